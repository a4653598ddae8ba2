#include <algorithm>

#include "cuda/kernels/exact_plain.cuh"
#include "cuda/kernels/exact_queries.cuh"
#include "cuda/launch/exact.hpp"
#include "cuda/launch/exact_hopper.hpp"
#include "cuda/launch/exact_portable.hpp"

namespace laprox::cuda {
namespace {

constexpr int kWideGroup = 16;  // above it a tile of the plain kernel is narrower

int plain_tile(int group) { return group <= kWideGroup ? 8 : 2; }

// Of all tokens.
void number_tiles(const Launch& launch, const Geometry& geometry, int tile, int32_t* tiles) {
  launch.run("exact scores", tile_kernel, 1, 1024, 0, geometry, tile, tiles);
}

template <typename C, int Tokens>
void plain_tiles(const Launch& launch, const Geometry& g, const int32_t* tiles, const TokenLists& lists, lpx_dtype window, const float* log_sums,
                 const PlainRule& rule, const FactorView& factors, float* scores) {
  launch.run("exact scores", exact_plain_kernel<C, Tokens>, static_cast<unsigned>(launch.multiprocessors * 8), kPlainThreads,
             static_cast<int64_t>(plain_shared(g.group, g.head_dim, Tokens).bytes), g, tiles, lists, window, log_sums, rule, factors, scores);
}

template <typename C>
void plain(const Launch& launch, const Geometry& g, const int32_t* tiles, const TokenLists& lists, lpx_dtype window, const float* log_sums,
           const PlainRule& rule, const FactorView& factors, float* scores) {
  if (plain_tile(g.group) == 8)
    plain_tiles<C, 8>(launch, g, tiles, lists, window, log_sums, rule, factors, scores);
  else
    plain_tiles<C, 2>(launch, g, tiles, lists, window, log_sums, rule, factors, scores);
}

void plain(const Launch& launch, lpx_dtype cache, const Geometry& g, const int32_t* tiles, const TokenLists& lists, lpx_dtype window,
           const float* log_sums, const PlainRule& rule, const FactorView& factors, float* scores) {
  switch (cache) {
    case LPX_F32: return plain<float>(launch, g, tiles, lists, window, log_sums, rule, factors, scores);
    case LPX_F16: return plain<__half>(launch, g, tiles, lists, window, log_sums, rule, factors, scores);
    case LPX_BF16: return plain<__nv_bfloat16>(launch, g, tiles, lists, window, log_sums, rule, factors, scores);
  }
}

// Rules that look at single rows, or at none.
template <typename C>
void rows(const Launch& launch, const Geometry& g, RowWork work, const lpx_score_rule& rule, int32_t* tiles, float* scores) {
  number_tiles(launch, g, kRowTile, tiles);
  const int lanes = row_lanes(g.head_dim * static_cast<int64_t>(sizeof(C)));
  const auto kernel = lanes == 8 ? row_kernel<C, 8> : lanes == 16 ? row_kernel<C, 16> : row_kernel<C, 32>;
  launch.run("exact scores", kernel, static_cast<unsigned>(launch.multiprocessors * 8), 256, 0, g, tiles, TokenLists{}, work, rule.aggregation,
             rule.seed, scores);
}

void rows(const Launch& launch, lpx_dtype cache, const Geometry& g, RowWork work, const lpx_score_rule& rule, int32_t* tiles, float* scores) {
  switch (cache) {
    case LPX_F32: return rows<float>(launch, g, work, rule, tiles, scores);
    case LPX_F16: return rows<__half>(launch, g, work, rule, tiles, scores);
    case LPX_BF16: return rows<__nv_bfloat16>(launch, g, work, rule, tiles, scores);
  }
}

bool projects(const lpx_score_rule& rule) {
  return rule.statistic == LPX_JOINT || rule.statistic == LPX_BOUND || (rule.statistic == LPX_FACTORED && rule.value == LPX_VALUE_PROJECTED_L2);
}

}  // namespace

Exact::Exact(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const lpx_score_rule& rule, const DeviceFactors* factors,
             const Attention* attention, Path path)
    : cache_(cache), window_(window), rule_(rule), factors_(factors), attention_(attention) {
  if (rule.statistic == LPX_REMOVAL) fail(LPX_UNSUPPORTED, "CUDA devices do not compute LPX_REMOVAL scores yet; use a CPU device, or LPX_JOINT");
  if (rule.statistic == LPX_FACTORED && rule.value == LPX_VALUE_PROJECTED_L1)
    fail(LPX_UNSUPPORTED, "CUDA devices do not compute LPX_VALUE_PROJECTED_L1 yet; use a CPU device, or LPX_VALUE_PROJECTED_L2");
  if (projects(rule) && (factors == nullptr || !factors->complete()))
    fail(LPX_UNSUPPORTED, "this rule needs the output projection of every layer; the model lacks some");
  tiles_ = arena.take<int32_t>(int64_t{shape.segments} + 1);
  tile_ = plain_tile(shape.group);

  if (path == Path::kPlain || cache != window || cache == LPX_F32 || !portable_serves(shape.group, shape.head_dim)) return;
  if (rule.statistic == LPX_JOINT || rule.statistic == LPX_BOUND) {
    portable_ = factors->view().image != nullptr && factors->precision() == cache;
    hopper_ = portable_ && path == Path::kHopper && hopper_joint_serves(shape.group, shape.head_dim);
  } else if (rule.statistic == LPX_FACTORED && rule.attention != LPX_ATTENTION_NONE) {
    portable_ = !attention->scores(rule);
  }
  if (!portable_) return;
  tile_ = hopper_ ? kHopperTile : portable_tile(shape.group, shape.head_dim);
  const int64_t slab = slab_rows(shape.group, shape.head_dim);
  const int64_t slabs = int64_t{shape.segments} * ceil_div(shape.rows, slab);
  packed_.image = arena.take<char>(slabs * slab_bytes(shape.group, shape.head_dim));
  packed_.lse = arena.take<float>(slabs * shape.group * slab);
  packed_.only_last = rule.statistic == LPX_FACTORED && rule.attention == LPX_ATTENTION_LAST;
}

void Exact::pack(const Launch& launch, const Geometry& g) const {
  if (packed_.image != nullptr) launch.run("queries", pack_queries, static_cast<unsigned>(g.segments), kPackThreads, 0, g, packed_);
}

void Exact::joint(const Launch& launch, const Geometry& g, const Candidates* only, float* scores) const {
  const bool bound = rule_.statistic == LPX_BOUND;
  if (only == nullptr) number_tiles(launch, g, tile_, tiles_);
  const int32_t* const tiles = only == nullptr ? tiles_ : only->first_tiles;
  const TokenLists lists = only == nullptr ? TokenLists{} : TokenLists{only->tokens, only->counts, only->all_after};
  if (hopper_) return hopper_joint(launch, cache_, {g, tiles, lists, packed_.image, packed_.lse, factors_->view(), bound, scores});
  if (portable_) {
    const PortableRule rule{false, bound, rule_.attention, rule_.aggregation, true};
    return portable_scores(launch, cache_, {g, tiles, lists, packed_.image, packed_.lse, factors_->view(), rule, scores});
  }
  PlainRule rule{};
  rule.statistic = rule_.statistic;
  rule.weigh = true;
  plain(launch, cache_, g, tiles, lists, window_, log_sums(), rule, factors_->view(), scores);
}

// scores = the group's attention statistic.
void Exact::attention(const Launch& launch, const Geometry& g, bool weigh, float* scores) const {
  if (!portable_ && attention_ != nullptr && attention_->scores(rule_)) return attention_->score(launch, g, rule_, weigh, scores);
  number_tiles(launch, g, tile_, tiles_);
  if (portable_) {
    const PortableRule rule{true, false, rule_.attention, rule_.aggregation, weigh};
    return portable_scores(launch, cache_, {g, tiles_, TokenLists{}, packed_.image, packed_.lse, FactorView{}, rule, scores});
  }
  PlainRule rule{};
  rule.statistic = LPX_FACTORED;
  rule.attention = rule_.attention;
  rule.aggregation = rule_.aggregation;
  rule.take_attention = true;
  rule.weigh = weigh;
  plain(launch, cache_, g, tiles_, TokenLists{}, window_, log_sums(), rule, FactorView{}, scores);
}

void Exact::factored(const Launch& launch, const Geometry& g, float* scores) const {
  // A layer's heads share what is known of all of them.
  const bool shared = rule_.sharing == LPX_SHARE_LAYER && rule_.attention != LPX_ATTENTION_NONE;
  attention(launch, g, rule_.value == LPX_VALUE_NONE && !shared, scores);
  if (shared) {
    const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(ceil_div(g.max_length, 256), 1, 1024)),
                    static_cast<unsigned>(std::min<int64_t>(int64_t{g.layers} * g.sequences, 65535)));
    launch.run("sharing scores", share_kernel, grid, 256, 0, g, rule_.aggregation, scores);
  }
  switch (rule_.value) {
    case LPX_VALUE_L1: rows(launch, cache_, g, RowWork::kMultiplyL1, rule_, tiles_, scores); break;
    case LPX_VALUE_L2: rows(launch, cache_, g, RowWork::kMultiplyL2, rule_, tiles_, scores); break;
    case LPX_VALUE_PROJECTED_L2: {
      PlainRule rule{};
      rule.statistic = LPX_FACTORED;
      rule.value = rule_.value;
      rule.aggregation = rule_.aggregation;
      rule.take_values = true;
      rule.weigh = true;
      number_tiles(launch, g, plain_tile(g.group), tiles_);
      plain(launch, cache_, g, tiles_, TokenLists{}, window_, log_sums(), rule, factors_->view(), scores);
      break;
    }
    default:
      if (shared) rows(launch, cache_, g, RowWork::kWeigh, rule_, tiles_, scores);
  }
}

void Exact::run(const Launch& launch, const Geometry& g, const Candidates* only, float* scores) const {
  switch (rule_.statistic) {
    case LPX_JOINT:
    case LPX_BOUND: return joint(launch, g, only, scores);
    case LPX_FACTORED: return factored(launch, g, scores);
    case LPX_KEY_NORM: return rows(launch, cache_, g, RowWork::kKeyNorm, rule_, tiles_, scores);
    case LPX_RECENCY: return rows(launch, cache_, g, RowWork::kRecency, rule_, tiles_, scores);
    case LPX_RANDOM: return rows(launch, cache_, g, RowWork::kRandom, rule_, tiles_, scores);
    case LPX_REMOVAL: fail(LPX_UNSUPPORTED, "CUDA devices do not compute LPX_REMOVAL scores yet; use a CPU device, or LPX_JOINT");
  }
}

}  // namespace laprox::cuda
