// The scan on any tensor core from compute capability 8.0: mma.sync, one read of K for each panel of up to 128 query rows.
//
// Formulas in scan.cuh. A segment of n tokens, d wide, costs 2 n d bytes and 2 n d * (R m) multiply-adds; R m exponentials a token.
// A warp keeps the 32 query rows of a band in registers as the left operand (d / 2 registers), so a K row is read from shared memory
// once a band. K comes in tiles of 64 tokens, 16-byte cp.async into rows whose 16-byte chunks are XORed with the row (no bank conflicts), kStages
// deep. A thread holds 4 rows by 2 tokens of each product fragment: e^2 is summed over the rows in the thread and then over the
// 8 lanes of equal column by a butterfly that halves what each lane holds, so that each lane ends with neighbouring tokens and stores are
// coalesced; sums over tokens stay in registers to the end of the split. Panels of one or two bands have Teams = 2 warps a band,
// each with half of a tile's tokens.
#pragma once

#include "cuda/kernels/scan_results.cuh"

namespace laprox::cuda {

inline constexpr int kLogSumWarps = 8;  // at most

template <int D>
struct MmaTile {
  static constexpr int kChunks = D / 8;                                  // of 16 bytes
  static constexpr int kPitch = D == 64 ? 128 : (D <= 128 ? 256 : 512);  // bytes of a row
  static constexpr int kBytes = kScanTile * kPitch;
  static constexpr int kStages = D <= 128 ? 3 : 2;

  // Chunk `chunk` of row `row`.
  __device__ static uint32_t offset(int row, int chunk) { return row * kPitch + (chunk ^ (row & 7)) * 16; }
};

// Query rows of a band as left operands: all 32 of them, or one half.
template <typename T, int D, int Halves>
struct BandQueries {
  uint32_t fragment[Halves][D / 16][4];

  __device__ void load(const ScanView& v, const LayerView& layer, int segment, int panel, int band, int first_half) {
    const Geometry& g = v.g;
    const int lane = threadIdx.x % 32;
    const int sequence = g.sequence_of(segment);
    const int kv_head = g.head_of(segment);
#pragma unroll
    for (int block = 0; block < 2 * Halves; ++block) {  // rows 8 * block + lane / 4
      const PanelRow at = panel_row(v, panel, band, (2 * first_half + block) * 8 + lane / 4);
      const bool exists = row_exists(v, segment, at);
      const char* row = exists ? query_row(g, layer, sequence, kv_head, at.head, at.query) : nullptr;
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int part = 0; part < 2; ++part)
          fragment[block / 2][k][block % 2 + 2 * part] =
              exists ? *reinterpret_cast<const uint32_t*>(row + (k * 16 + part * 8 + lane % 4 * 2) * sizeof(T)) : 0;
    }
  }
};

// Products of the rows with tokens of a tile from `token` on: out[group of 8 tokens][half][fragment].
template <typename T, int D, int Halves, int Groups>
__device__ inline void multiply_band(const BandQueries<T, D, Halves>& queries, uint32_t tile, int token, float (&out)[Groups][Halves][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int group = 0; group < Groups; ++group)
#pragma unroll
    for (int half = 0; half < Halves; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[group][half][i] = 0;
#pragma unroll
  for (int k = 0; k < D / 32; ++k) {
    uint32_t keys[Groups][4];
#pragma unroll
    for (int group = 0; group < Groups; ++group)
      load_matrices(tile + MmaTile<D>::offset(token + group * 8 + lane % 8, k * 4 + lane / 8), keys[group]);
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int group = 0; group < Groups; ++group)
#pragma unroll
        for (int half = 0; half < Halves; ++half)
          multiply_add<T>(out[group][half], queries.fragment[half][2 * k + step], keys[group][2 * step], keys[group][2 * step + 1]);
  }
}

// Sums v[i] over the 8 lanes of equal lane % 4. Each lane ends with N / 8 of them (at least one): v[0] is number `owned(lane)`.
template <int N>
struct ColumnSum {
  __device__ static void run(float (&v)[N]) {
    const int lane = threadIdx.x % 32;
    step<N, 16>(v, lane);
  }
  __device__ static int owned(int lane) {
    int at = 0;
    int count = N;
    for (int bit = 16; bit >= 4 && count > 1; bit /= 2) {
      count /= 2;
      if (lane & bit) at += count;
    }
    return at;
  }

 private:
  template <int Count, int Bit>
  __device__ static void step(float (&v)[N], int lane) {
    if constexpr (Bit >= 4) {
      if constexpr (Count > 1) {
        const bool upper = (lane & Bit) != 0;
#pragma unroll
        for (int i = 0; i < Count / 2; ++i) {
          const float sent = upper ? v[i] : v[i + Count / 2];
          const float kept = upper ? v[i + Count / 2] : v[i];
          v[i] = kept + __shfl_xor_sync(0xffffffffu, sent, Bit);
        }
        step<Count / 2, Bit / 2>(v, lane);
      } else {
        v[0] += __shfl_xor_sync(0xffffffffu, v[0], Bit);
        step<1, Bit / 2>(v, lane);
      }
    }
  }
};

// Which tokens of a fragment a row sees, for tiles at an edge.
struct EdgeMask {
  const LayerView& layer;
  int sequence;
  int head;
  int end;

  // Beyond every row where the token does not exist.
  __device__ int position(int token) const { return token < end ? token_position(layer, sequence, head, token) : INT32_MAX; }
};

template <typename T, int D, int Teams>
__global__ void __launch_bounds__(128, D <= 128 ? 3 : 2) scan_mma(ScanView v) {
  lead_next();
  using Tile = MmaTile<D>;
  constexpr int kTeamTokens = kScanTile / Teams;
  constexpr int kSquares = kTeamTokens / 8 * 2;  // a thread's, before they are summed over lanes
  extern __shared__ __align__(128) char memory[];
  __shared__ float band_squares[2][4][kScanTile];  // where a query head has several bands
  __shared__ float team_sums[4][kBand];
  const Geometry& g = v.g;
  if (*g.status != LPX_OK) return;
  const int panel = static_cast<int>(blockIdx.x) % v.panels;
  Pieces pieces(v, static_cast<int>(blockIdx.x) / v.panels);
  for (Piece piece; pieces.next(piece);) {
    const int segment = piece.segment;
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const Range range = v.ranges[segment];

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int band = warp % v.panel_bands;
    const int team = warp / v.panel_bands;
    const int sequence = g.sequence_of(segment);
    const int kv_head = g.head_of(segment);
    const Rows keys(layer, layer.key, sequence, kv_head);
    const uint32_t tiles = shared_address(memory);
    TileCopier<Tile> copier(keys, warp);
    const auto find = [&](int tile) {
      if (tile < piece.tiles) copier.find(piece.first + tile * kScanTile, range.end);
    };
    const auto copy = [&](int tile) {
      if (tile < piece.tiles) copier.copy(tiles + tile % Tile::kStages * Tile::kBytes);
      commit_copies();
    };
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      find(i);
      copy(i);
    }
    find(Tile::kStages - 1);

    BandQueries<T, D, 2> queries;
    queries.load(v, layer, segment, panel, band, 0);
    const int64_t row0 = int64_t{segment} * v.padded_rows + (panel * v.panel_bands + band) * kBand + lane / 4;
    float reference[4];
    int row_position[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      reference[i] = v.references[row0 + i * 8];
      row_position[i] = g.row_position(segment, panel_row(v, panel, band, i * 8 + lane / 4).query);
    }
    const LogitRule rule(layer);
    const int bands = v.head_bands();
    const int heads = v.panel_bands / bands;
    const int head = panel * heads + band / bands;
    __nv_bfloat16* const roots = v.roots == nullptr ? nullptr : v.roots + (int64_t{segment} * v.panels + panel) * g.stride * heads;
    float sums[4] = {};

    for (int tile = 0; tile < piece.tiles; ++tile) {
      wait_copies<Tile::kStages - 2>();
      __syncthreads();
      copy(tile + Tile::kStages - 1);
      find(tile + Tile::kStages);
      const int first = piece.first + tile * kScanTile;
      const uint32_t keys_at = tiles + tile % Tile::kStages * Tile::kBytes;
      const bool edge = first < range.full_begin || first + kScanTile > range.full_end || rule.capped;
      float squares[kSquares] = {};
#pragma unroll
      for (int pair = 0; pair < kTeamTokens / 16; ++pair) {
        const int token = team * kTeamTokens + pair * 16;
        float products[2][2][4];
        multiply_band(queries, keys_at, token, products);
        if (!edge) {
#pragma unroll
          for (int group = 0; group < 2; ++group)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              const int row = i / 2;  // lane / 4 + 8 * row
              const float e = exp2_fast(fmaf(products[group][i / 4][i % 4], rule.scale, -reference[row]));
              sums[row] += e;
              float& square = squares[(pair * 2 + group) * 2 + i % 2];
              square = fmaf(e, e, square);
            }
        } else {
          const EdgeMask mask{layer, sequence, kv_head, range.end};
#pragma unroll
          for (int group = 0; group < 2; ++group)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int position = mask.position(first + token + group * 8 + lane % 4 * 2 + c);
#pragma unroll
              for (int row = 0; row < 4; ++row) {
                const float logit = rule(products[group][row / 2][row % 2 * 2 + c]);
                const float e = sees(layer, row_position[row], position) ? exp2_fast(logit - reference[row]) : 0.0f;
                sums[row] += e;
                float& square = squares[(pair * 2 + group) * 2 + c];
                square = fmaf(e, e, square);
              }
            }
        }
      }
      if (v.roots == nullptr) continue;
      ColumnSum<kSquares>::run(squares);
      const int owned = ColumnSum<kSquares>::owned(lane);
      const int token = team * kTeamTokens + owned / 2 * 8 + lane % 4 * 2 + owned % 2;
      if (bands == 1) {
#pragma unroll
        for (int i = 0; i < kSquares / 8; ++i)
          if (head < g.group && first + token + i < g.lengths[segment])
            roots[int64_t{first + token + i} * heads + band] = root_of_squares(squares[i]);
        continue;
      }
      float (&at)[4][kScanTile] = band_squares[tile % 2];
      at[band][token] = squares[0];
      if constexpr (kSquares == 16) at[band][token + 1] = squares[1];
      __syncthreads();
      for (int i = threadIdx.x; i < heads * kScanTile; i += blockDim.x) {
        const int h = i / kScanTile;
        const int t = i % kScanTile;
        if (panel * heads + h >= g.group || first + t >= g.lengths[segment]) continue;
        float total = 0;
        for (int b = 0; b < bands; ++b) total += at[h * bands + b][t];
        roots[int64_t{first + t} * heads + h] = root_of_squares(total);
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
      sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
    }
    float* const partials = v.partials + piece.index * v.padded_rows + (panel * v.panel_bands + band) * kBand;
    if constexpr (Teams == 1) {
      if (lane % 4 == 0)
        for (int i = 0; i < 4; ++i) partials[i * 8 + lane / 4] = sums[i];
    } else {
      if (lane % 4 == 0)
        for (int i = 0; i < 4; ++i) team_sums[warp][i * 8 + lane / 4] = sums[i];
      __syncthreads();
      if (team == 0) partials[lane] = team_sums[band][lane] + team_sums[band + v.panel_bands][lane];
    }
    wait_copies<0>();
    __syncthreads();  // the tiles are read
  }
}

// Log-sum-exp over the sample of the piece's segment (writes references), or in a repair over the piece (writes partials).
template <typename T, int D>
__device__ inline void log_sum_mma(const ScanView& v, const Piece& piece, int panel, bool sample, char* memory,
                                   OnlineSum (&shared)[kLogSumWarps / 2][kBand]) {
  using Tile = MmaTile<D>;
  const Geometry& g = v.g;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int halves = 2 * v.panel_bands;
  const int band = warp % halves / 2;
  const int half = warp % 2;
  const int team = warp / halves;
  const int teams = blockDim.x / 32 / halves;
  const int segment = piece.segment;
  const LayerView& layer = g.layer[g.layer_of(segment)];
  BandQueries<T, D, 1> queries;
  queries.load(v, layer, segment, panel, band, half);
  Range range;
  if (sample) {
    if (!prepare_segment(v, layer, segment, panel, range)) return;
  } else {
    if (layer.lse != nullptr) return;
    range = v.ranges[segment];
  }
  const int sequence = g.sequence_of(segment);
  const int kv_head = g.head_of(segment);
  const Rows keys(layer, layer.key, sequence, kv_head);
  const int count = sample ? sample_size(range.end - range.begin) : range.end;
  const int run_tiles = sample ? (count + kScanTile - 1) / kScanTile : piece.tiles;
  const uint32_t tiles = shared_address(memory);
  const auto token_of = [&](int i) { return i >= count ? -1 : sample ? sample_token(range, count, i) : i; };
  TileCopier<Tile> copier(keys, warp);
  const auto copy = [&](int tile) {
    if (tile < run_tiles) {
      copier.find([&](int row) { return token_of(piece.first + tile * kScanTile + row); });
      copier.copy(tiles + tile % Tile::kStages * Tile::kBytes);
    }
    commit_copies();
  };
  __syncthreads();
  for (int i = 0; i < Tile::kStages - 1; ++i) copy(i);
  int row_position[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const PanelRow row = panel_row(v, panel, band, half * 16 + i * 8 + lane / 4);
    row_position[i] = row_exists(v, segment, row) ? g.row_position(segment, row.query) : -1;
  }
  const LogitRule rule(layer);
  OnlineSum online[2];
  for (int tile = 0; tile < run_tiles; ++tile) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();
    copy(tile + Tile::kStages - 1);
    const int first = piece.first + tile * kScanTile;
    const bool edge = first + kScanTile > count || token_of(first) < range.full_begin || token_of(first + kScanTile - 1) >= range.full_end;
    constexpr int kGroups = 4;  // of 8 tokens, multiplied at a time
    for (int begin = team * kGroups * 8; begin < kScanTile; begin += teams * kGroups * 8) {
      float products[kGroups][1][4];
      multiply_band(queries, tiles + tile % Tile::kStages * Tile::kBytes, begin, products);
      float logits[2][2 * kGroups];  // [row][token]
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int c = 0; c < 2 * kGroups; ++c) logits[row][c] = products[c / 2][0][row * 2 + c % 2];
        rule.apply(logits[row]);
      }
      if (edge) {
#pragma unroll
        for (int c = 0; c < 2 * kGroups; ++c) {
          const int token = token_of(first + begin + c / 2 * 8 + lane % 4 * 2 + c % 2);
          const int position = token < 0 ? INT32_MAX : token_position(layer, sequence, kv_head, token);
#pragma unroll
          for (int row = 0; row < 2; ++row)
            if (!sees(layer, row_position[row], position)) logits[row][c] = -INFINITY;
        }
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) online[row].add(logits[row]);
    }
  }
  wait_copies<0>();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    for (int offset = 1; offset <= 2; offset *= 2) {
      OnlineSum other;
      other.largest = __shfl_xor_sync(0xffffffffu, online[row].largest, offset);
      other.sum = __shfl_xor_sync(0xffffffffu, online[row].sum, offset);
      online[row].add(other);
    }
    if (lane % 4 == 0) shared[team * v.panel_bands + band][half * 16 + row * 8 + lane / 4] = online[row];
  }
  __syncthreads();
  if (warp >= v.panel_bands) return;
  OnlineSum all = shared[warp][lane];
  for (int t = 1; t < teams; ++t) all.add(shared[t * v.panel_bands + warp][lane]);
  // A row that sees nothing, or does not exist, has no attention at all.
  const bool exists = row_exists(v, segment, panel_row(v, panel, warp, lane));
  const float log_sum = exists ? all.log_sum() : -INFINITY;
  if (sample)
    v.references[int64_t{segment} * v.padded_rows + (panel * v.panel_bands + warp) * kBand + lane] = log_sum == -INFINITY ? INFINITY : log_sum;
  else
    v.partials[piece.index * v.padded_rows + (panel * v.panel_bands + warp) * kBand + lane] = log_sum;
}

// A block a (segment, panel) of a sample; its end numbers the tiles.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kLogSumWarps, 2) sample_mma(const __grid_constant__ ScanView v) {
  lead_next();
  extern __shared__ __align__(128) char memory[];
  __shared__ float storage[kLogSumWarps / 2][kBand][2];
  OnlineSum(&shared)[kLogSumWarps / 2][kBand] = reinterpret_cast<OnlineSum(&)[kLogSumWarps / 2][kBand]>(storage);
  if (failed_together(v.g.status)) return;
  const Piece piece{static_cast<int>(blockIdx.x) / v.panels, 0, 0, 0};
  log_sum_mma<T, D>(v, piece, static_cast<int>(blockIdx.x) % v.panels, true, memory, shared);
  if (last_to_arrive(v.g.arrivals + kSampled, gridDim.x)) number_seen_tiles(v);
}

// A block a (worker, panel): again from all tokens, where a reference was outgrown.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kLogSumWarps, 2) repair_mma(const __grid_constant__ ScanView v, const __grid_constant__ ScanResults to) {
  follow_previous();
  extern __shared__ __align__(128) char memory[];
  __shared__ float storage[kLogSumWarps / 2][kBand][2];
  OnlineSum(&shared)[kLogSumWarps / 2][kBand] = reinterpret_cast<OnlineSum(&)[kLogSumWarps / 2][kBand]>(storage);
  if (*v.g.status != LPX_OK || v.outgrown[v.g.segments] == 0) return;
  Piece piece;
  for (Pieces pieces(v, static_cast<int>(blockIdx.x) / v.panels); pieces.next(piece);)
    if (v.outgrown[piece.segment] != 0) log_sum_mma<T, D>(v, piece, static_cast<int>(blockIdx.x) % v.panels, false, memory, shared);
  finish_repair(v, to);
}

}  // namespace laprox::cuda
