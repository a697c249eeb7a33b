// Quantized im2col for a matrix product: a row of int8 codes q - offset for each window, by group.
//
// A block takes a tile of WINDOWS windows and CHANNELS channels, gathers its codes in shared memory and writes them in
// whole runs. Constants beside inference.cuh's: WINDOWS, CHANNELS, CHANNELS_LAST (layout of x), LANES_ARE_CHANNELS
// (neighbouring threads take neighbouring channels, not windows).
#include "inference.cuh"

extern "C" __global__ void __launch_bounds__(256, 1)
    integer_columns(QUANTIZER_PARAMETERS,
                    signed char* __restrict__ out,  // (G, out_rows, row_bytes), order (channel, position), zeros at the end
                    const int groups, const int row_bytes, const int out_rows, GEOMETRY) {
  __shared__ signed char tile[WINDOWS][CHANNELS * POSITIONS];
  const int group = blockIdx.z, group_channels = channels / groups;
  const int first_row = blockIdx.x * WINDOWS, first_channel = blockIdx.y * CHANNELS;
  const int all_rows = images * rows * columns;
  const Quantizer quantizer(Grid(*scale, zero_point, levels), border, alpha, thresholds, channels, offset);
  for (int pair = threadIdx.x; pair < WINDOWS * CHANNELS; pair += blockDim.x) {
    const int window = LANES_ARE_CHANNELS ? pair / CHANNELS : pair % WINDOWS;
    const int in_tile = LANES_ARE_CHANNELS ? pair % CHANNELS : pair / WINDOWS;
    if (first_row + window >= all_rows || first_channel + in_tile >= group_channels) continue;
    const Place place(first_row + window, rows, columns, stride_y, stride_x, padding_y, padding_x);
    const int channel = group * group_channels + first_channel + in_tile;
    const input_element* image = x + (size_t)place.image * channels * height * width;
    const auto read = [&](int, int position, Elements& elements) {
      const int y = place.y + position / KERNEL_WIDTH * dilation_y, x = place.x + position % KERNEL_WIDTH * dilation_x;
      if ((unsigned)y >= (unsigned)height || (unsigned)x >= (unsigned)width) return false;
      const size_t pixel = (size_t)y * width + x;
      elements.value[0] = image[CHANNELS_LAST ? pixel * channels + channel : (size_t)channel * height * width + pixel];
      return true;
    };
    float b[1][WIDTH];
    quantizer.fused_borders<1>(channel, read, b);
    const Quantizer::parameter* row = quantizer.first_parameters(channel);
    for (int position = 0; position < POSITIONS; position++, row += quantizer.stride()) {
      Elements elements = Elements();
      const bool inside = read(0, position, elements);
      const unsigned code = quantizer.quantize(inside, elements, quantizer.parameters(row), b[0]);
      tile[window][in_tile * POSITIONS + position] = (signed char)code;
    }
  }
  __syncthreads();
  // The last tile of a row writes the zeros that follow it, too.
  const int begin = first_channel * POSITIONS, filled = min(CHANNELS, group_channels - first_channel) * POSITIONS;
  const bool last = first_channel + CHANNELS >= group_channels;
  const int run = last ? row_bytes - begin : filled;
  for (int i = threadIdx.x; i < WINDOWS * run; i += blockDim.x) {
    const int window = i / run, byte = i - window * run;
    if (first_row + window >= all_rows) break;
    out[((size_t)group * out_rows + first_row + window) * row_bytes + begin + byte] =
        byte < filled ? tile[window][byte] : (signed char)0;
  }
}
