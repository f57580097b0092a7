// What all CUDA kernels share. Apart from the execution model it needs nothing of CUDA, so the
// tests compile it for an emulator (tests/cuda_emulation), which then defines SHARED_ARRAY.
#pragma once

#include <cstdint>
#include <math.h>
#include <type_traits>

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

// 2^x and 1 / x in one instruction each, to 2^-22 or better. In C++ there would be more around them,
// for what is below the smallest normal number; that becomes 0 here.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Keeps the compiler from taking apart how a value came about, to have sums that do not change in
// a loop in registers, where none are left. Of a pointer it still knows that it leads to global
// memory.
template <typename T>
__device__ __forceinline__ void forget_origin(T*& pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm("" : "+l"(address));
  pointer = static_cast<T*>(__cvta_global_to_generic(address));
}
__device__ __forceinline__ void forget_origin(unsigned& value) { asm("" : "+r"(value)); }

// Adds the value that lane + delta has, or lane - delta, where that lane is one of the same `width`
// lanes. The shuffle knows whether it is, so nobody has to compute that.
__device__ __forceinline__ void add_from_above(float& sum, float value, int delta, int width) {
  asm volatile(
      "{.reg .pred p; .reg .f32 x;"
      " shfl.sync.down.b32 x|p, %1, %2, %3, 0xffffffff; @p add.f32 %0, %0, x;}"
      : "+f"(sum)
      : "f"(value), "r"(delta), "r"((kWarpSize - width) << 8 | (kWarpSize - 1)));
}
__device__ __forceinline__ void add_from_below(float& sum, float value, int delta, int width) {
  asm volatile(
      "{.reg .pred p; .reg .f32 x;"
      " shfl.sync.up.b32 x|p, %1, %2, %3, 0xffffffff; @p add.f32 %0, %0, x;}"
      : "+f"(sum)
      : "f"(value), "r"(delta), "r"((kWarpSize - width) << 8));
}

// The rest is for GPUs of compute capability 8.0 and later; kernels that use it run on no other.

// Begins to copy words, which have to be aligned; zeros where they are not wanted, and nothing is
// read. They are there after wait_for_copies() for the thread itself, for others after a barrier.
template <int kWords>
__device__ __forceinline__ void copy_async(const SharedArray<uint32_t>& shared, int index,
                                           const void* source, bool wanted) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared.data + index))),
                 "l"(__cvta_generic_to_global(source)), "n"(kWords * 4),
                 "r"(wanted ? kWords * 4 : 0)
               : "memory");
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Two values in a word, the first one in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t to_word(float first, float second) {
#if __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  }
  return word;
#else
  return 0;
#endif
}

// c += a * b, for matrices of a warp: a is 16 x 16, b 16 x 8. With g = lane / 4 and i = lane % 4, a
// lane has of each, as words of two values where these are of 16 bits:
//
//     a[0], a[1]   row g and row g + 8, values 2 * i and 2 * i + 1
//     a[2], a[3]   the same rows, values 2 * i + 8 and 2 * i + 9
//     b[0], b[1]   column g, values 2 * i and 2 * i + 1, and 2 * i + 8 and 2 * i + 9
//     c[0], c[1]   row g, columns 2 * i and 2 * i + 1
//     c[2], c[3]   row g + 8, the same columns
template <typename T>
__device__ __forceinline__ void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                             float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
#define CARAFE_MMA(type)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, Half>) {
    CARAFE_MMA("f16");
  } else {
    CARAFE_MMA("bf16");
  }
#undef CARAFE_MMA
#endif
}

#endif

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// Where a subpixel is among the scale * scale ones of its location. Divisions by a number that is
// known at run time take many instructions: the usual scale does without.
struct Subpixel {
  int row, column;

  __device__ __forceinline__ Subpixel(const Shape& shape, int p) {
    const int scale = static_cast<int>(shape.scale);
    row = scale == 2 ? p / 2 : p / scale;
    column = p - row * scale;
  }
};

// What subpixel p adds to the offset of its location's taps.
__device__ __forceinline__ int64_t subpixel_offset(const Weights& weights, const Shape& shape,
                                                   int p) {
  const Subpixel subpixel(shape, p);
  return subpixel.row * weights.sub_row_stride + subpixel.column * weights.sub_column_stride;
}

// Where source location (h, w) and subpixel p of group g in image n have their first tap.
__device__ __forceinline__ int64_t weights_offset(const Weights& weights, const Shape& shape,
                                                  int64_t n, int64_t g, int h, int w, int p) {
  return n * weights.batch_stride + g * weights.group_stride + h * weights.row_stride +
         w * weights.column_stride + subpixel_offset(weights, shape, p);
}

template <typename W, int kTaps>
__device__ __forceinline__ void load_taps(const W* taps, int64_t stride, float (&values)[kTaps]) {
#pragma unroll
  for (int t = 0; t < kTaps; ++t, taps += stride) values[t] = to_float(*taps);
}

template <typename W, int kTaps>
__device__ __forceinline__ void store_taps(const float (&values)[kTaps], W* taps, int64_t stride) {
#pragma unroll
  for (int t = 0; t < kTaps; ++t, taps += stride) from_float(values[t], *taps);
}

// Calls body(elements) with a pointer to the weights, which have a type of their own under autocast.
// They are read once for many channels, so it costs nothing to decide at run time.
template <typename Body>
__device__ __forceinline__ void with_elements(const Weights& weights, const Body& body) {
  switch (weights.type) {
    case Type::kHalf: return body(static_cast<Half*>(weights.data));
    case Type::kBFloat16: return body(static_cast<BFloat16*>(weights.data));
    default: return body(static_cast<float*>(weights.data));
  }
}

// The values are masks or logits, as they are in memory.
template <int kTaps>
__device__ __forceinline__ void load_values(const Weights& weights, int64_t offset,
                                            float (&values)[kTaps]) {
  with_elements(weights, [&](const auto* elements) {
    load_taps(elements + offset, weights.tap_stride, values);
  });
}

template <int kTaps>
__device__ __forceinline__ void store_values(const float (&values)[kTaps], const Weights& weights,
                                             int64_t offset) {
  with_elements(weights,
                [&](auto* elements) { store_taps(values, elements + offset, weights.tap_stride); });
}

template <int kTaps>
__device__ __forceinline__ void softmax(float (&values)[kTaps]) {
  constexpr float kLog2E = 1.44269504f;
  float largest = values[0];
#pragma unroll
  for (int t = 1; t < kTaps; ++t) largest = fmaxf(largest, values[t]);
  float sum = 0;
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    // The maximum is subtracted first: times kLog2E, what is far from zero would lose digits that
    // the difference has, or become infinite.
    values[t] = power_of_two((values[t] - largest) * kLog2E);
    sum += values[t];
  }
  const float factor = reciprocal(sum);
#pragma unroll
  for (int t = 0; t < kTaps; ++t) values[t] *= factor;
}

// The weights of one output pixel, made of the logits where `weights` holds those.
template <int kTaps>
__device__ __forceinline__ void load_weights(const Weights& weights, int64_t offset,
                                             float (&values)[kTaps]) {
  load_values(weights, offset, values);
  if (weights.softmax) softmax(values);
}

// From the gradients of a pixel's weights to those of the masks or logits. Through the softmax
// m = softmax(l): grad l[t] = m[t] * (grad m[t] - sum over t' of m[t'] * grad m[t']).
template <int kTaps>
__device__ __forceinline__ void store_weight_gradients(float (&gradients)[kTaps],
                                                       const Weights& weights, int64_t offset,
                                                       const Weights& grad_weights,
                                                       int64_t grad_offset) {
  if (weights.softmax) {
    float values[kTaps];
    load_weights(weights, offset, values);
    float sum = 0;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) sum += values[t] * gradients[t];
#pragma unroll
    for (int t = 0; t < kTaps; ++t) gradients[t] = values[t] * (gradients[t] - sum);
  }
  store_values(gradients, grad_weights, grad_offset);
}

}  // namespace carafe_d2
