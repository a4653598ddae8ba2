// Softmax attention of the window on a cache: its log-sum-exp, and the scan that finds it.
//
// scan: one product of all keys with all query rows. With b a reference point for each row (the log-sum-exp over a small
// sample of the keys), e = exp(s - b) gives lse = b + log(sum of e) and, with sums of e^2 over groups of rows, an upper bound
// of every ||a_h[:, i]||: a = e * exp(b - lse). All of it in base 2. A row whose sum outgrows the reference is scanned again from all tokens.
#pragma once

#include <cstdint>
#include <functional>

#include "core/backend.hpp"
#include "cpu/pool.hpp"
#include "cpu/queries.hpp"
#include "cpu/tile.hpp"
#include "cpu/workspace.hpp"

namespace laprox::cpu {

// Tokens of one task: small enough to balance threads and to cancel within milliseconds.
inline constexpr int kBlock = 480;
static_assert(kBlock % kScanTile == 0 && kBlock % kTile == 0, "a task has whole tiles");

// Asks for rows that the next tile will read, while this one is computed.
void prefetch(const Rows& rows, int64_t first, int64_t end, int64_t row_bytes);

// Consecutive segments that are scanned together, and what the scan left for each.
struct Wave {
  int64_t first;
  int64_t last;
};

// What wants to know of the scan.
struct Observer {
  std::function<void(int64_t segment, int32_t first, int count)> tile;  // by the thread that scans it, before it does
  std::function<void(const Wave&)> wave;                                // while `squares` of its segments are there
};

class Attention {
 public:
  Attention(Workspace& workspace, const ScoreInputs& inputs, int lanes, int threads);

  // Packs queries and finds the log-sum-exp of all rows.
  void run(Pool& pool, const Kernels& kernels, std::vector<Scratch>& scratch, Progress& progress, const Observer* observer = nullptr);

  // Units of progress that run() advances by.
  int64_t work() const { return inputs_.cache.entries(); }
  int rows() const { return queries_.rows(); }    // m
  int heads() const { return queries_.heads(); }  // R
  const RowLayout& layout() const { return queries_.layout(); }
  // Rows of a segment that exist.
  int existing_rows(Segment s) const { return queries_.existing_rows(s); }

  // Attention of every row on `count` tokens, ascending: fills scratch.logits.
  void attend(const Kernels& kernels, int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
    queries_.attend(kernels, segment, tokens, count, log_sums(segment), residuals(segment), scratch);
  }

  // For upper bounds: sums of squares of a segment of the current wave, layout().squares() of each token, and how much each group
  // of rows has to be multiplied by.
  const float* squares(int64_t segment) const { return squares_ + square_offsets_[static_cast<size_t>(segment)]; }
  void inflation(int64_t segment, float* out) const;

 private:
  bool given(int64_t segment) const { return inputs_.window->has_lse(inputs_.cache.segments().at(segment).layer); }
  void prepare(const Kernels& kernels, int64_t segment, Scratch& scratch);
  void reference_from(const Kernels& kernels, int64_t segment, const std::vector<int32_t>& tokens, Scratch& scratch);
  void reference_from_all(const Kernels& kernels, int64_t segment, Scratch& scratch);
  void scan_block(const Kernels& kernels, int64_t segment, int64_t block, Scratch& scratch, const Observer* observer);
  void finish(const Kernels& kernels, int64_t segment, Scratch& scratch);
  int64_t blocks(int64_t segment) const { return (inputs_.cache.length(segment) + kBlock - 1) / kBlock; }
  float* references(int64_t segment) const { return references_ + segment * all_rows(); }
  float* residuals(int64_t segment) const { return residuals_ + segment * all_rows(); }
  void set_log_sum(int64_t segment, int row, double log_sum);
  float* log_sums(int64_t segment) const { return log_sums_ + segment * all_rows(); }
  int all_rows() const { return heads() * rows(); }

  const ScoreInputs& inputs_;
  Queries queries_;
  std::vector<Wave> waves_;
  std::vector<int64_t> square_offsets_;   // [segments] in the wave's buffers
  std::vector<int64_t> partial_offsets_;  // [segments]
  float* references_;                     // [segments][R * m]: b
  float* log_sums_;                       // [segments][R * m]; +inf for rows that do not exist or see nothing
  float* residuals_;                      // [segments][R * m]: what log_sums_ leaves out
  float* squares_;
  double* partials_;  // [blocks][packed rows] sums of e
};

}  // namespace laprox::cpu
