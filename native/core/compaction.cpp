#include "core/compaction.hpp"

#include <algorithm>
#include <cinttypes>
#include <vector>

#include "core/selection.hpp"
#include "core/status.hpp"

namespace laprox {
namespace {

struct Interval {
  uintptr_t begin;
  uintptr_t end;
  bool operator<(const Interval& other) const { return begin < other.begin; }
};

// `rows` rows in slots of one page.
void check_target_page(const lpx_plane& plane, const char* name, int64_t page, int64_t rows, int64_t row_bytes) {
  if (rows == 0) return;
  if (page < 0 || span_bytes({{page, plane.page_stride}, {rows - 1, plane.token_stride}}, row_bytes) > plane.bytes)
    fail(LPX_OUT_OF_BOUNDS, "%" PRId64 " rows in page %" PRId64 " leave the target's %s buffer of %" PRId64 " bytes", rows, page, name, plane.bytes);
}

void check_target_plane(const lpx_plane& plane, const char* name, int64_t row_bytes, int64_t element) {
  if (plane.data == nullptr) fail(LPX_INVALID_ARGUMENT, "target->layer has no %s plane", name);
  if (plane.token_stride < row_bytes || plane.page_stride < 0 || plane.token_stride % element != 0 || plane.page_stride % element != 0 ||
      reinterpret_cast<uintptr_t>(plane.data) % static_cast<uintptr_t>(element) != 0)
    fail(LPX_INVALID_ARGUMENT,
         "the target's %s plane: token stride %" PRId64 ", page stride %" PRId64 "; expected multiples of %" PRId64 ", rows of %" PRId64
         " bytes apart",
         name, plane.token_stride, plane.page_stride, element, row_bytes);
}

void add_rows(std::vector<Interval>& intervals, const lpx_plane& plane, int64_t page, int64_t head, int64_t rows, int64_t row_bytes) {
  if (rows == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(plane.data) + static_cast<uintptr_t>(page * plane.page_stride + head * plane.head_stride);
  if (plane.token_stride == row_bytes) {
    intervals.push_back({begin, begin + static_cast<uintptr_t>(rows * row_bytes)});
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const uintptr_t row = begin + static_cast<uintptr_t>(i * plane.token_stride);
    intervals.push_back({row, row + static_cast<uintptr_t>(row_bytes)});
  }
}

bool same_rows(const lpx_plane& a, const lpx_plane& b) {
  return a.data == b.data && a.page_stride == b.page_stride && a.token_stride == b.token_stride;
}

// Whether target rows may overlap each other or source rows: whether buffers share memory, but for one pool of all layers
// whose pages come from one list.
bool may_overlap(const Cache& cache, const lpx_compaction& target) {
  std::vector<lpx_plane> planes;
  for (int i = 0; i < target.layers; ++i) {
    const bool shared = i > 0 && target.free_list_count == 1 && same_rows(target.layer[i].key, target.layer[0].key) &&
                        same_rows(target.layer[i].value, target.layer[0].value);
    if (shared) continue;
    planes.push_back(target.layer[i].key);
    planes.push_back(target.layer[i].value);
  }
  for (size_t i = 0; i < planes.size(); ++i) {
    for (size_t j = 0; j < i; ++j)
      if (overlaps(planes[i].data, planes[i].bytes, planes[j].data, planes[j].bytes)) return true;
    for (int l = 0; l < cache.desc().layers; ++l)
      for (const lpx_plane* from : {&cache.layer(l).key, &cache.layer(l).value})
        if (overlaps(planes[i].data, planes[i].bytes, from->data, from->bytes)) return true;
  }
  return false;
}

void check_overlap(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) {
  const lpx_cache& desc = cache.desc();
  if (!may_overlap(cache, target)) return;

  std::vector<Interval> sources;
  std::vector<Interval> targets;
  const Segments& segments = cache.segments();
  std::vector<int64_t> used(static_cast<size_t>(std::max(target.free_list_count, 1)), 0);
  for (int64_t i = 0; i < segments.count(); ++i) {
    const Segment s = segments.at(i);
    const lpx_cache_layer& layer = desc.layer[s.layer];
    const int32_t* table =
        layer.page_table == nullptr ? nullptr : layer.page_table + s.sequence * layer.table_sequence_stride + s.head * layer.table_head_stride;
    for (int64_t first = 0, page = 0; first < cache.length(i); first += layer.page_size, ++page) {
      const int64_t rows = std::min<int64_t>(layer.page_size, cache.length(i) - first);
      const int64_t id = table == nullptr ? s.sequence : table[page];
      add_rows(sources, layer.key, id, s.head, rows, cache.row_bytes());
      add_rows(sources, layer.value, id, s.head, rows, cache.row_bytes());
    }
    const int64_t kept = selection.offsets[i + 1] - selection.offsets[i];
    if (target.target == LPX_TO_RAGGED) {
      for (const lpx_plane* plane : {&target.layer[0].key, &target.layer[0].value}) {
        lpx_plane rows = *plane;
        rows.data = static_cast<std::byte*>(plane->data) + selection.offsets[i] * plane->token_stride;
        add_rows(targets, rows, 0, 0, kept, cache.row_bytes());
      }
    } else {
      const lpx_cache_layer& to = target.layer[s.layer];
      const size_t list = target.free_list_count == 1 ? 0 : static_cast<size_t>(s.layer);
      for (int64_t first = 0; first < kept; first += to.page_size) {
        const int64_t id = target.free_lists[list].pages[used[list]++];
        const int64_t rows = std::min<int64_t>(to.page_size, kept - first);
        add_rows(targets, to.key, id, 0, rows, cache.row_bytes());
        add_rows(targets, to.value, id, 0, rows, cache.row_bytes());
      }
    }
  }
  std::sort(sources.begin(), sources.end());
  std::sort(targets.begin(), targets.end());
  for (size_t i = 1; i < targets.size(); ++i)
    if (targets[i].begin < targets[i - 1].end)
      fail(LPX_OVERLAP, "rows of the target overlap each other: is a free page listed twice, or are key and value one buffer?");
  size_t next = 0;
  uintptr_t reach = 0;
  for (const Interval& to : targets) {
    while (next < sources.size() && sources[next].begin < to.end) reach = std::max(reach, sources[next++].end);
    if (reach > to.begin)
      fail(LPX_OVERLAP, "rows of the target overlap rows of the source: compact to memory that the cache does not use, or in place");
  }
}

void check_ragged(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) {
  if (target.layer == nullptr || target.layers != 1)
    fail(LPX_INVALID_ARGUMENT, "target->layers is %d; a ragged target has one set of planes", target.layers);
  const int64_t rows = selection.offsets[cache.segments().count()];
  const auto element = static_cast<int64_t>(element_size(cache.dtype()));
  const lpx_cache_layer& to = target.layer[0];
  check_target_plane(to.key, "key", cache.row_bytes(), element);
  check_target_plane(to.value, "value", cache.row_bytes(), element);
  check_target_page(to.key, "key", 0, rows, cache.row_bytes());
  check_target_page(to.value, "value", 0, rows, cache.row_bytes());
  if (to.position.data != nullptr) {
    check_target_plane(to.position, "position", 4, 4);
    check_target_page(to.position, "position", 0, rows, 4);
  }
  if (to.value_norm.data != nullptr) {
    check_target_plane(to.value_norm, "value_norm", 4, 4);
    check_target_page(to.value_norm, "value_norm", 0, rows, 4);
  }
}

void check_pages(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) {
  const Segments& segments = cache.segments();
  if (target.layer == nullptr || target.layers != segments.layers)
    fail(LPX_INVALID_ARGUMENT, "target->layers is %d; pages need one set of planes a layer, %d", target.layers, segments.layers);
  if (target.free_lists == nullptr || (target.free_list_count != 1 && target.free_list_count != segments.layers))
    fail(LPX_INVALID_ARGUMENT, "target->free_list_count is %d; expected 1 or one a layer, %d", target.free_list_count, segments.layers);
  if (target.page_table == nullptr || target.lengths == nullptr || target.pages_used == nullptr)
    fail(LPX_INVALID_ARGUMENT, "target->page_table, lengths and pages_used are required for pages");
  const auto element = static_cast<int64_t>(element_size(cache.dtype()));
  std::vector<int64_t> used(static_cast<size_t>(target.free_list_count), 0);
  for (int64_t i = 0; i < segments.count(); ++i) {
    const Segment s = segments.at(i);
    const lpx_cache_layer& to = target.layer[s.layer];
    if (to.page_size < 1) fail(LPX_INVALID_ARGUMENT, "target->layer[%d].page_size is %d; expected 1 or more", s.layer, to.page_size);
    check_target_plane(to.key, "key", cache.row_bytes(), element);
    check_target_plane(to.value, "value", cache.row_bytes(), element);
    if (to.position.data != nullptr) check_target_plane(to.position, "position", 4, 4);
    if (to.value_norm.data != nullptr) check_target_plane(to.value_norm, "value_norm", 4, 4);
    const int64_t kept = selection.offsets[i + 1] - selection.offsets[i];
    const int64_t pages = pages_for(kept, to.page_size);
    if (pages > target.table_width)
      fail(LPX_OUT_OF_BOUNDS, "(layer %d, sequence %d, head %d) keeps %" PRId64 " rows in %" PRId64 " pages; the table has room for %d", s.layer,
           s.sequence, s.head, kept, pages, target.table_width);
    const size_t list = target.free_list_count == 1 ? 0 : static_cast<size_t>(s.layer);
    const lpx_free_list& free_list = target.free_lists[list];
    if (used[list] + pages > free_list.count)
      fail(LPX_OUT_OF_PAGES, "the free list of %s has %" PRId64 " pages; the kept rows need more (at layer %d, sequence %d, head %d)",
           target.free_list_count == 1 ? "all layers" : "this layer", free_list.count, s.layer, s.sequence, s.head);
    for (int64_t p = 0; p < pages; ++p) {
      const int64_t id = free_list.pages[used[list]++];
      const int64_t rows = std::min<int64_t>(to.page_size, kept - p * to.page_size);
      check_target_page(to.key, "key", id, rows, cache.row_bytes());
      check_target_page(to.value, "value", id, rows, cache.row_bytes());
      if (to.position.data != nullptr) check_target_page(to.position, "position", id, rows, 4);
      if (to.value_norm.data != nullptr) check_target_page(to.value_norm, "value_norm", id, rows, 4);
    }
  }
  for (size_t list = 0; list < used.size(); ++list) {
    std::vector<int32_t> pages(target.free_lists[list].pages, target.free_lists[list].pages + used[list]);
    std::sort(pages.begin(), pages.end());
    const auto twice = std::adjacent_find(pages.begin(), pages.end());
    if (twice != pages.end()) fail(LPX_OVERLAP, "page %d is listed twice in free list %zu", *twice, list);
  }
}

void check_in_place(const Cache& cache, const lpx_compaction& target) {
  for (int i = 0; i < cache.segments().layers; ++i)
    if (!cache.has_positions(i))
      fail(LPX_INVALID_ARGUMENT, "layer %d has no position plane: a compaction in place needs one to keep the original positions in", i);
  if (target.freed_pages != nullptr && target.freed_counts == nullptr) fail(LPX_INVALID_ARGUMENT, "target->freed_counts is NULL");
  int64_t freeable = 0;
  for (int l = 0; l < cache.segments().layers; ++l) {
    const lpx_cache_layer& layer = cache.layer(l);
    if (layer.page_table == nullptr) continue;
    // (page, head) of every page; heads of one page are apart where the planes have a head stride.
    std::vector<std::pair<int32_t, int>> pages;
    for (int sequence = 0; sequence < cache.segments().sequences; ++sequence) {
      for (int head = 0; head < cache.segments().heads; ++head) {
        const int32_t* table = layer.page_table + sequence * layer.table_sequence_stride + head * layer.table_head_stride;
        const int64_t used = pages_for(cache.length(cache.segments().index({l, sequence, head})), layer.page_size);
        for (int64_t p = 0; p < used; ++p) pages.emplace_back(table[p], layer.key.head_stride > 0 ? head : 0);
        if (layer.table_head_stride != 0 || head == 0) freeable += used;
      }
    }
    // Ragged rows have tables of first rows, not of pages: equal ones are empty segments or overlaps of the caller's making.
    std::sort(pages.begin(), pages.end());
    const auto twice = std::adjacent_find(pages.begin(), pages.end());
    if (twice != pages.end())
      fail(LPX_OVERLAP, "page %d of layer %d is used twice: pages that sequences share cannot be compacted in place", twice->first, l);
  }
  if (target.freed_pages != nullptr && target.freed_capacity < freeable)
    fail(LPX_OUT_OF_BOUNDS, "target->freed_capacity is %" PRId64 "; up to %" PRId64 " pages may be freed", target.freed_capacity, freeable);
}

}  // namespace

int64_t pages_for(int64_t rows, int64_t page_size) { return (rows + page_size - 1) / page_size; }

void check_compaction(const Cache& cache, const lpx_selection* selection, const lpx_compaction* target) {
  check_struct(target, "target");
  check_selection(cache, selection);
  switch (target->target) {
    case LPX_TO_RAGGED: check_ragged(cache, *selection, *target); break;
    case LPX_TO_PAGES: check_pages(cache, *selection, *target); break;
    case LPX_TO_IN_PLACE: check_in_place(cache, *target); return;
    default:
      fail(LPX_INVALID_ARGUMENT, "target->target is %d; expected LPX_TO_RAGGED, LPX_TO_PAGES or LPX_TO_IN_PLACE", static_cast<int>(target->target));
  }
  check_overlap(cache, *selection, *target);
}

}  // namespace laprox
