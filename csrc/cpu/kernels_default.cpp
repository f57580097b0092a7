// The CPU kernels for the compiler's default instruction set.
#define CARAFE_CPU_KERNELS kDefaultKernels
#define CARAFE_VECTOR_BYTES 16
#include "kernels.inl"
