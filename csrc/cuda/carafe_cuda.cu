// The CUDA backend: picks the kernel for the types at hand and launches it on the current stream.
#include <algorithm>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "carafe.cuh"
#include "types.h"

// In libtorch_cuda, which a PyTorch without CUDA does not have: the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** ret_stream);

namespace carafe_d2 {
namespace {

using torch::stable::accelerator::getCurrentDeviceIndex;

cudaStream_t current_stream() {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("features: on a GPU, but this PyTorch was built without CUDA");
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(getCurrentDeviceIndex(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t threads, const Arguments&... arguments) {
  if (threads == 0) return;
  constexpr int64_t kMostBlocks = INT32_MAX;  // kernels loop over what does not fit
  const int64_t blocks = std::min((threads + kThreads - 1) / kThreads, kMostBlocks);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream()>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("carafe_d2: CUDA kernel launch failed: ") +
                             cudaGetErrorString(error));
  }
}

int64_t pixels(const Shape& shape) {
  return shape.batch * shape.groups * shape.height * shape.width * shape.subpixels();
}

int64_t channel_threads(const Shape& shape) {
  return (shape.group_channels() + kChannels - 1) / kChannels;
}

// The normalisers of the softmax, one for each group and output pixel; nothing without a softmax.
template <typename Types>
torch::stable::Tensor normalisers(Types, const Shape& shape, const Kernels& kernels) {
  using A = typename Types::Accumulation;
  using K = typename Types::Kernel;
  const int64_t size[] = {kernels.softmax ? pixels(shape) : 0};
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, getCurrentDeviceIndex());
  auto result = torch::stable::empty(
      torch::headeronly::IntHeaderOnlyArrayRef(size, 1),
      sizeof(A) == sizeof(double) ? torch::headeronly::ScalarType::Double
                                  : torch::headeronly::ScalarType::Float,
      std::nullopt, device);
  launch(normaliser_kernel<A, K>, size[0], shape, kernels, static_cast<A*>(result.data_ptr()));
  return result;
}

void forward(const Shape& shape, const Map& features, const Kernels& kernels, const Map& output) {
  with_types(features, kernels, [&](auto types) {
    using Types = decltype(types);
    launch(forward_kernel<typename Types::Accumulation, typename Types::Feature,
                          typename Types::Kernel>,
           pixels(shape) * channel_threads(shape), shape, features, kernels, output);
  });
}

void backward_features(const Shape& shape, const Map& grad_output, const Kernels& kernels,
                       const Map& grad_features) {
  with_types(grad_output, kernels, [&](auto types) {
    using Types = decltype(types);
    using A = typename Types::Accumulation;
    const auto normaliser = normalisers(types, shape, kernels);
    const int64_t locations = shape.batch * shape.groups * shape.height * shape.width;
    launch(backward_features_kernel<A, typename Types::Feature, typename Types::Kernel>,
           locations * channel_threads(shape), shape, grad_output, kernels,
           static_cast<const A*>(normaliser.data_ptr()), grad_features);
  });
}

void backward_kernels(const Shape& shape, const Map& grad_output, const Map& features,
                      const Kernels& kernels, const Kernels& grad_kernels) {
  with_types(features, kernels, [&](auto types) {
    using Types = decltype(types);
    using A = typename Types::Accumulation;
    const auto normaliser = normalisers(types, shape, kernels);
    launch(backward_kernels_kernel<A, typename Types::Feature, typename Types::Kernel>,
           pixels(shape), shape, grad_output, features, kernels,
           static_cast<const A*>(normaliser.data_ptr()), grad_kernels);
  });
}

void backward(const Shape& shape, const Map& grad_output, const Map& features,
              const Kernels& kernels, const Map* grad_features, const Kernels* grad_kernels) {
  if (grad_features) backward_features(shape, grad_output, kernels, *grad_features);
  if (grad_kernels) backward_kernels(shape, grad_output, features, kernels, *grad_kernels);
}

}  // namespace

const Backend kCudaBackend = {forward, backward};

}  // namespace carafe_d2
