// CUDA kernels for downsampling where channels are adjacent in memory: kernel sizes 3 and 5, stride 2.
//
// As in channels_last.cuh, a lane has kVector adjacent channels. A block has a tile of locations,
// whose weights are in shared memory. What the windows of adjacent locations have in common is read
// again, from the first cache.
//
// forward and backward_features: a thread has a location, and in the latter the four pixels of the
// features that are there, see downsampling.cuh.
// backward_weights: a warp has a location.
#pragma once

#include "channels_last.cuh"
#include "downsampling.cuh"

namespace carafe_d2::downsampling_channels_last {

using channels_last::is_below;
using channels_last::kVector;
using channels_last::load;
using channels_last::load_if;
using channels_last::store;
using channels_last::take;
using channels_last::to_floats;
using downsampling::GatheredWeights;
using downsampling::kStride;

constexpr int kThreads = 256, kBlocks = 2;  // that fit into a multiprocessor
// Of backward_weights, which needs more registers
constexpr int kWeightThreads = 128, kWeightBlocks = 3;
constexpr int kRows = 8, kColumns = 4;  // of a tile, of rows at most

struct Tiling {
  int rows;  // of a tile, in locations
  int row_tiles, column_tiles;
};

// The tile of this block.
struct Tile {
  int n, g;
  int row, column;  // of its first location
  int rows;
  int vectors;                          // of a group
  int height, width;                    // of the features
  int location_rows, location_columns;  // of the map

  __device__ __forceinline__ Tile(const Shape& shape, const Tiling& tiling)
      : rows(tiling.rows),
        vectors(static_cast<int>(shape.group_channels()) / kVector),
        height(static_cast<int>(shape.height)),
        width(static_cast<int>(shape.width)),
        location_rows(static_cast<int>(shape.rows())),
        location_columns(static_cast<int>(shape.columns())) {
    unsigned block = blockIdx.x;
    column = take(block, tiling.column_tiles) * kColumns;
    row = take(block, tiling.row_tiles) * rows;
    g = take(block, static_cast<unsigned>(shape.groups));
    n = static_cast<int>(block);
  }

  __device__ __forceinline__ int locations() const { return rows * kColumns; }

  __device__ __forceinline__ bool is_location(int h, int w) const {
    return is_below(h, location_rows) && is_below(w, location_columns);
  }

  __device__ __forceinline__ bool is_pixel(int y, int x) const {
    return is_below(y, height) && is_below(x, width);
  }

  // Where the first channel of the group is in pixel (y, x) of a map.
  template <typename T>
  __device__ __forceinline__ T* pixel(const Map& map, int64_t y, int64_t x) const {
    return static_cast<T*>(map.data) + n * map.batch_stride + y * map.row_stride +
           x * map.column_stride + int64_t(g) * vectors * kVector;
  }

  // Calls body(location, h, w, channel) for the locations of the tile and the vectors of channels
  // that this thread takes: threads beside each other have adjacent channels.
  template <typename Body>
  __device__ __forceinline__ void for_vectors(const Body& body) const {
    for (int i = threadIdx.x; i < locations() * vectors; i += kThreads) {
      const int location = i / vectors, channel = (i - location * vectors) * kVector;
      const int h = row + location / kColumns, w = column + location % kColumns;
      if (is_location(h, w)) body(location, h, w, channel);
    }
  }
};

// The weights of a tile and of the locations around it in shared memory: [location][tap], with zeros
// for those outside the map.
template <int k, int kMargin>
struct TileWeights {
  static constexpr int kPitch = kColumns + 2 * kMargin;
  static constexpr int kSize = (kRows + 2 * kMargin) * kPitch * k * k;

  // Where the weights of the location in that row and column of the tile begin.
  CARAFE_HOST_DEVICE static int index(int row, int column) {
    return ((row + kMargin) * kPitch + column + kMargin) * (k * k);
  }

  // The block loads them.
  __device__ __forceinline__ static void load(const Shape& shape, const Weights& weights,
                                              const Tile& tile, const SharedArray<float>& shared) {
    for (int i = threadIdx.x; i < (tile.rows + 2 * kMargin) * kPitch; i += kThreads) {
      const int h = tile.row + i / kPitch - kMargin, w = tile.column + i % kPitch - kMargin;
      float values[k * k] = {};
      if (tile.is_location(h, w)) {
        load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, h, w, 0), values);
      }
#pragma unroll
      for (int t = 0; t < k * k; ++t) shared.set(i * (k * k) + t, values[t]);
    }
    __syncthreads();
  }
};

template <int k, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    forward_kernel(Shape shape, Tiling tiling, Map features, Weights weights, Map output) {
  using OwnWeights = TileWeights<k, 0>;
  SHARED_ARRAY(float, shared, OwnWeights::kSize);
  const Tile tile(shape, tiling);
  OwnWeights::load(shape, weights, tile, shared);
  const int row = static_cast<int>(features.row_stride);
  const int column = static_cast<int>(features.column_stride);
  tile.for_vectors([&](int location, int h, int w, int channel) {
    const int y = h * kStride - k / 2, x = w * kStride - k / 2;
    const T* window = tile.pixel<const T>(features, y, x) + channel;
    float sum[kVector] = {};
#pragma unroll
    for (int t = 0; t < k * k; ++t) {
      const int u = t / k, v = t % k;
      float feature[kVector];
      load_if(tile.is_pixel(y + u, x + v), window + (u * row + v * column), feature);
      const float weight = shared.get(location * (k * k) + t);
#pragma unroll
      for (int q = 0; q < kVector; ++q) sum[q] += weight * feature[q];
    }
    store(sum, tile.pixel<T>(output, h, w) + channel);
  });
}

template <int k, typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    backward_features_kernel(Shape shape, Tiling tiling, Map grad_output, Weights weights,
                             Map grad_features) {
  using Gathered = GatheredWeights<k>;
  constexpr int kSide = Gathered::kSide, kRadius = Gathered::kRadius, kPixels = kStride * kStride;
  using WeightsAround = TileWeights<k, kRadius>;
  SHARED_ARRAY(float, shared, WeightsAround::kSize);
  const Tile tile(shape, tiling);
  WeightsAround::load(shape, weights, tile, shared);
  const int row = static_cast<int>(grad_output.row_stride);
  const int column = static_cast<int>(grad_output.column_stride);
  tile.for_vectors([&](int location, int h, int w, int channel) {
    const T* source = tile.pixel<const T>(grad_output, h, w) + channel;
    const int taps = WeightsAround::index(location / kColumns, location % kColumns);
    float sums[kPixels][kVector] = {};
#pragma unroll
    for (int t = 0; t < kSide * kSide; ++t) {
      const int dy = t / kSide - kRadius, dx = t % kSide - kRadius;
      float gradient[kVector];
      load_if(tile.is_location(h + dy, w + dx), source + (dy * row + dx * column), gradient);
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        if (!Gathered::has(p, t)) continue;
        const int u = Gathered::tap(p / kStride, t / kSide);
        const int v = Gathered::tap(p % kStride, t % kSide);
        const float weight =
            shared.get(taps + (dy * WeightsAround::kPitch + dx) * (k * k) + u * k + v);
#pragma unroll
        for (int q = 0; q < kVector; ++q) sums[p][q] += weight * gradient[q];
      }
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      const int y = h * kStride + p / kStride, x = w * kStride + p % kStride;
      if (tile.is_pixel(y, x)) store(sums[p], tile.pixel<T>(grad_features, y, x) + channel);
    }
  });
}

// The sum over all lanes of sums[lane], where those of each half of 2 * kHalf lanes exchange what the
// other half needs.
template <int kHalf = kWarpSize / 2>
__device__ __forceinline__ float sum_of_warp(float (&sums)[kWarpSize], int lane) {
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float own = lane & kHalf ? sums[i + kHalf] : sums[i];
    const float others = lane & kHalf ? sums[i] : sums[i + kHalf];
    sums[i] = own + __shfl_xor_sync(kAllLanes, others, kHalf);
  }
  if constexpr (kHalf > 1) sum_of_warp<kHalf / 2>(sums, lane);
  return sums[0];
}

template <int k, typename T>
__global__ void __launch_bounds__(kWeightThreads, kWeightBlocks)
    backward_weights_kernel(Shape shape, Tiling tiling, Map grad_output, Map features,
                            Weights weights, Weights grad_weights) {
  SHARED_ARRAY(float, shared, kRows * kColumns * k * k);
  const Tile tile(shape, tiling);
  const int row = static_cast<int>(features.row_stride);
  const int column = static_cast<int>(features.column_stride);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < tile.locations();
       i += kWeightThreads / kWarpSize) {
    const int h = tile.row + i / kColumns, w = tile.column + i % kColumns;
    if (!tile.is_location(h, w)) continue;
    const int y = h * kStride - k / 2, x = w * kStride - k / 2;
    const T* window = tile.pixel<const T>(features, y, x);
    const T* output = tile.pixel<const T>(grad_output, h, w);
    float sums[kWarpSize] = {};
    for (int vector = lane; vector < tile.vectors; vector += kWarpSize) {
      float gradient[kVector];
      to_floats(load(output + vector * kVector), gradient);
#pragma unroll
      for (int t = 0; t < k * k; ++t) {
        const int u = t / k, v = t % k;
        float feature[kVector];
        load_if(tile.is_pixel(y + u, x + v), window + (u * row + v * column + vector * kVector),
                feature);
#pragma unroll
        for (int q = 0; q < kVector; ++q) sums[t] += feature[q] * gradient[q];
      }
    }
    const float sum = sum_of_warp(sums, lane);
    if (lane < k * k) shared.set(i * (k * k) + lane, sum);
  }
  __syncthreads();

  const int i = static_cast<int>(threadIdx.x);
  const int h = tile.row + i / kColumns, w = tile.column + i % kColumns;
  if (i >= tile.locations() || !tile.is_location(h, w)) return;
  float gradients[k * k];
#pragma unroll
  for (int t = 0; t < k * k; ++t) gradients[t] = shared.get(i * (k * k) + t);
  store_weight_gradients(gradients, weights,
                         weights_offset(weights, shape, tile.n, tile.g, h, w, 0), grad_weights,
                         weights_offset(grad_weights, shape, tile.n, tile.g, h, w, 0));
}

// --------------------------------------------------------------------------------------- launches

template <typename T>
bool is_suited(const Shape& shape, const Map& map) {
  return shape.stride == kStride && channels_last::is_suited(shape) &&
         shape.group_channels() <= INT32_MAX / (kRows * kColumns) &&
         channels_last::is_suited<T>(shape, map);
}

// Calls body(tiling, blocks): with as little work as possible for the busiest multiprocessor, for
// which to begin and end is work, too.
template <typename Launcher, typename Body>
void for_tiling(Launcher& launcher, const Shape& shape, int threads, const Body& body) {
  int64_t least_work = INT64_MAX, blocks = 0;
  Tiling best{};
  for (int rows = kRows; rows > 0; rows /= 2) {
    const Tiling tiling = {rows, static_cast<int>(divide_up(shape.rows(), rows)),
                           static_cast<int>(divide_up(shape.columns(), kColumns))};
    const int64_t tiles = shape.batch * shape.groups * tiling.row_tiles * tiling.column_tiles;
    const int64_t turns = divide_up(rows * kColumns * (shape.group_channels() / kVector), threads);
    const int64_t work = divide_up(tiles, launcher.multiprocessors()) * (turns + 2);
    if (work < least_work) {
      least_work = work;
      best = tiling;
      blocks = tiles;
    }
  }
  body(best, blocks);
}

// forward and backward return false, and launch nothing, for what they leave to general.cuh.

template <typename T, typename Launcher>
bool forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  if (!is_suited<T>(shape, features) || !is_suited<T>(shape, output)) return false;
  return downsampling::with_small_kernel(shape, [&](auto k) {
    for_tiling(launcher, shape, kThreads, [&](const Tiling& tiling, int64_t blocks) {
      launch(launcher, forward_kernel<k, T>, blocks, kThreads, shape, tiling, features, weights,
             output);
    });
  });
}

// Gradients that are not wanted are null.
template <typename T, typename Launcher>
bool backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  if (!is_suited<T>(shape, grad_output)) return false;
  if (grad_features && !is_suited<T>(shape, *grad_features)) return false;
  if (grad_weights && !is_suited<T>(shape, features)) return false;
  return downsampling::with_small_kernel(shape, [&](auto k) {
    if (grad_features) {
      for_tiling(launcher, shape, kThreads, [&](const Tiling& tiling, int64_t blocks) {
        launch(launcher, backward_features_kernel<k, T>, blocks, kThreads, shape, tiling,
               grad_output, weights, *grad_features);
      });
    }
    if (grad_weights) {
      for_tiling(launcher, shape, kWeightThreads, [&](const Tiling& tiling, int64_t blocks) {
        launch(launcher, backward_weights_kernel<k, T>, blocks, kWeightThreads, shape, tiling,
               grad_output, features, weights, *grad_weights);
      });
    }
  });
}

}  // namespace carafe_d2::downsampling_channels_last
