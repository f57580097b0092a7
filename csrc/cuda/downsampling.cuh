// CUDA kernels for downsampling of contiguous maps: kernel sizes 3 and 5, stride 2, even sizes. They
// consist of what contiguous.cuh has.
//
// forward and the gradient of the weights: tiles of locations that are two pixels apart, with one
// output pixel each.
//
// the gradient of the features: an upsampling of the output's gradient. A location has four pixels of
// the features, and a smaller kernel over the locations around it has the weights by which these
// reach each of the four:
//
//     k = 5, r = 2               k' = 3, r' = 1
//
//     location h':               pixel 2 * h + dy:
//     weights of pixels          weights of locations h - r' to h + r'; that of h - r' + a
//     2 * h' - r to 2 * h' + r   is tap u = dy + r + 2 * (r' - a) there, if it has one
//
// The two numbers of each softmax come from a launch of their own.
#pragma once

#include "contiguous.cuh"
#include "general.cuh"

namespace carafe_d2::downsampling {

using contiguous::kBackwardBlocks;
using contiguous::kBackwardWarps;
using contiguous::kForwardBlocks;
using contiguous::kForwardWarps;
using contiguous::kSubpixels;
using contiguous::kWeights;
using contiguous::kWindows;
using contiguous::Tile;
using Normalizer = general::Normalizer<float>;

constexpr int kStride = 2;

// Side of the kernel by which the gradients of features are gathered.
template <int k>
constexpr int kGathered = 2 * ((k / 2 + 1) / kStride) + 1;

// The weights by which the locations around it reach a pixel of the features; see
// contiguous::OwnWeights.
template <int k>
struct GatheredWeights {
  static constexpr int kSide = kGathered<k>, kRadius = kSide / 2;

  const Shape& shape;
  const Weights& weights;
  const Normalizer* normalizers;

  // Row (or column) of the tap by which the location in row `a` of those around reaches a location's
  // pixel in row `p`.
  CARAFE_HOST_DEVICE static constexpr int tap(int p, int a) {
    return p + k / 2 + kStride * (kRadius - a);
  }

  CARAFE_HOST_DEVICE static constexpr bool has(int p, int t) {
    const int u = tap(p / kStride, t / kSide), v = tap(p % kStride, t % kSide);
    return u >= 0 && u < k && v >= 0 && v < k;
  }

  __device__ __forceinline__ void stage(const Tile& tile, int location, int p,
                                        const SharedArray<float>& shared, int index) const {
    const int64_t plane = tile.n * shape.groups + tile.g;
#pragma unroll
    for (int t = 0; t < kSide * kSide; ++t) {
      const int h = tile.row(location) + t / kSide - kRadius;
      const int w = tile.column(location) + t % kSide - kRadius;
      float value = 0;
      if (has(p, t) && h >= 0 && h < shape.height && w >= 0 && w < shape.width) {
        const int64_t taps = weights_offset(weights, shape, tile.n, tile.g, h, w, 0);
        const int u = tap(p / kStride, t / kSide), v = tap(p % kStride, t % kSide);
        with_elements(weights, [&](const auto* elements) {
          const auto normalizer = weights.softmax
                                      ? normalizers[(plane * shape.height + h) * shape.width + w]
                                      : Normalizer{};
          value = general::weight_of(weights, elements + taps + (u * k + v) * weights.tap_stride,
                                     normalizer);
        });
      }
      shared.set(index + t * kWarpSize * kSubpixels<kSide>, value);
    }
  }
};

// `shape` is that of an upsampling from the output's gradient to that of the features.
template <int k, typename T>
__global__ void __launch_bounds__(kForwardWarps* kWarpSize, kForwardBlocks)
    backward_features_kernel(Shape shape, Map grad_output, Weights weights,
                             const Normalizer* normalizers, Map grad_features, int splits,
                             bool adjacent) {
  constexpr int kSide = kGathered<k>;
  SHARED_ARRAY(float, shared, (kWeights<kSide> + kForwardWarps * kWindows<kSide, T>));
  contiguous::forward_block<kSide, T>(shape, grad_output, grad_features, splits, adjacent, shared,
                                      GatheredWeights<k>{shape, weights, normalizers});
}

template <int k, typename T>
__global__ void __launch_bounds__(kBackwardWarps<k>* kWarpSize, kBackwardBlocks)
    backward_weights_kernel(Shape shape, Map grad_output, Map features, Weights weights,
                            Weights grad_weights) {
  SHARED_ARRAY(float, shared, (kWeights<k, kStride> + kBackwardWarps<k> * kWindows<k, T, kStride>));
  const Tile tile(shape, blockIdx.x, 1, 1);
  contiguous::backward_tile<k, T, kStride>(shape, grad_output, features, weights, grad_weights,
                                           tile, true, shared);
}

// That of the locations, and of an upsampling from there by `scale`.
inline Shape shape_of_locations(const Shape& shape, int64_t scale) {
  Shape result = shape;
  result.height = shape.rows();
  result.width = shape.columns();
  result.scale = scale;
  result.stride = 1;
  return result;
}

inline bool is_suited(const Shape& shape, std::initializer_list<Map> maps) {
  return shape.stride == kStride && shape.height % kStride == 0 && shape.width % kStride == 0 &&
         contiguous::is_suited(shape_of_locations(shape, kStride), maps);
}

// Calls body(k) with the kernel size as a constant; false for sizes that are left to general.cuh.
template <typename Body>
bool with_small_kernel(const Shape& shape, const Body& body) {
  if (shape.kernel >= 7) return false;
  return with_kernel_size(shape, [&](auto k) {
    if constexpr (k < 7) body(k);
  });
}

template <typename Types, typename Launcher>
bool forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  using T = typename Types::Feature;
  const Shape locations = shape_of_locations(shape, 1);
  return is_suited(shape, {features, output}) && with_small_kernel(shape, [&](auto k) {
           contiguous::for_grid<k, kStride>(
               launcher, locations, [&](int64_t blocks, int splits, bool adjacent) {
                 launch(launcher, contiguous::forward_kernel<k, T, kStride>, blocks,
                        kForwardWarps * kWarpSize, locations, features, weights, output, splits,
                        adjacent);
               });
         });
}

// Gradients that are not wanted are null.
template <typename Types, typename Launcher>
bool backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  using T = typename Types::Feature;
  if (!is_suited(shape, {grad_output, features})) return false;
  if (grad_features &&
      !(is_suited(shape, {*grad_features}) && contiguous::pairs_aligned<T>(*grad_features))) {
    return false;
  }
  return with_small_kernel(shape, [&](auto k) {
    if (grad_features) {
      const Normalizer* normalizers = general::normalizers<Types>(launcher, shape, weights);
      const Shape upsampling = shape_of_locations(shape, kStride);
      contiguous::for_grid<kGathered<k>>(
          launcher, upsampling, [&](int64_t blocks, int splits, bool adjacent) {
            launch(launcher, backward_features_kernel<k, T>, blocks, kForwardWarps * kWarpSize,
                   upsampling, grad_output, weights, normalizers, *grad_features, splits, adjacent);
          });
    }
    if (grad_weights) {
      const Shape locations = shape_of_locations(shape, 1);
      launch(launcher, backward_weights_kernel<k, T>, contiguous::tiles(locations),
             kBackwardWarps<k> * kWarpSize, locations, grad_output, features, weights,
             *grad_weights);
    }
  });
}

}  // namespace carafe_d2::downsampling
