// What the GPU can do at most: bytes a second of a copy and of a read, operations a second of bfloat16 matrix products whose
// operands are in shared memory already.
#pragma once

#include <cstdint>

namespace bench {

__global__ void read_all(const uint4* from, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 part[4];
#pragma unroll
    for (int j = 0; j < 4; j++) part[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < 4; j++) sum ^= part[j].x ^ part[j].y ^ part[j].z ^ part[j].w;
  }
  for (; i < count; i += step) sum ^= from[i].x;
  if (sum == 0x12345678) *sink = sum;
}

constexpr int kProductThreads = 256;
constexpr int kProductBytes = 2 * 64 * 64 * 2 + 256 * 64 * 2;  // two A tiles of 64 x 64, one B tile of 256 x 64
constexpr int kProductSteps = 1 << 16;                         // long enough for clocks to settle
// Of one block of matrix_products.
constexpr double kProductOperations = 2.0 * 2 * 64 * 256 * 64 * kProductSteps;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define LAPROX_C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define LAPROX_C32(i) LAPROX_C8(i), LAPROX_C8(i + 8), LAPROX_C8(i + 16), LAPROX_C8(i + 24)

// c += a b, 64 x 256 by 16, both operands K-major in shared memory.
__device__ inline void multiply_64_256_16(float (&c)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
      "%58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "
      "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, 1, 1, 1, 0, 0;"
      : LAPROX_C32(0), LAPROX_C32(32), LAPROX_C32(64), LAPROX_C32(96)
      : "l"(a), "l"(b));
}

// 128-byte swizzle, 64 columns of bfloat16 a row.
__device__ inline uint64_t describe_tile(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

#endif

// Two warpgroups a block multiply what lies in shared memory, over and over. grid: one block a multiprocessor
__global__ void __launch_bounds__(kProductThreads, 1) matrix_products(float* sink) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint32_t tiles[];
  for (int i = threadIdx.x; i < kProductBytes / 4; i += kProductThreads) {
    uint32_t bits = (i + blockIdx.x * 7919) * 0x9e3779b9u;
    bits ^= bits >> 15;
    bits *= 0x85ebca6bu;
    bits ^= bits >> 13;
    tiles[i] = (bits & 0x80ff80ff) | 0x3f003f00;  // of either sign, between 0.5 and 2
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(tiles));
  const uint64_t a = describe_tile(base + threadIdx.x / 128 * 64 * 64 * 2);
  const uint64_t b = describe_tile(base + 2 * 64 * 64 * 2);
  float c[128] = {};
  for (int step = 0; step < kProductSteps; step++) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; k++) multiply_64_256_16(c, a + k * 2, b + k * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  float sum = 0;
  for (float x : c) sum += x;
  if (sum == 1) *sink = sum;
#endif
}

}  // namespace bench
