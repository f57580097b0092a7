// The CUDA kernels of csrc/cuda under emulation, with a C interface for
// tests/test_cuda_emulation.py.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

// clang-format off: the kernels come after what they run on
#include "cuda_emulation.h"
#include "../../csrc/cuda/carafe.cuh"
// clang-format on

using namespace carafe_d2;

namespace {

// The GPU that is played, and what runs on it.
struct Device {
  unsigned order;  // of threads, see cuda_emulation::Block
  int multiprocessors;
  unsigned general_blocks;  // not 0: the general kernels only, which loop with so few blocks
  bool tensor_cores;
};

std::string launched;  // kernels, a line each

// A Launcher as csrc/cuda/carafe.cuh wants it.
class EmulatingLauncher {
 public:
  explicit EmulatingLauncher(const Device& device) : device_(device) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads,
              const Arguments&... arguments) {
    if (device_.general_blocks) grid.x = std::min(grid.x, device_.general_blocks);
    launched += cuda_emulation::name_of(reinterpret_cast<void*>(kernel)) + "\n";
    cuda_emulation::emulate(device_.order, kernel, grid, static_cast<unsigned>(threads),
                            arguments...);
  }

  int multiprocessors() const { return device_.multiprocessors; }
  bool tensor_cores() const { return device_.tensor_cores; }

  // Aligned as CUDA's allocator does; filled with NaN.
  void* temporary(size_t bytes) {
    temporaries_.emplace_back(operator new(bytes, kAlignment));
    return std::memset(temporaries_.back().get(), 0xff, bytes);
  }

 private:
  static constexpr std::align_val_t kAlignment{256};
  struct Delete {
    void operator()(void* memory) const { operator delete(memory, kAlignment); }
  };

  const Device& device_;
  std::vector<std::unique_ptr<void, Delete>> temporaries_;
};

}  // namespace

extern "C" {

// The names of the kernels launched since the last call.
const char* take_launched() {
  static std::string result;
  result = std::exchange(launched, std::string());
  return result.c_str();
}

const char* emulate_forward(const Device& device, const Shape& shape, const Map& features,
                            const Weights& weights, const Map& output) {
  return cuda_emulation::report_of([&] {
    EmulatingLauncher launcher(device);
    if (!device.general_blocks) return forward(launcher, shape, features, weights, output);
    with_types(features, weights, [&](auto types) {
      general::forward<decltype(types)>(launcher, shape, features, weights, output);
    });
  });
}

const char* emulate_backward(const Device& device, const Shape& shape, const Map& grad_output,
                             const Map& features, const Weights& weights, const Map* grad_features,
                             const Weights* grad_weights) {
  return cuda_emulation::report_of([&] {
    EmulatingLauncher launcher(device);
    if (!device.general_blocks) {
      return backward(launcher, shape, grad_output, features, weights, grad_features, grad_weights);
    }
    with_types(features, weights, [&](auto types) {
      general::backward<decltype(types)>(launcher, shape, grad_output, features, weights,
                                         grad_features, grad_weights);
    });
  });
}

}  // extern "C"
