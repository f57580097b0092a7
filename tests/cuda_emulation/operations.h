// What kernels do in CUDA C++ and in PTX alike, apart from memory and barriers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../csrc/half.h"
#include "block.h"

namespace cuda_emulation {

// The bytes of a (0 to 3) and b (4 to 7) that the lower half-bytes of `selector` name; with 8 added,
// their signs.
inline uint32_t permuted_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i, selector >>= 4) {
    const uint32_t byte = bytes >> 8 * (selector & 7) & 0xff;
    result |= (selector & 8 ? (byte >> 7) * 0xff : byte) << 8 * i;
  }
  return result;
}

// One bit of every lane of the mask.
inline unsigned vote(const char* operation, const Place& place, unsigned mask, bool predicate) {
  const uint64_t ballot = Block::current().exchange({operation, place, mask, predicate, kBallot});
  return static_cast<unsigned>(ballot);
}

// multiply_add() of csrc/cuda/device.cuh, which says what a lane has of the matrices.
template <typename T>
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float* c, const Place& place) {
  static float values_of_block[1024][12];  // of its threads: two of every word of a and b
  const unsigned lane = threadIdx.x % warpSize;
  const auto values = values_of_block + (threadIdx.x - lane);
  for (int i = 0; i < 12; ++i) {
    const uint32_t word = i < 8 ? a[i / 2] : b[i / 2 - 4];
    values[lane][i] = to_float(T{static_cast<uint16_t>(word >> 16 * (i % 2))});
  }
  // All lanes have to take part; and none goes on before the others have read.
  const Wait wait = {"mma", place, ~0u};
  Block::current().exchange(wait);
  for (unsigned j = 0; j < 4; ++j) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + j % 2;
    for (int t = 0; t < 16; ++t) {
      const unsigned i = t / 2 % 4;
      c[j] += values[row * 4 + i][t / 8 * 4 + j / 2 * 2 + t % 2] *
              values[column * 4 + i][8 + t / 8 * 2 + t % 2];
    }
  }
  Block::current().exchange(wait);
}

}  // namespace cuda_emulation
