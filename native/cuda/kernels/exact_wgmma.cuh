// Hopper's own instructions, one small function each: barriers with transaction counts, bulk copies, shares of registers, warpgroup products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/kernels/mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace laprox::cuda {

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ inline void barrier_arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory"); }
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Sleeps meanwhile: a thread that asks again and again takes issue slots of the warps beside it.
__device__ inline void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(barrier),
      "r"(parity), "r"(1000000)
      : "memory");
}
// `bytes` (a multiple of 16) from global to shared memory; the barrier counts them.
__device__ inline void bulk_copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}
// A warpgroup's registers a thread.
template <int Registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Registers));
}
template <int Registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Registers));
}
// Shared memory written by ordinary instructions and by cp.async, before tensor cores read it.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory"); }
// Keeps the compiler from reading the first N / 2 sums before they are there.
template <int N>
__device__ inline void wgmma_settle(float (&sums)[64]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A K-major tile of rows of 64 16-bit elements (128 bytes, 128-byte swizzle); groups of 8 rows lie 1024 bytes apart. The next 16
// elements of K are 32 bytes, 2 units of the descriptor, further.
__device__ inline uint64_t wgmma_tile(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (uint64_t{1} << 16) | (uint64_t{64} << 32) | (uint64_t{1} << 62);
}

// sums[64 x N] += a[64 x 16] b[N x 16]^T by a warpgroup (First: sums = the product); the sums are the first N / 2 registers. Each warp
// holds 16 rows of a, as for mma.sync; thread t of the warpgroup ends with rows t / 32 * 16 + t % 32 / 4 and 8 below, columns
// 8 * i + 2 * (t % 4) and the next, in sums[4 * i .. 4 * i + 3].
template <typename T, int N, bool First>
struct Wgmma;

#define LPX_S0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define LPX_S1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LPX_S2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define LPX_S3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define LPX_S4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define LPX_S5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LPX_S6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define LPX_S7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define LPX_R(C, i) C(sums[i]), C(sums[i + 1]), C(sums[i + 2]), C(sums[i + 3]), C(sums[i + 4]), C(sums[i + 5]), C(sums[i + 6]), C(sums[i + 7])
#define LPX_WGMMA(T, TYPE, N, NAMES, A, B, FIRST, SCALE, ...)                                                                                 \
  template <>                                                                                                                                 \
  struct Wgmma<T, N, FIRST> {                                                                                                                 \
    __device__ static void run(float (&sums)[64], const uint32_t (&a)[4], uint64_t b) {                                                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " SCALE ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES \
                   "}, " A ", " B ", p, 1, 1, 0;\n}\n"                                                                                        \
                   : __VA_ARGS__                                                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                                     \
    }                                                                                                                                         \
  };
#define LPX_WGMMAS(T, TYPE, F, S, C)                                                                                                                 \
  LPX_WGMMA(T, TYPE, 16, LPX_S0, "{%8,%9,%10,%11}", "%12", F, S, LPX_R(C, 0))                                                                        \
  LPX_WGMMA(T, TYPE, 32, LPX_S0 LPX_S1, "{%16,%17,%18,%19}", "%20", F, S, LPX_R(C, 0), LPX_R(C, 8))                                                  \
  LPX_WGMMA(T, TYPE, 48, LPX_S0 LPX_S1 LPX_S2, "{%24,%25,%26,%27}", "%28", F, S, LPX_R(C, 0), LPX_R(C, 8), LPX_R(C, 16))                             \
  LPX_WGMMA(T, TYPE, 64, LPX_S0 LPX_S1 LPX_S2 LPX_S3, "{%32,%33,%34,%35}", "%36", F, S, LPX_R(C, 0), LPX_R(C, 8), LPX_R(C, 16), LPX_R(C, 24))        \
  LPX_WGMMA(T, TYPE, 80, LPX_S0 LPX_S1 LPX_S2 LPX_S3 LPX_S4, "{%40,%41,%42,%43}", "%44", F, S, LPX_R(C, 0), LPX_R(C, 8), LPX_R(C, 16), LPX_R(C, 24), \
            LPX_R(C, 32))                                                                                                                            \
  LPX_WGMMA(T, TYPE, 96, LPX_S0 LPX_S1 LPX_S2 LPX_S3 LPX_S4 LPX_S5, "{%48,%49,%50,%51}", "%52", F, S, LPX_R(C, 0), LPX_R(C, 8), LPX_R(C, 16),        \
            LPX_R(C, 24), LPX_R(C, 32), LPX_R(C, 40))                                                                                                \
  LPX_WGMMA(T, TYPE, 112, LPX_S0 LPX_S1 LPX_S2 LPX_S3 LPX_S4 LPX_S5 LPX_S6, "{%56,%57,%58,%59}", "%60", F, S, LPX_R(C, 0), LPX_R(C, 8),              \
            LPX_R(C, 16), LPX_R(C, 24), LPX_R(C, 32), LPX_R(C, 40), LPX_R(C, 48))                                                                    \
  LPX_WGMMA(T, TYPE, 128, LPX_S0 LPX_S1 LPX_S2 LPX_S3 LPX_S4 LPX_S5 LPX_S6 LPX_S7, "{%64,%65,%66,%67}", "%68", F, S, LPX_R(C, 0), LPX_R(C, 8),       \
            LPX_R(C, 16), LPX_R(C, 24), LPX_R(C, 32), LPX_R(C, 40), LPX_R(C, 48), LPX_R(C, 56))
#define LPX_NEW "=f"
#define LPX_OLD "+f"
LPX_WGMMAS(__nv_bfloat16, "bf16", true, "0", LPX_NEW)
LPX_WGMMAS(__nv_bfloat16, "bf16", false, "1", LPX_OLD)
LPX_WGMMAS(__half, "f16", true, "0", LPX_NEW)
LPX_WGMMAS(__half, "f16", false, "1", LPX_OLD)
#undef LPX_NEW
#undef LPX_OLD
#undef LPX_WGMMAS
#undef LPX_WGMMA
#undef LPX_R
#undef LPX_S0
#undef LPX_S1
#undef LPX_S2
#undef LPX_S3
#undef LPX_S4
#undef LPX_S5
#undef LPX_S6
#undef LPX_S7

template <typename T, int N, bool First>
__device__ inline void wgmma(float (&sums)[64], const uint32_t (&a)[4], uint64_t b) {
  Wgmma<T, N, First>::run(sums, a, b);
}

}  // namespace laprox::cuda

#endif
