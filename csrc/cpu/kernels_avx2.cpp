// The CPU kernels for AVX2 and FMA.
#define CARAFE_CPU_KERNELS kAvx2Kernels
#define CARAFE_VECTOR_BYTES 32
#include "kernels.inl"
