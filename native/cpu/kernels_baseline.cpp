// Compiled for the platform's baseline: SSE2 on x86-64, NEON on arm64.
#define LPX_LANES 4
#define LPX_NAMESPACE baseline
#define LPX_KERNELS baseline_kernels
#define LPX_NAME "baseline"
#include "cpu/tile.inl"
