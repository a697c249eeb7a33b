// What the forward and the backward of reconstruction share: a window's elements, its shifts and its border.
//
// Constants beside border.cuh's: ROUNDED (the rounding schedule is known to be over), SUMMED (a depthwise
// convolution's weighted sum is wanted, not columns).
#include "border.cuh"

// Values of a window's positions are held in registers where they are few, else computed again.
constexpr bool KEPT = POSITIONS <= 9;
#define EACH_POSITION _Pragma("unroll (KEPT ? POSITIONS : 1)") for (int position = 0; position < POSITIONS; position++)

// One channel's coefficients by position, and alpha.
struct Coefficients {
  const float *border, *alpha;  // of the channel: border[term * stride + position], alpha[position]
  size_t stride;

  __device__ __forceinline__ float term(int degree, int position) const {
    return degree < TERMS ? border[degree * stride + position] : 0.0f;
  }
  __device__ __forceinline__ float v(float u, int position) const {
    return polynomial(u, term(0, position), term(1, position), term(2, position));
  }
};

// The elements under one window of one channel's (H, W) plane.
struct Window {
  const float* plane;
  int y, x, height, width, dilation_y, dilation_x;

  __device__ __forceinline__ int element(int position) const {  // -1 in the padding
    const int row = y + position / KERNEL_WIDTH * dilation_y, column = x + position % KERNEL_WIDTH * dilation_x;
    return (unsigned)row < (unsigned)height && (unsigned)column < (unsigned)width ? row * width + column : -1;
  }
  __device__ __forceinline__ float t(int position, const Grid& grid) const {
    const int index = element(position);
    return index < 0 ? grid.zero_point : grid.t(plane[index]);
  }
};

// t + a (ceil(t - B) - t), appendix Eq. 2 before its clip.
__device__ __forceinline__ float softened(float t, float b, float rounding) {
  const float rounded = ceil_of(t - b);
  return ROUNDED ? rounded : (rounded - t) * rounding + t;
}
