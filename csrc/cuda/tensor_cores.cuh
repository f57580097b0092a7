// CUDA kernels on tensor cores, for contiguous float16 and bfloat16 maps, kernels of 5 x 5, scale 2.
//
// The four output pixels of a source location share its 5 x 5 window, and the windows of neighbors
// overlap. So a product of small dense matrices makes the output of two neighbors: features of 16
// channels x 16 positions of the windows times weights of these positions x 8 output pixels, where
// weights of positions outside a pixel's window are zero. One instruction, mma.m16n8k16, multiplies
// the values as they are and adds up in float32.
//
//        window of a pair of neighbors: 6 columns,
//        in 3 pairs m, of 8 rows
//
//            m = 0   m = 1   m = 2
//          +---+---+---+---+---+---+
//    row 0 | a | * | * | * | * | b |     a, b: windows of the left and the right neighbor,
//        1 | a | * | * | * | * | b |     *: of both, for a pair in row 0 of the tile.
//        2 | a | * | L | R | * | b |     L, R: where the neighbors are
//        3 | a | * | * | * | * | b |
//        4 | a | * | * | * | * | b |     A pair in row y of the tile has rows y to y + 4.
//        5 |   |   |   |   |   |   |
//        6 |   |   |   |   |   |   |
//        7 |   |   |   |   |   |   |
//          +---+---+---+---+---+---+
//
// The 16 positions of an instruction are a pair m of columns, in all 8 rows. That wastes half of the
// multiplications, of which there are plenty, and needs few loads: the four rows of a tile and three
// adjacent pairs of locations use the same features.
//
// Only what is finite can be multiplied with zero: where a NaN or infinity is among the features,
// `store_sums` makes sums of them as they are defined.
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

inline int64_t tiles(const Shape& shape, int width) {
  return shape.batch * shape.groups * divide_up(shape.height, kTileSize / width) *
         divide_up(shape.width, width);
}

// What a tile and its margin have of a map in shared memory, 16 channels at a time: words of two
// horizontally adjacent values, the left one in the lower half. What is outside the map is zero. Each
// warp copies some channels, kCopy words at once.
template <typename T, int kRows, int kPitch, int kCopy>
class Window {
 public:
  // Fragments are loaded from eight channels at once, and of each from four words in a row, or from
  // one word in four rows, if the pitch is 3 modulo 8. These are in different banks.
  static constexpr int kChannelPitch = (kRows * kPitch + 7) / 8 * 8 + 4;
  static constexpr int kSize = kStep * kChannelPitch;

  CARAFE_HOST_DEVICE static int index(int channel, int row, int word) {
    return channel * kChannelPitch + row * kPitch + word;
  }

  // Of a map with so many rows and words in a row, and whose first channel is at `source`, the window
  // begins in `first_row` and `first_word`.
  __device__ __forceinline__ Window(const Map& map, const T* source, int rows, int words,
                                    int first_row, int first_word)
      : channel_(map.channel_stride),
        next_(source + threadIdx.x / kWarpSize * kChannels * channel_) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int position = (threadIdx.x % kWarpSize + i * kWarpSize) * kCopy;
      const int row = first_row + position / kPitch, word = first_word + position % kPitch;
      const bool inside =
          position < kRows * kPitch && row >= 0 && row < rows && word >= 0 && word < words;
      offsets_[i] = inside ? row * static_cast<int>(map.row_stride) + 2 * word : kOutside;
    }
  }

  // Begins to copy the next channels, of which `count` are left, to the buffer at `begin`, which has
  // zeros outside the map.
  __device__ __forceinline__ void copy(const SharedArray<uint32_t>& shared, int begin, int count) {
    const int channel = threadIdx.x / kWarpSize * kChannels;
    begin += index(channel, 0, threadIdx.x % kWarpSize * kCopy);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (offsets_[i] == kOutside) continue;
        const int target = begin + index(c, 0, i * kWarpSize * kCopy);
        if (channel + c < count) {
          copy_async<kCopy>(shared, target, next_ + offsets_[i]);
        } else {
          shared.set(target, Vector<uint32_t, kCopy>());
        }
      }
      next_ += channel_;
      forget_origin(next_);
    }
    next_ += (kStep - kChannels) * channel_;
  }

  // Fills `buffers` of them with zeros.
  __device__ __forceinline__ static void clear(const SharedArray<uint32_t>& shared, int buffers) {
    for (int i = threadIdx.x; i < buffers * kSize; i += kThreads) shared.set(i, 0);
  }

 private:
  static constexpr int kChannels = kStep / kWarps;  // of a warp
  static constexpr int kCopies = (kRows * kPitch / kCopy + kWarpSize - 1) / kWarpSize;
  static constexpr int kOutside = INT32_MIN;

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

// The weights of a tile in shared memory, as words of two horizontally adjacent taps: those that a
// row of taps has in a pair of columns. There are four neighboring banks for neither reason than
// that lanes of different rows of taps should not meet in one.
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

// The output of a warp's locations in a step's channels, of which `count` are left, without products
// of zeros: for windows that hold a NaN or infinity, which a zero would carry on to the neighbors.
template <typename T, int kWidth>
__device__ __forceinline__ void store_sums(const Shape& shape, const Weights& weights,
                                           const Map& output, const Tile<kWidth>& tile,
                                           int first_row, int first_pair, int lane, int count,
                                           T* target, const SharedArray<uint32_t>& shared,
                                           int buffer) {
#pragma unroll 1
  for (int j = lane; j < kRows * kPairs * 2 * kSubpixels; j += kWarpSize) {
    const int p = j % kSubpixels, location = j / kSubpixels;
    const int y = first_row + location / (2 * kPairs), x = 2 * first_pair + location % (2 * kPairs);
    if (tile.h + y >= shape.height || tile.w + x >= shape.width) continue;
    float values[kTaps];
    load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, tile.h + y, tile.w + x, p),
                 values);
    T* pixel = target + (2 * y + p / 2) * output.row_stride + 2 * x + p % 2;
#pragma unroll 1
    for (int c = 0; c < min(count, kStep); ++c, pixel += output.channel_stride) {
      float sum = 0;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        const int column = x + t % kKernel;
        const uint32_t word =
            shared.get(buffer + FeatureWindow<T, kWidth>::index(c, y + t / kKernel, column / 2));
        sum += values[t] * to_float(T{static_cast<uint16_t>(word >> column % 2 * 16)});
      }
      from_float(sum, *pixel);
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
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, i = lane % 4;
  // The warp's first pair and row in the tile
  const int first_pair = warp % (kWidth / 2 / kPairs) * kPairs;
  const int first_row = warp / (kWidth / 2 / kPairs) * kRows;
  // The first row of the window that it multiplies
  const int product_row = first_row - first_row % (kProductRows - kKernel + 1);

  TileWeights::template load<T>(shape, weights, tile, shared);
  __syncthreads();
  B b[kRows][kPairs][kColumnPairs];
#pragma unroll
  for (int y = 0; y < kRows; ++y) {
#pragma unroll
    for (int q = 0; q < kPairs; ++q) {
      const int pixel = TileWeights::pixel(first_row + y, first_pair + q, g);
#pragma unroll
      for (int m = 0; m < kColumnPairs; ++m) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = product_row + i + 4 * j - first_row - y;
          const bool is_tap = u >= 0 && u < kKernel;
          b[y][q][m][j] = is_tap ? shared.get(TileWeights::index(u, m, pixel)) : 0;
        }
      }
    }
  }
  __syncthreads();
  Window::clear(shared, 2);
  __syncthreads();

  Window window(shape, features, tile);
  const int upper = i / 2, odd = i % 2;  // C's columns of a lane: which row, which neighbor
  const int columns = min(static_cast<int>(shape.width) - tile.w - 2 * first_pair, 2 * kPairs);
  const bool aligned = aligned_rows && columns == 2 * kPairs;
  const int rows = static_cast<int>(shape.height) - tile.h - first_row;
  T* target = tile.template channel<T>(shape, output) + 2 * tile.h * output.row_stride + 2 * tile.w;
  int buffer = 0;
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
        a[m][j] = shared.get(buffer + Window::index(channel, row, first_pair + m));
      }
    };
    uint32_t words[kRows][2][kPairs];  // of channels g and g + 8
    float check = 0;                   // becomes NaN with any sum that is not finite
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
    if (__any_sync(kAllLanes, !(check == 0))) {
      store_sums(shape, weights, output, tile, first_row, first_pair, lane, count, target, shared,
                 buffer);
    } else {
#pragma unroll
      for (int y = 0; y < kRows; ++y) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          T* row = target + (g + 8 * j) * output.channel_stride +
                   (2 * (first_row + y) + upper) * output.row_stride + 4 * first_pair;
          const bool exists = y < rows && g + 8 * j < count;
          store_row(words[y][j], odd, exists ? columns : 0, aligned,
                    reinterpret_cast<uint32_t*>(row));
        }
      }
    }
    target += kStep * output.channel_stride;
    forget_origin(target);
    buffer = Window::kSize - buffer;
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
template <typename T>
bool is_suited(const Shape& shape, const Weights& weights) {
  return shape.kernel == kKernel && shape.scale == 2 && shape.width % 2 == 0 &&
         (std::is_same_v<T, BFloat16> || weights.softmax || weights.type == Type::kHalf);
}

// Returns false, and launches nothing, for what it leaves to contiguous.cuh.
template <typename T, typename Launcher>
bool forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  if (!launcher.tensor_cores() || !is_suited<T>(shape, weights) || !is_aligned<T>(features, 2) ||
      !contiguous::is_suited(shape, {features, output})) {
    return false;
  }
  // Where there are few tiles, several blocks share the channels of one: so that the busiest
  // multiprocessor has as little work as possible, of which the weights are as much as some steps.
  constexpr int64_t kStepsForWeights = 3;
  const int64_t resident = int64_t(kBlocksPerMultiprocessor) * launcher.multiprocessors();
  const int64_t steps = divide_up(shape.group_channels(), kStep);
  const int width = tiles(shape, 16) < tiles(shape, 32) ? 16 : 32;
  int splits = 1;
  int64_t least_work = INT64_MAX;
  for (int i = 1; i <= steps; ++i) {
    const int64_t work =
        divide_up(tiles(shape, width) * i, resident) * (divide_up(steps, i) + kStepsForWeights);
    if (work < least_work) {
      least_work = work;
      splits = i;
    }
  }
  launch(launcher, width == 16 ? forward_kernel<T, 16> : forward_kernel<T, 32>,
         tiles(shape, width) * splits, kThreads, shape, features, weights, output, splits,
         is_aligned<T>(output, 8));
  return true;
}

}  // namespace carafe_d2::tensor_cores
