// How far the outputs of the layers move where only a selection of a cache is kept.
//
// The tokens of a segment are in two parts, kept and dropped. Of each part, for query head h and row q, with a reference point b,
//   mass = sum over its tokens of 2^(s - b),   output = sum over its tokens of 2^(s - b) v.
// From these, with the masses and outputs of both parts brought to one reference point and the sink's mass there,
//   o' = output_kept / (mass_kept + sink)                                                    the output of what is kept
//   o  = (output_kept + output_dropped) / (mass_kept + mass_dropped + sink)                  the output of all
//   o' - o = (mass_dropped * o' - output_dropped) / (mass_kept + mass_dropped + sink)        as exact where it is small
// and, with W_O, the squares of sum over h of o W_h and sum over h of (o' - o) W_h.
//
// One pass over the cache. A task has up to kBlock tokens of one part, and their log-sum-exp for its reference point: nothing over-
// or underflows, whatever the logits. A wave of tasks is added up in their order before the next, in double: memory does not grow
// with the cache, and any number of threads gives the same bits.
#pragma once

#include <vector>

#include "cpu/attention.hpp"

namespace laprox::cpu {

class Fidelity {
 public:
  Fidelity(Workspace& workspace, const FidelityInputs& inputs, const Kernels& kernels, int threads);

  // Units of progress of run().
  int64_t work() const;
  // out[layers][2]: the squares of the norms of O_kept - O and O.
  void run(Pool& pool, double* out, Progress& progress);

 private:
  enum Part { kKept, kDropped, kParts };
  enum Square { kChange, kOutput, kSquares };

  struct Task {
    int64_t segment;
    Part part;
    int32_t first;  // of the kept tokens; of all tokens, those that are kept left out
    int32_t count;
  };

  // Sums over the tokens of a part, a row r = h * m + q of a segment.
  struct Sums {
    double* reference;  // -inf: no token
    double* outputs;    // [width_]: output and mass
  };

  void attend(Pool& pool, int64_t first_segment, Progress& progress);
  std::vector<Task> tasks(int64_t first_segment) const;
  void attend_task(const Task& task, int slot, int worker, Progress& progress);
  void add(const Task& task, int slot, int row);
  void difference(int64_t first_segment, int query_head, int worker);
  void project(int layer, int first_column, double* squares, int worker);

  Sums sums(int64_t segment, Part part, int row) const {
    const int64_t at = ((segment % kv_heads_) * kParts + part) * queries_.heads() * queries_.rows() + row;
    return {references_ + at, outputs_ + at * width_};
  }
  // Rows of one query head as a tile [d][kTile] for `multiply`: its `index`th kTile.
  float* tile(int query_head, Square square, int index) const {
    return tiles_ + ((int64_t{query_head} * kSquares + square) * row_tiles_ + index) * inputs_.model.head_dim * kTile;
  }

  const FidelityInputs& inputs_;
  const Kernels& kernels_;
  int kv_heads_;   // G
  int width_;      // d and, where the value is 1, the mass, in whole eights
  int row_tiles_;  // of the m rows
  int slots_;      // tasks of a wave
  std::vector<Scratch> scratch_;
  Queries queries_;               // of the heads of one layer and sequence
  double* references_;            // [G][kParts][R * m]
  double* outputs_;               // [G][kParts][R * m][width_]
  float* slot_references_;        // [slots_][R * m]
  float* slot_outputs_;           // [slots_][R * m][width_]
  float* tiles_;                  // [H][kSquares][row_tiles_][d][kTile]
  std::vector<float*> values_;    // a thread each: [kTile][width_]
  std::vector<float*> rows_;      // [kSquares][kTile][d]
  std::vector<double*> columns_;  // [kSquares][row_tiles_][kFactorColumns][kTile]
};

}  // namespace laprox::cpu
