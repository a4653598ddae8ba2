#include "cpu/scoring.hpp"

#include <algorithm>

namespace laprox::cpu {
namespace {

std::optional<Attention> attention_of(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, int threads, bool observed) {
  if (inputs.window == nullptr) return std::nullopt;
  return std::optional<Attention>(std::in_place, workspace, inputs, kernels, threads, observed);
}

}  // namespace

Scoring::Scoring(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, int threads, bool observed)
    : inputs_(inputs),
      scratch_(scratch_of_threads(workspace, inputs.model, inputs.window == nullptr ? 1 : inputs.window->rows(), kernels, threads)),
      attention_(attention_of(workspace, inputs, kernels, threads, observed)),
      exact_(workspace, inputs, kernels, attention_ ? &*attention_ : nullptr) {}

template <typename Body>
void Scoring::for_each_tile(Pool& pool, Progress& progress, Body&& body) {
  const Cache& cache = inputs_.cache;
  std::vector<std::pair<int64_t, int32_t>> tasks;
  for (int64_t segment = 0; segment < cache.segments().count(); ++segment)
    for (int32_t first = 0; first < cache.length(segment); first += kScoreBlock) tasks.emplace_back(segment, first);
  pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t i, int worker) {
    const auto [segment, begin] = tasks[static_cast<size_t>(i)];
    const int32_t end = std::min(begin + kScoreBlock, cache.length(segment));
    if (progress.cancelled()) return;
    int32_t tokens[kTile];
    for (int32_t first = begin; first < end; first += kTile) {
      const int count = std::min(kTile, end - first);
      for (int t = 0; t < count; ++t) tokens[t] = first + t;
      body(segment, tokens, count, scratch(worker));
    }
    progress.advance(kExactWork * (end - begin));
  });
  progress.check();
}

void Scoring::find_attention(Pool& pool, Progress& progress, const Observer* observer) {
  if (attention_) attention_->run(pool, scratch_, progress, observer);
  exact_.prepare(pool, scratch_, progress);
}

void Scoring::score_all(Pool& pool, const ScoreLayout& layout, float* data, Progress& progress) {
  for_each_tile(pool, progress, [&](int64_t segment, const int32_t* tokens, int count, Scratch& local) {
    exact_.scores(segment, tokens, count, data + layout.offset(segment) + tokens[0], local);
  });
  if (inputs_.rule.statistic != LPX_FACTORED || inputs_.rule.sharing != LPX_SHARE_LAYER) return;
  if (inputs_.rule.attention != LPX_ATTENTION_NONE) share(pool, layout, data);
  for_each_tile(pool, progress, [&](int64_t segment, const int32_t* tokens, int count, Scratch& local) {
    exact_.multiply_values(segment, tokens, count, data + layout.offset(segment) + tokens[0], local);
  });
}

void Scoring::share(Pool& pool, const ScoreLayout& layout, float* data) {
  const Segments& segments = layout.segments();
  pool.run(int64_t{segments.layers} * segments.sequences, [&](int64_t i, int) {
    std::vector<float*> heads;
    for (int head = 0; head < segments.heads; ++head) heads.push_back(data + layout.offset(i * segments.heads + head));
    exact_.share(heads, layout.length(i * segments.heads));
  });
}

void Scoring::run(Pool& pool, const ScoreLayout& layout, float* data, Progress& progress) {
  find_attention(pool, progress, nullptr);
  score_all(pool, layout, data, progress);
}

}  // namespace laprox::cpu
