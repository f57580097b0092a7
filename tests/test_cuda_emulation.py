"""The CUDA kernels without a GPU: the host compiler builds the same .cuh files, for an emulator.

`cuda_emulation/cuda_emulation.h` plays CUDA's execution model, and `emulated_kernels.cpp` beside it
launches the kernels as csrc/cuda/carafe_cuda.cu does.
"""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from carafe_d2.reference import carafe_naive, carafe_upsample_naive

FOLDER = Path(__file__).parent / "cuda_emulation"
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # enum Type in csrc/carafe.h
F64, F32, F16, BF16 = TYPES
TOLERANCE = {F64: 1e-10, F32: 2e-5, F16: 2e-3, BF16: 1.6e-2}


def struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


# The structs of csrc/carafe.h
Shape = struct(
    "Shape",
    *integers("batch", "channels", "height", "width", "kernel", "groups", "scale"),
    ("channels_last", ctypes.c_bool),
)
POINTER = [("data", ctypes.c_void_p), ("type", ctypes.c_int)]
Map = struct("Map", *POINTER, *integers("batch", "channel", "row", "column"))
Kernels = struct(
    "Kernels",
    *POINTER,
    *integers("batch", "group", "tap", "row", "sub_row", "column", "sub_column"),
    ("softmax", ctypes.c_bool),
)


def map_of(tensor: Tensor) -> ctypes.Structure:
    return Map(tensor.data_ptr(), TYPES.index(tensor.dtype), *tensor.stride())


def kernels_of(tensor: Tensor, k: int, s: int, fused: bool) -> ctypes.Structure:
    batch, channel, row, column = tensor.stride()
    if fused:
        tap = s * s * channel
        strides = (batch, k * k * tap, tap, row, s * channel, column, channel)
    else:
        strides = (batch, k * k * channel, channel, s * row, row, s * column, column)
    return Kernels(tensor.data_ptr(), TYPES.index(tensor.dtype), *strides, fused)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("cuda_emulation") / "emulation.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = FOLDER / "emulated_kernels.cpp"
    subprocess.run([compiler, *flags, "-shared", "-fPIC", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def poisoned(tensor: Tensor) -> Tensor:
    """Memory like that of `tensor` in which every value that is not written shows."""
    return torch.full_like(tensor, torch.nan)


SIZES = [(2, 12, 3, 5), (1, 25, 4, 3), (1, 4, 1, 1), (3, 8, 1, 6)]
PARAMETERS = [  # kernel, group, scale
    *((k, 1, s) for k, s in itertools.product((1, 3, 5, 7), (1, 2, 3, 4))),
    *((k, g, 2) for k, g in itertools.product((3, 5, 9), (2, 4))),
]
DTYPES = [(F64, F64), *itertools.product((F32, F16, BF16), repeat=2)]


def compare(emulation, shape, parameters, dtypes, channels_last, fused):
    (n, c, h, w), (k, g, s) = shape, parameters
    generator = torch.Generator().manual_seed(k * 100 + s)
    kernels_shape = (n, g * k * k * s * s, h, w) if fused else (n, g * k * k, h * s, w * s)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def random(size, dtype):
        values = torch.randn(size, dtype=F64, generator=generator)
        return values.to(dtype).contiguous(memory_format=layout)

    features, kernels = random(shape, dtypes[0]), random(kernels_shape, dtypes[1])
    grad_output = random((n, c, h * s, w * s), dtypes[0])
    out, grad_features, grad_kernels = map(poisoned, (grad_output, features, kernels))

    sizes = Shape(n, c, h, w, k, g, s, channels_last)
    weights, x, dy = kernels_of(kernels, k, s, fused), map_of(features), map_of(grad_output)
    calls = [
        (emulation.emulate_forward, x, weights, map_of(out)),
        (emulation.emulate_backward_features, dy, weights, map_of(grad_features)),
        (emulation.emulate_backward_kernels, dy, x, weights, kernels_of(grad_kernels, k, s, fused)),
    ]
    for function, *arguments in calls:
        function(ctypes.byref(sizes), *map(ctypes.byref, arguments))

    exact = [tensor.double().requires_grad_() for tensor in (features, kernels)]
    reference = carafe_upsample_naive if fused else carafe_naive
    expected = reference(*exact, k, g, s)
    expected_grads = torch.autograd.grad(expected, exact, grad_output.double())
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    for actual, wanted in zip(
        (out, grad_features, grad_kernels), (expected, *expected_grads), strict=True
    ):
        atol = tolerance * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=atol)


@pytest.mark.parametrize("fused", [False, True], ids=["carafe", "carafe_upsample"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda p: "k{}-g{}-s{}".format(*p))
def test_kernels_match_the_definition(emulation, parameters, channels_last, fused):
    for shape in SIZES:
        if shape[1] % parameters[1] == 0:
            compare(emulation, shape, parameters, (F32, F32), channels_last, fused)


@pytest.mark.parametrize("fused", [False, True], ids=["carafe", "carafe_upsample"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_pair_of_dtypes(emulation, dtypes, channels_last, fused):
    compare(emulation, (2, 12, 3, 4), (5, 2, 2), dtypes, channels_last, fused)
