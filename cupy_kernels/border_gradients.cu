// Gradients of reconstruction's columns, reference.backward: one block an (image, channel) plane, B computed again.
//
// Sums are taken in a fixed order and without atomics, so the same inputs give the same bits. At any one position the
// windows of a plane cover different elements: each position's gradients are added without a conflict, then the block
// waits for all. The host adds the planes' sums over the images.
//
// Constants beside training.cuh's: INPUT_GRADIENT, WRITE_COLUMNS, SHARED_MAP (the plane of x's gradient fits into
// shared memory, else it is built where it belongs).
#include "training.cuh"

constexpr bool HELD = KEPT && FUSED;  // a window's values between the two passes over its positions
constexpr int MOST_WARPS = 4, THREADS = 32 * MOST_WARPS;
constexpr int SUMS = 5;  // of b0, b1, b2, alpha and the tap

__device__ constexpr bool wanted(int sum) {
  return sum < 2 ? BORDERED : sum == 2 ? BORDERED && TERMS == 3 : sum == 3 ? LEARNED_ALPHA : SUMMED;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// How many of the sums before this one are wanted, and how many are in all.
__device__ constexpr int rank_of(int sum) { return sum == 0 ? 0 : rank_of(sum - 1) + wanted(sum - 1); }
constexpr int WANTED = rank_of(SUMS);
constexpr bool OWN = KEPT && WANTED > 0;

// Sums over the block of each position's quantities. Where positions are few, each thread has its own until the end, in
// shared memory: registers for them would halve the warps of a multiprocessor.
struct PositionSums {
  float (*own)[OWN ? WANTED : 1][THREADS];
  float (*shared)[POSITIONS][SUMS];  // by warp

  __device__ __forceinline__ void add(int position, int sum, float value) {
    if (OWN)
      own[position][rank_of(sum)][threadIdx.x] += value;
    else
      add_to_shared(position, sum, value);
  }
  __device__ __forceinline__ void add_to_shared(int position, int sum, float value) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32][position][sum] += value;
  }
  __device__ __forceinline__ void finish() {
    if (OWN) EACH_POSITION {
#pragma unroll
        for (int sum = 0; sum < SUMS; sum++)
          if (wanted(sum)) add_to_shared(position, sum, own[position][rank_of(sum)][threadIdx.x]);
      }
  }
};

// de/dv from v and e; the sigmoid's slope is (1/2 + h)(1/2 - h).
__device__ __forceinline__ float slope_of_shift(float v, float e) {
  if (BOUND == BOUND_STEEP) return (0.25f - e * e) * SCALE_OF_BOUND;
  if (BOUND == BOUND_STRETCHED) {
    const float h = e * (1.0f / SCALE_OF_BOUND);
    return fabsf(e) < 0.5f ? (0.25f - h * h) * SCALE_OF_BOUND : 0.0f;
  }
  return fabsf(v) <= 0.5f ? 1.0f : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    border_gradients(const float* __restrict__ grad,      // (N, C K, L), or (N, C, L) if SUMMED
                     const float* __restrict__ x,         // (N, C, H, W)
                     const float* __restrict__ scale,     // ()
                     const float* __restrict__ border,    // (P, C, K)
                     const float* __restrict__ alpha,     // (C, K)
                     const float* __restrict__ rounding,  // ()
                     const float* __restrict__ taps,      // (C, K)
                     float* grad_x,                       // (N, C, H, W)
                     double* __restrict__ sums_of_scale,  // (N, C)
                     float* __restrict__ sums,            // (N, C, K, SUMS)
                     float* __restrict__ x_hat,           // (N, C K, L), written if WRITE_COLUMNS
                     GEOMETRY, const float levels, const float zero_point) {
  __shared__ float shared_sums[MOST_WARPS][POSITIONS][SUMS];
  __shared__ double shared_of_scale[MOST_WARPS];
  __shared__ float own_border[(BORDERED ? TERMS : 1) * POSITIONS], own_alpha[POSITIONS];
  __shared__ float own_sums[OWN ? POSITIONS : 1][OWN ? WANTED : 1][THREADS];
#ifdef CUDA_ON_CPU
  float* shared_map = (float*)emulator::dynamic_shared;
#else
  extern __shared__ float shared_map[];
#endif
  const size_t plane = blockIdx.x;
  const int channel = plane % channels, size = height * width, windows = rows * columns;
  const int warps = blockDim.x / 32;
  float* map = SHARED_MAP ? shared_map : grad_x + plane * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) map[i] = 0.0f;
  for (int i = threadIdx.x; i < warps * POSITIONS * SUMS; i += blockDim.x) (&shared_sums[0][0][0])[i] = 0.0f;
  if (BORDERED)
    for (int i = threadIdx.x; i < TERMS * POSITIONS; i += blockDim.x)
      own_border[i] = border[(i / POSITIONS * channels + channel) * POSITIONS + i % POSITIONS];
  if (LEARNED_ALPHA)
    for (int i = threadIdx.x; i < POSITIONS; i += blockDim.x) own_alpha[i] = alpha[channel * POSITIONS + i];
  if (OWN)
    for (int i = 0; i < POSITIONS * WANTED; i++) (&own_sums[0][0][0])[i * THREADS + threadIdx.x] = 0.0f;
  __syncthreads();

  const Grid grid(*scale, zero_point, levels);
  const Coefficients coefficients{own_border, own_alpha, POSITIONS};  // registers are short
  const float a = ROUNDED ? 1.0f : *rounding;
  PositionSums position_sums{own_sums, shared_sums};
  double of_scale = 0.0;

  for (int first = 0; first < windows; first += blockDim.x) {
    const int here = first + threadIdx.x;
    const bool active = here < windows;
    const Place place(active ? here : 0, rows, columns, stride_y, stride_x, padding_y, padding_x);
    const Window window{x + plane * size, place.y, place.x, height, width, dilation_y, dilation_x};
    float ts[HELD ? POSITIONS : 1], es[HELD ? POSITIONS : 1], passed[HELD ? POSITIONS : 1];

    float b = 0.5f, chunk_of_scale = 0.0f;
    if (BORDERED && FUSED) {
      float total = 0.0f;
      EACH_POSITION {
        const float t = window.t(position, grid);
        float e = bounded_shift(coefficients.v(grid.u(t), position));
        if (HELD) ts[position] = t, es[position] = e;
        if (LEARNED_ALPHA) e *= coefficients.alpha[position];
        total += e;
      }
      b = total * (1.0f / POSITIONS) + 0.5f;
    }

    // From the gradient of x_hat to those of s (direct part), t and B. Twice where nothing is kept.
    const auto pass_rounding = [&](int position, bool record) {
      const bool inside = window.element(position) >= 0;
      const float t = HELD ? ts[position] : window.t(position, grid);
      float b_here = b;
      if (BORDERED && !FUSED) b_here = bounded_shift(coefficients.v(grid.u(t), position)) + 0.5f;
      const size_t index = (plane * (SUMMED ? 1 : POSITIONS) + (SUMMED ? 0 : position)) * windows + here;
      float g = active && inside ? grad[index] : 0.0f;
      const float q = softened(t, b_here, a);
      const float value = clamp(q, 0.0f, levels) - zero_point;
      if (record && SUMMED) position_sums.add(position, 4, value * g * grid.scale);
      if (SUMMED) g *= taps[channel * POSITIONS + position];
      if (record) chunk_of_scale += value * g;
      if (record && WRITE_COLUMNS && active)
        x_hat[(plane * POSITIONS + position) * windows + here] = inside ? value * grid.scale : 0.0f;
      return q >= 0.0f && q <= levels ? g * grid.scale : 0.0f;
    };
    float of_fused_b = 0.0f;
    if (FUSED) EACH_POSITION {
        const float of_t = pass_rounding(position, true);
        if (HELD) passed[position] = of_t;
        of_fused_b -= of_t * a;
      }
    of_fused_b *= 1.0f / POSITIONS;

    EACH_POSITION {
      float of_t = HELD ? passed[position] : pass_rounding(position, !FUSED);
      if (BORDERED) {
        const float t = HELD ? ts[position] : window.t(position, grid), u = grid.u(t);
        const float v = coefficients.v(u, position), e = HELD ? es[position] : bounded_shift(v);
        float of_e = FUSED ? of_fused_b : -(of_t * a);
        if (LEARNED_ALPHA) {
          position_sums.add(position, 3, of_e * e);
          of_e *= coefficients.alpha[position];
        }
        const float of_v = slope_of_shift(v, e) * of_e;
        position_sums.add(position, 0, of_v);
        position_sums.add(position, 1, of_v * u);
        if (TERMS == 3) position_sums.add(position, 2, of_v * u * u);
        if (INPUT_GRADIENT && t > 0.0f && t < levels) {
          const float slope = coefficients.term(1, position) + 2.0f * u * coefficients.term(2, position);
          of_t += slope * of_v * grid.inverse_levels;
        }
      }
      const int element = window.element(position);
      if (active && element >= 0) map[element] += of_t;
      __syncthreads();
    }
    of_scale += (double)chunk_of_scale;
  }

  // s divides x, too: its gradient through t is -(gradient of x) x / s.
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const float of_x = map[i] * grid.reciprocal;
    of_scale -= (double)(of_x * x[plane * size + i] * grid.reciprocal);
    grad_x[plane * size + i] = of_x;
  }
  position_sums.finish();
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) of_scale += __shfl_xor_sync(0xffffffffu, of_scale, distance);
  if (threadIdx.x % 32 == 0) shared_of_scale[threadIdx.x / 32] = of_scale;
  __syncthreads();
  for (int i = threadIdx.x; i < POSITIONS * SUMS; i += blockDim.x) {
    float total = 0.0f;
    for (int warp = 0; warp < warps; warp++) total += (&shared_sums[warp][0][0])[i];
    sums[plane * POSITIONS * SUMS + i] = total;
  }
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int warp = 0; warp < warps; warp++) total += shared_of_scale[warp];
    sums_of_scale[plane] = total;
  }
}
