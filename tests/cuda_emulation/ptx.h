// What PTX runs on that ptx.py has translated to C++: registers, the spaces of memory, and those
// instructions that are not an expression in C++. Threads, their barriers and what is noticed about
// shared memory are the emulator's.
//
// Every kernel is a library of its own. The emulator's state is in inline variables, which are one
// for all libraries of the process.
#pragma once

#include <algorithm>
#include <array>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <utility>

#include "../../csrc/half.h"
#include "block.h"
#include "operations.h"
#include "shared_memory.h"

namespace ptx {

using cuda_emulation::Block;
using cuda_emulation::Place;

// A translated kernel. Parameters are given as in cudaLaunchKernel(): by pointers to them.
using Kernel = void (*)(void* const* parameters);

// ------------------------------------------------------------------------------------- registers

using f16 = carafe_d2::Half;
using bf16 = carafe_d2::BFloat16;

template <int bytes>
using Bits = std::conditional_t<
    bytes == 2, uint16_t,
    std::conditional_t<bytes == 4, uint32_t, std::conditional_t<bytes == 8, uint64_t, void>>>;

// From and to registers: the low bits as another type; integers are extended as well.
template <typename To, typename From>
To as(From value) {
  if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
    return static_cast<To>(value);
  } else {
    static_assert(sizeof(To) <= sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
  }
}

// A value in `count` parts, the lowest bits first; or several values, as they are.
template <int count, typename T>
auto parts(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return as<std::array<Bits<sizeof(T) / count>, count>>(value);
  } else {
    return value;
  }
}

// One value of several parts, the lowest bits first.
template <typename... Parts>
auto packed(Parts... parts) {
  Bits<(sizeof(Parts) + ...)> result = 0;
  int shift = 0;
  ((result |= decltype(result){as<Bits<sizeof(parts)>>(parts)} << shift,
    shift += 8 * sizeof(parts)),
   ...);
  return result;
}

// ------------------------------------------------------------------------------------ arithmetic

template <typename To, typename From>
To convert(From value) {
  if constexpr (std::is_same_v<From, f16> || std::is_same_v<From, bf16>) {
    return static_cast<To>(carafe_d2::to_float(value));
  } else if constexpr (std::is_same_v<To, f16> || std::is_same_v<To, bf16>) {
    static_assert(std::is_same_v<From, float>);  // in two steps a double would be rounded twice
    To result;
    carafe_d2::from_float(value, result);
    return result;
  } else {
    return static_cast<To>(value);
  }
}

inline auto wide(uint16_t value) { return uint32_t{value}; }
inline auto wide(int16_t value) { return int32_t{value}; }
inline auto wide(uint32_t value) { return uint64_t{value}; }
inline auto wide(int32_t value) { return int64_t{value}; }
inline auto wide(uint64_t value) { return static_cast<unsigned __int128>(value); }
inline auto wide(int64_t value) { return static_cast<__int128>(value); }

template <typename T>
T divided(T a, T b) {
  if (b == 0) Block::current().fail("division by zero");
  return b == static_cast<T>(-1) && std::is_signed_v<T> ? static_cast<T>(0 - a) : a / b;
}

// Shifting by more bits than there are is as shifting by all of them, one by one.
template <typename T>
T left(T value, uint32_t count) {
  return count < 8 * sizeof(T) ? static_cast<T>(value << count) : T(0);
}
template <typename T>
T right(T value, uint32_t count) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  if (count >= kBits && !std::is_signed_v<T>) return 0;
  return static_cast<T>(value >> std::min(count, kBits - 1));
}

// `count` bits from `first` on.
template <typename T>
T bit_field(T value, uint32_t first, uint32_t count) {
  static_assert(std::is_unsigned_v<T>);
  return right(value, first & 255) & static_cast<T>(left<uint64_t>(1, count & 255) - 1);
}

// `base` with the lowest `count` bits of a value from `first` on.
inline uint32_t with_bits(uint32_t value, uint32_t base, uint32_t first, uint32_t count) {
  const auto mask = left(static_cast<uint32_t>(left<uint64_t>(1, count & 255) - 1), first & 255);
  return (base & ~mask) | (left(value, first & 255) & mask);
}

// volatile and noinline: the compiler does not know that the mode of rounding matters.
template <typename T>
__attribute__((noinline)) T fma_rounded_down(T a, T b, T c) {
  const int mode = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  volatile T x = a, y = b, z = c;
  volatile T result = std::fma(T{x}, T{y}, T{z});
  std::fesetround(mode);
  return result;
}

template <typename T>
T flushed(T value) {
  return std::fabs(value) < std::numeric_limits<T>::min() ? std::copysign(T(0), value) : value;
}
inline float saturated(float value) { return value > 0 ? std::min(value, 1.0f) : 0; }

// ---------------------------------------------------------------------------------------- memory

struct Memory {
  std::string name;
  uint64_t end;
  bool writable;
};

// Global memory that kernels may touch, by its first address.
inline std::map<uint64_t, Memory> global_memory;

inline void allow(const char* name, const void* data, size_t bytes, bool writable) {
  const uint64_t begin = reinterpret_cast<uint64_t>(data);
  global_memory[begin] = {name, begin + bytes, writable};
}

// What a message tells of one.
struct Access {
  const char* kind;
  uint64_t address;
  size_t bytes;
  Place place;

  [[noreturn]] void fail(const std::string& problem) const {
    Block::current().fail(std::to_string(bytes) + "-byte " + kind + " at " + text(place) + " " +
                          problem);
  }

  void check_alignment() const {
    if (address % bytes != 0) fail("is misaligned");
  }

  void check_global(bool writes) const {
    if (global_memory.empty()) fail("is out of range: there is no global memory");
    const auto next = global_memory.upper_bound(address);
    const auto& [begin, memory] = *(next == global_memory.begin() ? next : std::prev(next));
    if (address < begin || address + bytes > memory.end) {
      fail("is out of range, at byte " + std::to_string(static_cast<int64_t>(address - begin)) +
           " of " + memory.name + ", which has " + std::to_string(memory.end - begin));
    }
    if (writes && !memory.writable) fail("overwrites " + memory.name);
  }
};

template <typename T, int N>
auto values_at(const void* memory) {
  std::conditional_t<N == 1, T, std::array<T, N>> values;
  std::memcpy(&values, memory, sizeof(values));
  return values;
}

// N values of type T, which are one access.
template <typename T, int N>
[[gnu::noinline]] auto load_global(uint64_t address, const Place& place) {
  const Access access{"load from global memory", address, sizeof(T) * N, place};
  access.check_alignment();
  access.check_global(false);
  return values_at<T, N>(reinterpret_cast<const void*>(address));
}
template <typename T, int N>
[[gnu::noinline]] void store_global(uint64_t address, const std::array<T, N>& values,
                                    const Place& place) {
  const Access access{"store to global memory", address, sizeof(values), place};
  access.check_alignment();
  access.check_global(true);
  std::memcpy(reinterpret_cast<void*>(address), &values, sizeof(values));
}

// Parameters, and a thread's own memory, are the host's.
template <typename T, int N>
auto load_param(uint64_t address, const Place&) {
  return values_at<T, N>(reinterpret_cast<const void*>(address));
}
template <typename T, int N>
auto load_local(uint64_t address, const Place&) {
  return values_at<T, N>(reinterpret_cast<const void*>(address));
}
template <typename T, int N>
void store_local(uint64_t address, const std::array<T, N>& values, const Place&) {
  std::memcpy(reinterpret_cast<void*>(address), &values, sizeof(values));
}

// All shared arrays of a block, where addresses have 32 bits. Every access has `element` bytes or a
// multiple of that.
class Shared {
 public:
  Shared(size_t bytes, size_t element) : element_(element) {
    static const char declaration = 0;
    if (bytes > 0) {
      memory_ =
          cuda_emulation::declare_shared(&declaration, "shared memory", bytes / element, element);
    }
  }

  template <typename T, int N>
  [[gnu::noinline]] auto load(uint32_t address, const Place& place) const {
    const Access access{"load from shared memory", address, sizeof(T) * N, place};
    memory_->read(index(access), count(access));
    return values_at<T, N>(memory_->values.get() + address);
  }
  template <typename T, int N>
  [[gnu::noinline]] void store(uint32_t address, const std::array<T, N>& values,
                               const Place& place) const {
    const Access access{"store to shared memory", address, sizeof(values), place};
    memory_->write(index(access), count(access));
    std::memcpy(memory_->values.get() + address, &values, sizeof(values));
  }

  // Begins to copy, and reads no more than the first bytes; the others are zero.
  template <int bytes>
  [[gnu::noinline]] void copy(uint32_t address, uint64_t source, uint32_t bytes_of_source,
                              const Place& place) const {
    const char* kind = "asynchronous copy";
    Access{kind, source, bytes, place}.check_alignment();
    std::array<uint32_t, bytes / 4> values = {};
    if (bytes_of_source > 0) {
      Access{kind, source, bytes_of_source, place}.check_global(false);
      std::memcpy(&values, reinterpret_cast<const void*>(source), bytes_of_source);
    }
    const Access access{kind, address, bytes, place};
    memory_->begin_write(index(access), count(access));
    Block::current().begin_copy([=, *this] { store<uint32_t, bytes / 4>(address, values, place); });
  }

 private:
  int index(const Access& access) const {
    access.check_alignment();
    return static_cast<int>(std::min<uint64_t>(access.address / element_, 1u << 30));
  }
  int count(const Access& access) const { return static_cast<int>(access.bytes / element_); }

  cuda_emulation::SharedMemory* memory_ = nullptr;
  size_t element_;
};

// ------------------------------------------------------------------------------ barriers, warps

template <uint32_t barrier>
void synchronize(const Place& place) {
  static_assert(barrier == 0, "only the barrier of all threads");
  Block::current().synchronize(place);
}

inline void synchronize_warp(uint32_t mask, const Place& place) {
  Block::current().exchange({"bar.warp.sync", place, mask, 0, 0, true});
}

enum class Shuffle { up, down, bfly, idx };  // as PTX has them

// The value of another lane, and whether that lane is one of the same segment.
inline std::pair<uint32_t, bool> shuffled(Shuffle mode, uint32_t value, uint32_t b, uint32_t c,
                                          uint32_t mask, const Place& place) {
  const int lane = static_cast<int>(Block::current().lane());
  const int segment = c >> 8 & 31, delta = b & 31;
  const int first = lane & segment, limit = first | (c & 31 & ~segment);
  const int source = mode == Shuffle::up     ? lane - delta
                     : mode == Shuffle::down ? lane + delta
                     : mode == Shuffle::bfly ? lane ^ delta
                                             : first | (delta & ~segment);
  const bool valid = mode == Shuffle::up ? source >= limit : source <= limit;
  const uint64_t result =
      Block::current().exchange({"shfl.sync", place, mask, value, valid ? source : lane});
  return {static_cast<uint32_t>(result), valid};
}

template <typename T>
std::array<float, 4> multiply_add(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  std::array<float, 4> c, const Place& place) {
  cuda_emulation::multiply_add<T>(a, b, c.data(), place);
  return c;
}

}  // namespace ptx
