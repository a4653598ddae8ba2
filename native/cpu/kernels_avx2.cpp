// Compiled for avx2; called only where the machine has it.
#if defined(__x86_64__)
#define LPX_LANES 8
#define LPX_NAMESPACE avx2
#define LPX_KERNELS avx2_kernels
#define LPX_NAME "avx2"
#include "cpu/tile.inl"
#endif
