"""The operators on a GPU: what tests/test_ops.py, which runs on every device, does not ask.

Streams, graphs, memory, alignment, launch limits and tensors of more than 2^31 elements.
"""

import copy
import dataclasses
import itertools
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from carafe_d2 import CARAFEPack
from carafe_d2.benchmark.peers import mmcv_peers
from carafe_d2.ops import carafe, carafe_downsample, carafe_downsample_softmax, carafe_upsample
from carafe_d2.reference import (
    carafe_downsample_naive,
    carafe_downsample_softmax_naive,
    carafe_naive,
    carafe_upsample_naive,
)
from carafe_d2.testing import (
    BF16,
    F16,
    F32,
    F64,
    Case,
    assert_close,
    backward_of,
    check_operator,
)

pytestmark = pytest.mark.gpu
UPSAMPLING = [(carafe, carafe_naive), (carafe_upsample, carafe_upsample_naive)]
DOWNSAMPLING = [
    (carafe_downsample, carafe_downsample_naive),
    (carafe_downsample_softmax, carafe_downsample_softmax_naive),
]


def operators(pairs: list) -> pytest.MarkDecorator:
    ids = [operator.__name__ for operator, _ in pairs]
    return pytest.mark.parametrize(("operator", "reference"), pairs, ids=ids)


OPERATORS = operators(UPSAMPLING)
DEVICE = "cuda"
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MEDIUM = Case((2, 64, 26, 42), kernel=5, dtype=F32)  # a level of a small pyramid
LAYOUTS = pytest.mark.parametrize("layout", list(MEMORY_FORMATS))
# Even scales have kernels of their own; the others allocate memory for the backward.
SCALES = pytest.mark.parametrize("scale", [2, 3])


def of_layout(case: Case, layout: str, **changes) -> Case:
    return dataclasses.replace(case, layout=layout, **changes)


def output_shape(case: Case) -> tuple[int, int, int, int]:
    n, c, h, w = case.shape
    return n, c, h * case.scale, w * case.scale


def random_grad_output(case: Case, device: str = DEVICE) -> Tensor:
    values = torch.randn(output_shape(case), dtype=case.dtype)
    return values.to(memory_format=MEMORY_FORMATS[case.layout]).to(device)


def results(operator, inputs, grad_output: Tensor, case: Case) -> list[Tensor]:
    """The output and the gradients of both inputs."""
    out = operator(*inputs, *case.parameters)
    return [out, *torch.autograd.grad(out, inputs, grad_output)]


def exact_results(reference, inputs, grad_output: Tensor, case: Case) -> list[Tensor]:
    """The same by the definition, in float64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    return results(reference, exact, grad_output.double(), case)


def assert_all_close(actual: list[Tensor], expected: list[Tensor], case: Case) -> None:
    for tensor, expected_tensor in zip(actual, expected, strict=True):
        assert_close(tensor, expected_tensor, case)


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, expected_tensor in zip(actual, expected, strict=True):
        assert torch.equal(tensor, expected_tensor)


# ------------------------------------------------------------------------------------- values

SMALL_CASES = [
    *(Case((2, 6, 5, 7), k, 1, s, F32) for k in (1, 3, 5, 7) for s in (1, 2, 3, 4)),
    *(Case((1, 24, 9, 33), k, 2, 2, t) for k in (3, 5, 7) for t in (F32, F16, BF16)),
    *(Case((1, 40, 9, 38), 5, 2, 2, t) for t in (F16, BF16)),  # on tensor cores
    Case((1, 8, 4, 4), kernel=9, scale=5, dtype=F32),
    Case((1, 70, 10, 12), kernel=5, dtype=F16, kernels_dtype=F32),
    Case((2, 12, 6, 5), kernel=5, group=3, dtype=F64),
    *(Case((2, 12, 8, 22), k, 2, 2, t) for k in (3, 5) for t in (F32, F16)),  # with even sides
    *(Case((1, 40, 5, 9), k, 2, 2, F32) for k in (3, 5)),  # enough channels for channels_last
]


@operators(UPSAMPLING + DOWNSAMPLING)
@LAYOUTS
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_small_shapes(operator, reference, case, layout):
    """On the GPU no kernels run but these; dev/gpu_check.py has compute-sanitizer watch them."""
    case = of_layout(case, layout)
    inputs = case.inputs(operator)
    output = reference(*inputs, *case.parameters)
    grad_output = torch.randn_like(output, memory_format=MEMORY_FORMATS[layout])
    arguments = [tensor.detach().to(DEVICE) for tensor in inputs]
    out = getattr(torch.ops.carafe_d2, operator.__name__)(*arguments, *case.parameters)
    grads = backward_of(operator)(grad_output.to(DEVICE), *arguments, *case.parameters, True, True)
    actual = [tensor.cpu() for tensor in (out, *grads)]
    assert_all_close(actual, exact_results(reference, inputs, grad_output, case), case)


UNUSUAL_CASES = [
    # sizes beyond 65535, the most blocks in the second and third dimension of a launch
    Case((70_000, 1, 1, 2), dtype=F32),
    Case((2, 40_000, 1, 2), kernel=1, group=40_000, dtype=F32),
    Case((2, 40_000, 1, 2), kernel=3, group=20_000, dtype=F16),
    Case((1, 70_000, 2, 1), dtype=F32),
    Case((1, 2, 70_000, 1), dtype=F32),
    Case((1, 2, 1, 70_000), dtype=F32),
    # sizes of the published models
    Case((2, 256, 13, 21), kernel=5, dtype=F16),
    Case((1, 256, 52, 84), kernel=5, dtype=F32),
    Case((64, 256, 14, 14), kernel=5, dtype=BF16),
    # large kernels and scales
    Case((1, 16, 17, 19), kernel=11, dtype=F32),
    Case((1, 4, 5, 6), kernel=21, dtype=F16),
    Case((1, 16, 5, 7), kernel=3, scale=16, dtype=F32),
]


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("case", UNUSUAL_CASES, ids=str)
def test_unusual_shapes(operator, reference, case, layout):
    check_operator(operator, reference, of_layout(case, layout), DEVICE)


@operators(DOWNSAMPLING)
@LAYOUTS
@pytest.mark.parametrize("case", [*SMALL_CASES, *UNUSUAL_CASES], ids=str)
def test_downsampling(operator, reference, case, layout):
    check_operator(operator, reference, of_layout(case, layout), DEVICE)


def misaligned(tensor: Tensor, elements: int) -> Tensor:
    """A copy that starts `elements` behind an aligned address."""
    storage = tensor.new_empty(tensor.numel() + elements)
    return storage.as_strided(tensor.shape, tensor.stride(), elements).copy_(tensor.detach())


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, F32), (F32, F16)], ids=str)
@pytest.mark.parametrize("elements", [1, 2, 3])
def test_misaligned_pointers(operator, reference, elements, dtypes, layout):
    case = Case((2, 32, 8, 12), 5, 1, 2, *dtypes, layout)
    inputs = [misaligned(t, elements).requires_grad_() for t in case.inputs(operator, DEVICE)]
    grad_output = misaligned(random_grad_output(case), elements)
    assert all(tensor.data_ptr() % 16 for tensor in (*inputs, grad_output))
    actual = results(operator, inputs, grad_output, case)
    assert_all_close(actual, exact_results(reference, inputs, grad_output, case), case)


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("grad_layout", ["channels_last", "contiguous", "expanded"])
def test_output_gradient_of_any_layout(operator, reference, grad_layout, layout):
    case = of_layout(MEDIUM, layout)
    inputs = case.inputs(operator, DEVICE)
    if grad_layout == "expanded":  # what the gradient of a sum is
        grad_output = torch.ones((), device=DEVICE).expand(output_shape(case))
    else:
        grad_output = random_grad_output(of_layout(case, grad_layout))
    actual = results(operator, inputs, grad_output, case)
    assert_all_close(actual, exact_results(reference, inputs, grad_output, case), case)


@LAYOUTS
def test_upsampler_gives_what_it_gives_on_the_cpu(layout):
    torch.manual_seed(0)
    on_cpu = CARAFEPack(16, 2, up_group=2).double()
    torch.nn.init.normal_(on_cpu.content_encoder.weight, std=0.3)
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE, memory_format=MEMORY_FORMATS[layout])
    x = torch.randn(2, 16, 9, 13, dtype=F64).to(memory_format=MEMORY_FORMATS[layout])

    expected, actual = on_cpu(x), on_gpu(x.to(DEVICE))
    assert actual.is_contiguous(memory_format=MEMORY_FORMATS[layout])
    expected.square().sum().backward()
    actual.square().sum().backward()
    torch.testing.assert_close(actual.cpu(), expected)
    for ours, wanted in zip(on_gpu.parameters(), on_cpu.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), wanted.grad)


@LAYOUTS
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_upsampler_trains_under_autocast(dtype, layout):
    torch.manual_seed(0)
    pack = CARAFEPack(16, 2).to(DEVICE, memory_format=MEMORY_FORMATS[layout])
    x = torch.randn(2, 16, 12, 10).to(memory_format=MEMORY_FORMATS[layout]).to(DEVICE)
    target = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    optimizer = torch.optim.Adam(pack.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == F16)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype=dtype):
            out = pack(x)
            assert out.dtype == x.dtype  # features pass as they are
            loss = (out - target).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert all(p.grad.dtype == F32 for p in pack.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, F16])
def test_peer_of_mmcv_computes_the_same(dtype, layout):
    """What the benchmark compares with is right, also where mmcv itself would misread a layout."""
    peers = mmcv_peers()
    if not peers:
        pytest.skip("needs mmcv with its operators, or dev/build_mmcv_carafe.py's")
    case = of_layout(MEDIUM, layout, group=2, dtype=dtype)
    inputs = case.inputs(carafe, DEVICE)
    grad_output = random_grad_output(case)
    peer = peers["operator/mmcv"].build
    actual, expected = (results(f, inputs, grad_output, case) for f in (peer, carafe))
    # mmcv accumulates half types in half precision
    tolerance = {F32: 1e-4, F16: 5e-2}[dtype]
    for tensor, wanted in zip(actual, expected, strict=True):
        atol = tolerance * wanted.abs().max().item()
        torch.testing.assert_close(tensor, wanted, rtol=tolerance, atol=atol)


# ------------------------------------------------------------------------------- determinism


@OPERATORS
@LAYOUTS
@SCALES
@pytest.mark.parametrize("dtype", [F32, F16])
def test_bitwise_the_same_every_time(operator, reference, dtype, scale, layout):
    case = of_layout(MEDIUM, layout, shape=(2, 256, 50, 68), dtype=dtype, scale=scale)
    inputs = case.inputs(operator, DEVICE)
    grad_output = random_grad_output(case)
    expected = results(operator, inputs, grad_output, case)
    for _ in range(10):
        assert_all_equal(results(operator, inputs, grad_output, case), expected)


# ------------------------------------------------------------------------- graphs and streams


@contextmanager
def side_stream():
    """Makes a new stream the current one; afterwards the device has finished."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def refill(tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))


@OPERATORS
@LAYOUTS
@SCALES
@pytest.mark.parametrize("dtype", [F32, F16])
def test_graph_replays_with_new_inputs(operator, reference, dtype, scale, layout):
    """Forward and backward, captured once, give what eager calls give, to the bit."""
    case = of_layout(MEDIUM, layout, dtype=dtype, scale=scale)
    inputs = case.inputs(operator, DEVICE)
    grad_output = random_grad_output(case)
    with side_stream():  # nothing may be loaded or set up for the first time in a capture
        for _ in range(3):
            results(operator, inputs, grad_output, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(operator, inputs, grad_output, case)
    for _ in range(3):
        refill([*inputs, grad_output])
        graph.replay()
        assert_all_equal(captured, results(operator, inputs, grad_output, case))


@OPERATORS
def test_compiles_into_graphs(operator, reference):
    """torch.compile's "reduce-overhead" puts forward and backward into CUDA graphs."""
    pytest.importorskip("triton")
    case = dataclasses.replace(MEDIUM, shape=(1, 16, 10, 12))
    compiled = torch.compile(operator, fullgraph=True, mode="reduce-overhead")
    inputs = case.inputs(operator, DEVICE)
    grad_output = random_grad_output(case)
    for _ in range(4):  # compile, record, replay
        refill([*inputs, grad_output])
        torch.compiler.cudagraph_mark_step_begin()
        actual = [t.clone() for t in results(compiled, inputs, grad_output, case)]
        assert_all_equal(actual, results(operator, inputs, grad_output, case))


@OPERATORS
@LAYOUTS
@SCALES
def test_runs_on_the_current_stream_and_waits_for_nothing(operator, reference, scale, layout):
    case = of_layout(MEDIUM, layout, scale=scale)
    inputs = case.inputs(operator, DEVICE)
    grad_output = random_grad_output(case)
    expected = results(operator, inputs, grad_output, case)
    values = [tensor.detach().clone() for tensor in inputs]
    with side_stream() as stream:
        results(operator, inputs, grad_output, case)  # fills the allocator's cache of the stream
        with torch.no_grad():
            for tensor in inputs:
                tensor.zero_()
        stream.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            # Whoever does not queue behind this reads zeros; whoever waits comes back to a stream
            # that has nothing left to do.
            torch.cuda._sleep(2_000_000_000)
            with torch.no_grad():
                for tensor, value in zip(inputs, values, strict=True):
                    tensor.copy_(value)
            actual = results(operator, inputs, grad_output, case)
            busy = not stream.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert busy
    assert_all_equal(actual, expected)


@OPERATORS
def test_device_that_is_not_the_current_one(operator, reference):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = MEDIUM.inputs(operator, "cuda:1")
    grad_output = random_grad_output(MEDIUM, "cuda:1")
    with torch.cuda.device(0):
        actual = results(operator, inputs, grad_output, MEDIUM)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for tensor in actual)
    assert_all_close(actual, exact_results(reference, inputs, grad_output, MEDIUM), MEDIUM)
    with pytest.raises(RuntimeError, match=r"expected a tensor on cuda:0.*but got cuda:1"):
        operator(inputs[0].to("cuda:0"), inputs[1], *MEDIUM.parameters)


# ------------------------------------------------------------------------------------- memory


@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("group", [1, 4])
@SCALES
def test_allocates_results_and_normalizers_only(operator, reference, scale, group, dtype, layout):
    """Neither masks nor a copy in another layout; two floats for each group and output pixel."""
    case = of_layout(MEDIUM, layout, group=group, dtype=dtype, scale=scale)
    inputs = case.inputs(operator, DEVICE)
    grad_output = random_grad_output(case)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = results(operator, inputs, grad_output, case)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before

    n, _, h, w = found[0].shape
    normalizers = 2 * n * group * h * w * F32.itemsize if operator is carafe_upsample else 0
    assert peak <= sum(tensor.nbytes for tensor in found) + normalizers


# ------------------------------------------------------------------------- beyond 2^31 elements


@dataclasses.dataclass(frozen=True)
class Window:
    """A square of source locations, and around it all that its results depend on."""

    case: Case
    y: int
    x: int
    size: int = 6

    def _sides(self, margin: int) -> tuple[slice, slice]:
        _, _, h, w = self.case.shape
        return tuple(
            slice(max(0, start - margin), min(length, start + self.size + margin))
            for start, length in ((self.y, h), (self.x, w))
        )

    def cut(self, tensor: Tensor, scale: int) -> Tensor:
        """The window and its surroundings, in a tensor with `scale` values a location."""
        rows, columns = self._sides(self.case.kernel // 2)
        return tensor[
            ...,
            rows.start * scale : rows.stop * scale,
            columns.start * scale : columns.stop * scale,
        ].clone()

    def inside(self, tensor: Tensor, scale: int) -> Tensor:
        """The window alone, of what `cut` gave."""
        outer, inner = self._sides(self.case.kernel // 2), self._sides(0)
        (top, left), (height, width) = (
            [i.start - o.start for i, o in zip(inner, outer, strict=True)],
            [i.stop - i.start for i in inner],
        )
        return tensor[
            ...,
            top * scale : (top + height) * scale,
            left * scale : (left + width) * scale,
        ]


LARGE_CASES = [  # output, masks and logits are beyond 2^31 elements; features; features and output
    Case((1, 8, 4200, 4200), kernel=3, scale=4, dtype=F16),
    Case((1, 130, 4100, 4100), kernel=1, scale=1, dtype=F16),
    Case((3, 16, 6800, 6800), kernel=1, group=2, scale=1, dtype=BF16),
]


def bytes_of_large_test(case: Case) -> int:
    """Both inputs, the output, three gradients, normalizers, and a tenth for what tests them."""
    n, c, h, w = case.shape
    pixels = n * h * w * case.scale**2
    features, kernels = n * c * h * w, case.group * case.kernel**2 * pixels
    values = 2 * (features + kernels + c * pixels) * case.dtype.itemsize
    return int(1.1 * (values + case.group * pixels * F32.itemsize))


def filled(shape: tuple[int, ...], case: Case) -> Tensor:
    memory_format = MEMORY_FORMATS[case.layout]
    tensor = torch.empty(shape, dtype=case.dtype, device=DEVICE, memory_format=memory_format)
    return tensor.normal_()


@pytest.mark.slow
@OPERATORS
@LAYOUTS
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_more_than_2_31_elements(operator, reference, case, layout):
    case = of_layout(case, layout)
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], bytes_of_large_test(case)
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    n, c, h, w = case.shape
    s, taps = case.scale, case.group * case.kernel**2
    fused = operator is carafe_upsample
    kernels_shape = (n, taps * s**2, h, w) if fused else (n, taps, h * s, w * s)
    of_kernels = 1 if fused else s  # values of the kernels a location
    inputs = [filled(shape, case).requires_grad_() for shape in (case.shape, kernels_shape)]
    grad_output = filled(output_shape(case), case)
    assert max(tensor.numel() for tensor in (*inputs, grad_output)) > 2**31
    found = results(operator, inputs, grad_output, case)

    # corners, and where the offset into the output passes 2^31
    row_values = w * s * (c if layout == "channels_last" else 1)
    row = 2**31 % (h * s * row_values) // row_values // s
    for y, x in itertools.product((0, max(0, row - 3), h - 6), (0, w // 2, w - 6)):
        window = Window(case, y, x)
        scales = (1, of_kernels)
        cut = [window.cut(t.detach(), i) for t, i in zip(inputs, scales, strict=True)]
        expected = exact_results(reference, cut, window.cut(grad_output, s), case)
        for tensor, wanted, i in zip(found, expected, (s, *scales), strict=True):
            actual = window.inside(window.cut(tensor.detach(), i), i)
            assert_close(actual, window.inside(wanted, i), case)
