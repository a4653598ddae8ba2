#include "cpu/backend.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "core/status.hpp"
#include "cpu/compaction.hpp"
#include "cpu/factors.hpp"
#include "cpu/fidelity.hpp"
#include "cpu/pruning.hpp"
#include "cpu/ranking.hpp"
#include "cpu/scoring.hpp"

namespace laprox {
namespace cpu {
namespace {

constexpr int kMaxThreads = 1024;

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_avx512bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Asks the system, too: the state of tiles is large, and a process has none before it has asked. From then on all its threads do.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr uint32_t kTiles = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
  return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& kernels_for(lpx_isa isa) {
  switch (isa) {
    case LPX_ISA_AUTO:
    case LPX_ISA_BASELINE: break;
    case LPX_ISA_AVX2:
      if (!has_avx2()) fail(LPX_UNSUPPORTED, "options->isa is LPX_ISA_AVX2, but this processor has no AVX2, FMA and F16C");
      break;
    case LPX_ISA_AVX512:
      if (!has_avx512()) fail(LPX_UNSUPPORTED, "options->isa is LPX_ISA_AVX512, but this processor has no AVX-512 F, BW, DQ and VL");
      break;
    case LPX_ISA_AMX:
      if (!has_amx())
        fail(LPX_UNSUPPORTED, "options->isa is LPX_ISA_AMX, but this processor has no AMX for bfloat16, or its system does not allow it");
      break;
    case LPX_ISA_AVX512BF16:
      if (!has_avx512bf16()) fail(LPX_UNSUPPORTED, "options->isa is LPX_ISA_AVX512BF16, but this processor has no AVX-512 BF16");
      break;
    default: fail(LPX_INVALID_ARGUMENT, "options->isa is %d; expected one of lpx_isa", static_cast<int>(isa));
  }
#if defined(__x86_64__)
  if (isa == LPX_ISA_AMX || (isa == LPX_ISA_AUTO && has_amx())) return amx_kernels();
  // On Intel's Xeons (Sapphire Rapids) the instruction takes three times as long as one of floats.
  if (isa == LPX_ISA_AVX512BF16 || (isa == LPX_ISA_AUTO && has_avx512bf16() && __builtin_cpu_is("amd"))) return avx512bf16_kernels();
  if (isa == LPX_ISA_AVX512 || (isa == LPX_ISA_AUTO && has_avx512())) return avx512_kernels();
  if (isa == LPX_ISA_AVX2 || (isa == LPX_ISA_AUTO && has_avx2())) return avx2_kernels();
#endif
  return baseline_kernels();
}

int threads_for(int32_t threads) {
  if (threads < 0 || threads > kMaxThreads)
    fail(LPX_INVALID_ARGUMENT, "options->threads is %d; expected 1 to %d, or 0 for one a core", threads, kMaxThreads);
  if (threads > 0) return threads;
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

}  // namespace

CpuBackend::CpuBackend(const lpx_device_options& options) : pool_(threads_for(options.threads)), kernels_(kernels_for(options.isa)) {}

void CpuBackend::info(lpx_device_info& info) const {
  info.backend = LPX_CPU;
  info.threads = pool_.threads();
  std::snprintf(info.name, sizeof info.name, "CPU");
  std::snprintf(info.isa, sizeof info.isa, "%s", kernels_.name);
}

std::unique_ptr<Factors> CpuBackend::factorize(const ModelShape& model, const lpx_call& call) {
  return std::make_unique<CpuFactors>(model, pool_, kernels_, call);
}

void CpuBackend::value_norms(const Cache& cache, const lpx_call& call) {
  constexpr int64_t kBlock = 1024;
  Progress progress(call, cache.entries());
  for (int64_t segment = 0; segment < cache.segments().count(); ++segment) {
    const Segment s = cache.segments().at(segment);
    const Rows values = cache.values(s);
    const Rows norms = cache.value_norms(s);
    const int64_t length = cache.length(segment);
    pool_.run((length + kBlock - 1) / kBlock, [&](int64_t block, int) {
      if (progress.cancelled()) return;
      const int64_t end = std::min(length, (block + 1) * kBlock);
      for (int64_t first = block * kBlock; first < end; first += kTile) {
        const int count = static_cast<int>(std::min<int64_t>(kTile, end - first));
        const void* rows[kTile];
        float tile[kTile];
        values.run(first, count, rows);
        kernels_.norms(cache.dtype(), rows, count, cache.head_dim(), tile);
        for (int t = 0; t < count; ++t) *reinterpret_cast<float*>(norms(first + t)) = tile[t];
      }
      progress.advance(end - block * kBlock);
    });
    progress.check();
  }
}

int64_t CpuBackend::score_workspace(const ScoreInputs& inputs) {
  Workspace measured;
  const Scoring scoring(measured, inputs, kernels_, pool_.threads());
  return measured.bytes();
}

void CpuBackend::score(const ScoreInputs& inputs, const ScoreLayout& out, const lpx_call& call) {
  Workspace workspace(call, scratch_, score_workspace(inputs));
  Scoring scoring(workspace, inputs, kernels_, pool_.threads());
  Progress progress(call, scoring.work());
  scoring.run(pool_, out, out.desc().data, progress);
}

int64_t CpuBackend::select_workspace(const ScoreLayout& scores, const lpx_select_rule& rule) {
  Workspace measured;
  const Ranking ranking(measured, scores, rule, kernels_, pool_.threads());
  return measured.bytes();
}

void CpuBackend::select(const ScoreLayout& scores, const lpx_select_rule& rule, const std::vector<Part>& parts, const lpx_selection& out,
                        lpx_report& report, const lpx_call& call) {
  const auto start = std::chrono::steady_clock::now();
  Workspace workspace(call, scratch_, select_workspace(scores, rule));
  Ranking ranking(workspace, scores, rule, kernels_, pool_.threads());
  Progress progress(call, 1);
  ranking.rank(pool_, parts, scores.desc().data, Ranking::Absent::kNone, progress);
  ranking.emit(pool_, parts, out);
  report.non_finite = ranking.non_finite();
  report.select_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int64_t CpuBackend::select_cache_workspace(const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule) {
  Workspace measured;
  const Pruning pruning(measured, inputs, layout, rule, kernels_, pool_.threads());
  return measured.bytes();
}

void CpuBackend::select_cache(const ScoreInputs& inputs, const ScoreLayout& layout, const lpx_select_rule& rule, const std::vector<Part>& parts,
                              const lpx_selection& out, lpx_report& report, const lpx_call& call) {
  Workspace workspace(call, scratch_, select_cache_workspace(inputs, layout, rule));
  Pruning pruning(workspace, inputs, layout, rule, kernels_, pool_.threads());
  pruning.run(pool_, parts, out, report, call);
}

int64_t CpuBackend::fidelity_workspace(const FidelityInputs& inputs) {
  Workspace measured;
  const Fidelity fidelity(measured, inputs, kernels_, pool_.threads());
  return measured.bytes();
}

void CpuBackend::fidelity(const FidelityInputs& inputs, double* out, const lpx_call& call) {
  Workspace workspace(call, scratch_, fidelity_workspace(inputs));
  Fidelity fidelity(workspace, inputs, kernels_, pool_.threads());
  Progress progress(call, fidelity.work());
  fidelity.run(pool_, out, progress);
}

int64_t CpuBackend::compact_workspace(const Cache&, const lpx_selection&, const lpx_compaction&) { return 0; }

void CpuBackend::compact(const Cache& cache, const lpx_selection& selection, const lpx_compaction& target, const lpx_call&) {
  cpu::compact(pool_, kernels_, cache, selection, target);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const lpx_device_options& options) { return std::make_unique<cpu::CpuBackend>(options); }

}  // namespace laprox
