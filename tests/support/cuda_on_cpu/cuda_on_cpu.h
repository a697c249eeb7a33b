// CUDA C as C++ on a CPU: one fiber for each thread of a block, all switched at every barrier.
//
// Blocks run one after another. Every thread of a block must meet the same barriers, shuffles and matrix products in the
// same order; a data race between two barriers does not show. What PTX would do has a plain body here.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH__ 900
#define __shared__ static __attribute__((section("shared_memory")))

using std::min;
using std::max;
struct Index { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static Index threadIdx, blockIdx, blockDim, gridDim;

// The linker marks the ends of the section that __shared__ variables are put into; there is none without them.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_memory[], __stop_shared_memory[];

namespace emulator {
constexpr int MOST_THREADS = 1024;
constexpr int STACK_BYTES = 128 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it waits
  char* stack;
  bool started, done;
  Index thread;
};
static Fiber fibers[MOST_THREADS];
static jmp_buf scheduler;
static int current;
static void (*body)();
alignas(128) static char dynamic_shared[256 * 1024];
static uint64_t slots[MOST_THREADS];
static unsigned fragments[MOST_THREADS][6];
// The approximate reciprocal of the device is off by up to one unit in the last place; so is this one, at will.
static int reciprocal_error = 0;

// Contexts start the fibers; from then on jumps switch them, which take no system call.
inline void barrier() {
  const int mine = current;
  if (!_setjmp(fibers[mine].place)) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {  // a fiber outlives its block
    body();
    fibers[current].done = true;
    barrier();
  }
}

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block() {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    if (fiber.stack) continue;
    fiber.stack = (char*)malloc(STACK_BYTES);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.start, enter, 0);
  }
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (unsigned i = 0; i < threads; i++) {
      if (fibers[i].done) continue;
      resume(i);
      waiting |= !fibers[i].done;
    }
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<A>*)arguments[I]...);
}

template <class... A>
void launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, void** arguments) {
  static void (*entry)(A...);
  static void** given;
  entry = kernel;
  given = arguments;
  body = [] { call(entry, given, std::index_sequence_for<A...>{}); };
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  // Shared memory holds anything at a block's start; NaN bytes show where a kernel counts on zeros.
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        blockIdx = {x, y, z};
        memset(dynamic_shared, 0xff, sizeof dynamic_shared);
        if (__start_shared_memory) memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
        run_block();
      }
}

template <class T>
T exchange(T value, int source) {
  memcpy(&slots[current], &value, sizeof value);
  barrier();
  T result;
  memcpy(&result, &slots[source], sizeof result);
  barrier();
  return result;
}
}  // namespace emulator

#define __syncthreads() emulator::barrier()
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value, emulator::current ^ mask);
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float_as_int(float value) {
  int bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

inline float emulated_reciprocal(float value) {
  const float exact = 1.0f / value;
  return emulator::reciprocal_error ? nextafterf(exact, emulator::reciprocal_error * INFINITY) : exact;
}

inline float emulated_half_to_float(unsigned short bits) {
  const unsigned exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = exponent == 31  ? (mantissa ? NAN : INFINITY)
                : exponent == 0 ? ldexpf((float)mantissa, -24)
                                : ldexpf((float)(mantissa + 1024), (int)exponent - 25);
  return bits & 0x8000 ? -value : value;
}

inline unsigned short emulated_float_to_half(float value) {  // to nearest even
  if (value != value) return 0x7fff;
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  const int exponent = std::max(size == 0 ? -14 : ilogbf(size), -14);
  const unsigned steps = (unsigned)nearbyintf(ldexpf(size, 10 - exponent));  // below 2048, or 2048 after a carry
  return sign | (unsigned short)(steps + ((unsigned)(exponent + 14) << 10));
}

// mma.sync.m16n8k32.s8: each lane brings four words of A and two of B.
inline void emulated_mma(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const int me = emulator::current, warp = me / 32 * 32, lane = me % 32;
  unsigned* mine = emulator::fragments[me];
  for (int i = 0; i < 4; i++) mine[i] = a[i];
  mine[4] = b0;
  mine[5] = b1;
  emulator::barrier();
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; k++) {
      const int owner = k / 4 % 4, half = k / 16;
      const unsigned from_a = emulator::fragments[warp + row % 8 * 4 + owner][half * 2 + row / 8];
      const unsigned from_b = emulator::fragments[warp + column * 4 + owner][4 + half];
      d[i] += (int)(int8_t)(from_a >> 8 * (k % 4)) * (int)(int8_t)(from_b >> 8 * (k % 4));
    }
  }
  emulator::barrier();
}

// ldmatrix.x4: lane i gives the row i % 8 of matrix i / 8; it gets word i % 4 of row i / 4 of each.
inline void emulated_ldmatrix(unsigned (&a)[4], const unsigned* row) {
  const int me = emulator::current, warp = me / 32 * 32, lane = me % 32;
  memcpy(&emulator::slots[me], &row, sizeof row);
  emulator::barrier();
  for (int matrix = 0; matrix < 4; matrix++) {
    const unsigned* from;
    memcpy(&from, &emulator::slots[warp + matrix * 8 + lane / 4], sizeof from);
    a[matrix] = from[lane % 4];
  }
  emulator::barrier();
}
