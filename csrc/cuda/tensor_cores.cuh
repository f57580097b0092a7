// CUDA kernels on tensor cores, for contiguous float16 and bfloat16 maps, kernels of 5 x 5, scale 2.
//
// One instruction, mma.m16n8k16, multiplies a matrix A of 16 x 16 by a matrix B of 16 x 8 and adds the
// product to a matrix C in float32. The windows of neighbors overlap, so neighbors make a matrix
// together: in the forward, A are features of 16 channels in 16 positions, B the weights of these
// positions for the 8 output pixels of a pair of neighbors, C these pixels.
//
//            m = 0   m = 1   m = 2        the windows of two neighbors L and R: 6 columns,
//          +---+---+---+---+---+---+      in 3 pairs m
//    row 0 | l | * | * | * | * | r |
//        1 | l | * | * | * | * | r |      l, r: of the window of L or R only, where the weight of
//        2 | l | * | L | R | * | r |            the other one is zero
//        3 | l | * | * | * | * | r |      *: of both
//        4 | l | * | * | * | * | r |
//        5 |   |   |   |   |   |   |      The 16 positions of a product are one pair of columns in
//        6 |   |   |   |   |   |   |      8 rows, which are the windows of four rows of locations.
//        7 |   |   |   |   |   |   |      The other locations have their windows further down and
//          +---+---+---+---+---+---+      to the right, and use the same features.
//
// That wastes half of the multiply-adds, of which there are plenty, and needs few loads.
//
// The gradients are other products of the same three, see there. In all of them a warp has 8 x 2
// locations. What of these stays the same, weights or the sums for their gradients, is in registers,
// and the warp goes through the channels in steps of 16. The warps of a block share a window in shared
// memory.
//
// Zero times a NaN or infinity is NaN, and must not get into the results of a neighbor. A warp that
// found a sum that is not finite makes its sums once more in the end, as they are defined. Not those
// of the weights' gradient: each is of one pixel and one position, and no zero is put in between.
#pragma once

#include <algorithm>
#include <type_traits>

#include "contiguous.cuh"
#include "device.cuh"
#include "dispatch.h"

namespace carafe_d2::tensor_cores {

constexpr int kKernel = 5, kRadius = 2, kTaps = 25, kSubpixels = 4;
constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocksPerMultiprocessor = 2;  // which leaves 128 registers to a thread
constexpr int kStep = 16;                    // channels of a product

// A warp has 8 x 2 locations, and a block a tile of 32 x 4 of them, or of 16 x 8 on narrow maps.
constexpr int kPairs = 4, kRows = 2;  // of a warp: pairs of neighbors in a row, and rows
constexpr int kTileSize = kWarps * kRows * 2 * kPairs;
template <int kWidth>
constexpr int kHeight = kTileSize / kWidth;

constexpr int kColumnPairs = 3;  // of the window of a pair of neighbors
constexpr int kProductRows = 8;  // of features in a product

// Where a warp is in the tile of its block: its first row and pair.
template <int kWidth>
struct Place {
  int warp, lane, row, pair;

  __device__ __forceinline__ Place()
      : warp(threadIdx.x / kWarpSize),
        lane(threadIdx.x % kWarpSize),
        row(warp / (kWidth / 2 / kPairs) * kRows),
        pair(warp % (kWidth / 2 / kPairs) * kPairs) {}
};

// What a lane has of the matrices of a product, see multiply_add.
using A = uint32_t[4];
using B = uint32_t[2];
using C = float[4];

// ------------------------------------------------------------------------------ tiles and windows

// What a block works on: the locations of a tile, in one group of one image, and some channels.
template <int kWidth>
struct Tile {
  int n, g;
  int h, w;  // top left
  int first_channel, channels;

  __device__ __forceinline__ Tile(const Shape& shape, unsigned index, int splits) {
    const unsigned columns = static_cast<unsigned>(divide_up(shape.width, kWidth));
    const unsigned rows = static_cast<unsigned>(divide_up(shape.height, kHeight<kWidth>));
    w = static_cast<int>(index % columns) * kWidth;
    index /= columns;
    h = static_cast<int>(index % rows) * kHeight<kWidth>;
    index /= rows;
    const int group_channels = static_cast<int>(shape.group_channels());
    const int size = static_cast<int>(divide_up(divide_up(group_channels, kStep), splits)) * kStep;
    first_channel = min(static_cast<int>(index % splits) * size, group_channels);
    channels = min(size, group_channels - first_channel);
    index /= splits;
    g = static_cast<int>(index % static_cast<unsigned>(shape.groups));
    n = static_cast<int>(index / static_cast<unsigned>(shape.groups));
  }

  // The first of the block's channels in a map.
  template <typename T>
  __device__ __forceinline__ T* channel(const Shape& shape, const Map& map) const {
    return static_cast<T*>(map.data) + n * map.batch_stride +
           (g * shape.group_channels() + first_channel) * map.channel_stride;
  }
};

// What a tile and its margin have of a map in shared memory, 16 channels at a time: words of two
// horizontally adjacent values, the left one in the lower half. What is outside the map is zero.
// Threads copy kCopy words at once.
template <typename T, int kWindowRows, int kPitch, int kCopy>
class Window {
 public:
  // Fragments are loaded from eight channels at once, and of each from four words in a row, or from
  // one word in four rows, if the pitch is 3 modulo 8. These are in different banks.
  static constexpr int kChannelPitch = (kWindowRows * kPitch + 7) / 8 * 8 + 4;
  static constexpr int kSize = kStep * kChannelPitch;

  CARAFE_HOST_DEVICE static int index(int channel, int row, int word) {
    return channel * kChannelPitch + row * kPitch + word;
  }

  // Of a map with so many rows and words in a row, and whose first channel is at `source`, the window
  // begins in `first_row` and `first_word`.
  __device__ __forceinline__ Window(const Map& map, const T* source, int rows, int words,
                                    int first_row, int first_word)
      : channel_(map.channel_stride), next_(source) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int position = position_of(i);
      const int row = first_row + position / kPitch, word = first_word + position % kPitch;
      const bool inside = row >= 0 && row < rows && word >= 0 && word < words;
      offsets_[i] = inside ? row * static_cast<int>(map.row_stride) + 2 * word : kOutside;
    }
  }

  // Begins to copy the next channels, of which `count` are left and those beyond are zero, to the
  // buffer at `begin`.
  __device__ __forceinline__ void copy(const SharedArray<uint32_t>& shared, int begin, int count) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (position_of(i) >= kWindowRows * kPitch) continue;
      const bool inside = offsets_[i] != kOutside;
      const T* source = next_ + (inside ? offsets_[i] : 0);
#pragma unroll
      for (int c = 0; c < kStep; ++c) {
        copy_async<kCopy>(shared, begin + index(c, 0, position_of(i)), source, inside && c < count);
        source += channel_;
        forget_origin(source);
      }
    }
    next_ += kStep * channel_;
  }

 private:
  static constexpr int kCopies = (kWindowRows * kPitch / kCopy + kThreads - 1) / kThreads;
  static constexpr int kOutside = INT32_MIN;

  __device__ __forceinline__ static int position_of(int i) {
    return (threadIdx.x + i * kThreads) * kCopy;
  }

  int64_t channel_;
  const T* next_;
  int offsets_[kCopies];
};

template <typename T, int kWidth>
class FeatureWindow : public Window<T, kHeight<kWidth> + kKernel - 1, kWidth / 2 + 3, 1> {
 public:
  __device__ __forceinline__ FeatureWindow(const Shape& shape, const Map& features,
                                           const Tile<kWidth>& tile)
      : FeatureWindow::Window(features, tile.template channel<const T>(shape, features),
                              static_cast<int>(shape.height), static_cast<int>(shape.width / 2),
                              tile.h - kRadius, (tile.w - kRadius) / 2) {}
};

// ----------------------------------------------------------------------------------------- weights

// The weights of a tile in shared memory, as a product of the forward wants them: for each row u of
// taps and pair m of columns, the words of all output pixels. With this pitch, lanes of four rows and
// eight pixels meet in no bank.
template <int kWidth>
struct TileWeights {
  static constexpr int kPixels = kTileSize * kSubpixels;
  static constexpr int kPitch = kPixels + 8;
  static constexpr int kSize = kKernel * kColumnPairs * kPitch;

  CARAFE_HOST_DEVICE static int index(int u, int m, int pixel) {
    return (u * kColumnPairs + m) * kPitch + pixel;
  }

  // Output pixels are counted in the order of B's columns: of a pair, upper row first.
  CARAFE_HOST_DEVICE static int pixel(int row, int pair, int column) {
    return (row * (kWidth / 2) + pair) * 8 + column;
  }

  template <typename T>
  __device__ __forceinline__ static void load(const Shape& shape, const Weights& weights,
                                              const Tile<kWidth>& tile,
                                              const SharedArray<uint32_t>& shared) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kPixels; i += kThreads) {
      const int p = i / 4 % 2 * 2 + i % 2, right = i / 2 % 2;
      const int w = tile.w + i / 8 % (kWidth / 2) * 2 + right;
      const int h = tile.h + i / (8 * kWidth / 2);
      float values[kTaps] = {};
      if (h < shape.height && w < shape.width) {
        load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, h, w, p), values);
      }
#pragma unroll
      for (int u = 0; u < kKernel; ++u) {
        const float* taps = values + u * kKernel;
#pragma unroll
        for (int m = 0; m < kColumnPairs; ++m) {
          // The right neighbor's window begins a column later.
          const float before = m > 0 ? taps[2 * m - 1] : 0, after = m < 2 ? taps[2 * m + 1] : 0;
          shared.set(index(u, m, i),
                     right ? to_word<T>(before, taps[2 * m]) : to_word<T>(taps[2 * m], after));
        }
      }
    }
  }
};

// ----------------------------------------------------------------------------------------- forward

// Stores the output of a row of a warp's pairs in a channel, of which a lane has a word of each pair.
//
//     pair           0     1     2     3
//     word         0   1 0   1 0   1 0   1     of lanes with an even i and with an odd one
//                 \____   ____/ \____   ____/
//     afterwards       even          odd       four words in a row, for a store of 16 bytes
__device__ __forceinline__ void store_row(const uint32_t (&words)[kPairs], bool odd, int columns,
                                          bool aligned, uint32_t* target) {
  Vector<uint32_t, 4> row;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t own = odd ? words[j + 2] : words[j];
    const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? words[j] : words[j + 2], 1);
    row.values[2 * j] = odd ? other : own;
    row.values[2 * j + 1] = odd ? own : other;
  }
  target += 4 * odd;
  if (aligned) {
    if (columns > 0) *reinterpret_cast<Vector<uint32_t, 4>*>(target) = row;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (4 * odd + j < columns) target[j] = row.values[j];
    }
  }
}

// The output of a warp's locations, as it is defined: for windows that hold a NaN or infinity, which
// zeros of a product would carry on to the neighbors.
template <typename T, int kWidth>
__device__ __forceinline__ void store_sums(const Shape& shape, const Map& features,
                                           const Weights& weights, const Map& output,
                                           const Tile<kWidth>& tile, const Place<kWidth>& place) {
#pragma unroll 1
  for (int i = place.lane; i < kRows * kPairs * 2 * kSubpixels; i += kWarpSize) {
    const int p = i % kSubpixels, location = i / kSubpixels;
    const int h = tile.h + place.row + location / (2 * kPairs);
    const int w = tile.w + 2 * place.pair + location % (2 * kPairs);
    if (h >= shape.height || w >= shape.width) continue;
    float values[kTaps];
    load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, h, w, p), values);
    const T* source = tile.template channel<const T>(shape, features) +
                      (h - kRadius) * features.row_stride + w - kRadius;
    T* target = tile.template channel<T>(shape, output) + (2 * h + p / 2) * output.row_stride +
                2 * w + p % 2;
#pragma unroll 1
    for (int c = 0; c < tile.channels; ++c) {
      float sum = 0;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const int y = h + t / kKernel - kRadius, x = w + t % kKernel - kRadius;
        if (y < 0 || y >= shape.height || x < 0 || x >= shape.width) continue;
        sum += values[t] * to_float(source[t / kKernel * features.row_stride + t % kKernel]);
      }
      from_float(sum, *target);
      source += features.channel_stride;
      target += output.channel_stride;
    }
  }
}

// Words of shared memory: weights at first, then windows.
template <typename T, int kWidth>
constexpr int kForwardShared =
    std::max(TileWeights<kWidth>::kSize, 2 * FeatureWindow<T, kWidth>::kSize);

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    forward_kernel(Shape shape, Map features, Weights weights, Map output, int splits,
                   bool aligned_rows) {
  SHARED_ARRAY(uint32_t, shared, (kForwardShared<T, kWidth>));
  using TileWeights = tensor_cores::TileWeights<kWidth>;
  using Window = FeatureWindow<T, kWidth>;
  const Tile<kWidth> tile(shape, blockIdx.x, splits);
  const Place<kWidth> place;
  const int g = place.lane / 4, i = place.lane % 4;
  // The first row of the window that it multiplies
  const int product_row = place.row - place.row % (kProductRows - kKernel + 1);

  TileWeights::template load<T>(shape, weights, tile, shared);
  __syncthreads();
  B b[kRows][kPairs][kColumnPairs];
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
#pragma unroll
    for (int q = 0; q < kPairs; ++q) {
      const int pixel = TileWeights::pixel(place.row + y, place.pair + q, g);
#pragma unroll
      for (int m = 0; m < kColumnPairs; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = product_row + i + 4 * j - place.row - y;
          const bool is_tap = u >= 0 && u < kKernel;
          b[y][q][m][j] = is_tap ? shared.get(TileWeights::index(u, m, pixel)) : 0;
        }
      }
    }
  }
  __syncthreads();

  Window window(shape, features, tile);
  const int upper = i / 2, odd = i % 2;  // C's columns of a lane: which row, which neighbor
  const int columns = min(static_cast<int>(shape.width) - tile.w - 2 * place.pair, 2 * kPairs);
  const bool aligned = aligned_rows && columns == 2 * kPairs;
  const int rows = static_cast<int>(shape.height) - tile.h - place.row;
  T* target = tile.template channel<T>(shape, output) + 2 * tile.h * output.row_stride + 2 * tile.w;
  int buffer = 0;
  float check = 0;  // becomes NaN with any sum that is not finite
  window.copy(shared, buffer, tile.channels);
  for (int count = tile.channels; count > 0; count -= kStep) {
    wait_for_copies();
    __syncthreads();  // whoever still reads the other buffer has not come here
    if (count > kStep) window.copy(shared, Window::kSize - buffer, count - kStep);
    A a[kPairs + kColumnPairs - 1];
    const auto load_features = [&](int m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int channel = g + j % 2 * 8, row = product_row + i + j / 2 * 4;
        a[m][j] = shared.get(buffer + Window::index(channel, row, place.pair + m));
      }
    };
    uint32_t words[kRows][2][kPairs];  // of channels g and g + 8
    load_features(0);
    load_features(1);
#pragma unroll
    for (int q = 0; q < kPairs; ++q) {
      load_features(q + 2);
#pragma unroll
      for (int y = 0; y < kRows; ++y) {
        C c = {};
#pragma unroll
        for (int m = 0; m < kColumnPairs; ++m) multiply_add<T>(a[q + m], b[y][q][m], c);
#pragma unroll
        for (int j = 0; j < 4; ++j) check = fmaf(c[j], 0.f, check);
#pragma unroll
        for (int j = 0; j < 2; ++j) words[y][j][q] = to_word<T>(c[2 * j], c[2 * j + 1]);
      }
    }
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        T* row = target + (g + 8 * j) * output.channel_stride +
                 (2 * (place.row + y) + upper) * output.row_stride + 4 * place.pair;
        const bool exists = y < rows && g + 8 * j < count;
        store_row(words[y][j], odd, exists ? columns : 0, aligned,
                  reinterpret_cast<uint32_t*>(row));
      }
    }
    target += kStep * output.channel_stride;
    forget_origin(target);
    buffer = Window::kSize - buffer;
  }
  if (__any_sync(kAllLanes, !(check == 0))) {
    __syncwarp();  // after what other lanes stored there
    store_sums<T>(shape, features, weights, output, tile, place);
  }
}

// ---------------------------------------------------------------------------- gradient of weights
//
// A product makes the sums of four neighbors' output pixels with the features of a row of their
// windows, which are 8 columns together: the output's gradients of 16 pixels x 16 channels times
// features of 16 channels x 8 columns. Of a pixel's 8 sums, 5 are of its window.

// Two rows of a product, of each of which a lane has a word: the first and second values of `a`'s and
// `b`'s words become words of their own.
__device__ __forceinline__ void transpose(uint32_t a, uint32_t b, uint32_t& first,
                                          uint32_t& second) {
  first = __byte_perm(a, b, 0x5410);
  second = __byte_perm(a, b, 0x7632);
}

template <typename T, int kWidth>
__device__ __forceinline__ void backward_weights(const Shape& shape, const Map& grad_output,
                                                 const Map& features, const Weights& weights,
                                                 const Weights& grad_weights, unsigned block,
                                                 const SharedArray<uint32_t>& shared) {
  using Window = FeatureWindow<T, kWidth>;
  constexpr int kGroups = kPairs / 2, kPitch = kThreads + 4;
  const Tile<kWidth> tile(shape, block, 1);
  const Place<kWidth> place;
  const int g = place.lane / 4, i = place.lane % 4;
  // Of a group's output pixels, the lane has two in a row: those of a neighbor, in an upper or lower
  // row.
  const int neighbor = g % 4, lower = g / 4;
  unsigned exists = 0;  // which rows of which groups, a bit for each
#pragma unroll
  for (int j = 0; j < kRows * kGroups; ++j) {
    const int h = tile.h + place.row + j / kGroups;
    const int w = tile.w + 2 * place.pair + neighbor + j % kGroups * 4;
    exists |= static_cast<unsigned>(h < shape.height && w < shape.width) << j;
  }
  const T* source = tile.template channel<const T>(shape, grad_output) +
                    2 * i * grad_output.channel_stride +
                    (2 * (tile.h + place.row) + lower) * grad_output.row_stride +
                    2 * (tile.w + 2 * place.pair + neighbor);
  const auto load_gradients = [&](int y, int e, int channel, int count) {
    const T* words =
        source + channel * grad_output.channel_stride + 2 * y * grad_output.row_stride + 8 * e;
    const bool wanted = exists >> (y * kGroups + e) & 1 && 2 * i + channel < count;
    return wanted ? __ldg(reinterpret_cast<const uint32_t*>(words)) : 0;
  };

  Window window(shape, features, tile);
  C sums[kRows][kGroups][kKernel] = {};
  int buffer = 0;
  window.copy(shared, buffer, tile.channels);
  for (int count = tile.channels; count > 0; count -= kStep) {
    A a[kRows][kGroups];
#pragma unroll
    for (int y = 0; y < kRows; ++y) {
#pragma unroll
      for (int e = 0; e < kGroups; ++e) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          transpose(load_gradients(y, e, 8 * j, count), load_gradients(y, e, 8 * j + 1, count),
                    a[y][e][2 * j], a[y][e][2 * j + 1]);
        }
      }
    }
    wait_for_copies();
    __syncthreads();  // whoever still reads the other buffer has not come here
    if (count > kStep) window.copy(shared, Window::kSize - buffer, count - kStep);
#pragma unroll
    for (int row = 0; row < kRows + kKernel - 1; ++row) {
#pragma unroll
      for (int e = 0; e < kGroups; ++e) {
        B b;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int first =
              buffer + Window::index(2 * i + 8 * j, place.row + row, place.pair + 2 * e + g / 2);
          b[j] = __byte_perm(shared.get(first), shared.get(first + Window::index(1, 0, 0)),
                             g % 2 ? 0x7632 : 0x5410);
        }
#pragma unroll
        for (int y = 0; y < kRows; ++y) {
          const int u = row - y;
          if (u >= 0 && u < kKernel) multiply_add<T>(a[y][e], b, sums[y][e][u]);
        }
      }
    }
    source += kStep * grad_output.channel_stride;
    forget_origin(source);
    buffer = Window::kSize - buffer;
  }
  __syncthreads();

  // Through shared memory to the lanes of the output pixels, a row of locations at a time
  forget_origin(block);  // the tile from scratch: registers are scarce
  const Tile<kWidth> pixels(shape, block, 1);
  const int first = place.warp * kWarpSize;
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
#pragma unroll
    for (int e = 0; e < kGroups; ++e) {
#pragma unroll
      for (int u = 0; u < kKernel; ++u) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int v = 2 * i + j % 2 - neighbor, pixel = 16 * e + 4 * neighbor + 2 * lower + j / 2;
          if (v < 0 || v >= kKernel) continue;
          shared.set((u * kKernel + v) * kPitch + first + pixel, bits_from_float(sums[y][e][u][j]));
        }
      }
    }
    __syncwarp();
    const int h = pixels.h + place.row + y, p = place.lane % kSubpixels;
    const int w = pixels.w + 2 * place.pair + place.lane / kSubpixels;
    if (h < shape.height && w < shape.width) {
      float totals[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        totals[t] = float_from_bits(shared.get(t * kPitch + first + place.lane));
      }
      store_weight_gradients(
          totals, weights, weights_offset(weights, shape, pixels.n, pixels.g, h, w, p),
          grad_weights, weights_offset(grad_weights, shape, pixels.n, pixels.g, h, w, p));
    }
    __syncwarp();
  }
}

// --------------------------------------------------------------------------- gradient of features
//
// A product makes the gradients of 4 x 2 locations: the output's gradients of 16 channels x 8 source
// locations, two neighboring pixels of each, times the weights of these 16 pixels for the 8
// locations. Source locations within two columns and rows are those that use a location:
//
//         0   1   2   3   4   5   6   7       of a source row, half of the output pixels at a time
//       +---+---+---+---+---+---+---+---+
//       |   |   | L | L | L | L |   |   |     L: the locations
//       |   |   | L | L | L | L |   |   |
//       +---+---+---+---+---+---+---+---+

template <typename T, int kWidth>
class GradientWindow
    : public Window<T, 2 * (kHeight<kWidth> + kKernel - 1), kWidth + kKernel - 1, 2> {
 public:
  static constexpr int kColumns = kWidth + kKernel - 1;

  __device__ __forceinline__ GradientWindow(const Shape& shape, const Map& grad_output,
                                            const Tile<kWidth>& tile)
      : GradientWindow::Window(grad_output, tile.template channel<const T>(shape, grad_output),
                               static_cast<int>(2 * shape.height), static_cast<int>(shape.width),
                               2 * (tile.h - kRadius), tile.w - kRadius) {}
};

// The weights of four rows of source locations in shared memory: for each tap, the words of both
// pixels in the upper or the lower output row of a location.
template <int kWidth>
struct SourceWeights {
  static constexpr int kRows = 4, kColumns = kWidth + kKernel - 1;
  static constexpr int kWords = kRows * 2 * kColumns, kPitch = kWords + 4;
  static constexpr int kSize = kTaps * kPitch;

  CARAFE_HOST_DEVICE static int index(int t, int row, int lower, int column) {
    return t * kPitch + (row * 2 + lower) * kColumns + column;
  }

  // From `first_row` of the tile on
  template <typename T>
  __device__ __forceinline__ static void load(const Shape& shape, const Weights& weights,
                                              const Tile<kWidth>& tile, int first_row,
                                              const SharedArray<uint32_t>& shared) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kWords; i += kThreads) {
      const int h = tile.h + first_row + i / kColumns / 2, w = tile.w + i % kColumns - kRadius;
#pragma unroll 1  // registers are scarce
      for (int right = 0; right < 2; ++right) {
        const int p = i / kColumns % 2 * 2 + right;
        float values[kTaps] = {};
        if (h >= 0 && h < shape.height && w >= 0 && w < shape.width) {
          load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, h, w, p), values);
        }
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
          const int word = t * kPitch + i;
          shared.set(
              word, right ? shared.get(word) | to_word<T>(0, values[t]) : to_word<T>(values[t], 0));
        }
      }
    }
  }
};

// As store_sums, for gradients of features.
template <typename T, int kWidth>
__device__ __forceinline__ void store_feature_sums(const Shape& shape, const Map& grad_output,
                                                   const Weights& weights, const Map& grad_features,
                                                   const Tile<kWidth>& tile,
                                                   const Place<kWidth>& place) {
  const int location = place.lane % (kRows * 2 * kPairs), part = place.lane / (kRows * 2 * kPairs);
  const int row = tile.h + place.row + location / (2 * kPairs);
  const int column = tile.w + 2 * place.pair + location % (2 * kPairs);
  if (row >= shape.height || column >= shape.width) return;
  constexpr int kChannels = 8;  // at a time, which share the weights
#pragma unroll 1
  for (int first = part * kChannels; first < tile.channels; first += 2 * kChannels) {
    float sums[kChannels] = {};
#pragma unroll 1
    for (int i = 0; i < kTaps * kSubpixels; ++i) {
      const int p = i % kSubpixels, t = i / kSubpixels;
      const int h = row + kRadius - t / kKernel, w = column + kRadius - t % kKernel;
      if (h < 0 || h >= shape.height || w < 0 || w >= shape.width) continue;
      float values[kTaps], weight = 0;
      load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, h, w, p), values);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        if (j == t) weight = values[j];
      }
      const T* source = tile.template channel<const T>(shape, grad_output) +
                        first * grad_output.channel_stride +
                        (2 * h + p / 2) * grad_output.row_stride + 2 * w + p % 2;
#pragma unroll
      for (int c = 0; c < kChannels; ++c, source += grad_output.channel_stride) {
        if (first + c < tile.channels) sums[c] += weight * to_float(*source);
      }
    }
    T* target = tile.template channel<T>(shape, grad_features) +
                first * grad_features.channel_stride + row * grad_features.row_stride + column;
#pragma unroll
    for (int c = 0; c < kChannels; ++c, target += grad_features.channel_stride) {
      if (first + c < tile.channels) from_float(sums[c], *target);
    }
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void backward_features(const Shape& shape, const Map& grad_output,
                                                  const Weights& weights, const Map& grad_features,
                                                  unsigned block, int splits, bool aligned_rows,
                                                  const SharedArray<uint32_t>& shared) {
  using Window = GradientWindow<T, kWidth>;
  using SourceWeights = tensor_cores::SourceWeights<kWidth>;
  constexpr int kGroups = kPairs / 2, kSourceRows = kRows + kKernel - 1;
  const Tile<kWidth> tile(shape, block, splits);
  const Place<kWidth> place;
  const int g = place.lane / 4, i = place.lane % 4;

  B b[kGroups][kSourceRows][2];
#pragma unroll 1
  for (int first_row = 0; first_row < kHeight<kWidth> + kKernel - 1;
       first_row += SourceWeights::kRows) {
    __syncthreads();
    SourceWeights::template load<T>(shape, weights, tile, first_row - kRadius, shared);
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSourceRows; ++s) {
      const int row = place.row + s - first_row, u = g / 4 + 2 * kRadius - s;
      if (row < 0 || row >= SourceWeights::kRows) continue;
#pragma unroll
      for (int e = 0; e < kGroups; ++e) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = i + 4 * j, v = g % 4 + 2 * kRadius - column;
            const bool is_tap = u >= 0 && u < kKernel && v >= 0 && v < kKernel;
            const int index =
                SourceWeights::index(u * kKernel + v, row, lower, 2 * place.pair + 4 * e + column);
            b[e][s][lower][j] = is_tap ? shared.get(index) : 0;
          }
        }
      }
    }
  }
  __syncthreads();

  Window window(shape, grad_output, tile);
  const bool odd = i % 2;
  const int columns = static_cast<int>(shape.width) - tile.w - 2 * place.pair;
  const int rows = static_cast<int>(shape.height) - tile.h - place.row;
  T* target = tile.template channel<T>(shape, grad_features);
  float check = 0;  // becomes NaN with any sum that is not finite
  for (int count = tile.channels; count > 0; count -= kStep) {
    window.copy(shared, 0, count);
    wait_for_copies();
    __syncthreads();
    C sums[kGroups] = {};
#pragma unroll
    for (int s = 0; s < kSourceRows; ++s) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        // Of channels g and g + 8, word i of every four
        uint32_t words[kGroups + 1][2];
#pragma unroll
        for (int e = 0; e <= kGroups; ++e) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            words[e][j] = shared.get(
                Window::index(g + 8 * j, 2 * (place.row + s) + lower, 2 * place.pair + 4 * e + i));
          }
        }
#pragma unroll
        for (int e = 0; e < kGroups; ++e) {
          const A a = {words[e][0], words[e][1], words[e + 1][0], words[e + 1][1]};
          multiply_add<T>(a, b[e][s][lower], sums[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kGroups; ++e) {
#pragma unroll
      for (int j = 0; j < 4; ++j) check = fmaf(sums[e][j], 0.f, check);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // Lanes with an even i get the words of the left group, the others those of the right one.
      const uint32_t left = to_word<T>(sums[0][2 * j], sums[0][2 * j + 1]);
      const uint32_t right = to_word<T>(sums[1][2 * j], sums[1][2 * j + 1]);
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? left : right, 1);
      const Vector<uint32_t, 2> words = {odd ? other : left, odd ? right : other};
      if (i / 2 >= rows || g + 8 * j >= count) continue;
      uint32_t* const row =
          reinterpret_cast<uint32_t*>(target + (g + 8 * j) * grad_features.channel_stride +
                                      (tile.h + place.row + i / 2) * grad_features.row_stride +
                                      tile.w + 2 * place.pair + 4 * odd);
      if (aligned_rows && 4 * odd + 2 < columns) {
        *reinterpret_cast<Vector<uint32_t, 2>*>(row) = words;
      } else {
        if (4 * odd < columns) row[0] = words.values[0];
        if (4 * odd + 2 < columns) row[1] = words.values[1];
      }
    }
    target += kStep * grad_features.channel_stride;
    forget_origin(target);
    __syncthreads();
  }
  if (__any_sync(kAllLanes, !(check == 0))) {
    __syncwarp();
    store_feature_sums<T>(shape, grad_output, weights, grad_features, tile, place);
  }
}

// ----------------------------------------------------------------------------------- both gradients

template <typename T, int kWidth>
constexpr int kBackwardShared =
    std::max({SourceWeights<kWidth>::kSize, GradientWindow<T, kWidth>::kSize,
              2 * FeatureWindow<T, kWidth>::kSize, kTaps * (kThreads + 4)});

// Blocks take turns, as those of contiguous::backward_kernel do.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    backward_kernel(Shape shape, Map grad_output, Map features, Weights weights, Map grad_features,
                    Weights grad_weights, contiguous::Turns turns, int splits, bool aligned_rows) {
  SHARED_ARRAY(uint32_t, shared, (kBackwardShared<T, kWidth>));
  const unsigned before = turns.strips_of(blockIdx.x);
  if (before < turns.strips_of(blockIdx.x + 1)) {
    backward_features<T, kWidth>(shape, grad_output, weights, grad_features, before, splits,
                                 aligned_rows, shared);
  } else {
    backward_weights<T, kWidth>(shape, grad_output, features, weights, grad_weights,
                                blockIdx.x - before, shared);
  }
}

// --------------------------------------------------------------------------------------- launching

// Whether rows begin at multiples of so many values.
template <typename T>
bool is_aligned(const Map& map, int values) {
  return reinterpret_cast<uintptr_t>(map.data) % (values * sizeof(T)) == 0 &&
         map.batch_stride % values == 0 && map.channel_stride % values == 0 &&
         map.row_stride % values == 0;
}

// Whether there are kernels for it. Weights are multiplied in the type of the features, so they must
// not be beyond its range.
template <typename T, typename Launcher>
bool is_suited(const Launcher& launcher, const Shape& shape, const Map& features,
               const Weights& weights) {
  return launcher.tensor_cores() && shape.kernel == kKernel && shape.scale == 2 &&
         shape.width % 2 == 0 && is_aligned<T>(features, 2) &&
         contiguous::is_suited(shape, {features}) &&
         (std::is_same_v<T, BFloat16> || weights.softmax || weights.type == Type::kHalf);
}

// How the work on a map is divided: the width of tiles, and how many blocks share the channels of
// one. That is more than one where there are few tiles: so that the busiest multiprocessor has as
// little work as possible, of which the weights of a tile are as much as `weight_steps` of channels.
struct Division {
  int width;
  int64_t tiles;
  int splits = 1;

  Division(const Shape& shape, int multiprocessors, int weight_steps)
      : width(tiles_of(shape, 16) < tiles_of(shape, 32) ? 16 : 32), tiles(tiles_of(shape, width)) {
    const int64_t resident = int64_t(kBlocksPerMultiprocessor) * multiprocessors;
    const int64_t steps = divide_up(shape.group_channels(), kStep);
    int64_t least_work = INT64_MAX;
    for (int i = 1; i <= steps; ++i) {
      const int64_t work = divide_up(tiles * i, resident) * (divide_up(steps, i) + weight_steps);
      if (work < least_work) {
        least_work = work;
        splits = i;
      }
    }
  }

 private:
  static int64_t tiles_of(const Shape& shape, int width) {
    return shape.batch * shape.groups * divide_up(shape.height, kTileSize / width) *
           divide_up(shape.width, width);
  }
};

// forward and backward return false, and launch nothing, for what they leave to contiguous.cuh.

template <typename T, typename Launcher>
bool forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  if (!is_suited<T>(launcher, shape, features, weights) ||
      !contiguous::is_suited(shape, {output})) {
    return false;
  }
  const Division division(shape, launcher.multiprocessors(), 3);
  launch(launcher, division.width == 16 ? forward_kernel<T, 16> : forward_kernel<T, 32>,
         division.tiles * division.splits, kThreads, shape, features, weights, output,
         division.splits, is_aligned<T>(output, 8));
  return true;
}

// Gradients that are not wanted are null.
template <typename T, typename Launcher>
bool backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  if (!is_suited<T>(launcher, shape, features, weights) || !is_aligned<T>(grad_output, 4) ||
      !contiguous::is_suited(shape, {grad_output}) ||
      (grad_features && !contiguous::is_suited(shape, {*grad_features}))) {
    return false;
  }
  const Division division(shape, launcher.multiprocessors(), 9);
  contiguous::Turns turns{};
  if (grad_features && shape.channels > 0) {
    turns.strips = static_cast<unsigned>(division.tiles * division.splits);
  }
  if (grad_weights) turns.tiles = static_cast<unsigned>(division.tiles);
  launch(launcher, division.width == 16 ? backward_kernel<T, 16> : backward_kernel<T, 32>,
         turns.blocks(), kThreads, shape, grad_output, features, weights,
         grad_features ? *grad_features : Map{}, grad_weights ? *grad_weights : Weights{}, turns,
         division.splits, grad_features && is_aligned<T>(*grad_features, 4));
  return true;
}

}  // namespace carafe_d2::tensor_cores
