// Where a compaction on a CPU device puts rows, and what it tells.
#pragma once

#include <vector>

#include "addon/arguments.hpp"

namespace laprox::addon {

class TargetArguments {
 public:
  TargetArguments(Section section, const CacheArguments& cache);
  TargetArguments(const TargetArguments&) = delete;
  TargetArguments& operator=(const TargetArguments&) = delete;

  // Before compact(). `counts`: [seconds, pages used of each list or pages freed of each layer]. `pages`: the page table of new pages, or room for
  // the ids of pages that an in-place compaction frees.
  void write_to(const Buffer& counts, const Buffer& pages);
  // Compacts, and tells how long that took and how many pages it concerned.
  lpx_status compact(lpx_device* device, const lpx_cache& cache, const lpx_selection& selection, const lpx_call* call);

 private:
  const int64_t segments_;
  lpx_compaction desc_{};
  std::vector<lpx_cache_layer> layers_;
  std::vector<lpx_free_list> free_lists_;
  std::vector<std::vector<int32_t>> copies_;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> pages_used_;
  std::vector<int64_t> freed_counts_;
  double* counts_ = nullptr;
};

}  // namespace laprox::addon
