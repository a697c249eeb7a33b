// Implicit GEMM on tensor cores with the border in its prologue: columns never reach memory. Channels last.
//
// A block makes OUTPUTS output channels of one group for WINDOWS windows. For 32 input channels at a time it writes the codes
// of STAGE positions of all its windows to shared memory, each once, then multiplies them by weights which each lane
// reads from memory as it needs them (packed ahead in the order of mma.sync's fragments).
// Constants beside inference.cuh's (WIDTH is 4): WINDOWS, 64 or 128; OUTPUTS; STAGE; PAIRED, the number of a group's
// output channels is even.
#include "inference.cuh"

constexpr int DEPTH = 32, THREADS = 256;
constexpr int ROWS_OF_WARPS = WINDOWS / 32, COLUMNS_OF_WARPS = 8 / ROWS_OF_WARPS;
constexpr int TILES = OUTPUTS / 8 / COLUMNS_OF_WARPS;  // of 8 outputs, for one warp
constexpr int OWN = WINDOWS / 32;                      // windows that a thread quantizes
constexpr int NOWHERE = -(1 << 28);  // a row of no map: windows beyond the last are all padding, and never written
constexpr bool ONE_STAGE = POSITIONS <= STAGE;
// Positions of a row of the window share its address, where there are registers for that.
constexpr int UNROLLED = ONE_STAGE && TILES < 8 && OWN == 2 ? KERNEL_WIDTH : 1;
// Two blocks on a multiprocessor, so that one quantizes while the other multiplies; one where registers do not suffice.
constexpr bool FEW_REGISTERS =
    POSITIONS <= 9 && !CORRECTED && (QUANTIZER == QUANTIZER_NEAREST || (QUANTIZER == QUANTIZER_THRESHOLDS && LEVELS <= 3));
constexpr int BLOCKS = TILES == 8 && !FEW_REGISTERS ? 1 : 2;

#ifdef CUDA_ON_CPU
__device__ __forceinline__ void multiply_add(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  emulated_mma(d, a, b0, b1);
}
__device__ __forceinline__ void load_fragment(unsigned (&a)[4], const unsigned* row) { emulated_ldmatrix(a, row); }
#else
// d += a b with a (16, 32) and b (32, 8), int8, shared out over the warp as PTX's mma.m16n8k32 has it.
__device__ __forceinline__ void multiply_add(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_fragment(unsigned (&a)[4], const unsigned* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
}
#endif

// The word of shared memory that holds 4 channels of a window: rows of 8 words, swizzled against bank conflicts.
__device__ __forceinline__ int word_of(int window, int word) { return window * 8 + (word ^ (window & 4)); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    integer_convolution(QUANTIZER_PARAMETERS,
                        const uint2* __restrict__ weight,  // (G, C/G / 32, K, tiles of 8 outputs, 32 lanes)
                        output_element* __restrict__ out, EPILOGUE_PARAMETERS, const int groups,
                        const int out_channels, GEOMETRY) {
  __shared__ __align__(16) unsigned codes[STAGE][WINDOWS * 8];
  const int group_channels = channels / groups, group_outputs = out_channels / groups;
  const int blocks_a_group = (group_outputs + OUTPUTS - 1) / OUTPUTS, all_tiles = (group_outputs + 7) / 8;
  const int group = blockIdx.y / blocks_a_group, first_output = blockIdx.y % blocks_a_group * OUTPUTS;
  const int all_rows = images * rows * columns, first_row = blockIdx.x * WINDOWS;
  const int chunks = (group_channels + DEPTH - 1) / DEPTH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_window = warp % ROWS_OF_WARPS * 32, first_tile = first_output / 8 + warp / ROWS_OF_WARPS * TILES;
  const Quantizer quantizer(Grid(*scale, zero_point, levels), border, alpha, thresholds, channels, offset);

  // In the prologue a thread takes 4 channels of OWN windows.
  const int own_word = threadIdx.x % 8, own_window = threadIdx.x / 8;
  const input_element* own_first[OWN];  // the element under position (0, 0), if there is one
  int own_y[OWN], own_x[OWN];
#pragma unroll
  for (int own = 0; own < OWN; own++) {
    const int row = first_row + own_window + own * 32;
    const Place place(row < all_rows ? row : 0, rows, columns, stride_y, stride_x, padding_y, padding_x);
    own_y[own] = row < all_rows ? place.y : NOWHERE;
    own_x[own] = place.x;
    own_first[own] = x + ((long long)place.image * height * width + place.y * width + place.x) * channels +
                     group * group_channels + own_word * 4;
  }
  const Parameters uniform = UNIFORM ? quantizer.parameters(quantizer.all_parameters()) : Parameters();

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
    const bool channel_exists = chunk * DEPTH + own_word * 4 < group_channels;
    const int channel = group * group_channels + (channel_exists ? chunk * DEPTH + own_word * 4 : 0);
    const auto read = [&](int own, int position, Elements& elements) {
      const int y = position / KERNEL_WIDTH * dilation_y, x = position % KERNEL_WIDTH * dilation_x;
      const input_element* source = own_first[own] + ((y * width + x) * channels + chunk * DEPTH);
      const bool inside = channel_exists && (unsigned)(own_y[own] + y) < (unsigned)height &&
                          (unsigned)(own_x[own] + x) < (unsigned)width;
      if (inside) elements = neighbours(source);
      return inside;
    };
    float b[OWN][WIDTH];
    quantizer.fused_borders<OWN>(channel, read, b);
    const Quantizer::parameter* parameters = quantizer.first_parameters(channel);
    for (int stage = 0; stage < POSITIONS; stage += STAGE) {
      const int staged = ONE_STAGE ? POSITIONS : min(STAGE, POSITIONS - stage);
      __syncthreads();
#pragma unroll(UNROLLED)
      for (int i = 0; i < staged; i++, parameters += quantizer.stride()) {
        const Parameters given = UNIFORM ? uniform : quantizer.parameters(parameters);
#pragma unroll
        for (int own = 0; own < OWN; own++) {
          Elements elements = Elements();
          const bool inside = read(own, stage + i, elements);
          const unsigned found = quantizer.quantize(inside, elements, given, b[own]);
          codes[i][word_of(own_window + own * 32, own_word)] = channel_exists ? found : 0u;
        }
      }
      __syncthreads();
      const size_t step = (size_t)((group * chunks + chunk) * POSITIONS + stage) * all_tiles * 32;
      const uint2* fragments = weight + step + (size_t)first_tile * 32 + lane;
      for (int i = 0; i < staged; i++, fragments += all_tiles * 32) {
        unsigned a[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++)
          load_fragment(a[half], &codes[i][word_of(warp_window + half * 16 + lane % 16, lane / 16 * 4)]);
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
  struct alignas(2 * sizeof(output_element)) Pair {
    output_element value[2];
  };
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    const int output = (first_tile + tile) * 8 + lane % 4 * 2, o = group * group_outputs + output;
    if (output >= group_outputs) continue;
    const bool second_exists = output + 1 < group_outputs;
    const Epilogue::Channel first = epilogue.channel(o), second = epilogue.channel(second_exists ? o + 1 : o);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int lower = 0; lower < 2; lower++) {
        const int row = first_row + warp_window + half * 16 + lower * 8 + lane / 4;
        if (row >= all_rows) continue;
        const size_t index = (size_t)row * out_channels + o;
        const int of_codes = sums_of_codes[half][lower * 2];
        const int(&sum)[4] = sums[half][tile];
        Pair pair;
        pair.value[0] = epilogue.finish(sum[lower * 2], of_codes, first, index);
        if (PAIRED) {
          pair.value[1] = epilogue.finish(sum[lower * 2 + 1], of_codes, second, index + 1);
          *reinterpret_cast<Pair*>(out + index) = pair;
        } else {
          out[index] = pair.value[0];
          if (second_exists) out[index + 1] = epilogue.finish(sum[lower * 2 + 1], of_codes, second, index + 1);
        }
      }
  }
}
