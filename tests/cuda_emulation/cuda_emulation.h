// Just enough of CUDA's execution model to run kernels without barriers on the host: the threads
// of a grid one after the other.
#pragma once

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

inline Index3 threadIdx, blockIdx;
inline Index3 blockDim{1, 1, 1}, gridDim{1, 1, 1};

// kernel<<<blocks, threads>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void emulate(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
             const Arguments&... arguments) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
  }
}
