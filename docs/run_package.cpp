// Runs a package of AOTInductor without Python:
//
//     run_package MODEL.pt2 INPUT.pt OUTPUT.pt LIBRARY...
//
// INPUT.pt is a tensor that torch.save wrote; OUTPUT.pt becomes a tuple of tensors for torch.load.
// Each LIBRARY holds operators that the model calls, such as carafe_d2/_C.so.

#include <dlfcn.h>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_package MODEL.pt2 INPUT.pt OUTPUT.pt LIBRARY...\n";
    return 1;
  }
  for (int i = 4; i < argc; ++i) {
    if (!dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL)) {
      std::cerr << dlerror() << '\n';
      return 1;
    }
  }
  try {
    std::ifstream input(argv[2], std::ios::binary);
    std::vector<char> bytes{std::istreambuf_iterator<char>(input), {}};
    at::Tensor image = torch::jit::pickle_load(bytes).toTensor();

    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    std::vector<at::Tensor> outputs = model.run({image});

    std::vector<c10::IValue> elements(outputs.begin(), outputs.end());
    bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(elements)));
    std::ofstream(argv[3], std::ios::binary).write(bytes.data(), bytes.size());
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
