// What the integer kernels share: from the elements of a window to codes, and from integer sums to outputs.
//
// Constants beside border.cuh's:
//   QUANTIZER   how codes come about: QUANTIZER_NEAREST, _BORDER, _THRESHOLDS, or _CODES (the input is codes already)
//   INPUT       ELEMENT_FLOAT, ELEMENT_HALF or ELEMENT_CODE
//   OUTPUT      ELEMENT_FLOAT or ELEMENT_HALF
//   LEVELS      2^M - 1, so many thresholds has a position
//   UNIFORM     thresholds are the same for all positions and channels
//   WIDTH       neighbouring channels that a thread takes at once: 1 or 4
//   CORRECTED   weights have 8 bits, so their zero-points are still to be accounted for
#include "border.cuh"

#define QUANTIZER_NEAREST 0
#define QUANTIZER_BORDER 1
#define QUANTIZER_THRESHOLDS 2
#define QUANTIZER_CODES 3
#define ELEMENT_FLOAT 0
#define ELEMENT_HALF 1
#define ELEMENT_CODE 2

typedef unsigned short half_bits;

#ifdef CUDA_ON_CPU
__device__ __forceinline__ float half_to_float(half_bits value) { return emulated_half_to_float(value); }
__device__ __forceinline__ half_bits float_to_half(float value) { return emulated_float_to_half(value); }
__device__ __forceinline__ unsigned add_where_above(unsigned x, unsigned threshold, unsigned sum) {
  unsigned result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const bool above = half_to_float(x >> shift & 0xffff) > half_to_float(threshold >> shift & 0xffff);
    result |= (unsigned)float_to_half(half_to_float(sum >> shift & 0xffff) + (above ? 1.0f : 0.0f)) << shift;
  }
  return result;
}
#else
__device__ __forceinline__ float half_to_float(half_bits value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  return result;
}
__device__ __forceinline__ half_bits float_to_half(float value) {
  half_bits result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return result;
}
// Two halves at once: sum + (x > threshold ? 1 : 0).
__device__ __forceinline__ unsigned add_where_above(unsigned x, unsigned threshold, unsigned sum) {
  unsigned above, result;
  asm("set.gt.f16x2.f16x2 %0, %1, %2;" : "=r"(above) : "r"(x), "r"(threshold));
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(above), "r"(sum));
  return result;
}
#endif

template <int KIND>
struct ElementOf;
template <>
struct ElementOf<ELEMENT_FLOAT> {
  typedef float type;
  static __device__ __forceinline__ float read(float value) { return value; }
  static __device__ __forceinline__ float write(float value) { return value; }
};
template <>
struct ElementOf<ELEMENT_HALF> {
  typedef half_bits type;
  static __device__ __forceinline__ float read(half_bits value) { return half_to_float(value); }
  static __device__ __forceinline__ half_bits write(float value) { return float_to_half(value); }
};
template <>
struct ElementOf<ELEMENT_CODE> {
  typedef signed char type;
  static __device__ __forceinline__ float read(signed char value) { return value; }
};
typedef ElementOf<INPUT>::type input_element;
typedef ElementOf<OUTPUT>::type output_element;

// WIDTH neighbouring values, loaded and stored as one.
template <class T>
struct alignas(sizeof(T) * WIDTH) Neighbours {
  T value[WIDTH];
  __device__ __forceinline__ T get(int i) const { return value[i]; }
};
#if WIDTH == 4
// Four halves are two words: taken apart only where they have to be.
template <>
struct alignas(8) Neighbours<half_bits> {
  unsigned word[2];
  __device__ __forceinline__ half_bits get(int i) const { return word[i / 2] >> i % 2 * 16; }
};
#endif
typedef Neighbours<input_element> Elements;
template <class T>
__device__ __forceinline__ const Neighbours<T>& neighbours(const T* first) {
  return *reinterpret_cast<const Neighbours<T>*>(first);
}

// What a position of the window has of its own, for WIDTH neighbouring channels.
struct Parameters {
#if QUANTIZER == QUANTIZER_THRESHOLDS
  Elements level[LEVELS];
#elif QUANTIZER == QUANTIZER_BORDER
  Neighbours<float> term[TERMS];
#endif
};

// The quantizer of one layer's input. Parameters lie by position, four channels, term or level, channel of the four.
struct Quantizer {
  Grid grid;
  const float *border, *alpha;      // (K, C / 4, P, 4) and (K, C)
  const input_element* thresholds;  // (K, C / 4, LEVELS, 4), or (LEVELS, 4) if UNIFORM
  int channels, offset;             // stored is q - offset
  unsigned padding;                 // WIDTH codes that stand for 0

  __device__ __forceinline__ Quantizer(const Grid& grid, const float* border, const float* alpha,
                                       const input_element* thresholds, int channels, int offset)
      : grid(grid), border(border), alpha(alpha), thresholds(thresholds), channels(channels), offset(offset) {
    padding = ((unsigned)((int)grid.zero_point - offset) & 255) * (WIDTH == 4 ? 0x01010101u : 1u);
  }

#if QUANTIZER == QUANTIZER_THRESHOLDS
  typedef input_element parameter;
  static constexpr int ROWS = LEVELS;
  __device__ __forceinline__ const parameter* all_parameters() const { return thresholds; }
#else
  typedef float parameter;
  static constexpr int ROWS = TERMS;
  __device__ __forceinline__ const parameter* all_parameters() const { return border; }
#endif

  // From one position's parameters to the next one's.
  __device__ __forceinline__ int stride() const { return UNIFORM ? 0 : (channels + 3) / 4 * 4 * ROWS; }

  __device__ __forceinline__ const parameter* first_parameters(int channel) const {
    return all_parameters() + (UNIFORM ? 0 : channel / 4 * 4 * ROWS) + (WIDTH == 4 ? 0 : channel % 4);
  }

  __device__ __forceinline__ Parameters parameters(const parameter* row) const {
    Parameters found;
#if QUANTIZER == QUANTIZER_THRESHOLDS
#pragma unroll
    for (int level = 0; level < LEVELS; level++) found.level[level] = neighbours(row + level * 4);
#elif QUANTIZER == QUANTIZER_BORDER
#pragma unroll
    for (int term = 0; term < TERMS; term++) found.term[term] = neighbours(row + term * 4);
#endif
    return found;
  }

  // Codes q - offset of WIDTH neighbouring channels, a byte each, from their t and B. A NaN gets the lowest code.
  __device__ __forceinline__ unsigned codes(const float (&t)[WIDTH], const float (&b)[WIDTH]) const {
    unsigned packed = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const float q = fminf(fmaxf(ceil_of(t[i] - b[i]), 0.0f), grid.levels);
      const int code = __float_as_int(q + 12582912.0f) - offset;  // q is in the low bits
      packed |= (unsigned)(code & 255) << 8 * i;
    }
    return packed;
  }

#if QUANTIZER == QUANTIZER_THRESHOLDS
  // The same by thresholds: how many of them lie below.
  __device__ __forceinline__ unsigned codes_by_thresholds(const Elements& elements, const Parameters& given) const {
#if INPUT == ELEMENT_HALF && WIDTH == 4
    // Halves from 1024 to 2047 hold whole numbers in their low bits; the 256 keeps q - offset within them.
    const unsigned start = 0x6500u - offset;
    unsigned low = start << 16 | start, high = low;
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
      low = add_where_above(elements.word[0], given.level[level].word[0], low);
      high = add_where_above(elements.word[1], given.level[level].word[1], high);
    }
    return __byte_perm(low, high, 0x6420);
#else
    unsigned packed = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      int count = -offset;
#pragma unroll
      for (int level = 0; level < LEVELS; level++)
        count += ElementOf<INPUT>::read(elements.get(i)) > ElementOf<INPUT>::read(given.level[level].get(i));
      packed |= (unsigned)(count & 255) << 8 * i;
    }
    return packed;
#endif
  }
#endif

  __device__ __forceinline__ void to_t(const Elements& elements, bool inside, float (&t)[WIDTH]) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      const float here = grid.t(ElementOf<INPUT>::read(elements.get(i)));
      t[i] = inside ? here : grid.zero_point;
    }
  }

#if QUANTIZER == QUANTIZER_BORDER
  // e of WIDTH channels.
  __device__ __forceinline__ void shifts(const float (&t)[WIDTH], const Parameters& given, float (&e)[WIDTH]) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      e[i] = bounded_shift(
          polynomial(grid.u(t[i]), given.term[0].value[i], given.term[1].value[i], given.term[TERMS - 1].value[i]));
  }
#endif

  // Eq. 9's B over COUNT windows, of WIDTH channels each; read(window, position, elements) tells whether the position
  // is inside. Nothing unless the border is fused.
  template <int COUNT, class Read>
  __device__ __forceinline__ void fused_borders(int channel, const Read& read, float (&b)[COUNT][WIDTH]) const {
#if QUANTIZER == QUANTIZER_BORDER && FUSED
#pragma unroll
    for (int window = 0; window < COUNT; window++)
#pragma unroll
      for (int i = 0; i < WIDTH; i++) b[window][i] = 0.0f;
    const parameter* row = first_parameters(channel);
#pragma unroll 1
    for (int position = 0; position < POSITIONS; position++, row += stride()) {
      const Parameters given = parameters(row);
#pragma unroll
      for (int window = 0; window < COUNT; window++) {
        Elements elements = Elements();
        float t[WIDTH], e[WIDTH];
        const bool inside = read(window, position, elements);
        to_t(elements, inside, t);
        shifts(t, given, e);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
          if (LEARNED_ALPHA) e[i] *= alpha[(size_t)position * channels + channel + i];
          b[window][i] += e[i];
        }
      }
    }
#pragma unroll
    for (int window = 0; window < COUNT; window++)
#pragma unroll
      for (int i = 0; i < WIDTH; i++) b[window][i] = b[window][i] * (1.0f / POSITIONS) + 0.5f;
#endif
  }

  // Codes of WIDTH channels at one position; ``b`` is used where the border is fused.
  __device__ __forceinline__ unsigned quantize(bool inside, const Elements& elements, const Parameters& given,
                                               const float (&b)[WIDTH]) const {
    const unsigned code = codes_inside(elements, given, b);
    return inside ? code : padding;
  }

  __device__ __forceinline__ unsigned codes_inside(const Elements& elements, const Parameters& given,
                                                   const float (&b)[WIDTH]) const {
#if QUANTIZER == QUANTIZER_CODES
    return WIDTH == 4 ? *reinterpret_cast<const unsigned*>(&elements) : (unsigned)(unsigned char)elements.get(0);
#elif QUANTIZER == QUANTIZER_THRESHOLDS
    return codes_by_thresholds(elements, given);
#elif QUANTIZER == QUANTIZER_BORDER && FUSED
    float t[WIDTH];
    to_t(elements, true, t);
    return codes(t, b);
#else
    float t[WIDTH], here[WIDTH];
    to_t(elements, true, t);
#if QUANTIZER == QUANTIZER_BORDER
    shifts(t, given, here);
#endif
#pragma unroll
    for (int i = 0; i < WIDTH; i++) here[i] = QUANTIZER == QUANTIZER_NEAREST ? 0.5f : here[i] + 0.5f;
    return codes(t, here);
#endif
  }
};

#define QUANTIZER_PARAMETERS                                                                                     \
  const input_element *__restrict__ x, const float *__restrict__ scale, const float *__restrict__ border,        \
      const float *__restrict__ alpha, const input_element *__restrict__ thresholds, const float zero_point,     \
      const float levels, const int offset

// From integer sums to outputs; float operations are rounded one by one.
struct Epilogue {
  const float *multiplier, *bias;    // by output channel: s_w s_x, and the float bias
  const int *constant, *correction;  // the zero-points' terms: constant + correction (sum of the window's codes)
  const output_element* residual;    // of the output's layout, or null
  int relu;

  // What one output channel has of its own.
  struct Channel {
    float multiplier, bias;
    int constant, correction;
  };
  __device__ __forceinline__ Channel channel(int o) const {
    return {multiplier[o], bias[o], constant[o], CORRECTED ? correction[o] : 0};
  }

  __device__ __forceinline__ output_element finish(int sum, int sum_of_codes, const Channel& of, size_t index) const {
    const int total = sum + of.constant + (CORRECTED ? of.correction * sum_of_codes : 0);
    float value = (float)total * of.multiplier + of.bias;
    if (residual) value += ElementOf<OUTPUT>::read(residual[index]);
    if (relu) value = value < 0.0f ? 0.0f : value;
    return ElementOf<OUTPUT>::write(value);
  }
};

#define EPILOGUE_PARAMETERS                                                                                \
  const float *__restrict__ multiplier, const float *__restrict__ bias, const int *__restrict__ constant,  \
      const int *__restrict__ correction, const output_element *__restrict__ residual, const int relu
