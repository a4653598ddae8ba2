#include <algorithm>

#include "core/geometry.hpp"
#include "cuda/kernels/compact.cuh"
#include "cuda/launch/compact.hpp"

namespace laprox::cuda {
namespace {

PlaneView view(const lpx_plane& plane) { return {static_cast<char*>(plane.data), plane.page_stride, plane.token_stride, plane.head_stride}; }

TargetLayer target_layer(const TargetPlanes& planes) {
  TargetLayer to{};
  to.key = view(planes.key);
  to.value = view(planes.value);
  to.position = view(planes.position);
  to.value_norm = view(planes.value_norm);
  to.key_bytes = planes.key.bytes;
  to.value_bytes = planes.value.bytes;
  to.position_bytes = planes.position.bytes;
  to.value_norm_bytes = planes.value_norm.bytes;
  to.page_size = planes.page_size;
  return to;
}

}  // namespace

Compact::Compact(Arena& arena, const Geometry& shape, lpx_dtype dtype, const CompactTarget& target, bool check_tokens)
    : row_bytes_(static_cast<int32_t>(element_size(dtype)) * shape.head_dim), check_tokens_(check_tokens) {
  if (target.target == LPX_TO_PAGES) layers_ = arena.take<TargetLayer>(std::max<int64_t>(shape.layers, 1));
  if (target.target != LPX_TO_RAGGED) first_ = arena.take<int64_t>(shape.segments);
}

void Compact::run(const Launch& launch, const Geometry& from, const lpx_selection& selection, const CompactTarget& target) const {
  Move move{};
  move.from = from;
  move.tokens = selection.tokens;
  move.offsets = selection.offsets;
  move.capacity = selection.capacity;
  move.target = target.target;
  move.layer = layers_;
  move.row_bytes = row_bytes_;
  move.lengths = target.lengths;
  move.page_table = target.page_table;
  move.table_width = target.table_width;
  move.pages_used = target.pages_used;
  move.free_lists = static_cast<int32_t>(target.free_lists.size());
  move.first_page = first_;
  move.freed_pages = target.freed_pages;
  move.freed_capacity = target.freed_capacity;
  move.freed_counts = target.freed_counts;
  move.first_freed = first_;
  const auto segments = static_cast<unsigned>(from.segments);
  const unsigned rows_of_grid = std::min(segments, 65535u);

  if (check_tokens_) {
    launch.run("compact", laprox::cuda::check_tokens,
               dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(std::max(from.max_length, 1), 4096), 64)), rows_of_grid), 256, 0, move);
  }
  if (target.target == LPX_TO_RAGGED) move.flat = target_layer(target.planes[0]);
  for (size_t first = 0; target.target == LPX_TO_PAGES && first < target.planes.size(); first += TargetChunk::kSize) {
    TargetChunk chunk{};
    const size_t count = std::min<size_t>(TargetChunk::kSize, target.planes.size() - first);
    for (size_t i = 0; i < count; ++i) {
      chunk.layer[i] = target_layer(target.planes[first + i]);
      const lpx_free_list& list = target.free_lists[target.free_lists.size() == 1 ? 0 : first + i];
      chunk.layer[i].free_pages = list.pages;
      chunk.layer[i].free_count = list.count;
    }
    launch.run("compact", store_targets, 1, TargetChunk::kSize, 0, chunk, static_cast<int>(count), layers_ + first);
  }
  const unsigned blocks = static_cast<unsigned>(launch.multiprocessors) * 8;
  switch (target.target) {
    case LPX_TO_RAGGED: launch.run("compact", move_rows, blocks, kMoveThreads, 0, move); break;
    case LPX_TO_PAGES:
      launch.run("compact", plan_pages, 1, kListThreads, 0, move);
      launch.run("compact", fill_tables, segments, 256, 0, move);
      launch.run("compact", move_rows, blocks, kMoveThreads, 0, move);
      break;
    case LPX_TO_IN_PLACE:
      if (target.freed_pages != nullptr) {
        launch.run("compact", plan_freed, 1, kListThreads, 0, move);
        launch.run("compact", list_freed, dim3(8, rows_of_grid), 256, 0, move);
      }
      launch.run("compact", move_in_place, dim3(segments, 3), kInPlaceThreads, 0, move);
      break;
  }
}

}  // namespace laprox::cuda
