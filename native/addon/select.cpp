#include "addon/select.hpp"

#include <algorithm>
#include <numeric>

#include "addon/handle.hpp"
#include "addon/job.hpp"
#include "addon/model.hpp"
#include "addon/selection_table.hpp"

namespace laprox::addon {
namespace {

// Given scores. The lengths are copied: JavaScript may change its own while the call runs.
class ScoresArguments {
 public:
  explicit ScoresArguments(Section section) {
    desc.size = sizeof desc;
    desc.layers = section.int32();
    desc.sequences = section.int32();
    desc.kv_heads = section.int32();
    desc.bytes_per_entry = section.integer();
    const Buffer* lengths = section.buffer();
    const Buffer* data = section.buffer();
    const Buffer* positions = section.buffer();
    const Buffer* contexts = section.buffer();
    if (desc.layers < 1 || desc.sequences < 1 || desc.kv_heads < 1 || lengths == nullptr)
      fail("INVALID_ARGUMENT", "scores of %d layers, %d sequences and %d KV heads", desc.layers, desc.sequences, desc.kv_heads);
    // The product fits: no buffer has as many elements.
    if (int64_t{desc.layers} * desc.sequences > lengths->bytes) fail("OUT_OF_BOUNDS", "scores have fewer lengths than segments");
    const int64_t segments = int64_t{desc.layers} * desc.sequences * desc.kv_heads;
    const int32_t* given = elements<int32_t>(*lengths, 0, segments);
    lengths_.assign(given, given + segments);
    offsets_.resize(lengths_.size());
    std::exclusive_scan(lengths_.begin(), lengths_.end(), offsets_.begin(), int64_t{0});
    desc.lengths = lengths_.data();
    desc.offsets = offsets_.data();
    desc.count = offsets_.back() + lengths_.back();
    if (data != nullptr) desc.data = elements<float>(*data, 0, desc.count);
    if (positions != nullptr) desc.positions = elements<int32_t>(*positions, 0, desc.count);
    if (contexts != nullptr) desc.context_lengths = elements<int32_t>(*contexts, 0, desc.sequences);
  }
  ScoresArguments(const ScoresArguments&) = delete;
  ScoresArguments& operator=(const ScoresArguments&) = delete;

  int64_t segments() const { return static_cast<int64_t>(lengths_.size()); }

  lpx_scores desc{};

 private:
  std::vector<int32_t> lengths_;
  std::vector<int64_t> offsets_;
};

class SelectJob : public Job {
 public:
  SelectJob(const Napi::CallbackInfo& info, const std::shared_ptr<Device>& device)
      : Job(device, info[3]), scores_(section(info[1])), rule_(section(info[2])), selection_(next_buffer(), scores_.segments()) {}

  // Ranking takes up to 10 ns a score, mean pooling as much again for each neighbour; a segment that is ranked alone takes
  // 2 µs, a pinned range in it a tenth of one.
  bool brief() const override {
    constexpr int64_t kMost = 2048;
    constexpr int64_t kOfSegment = 256;
    constexpr int64_t kOfRange = 16;
    const int64_t neighbours = rule_.desc.pooling == LPX_POOL_MEAN ? rule_.desc.pooling_width : 1;
    return !device().cuda() && scores_.desc.count * neighbours + scores_.segments() * (kOfSegment + kOfRange * rule_.desc.pinned_count) <= kMost;
  }

 private:
  lpx_status run() override {
    const lpx_status status = lpx_select(device().handle(), &scores_.desc, &rule_.desc, &selection_.desc, &selection_.report, call());
    if (status == LPX_OK) selection_.write();
    return status;
  }

  const ScoresArguments scores_;
  const SelectRuleArguments rule_;
  SelectionOutput selection_;
};

class SelectCacheJob : public Job {
 public:
  SelectCacheJob(const Napi::CallbackInfo& info, std::shared_ptr<Model> model)
      : Job(model->device(), info[5]),
        model_(std::move(model)),
        cache_(section(info[1])),
        window_(section(info[2])),
        score_rule_(section(info[3])),
        select_rule_(section(info[4])),
        selection_(next_buffer(), cache_.segments()) {}

 private:
  lpx_status run() override {
    cache_.copy_tables();
    const lpx_status status = lpx_select_cache(model_->handle(), &cache_.desc(), window_.desc(), &score_rule_.desc(cache_.desc().layers),
                                               &select_rule_.desc, &selection_.desc, &selection_.report, call());
    if (status == LPX_OK) selection_.write();
    return status;
  }

  const std::shared_ptr<Model> model_;
  CacheArguments cache_;
  const WindowArguments window_;
  const ScoreRuleArguments score_rule_;
  const SelectRuleArguments select_rule_;
  SelectionOutput selection_;
};

}  // namespace

// (device, scores, select rule, held); after the sections' buffers: the selection's memory.
Napi::Value select(const Napi::CallbackInfo& info) { return submit(std::make_unique<SelectJob>(info, unwrap<Device>(info[0]))); }

// (model, cache, window, score rule, select rule, held); after the sections' buffers: the selection's memory.
Napi::Value select_cache(const Napi::CallbackInfo& info) { return submit(std::make_unique<SelectCacheJob>(info, unwrap<Model>(info[0]))); }

}  // namespace laprox::addon
