#include "addon/evict.hpp"

#include "addon/handle.hpp"
#include "addon/job.hpp"
#include "addon/model.hpp"
#include "addon/selection_table.hpp"
#include "addon/target.hpp"

namespace laprox::addon {
namespace {

class EvictJob : public Job {
 public:
  EvictJob(const Napi::CallbackInfo& info, std::shared_ptr<Model> model)
      : Job(model->device(), info[7]),
        model_(std::move(model)),
        cache_(section(info[1])),
        window_(section(info[2])),
        score_rule_(section(info[3])),
        select_rule_(section(info[4])),
        target_(section(info[5]), cache_),
        selection_(next_buffer(), cache_.segments()) {
    select_rule_.desc.exhaustive = info[6].As<Napi::Boolean>().Value() ? 1 : 0;
    const Buffer& counts = next_buffer();
    target_.write_to(counts, next_buffer());
  }

 private:
  // Not lpx_evict, since how long each of the two took is wanted.
  lpx_status run() override {
    cache_.copy_tables();
    const lpx_status status = lpx_select_cache(model_->handle(), &cache_.desc(), window_.desc(), &score_rule_.desc(cache_.desc().layers),
                                               &select_rule_.desc, &selection_.desc, &selection_.report, call());
    if (status != LPX_OK) return status;
    if (cancelled()) fail("ABORTED", "the call was aborted before any row moved");
    selection_.write();
    return target_.compact(device().handle(), cache_.desc(), selection_.desc, call());
  }
  bool changes_inputs() const override { return target_.in_place(); }

  const std::shared_ptr<Model> model_;
  CacheArguments cache_;
  const WindowArguments window_;
  const ScoreRuleArguments score_rule_;
  SelectRuleArguments select_rule_;
  HostTarget target_;
  SelectionOutput selection_;
};

}  // namespace

// (model, cache, window, score rule, select rule, target, exhaustive, held); after the sections' buffers: the selection's memory, [seconds of
// compaction, ...page counts], and page ids, as compact has them.
Napi::Value evict(const Napi::CallbackInfo& info) { return submit(std::make_unique<EvictJob>(info, unwrap<Model>(info[0]))); }

}  // namespace laprox::addon
