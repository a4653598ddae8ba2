#include "addon/pipeline.hpp"

#include <algorithm>
#include <cinttypes>
#include <numeric>
#include <optional>

#include "addon/handle.hpp"
#include "addon/memory.hpp"
#include "addon/model.hpp"
#include "addon/selection_table.hpp"
#include "addon/stream_job.hpp"

namespace laprox::addon {
namespace {

// The stages of a call, as lib/native.ts names them; kExhaustive: kSelectCache computes every exact score.
enum Stage : int64_t { kValueNorms = 1, kScore = 2, kSelect = 4, kSelectCache = 8, kCompact = 16, kExhaustive = 32 };

// What comes back as numbers, in the order of lib/native.ts.
enum Number { kTokens, kScores, kStride, kRows, kKeys, kValues, kPositions, kNorms, kTable, kNumbers };

// Scores that lie on the device, and the lengths that the host knows of them.
struct GivenScores {
  explicit GivenScores(Section section) {
    layers = section.int32();
    sequences = section.int32();
    kv_heads = section.int32();
    bytes_per_entry = section.integer();
    stride = section.integer();
    lengths = section.buffer();
    contexts = section.buffer();
    const Section::Place data = section.place();
    const Section::Place positions = section.place();
    if (lengths == nullptr || !data.on_device) fail("INVALID_ARGUMENT", "scores have no lengths or are not on the device");
    data_address = data.address<float>();
    if (positions.on_device) positions_address = positions.address<int32_t>();
  }
  int32_t layers, sequences, kv_heads;
  int64_t bytes_per_entry, stride;
  const Buffer* lengths;
  const Buffer* contexts;
  float* data_address;
  int32_t* positions_address = nullptr;
};

// (device, model, streams, stages, cache, window, score rule, select rule, scores, selection, target, handles, held): sections
// that the stages do not need are null. Handles: those of the tokens, the scores, the rows, the page table. Further buffers:
// [numbers], the selection's table, [counts], page ids.
class Pipeline : public StreamJob {
 public:
  Pipeline(const Napi::CallbackInfo& info, const std::shared_ptr<Device>& device)
      : StreamJob(device, info[12], info[2], "the call"), stages_(info[3].As<Napi::Number>().Int64Value()) {
    if (!info[1].IsNull()) {
      model_ = unwrap<Model>(info[1]);
      if (model_->device() != device) fail("DEVICE_MISMATCH", "the model is on another device");
    }
    if (!info[4].IsNull()) cache_.emplace(section(info[4]));
    if (!info[5].IsNull()) window_.emplace(section(info[5]));
    if (!info[6].IsNull()) score_rule_.emplace(section(info[6]));
    if (!info[7].IsNull()) select_rule_.emplace(section(info[7])).desc.exhaustive = has(kExhaustive) ? 1 : 0;
    if (!info[8].IsNull()) scores_.emplace(section(info[8]));
    read_shape();
    if (!info[9].IsNull()) read_selection(section(info[9]));
    if (!info[10].IsNull()) target_.emplace(section(info[10]), cache_->desc().dtype);
    const Napi::Array handles = info[11].As<Napi::Array>();
    const auto memory = [&](uint32_t index, std::shared_ptr<Memory>& to) {
      if (!handles.Get(index).IsObject()) return;
      to = std::make_shared<Memory>(device, LPX_MEMORY_DEVICE);
      wrap(handles.Get(index).As<Napi::Object>(), to);
    };
    memory(0, tokens_memory_);
    memory(1, scores_memory_);
    memory(2, rows_memory_);
    memory(3, table_memory_);
    numbers_ = elements<double>(next_buffer(), 0, kNumbers);
    table_ = &next_buffer();
    counts_ = &next_buffer();
    pages_ = &next_buffer();
  }

 private:
  bool has(Stage stage) const { return (stages_ & stage) != 0; }
  bool selects() const { return has(kSelect) || has(kSelectCache); }
  bool changes_inputs() const override { return has(kCompact) && target_->in_place(); }
  int64_t segments() const { return int64_t{layers_} * sequences_ * kv_heads_; }
  int64_t row_bytes() const { return int64_t{cache_->desc().head_dim} * (cache_->desc().dtype == LPX_F32 ? 4 : 2); }

  void read_shape() {
    if (cache_) {
      const lpx_cache& cache = cache_->desc();
      layers_ = cache.layers;
      sequences_ = cache.sequences;
      kv_heads_ = cache.kv_heads;
      lengths_ = cache_->lengths();
    } else if (scores_) {
      layers_ = scores_->layers;
      sequences_ = scores_->sequences;
      kv_heads_ = scores_->kv_heads;
      if (layers_ < 1 || sequences_ < 1 || kv_heads_ < 1 || int64_t{layers_} * sequences_ > scores_->lengths->bytes)
        fail("INVALID_ARGUMENT", "scores of %d layers, %d sequences and %d KV heads", layers_, sequences_, kv_heads_);
      const int32_t* lengths = elements<int32_t>(*scores_->lengths, 0, segments());
      lengths_.assign(lengths, lengths + segments());
    } else {
      fail("INVALID_ARGUMENT", "a call has neither a cache nor scores");
    }
    longest_ = *std::max_element(lengths_.begin(), lengths_.end());
  }

  // A selection that was made before: its tokens lie on the device.
  void read_selection(Section section) {
    const Section::Place tokens = section.place();
    selection_.capacity = section.integer();
    const Buffer* offsets = section.buffer();
    if (!tokens.on_device || offsets == nullptr) fail("INVALID_ARGUMENT", "the selection is not on the device");
    selection_.tokens = tokens.address<int32_t>();
    const double* from = elements<double>(*offsets, 0, segments() + 1);
    offsets_.assign(from, from + segments() + 1);
    kept_ = offsets_.back();
  }

  // What the rule keeps of all sequences: it depends on lengths alone. Where positions are the device's, so is what is protected.
  int64_t count_kept() const {
    std::vector<int64_t> offsets(lengths_.size());
    std::exclusive_scan(lengths_.begin(), lengths_.end(), offsets.begin(), int64_t{0});
    lpx_scores scores{};
    scores.size = sizeof scores;
    scores.layers = layers_;
    scores.sequences = sequences_;
    scores.kv_heads = kv_heads_;
    scores.lengths = lengths_.data();
    scores.offsets = offsets.data();
    scores.count = offsets.back() + lengths_.back();
    scores.bytes_per_entry = scores_ ? scores_->bytes_per_entry : 2 * row_bytes();
    lpx_select_rule rule = select_rule_->desc;
    if (scores_ ? scores_->positions_address != nullptr : cache_->has_positions()) {
      rule.sinks = rule.recent = rule.pinned_count = 0;
      rule.pyramid_beta = 0;
    }
    std::vector<int64_t> kept(static_cast<size_t>(sequences_));
    check(lpx_kept_counts(&scores, &rule, kept.data()));
    return std::accumulate(kept.begin(), kept.end(), int64_t{0});
  }

  void enqueue() override {
    if (selects()) kept_ = count_kept();
    if (cache_) cache_->put_on(exchange());
    if (selects()) {
      exchange().output(&selection_.offsets, segments() + 1);
      exchange().output(&report_, 1);
    } else if (!offsets_.empty()) {
      exchange().input(const_cast<const void**>(reinterpret_cast<void**>(&selection_.offsets)), offsets_.data(),
                       static_cast<int64_t>(offsets_.size() * sizeof(int64_t)));
    }
    lpx_scores scores = describe_scores();
    describe_target();
    exchange().send(stream());
    scores.lengths = scores_lengths_;
    scores.context_lengths = scores_contexts_;
    if (selects()) {
      selection_.capacity = kept_;
      selection_.tokens = allocate<int32_t>(tokens_memory_, kept_, kTokens);
    }
    selection_.size = sizeof selection_;
    const lpx_call call = stream_call();

    if (has(kValueNorms)) check(lpx_value_norms(handle(), &cache_->desc(), &call));
    if (has(kScore)) {
      // Positions, where the cache has them, lie behind the scores.
      const bool positions = cache_->has_positions();
      scores.data = allocate<float>(scores_memory_, (positions ? 2 : 1) * scores.count, kScores);
      if (positions) {
        scores.positions = reinterpret_cast<int32_t*>(scores.data + scores.count);
        scores.context_lengths = cache_->desc().context_lengths;
      }
      check(lpx_score(model_->handle(), &cache_->desc(), window(), &score_rule_->desc(layers_), &scores, &call));
    }
    if (has(kSelect)) check(lpx_select(handle(), &scores, &select_rule_->desc, &selection_, report_, &call));
    if (has(kCompact)) allocate_target();
    if (has(kSelectCache) && has(kCompact))
      check(lpx_evict(model_->handle(), &cache_->desc(), window(), &score_rule_->desc(layers_), &select_rule_->desc, &selection_, report_,
                      &target_->desc, &call));
    else if (has(kSelectCache))
      check(lpx_select_cache(model_->handle(), &cache_->desc(), window(), &score_rule_->desc(layers_), &select_rule_->desc, &selection_, report_,
                             &call));
    else if (has(kCompact))
      check(lpx_compact(handle(), &cache_->desc(), &selection_, &target_->desc, &call));
    exchange().receive(stream());
  }

  const lpx_window* window() const { return window_ ? window_->desc() : nullptr; }

  // [segments, stride]
  lpx_scores describe_scores() {
    lpx_scores scores{};
    scores.size = sizeof scores;
    scores.layers = layers_;
    scores.sequences = sequences_;
    scores.kv_heads = kv_heads_;
    const int64_t stride = scores_ ? scores_->stride : (std::max<int64_t>(longest_, 1) + 3) / 4 * 4;
    scores.count = segments() * stride;
    numbers_[kStride] = static_cast<double>(stride);
    if (scores_) {
      scores.data = scores_->data_address;
      scores.positions = scores_->positions_address;
      scores.bytes_per_entry = scores_->bytes_per_entry;
      exchange().input(&scores_lengths_, *scores_->lengths, 0);
      if (scores_->contexts != nullptr) exchange().input(&scores_contexts_, *scores_->contexts, 0);
    } else if (has(kScore)) {
      scores.bytes_per_entry = 2 * row_bytes();
      // Of heads as cache descriptions have them: [layers * segments], in order.
      packed_lengths_ = lengths_;
      exchange().input(reinterpret_cast<const void**>(&scores_lengths_), packed_lengths_.data(), segments() * 4);
    }
    return scores;
  }

  void describe_target() {
    if (!has(kCompact)) return;
    lpx_compaction& to = target_->desc;
    if (to.target == LPX_TO_PAGES) {
      for (size_t i = 0; i < target_->free_lists.size(); ++i) exchange().input(&target_->free_lists[i].pages, *target_->free_list_buffers[i], 0);
      exchange().output(&to.pages_used, to.free_list_count);
      exchange().output(&to.lengths, segments());
    }
    if (to.target == LPX_TO_IN_PLACE) {
      if (to.freed_capacity > 0) exchange().output(&to.freed_pages, to.freed_capacity);
      exchange().output(&to.freed_counts, layers_);
    }
  }

  template <typename T>
  T* allocate(const std::shared_ptr<Memory>& memory, int64_t count, Number number) {
    if (memory == nullptr) fail("INVALID_ARGUMENT", "a call has no handle for its memory");
    T* data = reinterpret_cast<T*>(memory->allocate(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), stream()));
    numbers_[number] = address(data);
    return data;
  }

  static double address(const void* data) { return static_cast<double>(reinterpret_cast<uintptr_t>(data)); }

  void allocate_target() {
    lpx_compaction& to = target_->desc;
    if (to.target == LPX_TO_RAGGED) {
      const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
      const int64_t rows = std::max<int64_t>(kept_, 1);
      const int64_t plane = aligned(rows * row_bytes());
      const int64_t integers = aligned(rows * 4);
      const bool norms = cache_->has_value_norms();
      std::byte* data = allocate<std::byte>(rows_memory_, 2 * plane + integers + (norms ? integers : 0), kKeys);
      lpx_cache_layer flat{};
      flat.key = {data, rows * row_bytes(), row_bytes(), row_bytes(), 0};
      flat.value = {data + plane, rows * row_bytes(), row_bytes(), row_bytes(), 0};
      flat.position = {data + 2 * plane, rows * 4, 4, 4, 0};
      if (norms) flat.value_norm = {data + 2 * plane + integers, rows * 4, 4, 4, 0};
      flat.page_size = static_cast<int32_t>(std::min<int64_t>(rows, INT32_MAX));
      flat.pages_per_row = 1;
      target_->layers.assign(1, flat);
      to.layer = target_->layers.data();
      to.layers = 1;
      numbers_[kRows] = static_cast<double>(kept_);
      numbers_[kValues] = address(flat.value.data);
      numbers_[kPositions] = address(flat.position.data);
      numbers_[kNorms] = address(flat.value_norm.data);
    }
    if (to.target == LPX_TO_PAGES) to.page_table = allocate<int32_t>(table_memory_, segments() * to.table_width, kTable);
  }

  void finish(Napi::Array) override {
    if (selects())
      write_table(elements<double>(*table_, 0, table_length(segments())), exchange().result(selection_.offsets), segments(),
                  *exchange().result(report_));
    if (!has(kCompact) || target_->desc.target == LPX_TO_RAGGED) return;
    const lpx_compaction& to = target_->desc;
    const int64_t* from = exchange().result(to.target == LPX_TO_PAGES ? to.pages_used : to.freed_counts);
    const int64_t lists = to.target == LPX_TO_PAGES ? to.free_list_count : layers_;
    double* counts = elements<double>(*counts_, 0, lists);
    std::copy(from, from + lists, counts);
    if (to.freed_capacity > 0) {
      const int64_t freed = std::accumulate(from, from + lists, int64_t{0});
      std::copy_n(exchange().result(to.freed_pages), freed, elements<int32_t>(*pages_, 0, freed));
    }
  }

  std::string explain(lpx_status status) const override {
    char text[320];
    const int64_t entries = std::accumulate(lengths_.begin(), lengths_.end(), int64_t{0});
    switch (status) {
      case LPX_BUDGET_TOO_SMALL:
        std::snprintf(text, sizeof text,
                      "the budget of %" PRId64 " of %" PRId64
                      " entries is below what is protected in some part of it (sinks %d, recent %d, "
                      "%d pinned range(s); positions are the device's): raise the budget or protect less",
                      kept_, entries, select_rule_->desc.sinks, select_rule_->desc.recent, select_rule_->desc.pinned_count);
        return text;
      case LPX_NON_FINITE:
        return "a score is NaN or infinite: are keys, values, queries and projections finite? nonFinite: 'keep' keeps such entries";
      case LPX_OUT_OF_PAGES: {
        int64_t pages = 0;
        for (const lpx_free_list& list : target_->free_lists) pages += list.count;
        std::snprintf(text, sizeof text, "freePages has %" PRId64 " pages; the %" PRId64 " kept entries need more", pages, kept_);
        return text;
      }
      case LPX_OUT_OF_BOUNDS:
        std::snprintf(text, sizeof text,
                      "the device found a page id, a token or a length that leaves its buffer: page tables, free pages and selected tokens of "
                      "%d layers, %d sequences and %d KV heads",
                      layers_, sequences_, kv_heads_);
        return text;
      case LPX_INVALID_ARGUMENT: return "the device found tokens of the selection, or positions, that do not ascend";
      default: return StreamJob::explain(status);
    }
  }

  const int64_t stages_;
  std::shared_ptr<Model> model_;
  std::optional<CacheArguments> cache_;
  std::optional<WindowArguments> window_;
  std::optional<ScoreRuleArguments> score_rule_;
  std::optional<SelectRuleArguments> select_rule_;
  std::optional<GivenScores> scores_;
  int32_t layers_ = 0, sequences_ = 0, kv_heads_ = 0;
  std::vector<int32_t> lengths_;  // [segments], of the host
  int32_t longest_ = 0;
  std::vector<int32_t> packed_lengths_;
  const int32_t* scores_lengths_ = nullptr;
  const int32_t* scores_contexts_ = nullptr;

  lpx_selection selection_{};
  std::vector<int64_t> offsets_;  // of a given selection
  int64_t kept_ = 0;
  lpx_report* report_ = nullptr;

  std::optional<TargetArguments> target_;

  std::shared_ptr<Memory> tokens_memory_, scores_memory_, rows_memory_, table_memory_;
  double* numbers_;
  const Buffer* table_;
  const Buffer* counts_;
  const Buffer* pages_;
};

}  // namespace

Napi::Value enqueue(const Napi::CallbackInfo& info) { return submit(std::make_unique<Pipeline>(info, unwrap<Device>(info[0]))); }

}  // namespace laprox::addon
