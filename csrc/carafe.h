// What the front (carafe.cpp) and the backends (cpu/, cuda/) tell each other.
//
// Nothing here knows PyTorch: a backend sees sizes, pointers and strides. Notation, after the
// CARAFE paper (arXiv 1905.02188, section 3) and `carafe_d2/reference.py`:
//
//   k = kernel, r = (k - 1) / 2, s = scale, g = group, t = tap = (u + r) * k + (v + r)
//   (h, w)             a source location, around the pixel (h * stride, w * stride) of the features
//   p = dy * s + dx    one of its s * s output pixels, at (h * s + dy, w * s + dx)
//
// Upsampling has a stride of 1, downsampling a scale of 1.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CARAFE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CARAFE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace carafe_d2 {

enum class Type { kDouble, kFloat, kHalf, kBFloat16 };

struct Shape {
  int64_t batch, channels, height, width;  // of the features
  int64_t kernel, groups, scale, stride;
  bool channels_last;  // layout of features, output and the gradients of either

  // Of source locations.
  CARAFE_HOST_DEVICE int64_t rows() const { return (height + stride - 1) / stride; }
  CARAFE_HOST_DEVICE int64_t columns() const { return (width + stride - 1) / stride; }

  CARAFE_HOST_DEVICE int64_t radius() const { return (kernel - 1) / 2; }
  CARAFE_HOST_DEVICE int64_t taps() const { return kernel * kernel; }
  CARAFE_HOST_DEVICE int64_t subpixels() const { return scale * scale; }
  CARAFE_HOST_DEVICE int64_t group_channels() const { return channels / groups; }
};

// A (N, C, H, W) tensor: features, output or one of their gradients. Strides count elements.
struct Map {
  void* data;
  Type type;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};

// The weights of the taps (the paper's reassembly kernels; here, kernels are functions), one for
// each (n, g, t, h, w, p). With R x C locations, masks (N, g*k*k, s*R, s*C) and the logits of the
// content encoder (N, g*k*k*s*s, R, C) hold the same values in a different order, and in both the
// offset is linear in these indices. So one struct of strides describes either of them, and
// `softmax` says whether the values have to be normalized over the taps first.
struct Weights {
  void* data;
  Type type;
  int64_t batch_stride, group_stride, tap_stride;
  int64_t row_stride, sub_row_stride;  // of source locations, of the subpixels of one
  int64_t column_stride, sub_column_stride;
  bool softmax;
};

// One backend. Outputs, the last arguments, are overwritten; gradients that are not wanted are null.
// Columns (or channels, in channels last) of features, output and their gradients are adjacent;
// every other stride is free.
struct Backend {
  void (*forward)(const Shape&, const Map& features, const Weights&, const Map& output);
  void (*backward)(const Shape&, const Map& grad_output, const Map& features, const Weights&,
                   const Map* grad_features, const Weights* grad_weights);
};

extern const Backend kCpuBackend;
#ifdef CARAFE_D2_WITH_CUDA
extern const Backend kCudaBackend;  // launches on the current device and stream
#endif

}  // namespace carafe_d2
