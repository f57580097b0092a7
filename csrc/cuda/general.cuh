// CUDA kernels for everything that the specialized ones leave out: float64, odd scales, any kernel
// size, any alignment.
//
// A thread owns what it writes (output values, feature gradients, or the weight gradients of one
// output pixel) and gathers what goes into it in a fixed order. Offsets are 64-bit throughout. T is
// the type of the features, W that of the weights in memory, A the accumulation type.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace carafe_d2::general {

constexpr int kThreads = 256;       // of a block; one has to fit, so nothing spills
constexpr int kChannels = 8;        // that one thread handles at a time, in registers
constexpr int kCachedTaps = 7 * 7;  // weight gradients of a pixel that a thread keeps

// An output pixel: subpixel (dy, dx) of source location (h, w) in group g of image n.
struct Pixel {
  int64_t n, g, h, w, dy, dx;
};

CARAFE_HOST_DEVICE int64_t pixel_count(const Shape& shape) {
  return shape.batch * shape.groups * shape.rows() * shape.scale * shape.columns() * shape.scale;
}

// The pixel with this index in the order (n, g, y, x).
__device__ __forceinline__ Pixel pixel_at(const Shape& shape, int64_t index) {
  const int64_t width = shape.columns() * shape.scale, height = shape.rows() * shape.scale;
  const int64_t x = index % width, y = index / width % height, plane = index / width / height;
  return {plane / shape.groups, plane % shape.groups, y / shape.scale,
          x / shape.scale,      y % shape.scale,      x % shape.scale};
}

__device__ __forceinline__ int64_t index_of(const Shape& shape, const Pixel& pixel) {
  const int64_t y = pixel.h * shape.scale + pixel.dy, x = pixel.w * shape.scale + pixel.dx;
  const int64_t plane = pixel.n * shape.groups + pixel.g;
  return (plane * shape.rows() * shape.scale + y) * shape.columns() * shape.scale + x;
}

__device__ __forceinline__ int64_t weights_offset(const Weights& weights, const Pixel& pixel) {
  return pixel.n * weights.batch_stride + pixel.g * weights.group_stride +
         pixel.h * weights.row_stride + pixel.dy * weights.sub_row_stride +
         pixel.w * weights.column_stride + pixel.dx * weights.sub_column_stride;
}

__device__ __forceinline__ int64_t output_offset(const Shape& shape, const Map& map,
                                                 const Pixel& pixel) {
  return pixel.n * map.batch_stride + pixel.g * shape.group_channels() * map.channel_stride +
         (pixel.h * shape.scale + pixel.dy) * map.row_stride +
         (pixel.w * shape.scale + pixel.dx) * map.column_stride;
}

// The softmax of a pixel: the weight of a tap is exp(logit - largest) * factor. Added up to one
// number, the factor's logarithm would be rounded to what the largest logit leaves of it.
template <typename A>
struct alignas(2 * sizeof(A)) Normalizer {
  A largest, factor;
};

template <typename A, typename W>
__device__ __forceinline__ Normalizer<A> normalizer_of(const W* taps, int64_t count,
                                                       int64_t stride) {
  A largest = to_float(taps[0]);
  for (int64_t t = 1; t < count; ++t) {
    const A value = to_float(taps[t * stride]);
    largest = value > largest ? value : largest;
  }
  A sum = 0;
  for (int64_t t = 0; t < count; ++t) sum += exponential(to_float(taps[t * stride]) - largest);
  return {largest, 1 / sum};
}

// Without a softmax, `normalizer` is not looked at.
template <typename A, typename W>
__device__ __forceinline__ A weight_of(const Weights& weights, const W* tap,
                                       const Normalizer<A>& normalizer) {
  const A value = to_float(*tap);
  return weights.softmax ? exponential(value - normalizer.largest) * normalizer.factor : value;
}

// The channels of one thread: `first`, `first + step`, ... below `count`. In channels last adjacent
// threads take adjacent channels, otherwise they take adjacent pixels; either way their accesses
// coalesce.
struct Channels {
  int64_t item;  // index of the pixel
  int64_t first, step, count;
};

CARAFE_HOST_DEVICE int64_t channel_blocks(const Shape& shape) {
  return (shape.group_channels() + kChannels - 1) / kChannels;
}

__device__ __forceinline__ Channels channels_at(const Shape& shape, int64_t items, int64_t index) {
  const int64_t blocks = channel_blocks(shape);
  if (shape.channels_last) return {index / blocks, index % blocks, blocks, shape.group_channels()};
  return {index % items, index / items * kChannels, 1, shape.group_channels()};
}

// out = sum over taps of weight * feature; a thread computes one pixel of up to kChannels channels.
template <typename A, typename T, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(Shape shape, Map features, Weights weights, Map output) {
  const int64_t pixels = pixel_count(shape), threads = pixels * channel_blocks(shape);
  const int64_t radius = shape.radius();
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < threads;
       index += int64_t(gridDim.x) * blockDim.x) {
    const Channels channels = channels_at(shape, pixels, index);
    const Pixel pixel = pixel_at(shape, channels.item);
    const W* taps = static_cast<const W*>(weights.data) + weights_offset(weights, pixel);
    const Normalizer<A> normalizer = weights.softmax
                                         ? normalizer_of<A>(taps, shape.taps(), weights.tap_stride)
                                         : Normalizer<A>{};
    const T* source = static_cast<const T*>(features.data) + pixel.n * features.batch_stride +
                      pixel.g * shape.group_channels() * features.channel_stride;
    A sum[kChannels] = {};
    for (int64_t u = 0; u < shape.kernel; ++u) {
      const int64_t y = pixel.h * shape.stride + u - radius;
      if (y < 0 || y >= shape.height) continue;
      for (int64_t v = 0; v < shape.kernel; ++v) {
        const int64_t x = pixel.w * shape.stride + v - radius;
        if (x < 0 || x >= shape.width) continue;
        const A weight =
            weight_of(weights, taps + (u * shape.kernel + v) * weights.tap_stride, normalizer);
        const T* location = source + y * features.row_stride + x * features.column_stride;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) {
          const int64_t c = channels.first + i * channels.step;
          if (c < channels.count)
            sum[i] += weight * to_float(location[c * features.channel_stride]);
        }
      }
    }
    T* target = static_cast<T*>(output.data) + output_offset(shape, output, pixel);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int64_t c = channels.first + i * channels.step;
      if (c < channels.count) from_float(sum[i], target[c * output.channel_stride]);
    }
  }
}

// Normalizers of the softmax, one for each group and output pixel, for the two kernels below.
template <typename A, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    normalizer_kernel(Shape shape, Weights weights, Normalizer<A>* normalizers) {
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < pixel_count(shape);
       index += int64_t(gridDim.x) * blockDim.x) {
    const W* taps =
        static_cast<const W*>(weights.data) + weights_offset(weights, pixel_at(shape, index));
    normalizers[index] = normalizer_of<A>(taps, shape.taps(), weights.tap_stride);
  }
}

// The last row (or column) of taps through which some location reaches row y (or column) of the
// features. The next location does so by a tap that is `stride` rows before.
__device__ __forceinline__ int64_t last_tap(const Shape& shape, int64_t y) {
  const int64_t last = shape.kernel - 1, first = (y + shape.radius()) % shape.stride;
  return last - (last - first + shape.stride) % shape.stride;
}

// Gradient of the features, gathered from the output pixels that a pixel of theirs contributed to;
// a thread computes one such pixel of up to kChannels channels.
template <typename A, typename T, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    backward_features_kernel(Shape shape, Map grad_output, Weights weights,
                             const Normalizer<A>* normalizers, Map grad_features) {
  const int64_t pixels = shape.batch * shape.groups * shape.height * shape.width;
  const int64_t threads = pixels * channel_blocks(shape), radius = shape.radius();
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < threads;
       index += int64_t(gridDim.x) * blockDim.x) {
    const Channels channels = channels_at(shape, pixels, index);
    const int64_t x = channels.item % shape.width;
    const int64_t y = channels.item / shape.width % shape.height;
    const int64_t plane = channels.item / shape.width / shape.height;
    const int64_t n = plane / shape.groups, g = plane % shape.groups;
    const int64_t last_row = last_tap(shape, y), first_h = (y + radius - last_row) / shape.stride;
    const int64_t last_column = last_tap(shape, x);
    const int64_t first_w = (x + radius - last_column) / shape.stride;
    A sum[kChannels] = {};
    for (int64_t u = last_row, h = first_h; u >= 0; u -= shape.stride, ++h) {
      if (h < 0 || h >= shape.rows()) continue;
      for (int64_t v = last_column, w = first_w; v >= 0; v -= shape.stride, ++w) {
        if (w < 0 || w >= shape.columns()) continue;
        for (int64_t p = 0; p < shape.subpixels(); ++p) {
          const Pixel pixel{n, g, h, w, p / shape.scale, p % shape.scale};
          const W* tap = static_cast<const W*>(weights.data) + weights_offset(weights, pixel) +
                         (u * shape.kernel + v) * weights.tap_stride;
          const Normalizer<A> normalizer =
              weights.softmax ? normalizers[index_of(shape, pixel)] : Normalizer<A>{};
          const A weight = weight_of(weights, tap, normalizer);
          const T* source =
              static_cast<const T*>(grad_output.data) + output_offset(shape, grad_output, pixel);
#pragma unroll
          for (int i = 0; i < kChannels; ++i) {
            const int64_t c = channels.first + i * channels.step;
            if (c < channels.count)
              sum[i] += weight * to_float(source[c * grad_output.channel_stride]);
          }
        }
      }
    }
    T* target = static_cast<T*>(grad_features.data) + n * grad_features.batch_stride +
                g * shape.group_channels() * grad_features.channel_stride +
                y * grad_features.row_stride + x * grad_features.column_stride;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const int64_t c = channels.first + i * channels.step;
      if (c < channels.count) from_float(sum[i], target[c * grad_features.channel_stride]);
    }
  }
}

// Gradient of the weight of tap (u, v) of a pixel: the product of output gradient and feature, summed
// over the channels.
template <typename A, typename T>
__device__ __forceinline__ A weight_gradient(const Shape& shape, const Map& grad_output,
                                             const Map& features, const Pixel& pixel, int64_t u,
                                             int64_t v) {
  const int64_t y = pixel.h * shape.stride + u - shape.radius();
  const int64_t x = pixel.w * shape.stride + v - shape.radius();
  if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) return 0;
  const T* gradient =
      static_cast<const T*>(grad_output.data) + output_offset(shape, grad_output, pixel);
  const T* feature = static_cast<const T*>(features.data) + pixel.n * features.batch_stride +
                     pixel.g * shape.group_channels() * features.channel_stride +
                     y * features.row_stride + x * features.column_stride;
  A sum = 0;
  for (int64_t c = 0; c < shape.group_channels(); ++c) {
    sum += A(to_float(gradient[c * grad_output.channel_stride])) *
           to_float(feature[c * features.channel_stride]);
  }
  return sum;
}

// Gradient of masks or logits; a thread computes all taps of one pixel. Through the softmax
// m = softmax(logits): grad logits[t] = m[t] * (grad m[t] - sum over t' of m[t'] * grad m[t']).
template <typename A, typename T, typename W>
__global__ void __launch_bounds__(kThreads, 1)
    backward_weights_kernel(Shape shape, Map grad_output, Map features, Weights weights,
                            const Normalizer<A>* normalizers, Weights grad_weights) {
  for (int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; index < pixel_count(shape);
       index += int64_t(gridDim.x) * blockDim.x) {
    const Pixel pixel = pixel_at(shape, index);
    const W* taps = static_cast<const W*>(weights.data) + weights_offset(weights, pixel);
    W* grad_taps = static_cast<W*>(grad_weights.data) + weights_offset(grad_weights, pixel);
    const Normalizer<A> normalizer = weights.softmax ? normalizers[index] : Normalizer<A>{};
    A cache[kCachedTaps];
    A sum = 0;
    if (weights.softmax) {
      int t = 0;
      for (int u = 0; u < shape.kernel; ++u) {
        for (int v = 0; v < shape.kernel; ++v, ++t) {
          const A gradient = weight_gradient<A, T>(shape, grad_output, features, pixel, u, v);
          sum += weight_of(weights, taps + t * weights.tap_stride, normalizer) * gradient;
          if (t < kCachedTaps) cache[t] = gradient;
        }
      }
    }
    int t = 0;
    for (int u = 0; u < shape.kernel; ++u) {
      for (int v = 0; v < shape.kernel; ++v, ++t) {
        A gradient = weights.softmax && t < kCachedTaps
                         ? cache[t]
                         : weight_gradient<A, T>(shape, grad_output, features, pixel, u, v);
        if (weights.softmax) {
          gradient =
              weight_of(weights, taps + t * weights.tap_stride, normalizer) * (gradient - sum);
        }
        from_float(gradient, grad_taps[t * grad_weights.tap_stride]);
      }
    }
  }
}

// Kernels loop over the work for which a grid has not enough blocks.
inline dim3 grid(int64_t threads) {
  return dim3(
      static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, INT32_MAX)));
}

// Normalizers of the softmax, one for each group and output pixel; null without a softmax.
template <typename Types, typename Launcher>
Normalizer<typename Types::Accumulation>* normalizers(Launcher& launcher, const Shape& shape,
                                                      const Weights& weights) {
  using A = typename Types::Accumulation;
  if (!weights.softmax) return nullptr;
  const int64_t pixels = pixel_count(shape);
  auto* result = static_cast<Normalizer<A>*>(launcher.temporary(pixels * sizeof(Normalizer<A>)));
  launcher.launch(normalizer_kernel<A, typename Types::Weight>, grid(pixels), kThreads, shape,
                  weights, result);
  return result;
}

template <typename Types, typename Launcher>
void forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  launcher.launch(
      forward_kernel<typename Types::Accumulation, typename Types::Feature, typename Types::Weight>,
      grid(pixel_count(shape) * channel_blocks(shape)), kThreads, shape, features, weights, output);
}

// Gradients that are not wanted are null.
template <typename Types, typename Launcher>
void backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  using A = typename Types::Accumulation;
  using T = typename Types::Feature;
  using W = typename Types::Weight;
  const Normalizer<A>* normalizer = normalizers<Types>(launcher, shape, weights);
  if (grad_features) {
    const int64_t pixels = shape.batch * shape.groups * shape.height * shape.width;
    launcher.launch(backward_features_kernel<A, T, W>, grid(pixels * channel_blocks(shape)),
                    kThreads, shape, grad_output, weights, normalizer, *grad_features);
  }
  if (grad_weights) {
    launcher.launch(backward_weights_kernel<A, T, W>, grid(pixel_count(shape)), kThreads, shape,
                    grad_output, features, weights, normalizer, *grad_weights);
  }
}

}  // namespace carafe_d2::general
