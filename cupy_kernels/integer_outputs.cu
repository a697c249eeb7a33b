// Outputs of an integer matrix product: the epilogue, one thread an output.
//
// Constants beside inference.cuh's: CHANNELS_LAST (layout of the outputs and the residual).
#include "inference.cuh"

extern "C" __global__ void __launch_bounds__(256, 1)
    integer_outputs(const int* __restrict__ sums,  // (G, rows of the product, pitch); CORRECTED: column O/G sums codes
                    output_element* __restrict__ out, EPILOGUE_PARAMETERS, const int groups, const int out_channels,
                    const int product_rows, const int pitch, const int images, const int windows) {
  const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)images * windows * out_channels) return;
  int channel, row;
  if (CHANNELS_LAST) {
    row = index / out_channels;
    channel = index - (size_t)row * out_channels;
  } else {
    const size_t plane = index / windows;
    channel = plane % out_channels;
    row = plane / out_channels * windows + index % windows;
  }
  const int group_channels = out_channels / groups, group = channel / group_channels;
  const int* line = sums + ((size_t)group * product_rows + row) * pitch;
  const Epilogue epilogue{multiplier, bias, constant, correction, residual, relu};
  const int sum_of_codes = CORRECTED ? line[group_channels] : 0;
  out[index] =
      epilogue.finish(line[channel - group * group_channels], sum_of_codes, epilogue.channel(channel), index);
}
