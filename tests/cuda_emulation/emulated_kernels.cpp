// The CUDA kernels of csrc/cuda under emulation, with a C interface for
// tests/test_cuda_emulation.py.
#include "cuda_emulation.h"

#include <vector>

#include "../../csrc/cuda/carafe.cuh"
#include "../../csrc/cuda/types.h"

using namespace carafe_d2;

namespace {

constexpr unsigned kBlocks = 2;  // few, so that threads have to loop over the rest of the work

template <typename Types>
std::vector<typename Types::Accumulation> normalisers(Types, const Shape& shape,
                                                      const Kernels& kernels) {
  using A = typename Types::Accumulation;
  std::vector<A> result(kernels.softmax ? pixel_count(shape) : 0);
  if (kernels.softmax) {
    emulate(normaliser_kernel<A, typename Types::Kernel>, kBlocks, kThreads, shape, kernels,
            result.data());
  }
  return result;
}

}  // namespace

extern "C" void emulate_forward(const Shape& shape, const Map& features, const Kernels& kernels,
                                const Map& output) {
  with_types(features, kernels, [&](auto types) {
    using Types = decltype(types);
    emulate(forward_kernel<typename Types::Accumulation, typename Types::Feature,
                           typename Types::Kernel>,
            kBlocks, kThreads, shape, features, kernels, output);
  });
}

extern "C" void emulate_backward_features(const Shape& shape, const Map& grad_output,
                                          const Kernels& kernels, const Map& grad_features) {
  with_types(grad_output, kernels, [&](auto types) {
    using Types = decltype(types);
    const auto normaliser = normalisers(types, shape, kernels);
    emulate(backward_features_kernel<typename Types::Accumulation, typename Types::Feature,
                                     typename Types::Kernel>,
            kBlocks, kThreads, shape, grad_output, kernels, normaliser.data(), grad_features);
  });
}

extern "C" void emulate_backward_kernels(const Shape& shape, const Map& grad_output,
                                         const Map& features, const Kernels& kernels,
                                         const Kernels& grad_kernels) {
  with_types(features, kernels, [&](auto types) {
    using Types = decltype(types);
    const auto normaliser = normalisers(types, shape, kernels);
    emulate(backward_kernels_kernel<typename Types::Accumulation, typename Types::Feature,
                                    typename Types::Kernel>,
            kBlocks, kThreads, shape, grad_output, features, kernels, normaliser.data(),
            grad_kernels);
  });
}
