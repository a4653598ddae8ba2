// Moves the kept rows of a cache: what native/cpu/compaction.cpp does, byte for byte.
#pragma once

#include <vector>

#include "cuda/kernels/views.cuh"
#include "cuda/launch/launch.hpp"

namespace laprox::cuda {

struct TargetLayer;
struct Move;

// One set of planes of lpx_compaction, pointers on the device.
struct TargetPlanes {
  lpx_plane key;
  lpx_plane value;
  lpx_plane position;    // data null: not wanted
  lpx_plane value_norm;  // likewise; moved where the cache has them too
  int32_t page_size;
};

// lpx_compaction with its host arrays taken apart. Sizes and pointers of `planes` and of the lists are host values; what they point to is
// device memory.
struct CompactTarget {
  lpx_target target;
  std::vector<TargetPlanes> planes;       // 1 for RAGGED, one a layer for PAGES, none IN_PLACE
  std::vector<lpx_free_list> free_lists;  // 1 or one a layer, for PAGES
  int32_t* lengths = nullptr;
  int32_t* page_table = nullptr;
  int32_t table_width = 0;
  int64_t* pages_used = nullptr;
  int32_t* freed_pages = nullptr;
  int64_t freed_capacity = 0;
  int64_t* freed_counts = nullptr;
};

class Compact {
 public:
  // `check_tokens`: whether the selection is read once to see that tokens ascend and lie inside their segments. Not needed for what Select wrote.
  Compact(Arena& arena, const Geometry& shape, lpx_dtype dtype, const CompactTarget& target, bool check_tokens);

  // Sets the status (OUT_OF_PAGES, OUT_OF_BOUNDS) before any row moves.
  void run(const Launch& launch, const Geometry& from, const lpx_selection& selection, const CompactTarget& target) const;

 private:
  int32_t row_bytes_;
  bool check_tokens_;
  TargetLayer* layers_ = nullptr;  // [layers]
  int64_t* first_ = nullptr;       // [segments]: of its pages in a list
};

}  // namespace laprox::cuda
