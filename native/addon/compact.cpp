#include "addon/compact.hpp"

#include "addon/handle.hpp"
#include "addon/job.hpp"
#include "addon/target.hpp"

namespace laprox::addon {
namespace {

class CompactJob : public Job {
 public:
  CompactJob(const Napi::CallbackInfo& info, const std::shared_ptr<Device>& device)
      : Job(device, info[4]), cache_(section(info[1])), selection_(section(info[2]), cache_.segments()), target_(section(info[3]), cache_) {
    const Buffer& counts = next_buffer();
    target_.write_to(counts, next_buffer());
  }

 private:
  lpx_status run() override {
    cache_.copy_tables();
    selection_.copy();
    return target_.compact(device().handle(), cache_.desc(), selection_.desc, call());
  }
  bool changes_inputs() const override { return target_.in_place(); }

  CacheArguments cache_;
  SelectionArguments selection_;
  HostTarget target_;
};

}  // namespace

// (device, cache, selection, target, held); after the sections' buffers: [seconds, ...page counts], and page ids: the page
// table of new pages, or the pages that an in-place compaction frees.
Napi::Value compact(const Napi::CallbackInfo& info) { return submit(std::make_unique<CompactJob>(info, unwrap<Device>(info[0]))); }

}  // namespace laprox::addon
