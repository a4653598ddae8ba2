#include "cpu/compaction.hpp"

#include <algorithm>
#include <cstring>

#include "core/compaction.hpp"

namespace laprox::cpu {
namespace {

constexpr int64_t kRowsPerTask = 1024;
constexpr int64_t kStreamedBytes = INT64_C(1) << 20;  // of keys: more would push everything else out of the caches
// Kept rows lie too far apart for the hardware to foresee: a row is asked for so many rows before it is moved, for one use.
constexpr int64_t kAhead = 24;

void prefetch(const std::byte* row, size_t bytes) {
  for (size_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 0);
}

// One kind of row on its way from the cache to where it is kept.
struct Plane {
  Rows from;
  Rows to;
  size_t row_bytes = 0;
};

// Where kept rows of a segment go. The target's planes as a layer with one head and, for pages, this segment's table.
Rows target_rows(const lpx_plane& plane, lpx_cache_layer layer, const int32_t* table) {
  layer.page_table = table;
  layer.table_sequence_stride = 0;
  layer.table_head_stride = 0;
  return Rows(plane, layer, 0, 0);
}

class Move {
 public:
  Move(const Kernels& kernels, const Cache& cache, const lpx_selection& selection, const lpx_compaction& target, int64_t index)
      : kernels_(kernels),
        tokens_(selection.tokens + selection.offsets[index]),
        streamed_(target.target != LPX_TO_IN_PLACE && selection.offsets[cache.segments().count()] * cache.row_bytes() > kStreamedBytes) {
    const Segment segment = cache.segments().at(index);
    const lpx_cache_layer& from = cache.layer(segment.layer);
    lpx_cache_layer to = from;
    const int32_t* table = nullptr;
    int64_t first = 0;
    if (target.target == LPX_TO_RAGGED) {
      to = target.layer[0];
      to.page_size = INT32_MAX;
      first = selection.offsets[index];
    } else if (target.target == LPX_TO_PAGES) {
      to = target.layer[segment.layer];
      table = target.page_table + index * target.table_width;
    }
    const auto add = [&](const lpx_plane& source, lpx_plane plane, size_t bytes) {
      if (source.data == nullptr || plane.data == nullptr) return;
      const Rows rows(source, from, segment.sequence, segment.head);
      plane.data = static_cast<std::byte*>(plane.data) + first * plane.token_stride;
      planes_[plane_count_++] = {rows, target.target == LPX_TO_IN_PLACE ? rows : target_rows(plane, to, table), bytes};
    };
    add(from.key, to.key, static_cast<size_t>(cache.row_bytes()));
    add(from.value, to.value, static_cast<size_t>(cache.row_bytes()));
    add(from.value_norm, to.value_norm, 4);
    if (from.position.data != nullptr) {
      add(from.position, to.position, 4);
    } else if (to.position.data != nullptr) {
      lpx_plane plane = to.position;
      plane.data = static_cast<std::byte*>(plane.data) + first * plane.token_stride;
      fresh_positions_ = target_rows(plane, to, table);
      has_fresh_positions_ = true;
    }
  }

  // Kept rows [begin, end) of the segment, ascending.
  void rows(int64_t begin, int64_t end) const {
    for (int p = 0; p < plane_count_; ++p) {
      const Plane& plane = planes_[p];
      const std::byte* next[kAhead];
      const auto ask = [&](int64_t i) {
        next[i % kAhead] = plane.from(tokens_[i]);
        prefetch(next[i % kAhead], plane.row_bytes);
      };
      for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i) ask(i);
      for (int64_t i = begin; i < end; ++i) {
        const std::byte* from = next[i % kAhead];
        std::byte* to = plane.to(i);
        if (streamed_)
          kernels_.stream(to, from, static_cast<int64_t>(plane.row_bytes));
        else if (to != from)
          std::memcpy(to, from, plane.row_bytes);
        if (i + kAhead < end) ask(i + kAhead);
      }
    }
    if (streamed_) kernels_.end_stream();
    if (!has_fresh_positions_) return;
    for (int64_t i = begin; i < end; ++i) *reinterpret_cast<int32_t*>(fresh_positions_(i)) = tokens_[i];
  }

 private:
  const Kernels& kernels_;
  const int32_t* tokens_;
  Plane planes_[4];
  int plane_count_ = 0;
  Rows fresh_positions_;  // the positions of a cache that has none are its token indices
  bool has_fresh_positions_ = false;
  bool streamed_;
};

void take_pages(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) {
  std::fill_n(target.pages_used, target.free_list_count, 0);
  for (int64_t i = 0; i < cache.segments().count(); ++i) {
    const int layer = cache.segments().at(i).layer;
    const int list = target.free_list_count == 1 ? 0 : layer;
    int32_t* table = target.page_table + i * target.table_width;
    const int64_t pages = pages_for(selection.offsets[i + 1] - selection.offsets[i], target.layer[layer].page_size);
    for (int64_t p = 0; p < target.table_width; ++p) table[p] = p < pages ? target.free_lists[list].pages[target.pages_used[list]++] : -1;
  }
}

// Pages whose every row has moved away: behind the longest kept segment that uses them.
void list_freed_pages(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) {
  int64_t listed = 0;
  for (int l = 0; l < cache.segments().layers; ++l) {
    const lpx_cache_layer& layer = cache.layer(l);
    const int64_t before = listed;
    const bool shared = layer.table_head_stride == 0;
    for (int sequence = 0; sequence < cache.segments().sequences && layer.page_table != nullptr; ++sequence) {
      int64_t kept = 0;
      int64_t used = 0;
      for (int head = 0; head < cache.segments().heads; ++head) {
        const int64_t index = cache.segments().index({l, sequence, head});
        kept = std::max(shared ? kept : 0, pages_for(selection.offsets[index + 1] - selection.offsets[index], layer.page_size));
        used = std::max(shared ? used : 0, pages_for(cache.length(index), layer.page_size));
        if (shared && head + 1 < cache.segments().heads) continue;
        const int32_t* table = layer.page_table + sequence * layer.table_sequence_stride + head * layer.table_head_stride;
        for (int64_t p = kept; p < used; ++p) target.freed_pages[listed++] = table[p];
      }
    }
    target.freed_counts[l] = listed - before;
  }
}

}  // namespace

void compact(Pool& pool, const Kernels& kernels, const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) {
  const int64_t segments = cache.segments().count();
  if (target.target == LPX_TO_PAGES) take_pages(cache, selection, target);
  if (target.target == LPX_TO_IN_PLACE) {
    // Rows move towards the front, so one thread a segment walks forward.
    pool.run(segments, [&](int64_t i, int) { Move(kernels, cache, selection, target, i).rows(0, selection.offsets[i + 1] - selection.offsets[i]); });
    if (target.freed_pages != nullptr) list_freed_pages(cache, selection, target);
  } else {
    std::vector<std::pair<int64_t, int64_t>> tasks;
    for (int64_t i = 0; i < segments; ++i)
      for (int64_t first = 0; first < selection.offsets[i + 1] - selection.offsets[i]; first += kRowsPerTask) tasks.emplace_back(i, first);
    pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t task, int) {
      const auto [segment, first] = tasks[static_cast<size_t>(task)];
      const int64_t kept = selection.offsets[segment + 1] - selection.offsets[segment];
      Move(kernels, cache, selection, target, segment).rows(first, std::min(first + kRowsPerTask, kept));
    });
  }
  if (target.lengths == nullptr) return;
  for (int64_t i = 0; i < segments; ++i) target.lengths[i] = static_cast<int32_t>(selection.offsets[i + 1] - selection.offsets[i]);
}

}  // namespace laprox::cpu
