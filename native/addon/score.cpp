#include "addon/score.hpp"

#include <numeric>

#include "addon/handle.hpp"
#include "addon/job.hpp"
#include "addon/model.hpp"
#include "addon/stopwatch.hpp"

namespace laprox::addon {
namespace {

class ScoreJob : public Job {
 public:
  ScoreJob(const Napi::CallbackInfo& info, std::shared_ptr<Model> model)
      : Job(model->device(), info[4]),
        model_(std::move(model)),
        cache_(section(info[1])),
        window_(section(info[2])),
        rule_(section(info[3])),
        lengths_(cache_.lengths()),
        offsets_(lengths_.size()) {
    std::exclusive_scan(lengths_.begin(), lengths_.end(), offsets_.begin(), int64_t{0});
    const int64_t entries = lengths_.empty() ? 0 : offsets_.back() + lengths_.back();
    scores_.size = sizeof scores_;
    scores_.layers = cache_.desc().layers;
    scores_.sequences = cache_.desc().sequences;
    scores_.kv_heads = cache_.desc().kv_heads;
    scores_.data = elements<float>(next_buffer(), 0, entries);
    scores_.count = entries;
    scores_.offsets = offsets_.data();
    scores_.lengths = lengths_.data();
    const Buffer& positions = next_buffer();
    if (positions.bytes > 0) positions_ = elements<int32_t>(positions, 0, entries);
    seconds_ = elements<double>(next_buffer(), 0, 1);
  }

 private:
  lpx_status run() override {
    const Stopwatch stopwatch(seconds_);
    cache_.copy_tables();
    const lpx_status status = lpx_score(model_->handle(), &cache_.desc(), window_.desc(), &rule_.desc(scores_.layers), &scores_, call());
    if (status == LPX_OK && positions_ != nullptr) gather_positions();
    return status;
  }

  // Original positions, laid out as the scores. The core has checked that every row lies inside its plane.
  void gather_positions() const {
    int64_t segment = 0;
    for (int32_t i = 0; i < scores_.layers; ++i) {
      const lpx_cache_layer& layer = cache_.desc().layer[i];
      for (int32_t sequence = 0; sequence < scores_.sequences; ++sequence) {
        for (int32_t head = 0; head < scores_.kv_heads; ++head, ++segment) {
          const auto x = static_cast<size_t>(segment);
          copy_positions(layer, sequence, head, lengths_[x], positions_ + offsets_[x]);
        }
      }
    }
  }

  static void copy_positions(const lpx_cache_layer& layer, int32_t sequence, int32_t head, int32_t length, int32_t* out) {
    const lpx_plane& plane = layer.position;
    if (plane.data == nullptr) {
      std::iota(out, out + length, 0);
      return;
    }
    const int32_t* table =
        layer.page_table == nullptr ? nullptr : layer.page_table + sequence * layer.table_sequence_stride + head * layer.table_head_stride;
    for (int32_t t = 0; t < length; ++t) {
      const int64_t page = table == nullptr ? sequence : table[t / layer.page_size];
      const int64_t slot = t % layer.page_size;
      const auto* row = static_cast<const std::byte*>(plane.data) + page * plane.page_stride + slot * plane.token_stride + head * plane.head_stride;
      out[t] = *reinterpret_cast<const int32_t*>(row);
    }
  }

  const std::shared_ptr<Model> model_;
  CacheArguments cache_;
  const WindowArguments window_;
  const ScoreRuleArguments rule_;
  const std::vector<int32_t> lengths_;
  std::vector<int64_t> offsets_;
  lpx_scores scores_{};
  int32_t* positions_ = nullptr;
  double* seconds_ = nullptr;
};

class ValueNormsJob : public Job {
 public:
  ValueNormsJob(const Napi::CallbackInfo& info, std::shared_ptr<Device> device) : Job(std::move(device), info[2]), cache_(section(info[1])) {}

 private:
  lpx_status run() override {
    cache_.copy_tables();
    return lpx_value_norms(device().handle(), &cache_.desc(), call());
  }

  CacheArguments cache_;
};

}  // namespace

// (device, cache, held)
Napi::Value value_norms(const Napi::CallbackInfo& info) { return submit(std::make_unique<ValueNormsJob>(info, unwrap<Device>(info[0]))); }

// (model, cache, window, score rule, held); after the sections' buffers: scores, positions (or an empty array), seconds.
Napi::Value score(const Napi::CallbackInfo& info) { return submit(std::make_unique<ScoreJob>(info, unwrap<Model>(info[0]))); }

}  // namespace laprox::addon
