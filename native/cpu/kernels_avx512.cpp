// Compiled for avx512; called only where the machine has it.
#if defined(__x86_64__)
#define LPX_LANES 16
#define LPX_NAMESPACE avx512
#define LPX_KERNELS avx512_kernels
#define LPX_NAME "avx512"
#include "cpu/tile.inl"
#endif
