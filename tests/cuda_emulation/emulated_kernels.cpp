// The CUDA kernels of csrc/cuda under emulation, with a C interface for
// tests/test_cuda_emulation.py.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// clang-format off: the kernels come after what they run on
#include "cuda_emulation.h"
#include "../../csrc/cuda/carafe.cuh"
#include "ptx.h"
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

// Finds what runs in the place of a kernel, by its mangled name; null: nothing does.
ptx::Kernel (*find_replacement)(const char* name) = nullptr;

// What a translated kernel may touch of a tensor: from its first element to its last one.
void allow(const char* name, const void* data, Type type, bool writable,
           std::initializer_list<std::pair<int64_t, int64_t>> sizes_and_strides) {
  int64_t elements = 1;
  for (const auto& [size, stride] : sizes_and_strides) {
    if (size == 0) return;
    elements += (size - 1) * stride;
  }
  const int64_t bytes = type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
  ptx::allow(name, data, elements * bytes, writable);
}

void allow(const char* name, const Shape& shape, const Map& map, int64_t rows, int64_t columns,
           bool writable) {
  allow(name, map.data, map.type, writable,
        {{shape.batch, map.batch_stride},
         {shape.channels, map.channel_stride},
         {rows, map.row_stride},
         {columns, map.column_stride}});
}

void allow_features(const char* name, const Shape& shape, const Map& map, bool writable) {
  allow(name, shape, map, shape.height, shape.width, writable);
}

void allow_output(const char* name, const Shape& shape, const Map& map, bool writable) {
  allow(name, shape, map, shape.rows() * shape.scale, shape.columns() * shape.scale, writable);
}

void allow(const char* name, const Shape& shape, const Weights& weights, bool writable) {
  allow(name, weights.data, weights.type, writable,
        {{shape.batch, weights.batch_stride},
         {shape.groups, weights.group_stride},
         {shape.taps(), weights.tap_stride},
         {shape.rows(), weights.row_stride},
         {shape.scale, weights.sub_row_stride},
         {shape.columns(), weights.column_stride},
         {shape.scale, weights.sub_column_stride}});
}

// A Launcher as csrc/cuda/carafe.cuh wants it.
class EmulatingLauncher {
 public:
  explicit EmulatingLauncher(const Device& device) : device_(device) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads,
              const Arguments&... arguments) {
    if (device_.general_blocks) grid.x = std::min(grid.x, device_.general_blocks);
    const dim3 block(static_cast<unsigned>(threads));
    const std::string name = cuda_emulation::name_of(reinterpret_cast<void*>(kernel));
    launched += name + "\n";
    if (find_replacement == nullptr) {
      return cuda_emulation::emulate(device_.order, kernel, grid, block, arguments...);
    }
    const auto replacement =
        find_replacement(cuda_emulation::symbol_of(reinterpret_cast<void*>(kernel)));
    if (replacement == nullptr) throw std::runtime_error("no PTX of " + name);
    std::tuple<Parameters...> parameters(arguments...);
    std::apply(
        [&](auto&... parameter) {
          void* const pointers[] = {&parameter...};
          cuda_emulation::emulate(device_.order, name, grid, block, [&] { replacement(pointers); });
        },
        parameters);
  }

  int multiprocessors() const { return device_.multiprocessors; }
  bool tensor_cores() const { return device_.tensor_cores; }

  // Aligned as CUDA's allocator does; filled with NaN.
  void* temporary(size_t bytes) {
    temporaries_.emplace_back(operator new(bytes, kAlignment));
    void* const result = temporaries_.back().get();
    ptx::allow("temporary memory", result, bytes, true);
    return std::memset(result, 0xff, bytes);
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

// From now on, what this function finds runs in the place of the kernels.
void replace_kernels(ptx::Kernel (*find)(const char* name)) { find_replacement = find; }

const char* emulate_forward(const Device& device, const Shape& shape, const Map& features,
                            const Weights& weights, const Map& output) {
  return cuda_emulation::report_of([&] {
    ptx::global_memory.clear();
    allow_features("features", shape, features, false);
    allow("weights", shape, weights, false);
    allow_output("output", shape, output, true);
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
    ptx::global_memory.clear();
    allow_output("grad_output", shape, grad_output, false);
    allow_features("features", shape, features, false);
    allow("weights", shape, weights, false);
    if (grad_features) allow_features("grad_features", shape, *grad_features, true);
    if (grad_weights) allow("grad_weights", shape, *grad_weights, true);
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
