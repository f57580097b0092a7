// The CUDA backend: launches the kernels on the current device and stream.
#include <stdexcept>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "carafe.cuh"
#include "error.h"

// In libtorch_cuda, which a PyTorch without CUDA does not have: the library must load there too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace carafe_d2 {
namespace {

using torch::stable::accelerator::getCurrentDeviceIndex;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("carafe_d2: CUDA: " + error_message(error));
}

cudaStream_t current_stream() {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("features: on a GPU, but this PyTorch was built without CUDA");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(getCurrentDeviceIndex(), &stream));
  return static_cast<cudaStream_t>(stream);
}

class Launcher {
 public:
  Launcher() : device_(getCurrentDeviceIndex()), stream_(current_stream()) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads,
              const Arguments&... arguments) {
    kernel<<<grid, threads, 0, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  bool tensor_cores() const { return attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

  // PyTorch's allocator knows streams: what is freed here is used again only after the kernels.
  void* temporary(size_t bytes) {
    const int64_t size[] = {static_cast<int64_t>(bytes)};
    temporaries_.push_back(torch::stable::empty(
        torch::headeronly::IntHeaderOnlyArrayRef(size, 1), torch::headeronly::ScalarType::Byte,
        std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_)));
    return temporaries_.back().data_ptr();
  }

 private:
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device_));
    return value;
  }

  int32_t device_;
  cudaStream_t stream_;
  std::vector<torch::stable::Tensor> temporaries_;
};

void forward_on_device(const Shape& shape, const Map& features, const Weights& weights,
                       const Map& output) {
  Launcher launcher;
  forward(launcher, shape, features, weights, output);
}

void backward_on_device(const Shape& shape, const Map& grad_output, const Map& features,
                        const Weights& weights, const Map* grad_features,
                        const Weights* grad_weights) {
  Launcher launcher;
  backward(launcher, shape, grad_output, features, weights, grad_features, grad_weights);
}

}  // namespace

const Backend kCudaBackend = {forward_on_device, backward_on_device};

}  // namespace carafe_d2
