// Vectors of LPX_LANES floats, and functions of them. Vectors are the compiler's own, so that one text serves SSE2, AVX2, AVX-512 and NEON; the
// including file defines LPX_LANES and LPX_NAMESPACE.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if LPX_LANES == 16
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace laprox::cpu {
namespace LPX_NAMESPACE {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kLanes = LPX_LANES;
constexpr int kCacheLine = 64;
constexpr uint32_t kUpperHalf = 0xffff0000;

typedef float vf __attribute__((vector_size(4 * LPX_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LPX_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LPX_LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LPX_LANES), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(4 * LPX_LANES), aligned(4), may_alias));
typedef int32_t vi_unaligned __attribute__((vector_size(4 * LPX_LANES), aligned(4), may_alias));
// Rows are read in eights whatever the width: head dimensions are multiples of 8. Two numbers of two bytes may be read as a float.
typedef float v8 __attribute__((vector_size(32)));
typedef float v8_unaligned __attribute__((vector_size(32), aligned(2), may_alias));
typedef float float_unaligned __attribute__((aligned(2), may_alias));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint16_t h8_unaligned __attribute__((vector_size(16), aligned(2), may_alias));

inline vf load_vector(const float* from) { return *reinterpret_cast<const vf_unaligned*>(from); }
inline void store_vector(float* to, vf value) { *reinterpret_cast<vf_unaligned*>(to) = value; }
inline vu load_bits(const uint32_t* from) { return *reinterpret_cast<const vu_unaligned*>(from); }
inline void store_bits(uint32_t* to, vu value) { *reinterpret_cast<vu_unaligned*>(to) = value; }
inline vf splat(float value) { return vf{} + value; }
inline vf bits_to_float(vi value) { return reinterpret_cast<vf>(value); }
inline vi float_to_bits(vf value) { return reinterpret_cast<vi>(value); }

// Of numbers in bfloat16: those of `low` in the lower halves.
inline vu pack_halves(vf low, vf high) { return reinterpret_cast<vu>(low) >> 16 | reinterpret_cast<vu>(high); }

inline vf square_root(vf x) {
  vf root = {};
  for (int i = 0; i < kLanes; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
}

// 2^x to about 1 ulp: 0 below the smallest normal number, at most infinity and at least 2^127 above 2^127.5, NaN for NaN. A
// minimax polynomial on [-1/2, 1/2] (relative error 9e-8), 1 at 0.
inline vf power_of_two(vf x) {
#if LPX_LANES == 16
  const __mmask16 stays = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);  // the difference to the nearest integer, 0 for an infinite x
#else
  const vi vanishes = x < -126.0f;
  x = 127.5f < x ? splat(127.5f) : x;
  const vf shifted = x + 12582912.0f;  // rounds to an integer in the low bits
  const vf f = x - (shifted - 12582912.0f);
#endif
  const vf p = ((((1.3264727e-3f * f + 9.6715126e-3f) * f + 5.5507337e-2f) * f + 2.4022242e-1f) * f + 6.9314698e-1f) * f + 1.0f;
#if LPX_LANES == 16
  return _mm512_maskz_scalef_ps(stays, p, x - f);
#else
  // Adds to the exponent; in unsigned, since what vanishes may wrap around.
  const vu scaled = reinterpret_cast<vu>(p) + (reinterpret_cast<vu>(shifted) << 23);
  return bits_to_float(reinterpret_cast<vi>(scaled) & ~vanishes);
#endif
}

// tanh(x): the polynomial of Cephes' tanhf near 0, where 1 - 2/(exp(2x) + 1) would cancel.
inline vf hyperbolic_tangent(vf x) {
  const vf magnitude = bits_to_float(float_to_bits(x) & 0x7fffffff);
  const vi sign = float_to_bits(x) & static_cast<int32_t>(0x80000000);
  const vf far = 1.0f - 2.0f / (power_of_two(2.0f * kLog2E * magnitude) + 1.0f);
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf near = p * z * x + x;
  return magnitude < 0.625f ? near : bits_to_float(float_to_bits(far) | sign);
}

}  // namespace LPX_NAMESPACE
}  // namespace laprox::cpu
