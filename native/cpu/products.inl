// Products of rows by vectors: tokens along the lanes, or query rows. A row is of words of 32 bits, and a Product says what a word is and how
// products of words are added up: a float, or a pair of numbers in bfloat16, whose rows of `depth` numbers are rows of half as many words.
//
// `multiply_panels` is where the time of exact scores goes: 2 * rows * depth operations a token. Its block is kPanel rows by two vectors of tokens,
// 12 accumulators: enough to hide the latency of two multiply-adds a cycle, and few enough for 16 registers; two panels by one
// vector where there are no more tokens. With the 32 registers of AVX-512 it is two panels by two vectors: a load feeds more
// multiply-adds, which the width of the front end would limit otherwise. A panel
// (depth * 6 words) and a stripe of the tile (depth * 2 vectors) stay in the first-level cache together.
#pragma once

#include "cpu/scan.inl"
#include "cpu/tile.hpp"
#include "cpu/vector.inl"

namespace laprox::cpu {
namespace LPX_NAMESPACE {

constexpr int kStripe = 2 * kLanes;          // tokens that `multiply_panels` takes at a time
constexpr int kHeld = kLanes == 16 ? 4 : 2;  // vectors of query rows that `scan` multiplies at a time: what fits the registers
static_assert(kTile % kStripe == 0, "a tile holds whole stripes");

struct Floats {
  static vf add(vf sum, float one, vf others) { return sum + one * others; }
};

// ------------------------------------------------------------------ tokens along the lanes

template <typename Product, int Panels, int Vectors>
inline void multiply_block(const float* panels, int depth, const float* tile, float* out) {
  vf sums[Panels * kPanel][Vectors] = {};
  const ptrdiff_t size = static_cast<ptrdiff_t>(Panels) * depth * kPanel;
  for (int k = 0; k < depth; ++k, tile += kStripe) {
    // What is multiplied next: factors are larger than the nearer caches.
    __builtin_prefetch(panels + size + static_cast<ptrdiff_t>(k) * Panels * kPanel);
    vf tokens[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) tokens[v] = load_vector(tile + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Panels * kPanel; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v)
        sums[r][v] = Product::add(sums[r][v], panels[(static_cast<ptrdiff_t>(r / kPanel) * depth + k) * kPanel + r % kPanel], tokens[v]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < Panels * kPanel; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store_vector(out + r * kTile + v * kLanes, sums[r][v]);
}

// As Kernels::multiply.
template <typename Product>
void multiply_panels(const float* panels, int rows, int depth, const float* tile, int count, float* out) {
  for (int row = 0; row < rows; row += 2 * kPanel, panels += static_cast<ptrdiff_t>(2) * depth * kPanel) {
    const bool two = row + kPanel < rows;
    for (int first = 0; first < count; first += kStripe) {
      const float* stripe = tile + static_cast<ptrdiff_t>(first) * depth;
      float* to = out + static_cast<ptrdiff_t>(row) * kTile + first;
      if (count - first > kLanes) {
        if (two && kLanes == 16) {
          multiply_block<Product, 2, 2>(panels, depth, stripe, to);
        } else {
          multiply_block<Product, 1, 2>(panels, depth, stripe, to);
          if (two) multiply_block<Product, 1, 2>(panels + static_cast<ptrdiff_t>(depth) * kPanel, depth, stripe, to + kPanel * kTile);
        }
      } else if (two) {
        multiply_block<Product, 2, 1>(panels, depth, stripe, to);
      } else {
        multiply_block<Product, 1, 1>(panels, depth, stripe, to);
      }
    }
  }
}

// ------------------------------------------------------------------ query rows along the lanes

// The vectors of packed query rows in blocks of whole pairs, as even as they can be; the last pair may be one vector.
struct ScanBlocks {
  constexpr ScanBlocks(int vectors, int most) : vectors(vectors), pairs((vectors + 1) / 2), count((pairs + most / 2 - 1) / (most / 2)) {}
  // The first vector of a block.
  constexpr int begin(int block) const {
    const int vector = 2 * (pairs * block / count);
    return vector < vectors ? vector : vectors;
  }
  int vectors;
  int pairs;
  int count;
};

// Rows to ask for while a product is computed: all at once they would fill the buffers that wait for memory.
struct Ahead {
  const void* const* keys;
  const void* const* values;  // null where they are not wanted
  int count;
  int bytes;
};

// out[t][0 .. Vectors) = sum over k of keys[t][k] * queries[k][..], k ascending as in `multiply`: the same bits. Of `count` tokens up to kScanBlock;
// behind them is the last one again.
template <typename Product, int Vectors>
[[gnu::noinline]] void multiply_keys(const void* const* keys, int count, int depth, const float* queries, Ahead ahead, float* out) {
  const ptrdiff_t pair = static_cast<ptrdiff_t>(depth) * kStripe;
  const float_unaligned* key[kScanBlock];
  vf sums[kScanBlock][Vectors];
#pragma GCC unroll 6
  for (int t = 0; t < kScanBlock; ++t) {
    key[t] = static_cast<const float_unaligned*>(keys[t < count ? t : count - 1]);
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sums[t][j] = vf{};
  }
  const int step = ahead.count == 0 ? depth : depth / ahead.count;
  for (int k = 0, row = 0; k < depth; ++row) {
    if (row < ahead.count) {
      ask_for<true>(ahead.keys[row], ahead.bytes);
      if (ahead.values != nullptr) ask_for<true>(ahead.values[row], ahead.bytes);
    }
    const int end = row + 1 < ahead.count ? k + step : depth;
    for (; k < end; ++k, queries += kStripe) {
      vf query[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) query[j] = load_vector(queries + j / 2 * pair + j % 2 * kLanes);
#pragma GCC unroll 6
      for (int t = 0; t < kScanBlock; ++t)
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) sums[t][j] = Product::add(sums[t][j], key[t][k], query[j]);
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < kScanBlock; ++t, out += Vectors * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store_vector(out + j * kLanes, sums[t][j]);
}

// What is multiplied of a tile: `depth` words a row, of [count] keys and of queries [depth][2 * kLanes] a pair of vectors.
struct Operands {
  const void* const* keys;
  const float* queries;
  int depth;
};

// Calls body.operator()<Width>(vector, logits_of) for each block of Width vectors of rows; logits_of(first) are those of a block of tokens,
// [kScanBlock][Width * kLanes], until it is called again. To be called for each, in order.
template <typename Product, typename Body>
inline void for_each_block(const ScanRun& tile, const Operands& of, Body&& body) {
  alignas(kCacheLine) float logits[kScanBlock * kHeld * kLanes];
  const ScanBlocks blocks(tile.vectors, kHeld);
  const int products = (tile.count + kScanBlock - 1) / kScanBlock * blocks.count;
  const int share = (tile.ahead + products - 1) / products;
  int asked = 0;
  for (int block = 0; block < blocks.count; ++block) {
    const int vector = blocks.begin(block);
    const auto take = [&]<int Width>() {
      body.template operator()<Width>(vector, [&](int first) {
        const int row = tile.count + asked;
        const int left = tile.ahead - asked;
        const Ahead ahead{tile.keys + row, tile.values == nullptr ? nullptr : tile.values + row, left < share ? left : share,
                          tile.depth * static_cast<int>(element_size(tile.key_type))};
        asked += ahead.count;
        multiply_keys<Product, Width>(of.keys + first, tile.count - first, of.depth, of.queries + static_cast<ptrdiff_t>(vector) * kLanes * of.depth,
                                      ahead, logits);
        return static_cast<const float*>(logits);
      });
    };
    switch (blocks.begin(block + 1) - vector) {
      case 1: take.template operator()<1>(); break;
#if LPX_LANES == 16
      case 2: take.template operator()<2>(); break;
      case 3: take.template operator()<3>(); break;
#endif
      default: take.template operator()<kHeld>(); break;
    }
  }
}

template <typename Product, bool SoftCap, bool Masked>
void scan_rows(const ScanRun& tile, const Operands& of, double* sums, uint32_t* kept) {
  for_each_block<Product>(tile, of, [&tile, sums, kept]<int Width>(int vector, auto&& logits_of) {
    ScanRows<SoftCap, Masked, Width> rows(tile, vector, Width, kept);
    for (int first = 0; first < tile.count; first += kScanBlock) {
      const float* logits = logits_of(first);
      const int end = tile.count - first < kScanBlock ? tile.count : first + kScanBlock;
      for (int t = first; t < end; ++t, logits += Width * kLanes) rows.take(logits, t);
      rows.close();
    }
    rows.add_to(sums);
  });
}

// A tile, as Kernels::scan a run.
template <typename Product>
void scan_operands(const ScanRun& tile, const Operands& of, double* sums, uint32_t* kept) {
  if (tile.soft_cap == 0)
    (tile.masked == nullptr ? scan_rows<Product, false, false> : scan_rows<Product, false, true>)(tile, of, sums, kept);
  else
    (tile.masked == nullptr ? scan_rows<Product, true, false> : scan_rows<Product, true, true>)(tile, of, sums, kept);
}

}  // namespace LPX_NAMESPACE
}  // namespace laprox::cpu
