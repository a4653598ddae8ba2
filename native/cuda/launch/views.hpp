// A call's cache, window and model on the device.
#pragma once

#include <vector>

#include "cuda/kernels/views.cuh"
#include "cuda/launch/launch.hpp"
#include "cuda/model.hpp"

namespace laprox::cuda {

struct LayerLimits;

// Throws unless a cache can be: what the host can see of it.
void check_cache(const lpx_cache* cache);

// What a window must be beyond what the core checks: rows that can be read 16 bytes at a time.
void check_alignment(const lpx_window& window, int layers);

// What a stage is asked for. `model`, `window` and `rule` may be null.
struct Inputs {
  const lpx_cache& cache;
  const Model* model;
  const lpx_window* window;
  const lpx_score_rule* rule;
  int32_t* status;  // the caller's, or null
};

// Slots per segment of per-token arrays that are laprox's own.
inline int64_t score_stride(int64_t max_length) { return ceil_div(max_length > 0 ? max_length : 1, 32) * 32; }

// contexts [segments] from context_lengths [sequences], both on the device.
void spread_contexts(const Launch& launch, const int32_t* context_lengths, int sequences, int kv_heads, int64_t segments, int32_t* contexts);

class Views {
 public:
  // `stride`: slots per segment of per-token arrays.
  Views(Arena& arena, const Inputs& inputs, int64_t stride);

  // Brings the descriptions to the device and checks there what they lead to.
  void upload(const Launch& launch) const;
  // [segments][stride] original positions.
  void write_positions(const Launch& launch, int32_t* positions) const;
  const Geometry& geometry() const { return geometry_; }

 private:
  LayerView view(int index) const;
  LayerLimits limits(int index) const;

  Inputs inputs_;
  Geometry geometry_{};
  LayerView* views_;
  int32_t* lengths_;
  int32_t* contexts_;
  int32_t* own_status_;  // where the caller has none
};

}  // namespace laprox::cuda
