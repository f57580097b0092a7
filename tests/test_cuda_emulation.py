"""The CUDA kernels without a GPU: the host compiler builds the same .cuh files, for an emulator.

The emulator (`cuda_emulation/`, tested by test_cuda_emulator.py) plays CUDA's execution model, and
`emulated_kernels.cpp` launches the kernels as csrc/cuda/carafe_cuda.cu does. Every case is compared
with the definition, and runs with the threads in opposite orders, which must not change a bit.

With CARAFE_D2_PTX=compute_80, or another virtual architecture, what nvcc makes of the kernels runs
in their place, through a translator of PTX (`cuda_emulation/ptx.py`, tested by test_ptx.py).
"""

import ctypes
import itertools
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import carafe_d2
from carafe_d2.reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_naive,
    carafe_upsample_naive,
)
from carafe_d2.testing import extreme_logits

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "cuda_emulation" / "emulated_kernels.cpp"
PTX = "CARAFE_D2_PTX"  # the virtual architecture whose PTX all tests are to run
SANITIZED = "CARAFE_D2_SANITIZED_EMULATION"  # the library that a process of its own tests
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # enum Type in csrc/carafe.h
F64, F32, F16, BF16 = TYPES
TOLERANCE = {F64: 1e-10, F32: 2e-5, F16: 2e-3, BF16: 1.6e-2}
FORWARD, BACKWARD = 0, 1  # orders of threads; any other number is the seed of a shuffled one


# ------------------------------------------------------------------------------------- the kernels


def struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def integers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


# The structs of csrc/carafe.h and emulated_kernels.cpp
Shape = struct(
    "Shape",
    *integers("batch", "channels", "height", "width", "kernel", "groups", "scale", "stride"),
    ("channels_last", ctypes.c_bool),
)
POINTER = [("data", ctypes.c_void_p), ("type", ctypes.c_int)]
Map = struct(
    "Map", *POINTER, *integers("batch_stride", "channel_stride", "row_stride", "column_stride")
)
Weights = struct(
    "Weights",
    *POINTER,
    *integers("batch_stride", "group_stride", "tap_stride"),
    *integers("row_stride", "sub_row_stride", "column_stride", "sub_column_stride"),
    ("softmax", ctypes.c_bool),
)
Device = struct(
    "Device",
    ("order", ctypes.c_uint),
    ("multiprocessors", ctypes.c_int),
    ("general_blocks", ctypes.c_uint),
    ("tensor_cores", ctypes.c_bool),
)


def map_of(tensor: Tensor) -> ctypes.Structure:
    return Map(tensor.data_ptr(), TYPES.index(tensor.dtype), *tensor.stride())


def weights_of(case: "Case", tensor: Tensor) -> ctypes.Structure:
    batch, channel, row, column = tensor.stride()
    s = case.scale
    weights = Weights(tensor.data_ptr(), TYPES.index(tensor.dtype), batch, softmax=case.fused)
    if case.fused:
        weights.tap_stride = s * s * channel
        weights.row_stride, weights.sub_row_stride = row, s * channel
        weights.column_stride, weights.sub_column_stride = column, channel
    else:
        weights.tap_stride = channel
        weights.row_stride, weights.sub_row_stride = s * row, row
        weights.column_stride, weights.sub_column_stride = s * column, column
    weights.group_stride = case.kernel**2 * weights.tap_stride
    return weights


def compiled(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs g++, and a processor for which the emulator has fibers")
    library = folder / "emulation.so"
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags)
    flags = ("-march=native", "-fno-stack-protector", *flags)  # a fifth faster
    subprocess.run([compiler, *flags, "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def emulation(folder) -> Iterator[ctypes.CDLL]:
    library = load(os.environ.get(SANITIZED) or compiled(folder, "-O2"))
    if architecture := os.environ.get(PTX):
        ptx = compile_to_ptx(ROOT / "csrc" / "cuda" / "carafe_cuda.cu", architecture, folder)
        with replaced_kernels(library, Translation(ptx, folder)):
            yield library
    else:
        yield library


def load(library: str | Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.emulate_forward, loaded.emulate_backward, loaded.take_launched):
        function.restype = ctypes.c_char_p
    loaded.find_kernel = None
    return loaded


Translation = runpy.run_path(str(SOURCE.with_name("ptx.py")))["Translation"]


@contextmanager
def replaced_kernels(library: ctypes.CDLL, translation: Translation) -> Iterator[None]:
    """In there, translated ones run in the place of the library's."""

    def find(name: bytes) -> int | None:
        try:
            return translation(name)
        except Exception:  # which C++ could not pass on; it says which kernel is missing
            traceback.print_exc()
            return None

    before = library.find_kernel
    library.find_kernel = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(find)
    library.replace_kernels(library.find_kernel)
    try:
        yield
    finally:
        library.find_kernel = before
        library.replace_kernels(before)


def compile_to_ptx(source: Path, architecture: str, folder: Path) -> str:
    """What nvcc makes of a source file, compiled as setup.py does."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = setup["find_nvcc"]() or pytest.skip("needs nvcc")
    target = folder / "kernels.ptx"
    command = [*setup["compile_command"](source, nvcc, []), "-ptx", f"-arch={architecture}"]
    include = ["-I", ROOT / "csrc" / "cuda"]
    subprocess.run([*command, *include, source, "-o", target], check=True)
    return target.read_text()


# ------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Inputs of one call. `memory` is how they lie there: dense, unaligned, cropped or expanded."""

    shape: tuple[int, int, int, int] = (2, 20, 5, 9)
    kernel: int = 5
    group: int = 1
    scale: int = 2
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32)
    channels_last: bool = False
    fused: bool = False
    memory: str = "dense"
    stride: int = 1

    @property
    def parameters(self) -> tuple[int, int, int]:
        return self.kernel, self.group, self.scale

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features, masks or logits, and the gradient of the output."""
        (n, c, *size), (k, g, s) = self.shape, self.parameters
        h, w = (-(-side // self.stride) for side in size)
        weights = (n, g * k * k * s * s, h, w) if self.fused else (n, g * k * k, h * s, w * s)
        generator = torch.Generator().manual_seed(k * 100 + s)
        features, weights, grad_output = (
            torch.randn(shape, dtype=F64, generator=generator).to(dtype)
            for shape, dtype in zip(
                (self.shape, weights, (n, c, h * s, w * s)),
                (*self.dtypes, self.dtypes[0]),
                strict=True,
            )
        )
        # The operator takes features for channels_last only where they are dense.
        dense_only = self.channels_last and self.memory != "unaligned"
        memory = "dense" if dense_only else self.memory
        return (
            arranged(features, memory, self.channels_last),
            arranged(weights, self.memory, self.channels_last),
            arranged(grad_output, self.memory, self.channels_last),
        )

    def expected(self, features, weights, grad_output) -> tuple[Tensor, Tensor, Tensor]:
        """Output, gradient of the features and gradient of the weights, in float64."""
        exact = [tensor.double().requires_grad_() for tensor in (features, weights)]
        if self.stride > 1:
            definition = carafe_downsample_softmax_naive if self.fused else carafe_downsample_naive
            out = definition(*exact, self.kernel, self.group, self.stride)
        else:
            definition = carafe_upsample_naive if self.fused else carafe_naive
            out = definition(*exact, *self.parameters)
        return out.detach(), *torch.autograd.grad(out, exact, grad_output.double())


def arranged(tensor: Tensor, memory: str, channels_last: bool) -> Tensor:
    """The same values elsewhere, with NaN in between where there is an in-between."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = tensor.contiguous(memory_format=layout)
    if memory == "unaligned":
        flat = tensor.new_full((tensor.numel() + 1,), torch.nan)[1:]
        return flat.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)
    if memory == "cropped":
        n, c, h, w = tensor.shape
        larger = tensor.new_full((n, c + 1, h + 2, w + 3), torch.nan)
        larger = larger.contiguous(memory_format=layout)
        return larger[:, :c, 1 : h + 1, 2 : w + 2].copy_(tensor)
    if memory == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


def poisoned(tensor: Tensor) -> Tensor:
    """Dense memory for a result like `tensor`, in which every value that is not written shows."""
    return torch.full_like(tensor, torch.nan)


class Operator:
    """The operator on an emulated GPU with a number of multiprocessors.

    With `general_blocks`, none but the general kernels run, and loop with so few blocks.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        order: int = FORWARD,
        multiprocessors: int = 2,
        general_blocks: int = 0,
        tensor_cores: bool = True,
    ):
        self.library = library
        self.device = Device(order, multiprocessors, general_blocks, tensor_cores)

    def forward(self, case: Case, features, weights, grad_output) -> Tensor:
        out = poisoned(arranged(grad_output, "dense", case.channels_last))
        self.forward_into(out, case, features, weights)
        return out

    def forward_into(self, out: Tensor, case: Case, features, weights) -> None:
        self.call(
            self.library.emulate_forward,
            Shape(*case.shape, *case.parameters, case.stride, case.channels_last),
            map_of(features),
            weights_of(case, weights),
            map_of(out),
        )

    def backward(
        self, case: Case, features, weights, grad_output, wanted=(True, True)
    ) -> list[Tensor | None]:
        grads = [
            poisoned(arranged(tensor, "dense", case.channels_last)) if is_wanted else None
            for tensor, is_wanted in zip((features, weights), wanted, strict=True)
        ]
        self.call(
            self.library.emulate_backward,
            Shape(*case.shape, *case.parameters, case.stride, case.channels_last),
            map_of(grad_output),
            map_of(features),
            weights_of(case, weights),
            None if grads[0] is None else map_of(grads[0]),
            None if grads[1] is None else weights_of(case, grads[1]),
        )
        return grads

    def __call__(self, case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        return [self.forward(case, *inputs), *self.backward(case, *inputs)]

    def call(self, function, *arguments) -> None:
        by_reference = (None if a is None else ctypes.byref(a) for a in arguments)
        report = function(ctypes.byref(self.device), *by_reference)
        assert report is None, report.decode()


def assert_same_bits(results: list[Tensor], others: list[Tensor]) -> None:
    for result, other in zip(results, others, strict=True):
        torch.testing.assert_close(result, other, rtol=0, atol=0, equal_nan=True)


def assert_as_defined(results: list[Tensor], case: Case, inputs: tuple) -> None:
    tolerance = max(TOLERANCE[dtype] for dtype in case.dtypes)
    for result, expected in zip(results, case.expected(*inputs), strict=True):
        atol = tolerance * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=atol)


def check(library: ctypes.CDLL, case: Case, *device: int) -> None:
    inputs = case.inputs()
    results = Operator(library, FORWARD, *device)(case, inputs)
    assert_as_defined(results, case, inputs)
    assert_same_bits(results, Operator(library, BACKWARD, *device)(case, inputs))


OPERATORS = pytest.mark.parametrize("fused", [False, True], ids=["carafe", "carafe_upsample"])
LAYOUTS = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)
MULTIPROCESSORS = [1, 132]


# --------------------------------------------------------------------------------------- the sweep


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize(
    ("kernel", "group", "scale"),
    [
        *((k, 1, s) for k, s in itertools.product((1, 3, 5, 7, 9), (1, 2, 3, 4))),
        *((k, g, 2) for k, g in itertools.product((3, 5, 7, 9), (2, 3))),
        (5, 6, 4),
    ],
)
def test_parameters(emulation, kernel, group, scale, channels_last, fused):
    for shape in ((2, 12, 3, 5), (1, 48, 6, 11)):
        case = Case(shape, kernel, group, scale, channels_last=channels_last, fused=fused)
        check(emulation, case)


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 2), (5, 2), (5, 3), (3, 7)])
def test_downsampling(emulation, kernel, stride, dtypes, channels_last, fused):
    for shape, group in (((2, 12, 7, 5), 1), ((1, 20, 6, 11), 2), ((1, 2, 1, 1), 1)):
        case = Case(shape, kernel, group, 1, dtypes, channels_last, fused, stride=stride)
        check(emulation, case)


SHAPES = [
    *((1, 1, 1, 1), (1, 4, 1, 9), (1, 3, 9, 1), (2, 4, 2, 2), (3, 8, 7, 13)),
    *((2, 20, 14, 14), (1, 72, 5, 8), (1, 64, 7, 4), (1, 136, 3, 5), (1, 36, 1, 1)),
    *((1, 4, 3, 70), (1, 16, 2, 67), (1, 24, 41, 3), (1, 12, 2, 33), (1, 2, 33, 31)),
]


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(emulation, shape, channels_last, fused):
    for kernel, multiprocessors in zip((3, 5, 7), (1, 132, 16), strict=True):
        case = Case(shape, kernel, channels_last=channels_last, fused=fused)
        check(emulation, case, multiprocessors)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 72, 20, 9), (2, 32, 9, 40)], ids=str)
def test_multiprocessors(emulation, shape, channels_last, multiprocessors):
    for kernel, group in ((3, 1), (5, 2)):
        case = Case(shape, kernel, group, channels_last=channels_last, fused=True)
        check(emulation, case, multiprocessors)


DTYPES = [(F64, F64), *itertools.product((F32, F16, BF16), repeat=2)]


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(emulation, dtypes, channels_last, fused):
    for kernel, group, scale in ((5, 2, 2), (3, 1, 1)):
        case = Case((2, 40, 3, 9), kernel, group, scale, dtypes, channels_last, fused)
        check(emulation, case)


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("memory", ["unaligned", "cropped", "expanded"])
def test_memory(emulation, memory, dtype, channels_last, fused):
    """Nothing has to be aligned or dense, apart from the innermost dimension of maps."""
    for shape, kernel in (((2, 20, 5, 9), 5), ((2, 16, 4, 8), 3), ((3, 7, 3, 6), 7)):
        case = Case(shape, kernel, 1, 2, (dtype, dtype), channels_last, fused, memory)
        check(emulation, case)


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32), (F64, F64)], ids=str)
def test_general_kernels_loop_over_the_work(emulation, dtypes, channels_last, fused):
    """They are the ones for sizes beyond those of a grid."""
    for kernel, group, scale in ((5, 2, 2), (9, 1, 1)):
        case = Case((2, 20, 6, 9), kernel, group, scale, dtypes, channels_last, fused)
        check(emulation, case, 1, 2)


def launched(library: ctypes.CDLL) -> list[str]:
    """The kernels that ran since the last call, with their namespaces."""
    return library.take_launched().decode().replace("carafe_d2::", "").splitlines()


def kernels_of_case(library: ctypes.CDLL, case: Case) -> set[str]:
    """The namespaces of the kernels that run."""
    launched(library)
    Operator(library)(case, case.inputs())
    return {name.split("::")[0] for name in launched(library)}


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if F64 not in pair], ids=str)
def test_there_are_special_kernels(emulation, dtypes, kernel, channels_last, fused):
    """So that the sweep is about them."""
    for group, scale in ((1, 2), (2, 4)):
        shape = (1, 16 * group, 2, 3)
        case = Case(shape, kernel, group, scale, dtypes, channels_last, fused)
        layout = "channels_last" if channels_last else "contiguous"
        assert kernels_of_case(emulation, case) == {layout}


@LAYOUTS
@pytest.mark.parametrize(
    "case",
    [Case(dtypes=(F64, F64)), Case(kernel=1), Case(kernel=9), Case(scale=1), Case(scale=3)],
    ids=["float64", "k1", "k9", "s1", "s3"],
)
def test_there_are_general_kernels(emulation, case, channels_last):
    assert kernels_of_case(emulation, replace(case, channels_last=channels_last)) == {"general"}


@OPERATORS
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_contiguous_maps_are_one_launch(emulation, wanted, fused):
    """So that the output's gradient, which both need, is read at about the same time."""
    case = Case(fused=fused)
    launched(emulation)
    Operator(emulation).backward(case, *case.inputs(), wanted=wanted)
    (kernel,) = launched(emulation)
    assert kernel.startswith("contiguous::backward_kernel<5")
    case = replace(case, shape=(2, 20, 5, 8), dtypes=(F16, F16))
    Operator(emulation).backward(case, *case.inputs(), wanted=wanted)
    (kernel,) = launched(emulation)
    assert kernel.startswith("tensor_cores::backward_kernel<Half")


TENSOR_CORE_CASES = [
    Case((1, 1, 1, 2)),
    Case((2, 40, 9, 12), group=2),
    Case((1, 70, 5, 38)),
    Case((1, 16, 13, 14), memory="unaligned"),
    Case((2, 36, 4, 66), memory="cropped"),
    Case((3, 8, 7, 8), memory="expanded"),
]


@OPERATORS
@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if pair[0] in (F16, BF16)], ids=str)
@pytest.mark.parametrize("case", TENSOR_CORE_CASES, ids=lambda case: str(case.shape))
def test_half_types_with_tensor_cores_and_without(emulation, case, dtypes, fused):
    case = replace(case, dtypes=dtypes, fused=fused)
    for multiprocessors in (1, 132):
        check(emulation, case, multiprocessors)
        check(emulation, case, multiprocessors, 0, False)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(dtypes=(F16, F16)), "tensor_cores"),
        (Case(dtypes=(BF16, F32)), "tensor_cores"),
        (Case(dtypes=(F16, F32), fused=True), "tensor_cores"),
        (Case(dtypes=(F16, F32)), "contiguous"),  # whose masks may be too large for float16
        (Case(dtypes=(F32, F32)), "contiguous"),
        (Case(dtypes=(F16, F16), kernel=3), "contiguous"),
        (Case(dtypes=(F16, F16), scale=4), "contiguous"),
        (Case(dtypes=(F16, F16), memory="unaligned"), "contiguous"),
        (Case(dtypes=(F16, F16), channels_last=True), "channels_last"),
    ],
    ids=str,
)
def test_where_tensor_cores_are_used(emulation, case, expected):
    assert kernels_of_case(emulation, replace(case, shape=(2, 20, 5, 8))) == {expected}


def test_masks_beyond_float16(emulation):
    case = Case((1, 16, 4, 8), dtypes=(F16, F32))
    features, masks, grad_output = case.inputs()
    inputs = features * 1e-3, masks * 1e5, grad_output * 1e-3
    expected = case.expected(*inputs)[0]
    torch.testing.assert_close(
        Operator(emulation).forward(case, *inputs).double(), expected, rtol=2e-3, atol=1
    )


# Shape, groups and memory of the features of downsampling by 2
DOWNSAMPLED = [
    ((2, 12, 8, 10), 1, "dense"),
    ((1, 6, 2, 2), 3, "dense"),
    ((1, 72, 4, 70), 2, "unaligned"),
    ((2, 20, 34, 6), 1, "cropped"),
    ((2, 34, 18, 36), 1, "expanded"),
]
DOWNSAMPLED_CHANNELS_LAST = [
    ((2, 20, 8, 10), 1, "dense"),
    ((1, 48, 1, 3), 3, "dense"),
    ((2, 136, 19, 7), 2, "expanded"),
]


@OPERATORS
@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if F64 not in pair], ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
def test_downsampling_by_two(emulation, kernel, dtypes, fused):
    """Of contiguous maps with even sides, which have kernels of their own."""
    namespaces = {"contiguous", "downsampling", *(["general"] if fused else [])}
    for shape, group, memory in DOWNSAMPLED:
        case = Case(shape, kernel, group, 1, dtypes, fused=fused, memory=memory, stride=2)
        assert kernels_of_case(emulation, case) == namespaces
        for multiprocessors in (1, 132):
            check(emulation, case, multiprocessors)


@OPERATORS
@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if F64 not in pair], ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
def test_downsampling_by_two_in_channels_last(emulation, kernel, dtypes, fused):
    for shape, group, memory in DOWNSAMPLED_CHANNELS_LAST:
        case = Case(shape, kernel, group, 1, dtypes, True, fused, memory, stride=2)
        assert kernels_of_case(emulation, case) == {"downsampling_channels_last"}
        for multiprocessors in (1, 132):
            check(emulation, case, multiprocessors)


# ----------------------------------------------------------------------------- promises and limits

TYPICAL = [
    Case((2, 40, 9, 11), kernel=5, group=2),
    Case((1, 36, 14, 14), kernel=5, dtypes=(F16, F16)),
    Case((2, 40, 5, 38), kernel=5, group=2, dtypes=(BF16, BF16)),
    Case((1, 20, 6, 37), kernel=3, scale=4, dtypes=(BF16, F32)),
    Case((1, 24, 8, 8), kernel=7),
    Case((2, 12, 5, 5), kernel=3, scale=3),
    Case((2, 20, 8, 22), kernel=5, scale=1, stride=2),
    Case((2, 6, 5, 5), dtypes=(F64, F64)),
]
TYPICAL_CASES = pytest.mark.parametrize("case", TYPICAL, ids=range(len(TYPICAL)))


@OPERATORS
@LAYOUTS
@TYPICAL_CASES
def test_results_do_not_depend_on_the_order_of_threads(emulation, case, channels_last, fused):
    case = replace(case, channels_last=channels_last, fused=fused)
    inputs = case.inputs()
    for multiprocessors in MULTIPROCESSORS:
        results = Operator(emulation, FORWARD, multiprocessors)(case, inputs)
        for order in (FORWARD, BACKWARD, 2, 3):
            assert_same_bits(results, Operator(emulation, order, multiprocessors)(case, inputs))


@OPERATORS
@LAYOUTS
@TYPICAL_CASES
def test_each_gradient_alone(emulation, case, channels_last, fused):
    case = replace(case, channels_last=channels_last, fused=fused)
    inputs, operator = case.inputs(), Operator(emulation)
    both = operator.backward(case, *inputs)
    of_features, nothing = operator.backward(case, *inputs, wanted=(True, False))
    assert nothing is None
    nothing, of_weights = operator.backward(case, *inputs, wanted=(False, True))
    assert nothing is None
    assert_same_bits([of_features, of_weights], both)


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@TYPICAL_CASES
def test_what_is_not_finite_stays_in_its_window(emulation, case, bad, channels_last, fused):
    """A NaN or infinity reaches the results that depend on it, and no other."""
    case = replace(case, channels_last=channels_last, fused=fused)
    features, weights, grad_output = case.inputs()
    operator = Operator(emulation)
    for h, w in ((0, 0), (2, 3), (case.shape[2] - 1, case.shape[3] - 1)):
        inputs = features.clone(), weights, grad_output.clone()
        inputs[0][0, 1, h, w] = bad
        inputs[2][0, 2, h // case.stride * case.scale, w // case.stride * case.scale] = bad
        finite = [expected.isfinite() for expected in case.expected(*inputs)]
        out, grad_features, grad_weights = (result.isfinite() for result in operator(case, inputs))
        assert torch.equal(out, finite[0])
        assert torch.equal(grad_features, finite[1])
        # Where a tap lies outside the map, the definition multiplies the gradient with zero.
        assert torch.equal(grad_weights | ~finite[2], torch.ones_like(grad_weights))
        assert grad_weights.sum() < grad_weights.numel()


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@TYPICAL_CASES
def test_a_weight_that_is_not_finite_stays_in_its_window(
    emulation, case, bad, channels_last, fused
):
    """Also beside the border, where lanes have no location of their own."""
    case = replace(case, channels_last=channels_last, fused=fused)
    features, weights, grad_output = case.inputs()
    operator = Operator(emulation)
    taps = case.kernel**2
    for tap in (0, taps // 2, taps - 1):  # the corners and the center
        for position in (0, -1):
            inputs = features, weights.clone(), grad_output
            channel = tap * case.scale**2 if fused else tap
            inputs[1][-1, channel, position, position] = bad
            finite = [expected.isfinite() for expected in case.expected(*inputs)]
            results = operator(case, inputs)
            for result, is_finite in zip(results, finite, strict=True):
                assert result[is_finite].isfinite().all()
            if tap == taps // 2:  # which is never outside the map
                assert not results[0].isfinite().all()


@LAYOUTS
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("general", [False, True], ids=["special", "general"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_logits_far_from_zero(emulation, dtypes, general, kernel, channels_last):
    """Only the differences between logits count; what rounding leaves of them, counts in full."""
    case = Case((1, 16, 2, 4), kernel, 1, 2, dtypes, channels_last, fused=True)
    features, logits, grad_output = case.inputs()
    operator = Operator(emulation, general_blocks=2 if general else 0)
    for extreme in extreme_logits(logits):
        inputs = features, extreme, grad_output
        assert_as_defined(operator(case, inputs), case, inputs)


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(("kernel", "scale"), [(3, 2), (5, 2), (9, 2), (3, 1)])
def test_maps_without_channels_give_weights_no_gradient(
    emulation, kernel, scale, dtype, channels_last
):
    case = Case((1, 0, 3, 4), kernel, 1, scale, (dtype, dtype), channels_last)
    _, gradient = Operator(emulation).backward(case, *case.inputs(), wanted=(False, True))
    assert torch.equal(gradient, torch.zeros_like(gradient))


# ------------------------------------------------------------------------------- what nvcc makes

# What the tests below run. To compile all kernels takes minutes: that is for CARAFE_D2_PTX.
SOME_KERNELS = """
#include "carafe.cuh"
using namespace carafe_d2;
void* const kernels[] = {
    reinterpret_cast<void*>(contiguous::forward_kernel<5, float>),
    reinterpret_cast<void*>(contiguous::backward_kernel<5, float>),
    reinterpret_cast<void*>(tensor_cores::forward_kernel<Half, 16>),
    reinterpret_cast<void*>(tensor_cores::backward_kernel<Half, 16>),
    reinterpret_cast<void*>(channels_last::forward_kernel<3, float>),
    reinterpret_cast<void*>(channels_last::backward_features_kernel<3, float>),
    reinterpret_cast<void*>(channels_last::backward_weights_kernel<3, float>),
    reinterpret_cast<void*>(contiguous::forward_kernel<5, float, 2>),
    reinterpret_cast<void*>(downsampling::backward_features_kernel<5, float>),
    reinterpret_cast<void*>(downsampling::backward_weights_kernel<5, float>),
    reinterpret_cast<void*>(downsampling_channels_last::forward_kernel<5, float>),
    reinterpret_cast<void*>(downsampling_channels_last::backward_features_kernel<5, float>),
    reinterpret_cast<void*>(downsampling_channels_last::backward_weights_kernel<5, float>),
    reinterpret_cast<void*>(general::normalizer_kernel<float, float>),
    reinterpret_cast<void*>(general::forward_kernel<double, double, double>),
    reinterpret_cast<void*>(general::normalizer_kernel<double, double>),
    reinterpret_cast<void*>(general::backward_features_kernel<double, double, double>),
    reinterpret_cast<void*>(general::backward_weights_kernel<double, double, double>),
};
"""
HALF_STRIPS = Case((2, 20, 5, 16))  # so narrow that a warp has two of them beside each other
TENSOR_CORES = Case((1, 20, 9, 14), dtypes=(F16, F16))
CHANNELS_LAST = Case((2, 40, 5, 9), kernel=3, channels_last=True)
PTX_CASES = [
    HALF_STRIPS,
    Case((1, 36, 9, 37), group=2),
    Case((2, 20, 5, 9), memory="unaligned"),
    TENSOR_CORES,
    CHANNELS_LAST,
    replace(CHANNELS_LAST, shape=(1, 32, 3, 11), scale=4),
    Case((2, 12, 3, 5), scale=3, dtypes=(F64, F64)),
    Case((2, 12, 5, 3), kernel=9, dtypes=(F64, F64), channels_last=True),
    Case((2, 12, 5, 7), scale=1, stride=2, dtypes=(F64, F64)),
    Case((2, 20, 10, 22), scale=1, stride=2),
    Case((1, 40, 9, 7), group=2, scale=1, channels_last=True, stride=2),
]


@pytest.fixture(scope="module")
def some_ptx(folder) -> str:
    source = folder / "some_kernels.cu"
    source.write_text(SOME_KERNELS)
    return compile_to_ptx(source, "compute_80", folder)


@pytest.fixture(scope="module")
def translation(some_ptx, folder) -> Translation:
    return Translation(some_ptx, folder)


@pytest.mark.slow
@OPERATORS
@pytest.mark.parametrize("case", PTX_CASES, ids=range(len(PTX_CASES)))
def test_ptx(emulation, translation, case, fused):
    with replaced_kernels(emulation, translation):
        check(emulation, replace(case, fused=fused))


# What to put in the place of what in the PTX, and how that is noticed.
FAULTS = {
    "no clamp": (CHANNELS_LAST, r"max\.s32\s+(\S+), (\S+), 0;", r"mov.b32 \1, \2;", "out of range"),
    "no bounds of stores": (
        HALF_STRIPS,
        r"@%p\d+ bra \s*\S+;(?=(\n(?!\s*@).*){1,4}\n\s*st\.global\.v2)",
        "",
        "8-byte store to global memory at ptx:\\d+ is out of range, at byte .* of output",
    ),
    "no predicate": (HALF_STRIPS, "@p add", "add", "not close"),
    "no segment": (HALF_STRIPS, r"(shfl\S+ x\|p, \S+ \S+) %r\d+", r"\1 31", "not close"),
    "no barrier of warps": (HALF_STRIPS, r"bar\.warp\.sync[^;]*;", "", "race|before it was"),
    "no wait for copies": (TENSOR_CORES, r"cp\.async\.wait_all;", "", "before it was"),
    "no barrier": (HALF_STRIPS, r"bar\.sync[^;]*;", "", "race|before it was"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_ptx_are_noticed(emulation, some_ptx, fault, folder):
    case, pattern, replacement, report = FAULTS[fault]
    ptx, count = re.subn(pattern, replacement, some_ptx)
    assert count > 0
    with (
        replaced_kernels(emulation, Translation(ptx, folder)),
        pytest.raises(AssertionError, match=report),
    ):
        check(emulation, case)


# ---------------------------------------------------------------------------------- sanitizers


@pytest.fixture(scope="module")
def run_sanitized(tmp_path_factory, sanitizer_runtimes):
    """Runs Python with an emulation that has AddressSanitizer and UBSan in it."""
    folder = tmp_path_factory.mktemp("sanitized_emulation")
    runtimes = sanitizer_runtimes(shutil.which("g++") or pytest.skip("needs g++"))
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1"]
    variables = {
        SANITIZED: str(compiled(folder, *flags)),
        PTX: "",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself and PyTorch never free some memory
        "LD_PRELOAD": runtimes,
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": str(Path(carafe_d2.__file__).parents[1]),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.slow
def test_sanitizers_find_nothing(run_sanitized):
    sweep = "test_shapes or alone or without_channels or (test_memory and (float32 or .float16))"
    result = run_sanitized(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", sweep
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "report"),
    [("too few rows", "heap-buffer-overflow"), ("misaligned pairs", "misaligned address")],
)
def test_sanitizers_are_at_work(run_sanitized, problem, report):
    program = f"import runpy; runpy.run_path({__file__!r})['do_wrong']({problem!r})"
    result = run_sanitized("-c", program)
    assert result.returncode != 0
    assert report in result.stderr


def do_wrong(problem: str) -> None:
    """What sanitizers have to notice; in the process that it ends."""
    operator, case = Operator(load(os.environ[SANITIZED])), Case((1, 4, 6, 6), kernel=3)
    features, weights, out = case.inputs()
    if problem == "too few rows":
        features.untyped_storage().resize_(4 * 6 * 5 * 4)
    else:  # the operator's own outputs are aligned, so kernels need not expect this
        out = arranged(out, "unaligned", channels_last=False)
    operator.forward_into(out, case, features, weights)
