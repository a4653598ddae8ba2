// What a scan does with logits, however they are multiplied: their exponentials, what a row sees of them, and what is kept.
#pragma once

#include "cpu/tile.hpp"
#include "cpu/vector.inl"

namespace laprox::cpu {
namespace LPX_NAMESPACE {

// Into the nearest cache, or into the one behind it. Always inlined: GCC takes a function that only asks for memory for one that does nothing,
// and leaves its calls out.
template <bool Nearest, bool Written = false>
[[gnu::always_inline]] inline void ask_for(const void* memory, int bytes) {
  for (int byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(static_cast<const char*>(memory) + byte, Written ? 1 : 0, Nearest ? 3 : 2);
}

// Calls body(tile, kept) for each tile of a run, one after the other.
template <typename Body>
inline void for_each_tile(const ScanRun& run, uint32_t* kept, Body&& body) {
  const ptrdiff_t stride = static_cast<ptrdiff_t>((run.vectors + 1) / 2) * kLanes;
  const auto least = [](int a, int b) { return a < b ? a : b; };
  for (int first = 0; first < run.count; first += kScanTile) {
    ScanRun tile = run;
    tile.keys += first;
    if (run.values != nullptr) tile.values += first, tile.norms += first;
    tile.count = least(kScanTile, run.count - first);
    tile.ahead = least(kScanTile, run.count + run.ahead - first - tile.count);
    Visibility mask;
    if (run.masked != nullptr) {
      mask = *run.masked;
      mask.positions += first;
      tile.masked = &mask;
    }
    body(tile, kept == nullptr ? nullptr : kept + first * stride);
  }
}

// The exponent, in base 2: one multiply-add where there is no soft-cap. Masks come after the exponential, so that the bits of
// a token do not depend on its neighbours.
template <bool SoftCap>
inline vf exponent(const float* logits, float scale, float soft_cap, vf reference) {
  if constexpr (SoftCap) return (soft_cap * kLog2E) * hyperbolic_tangent(load_vector(logits) * scale / soft_cap) - reference;
  return load_vector(logits) * (scale * kLog2E) - reference;
}

// All bits where a row sees a token.
inline vi visible(const Visibility& mask, const int32_t* rows, int token) {
  const vi last = *reinterpret_cast<const vi_unaligned*>(rows) + mask.last;
  const int32_t position = mask.positions[token];
  const vi seen = last >= position;
  return mask.window == 0 ? seen : seen & (last - mask.window < position);
}

// What a scan finds of up to Width vectors of query rows, token by token. Its members stay in registers where its functions are inlined.
template <bool SoftCap, bool Masked, int Width>
class ScanRows {
 public:
  // Of the vectors from `vector` on, `vectors` in number. `kept` is of the tile's tokens, or null.
  [[gnu::always_inline]] ScanRows(const ScanRun& tile, int vector, int vectors, uint32_t* kept)
      : mask_(tile.masked),
        rows_(tile.rows + static_cast<ptrdiff_t>(vector) * kLanes),
        scale_(tile.scale),
        soft_cap_(tile.soft_cap),
        stride_(static_cast<ptrdiff_t>((tile.vectors + 1) / 2) * kLanes),
        kept_(kept == nullptr ? nullptr : kept + static_cast<ptrdiff_t>(vector) * kLanes / 2),
        vector_(vector),
        vectors_(vectors) {
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j)
      reference_[j] = j < vectors ? load_vector(tile.reference + static_cast<ptrdiff_t>(vector + j) * kLanes) : splat(INFINITY);
  }

  // Tokens one after the other, [Width * kLanes] logits each.
  [[gnu::always_inline]] void take(const float* logits, int token) {
    vf e[Width];
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j) {
      e[j] = power_of_two(exponent<SoftCap>(logits + j * kLanes, scale_, soft_cap_, reference_[j]));
      if constexpr (Masked) e[j] = bits_to_float(float_to_bits(e[j]) & visible(*mask_, rows_ + (j < vectors_ ? j : 0) * kLanes, token));
      row_sums_[j] += e[j];
    }
    if (kept_ == nullptr) return;
#pragma GCC unroll 2
    for (int j = 0; j < Width; j += 2) {
      vu pair = reinterpret_cast<vu>(e[j]) >> 16;
      if (j + 1 < Width) pair |= reinterpret_cast<vu>(e[j + 1]) & kUpperHalf;
      store_bits(kept_ + j / 2 * kLanes, pair);
    }
    kept_ += stride_;
  }

  // After some tokens: sums of few terms are closer.
  [[gnu::always_inline]] void close() {
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j) {
      totals_[j] += row_sums_[j];
      row_sums_[j] = vf{};
    }
  }

  [[gnu::always_inline]] void add_to(double* sums) const {
    typedef double vd __attribute__((vector_size(8 * LPX_LANES)));
    typedef double vd_unaligned __attribute__((vector_size(8 * LPX_LANES), aligned(8), may_alias));
#pragma GCC unroll 4
    for (int j = 0; j < Width; ++j)
      if (j < vectors_)
        *reinterpret_cast<vd_unaligned*>(sums + static_cast<ptrdiff_t>(vector_ + j) * kLanes) += __builtin_convertvector(totals_[j], vd);
  }

 private:
  const Visibility* mask_;
  const int32_t* rows_;
  float scale_;
  float soft_cap_;
  ptrdiff_t stride_;
  uint32_t* kept_;
  int vector_;
  int vectors_;
  vf reference_[Width];
  vf row_sums_[Width] = {};
  vf totals_[Width] = {};
};

}  // namespace LPX_NAMESPACE
}  // namespace laprox::cpu
