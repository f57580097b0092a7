// The CPU kernels of one instruction set. `kernels.inl` defines them; it is compiled once for
// each set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../carafe.h"

namespace carafe_d2 {

// Every kernel works on a range of rows of source locations of all images and groups, in the order (n, g, h),
// and is called by each thread with a range of its own. Results do not depend on the partition.
//
// Without `scratch` a kernel does nothing but return how many bytes of it a call needs;
// `scratch` is aligned to 64 bytes.
struct CpuKernels {
  size_t (*forward)(const Shape&, const Map& features, const Weights&, const Map& output,
                    int64_t begin, int64_t end, char* scratch);
  size_t (*backward)(const Shape&, const Map& grad_output, const Map& features, const Weights&,
                     const Map* grad_features, const Weights* grad_weights, int64_t begin,
                     int64_t end, char* scratch);
};

extern const CpuKernels kDefaultKernels;
#ifdef __x86_64__
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
#endif

}  // namespace carafe_d2
