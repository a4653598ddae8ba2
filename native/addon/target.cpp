#include "addon/target.hpp"

#include <algorithm>

#include "addon/stopwatch.hpp"

namespace laprox::addon {

TargetArguments::TargetArguments(Section section, const CacheArguments& cache) : segments_(cache.segments()) {
  desc_.size = sizeof desc_;
  desc_.target = section.choice<lpx_target>();
  desc_.table_width = section.int32();
  desc_.layers = section.int32();
  for (int32_t i = 0; i < desc_.layers; ++i) {
    lpx_cache_layer layer{};
    read_planes(section, cache.desc().dtype, layer);
    layer.page_size = section.int32();
    layer.pages_per_row = 1;
    layers_.push_back(layer);
  }
  desc_.layer = layers_.empty() ? nullptr : layers_.data();
  desc_.free_list_count = section.int32();
  for (int32_t i = 0; i < desc_.free_list_count; ++i) {
    const Buffer* list = section.buffer();
    if (list == nullptr) fail("INVALID_ARGUMENT", "free list %d has no buffer", i);
    free_lists_.push_back({elements<int32_t>(*list, 0, list->bytes / 4), list->bytes / 4});
  }
  if (desc_.table_width < 0) fail("INVALID_ARGUMENT", "the page table's width is %d; expected 0 or more", desc_.table_width);
  lengths_.resize(static_cast<size_t>(segments_));
  desc_.lengths = lengths_.data();
  pages_used_.resize(free_lists_.size());
  desc_.free_lists = free_lists_.data();
  desc_.pages_used = pages_used_.data();
  if (desc_.target == LPX_TO_IN_PLACE) freed_counts_.resize(static_cast<size_t>(cache.desc().layers));
  desc_.freed_counts = freed_counts_.data();
}

void TargetArguments::write_to(const Buffer& counts, const Buffer& pages) {
  counts_ = elements<double>(counts, 0, 1 + static_cast<int64_t>(std::max(free_lists_.size(), freed_counts_.size())));
  if (desc_.target == LPX_TO_PAGES) {
    desc_.page_table = elements<int32_t>(pages, 0, segments_ * desc_.table_width);
  } else if (desc_.target == LPX_TO_IN_PLACE) {
    desc_.freed_capacity = pages.bytes / 4;
    if (desc_.freed_capacity > 0) desc_.freed_pages = elements<int32_t>(pages, 0, desc_.freed_capacity);
  }
}

// Free lists are copied: JavaScript may change its own while the call runs.
lpx_status TargetArguments::compact(lpx_device* device, const lpx_cache& cache, const lpx_selection& selection, const lpx_call* call) {
  const Stopwatch stopwatch(counts_);
  for (lpx_free_list& list : free_lists_) {
    copies_.emplace_back(list.pages, list.pages + list.count);
    list.pages = copies_.back().data();
  }
  const lpx_status status = lpx_compact(device, &cache, &selection, &desc_, call);
  const std::vector<int64_t>& counts = desc_.target == LPX_TO_IN_PLACE ? freed_counts_ : pages_used_;
  if (status == LPX_OK) std::copy(counts.begin(), counts.end(), counts_ + 1);
  return status;
}

}  // namespace laprox::addon
