// Exact scores in float, for any dtype, head dimension, group and window: the oracle of the fast kernels at large sizes, and
// the path of what they do not serve.
//
//   a_h[q] = 2^(logit2(q_h . k) - lse[h, q])      0 where row q does not see the token
//   A_hh'  = sum over q of a_h[q] a_h'[q]
//   u_h    = v L_h                                 block column by block column, a few columns at a time
//   joint^2 = sum over columns c of sum over h, h' of A_hh' u_h[c] u_h'[c]
//   bound   = sum over h of sqrt(A_hh) ||u_h||
//
// Sums over q, c and pairs of heads are in double, over products that float carries: where cross pairs cancel own pairs (the CPU
// then adds up term by term) nothing but the rounding of a and u themselves is lost, as there. The fast kernels keep these sums in
// float and read L rounded to the cache's dtype: the rounding of L is 2^-9 of each own term for bf16, the cancellation of float sums
// below 2^-20 of their own, so that it shows only where the joint norm is under a thousandth of the own terms' norm.
//
// A CTA takes kTokens tokens of one segment: keys, values, attention of some window rows and u of some columns lie in shared
// memory, a thread owns a query row, a factor column or a pair. A token's sums never look at another token: its bits do not
// depend on what lies beside it. Bound by L2 and shared memory, some percent of the float peak: not meant to be fast.
#pragma once

#include "cuda/kernels/exact_tiles.cuh"
#include "cuda/kernels/factors_layout.cuh"
#include "cuda/kernels/value_norms.cuh"
#include "cuda/kernels/views.cuh"

namespace laprox::cuda {

inline constexpr int kPlainThreads = 128;
inline constexpr int kPlainRows = 8;      // window rows at a time, of every head
inline constexpr int kPlainColumns = 32;  // factor columns at a time

struct PlainRule {
  lpx_statistic statistic;
  lpx_attention_statistic attention;
  lpx_value_statistic value;
  lpx_aggregation aggregation;
  bool take_attention;  // factored: the score is the attention statistic, else it is multiplied onto what is there
  bool take_values;
  bool weigh;  // multiply by the layer's weight at the end
};

// Of [R] numbers; the order of the CPU.
__device__ inline float aggregate(const float* x, int stride, int heads, lpx_aggregation aggregation) {
  float value = 0;
  for (int h = 0; h < heads; ++h) {
    const float a = x[h * stride];
    if (aggregation == LPX_AGGREGATE_MAX)
      value = h == 0 || a > value || a != a ? a : value;
    else
      value += aggregation == LPX_AGGREGATE_RSS ? a * a : a;
  }
  if (aggregation == LPX_AGGREGATE_RSS) value = sqrtf(value);
  if (aggregation == LPX_AGGREGATE_MEAN) value /= static_cast<float>(heads);
  return value;
}

struct PlainShared {
  int rows;     // floats of a row of K or V: [tokens][d]
  int logits;   // [R * kPlainRows][tokens]
  int columns;  // u: [R][tokens][kPlainColumns]
  int pairs;    // doubles [pairs][tokens]
  int heads;    // [R][tokens] doubles: own norms; and floats for statistics
  int64_t bytes;
};
LPX_BOTH inline PlainShared plain_shared(int group, int head_dim, int tokens) {
  PlainShared s{};
  s.pairs = 0;  // doubles first
  int64_t at = int64_t{group} * (group + 1) / 2 * tokens * 8;
  s.heads = static_cast<int>(at);
  at += int64_t{group} * tokens * 8;
  s.rows = static_cast<int>(at);
  at += int64_t{tokens} * head_dim * 4;
  s.logits = static_cast<int>(at);
  const int64_t logits = int64_t{group} * kPlainRows * tokens * 4;
  const int64_t columns = int64_t{group} * tokens * kPlainColumns * 4;
  s.columns = s.logits;  // attention is done with when columns come
  at += logits > columns ? logits : columns;
  s.bytes = at;
  return s;
}

__device__ inline float element(const char* row, int k, lpx_dtype dtype) {
  switch (dtype) {
    case LPX_F16: return to_float(reinterpret_cast<const __half*>(row)[k]);
    case LPX_BF16: return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[k]);
    default: return reinterpret_cast<const float*>(row)[k];
  }
}

template <typename T, int Tokens>
__device__ void load_plain_rows(const LayerView& layer, const PlaneView& plane, int sequence, int head, const int* tokens, int head_dim, float* to) {
  const Rows rows(layer, plane, sequence, head);
  for (int i = static_cast<int>(threadIdx.x); i < Tokens * head_dim; i += kPlainThreads) {
    const int t = i / head_dim;
    to[i] = tokens[t] < 0 ? 0.0f : to_float(reinterpret_cast<const T*>(rows(tokens[t]))[i % head_dim]);
  }
}

// Cache of C. scores[segment * stride + token].
template <typename C, int Tokens>
__global__ void __launch_bounds__(kPlainThreads) exact_plain_kernel(Geometry g, const int32_t* first_tiles, TokenLists given, lpx_dtype window,
                                                                    const float* log_sums, PlainRule rule, FactorView factors, float* scores) {
  follow_previous();
  const TokenLists lists = given.now();
  extern __shared__ double plain_shared_memory[];
  __shared__ int tokens[Tokens];
  __shared__ int positions[Tokens];
  __shared__ double parts[kPlainThreads / 32][Tokens];
  char* memory = reinterpret_cast<char*>(plain_shared_memory);
  const PlainShared at = plain_shared(g.group, g.head_dim, Tokens);
  auto* pairs = reinterpret_cast<double*>(memory + at.pairs);
  auto* own = reinterpret_cast<double*>(memory + at.heads);
  auto* heads = reinterpret_cast<float*>(memory + at.heads);  // statistics of heads, when `own` is not in use
  auto* rows = reinterpret_cast<float*>(memory + at.rows);
  auto* attention = reinterpret_cast<float*>(memory + at.logits);
  auto* columns = reinterpret_cast<float*>(memory + at.columns);
  const int id = static_cast<int>(threadIdx.x);
  const int R = g.group;
  const int d = g.head_dim;
  const int m = g.rows;
  const int pair_count = R * (R + 1) / 2;
  const bool weighted_pairs = rule.statistic == LPX_JOINT || rule.statistic == LPX_BOUND;
  const bool projected = weighted_pairs || (rule.statistic == LPX_FACTORED && rule.take_values && rule.value == LPX_VALUE_PROJECTED_L2);
  const bool attends = weighted_pairs || (rule.take_attention && rule.attention != LPX_ATTENTION_NONE);

  int segment = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < first_tiles[g.segments]; tile += static_cast<int>(gridDim.x)) {
    segment = segment_of_tile(first_tiles, g.segments, tile, segment);
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const int sequence = g.sequence_of(segment);
    const int head = g.head_of(segment);
    const int count = lists.count(g, segment);
    __syncthreads();
    if (id < Tokens) {
      tokens[id] = lists.token(g, segment, (tile - first_tiles[segment]) * Tokens + id, count);
      positions[id] = tokens[id] < 0 ? 0 : token_position(layer, sequence, head, tokens[id]);
    }
    for (int i = id; i < pair_count * Tokens; i += kPlainThreads) pairs[i] = 0;
    __syncthreads();

    float factor = 1;  // of token `id`, for factored rules
    if (attends) {
      load_plain_rows<C, Tokens>(layer, layer.key, sequence, head, tokens, d, rows);
      for (int i = id; i < R * Tokens; i += kPlainThreads) heads[i] = 0;
      __syncthreads();
      for (int q0 = 0; q0 < m; q0 += kPlainRows) {
        const int slab = min(kPlainRows, m - q0);
        for (int row = id; row < R * slab; row += kPlainThreads) {
          const int h = row / slab;
          const int q = q0 + row % slab;
          float products[Tokens] = {};
          const int row_position = g.row_position(segment, q);
          if (row_position >= 0) {
            const char* query = query_row(g, layer, sequence, head, h, q);
            for (int k = 0; k < d; ++k) {
              const float x = element(query, k, window);
              for (int t = 0; t < Tokens; ++t) products[t] += x * rows[t * d + k];
            }
          }
          const float lse = log_sums[int64_t{segment} * R * m + h * m + q];
          for (int t = 0; t < Tokens; ++t)
            attention[row * Tokens + t] = sees(layer, row_position, positions[t]) ? exp2f(logit2(layer, products[t]) - lse) : 0.0f;
        }
        __syncthreads();
        if (weighted_pairs) {
          for (int i = id; i < pair_count * Tokens; i += kPlainThreads) {
            int h = i / Tokens;
            int other = 0;
            while (h > other) h -= ++other;
            double sum = pairs[i];
            for (int q = 0; q < slab; ++q)
              sum += static_cast<double>(attention[(h * slab + q) * Tokens + i % Tokens]) * attention[(other * slab + q) * Tokens + i % Tokens];
            pairs[i] = sum;
          }
        } else {
          for (int i = id; i < R * Tokens; i += kPlainThreads) {
            float value = heads[i];
            for (int q = 0; q < slab; ++q) {
              const float a = attention[(i / Tokens * slab + q) * Tokens + i % Tokens];
              switch (rule.attention) {
                case LPX_ATTENTION_MAX: value = a > value || a != a ? a : value; break;
                case LPX_ATTENTION_L2: value += a * a; break;
                case LPX_ATTENTION_LAST: value = a; break;
                default: value += a;
              }
            }
            if (q0 + slab == m) {
              const int existing = min(max(g.contexts[segment], 0), m);
              if (rule.attention == LPX_ATTENTION_L2) value = sqrtf(value);
              if (rule.attention == LPX_ATTENTION_MEAN && existing > 0) value /= static_cast<float>(existing);
            }
            heads[i] = value;
          }
        }
        __syncthreads();
      }
      if (!weighted_pairs && id < Tokens) factor = aggregate(heads + id, Tokens, R, rule.aggregation);
      __syncthreads();
    }

    double total[Tokens] = {};  // joint: this thread's columns
    if (projected) {
      load_plain_rows<C, Tokens>(layer, layer.value, sequence, head, tokens, d, rows);
      for (int i = id; i < R * Tokens; i += kPlainThreads) own[i] = 0;
      __syncthreads();
      const int slot = factors.slots[g.layer_of(segment)];
      const float* L = slot < 0 ? nullptr : factors.plain + (int64_t{slot} * g.kv_heads + head) * factors.plain_floats;
      for (int j = 0; j < R && L != nullptr; ++j) {
        for (int c0 = 0; c0 < d; c0 += kPlainColumns) {
          const int width = min(kPlainColumns, d - c0);
          for (int i = id; i < (R - j) * kPlainColumns; i += kPlainThreads) {
            const int h = j + i / kPlainColumns;
            const int c = c0 + i % kPlainColumns;
            float u[Tokens] = {};
            if (c < c0 + width) {
              const float* block = L + (int64_t{h} * (h + 1) / 2 + j) * d * d + c;
              for (int k = h == j ? c : 0; k < d; ++k)
                for (int t = 0; t < Tokens; ++t) u[t] += rows[t * d + k] * block[int64_t{k} * d];
            }
            for (int t = 0; t < Tokens; ++t) columns[(h * Tokens + t) * kPlainColumns + i % kPlainColumns] = u[t];
          }
          __syncthreads();
          if (rule.statistic == LPX_JOINT) {
            for (int i = id; i < Tokens * kPlainColumns; i += kPlainThreads) {
              const int t = i / kPlainColumns;
              const int c = i % kPlainColumns;
              double sum = 0;
              for (int other = j; other < R; ++other) {
                const double x = columns[(other * Tokens + t) * kPlainColumns + c];
                double inner = 0;
                for (int h = j; h < other; ++h)
                  inner += pairs[(other * (other + 1) / 2 + h) * Tokens + t] * columns[(h * Tokens + t) * kPlainColumns + c];
                sum += x * (2 * inner + pairs[(other * (other + 1) / 2 + other) * Tokens + t] * x);
              }
              for (int u = 0; u < Tokens; ++u)
                if (u == t) total[u] += sum;
            }
          } else {
            for (int i = id; i < (R - j) * Tokens; i += kPlainThreads) {
              const int h = j + i / Tokens;
              double sum = own[h * Tokens + i % Tokens];
              for (int c = 0; c < width; ++c) {
                const double x = columns[(h * Tokens + i % Tokens) * kPlainColumns + c];
                sum += x * x;
              }
              own[h * Tokens + i % Tokens] = sum;
            }
          }
          __syncthreads();
        }
      }
    }
    if (rule.statistic == LPX_JOINT) {
      for (int t = 0; t < Tokens; ++t) {
        for (int lane = 16; lane > 0; lane /= 2) total[t] += __shfl_xor_sync(0xffffffffu, total[t], lane);
        if (id % 32 == 0) parts[id / 32][t] = total[t];
      }
      __syncthreads();
    }
    if (id < Tokens && tokens[id] >= 0) {
      float score = factor;
      if (rule.statistic == LPX_JOINT) {
        double sum = 0;
        for (int warp = 0; warp < kPlainThreads / 32; ++warp) sum += parts[warp][id];
        score = sum < 0 ? 0.0f : static_cast<float>(sqrt(sum));
      } else if (rule.statistic == LPX_BOUND) {
        double sum = 0;
        for (int h = 0; h < R; ++h) sum += sqrt(pairs[(h * (h + 1) / 2 + h) * Tokens + id] * own[h * Tokens + id]);
        score = static_cast<float>(sum);
      } else {
        float* to = scores + segment * g.stride + tokens[id];
        if (!rule.take_attention) score = *to;
        if (projected) {
          float value = 0;
          for (int h = 0; h < R; ++h) {
            const auto a = static_cast<float>(sqrt(own[h * Tokens + id]));
            if (rule.aggregation == LPX_AGGREGATE_MAX)
              value = h == 0 || a > value || a != a ? a : value;
            else
              value += rule.aggregation == LPX_AGGREGATE_RSS ? a * a : a;
          }
          if (rule.aggregation == LPX_AGGREGATE_RSS) value = sqrtf(value);
          if (rule.aggregation == LPX_AGGREGATE_MEAN) value /= static_cast<float>(R);
          score *= value;
        }
      }
      if (rule.weigh) score *= layer.weight;
      scores[segment * g.stride + tokens[id]] = score;
    }
  }
}

// ------------------------------------------------------------------ rows alone

// A uniform number in [0, 1): splitmix64 over what names the entry. The CPU's bits.
__device__ inline float random_score(uint64_t seed, int layer, int head, int position) {
  uint64_t x = seed;
  const uint64_t parts[3] = {static_cast<uint64_t>(layer), static_cast<uint64_t>(head), static_cast<uint64_t>(static_cast<int64_t>(position))};
  for (const uint64_t part : parts) {
    x += 0x9e3779b97f4a7c15u + part;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
  }
  return static_cast<float>(x >> 40) * 0x1p-24f;
}

enum class RowWork { kKeyNorm, kRecency, kRandom, kMultiplyL1, kMultiplyL2, kWeigh };

// Rules of single rows, and factors of single rows multiplied onto scores: one read of the rows, nothing else, as value_norms.cuh.
inline constexpr int kRowTile = 512;
template <typename T, int Lanes>
__global__ void __launch_bounds__(256)
    row_kernel(Geometry g, const int32_t* first_tiles, TokenLists lists, RowWork work, lpx_aggregation aggregation, uint64_t seed, float* scores) {
  follow_previous();
  constexpr int kGroups = 256 / Lanes;
  const int group = static_cast<int>(threadIdx.x) / Lanes;
  const int bytes = g.head_dim * static_cast<int>(sizeof(T));
  const bool reads = work == RowWork::kKeyNorm || work == RowWork::kMultiplyL1 || work == RowWork::kMultiplyL2;
  int segment = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < first_tiles[g.segments]; tile += static_cast<int>(gridDim.x)) {
    segment = segment_of_tile(first_tiles, g.segments, tile, segment);
    const LayerView& layer = g.layer[g.layer_of(segment)];
    const int sequence = g.sequence_of(segment);
    const int head = g.head_of(segment);
    const int count = lists.count(g, segment);
    const int first = (tile - first_tiles[segment]) * kRowTile;
    const Rows rows(layer, work == RowWork::kKeyNorm ? layer.key : layer.value, sequence, head);
    for (int base = 0; base < kRowTile; base += kGroups * kRowBatch) {
      const auto token_of = [&](int i) { return lists.token(g, segment, first + base + i * kGroups + group, count); };
      const auto row_at = [&](int i) -> const char* {
        const int token = token_of(i);
        return token < 0 ? nullptr : rows(token);
      };
      const float sum = reads ? row_sum<T, Lanes>(row_at, bytes, work == RowWork::kMultiplyL1) : 0.0f;
      const int lane = static_cast<int>(threadIdx.x) % 32;
      const int token = token_of(owned_row<Lanes>(lane));
      if (!owns_row<Lanes>(lane) || token < 0) continue;
      float* to = scores + segment * g.stride + token;
      float score = 0;
      switch (work) {
        case RowWork::kKeyNorm: score = -sqrtf(sum); break;
        case RowWork::kRecency: score = static_cast<float>(token_position(layer, sequence, head, token)); break;
        case RowWork::kRandom: score = random_score(seed, g.layer_of(segment), head, token_position(layer, sequence, head, token)); break;
        case RowWork::kWeigh: score = *to; break;
        default: {
          // The aggregate of R equal numbers, as the CPU adds them up.
          const float size = work == RowWork::kMultiplyL2 ? sqrtf(sum) : sum;
          float value = aggregation == LPX_AGGREGATE_MAX ? size : 0.0f;
          if (aggregation != LPX_AGGREGATE_MAX)
            for (int h = 0; h < g.group; ++h) value += aggregation == LPX_AGGREGATE_RSS ? size * size : size;
          if (aggregation == LPX_AGGREGATE_RSS) value = sqrtf(value);
          if (aggregation == LPX_AGGREGATE_MEAN) value /= static_cast<float>(g.group);
          score = *to * value;
        }
      }
      *to = score * layer.weight;
    }
  }
}

// Every head of a layer gets the aggregate over its heads. A thread a token; grid.y = (layer, sequence).
__global__ void __launch_bounds__(256) share_kernel(Geometry g, lpx_aggregation aggregation, float* scores) {
  follow_previous();
  if (*g.status != LPX_OK) return;
  for (int64_t i = blockIdx.y; i < int64_t{g.layers} * g.sequences; i += gridDim.y) {
    const int64_t first = i * g.kv_heads;
    const int length = g.lengths[first];
    for (int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); t < length; t += static_cast<int>(gridDim.x * blockDim.x)) {
      float* at = scores + first * g.stride + t;
      float value = at[0];
      if (aggregation == LPX_AGGREGATE_RSS) value *= value;
      for (int h = 1; h < g.kv_heads; ++h) {
        const float other = at[h * g.stride];
        switch (aggregation) {
          case LPX_AGGREGATE_MAX: value = other > value || other != other ? other : value; break;
          case LPX_AGGREGATE_RSS: value += other * other; break;
          default: value += other;
        }
      }
      if (aggregation == LPX_AGGREGATE_RSS) value = sqrtf(value);
      if (aggregation == LPX_AGGREGATE_MEAN) value /= static_cast<float>(g.kv_heads);
      for (int h = 0; h < g.kv_heads; ++h) at[h * g.stride] = value;
    }
  }
}

}  // namespace laprox::cuda
