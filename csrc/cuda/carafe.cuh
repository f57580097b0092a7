// The CUDA operator: which kernels do what. Nothing here or in what it includes knows PyTorch.
//
//   contiguous.cuh     (N, C, H, W) in memory: a lane is a source location
//   tensor_cores.cuh   the same for half types, where the GPU has the instructions
//   channels_last.cuh  (N, H, W, C) in memory: a lane is some channels
//   downsampling.cuh   downsampling by 2, out of what contiguous.cuh has
//   downsampling_channels_last.cuh
//                      the same in (N, H, W, C)
//   general.cuh        whatever those leave out
//
// None uses atomics, so results are bitwise the same from run to run. A Launcher stands for the
// device; the one of carafe_cuda.cu is CUDA's, that of tests/cuda_emulation runs on the host:
//
//   void launch(kernel, dim3 grid, int threads, arguments...)
//   int multiprocessors()            of the device
//   bool tensor_cores()              whether it has those of compute capability 8.0
//   void* temporary(size_t bytes)    device memory that lives as long as the launcher
#pragma once

#include "channels_last.cuh"
#include "contiguous.cuh"
#include "dispatch.h"
#include "downsampling.cuh"
#include "downsampling_channels_last.cuh"
#include "general.cuh"
#include "tensor_cores.cuh"

namespace carafe_d2 {

// There are specialized kernels for all but float64.
template <typename Types>
constexpr bool kSpecialized = sizeof(typename Types::Feature) < sizeof(double);
template <typename Types>
constexpr bool kHalfType = sizeof(typename Types::Feature) < sizeof(float);

// Those below return false, and launch nothing, for what is left to general.cuh.

template <typename Types, typename Launcher>
bool specialized_forward(Launcher& launcher, const Shape& shape, const Map& features,
                         const Weights& weights, const Map& output) {
  using T = typename Types::Feature;
  if (shape.stride != 1) {
    return shape.channels_last
               ? downsampling_channels_last::forward<T>(launcher, shape, features, weights, output)
               : downsampling::forward<Types>(launcher, shape, features, weights, output);
  }
  if (shape.channels_last) {
    return channels_last::forward<T>(launcher, shape, features, weights, output);
  }
  if constexpr (kHalfType<Types>) {
    if (tensor_cores::forward<T>(launcher, shape, features, weights, output)) return true;
  }
  return contiguous::forward<T>(launcher, shape, features, weights, output);
}

template <typename Types, typename Launcher>
bool specialized_backward(Launcher& launcher, const Shape& shape, const Map& grad_output,
                          const Map& features, const Weights& weights, const Map* grad_features,
                          const Weights* grad_weights) {
  using T = typename Types::Feature;
  const auto run = [&](auto backward) {
    return backward(launcher, shape, grad_output, features, weights, grad_features, grad_weights);
  };
  if (shape.stride != 1) {
    return shape.channels_last ? run(downsampling_channels_last::backward<T, Launcher>)
                               : run(downsampling::backward<Types, Launcher>);
  }
  if (shape.channels_last) return run(channels_last::backward<T, Launcher>);
  if constexpr (kHalfType<Types>) {
    if (run(tensor_cores::backward<T, Launcher>)) return true;
  }
  return run(contiguous::backward<T, Launcher>);
}

template <typename Launcher>
void forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  with_types(features, weights, [&](auto types) {
    using Types = decltype(types);
    if constexpr (kSpecialized<Types>) {
      if (specialized_forward<Types>(launcher, shape, features, weights, output)) return;
    }
    general::forward<Types>(launcher, shape, features, weights, output);
  });
}

// Gradients that are not wanted are null.
template <typename Launcher>
void backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  with_types(features, weights, [&](auto types) {
    using Types = decltype(types);
    if constexpr (kSpecialized<Types>) {
      if (specialized_backward<Types>(launcher, shape, grad_output, features, weights,
                                      grad_features, grad_weights)) {
        return;
      }
    }
    general::backward<Types>(launcher, shape, grad_output, features, weights, grad_features,
                             grad_weights);
  });
}

}  // namespace carafe_d2
