// Joint and bound scores by warpgroup products (compute capability 9.0a).
//
//   S = K Q^T -> a_h[q] = 2^(S * scale - lse)    A_hh' = sum over q of a_h a_h'
//   U = V L   -> joint^2 = sum over columns c, heads h, h' of A_hh' u_h[c] u_h'[c];  bound = sum over h of sqrt(A_hh) ||u_h||
//
// Bytes: one read of K and V, one write of scores. Operations a token at R = 4, d = 128, m = 32: 2 * 128 * 128 for S and 8.25 times that
// for U (10 blocks, zero halves of the diagonal ones skipped in steps of 16 columns), 10.2 TFLOP for Llama-8B at n = 131072.
//
// Tokens are the rows of both products (64 a warpgroup), so keys and values are left operands, in registers for all of a tile, and
// everything else, window queries and factor, is one stream of right operands: chunks of up to 128 rows by d, already in the order and swizzle
// of shared memory. They come from L2 by bulk copies through a ring; the three warpgroups of a CTA that multiply read the same chunks, each at its
// own pace: while one adds up its products the tensor cores work for the others. With 192 tokens a CTA the stream is 1.8 KB a token. A thread of a
// fourth warpgroup keeps the ring full; its registers go to the others. (When the warp that was last to free a chunk refilled its place, every
// instruction of that was waited for by all: 60 of them more cost 9 % of the time.) A warpgroup's own chain of instructions binds, more than the
// tensor cores: whatever needs no products is done while some are under way.
// Left operands from registers matter: from shared memory, a product of 64 x 128 x 16 would read 6 KB instead of 4 in 64 cycles, and at 128 bytes a
// cycle shared memory, not the tensor cores, would bind. They also spare a fence between the copies of rows and the products.
// A chunk holds the same columns of u for all heads that have them: sums over columns of products of heads never leave a thread (R <= 4; for more
// heads A waits in shared memory and what is summed is the whole quadratic form).
// K and V rows come by 16-byte copies from wherever pages or lists of tokens say, each warp its own 16: values during the products of
// keys, the next tile's keys during the products of values.
// Tiles are dealt in turn to a persistent grid, so that all CTAs stream the same segment's factor at about the same time.
// A token's sums do not depend on its tile: bits are the same for all tokens and for lists.
#pragma once

#include "cuda/kernels/exact_queries.cuh"
#include "cuda/kernels/exact_tiles.cuh"
#include "cuda/kernels/exact_wgmma.cuh"

namespace laprox::cuda {

template <int R, int D>
struct HopperShape {
  static constexpr int kWarpgroups = 3;
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kRegisters = 160;         // of a thread that multiplies
  static constexpr int kProducerRegisters = 24;  // and of the fourth warpgroup's
  static constexpr int kTokens = kWarpgroups * 64;
  static constexpr int kSteps = D / 16;                 // of a product's depth
  static constexpr int kRowBytes = chunk_bytes(16, D);  // of a warp's tokens
  static constexpr int kStageBytes = chunk_bytes(chunk_rows(D), D);
  static constexpr int kPairs = R * (R + 1) / 2;
  static constexpr bool kPairsInRegisters = R <= 4;
  static constexpr int kPairGroups = (kPairs + 3) / 4;
  static constexpr int kPairStride = kPairsInRegisters ? 0 : (kPairs + 3) / 4 * 4;
  static constexpr int kQueryRows = R * slab_rows(R, D);
  static constexpr int factor_chunks() {
    int chunks = 0;
    for (int j = 0; j < R; ++j) chunks += D / chunk_columns(R - j, D);
    return chunks;
  }
  static constexpr int kFactorChunks = factor_chunks();
  static constexpr int kMostStages = kPairsInRegisters ? 5 : 4;
  static constexpr int kStages = kMostStages < kFactorChunks + 1 ? kMostStages : kFactorChunks + 1;  // no more than the chunks of a tile
  // Shared memory.
  static constexpr int kRowsAt = kStages * kStageBytes;
  static constexpr int kPairsAt = kRowsAt + kWarpgroups * 4 * kRowBytes;
  static constexpr int kBarriers = kPairsAt + kTokens * kPairStride * 4;
  static constexpr int kReleases = kBarriers + kStages * 8;       // a barrier a stage: warps that have freed it
  static constexpr int kShared = kReleases + kStages * 8 + 1024;  // and room to align
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A segment taken apart, once a tile: divisions are long chains of instructions.
struct Place {
  int segment;
  int layer;
  int sequence;
  int head;

  __device__ Place(const Geometry& g, int segment_) : segment(segment_) {
    const int row = segment / g.kv_heads;
    head = segment - row * g.kv_heads;
    layer = row / g.sequences;
    sequence = row - layer * g.sequences;
  }
};

// Rows of a warp's 16 tokens into a swizzled tile: a lane looks one row up, all copy. Tokens that are not there become zero.
template <int D>
__device__ __forceinline__ void load_token_rows(const Geometry& g, const TokenLists& lists, const Place& place, int first, bool values, uint32_t to) {
  constexpr int kPieces = D / 8;
  const LayerView& layer = g.layer[place.layer];
  const Rows rows(layer, values ? layer.value : layer.key, place.sequence, place.head);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int own = lists.token(g, place.segment, first + lane % 16, lists.count(g, place.segment));
  const auto address = own < 0 ? 0ull : reinterpret_cast<unsigned long long>(rows(own));
#pragma unroll
  for (int i = 0; i < 16 * kPieces / 32; ++i) {
    const int row = (lane + 32 * i) / kPieces;
    const int piece = (lane + 32 * i) % kPieces;
    const auto* from = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, address, row));
    copy_async_16(to + swizzled(16, row, piece * 8), (from == nullptr ? rows.base : from) + piece * 16, from != nullptr);
  }
}

// The left operands of all steps of a product.
template <int D>
__device__ __forceinline__ void load_left(uint32_t rows, uint32_t (&left)[D / 16][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();  // the copies of other lanes
#pragma unroll
  for (int step = 0; step < D / 16; ++step) load_matrices(rows + swizzled(16, lane % 16, step * 16 + lane / 16 * 8), left[step]);
  __syncwarp();
}

// Where a warp is in the ring of chunks.
template <int Stages>
struct Ring {
  int stage = 0;
  int parity = 0;
  __device__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// What hides tokens from rows.
struct Mask {
  int position[2];   // of the thread's tokens
  int row_position;  // of the lane's first row in the slab
  int window;

  __device__ bool sees(int row, int q) const {
    return position[row] <= row_position + q && (window == 0 || row_position + q - position[row] < window);
  }
};

template <typename T, int R, int D, bool Bound>
struct HopperJoint {
  using Shape = HopperShape<R, D>;

  uint32_t memory;  // shared
  int lane;
  Ring<Shape::kStages> ring;
  uint32_t left[Shape::kSteps][4];  // keys or values
  float sums[64];
  // Of the thread's two tokens, R <= 4: sums over this thread's rows (A) or columns (<u_h, u_h'>) of the products of heads; then, with
  // pair 4 * i + lane % 4 in group i, A.
  float pairs[2][Shape::kPairsInRegisters ? Shape::kPairGroups * 4 : 1];
  float attention[2][Shape::kPairGroups];
  // R > 4: A lies in shared memory, cross pairs twice: [2 rows 8 tokens apart][kPairStride].
  float* shared_pairs;
  float totals[2][Bound ? R : 1];  // joint^2, or ||u_h||^2 of each head

  __device__ __forceinline__ uint64_t chunk() const { return wgmma_tile(memory + ring.stage * Shape::kStageBytes); }
  __device__ __forceinline__ void wait_chunk() const { barrier_wait(memory + Shape::kBarriers + ring.stage * 8, ring.parity); }
  __device__ __forceinline__ void free_chunk() {
    __syncwarp();
    if (lane == 0) barrier_arrive(memory + Shape::kReleases + ring.stage * 8);
    ring.advance();
  }
  // Products are there and the chunk is no longer read. They were committed right behind the last: anywhere else, that is a product of its own.
  template <int N>
  __device__ __forceinline__ void finish_products() {
    wgmma_wait();
    wgmma_settle<N>(sums);
    free_chunk();
  }
  // Units of a descriptor to k-step `step` of a tile of `rows` rows.
  __device__ __forceinline__ static int step_offset(int rows, int step) { return (step / 4 * rows * 128 + step % 4 * 32) >> 4; }

  // `meanwhile`: what is done while the tensor cores are at it.
  template <typename Meanwhile>
  __device__ __forceinline__ void multiply_queries(Meanwhile&& meanwhile) {
    wait_chunk();
    const uint64_t queries = chunk();
    wgmma_fence();
    wgmma<T, Shape::kQueryRows, true>(sums, left[0], queries);
#pragma unroll
    for (int step = 1; step < Shape::kSteps; ++step)
      wgmma<T, Shape::kQueryRows, false>(sums, left[step], queries + step_offset(Shape::kQueryRows, step));
    wgmma_commit();
    meanwhile();
    finish_products<Shape::kQueryRows>();
  }

  // References of block b of 8 rows of the slab, for all heads. Waits for `after`, so that no more than a block of them is in registers.
  __device__ __forceinline__ static void load_references(const float* lse, int b, float& after, float2 (&references)[R]) {
    asm volatile("" : "+l"(lse), "+f"(after));
#pragma unroll
    for (int h = 0; h < R; ++h) references[h] = *reinterpret_cast<const float2*>(lse + h * slab_rows(R, D) + b * 8);
  }

  // local += products of heads' attention, of the thread's token `row` and its two rows of block b.
  template <bool Masked>
  __device__ __forceinline__ void add_block(const Mask& mask, int b, int row, float scale, const float2 (&references)[R], float* local) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float a[R];
#pragma unroll
      for (int h = 0; h < R; ++h) {
        a[h] = exp2_fast(sums[(h * (slab_rows(R, D) / 8) + b) * 4 + row * 2 + e] * scale - (e == 0 ? references[h].x : references[h].y));
        if (Masked) a[h] = mask.sees(row, b * 8 + e) ? a[h] : 0.0f;
      }
#pragma unroll
      for (int h = 0; h < R; ++h)
#pragma unroll
        for (int other = 0; other <= h; ++other) local[h * (h + 1) / 2 + other] += a[h] * a[other];
    }
  }

  // Adds this slab's attention to A. `lse` begins at the lane's first row.
  template <bool Masked>
  __device__ __forceinline__ void add_attention(const Mask& mask, float layer_scale, const float* lse, bool first_slab) {
    constexpr int kBlocks = slab_rows(R, D) / 8;
    const float scale = layer_scale * 1.44269504088896340736f;
    float2 references[R];
    if constexpr (Shape::kPairsInRegisters) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        load_references(lse, b, pairs[1][0], references);
#pragma unroll
        for (int row = 0; row < 2; ++row) add_block<Masked>(mask, b, row, scale, references, pairs[row]);
      }
    } else {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float local[Shape::kPairs] = {};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          load_references(lse, b, local[0], references);
          add_block<Masked>(mask, b, row, scale, references, local);
        }
        float* to = shared_pairs + row * 8 * Shape::kPairStride;
#pragma unroll
        for (int p = 0; p < Shape::kPairs; ++p) {
          float sum = local[p];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (p % 4 == lane % 4) to[p] = first_slab ? sum : to[p] + sum;
        }
      }
    }
  }

  // Sums of pairs over the four lanes of a quad: out[i] = pair 4 * i + lane % 4 in full.
  __device__ __forceinline__ void reduce_pairs(const float (&from)[Shape::kPairsInRegisters ? Shape::kPairGroups * 4 : 1],
                                               float (&out)[Shape::kPairGroups]) const {
    const bool high = (lane & 2) != 0;
    const bool odd = (lane & 1) != 0;
#pragma unroll
    for (int i = 0; i < Shape::kPairGroups; ++i) {
      const float* x = from + 4 * i;
      float first = high ? x[2] : x[0];
      float second = high ? x[3] : x[1];
      first += __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2);
      second += __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
      out[i] = odd ? second : first;
      out[i] += __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
    }
  }

  // All slabs are in.
  __device__ __forceinline__ void finish_attention() {
    if constexpr (Shape::kPairsInRegisters) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        reduce_pairs(pairs[row], attention[row]);
#pragma unroll
        for (int p = 0; p < Shape::kPairGroups * 4; ++p) pairs[row][p] = 0;
      }
    } else {
      __syncwarp();
#pragma unroll
      for (int row = 0; row < 2; ++row)
#pragma unroll
        for (int h = 0; h < R; ++h)
#pragma unroll
          for (int other = 0; other < h; ++other)
            if ((h * (h + 1) / 2 + other) % 4 == lane % 4) shared_pairs[row * 8 * Shape::kPairStride + h * (h + 1) / 2 + other] *= 2;
      __syncwarp();
    }
  }

  // The score of the thread's token `row`, before weights.
  __device__ __forceinline__ float finish_score(int row) {
    float score = 0;
    if constexpr (Shape::kPairsInRegisters) {
      float values[Shape::kPairGroups];
      reduce_pairs(pairs[row], values);
#pragma unroll
      for (int i = 0; i < Shape::kPairGroups; ++i) {
        const int p = 4 * i + lane % 4;
        const bool own = p == 0 || p == 2 || p == 5 || p == 9;
        if (Bound)
          score += own ? sqrtf(attention[row][i]) * sqrtf(values[i]) : 0.0f;
        else
          score += attention[row][i] * (own ? values[i] : 2 * values[i]);
      }
      score += __shfl_xor_sync(0xffffffffu, score, 1);
      score += __shfl_xor_sync(0xffffffffu, score, 2);
    } else {
#pragma unroll
      for (int h = 0; h < (Bound ? R : 1); ++h) {
        float total = totals[row][h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        score += Bound ? sqrtf(shared_pairs[row * 8 * Shape::kPairStride + h * (h + 1) / 2 + h]) * sqrtf(total) : total;
      }
    }
    return Bound ? score : sqrtf(score < 0 ? 0.0f : score);
  }

  // Columns of u in `sums`: heads J + 1 .. R - 1, then J, each Columns wide.
  template <int J>
  __device__ __forceinline__ void add_columns() {
    constexpr int kHeads = R - J;
    constexpr int kBlocks = chunk_columns(kHeads, D) / 8;
    constexpr auto head = [](int slot) { return slot == kHeads - 1 ? J : J + 1 + slot; };
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float weights[Shape::kPairs];
      if constexpr (!Shape::kPairsInRegisters && !Bound) {
#pragma unroll
        for (int h = J; h < R; ++h)
#pragma unroll
          for (int other = J; other <= h; ++other)
            weights[h * (h + 1) / 2 + other] = shared_pairs[row * 8 * Shape::kPairStride + h * (h + 1) / 2 + other];
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float u[kHeads];
#pragma unroll
          for (int slot = 0; slot < kHeads; ++slot) u[slot] = sums[(slot * kBlocks + b) * 4 + row * 2 + e];
#pragma unroll
          for (int slot = 0; slot < kHeads; ++slot) {
            float inner = 0;
#pragma unroll
            for (int other = Bound ? slot : 0; other <= slot; ++other) {
              const int h = head(slot) > head(other) ? head(slot) : head(other);
              const int p = h * (h + 1) / 2 + (head(slot) > head(other) ? head(other) : head(slot));
              if constexpr (Shape::kPairsInRegisters)
                pairs[row][p] += u[slot] * u[other];
              else if constexpr (Bound)
                totals[row][h] += u[slot] * u[slot];
              else
                inner = other == 0 ? weights[p] * u[other] : inner + weights[p] * u[other];
            }
            if constexpr (!Shape::kPairsInRegisters && !Bound) totals[row][0] += u[slot] * inner;
          }
        }
    }
  }

  // Products of the chunk that begins at column First, from the last 16 features down: step k meets head J's columns up to 16 * k + 15
  // alone, in whole steps.
  template <int J, int First, int Step>
  __device__ __forceinline__ void multiply_chunk(uint64_t factor) {
    constexpr int kColumns = chunk_columns(R - J, D);
    constexpr int kRows = (R - J) * kColumns;
    constexpr int kOwn = Step * 16 + 16 <= First ? 0 : Step * 16 + 16 - First < kColumns ? Step * 16 + 16 - First : kColumns;
    constexpr int kN = kRows - kColumns + kOwn;
    if constexpr (kN > 0) wgmma<T, kN, Step == Shape::kSteps - 1>(sums, left[Step], factor + step_offset(kRows, Step));
    if constexpr (Step > 0)
      multiply_chunk<J, First, Step - 1>(factor);
    else
      wgmma_commit();
  }
  template <int J, int First>
  __device__ __forceinline__ void multiply_chunk_at(int first, uint64_t factor) {
    constexpr int kNext = First + chunk_columns(R - J, D);
    if (kNext >= D || first == First) {
      wgmma_fence();
      multiply_chunk<J, First, Shape::kSteps - 1>(factor);
    } else if constexpr (kNext < D) {
      multiply_chunk_at<J, kNext>(first, factor);
    }
  }

  template <int J, typename Meanwhile>
  __device__ __forceinline__ void multiply_values(Meanwhile&& meanwhile) {
    constexpr int kColumns = chunk_columns(R - J, D);
#pragma unroll 1
    for (int first = 0; first < D; first += kColumns) {
      wait_chunk();
      multiply_chunk_at<J, 0>(first, chunk());
      if (J == 0 && first == 0) meanwhile();
      finish_products<(R - J) * kColumns>();
      add_columns<J>();
    }
    if constexpr (J + 1 < R) multiply_values<J + 1>(meanwhile);
  }
};

// What the chunks of a launch are made of.
struct HopperStream {
  const char* queries;  // [segments][slabs][slab_bytes]
  int slabs;
  FactorView factors;

  __device__ int64_t head_of(const Geometry& g, const Place& place) const {
    return static_cast<int64_t>(factors.slots[place.layer]) * g.kv_heads + place.head;
  }
};

// One thread: the chunks of the CTA's tiles, as stages are freed.
template <int R, int D>
__device__ __forceinline__ void fill_ring(const Geometry& g, const int32_t* first_tiles, int segment, const HopperStream& stream, uint32_t memory) {
  using Shape = HopperShape<R, D>;
  Ring<Shape::kStages> ring;
  ring.parity = 1;  // as if all stages had been freed once
  const auto fill = [&](const char* from, int bytes) {
    const uint32_t full = memory + Shape::kBarriers + ring.stage * 8;
    barrier_wait(memory + Shape::kReleases + ring.stage * 8, ring.parity);
    barrier_expect(full, bytes);
    bulk_copy(memory + ring.stage * Shape::kStageBytes, from, bytes, full);
    ring.advance();
  };
  const int tiles = first_tiles[g.segments];
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    segment = segment_of_tile(first_tiles, g.segments, tile, segment);
    for (int slab = 0; slab < stream.slabs; ++slab)
      fill(stream.queries + (int64_t{segment} * stream.slabs + slab) * slab_bytes(R, D), slab_bytes(R, D));
    const char* image = stream.factors.image + stream.head_of(g, Place(g, segment)) * stream.factors.image_bytes;
    for (int j = 0; j < R; ++j) {
      const int columns = chunk_columns(R - j, D);
      const int bytes = chunk_bytes((R - j) * columns, D);
      for (int c = 0; c < D; c += columns, image += bytes) fill(image, bytes);
    }
  }
}

// The scores of the CTA's tiles, by the warps that multiply.
template <typename T, int R, int D, bool Bound>
__device__ __forceinline__ void score_tiles(const Geometry& g, const int32_t* first_tiles, const TokenLists& lists, const HopperStream& stream,
                                            const float* lse, float* scores, char* base, uint32_t memory) {
  using Shape = HopperShape<R, D>;
  HopperJoint<T, R, D, Bound> joint;
  joint.memory = memory;
  joint.lane = static_cast<int>(threadIdx.x) % 32;
  const int slabs = stream.slabs;
  const int tiles = first_tiles[g.segments];
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const uint32_t rows = joint.memory + Shape::kRowsAt + warp * Shape::kRowBytes;
  joint.shared_pairs = reinterpret_cast<float*>(base + Shape::kPairsAt) + (warp * 16 + joint.lane / 4) * Shape::kPairStride;

  int tile = static_cast<int>(blockIdx.x);
  Place place(g, segment_of_tile_together(first_tiles, g.segments, tile));
  int first = 0;  // of the warp's tokens, in the segment's list
  const auto find_tile = [&] {
    place = Place(g, segment_of_tile(first_tiles, g.segments, tile, place.segment));
    first = (tile - first_tiles[place.segment]) * Shape::kTokens + warp * 16;
    load_token_rows<D>(g, lists, place, first, false, rows);
  };
  if (tile < tiles) find_tile();
  commit_copies();
  while (tile < tiles) {
    const Place now = place;
    const LayerView& layer = g.layer[now.layer];
    const int first_row_position = g.row_position(now.segment, 0);
    int token[2];
    Mask mask;
    mask.window = layer.sliding_window;
    bool masked = false;
    const auto find_tokens = [&] {
      const int count = lists.count(g, now.segment);
      bool hidden = false;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        token[row] = lists.token(g, now.segment, first + joint.lane / 4 + row * 8, count);
        mask.position[row] = token[row] < 0 ? 0 : token_position(layer, now.sequence, now.head, token[row]);
        hidden |= mask.position[row] > first_row_position ||
                  (layer.sliding_window != 0 && first_row_position + g.rows - 1 - mask.position[row] >= layer.sliding_window);
      }
      masked = __any_sync(0xffffffffu, hidden);
    };
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int h = 0; h < (Bound ? R : 1); ++h) joint.totals[row][h] = 0;
      if constexpr (Shape::kPairsInRegisters)
#pragma unroll
        for (int p = 0; p < Shape::kPairGroups * 4; ++p) joint.pairs[row][p] = 0;
    }

    wait_copies<0>();  // keys
    load_left<D>(rows, joint.left);
    for (int slab = 0; slab < slabs; ++slab) {
      joint.multiply_queries([&] {
        if (slab > 0) return;
        find_tokens();
        load_token_rows<D>(g, lists, now, first, true, rows);
        commit_copies();
      });
      if (layer.soft_cap > 0) {
        const SoftCap cap(layer);
#pragma unroll
        for (int i = 0; i < Shape::kQueryRows / 2; ++i) joint.sums[i] = cap(joint.sums[i]);
      }
      const float* slab_lse = lse + (int64_t{now.segment} * slabs + slab) * Shape::kQueryRows + joint.lane % 4 * 2;
      mask.row_position = first_row_position + slab * slab_rows(R, D) + joint.lane % 4 * 2;
      if (masked)
        joint.template add_attention<true>(mask, layer.scale, slab_lse, slab == 0);
      else
        joint.template add_attention<false>(mask, layer.scale, slab_lse, slab == 0);
    }
    joint.finish_attention();

    wait_copies<0>();  // values
    load_left<D>(rows, joint.left);
    tile += static_cast<int>(gridDim.x);
    joint.template multiply_values<0>([&] {
      if (tile < tiles) find_tile();
      commit_copies();
    });

    const float scale = stream.factors.scales[stream.head_of(g, now)];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float score = joint.finish_score(row);
      if (joint.lane % 4 == 0 && token[row] >= 0) scores[now.segment * g.stride + token[row]] = score * scale * layer.weight;
    }
  }
}

#endif

template <typename T, int R, int D, bool Bound>
__global__ void __launch_bounds__(HopperShape<R, D>::kThreads, 1)
    joint_hopper_kernel(const __grid_constant__ Geometry g, const int32_t* first_tiles, const __grid_constant__ TokenLists given, const char* queries,
                        const float* lse, const __grid_constant__ FactorView factors, float* scores) {
  follow_previous();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = HopperShape<R, D>;
  extern __shared__ char hopper_memory[];
  const uint32_t memory = (shared_address(hopper_memory) + 1023) / 1024 * 1024;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      barrier_init(memory + Shape::kBarriers + stage * 8, 1);
      barrier_init(memory + Shape::kReleases + stage * 8, Shape::kWarpgroups * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const HopperStream stream{queries, (g.rows + slab_rows(R, D) - 1) / slab_rows(R, D), factors};
  if (threadIdx.x >= Shape::kWarpgroups * 128) {
    give_registers<Shape::kProducerRegisters>();
    const int segment = segment_of_tile_together(first_tiles, g.segments, static_cast<int>(blockIdx.x));
    if (threadIdx.x == Shape::kWarpgroups * 128) fill_ring<R, D>(g, first_tiles, segment, stream, memory);
  } else {
    take_registers<Shape::kRegisters>();
    score_tiles<T, R, D, Bound>(g, first_tiles, given.now(), stream, lse, scores, hopper_memory + (memory - shared_address(hopper_memory)), memory);
  }
#endif
}

}  // namespace laprox::cuda
