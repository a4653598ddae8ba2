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
      "native/core/status.cpp"
    ],
    "laprox_cpu": [
      "native/cpu/attention.cpp",
      "native/cpu/backend.cpp",
      "native/cpu/compaction.cpp",
      "native/cpu/exact.cpp",
      "native/cpu/factors.cpp",
      "native/cpu/kernels_baseline.cpp",
      "native/cpu/pool.cpp",
      "native/cpu/pruning.cpp",
      "native/cpu/ranking.cpp",
      "native/cpu/scoring.cpp"
    ],
    "laprox_cpu_avx2": [
      "native/cpu/kernels_avx2.cpp"
    ],
    "laprox_cpu_avx512": [
      "native/cpu/kernels_avx512.cpp"
    ],
    "laprox_addon": [
      "native/addon/addon.cpp",
      "native/addon/arguments.cpp",
      "native/addon/buffers.cpp",
      "native/addon/compact.cpp",
      "native/addon/device.cpp",
      "native/addon/environment.cpp",
      "native/addon/job.cpp",
      "native/addon/model.cpp",
      "native/addon/score.cpp",
      "native/addon/select.cpp"
    ],
    "laprox_headers": [
      "native/include/laprox/laprox.h"
    ],
    "laprox_warnings": ["-Wall", "-Wextra"],
    "laprox_flags_core": ["-ffp-contract=off"],
    "laprox_flags_cpu": ["-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi"],
    "laprox_flags_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "laprox_flags_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
  }
}
