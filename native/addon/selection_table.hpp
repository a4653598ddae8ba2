// How a selection comes back as numbers: [segments + 1] offsets, the report, the bytes of its `fallback`. lib/native.ts has the order.
#pragma once

#include <cstring>
#include <vector>

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

// A selection that a call on a CPU device writes to one Float64Array: the table, and behind it the tokens.
class SelectionOutput {
 public:
  SelectionOutput(const Buffer& memory, int64_t segments) : offsets_(static_cast<size_t>(segments) + 1) {
    const int64_t table = table_length(segments);
    const int64_t tokens = memory.bytes / 8 - table;
    if (tokens < 0) fail("OUT_OF_BOUNDS", "a selection's memory has %lld bytes", static_cast<long long>(memory.bytes));
    table_ = elements<double>(memory, 0, table + tokens);
    desc.size = sizeof desc;
    desc.tokens = reinterpret_cast<int32_t*>(table_ + table);
    desc.capacity = 2 * tokens;
    desc.offsets = offsets_.data();
    report.size = sizeof report;
  }
  SelectionOutput(const SelectionOutput&) = delete;
  SelectionOutput& operator=(const SelectionOutput&) = delete;

  // Once `desc` and `report` are there.
  void write() const { write_table(table_, offsets_.data(), static_cast<int64_t>(offsets_.size()) - 1, report); }

  lpx_selection desc{};
  lpx_report report{};

 private:
  std::vector<int64_t> offsets_;
  double* table_ = nullptr;
};

}  // namespace laprox::addon
