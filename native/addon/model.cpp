#include "addon/model.hpp"

#include "addon/arguments.hpp"
#include "addon/handle.hpp"
#include "addon/job.hpp"

namespace laprox::addon {

Model::Model(Napi::Env env, std::shared_ptr<Device> device, int64_t bytes) : env_(env), device_(std::move(device)), bytes_(bytes) {
  // The garbage collector should know what stands behind a small object.
  int64_t total;
  napi_adjust_external_memory(env_, bytes_, &total);
}

Model::~Model() {
  if (handle_ != nullptr) device_->discard(handle_);
}

void Model::dispose() noexcept {
  if (disposed_) return;
  disposed_ = true;
  int64_t total;
  napi_adjust_external_memory(env_, -bytes_, &total);
}

lpx_status Model::create(const lpx_model_desc& desc, const lpx_call* call) {
  status_ = lpx_model_create(device_->handle(), &desc, call, &handle_);
  if (status_ != LPX_OK) message_ = lpx_last_error();
  return status_;
}

void Model::fail(lpx_status status, std::string message) {
  status_ = status;
  message_ = std::move(message);
}

lpx_model* Model::handle() const {
  if (status_ != LPX_OK) throw Failure(code_of(status_), "the model could not be created: " + message_);
  return handle_;
}

namespace {

class CreateModelJob : public Job {
 public:
  CreateModelJob(const Napi::CallbackInfo& info, std::shared_ptr<Device> device) : Job(device, info[2]), arguments_(section(info[1])) {
    // Factors on a GPU are no memory of the host.
    const int64_t bytes = device->cuda() ? 0 : arguments_.factor_bytes();
    model_ = std::make_shared<Model>(info.Env(), std::move(device), bytes);
    wrap(info[2].As<Napi::Array>().Get(0u).As<Napi::Object>(), model_);
  }

 private:
  lpx_status run() override {
    std::vector<void*> uploaded;
    lpx_status status = LPX_OK;
    for (lpx_layer* layer : arguments_.on_host) {
      void* memory = nullptr;
      status = lpx_allocate(device().handle(), LPX_MEMORY_DEVICE, layer->projection_bytes, nullptr, &memory);
      if (status != LPX_OK) break;
      uploaded.push_back(memory);
      status = lpx_copy(device().handle(), memory, layer->projection, layer->projection_bytes, nullptr);
      if (status != LPX_OK) break;
      layer->projection = memory;
    }
    if (status == LPX_OK)
      status = model_->create(arguments_.desc, call());
    else
      model_->fail(status, lpx_last_error());
    const std::string message = status == LPX_OK ? "" : lpx_last_error();
    for (void* memory : uploaded) lpx_free(device().handle(), LPX_MEMORY_DEVICE, memory, nullptr);
    if (status != LPX_OK) throw Failure(code_of(status), message);
    return status;
  }

  ModelArguments arguments_;
  std::shared_ptr<Model> model_;
};

}  // namespace

// (device, model section, held); held[0] becomes the model's handle, and calls may use it at once.
Napi::Value create_model(const Napi::CallbackInfo& info) { return submit(std::make_unique<CreateModelJob>(info, unwrap<Device>(info[0]))); }

// (model)
Napi::Value close_model(const Napi::CallbackInfo& info) {
  release<Model>(info[0]);
  return info.Env().Undefined();
}

}  // namespace laprox::addon
