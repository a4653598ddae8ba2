// The window's attention on a cache: log-sum-exps and, for bounds, roots of sums of squares (kernels/scan.cuh has the formulas).
#pragma once

#include "cuda/kernels/exact_queries.cuh"
#include "cuda/kernels/scan.cuh"
#include "cuda/kernels/scan_statistic.cuh"
#include "cuda/launch/launch.hpp"
#include "cuda/launch/path.hpp"

namespace laprox::cuda {

// What a call hands over, for all layers.
struct Known {
  bool norms;     // ||v|| of every row
  bool log_sums;  // log-sum-exps of the window: bounds are tight from the begin
};

class Attention {
 public:
  // roots: whether they are wanted. The sums over tokens are the same with and without.
  Attention(Arena& arena, const Geometry& shape, lpx_dtype cache, lpx_dtype window, const Known& known, bool roots, Path path);

  // The reference points: one launch, beside which the next one may work. False where there is nothing to do at all.
  bool sample(const Launch& launch, const Geometry& g) const;
  // What is left after `sample`: the scan, its end, and the repair of outgrown references, which ends at once where there are none. Where all
  // log-sum-exps are given, the end is beside the scan, which is for roots alone.
  void scan(const Launch& launch, const Geometry& g, const PackedQueries& packed) const;

  // Whether `tighten` can be called.
  bool tightens() const { return path_ == Path::kHopper; }
  // Reads the keys of listed tokens again: raises scores that are negated bounds to those from exact attention, and returns true; or, where panels
  // have but some of the heads, leaves ||a_h|| of them in `roots`, within exact_inflation. `tokens` [segments][stride], `counts` [segments]; they
  // are numbered in tiles of kScanTile in first_tile(). After `scan`.
  bool tighten(const Launch& launch, const Geometry& g, const int32_t* tokens, const int32_t* counts, BoundTerms terms, float* scores) const;

  // Whether `score` serves the rule.
  bool scores(const lpx_score_rule& rule) const;
  // scores = the group's attention statistic of every token, from one more read of K a panel. After `scan`.
  void score(const Launch& launch, const Geometry& g, const lpx_score_rule& rule, bool weigh, float* scores) const;

  int32_t* first_tile() const { return view_.first_tile; }

  // [segments][R * m], row h * m + q, in base 2: given or computed, sink logits included; +inf for rows that do not exist or
  // see nothing.
  const float* log_sums() const { return log_sums_; }
  // [segments][panels][stride][panel heads]: roots of the sums of e^2 over the rows; +inf where one overflowed.
  const __nv_bfloat16* roots() const { return view_.roots; }
  int panels() const { return view_.panels; }
  int panel_heads() const { return view_.panel_heads(); }
  const Range* ranges() const { return view_.ranges; }
  // [segments][R]: ||a_h[:,i]|| <= inflation * roots, with a margin for rounding.
  const float* inflation() const { return inflation_; }
  // The same for what `tighten` left.
  const float* exact_inflation() const { return exact_inflation_; }

 private:
  ScanView view(const Geometry& g) const;

  lpx_dtype cache_;
  lpx_dtype window_;
  Path path_;
  bool given_;  // all log-sum-exps
  ScanView view_{};
  float* log_sums_;
  float* inflation_;
  float* exact_inflation_;
};

struct ScanResults;

// The kernels of a path; each in a file of its own, since they take long to compile.
void sample_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window);
void scan_plain(const Launch& launch, const ScanView& v, lpx_dtype cache, lpx_dtype window);
void repair_plain(const Launch& launch, const ScanView& v, const ScanResults& to, lpx_dtype cache, lpx_dtype window);
void sample_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype);
void scan_mma(const Launch& launch, const ScanView& v, lpx_dtype dtype);
void repair_mma(const Launch& launch, const ScanView& v, const ScanResults& to, lpx_dtype dtype);
void scan_wgmma(const Launch& launch, const ScanView& v, lpx_dtype dtype);
void roots_wgmma(const Launch& launch, const ScanView& v, const StatisticView& lists, lpx_dtype dtype);
void score_wgmma(const Launch& launch, const ScanView& v, const StatisticView& statistic, bool squares, lpx_dtype dtype);

}  // namespace laprox::cuda
