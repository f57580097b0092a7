// CUDA kernels for contiguous maps, kernel sizes 3, 5, 7 and even scales. downsampling.cuh makes use
// of what they consist of, with locations that are S = 2 pixels apart; here, S is 1.
//
// Lanes are source locations. Neighboring lanes have neighboring columns, so whatever they read
// or write coalesces, and every lane has weights of its own. A thread handles P of the s * s
// subpixels of its location at a time, in passes.
//
// forward and the gradient of the weights: a warp has a tile of 8 x 4 locations. It walks over
// channels and stages the tile's features, with a margin, in shared memory. A lane keeps its
// P * k * k weights, or their gradients, in registers, so that a feature read once serves P
// multiplications. The warps of a block take different channels of one tile and share the weights;
// in the forward of a map with many tiles they take tiles beside each other and the same channels,
// so that the margins come out of the L1 cache.
//
// the gradient of the features: a warp has a strip of columns, walks down the rows and scatters. A
// lane keeps sums for the k x k locations around its own, separately by column, so that lanes
// exchange values only when a row is complete: k - 1 shuffles for P * k * k multiplications.
//
// One launch makes both gradients, for both read the output's.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "device.cuh"
#include "dispatch.h"

namespace carafe_d2::contiguous {

// Warps of a block, and blocks of a multiprocessor. Twelve warps leave 168 registers to a thread.
constexpr int kForwardWarps = 4, kForwardBlocks = 3;
// Fewer and larger ones normalize weights less often. A 7 x 7 kernel needs more registers.
template <int k>
constexpr int kBackwardWarps = k == 7 ? 4 : 6;
constexpr int kBackwardBlocks = 2;

constexpr int kTileWidth = 8, kTileHeight = 4;

// Tiles beside each other, one for each warp of a forward's block.
constexpr int kTilesAcross = 2, kTilesDown = 2;
static_assert(kTilesAcross * kTilesDown == kForwardWarps);
// Blocks that share the channels of adjacent tiles.
constexpr int kMostAdjacentSplits = 4;
// A 7 x 7 kernel leaves no register for the choice.
template <int k>
constexpr bool kCanBeAdjacent = k != 7;

// Weights of a 7 x 7 kernel for more subpixels than two would not fit into registers.
template <int k, int S = 1>
constexpr int kSubpixels = S > 1    ? 1
                           : k == 7 ? 2
                                    : 4;

// Weights of a warp's locations, or sums for them, in shared memory: tap, location, subpixel.
template <int k, int S = 1>
constexpr int kWeights = k * k * kWarpSize * kSubpixels<k, S>;

// Channels of a warp's tile in shared memory, and as many on their way.
template <int k>
constexpr int kStage = k == 7 ? 1 : 2;

// Horizontally adjacent subpixels, which are read and written at once.
template <int P>
constexpr int kBeside = P == 1 ? 1 : 2;

// A pair in a gradient that comes from elsewhere may be unaligned.
template <int kCount, typename T>
__device__ __forceinline__ Vector<float, kCount> load_beside(const T* source, bool aligned) {
  Vector<T, kCount> loaded;
  if (aligned) {
    loaded = *reinterpret_cast<const Vector<T, kCount>*>(source);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) loaded.values[i] = source[i];
  }
  Vector<float, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.values[i] = to_float(loaded.values[i]);
  return result;
}

template <int kCount, typename T>
__device__ __forceinline__ void store_beside(const float* values, T* target) {
  Vector<T, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) from_float(values[i], result.values[i]);
  *reinterpret_cast<Vector<T, kCount>*>(target) = result;
}

// Offsets of those beside each other from the top left output pixel of a location.
template <int P>
struct Offsets {
  static constexpr int kCount = P / kBeside<P>;
  int values[kCount];

  __device__ __forceinline__ Offsets(const Shape& shape, const Map& map, int pass) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Subpixel subpixel(shape, pass * P + kBeside<P> * i);
      values[i] = subpixel.row * static_cast<int>(map.row_stride) + subpixel.column;
    }
  }
};

// ------------------------------------------------------------------- tiles of 8 x 4 locations

// What a block works on: some subpixels of all locations of a tile, in one group of one image.
// `split` is a part of the channels. With more tiles than one `across` and `down` it is the top left
// one of as many beside each other.
struct Tile {
  int64_t n, g;
  int h, w;  // top left
  int pass, split;

  __device__ __forceinline__ Tile(const Shape& shape, unsigned index, int passes, int splits,
                                  int across = 1, int down = 1) {
    const unsigned columns = static_cast<unsigned>(divide_up(shape.width, across * kTileWidth));
    const unsigned rows = static_cast<unsigned>(divide_up(shape.height, down * kTileHeight));
    w = static_cast<int>(index % columns) * across * kTileWidth;
    index /= columns;
    h = static_cast<int>(index % rows) * down * kTileHeight;
    index /= rows;
    pass = index % passes;
    index /= passes;
    split = index % splits;
    index /= splits;
    g = index % static_cast<unsigned>(shape.groups);
    n = index / static_cast<unsigned>(shape.groups);
  }

  // One of those beside each other.
  __device__ __forceinline__ Tile neighbor(int number) const {
    Tile result = *this;
    result.w += number % kTilesAcross * kTileWidth;
    result.h += number / kTilesAcross * kTileHeight;
    return result;
  }

  // The order of locations, and so of lanes: first the even rows, then the odd ones, see Window.
  CARAFE_HOST_DEVICE static int row_of(int location) {
    return location / kTileWidth % 2 * 2 + location / kTileWidth / 2;
  }
  CARAFE_HOST_DEVICE static int column_of(int location) { return location % kTileWidth; }

  __device__ __forceinline__ int row(int location) const { return h + row_of(location); }
  __device__ __forceinline__ int column(int location) const { return w + column_of(location); }
  __device__ __forceinline__ bool has(const Shape& shape, int location) const {
    return row(location) < shape.height && column(location) < shape.width;
  }
};

inline int64_t tiles(const Shape& shape, int across = 1, int down = 1) {
  return shape.batch * shape.groups * divide_up(shape.height, down * kTileHeight) *
         divide_up(shape.width, across * kTileWidth);
}

// Features of a warp's tile and its margin, on their way through registers to shared memory. The
// locations are S pixels apart, and so has the map S times as many rows and columns of them as
// `shape`, that of the locations.
template <int k, typename T, int S = 1>
class Window {
 public:
  static constexpr int kWidth = S * (kTileWidth - 1) + k, kHeight = S * (kTileHeight - 1) + k;
  // In which lanes of different rows meet in no bank. Two channels are read by half of a warp at
  // once, which has two rows with another between them; with k = 5, they are stored without a gap.
  // Columns that are S apart lie beside each other there, so many of them.
  static constexpr int kColumns = (kWidth + S - 1) / S;
  static constexpr int kPitch = S == 2 ? (2 * kColumns + 1) / 4 * 4 + 2 : kStage<k> == 2 ? 12 : 24;
  static constexpr int kSize = kHeight * kPitch;  // vectors of kStage channels

  __device__ __forceinline__ Window(const Shape& shape, const Map& features, const Tile& tile,
                                    int64_t first_channel, int lane)
      : channel_(features.channel_stride),
        next_(static_cast<const T*>(features.data) + tile.n * features.batch_stride +
              (tile.g * shape.group_channels() + first_channel) * features.channel_stride) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int position = lane + i * kWarpSize;
      const int h = S * tile.h + position / kWidth - k / 2;
      const int w = S * tile.w + position % kWidth - k / 2;
      const bool inside = position < kWidth * kHeight && h >= 0 && h < S * shape.height && w >= 0 &&
                          w < S * shape.width;
      offsets_[i] = inside ? h * static_cast<int>(features.row_stride) + w : -1;
    }
  }

  // Begins to read the next channels, of which `count` are left.
  __device__ __forceinline__ void load(int count) {
#pragma unroll
    for (int c = 0; c < kStage<k>; ++c) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool wanted = offsets_[i] >= 0 && c < count;
        values_[i].values[c] = wanted ? to_float(next_[offsets_[i]]) : 0;
      }
      next_ += channel_;
      forget_origin(next_);
    }
  }

  // Where the vector of a pixel's channels is.
  CARAFE_HOST_DEVICE static int index(int row, int column) {
    return row * kPitch + column % S * kColumns + column / S;
  }
  // ... of that under the lane's first tap.
  CARAFE_HOST_DEVICE static int corner(int lane) {
    return index(S * Tile::row_of(lane), S * Tile::column_of(lane));
  }

  __device__ __forceinline__ void store(const SharedArray<float>& shared, int begin,
                                        int lane) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int position = lane + i * kWarpSize;
      if (position >= kWidth * kHeight) continue;
      // With this factor the compiler knows that it is aligned, and stores it at once.
      shared.set(kStage<k> * (begin + index(position / kWidth, position % kWidth)), values_[i]);
    }
  }

 private:
  static constexpr int kLoads = (kWidth * kHeight + kWarpSize - 1) / kWarpSize;

  int64_t channel_;
  const T* next_;
  int offsets_[kLoads];  // negative outside the map
  Vector<float, kStage<k>> values_[kLoads];
};

// Floats of shared memory for the windows of a warp.
template <int k, typename T, int S = 1>
constexpr int kWindows = 2 * kStage<k> * Window<k, T, S>::kSize;

// Calls prefetch(count) and then body(count, corner) for every kStage channels of a warp, of which
// `count` are left and those beyond are zero: `corner` is the vector in shared memory of the features
// under the lane's first tap. The windows of the block begin at `windows`.
template <int k, typename T, int S, typename Prefetch, typename Body>
__device__ __forceinline__ void for_channels(Window<k, T, S>& window, int count,
                                             const SharedArray<float>& shared, int windows,
                                             int warp, int lane, const Prefetch& prefetch,
                                             const Body& body) {
  constexpr int kSize = Window<k, T, S>::kSize;
  const int corner = Window<k, T, S>::corner(lane);
  const int first = windows / kStage<k> + warp * 2 * kSize;
  int buffer = first;
  window.load(count);
  for (; count > 0; count -= kStage<k>) {
    // Two buffers in turns: whoever still reads the other one has not passed this barrier.
    window.store(shared, buffer, lane);
    __syncwarp();
    prefetch(count);
    window.load(count - kStage<k>);
    body(count, buffer + corner);
    buffer = 2 * first + kSize - buffer;
  }
}

// The channels of a group that are one of `parts`.
struct Range {
  int64_t begin;
  int count;

  __device__ __forceinline__ Range(const Shape& shape, int part, int parts) {
    const int64_t size = divide_up(shape.group_channels(), parts);
    begin = min(part * size, shape.group_channels());
    count = static_cast<int>(min(size, shape.group_channels() - begin));
  }
};

// The top left output pixel of a lane's location, in the output or its gradient.
template <typename T>
__device__ __forceinline__ T* first_output(const Shape& shape, const Map& map, const Tile& tile,
                                           int64_t channel, int lane) {
  return static_cast<T*>(map.data) + tile.n * map.batch_stride +
         (tile.g * shape.group_channels() + channel) * map.channel_stride +
         tile.row(lane) * shape.scale * map.row_stride + tile.column(lane) * shape.scale;
}

// Puts the weights of an output pixel where kWeights wants them, from `index` on; zeros where the
// pixel does not exist.
template <int k, int S = 1>
__device__ __forceinline__ void stage_weights(const Weights& weights, int64_t offset, bool exists,
                                              const SharedArray<float>& shared, int index) {
  float values[k * k] = {};
  if (exists) load_weights(weights, offset, values);
#pragma unroll
  for (int t = 0; t < k * k; ++t) shared.set(index + t * kWarpSize * kSubpixels<k, S>, values[t]);
}

// The weights of a location's own output pixels: `stage` puts those of one pixel into shared memory,
// from `index` on, and subpixel p of a pass `has` those taps.
template <int k, int S>
struct OwnWeights {
  const Shape& shape;
  const Weights& weights;

  __device__ __forceinline__ void stage(const Tile& tile, int location, int p,
                                        const SharedArray<float>& shared, int index) const {
    const int64_t offset = weights_offset(weights, shape, tile.n, tile.g, tile.row(location),
                                          tile.column(location), p);
    stage_weights<k, S>(weights, offset, tile.has(shape, location), shared, index);
  }

  CARAFE_HOST_DEVICE static constexpr bool has(int, int) { return true; }
};

// What a block of a forward does, with weights such as OwnWeights.
template <int k, typename T, int S = 1, typename Source>
__device__ __forceinline__ void forward_block(const Shape& shape, const Map& features,
                                              const Map& output, int splits, bool are_adjacent,
                                              const SharedArray<float>& shared,
                                              const Source& weights) {
  constexpr int P = kSubpixels<k, S>, kTaps = k * k;
  const bool adjacent = kCanBeAdjacent<k> && are_adjacent;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const Tile first(shape, blockIdx.x, static_cast<int>(shape.subpixels() / P), splits,
                   adjacent ? kTilesAcross : 1, adjacent ? kTilesDown : 1);
  const Tile tile = adjacent ? first.neighbor(warp) : first;

  Vector<float, P> taps[kTaps] = {};
  for (int i = 0; i < (adjacent ? kForwardWarps : 1); ++i) {
    if (i > 0) __syncthreads();
    if (thread < kWarpSize * P) {
      weights.stage(first.neighbor(i), thread / P, first.pass * P + thread % P, shared, thread);
    }
    __syncthreads();
    if (adjacent && warp != i) continue;
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      taps[t] = shared.template get<P>((t * kWarpSize + lane) * P);
    }
  }
  if (!tile.has(shape, 0)) return;

  const Range channels(shape, adjacent ? tile.split : tile.split * kForwardWarps + warp,
                       adjacent ? splits : splits * kForwardWarps);
  const bool inside = tile.has(shape, lane);
  T* target = first_output<T>(shape, output, tile, channels.begin, lane);
  const Offsets<P> offsets(shape, output, tile.pass);
  Window<k, T, S> window(shape, features, tile, channels.begin, lane);
  for_channels(
      window, channels.count, shared, kWeights<k, S>, warp, lane, [](int) {},
      [&](int count, int corner) {
        float sums[kStage<k>][P] = {};
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          const auto features = shared.template get<kStage<k>>(
              kStage<k> * (corner + Window<k, T, S>::index(t / k, t % k)));
#pragma unroll
          for (int c = 0; c < kStage<k>; ++c) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
              if (Source::has(p, t)) sums[c][p] += taps[t].values[p] * features.values[c];
            }
          }
        }
#pragma unroll
        for (int c = 0; c < kStage<k>; ++c) {
#pragma unroll
          for (int i = 0; i < Offsets<P>::kCount; ++i) {
            if (!inside || c >= count) continue;
            store_beside<kBeside<P>>(&sums[c][kBeside<P> * i], target + offsets.values[i]);
          }
          target += output.channel_stride;
        }
      });
}

template <int k, typename T, int S = 1>
__global__ void __launch_bounds__(kForwardWarps* kWarpSize, kForwardBlocks)
    forward_kernel(Shape shape, Map features, Weights weights, Map output, int splits,
                   bool adjacent) {
  SHARED_ARRAY(float, shared, (kWeights<k, S> + kForwardWarps * kWindows<k, T, S>));
  forward_block<k, T, S>(shape, features, output, splits, adjacent, shared,
                         OwnWeights<k, S>{shape, weights});
}

// The gradient of the weights of a tile.
template <int k, typename T, int S = 1>
__device__ __forceinline__ void backward_tile(const Shape& shape, const Map& grad_output,
                                              const Map& features, const Weights& weights,
                                              const Weights& grad_weights, const Tile& tile,
                                              bool aligned, const SharedArray<float>& shared) {
  constexpr int P = kSubpixels<k, S>, kTaps = k * k;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;

  const Range channels(shape, warp, kBackwardWarps<k>);
  const bool inside = tile.has(shape, lane);
  const T* source = first_output<T>(shape, grad_output, tile, channels.begin, lane);
  const Offsets<P> offsets(shape, grad_output, tile.pass);
  Window<k, T, S> window(shape, features, tile, channels.begin, lane);
  Vector<float, kBeside<P>> gradients[kStage<k>][Offsets<P>::kCount];
  Vector<float, P> sums[kTaps] = {};
  for_channels(
      window, channels.count, shared, kWeights<k, S>, warp, lane,
      [&](int count) {
#pragma unroll
        for (int c = 0; c < kStage<k>; ++c) {
#pragma unroll
          for (int i = 0; i < Offsets<P>::kCount; ++i) {
            gradients[c][i] = {};
            if (inside && c < count) {
              gradients[c][i] = load_beside<kBeside<P>>(source + offsets.values[i], aligned);
            }
          }
          source += grad_output.channel_stride;
        }
      },
      [&](int, int corner) {
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          const auto features = shared.template get<kStage<k>>(
              kStage<k> * (corner + Window<k, T, S>::index(t / k, t % k)));
#pragma unroll
          for (int c = 0; c < kStage<k>; ++c) {
#pragma unroll
            for (int p = 0; p < P; ++p) {
              sums[t].values[p] +=
                  gradients[c][p / kBeside<P>].values[p % kBeside<P>] * features.values[c];
            }
          }
        }
      });

  // One warp after the other, always in the same order
  for (int i = 0; i < kBackwardWarps<k>; ++i) {
    if (warp == i) {
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const int index = (t * kWarpSize + lane) * P;
        Vector<float, P> total = sums[t];
        if (i > 0) {
          const Vector<float, P> before = shared.template get<P>(index);
#pragma unroll
          for (int p = 0; p < P; ++p) total.values[p] += before.values[p];
        }
        shared.set(index, total);
      }
    }
    __syncthreads();
  }

  const int location = thread / P, p = tile.pass * P + thread % P;
  if (thread >= kWarpSize * P || !tile.has(shape, location)) return;
  float totals[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) totals[t] = shared.get(t * kWarpSize * P + thread);
  const int row = tile.row(location), column = tile.column(location);
  store_weight_gradients(
      totals, weights, weights_offset(weights, shape, tile.n, tile.g, row, column, p), grad_weights,
      weights_offset(grad_weights, shape, tile.n, tile.g, row, column, p));
}

// --------------------------------------------------------------------------- strips of columns
//
// The gradient of the features. A strip has a column of source locations for each lane. A warp
// walks down the rows of the source that reach into a band, and stores the gradients of the band:
//
//     lane    0   1                                  30  31
//           +-------+-------------------------------+-------+
//           |         r rows of the source above it         |    here k = 5, r = k / 2 = 2
//           +-------+-------------------------------+-------+  begin
//           |       |                               |       |
//           |   r   |     gradients that this       |   r   |
//           | lanes |     strip completes, and      | lanes |  `rows` of the band
//           |       |     stores                    |       |
//           |       |                               |       |
//           +-------+-------------------------------+-------+  begin + rows
//           |         r rows of the source below it         |
//           +-------+-------------------------------+-------+
//
// The outer lanes are the margin: strips beside each other overlap by 2 * r lanes, so each gradient
// is complete in one of them. There is no margin where the map ends, and no row beyond it.
//
// Lanes scatter. With row y of the source, the lane of column w adds the weight of each tap (u, v)
// times the gradient of the output to sums[u][v], which is for row y - r + u and column w - r + v:
//
//                           w - r       w       w + r
//                         +-----+-----+-----+-----+-----+
//     y - r     sums[0]   |     |     |     |     |     |  complete now: finish_row
//                         +-----+-----+-----+-----+-----+
//               sums[1]   |     |     |     |     |     |  these become sums[u - 1]
//                         +-----+-----+-----+-----+-----+  with the next row
//     y         sums[2]   |     |     |(y,w)|     |     |
//                         +-----+-----+-----+-----+-----+
//               sums[3]   |     |     |     |     |     |
//                         +-----+-----+-----+-----+-----+
//     y + r     sums[4]   |     |     |     |     |     |  which then begins with 0
//                         +-----+-----+-----+-----+-----+
//
// What belongs in column w is then in sums[0][r - d] of the lanes of columns w + d, for d from -r
// to r: finish_row adds it up, with shuffles. Before, no lane needs another's sums.
//
// The warps of a block have different channels of the same strip and band, and share the weights.
// For each row and each pass of P subpixels:
//
//     load_pass      each lane: the gradients of the output pixels of its location, to registers
//     stage_weights  the first 32 * P threads: the weights of one output pixel, to shared memory
//     scatter_pass   each lane: k * k * P products for each of its channels

// Channels of a lane: as many as their sums, k * (k - 1) for each, leave registers for.
template <int k>
constexpr int kStripChannels = k == 3   ? 8
                               : k == 5 ? 4
                                        : 2;

// How the gradient of the features is divided. A strip is as wide as a warp, or half of one where
// the map is narrow: a warp then has strips of two planes.
struct Strips {
  int lanes;   // of a strip
  int across;  // strips beside each other
  int rows;    // of a band
  int bands;   // below each other
  int channel_blocks;
  int64_t planes;  // groups of images, each with strips of its own

  template <int k>
  static Strips of(const Shape& shape, int multiprocessors) {
    constexpr int kMargin = k - 1;
    Strips result;
    result.lanes = shape.width <= kWarpSize / 2 ? kWarpSize / 2 : kWarpSize;
    result.across = static_cast<int>(
        std::max<int64_t>(1, divide_up(shape.width - kMargin, result.lanes - kMargin)));
    result.planes = shape.batch * shape.groups;
    result.channel_blocks =
        static_cast<int>(divide_up(shape.group_channels(), kBackwardWarps<k> * kStripChannels<k>));
    // A band also reads the k - 1 rows around it: only as many bands as the GPU has room for.
    const int64_t resident = int64_t(kBackwardBlocks) * multiprocessors;
    const int64_t bands = std::max<int64_t>(1, 2 * resident / result.blocks_of_a_band());
    result.rows = static_cast<int>(
        std::max(divide_up(shape.height, bands), std::min<int64_t>(shape.height, 2 * kMargin)));
    result.bands = static_cast<int>(divide_up(shape.height, result.rows));
    return result;
  }

  CARAFE_HOST_DEVICE int planes_of_a_warp() const { return kWarpSize / lanes; }
  int64_t blocks_of_a_band() const {
    return divide_up(planes, planes_of_a_warp()) * across * channel_blocks;
  }
};

// The source location of a lane in a strip, and whether the strip completes its gradient.
struct Column {
  int64_t n, g;
  int w;
  bool exists, complete;

  // The strip has an index in its row of strips, and a warp those of adjacent planes.
  __device__ __forceinline__ Column(const Shape& shape, const Strips& strips, int64_t first_plane,
                                    int index, int lane) {
    const int position = lane % strips.lanes, margin = static_cast<int>(shape.kernel) - 1;
    const int64_t plane = first_plane + lane / strips.lanes;
    n = plane / shape.groups;
    g = plane % shape.groups;
    w = index * (strips.lanes - margin) + position;
    exists = plane < strips.planes && w < shape.width;
    complete = exists && (index == 0 || position >= margin / 2) &&
               (index == strips.across - 1 || position < strips.lanes - margin / 2);
  }
};

// What a warp works on; `block` counts bands of strips, and blocks of their channels.
template <int k>
struct Band {
  int64_t first_plane, first_channel;
  int strip;               // its index in its row of strips
  int begin, rows;         // of gradients
  int first_row, end_row;  // of the source; like those of gradients, they count from `begin`

  __device__ __forceinline__ Band(const Shape& shape, const Strips& strips, unsigned block,
                                  int warp) {
    const int height = static_cast<int>(shape.height);
    first_channel =
        (int64_t(block % strips.channel_blocks) * kBackwardWarps<k> + warp) * kStripChannels<k>;
    block /= strips.channel_blocks;
    strip = static_cast<int>(block % strips.across);
    block /= strips.across;
    begin = static_cast<int>(block % strips.bands) * strips.rows;
    rows = min(strips.rows, height - begin);
    first_row = -min(begin, k / 2);
    end_row = min(rows + k / 2, height - begin);
    first_plane = int64_t(block / strips.bands) * strips.planes_of_a_warp();
    // A warp that no channels are left for only provides weights.
    if (first_channel >= shape.group_channels()) rows = 0;
  }

  __device__ __forceinline__ bool has(int row) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(rows);
  }
};

// Gradients of the subpixels of a pass, as pairs.
template <int k>
using PassGradients = Vector<float, 2>[kStripChannels<k>][kSubpixels<k> / 2];

template <int k>
using StripSums = float[kStripChannels<k>][k][k];

// `source` is the lane's first output pixel of the row; `channels` of it exist.
template <int k, typename T>
__device__ __forceinline__ void load_pass(const Shape& shape, const Map& grad_output,
                                          const T* source, int pass, int channels, bool aligned,
                                          PassGradients<k>& gradients) {
  const Offsets<kSubpixels<k>> offsets(shape, grad_output, pass);
#pragma unroll
  for (int c = 0; c < kStripChannels<k>; ++c) {
#pragma unroll
    for (int i = 0; i < kSubpixels<k> / 2; ++i) {
      gradients[c][i] = {};
      if (c < channels) gradients[c][i] = load_beside<2>(source + offsets.values[i], aligned);
    }
    source += grad_output.channel_stride;
  }
}

// Adds a pass of a row of the source, whose uppermost gradients are those of `row`. The lane's
// weights are at `first`. With the first pass the sums move up.
template <int k, bool kFirst>
__device__ __forceinline__ void scatter_pass(const Band<k>& band, int row,
                                             const SharedArray<float>& shared, int first,
                                             const PassGradients<k>& gradients,
                                             StripSums<k>& sums) {
  constexpr int P = kSubpixels<k>;
#pragma unroll
  for (int u = 0; u < k; ++u) {
    if (!band.has(row + u)) continue;
#pragma unroll
    for (int v = 0; v < k; ++v) {
      const auto tap = shared.template get<P>(first + (u * k + v) * kWarpSize * P);
#pragma unroll
      for (int c = 0; c < kStripChannels<k>; ++c) {
        float sum = u + kFirst < k ? sums[c][u + kFirst][v] : 0;
#pragma unroll
        for (int p = 0; p < P; ++p) sum += tap.values[p] * gradients[c][p / 2].values[p % 2];
        sums[c][u][v] = sum;
      }
    }
  }
}

// Adds up what the lanes have for a row, the sums in place u, and stores those of `channels`.
template <int k, typename T>
__device__ __forceinline__ void finish_row(const StripSums<k>& sums, int u, int lanes, T* target,
                                           int64_t channel_stride, int channels) {
  constexpr int r = k / 2;
#pragma unroll
  for (int c = 0; c < kStripChannels<k>; ++c) {
    float total = sums[c][u][r];
#pragma unroll
    for (int d = 1; d <= r; ++d) {
      add_from_above(total, sums[c][u][r - d], d, lanes);
      add_from_below(total, sums[c][u][r + d], d, lanes);
    }
    if (c < channels) from_float(total, *target);
    target += channel_stride;
  }
}

template <int k, typename T>
__device__ __forceinline__ void backward_strip(const Shape& shape, const Map& grad_output,
                                               const Weights& weights, const Map& grad_features,
                                               const Strips& strips, unsigned block, bool aligned,
                                               const SharedArray<float>& shared) {
  constexpr int P = kSubpixels<k>, r = k / 2;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const Band<k> band(shape, strips, block, warp);
  const Column column(shape, strips, band.first_plane, band.strip, lane);  // whose sums it has
  // Whose weights it provides, and where those of the first pass are
  const Column staged(shape, strips, band.first_plane, band.strip, thread / P);
  int64_t staged_offset = weights_offset(weights, shape, staged.n, staged.g,
                                         band.begin + band.first_row, staged.w, thread % P);
  const int channels = static_cast<int>(
      min(shape.group_channels() - band.first_channel, int64_t(kStripChannels<k>)));
  const int loaded = column.exists ? channels : 0, stored = column.complete ? channels : 0;

  const int64_t channel = column.g * shape.group_channels() + band.first_channel;
  const int first_row = band.begin + band.first_row;
  const T* source = static_cast<const T*>(grad_output.data) + column.n * grad_output.batch_stride +
                    channel * grad_output.channel_stride +
                    first_row * shape.scale * grad_output.row_stride + column.w * shape.scale;
  T* target = static_cast<T*>(grad_features.data) + column.n * grad_features.batch_stride +
              channel * grad_features.channel_stride + (first_row - r) * grad_features.row_stride +
              column.w;

  const int passes = static_cast<int>(shape.subpixels() / P);
  int buffer = 0;  // of the weights: two in turns, so one barrier is enough
  StripSums<k> sums = {};
  for (int row = band.first_row - r; row < band.end_row - r; ++row) {  // of the uppermost sums
    const auto add = [&](int pass, auto is_first) {
      constexpr bool kFirst = decltype(is_first)::value;
      PassGradients<k> gradients;
      const auto load = [&] {
        load_pass<k>(shape, grad_output, source, pass, loaded, aligned, gradients);
      };
      if constexpr (kFirst) load();  // early
      if (thread < kWarpSize * P) {
        int64_t offset = staged_offset;
        if constexpr (!kFirst) {
          offset += subpixel_offset(weights, shape, pass * P + thread % P) -
                    subpixel_offset(weights, shape, thread % P);
        }
        stage_weights<k>(weights, offset, staged.exists, shared, buffer + thread);
      }
      if constexpr (!kFirst) load();  // late, as there are more sums to keep
      __syncthreads();
      scatter_pass<k, kFirst>(band, row, shared, buffer + lane * P, gradients, sums);
      buffer = kWeights<k> - buffer;
    };
    add(0, std::true_type());
    for (int pass = 1; pass < passes; ++pass) add(pass, std::false_type());
    if (band.has(row)) {
      finish_row<k>(sums, 0, strips.lanes, target, grad_features.channel_stride, stored);
    }
    staged_offset += weights.row_stride;
    source += shape.scale * grad_output.row_stride;
    target += grad_features.row_stride;
  }
  // At the lower border of the map, no more rows of the source complete the last ones.
#pragma unroll
  for (int u = 1; u <= r; ++u, target += grad_features.row_stride) {
    if (band.has(band.end_row - r + u - 1)) {
      finish_row<k>(sums, u, strips.lanes, target, grad_features.channel_stride, stored);
    }
  }
}

// ----------------------------------------------------------------------------- both gradients

// How many blocks of a launch work on strips and on tiles. They take turns, and both kinds go through
// the maps in the same order: whichever comes second to a part of the output's gradient is likely to
// find it in the L2 cache. The last tenth of the blocks has tiles only, so far as there are any: a
// strip takes several times as long, and one that begins last leaves the GPU to itself.
struct Turns {
  unsigned strips, tiles;

  CARAFE_HOST_DEVICE unsigned blocks() const { return strips + tiles; }
  // Blocks for strips among the first ones.
  __device__ __forceinline__ unsigned strips_of(unsigned first_blocks) const {
    const uint64_t even = uint64_t(first_blocks) * strips / (blocks() - blocks() / 10);
    return min(min(first_blocks, strips), static_cast<unsigned>(even));
  }
};

// Floats of shared memory: weights twice, or sums and windows.
template <int k, typename T>
constexpr int kBackwardShared =
    kWeights<k> + std::max(kWeights<k>, kBackwardWarps<k>* kWindows<k, T>);

template <int k, typename T>
__global__ void __launch_bounds__(kBackwardWarps<k>* kWarpSize, kBackwardBlocks)
    backward_kernel(Shape shape, Map grad_output, Map features, Weights weights, Map grad_features,
                    Weights grad_weights, Strips strips, Turns turns, bool aligned) {
  SHARED_ARRAY(float, shared, (kBackwardShared<k, T>));
  const unsigned before = turns.strips_of(blockIdx.x);
  if (before < turns.strips_of(blockIdx.x + 1)) {
    backward_strip<k, T>(shape, grad_output, weights, grad_features, strips, before, aligned,
                         shared);
  } else {
    const Tile tile(shape, blockIdx.x - before, static_cast<int>(shape.subpixels() / kSubpixels<k>),
                    1);
    backward_tile<k, T>(shape, grad_output, features, weights, grad_weights, tile, aligned, shared);
  }
}

// ------------------------------------------------------------------------------------ launching

template <typename T>
bool pairs_aligned(const Map& map) {
  const auto is_even = [](int64_t stride) { return stride % 2 == 0; };
  return reinterpret_cast<uintptr_t>(map.data) % sizeof(Vector<T, 2>) == 0 &&
         is_even(map.batch_stride) && is_even(map.channel_stride) && is_even(map.row_stride);
}

// Whether there are kernels for it. Within a channel of one image they have 32-bit offsets into
// `maps`, and the limit of a grid is 2^31 - 1 blocks.
inline bool is_suited(const Shape& shape, std::initializer_list<Map> maps) {
  if (shape.scale % 2 != 0) return false;
  const int64_t rows = shape.height * shape.scale, columns = shape.width * shape.scale;
  for (const Map& map : maps) {
    if (rows > (INT32_MAX - columns) / std::max<int64_t>(1, map.row_stride)) return false;
  }
  // Of a tile, there are at most half as many blocks as subpixels, and no more strips than channels.
  return tiles(shape) <= INT32_MAX / (shape.subpixels() / 2 + shape.group_channels());
}

// Calls start(blocks, splits, adjacent) for the grid of a forward.
template <int k, int S = 1, typename Launcher, typename Start>
void for_grid(const Launcher& launcher, const Shape& shape, const Start& start) {
  const int64_t passes = shape.subpixels() / kSubpixels<k, S>;
  const int64_t resident = int64_t(kForwardBlocks) * launcher.multiprocessors();
  // A block of adjacent tiles normalizes the weights of all of them, so it needs many channels to be
  // worth it.
  int64_t blocks = tiles(shape, kTilesAcross, kTilesDown) * passes;
  const bool adjacent = kCanBeAdjacent<k> && kMostAdjacentSplits * blocks >= resident;
  if (!adjacent) blocks = tiles(shape) * passes;
  // Small maps have few tiles: there, several blocks share the channels of one.
  const int64_t most = divide_up(shape.group_channels(), 4 * kStage<k> * kForwardWarps);
  const int64_t wanted = (adjacent ? 1 : 2) * resident / blocks;
  const int splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  start(blocks * splits, splits, adjacent);
}

// forward and backward return false, and launch nothing, for what they leave to general.cuh.

template <typename T, typename Launcher>
bool forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  return is_suited(shape, {features, output}) && with_kernel_size(shape, [&](auto k) {
           for_grid<k>(launcher, shape, [&](int64_t blocks, int splits, bool adjacent) {
             launch(launcher, forward_kernel<k, T>, blocks, kForwardWarps * kWarpSize, shape,
                    features, weights, output, splits, adjacent);
           });
         });
}

// Gradients that are not wanted are null.
template <typename T, typename Launcher>
bool backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  if (!is_suited(shape, {grad_output, features})) return false;
  if (grad_features && !is_suited(shape, {*grad_features})) return false;
  return with_kernel_size(shape, [&](auto k) {
    Strips strips{};
    Turns turns{};
    if (grad_features && shape.channels > 0) {
      strips = Strips::of<k>(shape, launcher.multiprocessors());
      turns.strips = static_cast<unsigned>(strips.blocks_of_a_band() * strips.bands);
    }
    if (grad_weights) {
      turns.tiles = static_cast<unsigned>(tiles(shape) * shape.subpixels() / kSubpixels<k>);
    }
    launch(launcher, backward_kernel<k, T>, turns.blocks(), kBackwardWarps<k> * kWarpSize, shape,
           grad_output, features, weights, grad_features ? *grad_features : Map{},
           grad_weights ? *grad_weights : Weights{}, strips, turns, pairs_aligned<T>(grad_output));
  });
}

}  // namespace carafe_d2::contiguous
