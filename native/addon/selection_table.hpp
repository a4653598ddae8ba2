// How a selection comes back as numbers: [segments + 1] offsets, the report, the bytes of its `fallback`. lib/native.ts has the order.
#pragma once

#include <cstring>

#include "addon/arguments.hpp"

namespace laprox::addon {

inline constexpr int64_t kReportNumbers = 9;
inline constexpr int64_t kFallbackNumbers = sizeof(lpx_report::fallback) / sizeof(double);

inline int64_t table_length(int64_t segments) { return segments + 1 + kReportNumbers + kFallbackNumbers; }

inline void write_table(double* out, const int64_t* offsets, int64_t segments, const lpx_report& report) {
  out = std::copy(offsets, offsets + segments + 1, out);
  *out++ = static_cast<double>(report.entries);
  *out++ = static_cast<double>(report.kept);
  *out++ = static_cast<double>(report.protected_entries);
  *out++ = static_cast<double>(report.non_finite);
  *out++ = report.path;
  *out++ = static_cast<double>(report.candidates);
  *out++ = static_cast<double>(report.exact_scores);
  *out++ = report.score_seconds;
  *out++ = report.select_seconds;
  std::memcpy(out, report.fallback, sizeof report.fallback);
}

}  // namespace laprox::addon
