// The scan on Hopper: wgmma, one read of K for each panel of up to 128 query rows. Formulas in scan.cuh.
//
// For 128 query rows of 128 elements a tile of 64 tokens is 16 KiB of K, 512 cycles of the tensor cores, 512 of the special functions (16
// exponentials a cycle) and about 500 issue slots on each quarter of a processor; its share of the memory's bandwidth takes about 850. So memory
// binds where the other three overlap and enough bytes are on the way (some 2 microseconds of bandwidth, 100 KiB a processor): kGroups warpgroups
// share the panel's queries and take the tiles of a piece in turn, each with kStages stages of its own and a barrier of its own a tile; they never
// wait for each other, so that one multiplies while another exponentiates. Tokens are the rows of the product (left operand: the tile), query rows
// its columns (right operand: the panel), both swizzled in shared memory. A thread then holds 2 tokens by 32 query rows: e^2 is summed over a query
// head in the thread and by 2 shuffles, sums over tokens are 32 registers to the end of the piece. Tiles come by 16-byte cp.async, row by row, so
// that any page size and stride will do.
#pragma once

#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/scan.cuh"
#include "cuda/kernels/scan_bound.cuh"
#include "cuda/kernels/scan_statistic.cuh"

namespace laprox::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kGroups = 3;

template <typename T, int D, int Bands>
struct WgmmaScan {
  static_assert(D % 64 == 0, "a row of a swizzled matrix has 64 elements");
  static constexpr int kRows = Bands * kBand;
  static constexpr int kQueryBytes = kRows * D * 2;
  static constexpr int kTileBytes = kScanTile * D * 2;
  static constexpr int kStages = 4 * 128 / D;  // of a warpgroup
  static constexpr int kTilesBytes = kGroups * kStages * kTileBytes;

  // Behind the queries and tiles.
  struct Shared {
    float references[kRows];
  };
  // In place of the tiles, after the last.
  struct Sums {
    float sums[kGroups * 4][kRows];
  };
  static constexpr int kBytes = kQueryBytes + kTilesBytes + static_cast<int>(sizeof(Shared));
  static_assert(kBytes <= 232448, "more shared memory than a block can have");

  // 16-byte chunk `chunk` of row `row` of a matrix of `rows` rows.
  __device__ static uint32_t offset(int rows, int row, int chunk) { return (chunk / 8 * rows + row) * 128 + (chunk % 8 ^ row % 8) * 16; }
  // Step `k` of 16 elements, for wgmma.
  static constexpr uint32_t step(int rows, int k) { return k / 4 * rows * 128 + k % 4 * 32; }

  struct Tile {
    static constexpr int kChunks = D / 8;
    static constexpr int kPitch = 128;
    __device__ static uint32_t offset(int row, int chunk) { return WgmmaScan::offset(kScanTile, row, chunk); }
  };
};

// What a scan is for.
enum class ScanFor {
  kSums,     // log-sum-exps, and roots where they are wanted
  kRoots,    // roots of listed tokens, with known log-sum-exps; where a panel has all heads, their bounds instead
  kAverage,  // likewise scores of all tokens from sums of attention
  kEnergy    // and from sums of its squares
};
// Whether a launch is for all panels of a segment, or for one.
constexpr bool all_panels(ScanFor what) { return what == ScanFor::kSums || what == ScanFor::kRoots; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Sums v[i] over the 8 lanes of equal lane % 4; each lane ends with N / 8 of them, from `owned_sums`.
template <int N, int Bit = 16>
__device__ inline void sum_columns(float (&v)[N], int lane) {
  constexpr int kCount = Bit == 16 ? N : Bit == 8 ? N / 2 : N / 4;
  const bool upper = (lane & Bit) != 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float sent = upper ? v[i] : v[i + kCount / 2];
    const float kept = upper ? v[i + kCount / 2] : v[i];
    v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, Bit);
  }
  if constexpr (Bit > 4) sum_columns<N, Bit / 2>(v, lane);
}
template <int N>
__device__ inline int owned_sums(int lane) {
  return (lane & 16 ? N / 2 : 0) + (lane & 8 ? N / 4 : 0) + (lane & 4 ? N / 8 : 0);
}

// Sums v[band] over the 4 lanes of a quad; the lane ends with that of band `quad_band`.
template <int Bands>
__device__ inline int quad_band(int lane) {
  return Bands >= 3 ? lane % 4 : Bands == 2 ? lane % 2 : 0;
}
template <int Bands>
__device__ inline float sum_quad(const float (&v)[Bands], int lane) {
  const auto exchange = [](float lower, float upper, bool keep_upper, int bit) {
    return (keep_upper ? upper : lower) + __shfl_xor_sync(0xffffffffu, keep_upper ? lower : upper, bit);
  };
  if constexpr (Bands == 1) {
    const float half = v[0] + __shfl_xor_sync(0xffffffffu, v[0], 1);
    return half + __shfl_xor_sync(0xffffffffu, half, 2);
  } else if constexpr (Bands == 2) {
    const float half = exchange(v[0], v[1], lane & 1, 1);
    return half + __shfl_xor_sync(0xffffffffu, half, 2);
  } else {
    float last = 0;
    if constexpr (Bands == 4) last = v[3];
    const float even = exchange(v[0], v[2], lane & 2, 2);
    const float odd = exchange(v[1], last, lane & 2, 2);
    return exchange(even, odd, lane & 1, 1);
  }
}

// Query rows of a panel to shared memory, and their references; the copies are committed with those that follow.
template <typename T, int D, int Bands>
__device__ inline void load_panel(const ScanView& v, int segment, int panel, uint32_t queries) {
  using Scan = WgmmaScan<T, D, Bands>;
  constexpr int kChunks = D / 8;
  const Geometry& g = v.g;
  const LayerView& layer = g.layer[g.layer_of(segment)];
  for (int i = threadIdx.x; i < Scan::kRows * kChunks; i += kGroups * kWarpgroup) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const PanelRow at = panel_row(v, panel, row / kBand, row % kBand);
    const bool exists = row_exists(v, segment, at);
    const char* from = exists ? query_row(g, layer, g.sequence_of(segment), g.head_of(segment), at.head, at.query) : layer.queries;
    copy_async_16(queries + Scan::offset(Scan::kRows, row, chunk), from + chunk * 16, exists);
  }
}

// The statistic of the heads of a quad's lanes, aggregated: all lanes get it. `mine`: this lane has a head's.
__device__ inline float aggregate_quad(float value, bool mine, lpx_aggregation aggregation) {
  if (aggregation == LPX_AGGREGATE_RSS) value *= value;
  if (!mine) value = 0;  // no statistic is negative
  for (int step = 1; step < 4; step *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, value, step);
    if (aggregation == LPX_AGGREGATE_MAX)
      value = other > value || other != other ? other : value;
    else
      value += other;
  }
  return value;
}

template <typename T, int D, int Bands, ScanFor For>
__device__ inline void scan_piece(const ScanView& v, const StatisticView& statistic, const Piece& piece, int panel, char* memory) {
  using Scan = WgmmaScan<T, D, Bands>;
  const Geometry& g = v.g;
  auto& shared = *reinterpret_cast<typename Scan::Shared*>(memory + Scan::kQueryBytes + Scan::kTilesBytes);
  const uint32_t queries = shared_address(memory);
  const int segment = piece.segment;
  const LayerView& layer = g.layer[g.layer_of(segment)];
  const Range range = v.ranges[segment];
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0);
  const uint32_t tiles = queries + Scan::kQueryBytes + group * Scan::kStages * Scan::kTileBytes;
  const int lane = threadIdx.x % 32;
  const Rows keys(layer, layer.key, g.sequence_of(segment), g.head_of(segment));
  constexpr bool kListed = For == ScanFor::kRoots;
  const int32_t* const listed = kListed ? statistic.tokens + segment * g.stride : nullptr;
  const int listed_count = kListed ? statistic.counts[segment] : 0;
  const auto listed_token = [&](int i) { return i < listed_count ? listed[i] : -1; };
  TileCopier<typename Scan::Tile, kScanTile / 4> copier(keys, warp, kListed);
  // Tile `i` of this warpgroup.
  const int count = (piece.tiles - group + kGroups - 1) / kGroups;
  const auto first_of = [&](int i) { return piece.first + (i * kGroups + group) * kScanTile; };
  const auto copy = [&](int i) {
    if (i < count) copier.copy(tiles + i % Scan::kStages * Scan::kTileBytes);
    commit_copies();
  };
  const auto find = [&](int i) {
    if (i >= count) return;
    const int first = first_of(i);
    if constexpr (kListed)
      copier.find([&](int row) { return listed_token(first + row); });
    else
      copier.find(first, range.end);
  };
  if constexpr (kListed) {
    for (int i = 0; i < Scan::kStages; ++i) {
      const int at = first_of(i) + warp * (kScanTile / 4) + lane % (kScanTile / 4);
      if (i < count && at < listed_count) prefetch(listed + at);
    }
  }
  load_panel<T, D, Bands>(v, segment, panel, queries);
  if (For == ScanFor::kSums) {
    if (threadIdx.x < Scan::kRows / 4)
      copy_async_16(shared_address(&shared.references[threadIdx.x * 4]),
                    v.references + int64_t{segment} * v.padded_rows + panel * Scan::kRows + threadIdx.x * 4, true);
  } else if (threadIdx.x < Scan::kRows) {
    const PanelRow row = panel_row(v, panel, threadIdx.x / kBand, threadIdx.x % kBand);
    const bool counts = row_exists(v, segment, row) && (!statistic.only_last || row.query == g.rows - 1);
    if (counts)
      copy_async_4(shared_address(&shared.references[threadIdx.x]),
                   statistic.log_sums + (int64_t{segment} * g.group + row.head) * g.rows + row.query);
    else
      shared.references[threadIdx.x] = INFINITY;
  }
  commit_copies();
  for (int i = 0; i < Scan::kStages - 1; ++i) {
    find(i);
    copy(i);
  }
  find(Scan::kStages - 1);

  const LogitRule rule(layer);
  const int head_bands = v.head_bands();
  const int heads = v.panel_heads();
  const int band = quad_band<Bands>(lane);
  // Whether this lane ends with what is summed over a head's rows, and which head that is.
  const int head = panel * heads + band / head_bands;
  const bool owns = lane % 4 < Bands && band % head_bands == 0 && head < g.group;
  __nv_bfloat16* roots = nullptr;
  if ((For == ScanFor::kSums || For == ScanFor::kRoots) && v.roots != nullptr && owns)
    roots = v.roots + (int64_t{segment} * v.panels + panel) * g.stride * heads + band / head_bands;
  const bool bounds = kListed && v.panels == 1;
  float head_factor = 0;  // a head's share of a bound
  if (bounds && owns) head_factor = bound_factor(g, layer, segment, head, statistic.bound.singular, statistic.bound.inflation);
  const float scale = For == ScanFor::kAverage || For == ScanFor::kEnergy ? statistic.scale(g, segment, layer.weight) : 1.0f;
  const bool linear = For == ScanFor::kAverage && statistic.aggregation != LPX_AGGREGATE_MAX && statistic.aggregation != LPX_AGGREGATE_RSS;
  // What is listed, and the norms of that, come from memory: asked for a tile ahead of their use.
  const auto token_at = [&](int i, int j) {
    const int at = first_of(i) + warp * 16 + lane / 4 + j * 8;
    return kListed ? listed_token(at) : at;
  };
  const auto norm_of = [&](int token) {
    return bounds && lane % 4 == 0 && token >= 0 ? value_norm(g, layer, segment, statistic.bound.norms, token) : 0.0f;
  };
  int next_token[2];
  int later_token[2];
  float next_norm[2];
  if constexpr (kListed) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      next_token[j] = token_at(0, j);
      later_token[j] = token_at(1, j);
      next_norm[j] = norm_of(next_token[j]);
    }
  }
  const float2* const references = reinterpret_cast<const float2*>(shared.references) + lane % 4;
  const uint32_t query_matrix = swizzled_matrix(queries);
  float sums[For == ScanFor::kSums ? Bands * 8 : 1];
#pragma unroll
  for (float& sum : sums) sum = 0;

  wait_copies<Scan::kStages - 1>();
  fence_shared_for_wgmma();
  __syncthreads();  // the queries have landed
  for (int i = 0; i < count; ++i) {
    wait_copies<Scan::kStages - 2>();
    fence_shared_for_wgmma();
    sync_threads(1 + group, kWarpgroup);  // the tile has landed, and all warps have multiplied the one before
    const uint32_t key_matrix = swizzled_matrix(tiles + i % Scan::kStages * Scan::kTileBytes);
    float c[Bands * 16];
    hold_registers(c);
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
      multiply_warpgroup<T, Scan::kRows>(c, key_matrix + Scan::step(kScanTile, k) / 16, query_matrix + Scan::step(Scan::kRows, k) / 16, k > 0);
    commit_products();
    copy(i + Scan::kStages - 1);
    find(i + Scan::kStages);
    const int first = first_of(i);
    bool full = first >= range.full_begin && first + kScanTile <= range.full_end;
    int token[2];  // this thread's; negative or not below `range.end`: not there
    float norm[2];
    if constexpr (kListed) {
      full = true;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        token[j] = next_token[j];
        norm[j] = next_norm[j];
        next_token[j] = later_token[j];
        next_norm[j] = norm_of(next_token[j]);
        later_token[j] = token_at(i + 2, j);
        full = full && (token[j] < 0 || (token[j] >= range.full_begin && token[j] < range.full_end));
      }
      full = __all_sync(0xffffffffu, full);
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) token[j] = token_at(i, j);
    }
    wait_products<0>(c);

    float totals[2][Bands];  // over this thread's rows
    const auto add = [&](float e, float total) { return For == ScanFor::kAverage ? total + e : fmaf(e, e, total); };
    if (full && !rule.capped) {
#pragma unroll
      for (int b = 0; b < Bands; ++b) {
        float total[2] = {};
#pragma unroll
        for (int block = b * 4; block < b * 4 + 4; ++block) {
          const float2 reference = references[block * 4];
          const float e0 = exp2_fast(fmaf(c[block * 4], rule.scale, -reference.x));
          const float e1 = exp2_fast(fmaf(c[block * 4 + 1], rule.scale, -reference.y));
          const float f0 = exp2_fast(fmaf(c[block * 4 + 2], rule.scale, -reference.x));
          const float f1 = exp2_fast(fmaf(c[block * 4 + 3], rule.scale, -reference.y));
          if constexpr (For == ScanFor::kSums) {
            sums[block * 2] += e0 + f0;
            sums[block * 2 + 1] += e1 + f1;
          }
          total[0] = add(e0, add(e1, total[0]));
          total[1] = add(f0, add(f1, total[1]));
        }
        totals[0][b] = total[0];
        totals[1][b] = total[1];
      }
    } else {
      int position[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        position[i] = INT32_MAX;  // does not exist: beyond every row
        if (token[i] >= 0 && token[i] < range.end) position[i] = token_position(layer, g.sequence_of(segment), g.head_of(segment), token[i]);
      }
      const int row0 = g.row_position(segment, 0);
#pragma unroll
      for (int b = 0; b < Bands; ++b) {
        float total[2] = {};
#pragma unroll
        for (int block = b * 4; block < b * 4 + 4; ++block) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int query = b % head_bands * kBand + (block * 8 + lane % 4 * 2 + i % 2) % kBand;
            const float reference = i % 2 == 0 ? references[block * 4].x : references[block * 4].y;
            const float e = sees(layer, row0 + query, position[i / 2]) ? exp2_fast(rule(c[block * 4 + i]) - reference) : 0.0f;
            if constexpr (For == ScanFor::kSums) sums[block * 2 + i % 2] += e;
            total[i / 2] = add(e, total[i / 2]);
          }
        }
        totals[0][b] = total[0];
        totals[1][b] = total[1];
      }
    }
    if (For == ScanFor::kSums && v.roots == nullptr) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = token[i];
      float total;
      if (linear) {  // a sum over all rows of all heads
        total = totals[i][0];
#pragma unroll
        for (int b = 1; b < Bands; ++b) total += totals[i][b];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
      } else {
        total = sum_quad<Bands>(totals[i], lane);
        if (head_bands >= 2) total += __shfl_xor_sync(0xffffffffu, total, 1);
        if (head_bands >= 3) total += __shfl_xor_sync(0xffffffffu, total, 2);
      }
      if (kListed && bounds) {
        float sum = owns ? head_factor * root(total + kVanishedSquares) : 0.0f;  // what others have may be infinite
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        // What no row sees has a bound as tight as can be.
        if (lane % 4 == 0 && at >= range.begin && at < range.end) statistic.scores[segment * g.stride + at] = negated_bound(norm[i], sum);
      } else if constexpr (For == ScanFor::kSums || For == ScanFor::kRoots) {
        if (roots != nullptr && at >= 0 && at < range.end) roots[int64_t{at} * heads] = root_of_squares(total);
      } else {
        if (!linear) total = aggregate_quad(For == ScanFor::kEnergy ? sqrtf(total) : total, owns, statistic.aggregation);
        if (lane % 4 == 0 && at < range.end) {
          float* const out = statistic.scores + segment * g.stride + at;
          if (panel > 0) total = statistic.aggregation == LPX_AGGREGATE_MAX ? (total > *out || total != total ? total : *out) : total + *out;
          if (panel + 1 == v.panels) total = scale * (statistic.aggregation == LPX_AGGREGATE_RSS ? sqrtf(total) : total);
          *out = total;
        }
      }
    }
    __syncwarp();  // barriers and products are of whole warps
  }

  if constexpr (For == ScanFor::kSums) {
    sum_columns(sums, lane);
    const int owned = owned_sums<Bands * 8>(lane);
    auto& all = reinterpret_cast<typename Scan::Sums*>(memory + Scan::kQueryBytes)->sums;
    wait_copies<0>();
    __syncthreads();  // all tiles are multiplied
#pragma unroll
    for (int i = 0; i < Bands; ++i) all[group * 4 + warp][(owned + i) / 2 * 8 + lane % 4 * 2 + (owned + i) % 2] = sums[i];
    __syncthreads();
    const int row = threadIdx.x;
    if (row < Scan::kRows) {
      float total = 0;
      for (int i = 0; i < kGroups * 4; ++i) total += all[i][row];
      v.partials[piece.index * v.padded_rows + panel * Scan::kRows + row] = total;
    }
  }
  wait_copies<0>();
  __syncthreads();  // nothing of this piece is read any more
}

#endif

// Blocks are (worker, panel), panels first, so that those of a worker run side by side and K comes from the L2 cache for all but one. Scores are
// of one panel: what the panels before it found is in them.
template <typename T, int D, int Bands, ScanFor For>
__global__ void __launch_bounds__(kGroups* kWarpgroup, 1)
    scan_wgmma(const __grid_constant__ ScanView v, const __grid_constant__ StatisticView statistic) {
  lead_next();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char memory[];
  if (*v.g.status != LPX_OK) return;
  const int panel = all_panels(For) ? static_cast<int>(blockIdx.x) % v.panels : statistic.panel;
  Pieces pieces(v, all_panels(For) ? static_cast<int>(blockIdx.x) / v.panels : static_cast<int>(blockIdx.x), For == ScanFor::kRoots);
  for (Piece piece; pieces.next(piece);) scan_piece<T, D, Bands, For>(v, statistic, piece, panel, memory);
#endif
}

}  // namespace laprox::cuda
