// CARAFE where channels are adjacent in memory: float32 and the half types, kernels of 3, 5 and 7,
// even scales. Everything else is left to general.cuh.
//
// A lane has kVector adjacent channels, and all lanes of a team the same location. So a weight is
// one number for the whole team: it lies in shared memory as [location][tap][subpixel] and is
// broadcast from there, those of kSubpixels subpixels at a time, which make up a pass.
//
// forward and backward_features walk along a row. They load each source column once and add it to
// all sums that it is part of. The sums of k adjacent columns are kept in registers, and in every
// step one column is complete and the others move up by one. In backward_weights a lane has all
// k * k * kSubpixels sums of a location instead, which are added up over the lanes at the end.
//
// A sum belongs to one thread, or to several that meet in a fixed order: no atomics.
#pragma once

#include <type_traits>

#include "device.cuh"
#include "dispatch.h"

namespace carafe_d2::channels_last {

constexpr int kVector = 4;  // adjacent channels, which one instruction loads or stores
constexpr int kSubpixels = 4;
constexpr int kRowTeams = 4;  // of a block that walks along rows, one below the other

// ---------------------------------------------------------------------------- division of the work

// A block has a tile: channel_teams x row_teams teams, whose channels and rows are adjacent.
struct Tiling {
  int channels;  // of a group
  int lanes;     // of a team
  int channel_teams, row_teams;
  int rows, columns;  // of a tile, in locations
  int channel_tiles, row_tiles, column_tiles;
  int passes;

  CARAFE_HOST_DEVICE int threads() const { return lanes * channel_teams * row_teams; }
};

__device__ __forceinline__ int take(unsigned& index, unsigned count) {
  const unsigned digit = index % count;
  index /= count;
  return static_cast<int>(digit);
}

// The tile of this block, and in it the team and the channels of this thread.
struct Tile {
  int n, g, pass;
  int row, column;  // of the first location
  int columns;      // without those outside the map
  int lane, row_team;
  int channel;  // the first one of this thread, in the group

  // `passes` that different blocks take.
  __device__ __forceinline__ Tile(const Shape& shape, const Tiling& tiling, int passes) {
    unsigned block = blockIdx.x, thread = threadIdx.x;
    pass = take(block, passes);
    const int first_team = take(block, tiling.channel_tiles) * tiling.channel_teams;
    column = take(block, tiling.column_tiles) * tiling.columns;
    row = take(block, tiling.row_tiles) * tiling.rows;
    g = take(block, static_cast<unsigned>(shape.groups));
    n = static_cast<int>(block);
    columns = min(tiling.columns, static_cast<int>(shape.width) - column);
    lane = take(thread, tiling.lanes);
    channel = ((first_team + take(thread, tiling.channel_teams)) * tiling.lanes + lane) * kVector;
    row_team = static_cast<int>(thread);
  }

  // Where the channels of this thread are in pixel (y, x) of a map.
  template <typename T>
  __device__ __forceinline__ T* pixel(const Tiling& tiling, const Map& map, int64_t y,
                                      int64_t x) const {
    return static_cast<T*>(map.data) + n * map.batch_stride + y * map.row_stride +
           x * map.column_stride + (g * tiling.channels + channel);
  }
};

// Where the subpixels of a pass are in an output map: two pairs of neighbors, which are in one row
// or, if the scale is 2, in two.
struct Pass {
  int first;           // from the first pixel of the location
  int column, second;  // from the first one of the pass: its neighbor, the other pair

  __device__ __forceinline__ Pass(const Shape& shape, const Map& map, int pass)
      : column(static_cast<int>(map.column_stride)) {
    const auto offset = [&](int p) {
      const Subpixel subpixel(shape, p);
      return subpixel.row * static_cast<int>(map.row_stride) + subpixel.column * column;
    };
    first = offset(pass * kSubpixels);
    second = offset(pass * kSubpixels + 2) - first;
  }

  __device__ __forceinline__ int operator[](int p) const {
    return (p < 2 ? 0 : second) + p % 2 * column;
  }
};

__device__ __forceinline__ bool is_below(int index, int size) {  // and not negative
  return static_cast<unsigned>(index) < static_cast<unsigned>(size);
}

__device__ __forceinline__ int nearest_below(int index, int size) {
  return min(max(index, 0), size - 1);
}

// ------------------------------------------------------------------------------- loads and stores

// What a lane loads at once. The compiler would take apart the words of BFloat16 in more steps.
template <typename T>
using Channels = std::conditional_t<std::is_same_v<T, BFloat16>, Vector<uint32_t, kVector / 2>,
                                    Vector<T, kVector>>;

template <typename T>
__device__ __forceinline__ void to_floats(const Vector<T, kVector>& channels,
                                          float (&values)[kVector]) {
#pragma unroll
  for (int q = 0; q < kVector; ++q) values[q] = to_float(channels.values[q]);
}

__device__ __forceinline__ void to_floats(const Channels<BFloat16>& channels,
                                          float (&values)[kVector]) {
#pragma unroll
  for (int q = 0; q < kVector; ++q) {
    const uint32_t word = channels.values[q / 2];
    values[q] = float_from_bits(q % 2 ? word & 0xffff0000u : word << 16);
  }
}

template <typename T>
__device__ __forceinline__ Channels<T> load(const T* source) {
  return *reinterpret_cast<const Channels<T>*>(source);
}

// Zeros, and nothing is read, if the pixel is not one of the map.
template <typename T>
__device__ __forceinline__ void load_if(bool is_inside, const T* pixel, float (&values)[kVector]) {
  Channels<T> channels{};
  if (is_inside) channels = load(pixel);
  to_floats(channels, values);
}

template <typename T>
__device__ __forceinline__ void store(const float (&values)[kVector], T* target) {
  Vector<T, kVector> vector;
#pragma unroll
  for (int q = 0; q < kVector; ++q) from_float(values[q], vector.values[q]);
  *reinterpret_cast<Vector<T, kVector>*>(target) = vector;
}

// Rows of columns, from `column` to before `end`, with `passes` of each, of which the first column
// lacks those before `pass`.
struct Area {
  int row, rows;
  int column, end;
  int pass, passes;
};

// The weights of an area in shared memory: rows of steps, where a step is a pass of a column.
//
// Neighbors begin in different banks, since k * k is one more than a multiple of eight; and so do
// rows, since kPitch is odd.
template <int k, int kSteps>
struct SharedWeights {
  static constexpr int kPitch = kSteps | 1;

  template <int kRows>
  static constexpr int kSize = kRows * kPitch * k * k * kSubpixels;

  // Where the weights of tap t are. Steps and taps beyond the last go on with the next ones.
  CARAFE_HOST_DEVICE static int index(int row, int step, int t) {
    return ((row * kPitch + step) * k * k + t) * kSubpixels;
  }

  // The block loads them, except for what is outside the map.
  __device__ __forceinline__ static void load(const Shape& shape, const Weights& weights,
                                              const Tile& tile, const Area& area,
                                              const SharedArray<float>& shared) {
    for (int i = threadIdx.x; i < area.rows * kSteps * kSubpixels; i += blockDim.x) {
      const int p = i % kSubpixels, step = i / kSubpixels % kSteps, row = i / kSubpixels / kSteps;
      const int h = area.row + row, w = area.column + (area.pass + step) / area.passes;
      if (!is_below(h, static_cast<int>(shape.height)) || w < 0 || w >= area.end) continue;
      const int subpixel = (tile.pass + (area.pass + step) % area.passes) * kSubpixels + p;
      float values[k * k];
      load_weights(weights, weights_offset(weights, shape, tile.n, tile.g, h, w, subpixel), values);
#pragma unroll
      for (int t = 0; t < k * k; ++t) shared.set(index(row, step, t) + p, values[t]);
    }
  }
};

// ---------------------------------------------------------------------------------------- forward

template <int k>
struct Forward {
  static constexpr int kThreads = k == 7 ? 128 : 256;
  static constexpr int kBlocks = 2;                 // that fit into a multiprocessor
  static constexpr int kColumns = k == 7 ? 8 : 16;  // of a tile, at most
};

// A team has one row. Source column x is part of the columns x - r to x + r of the output, and is
// added to them in this order: the first one is then complete and stored, and each of the others
// takes the place in `sums` of the one before. That costs no moves, and columns beyond the ends of
// the tile, which nobody needs, can be skipped.
template <int k, typename T>
__global__ void __launch_bounds__(Forward<k>::kThreads, Forward<k>::kBlocks)
    forward_kernel(Shape shape, Tiling tiling, Map features, Weights weights, Map output) {
  using TileWeights = SharedWeights<k, Forward<k>::kColumns>;
  constexpr int r = k / 2;
  SHARED_ARRAY(float, shared, TileWeights::template kSize<kRowTeams>);
  const Tile tile(shape, tiling, tiling.passes);
  const Area area = {tile.row, kRowTeams, tile.column, tile.column + tile.columns, 0, 1};
  TileWeights::load(shape, weights, tile, area, shared);
  __syncthreads();

  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const int h = tile.row + tile.row_team;
  if (h >= height || tile.channel >= tiling.channels) return;
  const int row = static_cast<int>(features.row_stride);
  const int column = static_cast<int>(features.column_stride);
  const int target_column = static_cast<int>(shape.scale * output.column_stride);
  const Pass pass(shape, output, tile.pass);
  const T* source = tile.pixel<const T>(tiling, features, h - r, tile.column);
  T* target =
      tile.pixel<T>(tiling, output, h * shape.scale, tile.column * shape.scale) + pass.first;

  float sums[k - 1][kSubpixels][kVector] = {};
  int first = TileWeights::index(tile.row_team, -2 * r, 0);  // weights of column x - r
  for (int x = -r; x < tile.columns + r; ++x, first += TileWeights::index(0, 1, 0)) {
    const bool is_column = is_below(tile.column + x, width);
    float feature[k][kVector];
#pragma unroll
    for (int u = 0; u < k; ++u) {
      const bool is_inside = is_column && is_below(h - r + u, height);
      load_if(is_inside, source + x * column + u * row, feature[u]);
    }
#pragma unroll
    for (int j = 0; j < k; ++j) {
      const int w = x - r + j, v = k - 1 - j;
      if (!is_below(w, tile.columns)) continue;
      float sum[kSubpixels][kVector];
#pragma unroll
      for (int p = 0; p < kSubpixels; ++p) {
#pragma unroll
        for (int q = 0; q < kVector; ++q) sum[p][q] = j < k - 1 ? sums[j][p][q] : 0;
      }
#pragma unroll
      for (int u = 0; u < k; ++u) {
        const auto weight = shared.get<kSubpixels>(first + TileWeights::index(0, j, u * k + v));
#pragma unroll
        for (int p = 0; p < kSubpixels; ++p) {
#pragma unroll
          for (int q = 0; q < kVector; ++q) sum[p][q] += weight.values[p] * feature[u][q];
        }
      }
#pragma unroll
      for (int p = 0; p < kSubpixels; ++p) {
        if (j == 0) {
          store(sum[p], target + w * target_column + pass[p]);
        } else {
#pragma unroll
          for (int q = 0; q < kVector; ++q) sums[j - 1][p][q] = sum[p][q];
        }
      }
    }
  }
}

// --------------------------------------------------------------------------- gradient of features

template <int k>
struct BackwardFeatures {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 3;
  static constexpr int kColumns = 16;           // of a tile, at most
  static constexpr int kRows = k == 7 ? 2 : 4;  // of a team
  static constexpr int kSteps = 3;              // whose weights are in shared memory at a time
  using StepWeights = SharedWeights<k, kSteps>;
};

// Adds a pass of source column x to the sums of the locations that it reaches, those in columns
// x - r to x + r and in the kRows rows from `row` on. `source` is its pixel in `tile_row`.
template <int k, typename T>
__device__ __forceinline__ void scatter_column(
    const T* source, int source_row, int tile_row, const Pass& pass, int row, int height, int x,
    int columns, const SharedArray<float>& shared, int first,
    float (&sums)[BackwardFeatures<k>::kRows][k][kVector]) {
  using Sizes = BackwardFeatures<k>;
  constexpr int r = k / 2, kSources = Sizes::kRows + k - 1;
  Channels<T> next[kSubpixels];
  // Source row row - r + i. One outside the map is not used, and another one loaded in its place.
  const auto load_row = [&](int i) {
    const T* pixel = source + (nearest_below(row - r + i, height) - tile_row) * source_row;
#pragma unroll
    for (int p = 0; p < kSubpixels; ++p) next[p] = load(pixel + pass[p]);
  };
  load_row(0);
#pragma unroll
  for (int i = 0; i < kSources; ++i) {
    float gradient[kSubpixels][kVector];
#pragma unroll
    for (int p = 0; p < kSubpixels; ++p) to_floats(next[p], gradient[p]);
    if (i + 1 < kSources) load_row(i + 1);  // a row ahead, since they are in no cache
    if (!is_below(row - r + i, height)) continue;
#pragma unroll
    for (int v = 0; v < k; ++v) {
      if (!is_below(x - r + v, columns)) continue;
#pragma unroll
      for (int a = 0; a < Sizes::kRows; ++a) {
        const int u = a - i + k - 1;
        if (u < 0 || u >= k) continue;
        const auto weight =
            shared.get<kSubpixels>(first + Sizes::StepWeights::index(i, 0, u * k + v));
#pragma unroll
        for (int p = 0; p < kSubpixels; ++p) {
#pragma unroll
          for (int q = 0; q < kVector; ++q) {
            sums[a][v][q] += weight.values[p] * gradient[p][q];
          }
        }
      }
    }
  }
}

// A team has kRows rows, so that it uses a gradient for up to kRows * k sums.
template <int k, typename T>
__global__ void __launch_bounds__(BackwardFeatures<k>::kThreads, BackwardFeatures<k>::kBlocks)
    backward_features_kernel(Shape shape, Tiling tiling, Map grad_output, Weights weights,
                             Map grad_features) {
  using Sizes = BackwardFeatures<k>;
  using StepWeights = typename Sizes::StepWeights;
  constexpr int r = k / 2, kRows = Sizes::kRows;
  SHARED_ARRAY(float, shared, StepWeights::template kSize<kRowTeams * kRows + 2 * r>);
  const Tile tile(shape, tiling, 1);
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const int row = tile.row + tile.row_team * kRows;
  const int end = min(tile.column + tile.columns + r, width);  // of the source columns
  const bool is_active = row < height && tile.channel < tiling.channels;
  const int source_row = static_cast<int>(shape.scale * grad_output.row_stride);
  const T* source = tile.pixel<const T>(tiling, grad_output, tile.row * shape.scale,
                                        (tile.column - r) * shape.scale);

  float sums[kRows][k][kVector] = {};  // of columns x - r to x + r
  int slot = Sizes::kSteps;            // of the step's weights
  for (int x = -r; x < tile.columns + r; ++x) {
    for (int pass = 0; pass < tiling.passes; ++pass, ++slot) {
      if (slot == Sizes::kSteps) {
        slot = 0;
        __syncthreads();
        const Area area = {tile.row - r, tiling.rows + 2 * r, tile.column + x, end,
                           pass,         tiling.passes};
        StepWeights::load(shape, weights, tile, area, shared);
        __syncthreads();
      }
      if (is_active && is_below(tile.column + x, end)) {
        const Pass offsets(shape, grad_output, pass);
        scatter_column<k>(source + offsets.first, source_row, tile.row, offsets, row, height, x,
                          tile.columns, shared, StepWeights::index(tile.row_team * kRows, slot, 0),
                          sums);
      }
    }
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      if (is_active && x >= r && row + a < height) {  // from scratch: registers are scarce
        store(sums[a][0], tile.pixel<T>(tiling, grad_features, row + a, tile.column + x - r));
      }
#pragma unroll
      for (int v = 0; v < k; ++v) {
#pragma unroll
        for (int q = 0; q < kVector; ++q) sums[a][v][q] = v + 1 < k ? sums[a][v + 1][q] : 0;
      }
    }
    source += shape.scale * grad_output.column_stride;
  }
}

// ---------------------------------------------------------------------------- gradient of weights

template <int k>
struct BackwardWeights {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = k == 3 ? 4 : 2;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kLanes = 8;                     // of a team
  static constexpr int kColumns = kWarpSize / kLanes;  // of a warp and of a tile
  static constexpr int kChannels = kLanes * kVector;   // of a team
  static constexpr int kRows = k == 7 ? 3 : k;         // of taps whose sums fit into registers
};

template <typename T>
__device__ __forceinline__ const T* move_bytes(const T* source, unsigned bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(source) + bytes);
}

// Sums over every `step`-th of the `channels` left, for one location, the subpixels of a pass and
// the taps in these rows and columns: offsets in elements and, which saves instructions, in bytes.
template <int kRows, int k, typename T>
__device__ __forceinline__ void correlate(const T* source, const int (&rows)[kRows],
                                          const unsigned (&columns)[k], const T* output,
                                          const Pass& pass, int channels, int step,
                                          float (&sums)[kRows * k][kSubpixels]) {
  Channels<T> next[kSubpixels] = {};
  const auto load_gradients = [&] {
#pragma unroll
    for (int p = 0; p < kSubpixels; ++p) {
      if (channels > 0) next[p] = load(output + pass[p]);
    }
  };
  load_gradients();
  while (channels > 0) {
    float gradient[kSubpixels][kVector];
#pragma unroll
    for (int p = 0; p < kSubpixels; ++p) to_floats(next[p], gradient[p]);
    channels -= step;
    output += step;
    load_gradients();  // a turn ahead, since they are in no cache
#pragma unroll
    for (int t = 0; t < kRows * k; ++t) {
      float feature[kVector];
      to_floats(load(move_bytes(source + rows[t / k], columns[t % k])), feature);
#pragma unroll
      for (int q = 0; q < kVector; ++q) {
#pragma unroll
        for (int p = 0; p < kSubpixels; ++p) sums[t][p] += feature[q] * gradient[p][q];
      }
    }
    source += step;
  }
}

// The sum over a team's lanes, of subpixel lane / 2.
__device__ __forceinline__ float sum_of_team(const float (&sums)[kSubpixels], int lane) {
  float pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, lane & 4 ? sums[i] : sums[i + 2], 4);
    pair[i] = (lane & 4 ? sums[i + 2] : sums[i]) + other;
  }
  const float other = __shfl_xor_sync(kAllLanes, lane & 2 ? pair[0] : pair[1], 2);
  const float sum = (lane & 2 ? pair[1] : pair[0]) + other;
  return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

// A team has one location, a warp adjacent columns. `splits` warps share the channels of their
// locations, if there are too few of these to keep the device busy.
template <int k, typename T>
__global__ void __launch_bounds__(BackwardWeights<k>::kThreads, BackwardWeights<k>::kBlocks)
    backward_weights_kernel(Shape shape, Tiling tiling, int splits, Map grad_output, Map features,
                            Weights weights, Weights grad_weights) {
  using Sizes = BackwardWeights<k>;
  constexpr int r = k / 2, kRows = Sizes::kRows, kPairs = Sizes::kThreads / 2;  // of lanes
  SHARED_ARRAY(float, tap_sums, k * k * kPairs);
  const Tile tile(shape, tiling, tiling.passes);
  const int height = static_cast<int>(shape.height), width = static_cast<int>(shape.width);
  const int warp = tile.row_team / Sizes::kColumns, split = warp % splits;
  const int own_row = tile.row + warp / splits;
  const int own_column = tile.column + tile.row_team % Sizes::kColumns;
  // Instead of what is outside the map something inside is loaded, and its sums are not used.
  const int h = min(own_row, height - 1), w = min(own_column, width - 1);
  const int left = max(w - r, 0), pair = static_cast<int>(threadIdx.x) / 2;
  unsigned columns[k];
#pragma unroll
  for (int v = 0; v < k; ++v) {
    columns[v] = (nearest_below(w + v - r, width) - left) *
                 static_cast<unsigned>(features.column_stride * sizeof(T));
  }

  for (int first = 0; first < k; first += kRows) {  // row of taps
    int rows[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      rows[u] =
          (nearest_below(h + first + u - r, height) - h) * static_cast<int>(features.row_stride);
    }
    const int c = split * Sizes::kChannels;
    const Pass pass(shape, grad_output, tile.pass);
    const T* source = tile.pixel<const T>(tiling, features, h, left) + c;
    const T* output = tile.pixel<const T>(tiling, grad_output, h * shape.scale, w * shape.scale) +
                      (pass.first + c);
    float sums[kRows * k][kSubpixels] = {};
    correlate<kRows, k>(source, rows, columns, output, pass, tiling.channels - tile.channel - c,
                        splits * Sizes::kChannels, sums);
#pragma unroll
    for (int i = 0; i < kRows * k; ++i) {
      const float sum = sum_of_team(sums[i], tile.lane);
      const int t = first * k + i;
      if (t < k * k && tile.lane % 2 == 0) tap_sums.set(t * kPairs + pair, sum);
    }
  }
  __syncthreads();

  if (split > 0 || tile.lane % 2 > 0 || own_row >= height || own_column >= width) return;
  float gradients[k * k] = {};
#pragma unroll 1
  for (int i = 0; i < splits; ++i) {
#pragma unroll
    for (int t = 0; t < k * k; ++t) {
      gradients[t] += tap_sums.get(t * kPairs + i * (kWarpSize / 2) + pair);
    }
  }
#pragma unroll
  for (int t = 0; t < k * k; ++t) {
    const bool is_inside = is_below(h + t / k - r, height) && is_below(w + t % k - r, width);
    if (!is_inside) gradients[t] = 0;
  }
  const int p = tile.pass * kSubpixels + tile.lane / 2;
  store_weight_gradients(gradients, weights,
                         weights_offset(weights, shape, tile.n, tile.g, h, w, p), grad_weights,
                         weights_offset(grad_weights, shape, tile.n, tile.g, h, w, p));
}

// --------------------------------------------------------------------------------------- launches

// Whether a lane can load or store kVector channels at once. Offsets in a tile and its margin are
// 32-bit, all others 64-bit.
template <typename T>
bool is_suited(const Shape& shape, const Map& map) {
  constexpr int64_t kReach = 32;  // in locations; more than a tile and its margin have
  return map.channel_stride == 1 && map.batch_stride % kVector == 0 &&
         map.row_stride % kVector == 0 && map.column_stride % kVector == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % sizeof(Vector<T, kVector>) == 0 &&
         (map.row_stride + map.column_stride) * shape.scale * kReach <= INT32_MAX;
}

// Whether lanes have channels, and locations fit into 32 bits.
inline bool is_suited(const Shape& shape) {
  constexpr int64_t kFewestChannels = 16;  // with fewer, too many lanes would be idle
  return shape.height <= INT32_MAX / 2 && shape.width <= INT32_MAX / 2 &&
         shape.group_channels() >= kFewestChannels && shape.group_channels() % kVector == 0;
}

template <typename T>
bool is_suited(const Shape& shape, const Map& small, const Map& large) {
  return shape.scale % 2 == 0 && shape.scale <= INT16_MAX && is_suited(shape) &&
         is_suited<T>(shape, small) && is_suited<T>(shape, large);
}

inline int64_t tiles(const Shape& shape, const Tiling& tiling) {
  return shape.batch * shape.groups * tiling.row_tiles * tiling.column_tiles * tiling.channel_tiles;
}

// For teams that walk along `team_rows` rows each. Blocks take one of `passes` of a tile.
inline Tiling walking_tiling(const Shape& shape, int most_threads, int team_rows, int most_columns,
                             int passes, int multiprocessors) {
  Tiling tiling{};
  tiling.channels = static_cast<int>(shape.group_channels());
  tiling.passes = static_cast<int>(shape.subpixels() / kSubpixels);
  // As few idle lanes as possible
  const int64_t vectors = tiling.channels / kVector;
  tiling.lanes = kWarpSize;
  for (int lanes : {16, 8}) {
    if (divide_up(vectors, lanes) * lanes < divide_up(vectors, tiling.lanes) * tiling.lanes) {
      tiling.lanes = lanes;
    }
  }
  // As many teams as possible, since the teams of a block share weights
  const int64_t channel_teams = divide_up(vectors, tiling.lanes);
  tiling.row_teams = kRowTeams;
  tiling.channel_teams = 1;
  while (2 * tiling.threads() <= most_threads && channel_teams % (2 * tiling.channel_teams) == 0) {
    tiling.channel_teams *= 2;
  }
  tiling.channel_tiles = static_cast<int>(channel_teams / tiling.channel_teams);
  tiling.rows = team_rows * kRowTeams;
  tiling.row_tiles = static_cast<int>(divide_up(shape.height, tiling.rows));
  // As little work as possible for the busiest multiprocessor; the margin of a tile is work, too
  int64_t least_work = INT64_MAX;
  Tiling best = tiling;
  for (tiling.columns = most_columns; tiling.columns > 0; --tiling.columns) {
    tiling.column_tiles = static_cast<int>(divide_up(shape.width, tiling.columns));
    const int64_t work = divide_up(tiles(shape, tiling) * passes, multiprocessors) *
                         (tiling.columns + shape.kernel - 1);
    if (work < least_work) {
      least_work = work;
      best = tiling;
    }
  }
  return best;
}

// forward and backward return false, and launch nothing, for what they leave to general.cuh.

template <typename T, typename Launcher>
bool forward(Launcher& launcher, const Shape& shape, const Map& features, const Weights& weights,
             const Map& output) {
  return is_suited<T>(shape, features, output) && with_kernel_size(shape, [&](auto size) {
           constexpr int k = decltype(size)::value;
           const int passes = static_cast<int>(shape.subpixels() / kSubpixels);
           const Tiling tiling =
               walking_tiling(shape, Forward<k>::kThreads, 1, Forward<k>::kColumns, passes,
                              launcher.multiprocessors());
           launch(launcher, forward_kernel<k, T>, tiles(shape, tiling) * passes, tiling.threads(),
                  shape, tiling, features, weights, output);
         });
}

template <int k, typename T, typename Launcher>
void launch_backward_features(Launcher& launcher, const Shape& shape, const Map& grad_output,
                              const Weights& weights, const Map& grad_features) {
  using Sizes = BackwardFeatures<k>;
  const Tiling tiling = walking_tiling(shape, Sizes::kThreads, Sizes::kRows, Sizes::kColumns, 1,
                                       launcher.multiprocessors());
  launch(launcher, backward_features_kernel<k, T>, tiles(shape, tiling), tiling.threads(), shape,
         tiling, grad_output, weights, grad_features);
}

template <int k, typename T, typename Launcher>
void launch_backward_weights(Launcher& launcher, const Shape& shape, const Map& grad_output,
                             const Map& features, const Weights& weights,
                             const Weights& grad_weights) {
  using Sizes = BackwardWeights<k>;
  Tiling tiling{};
  tiling.channels = static_cast<int>(shape.group_channels());
  tiling.passes = static_cast<int>(shape.subpixels() / kSubpixels);
  tiling.lanes = Sizes::kLanes;
  tiling.row_teams = Sizes::kThreads / Sizes::kLanes;
  tiling.channel_teams = tiling.channel_tiles = 1;
  tiling.columns = Sizes::kColumns;
  tiling.column_tiles = static_cast<int>(divide_up(shape.width, tiling.columns));
  // As little work as possible for the busiest multiprocessor; beginning and end are work, too
  int64_t least_work = INT64_MAX;
  Tiling best = tiling;
  for (tiling.rows = Sizes::kWarps; tiling.rows > 0; tiling.rows /= 2) {
    tiling.row_tiles = static_cast<int>(divide_up(shape.height, tiling.rows));
    const int64_t turns =
        divide_up(tiling.channels, Sizes::kChannels * Sizes::kWarps / tiling.rows);
    const int64_t work =
        divide_up(tiles(shape, tiling) * tiling.passes, launcher.multiprocessors()) * (turns + 2);
    if (work < least_work) {
      least_work = work;
      best = tiling;
    }
  }
  launch(launcher, backward_weights_kernel<k, T>, tiles(shape, best) * best.passes, Sizes::kThreads,
         shape, best, Sizes::kWarps / best.rows, grad_output, features, weights, grad_weights);
}

// Gradients that are not wanted are null.
template <typename T, typename Launcher>
bool backward(Launcher& launcher, const Shape& shape, const Map& grad_output, const Map& features,
              const Weights& weights, const Map* grad_features, const Weights* grad_weights) {
  if (grad_features && !is_suited<T>(shape, *grad_features, grad_output)) return false;
  if (grad_weights && !is_suited<T>(shape, features, grad_output)) return false;
  return with_kernel_size(shape, [&](auto size) {
    constexpr int k = decltype(size)::value;
    if (grad_features) {
      launch_backward_features<k, T>(launcher, shape, grad_output, weights, *grad_features);
    }
    if (grad_weights) {
      launch_backward_weights<k, T>(launcher, shape, grad_output, features, weights, *grad_weights);
    }
  });
}

}  // namespace carafe_d2::channels_last
