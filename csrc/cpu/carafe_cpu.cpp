// The CPU backend: picks the kernels for the processor at hand and spreads rows over threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>

#include "../carafe.h"
#include "kernels.h"

namespace carafe_d2 {
namespace {

// CARAFE_D2_CPU = default, avx2 or avx512 overrides the choice, for tests and comparisons.
const CpuKernels& select_kernels() {
#ifdef __x86_64__
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* variable = std::getenv("CARAFE_D2_CPU");
  const std::string wanted = variable ? variable : "";
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return kAvx512Kernels;
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return kAvx2Kernels;
  if (!wanted.empty() && wanted != "default") {
    throw std::runtime_error(
        "CARAFE_D2_CPU: expected default, avx2 or avx512, as far as the "
        "processor has them, but got " +
        wanted);
  }
#endif
  return kDefaultKernels;
}

const CpuKernels& kernels() {
  static const CpuKernels& selected = select_kernels();
  return selected;
}

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

std::unique_ptr<char, Free> allocate(size_t bytes) {
  const size_t size = (bytes + 63) / 64 * 64;
  std::unique_ptr<char, Free> memory(static_cast<char*>(std::aligned_alloc(64, size)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Calls kernel(begin, end, scratch) on all threads that are worth starting.
template <typename Kernel>
void for_all_rows(const Shape& shape, const Kernel& kernel) {
  constexpr int64_t kWorkPerThread = 1 << 18;  // multiplications
  const int64_t row_work = std::max<int64_t>(
      1, shape.columns() * shape.subpixels() * shape.taps() * shape.group_channels());
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / row_work);
  const size_t scratch_bytes = kernel(0, 0, nullptr);
  torch::stable::parallel_for(0, shape.batch * shape.groups * shape.rows(), grain,
                              [&](int64_t begin, int64_t end) {
                                const auto scratch = allocate(scratch_bytes);
                                kernel(begin, end, scratch.get());
                              });
}

// Parts of the channels that a forward pass takes one after the other. With a stride there is little
// to compute for each pixel that is read, so the k rows around the current one have to stay in the
// second cache, which they do not of all channels of a wide map. A part of a channels_last map would
// lie in pieces, and reading those takes longer than what the cache saves.
int64_t panels(const Shape& shape, const Map& features) {
  constexpr int64_t kMostChannels = 128;
  int64_t count = 1;
  if (shape.stride == 1 || shape.groups != 1 || features.channel_stride == 1) return count;
  while (shape.channels / count > kMostChannels && shape.channels % (2 * count) == 0) count *= 2;
  return count;
}

void forward(const Shape& shape, const Map& features, const Weights& weights, const Map& output) {
  Shape parts = shape;
  Weights shared = weights;
  if (const int64_t count = panels(shape, features); count > 1) {
    parts.groups = count;
    shared.group_stride = 0;  // The groups have their weights in common.
  }
  for_all_rows(parts, [&](int64_t begin, int64_t end, char* scratch) {
    return kernels().forward(parts, features, shared, output, begin, end, scratch);
  });
}

void backward(const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  for_all_rows(shape, [&](int64_t begin, int64_t end, char* scratch) {
    return kernels().backward(shape, grad_output, features, weights, grad_features, grad_weights,
                              begin, end, scratch);
  });
}

}  // namespace

const Backend kCpuBackend = {forward, backward};

}  // namespace carafe_d2
