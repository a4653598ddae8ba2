// The C ABI: checks what callers hand in, then calls the backend.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include "core/backend.hpp"
#include "core/compaction.hpp"
#include "core/status.hpp"

using namespace laprox;

namespace {

struct OpenDevice {
  std::unique_ptr<Backend> backend;
  std::mutex turn;  // one call at a time
};

}  // namespace

struct lpx_device {
  std::shared_ptr<OpenDevice> open;
};

struct lpx_model {
  std::shared_ptr<OpenDevice> open;
  ModelShape shape;
  std::unique_ptr<Factors> factors;
};

namespace {

OpenDevice& opened(const lpx_device* device) {
  if (device == nullptr) fail(LPX_INVALID_ARGUMENT, "device is NULL");
  return *device->open;
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

bool needs_window(const lpx_score_rule& rule) {
  switch (rule.statistic) {
    case LPX_JOINT:
    case LPX_BOUND:
    case LPX_REMOVAL: return true;
    case LPX_FACTORED: return rule.attention != LPX_ATTENTION_NONE;
    default: return false;
  }
}

bool needs_projection(const lpx_score_rule& rule) {
  switch (rule.statistic) {
    case LPX_JOINT:
    case LPX_BOUND:
    case LPX_REMOVAL: return true;
    case LPX_FACTORED: return rule.value == LPX_VALUE_PROJECTED_L1 || rule.value == LPX_VALUE_PROJECTED_L2;
    default: return false;
  }
}

void check_rule(const lpx_score_rule* rule, const ModelShape& model) {
  check_struct(rule, "rule");
  if (rule->statistic < LPX_JOINT || rule->statistic > LPX_RANDOM)
    fail(LPX_INVALID_ARGUMENT, "rule->statistic is %d; expected one of lpx_statistic", static_cast<int>(rule->statistic));
  if (rule->attention < LPX_ATTENTION_MEAN || rule->attention > LPX_ATTENTION_NONE)
    fail(LPX_INVALID_ARGUMENT, "rule->attention is %d; expected one of lpx_attention_statistic", static_cast<int>(rule->attention));
  if (rule->value < LPX_VALUE_NONE || rule->value > LPX_VALUE_PROJECTED_L2)
    fail(LPX_INVALID_ARGUMENT, "rule->value is %d; expected one of lpx_value_statistic", static_cast<int>(rule->value));
  if (rule->aggregation < LPX_AGGREGATE_MEAN || rule->aggregation > LPX_AGGREGATE_RSS)
    fail(LPX_INVALID_ARGUMENT, "rule->aggregation is %d; expected one of lpx_aggregation", static_cast<int>(rule->aggregation));
  if (rule->sharing != LPX_SHARE_GROUP && rule->sharing != LPX_SHARE_LAYER)
    fail(LPX_INVALID_ARGUMENT, "rule->sharing is %d; expected LPX_SHARE_GROUP or LPX_SHARE_LAYER", static_cast<int>(rule->sharing));
  for (size_t i = 0; i < model.layers.size(); ++i) {
    if (needs_projection(*rule) && !model.layers[i].projection)
      fail(LPX_UNSUPPORTED, "this rule needs the output projection, and layer %zu of the model has none", i);
    if (rule->layer_weights == nullptr) continue;
    const float weight = rule->layer_weights[i];
    if (!(weight >= 0 && weight <= 3.4e38f))
      fail(LPX_INVALID_ARGUMENT, "rule->layer_weights[%zu] is %g; expected a finite number of 0 or more", i, weight);
  }
}

// Checked inputs of a score, and what keeps them alive.
struct CheckedInputs {
  CheckedInputs(const lpx_model* model, const lpx_cache* cache_desc, const lpx_window* window_desc, const lpx_score_rule* rule)
      : shape(checked(model).shape), cache(cache_desc) {
    shape.check(cache);
    check_rule(rule, shape);
    if (rule->sharing == LPX_SHARE_LAYER) {
      for (int64_t i = 0; i < cache.segments().count(); i += cache.segments().heads)
        for (int head = 1; head < cache.segments().heads; ++head)
          if (cache.length(i + head) != cache.length(i))
            fail(LPX_INVALID_ARGUMENT, "layer-wide sharing needs heads of equal length; head %d of layer %d has %d tokens, head 0 has %d", head,
                 cache.segments().at(i).layer, cache.length(i + head), cache.length(i));
    }
    if (needs_window(*rule)) {
      if (window_desc == nullptr) fail(LPX_INVALID_ARGUMENT, "window is NULL, but this rule looks at queries");
      window = std::make_unique<Window>(window_desc, shape, cache);
    }
    inputs = std::make_unique<ScoreInputs>(ScoreInputs{shape, *model->factors, cache, window.get(), *rule});
  }

  const ModelShape& shape;
  Cache cache;
  std::unique_ptr<Window> window;
  std::unique_ptr<ScoreInputs> inputs;
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
      case LPX_CUDA:
        std::snprintf(info->code, sizeof info->code, "NOT_BUILT");
        std::snprintf(info->reason, sizeof info->reason, "this build of laprox has no CUDA backend");
        return;
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
    auto open = std::make_shared<OpenDevice>();
    open->backend = make_cpu_backend(*options);
    *device = new lpx_device{std::move(open)};
  });
}

void lpx_device_close(lpx_device* device) {
  if (device == nullptr) return;
  { const std::lock_guard<std::mutex> wait(device->open->turn); }
  delete device;
}

lpx_status lpx_get_device_info(const lpx_device* device, lpx_device_info* info) {
  return guarded([&] {
    check_struct(info, "info");
    *info = {};
    info->size = sizeof *info;
    opened(device).backend->info(*info);
  });
}

lpx_status lpx_model_create(lpx_device* device, const lpx_model_desc* desc, const lpx_call* call, lpx_model** model) {
  return guarded([&] {
    OpenDevice& open = opened(device);
    if (model == nullptr) fail(LPX_INVALID_ARGUMENT, "model is NULL");
    *model = nullptr;
    const lpx_call checked_call = checked(call);
    ModelShape shape(desc);
    const std::lock_guard<std::mutex> turn(open.turn);
    auto factors = open.backend->factorize(shape, checked_call);
    *model = new lpx_model{device->open, std::move(shape), std::move(factors)};
  });
}

void lpx_model_destroy(lpx_model* model) {
  if (model == nullptr) return;
  { const std::lock_guard<std::mutex> wait(model->open->turn); }
  delete model;
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
    const CheckedInputs checked_inputs(model, cache, window, rule);
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    *bytes = model->open->backend->score_workspace(*checked_inputs.inputs);
  });
}

lpx_status lpx_score(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, const lpx_scores* out,
                     const lpx_call* call) {
  return guarded([&] {
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
    const ScoreLayout layout(scores, false);
    check_rule(rule);
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    *bytes = opened(device).backend->select_workspace(layout, *rule);
  });
}

lpx_status lpx_select(lpx_device* device, const lpx_scores* scores, const lpx_select_rule* rule, const lpx_selection* out, lpx_report* report,
                      const lpx_call* call) {
  return guarded([&] {
    OpenDevice& open = opened(device);
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
    const CheckedInputs checked_inputs(model, cache, window, score_rule);
    check_rule(select_rule);
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    const CacheLayout layout(checked_inputs.cache);
    *bytes = model->open->backend->select_cache_workspace(*checked_inputs.inputs, *layout.layout, *select_rule);
  });
}

lpx_status lpx_select_cache(lpx_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                            const lpx_select_rule* select_rule, const lpx_selection* out, lpx_report* report, const lpx_call* call) {
  return guarded([&] {
    const CheckedInputs checked_inputs(model, cache, window, score_rule);
    check_rule(select_rule);
    if (report != nullptr) check_struct(report, "report");
    const lpx_call checked_call = checked(call);
    const CacheLayout layout(checked_inputs.cache);
    const std::vector<Part> parts = budget_parts(*layout.layout, *select_rule);
    check_selection_output(out, parts);
    lpx_report result = fresh_report(parts);
    const std::lock_guard<std::mutex> turn(model->open->turn);
    check_workspace(checked_call, model->open->backend->select_cache_workspace(*checked_inputs.inputs, *layout.layout, *select_rule));
    model->open->backend->select_cache(*checked_inputs.inputs, *layout.layout, *select_rule, parts, *out, result, checked_call);
    deliver(result, report);
  });
}

lpx_status lpx_compact_workspace(const lpx_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                                 int64_t* bytes) {
  return guarded([&] {
    const Cache checked_cache(cache);
    check_compaction(checked_cache, selection, target);
    if (bytes == nullptr) fail(LPX_INVALID_ARGUMENT, "bytes is NULL");
    *bytes = opened(device).backend->compact_workspace(checked_cache, *selection, *target);
  });
}

lpx_status lpx_compact(lpx_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                       const lpx_call* call) {
  return guarded([&] {
    OpenDevice& open = opened(device);
    const Cache checked_cache(cache);
    const lpx_call checked_call = checked(call);
    check_compaction(checked_cache, selection, target);
    const std::lock_guard<std::mutex> turn(open.turn);
    open.backend->compact(checked_cache, *selection, *target, checked_call);
  });
}

}  // extern "C"
