// What liblaprox_cuda exports: the table of native/core/cuda_table.h. Each function checks what the host can see, takes its
// workspace, and enqueues its stages.
#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <memory>

#include "core/budget.hpp"
#include "core/cuda_table.h"
#include "core/geometry.hpp"
#include "core/score_rule.hpp"
#include "cuda/device.hpp"
#include "cuda/launch/attention.hpp"
#include "cuda/launch/compact.hpp"
#include "cuda/launch/exact.hpp"
#include "cuda/launch/pruning.hpp"
#include "cuda/launch/select.hpp"
#include "cuda/launch/value_norms.hpp"
#include "cuda/launch/views.hpp"
#include "cuda/model.hpp"

using namespace laprox;
using namespace laprox::cuda;

struct lpx_cuda_device {
  Device device;
};

struct lpx_cuda_model {
  Model model;
};

namespace {

lpx_call checked(const lpx_call* call) {
  lpx_call none{};
  none.size = sizeof none;
  if (call == nullptr) return none;
  check_struct(call, "call");
  if (reinterpret_cast<uintptr_t>(call->workspace) % 256 != 0)
    fail(LPX_INVALID_ARGUMENT, "call->workspace is %p; expected a multiple of 256 bytes", call->workspace);
  if (reinterpret_cast<uintptr_t>(call->status) % sizeof *call->status != 0)
    fail(LPX_INVALID_ARGUMENT, "call->status is %p; expected a multiple of %zu bytes", static_cast<void*>(call->status), sizeof *call->status);
  return *call;
}

// A stage's parts, taken from an arena: without memory they count, with it they run.
template <typename Plan, typename... Arguments>
int64_t workspace_of(const Arguments&... arguments) {
  Arena counting;
  const Plan plan(counting, arguments...);
  return std::max<int64_t>(counting.bytes(), 1);
}

template <typename Plan, typename... Arguments>
void run_in_workspace(const Device& device, const lpx_call& call, const Arguments&... arguments) {
  const Workspace workspace(device, call, workspace_of<Plan>(arguments...));
  Arena arena = workspace.arena();
  const Plan plan(arena, arguments...);
  plan.run(device.launch(call.stream));
}

// Checked inputs of a score.
Inputs score_inputs(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, int32_t* status) {
  const ModelShape& shape = model->model.shape();
  check_cache(cache);
  shape.check(*cache);
  check_score_rule(rule, shape);
  if (!needs_window(*rule)) return {*cache, &model->model, nullptr, rule, status};
  if (window == nullptr) fail(LPX_INVALID_ARGUMENT, "window is NULL, but this rule looks at queries");
  const Window check_window(window, shape, *cache);
  check_alignment(*window, cache->layers);
  return {*cache, &model->model, window, rule, status};
}

// Scores of segment x begin at x * slots, and there are that many.
int64_t score_slots(const lpx_scores* scores, int64_t longest) {
  check_struct(scores, "scores");
  if (scores->layers < 1 || scores->sequences < 1 || scores->kv_heads < 1)
    fail(LPX_INVALID_ARGUMENT, "scores have %d layers, %d sequences and %d KV heads; expected 1 or more of each", scores->layers, scores->sequences,
         scores->kv_heads);
  const int64_t segments = int64_t{scores->layers} * scores->sequences * scores->kv_heads;
  if (scores->offsets != nullptr)
    fail(LPX_INVALID_ARGUMENT, "scores->offsets is set; on a CUDA device it is NULL, and scores lie [segments, count / segments]");
  const int64_t slots = scores->count / segments;
  if (scores->count < 0 || scores->count % segments != 0 || slots % 4 != 0 || slots < longest || slots > INT32_MAX)
    fail(LPX_OUT_OF_BOUNDS, "scores->count is %" PRId64 "; expected %" PRId64 " segments of a multiple of 4 scores, at least %" PRId64 " each",
         scores->count, segments, longest);
  if (scores->data == nullptr && scores->count > 0) fail(LPX_INVALID_ARGUMENT, "scores->data is NULL");
  if (reinterpret_cast<uintptr_t>(scores->data) % 16 != 0)
    fail(LPX_INVALID_ARGUMENT, "scores->data is %p; expected a multiple of 16 bytes", static_cast<void*>(scores->data));
  return slots;
}

Known known_of(const Inputs& inputs) {
  const lpx_cache& cache = inputs.cache;
  const lpx_window_layer* windows = inputs.window == nullptr ? nullptr : inputs.window->layer;
  return {std::all_of(cache.layer, cache.layer + cache.layers, [](const lpx_cache_layer& layer) { return layer.value_norm.data != nullptr; }),
          windows != nullptr && std::all_of(windows, windows + cache.layers, [](const lpx_window_layer& layer) { return layer.lse != nullptr; })};
}

// Every exact score.
class Scoring {
 public:
  Scoring(Arena& arena, const Inputs& inputs, const lpx_scores& out, int64_t slots)
      : out_(out),
        views_(arena, inputs, slots),
        attention_(inputs.window == nullptr ? nullptr
                                            : std::make_unique<Attention>(arena, views_.geometry(), inputs.cache.dtype, inputs.window->dtype,
                                                                          known_of(inputs), false, inputs.model->device().path())),
        exact_(arena, views_.geometry(), inputs.cache.dtype, window_dtype(inputs), *inputs.rule, &inputs.model->factors(), attention_.get(),
               inputs.model->device().path()) {}

  void run(const Launch& launch) const {
    views_.upload(launch);
    const Geometry& geometry = views_.geometry();
    if (attention_ != nullptr && attention_->sample(launch, geometry)) {
      exact_.pack(launch, geometry);
      attention_->scan(launch, geometry, exact_.packed());
    }
    exact_.run(launch, geometry, nullptr, out_.data);
    if (out_.positions != nullptr) views_.write_positions(launch, out_.positions);
  }

 private:
  static lpx_dtype window_dtype(const Inputs& inputs) { return inputs.window == nullptr ? inputs.cache.dtype : inputs.window->dtype; }

  const lpx_scores& out_;
  Views views_;
  std::unique_ptr<Attention> attention_;
  Exact exact_;
};

// ---- the functions of the table

lpx_status get_backend_info(lpx_backend_info* info) {
  return guarded([&] { describe_backend(*info); });
}

lpx_status device_open(const lpx_device_options* options, lpx_cuda_device** device) {
  return guarded([&] { *device = new lpx_cuda_device{Device(*options)}; });
}

void device_close(lpx_cuda_device* device) { delete device; }

lpx_status get_device_info(const lpx_cuda_device* device, lpx_device_info* info) {
  return guarded([&] { device->device.info(*info); });
}

lpx_status check_device(lpx_cuda_device* device) {
  return guarded([&] {
    device->device.use();
    device->device.check_alive();
  });
}

lpx_status allocate(lpx_cuda_device* device, lpx_memory kind, int64_t bytes, void* stream, void** memory) {
  return guarded([&] {
    device->device.use();
    *memory = device->device.allocate(kind, bytes, stream);
  });
}

void release(lpx_cuda_device* device, lpx_memory kind, void* memory, void* stream) {
  guarded([&] {
    device->device.use();
    device->device.free(kind, memory, stream);
  });
}

lpx_status copy(lpx_cuda_device* device, void* to, const void* from, int64_t bytes, void* stream) {
  return guarded([&] {
    device->device.use();
    check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, device->device.stream(stream)), "copy");
  });
}

lpx_status fill(lpx_cuda_device* device, void* memory, int value, int64_t bytes, void* stream) {
  return guarded([&] {
    device->device.use();
    check(cudaMemsetAsync(memory, value, static_cast<size_t>(bytes), device->device.stream(stream)), "fill");
  });
}

// What a callback of the driver is given.
struct Notice {
  lpx_done done;
  void* user;
};

lpx_status notify(lpx_cuda_device* device, void* stream, lpx_done done, void* user) {
  return guarded([&] {
    device->device.use();
    auto notice = std::make_unique<Notice>(Notice{done, user});
    // Unlike a host function it is called after an error too.
    const auto callback = [](cudaStream_t, cudaError_t, void* data) {
      const std::unique_ptr<Notice> mine(static_cast<Notice*>(data));
      mine->done(mine->user);
    };
    check(cudaStreamAddCallback(device->device.stream(stream), callback, notice.get(), 0), "notice");
    notice.release();
  });
}

lpx_status wait_event(lpx_cuda_device* device, void* stream, void* event) {
  return guarded([&] {
    device->device.use();
    check(cudaStreamWaitEvent(device->device.stream(stream), static_cast<cudaEvent_t>(event), 0), "waiting for an event");
  });
}

lpx_status record_event(lpx_cuda_device* device, void* stream, void* event) {
  return guarded([&] {
    device->device.use();
    check(cudaEventRecord(static_cast<cudaEvent_t>(event), device->device.stream(stream)), "recording an event");
  });
}

lpx_status synchronize(lpx_cuda_device* device, void* stream) {
  return guarded([&] {
    device->device.use();
    check(cudaStreamSynchronize(device->device.stream(stream)), "synchronisation");
  });
}

lpx_status model_create(lpx_cuda_device* device, const lpx_model_desc* desc, const lpx_call* call, lpx_cuda_model** model) {
  return guarded([&] {
    const lpx_call checked_call = checked(call);
    device->device.use();
    *model = new lpx_cuda_model{Model(device->device, desc, checked_call)};
  });
}

void model_destroy(lpx_cuda_model* model) {
  guarded([&] { model->model.device().use(); });
  delete model;
}

// ---- value norms

class ValueNorms {
 public:
  ValueNorms(Arena& arena, const Inputs& inputs) : dtype_(inputs.cache.dtype), views_(arena, inputs, 0) {}

  void run(const Launch& launch) const {
    views_.upload(launch);
    cuda::value_norms(launch, views_.geometry(), dtype_, nullptr);
  }

 private:
  lpx_dtype dtype_;
  Views views_;
};

lpx_status value_norms(lpx_cuda_device* device, const lpx_cache* cache, const lpx_call* call) {
  return guarded([&] {
    check_cache(cache);
    for (int i = 0; i < cache->layers; ++i)
      if (cache->layer[i].value_norm.data == nullptr) fail(LPX_INVALID_ARGUMENT, "cache->layer[%d].value_norm.data is NULL", i);
    const lpx_call checked_call = checked(call);
    device->device.use();
    run_in_workspace<ValueNorms>(device->device, checked_call, Inputs{*cache, nullptr, nullptr, nullptr, checked_call.status});
  });
}

// ---- scores

// The bytes alone: `out` is not there yet.
lpx_status score_workspace(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule,
                           int64_t* bytes) {
  return guarded([&] {
    const Inputs inputs = score_inputs(model, cache, window, rule, nullptr);
    const lpx_scores none{};
    *bytes = workspace_of<Scoring>(inputs, none, score_stride(cache->max_length));
  });
}

lpx_status score(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* rule, const lpx_scores* out,
                 const lpx_call* call) {
  return guarded([&] {
    const lpx_call checked_call = checked(call);
    const Inputs inputs = score_inputs(model, cache, window, rule, checked_call.status);
    const int64_t slots = score_slots(out, cache->max_length);
    if (out->layers != cache->layers || out->sequences != cache->sequences || out->kv_heads != cache->kv_heads)
      fail(LPX_INVALID_ARGUMENT, "out has %d layers, %d sequences and %d heads; the cache has %d, %d and %d", out->layers, out->sequences,
           out->kv_heads, cache->layers, cache->sequences, cache->kv_heads);
    for (int i = 0; i < cache->layers; ++i)
      for (const lpx_plane* plane : {&cache->layer[i].key, &cache->layer[i].value})
        if (overlaps(out->data, out->count * 4, plane->data, plane->bytes)) fail(LPX_OVERLAP, "out->data overlaps the cache's layer %d", i);
    model->model.device().use();
    run_in_workspace<Scoring>(model->model.device(), checked_call, inputs, *out, slots);
  });
}

// ---- selection

void check_output(const lpx_selection* out, const lpx_report* report) {
  check_struct(out, "out");
  if (out->offsets == nullptr || (out->capacity > 0 && out->tokens == nullptr))
    fail(LPX_INVALID_ARGUMENT, "out->tokens and out->offsets are required");
  if (out->capacity < 0) fail(LPX_INVALID_ARGUMENT, "out->capacity is %" PRId64 "; expected 0 or more", out->capacity);
  if (reinterpret_cast<uintptr_t>(out->offsets) % 8 != 0 || reinterpret_cast<uintptr_t>(out->tokens) % 4 != 0 ||
      reinterpret_cast<uintptr_t>(report) % alignof(lpx_report) != 0)
    fail(LPX_INVALID_ARGUMENT, "out->tokens, out->offsets and report must be aligned to their elements");
}

// Scores that are there: a selection, with a status of its own where the caller has none.
class Selecting {
 public:
  Selecting(Arena& arena, const lpx_scores& scores, int64_t slots, const lpx_select_rule& rule, const lpx_selection& out, lpx_report* report,
            int32_t* status)
      : scores_(scores),
        own_status_(arena.take<int32_t>(1)),
        fresh_(status == nullptr),
        contexts_(scores.positions == nullptr ? nullptr : arena.take<int32_t>(int64_t{scores.layers} * scores.sequences * scores.kv_heads)),
        view_(view(scores, slots, status == nullptr ? own_status_ : status, contexts_)),
        out_(out),
        report_(report),
        select_(arena, view_, rule) {}

  void run(const Launch& launch) const {
    if (fresh_) check(cudaMemsetAsync(own_status_, 0, sizeof *own_status_, launch.stream), "select");
    if (scores_.positions != nullptr)
      spread_contexts(launch, scores_.context_lengths, scores_.sequences, scores_.kv_heads, view_.segments(), contexts_);
    select_.run(launch, view_, out_, report_);
  }

 private:
  static ScoreView view(const lpx_scores& scores, int64_t slots, int32_t* status, const int32_t* contexts) {
    ScoreView view{};
    view.data = scores.data;
    view.stride = slots;
    view.lengths = scores.lengths;
    view.contexts = contexts;
    view.positions = scores.positions;
    view.layers = scores.layers;
    view.sequences = scores.sequences;
    view.kv_heads = scores.kv_heads;
    view.max_length = static_cast<int32_t>(slots);
    view.bytes_per_entry = scores.bytes_per_entry;
    view.status = status;
    return view;
  }

  const lpx_scores& scores_;
  int32_t* own_status_;
  bool fresh_;
  int32_t* contexts_;
  ScoreView view_;
  const lpx_selection& out_;
  lpx_report* report_;
  Select select_;
};

void check_bytes(const lpx_select_rule& rule, int64_t bytes_per_entry) {
  if (rule.budget == LPX_BUDGET_BYTES && bytes_per_entry < 1)
    fail(LPX_INVALID_ARGUMENT, "scores->bytes_per_entry is %" PRId64 "; a budget in bytes needs the size of a key and a value row", bytes_per_entry);
}

int64_t check_scores(const lpx_scores* scores, const lpx_select_rule* rule) {
  const int64_t slots = score_slots(scores, 0);
  check_rule(rule);
  if (scores->lengths == nullptr) fail(LPX_INVALID_ARGUMENT, "scores->lengths is NULL");
  if (scores->positions != nullptr && scores->context_lengths == nullptr)
    fail(LPX_INVALID_ARGUMENT, "scores->context_lengths is NULL, but scores have positions: say how many tokens each sequence has read");
  check_bytes(*rule, scores->bytes_per_entry);
  return slots;
}

lpx_status select_workspace(const lpx_cuda_device*, const lpx_scores* scores, const lpx_select_rule* rule, int64_t* bytes) {
  return guarded([&] {
    const int64_t slots = check_scores(scores, rule);
    const lpx_selection none{};
    *bytes = workspace_of<Selecting>(*scores, slots, *rule, none, static_cast<lpx_report*>(nullptr), static_cast<int32_t*>(nullptr));
  });
}

lpx_status select(lpx_cuda_device* device, const lpx_scores* scores, const lpx_select_rule* rule, const lpx_selection* out, lpx_report* report,
                  const lpx_call* call) {
  return guarded([&] {
    const lpx_call checked_call = checked(call);
    const int64_t slots = check_scores(scores, rule);
    check_output(out, report);
    device->device.use();
    run_in_workspace<Selecting>(device->device, checked_call, *scores, slots, *rule, *out, report, checked_call.status);
  });
}

// ---- compaction

constexpr int64_t kRowAlignment = 16;

TargetPlanes target_planes(const lpx_cache& cache, const lpx_cache_layer& layer, int index) {
  const int64_t row_bytes = static_cast<int64_t>(element_size(cache.dtype)) * cache.head_dim;
  const auto check_plane = [&](const lpx_plane& plane, const char* name, int64_t bytes, int64_t alignment, bool required) {
    if (plane.data == nullptr) {
      if (required) fail(LPX_INVALID_ARGUMENT, "target->layer[%d] has no %s plane", index, name);
      return;
    }
    if (plane.token_stride < bytes || plane.page_stride < 0 || plane.bytes < 0 || plane.token_stride % alignment != 0 ||
        plane.page_stride % alignment != 0 || reinterpret_cast<uintptr_t>(plane.data) % static_cast<uintptr_t>(alignment) != 0)
      fail(LPX_INVALID_ARGUMENT,
           "target->layer[%d].%s: data %p, token stride %" PRId64 ", page stride %" PRId64 "; expected multiples of %" PRId64 ", rows of %" PRId64
           " bytes apart",
           index, name, plane.data, plane.token_stride, plane.page_stride, alignment, bytes);
  };
  check_plane(layer.key, "key", row_bytes, kRowAlignment, true);
  check_plane(layer.value, "value", row_bytes, kRowAlignment, true);
  check_plane(layer.position, "position", 4, 4, false);
  check_plane(layer.value_norm, "value_norm", 4, 4, false);
  return {layer.key, layer.value, layer.position, layer.value_norm, layer.page_size};
}

CompactTarget compact_target(const lpx_cache& cache, const lpx_compaction* target) {
  check_struct(target, "target");
  CompactTarget to;
  to.target = target->target;
  to.lengths = target->lengths;
  switch (target->target) {
    case LPX_TO_RAGGED:
      if (target->layer == nullptr || target->layers != 1)
        fail(LPX_INVALID_ARGUMENT, "target->layers is %d; a ragged target has one set of planes", target->layers);
      to.planes.push_back(target_planes(cache, target->layer[0], 0));
      for (const lpx_plane* plane : {&to.planes[0].key, &to.planes[0].value}) {
        for (int i = 0; i < cache.layers; ++i)
          for (const lpx_plane* from : {&cache.layer[i].key, &cache.layer[i].value})
            if (overlaps(plane->data, plane->bytes, from->data, from->bytes))
              fail(LPX_OVERLAP, "the target shares memory with layer %d of the cache: compact to memory that it does not use, or in place", i);
      }
      if (overlaps(to.planes[0].key.data, to.planes[0].key.bytes, to.planes[0].value.data, to.planes[0].value.bytes))
        fail(LPX_OVERLAP, "the target's keys and values share memory");
      break;
    case LPX_TO_PAGES:
      if (target->layer == nullptr || target->layers != cache.layers)
        fail(LPX_INVALID_ARGUMENT, "target->layers is %d; pages need one set of planes a layer, %d", target->layers, cache.layers);
      if (target->free_lists == nullptr || (target->free_list_count != 1 && target->free_list_count != cache.layers))
        fail(LPX_INVALID_ARGUMENT, "target->free_list_count is %d; expected 1 or one a layer, %d", target->free_list_count, cache.layers);
      if (target->page_table == nullptr || target->lengths == nullptr || target->pages_used == nullptr)
        fail(LPX_INVALID_ARGUMENT, "target->page_table, lengths and pages_used are required for pages");
      if (target->table_width < 0) fail(LPX_INVALID_ARGUMENT, "target->table_width is %d; expected 0 or more", target->table_width);
      for (int i = 0; i < target->layers; ++i) {
        if (target->layer[i].page_size < 1)
          fail(LPX_INVALID_ARGUMENT, "target->layer[%d].page_size is %d; expected 1 or more", i, target->layer[i].page_size);
        to.planes.push_back(target_planes(cache, target->layer[i], i));
      }
      for (int i = 0; i < target->free_list_count; ++i) {
        if (target->free_lists[i].count < 0 || (target->free_lists[i].count > 0 && target->free_lists[i].pages == nullptr))
          fail(LPX_INVALID_ARGUMENT, "target->free_lists[%d] has %" PRId64 " pages at %p", i, target->free_lists[i].count,
               static_cast<const void*>(target->free_lists[i].pages));
        to.free_lists.push_back(target->free_lists[i]);
      }
      to.page_table = target->page_table;
      to.table_width = target->table_width;
      to.pages_used = target->pages_used;
      break;
    case LPX_TO_IN_PLACE:
      for (int i = 0; i < cache.layers; ++i)
        if (cache.layer[i].position.data == nullptr)
          fail(LPX_INVALID_ARGUMENT, "layer %d has no position plane: a compaction in place needs one to keep the original positions in", i);
      if (target->freed_pages != nullptr && target->freed_counts == nullptr) fail(LPX_INVALID_ARGUMENT, "target->freed_counts is NULL");
      to.freed_pages = target->freed_pages;
      to.freed_capacity = target->freed_capacity;
      to.freed_counts = target->freed_counts;
      break;
    default:
      fail(LPX_INVALID_ARGUMENT, "target->target is %d; expected LPX_TO_RAGGED, LPX_TO_PAGES or LPX_TO_IN_PLACE", static_cast<int>(target->target));
  }
  return to;
}

class Compacting {
 public:
  Compacting(Arena& arena, const Inputs& inputs, const lpx_selection& selection, const CompactTarget& target)
      : selection_(selection), target_(target), views_(arena, inputs, 0), compact_(arena, views_.geometry(), inputs.cache.dtype, target, true) {}

  void run(const Launch& launch) const {
    views_.upload(launch);
    compact_.run(launch, views_.geometry(), selection_, target_);
  }

 private:
  const lpx_selection& selection_;
  const CompactTarget& target_;
  Views views_;
  Compact compact_;
};

void check_selection(const lpx_selection* selection) {
  check_struct(selection, "selection");
  if (selection->offsets == nullptr || (selection->capacity > 0 && selection->tokens == nullptr))
    fail(LPX_INVALID_ARGUMENT, "selection->tokens and selection->offsets are required");
}

lpx_status compact_workspace(const lpx_cuda_device*, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                             int64_t* bytes) {
  return guarded([&] {
    check_cache(cache);
    check_selection(selection);
    const CompactTarget to = compact_target(*cache, target);
    *bytes = workspace_of<Compacting>(Inputs{*cache, nullptr, nullptr, nullptr, nullptr}, *selection, to);
  });
}

lpx_status compact(lpx_cuda_device* device, const lpx_cache* cache, const lpx_selection* selection, const lpx_compaction* target,
                   const lpx_call* call) {
  return guarded([&] {
    const lpx_call checked_call = checked(call);
    check_cache(cache);
    check_selection(selection);
    const CompactTarget to = compact_target(*cache, target);
    device->device.use();
    run_in_workspace<Compacting>(device->device, checked_call, Inputs{*cache, nullptr, nullptr, nullptr, checked_call.status}, *selection, to);
  });
}

// ---- selection straight from a cache

class CacheSelecting {
 public:
  CacheSelecting(Arena& arena, const Inputs& inputs, const lpx_select_rule& rule, const lpx_selection& out, lpx_report* report)
      : out_(out),
        report_(report),
        views_(arena, inputs, score_stride(inputs.cache.max_length)),
        pruning_(arena, views_.geometry(), inputs.cache.dtype, inputs.window == nullptr ? inputs.cache.dtype : inputs.window->dtype, *inputs.rule,
                 &inputs.model->factors(), rule, known_of(inputs), inputs.model->device().path()) {}

  void run(const Launch& launch) const {
    views_.upload(launch);
    pruning_.run(launch, views_.geometry(), out_, report_);
  }
  const Geometry& geometry() const { return views_.geometry(); }

 private:
  const lpx_selection& out_;
  lpx_report* report_;
  Views views_;
  Pruning pruning_;
};

lpx_status select_cache_workspace(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                                  const lpx_select_rule* select_rule, int64_t* bytes) {
  return guarded([&] {
    const Inputs inputs = score_inputs(model, cache, window, score_rule, nullptr);
    check_rule(select_rule);
    const lpx_selection none{};
    *bytes = workspace_of<CacheSelecting>(inputs, *select_rule, none, static_cast<lpx_report*>(nullptr));
  });
}

lpx_status select_cache(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                        const lpx_select_rule* select_rule, const lpx_selection* out, lpx_report* report, const lpx_call* call) {
  return guarded([&] {
    const lpx_call checked_call = checked(call);
    const Inputs inputs = score_inputs(model, cache, window, score_rule, checked_call.status);
    check_rule(select_rule);
    check_output(out, report);
    model->model.device().use();
    run_in_workspace<CacheSelecting>(model->model.device(), checked_call, inputs, *select_rule, *out, report);
  });
}

// ---- both

class Evicting {
 public:
  Evicting(Arena& arena, const Inputs& inputs, const lpx_select_rule& rule, const lpx_selection& selection, lpx_report* report,
           const CompactTarget& target)
      : selection_(selection),
        target_(target),
        selecting_(arena, inputs, rule, selection, report),
        compact_(arena, selecting_.geometry(), inputs.cache.dtype, target, false) {}

  void run(const Launch& launch) const {
    selecting_.run(launch);
    compact_.run(launch, selecting_.geometry(), selection_, target_);
  }

 private:
  const lpx_selection& selection_;
  const CompactTarget& target_;
  CacheSelecting selecting_;
  Compact compact_;
};

lpx_status evict_workspace(const lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                           const lpx_select_rule* select_rule, const lpx_compaction* target, int64_t* bytes) {
  return guarded([&] {
    const Inputs inputs = score_inputs(model, cache, window, score_rule, nullptr);
    check_rule(select_rule);
    const CompactTarget to = compact_target(*cache, target);
    const lpx_selection none{};
    *bytes = workspace_of<Evicting>(inputs, *select_rule, none, static_cast<lpx_report*>(nullptr), to);
  });
}

lpx_status evict(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                 const lpx_select_rule* select_rule, const lpx_selection* selection, lpx_report* report, const lpx_compaction* target,
                 const lpx_call* call) {
  return guarded([&] {
    const lpx_call checked_call = checked(call);
    const Inputs inputs = score_inputs(model, cache, window, score_rule, checked_call.status);
    check_rule(select_rule);
    check_output(selection, report);
    const CompactTarget to = compact_target(*cache, target);
    model->model.device().use();
    run_in_workspace<Evicting>(model->model.device(), checked_call, inputs, *select_rule, *selection, report, to);
  });
}

const char* last_error() { return lpx_last_error(); }

constexpr lpx_cuda_table kTable = {
    LAPROX_CUDA_TABLE_VERSION,
    LAPROX_VERSION,
    last_error,
    get_backend_info,
    device_open,
    device_close,
    get_device_info,
    check_device,
    allocate,
    release,
    copy,
    fill,
    notify,
    wait_event,
    record_event,
    synchronize,
    model_create,
    model_destroy,
    value_norms,
    score_workspace,
    score,
    select_workspace,
    select,
    select_cache_workspace,
    select_cache,
    compact_workspace,
    compact,
    evict_workspace,
    evict,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const lpx_cuda_table* laprox_cuda_table(uint32_t version) {
  return version == LAPROX_CUDA_TABLE_VERSION ? &kTable : nullptr;
}
