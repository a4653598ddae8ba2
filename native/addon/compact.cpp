#include "addon/compact.hpp"

#include <algorithm>

#include "addon/handle.hpp"
#include "addon/job.hpp"
#include "addon/stopwatch.hpp"

namespace laprox::addon {
namespace {

class CompactJob : public Job {
 public:
  CompactJob(const Napi::CallbackInfo& info, const std::shared_ptr<Device>& device)
      : Job(device, info[4]), cache_(section(info[1])), selection_(section(info[2]), cache_.segments()) {
    read_target(section(info[3]));
    // [seconds, pages used of each list or pages freed of each layer]
    const Buffer& table = next_buffer();
    const Buffer& pages = next_buffer();
    const auto lists = static_cast<int64_t>(std::max(free_lists_.size(), freed_counts_.size()));
    table_ = elements<double>(table, 0, 1 + lists);
    if (target_.target == LPX_TO_PAGES) {
      target_.page_table = elements<int32_t>(pages, 0, cache_.segments() * target_.table_width);
    } else if (target_.target == LPX_TO_IN_PLACE) {
      target_.freed_capacity = pages.bytes / 4;
      if (target_.freed_capacity > 0) target_.freed_pages = elements<int32_t>(pages, 0, target_.freed_capacity);
    }
  }

 private:
  void read_target(Section section) {
    target_.size = sizeof target_;
    target_.target = section.choice<lpx_target>();
    target_.table_width = section.int32();
    target_.layers = section.int32();
    for (int32_t i = 0; i < target_.layers; ++i) {
      lpx_cache_layer layer{};
      read_planes(section, cache_.desc().dtype, layer);
      layer.page_size = section.int32();
      layer.pages_per_row = 1;
      layers_.push_back(layer);
    }
    target_.layer = layers_.empty() ? nullptr : layers_.data();
    target_.free_list_count = section.int32();
    for (int32_t i = 0; i < target_.free_list_count; ++i) {
      const Buffer* pages = section.buffer();
      if (pages == nullptr) fail("INVALID_ARGUMENT", "free list %d has no buffer", i);
      free_lists_.push_back({elements<int32_t>(*pages, 0, pages->bytes / 4), pages->bytes / 4});
    }
    if (target_.table_width < 0) fail("INVALID_ARGUMENT", "the page table's width is %d; expected 0 or more", target_.table_width);
    lengths_.resize(static_cast<size_t>(cache_.segments()));
    target_.lengths = lengths_.data();
    pages_used_.resize(free_lists_.size());
    target_.free_lists = free_lists_.data();
    target_.pages_used = pages_used_.data();
    if (target_.target == LPX_TO_IN_PLACE) freed_counts_.resize(static_cast<size_t>(cache_.desc().layers));
    target_.freed_counts = freed_counts_.data();
  }

  lpx_status run() override {
    const Stopwatch stopwatch(table_);
    cache_.copy_tables();
    selection_.copy();
    for (lpx_free_list& list : free_lists_) {
      copies_.emplace_back(list.pages, list.pages + list.count);
      list.pages = copies_.back().data();
    }
    const lpx_status status = lpx_compact(device().handle(), &cache_.desc(), &selection_.desc, &target_, call());
    const std::vector<int64_t>& counts = target_.target == LPX_TO_IN_PLACE ? freed_counts_ : pages_used_;
    if (status == LPX_OK) std::copy(counts.begin(), counts.end(), table_ + 1);
    return status;
  }

  CacheArguments cache_;
  SelectionArguments selection_;
  lpx_compaction target_{};
  std::vector<lpx_cache_layer> layers_;
  std::vector<lpx_free_list> free_lists_;
  std::vector<std::vector<int32_t>> copies_;
  std::vector<int32_t> lengths_;
  std::vector<int64_t> pages_used_;
  std::vector<int64_t> freed_counts_;
  double* table_ = nullptr;
};

}  // namespace

// (device, cache, selection, target, held); after the sections' buffers: [seconds, ...page counts], and page ids: the page
// table of new pages, or the pages that an in-place compaction frees.
Napi::Value compact(const Napi::CallbackInfo& info) { return submit(std::make_unique<CompactJob>(info, unwrap<Device>(info[0]))); }

}  // namespace laprox::addon
