// The kernels of a tile, compiled once for each instruction set: the including file defines LPX_LANES, LPX_NAMESPACE and
// LPX_KERNELS (the accessor's name). Vectors are the compiler's own, so that one text serves SSE2, AVX2, AVX-512 and NEON.

#include <cstring>

#include "cpu/products.inl"
#include "cpu/tile.hpp"
#include "cpu/vector.inl"

namespace laprox::cpu {
namespace LPX_NAMESPACE {

constexpr int kVectors = kTile / kLanes;  // vectors in a row of a tile
constexpr int kKeptAhead = 16;            // tokens that `square` asks for before it reads them
constexpr int kFormsAhead = 1024;         // numbers that `forms` asks for before it reads them

// ------------------------------------------------------------------ rows in

inline v8 read_f32(const void* row, int k) { return reinterpret_cast<const v8_unaligned*>(static_cast<const float*>(row) + k)[0]; }

inline u8 read_u16(const void* row, int k) {
  const h8 half = reinterpret_cast<const h8_unaligned*>(static_cast<const uint16_t*>(row) + k)[0];
  return __builtin_convertvector(half, u8);
}

inline v8 read_bf16(const void* row, int k) { return reinterpret_cast<v8>(read_u16(row, k) << 16); }

// The exponent is rebased by a multiplication, which is right for subnormal numbers too; infinity and NaN are then restored.
inline v8 read_f16(const void* row, int k) {
  const u8 bits = read_u16(row, k);
  const v8 rebased = reinterpret_cast<v8>((bits & 0x7fffu) << 13) * 5.192296858534828e33f;  // 2^112
  const u8 special = reinterpret_cast<u8>((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<v8>(reinterpret_cast<u8>(rebased) | special | ((bits & 0x8000u) << 16));
}

// 8 rows of 8 numbers to 8 columns.
inline void transpose(v8 r[8]) {
  v8 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  v8 u[8];
  for (int i = 0; i < 8; i += 4) {
    u[i] = __builtin_shufflevector(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    u[i + 1] = __builtin_shufflevector(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    u[i + 2] = __builtin_shufflevector(t[i + 1], t[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    u[i + 3] = __builtin_shufflevector(t[i + 1], t[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

template <v8 (*Read)(const void*, int)>
void load_rows(const void* const* rows, int count, int depth, float* tile) {
  for (int first = 0; first < kTile; first += 8) {
    float* stripe = tile + static_cast<ptrdiff_t>(first / kStripe) * depth * kStripe + first % kStripe;
    for (int k = 0; k < depth; k += 8) {
      v8 block[8];
      for (int i = 0; i < 8; ++i) block[i] = first + i < count ? Read(rows[first + i], k) : v8{};
      transpose(block);
      for (int i = 0; i < 8; ++i) *reinterpret_cast<v8_unaligned*>(stripe + (k + i) * kStripe) = block[i];
    }
  }
}

void load(lpx_dtype dtype, const void* const* rows, int count, int depth, float* tile) {
  switch (dtype) {
    case LPX_F32: return load_rows<read_f32>(rows, count, depth, tile);
    case LPX_F16: return load_rows<read_f16>(rows, count, depth, tile);
    case LPX_BF16: return load_rows<read_bf16>(rows, count, depth, tile);
  }
}

inline v8 read(lpx_dtype dtype, const void* row, int k) {
  switch (dtype) {
    case LPX_F16: return read_f16(row, k);
    case LPX_BF16: return read_bf16(row, k);
    default: return read_f32(row, k);
  }
}

void convert(lpx_dtype dtype, const void* from, int64_t count, float* to) {
  const int64_t whole = count / 8 * 8;
  const size_t element = element_size(dtype);
  for (int64_t i = 0; i < whole; i += 8)
    *reinterpret_cast<v8_unaligned*>(to + i) = read(dtype, static_cast<const char*>(from) + static_cast<size_t>(i) * element, 0);
  if (whole == count) return;
  float rest[8] = {};
  std::memcpy(rest, static_cast<const char*>(from) + static_cast<size_t>(whole) * element, static_cast<size_t>(count - whole) * element);
  v8 numbers = read(dtype, rest, 0);
  std::memcpy(to + whole, &numbers, static_cast<size_t>(count - whole) * 4);
}

// ------------------------------------------------------------------ products

void multiply(const float* panels, int rows, int depth, const float* tile, int count, float* out) {
  multiply_panels<Floats>(panels, rows, depth, tile, count, out);
}

int64_t pack_size(int count, int depth) { return static_cast<int64_t>(panels_for(count)) * kPanel * depth * 4; }

void pack(lpx_dtype dtype, const void* const* rows, int count, int depth, std::byte* out) {
  auto* to = reinterpret_cast<float*>(out);
  for (int first = 0; first < count; first += kPanel) {
    for (int k = 0; k < depth; k += 8) {
      v8 block[8];
      for (int i = 0; i < 8; ++i) block[i] = i < kPanel && first + i < count ? read(dtype, rows[first + i], k) : v8{};
      transpose(block);
      for (int i = 0; i < 8; ++i, to += kPanel) std::memcpy(to, &block[i], kPanel * sizeof(float));
    }
  }
}

void logits(const LogitTile& tile) {
  auto* keys = reinterpret_cast<float*>(tile.room);
  load(tile.key_type, tile.keys, tile.count, tile.depth, keys);
  multiply(reinterpret_cast<const float*>(tile.queries), tile.rows, tile.depth, keys, tile.count, tile.out);
}

// Row by row of the triangle: (sum over j >= i of form[i][j] v_j) v_i.
template <int Pairs, int Vectors>
void forms_block(const float* forms, int depth, const float* tile, float* out) {
  vf sums[Pairs][Vectors] = {};
  for (int i = 0; i < depth; ++i) {
    vf rows[Pairs][Vectors] = {};
    for (int j = i; j < depth; ++j, forms += Pairs) {
      __builtin_prefetch(forms + kFormsAhead);
      vf tokens[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) tokens[v] = load_vector(tile + static_cast<ptrdiff_t>(j) * kStripe + v * kLanes);
#pragma GCC unroll 5
      for (int pair = 0; pair < Pairs; ++pair)
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) rows[pair][v] += forms[pair] * tokens[v];
    }
#pragma GCC unroll 5
    for (int pair = 0; pair < Pairs; ++pair)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[pair][v] += rows[pair][v] * load_vector(tile + static_cast<ptrdiff_t>(i) * kStripe + v * kLanes);
  }
#pragma GCC unroll 5
  for (int pair = 0; pair < Pairs; ++pair)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store_vector(out + pair * kTile + v * kLanes, sums[pair][v]);
}

template <int Pairs>
void forms_of(const float* forms, int depth, const float* tile, int count, float* out) {
  for (int first = 0; first < count; first += kStripe) {
    const float* stripe = tile + static_cast<ptrdiff_t>(first) * depth;
    (count - first > kLanes ? forms_block<Pairs, 2> : forms_block<Pairs, 1>)(forms, depth, stripe, out + first);
  }
}

void forms(const float* forms, int pairs, int depth, const float* tile, int count, float* out) {
  static_assert(kFormPairs == 5);
  const ptrdiff_t size = static_cast<ptrdiff_t>(depth) * (depth + 1) / 2;
  for (; pairs > 0; pairs -= kFormPairs, forms += size * kFormPairs, out += kFormPairs * kTile) {
    switch (pairs) {
      case 1: forms_of<1>(forms, depth, tile, count, out); break;
      case 2: forms_of<2>(forms, depth, tile, count, out); break;
      case 3: forms_of<3>(forms, depth, tile, count, out); break;
      case 4: forms_of<4>(forms, depth, tile, count, out); break;
      default: forms_of<5>(forms, depth, tile, count, out);
    }
  }
}

template <int Heads>
void pair_products_of(const float* x, int rows, int first, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    vf sums[pair_count(Heads)] = {};
    for (int r = 0; r < rows; ++r) {
      vf head[Heads];
      for (int h = 0; h < Heads; ++h) head[h] = load_vector(x + (static_cast<ptrdiff_t>(h) * rows + r) * kTile + v * kLanes);
      for (int h = 0; h < Heads; ++h)
        for (int other = h; other < Heads; ++other) sums[pair_index(h, other)] += head[h] * head[other];
    }
    for (int h = 0; h < Heads; ++h) {
      for (int other = h; other < Heads; ++other) {
        float* to = out + static_cast<ptrdiff_t>(pair_index(first + h, first + other)) * kTile + v * kLanes;
        store_vector(to, load_vector(to) + sums[pair_index(h, other)]);
      }
    }
  }
}

void pair_products_general(const float* x, int heads, int rows, int first, float* out) {
  for (int other = 0; other < heads; ++other) {
    for (int h = 0; h <= other; ++h) {
      float* to = out + static_cast<ptrdiff_t>(pair_index(first + h, first + other)) * kTile;
      const float* a = x + static_cast<ptrdiff_t>(h) * rows * kTile;
      const float* b = x + static_cast<ptrdiff_t>(other) * rows * kTile;
      vf sums[kVectors] = {};
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[v] += load_vector(a + r * kTile + v * kLanes) * load_vector(b + r * kTile + v * kLanes);
      for (int v = 0; v < kVectors; ++v) store_vector(to + v * kLanes, load_vector(to + v * kLanes) + sums[v]);
    }
  }
}

void pair_products(const float* x, int heads, int rows, int first, float* out) {
  switch (heads) {
    case 1: return pair_products_of<1>(x, rows, first, out);
    case 2: return pair_products_of<2>(x, rows, first, out);
    case 3: return pair_products_of<3>(x, rows, first, out);
    case 4: return pair_products_of<4>(x, rows, first, out);
    default: return pair_products_general(x, heads, rows, first, out);
  }
}

// ------------------------------------------------------------------ attention

// Sets what a row does not see to 0.
void hide(const AttentionTile& tile) {
  const Visibility& mask = *tile.masked;
  for (int row = 0; row < tile.heads * tile.rows; ++row) {
    const int32_t last = mask.last + row % tile.rows;
    for (int v = 0; v < kVectors; ++v) {
      float* at = tile.logits + static_cast<ptrdiff_t>(row) * kTile + v * kLanes;
      const vi position = *reinterpret_cast<const vi_unaligned*>(mask.positions + v * kLanes);
      vi seen = position <= last;
      if (mask.window != 0) seen &= position > last - mask.window;
      store_vector(at, bits_to_float(float_to_bits(load_vector(at)) & seen));
    }
  }
}

template <bool SoftCap>
inline void attend_rows(const AttentionTile& tile) {
  for (int row = 0; row < tile.heads * tile.rows; ++row) {
    float* logits = tile.logits + static_cast<ptrdiff_t>(row) * kTile;
    const float residual = tile.residual == nullptr ? 0.0f : tile.residual[row];
    for (int v = 0; v * kLanes < tile.count; ++v) {
      const vf x = exponent<SoftCap>(logits + v * kLanes, tile.scale, tile.soft_cap, splat(tile.reference[row])) - residual;
      store_vector(logits + v * kLanes, power_of_two(x));
    }
  }
}

void attend(const AttentionTile& tile) {
  if (tile.soft_cap == 0)
    attend_rows<false>(tile);
  else
    attend_rows<true>(tile);
  if (tile.masked != nullptr) hide(tile);
}

// ------------------------------------------------------------------ the scan

// Of a tile in floats: keys of other types are converted, into tile.room, and their addresses are `converted`.
Operands in_floats(const ScanRun& tile, const void** converted) {
  if (tile.key_type == LPX_F32) return {tile.keys, tile.queries, tile.depth};
  auto* row = reinterpret_cast<float*>(tile.room);
  for (int t = 0; t < tile.count; ++t, row += tile.depth) {
    convert(tile.key_type, tile.keys[t], tile.depth, row);
    converted[t] = row;
  }
  return {converted, tile.queries, tile.depth};
}

void norms(lpx_dtype dtype, const void* const* rows, int count, int depth, float* out);

void scan(const ScanRun& run, double* sums, uint32_t* kept) {
  for_each_tile(run, kept, [sums](const ScanRun& tile, uint32_t* kept_of_tile) {
    const void* converted[kScanTile];
    if (tile.values != nullptr) norms(tile.key_type, tile.values, tile.count, tile.depth, tile.norms);
    scan_operands<Floats>(tile, in_floats(tile, converted), sums, kept_of_tile);
  });
}

template <bool SoftCap>
void sample_rows(const ScanRun& tile, float* largest, float* sums) {
  const void* converted[kScanTile];
  for_each_block<Floats>(tile, in_floats(tile, converted), [&]<int Width>(int vector, auto&& logits_of) {
    for (int first = 0; first < tile.count; first += kScanBlock) {
      const float* logits = logits_of(first);
      const int count = tile.count - first < kScanBlock ? tile.count - first : kScanBlock;
      for (int j = 0; j < Width; ++j) {
        const ptrdiff_t row = static_cast<ptrdiff_t>(vector + j) * kLanes;
        const vf before = load_vector(largest + row);
        vf most = before;
        vf x[kScanBlock];
        for (int t = 0; t < count; ++t) {
          x[t] = exponent<SoftCap>(logits + (t * Width + j) * kLanes, tile.scale, tile.soft_cap, vf{});
          if (tile.masked != nullptr) x[t] = visible(*tile.masked, tile.rows + row, first + t) ? x[t] : splat(-INFINITY);
          most = x[t] > most ? x[t] : most;
        }
        const vf base = most == -INFINITY ? vf{} : most;
        vf sum = load_vector(sums + row) * power_of_two(before - base);
        for (int t = 0; t < count; ++t) sum += power_of_two(x[t] - base);
        store_vector(sums + row, sum);
        store_vector(largest + row, most);
      }
    }
  });
}

void sample(const ScanRun& tile, float* largest, float* sums) { (tile.soft_cap == 0 ? sample_rows<false> : sample_rows<true>)(tile, largest, sums); }

#if LPX_LANES == 16
// Of one chunk of Pairs whole pairs of vectors, whose weights stay in registers.
template <int Pairs>
void square_pairs(const uint32_t* kept, int count, const float* weights, float* out) {
  vf weight[Pairs][2];
#pragma GCC unroll 8
  for (int pair = 0; pair < Pairs; ++pair)
    for (int half = 0; half < 2; ++half) weight[pair][half] = load_vector(weights + (2 * pair + half) * kLanes);
  for (int t = 0; t < count; ++t, kept += Pairs * kLanes, out += kLanes) {
    ask_for<true>(kept + kKeptAhead * Pairs * kLanes, Pairs * kLanes * 4);
    vf sums[2] = {};
#pragma GCC unroll 8
    for (int pair = 0; pair < Pairs; ++pair) {
      const vu both = load_bits(kept + pair * kLanes);
      const vf low = reinterpret_cast<vf>(both << 16) * weight[pair][0];
      const vf high = reinterpret_cast<vf>(both & kUpperHalf) * weight[pair][1];
      sums[0] += low * low;
      sums[1] += high * high;
    }
    store_vector(out, sums[0] + sums[1]);
  }
}

#endif

void square_chunks(const uint32_t* kept, int count, int chunks, int vectors, const float* weights, float* out) {
  const ptrdiff_t stride = static_cast<ptrdiff_t>((chunks * vectors + 1) / 2) * kLanes;
  const ptrdiff_t out_stride = (static_cast<ptrdiff_t>(chunks) * kLanes + 7) / 8 * 8;
  for (int t = 0; t < count; ++t, kept += stride, out += out_stride) {
    const uint32_t* pair = kept;
    float* to = out;
    const float* weight = weights;
    bool between = false;  // the halves of a pair
    ask_for<true>(kept + kKeptAhead * stride, static_cast<int>(stride) * 4);
    for (int chunk = 0; chunk < chunks; ++chunk, to += kLanes) {
      vf sums[2] = {};
      const auto add = [&](int half, vu bits) {
        const vf a = reinterpret_cast<vf>(bits) * load_vector(weight);
        sums[half] += a * a;
        weight += kLanes;
      };
      int left = vectors;
      if (between) {
        add(1, load_bits(pair) & kUpperHalf);
        pair += kLanes;
        --left;
      }
      for (; left > 1; left -= 2, pair += kLanes) {
        const vu both = load_bits(pair);
        add(0, both << 16);
        add(1, both & kUpperHalf);
      }
      between = left == 1;
      if (between) add(0, load_bits(pair) << 16);
      store_vector(to, sums[0] + sums[1]);
    }
  }
}

void square(const uint32_t* kept, int count, int chunks, int vectors, const float* weights, float* out) {
#if LPX_LANES == 16
  switch (chunks == 1 ? vectors : 0) {
    case 2: return square_pairs<1>(kept, count, weights, out);
    case 4: return square_pairs<2>(kept, count, weights, out);
    case 8: return square_pairs<4>(kept, count, weights, out);
    case 16: return square_pairs<8>(kept, count, weights, out);
  }
#endif
  square_chunks(kept, count, chunks, vectors, weights, out);
}

// ------------------------------------------------------------------ statistics

void attention_statistic(const float* attention, int heads, int rows, int existing, lpx_attention_statistic statistic, float* out) {
  for (int h = 0; h < heads; ++h) {
    const float* head = attention + static_cast<ptrdiff_t>(h) * rows * kTile;
    for (int v = 0; v < kVectors; ++v) {
      vf value = {};
      if (statistic == LPX_ATTENTION_LAST) value = load_vector(head + static_cast<ptrdiff_t>(rows - 1) * kTile + v * kLanes);
      for (int q = 0; q < rows && statistic != LPX_ATTENTION_LAST; ++q) {
        const vf a = load_vector(head + static_cast<ptrdiff_t>(q) * kTile + v * kLanes);
        if (statistic == LPX_ATTENTION_MAX)
          value = a > value || a != a ? a : value;
        else
          value += statistic == LPX_ATTENTION_L2 ? a * a : a;
      }
      if (statistic == LPX_ATTENTION_L2) value = square_root(value);
      if (statistic == LPX_ATTENTION_MEAN && existing > 0) value = value / static_cast<float>(existing);
      store_vector(out + h * kTile + v * kLanes, value);
    }
  }
}

void aggregate(const float* x, int heads, lpx_aggregation aggregation, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    vf value = {};
    for (int h = 0; h < heads; ++h) {
      const vf a = load_vector(x + h * kTile + v * kLanes);
      if (aggregation == LPX_AGGREGATE_MAX)
        value = h == 0 || a > value || a != a ? a : value;
      else
        value += aggregation == LPX_AGGREGATE_RSS ? a * a : a;
    }
    if (aggregation == LPX_AGGREGATE_RSS) value = square_root(value);
    if (aggregation == LPX_AGGREGATE_MEAN) value = value / static_cast<float>(heads);
    store_vector(out + v * kLanes, value);
  }
}

// ------------------------------------------------------------------ scores

uint32_t joint(const float* attention, const float* values, int heads, float* out) {
  uint32_t cancelled = 0;
  for (int v = 0; v < kVectors; ++v) {
    vf own = {};
    vf cross = {};
    for (int other = 0; other < heads; ++other) {
      for (int h = 0; h <= other; ++h) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(pair_index(h, other)) * kTile + v * kLanes;
        const vf product = load_vector(attention + at) * load_vector(values + at);
        if (h == other)
          own += product;
        else
          cross += product;
      }
    }
    const vf total = own + 2.0f * cross;
    store_vector(out + v * kLanes, square_root(total < 0.0f ? vf{} : total));
    const vi lost = total < kCancelled * own;
    for (int i = 0; i < kLanes; ++i) cancelled |= static_cast<uint32_t>(lost[i] & 1) << (v * kLanes + i);
  }
  return cancelled;
}

void bound(const float* attention, const float* values, int heads, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    vf total = {};
    for (int h = 0; h < heads; ++h) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(pair_index(h, h)) * kTile + v * kLanes;
      total += square_root(load_vector(attention + at)) * square_root(load_vector(values + at));
    }
    store_vector(out + v * kLanes, total);
  }
}

void add_magnitudes(const float* x, int rows, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    vf total = {};
    for (int r = 0; r < rows; ++r)
      total += bits_to_float(float_to_bits(load_vector(x + static_cast<ptrdiff_t>(r) * kTile + v * kLanes)) & 0x7fffffff);
    store_vector(out + v * kLanes, load_vector(out + v * kLanes) + total);
  }
}

void removal_weights(float* attention, int rows) {
  for (ptrdiff_t i = 0; i < static_cast<ptrdiff_t>(rows) * kTile; i += kLanes) {
    const vf a = load_vector(attention + i);
    const vf rest = 1.0f - a;
    store_vector(attention + i, a / (rest < 1e-3f ? splat(1e-3f) : rest));
  }
}

template <int Heads>
inline void removal_of(const float* weights, const float* outputs, int64_t output_stride, int64_t row_stride, const float* values, int heads,
                       int rows, int columns, float* out) {
  const int count = Heads == 0 ? heads : Heads;
  for (int v = 0; v < kVectors; ++v) {
    vf total = {};
    for (int q = 0; q < rows; ++q) {
      vf part = {};
      for (int c = 0; c < columns; ++c) {
        vf change = {};
        for (int h = 0; h < count; ++h) {
          const vf weight = load_vector(weights + (static_cast<ptrdiff_t>(h) * rows + q) * kTile + v * kLanes);
          const vf value = load_vector(values + (static_cast<ptrdiff_t>(h) * columns + c) * kTile + v * kLanes);
          change += weight * (outputs[h * output_stride + q * row_stride + c] - value);
        }
        part += change * change;
      }
      total += part;
    }
    store_vector(out + v * kLanes, load_vector(out + v * kLanes) + total);
  }
}

void removal(const float* weights, const float* outputs, int64_t output_stride, int64_t row_stride, const float* values, int heads, int rows,
             int columns, float* out) {
  switch (heads) {
    case 1: return removal_of<1>(weights, outputs, output_stride, row_stride, values, heads, rows, columns, out);
    case 2: return removal_of<2>(weights, outputs, output_stride, row_stride, values, heads, rows, columns, out);
    case 3: return removal_of<3>(weights, outputs, output_stride, row_stride, values, heads, rows, columns, out);
    case 4: return removal_of<4>(weights, outputs, output_stride, row_stride, values, heads, rows, columns, out);
    default: return removal_of<0>(weights, outputs, output_stride, row_stride, values, heads, rows, columns, out);
  }
}

void add_outputs(const float* attention, int rows, const float* values, int depth, float* outputs) {
  for (int r = 0; r < rows; ++r) {
    const float* a = attention + static_cast<ptrdiff_t>(r) * kTile;
    for (int c = 0; c < depth; c += 8) {
      float* to = outputs + static_cast<ptrdiff_t>(r) * depth + c;
      v8 sum = *reinterpret_cast<v8_unaligned*>(to);
      for (int t = 0; t < kTile; ++t) sum += a[t] * read_f32(values + static_cast<ptrdiff_t>(t) * depth + c, 0);
      *reinterpret_cast<v8_unaligned*>(to) = sum;
    }
  }
}

inline float horizontal_sum(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

template <v8 (*Read)(const void*, int), bool Squares>
inline void lengths_of(const void* const* rows, int count, int depth, float* out) {
  constexpr int kRows = 4;  // at a time: sums of one wait for each other
  for (int first = 0; first < count; first += kRows) {
    v8 sums[kRows] = {};
    for (int k = 0; k < depth; k += 8) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const v8 x = Read(rows[first + i < count ? first + i : first], k);
        sums[i] += Squares ? x * x : reinterpret_cast<v8>(reinterpret_cast<u8>(x) & 0x7fffffffu);
      }
    }
    for (int i = 0; i < kRows && first + i < count; ++i)
      out[first + i] = Squares ? __builtin_sqrtf(horizontal_sum(sums[i])) : horizontal_sum(sums[i]);
  }
}

template <bool Squares>
inline void lengths(lpx_dtype dtype, const void* const* rows, int count, int depth, float* out) {
  switch (dtype) {
    case LPX_F16: return lengths_of<read_f16, Squares>(rows, count, depth, out);
    case LPX_BF16: return lengths_of<read_bf16, Squares>(rows, count, depth, out);
    default: return lengths_of<read_f32, Squares>(rows, count, depth, out);
  }
}

void norms(lpx_dtype dtype, const void* const* rows, int count, int depth, float* out) { lengths<true>(dtype, rows, count, depth, out); }

void magnitudes(lpx_dtype dtype, const void* const* rows, int count, int depth, float* out) { lengths<false>(dtype, rows, count, depth, out); }

void upper_bounds(const float* squares, int depth, const float* singular, int heads, int parts, const float* norms, float* out) {
  for (int v = 0; v < kVectors; ++v) {
    const float* own = squares + static_cast<ptrdiff_t>(v / 2) * depth * kStripe + v % 2 * kLanes;
    vf total = {};
    for (int h = 0; h < heads; ++h) {
      vf square = {};
      for (int p = 0; p < parts; ++p) square += load_vector(own + (h * parts + p) * kStripe);
      total += singular[h] * square_root(square + 1e-37f);
    }
    store_vector(out + v * kLanes, total * load_vector(norms + v * kLanes) * 1.001f);
  }
}

// A block of 8 x 8 sums in double: out[i][j] = sum over k of a[k][i] * b[k][j].
void gram(const double* a, const double* b, int depth, double* out) {
  typedef double vd __attribute__((vector_size(32)));
  typedef double vd_unaligned __attribute__((vector_size(32), aligned(8), may_alias));
  for (int half = 0; half < 8; half += 4) {
    vd sums[4][2] = {};
    for (int k = 0; k < depth; ++k) {
      const vd left = *reinterpret_cast<const vd_unaligned*>(b + static_cast<ptrdiff_t>(k) * 8);
      const vd right = *reinterpret_cast<const vd_unaligned*>(b + static_cast<ptrdiff_t>(k) * 8 + 4);
      for (int i = 0; i < 4; ++i) {
        sums[i][0] += a[static_cast<ptrdiff_t>(k) * 8 + half + i] * left;
        sums[i][1] += a[static_cast<ptrdiff_t>(k) * 8 + half + i] * right;
      }
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) *reinterpret_cast<vd_unaligned*>(out + (half + i) * 8 + j * 4) = sums[i][j];
  }
}

void pool_keys(const float* values, int64_t count, int width, uint32_t* out) {
  float window[kPoolChunk + 256];
  const int64_t extent = count + width - 1;
  std::memcpy(window, values, static_cast<size_t>(extent) * sizeof(float));
  int reach = 1;  // window[i] is the largest of values[i .. i + reach)
  for (; 2 * reach <= width; reach *= 2)
    for (int64_t i = 0; i + 2 * reach <= extent; ++i) window[i] = window[i] > window[i + reach] ? window[i] : window[i + reach];
  const int rest = width - reach;
  for (int64_t i = 0; i < count; ++i) {
    const float largest = (window[i] > window[i + rest] ? window[i] : window[i + rest]) + 0.0f;  // -0 becomes 0
    uint32_t bits;
    std::memcpy(&bits, &largest, sizeof bits);
    out[i] = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  }
}

template <bool Indices, typename Out>
int64_t pick_of(const uint32_t* keys, int64_t count, uint32_t least, uint32_t most, Out* out) {
  int64_t picked = 0;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t size = count - first < kLanes ? count - first : kLanes;
#if LPX_LANES == 16
    if (size == kLanes) {
      const __m512i key = _mm512_loadu_si512(keys + first);
      const __mmask16 wanted = _mm512_cmple_epu32_mask(_mm512_sub_epi32(key, _mm512_set1_epi32(static_cast<int>(least))),
                                                       _mm512_set1_epi32(static_cast<int>(most - least)));
      const __m512i index =
          _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(static_cast<int>(first)));
      _mm512_storeu_si512(out + picked, _mm512_maskz_compress_epi32(wanted, Indices ? index : key));
      picked += __builtin_popcount(wanted);
      continue;
    }
#else
    uint32_t any = 0;
    for (int64_t i = 0; i < size; ++i) any |= static_cast<uint32_t>(keys[first + i] - least <= most - least);
    if (any == 0) continue;
#endif
    for (int64_t i = first; i < first + size; ++i) {
      out[picked] = Indices ? static_cast<Out>(i) : static_cast<Out>(keys[i]);
      picked += keys[i] - least <= most - least;
    }
  }
  return picked;
}

int64_t pick_keys(const uint32_t* keys, int64_t count, uint32_t least, uint32_t most, uint32_t* out) {
  return pick_of<false>(keys, count, least, most, out);
}

int64_t pick(const uint32_t* keys, int64_t count, uint32_t least, uint32_t most, int32_t* out) {
  return pick_of<true>(keys, count, least, most, out);
}

// ------------------------------------------------------------------ rows out

void stream(void* to, const void* from, int64_t bytes) {
  [[maybe_unused]] auto* target = static_cast<std::byte*>(to);
  [[maybe_unused]] const auto* source = static_cast<const std::byte*>(from);
#if LPX_LANES == 16
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t byte = 0; byte < bytes; byte += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + byte), _mm512_loadu_si512(source + byte));
    return;
  }
#endif
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    for (int64_t byte = 0; byte < bytes; byte += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + byte), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + byte)));
    return;
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

void end_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace LPX_NAMESPACE

const Kernels& LPX_KERNELS() noexcept {
  namespace isa = LPX_NAMESPACE;
  static constexpr Kernels kernels = {
      LPX_NAME,
      isa::kLanes,
      isa::load,
      isa::convert,
      isa::multiply,
      isa::pack_size,
      isa::pack,
      isa::logits,
      isa::attend,
      isa::sample,
      0,
      nullptr,
      isa::scan,
      isa::square,
      isa::forms,
      isa::pair_products,
      isa::joint,
      isa::bound,
      isa::attention_statistic,
      isa::aggregate,
      isa::add_magnitudes,
      isa::removal_weights,
      isa::removal,
      isa::add_outputs,
      isa::norms,
      isa::magnitudes,
      isa::upper_bounds,
      isa::pool_keys,
      isa::pick_keys,
      isa::pick,
      isa::gram,
      isa::stream,
      isa::end_stream,
  };
  return kernels;
}

}  // namespace laprox::cpu
