#include "addon/target.hpp"

#include <algorithm>

#include "addon/stopwatch.hpp"

namespace laprox::addon {

HostTarget::HostTarget(Section section, const CacheArguments& cache)
    : segments_(cache.segments()),
      to_(section, cache.desc().dtype),
      lengths_(static_cast<size_t>(segments_)),
      pages_used_(to_.free_lists.size()),
      freed_counts_(in_place() ? static_cast<size_t>(cache.desc().layers) : 0) {
  to_.desc.lengths = lengths_.data();
  to_.desc.pages_used = pages_used_.data();
  to_.desc.freed_counts = freed_counts_.data();
}

void HostTarget::write_to(const Buffer& counts, const Buffer& pages) {
  counts_ = elements<double>(counts, 0, 1 + static_cast<int64_t>(std::max(to_.free_lists.size(), freed_counts_.size())));
  if (to_.desc.target == LPX_TO_PAGES) {
    to_.desc.page_table = elements<int32_t>(pages, 0, segments_ * to_.desc.table_width);
  } else if (in_place()) {
    to_.desc.freed_capacity = pages.bytes / 4;
    if (to_.desc.freed_capacity > 0) to_.desc.freed_pages = elements<int32_t>(pages, 0, to_.desc.freed_capacity);
  }
}

// Free lists are copied: JavaScript may change its own while the call runs.
lpx_status HostTarget::compact(lpx_device* device, const lpx_cache& cache, const lpx_selection& selection, const lpx_call* call) {
  const Stopwatch stopwatch(counts_);
  for (lpx_free_list& list : to_.free_lists) {
    copies_.emplace_back(list.pages, list.pages + list.count);
    list.pages = copies_.back().data();
  }
  const lpx_status status = lpx_compact(device, &cache, &selection, &to_.desc, call);
  const std::vector<int64_t>& counts = in_place() ? freed_counts_ : pages_used_;
  if (status == LPX_OK) std::copy(counts.begin(), counts.end(), counts_ + 1);
  return status;
}

}  // namespace laprox::addon
