// CUDA's errors as messages for users.
#pragma once

#include <string>

#include <cuda_runtime_api.h>

namespace carafe_d2 {

// The runtime is part of the library, so a driver that does for PyTorch's may be too old for it.
inline std::string error_message(cudaError_t error) {
  if (error != cudaErrorInsufficientDriver) return cudaGetErrorString(error);
  const auto name = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  int supported = 0;
  cudaDriverGetVersion(&supported);
  // As OLDEST_DRIVERS in carafe_d2/collect_env.py has it.
  const char* oldest = CUDART_VERSION >= 13000 ? "580" : "525";
  return "the NVIDIA driver is too old: carafe_d2 was built with CUDA " + name(CUDART_VERSION) +
         ", which needs driver " + oldest + " or newer, and this one supports CUDA " +
         name(supported);
}

}  // namespace carafe_d2
