// What a backend does for the C ABI. One object a device; the ABI has checked everything before it calls.
#pragma once

#include <memory>

#include "core/budget.hpp"
#include "core/geometry.hpp"
#include "core/model.hpp"
#include "laprox/laprox.h"

namespace laprox {

// What a backend derives from a model's projections.
class Factors {
 public:
  virtual ~Factors() = default;
};

// A score's inputs. `window` is null for rules that look at no query.
struct ScoreInputs {
  const ModelShape& model;
  const Factors& factors;
  const Cache& cache;
  const Window* window;
  const lpx_score_rule& rule;
};

struct FidelityInputs {
  const ModelShape& model;
  const Cache& cache;
  const Window& window;
  const lpx_selection& selection;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual void info(lpx_device_info& info) const = 0;
  virtual std::unique_ptr<Factors> factorize(const ModelShape& model, const lpx_call& call) = 0;

  virtual void value_norms(const Cache& cache, const lpx_call& call) = 0;

  virtual int64_t score_workspace(const ScoreInputs& inputs) = 0;
  virtual void score(const ScoreInputs& inputs, const ScoreLayout& out, const lpx_call& call) = 0;

  virtual int64_t select_workspace(const ScoreLayout& scores, const lpx_select_rule& rule) = 0;
  virtual void select(const ScoreLayout& scores, const lpx_select_rule& rule, const std::vector<Part>& parts, const lpx_selection& out,
                      lpx_report& report, const lpx_call& call) = 0;

  // `layout` describes the cache's scores; its data is null.
  virtual int64_t select_cache_workspace(const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule) = 0;
  virtual void select_cache(const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule, const std::vector<Part>& parts,
                            const lpx_selection& out, lpx_report& report, const lpx_call& call) = 0;

  virtual int64_t fidelity_workspace(const FidelityInputs& inputs) = 0;
  virtual void fidelity(const FidelityInputs& inputs, double* out, const lpx_call& call) = 0;

  virtual int64_t compact_workspace(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) = 0;
  virtual void compact(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target, const lpx_call& call) = 0;
};

std::unique_ptr<Backend> make_cpu_backend(const lpx_device_options& options);

}  // namespace laprox
