#include "cpu/fidelity.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/factors.hpp"

namespace laprox::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLog2E = 1.44269504088896340736;
constexpr int kTasksPerThread = 4;
// Products with rows of d: an entry's key twice and its value, and a column of each projection with what is kept and what is there.
constexpr int64_t kEntryWork = 3;
constexpr int64_t kColumnWork = 2;

int chunks(const ModelShape& model) { return (model.model_dim + kFactorColumns - 1) / kFactorColumns; }

}  // namespace

Fidelity::Fidelity(Workspace& workspace, const FidelityInputs& inputs, const Kernels& kernels, int threads)
    : inputs_(inputs),
      kernels_(kernels),
      kv_heads_(inputs.model.kv_heads),
      width_(inputs.model.head_dim + 8),
      row_tiles_((inputs.window.rows() + kTile - 1) / kTile),
      slots_(threads * kTasksPerThread),
      scratch_(scratch_of_threads(workspace, inputs.model, inputs.window.rows(), kernels, threads)),
      queries_(workspace, inputs.model, inputs.cache, inputs.window, kv_heads_, kernels) {
  const int64_t d = inputs.model.head_dim;
  const int64_t rows = int64_t{queries_.heads()} * queries_.rows();
  references_ = workspace.take<double>(kv_heads_ * kParts * rows);
  outputs_ = workspace.take<double>(kv_heads_ * kParts * rows * width_);
  slot_references_ = workspace.take<float>(slots_ * rows);
  slot_outputs_ = workspace.take<float>(slots_ * rows * width_);
  tiles_ = workspace.take<float>(int64_t{inputs.model.query_heads} * kSquares * row_tiles_ * d * kTile);
  for (int i = 0; i < threads; ++i) {
    values_.push_back(workspace.take<float>(int64_t{kTile} * width_));
    rows_.push_back(workspace.take<float>(kSquares * kTile * d));
    columns_.push_back(workspace.take<double>(int64_t{kSquares} * row_tiles_ * kFactorColumns * kTile));
  }
}

int64_t Fidelity::work() const {
  const Segments& segments = inputs_.cache.segments();
  return kEntryWork * inputs_.cache.entries() + kColumnWork * segments.count() * inputs_.model.model_dim;
}

void Fidelity::run(Pool& pool, double* out, Progress& progress) {
  const Segments& segments = inputs_.cache.segments();
  const ModelShape& model = inputs_.model;
  std::vector<double> squares(static_cast<size_t>(chunks(model)) * kSquares);
  std::fill_n(out, segments.layers * kSquares, 0.0);
  for (int64_t first = 0; first < segments.count(); first += kv_heads_) {
    const int layer = segments.at(first).layer;
    attend(pool, first, progress);
    pool.run(model.query_heads, [&](int64_t h, int worker) { difference(first, static_cast<int>(h), worker); });
    pool.run(chunks(model), [&](int64_t chunk, int worker) {
      if (progress.cancelled()) return;
      const int column = static_cast<int>(chunk) * kFactorColumns;
      project(layer, column, squares.data() + chunk * kSquares, worker);
      progress.advance(kColumnWork * kv_heads_ * std::min(kFactorColumns, model.model_dim - column));
    });
    progress.check();
    for (int chunk = 0; chunk < chunks(model); ++chunk)
      for (int i = 0; i < kSquares; ++i) out[layer * kSquares + i] += squares[static_cast<size_t>(chunk) * kSquares + static_cast<size_t>(i)];
  }
}

// Both parts of all heads of a layer and sequence.
void Fidelity::attend(Pool& pool, int64_t first_segment, Progress& progress) {
  const int rows = queries_.heads() * queries_.rows();
  pool.run(kv_heads_, [&](int64_t head, int) {
    queries_.pack(kernels_, first_segment + head);
    for (const Part part : {kKept, kDropped}) {
      const Sums first = sums(head, part, 0);
      std::fill_n(first.reference, rows, -kInfinity);
      std::fill_n(first.outputs, int64_t{rows} * width_, 0.0);
    }
  });
  const std::vector<Task> all = tasks(first_segment);
  for (size_t first = 0; first < all.size(); first += static_cast<size_t>(slots_)) {
    const int count = static_cast<int>(std::min(all.size() - first, static_cast<size_t>(slots_)));
    pool.run(count, [&](int64_t slot, int worker) { attend_task(all[first + static_cast<size_t>(slot)], static_cast<int>(slot), worker, progress); });
    progress.check();
    pool.run(rows, [&](int64_t row, int) {
      for (int slot = 0; slot < count; ++slot) add(all[first + static_cast<size_t>(slot)], slot, static_cast<int>(row));
    });
  }
}

std::vector<Fidelity::Task> Fidelity::tasks(int64_t first_segment) const {
  const lpx_selection& selection = inputs_.selection;
  std::vector<Task> all;
  for (int64_t segment = first_segment; segment < first_segment + kv_heads_; ++segment) {
    const int32_t* kept = selection.tokens + selection.offsets[segment];
    const auto kept_count = static_cast<int32_t>(selection.offsets[segment + 1] - selection.offsets[segment]);
    for (int32_t first = 0; first < kept_count; first += kBlock) all.push_back({segment, kKept, first, std::min(kBlock, kept_count - first)});
    const int32_t n = inputs_.cache.length(segment);
    const int32_t* passed = kept;
    for (int32_t first = 0, end = 0; first < n; first = end) {
      end = first + std::min(kBlock, n - first);
      const int32_t* next = std::lower_bound(passed, kept + kept_count, end);
      const int32_t dropped = end - first - static_cast<int32_t>(next - passed);
      if (dropped > 0) all.push_back({segment, kDropped, first, dropped});
      passed = next;
    }
  }
  return all;
}

void Fidelity::attend_task(const Task& task, int slot, int worker, Progress& progress) {
  if (progress.cancelled()) return;
  Scratch& scratch = scratch_[static_cast<size_t>(worker)];
  float* values = values_[static_cast<size_t>(worker)];
  const int d = inputs_.model.head_dim;
  const int rows = queries_.heads() * queries_.rows();
  const Rows rows_of_values = inputs_.cache.values(inputs_.cache.segments().at(task.segment));
  const lpx_selection& selection = inputs_.selection;
  const int32_t* kept = selection.tokens + selection.offsets[task.segment];
  const int32_t* kept_end = selection.tokens + selection.offsets[task.segment + 1];
  int32_t tokens[kBlock];
  if (task.part == kKept) {
    std::copy_n(kept + task.first, task.count, tokens);
  } else {
    kept = std::lower_bound(kept, kept_end, task.first);
    for (int32_t token = task.first, i = 0; i < task.count; ++token) {
      if (kept != kept_end && *kept == token)
        ++kept;
      else
        tokens[i++] = token;
    }
  }

  float* references = slot_references_ + int64_t{slot} * rows;
  float* outputs = slot_outputs_ + int64_t{slot} * rows * width_;
  queries_.log_sums(kernels_, task.segment, tokens, task.count, references, scratch);
  for (int r = 0; r < rows; ++r)
    if (references[r] == -static_cast<float>(kInfinity)) references[r] = static_cast<float>(kInfinity);  // no weight at all
  std::fill_n(outputs, int64_t{rows} * width_, 0.0f);
  for (int32_t first = 0; first < task.count; first += kTile) {
    const int count = std::min(kTile, task.count - first);
    queries_.attend(kernels_, task.segment, tokens + first, count, references, nullptr, scratch);
    for (int r = 0; r < rows; ++r) std::fill(scratch.logits + int64_t{r} * kTile + count, scratch.logits + (int64_t{r} + 1) * kTile, 0.0f);
    std::fill_n(values, int64_t{kTile} * width_, 0.0f);
    for (int i = 0; i < count; ++i) {
      kernels_.convert(inputs_.cache.dtype(), rows_of_values(tokens[first + i]), d, values + int64_t{i} * width_);
      values[int64_t{i} * width_ + d] = 1;
    }
    kernels_.add_outputs(scratch.logits, rows, values, width_, outputs);
    if (!progress.advance(kEntryWork * count)) return;
  }
}

// A row of a task to the sums of its part.
void Fidelity::add(const Task& task, int slot, int row) {
  const int64_t at = int64_t{slot} * queries_.heads() * queries_.rows() + row;
  const double reference = slot_references_[at];
  if (reference == kInfinity) return;
  const Sums to = sums(task.segment, task.part, row);
  if (!(reference <= *to.reference)) {
    const double scale = std::exp2(*to.reference - reference);
    for (int c = 0; c < width_; ++c) to.outputs[c] *= scale;
    *to.reference = reference;
  }
  const double weight = std::exp2(reference - *to.reference);
  for (int c = 0; c < width_; ++c) to.outputs[c] += weight * static_cast<double>(slot_outputs_[at * width_ + c]);
}

// The outputs of a query head and what keeping changes of them, as tiles.
void Fidelity::difference(int64_t first_segment, int query_head, int worker) {
  const Segment s = inputs_.cache.segments().at(first_segment);
  const std::vector<float>& sink_logits = inputs_.model.layers[static_cast<size_t>(s.layer)].sink_logits;
  const double sink_logit = sink_logits.empty() ? -kInfinity : kLog2E * static_cast<double>(sink_logits[static_cast<size_t>(query_head)]);
  const int d = inputs_.model.head_dim;
  const int m = queries_.rows();
  const int64_t head = query_head / queries_.heads();
  float* changes = rows_[static_cast<size_t>(worker)];
  float* all = changes + int64_t{kTile} * d;
  for (int first = 0, index = 0; first < m; first += kTile, ++index) {
    const int count = std::min(kTile, m - first);
    for (int i = 0; i < count; ++i) {
      const int row = query_head % queries_.heads() * m + first + i;
      const Sums kept = sums(head, kKept, row);
      const Sums dropped = sums(head, kDropped, row);
      if (sink_logit == -kInfinity && *kept.reference == -kInfinity && *dropped.reference == -kInfinity) {  // no row, or it sees nothing
        std::fill_n(changes + int64_t{i} * d, d, 0.0f);
        std::fill_n(all + int64_t{i} * d, d, 0.0f);
        continue;
      }
      const double reference = std::max({sink_logit, *kept.reference, *dropped.reference});
      const double kept_weight = std::exp2(*kept.reference - reference);
      const double dropped_weight = std::exp2(*dropped.reference - reference);
      const double dropped_mass = dropped_weight * dropped.outputs[d];
      const double total = kept_weight * kept.outputs[d] + dropped_mass + std::exp2(sink_logit - reference);
      // By the kept tokens' own reference point: beside dropped ones they may be next to nothing.
      const double kept_total = *kept.reference == -kInfinity ? 1 : kept.outputs[d] + std::exp2(sink_logit - *kept.reference);
      for (int c = 0; c < d; ++c) {
        const double missed = dropped_weight * dropped.outputs[c];
        changes[int64_t{i} * d + c] = static_cast<float>((dropped_mass * kept.outputs[c] / kept_total - missed) / total);
        all[int64_t{i} * d + c] = static_cast<float>((kept_weight * kept.outputs[c] + missed) / total);
      }
    }
    const void* rows[kTile];
    for (const Square square : {kChange, kOutput}) {
      for (int i = 0; i < count; ++i) rows[i] = (square == kChange ? changes : all) + int64_t{i} * d;
      kernels_.load(LPX_F32, rows, count, d, tile(query_head, square, index));
    }
  }
}

// squares[kSquares]: of some columns of the layer's output.
void Fidelity::project(int layer, int first_column, double* squares, int worker) {
  Scratch& scratch = scratch_[static_cast<size_t>(worker)];
  const ModelShape& model = inputs_.model;
  const int columns = std::min(kFactorColumns, model.model_dim - first_column);
  const int m = queries_.rows();
  double* sums_of_tiles = columns_[static_cast<size_t>(worker)];
  constexpr int kTileColumns = kFactorColumns * kTile;
  std::fill_n(sums_of_tiles, int64_t{kSquares} * row_tiles_ * kTileColumns, 0.0);
  for (int h = 0; h < model.query_heads; ++h) {
    pack_projection(kernels_, model, layer, h, first_column, columns, scratch.panels);
    for (int i = 0; i < kSquares * row_tiles_; ++i) {
      const int index = i % row_tiles_;
      kernels_.multiply(scratch.panels, columns, model.head_dim, tile(h, static_cast<Square>(i / row_tiles_), index),
                        std::min(kTile, m - index * kTile), scratch.columns);
      double* to = sums_of_tiles + int64_t{i} * kTileColumns;
      for (int x = 0; x < columns * kTile; ++x) to[x] += static_cast<double>(scratch.columns[x]);
    }
  }
  for (const Square square : {kChange, kOutput}) {
    double sum = 0;
    for (int index = 0; index < row_tiles_; ++index) {
      const double* from = sums_of_tiles + (int64_t{square} * row_tiles_ + index) * kTileColumns;
      for (int c = 0; c < columns; ++c)
        for (int i = 0; i < std::min(kTile, m - index * kTile); ++i) sum += from[c * kTile + i] * from[c * kTile + i];
    }
    squares[square] = sum;
  }
}

}  // namespace laprox::cpu
