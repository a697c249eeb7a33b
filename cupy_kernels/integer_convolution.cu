// Implicit GEMM on tensor cores with the border in its prologue: columns never reach memory. Channels last.
//
// A block makes OUTPUTS output channels of one group for 64 windows. For 32 input channels at a time it writes the codes
// of STAGE positions of all its windows to shared memory, each once, then multiplies them by weights which each lane
// reads from memory as it needs them (packed ahead in the order of mma.sync's fragments).
// Constants beside inference.cuh's (WIDTH is 4): OUTPUTS, STAGE.
#include "inference.cuh"

constexpr int WINDOWS = 64, DEPTH = 32, THREADS = 256;
// Two blocks on a multiprocessor, so that one quantizes while the other multiplies; one where registers do not suffice.
#define BLOCKS (OUTPUTS == 256 && QUANTIZER == QUANTIZER_BORDER && (CORRECTED || __CUDA_ARCH__ < 900) ? 1 : 2)
constexpr bool ONE_STAGE = POSITIONS <= STAGE;
constexpr int TILES = OUTPUTS / 32;  // of 8 outputs, for each of 4 groups of warps

#ifdef CUDA_ON_CPU
__device__ __forceinline__ void multiply_add(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated_mma(d, a, b0, b1);
}
#else
// d += a b with a (16, 32) and b (32, 8), int8, shared out over the warp as PTX's mma.m16n8k32 has it.
__device__ __forceinline__ void multiply_add(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// The word of shared memory that holds 4 channels of a window: rows of 8 words, swizzled against bank conflicts.
__device__ __forceinline__ int word_of(int window, int word) { return window * 8 + (word ^ (window & 4)); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    integer_convolution(QUANTIZER_PARAMETERS,
                        const uint2* __restrict__ weight,  // (G, C/G / 32, K, tiles of 8 outputs, 32 lanes)
                        output_element* __restrict__ out, EPILOGUE_PARAMETERS, const int groups,
                        const int out_channels, GEOMETRY) {
  __shared__ unsigned codes[STAGE][WINDOWS * 8];
  const int group_channels = channels / groups, group_outputs = out_channels / groups;
  const int blocks_a_group = (group_outputs + OUTPUTS - 1) / OUTPUTS, all_tiles = (group_outputs + 7) / 8;
  const int group = blockIdx.y / blocks_a_group, first_output = blockIdx.y % blocks_a_group * OUTPUTS;
  const int all_rows = images * rows * columns, first_row = blockIdx.x * WINDOWS;
  const int chunks = (group_channels + DEPTH - 1) / DEPTH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int window_half = warp % 2 * 32, first_tile = first_output / 8 + warp / 2 * TILES;
  const Quantizer quantizer{Grid(*scale, zero_point, levels), border, alpha, thresholds, channels, offset};

  int sums[2][TILES][4], sums_of_codes[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      sums_of_codes[i][j] = 0;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) sums[i][tile][j] = 0;
    }

  for (int chunk = 0; chunk < chunks; chunk++) {
    const int in_group = chunk * DEPTH + threadIdx.x % 8 * 4;
    const int channel = group * group_channels + in_group;
    float kept_b[ONE_STAGE ? 1 : 2][WIDTH];
    for (int stage = 0; stage < POSITIONS; stage += STAGE) {
      const int staged = min(STAGE, POSITIONS - stage);
      __syncthreads();
#pragma unroll(ONE_STAGE ? 1 : 2)
      for (int half = 0; half < 2; half++) {
        float(&b)[WIDTH] = kept_b[ONE_STAGE ? 0 : half];
        const int window = threadIdx.x / 8 + half * 32, row = first_row + window;
        const bool exists = row < all_rows && in_group < group_channels;
        const Place place(exists ? row : 0, rows, columns, stride_y, stride_x, padding_y, padding_x);
        const input_element* image = x + (size_t)place.image * channels * height * width + (exists ? channel : 0);
        const auto read = [&](int position, Elements& elements) {
          const int y = place.y + position / KERNEL_WIDTH * dilation_y;
          const int x = place.x + position % KERNEL_WIDTH * dilation_x;
          if ((unsigned)y >= (unsigned)height || (unsigned)x >= (unsigned)width) return false;
          elements = neighbours(image + ((size_t)y * width + x) * channels);
          return true;
        };
        if (QUANTIZER == QUANTIZER_BORDER && FUSED && exists && stage == 0)
          quantizer.fused_border(channel, read, b);
        for (int i = 0; i < staged; i++)
          codes[i][word_of(window, threadIdx.x % 8)] =
              exists ? quantizer.quantize(stage + i, channel, read, b) : 0u;
      }
      __syncthreads();
      const size_t step = (size_t)((group * chunks + chunk) * POSITIONS + stage) * all_tiles * 32;
      const uint2* fragments = weight + step + (size_t)first_tile * 32 + lane;
      for (int i = 0; i < staged; i++, fragments += (size_t)all_tiles * 32) {
        unsigned a[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int word = 0; word < 4; word++)
            a[half][word] =
                codes[i][word_of(window_half + half * 16 + word % 2 * 8 + lane / 4, word / 2 * 4 + lane % 4)];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const uint2 fragment = first_tile + tile < all_tiles ? fragments[tile * 32] : make_uint2(0u, 0u);
          multiply_add(sums[0][tile], a[0], fragment.x, fragment.y);
          multiply_add(sums[1][tile], a[1], fragment.x, fragment.y);
        }
        if (CORRECTED) {  // times ones: the sums of the codes themselves
          multiply_add(sums_of_codes[0], a[0], 0x01010101u, 0x01010101u);
          multiply_add(sums_of_codes[1], a[1], 0x01010101u, 0x01010101u);
        }
      }
    }
  }

  const Epilogue epilogue{multiplier, bias, constant, correction, residual, relu};
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int lower = 0; lower < 2; lower++) {
      const int row = first_row + window_half + half * 16 + lower * 8 + lane / 4;
      if (row >= all_rows) continue;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int output = (first_tile + tile) * 8 + lane % 4 * 2 + i;
          if (output >= group_outputs) continue;
          const int o = group * group_outputs + output;
          const size_t index = (size_t)row * out_channels + o;
          out[index] = epilogue.finish(sums[half][tile][lower * 2 + i], sums_of_codes[half][lower * 2], o, index);
        }
    }
}
