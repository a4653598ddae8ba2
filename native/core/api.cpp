// The C ABI: checks what callers hand in, then calls the CPU backend. What belongs to a CUDA device goes to liblaprox_cuda,
// which checks for itself: the memory it reads is not the host's.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "core/backend.hpp"
#include "core/compaction.hpp"
#include "core/cuda.hpp"
#include "core/score_rule.hpp"
#include "core/selection.hpp"
#include "core/status.hpp"

using namespace laprox;

namespace {

struct OpenDevice {
  std::unique_ptr<Backend> backend;
  std::mutex turn;  // one call at a time
};

struct CudaDevice {
  const lpx_cuda_table& table;
  lpx_cuda_device* handle;

  ~CudaDevice() { table.device_close(handle); }
};

}  // namespace

// One of the two.
struct lpx_device {
  std::shared_ptr<OpenDevice> open;
  std::shared_ptr<CudaDevice> cuda;
};

struct lpx_model {
  std::shared_ptr<OpenDevice> open;
  std::unique_ptr<ModelShape> shape;
  std::unique_ptr<Factors> factors;
  std::shared_ptr<CudaDevice> cuda;
  lpx_cuda_model* cuda_model = nullptr;

  ~lpx_model() {
    if (cuda_model != nullptr) cuda->table.model_destroy(cuda_model);
  }
};

namespace {

const lpx_device& checked(const lpx_device* device) {
  if (device == nullptr) fail(LPX_INVALID_ARGUMENT, "device is NULL");
  return *device;
}

const lpx_model& checked(const lpx_model* model) {
  if (model == nullptr) fail(LPX_INVALID_ARGUMENT, "model is NULL");
  return *model;
}

lpx_call checked(const lpx_call* call) {
  if (call == nullptr) {
    lpx_call none{};
    none.size = sizeof none;
    return none;
  }
  check_struct(call, "call");
  if (reinterpret_cast<uintptr_t>(call->workspace) % 64 != 0) fail(LPX_INVALID_ARGUMENT, "call->workspace is not aligned to 64 bytes");
  return *call;
}

void check_workspace(const lpx_call& call, int64_t needed) {
  if (call.workspace != nullptr && call.workspace_bytes < needed)
    fail(LPX_OUT_OF_MEMORY, "call->workspace_bytes is %" PRId64 "; this call needs %" PRId64, call.workspace_bytes, needed);
}

// Checked inputs of a score, and what keeps them alive.
struct CheckedInputs {
  CheckedInputs(const lpx_model* model, const lpx_cache* cache_desc, const lpx_window* window_desc, const lpx_score_rule* rule)
      : shape(*checked(model).shape), cache(cache_desc) {
    shape.check(cache.desc());
    check_score_rule(rule, shape);
    if (rule->sharing == LPX_SHARE_LAYER) {
      for (int64_t i = 0; i < cache.segments().count(); i += cache.segments().heads)
        for (int head = 1; head < cache.segments().heads; ++head)
          if (cache.length(i + head) != cache.length(i))
            fail(LPX_INVALID_ARGUMENT, "layer-wide sharing needs heads of equal length; head %d of layer %d has %d tokens, head 0 has %d", head,
                 cache.segments().at(i).layer, cache.length(i + head), cache.length(i));
    }
    if (needs_window(*rule)) {
      if (window_desc == nullptr) fail(LPX_INVALID_ARGUMENT, "window is NULL, but this rule looks at queries");
      window = std::make_unique<Window>(window_desc, shape, cache.desc());
    }
    inputs = std::make_unique<ScoreInputs>(ScoreInputs{shape, *model->factors, cache, window.get(), *rule});
  }

  const ModelShape& shape;
  Cache cache;
  std::unique_ptr<Window> window;
  std::unique_ptr<ScoreInputs> inputs;
};

// The same of a fidelity.
struct CheckedFidelity {
  CheckedFidelity(const lpx_model* model, const lpx_cache* cache_desc, const lpx_window* window_desc, int32_t ahead, const lpx_selection* selection)
      : shape(shape_of(model)), cache(cache_desc), window(checked_window(window_desc, ahead)) {
    check_selection(cache, selection);
    inputs = std::make_unique<FidelityInputs>(FidelityInputs{shape, cache, window, *selection});
  }

  const ModelShape& shape;
  Cache cache;
  Window window;
  std::unique_ptr<FidelityInputs> inputs;

 private:
  static const ModelShape& shape_of(const lpx_model* model) {
    if (checked(model).cuda != nullptr)
      fail(LPX_UNSUPPORTED,
           "fidelity is computed on CPU devices: create a model on one, and hand over copies of the cache, the queries and the selection");
    for (size_t i = 0; i < model->shape->layers.size(); ++i)
      if (!model->shape->layers[i].projection) fail(LPX_UNSUPPORTED, "fidelity needs the output projection, and layer %zu of the model has none", i);
    return *model->shape;
  }

  Window checked_window(const lpx_window* desc, int32_t ahead) const {
    shape.check(cache.desc());
    if (ahead < 0) fail(LPX_INVALID_ARGUMENT, "ahead is %d; expected 0 or more", ahead);
    for (int64_t i = 0; i < cache.segments().count(); ++i)
      if (const int32_t context = cache.context(cache.segments().at(i)); context > INT32_MAX - ahead)
        fail(LPX_INVALID_ARGUMENT, "ahead is %d; expected at most %d, behind %d tokens", ahead, INT32_MAX - context, context);
    return Window(desc, shape, cache.desc(), ahead);
  }
};

// The scores a cache would have, with positions but without data.
struct CacheLayout {
  explicit CacheLayout(const Cache& cache) {
    const Segments& segments = cache.segments();
    bool any = false;
    for (int i = 0; i < segments.layers; ++i) any = any || cache.has_positions(i);
    if (any) {
      positions.resize(static_cast<size_t>(cache.entries()));
      for (int64_t i = 0; i < segments.count(); ++i)
        for (int32_t t = 0; t < cache.length(i); ++t) positions[static_cast<size_t>(cache.offset(i) + t)] = cache.position(segments.at(i), t);
    }
    desc.size = sizeof desc;
    desc.layers = segments.layers;
    desc.sequences = segments.sequences;
    desc.kv_heads = segments.heads;
    desc.count = cache.entries();
    desc.offsets = cache.offsets().data();
    desc.lengths = cache.lengths().data();
    desc.positions = any ? positions.data() : nullptr;
    desc.context_lengths = cache.desc().context_lengths;
    desc.bytes_per_entry = 2 * cache.row_bytes();
    layout = std::make_unique<ScoreLayout>(&desc, false);
  }
  CacheLayout(const CacheLayout&) = delete;
  CacheLayout& operator=(const CacheLayout&) = delete;

  std::vector<int32_t> positions;
  lpx_scores desc{};
  std::unique_ptr<ScoreLayout> layout;
};

void check_selection_output(const lpx_selection* out, const std::vector<Part>& parts) {
  check_struct(out, "out");
  int64_t kept = 0;
  for (const Part& part : parts) kept += part.quota;
  if (out->offsets == nullptr || (kept > 0 && out->tokens == nullptr)) fail(LPX_INVALID_ARGUMENT, "out->tokens and out->offsets are required");
  if (out->capacity < kept) fail(LPX_OUT_OF_BOUNDS, "out->capacity is %" PRId64 "; this rule keeps %" PRId64 " entries", out->capacity, kept);
}

lpx_report fresh_report(const std::vector<Part>& parts) {
  lpx_report report{};
  report.size = sizeof report;
  for (const Part& part : parts) {
    report.entries += part.entries;
    report.kept += part.quota;
    report.protected_entries += part.protected_entries;
  }
  return report;
}

void deliver(const lpx_report& from, lpx_report* to) {
  if (to != nullptr) *to = from;
}

// lpx_select_cache_workspace, lpx_select_cache and lpx_compact on a CPU device.
int64_t select_bytes_on_host(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                             const lpx_select_rule* select_rule) {
  const CheckedInputs checked_inputs(model, cache, window, score_rule);
  check_rule(select_rule);
  const CacheLayout layout(checked_inputs.cache);
  return model->open->backend->select_cache_workspace(*checked_inputs.inputs, *layout.layout, *select_rule);
}

void select_on_host(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                    const lpx_select_rule* select_rule, const lpx_selection* out, lpx_report* report, const lpx_call& call) {
  const CheckedInputs checked_inputs(model, cache, window, score_rule);
  check_rule(select_rule);
  if (report != nullptr) check_struct(report, "report");
  const CacheLayout layout(checked_inputs.cache);
  const std::vector<Part> parts = budget_parts(*layout.layout, *select_rule);
  check_selection_output(out, parts);
  lpx_report result = fresh_report(parts);
  const std::lock_guard<std::mutex> turn(model->open->turn);
  check_workspace(call, model->open->backend->select_cache_workspace(*checked_inputs.inputs, *layout.layout, *select_rule));
  model->open->backend->select_cache(*checked_inputs.inputs, *layout.layout, *select_rule, parts, *out, result, call);
  deliver(result, report);
}

void compact_on_host(OpenDevice& open, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target, const lpx_call& call) {
  const Cache checked_cache(cache);
  check_compaction(checked_cache, selection, target);
  const std::lock_guard<std::mutex> turn(open.turn);
  open.backend->compact(checked_cache, *selection, *target, call);
}

}  // namespace

extern "C" {

uint32_t lpx_abi_version(void) { return LAPROX_ABI_VERSION; }

const char* lpx_version(void) { return LAPROX_VERSION; }

lpx_status lpx_get_backend_info(lpx_backend backend, lpx_backend_info* info) {
  return guarded([&] {
    check_struct(info, "info");
    *info = {};
    info->size = sizeof *info;
    switch (backend) {
      case LPX_CPU:
        info->available = 1;
        info->device_count = 1;
        return;
      case LPX_CUDA: {
        const CudaLibrary& library = cuda_library();
        if (library.table != nullptr) return relay(*library.table, library.table->get_backend_info(info));
        std::snprintf(info->code, sizeof info->code, "%s", library.code.c_str());
        std::snprintf(info->reason, sizeof info->reason, "%s", library.reason.c_str());
        return;
      }
    }
    fail(LPX_INVALID_ARGUMENT, "backend is %d; expected LPX_CPU or LPX_CUDA", static_cast<int>(backend));
  });
}

lpx_status lpx_device_open(const lpx_device_options* options, lpx_device** device) {
  return guarded([&] {
    check_struct(options, "options");
    if (device == nullptr) fail(LPX_INVALID_ARGUMENT, "device is NULL");
    *device = nullptr;
    lpx_backend_info info{};
    info.size = sizeof info;
    if (lpx_get_backend_info(options->backend, &info) != LPX_OK)
      fail(LPX_INVALID_ARGUMENT, "options->backend is %d; expected LPX_CPU or LPX_CUDA", static_cast<int>(options->backend));
    if (!info.available) fail(LPX_NO_DEVICE, "%s (%s)", info.reason, info.code);
    if (options->index < 0 || options->index >= info.device_count)
      fail(LPX_NO_DEVICE, "options->index is %d; this backend has %d device(s)", options->index, info.device_count);
    if (options->backend == LPX_CUDA) {
      const lpx_cuda_table& table = *cuda_library().table;
      lpx_cuda_device* handle = nullptr;
      relay(table, table.device_open(options, &handle));
      *device = new lpx_device{nullptr, std::shared_ptr<CudaDevice>(new CudaDevice{table, handle})};
      return;
    }
    auto open = std::make_shared<OpenDevice>();
    open->backend = make_cpu_backend(*options);
    *device = new lpx_device{std::move(open), nullptr};
  });
}

void lpx_device_close(lpx_device* device) {
  if (device == nullptr) return;
  if (device->open != nullptr) { const std::lock_guard<std::mutex> wait(device->open->turn); }
  delete device;
}

lpx_status lpx_get_device_info(const lpx_device* device, lpx_device_info* info) {
  return guarded([&] {
    check_struct(info, "info");
    *info = {};
    info->size = sizeof *info;
    const lpx_device& from = checked(device);
    if (from.cuda != nullptr) return relay(from.cuda->table, from.cuda->table.get_device_info(from.cuda->handle, info));
    from.open->backend->info(*info);
  });
}

lpx_status lpx_check_device(lpx_device* device) {
  return guarded([&] {
    if (const auto& cuda = checked(device).cuda; cuda != nullptr) relay(cuda->table, cuda->table.check_device(cuda->handle));
  });
}

lpx_status lpx_allocate(lpx_device* device, lpx_memory kind, int64_t bytes, void* stream, void** memory) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (kind != LPX_MEMORY_DEVICE && kind != LPX_MEMORY_HOST)
      fail(LPX_INVALID_ARGUMENT, "kind is %d; expected LPX_MEMORY_DEVICE or LPX_MEMORY_HOST", static_cast<int>(kind));
    if (bytes < 0) fail(LPX_INVALID_ARGUMENT, "bytes is %" PRId64 "; expected 0 or more", bytes);
    if (memory == nullptr) fail(LPX_INVALID_ARGUMENT, "memory is NULL");
    *memory = nullptr;
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.allocate(on.cuda->handle, kind, bytes, stream, memory));
    constexpr int64_t kAlignment = 256;
    if (bytes <= INT64_MAX - kAlignment) *memory = std::aligned_alloc(kAlignment, static_cast<size_t>((bytes / kAlignment + 1) * kAlignment));
    if (*memory == nullptr) fail(LPX_OUT_OF_MEMORY, "the host has not enough memory for %" PRId64 " bytes", bytes);
  });
}

void lpx_free(lpx_device* device, lpx_memory kind, void* memory, void* stream) {
  if (device == nullptr || memory == nullptr) return;
  if (device->cuda != nullptr) return device->cuda->table.free(device->cuda->handle, kind, memory, stream);
  std::free(memory);
}

lpx_status lpx_copy(lpx_device* device, void* to, const void* from, int64_t bytes, void* stream) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (bytes < 0) fail(LPX_INVALID_ARGUMENT, "bytes is %" PRId64 "; expected 0 or more", bytes);
    if (bytes > 0 && (to == nullptr || from == nullptr)) fail(LPX_INVALID_ARGUMENT, "to and from are required");
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.copy(on.cuda->handle, to, from, bytes, stream));
    if (bytes > 0) std::memmove(to, from, static_cast<size_t>(bytes));
  });
}

lpx_status lpx_fill(lpx_device* device, void* memory, int value, int64_t bytes, void* stream) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (bytes < 0) fail(LPX_INVALID_ARGUMENT, "bytes is %" PRId64 "; expected 0 or more", bytes);
    if (bytes > 0 && memory == nullptr) fail(LPX_INVALID_ARGUMENT, "memory is NULL");
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.fill(on.cuda->handle, memory, value, bytes, stream));
    if (bytes > 0) std::memset(memory, value, static_cast<size_t>(bytes));
  });
}

lpx_status lpx_notify(lpx_device* device, void* stream, lpx_done done, void* user) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (done == nullptr) fail(LPX_INVALID_ARGUMENT, "done is NULL");
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.notify(on.cuda->handle, stream, done, user));
    done(user);
  });
}

lpx_status lpx_wait_event(lpx_device* device, void* stream, void* event) {
  return guarded([&] {
    if (const auto& cuda = checked(device).cuda; cuda != nullptr) relay(cuda->table, cuda->table.wait_event(cuda->handle, stream, event));
  });
}

lpx_status lpx_record_event(lpx_device* device, void* stream, void* event) {
  return guarded([&] {
    if (const auto& cuda = checked(device).cuda; cuda != nullptr) relay(cuda->table, cuda->table.record_event(cuda->handle, stream, event));
  });
}

lpx_status lpx_synchronize(lpx_device* device, void* stream) {
  return guarded([&] {
    if (const auto& cuda = checked(device).cuda; cuda != nullptr) relay(cuda->table, cuda->table.synchronize(cuda->handle, stream));
  });
}

lpx_status lpx_model_create(lpx_device* device, const lpx_model_desc* desc, const lpx_call* call, lpx_model** model) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (model == nullptr) fail(LPX_INVALID_ARGUMENT, "model is NULL");
    *model = nullptr;
    auto result = std::make_unique<lpx_model>();
    result->open = on.open;
    result->cuda = on.cuda;
    if (on.cuda != nullptr) {
      relay(on.cuda->table, on.cuda->table.model_create(on.cuda->handle, desc, call, &result->cuda_model));
    } else {
      const lpx_call checked_call = checked(call);
      result->shape = std::make_unique<ModelShape>(desc);
      const std::lock_guard<std::mutex> turn(on.open->turn);
      result->factors = on.open->backend->factorize(*result->shape, checked_call);
    }
    *model = result.release();
  });
}

void lpx_model_destroy(lpx_model* model) {
  if (model == nullptr) return;
  if (model->open != nullptr) { const std::lock_guard<std::mutex> wait(model->open->turn); }
  delete model;
}

lpx_status lpx_value_norms(lpx_device* device, const lpx_cache* cache, const lpx_call* call) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.value_norms(on.cuda->handle, cache, call));
    const Cache checked_cache(cache);
    const lpx_call checked_call = checked(call);
    for (int i = 0; i < checked_cache.segments().layers; ++i)
      if (!checked_cache.has_value_norms(i)) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].value_norm.data is NULL", i);
    const std::lock_guard<std::mutex> turn(on.open->turn);
    on.open->backend->value_norms(checked_cache, checked_call);
  });
}

lpx_status lpx_score_layout(const lpx_cache* cache, int64_t* offsets, int32_t* lengths, int64_t* total) {
  return guarded([&] {
    const Cache checked_cache(cache);
    if (offsets == nullptr || lengths == nullptr || total == nullptr) fail(LPX_INVALID_ARGUMENT, "offsets, lengths and total are required");
    std::copy(checked_cache.lengths().begin(), checked_cache.lengths().end(), lengths);
    std::copy_n(checked_cache.offsets().begin(), checked_cache.lengths().size(), offsets);
    *total = checked_cache.entries();
  });
}

lpx_status lpx_score_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, int64_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    if (const auto& cuda = checked(model).cuda; cuda != nullptr)
      return relay(cuda->table, cuda->table.score_workspace(model->cuda_model, cache, window, rule, bytes));
    const CheckedInputs checked_inputs(model, cache, window, rule);
    *bytes = model->open->backend->score_workspace(*checked_inputs.inputs);
  });
}

lpx_status lpx_score(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, const lpx_scores* out,
                     const lpx_call* call) {
  return guarded([&] {
    if (const auto& cuda = checked(model).cuda; cuda != nullptr)
      return relay(cuda->table, cuda->table.score(model->cuda_model, cache, window, rule, out, call));
    const CheckedInputs checked_inputs(model, cache, window, rule);
    const lpx_call checked_call = checked(call);
    const ScoreLayout layout(out);
    const Cache& source = checked_inputs.cache;
    const Segments& segments = source.segments();
    if (layout.segments().layers != segments.layers || layout.segments().sequences != segments.sequences || layout.segments().heads != segments.heads)
      fail(LPX_INVALID_ARGUMENT, "out has %d layers, %d sequences and %d heads; the cache has %d, %d and %d", out->layers, out->sequences,
           out->kv_heads, segments.layers, segments.sequences, segments.heads);
    for (int64_t i = 0; i < segments.count(); ++i)
      if (layout.length(i) != source.length(i))
        fail(LPX_INVALID_ARGUMENT, "out->lengths[%" PRId64 "] is %d; the cache has %d tokens there", i, layout.length(i), source.length(i));
    for (int i = 0; i < segments.layers; ++i)
      for (const lpx_plane* plane : {&source.layer(i).key, &source.layer(i).value})
        if (overlaps(out->data, out->count * 4, plane->data, plane->bytes)) fail(LPX_OVERLAP, "out->data overlaps the cache's layer %d", i);
    const std::lock_guard<std::mutex> turn(model->open->turn);
    check_workspace(checked_call, model->open->backend->score_workspace(*checked_inputs.inputs));
    model->open->backend->score(*checked_inputs.inputs, layout, checked_call);
  });
}

lpx_status lpx_kept_counts(const lpx_scores* scores, const lpx_select_rule* rule, int64_t* kept) {
  return guarded([&] {
    const ScoreLayout layout(scores, false);
    check_rule(rule);
    if (kept == nullptr) fail(LPX_INVALID_ARGUMENT, "kept is NULL");
    std::fill_n(kept, layout.segments().sequences, 0);
    for (const Part& part : budget_parts(layout, *rule)) kept[layout.segments().at(part.segments.front()).sequence] += part.quota;
  });
}

lpx_status lpx_select_workspace(const lpx_device* device, const lpx_scores* scores, const lpx_select_rule* rule, int64_t* bytes) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.select_workspace(on.cuda->handle, scores, rule, bytes));
    const ScoreLayout layout(scores, false);
    check_rule(rule);
    *bytes = on.open->backend->select_workspace(layout, *rule);
  });
}

lpx_status lpx_select(lpx_device* device, const lpx_scores* scores, const lpx_select_rule* rule, const lpx_selection* out, lpx_report* report,
                      const lpx_call* call) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.select(on.cuda->handle, scores, rule, out, report, call));
    OpenDevice& open = *on.open;
    const ScoreLayout layout(scores);
    check_rule(rule);
    if (report != nullptr) check_struct(report, "report");
    const lpx_call checked_call = checked(call);
    const std::vector<Part> parts = budget_parts(layout, *rule);
    check_selection_output(out, parts);
    lpx_report result = fresh_report(parts);
    result.candidates = result.entries;
    const std::lock_guard<std::mutex> turn(open.turn);
    check_workspace(checked_call, open.backend->select_workspace(layout, *rule));
    open.backend->select(layout, *rule, parts, *out, result, checked_call);
    deliver(result, report);
  });
}

lpx_status lpx_select_cache_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                                      const lpx_select_rule* select_rule, int64_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    if (const auto& cuda = checked(model).cuda; cuda != nullptr)
      return relay(cuda->table, cuda->table.select_cache_workspace(model->cuda_model, cache, window, score_rule, select_rule, bytes));
    *bytes = select_bytes_on_host(model, cache, window, score_rule, select_rule);
  });
}

lpx_status lpx_select_cache(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                            const lpx_select_rule* select_rule, const lpx_selection* out, lpx_report* report, const lpx_call* call) {
  return guarded([&] {
    if (const auto& cuda = checked(model).cuda; cuda != nullptr)
      return relay(cuda->table, cuda->table.select_cache(model->cuda_model, cache, window, score_rule, select_rule, out, report, call));
    select_on_host(model, cache, window, score_rule, select_rule, out, report, checked(call));
  });
}

lpx_status lpx_fidelity_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, int32_t ahead,
                                  const lpx_selection* selection, int64_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    const CheckedFidelity fidelity(model, cache, window, ahead, selection);
    *bytes = model->open->backend->fidelity_workspace(*fidelity.inputs);
  });
}

lpx_status lpx_fidelity(lpx_model* model, const lpx_cache* cache, const lpx_window* window, int32_t ahead, const lpx_selection* selection,
                        double* out, const lpx_call* call) {
  return guarded([&] {
    const CheckedFidelity fidelity(model, cache, window, ahead, selection);
    if (out == nullptr) fail(LPX_INVALID_ARGUMENT, "out is NULL");
    const lpx_call checked_call = checked(call);
    const std::lock_guard<std::mutex> turn(model->open->turn);
    check_workspace(checked_call, model->open->backend->fidelity_workspace(*fidelity.inputs));
    model->open->backend->fidelity(*fidelity.inputs, out, checked_call);
    for (int i = 0; i < cache->layers; ++i)
      if (!std::isfinite(out[2 * i]) || !std::isfinite(out[2 * i + 1]))
        fail(LPX_NON_FINITE, "the output of layer %d is not finite: its queries, keys or values have NaN, infinity or numbers too large for float32",
             i);
  });
}

lpx_status lpx_compact_workspace(const lpx_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                                 int64_t* bytes) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.compact_workspace(on.cuda->handle, cache, selection, target, bytes));
    const Cache checked_cache(cache);
    check_compaction(checked_cache, selection, target);
    *bytes = on.open->backend->compact_workspace(checked_cache, *selection, *target);
  });
}

lpx_status lpx_compact(lpx_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                       const lpx_call* call) {
  return guarded([&] {
    const lpx_device& on = checked(device);
    if (on.cuda != nullptr) return relay(on.cuda->table, on.cuda->table.compact(on.cuda->handle, cache, selection, target, call));
    compact_on_host(*on.open, cache, selection, target, checked(call));
  });
}

lpx_status lpx_evict_workspace(const lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                               const lpx_select_rule* select_rule, const lpx_compaction* target, int64_t* bytes) {
  return guarded([&] {
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    if (const auto& cuda = checked(model).cuda; cuda != nullptr)
      return relay(cuda->table, cuda->table.evict_workspace(model->cuda_model, cache, window, score_rule, select_rule, target, bytes));
    check_struct(target, "target");
    *bytes = select_bytes_on_host(model, cache, window, score_rule, select_rule);  // rows move without scratch memory
  });
}

lpx_status lpx_evict(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                     const lpx_select_rule* select_rule, const lpx_selection* selection, lpx_report* report, const lpx_compaction* target,
                     const lpx_call* call) {
  return guarded([&] {
    if (const auto& cuda = checked(model).cuda; cuda != nullptr)
      return relay(cuda->table, cuda->table.evict(model->cuda_model, cache, window, score_rule, select_rule, selection, report, target, call));
    const lpx_call checked_call = checked(call);
    check_struct(target, "target");
    select_on_host(model, cache, window, score_rule, select_rule, selection, report, checked_call);
    compact_on_host(*model->open, cache, selection, target, checked_call);
  });
}

}  // extern "C"
