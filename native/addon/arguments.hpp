// Reads the flat numbers that lib/ writes: the records are described in lib/native.ts, field by field in this order. Every
// pointer made here lies inside the typed array it came from.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "addon/buffers.hpp"
#include "addon/exchange.hpp"

namespace laprox::addon {

// An address on a device, or a stream's or event's handle: JavaScript hands them over as numbers.
template <typename T>
T* pointer_to(int64_t address) {
  return std::bit_cast<T*>(static_cast<uintptr_t>(address));
}

// One Float64Array of numbers, and the typed arrays that belong to it: `count` of them from the next one on, where `count`
// is its first number.
class Section {
 public:
  // `next` is the first of the call's buffers that no section before has taken. `on_device`: planes and the like are memory of
  // a GPU, which records name by kOnDevice and an address.
  Section(Napi::Value numbers, const Buffers& buffers, size_t& next, bool on_device);

  double real();
  int64_t integer();
  int32_t int32();
  template <typename Enum>
  Enum choice() {
    return static_cast<Enum>(int32());
  }
  // A buffer's index, or nothing for -1.
  const Buffer* buffer();
  // A buffer's index and a number: the buffer, or nothing for -1, or nothing and `on_device` for kOnDevice. The number is the
  // offset in the buffer, or the address on the device.
  struct Place {
    const Buffer* buffer;
    bool on_device;
    int64_t offset;
    template <typename T>
    T* address() const {
      return pointer_to<T>(offset);
    }
  };
  Place place();
  bool on_device() const { return on_device_; }

 private:
  const double* at_ = nullptr;
  const double* end_ = nullptr;
  const Buffers& buffers_;
  size_t first_;
  size_t count_ = 0;
  bool on_device_;
};

// Stands for a buffer's index.
inline constexpr int64_t kOnDevice = -2;

// `count` elements of `T` from element `offset` on. Throws where the buffer is of another type or has fewer.
template <typename T>
T* elements(const Buffer& buffer, int64_t offset, int64_t count);

// A record of (buffer, byte offset, bytes): memory inside one typed array of the element type of `dtype`.
struct Bytes {
  std::byte* data = nullptr;  // null: absent
  int64_t bytes = 0;
};

struct ModelArguments {
  explicit ModelArguments(Section section);
  lpx_model_desc desc{};
  int64_t factor_bytes() const;
  // For a GPU: the layers whose projections are the host's, which are to be uploaded.
  std::vector<lpx_layer*> on_host;

 private:
  std::vector<lpx_layer> layers_;
  std::vector<float> sink_logits_;
};

class CacheArguments {
 public:
  explicit CacheArguments(Section section);
  CacheArguments(const CacheArguments&) = delete;
  CacheArguments& operator=(const CacheArguments&) = delete;

  // Copies the page tables, so that JavaScript that changes them while the call runs cannot lead it astray.
  void copy_tables();
  // For a GPU: lengths, context lengths and page tables of the host go up with the exchange. Lengths are read before.
  void put_on(Exchange& exchange);
  bool has_positions() const;
  bool has_value_norms() const;
  const lpx_cache& desc() const { return desc_; }
  int64_t segments() const { return int64_t{desc_.layers} * desc_.sequences * desc_.kv_heads; }
  std::vector<int32_t> lengths() const;

 private:
  struct Integers {
    const Buffer* buffer;  // null: on the device, or there are none
    int64_t offset;        // elements
  };

  lpx_cache desc_{};
  std::vector<lpx_cache_layer> layers_;
  std::vector<std::vector<int32_t>> tables_;
  Integers contexts_{};
  std::vector<Integers> table_places_;   // [layers]
  std::vector<Integers> length_places_;  // [layers]
};

class WindowArguments {
 public:
  explicit WindowArguments(Section section);
  WindowArguments(const WindowArguments&) = delete;
  WindowArguments& operator=(const WindowArguments&) = delete;
  // Null where the call has none.
  const lpx_window* desc() const { return desc_.layer == nullptr ? nullptr : &desc_; }

 private:
  lpx_window desc_{};
  std::vector<lpx_window_layer> layers_;
};

class ScoreRuleArguments {
 public:
  explicit ScoreRuleArguments(Section section);
  ScoreRuleArguments(const ScoreRuleArguments&) = delete;
  ScoreRuleArguments& operator=(const ScoreRuleArguments&) = delete;
  // Checks the number of layer weights.
  const lpx_score_rule& desc(int32_t layers) const;

 private:
  lpx_score_rule desc_{};
  std::vector<float> weights_;
};

class SelectRuleArguments {
 public:
  explicit SelectRuleArguments(Section section);
  SelectRuleArguments(const SelectRuleArguments&) = delete;
  SelectRuleArguments& operator=(const SelectRuleArguments&) = delete;
  lpx_select_rule desc{};

 private:
  std::vector<lpx_range> pinned_;
};

// Tokens and offsets are copied before they are used: JavaScript may change its own while the call runs.
class SelectionArguments {
 public:
  SelectionArguments(Section section, int64_t segments);
  SelectionArguments(const SelectionArguments&) = delete;
  SelectionArguments& operator=(const SelectionArguments&) = delete;
  void copy();
  lpx_selection desc{};

 private:
  const int32_t* given_tokens_;
  int64_t given_count_;
  const double* given_offsets_;
  int64_t segments_;
  std::vector<int32_t> tokens_;
  std::vector<int64_t> offsets_;
};

// Where a compaction puts rows. What it tells is left to the caller.
struct TargetArguments {
  TargetArguments(Section section, lpx_dtype dtype);
  TargetArguments(const TargetArguments&) = delete;
  TargetArguments& operator=(const TargetArguments&) = delete;
  bool in_place() const { return desc.target == LPX_TO_IN_PLACE; }
  lpx_compaction desc{};
  std::vector<lpx_cache_layer> layers;
  std::vector<lpx_free_list> free_lists;
  std::vector<const Buffer*> free_list_buffers;
};

// Four planes: key, value, position, value norm.
void read_planes(Section& section, lpx_dtype dtype, lpx_cache_layer& layer);

}  // namespace laprox::addon
