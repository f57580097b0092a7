// CUDA's execution model on the host, for kernels that keep to what is here. Include it first.
//
// emulate() runs a launch and throws where a kernel breaks the rules: a barrier, shuffle or vote
// that some of its threads never reach, divergent barriers, races on shared memory, shared memory
// that is out of range or read before it was written, more of it or more threads than there are.
// Races on global memory show in results that depend on the order of the threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cxxabi.h>
#include <dlfcn.h>
#include <functional>
#include <math.h>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../../csrc/half.h"
#include "block.h"
#include "operations.h"
#include "shared_memory.h"

#define CARAFE_D2_EMULATION

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// ----------------------------------------------------------------------------------- arithmetic

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(__builtin_fmin(a, b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return static_cast<T>(__builtin_fmax(a, b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// A load that hints at how caches are to be used.
template <typename T>
T __ldg(const T* source) {
  return *source;
}

// The bytes of a (0 to 3) and b (4 to 7) that the lower half-bytes of `selector` name.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  return cuda_emulation::permuted_bytes(a, b, selector & 0x7777);
}

// ------------------------------------------------------------------- barriers, shuffles, votes

namespace cuda_emulation {

// Of the lanes of a warp, those among which a lane shuffles.
struct Segment {
  int64_t lane, first, last;

  Segment(const char* operation, const Place& place, int width) {
    const Block& block = Block::current();
    if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
      block.fail(text({operation, place}) + " has width " + std::to_string(width) +
                 ", which is no power of two up to 32");
    }
    lane = block.lane();
    first = lane & -int64_t{width};
    last = lane | (width - 1);
  }
};

template <typename T>
T shuffle(const char* operation, const Place& place, unsigned mask, T value, int64_t source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Block::current().exchange({operation, place, mask, bits, static_cast<int>(source)});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

inline void __syncthreads(cuda_emulation::Place place = cuda_emulation::Place::here()) {
  cuda_emulation::Block::current().synchronize(place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       cuda_emulation::Place place = cuda_emulation::Place::here()) {
  cuda_emulation::Block::current().exchange({"__syncwarp()", place, mask, 0, 0, true});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_emulation::Place place = cuda_emulation::Place::here()) {
  const cuda_emulation::Segment segment("__shfl_sync()", place, width);
  return cuda_emulation::shuffle("__shfl_sync()", place, mask, value,
                                 segment.first + (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 cuda_emulation::Place place = cuda_emulation::Place::here()) {
  const cuda_emulation::Segment segment("__shfl_up_sync()", place, width);
  const int64_t source = segment.lane - delta;
  return cuda_emulation::shuffle("__shfl_up_sync()", place, mask, value,
                                 source < segment.first ? segment.lane : source);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_emulation::Place place = cuda_emulation::Place::here()) {
  const cuda_emulation::Segment segment("__shfl_down_sync()", place, width);
  const int64_t source = segment.lane + delta;
  return cuda_emulation::shuffle("__shfl_down_sync()", place, mask, value,
                                 source > segment.last ? segment.lane : source);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_emulation::Place place = cuda_emulation::Place::here()) {
  const cuda_emulation::Segment segment("__shfl_xor_sync()", place, width);
  const int64_t source = segment.lane ^ lane_mask;
  return cuda_emulation::shuffle("__shfl_xor_sync()", place, mask, value,
                                 source > segment.last ? segment.lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::vote("__ballot_sync()", place, mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate,
                      cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::vote("__any_sync()", place, mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      cuda_emulation::Place place = cuda_emulation::Place::here()) {
  return cuda_emulation::vote("__all_sync()", place, mask, predicate != 0) ==
         cuda_emulation::Block::current().lanes(mask);
}

// ------------------------------------------- what csrc/cuda/device.cuh writes in CUDA's assembler

namespace carafe_d2 {

inline float power_of_two(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }

template <typename T>
void forget_origin(T&) {}

inline void add_from_above(float& sum, float value, unsigned delta, int width) {
  const float other = __shfl_down_sync(~0u, value, delta, width);
  if (threadIdx.x % width + delta < static_cast<unsigned>(width)) sum += other;
}
inline void add_from_below(float& sum, float value, unsigned delta, int width) {
  const float other = __shfl_up_sync(~0u, value, delta, width);
  if (threadIdx.x % width >= delta) sum += other;
}

template <int kWords>
void copy_async(const SharedArray<uint32_t>& shared, int index, const void* source, bool wanted) {
  Vector<uint32_t, kWords> words = {};
  if (wanted) words = *static_cast<const Vector<uint32_t, kWords>*>(source);
  shared.set_later(index, words);
}

inline void wait_for_copies() { cuda_emulation::Block::current().wait_for_copies(); }

template <typename T>
uint32_t to_word(float first, float second) {
  T values[2];
  from_float(first, values[0]);
  from_float(second, values[1]);
  return values[0].bits | static_cast<uint32_t>(values[1].bits) << 16;
}

template <typename T>
void multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4],
                  cuda_emulation::Place place = cuda_emulation::Place::here()) {
  cuda_emulation::multiply_add<T>(a, b, c, place);
}

}  // namespace carafe_d2

// -------------------------------------------------------------------------------------- launches

namespace cuda_emulation {

// Its mangled name, as far as the library exports it.
inline const char* symbol_of(void* kernel) {
  Dl_info info;
  return dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "kernel";
}

// Its name with template arguments.
inline std::string name_of(void* kernel) {
  const char* symbol = symbol_of(kernel);
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : symbol;
  std::free(demangled);
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);  // templates come with the type they return
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

inline void check_size(const std::string& kernel, const char* what, const dim3& size,
                       const dim3& most) {
  const auto fits = [](unsigned value, unsigned limit) { return value >= 1 && value <= limit; };
  if (fits(size.x, most.x) && fits(size.y, most.y) && fits(size.z, most.z)) return;
  throw std::runtime_error(kernel + ": a " + what + " of " + text(size) +
                           ", where every size is from 1 to those of " + text(most));
}

// A launch whose threads call `body`, in an order of threads (see Block).
inline void emulate(unsigned order, const std::string& name, dim3 grid, dim3 block,
                    std::function<void()> body) {
  check_size(name, "grid", grid, {0x7fffffff, 65535, 65535});
  check_size(name, "block", block, {1024, 1024, 64});
  if (volume(block) > 1024) throw std::runtime_error(name + ": a block has at most 1024 threads");
  gridDim = grid;
  blockDim = block;
  Block(name, order).run(std::move(body));
}

// kernel<<<grid, block>>>(arguments...)
template <typename... Parameters, typename... Arguments>
void emulate(unsigned order, void (*kernel)(Parameters...), dim3 grid, dim3 block,
             const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  static_assert((sizeof(Parameters) + ... + 0) <= 4096);
  emulate(order, name_of(reinterpret_cast<void*>(kernel)), grid, block,
          [&] { kernel(arguments...); });
}

// For C interfaces: null, or what body() throws.
template <typename Body>
const char* report_of(const Body& body) {
  static std::string report;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    report = error.what();
    return report.c_str();
  }
}

}  // namespace cuda_emulation
