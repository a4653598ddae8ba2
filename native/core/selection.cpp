#include "core/selection.hpp"

#include <cinttypes>

#include "core/status.hpp"

namespace laprox {

void check_selection(const Cache& cache, const lpx_selection* selection) {
  check_struct(selection, "selection");
  if (selection->offsets == nullptr) fail(LPX_INVALID_ARGUMENT, "selection->offsets is NULL");
  if (selection->offsets[0] != 0) fail(LPX_INVALID_ARGUMENT, "selection->offsets[0] is %" PRId64 "; expected 0", selection->offsets[0]);
  const Segments& segments = cache.segments();
  for (int64_t i = 0; i < segments.count(); ++i) {
    const Segment s = segments.at(i);
    const int64_t begin = selection->offsets[i];
    const int64_t end = selection->offsets[i + 1];
    if (end < begin || end > selection->capacity)
      fail(LPX_OUT_OF_BOUNDS, "selection->offsets[%" PRId64 "] is %" PRId64 "; expected %" PRId64 " to %" PRId64, i + 1, end, begin,
           selection->capacity);
    if (end > begin && selection->tokens == nullptr) fail(LPX_INVALID_ARGUMENT, "selection->tokens is NULL");
    int32_t previous = -1;
    for (int64_t e = begin; e < end; ++e) {
      const int32_t token = selection->tokens[e];
      if (token <= previous || token >= cache.length(i))
        fail(LPX_OUT_OF_BOUNDS, "selected token %d of (layer %d, sequence %d, head %d): expected ascending tokens below %d", token, s.layer,
             s.sequence, s.head, cache.length(i));
      previous = token;
    }
  }
}

}  // namespace laprox
