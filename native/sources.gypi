{
  "variables": {
    "laprox_core": [
      "native/core/api.cpp",
      "native/core/budget.cpp",
      "native/core/compaction.cpp",
      "native/core/cuda.cpp",
      "native/core/geometry.cpp",
      "native/core/model.cpp",
      "native/core/score_rule.cpp",
      "native/core/selection.cpp",
      "native/core/status.cpp"
    ],
    "laprox_cpu": [
      "native/cpu/attention.cpp",
      "native/cpu/backend.cpp",
      "native/cpu/compaction.cpp",
      "native/cpu/exact.cpp",
      "native/cpu/factors.cpp",
      "native/cpu/fidelity.cpp",
      "native/cpu/kernels_baseline.cpp",
      "native/cpu/pool.cpp",
      "native/cpu/pruning.cpp",
      "native/cpu/queries.cpp",
      "native/cpu/ranking.cpp",
      "native/cpu/scoring.cpp"
    ],
    "laprox_cpu_avx2": [
      "native/cpu/kernels_avx2.cpp"
    ],
    "laprox_cpu_avx512": [
      "native/cpu/kernels_avx512.cpp"
    ],
    "laprox_cpu_avx512bf16": [
      "native/cpu/kernels_avx512bf16.cpp"
    ],
    "laprox_cpu_amx": [
      "native/cpu/kernels_amx.cpp"
    ],
    "laprox_cuda": [
      "native/cuda/device.cu",
      "native/cuda/launch/attention.cu",
      "native/cuda/launch/attention_mma.cu",
      "native/cuda/launch/attention_plain.cu",
      "native/cuda/launch/attention_wgmma.cu",
      "native/cuda/launch/compact.cu",
      "native/cuda/launch/exact.cu",
      "native/cuda/launch/exact_hopper.cu",
      "native/cuda/launch/exact_portable.cu",
      "native/cuda/launch/factors.cu",
      "native/cuda/launch/pruning.cu",
      "native/cuda/launch/select.cu",
      "native/cuda/launch/value_norms.cu",
      "native/cuda/launch/views.cu",
      "native/cuda/library.cu",
      "native/cuda/model.cu"
    ],
    "laprox_cuda_core": [
      "native/core/budget.cpp",
      "native/core/geometry.cpp",
      "native/core/model.cpp",
      "native/core/score_rule.cpp",
      "native/core/status.cpp"
    ],
    "laprox_addon": [
      "native/addon/addon.cpp",
      "native/addon/arguments.cpp",
      "native/addon/buffers.cpp",
      "native/addon/compact.cpp",
      "native/addon/device.cpp",
      "native/addon/environment.cpp",
      "native/addon/evict.cpp",
      "native/addon/exchange.cpp",
      "native/addon/fidelity.cpp",
      "native/addon/job.cpp",
      "native/addon/memory.cpp",
      "native/addon/model.cpp",
      "native/addon/pipeline.cpp",
      "native/addon/score.cpp",
      "native/addon/select.cpp",
      "native/addon/stream_job.cpp",
      "native/addon/target.cpp"
    ],
    "laprox_headers": [
      "native/include/laprox/laprox.h"
    ],
    "laprox_warnings": ["-Wall", "-Wextra"],
    "laprox_flags_core": ["-ffp-contract=off"],
    "laprox_flags_cpu": ["-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"],
    "laprox_flags_cuda": ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "--compress-mode=size", "-Xcompiler=-fPIC,-fvisibility=hidden"],
    "laprox_cuda_architectures": [
      "-gencode=arch=compute_80,code=sm_80",
      "-gencode=arch=compute_89,code=sm_89",
      "-gencode=arch=compute_90a,code=sm_90a",
      "-gencode=arch=compute_90,code=compute_90"
    ],
    "laprox_flags_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "laprox_flags_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "laprox_flags_avx512bf16": ["-mavx512bf16"],
    "laprox_flags_amx": ["-mamx-tile", "-mamx-bf16"]
  }
}
