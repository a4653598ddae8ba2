#include "addon/fidelity.hpp"

#include "addon/handle.hpp"
#include "addon/job.hpp"
#include "addon/model.hpp"

namespace laprox::addon {
namespace {

class FidelityJob : public Job {
 public:
  FidelityJob(const Napi::CallbackInfo& info, std::shared_ptr<Model> model)
      : Job(model->device(), info[5]),
        model_(std::move(model)),
        cache_(section(info[1])),
        window_(section(info[2])),
        ahead_(info[3].As<Napi::Number>().Int32Value()),
        selection_(section(info[4]), cache_.segments()),
        squares_(elements<double>(next_buffer(), 0, int64_t{2} * cache_.desc().layers)) {}

 private:
  lpx_status run() override {
    cache_.copy_tables();
    selection_.copy();
    return lpx_fidelity(model_->handle(), &cache_.desc(), window_.desc(), ahead_, &selection_.desc, squares_, call());
  }

  const std::shared_ptr<Model> model_;
  CacheArguments cache_;
  const WindowArguments window_;
  const int32_t ahead_;
  SelectionArguments selection_;
  double* squares_;
};

}  // namespace

// (model, cache, window, ahead, selection, held); after the sections' buffers: squares.
Napi::Value fidelity(const Napi::CallbackInfo& info) { return submit(std::make_unique<FidelityJob>(info, unwrap<Model>(info[0]))); }

}  // namespace laprox::addon
