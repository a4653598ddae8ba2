// Measures laprox on a GPU through its C ABI, and prints what it finds as lines of JSON; bench/gpu/main.ts makes a table of them.
//
//   gpu [--models a,b] [--tokens 8192,131072] [--inputs peaked,diffuse] [--stages evict,scan] [--runs 30] [--kernels portable] [--profile]
//       [--answers]
//
// --answers: measures nothing and checks all answers, for a memory or race checker.
//
// Whole models are built in memory, caches are contiguous and filled from a seed (gpu_data.cuh). Answers are checked before
// anything is timed: selections of the pruned path against those of all scores, bit for bit; scores against bounds that
// plain kernels compute from definitions (gpu_reference.cuh); compacted rows against the cache's.
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>

#include "gpu_data.cuh"
#include "gpu_rates.cuh"
#include "gpu_reference.cuh"
#include "gpu_timing.cuh"
#include "laprox/laprox.h"

namespace bench {
namespace {

constexpr uint64_t kSeed = 7;
constexpr double kKeep = 0.05;
constexpr double kKeepMany = 0.5;
constexpr int kMostReplayed = 32768;  // tokens, where a replayed graph is checked
constexpr int kPooling = 7;
constexpr int kSinks = 4;

struct Model {
  const char* name;
  int layers;
  int measured_layers;  // fewer where the whole does not fit: times are scaled
  int query_heads;
  int kv_heads;
  int model_dim;
};

constexpr Model kModels[] = {
    {"Llama-3.1-8B", 32, 32, 32, 8, 4096},
    {"Llama-3.2-3B", 28, 28, 24, 8, 3072},
    {"Qwen2.5-7B", 28, 28, 28, 4, 3584},
    {"Llama-3.1-70B", 80, 16, 64, 8, 8192},
};

struct Options {
  std::vector<std::string> models;
  std::vector<int> tokens = {8192, 32768, 131072};
  std::vector<std::string> inputs = {"peaked", "diffuse"};
  std::vector<std::string> stages;  // empty: all
  int runs = 30;
  lpx_kernels kernels = LPX_KERNELS_AUTO;
  bool profile = false;
  bool answers = false;
};

using bench::check;

void check(lpx_status status, const char* what) {
  if (status != LPX_OK) throw std::runtime_error(std::string(what) + ": " + lpx_status_name(status) + ": " + lpx_last_error());
}

template <typename T>
T sized() {
  T of{};
  of.size = sizeof of;
  return of;
}

// ---------------------------------------------------------------- lines of JSON

class Line {
 public:
  explicit Line(const char* kind) { text_ = std::string("{\"kind\":\"") + kind + "\""; }
  Line& add(const char* key, const std::string& value) { return raw(key, "\"" + escaped(value) + "\""); }
  Line& add(const char* key, const char* value) { return add(key, std::string(value)); }
  Line& add(const char* key, double value) {
    char buffer[40];
    std::snprintf(buffer, sizeof buffer, "%.9g", value);
    return raw(key, std::isfinite(value) ? buffer : "null");
  }
  Line& add(const char* key, int64_t value) { return raw(key, std::to_string(value)); }
  Line& add(const char* key, int value) { return add(key, int64_t{value}); }
  Line& add(const char* key, bool value) { return raw(key, value ? "true" : "false"); }
  Line& raw(const char* key, const std::string& value) {
    text_ += std::string(",\"") + key + "\":" + value;
    return *this;
  }
  static std::string escaped(const std::string& text) {
    std::string to;
    for (const char c : text) {
      if (c == '"' || c == '\\') to += '\\';
      to += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    return to;
  }
  void print() const {
    std::printf("%s}\n", text_.c_str());
    std::fflush(stdout);
  }

 private:
  std::string text_;
};

// A part of a stage that the next one waits for: what it moves at least, and what it multiplies and adds.
struct Phase {
  double bytes = 0;
  double operations = 0;
  bool copy = false;  // as much is written as is read
};

// ---------------------------------------------------------------- the machine

void measure_machine(Timer& timer, const lpx_device* device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  int driver = 0;
  int runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");

  constexpr int64_t kBytes = int64_t{4} << 30;
  Buffer<char> from(kBytes);
  Buffer<char> to(kBytes);
  Buffer<uint32_t> sink(1);
  fill_pairs<<<4096, 256, 0, timer.stream()>>>(reinterpret_cast<bf16*>(from.data()), kBytes / 4,
                                               [] __device__(int64_t i) { return Random(1, kValueNoise).noise(i); });
  const Timing copy = timer([&] { check(cudaMemcpyAsync(to.data(), from.data(), kBytes, cudaMemcpyDeviceToDevice, timer.stream()), "copy"); });
  const Timing read = timer([&] {
    read_all<<<properties.multiProcessorCount * 8, 512, 0, timer.stream()>>>(reinterpret_cast<uint4*>(from.data()), kBytes / 16, sink.data());
  });
  Line line("machine");
  line.add("gpu", properties.name).add("multiprocessors", properties.multiProcessorCount).add("memoryBytes", int64_t(properties.totalGlobalMem));
  line.add("computeCapability", std::to_string(properties.major) + "." + std::to_string(properties.minor));
  line.add("cudaDriver", std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10));
  line.add("cudaRuntime", std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10)).add("laprox", lpx_version());
  line.add("copyBytesPerSecond", 2e6 * kBytes / copy.median).add("readBytesPerSecond", 1e6 * kBytes / read.median);
  if (properties.major == 9 && properties.minor == 0) {
    check(cudaFuncSetAttribute(matrix_products, cudaFuncAttributeMaxDynamicSharedMemorySize, kProductBytes), "cudaFuncSetAttribute");
    const Timing products = timer([&] {
      matrix_products<<<properties.multiProcessorCount, kProductThreads, kProductBytes, timer.stream()>>>(reinterpret_cast<float*>(sink.data()));
    });
    line.add("matrixOperationsPerSecond", 1e6 * kProductOperations * properties.multiProcessorCount / products.median);
  }
  auto info = sized<lpx_device_info>();
  if (device != nullptr && lpx_get_device_info(device, &info) == LPX_OK) line.add("kernels", info.isa);
  line.print();
  check(cudaGetLastError(), "measuring the machine");
}

// ---------------------------------------------------------------- a model

struct Weights {
  Buffer<bf16> projections;
  Buffer<float> singular;  // [layers, query heads]

  Weights(const Shape& shape, cudaStream_t stream) : projections(shape.projection_elements()), singular(int64_t{shape.layers} * shape.query_heads) {
    fill_projections({shape, Input::kPeaked, kSeed}, projections.data(), stream);
    largest_singular<<<shape.layers * shape.query_heads, 256, 0, stream>>>(shape, projections.data(), singular.data());
    check(cudaStreamSynchronize(stream), "filling the projections");
  }
};

class Described {
 public:
  Described(lpx_device* device, const Shape& shape, const Weights& weights, cudaStream_t stream) {
    std::vector<lpx_layer> layers(shape.layers);
    const int64_t width = int64_t{shape.query_heads} * shape.head_dim;
    for (int i = 0; i < shape.layers; i++) {
      layers[i].projection = weights.projections.data() + i * width * shape.model_dim;
      layers[i].projection_bytes = width * shape.model_dim * 2;
      layers[i].projection_row_stride = 2;
      layers[i].projection_column_stride = width * 2;
    }
    auto desc = sized<lpx_model_desc>();
    desc.layers = shape.layers;
    desc.query_heads = shape.query_heads;
    desc.kv_heads = shape.kv_heads;
    desc.head_dim = shape.head_dim;
    desc.model_dim = shape.model_dim;
    desc.projection_dtype = LPX_BF16;
    desc.layer = layers.data();
    auto call = sized<lpx_call>();
    call.stream = stream;
    const auto before = std::chrono::steady_clock::now();
    check(lpx_model_create(device, &desc, &call, &model_), "lpx_model_create");
    check(cudaStreamSynchronize(stream), "lpx_model_create");
    seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  }
  Described(const Described&) = delete;
  Described& operator=(const Described&) = delete;
  ~Described() { lpx_model_destroy(model_); }

  lpx_model* get() const { return model_; }
  double seconds() const { return seconds_; }

 private:
  lpx_model* model_ = nullptr;
  double seconds_ = 0;
};

// ---------------------------------------------------------------- one configuration

// What a caller keeps of a selection.
struct Selected {
  Buffer<int32_t> tokens;
  Buffer<int64_t> offsets;
  int64_t kept;

  Selected(const Shape& shape, int64_t kept_) : tokens(kept_), offsets(shape.segments() + 1), kept(kept_) {}
  lpx_selection view() const {
    auto to = sized<lpx_selection>();
    to.tokens = tokens.data();
    to.capacity = tokens.count();
    to.offsets = offsets.data();
    return to;
  }
};

// A compacted cache: flat rows.
struct Compacted {
  Buffer<bf16> keys;
  Buffer<bf16> values;
  Buffer<int32_t> positions;
  Buffer<float> value_norms;
  Buffer<int32_t> lengths;
  lpx_cache_layer planes{};

  Compacted(const Shape& shape, int64_t kept)
      : keys(kept * shape.head_dim), values(kept * shape.head_dim), positions(kept), value_norms(kept), lengths(shape.segments()) {
    const auto plane = [&](void* data, int64_t row) {
      lpx_plane to{};
      to.data = data;
      to.bytes = kept * row;
      to.page_stride = to.bytes;
      to.token_stride = row;
      return to;
    };
    planes.key = plane(keys.data(), shape.head_dim * 2);
    planes.value = plane(values.data(), shape.head_dim * 2);
    planes.position = plane(positions.data(), 4);
    planes.value_norm = plane(value_norms.data(), 4);
    planes.page_size = static_cast<int32_t>(kept);
    planes.pages_per_row = 1;
  }

  lpx_cache_layer planes_with(bool norms) const {
    lpx_cache_layer to = planes;
    if (!norms) to.value_norm = {};
    return to;
  }
  lpx_compaction target(const lpx_cache_layer& to) const {
    auto target = sized<lpx_compaction>();
    target.target = LPX_TO_RAGGED;
    target.layer = &to;
    target.layers = 1;
    target.lengths = lengths.data();
    return target;
  }
};

class Configuration {
 public:
  Configuration(const Options& options, const Model& of, const Shape& shape, Input input, lpx_device* device, lpx_model* model,
                const Weights& weights, Timer& timer)
      : options_(options),
        of_(of),
        s_(shape),
        input_(input),
        device_(device),
        model_(model),
        weights_(weights),
        timer_(timer),
        keys_(shape.cache_elements()),
        values_(shape.cache_elements()),
        queries_(shape.query_elements()),
        value_norms_(shape.entries()),
        scores_(shape.entries()),
        lse_(int64_t{shape.layers} * shape.query_heads * shape.rows),
        host_lengths_(shape.segments(), shape.tokens),
        lengths_(shape.segments()),
        status_(1),
        report_(1),
        counts_(1) {
    check(cudaMemset(status_.data(), 0, sizeof(int32_t)), "cudaMemset");
    lengths_.write(host_lengths_.data(), lengths_.count());
    const auto report = sized<lpx_report>();
    report_.write(&report, 1);
    fill_inputs({shape, input, kSeed}, {keys_.data(), values_.data(), queries_.data()}, stream());
    compute_lse();
    describe_cache();
    check(cudaStreamSynchronize(stream()), "filling the cache");
  }

  void run() {
    Selected selected(s_, kept(kKeep));
    Compacted compacted(s_, selected.kept);
    value_norms();
    check_answers(selected, compacted);
    if (s_.tokens <= kMostReplayed) check_replay(selected, compacted);
    if (options_.answers) return call_the_rest(compacted);

    const double kv_read = 2.0 * row_bytes() * static_cast<double>(s_.entries());
    const double k_read = kv_read / 2;
    const double logits = 2.0 * s_.group() * s_.rows * s_.head_dim * static_cast<double>(s_.entries());
    const double score_bytes = 4.0 * static_cast<double>(s_.entries());

    for (const auto& [name, norms, lse] : {std::tuple{"evict-kept-norms", true, false}, {"evict", false, false}, {"evict-given-lse", true, true}})
      evict(name, norms, lse, selected, compacted);
    scan();

    const lpx_score_rule joint = joint_rule();
    const lpx_score_rule snapkv = snapkv_rule();
    score("score-snapkv", snapkv, false, {{k_read, logits}, {k_read + score_bytes, logits}});
    score("score-snapkv-given-lse", snapkv, true, {{k_read + score_bytes, logits}});

    if (wanted("select") || wanted("compact")) {
      call_score(joint, false);
      select(selected);
      compact(selected, compacted, kKeep);
      if (s_.entries() * row_bytes() * 5 < free_bytes()) {
        Selected many(s_, kept(kKeepMany));
        compacted = Compacted(s_, many.kept);
        call_select(kKeepMany, many);
        synchronize("selecting half");
        compact(many, compacted, kKeepMany);
      }
    }
    // Last: nearly a second of matrix products, which heats the card.
    score("score-joint", joint, false, {{k_read, logits}, {kv_read + score_bytes, logits + value_terms(static_cast<double>(s_.entries()))}});
  }

 private:
  cudaStream_t stream() const { return timer_.stream(); }
  double row_bytes() const { return 2.0 * s_.head_dim; }
  bool wanted(const char* stage) const {
    return options_.stages.empty() || std::find(options_.stages.begin(), options_.stages.end(), stage) != options_.stages.end();
  }

  static int64_t free_bytes() {
    size_t free = 0;
    size_t total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return static_cast<int64_t>(free);
  }

  // Operations of u_h = v L_h and of their products for so many entries: a triangle of the group's width, d rows deep.
  double value_terms(double entries) const {
    const double d = s_.head_dim;
    const double r = s_.group();
    return 2 * entries * (d * d * r * (r + 1) / 2 - r * d * (d - 1) / 2);
  }

  // ---- descriptions

  void describe_cache() {
    layers_.assign(s_.layers, {});
    windows_.assign(s_.layers, {});
    const int64_t head = int64_t{s_.tokens} * s_.head_dim;
    const auto plane = [&](auto* data, int64_t row) {
      lpx_plane to{};
      to.data = data;
      to.bytes = int64_t{s_.kv_heads} * s_.tokens * row;
      to.page_stride = to.bytes;
      to.token_stride = row;
      to.head_stride = s_.tokens * row;
      return to;
    };
    for (int i = 0; i < s_.layers; i++) {
      lpx_cache_layer& layer = layers_[i];
      layer.key = plane(keys_.data() + i * s_.kv_heads * head, s_.head_dim * 2);
      layer.value = plane(values_.data() + i * s_.kv_heads * head, s_.head_dim * 2);
      layer.value_norm = plane(value_norms_.data() + int64_t{i} * s_.kv_heads * s_.tokens, 4);
      layer.page_size = s_.tokens;
      layer.pages_per_row = 1;
      layer.lengths = lengths_.data();
      lpx_window_layer& window = windows_[i];
      const int64_t row = int64_t{s_.head_dim} * 2;
      window.queries = queries_.data() + int64_t{i} * s_.query_heads * s_.rows * s_.head_dim;
      window.queries_bytes = s_.query_heads * s_.rows * row;
      window.sequence_stride = window.queries_bytes;
      window.head_stride = s_.rows * row;
      window.row_stride = row;
    }
  }

  lpx_cache cache(bool norms) {
    layers_now_ = layers_;
    if (!norms)
      for (lpx_cache_layer& layer : layers_now_) layer.value_norm = {};
    auto to = sized<lpx_cache>();
    to.dtype = LPX_BF16;
    to.layers = s_.layers;
    to.sequences = 1;
    to.kv_heads = s_.kv_heads;
    to.head_dim = s_.head_dim;
    to.max_length = s_.tokens;
    to.layer = layers_now_.data();
    return to;
  }

  lpx_window window(bool lse) {
    windows_now_ = windows_;
    for (int i = 0; lse && i < s_.layers; i++) {
      lpx_window_layer& layer = windows_now_[i];
      layer.lse = lse_.data() + int64_t{i} * s_.query_heads * s_.rows;
      layer.lse_bytes = int64_t{s_.query_heads} * s_.rows * 4;
      layer.lse_sequence_stride = layer.lse_bytes;
      layer.lse_head_stride = s_.rows * 4;
      layer.lse_row_stride = 4;
    }
    auto to = sized<lpx_window>();
    to.dtype = LPX_BF16;
    to.rows = s_.rows;
    to.lse_base = LPX_NATURAL;
    to.layer = windows_now_.data();
    return to;
  }

  static lpx_score_rule joint_rule() {
    auto rule = sized<lpx_score_rule>();
    rule.statistic = LPX_JOINT;
    return rule;
  }

  static lpx_score_rule snapkv_rule() {
    auto rule = sized<lpx_score_rule>();
    rule.statistic = LPX_FACTORED;
    rule.attention = LPX_ATTENTION_MEAN;
    rule.value = LPX_VALUE_NONE;
    rule.aggregation = LPX_AGGREGATE_MEAN;
    return rule;
  }

  lpx_select_rule select_rule(double keep) const {
    auto rule = sized<lpx_select_rule>();
    rule.pooling = LPX_POOL_MAX;
    rule.pooling_width = kPooling;
    rule.scope = LPX_SCOPE_MODEL;
    rule.budget = LPX_BUDGET_RATIO;
    rule.ratio = keep;
    rule.sinks = kSinks;
    rule.recent = s_.rows;
    return rule;
  }

  lpx_scores scores(const int32_t* lengths) const {
    auto to = sized<lpx_scores>();
    to.layers = s_.layers;
    to.sequences = 1;
    to.kv_heads = s_.kv_heads;
    to.data = scores_.data();
    to.count = scores_.count();
    to.lengths = const_cast<int32_t*>(lengths);
    to.bytes_per_entry = 4 * s_.head_dim;
    return to;
  }

  int64_t kept(double keep) const {
    std::vector<int64_t> offsets;
    for (int i = 0; i < s_.segments(); i++) offsets.push_back(int64_t{i} * s_.tokens);
    lpx_scores of = scores(host_lengths_.data());
    of.offsets = offsets.data();
    of.data = nullptr;
    const lpx_select_rule rule = select_rule(keep);
    int64_t count = 0;
    check(lpx_kept_counts(&of, &rule, &count), "lpx_kept_counts");
    return count;
  }

  // ---- calls

  lpx_call call(int64_t bytes) {
    if (workspace_.count() < bytes) {
      workspace_ = {};
      workspace_ = Buffer<char>(bytes);
    }
    auto to = sized<lpx_call>();
    to.stream = stream();
    to.workspace = workspace_.data();
    to.workspace_bytes = workspace_.count();
    to.status = status_.data();
    return to;
  }

  // Waits, and throws what the device found.
  void synchronize(const char* what) {
    check(cudaStreamSynchronize(stream()), what);
    const auto status = static_cast<lpx_status>(status_.read()[0]);
    check(cudaMemset(status_.data(), 0, sizeof(int32_t)), "cudaMemset");
    if (status != LPX_OK) throw std::runtime_error(std::string(what) + ": the device found " + lpx_status_name(status));
  }

  int64_t score_bytes(const lpx_score_rule& rule, bool lse) {
    const lpx_cache from = cache(false);
    const lpx_window by = window(lse);
    int64_t bytes = 0;
    check(lpx_score_workspace(model_, &from, &by, &rule, &bytes), "lpx_score_workspace");
    return bytes;
  }

  void call_score(const lpx_score_rule& rule, bool lse) {
    const lpx_call to = call(score_bytes(rule, lse));
    const lpx_cache from = cache(false);
    const lpx_window by = window(lse);
    const lpx_scores out = scores(nullptr);
    check(lpx_score(model_, &from, &by, &rule, &out, &to), "lpx_score");
  }

  int64_t select_bytes(double keep) {
    const lpx_scores from = scores(lengths_.data());
    const lpx_select_rule rule = select_rule(keep);
    int64_t bytes = 0;
    check(lpx_select_workspace(device_, &from, &rule, &bytes), "lpx_select_workspace");
    return bytes;
  }

  void call_select(double keep, const Selected& selected) {
    const lpx_call to = call(select_bytes(keep));
    const lpx_scores from = scores(lengths_.data());
    const lpx_select_rule rule = select_rule(keep);
    const lpx_selection out = selected.view();
    check(lpx_select(device_, &from, &rule, &out, report_.data(), &to), "lpx_select");
  }

  void call_select_cache(bool norms, bool lse, const Selected& selected) {
    const lpx_cache from = cache(norms);
    const lpx_window by = window(lse);
    const lpx_score_rule score = joint_rule();
    const lpx_select_rule rule = select_rule(kKeep);
    const lpx_selection out = selected.view();
    int64_t bytes = 0;
    check(lpx_select_cache_workspace(model_, &from, &by, &score, &rule, &bytes), "lpx_select_cache_workspace");
    const lpx_call to = call(bytes);
    check(lpx_select_cache(model_, &from, &by, &score, &rule, &out, report_.data(), &to), "lpx_select_cache");
  }

  void call_compact(bool norms, const Selected& selected, const Compacted& compacted) {
    const lpx_cache from = cache(norms);
    const lpx_selection of = selected.view();
    const lpx_cache_layer planes = compacted.planes_with(norms);
    const lpx_compaction target = compacted.target(planes);
    int64_t bytes = 0;
    check(lpx_compact_workspace(device_, &from, &of, &target, &bytes), "lpx_compact_workspace");
    const lpx_call to = call(bytes);
    check(lpx_compact(device_, &from, &of, &target, &to), "lpx_compact");
  }

  // Gives the bytes of its workspace.
  int64_t call_evict(bool norms, bool lse, const Selected& selected, const Compacted& compacted) {
    const lpx_cache from = cache(norms);
    const lpx_window by = window(lse);
    const lpx_score_rule score = joint_rule();
    const lpx_select_rule rule = select_rule(kKeep);
    const lpx_selection out = selected.view();
    const lpx_cache_layer planes = compacted.planes_with(norms);
    const lpx_compaction target = compacted.target(planes);
    int64_t bytes = 0;
    check(lpx_evict_workspace(model_, &from, &by, &score, &rule, &target, &bytes), "lpx_evict_workspace");
    const lpx_call to = call(bytes);
    check(lpx_evict(model_, &from, &by, &score, &rule, &out, report_.data(), &target, &to), "lpx_evict");
    return bytes;
  }

  // ---- what is known without the library

  void compute_lse() {
    constexpr int kSplit = 4096;
    const int splits = (s_.tokens + kSplit - 1) / kSplit;
    const int heads = s_.layers * s_.query_heads;
    Buffer<Partial> partials(int64_t{heads} * splits * kRows);
    partial_sums<<<dim3(splits, heads), 256, 0, stream()>>>(s_, queries_.data(), keys_.data(), kSplit, partials.data());
    join_sums<<<heads, kRows, 0, stream()>>>(partials.data(), splits, lse_.data());
    check(cudaStreamSynchronize(stream()), "the log-sum-exp");
  }

  // ---- stages

  Line line(const char* stage, double keep, const char* kind = "result") const {
    Line to(kind);
    to.add("model", of_.name).add("layers", of_.layers).add("measuredLayers", s_.layers).add("queryHeads", s_.query_heads);
    to.add("kvHeads", s_.kv_heads).add("n", s_.tokens).add("keep", keep).add("input", input_ == Input::kPeaked ? "peaked" : "diffuse");
    to.add("stage", stage);
    return to;
  }

  static void add_timing(Line& to, const Timing& timing) {
    to.add("medianUs", timing.median).add("p10Us", timing.p10).add("p90Us", timing.p90).add("hostUs", timing.host).add("runs", timing.runs);
  }

  static void add_phases(Line& to, const std::vector<Phase>& phases) {
    std::string text = "[";
    for (const Phase& phase : phases) {
      char buffer[100];
      std::snprintf(buffer, sizeof buffer, "%s{\"bytes\":%.9g,\"operations\":%.9g,\"copy\":%s}", text.size() > 1 ? "," : "", phase.bytes,
                    phase.operations, phase.copy ? "true" : "false");
      text += buffer;
    }
    to.raw("phases", text + "]");
  }

  void add_report(Line& to, const lpx_report& report) const {
    to.add("entries", report.entries).add("kept", report.kept).add("candidates", report.candidates).add("exactScores", report.exact_scores);
    to.add("path", report.path == LPX_PATH_PRUNED ? "pruned" : "full").add("fallback", report.fallback);
  }

  // Runs a stage; what goes wrong with it is told, and the others go on.
  void attempt(const char* stage, double keep, const std::function<void()>& run) {
    if (!wanted(stage)) return;
    try {
      run();
    } catch (const std::exception& error) {
      line(stage, keep, "error").add("error", error.what()).print();
      if (cudaDeviceSynchronize() != cudaSuccess) throw;
      check(cudaMemset(status_.data(), 0, sizeof(int32_t)), "cudaMemset");
    }
  }

  void value_norms() {
    const lpx_cache of = cache(true);
    const lpx_call to = call(0);
    check(lpx_value_norms(device_, &of, &to), "lpx_value_norms");
    synchronize("lpx_value_norms");
    if (options_.answers) return;
    attempt("value-norms", 0, [&] {
      const Timing timing = timer_([&] { check(lpx_value_norms(device_, &of, &to), "lpx_value_norms"); });
      synchronize("lpx_value_norms");
      Line out = line("value-norms", 0);
      add_timing(out, timing);
      add_phases(out, {{(row_bytes() + 4) * static_cast<double>(s_.entries()), 0}});
      out.print();
    });
  }

  // What the checks of answers do not call.
  void call_the_rest(const Compacted& compacted) {
    for (const bool lse : {false, true}) call_score(snapkv_rule(), lse);
    call_score(joint_rule(), false);
    Selected selected(s_, compacted.positions.count());
    call_select(kKeep, selected);
    call_compact(true, selected, compacted);
    synchronize("other calls");
  }

  // The selections of both paths, and the statistics of what the generator made.
  void check_answers(const Selected& selected, const Compacted& compacted) {
    Selected full(s_, selected.kept);
    call_score(joint_rule(), false);
    call_select(kKeep, full);
    synchronize("all scores and their selection");
    Buffer<float> bounds(s_.entries());
    Buffer<unsigned> threshold(1);
    check(cudaMemset(threshold.data(), 0x7f, 4), "cudaMemset");
    check(cudaMemset(counts_.data(), 0, sizeof(Counts)), "cudaMemset");
    exact_bounds<<<dim3(s_.tokens / (8 * kTile), s_.segments()), 256, 0, stream()>>>(s_, queries_.data(), keys_.data(), values_.data(), lse_.data(),
                                                                                     weights_.singular.data(), bounds.data());
    smallest_kept<<<s_.segments(), 256, 0, stream()>>>(s_, scores_.data(), kPooling / 2, kSinks, s_.rows, full.tokens.data(), full.offsets.data(),
                                                       threshold.data());
    count_above<<<1024, 256, 0, stream()>>>(s_, bounds.data(), scores_.data(), threshold.data(), kSinks, s_.rows, counts_.data());
    check(cudaStreamSynchronize(stream()), "the plain kernels");
    statistics_ = counts_.read()[0];

    for (const auto& [stage, norms, lse] : {std::tuple{"evict-kept-norms", true, false}, {"evict", false, false}, {"evict-given-lse", true, true}}) {
      attempt(stage, kKeep, [&, stage = stage, norms = norms, lse = lse] {
        if (lse) {  // whose last bits are another computation's
          call_score(joint_rule(), true);
          call_select(kKeep, full);
          synchronize("all scores with a given log-sum-exp, and their selection");
        }
        check(cudaMemset(counts_.data(), 0, sizeof(Counts)), "cudaMemset");
        poison(selected, compacted);
        call_evict(norms, lse, selected, compacted);
        synchronize("an eviction");
        compare(selected, compacted, full, full.kept);
        const Counts counts = counts_.read()[0];
        Line to = line(stage, kKeep, "check");
        add_report(to, report_.read()[0]);
        print_check(to, counts);
      });
    }
  }

  // An eviction as a graph, captured at the longest lengths and replayed with others: what calls of these lengths do.
  void check_replay(const Selected& selected, const Compacted& compacted) {
    attempt("evict-replay", kKeep, [&] {
      Selected called(s_, selected.kept);
      call_evict(true, false, selected, compacted);  // the workspace is there before the capture
      synchronize("an eviction");
      Captured captured(stream(), [&] { call_evict(true, false, selected, compacted); });
      cudaGraphExec_t graph = captured.whole();
      check(cudaMemset(counts_.data(), 0, sizeof(Counts)), "cudaMemset");
      for (const int32_t length : {s_.tokens - 77, s_.tokens * 3 / 4 + 1, s_.tokens}) {
        const std::vector<int32_t> lengths(host_lengths_.size(), length);
        lengths_.write(lengths.data(), lengths_.count());
        poison(selected, compacted);
        check(cudaGraphLaunch(graph, stream()), "cudaGraphLaunch");
        synchronize("a replay");
        call_select_cache(true, false, called);
        synchronize("a call");
        compare(selected, compacted, called, called.offsets.read().back());
      }
      Line to = line("evict-replay", kKeep, "check");
      add_report(to, report_.read()[0]);
      print_check(to, counts_.read()[0]);
    });
    lengths_.write(host_lengths_.data(), lengths_.count());  // whatever went wrong
  }

  // So that what is not written shows.
  static void poison(const Selected& selected, const Compacted& compacted) {
    check(cudaMemset(selected.tokens.data(), 0xff, static_cast<size_t>(selected.tokens.bytes())), "cudaMemset");
    check(cudaMemset(compacted.keys.data(), 0xff, static_cast<size_t>(compacted.keys.bytes())), "cudaMemset");
    check(cudaMemset(compacted.values.data(), 0xff, static_cast<size_t>(compacted.values.bytes())), "cudaMemset");
  }

  // Adds to the counts how far a selection differs from the wanted one, of `kept` tokens, and what of its rows was not moved.
  void compare(const Selected& selected, const Compacted& compacted, const Selected& wanted, int64_t kept) {
    count_different<<<1024, 256, 0, stream()>>>(selected.tokens.data(), wanted.tokens.data(), kept, selected.offsets.data(), wanted.offsets.data(),
                                                s_.segments(), counts_.data());
    for (const auto& [rows, moved] : {std::pair{keys_.data(), compacted.keys.data()}, {values_.data(), compacted.values.data()}})
      count_not_moved<<<s_.segments(), 256, 0, stream()>>>(s_, rows, moved, wanted.tokens.data(), wanted.offsets.data(), counts_.data());
    check(cudaStreamSynchronize(stream()), "comparing selections");
  }

  void print_check(Line& to, const Counts& counts) const {
    to.add("tokensDiffer", static_cast<int64_t>(counts.differs)).add("partsNotMoved", static_cast<int64_t>(counts.moved));
    to.add("scoresBeyondBounds", static_cast<int64_t>(statistics_.beyond));
    to.add("aboveThreshold", static_cast<double>(statistics_.above) / static_cast<double>(s_.entries()));
    to.print();
  }

  void evict(const char* stage, bool norms, bool lse, const Selected& selected, const Compacted& compacted) {
    attempt(stage, kKeep, [&] {
      int64_t bytes = 0;
      const auto work = [&] { bytes = call_evict(norms, lse, selected, compacted); };
      const Timing timing = timer_(work);
      synchronize(stage);
      const lpx_report report = report_.read()[0];
      const auto entries = static_cast<double>(s_.entries());
      const double logits = 2.0 * s_.group() * s_.rows * s_.head_dim;
      std::vector<Phase> phases;
      if (report.path == LPX_PATH_PRUNED) {
        phases.push_back({row_bytes() * entries, logits * entries});
        phases.push_back({(norms ? 4 : row_bytes()) * entries, 0});
      } else if (!lse) {
        phases.push_back({row_bytes() * entries, logits * entries});
      }
      const auto exact = static_cast<double>(report.exact_scores);
      phases.push_back({2 * row_bytes() * exact, logits * exact + value_terms(exact)});
      phases.push_back({2 * 4 * entries, 0});
      phases.push_back({4 * row_bytes() * static_cast<double>(selected.kept), 0, true});
      Line to = line(stage, kKeep);
      add_timing(to, timing);
      add_phases(to, phases);
      add_report(to, report);
      to.add("workspaceBytes", bytes).add("workspaceLimit", workspace_limit());
      if (s_.tokens <= 8192) {
        Captured captured(stream(), work);
        cudaGraphExec_t graph = captured.whole();
        to.add("graphUs", timer_([&] { check(cudaGraphLaunch(graph, stream()), "cudaGraphLaunch"); }).median);
        synchronize("a graph's replay");
      }
      to.print();
      if (options_.profile) {
        Captured captured(stream(), work);
        profile(stage, captured);
      }
    });
  }

  int64_t workspace_limit() const { return 4 * s_.entries() * s_.group() + 3 * 4 * s_.entries() + (int64_t{64} << 20); }

  void profile(const char* stage, Captured& captured) {
    std::vector<double> times;
    for (const std::vector<double>& each : captured.profile(timer_, std::min(options_.runs, 10))) times.push_back(quantile(each, 0.5));
    std::string text = "[";
    for (size_t i = 0; i < times.size(); i++) {
      char buffer[40];
      std::snprintf(buffer, sizeof buffer, "\",\"us\":%.2f}", times[i]);
      text += (i == 0 ? "{\"kernel\":\"" : ",{\"kernel\":\"") + Line::escaped(captured.names()[i]) + buffer;
    }
    line(stage, kKeep, "profile").raw("kernels", text + "]").print();
  }

  // The scan's kernel where it stands in an eviction.
  void scan() {
    attempt("scan", 0, [&] {
      Selected selected(s_, kept(kKeep));
      Captured captured(stream(), [&] { call_select_cache(true, false, selected); });
      const std::vector<std::vector<double>> times = captured.profile(timer_, timer_.runs());
      synchronize("an eviction as a graph");
      std::vector<double> scan(times[0].size());
      std::string names;
      for (const char* kernel : {"scan_wgmma", "scan_mma", "scan_plain"}) {
        for (size_t i = 0; i < times.size() && names.empty(); i++) {
          if (captured.names()[i].rfind(kernel, 0) != 0) continue;
          names = captured.names()[i];
          scan = times[i];
        }
      }
      if (names.empty()) throw std::runtime_error("no kernel of the eviction is called scan");
      const auto entries = static_cast<double>(s_.entries());
      Line to = line("scan", 0);
      add_timing(to, {quantile(scan, 0.5), quantile(scan, 0.1), quantile(scan, 0.9), 0, static_cast<int>(scan.size())});
      add_phases(to, {{row_bytes() * entries, 2.0 * s_.group() * s_.rows * s_.head_dim * entries}});
      to.add("kernel", names).print();
    });
  }

  void score(const char* stage, const lpx_score_rule& rule, bool lse, const std::vector<Phase>& phases) {
    attempt(stage, 0, [&] {
      const int64_t bytes = score_bytes(rule, lse);
      const Timing timing = timer_([&] { call_score(rule, lse); });
      synchronize(stage);
      Line to = line(stage, 0);
      add_timing(to, timing);
      add_phases(to, phases);
      to.add("workspaceBytes", bytes).add("workspaceLimit", workspace_limit()).print();
      if (options_.profile) {
        Captured captured(stream(), [&] { call_score(rule, lse); });
        profile(stage, captured);
      }
    });
  }

  void select(const Selected& selected) {
    attempt("select", kKeep, [&] {
      const int64_t bytes = select_bytes(kKeep);
      const Timing timing = timer_([&] { call_select(kKeep, selected); });
      synchronize("select");
      Line to = line("select", kKeep);
      add_timing(to, timing);
      add_phases(to, {{2 * 4.0 * static_cast<double>(s_.entries()) + 4.0 * static_cast<double>(selected.kept), 0}});
      to.add("workspaceBytes", bytes).add("workspaceLimit", workspace_limit()).print();
      if (options_.profile) {
        Captured captured(stream(), [&] { call_select(kKeep, selected); });
        profile("select", captured);
      }
    });
  }

  void compact(const Selected& selected, const Compacted& compacted, double keep) {
    attempt("compact", keep, [&] {
      const Timing timing = timer_([&] { call_compact(false, selected, compacted); });
      synchronize("compact");
      Line to = line("compact", keep);
      add_timing(to, timing);
      add_phases(to, {{4 * row_bytes() * static_cast<double>(selected.kept), 0, true}});
      to.add("kept", selected.kept).print();
    });
  }

  const Options& options_;
  const Model& of_;
  const Shape s_;
  const Input input_;
  lpx_device* device_;
  lpx_model* model_;
  const Weights& weights_;
  Timer& timer_;
  Buffer<bf16> keys_;
  Buffer<bf16> values_;
  Buffer<bf16> queries_;
  Buffer<float> value_norms_;
  Buffer<float> scores_;
  Buffer<float> lse_;
  std::vector<int32_t> host_lengths_;
  Buffer<int32_t> lengths_;
  Buffer<int32_t> status_;
  Buffer<lpx_report> report_;
  Buffer<Counts> counts_;
  Counts statistics_{};
  Buffer<char> workspace_;
  std::vector<lpx_cache_layer> layers_;
  std::vector<lpx_cache_layer> layers_now_;
  std::vector<lpx_window_layer> windows_;
  std::vector<lpx_window_layer> windows_now_;
};

// ---------------------------------------------------------------- the program

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t from = 0;
  while (from <= text.size()) {
    const size_t to = std::min(text.find(',', from), text.size());
    if (to > from) parts.push_back(text.substr(from, to - from));
    from = to + 1;
  }
  return parts;
}

Options read_options(int count, char** arguments) {
  Options to;
  for (int i = 1; i < count; i++) {
    const std::string name = arguments[i];
    if (name == "--profile" || name == "--answers") {
      (name == "--profile" ? to.profile : to.answers) = true;
      continue;
    }
    if (i + 1 == count) throw std::runtime_error(name + " needs a value");
    const std::string value = arguments[++i];
    if (name == "--models")
      to.models = split(value);
    else if (name == "--inputs")
      to.inputs = split(value);
    else if (name == "--stages")
      to.stages = split(value);
    else if (name == "--runs")
      to.runs = std::stoi(value);
    else if (name == "--tokens") {
      to.tokens.clear();
      for (const std::string& tokens : split(value)) to.tokens.push_back(std::stoi(tokens));
    } else if (name == "--kernels") {
      to.kernels = value == "plain"      ? LPX_KERNELS_PLAIN
                   : value == "portable" ? LPX_KERNELS_PORTABLE
                   : value == "hopper"   ? LPX_KERNELS_HOPPER
                                         : LPX_KERNELS_AUTO;
    } else {
      throw std::runtime_error("there is no option " + name);
    }
  }
  return to;
}

int run(int count, char** arguments) {
  const Options options = read_options(count, arguments);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    Line("skip").add("reason", "there is no GPU").print();
    return 0;
  }
  auto backend = sized<lpx_backend_info>();
  check(lpx_get_backend_info(LPX_CUDA, &backend), "lpx_get_backend_info");
  if (backend.available == 0) {
    Line("skip").add("reason", std::string(backend.code) + ": " + backend.reason).print();
    return 0;
  }
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");  // what is copied or set without a stream waits for it, and it for them
  auto wanted = sized<lpx_device_options>();
  wanted.backend = LPX_CUDA;
  wanted.kernels = options.kernels;
  lpx_device* device = nullptr;
  check(lpx_device_open(&wanted, &device), "lpx_device_open");
  int failures = 0;
  {
    Timer timer(stream, options.runs);
    if (!options.answers) measure_machine(timer, device);
    for (const Model& model : kModels) {
      if (!options.models.empty() && std::find(options.models.begin(), options.models.end(), model.name) == options.models.end()) continue;
      Shape shape{model.measured_layers, model.query_heads, model.kv_heads, kHeadDim, model.model_dim, kRows, 0};
      const Weights weights(shape, stream);
      std::optional<Described> described;
      try {
        described.emplace(device, shape, weights, stream);
      } catch (const std::exception& error) {
        Line("error").add("model", model.name).add("stage", "model").add("error", error.what()).print();
        failures++;
        continue;
      }
      Line("model").add("model", model.name).add("measuredLayers", model.measured_layers).add("factorSeconds", described->seconds()).print();
      for (const std::string& input : options.inputs) {
        for (const int tokens : options.tokens) {
          shape.tokens = tokens;
          try {
            Configuration(options, model, shape, input == "diffuse" ? Input::kDiffuse : Input::kPeaked, device, described->get(), weights, timer)
                .run();
          } catch (const std::exception& error) {
            Line("error").add("model", model.name).add("n", tokens).add("input", input).add("stage", "all").add("error", error.what()).print();
            failures++;
            if (cudaDeviceSynchronize() != cudaSuccess) return 1;  // the context is lost
          }
        }
      }
    }
  }
  lpx_device_close(device);
  cudaStreamDestroy(stream);
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace bench

int main(int count, char** arguments) {
  try {
    return bench::run(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
