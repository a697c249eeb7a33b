// A depthwise convolution of quantized inputs, channels last: codes, sum over the window and epilogue in one pass.
#include "inference.cuh"

extern "C" __global__ void __launch_bounds__(256, 1)
    integer_depthwise(QUANTIZER_PARAMETERS, const signed char* __restrict__ weight,  // (K, C)
                      output_element* __restrict__ out, EPILOGUE_PARAMETERS, GEOMETRY) {
  const size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int runs = channels / WIDTH;
  if (index >= (size_t)images * rows * columns * runs) return;
  const int row = index / runs, channel = (index - (size_t)row * runs) * WIDTH;
  const Place place(row, rows, columns, stride_y, stride_x, padding_y, padding_x);
  const input_element* image = x + (size_t)place.image * channels * height * width;
  const auto read = [&](int, int position, Elements& elements) {
    const int y = place.y + position / KERNEL_WIDTH * dilation_y, x = place.x + position % KERNEL_WIDTH * dilation_x;
    if ((unsigned)y >= (unsigned)height || (unsigned)x >= (unsigned)width) return false;
    elements = neighbours(image + ((size_t)y * width + x) * channels + channel);
    return true;
  };
  const Quantizer quantizer(Grid(*scale, zero_point, levels), border, alpha, thresholds, channels, offset);
  float b[1][WIDTH];
  int sums[WIDTH], sums_of_codes[WIDTH];
  quantizer.fused_borders<1>(channel, read, b);
#pragma unroll
  for (int i = 0; i < WIDTH; i++) sums[i] = sums_of_codes[i] = 0;
  const Quantizer::parameter* row_of_parameters = quantizer.first_parameters(channel);
#pragma unroll(POSITIONS <= 9 ? POSITIONS : 1)
  for (int position = 0; position < POSITIONS; position++, row_of_parameters += quantizer.stride()) {
    Elements elements = Elements();
    const bool inside = read(0, position, elements);
    const unsigned codes = quantizer.quantize(inside, elements, quantizer.parameters(row_of_parameters), b[0]);
    const Neighbours<signed char> weights = neighbours(weight + (size_t)position * channels + channel);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const int code = (signed char)(codes >> 8 * i & 255);
      sums[i] += code * weights.value[i];
      sums_of_codes[i] += code;
    }
  }
  const Epilogue epilogue{multiplier, bias, constant, correction, residual, relu};
  const size_t first = (size_t)row * channels + channel;
  struct alignas(WIDTH * sizeof(output_element)) Outputs {
    output_element value[WIDTH];
  } outputs;
#pragma unroll
  for (int i = 0; i < WIDTH; i++)
    outputs.value[i] = epilogue.finish(sums[i], sums_of_codes[i], epilogue.channel(channel + i), first + i);
  *reinterpret_cast<Outputs*>(out + first) = outputs;
}
