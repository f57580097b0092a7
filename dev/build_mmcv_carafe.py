#!/usr/bin/env python3
"""Builds CARAFE alone out of mmcv's sources, for python -m carafe_d2.benchmark to compare with.

Example:
    echo 'setuptools<81' > constraints.txt  # mmcv's setup.py needs pkg_resources
    PIP_CONSTRAINT=constraints.txt pip download mmcv==2.2.0 --no-binary mmcv --no-deps --use-pep517
    python dev/build_mmcv_carafe.py mmcv-2.2.0.tar.gz
    PYTHONPATH=output/mmcv python -m carafe_d2.benchmark

The result is a package `mmcv` with nothing in it but `mmcv.ops.carafe` and `mmcv.ops.CARAFEPack`:
mmcv's own CUDA kernels, called by mmcv's own Python code. All operators of mmcv would take the
better part of an hour to compile, this takes a minute. It needs nvcc, but neither a GPU nor
mmengine. Variables CUDA_HOME and TORCH_CUDA_ARCH_LIST mean what they do in setup.py.
"""

import argparse
import importlib.util
import runpy
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from carafe_d2.errors import UserError, exit_on_user_error

SETUP = Path(__file__).parents[1] / "setup.py"
KERNELS = "mmcv/ops/csrc/pytorch/cuda/carafe_cuda.cu"
HEADERS = ("mmcv/ops/csrc/common", "mmcv/ops/csrc/common/cuda")
PYTHON = ("mmcv/ops/carafe.py", "mmcv/utils/ext_loader.py")
LIBRARY = "mmcv/carafe.so"

# Two of the functions that mmcv/ops/csrc/pytorch/pybind.cpp offers to mmcv's Python code.
BINDING = """\
#include <torch/library.h>

using at::Tensor;

void CARAFEForwardCUDAKernelLauncher(const Tensor, const Tensor, Tensor, Tensor, Tensor, Tensor,
                                     const int, const int, const int);
void CARAFEBackwardCUDAKernelLauncher(const Tensor, const Tensor, const Tensor, Tensor, Tensor,
                                      Tensor, Tensor, Tensor, Tensor, const int, const int,
                                      const int);

static void forward(const Tensor& features, const Tensor& masks, Tensor rfeatures, Tensor routput,
                    Tensor rmasks, Tensor output, int64_t kernel_size, int64_t group_size,
                    int64_t scale_factor) {
  CARAFEForwardCUDAKernelLauncher(features, masks, rfeatures, routput, rmasks, output, kernel_size,
                                  group_size, scale_factor);
}

static void backward(const Tensor& top_grad, const Tensor& rfeatures, const Tensor& masks,
                     Tensor rtop_grad, Tensor rbottom_grad_hs, Tensor rbottom_grad,
                     Tensor rmask_grad, Tensor bottom_grad, Tensor mask_grad, int64_t kernel_size,
                     int64_t group_size, int64_t scale_factor) {
  CARAFEBackwardCUDAKernelLauncher(top_grad, rfeatures, masks, rtop_grad, rbottom_grad_hs,
                                   rbottom_grad, rmask_grad, bottom_grad, mask_grad, kernel_size,
                                   group_size, scale_factor);
}

TORCH_LIBRARY(mmcv_carafe, library) {
  library.def(
      "carafe_forward(Tensor features, Tensor masks, Tensor(a!) rfeatures, Tensor(b!) routput, "
      "Tensor(c!) rmasks, Tensor(d!) output, *, int kernel_size, int group_size, "
      "int scale_factor) -> ()");
  library.def(
      "carafe_backward(Tensor top_grad, Tensor rfeatures, Tensor masks, Tensor(a!) rtop_grad, "
      "Tensor(b!) rbottom_grad_hs, Tensor(c!) rbottom_grad, Tensor(d!) rmask_grad, "
      "Tensor(e!) bottom_grad, Tensor(f!) mask_grad, *, int kernel_size, int group_size, "
      "int scale_factor) -> ()");
}

TORCH_LIBRARY_IMPL(mmcv_carafe, CUDA, library) {
  library.impl("carafe_forward", &forward);
  library.impl("carafe_backward", &backward);
}
"""

# What mmcv/ops/carafe.py imports, as far as it needs it.
MODULES = {
    "mmcv/__init__.py": "",
    "mmcv/utils/__init__.py": "",
    "mmcv/ops/__init__.py": "from .carafe import CARAFE, CARAFEPack, carafe\n",
    "mmcv/_ext.py": """\
from pathlib import Path

import torch

torch.ops.load_library(Path(__file__).with_name("carafe.so"))
carafe_forward = torch.ops.mmcv_carafe.carafe_forward.default
carafe_backward = torch.ops.mmcv_carafe.carafe_backward.default
carafe_naive_forward = carafe_naive_backward = None  # not built
""",
    "mmengine/__init__.py": "",
    "mmengine/registry.py": """\
class MODELS:
    def register_module(name):
        return lambda module: module
""",
    "mmengine/model.py": """\
from torch import nn


def normal_init(module, std):
    nn.init.normal_(module.weight, std=std)
    nn.init.zeros_(module.bias)


def xavier_init(module, distribution):
    {"uniform": nn.init.xavier_uniform_}[distribution](module.weight)
    nn.init.zeros_(module.bias)
""",
}


def unpack(source: Path, folder: Path) -> Path:
    """The folder with mmcv's sources, which may come as a folder or as a tar archive."""
    if source.is_file():
        try:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise UserError(f"{source}: not a tar archive ({error})") from error
        candidates = list(folder.iterdir())
    else:
        candidates = [source]
    for candidate in candidates:
        if (candidate / KERNELS).is_file():
            return candidate
    raise UserError(f"{source}: expected mmcv's source archive or folder, with {KERNELS} in it")


def compile_kernels(sources: Path, nvcc: str, setup: dict, library: Path) -> None:
    """Compiles mmcv's kernels and the binding into a library that PyTorch loads."""
    codes = setup["gencode_flags"](*setup["cuda_archs"](nvcc))
    torch_folder = Path(torch.__file__).parent
    # PyTorch's headers include those of cuBLAS and the like, which a toolkit may come without.
    # Last in line, so that they do not displace headers of the toolkit that nvcc belongs to.
    nvidia = importlib.util.find_spec("nvidia")
    locations = (nvidia.submodule_search_locations if nvidia else None) or []
    folders = [Path(folder) for folder in locations]
    spare = [path for folder in folders for path in sorted(folder.glob("*/include"))]
    host = ["-fPIC", *(word for path in spare for word in ("-idirafter", str(path)))]

    binding = library.with_suffix(".cpp")
    binding.write_text(BINDING)
    command = [
        *(nvcc, "-shared", "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-w"),
        *("-Xcompiler", ",".join(host), *codes, *setup["pip_toolkit_flags"](nvcc)),
        *(f"-I{sources / folder}" for folder in HEADERS),
        *("-isystem", torch_folder / "include"),
        *("-isystem", torch_folder / "include/torch/csrc/api/include"),
        *(sources / KERNELS, binding, "-o", library, f"-L{torch_folder / 'lib'}"),
        *("-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda"),
    ]
    if subprocess.run(command).returncode:
        raise UserError("mmcv's kernels did not compile; see the messages above")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=Path, help="mmcv's source archive (.tar.gz) or folder")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=Path("output/mmcv"),
        help="where the package goes (default: output/mmcv)")  # fmt: skip
    args = parser.parse_args(argv)

    setup = runpy.run_path(str(SETUP))
    nvcc = setup["find_nvcc"]()
    if nvcc is None:
        raise UserError("mmcv's kernels need nvcc: set CUDA_HOME to a CUDA toolkit")
    if torch.version.cuda is None:
        raise UserError(f"mmcv needs a PyTorch with CUDA, and {torch.__version__} is without")
    with tempfile.TemporaryDirectory() as scratch:
        sources = unpack(args.source, Path(scratch))
        (args.output / LIBRARY).parent.mkdir(parents=True, exist_ok=True)
        compile_kernels(sources, nvcc, setup, args.output / LIBRARY)
        for name, text in MODULES.items():
            (args.output / name).parent.mkdir(parents=True, exist_ok=True)
            (args.output / name).write_text(text)
        for name in PYTHON:
            shutil.copy(sources / name, args.output / name)
    print(f"written to {args.output}; PYTHONPATH={args.output} makes it the mmcv of a program")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
