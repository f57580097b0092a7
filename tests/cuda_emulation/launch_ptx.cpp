// Launches translated PTX for tests/test_ptx.py.

// clang-format off: the emulator comes before what runs on it
#include "cuda_emulation.h"
#include "ptx.h"
// clang-format on

extern "C" const char* launch(unsigned order, ptx::Kernel kernel, unsigned threads,
                              const void* input, size_t input_bytes, void* output,
                              size_t output_bytes, unsigned number) {
  ptx::global_memory.clear();
  ptx::allow("input", input, input_bytes, false);
  ptx::allow("output", output, output_bytes, true);
  void* const parameters[] = {&input, &output, &number};
  return cuda_emulation::report_of(
      [&] { cuda_emulation::emulate(order, "toy", 1, threads, [&] { kernel(parameters); }); });
}
