// Where a compaction on a CPU device puts rows, and what it tells.
#pragma once

#include <vector>

#include "addon/arguments.hpp"

namespace laprox::addon {

class HostTarget {
 public:
  HostTarget(Section section, const CacheArguments& cache);

  bool in_place() const { return to_.in_place(); }
  // Before compact(). `counts`: [seconds, pages used of each list or pages freed of each layer]. `pages`: the page table of new pages, or room for
  // the ids of pages that an in-place compaction frees.
  void write_to(const Buffer& counts, const Buffer& pages);
  // Compacts, and tells how long that took and how many pages it concerned.
  lpx_status compact(lpx_device* device, const lpx_cache& cache, const lpx_selection& selection, const lpx_call* call);

 private:
  const int64_t segments_;
  TargetArguments to_;
  std::vector<std::vector<int32_t>> copies_;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> pages_used_;
  std::vector<int64_t> freed_counts_;
  double* counts_ = nullptr;
};

}  // namespace laprox::addon
