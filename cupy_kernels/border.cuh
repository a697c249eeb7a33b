// The specification's arithmetic on a device, each operation rounded as reference.py rounds it, so that equal inputs
// give equal codes. Compile with --fmad=false: a contraction the source does not ask for would change codes.
//
// Constants given to the compiler: KERNEL_HEIGHT, KERNEL_WIDTH, BORDERED, TERMS (coefficients of Eq. 8), BOUND,
// FUSED (Eq. 9), LEARNED_ALPHA, and those of specification.py.

#define BOUND_STEEP 0
#define BOUND_STRETCHED 1
#define BOUND_CLIP 2

// Geometry of im2col, as every kernel takes it.
#define GEOMETRY                                                                                             \
  const int images, const int channels, const int height, const int width, const int rows, const int columns, \
      const int stride_y, const int stride_x, const int padding_y, const int padding_x, const int dilation_y, \
      const int dilation_x

[[maybe_unused]] constexpr int POSITIONS = KERNEL_HEIGHT * KERNEL_WIDTH;

// Unlike fminf and fmaxf, minimum and maximum of a NaN are NaN, as in torch.
#ifdef CUDA_ON_CPU
__device__ __forceinline__ float approximate_reciprocal(float value) { return emulated_reciprocal(value); }
__device__ __forceinline__ float minimum(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float maximum(float a, float b) { return a > b || a != a ? a : b; }
#else
__device__ __forceinline__ float approximate_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ float minimum(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float maximum(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

__device__ __forceinline__ float clamp(float value, float low, float high) {
  return maximum(minimum(value, high), low);
}

// ceil of a value well below 2^22, by additions: a conversion has a quarter of their rate.
__device__ __forceinline__ float ceil_of(float value) {
  const float magic = 12582912.0f;  // 1.5 * 2^23
  const float nearest = (value + magic) - magic;
  return nearest >= value ? nearest : nearest + 1.0f;
}

// numerator / denominator, correctly rounded, from the denominator's correctly rounded reciprocal: two corrections
// without the branches of a general division. Neither may be near the ends of the fp32 range.
__device__ __forceinline__ float quotient(float numerator, float denominator, float reciprocal) {
  float result = numerator * reciprocal;
  result = __fmaf_rn(__fmaf_rn(-denominator, result, numerator), reciprocal, result);
  return __fmaf_rn(__fmaf_rn(-denominator, result, numerator), reciprocal, result);
}

// sigmoid(w) - 1/2 by the specification's rational function; its denominator lies between 1 and 12.
__device__ __forceinline__ float sigmoid_minus_half(float w) {
  w = clamp(w, -SIGMOID_LIMIT, SIGMOID_LIMIT);
  const float z = w * w;
  const float numerator = ((z * SIGMOID_P2 + SIGMOID_P1) * z + SIGMOID_P0) * w;
  const float denominator = (z * SIGMOID_Q2 + SIGMOID_Q1) * z + 1.0f;
  float reciprocal = approximate_reciprocal(denominator);
  reciprocal = __fmaf_rn(reciprocal, __fmaf_rn(-denominator, reciprocal, 1.0f), reciprocal);
  // One correction is enough for every w: tests/cupy_kernels/test_on_gpu.py goes through all of them.
  const float rough = numerator * reciprocal;
  return __fmaf_rn(__fmaf_rn(-denominator, rough, numerator), reciprocal, rough);
}

// Eq. 8.
__device__ __forceinline__ float polynomial(float u, float b0, float b1, float b2) {
  return (TERMS == 3 ? (u * b2 + b1) * u : u * b1) + b0;
}

// e, the shift v kept within [-1/2, 1/2] (appendix B).
__device__ __forceinline__ float bounded_shift(float v) {
  if (BOUND == BOUND_STEEP) return sigmoid_minus_half(v * SCALE_OF_BOUND);
  if (BOUND == BOUND_STRETCHED) return clamp(sigmoid_minus_half(v) * SCALE_OF_BOUND, -0.5f, 0.5f);
  return clamp(v, -0.5f, 0.5f);
}

// The grid of one layer's input: t = x / s + z and u = clip(t, 0, Q) / Q.
struct Grid {
  float scale, reciprocal, zero_point, levels, inverse_levels;

  __device__ __forceinline__ Grid(float scale, float zero_point, float levels)
      : scale(scale),
        reciprocal(1.0f / scale),
        zero_point(zero_point),
        levels(levels),
        inverse_levels(1.0f / levels) {}

  // Far outside the codes nothing changes, but infinity gets an end code.
  __device__ __forceinline__ float t(float x) const {
    const float rough = x * reciprocal;
    const float exact = quotient(x, scale, reciprocal);
    const float ratio = fabsf(rough) < 1048576.0f ? exact : rough;  // an infinite ratio cannot be corrected
    return clamp(ratio + zero_point, -2.0f, levels + 2.0f);
  }

  __device__ __forceinline__ float u(float t) const { return clamp(t, 0.0f, levels) * inverse_levels; }
};

// One window of im2col: which image, and the element that its position (0, 0) covers.
struct Place {
  int image, window, y, x;

  __device__ __forceinline__ Place(int row, int rows, int columns, int stride_y, int stride_x, int padding_y,
                                   int padding_x) {
    image = row / (rows * columns);
    window = row - image * (rows * columns);
    y = window / columns;
    x = (window - y * columns) * stride_x - padding_x;
    y = y * stride_y - padding_y;
  }
};
