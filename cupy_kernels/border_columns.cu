// Quantized im2col columns for reconstruction, reference.forward: x_hat = s (q~ - z), one thread a window and channel.
#include "training.cuh"

extern "C" __global__ void __launch_bounds__(256, 1)
    border_columns(const float* __restrict__ x,         // (N, C, H, W)
                   const float* __restrict__ scale,     // ()
                   const float* __restrict__ border,    // (P, C, K)
                   const float* __restrict__ alpha,     // (C, K)
                   const float* __restrict__ rounding,  // ()
                   const float* __restrict__ taps,      // (C, K)
                   float* __restrict__ out,             // (N, C K, L), or (N, C, L) if SUMMED
                   GEOMETRY, const float levels, const float zero_point) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x, channel = blockIdx.y;
  if (row >= images * rows * columns) return;
  const Place place(row, rows, columns, stride_y, stride_x, padding_y, padding_x);
  const size_t plane = (size_t)place.image * channels + channel, windows = rows * columns;
  const Window window{x + plane * height * width, place.y, place.x, height, width, dilation_y, dilation_x};
  const Grid grid(*scale, zero_point, levels);
  const Coefficients coefficients{border + channel * POSITIONS, alpha + channel * POSITIONS,
                                  (size_t)channels * POSITIONS};
  const float a = ROUNDED ? 1.0f : *rounding;
  float t[KEPT ? POSITIONS : 1];
  float b = 0.5f, sum = 0.0f;
  if (BORDERED && FUSED) {
    float total = 0.0f;
    EACH_POSITION {
      const float here = window.t(position, grid);
      if (KEPT) t[position] = here;
      float e = bounded_shift(coefficients.v(grid.u(here), position));
      if (LEARNED_ALPHA) e *= coefficients.alpha[position];
      total += e;
    }
    b = total * (1.0f / POSITIONS) + 0.5f;
  }
  EACH_POSITION {
    const bool inside = window.element(position) >= 0;
    const float here = KEPT && BORDERED && FUSED ? t[position] : window.t(position, grid);
    if (BORDERED && !FUSED) b = bounded_shift(coefficients.v(grid.u(here), position)) + 0.5f;
    const float q = clamp(softened(here, b, a), 0.0f, levels);
    const float value = inside ? (q - zero_point) * grid.scale : 0.0f;
    if (SUMMED)
      sum += value * taps[channel * POSITIONS + position];
    else
      out[(plane * POSITIONS + position) * windows + place.window] = value;
  }
  if (SUMMED) out[plane * windows + place.window] = sum;
}
