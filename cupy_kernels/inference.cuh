// What the integer kernels share: from the elements of a window to codes, and from integer sums to outputs.
//
// Constants beside border.cuh's:
//   QUANTIZER   how codes come about: QUANTIZER_NEAREST, _BORDER, _THRESHOLDS, or _CODES (the input is codes already)
//   INPUT       ELEMENT_FLOAT, ELEMENT_HALF or ELEMENT_CODE
//   OUTPUT      ELEMENT_FLOAT or ELEMENT_HALF
//   LEVELS      2^M - 1, so many thresholds has a position
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
};
typedef Neighbours<input_element> Elements;
template <class T>
__device__ __forceinline__ const Neighbours<T>& neighbours(const T* first) {
  return *reinterpret_cast<const Neighbours<T>*>(first);
}

// The quantizer of one layer's input, by (position, channel), the channel fastest.
struct Quantizer {
  Grid grid;
  const float *border, *alpha;      // (K, P, C) and (K, C)
  const input_element* thresholds;  // (K, LEVELS, C)
  int channels, offset;             // stored is q - offset

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

  // The same by thresholds: how many of them lie below.
  __device__ __forceinline__ unsigned codes_by_thresholds(const Elements& elements, int position, int channel) const {
    const input_element* row = thresholds + (size_t)position * LEVELS * channels + channel;
    unsigned packed = 0;
#if INPUT == ELEMENT_HALF && WIDTH == 4
    // Halves from 1024 to 2047 hold whole numbers in their low bits; the 256 keeps q - offset within them.
    const unsigned start = 0x6500u - offset;
    unsigned low = start << 16 | start, high = low;
    const unsigned* x = reinterpret_cast<const unsigned*>(&elements);
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
      const Elements at_level = neighbours(row + level * channels);
      const unsigned* threshold = reinterpret_cast<const unsigned*>(&at_level);
      low = add_where_above(x[0], threshold[0], low);
      high = add_where_above(x[1], threshold[1], high);
    }
    packed = __byte_perm(low, high, 0x6420);
#else
    int count[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) count[i] = -offset;
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
      const Elements at_level = neighbours(row + level * channels);
#pragma unroll
      for (int i = 0; i < WIDTH; i++)
        count[i] += ElementOf<INPUT>::read(elements.value[i]) > ElementOf<INPUT>::read(at_level.value[i]);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) packed |= (unsigned)(count[i] & 255) << 8 * i;
#endif
    return packed;
  }

  __device__ __forceinline__ void to_t(const Elements& elements, bool inside, float (&t)[WIDTH]) const {
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      t[i] = inside ? grid.t(ElementOf<INPUT>::read(elements.value[i])) : grid.zero_point;
  }

  // e of WIDTH channels at one position.
  __device__ __forceinline__ void shifts(const float (&t)[WIDTH], int position, int channel, float (&e)[WIDTH]) const {
    const float* row = border + (size_t)position * TERMS * channels + channel;
    const Neighbours<float> b0 = neighbours(row), b1 = neighbours(row + channels),
                            b2 = neighbours(row + (TERMS == 3 ? 2 * channels : 0));
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      e[i] = bounded_shift(polynomial(grid.u(t[i]), b0.value[i], b1.value[i], b2.value[i]));
  }

  // The padding's code, which stands for 0.
  __device__ __forceinline__ unsigned codes_of_padding() const {
    const unsigned code = (unsigned)((int)grid.zero_point - offset) & 255;
    return WIDTH == 4 ? code * 0x01010101u : code;
  }

  // Eq. 9's B of WIDTH channels over one window; read(position, elements) tells whether the position is inside.
  template <class Read>
  __device__ __forceinline__ void fused_border(int channel, const Read& read, float (&b)[WIDTH]) const {
    float total[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) total[i] = 0.0f;
#pragma unroll 1
    for (int position = 0; position < POSITIONS; position++) {
      Elements elements;
      float t[WIDTH], e[WIDTH];
      const bool inside = read(position, elements);
      to_t(elements, inside, t);
      shifts(t, position, channel, e);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        if (LEARNED_ALPHA) e[i] *= alpha[(size_t)position * channels + channel + i];
        total[i] += e[i];
      }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; i++) b[i] = total[i] * (1.0f / POSITIONS) + 0.5f;
  }

  // Codes of WIDTH channels at one position; ``b`` is fused_border's, and otherwise computed here.
  template <class Read>
  __device__ __forceinline__ unsigned quantize(int position, int channel, const Read& read,
                                               const float (&b)[WIDTH]) const {
    Elements elements;
    if (!read(position, elements)) return codes_of_padding();
#if QUANTIZER == QUANTIZER_CODES
    return WIDTH == 4 ? *reinterpret_cast<const unsigned*>(&elements) : (unsigned)(unsigned char)elements.value[0];
#elif QUANTIZER == QUANTIZER_THRESHOLDS
    return codes_by_thresholds(elements, position, channel);
#else
    float t[WIDTH], b_here[WIDTH];
    to_t(elements, true, t);
    if (QUANTIZER == QUANTIZER_BORDER && !FUSED) shifts(t, position, channel, b_here);
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
      b_here[i] = QUANTIZER == QUANTIZER_NEAREST ? 0.5f : FUSED ? b[i] : b_here[i] + 0.5f;
    return codes(t, b_here);
#endif
  }
};

#define QUANTIZER_PARAMETERS                                                                                     \
  const input_element *__restrict__ x, const float *__restrict__ scale, const float *__restrict__ border,        \
      const float *__restrict__ alpha, const input_element *__restrict__ thresholds, const float zero_point,     \
      const float levels, const int offset

// From integer sums to outputs. All by output channel; float operations are rounded one by one.
struct Epilogue {
  const float *multiplier, *bias;     // s_w s_x, and the float bias
  const int *constant, *correction;   // the zero-points' terms: constant + correction (sum of the window's codes)
  const output_element* residual;     // of the output's layout, or null
  int relu;

  __device__ __forceinline__ output_element finish(int sum, int sum_of_codes, int channel, size_t index) const {
    int total = sum + constant[channel];
    if (CORRECTED) total += correction[channel] * sum_of_codes;
    float value = (float)total * multiplier[channel] + bias[channel];
    if (residual) value += ElementOf<OUTPUT>::read(residual[index]);
    if (relu) value = value < 0.0f ? 0.0f : value;
    return ElementOf<OUTPUT>::write(value);
  }
};

#define EPILOGUE_PARAMETERS                                                                                \
  const float *__restrict__ multiplier, const float *__restrict__ bias, const int *__restrict__ constant,  \
      const int *__restrict__ correction, const output_element *__restrict__ residual, const int relu
