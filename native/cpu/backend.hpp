// The CPU backend: a thread pool, the kernels of the best instruction set, and the stages in order.
#pragma once

#include "core/backend.hpp"
#include "cpu/pool.hpp"
#include "cpu/tile.hpp"
#include "cpu/workspace.hpp"

namespace laprox::cpu {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const lpx_device_options& options);

  void info(lpx_device_info& info) const override;
  std::unique_ptr<Factors> factorize(const ModelShape& model, const lpx_call& call) override;
  void value_norms(const Cache& cache, const lpx_call& call) override;

  int64_t score_workspace(const ScoreInputs& inputs) override;
  void score(const ScoreInputs& inputs, const ScoreLayout& out, const lpx_call& call) override;
  int64_t select_workspace(const ScoreLayout& scores, const lpx_select_rule& rule) override;
  void select(const ScoreLayout& scores, const lpx_select_rule& rule, const std::vector<Part>& parts, const lpx_selection& out, lpx_report& report,
              const lpx_call& call) override;
  int64_t select_cache_workspace(const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule) override;
  void select_cache(const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule, const std::vector<Part>& parts,
                    const lpx_selection& out, lpx_report& report, const lpx_call& call) override;
  int64_t fidelity_workspace(const FidelityInputs& inputs) override;
  void fidelity(const FidelityInputs& inputs, double* out, const lpx_call& call) override;
  int64_t compact_workspace(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target) override;
  void compact(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target, const lpx_call& call) override;

 private:
  Pool pool_;
  ScratchPool scratch_;
  const Kernels& kernels_;
};

}  // namespace laprox::cpu
