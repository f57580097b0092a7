// Small kernels for tests/test_cuda_emulator.py: some in order, and one for each rule to break.
#include "cuda_emulation.h"

using carafe_d2::Vector;

namespace toys {

constexpr int kTile = 8, kTileSize = kTile * kTile;
constexpr unsigned kAll = 0xffffffffu;

// ------------------------------------------------------------------------------------- in order

// C = A * B of n x n matrices, by tiles of 8 x 8.
__global__ void matrix_product(const float* a, const float* b, float* c, int n) {
  SHARED_ARRAY(float, tile_a, kTileSize);
  SHARED_ARRAY(float, tile_b, kTileSize);
  const int row = blockIdx.y * kTile + threadIdx.y, column = blockIdx.x * kTile + threadIdx.x;
  const int here = threadIdx.y * kTile + threadIdx.x;
  float sum = 0;
  for (int first = 0; first < n; first += kTile) {
    const int k = first + threadIdx.x, l = first + threadIdx.y;
    tile_a.set(here, row < n && k < n ? __ldg(a + row * n + k) : 0);
    tile_b.set(here, column < n && l < n ? b[l * n + column] : 0);
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
      sum = fmaf(tile_a.get(threadIdx.y * kTile + i), tile_b.get(i * kTile + threadIdx.x), sum);
    }
    __syncthreads();
  }
  if (row < n && column < n) c[row * n + column] = sum;
}

// Sums of the blocks' parts of the input, in a warp by shuffles, among warps by shared memory.
__global__ void block_sums(const double* input, double* sums, int count) {
  SHARED_ARRAY(double, warp_sums, 32);
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  double sum = index < count ? input[index] : 0;
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(kAll, sum, delta);
  if (lane == 0) warp_sums.set(warp, sum);
  __syncthreads();
  if (warp > 0) return;
  sum = lane < static_cast<int>(blockDim.x) / warpSize ? warp_sums.get(lane) : 0;
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_xor_sync(kAll, sum, delta);
  if (lane == 0) sums[blockIdx.x] = sum;
}

template <typename T>
__global__ void shuffles(T* result, int lane, int width) {
  const T value = static_cast<T>(threadIdx.x);
  T* mine = result + 4 * threadIdx.x;
  mine[0] = __shfl_sync(kAll, value, lane, width);
  mine[1] = __shfl_up_sync(kAll, value, static_cast<unsigned>(lane), width);
  mine[2] = __shfl_down_sync(kAll, value, static_cast<unsigned>(lane), width);
  mine[3] = __shfl_xor_sync(kAll, value, lane, width);
}

// Of lanes below `participants`.
__global__ void votes(unsigned* result, int participants, int bound) {
  const int lane = threadIdx.x % warpSize;
  const unsigned mask = __ballot_sync(kAll, lane < participants);
  if (lane >= participants) return;
  unsigned* mine = result + 3 * threadIdx.x;
  mine[0] = __ballot_sync(mask, lane < bound);
  mine[1] = __any_sync(mask, lane < bound);
  mine[2] = __all_sync(mask, lane < bound);
}

// Each lane tells the next by shared memory, with barriers of half a warp.
__global__ void half_warps(int* result) {
  SHARED_ARRAY(int, values, 64);
  const int thread = threadIdx.x;
  const unsigned half = thread % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int round = 0; round < 3; ++round) {
    values.set(thread, thread + round);
    __syncwarp(half);
    result[thread] = values.get(thread / 16 * 16 + (thread + 1) % 16);
    __syncwarp(half);
  }
}

__global__ void vectors(int* result) {
  SHARED_ARRAY(int, values, 4 * 32);
  const int thread = threadIdx.x;
  values.set(4 * thread, Vector<int, 4>{thread, thread + 1, thread + 2, thread + 3});
  __syncthreads();
  const Vector<int, 2> pair = values.get<2>(4 * (31 - thread) + 2);
  result[thread] = 100 * pair.values[0] + values.get(4 * (31 - thread)) + min(pair.values[1], 0);
}

// C = A * B of 16 x 16 and 16 x 8, of half types two in a word, by one instruction. B is stored by
// columns. Only so many rows of A are wanted, and the rest is zero.
template <typename T>
__global__ void tensor_cores(const uint32_t* a, const uint32_t* b, float* c, int rows) {
  constexpr int kWords = 8, kRows = 16;
  SHARED_ARRAY(uint32_t, words, (kRows + 8) * kWords);
  const int thread = threadIdx.x, g = thread / 4, i = thread % 4;
  for (int row = g; row < kRows; row += 8) {
    carafe_d2::copy_async<2>(words, row * kWords + 2 * i, a + row * kWords + 2 * i, row < rows);
  }
  carafe_d2::copy_async<2>(words, (kRows + g) * kWords + 2 * i, b + g * kWords + 2 * i, true);
  carafe_d2::wait_for_copies();
  __syncwarp();
  const auto word = [&](int row, int column) { return words.get(row * kWords + column); };
  const uint32_t part_of_a[] = {word(g, i), word(g + 8, i), word(g, i + 4), word(g + 8, i + 4)};
  const uint32_t part_of_b[] = {word(kRows + g, i), word(kRows + g, i + 4)};
  float sums[4] = {};
  carafe_d2::multiply_add<T>(part_of_a, part_of_b, sums);
  for (int j = 0; j < 4; ++j) c[(g + j / 2 * 8) * 8 + 2 * i + j % 2] = sums[j];
}

// The lower half of a and the upper one of b.
__global__ void bytes(const unsigned* a, const unsigned* b, unsigned* c) {
  c[threadIdx.x] = __byte_perm(a[threadIdx.x], b[threadIdx.x], 0x7610);
}

// How often each block and thread of a grid of 3 dimensions runs.
__global__ void indices(unsigned* result) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++result[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

// Threads and blocks by their turns, which no kernel may depend on.
__global__ void turns(unsigned* next, unsigned* result) {
  result[(*next)++] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void many_barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}

// --------------------------------------------------------------------------------- out of order

__global__ void missed_barrier() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void divergent_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_against_shuffle() {
  if (threadIdx.x < 16) __shfl_sync(kAll, 1, 0);
  __syncthreads();
}

__global__ void different_masks() { __any_sync(threadIdx.x == 3 ? 0x0000000fu : kAll, 1); }

__global__ void different_operations() {
  if (threadIdx.x % 2 == 0) {
    __any_sync(kAll, 1);
  } else {
    __all_sync(kAll, 1);
  }
}

__global__ void dead_lane() {
  if (threadIdx.x == 7) return;
  __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void caller_not_in_mask() { __ballot_sync(0x0000ffffu, 1); }

__global__ void odd_width() { __shfl_down_sync(kAll, 1, 1, 12); }

__global__ void unwritten() {
  SHARED_ARRAY(float, tile, 64);
  if (threadIdx.x != 9) tile.set(threadIdx.x, 1);
  __syncthreads();
  tile.get(threadIdx.x);
}

__global__ void copies_without_wait() {
  SHARED_ARRAY(uint32_t, tile, 64);
  carafe_d2::copy_async<1>(tile, threadIdx.x, nullptr, false);
  tile.get(threadIdx.x);
}

// Others still read what the copies overwrite, which they may do before they are waited for.
__global__ void copies_too_early() {
  SHARED_ARRAY(uint32_t, tile, 64);
  tile.set(threadIdx.x, 1);
  __syncthreads();
  tile.get(63 - threadIdx.x);
  carafe_d2::copy_async<1>(tile, threadIdx.x, nullptr, false);
  __syncthreads();
  carafe_d2::wait_for_copies();
}

// Who waited has only its own copies.
__global__ void copies_without_barrier() {
  SHARED_ARRAY(uint32_t, tile, 64);
  carafe_d2::copy_async<1>(tile, threadIdx.x, nullptr, false);
  carafe_d2::wait_for_copies();
  tile.get(63 - threadIdx.x);
}

// Only the first block writes.
__global__ void left_by_another_block() {
  SHARED_ARRAY(float, tile, 64);
  if (blockIdx.x == 0) tile.set(threadIdx.x, 1);
  __syncthreads();
  tile.get(threadIdx.x);
}

__global__ void read_after_write() {
  SHARED_ARRAY(int, tile, 64);
  tile.set(threadIdx.x, 1);
  __syncthreads();
  if (threadIdx.x == 39) tile.set(39, 2);
  if (threadIdx.x == 40) tile.get(39);
}

__global__ void write_after_read() {
  SHARED_ARRAY(int, tile, 64);
  tile.set(threadIdx.x, 1);
  __syncthreads();
  if (threadIdx.x < 32) tile.get(20);
  if (threadIdx.x == 20) tile.set(20, 2);
}

__global__ void write_after_reads_of_warps() {
  SHARED_ARRAY(int, tile, 64);
  tile.set(threadIdx.x, 1);
  __syncthreads();
  tile.get(20);
  __syncwarp();
  if (threadIdx.x == 20) tile.set(20, 2);
}

__global__ void two_writers() {
  SHARED_ARRAY(int, tile, 64);
  tile.set(threadIdx.x / 2, 1);
}

// A shuffle is no barrier for memory.
__global__ void shuffle_for_barrier() {
  SHARED_ARRAY(int, tile, 64);
  tile.set(threadIdx.x, 1);
  __shfl_sync(kAll, 1, 0);
  tile.get(threadIdx.x ^ 1);
}

// Nor is that of a warp one for the block.
__global__ void warp_barrier_for_block() {
  SHARED_ARRAY(int, tile, 64);
  tile.set(threadIdx.x, 1);
  __syncwarp();
  tile.get(63 - threadIdx.x);
}

__global__ void out_of_range() {
  SHARED_ARRAY(float, tile, 64);
  tile.set(threadIdx.x + 1, 1);
}

__global__ void negative_index() {
  SHARED_ARRAY(float, tile, 64);
  tile.set(static_cast<int>(threadIdx.x) - 1, 1);
}

__global__ void misaligned() {
  SHARED_ARRAY(float, tile, 128);
  tile.set(threadIdx.x + 2, Vector<float, 4>());
}

__global__ void too_much_shared_memory() {
  SHARED_ARRAY(double, first, 5 * 1024);
  SHARED_ARRAY(double, second, 1024 + 1);
  first.set(0, 0);
  second.set(0, 0);
}

}  // namespace toys

// ------------------------------------------------------------------------- interface for Python

using cuda_emulation::emulate;
using cuda_emulation::report_of;

extern "C" {

const char* matrix_product(unsigned order, const float* a, const float* b, float* c, int n) {
  const unsigned tiles = (n + toys::kTile - 1) / toys::kTile;
  return report_of([&] {
    emulate(order, toys::matrix_product, dim3(tiles, tiles), dim3(toys::kTile, toys::kTile), a, b,
            c, n);
  });
}

const char* block_sums(unsigned order, const double* input, double* sums, int count,
                       unsigned threads) {
  const unsigned blocks = (count + threads - 1) / threads;
  return report_of([&] { emulate(order, toys::block_sums, blocks, threads, input, sums, count); });
}

const char* shuffle_floats(unsigned order, float* result, unsigned threads, int lane, int width) {
  return report_of([&] { emulate(order, toys::shuffles<float>, 1, threads, result, lane, width); });
}

const char* shuffle_integers(unsigned order, int64_t* result, unsigned threads, int lane,
                             int width) {
  return report_of(
      [&] { emulate(order, toys::shuffles<int64_t>, 1, threads, result, lane, width); });
}

const char* votes(unsigned order, unsigned* result, unsigned threads, int participants, int bound) {
  return report_of([&] { emulate(order, toys::votes, 1, threads, result, participants, bound); });
}

const char* half_warps(unsigned order, int* result) {
  return report_of([&] { emulate(order, toys::half_warps, 1, 64, result); });
}

const char* vectors(unsigned order, int* result) {
  return report_of([&] { emulate(order, toys::vectors, 1, 32, result); });
}

const char* tensor_cores_float16(unsigned order, const uint32_t* a, const uint32_t* b, float* c,
                                 int rows) {
  return report_of(
      [&] { emulate(order, toys::tensor_cores<carafe_d2::Half>, 1, 32, a, b, c, rows); });
}

const char* tensor_cores_bfloat16(unsigned order, const uint32_t* a, const uint32_t* b, float* c,
                                  int rows) {
  return report_of(
      [&] { emulate(order, toys::tensor_cores<carafe_d2::BFloat16>, 1, 32, a, b, c, rows); });
}

const char* bytes(unsigned order, const unsigned* a, const unsigned* b, unsigned* c,
                  unsigned threads) {
  return report_of([&] { emulate(order, toys::bytes, 1, threads, a, b, c); });
}

const char* indices(unsigned order, const unsigned* grid, const unsigned* block, unsigned* result) {
  return report_of([&] {
    emulate(order, toys::indices, dim3(grid[0], grid[1], grid[2]),
            dim3(block[0], block[1], block[2]), result);
  });
}

const char* turns(unsigned order, unsigned* result, unsigned blocks, unsigned threads) {
  unsigned next = 0;
  return report_of([&] { emulate(order, toys::turns, blocks, threads, &next, result); });
}

const char* many_barriers(int count, unsigned threads) {
  return report_of([&] { emulate(0, toys::many_barriers, 1, threads, count); });
}

const char* mistake(const char* name, unsigned order) {
#define MISTAKE(name) \
  {                   \
    #name, toys::name \
  }
  static const std::map<std::string, void (*)()> kernels = {
      MISTAKE(missed_barrier),
      MISTAKE(divergent_barriers),
      MISTAKE(barrier_against_shuffle),
      MISTAKE(different_masks),
      MISTAKE(different_operations),
      MISTAKE(dead_lane),
      MISTAKE(caller_not_in_mask),
      MISTAKE(odd_width),
      MISTAKE(unwritten),
      MISTAKE(copies_without_wait),
      MISTAKE(copies_too_early),
      MISTAKE(copies_without_barrier),
      MISTAKE(left_by_another_block),
      MISTAKE(read_after_write),
      MISTAKE(write_after_read),
      MISTAKE(write_after_reads_of_warps),
      MISTAKE(two_writers),
      MISTAKE(shuffle_for_barrier),
      MISTAKE(warp_barrier_for_block),
      MISTAKE(out_of_range),
      MISTAKE(negative_index),
      MISTAKE(misaligned),
      MISTAKE(too_much_shared_memory),
  };
  return report_of([&] { emulate(order, kernels.at(name), 2, 64); });
}

}  // extern "C"
