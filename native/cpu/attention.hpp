// Softmax attention of the window on a cache: its log-sum-exp, and the scan that finds it.
//
// scan: one product of all keys with all query rows. With b a reference point for each row (the log-sum-exp over a small
// sample of the keys), e = exp(s - b) gives lse = b + log(sum of e), and attention a = e * exp(b - lse). All of it in base 2. For upper
// bounds of every ||a_h[:, i]|| the scan keeps e in 16 bits until the log-sum-exp is known. A row whose sum outgrows the reference is
// scanned again from all tokens.
//
// The blocks of all segments are scanned in one go. What the scan leaves of a block lies in a slot, and the thread that scanned it tells of it once
// the segment's log-sum-exps are known, from its own caches, and takes the slot again for a block to come.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/backend.hpp"
#include "cpu/pool.hpp"
#include "cpu/queries.hpp"
#include "cpu/tile.hpp"
#include "cpu/workspace.hpp"

namespace laprox::cpu {

// Tokens of one task: small enough to balance threads and to cancel within milliseconds.
inline constexpr int kBlock = kScanRun;
static_assert(kBlock % kTile == 0, "a task has whole tiles");

// Asks for rows that are about to be read.
void prefetch(const Rows& rows, const int32_t* tokens, int count, int64_t row_bytes);

// What wants to know of the scan.
struct Observer {
  // Where the norms of the values of a segment's tokens from `begin` on go, unless the cache keeps them.
  std::function<float*(int64_t segment, int32_t begin)> norms;
  // Tokens [begin, end) of a segment whose log-sum-exps are known, and what the scan kept: RowLayout::kept() of each token.
  std::function<void(int64_t segment, int32_t begin, int32_t end, const uint32_t* kept, Scratch& scratch)> scanned;
};

class Attention {
 public:
  // `observed`: run() may have an observer.
  Attention(Workspace& workspace, const ScoreInputs& inputs, const Kernels& kernels, int threads, bool observed);

  // Packs queries and finds the log-sum-exp of all rows.
  void run(Pool& pool, std::vector<Scratch>& scratch, Progress& progress, const Observer* observer = nullptr);

  // Units of progress that run() advances by.
  int64_t work() const { return inputs_.cache.entries(); }
  int rows() const { return queries_.rows(); }    // m
  int heads() const { return queries_.heads(); }  // R
  const RowLayout& layout() const { return queries_.layout(); }
  // Rows of a segment that exist.
  int existing_rows(Segment s) const { return queries_.existing_rows(s); }

  // Attention of every row on `count` tokens, ascending: fills scratch.logits.
  void attend(int64_t segment, const int32_t* tokens, int count, Scratch& scratch) const {
    queries_.attend(kernels_, segment, tokens, count, log_sums(segment), residuals(segment), scratch);
  }

  // For an observer, of the segment that it is told: what each packed row that was kept has to be multiplied by to be no less than its attention.
  const float* weights(int64_t segment) const { return weights_ + segment * layout().count(); }

 private:
  // Tokens of a segment that are scanned by one thread, and where the scan leaves what it finds.
  struct Block {
    int64_t segment;
    int32_t begin;
    int64_t slot;
  };

  bool given(int64_t segment) const { return inputs_.window->has_lse(inputs_.cache.segments().at(segment).layer); }
  void prepare(int64_t segment, Scratch& scratch);
  std::vector<int32_t> sample(int64_t segment) const;
  void reference_from(int64_t segment, const std::vector<int32_t>& tokens, Scratch& scratch);
  void reference_from_all(int64_t segment, Scratch& scratch);
  // `next` is the block that the thread is likely to scan next, or null: its first rows are asked for.
  void scan_block(const Block& block, const Block* next, Scratch& scratch, const Observer* observer);
  void finish(int64_t segment, Scratch& scratch, const Observer* observer);
  void weigh(int64_t segment);
  int32_t end(const Block& block) const { return std::min(block.begin + kBlock, inputs_.cache.length(block.segment)); }
  // The blocks of a segment: [first_block(segment), first_block(segment + 1)).
  int64_t first_block(int64_t segment) const { return first_blocks_[static_cast<size_t>(segment)]; }
  const Block& block(int64_t i) const { return blocks_[static_cast<size_t>(i)]; }
  uint32_t* kept(const Block& block) const { return kept_ + block.slot * kBlock * layout().kept(); }
  double* sums(const Block& block) const { return sums_ + block.slot * layout().count(); }
  float* references(int64_t segment) const { return references_ + segment * all_rows(); }
  float* residuals(int64_t segment) const { return residuals_ + segment * all_rows(); }
  void set_log_sum(int64_t segment, int row, double log_sum);
  float* log_sums(int64_t segment) const { return log_sums_ + segment * all_rows(); }
  int all_rows() const { return heads() * rows(); }

  const ScoreInputs& inputs_;
  const Kernels& kernels_;
  Queries queries_;
  std::vector<Block> blocks_;          // of all segments
  std::vector<int64_t> first_blocks_;  // [segments + 1]
  int64_t slots_ = 0;
  float* references_;  // [segments][R * m]: b
  float* log_sums_;    // [segments][R * m]; +inf for rows that do not exist or see nothing
  float* residuals_;   // [segments][R * m]: what log_sums_ leaves out
  float* weights_;     // [segments][packed rows]
  uint32_t* kept_;     // [slots][kBlock][RowLayout::kept()]
  double* sums_;       // [slots][packed rows] of e
};

}  // namespace laprox::cpu
