// Joint and bound scores and attention statistics by mma.sync: compute capability 8.0 and newer, bf16 and f16.
//
// The formulas and the stream of chunks of exact_hopper.cuh (packed queries, then the factor's image; only queries for statistics), in the
// orientation that mma.sync likes: a warp owns 32 tokens (16 where d is 256) whose keys, then values, are left operands in registers for
// the whole tile; chunks are right operands, in two stages of shared memory that all warps of the CTA read. A few columns of all heads
// are multiplied at a time, so that products of heads are sums within a thread; attention pairs wait in shared memory.
//
// Bytes and operations as there. Per 16 products of a warp four ldmatrix: shared memory is two thirds busy when the tensor cores are
// as fast as they go with mma.sync.
#pragma once

#include "cuda/kernels/exact_queries.cuh"
#include "cuda/kernels/exact_tiles.cuh"
#include "cuda/kernels/mma.cuh"

namespace laprox::cuda {

struct PortableRule {
  bool attention_only;
  bool bound;
  lpx_attention_statistic statistic;  // attention alone; LAST: as SUM, of queries packed so that the other rows have no attention
  lpx_aggregation aggregation;
  bool weigh;
};

// R: room for heads (4 or 8); any number up to that is served.
template <int R, int D>
struct PortableShape {
  static constexpr int kTiles = D <= 128 ? 2 : 1;  // of 16 tokens a warp
  static constexpr int kTokens = 16 * kTiles;      // of a warp
  static constexpr int kSteps = D / 16;
  static constexpr int kBlocks = R <= 4 && D <= 128 ? 2 : 1;  // blocks of 8 columns of each head at a time
  static constexpr int kStageBytes = chunk_bytes(chunk_rows(D), D);
  static constexpr int kTileBytes = chunk_bytes(kTokens, D);
  static constexpr int kPairGroups = (R * (R + 1) / 2 + 3) / 4;
  static constexpr int kNorms = kPairGroups * 4;           // ||u_h||^2 of heads, after the pairs
  static constexpr int kPairStride = kPairGroups * 4 + R;  // floats of a token
  static constexpr int kMaxChunks = 176;
  static constexpr int shared(int warps) { return 2 * kStageBytes + warps * (kTileBytes + kTokens * kPairStride * 4); }
};

// Sums over the four lanes of a quad: out[i] = x[4 * i + lane % 4] in full.
template <int Groups>
__device__ __forceinline__ void reduce_quads(const float* x, int lane, float (&out)[Groups]) {
  const bool high = (lane & 2) != 0;
  const bool odd = (lane & 1) != 0;
#pragma unroll
  for (int i = 0; i < Groups; ++i, x += 4) {
    float first = high ? x[2] : x[0];
    float second = high ? x[3] : x[1];
    first += __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2);
    second += __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
    out[i] = odd ? second : first;
    out[i] += __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  }
}

template <typename T, int R, int D>
__global__ void __launch_bounds__(256, 1) portable_kernel(Geometry g, const int32_t* first_tiles, TokenLists given, const char* queries,
                                                          const float* lse, FactorView factors, PortableRule rule, float* scores) {
  follow_previous();
  const TokenLists lists = given.now();
  using Shape = PortableShape<R, D>;
  constexpr int kRows = 2 * Shape::kTiles;  // tokens of a thread: lane / 4, 8 below, and so on
  extern __shared__ __align__(128) char portable_memory[];
  __shared__ int offsets[Shape::kMaxChunks + 1];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int heads = g.group;
  const int height = slab_rows(heads, D);
  const int slabs = (g.rows + height - 1) / height;
  const uint32_t stages = shared_address(portable_memory);
  const uint32_t rows = stages + 2 * Shape::kStageBytes + warp * Shape::kTileBytes;
  float* pairs = reinterpret_cast<float*>(portable_memory + 2 * Shape::kStageBytes + warps * Shape::kTileBytes) +
                 (warp * Shape::kTokens + lane / 4) * Shape::kPairStride;  // of the thread's first token
  const int tiles = first_tiles[g.segments];
  if (threadIdx.x == 0) {
    int at = 0;
    int index = 0;
    for (int j = 0; j < heads && !rule.attention_only; ++j) {
      const int columns = chunk_columns(heads - j, D);
      for (int c = 0; c < D; c += columns, at += chunk_bytes((heads - j) * columns, D)) offsets[index++] = at;
    }
    offsets[index] = at;
    offsets[Shape::kMaxChunks] = index;
  }
  __syncthreads();
  const int steps = slabs + offsets[Shape::kMaxChunks];

  const auto fetch_chunk = [&](int segment, int index, int stage) {
    const char* from;
    int bytes = chunk_bytes(heads * height, D);
    if (index < slabs) {
      from = queries + (int64_t{segment} * slabs + index) * bytes;
    } else {
      from = factors.image + (static_cast<int64_t>(factors.slots[g.layer_of(segment)]) * g.kv_heads + g.head_of(segment)) * factors.image_bytes +
             offsets[index - slabs];
      bytes = offsets[index - slabs + 1] - offsets[index - slabs];
    }
    for (int i = static_cast<int>(threadIdx.x) * 16; i < bytes; i += static_cast<int>(blockDim.x) * 16)
      copy_async_16(stages + stage * Shape::kStageBytes + i, from + i, true);
  };
  // The warp's own rows.
  const auto fetch_rows = [&](int segment, int first, bool values) {
    constexpr int kPieces = D / 8;
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const Rows of(layer, values ? layer.value : layer.key, g.sequence_of(segment), g.head_of(segment));
    const int own = lists.token(g, segment, first + lane % Shape::kTokens, lists.count(g, segment));
    const auto address = own < 0 ? 0ull : reinterpret_cast<unsigned long long>(of(own));
#pragma unroll 4
    for (int i = lane; i < Shape::kTokens * kPieces; i += 32) {
      const auto* from = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, address, i / kPieces));
      copy_async_16(rows + swizzled(Shape::kTokens, i / kPieces, i % kPieces * 8), (from == nullptr ? of.base : from) + i % kPieces * 16,
                    from != nullptr);
    }
  };
  uint32_t left[Shape::kTiles][Shape::kSteps][4];
  const auto load_left = [&] {
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile)
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step)
        load_matrices(rows + swizzled(Shape::kTokens, tile * 16 + lane % 16, step * 16 + lane / 16 * 8), left[tile][step]);
    __syncwarp();
  };
  // sums of one block group: columns [first, first + 8 * kBlocks) of every head of a chunk of `chunk_heads` x `columns`; the last head's
  // columns from `own_first` on are zero below that feature.
  float sums[R][Shape::kBlocks][Shape::kTiles][4];
  const auto multiply = [&](int stage, int chunk_heads, int columns, int first, int own_first) {
#pragma unroll
    for (int h = 0; h < R; ++h)
#pragma unroll
      for (int b = 0; b < Shape::kBlocks; ++b)
#pragma unroll
        for (int tile = 0; tile < Shape::kTiles; ++tile)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[h][b][tile][e] = 0;
    const uint32_t base = stages + stage * Shape::kStageBytes;
    const int chunk_height = chunk_heads * columns;
#pragma unroll
    for (int step = 0; step < Shape::kSteps; step += 2) {
      const uint32_t panel = base + step / 4 * chunk_height * 128;
      const int piece = step % 4 * 2 + lane / 8;
#pragma unroll
      for (int h = 0; h < R; ++h) {
        if (h >= chunk_heads || (h == chunk_heads - 1 && step * 16 + 32 <= own_first)) continue;
#pragma unroll
        for (int b = 0; b < Shape::kBlocks; ++b) {
          const int row = h * columns + first + b * 8 + lane % 8;
          uint32_t right[4];
          load_matrices(panel + row * 128 + ((piece ^ (row % 8)) * 16), right);
#pragma unroll
          for (int tile = 0; tile < Shape::kTiles; ++tile) {
            multiply_add<T>(sums[h][b][tile], left[tile][step], right[0], right[1]);
            multiply_add<T>(sums[h][b][tile], left[tile][step + 1], right[2], right[3]);
          }
        }
      }
    }
  };

  int segment = 0;
  int first = 0;  // of the warp's tokens
  int stage = 0;
  int tile = static_cast<int>(blockIdx.x);
  if (tile < tiles) {
    segment = segment_of_tile_together(first_tiles, g.segments, tile);
    first = ((tile - first_tiles[segment]) * warps + warp) * Shape::kTokens;
    fetch_chunk(segment, 0, 0);
    fetch_rows(segment, first, false);
    commit_copies();
  }
  while (tile < tiles) {
    const int next_tile = tile + static_cast<int>(gridDim.x);
    int next_segment = segment;
    int next_first = 0;
    if (next_tile < tiles) {
      next_segment = segment_of_tile(first_tiles, g.segments, next_tile, segment);
      next_first = ((next_tile - first_tiles[next_segment]) * warps + warp) * Shape::kTokens;
    }
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const int count = lists.count(g, segment);
    const int first_row_position = g.row_position(segment, 0);
    int token[kRows];
    int position[kRows];
    bool hidden = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      token[row] = lists.token(g, segment, first + lane / 4 + row * 8, count);
      position[row] = token[row] < 0 ? 0 : token_position(layer, g.sequence_of(segment), g.head_of(segment), token[row]);
      hidden |= position[row] > first_row_position ||
                (layer.sliding_window != 0 && first_row_position + g.rows - 1 - position[row] >= layer.sliding_window);
    }
    const bool masked = __any_sync(0xffffffffu, hidden);
    float local[kRows][Shape::kPairGroups * 4 > R ? Shape::kPairGroups * 4 : R];  // pairs (R <= 4), or statistics of heads
    float totals[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      totals[row] = 0;
#pragma unroll
      for (int p = 0; p < (R <= 4 ? Shape::kPairGroups * 4 : R); ++p) local[row][p] = 0;
      for (int p = lane % 4; p < Shape::kPairStride && !rule.attention_only; p += 4) pairs[row * 8 * Shape::kPairStride + p] = 0;
    }
    __syncwarp();

    int j = 0;
    int column = 0;
    for (int index = 0; index < steps; ++index) {
      wait_copies<0>();
      __syncthreads();
      if (index + 1 < steps)
        fetch_chunk(segment, index + 1, stage ^ 1);
      else if (next_tile < tiles)
        fetch_chunk(next_segment, 0, stage ^ 1);
      if (index == 0) {
        load_left();
        if (!rule.attention_only)
          fetch_rows(segment, first, true);
        else if (next_tile < tiles)
          fetch_rows(next_segment, next_first, false);
      } else if (index == slabs) {
        load_left();
        if (next_tile < tiles) fetch_rows(next_segment, next_first, false);
      }
      commit_copies();

      if (index < slabs) {
        const float* slab_lse = lse + (int64_t{segment} * slabs + index) * heads * height + lane % 4 * 2;
        const float scale = layer.scale * 1.44269504088896340736f;
        for (int q0 = 0; q0 < height; q0 += 8 * Shape::kBlocks) {
          multiply(stage, heads, height, q0, 0);
          if (layer.soft_cap > 0) {
            const SoftCap cap(layer);
#pragma unroll
            for (int h = 0; h < R; ++h)
#pragma unroll
              for (int i = 0; i < Shape::kBlocks * Shape::kTiles * 4; ++i) {
                float& sum = sums[h][i / (Shape::kTiles * 4)][i / 4 % Shape::kTiles][i % 4];
                sum = cap(sum);
              }
          }
#pragma unroll
          for (int b = 0; b < Shape::kBlocks; ++b) {
            float2 references[R];
#pragma unroll
            for (int h = 0; h < R; ++h)
              references[h] = h < heads ? *reinterpret_cast<const float2*>(slab_lse + h * height + q0 + b * 8) : make_float2(INFINITY, INFINITY);
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
              float products[Shape::kPairGroups * 4] = {};
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float a[R];
#pragma unroll
                for (int h = 0; h < R; ++h) {
                  a[h] = exp2_fast(sums[h][b][row / 2][row % 2 * 2 + e] * scale - (e == 0 ? references[h].x : references[h].y));
                  if (masked) {
                    const int at = first_row_position + index * height + q0 + b * 8 + lane % 4 * 2 + e;
                    const bool seen = position[row] <= at && (layer.sliding_window == 0 || at - position[row] < layer.sliding_window);
                    a[h] = seen ? a[h] : 0.0f;
                  }
                }
                if (rule.attention_only) {
#pragma unroll
                  for (int h = 0; h < R; ++h) {
                    float& value = local[row][h];
                    if (rule.statistic == LPX_ATTENTION_MAX)
                      value = a[h] > value || a[h] != a[h] ? a[h] : value;
                    else
                      value += rule.statistic == LPX_ATTENTION_L2 ? a[h] * a[h] : a[h];
                  }
                } else {
#pragma unroll
                  for (int h = 0; h < R; ++h)
#pragma unroll
                    for (int other = 0; other <= h; ++other) (R <= 4 ? local[row] : products)[h * (h + 1) / 2 + other] += a[h] * a[other];
                }
              }
              if (R > 4 && !rule.attention_only) {
                float reduced[Shape::kPairGroups];
                reduce_quads(products, lane, reduced);
#pragma unroll
                for (int i = 0; i < Shape::kPairGroups; ++i) pairs[row * 8 * Shape::kPairStride + 4 * i + lane % 4] += reduced[i];
              }
            }
          }
        }
        if (index + 1 == slabs && !rule.attention_only) {
          if (R <= 4) {
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
              float reduced[Shape::kPairGroups];
              reduce_quads(local[row], lane, reduced);
#pragma unroll
              for (int i = 0; i < Shape::kPairGroups; ++i) pairs[row * 8 * Shape::kPairStride + 4 * i + lane % 4] = reduced[i];
            }
          }
          __syncwarp();
        }
      } else {
        const int chunk_heads = heads - j;
        const int columns = chunk_columns(chunk_heads, D);
        const auto head = [&](int slot) { return slot == chunk_heads - 1 ? j : j + 1 + slot; };
        float norms[kRows][R] = {};
        for (int c = 0; c < columns; c += 8 * Shape::kBlocks) {
          multiply(stage, chunk_heads, columns, c, column + c);
#pragma unroll
          for (int row = 0; row < kRows; ++row) {
            const float* weights = pairs + row * 8 * Shape::kPairStride;
#pragma unroll
            for (int slot = 0; slot < R; ++slot) {
              if (slot >= chunk_heads) continue;
              float inner[Shape::kBlocks][2] = {};
              if (!rule.bound) {
                const int h = head(slot);
#pragma unroll
                for (int other = 0; other < slot; ++other) {
                  // Heads ascend but for the last slot, which is the least.
                  const int l = j + 1 + other;
                  const float weight = weights[l < h ? h * (h + 1) / 2 + l : l * (l + 1) / 2 + h];
#pragma unroll
                  for (int b = 0; b < Shape::kBlocks; ++b)
#pragma unroll
                    for (int e = 0; e < 2; ++e) inner[b][e] += weight * sums[other][b][row / 2][row % 2 * 2 + e];
                }
                const float own = weights[h * (h + 1) / 2 + h];
#pragma unroll
                for (int b = 0; b < Shape::kBlocks; ++b)
#pragma unroll
                  for (int e = 0; e < 2; ++e) {
                    const float u = sums[slot][b][row / 2][row % 2 * 2 + e];
                    totals[row] += u * (2 * inner[b][e] + own * u);
                  }
              } else {
#pragma unroll
                for (int b = 0; b < Shape::kBlocks; ++b)
#pragma unroll
                  for (int e = 0; e < 2; ++e) norms[row][slot] += sums[slot][b][row / 2][row % 2 * 2 + e] * sums[slot][b][row / 2][row % 2 * 2 + e];
              }
            }
          }
        }
        if (rule.bound) {
#pragma unroll
          for (int row = 0; row < kRows; ++row)
#pragma unroll
            for (int slot = 0; slot < R; ++slot) {
              if (slot >= chunk_heads) continue;
              float norm = norms[row][slot];
              norm += __shfl_xor_sync(0xffffffffu, norm, 1);
              norm += __shfl_xor_sync(0xffffffffu, norm, 2);
              if (lane % 4 == 0) pairs[row * 8 * Shape::kPairStride + Shape::kNorms + head(slot)] += norm;
            }
        }
        column += columns;
        if (column == D) {
          column = 0;
          ++j;
        }
      }
      stage ^= 1;
    }

    __syncwarp();
    const int existing = min(max(first_row_position + g.rows, 0), g.rows);
    const float factor_scale =
        rule.attention_only ? 1.0f : factors.scales[static_cast<int64_t>(factors.slots[g.layer_of(segment)]) * g.kv_heads + g.head_of(segment)];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float score = 0;
      if (rule.attention_only) {
#pragma unroll
        for (int h = 0; h < R; ++h) {
          if (h >= heads) continue;
          float value = local[row][h];
#pragma unroll
          for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, value, step);
            if (rule.statistic == LPX_ATTENTION_MAX)
              value = other > value || other != other ? other : value;
            else
              value += other;
          }
          if (rule.statistic == LPX_ATTENTION_L2) value = sqrtf(value);
          if (rule.statistic == LPX_ATTENTION_MEAN && existing > 0) value /= static_cast<float>(existing);
          if (rule.aggregation == LPX_AGGREGATE_MAX)
            score = h == 0 || value > score || value != value ? value : score;
          else
            score += rule.aggregation == LPX_AGGREGATE_RSS ? value * value : value;
        }
        if (rule.aggregation == LPX_AGGREGATE_RSS) score = sqrtf(score);
        if (rule.aggregation == LPX_AGGREGATE_MEAN) score /= static_cast<float>(heads);
      } else if (rule.bound) {
        const float* own = pairs + row * 8 * Shape::kPairStride;
        for (int h = 0; h < heads; ++h) score += sqrtf(own[h * (h + 1) / 2 + h]) * sqrtf(own[Shape::kNorms + h]);
        score *= factor_scale;
      } else {
        float total = totals[row];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        score = sqrtf(total < 0 ? 0.0f : total) * factor_scale;
      }
      if (rule.weigh) score *= layer.weight;
      if (lane % 4 == 0 && token[row] >= 0) scores[segment * g.stride + token[row]] = score;
    }
    __syncwarp();
    tile = next_tile;
    segment = next_segment;
    first = next_first;
  }
}

}  // namespace laprox::cuda
