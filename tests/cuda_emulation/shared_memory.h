// Shared memory that notices races, accesses out of range and reads of what was never written.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/vector.h"
#include "block.h"

namespace cuda_emulation {

constexpr size_t kMostSharedBytes = 48 * 1024;  // that a block gets without asking for more

// The last write to an element of a shared array, and the reads since then.
//
// Reads by lanes of one warp have one time, that of the earliest. That may hide a race where parts
// of a warp synchronize and overlap; it never makes one up.
struct Element {
  Time written = 0, read = 0;
  uint16_t writer = 0, reader = 0;
  unsigned reading_lanes = 0;  // of the reader's warp
  bool several_warps = false;  // have read it since all threads met
};

struct SharedMemory {
  SharedMemory(const char* name, size_t count, size_t size)
      : name(name), bytes(count * size), elements(count), values(new unsigned char[bytes]) {}

  void read(int index, int count) {
    check_range(index, count);
    for (int i = index; i < index + count; ++i) read(i);
  }

  void write(int index, int count) {
    check_range(index, count);
    for (int i = index; i < index + count; ++i) write(i);
  }

  // From now on until it has been written, a read is a mistake.
  void begin_write(int index, int count) {
    write(index, count);
    std::fill_n(elements.begin() + index, count, Element());
  }

  const std::string name;
  const size_t bytes;
  std::vector<Element> elements;
  std::unique_ptr<unsigned char[]> values;

 private:
  void check_range(int index, int count) const {
    if (index < 0 || static_cast<size_t>(index) + count > elements.size()) {
      Block::current().fail(range(index, count) + " is out of range, it has " +
                            std::to_string(elements.size()) + " elements");
    }
    if (index % count != 0) {
      Block::current().fail(range(index, count) + " is misaligned, as a vector of " +
                            std::to_string(count));
    }
  }

  void read(int index) {
    const Block& block = Block::current();
    Element& element = elements[index];
    if (element.written < block.start()) {
      block.fail(range(index, 1) + " is read before it was written");
    }
    if (!block.happened_before(element.writer, element.written)) {
      race(index, "reads what " + name_of(element.writer) + " wrote");
    }
    const unsigned lane = 1u << block.lane();
    if (element.read < block.barrier()) {
      element.read = block.now();
      element.reading_lanes = lane;
      element.several_warps = false;
    } else if (element.reader / warpSize != block.thread() / warpSize) {
      element.several_warps = true;
    } else {
      const unsigned concurrent = concurrent_readers(element);
      if (concurrent == 0) element.read = block.now();
      element.reading_lanes = concurrent | lane;
    }
    element.reader = static_cast<uint16_t>(block.thread());
  }

  void write(int index) {
    const Block& block = Block::current();
    Element& element = elements[index];
    if (!block.happened_before(element.writer, element.written)) {
      race(index, "overwrites what " + name_of(element.writer) + " wrote");
    }
    if (element.read >= block.barrier()) {
      const unsigned warp = element.reader / warpSize;
      if (element.several_warps) {
        race(index, "overwrites what several warps read");
      }
      if (warp != block.thread() / warpSize) {
        race(index, "overwrites what " + name_of(element.reader) + " read");
      }
      if (const unsigned lanes = concurrent_readers(element)) {
        const unsigned reader = warp * warpSize + __builtin_ctz(lanes);
        race(index, "overwrites what " + name_of(reader) + " read");
      }
    }
    element = {block.now(), 0, static_cast<uint16_t>(block.thread()), 0, 0, false};
  }

  // Lanes of this warp whose reads are not known to have happened before.
  static unsigned concurrent_readers(const Element& element) {
    const Block& block = Block::current();
    if (element.read < block.barrier()) return 0;
    unsigned result = 0;
    for (unsigned rest = element.reading_lanes; rest != 0; rest &= rest - 1) {
      const unsigned lane = __builtin_ctz(rest), first = element.reader / warpSize * warpSize;
      if (!block.happened_before(first + lane, element.read)) result |= 1u << lane;
    }
    return result;
  }

  [[noreturn]] void race(int index, const std::string& problem) const {
    Block::current().fail("data race on " + range(index, 1) + ": " + problem +
                          ", without a barrier in between");
  }

  static std::string name_of(unsigned thread) {
    return "thread " + text(Block::current().index_of(thread));
  }

  std::string range(int index, int count) const {
    std::string text = name + "[" + std::to_string(index);
    if (count > 1) text += ".." + std::to_string(index + count - 1);
    return text + "]";
  }
};

// The shared array of the running block that this declaration makes.
inline SharedMemory* declare_shared(const void* declaration, const char* name, size_t count,
                                    size_t size) {
  Block& block = Block::current();
  auto& memory = block.shared[declaration];
  if (!memory) {
    memory = std::make_shared<SharedMemory>(name, count, size);
    size_t total = 0;
    for (const auto& [_, other] : block.shared) total += (other->bytes + 15) / 16 * 16;
    if (total > kMostSharedBytes) {
      block.fail("with " + memory->name + " the block has " + std::to_string(total) +
                 " bytes of shared memory, more than " + std::to_string(kMostSharedBytes));
    }
  }
  return memory.get();
}

}  // namespace cuda_emulation

// As in csrc/cuda/device.cuh.
template <typename T>
class SharedArray {
 public:
  static_assert(std::is_trivial_v<T>);

  explicit SharedArray(cuda_emulation::SharedMemory* memory) : memory_(memory) {}

  T get(int index) const { return load<T>(index, 1); }
  void set(int index, T value) const { store(index, 1, value); }

  template <int N>
  carafe_d2::Vector<T, N> get(int index) const {
    return load<carafe_d2::Vector<T, N>>(index, N);
  }
  template <int N>
  void set(int index, const carafe_d2::Vector<T, N>& value) const {
    store(index, N, value);
  }

  // Arrives when the thread waits for its copies.
  template <int N>
  void set_later(int index, const carafe_d2::Vector<T, N>& value) const {
    memory_->begin_write(index, N);
    cuda_emulation::Block::current().begin_copy([*this, index, value] { set(index, value); });
  }

 private:
  template <typename V>
  V load(int index, int count) const {
    memory_->read(index, count);
    V value;
    std::memcpy(&value, memory_->values.get() + index * sizeof(T), sizeof(V));
    return value;
  }
  template <typename V>
  void store(int index, int count, const V& value) const {
    memory_->write(index, count);
    std::memcpy(memory_->values.get() + index * sizeof(T), &value, sizeof(V));
  }

  cuda_emulation::SharedMemory* memory_;
};

#define SHARED_ARRAY(type, name, ...)                                                     \
  static const char name##_declaration = 0;                                               \
  const SharedArray<type> name(cuda_emulation::declare_shared(&name##_declaration, #name, \
                                                              size_t{__VA_ARGS__}, sizeof(type)))
