// Fibers: functions with a stack of their own that take turns on one thread of the host.
//
// The switch is a dozen instructions, as swapcontext() would make a system call each time. A fiber
// may throw, but has to catch what it throws. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATION_ASAN
#endif
#endif
#ifdef CUDA_EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

// Saves the registers that a function must preserve on the stack, the stack pointer in *from, and
// goes on where the stack `to` was left.
extern "C" void cuda_emulation_switch(void** from, void* to);

// Registers that a switch keeps, and the slot among them (from the bottom) that it returns to.
#if defined(__x86_64__)
constexpr int kSavedWords = 8, kReturnWord = 6;
asm(R"(
  .pushsection .text
  .weak cuda_emulation_switch
  .hidden cuda_emulation_switch
  .type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_emulation_switch, . - cuda_emulation_switch
  .popsection
)");
#elif defined(__aarch64__)
constexpr int kSavedWords = 20, kReturnWord = 11;
asm(R"(
  .pushsection .text
  .weak cuda_emulation_switch
  .hidden cuda_emulation_switch
  .type cuda_emulation_switch, @function
cuda_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size cuda_emulation_switch, . - cuda_emulation_switch
  .popsection
)");
#else
#error "cuda_emulation: no fibers for this processor"
#endif

class Fiber {
 public:
  Fiber() {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);  // a stack that overflows ends the process
    memory_ = static_cast<char*>(memory);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(memory_, kGuard + kStack); }

  // The next resume() begins to run this function, on an empty stack.
  void start(void (*function)() noexcept) {
    function_ = function;
    void** top = reinterpret_cast<void**>(memory_ + kGuard + kStack);
    void** frame = top - kSavedWords;
    std::memset(frame, 0, kSavedWords * sizeof(void*));
    frame[kReturnWord] = reinterpret_cast<void*>(&enter);
    stack_ = frame;
  }

  // Runs the function until it suspends or ends.
  void resume() {
    running_ = this;
#ifdef CUDA_EMULATION_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, memory_ + kGuard, kStack);
#endif
    cuda_emulation_switch(&resumer_, stack_);
#ifdef CUDA_EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Called by the running fiber: goes back to whoever resumed it.
  static void suspend() { running_->leave(false); }

 private:
  static constexpr size_t kStack = 128 * 1024, kGuard = 64 * 1024;  // pages have up to 64 KiB

  static void enter() {
    Fiber* const self = running_;
    self->arrive(nullptr);
    self->function_();
    self->leave(true);
    __builtin_unreachable();
  }

  void leave([[maybe_unused]] bool for_good) {
#ifdef CUDA_EMULATION_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, resumer_bottom_,
                                   resumer_size_);
    cuda_emulation_switch(&stack_, resumer_);
    arrive(fake_stack);
#else
    cuda_emulation_switch(&stack_, resumer_);
#endif
  }

  void arrive([[maybe_unused]] void* fake_stack) {
#ifdef CUDA_EMULATION_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &resumer_bottom_, &resumer_size_);
#endif
  }

  static inline Fiber* running_ = nullptr;

  char* memory_;
  void* stack_ = nullptr;    // its stack pointer while it is suspended
  void* resumer_ = nullptr;  // that of whoever resumed it, while it runs
  void (*function_)() noexcept = nullptr;
#ifdef CUDA_EMULATION_ASAN
  const void* resumer_bottom_ = nullptr;
  size_t resumer_size_ = 0;
#endif
};

}  // namespace cuda_emulation
