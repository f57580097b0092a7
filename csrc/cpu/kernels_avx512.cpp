// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#define CARAFE_CPU_KERNELS kAvx512Kernels
#define CARAFE_VECTOR_BYTES 64
#include "kernels.inl"
