// Logits by AMX, the matrix instructions of Intel's servers; all other kernels are those of AVX-512.
//
// An instruction multiplies numbers in bfloat16 and adds in float, at 16 times the rate of multiply-adds in float:
//
//   C[16][16] += A[16][32] * B[16][16][2], of tiles in registers; B has pairs of numbers, those of a column one below the other
//
// A float is the sum of three such numbers, x = x0 + x1 + x2: of a query each the nearest to what those before it leave, of a key cut off it, which
// takes fewer operations. A product is the sum of the six qi kj with i + j <= 2; what is left out is below 2^-22 |q k|, and has no sign of its own,
// since a query's parts have none. Sums of 32 are rounded apart from the total, so that logits are closer than those of a chain of multiply-adds.
// Numbers in bfloat16 and float16 are one and two parts. Numbers that parts cannot hold (huge ones, infinity, NaN) are multiplied in float.
//
// Bytes: keys are split where they are read, 6 for a float's 4, into memory that the nearer caches hold; queries once for all keys.
// The scan has keys in A and packed query rows in B, so that both lie as they are in memory; `logits` has query rows in A and keys in B,
// which come out as [rows][tokens]. Both add the same products in the same order: the same bits.
//
// In the scan, instructions for tiles take turns with all others: while 16 tokens by two vectors of rows are multiplied, in 12 steps of two
// instructions for 64 floats, those multiplied before become attention, two tokens a step, and keys of the next tile are split, one every third.
// One after the other they take longer, since a processor does not look far enough ahead to mix them itself.
#if defined(__x86_64__)
#define LPX_LANES 16
#define LPX_NAMESPACE amx
#include <cstring>

#include "core/geometry.hpp"
#include "cpu/scan.inl"

namespace laprox::cpu {
namespace amx {

constexpr int kTileNumbers = kSplitRows * kSplitDepth;

// To numbers in bfloat16: the nearest, and the next towards 0.
inline vf nearest(vf x) { return reinterpret_cast<vf>((reinterpret_cast<vu>(x) + 0x8000u) & kUpperHalf); }
inline vf cut(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vu>(x) & kUpperHalf); }

// Calls store(part, pairs of numbers) for each part of both.
template <int Parts, vf (*Round)(vf), typename Store>
[[gnu::always_inline]] inline void split_pairs(vf low, vf high, Store&& store) {
  for (int part = 0; part < Parts; ++part) {
    const vf low_part = Round(low);
    const vf high_part = Round(high);
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
        split_pairs<kSplitParts, nearest>(low, high, [&](int part, vu pairs) {
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

// Those of 16 numbers that exist.
template <lpx_dtype Type>
inline vf read(const void* numbers, __mmask16 existing) {
  if constexpr (Type == LPX_F32) return _mm512_maskz_loadu_ps(existing, numbers);
  typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
  const __m256i bits = _mm256_maskz_loadu_epi16(existing, numbers);
  if constexpr (Type == LPX_F16) return _mm512_maskz_cvtph_ps(existing, bits);
  return reinterpret_cast<vf>(__builtin_convertvector(reinterpret_cast<vh>(bits), vu) << 16);
}

// Of pairs of numbers in bfloat16.
inline vu larger(vu a, vu b) { return reinterpret_cast<vu>(_mm512_max_epu16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b))); }

// Those of 32 numbers that exist, to[part * stride]. Returns the magnitudes of their first parts.
template <lpx_dtype Type>
inline vu split_numbers(const void* numbers, __mmask32 existing, ptrdiff_t stride, uint16_t* to) {
  const vf low = read<Type>(numbers, static_cast<__mmask16>(existing));
  const vf high = read<Type>(static_cast<const std::byte*>(numbers) + kLanes * element_size(Type), static_cast<__mmask16>(existing >> kLanes));
  vu first = {};
  split_pairs<split_parts(Type), cut>(low, high, [&](int part, vu pairs) {
    store_bits(reinterpret_cast<uint32_t*>(to + part * stride), pairs);
    if (part == 0) first = pairs & 0x7fff7fffu;
  });
  return first;
}

// to[part][kScanTile][padded depth], of which this is a row. Returns whether it could not be split.
template <lpx_dtype Type>
[[gnu::always_inline]] inline bool split_row(const void* row, int depth, uint16_t* to) {
  const ptrdiff_t stride = static_cast<ptrdiff_t>(kScanTile) * padded_depth(depth);
  const auto* from = static_cast<const std::byte*>(row);
  vu largest = {};
  int k = 0;
  for (; k + kSplitDepth <= depth; k += kSplitDepth, from += kSplitDepth * element_size(Type))
    largest = larger(largest, split_numbers<Type>(from, ~__mmask32{0}, stride, to + k));
  if (k < depth) largest = larger(largest, split_numbers<Type>(from, (__mmask32{1} << (depth - k)) - 1, stride, to + k));
  return _mm512_cmpge_epu16_mask(reinterpret_cast<__m512i>(largest), _mm512_set1_epi16(kHugeBits >> 16)) != 0;
}

// Rows of a tile, as those before. Returns a bit for each that could not be split.
template <lpx_dtype Type>
uint64_t split_rows(const void* const* rows, int count, int depth, uint16_t* to) {
  static_assert(kScanTile < 64);
  uint64_t unsplit = 0;
  for (int i = 0; i < count; ++i, to += padded_depth(depth)) unsplit |= uint64_t{split_row<Type>(rows[i], depth, to)} << i;
  return unsplit;
}

struct alignas(kCacheLine) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows, kSplitRows};
};
constexpr Configuration kConfiguration;  // in memory: GCC thinks that 8 bytes of it are read

// What was stored before may be loaded as tiles. GCC does not know that these come from memory.
inline void publish() { asm volatile("" ::: "memory"); }

// Tiles can be used until _tile_release().
inline void begin_tiles() {
  publish();
  _tile_loadconfig(&kConfiguration);
}

// Calls body.operator()<type of keys, parts of queries>(). Queries of another type than the keys count as floats.
template <typename Body>
void with_types(lpx_dtype keys, lpx_dtype queries, Body&& body) {
  switch (keys) {
    case LPX_F32: return body.template operator()<LPX_F32, 3>();
    case LPX_F16: return queries == LPX_F16 ? body.template operator()<LPX_F16, 2>() : body.template operator()<LPX_F16, 3>();
    case LPX_BF16: return queries == LPX_BF16 ? body.template operator()<LPX_BF16, 1>() : body.template operator()<LPX_BF16, 3>();
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
    for (int k = 0; k < padded_depth(depth); k += kSplitDepth)
      split_pairs<kSplitParts, nearest>(load_vector(row + k), load_vector(row + k + kLanes),
                                        [&](int part, vu pairs) { store_bits(reinterpret_cast<uint32_t*>(split + part * stride + k), pairs); });
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
  uint64_t in_float = 0;
  with_types(tile.key_type, tile.query_type,
             [&]<lpx_dtype Type, int>() { in_float = split_rows<Type>(tile.keys, tile.count, tile.depth, tile.room); });
  if (tile.in_float) in_float = (uint64_t{1} << tile.count) - 1;
  // Pairs of numbers are moved as if they were floats.
  uint16_t* keys = tile.room + split_keys_size(tile.depth);
  for (int part = 0; part < split_parts(tile.key_type); ++part) {
    const void* pairs[kTile];
    for (int t = 0; t < tile.count; ++t) pairs[t] = tile.room + (static_cast<ptrdiff_t>(part) * kScanTile + t) * depth;
    avx512_kernels().load(LPX_F32, pairs, tile.count, depth / 2, reinterpret_cast<float*>(keys + static_cast<ptrdiff_t>(part) * depth * kTile));
  }
  begin_tiles();
  with_types(tile.key_type, tile.query_type, [&]<lpx_dtype Type, int QueryParts>() {
    for (int64_t r = 0; r < rows; r += kSplitRows)
      multiply_rows<split_parts(Type), QueryParts>(queries + r * depth, rows * depth, keys, depth, tile.out + r * kTile);
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

// The logits of a key and a pair of vectors of query rows, k ascending.
[[gnu::noinline]] void multiply_in_float(const ScanRun& run, const void* row, int pair, float* out) {
  float key[kMaxHeadDim];
  avx512_kernels().convert(run.key_type, row, run.depth, key);
  const float* rows = run.queries + static_cast<ptrdiff_t>(pair) * run.depth * 2 * kLanes;
  vf sums[2] = {};
  for (int k = 0; k < run.depth; ++k)
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

// out[kSplitRows][2 * kLanes] of tokens whose parts begin at `key` and a pair of vectors of rows. Calls between() each time both vectors have been
// multiplied.
template <int KeyParts, int QueryParts, typename Between>
[[gnu::always_inline]] inline void multiply(const uint16_t* key, const uint16_t* query, int depth, float* out, Between&& between) {
  const ptrdiff_t key_part = static_cast<ptrdiff_t>(kScanTile) * depth;
  const ptrdiff_t query_part = static_cast<ptrdiff_t>(2) * depth * kLanes;
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
}

// How something that is wanted `count` times is spread over `steps`: so many times every so many steps.
struct Pace {
  Pace(int count, int steps) : times((count + steps - 1) / steps), every(steps < count ? 1 : steps / count) {}
  int times;
  int every;
};

// What 16 tokens by two vectors of rows are multiplied to.
struct Product {
  int pair;
  int first;  // token
  int count;
};

// Takes the logits of a product, some tokens at a time.
template <bool SoftCap, bool Masked>
class Taking {
 public:
  [[gnu::always_inline]] Taking(const ScanRun& run, const Product& of, const float* logits, uint32_t* kept)
      : rows_(run, 2 * of.pair, run.vectors - 2 * of.pair, kept), logits_(logits), token_(of.first), end_(of.first + of.count) {}

  [[gnu::always_inline]] void take(int tokens) {
    const int until = token_ + tokens < end_ ? token_ + tokens : end_;
    for (; token_ < until; ++token_, logits_ += 2 * kLanes) rows_.take(logits_, token_);
  }
  [[gnu::always_inline]] void finish(double* sums) {
    take(kSplitRows);
    rows_.close();
    rows_.add_to(sums);
  }

 private:
  ScanRows<SoftCap, Masked, 2> rows_;
  const float* logits_;
  int token_;
  int end_;
};

// Keys of a run, split.
struct SplitTile {
  int first;  // token
  int count;
  uint16_t* keys;
  uint64_t in_float;  // those that could not be split
};

template <lpx_dtype Type, int QueryParts, bool SoftCap, bool Masked>
void scan_run(const ScanRun& run, double* sums, uint32_t* kept) {
  constexpr int kKeyParts = split_parts(Type);
  alignas(kCacheLine) float logits[2][kSplitRows * 2 * kLanes];
  const int depth = padded_depth(run.depth);
  const int bytes = run.depth * static_cast<int>(element_size(Type));
  const int pairs = (run.vectors + 1) / 2;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(pairs) * kLanes;
  const int steps = terms(kKeyParts, QueryParts) * depth / kSplitDepth;  // of a product
  const Pace tokens(kSplitRows, steps);
  const auto tile_from = [&](int first) -> SplitTile {
    const int left = run.count - first;
    return {first, left < kScanTile ? left : kScanTile, run.room + first / kScanTile % 2 * split_keys_size(run.depth), 0};
  };
  const auto split_key = [&](SplitTile& tile, int i) __attribute__((always_inline)) {
    const bool in_float = split_row<Type>(run.keys[tile.first + i], run.depth, tile.keys + static_cast<ptrdiff_t>(i) * depth);
    tile.in_float |= uint64_t{in_float || run.in_float} << i;
  };
  int products = 0;
  Product before{};  // whose logits are not taken yet
  const auto taking = [&]() __attribute__((always_inline)) {
    return Taking<SoftCap, Masked>(run, before, logits[(products + 1) % 2], kept == nullptr ? nullptr : kept + before.first * stride);
  };

  SplitTile tile = tile_from(0);
  for (int i = 0; i < tile.count; ++i) split_key(tile, i);
  for (SplitTile next; tile.count > 0; tile = next) {
    publish();
    next = tile_from(tile.first + kScanTile);
    const int groups = (tile.count + kSplitRows - 1) / kSplitRows;
    const Pace keys(kScanTile, pairs * groups * steps);
    int step = 0;
    int key = 0;
    const auto prepare_next = [&]() __attribute__((always_inline)) {
      if (key < next.count) split_key(next, key);
      const int behind = next.first + kScanTile + key;
      if (behind < run.count + run.ahead) {
        ask_for<false>(run.keys[behind], bytes);
        if (run.values != nullptr) ask_for<false>(run.values[behind], bytes);
      }
      if (kept != nullptr) ask_for<true, true>(kept + (next.first + key) * stride, static_cast<int>(stride) * 4);
      ++key;
    };
    if (run.values != nullptr) avx512_kernels().norms(Type, run.values + tile.first, tile.count, run.depth, run.norms + tile.first);
    for (int pair = 0; pair < pairs; ++pair) {
      const uint16_t* query = run.split_queries + static_cast<ptrdiff_t>(pair) * 2 * kLanes * split_size(run.depth);
      for (int group = 0; group < groups; ++group, ++products) {
        const int first = group * kSplitRows;
        float* out = logits[products % 2];
        auto last = taking();
        multiply<kKeyParts, QueryParts>(tile.keys + static_cast<ptrdiff_t>(first) * depth, query, depth, out, [&]() __attribute__((always_inline)) {
          if (++step == keys.every) {
            step = 0;
            for (int i = 0; i < keys.times && key < kScanTile; ++i) prepare_next();
          }
          last.take(tokens.times);
        });
        last.finish(sums);
        for (uint64_t rest = tile.in_float >> first & 0xffff; rest != 0; rest &= rest - 1) {
          const int t = __builtin_ctzll(rest);
          multiply_in_float(run, run.keys[tile.first + first + t], pair, out + static_cast<ptrdiff_t>(t) * 2 * kLanes);
        }
        before = {pair, tile.first + first, tile.count - first < kSplitRows ? tile.count - first : kSplitRows};
      }
    }
    while (key < next.count) prepare_next();
  }
  taking().finish(sums);
}

void scan(const ScanRun& run, double* sums, uint32_t* kept) {
  begin_tiles();
  with_types(run.key_type, run.query_type, [&]<lpx_dtype Type, int QueryParts>() {
    if (run.soft_cap == 0)
      (run.masked == nullptr ? scan_run<Type, QueryParts, false, false> : scan_run<Type, QueryParts, false, true>)(run, sums, kept);
    else
      (run.masked == nullptr ? scan_run<Type, QueryParts, true, false> : scan_run<Type, QueryParts, true, true>)(run, sums, kept);
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
