// What all CUDA kernels share. Apart from the execution model it needs nothing of CUDA, so the
// tests compile it for an emulator (tests/cuda_emulation), which then defines SHARED_ARRAY.
#pragma once

#include <cstdint>
#include <math.h>

#include "../carafe.h"
#include "../half.h"
#include "vector.h"

namespace carafe_d2 {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

CARAFE_HOST_DEVICE int64_t divide_up(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

#ifndef CARAFE_D2_EMULATION

// Memory of a block. Vectors are aligned: their index is a multiple of their size.
template <typename T>
struct SharedArray {
  T* data;

  __device__ __forceinline__ T get(int index) const { return data[index]; }
  __device__ __forceinline__ void set(int index, T value) const { data[index] = value; }

  template <int N>
  __device__ __forceinline__ Vector<T, N> get(int index) const {
    return *reinterpret_cast<const Vector<T, N>*>(data + index);
  }
  template <int N>
  __device__ __forceinline__ void set(int index, const Vector<T, N>& value) const {
    *reinterpret_cast<Vector<T, N>*>(data + index) = value;
  }
};

// Declares the shared array `name`, whose elements are undefined at first.
#define SHARED_ARRAY(type, name, count)                \
  __shared__ __align__(16) type name##_storage[count]; \
  const SharedArray<type> name { name##_storage }

#endif

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// Where source location (h, w) and subpixel p of group g in image n have their first tap.
__device__ __forceinline__ int64_t kernel_offset(const Kernels& kernels, const Shape& shape,
                                                 int64_t n, int64_t g, int h, int w, int p) {
  const int scale = static_cast<int>(shape.scale);
  return n * kernels.batch + g * kernels.group + h * kernels.row + p / scale * kernels.sub_row +
         w * kernels.column + p % scale * kernels.sub_column;
}

template <typename K, int kTaps>
__device__ __forceinline__ void load_taps(const K* taps, int64_t stride, float (&values)[kTaps]) {
#pragma unroll
  for (int t = 0; t < kTaps; ++t, taps += stride) values[t] = to_float(*taps);
}

template <typename K, int kTaps>
__device__ __forceinline__ void store_taps(const float (&values)[kTaps], K* taps, int64_t stride) {
#pragma unroll
  for (int t = 0; t < kTaps; ++t, taps += stride) from_float(values[t], *taps);
}

// Reassembly kernels have a type of their own under autocast. They are read once for many
// channels, so it costs nothing to decide at run time.
template <int kTaps>
__device__ __forceinline__ void load_kernel(const Kernels& kernels, int64_t offset,
                                            float (&values)[kTaps]) {
  switch (kernels.type) {
    case Type::kHalf:
      return load_taps(static_cast<const Half*>(kernels.data) + offset, kernels.tap, values);
    case Type::kBFloat16:
      return load_taps(static_cast<const BFloat16*>(kernels.data) + offset, kernels.tap, values);
    default:
      return load_taps(static_cast<const float*>(kernels.data) + offset, kernels.tap, values);
  }
}

template <int kTaps>
__device__ __forceinline__ void store_kernel(const float (&values)[kTaps], const Kernels& kernels,
                                             int64_t offset) {
  switch (kernels.type) {
    case Type::kHalf:
      return store_taps(values, static_cast<Half*>(kernels.data) + offset, kernels.tap);
    case Type::kBFloat16:
      return store_taps(values, static_cast<BFloat16*>(kernels.data) + offset, kernels.tap);
    default: return store_taps(values, static_cast<float*>(kernels.data) + offset, kernels.tap);
  }
}

template <int kTaps>
__device__ __forceinline__ void softmax(float (&values)[kTaps]) {
  float largest = values[0];
#pragma unroll
  for (int t = 1; t < kTaps; ++t) largest = fmaxf(largest, values[t]);
  float sum = 0;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    values[t] = expf(values[t] - largest);
    sum += values[t];
  }
  const float factor = 1 / sum;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) values[t] *= factor;
}

// The weights of one output pixel, whatever the kernels hold.
template <int kTaps>
__device__ __forceinline__ void load_weights(const Kernels& kernels, int64_t offset,
                                             float (&weights)[kTaps]) {
  load_kernel(kernels, offset, weights);
  if (kernels.softmax) softmax(weights);
}

// From the gradients of a pixel's weights to those of what the kernels hold. Through the softmax
// m = softmax(l): grad l[t] = m[t] * (grad m[t] - sum over t' of m[t'] * grad m[t']).
template <int kTaps>
__device__ __forceinline__ void store_weight_gradients(float (&gradients)[kTaps],
                                                       const Kernels& kernels, int64_t offset,
                                                       const Kernels& grad_kernels,
                                                       int64_t grad_offset) {
  if (kernels.softmax) {
    float weights[kTaps];
    load_weights(kernels, offset, weights);
    float sum = 0;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) sum += weights[t] * gradients[t];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) gradients[t] = weights[t] * (gradients[t] - sum);
  }
  store_kernel(gradients, grad_kernels, grad_offset);
}

}  // namespace carafe_d2
