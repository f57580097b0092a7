// The threads of a block: how they take turns, meet at barriers and exchange values in a warp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_emulation {

// A place in the source; as a default argument, that of the call.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Place& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

inline std::string text(const Place& place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

template <typename Index>
std::string text_of(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

inline std::string text(const uint3& index) { return text_of(index); }
inline std::string text(const dim3& size) { return text_of(size); }

// Of ascending numbers: {0, 1, 2, 5} is "0-2, 5".
inline std::string text(const std::vector<unsigned>& numbers) {
  std::string result;
  for (size_t first = 0, last; first < numbers.size(); first = last + 1) {
    for (last = first; last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1;) ++last;
    result += (first ? ", " : "") + std::to_string(numbers[first]);
    if (last > first) result += "-" + std::to_string(numbers[last]);
  }
  return result;
}

inline unsigned volume(const dim3& size) { return size.x * size.y * size.z; }

inline uint3 index_at(unsigned number, const dim3& size) {
  return {number % size.x, number / size.x % size.y, number / size.x / size.y};
}

// Counts the synchronizations of a launch. What threads do between two of them has the same time.
using Time = uint32_t;

constexpr int kBallot = -1;  // the source of a vote: one bit of every lane

// Why a thread waits.
struct Wait {
  const char* operation = "";
  Place place = {"", 0};
  unsigned mask = 0;   // lanes of its warp for whom it waits; 0 is the whole block
  uint64_t value = 0;  // that it gives to the others
  int source = 0;      // the lane whose value it gets, or kBallot
  bool orders_memory = false;
};

inline std::string text(const Wait& wait) {
  char mask[32] = "";
  if (wait.mask != 0) std::snprintf(mask, sizeof(mask), " with mask 0x%08x", wait.mask);
  return wait.operation + (" at " + text(wait.place)) + mask;
}

struct Thread {
  enum State { kReady, kWaiting, kEnded };

  Fiber* fiber = nullptr;
  uint3 index = {};
  State state = kReady;
  Wait wait;
  uint64_t result = 0;  // of waiting
  // What it has begun to copy
  std::vector<std::function<void()>> copies;
};

struct Warp {
  unsigned existing = 0;  // lanes: the last warp of a block may be incomplete
  unsigned waiting = 0;   // lanes that wait for lanes
  // What lane j did before the time met[i][j] happened before what lane i does now.
  std::array<std::array<Time, warpSize>, warpSize> met = {};
};

struct SharedMemory;  // one shared array, see shared_memory.h

// Runs the blocks of a launch one after the other. A thread has its turn until it waits or ends.
class Block {
 public:
  // The order in which blocks, and the threads of a block, have their turns: forward (0), backward
  // (1) or shuffled by any other seed. What a kernel computes must not depend on it.
  Block(std::string kernel, unsigned order)
      : kernel_(std::move(kernel)), order_(order), random_(order) {}

  // Throws what is reported first.
  void run(std::function<void()> kernel) {
    body_ = std::move(kernel);
    threads_.resize(volume(blockDim));
    warps_.resize((threads_.size() + warpSize - 1) / warpSize);
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (i == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
      threads_[i].fiber = fibers_[i].get();
      threads_[i].index = index_at(static_cast<unsigned>(i), blockDim);
      warps_[i / warpSize].existing |= 1u << i % warpSize;
    }
    current_ = this;
    for (const unsigned block : order(volume(gridDim))) {
      blockIdx = index_at(block, gridDim);
      run_block();
      if (!report_.empty()) throw std::runtime_error(report_);
    }
  }

  static Block& current() { return *current_; }

  std::map<const void*, std::shared_ptr<SharedMemory>> shared;

  // ------------------------------------------------------- for the thread that has its turn

  unsigned thread() const { return thread_; }
  unsigned lane() const { return thread_ % warpSize; }
  Time now() const { return now_; }
  Time start() const { return start_; }      // of the block
  Time barrier() const { return barrier_; }  // the last one that all threads passed

  // Whether what a thread did at that time happened before what this one does now.
  bool happened_before(unsigned thread, Time time) const {
    return time < barrier_ || thread == thread_ ||
           (thread / warpSize == thread_ / warpSize &&
            time < warps_[thread_ / warpSize].met[lane()][thread % warpSize]);
  }

  // Waits for all threads of the block.
  void synchronize(const Place& place) {
    begin_wait({"__syncthreads()", place});
    if (++arrived_ == threads_.size()) {
      for (const Thread& thread : threads_) {
        if (!(thread.wait.place == place)) fail("divergent barrier: " + whereabouts());
      }
      for (Thread& thread : threads_) thread.state = Thread::kReady;
      arrived_ = 0;
      barrier_ = ++now_;
    }
    end_turn();
  }

  // Waits for all lanes of the mask and gets the value of one of them, or their ballot.
  uint64_t exchange(const Wait& wait) {
    if (!(wait.mask >> lane() & 1)) {
      fail(text(wait) + " is called by lane " + std::to_string(lane()) + ", which the mask lacks");
    }
    begin_wait(wait);
    warp().waiting |= 1u << lane();
    if (all_wait_for(wait)) complete(wait);
    end_turn();
    return threads_[thread_].result;
  }

  // What is copied asynchronously arrives as late as it may.
  void begin_copy(std::function<void()> copy) {
    threads_[thread_].copies.push_back(std::move(copy));
  }
  void wait_for_copies() {
    for (const auto& copy : std::exchange(threads_[thread_].copies, {})) copy();
  }

  // The lanes of the mask that exist, of the warp of this thread.
  unsigned lanes(unsigned mask) const { return mask & warps_[thread_ / warpSize].existing; }

  [[noreturn]] void fail(const std::string& problem) const {
    throw std::runtime_error(kernel_ + ", block " + text(blockIdx) + ", thread " + text(threadIdx) +
                             ": " + problem);
  }

  uint3 index_of(unsigned thread) const { return threads_[thread].index; }

 private:
  struct Unwind {};

  std::vector<unsigned> order(unsigned count) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (order_ == 1) std::reverse(numbers.begin(), numbers.end());
    if (order_ > 1) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  void run_block() {
    start_ = barrier_ = ++now_;
    for (Thread& thread : threads_) {
      thread.state = Thread::kReady;
      thread.copies.clear();  // which the thread before it did not wait for
      thread.fiber->start(run_thread);
    }
    const std::vector<unsigned> turns = order(static_cast<unsigned>(threads_.size()));
    for (bool progress = true; progress;) {
      progress = false;
      for (const unsigned thread : turns) {
        if (threads_[thread].state != Thread::kReady || !report_.empty()) continue;
        give_turn(thread);
        progress = true;
      }
    }
    const auto waits = [](const Thread& thread) { return thread.state == Thread::kWaiting; };
    if (report_.empty() && std::any_of(threads_.begin(), threads_.end(), waits)) {
      report_ =
          kernel_ + ", block " + text(blockIdx) + ": some threads wait for ever: " + whereabouts();
    }
    if (!report_.empty()) unwind();
  }

  void give_turn(unsigned thread) {
    thread_ = thread;
    threadIdx = threads_[thread].index;
    threads_[thread].fiber->resume();
  }

  void end_turn() const {
    Fiber::suspend();
    if (unwinding_) throw Unwind();
  }

  // Ends the threads that have not ended, in an orderly way.
  void unwind() {
    unwinding_ = true;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      if (threads_[i].state != Thread::kEnded) give_turn(i);
    }
  }

  static void run_thread() noexcept {
    Block& block = *current_;
    try {
      if (!block.unwinding_) block.body_();
    } catch (const Unwind&) {
    } catch (const std::exception& error) {
      block.report_ = error.what();
    }
    block.threads_[block.thread_].state = Thread::kEnded;
  }

  void begin_wait(const Wait& wait) {
    threads_[thread_].wait = wait;
    threads_[thread_].state = Thread::kWaiting;
  }

  Warp& warp() { return warps_[thread_ / warpSize]; }

  // Calls body(lane, thread) for the lanes of a mask that exist in the warp of this thread.
  template <typename Body>
  void for_lanes(unsigned mask, const Body& body) {
    for (unsigned lane = 0; lane < warpSize; ++lane) {
      if (lanes(mask) >> lane & 1) body(lane, threads_[thread_ / warpSize * warpSize + lane]);
    }
  }

  bool all_wait_for(const Wait& wait) {
    bool result = (lanes(wait.mask) & ~warp().waiting) == 0;
    if (!result) return false;
    for_lanes(wait.mask, [&](unsigned, const Thread& thread) {
      result &=
          thread.wait.mask == wait.mask && std::strcmp(thread.wait.operation, wait.operation) == 0;
    });
    return result;
  }

  void complete(const Wait& wait) {
    uint64_t values[warpSize], ballot = 0;
    std::fill_n(values, warpSize, ~uint64_t());  // undefined for lanes that take no part
    for_lanes(wait.mask, [&](unsigned lane, const Thread& thread) {
      values[lane] = thread.wait.value;
      ballot |= uint64_t(thread.wait.value != 0) << lane;
    });
    for_lanes(wait.mask, [&](unsigned, Thread& thread) {
      thread.result = thread.wait.source == kBallot ? ballot : values[thread.wait.source];
      thread.state = Thread::kReady;
    });
    warp().waiting &= ~wait.mask;
    if (wait.orders_memory) order_memory(wait.mask);
  }

  // From now on, every lane of the mask comes after what came before any of them.
  void order_memory(unsigned mask) {
    ++now_;
    std::array<Time, warpSize> before = {};
    for_lanes(mask, [&](unsigned lane, const Thread&) {
      for (int other = 0; other < warpSize; ++other) {
        before[other] = std::max(before[other], warp().met[lane][other]);
      }
    });
    for_lanes(mask, [&](unsigned lane, const Thread&) { before[lane] = now_; });
    for_lanes(mask, [&](unsigned lane, const Thread&) { warp().met[lane] = before; });
  }

  // Where all threads are, by their number in the block.
  std::string whereabouts() const {
    std::map<std::string, std::vector<unsigned>> places;
    for (unsigned i = 0; i < threads_.size(); ++i) {
      const bool waits = threads_[i].state == Thread::kWaiting;
      places[waits ? "at " + text(threads_[i].wait) : "ended"].push_back(i);
    }
    std::string result;
    for (const auto& [place, threads] : places) {
      result += (result.empty() ? "thread" : "; thread") +
                std::string(threads.size() > 1 ? "s" : "") + " " + text(threads) + " " + place;
    }
    return result;
  }

  static inline Block* current_ = nullptr;
  static inline std::vector<std::unique_ptr<Fiber>> fibers_;  // also for the launches to come

  std::string kernel_;
  unsigned order_;
  std::mt19937 random_;
  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  unsigned thread_ = 0;   // whose turn it is
  unsigned arrived_ = 0;  // threads at __syncthreads()
  Time now_ = 0, start_ = 0, barrier_ = 0;
  bool unwinding_ = false;
  std::string report_;
};

}  // namespace cuda_emulation
