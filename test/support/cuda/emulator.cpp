// liblaprox_cuda without a GPU: the CPU backend behind the CUDA backend's table. Memory of the "device" is the host's, a stream is
// a thread that does things in order. It exists to test what stands on top of the table; results are the CPU's.
//
// Pointers below kBadPointer make the device fail as an illegal address does. LAPROX_EMULATOR_DELAY_MS slows every stage down.
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/cuda_table.h"

namespace {

constexpr uintptr_t kBadPointer = 1 << 16;
constexpr int64_t kMemory = INT64_C(1) << 34;

thread_local std::string last_error;

lpx_status refuse(lpx_status status, const std::string& message) {
  last_error = message;
  return status;
}

lpx_status relay(lpx_status status) {
  if (status != LPX_OK) last_error = lpx_last_error();
  return status;
}

class Stream {
 public:
  Stream() : thread_([this] { work(); }) {}
  ~Stream() {
    push(nullptr);
    thread_.join();
  }
  void push(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }
  void synchronize() {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    push([&] {
      const std::lock_guard<std::mutex> lock(mutex);
      done = true;
      changed.notify_all();
    });
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return done; });
  }

 private:
  void work() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      if (!task) return;
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;
};

// Events of a caller: any number names one.
struct Events {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<void*, bool> happened;
} events;

}  // namespace

struct lpx_cuda_device {
  lpx_device* cpu = nullptr;
  std::mutex mutex;
  std::map<void*, std::unique_ptr<Stream>> streams;
  bool lost = false;

  Stream& stream(void* handle) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& stream = streams[handle];
    if (stream == nullptr) stream = std::make_unique<Stream>();
    return *stream;
  }
  bool is_lost() {
    const std::lock_guard<std::mutex> lock(mutex);
    return lost;
  }
  void lose() {
    const std::lock_guard<std::mutex> lock(mutex);
    lost = true;
  }
  bool touches(const void* pointer) {
    if (pointer == nullptr || reinterpret_cast<uintptr_t>(pointer) >= kBadPointer) return false;
    lose();
    return true;
  }
};

struct lpx_cuda_model {
  lpx_cuda_device* device;
  lpx_model* cpu = nullptr;
};

namespace {

struct CacheCopy {
  explicit CacheCopy(const lpx_cache& from) : layers(from.layer, from.layer + from.layers), cache(from) { cache.layer = layers.data(); }
  CacheCopy(const CacheCopy&) = delete;
  std::vector<lpx_cache_layer> layers;
  lpx_cache cache;
};

struct WindowCopy {
  WindowCopy(const lpx_window* from, int32_t count) {
    if (from == nullptr) return;
    layers.assign(from->layer, from->layer + count);
    window = *from;
    window.layer = layers.data();
  }
  WindowCopy(const WindowCopy&) = delete;
  const lpx_window* get() const { return layers.empty() ? nullptr : &window; }
  std::vector<lpx_window_layer> layers;
  lpx_window window{};
};

struct ScoreRuleCopy {
  ScoreRuleCopy(const lpx_score_rule& from, int32_t layers) : rule(from) {
    if (from.layer_weights == nullptr) return;
    weights.assign(from.layer_weights, from.layer_weights + layers);
    rule.layer_weights = weights.data();
  }
  ScoreRuleCopy(const ScoreRuleCopy&) = delete;
  std::vector<float> weights;
  lpx_score_rule rule;
};

struct SelectRuleCopy {
  explicit SelectRuleCopy(const lpx_select_rule& from) : pinned(from.pinned, from.pinned + from.pinned_count), rule(from) {
    rule.pinned = pinned.data();
  }
  SelectRuleCopy(const SelectRuleCopy&) = delete;
  std::vector<lpx_range> pinned;
  lpx_select_rule rule;
};

int delay() {
  const char* text = std::getenv("LAPROX_EMULATOR_DELAY_MS");
  return text == nullptr ? 0 : std::atoi(text);
}

// A stage: does nothing after an error, and leaves its own in the call's status.
lpx_status stage(lpx_cuda_device* device, const lpx_call* call, std::function<lpx_status()> work) {
  int32_t* status = call->status;
  device->stream(call->stream).push([device, status, work = std::move(work)] {
    std::this_thread::sleep_for(std::chrono::milliseconds(delay()));
    if (device->is_lost() || (status != nullptr && *status != LPX_OK)) return;
    const lpx_status result = work();
    if (result != LPX_OK && status != nullptr) *status = result;
    if (result != LPX_OK && std::getenv("LAPROX_EMULATOR_VERBOSE") != nullptr) std::fprintf(stderr, "emulator: %s\n", lpx_last_error());
  });
  return LPX_OK;
}

bool bad(lpx_cuda_device* device, const lpx_cache& cache) {
  bool bad = false;
  for (int i = 0; i < cache.layers; ++i)
    for (const lpx_plane* plane : {&cache.layer[i].key, &cache.layer[i].value}) bad = bad || device->touches(plane->data);
  return bad;
}

lpx_status check_lengths(const lpx_cache& cache) {
  for (int i = 0; i < cache.layers; ++i) {
    const lpx_cache_layer& layer = cache.layer[i];
    for (int s = 0; s < cache.sequences; ++s)
      for (int g = 0; g < cache.kv_heads; ++g) {
        const int32_t length = layer.lengths[s * layer.length_sequence_stride + g * layer.length_head_stride];
        if (length < 0 || length > cache.max_length) return LPX_OUT_OF_BOUNDS;
      }
  }
  return LPX_OK;
}

lpx_status misaligned(const lpx_cache* cache) {
  for (int i = 0; i < cache->layers; ++i)
    for (const lpx_plane* plane : {&cache->layer[i].key, &cache->layer[i].value})
      if (reinterpret_cast<uintptr_t>(plane->data) % 16 != 0 || plane->token_stride % 16 != 0 || plane->page_stride % 16 != 0 ||
          plane->head_stride % 16 != 0)
        return refuse(LPX_INVALID_ARGUMENT, "rows are not aligned to 16 bytes");
  return LPX_OK;
}

lpx_status backend_info(lpx_backend_info* info) {
  info->available = 1;
  info->device_count = 2;
  return LPX_OK;
}

lpx_status device_open(const lpx_device_options* options, lpx_cuda_device** out) {
  auto device = std::make_unique<lpx_cuda_device>();
  lpx_device_options cpu{};
  cpu.size = sizeof cpu;
  cpu.backend = LPX_CPU;
  cpu.threads = 1;
  if (options->kernels == LPX_KERNELS_HOPPER && options->index == 1) return refuse(LPX_UNSUPPORTED, "device 1 is no Hopper GPU");
  if (const lpx_status status = relay(lpx_device_open(&cpu, &device->cpu)); status != LPX_OK) return status;
  *out = device.release();
  return LPX_OK;
}

void device_close(lpx_cuda_device* device) {
  device->streams.clear();
  lpx_device_close(device->cpu);
  delete device;
}

lpx_status device_info(const lpx_cuda_device*, lpx_device_info* info) {
  info->backend = LPX_CUDA;
  std::snprintf(info->name, sizeof info->name, "Emulated GPU");
  std::snprintf(info->isa, sizeof info->isa, "sm_0");
  info->memory_bytes = kMemory;
  return LPX_OK;
}

lpx_status check_device(lpx_cuda_device* device) {
  return device->is_lost() ? refuse(LPX_DEVICE_ERROR, "cudaErrorIllegalAddress: an illegal memory access was encountered") : LPX_OK;
}

lpx_status allocate(lpx_cuda_device* device, lpx_memory, int64_t bytes, void*, void** memory) {
  if (bytes > kMemory) return refuse(LPX_OUT_OF_MEMORY, "Emulated GPU has no " + std::to_string(bytes) + " bytes left (cudaErrorMemoryAllocation)");
  if (const lpx_status status = relay(lpx_allocate(device->cpu, LPX_MEMORY_DEVICE, bytes, nullptr, memory)); status != LPX_OK) return status;
  std::memset(*memory, 0xff, static_cast<size_t>(bytes < (1 << 22) ? bytes : 1 << 22));  // NaN
  return LPX_OK;
}

void release(lpx_cuda_device* device, lpx_memory kind, void* memory, void* stream) {
  if (kind == LPX_MEMORY_HOST) return lpx_free(device->cpu, kind, memory, nullptr);
  device->stream(stream).push([device, memory] { lpx_free(device->cpu, LPX_MEMORY_DEVICE, memory, nullptr); });
}

lpx_status copy(lpx_cuda_device* device, void* to, const void* from, int64_t bytes, void* stream) {
  device->stream(stream).push([=] {
    if (!device->touches(to) && !device->touches(from) && !device->is_lost()) std::memmove(to, from, static_cast<size_t>(bytes));
  });
  return LPX_OK;
}

lpx_status fill(lpx_cuda_device* device, void* memory, int value, int64_t bytes, void* stream) {
  device->stream(stream).push([=] {
    if (!device->touches(memory) && !device->is_lost()) std::memset(memory, value, static_cast<size_t>(bytes));
  });
  return LPX_OK;
}

lpx_status notify(lpx_cuda_device* device, void* stream, lpx_done done, void* user) {
  device->stream(stream).push([=] { done(user); });
  return LPX_OK;
}

lpx_status record_event(lpx_cuda_device* device, void* stream, void* event) {
  {
    const std::lock_guard<std::mutex> lock(events.mutex);
    events.happened[event] = false;
  }
  device->stream(stream).push([=] {
    const std::lock_guard<std::mutex> lock(events.mutex);
    events.happened[event] = true;
    events.changed.notify_all();
  });
  return LPX_OK;
}

lpx_status wait_event(lpx_cuda_device* device, void* stream, void* event) {
  const std::lock_guard<std::mutex> lock(events.mutex);
  if (!events.happened.contains(event)) return LPX_OK;
  device->stream(stream).push([=] {
    std::unique_lock<std::mutex> wait(events.mutex);
    events.changed.wait(wait, [&] { return events.happened[event]; });
  });
  return LPX_OK;
}

lpx_status synchronize(lpx_cuda_device* device, void* stream) {
  device->stream(stream).synchronize();
  return check_device(device);
}

lpx_status model_create(lpx_cuda_device* device, const lpx_model_desc* desc, const lpx_call*, lpx_cuda_model** out) {
  device->stream(nullptr).synchronize();
  auto model = std::make_unique<lpx_cuda_model>();
  model->device = device;
  const lpx_status status = relay(lpx_model_create(device->cpu, desc, nullptr, &model->cpu));
  if (status == LPX_OK) *out = model.release();
  return status;
}

void model_destroy(lpx_cuda_model* model) {
  lpx_model_destroy(model->cpu);
  delete model;
}

lpx_status supported(const lpx_score_rule* rule) {
  if (rule->statistic == LPX_REMOVAL) return refuse(LPX_UNSUPPORTED, "removal is not built for CUDA; score on a CPU device");
  if (rule->statistic == LPX_FACTORED && rule->value == LPX_VALUE_PROJECTED_L1)
    return refuse(LPX_UNSUPPORTED, "projected l1 norms are not built for CUDA; score on a CPU device");
  return LPX_OK;
}

lpx_status value_norms(lpx_cuda_device* device, const lpx_cache* given, const lpx_call* call) {
  if (const lpx_status status = misaligned(given); status != LPX_OK) return status;
  auto cache = std::make_shared<CacheCopy>(*given);
  return stage(device, call, [=] { return bad(device, cache->cache) ? LPX_OK : lpx_value_norms(device->cpu, &cache->cache, nullptr); });
}

// [segments, stride] as the CPU knows it.
lpx_scores strided(const lpx_scores& from, std::vector<int64_t>& offsets) {
  const int64_t segments = int64_t{from.layers} * from.sequences * from.kv_heads;
  for (int64_t i = 0; i < segments; ++i) offsets.push_back(i * (from.count / segments));
  lpx_scores scores = from;
  scores.offsets = offsets.data();
  return scores;
}

void gather_positions(const lpx_cache& cache, int64_t stride, int32_t* out) {
  for (int i = 0; i < cache.layers; ++i)
    for (int s = 0; s < cache.sequences; ++s)
      for (int g = 0; g < cache.kv_heads; ++g, out += stride) {
        const lpx_cache_layer& layer = cache.layer[i];
        const int32_t length = layer.lengths[s * layer.length_sequence_stride + g * layer.length_head_stride];
        const int32_t* table =
            layer.page_table == nullptr ? nullptr : layer.page_table + s * layer.table_sequence_stride + g * layer.table_head_stride;
        for (int32_t t = 0; t < length; ++t) {
          const int64_t page = table == nullptr ? s : table[t / layer.page_size];
          const char* row = static_cast<const char*>(layer.position.data) + page * layer.position.page_stride +
                            t % layer.page_size * layer.position.token_stride + g * layer.position.head_stride;
          out[t] = layer.position.data == nullptr ? t : *reinterpret_cast<const int32_t*>(row);
        }
      }
}

lpx_status score(lpx_cuda_model* model, const lpx_cache* given, const lpx_window* window_given, const lpx_score_rule* rule_given,
                 const lpx_scores* out, const lpx_call* call) {
  if (const lpx_status status = supported(rule_given); status != LPX_OK) return status;
  if (const lpx_status status = misaligned(given); status != LPX_OK) return status;
  auto cache = std::make_shared<CacheCopy>(*given);
  auto window = std::make_shared<WindowCopy>(window_given, given->layers);
  auto rule = std::make_shared<ScoreRuleCopy>(*rule_given, given->layers);
  const lpx_scores scores = *out;
  return stage(model->device, call, [=] {
    if (bad(model->device, cache->cache)) return LPX_OK;
    if (const lpx_status status = check_lengths(cache->cache); status != LPX_OK) return status;
    std::vector<int64_t> offsets;
    lpx_scores to = strided(scores, offsets);
    std::vector<int64_t> packed(offsets.size());
    std::vector<int32_t> lengths(offsets.size());
    int64_t total;
    if (const lpx_status status = lpx_score_layout(&cache->cache, packed.data(), lengths.data(), &total); status != LPX_OK) return status;
    to.lengths = lengths.data();
    to.positions = nullptr;
    if (scores.positions != nullptr) gather_positions(cache->cache, scores.count / static_cast<int64_t>(offsets.size()), scores.positions);
    return lpx_score(model->cpu, &cache->cache, window->get(), &rule->rule, &to, nullptr);
  });
}

void deliver(lpx_status status, const lpx_report& from, lpx_report* to, const lpx_selection& out, int64_t segments) {
  if (status != LPX_OK)
    std::memset(out.offsets, 0, static_cast<size_t>(segments + 1) * sizeof(int64_t));
  else if (to != nullptr)
    *to = from;
}

lpx_status select(lpx_cuda_device* device, const lpx_scores* given, const lpx_select_rule* rule_given, const lpx_selection* out_given,
                  lpx_report* report, const lpx_call* call) {
  auto rule = std::make_shared<SelectRuleCopy>(*rule_given);
  const lpx_scores scores = *given;
  const lpx_selection out = *out_given;
  return stage(device, call, [=] {
    std::vector<int64_t> offsets;
    const lpx_scores from = strided(scores, offsets);
    lpx_report local{};
    local.size = sizeof local;
    const lpx_status status = lpx_select(device->cpu, &from, &rule->rule, &out, &local, nullptr);
    local.score_seconds = local.select_seconds = 0;
    deliver(status, local, report, out, static_cast<int64_t>(offsets.size()));
    return status;
  });
}

lpx_status select_cache(lpx_cuda_model* model, const lpx_cache* given, const lpx_window* window_given, const lpx_score_rule* score_given,
                        const lpx_select_rule* select_given, const lpx_selection* out_given, lpx_report* report, const lpx_call* call) {
  if (const lpx_status status = supported(score_given); status != LPX_OK) return status;
  if (const lpx_status status = misaligned(given); status != LPX_OK) return status;
  auto cache = std::make_shared<CacheCopy>(*given);
  auto window = std::make_shared<WindowCopy>(window_given, given->layers);
  auto score_rule = std::make_shared<ScoreRuleCopy>(*score_given, given->layers);
  auto select_rule = std::make_shared<SelectRuleCopy>(*select_given);
  const lpx_selection out = *out_given;
  return stage(model->device, call, [=] {
    if (bad(model->device, cache->cache)) return LPX_OK;
    if (const lpx_status status = check_lengths(cache->cache); status != LPX_OK) return status;
    lpx_report local{};
    local.size = sizeof local;
    const lpx_status status =
        lpx_select_cache(model->cpu, &cache->cache, window->get(), &score_rule->rule, &select_rule->rule, &out, &local, nullptr);
    local.score_seconds = local.select_seconds = 0;
    deliver(status, local, report, out, int64_t{cache->cache.layers} * cache->cache.sequences * cache->cache.kv_heads);
    return status;
  });
}

lpx_status compact(lpx_cuda_device* device, const lpx_cache* given, const lpx_selection* selection_given, const lpx_compaction* target_given,
                   const lpx_call* call) {
  if (const lpx_status status = misaligned(given); status != LPX_OK) return status;
  auto cache = std::make_shared<CacheCopy>(*given);
  const lpx_selection selection = *selection_given;
  const lpx_compaction target = *target_given;
  auto layers = std::make_shared<std::vector<lpx_cache_layer>>();
  if (target.layer != nullptr) layers->assign(target.layer, target.layer + target.layers);
  auto lists = std::make_shared<std::vector<lpx_free_list>>();
  if (target.free_lists != nullptr) lists->assign(target.free_lists, target.free_lists + target.free_list_count);
  return stage(device, call, [=] {
    if (bad(device, cache->cache)) return LPX_OK;
    if (const lpx_status status = check_lengths(cache->cache); status != LPX_OK) return status;
    lpx_compaction to = target;
    to.layer = layers->empty() ? nullptr : layers->data();
    to.free_lists = lists->empty() ? nullptr : lists->data();
    std::vector<int32_t> lengths(static_cast<size_t>(cache->cache.layers) * cache->cache.sequences * cache->cache.kv_heads);
    if (to.lengths == nullptr) to.lengths = lengths.data();
    return lpx_compact(device->cpu, &cache->cache, &selection, &to, nullptr);
  });
}

lpx_status evict(lpx_cuda_model* model, const lpx_cache* cache, const lpx_window* window, const lpx_score_rule* score_rule,
                 const lpx_select_rule* select_rule, const lpx_selection* selection, lpx_report* report, const lpx_compaction* target,
                 const lpx_call* call) {
  const lpx_status status = select_cache(model, cache, window, score_rule, select_rule, selection, report, call);
  return status == LPX_OK ? compact(model->device, cache, selection, target, call) : status;
}

lpx_status no_workspace(int64_t* bytes) {
  *bytes = 0;
  return LPX_OK;
}

const lpx_cuda_table table = {
    .version = LAPROX_CUDA_TABLE_VERSION,
    .release = LAPROX_VERSION,
    .last_error = [] { return last_error.c_str(); },
    .get_backend_info = backend_info,
    .device_open = device_open,
    .device_close = device_close,
    .get_device_info = device_info,
    .check_device = check_device,
    .allocate = allocate,
    .free = release,
    .copy = copy,
    .fill = fill,
    .notify = notify,
    .wait_event = wait_event,
    .record_event = record_event,
    .synchronize = synchronize,
    .model_create = model_create,
    .model_destroy = model_destroy,
    .value_norms = value_norms,
    .score_workspace = [](auto*, auto*, auto*, auto*, int64_t* bytes) { return no_workspace(bytes); },
    .score = score,
    .select_workspace = [](auto*, auto*, auto*, int64_t* bytes) { return no_workspace(bytes); },
    .select = select,
    .select_cache_workspace = [](auto*, auto*, auto*, auto*, auto*, int64_t* bytes) { return no_workspace(bytes); },
    .select_cache = select_cache,
    .compact_workspace = [](auto*, auto*, auto*, auto*, int64_t* bytes) { return no_workspace(bytes); },
    .compact = compact,
    .evict_workspace = [](auto*, auto*, auto*, auto*, auto*, auto*, int64_t* bytes) { return no_workspace(bytes); },
    .evict = evict,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const lpx_cuda_table* laprox_cuda_table(uint32_t version) {
  return version == LAPROX_CUDA_TABLE_VERSION ? &table : nullptr;
}
