// Logits by AMX, the matrix instructions of Intel's servers; all other kernels are those of AVX-512.
//
// An instruction multiplies numbers in bfloat16 and adds in float, at 16 times the rate of multiply-adds in float:
//
//   C[16][16] += A[16][32] * B[16][16][2], of tiles in registers; B has pairs of numbers, those of a column one below the other
//
// A float is the sum of three such numbers, x = x0 + x1 + x2, each the nearest to what those before it leave. A product is the sum of the
// six qi kj with i + j <= 2; what is left out is below 2^-23 |q k|, and sums of 32 are rounded apart from the total, so that logits are
// closer than those of a chain of multiply-adds. Numbers in bfloat16 and float16 are one and two parts. Numbers that parts cannot hold
// (huge ones, infinity, NaN) are multiplied in float.
//
// Bytes: keys are split where they are read, 6 for a float's 4, into memory that the first-level cache holds; queries once for all keys.
// The scan has keys in A and packed query rows in B, so that both lie as they are in memory; `logits` has query rows in A and keys in B,
// which come out as [rows][tokens]. Both add the same products in the same order: the same bits.
//
// In the scan, instructions for tiles take turns with exponentials: while 16 tokens by two vectors of rows are multiplied, in 12 steps of
// two instructions for 64 floats, those multiplied before become attention, two tokens a step. One after the other they take a third
// longer, since a processor does not look far enough ahead to mix them itself.
#if defined(__x86_64__)
#define LPX_LANES 16
#define LPX_NAMESPACE amx
#include <cstring>

#include "core/geometry.hpp"
#include "cpu/scan.inl"

namespace laprox::cpu {
namespace amx {

constexpr int kTileNumbers = kSplitRows * kSplitDepth;

// The nearest number in bfloat16.
inline vf nearest(vf x) { return reinterpret_cast<vf>((reinterpret_cast<vu>(x) + 0x8000u) & kUpperHalf); }

// Calls store(part, pairs of numbers) for each part of both.
template <int Parts, typename Store>
[[gnu::always_inline]] inline void split_pairs(vf low, vf high, Store&& store) {
  for (int part = 0; part < Parts; ++part) {
    const vf low_part = nearest(low);
    const vf high_part = nearest(high);
    store(part, pack_halves(low_part, high_part));
    low -= low_part;
    high -= high_part;
  }
}

// Tiles hold the numbers k and k + 16 of each 32 beside each other, as a pair.

// out[pair of vectors][part][padded depth / 32][vector of the pair]: tiles B[16][lane][2].
bool split(lpx_dtype, const float* queries, int vectors, int depth, uint16_t* out) {
  const int steps = padded_depth(depth) / kSplitDepth;
  vf magnitudes = {};
  for (int vector = 0; vector < (vectors + 1) / 2 * 2; ++vector) {
    const float* rows = queries + static_cast<ptrdiff_t>(vector / 2) * depth * 2 * kLanes + vector % 2 * kLanes;
    const auto row = [&](int k) { return k < depth ? load_vector(rows + static_cast<ptrdiff_t>(k) * 2 * kLanes) : vf{}; };
    for (int step = 0; step < steps; ++step) {
      for (int k = 0; k < kSplitDepth / 2; ++k) {
        const vf low = row(step * kSplitDepth + k);
        const vf high = row(step * kSplitDepth + k + kSplitDepth / 2);
        magnitudes += bits_to_float(float_to_bits(low) & 0x7fffffff) + bits_to_float(float_to_bits(high) & 0x7fffffff);
        split_pairs<kSplitParts>(low, high, [&](int part, vu pairs) {
          const ptrdiff_t tile = ((static_cast<ptrdiff_t>(vector / 2) * kSplitParts + part) * steps + step) * 2 + vector % 2;
          store_bits(reinterpret_cast<uint32_t*>(out + tile * kTileNumbers) + k * kLanes, pairs);
        });
      }
    }
  }
  float magnitude = 0;
  for (int lane = 0; lane < kLanes; ++lane) magnitude += magnitudes[lane];
  return magnitude < kHuge;
}

// Of magnitudes' bits, which are in the order of floats, with infinity and NaN behind them.
inline vu larger(vu a, vu b) { return a > b ? a : b; }

// Those of 16 numbers that exist.
template <lpx_dtype Type>
inline vf read(const void* numbers, __mmask16 existing) {
  if constexpr (Type == LPX_F32) return _mm512_maskz_loadu_ps(existing, numbers);
  typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
  const __m256i bits = _mm256_maskz_loadu_epi16(existing, numbers);
  if constexpr (Type == LPX_F16) return _mm512_maskz_cvtph_ps(existing, bits);
  return reinterpret_cast<vf>(__builtin_convertvector(reinterpret_cast<vh>(bits), vu) << 16);
}

// Those of 32 numbers that exist, to[part * stride]. Returns the largest magnitudes of their lanes.
template <lpx_dtype Type>
inline vu split_numbers(const void* numbers, __mmask32 existing, ptrdiff_t stride, uint16_t* to) {
  constexpr int kBytes = Type == LPX_F32 ? 4 : 2;
  const vf low = read<Type>(numbers, static_cast<__mmask16>(existing));
  const vf high = read<Type>(static_cast<const std::byte*>(numbers) + kLanes * kBytes, static_cast<__mmask16>(existing >> kLanes));
  split_pairs<split_parts(Type)>(low, high, [&](int part, vu pairs) { store_bits(reinterpret_cast<uint32_t*>(to + part * stride), pairs); });
  return larger(reinterpret_cast<vu>(low) & 0x7fffffffu, reinterpret_cast<vu>(high) & 0x7fffffffu);
}

// to[part][kScanTile][padded depth]. Returns a bit for each row that could not be split.
template <lpx_dtype Type>
uint64_t split_rows_of(const void* const* rows, int count, int depth, uint16_t* to) {
  constexpr int kBytes = Type == LPX_F32 ? 4 : 2;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(kScanTile) * padded_depth(depth);
  uint64_t unsplit = 0;
  for (int i = 0; i < count; ++i, to += padded_depth(depth)) {
    const auto* row = static_cast<const std::byte*>(rows[i]);
    vu largest = {};
    const auto split = [&](int k, __mmask32 existing) {
      largest = larger(largest, split_numbers<Type>(row + static_cast<ptrdiff_t>(k) * kBytes, existing, stride, to + k));
    };
    int k = 0;
    for (; k + kSplitDepth <= depth; k += kSplitDepth) split(k, ~__mmask32{0});
    if (k < depth) split(k, (__mmask32{1} << (depth - k)) - 1);
    unsplit |= uint64_t{_mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(largest), _mm512_set1_epi32(kHugeBits)) != 0} << i;
  }
  return unsplit;
}

// The keys of a tile, as those before, and those that have to be multiplied in float.
template <typename Tile>
uint64_t split_keys(const Tile& tile) {
  static_assert(kScanTile < 64);
  const auto split_rows = tile.key_type == LPX_F32   ? split_rows_of<LPX_F32>
                          : tile.key_type == LPX_F16 ? split_rows_of<LPX_F16>
                                                     : split_rows_of<LPX_BF16>;
  const uint64_t unsplit = split_rows(tile.keys, tile.count, tile.depth, tile.room);
  return tile.in_float ? (uint64_t{1} << tile.count) - 1 : unsplit;
}

struct alignas(kCacheLine) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows};
};
constexpr Configuration kConfiguration;  // in memory: GCC thinks that 8 bytes of it are read

// What was stored before may be loaded as tiles until _tile_release(). GCC does not know that these come from memory.
inline void begin_tiles() {
  asm volatile("" ::: "memory");
  _tile_loadconfig(&kConfiguration);
}

// Calls body.operator()<parts of keys, of queries>(). Queries of another type than the keys count as floats.
template <typename Body>
void with_parts(lpx_dtype keys, lpx_dtype queries, Body&& body) {
  switch (keys) {
    case LPX_F32: return body.template operator()<3, 3>();
    case LPX_F16: return queries == LPX_F16 ? body.template operator()<2, 2>() : body.template operator()<2, 3>();
    case LPX_BF16: return queries == LPX_BF16 ? body.template operator()<1, 1>() : body.template operator()<1, 3>();
  }
}

// ------------------------------------------------------------------ tokens along the lanes: logits

int64_t pack_size(int count, int depth) { return int64_t{padded_rows(count)} * split_size(depth) * 2 + static_cast<int64_t>(count) * depth * 4; }

// out[part][rows in whole tiles][padded depth], then floats [rows][depth].
void pack(lpx_dtype dtype, const void* const* rows, int count, int depth, std::byte* out) {
  auto* split = reinterpret_cast<uint16_t*>(out);
  auto* plain = reinterpret_cast<float*>(split + static_cast<ptrdiff_t>(padded_rows(count)) * split_size(depth));
  const ptrdiff_t stride = static_cast<ptrdiff_t>(padded_rows(count)) * padded_depth(depth);
  for (int r = 0; r < padded_rows(count); ++r, split += padded_depth(depth)) {
    alignas(kCacheLine) float row[kMaxHeadDim] = {};
    if (r < count) {
      avx512_kernels().convert(dtype, rows[r], depth, row);
      std::memcpy(plain + static_cast<ptrdiff_t>(r) * depth, row, static_cast<size_t>(depth) * sizeof(float));
    }
    for (int k = 0; k < padded_depth(depth); k += kSplitDepth) split_numbers<LPX_F32>(row + k, ~__mmask32{0}, stride, split + k);
  }
}

// out[16][kTile] of the rows whose parts begin at `query`, and of keys in tiles B[16][token][2], [part][padded depth / 32]. Adds in the order of
// the scan's multiply(): the same bits.
template <int KeyParts, int QueryParts>
inline void multiply_rows(const uint16_t* query, ptrdiff_t query_part, const uint16_t* key, int depth, float* out) {
  const ptrdiff_t key_part = static_cast<ptrdiff_t>(depth) * kTile;
  constexpr int kStride = kTile * 4;
  _tile_zero(0);
  _tile_zero(1);
  for (int k = 0; k < depth; k += kSplitDepth, query += kSplitDepth, key += static_cast<ptrdiff_t>(kSplitDepth) * kTile) {
    _tile_loadd(2, query, depth * 2);
    _tile_loadd(3, key, kStride);
    _tile_loadd(4, key + kSplitDepth, kStride);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
    if constexpr (KeyParts > 1) {
      _tile_loadd(5, key + key_part, kStride);
      _tile_loadd(6, key + key_part + kSplitDepth, kStride);
      _tile_dpbf16ps(0, 2, 5);
      _tile_dpbf16ps(1, 2, 6);
    }
    if constexpr (KeyParts > 2) {
      _tile_loadd(7, key + 2 * key_part, kStride);
      _tile_dpbf16ps(0, 2, 7);
      _tile_loadd(7, key + 2 * key_part + kSplitDepth, kStride);
      _tile_dpbf16ps(1, 2, 7);
    }
    if constexpr (QueryParts > 1) {
      _tile_loadd(2, query + query_part, depth * 2);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
      if constexpr (KeyParts > 1) {
        _tile_dpbf16ps(0, 2, 5);
        _tile_dpbf16ps(1, 2, 6);
      }
    }
    if constexpr (QueryParts > 2) {
      _tile_loadd(2, query + 2 * query_part, depth * 2);
      _tile_dpbf16ps(0, 2, 3);
      _tile_dpbf16ps(1, 2, 4);
    }
  }
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + kSplitRows, kStride);
}

void logits(const LogitTile& tile) {
  const int depth = padded_depth(tile.depth);
  const int64_t rows = padded_rows(tile.rows);
  const auto* queries = reinterpret_cast<const uint16_t*>(tile.queries);
  const uint64_t in_float = split_keys(tile);
  // Pairs of numbers are moved as if they were floats.
  uint16_t* keys = tile.room + split_keys_size(tile.depth);
  for (int part = 0; part < split_parts(tile.key_type); ++part) {
    const void* pairs[kTile];
    for (int t = 0; t < tile.count; ++t) pairs[t] = tile.room + (static_cast<ptrdiff_t>(part) * kScanTile + t) * depth;
    avx512_kernels().load(LPX_F32, pairs, tile.count, depth / 2, reinterpret_cast<float*>(keys + static_cast<ptrdiff_t>(part) * depth * kTile));
  }
  begin_tiles();
  with_parts(tile.key_type, tile.query_type, [&]<int KeyParts, int QueryParts>() {
    for (int64_t r = 0; r < rows; r += kSplitRows)
      multiply_rows<KeyParts, QueryParts>(queries + r * depth, rows * depth, keys, depth, tile.out + r * kTile);
  });
  _tile_release();
  const auto* plain = reinterpret_cast<const float*>(queries + rows * split_size(tile.depth));
  for (uint64_t rest = in_float; rest != 0; rest &= rest - 1) {
    const int t = __builtin_ctzll(rest);
    float key[kMaxHeadDim];
    avx512_kernels().convert(tile.key_type, tile.keys[t], tile.depth, key);
    for (int r = 0; r < tile.rows; ++r) {
      float sum = 0;
      for (int k = 0; k < tile.depth; ++k) sum += plain[static_cast<ptrdiff_t>(r) * tile.depth + k] * key[k];
      tile.out[static_cast<ptrdiff_t>(r) * kTile + t] = sum;
    }
  }
}

// ------------------------------------------------------------------ query rows along the lanes: the scan

// The logits of a token and a pair of vectors of query rows, k ascending.
[[gnu::noinline]] void multiply_in_float(const ScanTile& tile, int token, int pair, float* out) {
  float key[kMaxHeadDim];
  avx512_kernels().convert(tile.key_type, tile.keys[token], tile.depth, key);
  const float* rows = tile.queries + static_cast<ptrdiff_t>(pair) * tile.depth * 2 * kLanes;
  vf sums[2] = {};
  for (int k = 0; k < tile.depth; ++k)
    for (int j = 0; j < 2; ++j) sums[j] += key[k] * load_vector(rows + (static_cast<ptrdiff_t>(k) * 2 + j) * kLanes);
  for (int j = 0; j < 2; ++j) store_vector(out + j * kLanes, sums[j]);
}

// Products of parts that count.
constexpr int terms(int key_parts, int query_parts) {
  int count = 0;
  for (int key = 0; key < key_parts; ++key)
    for (int query = 0; query < query_parts && key + query < kSplitParts; ++query) ++count;
  return count;
}

// out[kSplitRows][2 * kLanes] of the tokens from `first` on and a pair of vectors of rows. Calls between() each time both vectors have been
// multiplied.
template <int KeyParts, int QueryParts, typename Between>
[[gnu::always_inline]] inline void multiply(const ScanTile& tile, uint64_t in_float, int first, int pair, float* out, Between&& between) {
  const int depth = padded_depth(tile.depth);
  const ptrdiff_t key_part = static_cast<ptrdiff_t>(kScanTile) * depth;
  const ptrdiff_t query_part = static_cast<ptrdiff_t>(2) * depth * kLanes;
  const uint16_t* key = tile.room + static_cast<ptrdiff_t>(first) * depth;
  const uint16_t* query = tile.split_queries + static_cast<ptrdiff_t>(pair) * kSplitParts * query_part;
  const auto load_queries = [&](int part) {
    _tile_loadd(5, query + part * query_part, 2 * kSplitDepth);
    _tile_loadd(6, query + part * query_part + kTileNumbers, 2 * kSplitDepth);
  };
  _tile_zero(0);
  _tile_zero(1);
  for (int k = 0; k < depth; k += kSplitDepth, key += kSplitDepth, query += 2 * kTileNumbers) {
    _tile_loadd(2, key, depth * 2);
    load_queries(0);
    _tile_dpbf16ps(0, 2, 5);
    _tile_dpbf16ps(1, 2, 6);
    between();
    if constexpr (KeyParts > 1) {
      _tile_loadd(3, key + key_part, depth * 2);
      _tile_dpbf16ps(0, 3, 5);
      _tile_dpbf16ps(1, 3, 6);
      between();
    }
    if constexpr (KeyParts > 2) {
      _tile_loadd(4, key + 2 * key_part, depth * 2);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      between();
    }
    if constexpr (QueryParts > 1) {
      load_queries(1);
      _tile_dpbf16ps(0, 2, 5);
      _tile_dpbf16ps(1, 2, 6);
      between();
      if constexpr (KeyParts > 1) {
        _tile_dpbf16ps(0, 3, 5);
        _tile_dpbf16ps(1, 3, 6);
        between();
      }
    }
    if constexpr (QueryParts > 2) {
      load_queries(2);
      _tile_dpbf16ps(0, 2, 5);
      _tile_dpbf16ps(1, 2, 6);
      between();
    }
  }
  _tile_stored(0, out, 2 * kLanes * 4);
  _tile_stored(1, out + kLanes, 2 * kLanes * 4);
  for (uint64_t rest = in_float >> first & 0xffff; rest != 0; rest &= rest - 1) {
    const int t = __builtin_ctzll(rest);
    multiply_in_float(tile, first + t, pair, out + static_cast<ptrdiff_t>(t) * 2 * kLanes);
  }
}

template <int KeyParts, int QueryParts, bool SoftCap, bool Masked>
void scan_rows(const ScanTile& tile, uint64_t in_float, double* sums, uint32_t* kept) {
  constexpr int kTerms = terms(KeyParts, QueryParts);
  alignas(kCacheLine) float logits[2][kSplitRows * 2 * kLanes];
  const int pairs = (tile.vectors + 1) / 2;
  const int groups = (tile.count + kSplitRows - 1) / kSplitRows;
  const int products = pairs * groups;
  const int steps = kTerms * padded_depth(tile.depth) / kSplitDepth;  // of a product
  const int tokens_a_step = (kSplitRows + steps - 1) / steps;
  const int rows_a_step = (tile.ahead_count + products * steps - 1) / (products * steps);
  const int steps_between = tile.ahead_count == 0 ? 1 : 1 + (products * steps - 1) / tile.ahead_count;  // one ask for rows and the next
  int asked = 0;
  int step = 0;
  const auto ask = [&]() __attribute__((always_inline)) {
    if (++step < steps_between) return;
    step = 0;
    for (int i = 0; i < rows_a_step && asked < tile.ahead_count; ++i, ++asked) {
      ask_for<false>(tile.ahead_keys[asked], tile.ahead_bytes);
      if (tile.ahead_values != nullptr) ask_for<false>(tile.ahead_values[asked], tile.ahead_bytes);
      if (kept != nullptr) ask_for<true, true>(kept + static_cast<ptrdiff_t>(tile.count + asked) * pairs * kLanes, pairs * kLanes * 4);
    }
  };
  multiply<KeyParts, QueryParts>(tile, in_float, 0, 0, logits[0], ask);
  for (int pair = 0; pair < pairs; ++pair) {
    ScanRows<SoftCap, Masked, 2> rows(tile, 2 * pair, tile.vectors - 2 * pair, kept);
    for (int group = 0; group < groups; ++group) {
      const int product = pair * groups + group;
      const int first = group * kSplitRows;
      const int end = tile.count - first < kSplitRows ? tile.count : first + kSplitRows;
      const float* own = logits[product % 2];
      int token = first;
      const auto take = [&](int until) __attribute__((always_inline)) {
        for (; token < until; ++token, own += 2 * kLanes) rows.take(own, token);
      };
      if (product + 1 < products) {
        const bool last = group + 1 == groups;
        multiply<KeyParts, QueryParts>(tile, in_float, last ? 0 : first + kSplitRows, last ? pair + 1 : pair, logits[(product + 1) % 2],
                                       [&]() __attribute__((always_inline)) {
                                         ask();
                                         take(token + tokens_a_step < end ? token + tokens_a_step : end);
                                       });
      }
      take(end);
      rows.close();
    }
    rows.add_to(sums);
  }
}

void scan(const ScanTile& tile, double* sums, uint32_t* kept) {
  const uint64_t in_float = split_keys(tile);
  begin_tiles();
  with_parts(tile.key_type, tile.query_type, [&]<int KeyParts, int QueryParts>() {
    if (tile.soft_cap == 0)
      (tile.masked == nullptr ? scan_rows<KeyParts, QueryParts, false, false> : scan_rows<KeyParts, QueryParts, false, true>)(tile, in_float, sums,
                                                                                                                              kept);
    else
      (tile.masked == nullptr ? scan_rows<KeyParts, QueryParts, true, false> : scan_rows<KeyParts, QueryParts, true, true>)(tile, in_float, sums,
                                                                                                                            kept);
  });
  _tile_release();
}

}  // namespace amx

const Kernels& amx_kernels() noexcept {
  static const Kernels kernels = []() noexcept {
    Kernels all = avx512_kernels();
    all.name = "amx";
    all.pack_size = amx::pack_size;
    all.pack = amx::pack;
    all.logits = amx::logits;
    all.split_parts = kSplitParts;
    all.split = amx::split;
    all.scan = amx::scan;
    return all;
  }();
  return kernels;
}

}  // namespace laprox::cpu
#endif
