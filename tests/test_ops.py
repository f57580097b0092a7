"""The compiled operators, against their plain-PyTorch definition."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from carafe_d2.ops import (
    carafe,
    carafe_downsample,
    carafe_downsample_softmax,
    carafe_upsample,
)
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
    LAYOUTS,
    Case,
    backward_of,
    check_operator,
    extreme_logits,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED = [
    (carafe_upsample, carafe_upsample_naive),
    (carafe_downsample_softmax, carafe_downsample_softmax_naive),
]
PAIRS = [(carafe, carafe_naive), (carafe_downsample, carafe_downsample_naive), *FUSED]
OPERATORS = pytest.mark.parametrize(
    ("operator", "reference"), PAIRS, ids=[operator.__name__ for operator, _ in PAIRS]
)


BOTH = LAYOUTS[:2]

CASES = [
    *(Case(kernel=k, scale=s, layout=m) for k in (1, 3, 5, 7) for s in (1, 2, 3, 4) for m in BOTH),
    *(Case(group=g, layout=m) for g in (2, 3, 6) for m in BOTH),
    *(Case(layout=m) for m in LAYOUTS[2:]),
    *(Case(dtype=t, layout=m) for t in (F16, BF16, F32) for m in LAYOUTS),
    *(
        Case(kernel=5, group=2, dtype=a, kernels_dtype=b, layout=m)
        for a, b in ((F16, F32), (F32, F16), (BF16, F32), (F32, BF16), (F16, BF16))
        for m in BOTH
    ),
    Case((1, 1, 1, 1), kernel=5),
    Case((1, 3, 1, 9), kernel=7),
    Case((1, 3, 9, 1), kernel=7, layout="channels_last"),
    Case((1, 2, 3, 3), kernel=9),
    Case((2, 40, 13, 21), kernel=5, dtype=F32),
    Case((2, 40, 13, 21), kernel=5, group=2, dtype=F32, layout="channels_last"),
    # more than 8 MiB of output, which the CPU writes past its caches where lines are whole
    *(Case((1, 48, h, 97), kernel=3, dtype=F32, layout=m) for h in (120, 121) for m in BOTH),
    Case((1, 48, 120, 97), kernel=3, dtype=BF16),
    # more channels than a downsampling forward on the CPU takes at a time, in equal parts or not
    *(Case((2, c, 5, 7), dtype=F32, layout=m) for c in (258, 263, 512) for m in BOTH),
    Case((2, 258, 5, 7), group=2, dtype=F32),
    Case((3, 37, 7, 35), kernel=3, dtype=F32),
    Case((3, 37, 7, 35), kernel=3, dtype=F32, layout="channels_last"),
    *(Case(s, dtype=F32) for s in ((0, 6, 4, 5), (2, 6, 0, 5), (2, 6, 4, 0), (2, 0, 4, 5))),
]


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_match_the_definition(operator, reference, case, device):
    check_operator(operator, reference, case, device)


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize(("kernel", "group", "scale"), [(3, 1, 2), (5, 2, 1), (1, 2, 3)])
def test_gradcheck(operator, reference, kernel, group, scale, layout, device):
    case = Case((1, 2, 2, 3), kernel, group, scale, layout=layout)
    inputs = case.inputs(operator, device)
    assert torch.autograd.gradcheck(lambda *tensors: operator(*tensors, *case.parameters), inputs)


# Every dtype, layout, kernel, group and scale, a mix of dtypes and every empty dimension at least
# once: opcheck is slow.
OPCHECK_CASES = [
    Case((1, 2, 3, 5), kernel=1, scale=1, dtype=F64, layout="sliced"),
    Case((2, 2, 3, 2), kernel=5, scale=3, dtype=F64, layout="channels_last"),
    Case((1, 4, 5, 3), kernel=7, group=2, scale=4, dtype=F32, layout="channels_last"),
    Case((1, 6, 2, 3), kernel=5, group=3, dtype=F16),
    Case((2, 4, 3, 3), dtype=F32, kernels_dtype=F16, layout="channels_last"),
    Case((1, 4, 3, 3), group=4, scale=1, dtype=BF16, kernels_dtype=F32, layout="transposed"),
    Case((1, 1, 1, 1), dtype=F32, layout="expanded"),
    Case((0, 6, 4, 5), dtype=F16, kernels_dtype=F32, layout="channels_last"),
    Case((2, 6, 0, 5), dtype=F32, layout="broadcast"),
    Case((2, 0, 4, 5), dtype=F64),
]


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck(operator, reference, case, device):
    inputs = case.inputs(operator, device)
    forward = getattr(torch.ops.carafe_d2, operator.__name__).default
    torch.library.opcheck(forward, (*inputs, *case.parameters))

    detached = [tensor.detach() for tensor in inputs]
    grad_output = torch.randn_like(forward(*detached, *case.parameters))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            backward_of(operator).default, (grad_output, *detached, *case.parameters, *wanted)
        )


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 4, 1, 5), (1, 4, 5, 1), (2, 4, 1, 1)], ids=str)
def test_results_without_data_have_the_same_strides(operator, reference, shape, layout, device):
    """Where a size is one, layouts are ambiguous; csrc/carafe.cpp and ops.py must agree on them."""
    case = Case(shape, dtype=F32, layout=layout)
    inputs = [tensor.detach() for tensor in case.inputs(operator, device)]
    forward = getattr(torch.ops.carafe_d2, operator.__name__).default
    backward = backward_of(operator).default
    grad_output = torch.randn_like(forward(*inputs, *case.parameters))
    for op, arguments in (
        (forward, (*inputs, *case.parameters)),
        *(
            (backward, (grad_output, *inputs, *case.parameters, *w))
            for w in ((1, 1), (0, 1), (1, 0))
        ),
    ):
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
def test_only_the_gradient_that_is_needed_is_computed(operator, reference, device):
    features, kernels = Case().inputs(operator, device)
    out = operator(features.detach(), kernels, *Case().parameters)
    (grad,) = torch.autograd.grad(out.sum(), kernels)
    assert grad.shape == kernels.shape
    skipped, grad_again = backward_of(operator)(
        torch.ones_like(out), features.detach(), kernels.detach(), *Case().parameters, False, True
    )
    assert skipped.numel() == 0
    assert torch.equal(grad, grad_again)


@OPERATORS
def test_second_derivatives_are_refused(operator, reference):
    inputs = Case().inputs(operator)
    out = operator(*inputs, *Case().parameters)
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(grads[0].sum(), inputs)


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_in_gives_channels_last_out(operator, reference, device):
    inputs = Case(layout="channels_last").inputs(operator, device)
    out = operator(*inputs, *Case().parameters)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for grad in torch.autograd.grad(out, inputs, torch.randn_like(out)):
        assert grad.is_contiguous(memory_format=torch.channels_last)
    # the layouts of the two inputs need not agree
    features, kernels = inputs
    mixed = operator(features.contiguous(), kernels, *Case().parameters)
    assert mixed.is_contiguous()
    torch.testing.assert_close(mixed, out)


@OPERATORS
def test_upsample_keeps_nothing_but_its_inputs(operator, reference):
    inputs = Case().inputs(operator)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(*inputs, *Case().parameters)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in inputs]


@OPERATORS
@pytest.mark.parametrize("layout", BOTH)
def test_bitwise_the_same_for_any_number_of_threads(operator, reference, layout):
    case = Case((2, 32, 17, 19), kernel=5, group=2, dtype=F32, layout=layout)
    inputs = case.inputs(operator)

    def results():
        out = operator(*inputs, *case.parameters)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_num_threads(before)


# For CUDA's kernels, those of their own for each layout come first, then the general ones. Half
# types take tensor cores where the width is even.
EXTREME_CASES = [
    *(
        Case((1, 16, 3, 6), k, 1, s, dtype, kernels_dtype, m)
        for k, s in ((3, 2), (5, 2), (7, 2), (3, 1), (9, 2))
        for dtype, kernels_dtype in ((F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16))
        for m in BOTH
    ),
    *(Case((1, 16, 3, 6), kernel=5, layout=m) for m in BOTH),
]


def check_extreme_logits(case: Case, device: str) -> None:
    for operator, reference in FUSED:
        features, logits = case.inputs(operator, device)
        for extreme in extreme_logits(logits):
            inputs = features, extreme.requires_grad_()
            check_operator(operator, reference, case, device, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", EXTREME_CASES, ids=str)
def test_logits_far_from_zero(case, device):
    """Only the differences between logits count; what rounding leaves of them, counts in full."""
    check_extreme_logits(case, device)


def check_on_cpu():
    for operator, reference in PAIRS:
        for case in CASES:
            if case.kernel == 5 or case.shape == (3, 37, 7, 35):
                check_operator(operator, reference, case)
    for case in EXTREME_CASES:
        check_extreme_logits(case, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["default", "avx2", "avx512"])
def test_every_instruction_set(instruction_set):
    """Runs a few cases in a process that is told which of the compiled kernels to use."""
    command = [sys.executable, "-c", "from test_ops import check_on_cpu; check_on_cpu()"]
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"CARAFE_D2_CPU": instruction_set, "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "CARAFE_D2_CPU: expected" in run.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert run.returncode == 0, run.stderr


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast(operator, reference, dtype, device):
    """Half features with the float32 masks that softmax gives under autocast, and the reverse."""
    features, kernels = Case((1, 4, 5, 5), dtype=F32).inputs(operator, device)
    weight = torch.randn(4, 4, 1, 1, device=device)
    with torch.autocast(device, dtype=dtype):
        half = torch.nn.functional.conv2d(features, weight)
        assert half.dtype == dtype
        for tensors in ((half, kernels), (features, kernels.to(dtype)), (half, kernels.to(dtype))):
            out = operator(*tensors, *Case().parameters)
            assert out.dtype == tensors[0].dtype
            expected = reference(*(t.double() for t in tensors), *Case().parameters)
            torch.testing.assert_close(out.double(), expected, rtol=1.6e-2, atol=3e-2)
    out.float().sum().backward()
    assert features.grad.dtype == kernels.grad.dtype == F32


@OPERATORS
@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_allocates_nothing_but_results(operator, reference, dtype, layout):
    """Of what PyTorch's allocator sees, neither masks nor a copy of anything."""
    case = Case((1, 32, 16, 16), kernel=5, dtype=dtype, layout=layout)
    inputs = case.inputs(operator)
    grad_output = torch.empty_like(operator(*inputs, *case.parameters))
    with torch.profiler.profile(profile_memory=True) as profiler:
        out = operator(*inputs, *case.parameters)
        grads = torch.autograd.grad(out, inputs, grad_output)
    results = sorted(tensor.nbytes for tensor in (out, *grads))
    allocated = [event.self_cpu_memory_usage for event in profiler.events()]
    assert sorted(size for size in allocated if size > results[0] // 8) == results


@OPERATORS
@pytest.mark.parametrize("device", DEVICES)
def test_compiles_into_one_graph_with_dynamic_shapes(operator, reference, device):
    torch.compiler.reset()
    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend="aot_eager")
    # In the first shape no two sizes are equal by chance, which would be taken for a rule.
    for stance, shape in (("default", (2, 8, 7, 11)), ("fail_on_recompile", (3, 8, 4, 5))):
        case = Case(shape, dtype=F32)
        inputs = case.inputs(operator, device)
        with torch.compiler.set_stance(stance):
            out = compiled(*inputs, *case.parameters)
        torch.testing.assert_close(out, operator(*inputs, *case.parameters))
        torch.autograd.grad(out.sum(), inputs)


@OPERATORS
def test_flops_are_counted(operator, reference):
    inputs = Case().inputs(operator)
    with FlopCounterMode(display=False) as counter:
        out = operator(*inputs, *Case().parameters)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * out.numel() * Case().kernel ** 2
    assert counter.get_total_flops() == 3 * forward


class Reassembly(torch.nn.Module):
    """An operator as a module, for tools that take modules."""

    def __init__(self, operator, parameters):
        super().__init__()
        self.operator, self.parameters_ = operator, parameters

    def forward(self, features, kernels):
        return self.operator(features, kernels, *self.parameters_)


@OPERATORS
def test_fvcore_counts_a_multiply_add_as_one(operator, reference):
    fvcore = pytest.importorskip("fvcore.nn")
    case = Case(kernel=5, group=2, scale=3, dtype=F32)
    inputs = tuple(tensor.detach() for tensor in case.inputs(operator))
    analysis = fvcore.FlopCountAnalysis(Reassembly(operator, case.parameters), inputs)
    assert analysis.by_operator() == {operator.__name__: operator(*inputs, 5, 2, 3).numel() * 5**2}
    assert not analysis.unsupported_ops()


def zeros(*shape, **options) -> Tensor:
    return torch.zeros(shape, **options)


# what changes in a valid call, and what the message has to say
WRONG_INPUT = {
    "features rank": (
        {"features": zeros(4, 5, 5)},
        "features: expected a tensor of rank 4.*rank 3",
    ),
    "kernels rank": ({"kernels": zeros(100)}, "(masks|kernel_logits): expected a tensor of rank 4"),
    "features dtype": (
        {"features": zeros(1, 4, 5, 5, dtype=torch.int64)},
        "features: expected dtype float64, float32, float16 or bfloat16, but got",
    ),
    "kernels dtype": (
        {"kernels": zeros(1, 25, 10, 10, dtype=torch.complex64)},
        "(masks|kernel_logits): expected dtype float64, float32, float16 or bfloat16, but got",
    ),
    "dtype mix": (
        {"features": zeros(1, 4, 5, 5, dtype=F64)},
        "(masks|kernel_logits): expected .*dtype.* with features of .*, but got",
    ),
    "batch": ({"features": zeros(2, 4, 5, 5)}, "expected shape.*but got"),
    "map": ({"features": zeros(1, 4, 5, 8)}, r"expected shape \(1, .*\(1, 4, 5, 8\).*but got"),
    "even kernel": ({"kernel_size": 4}, "kernel_size: expected a positive odd number, but got 4"),
    "kernel 0": ({"kernel_size": 0}, "kernel_size: expected a positive odd number, but got 0"),
    "kernel -1": ({"kernel_size": -1}, "kernel_size: expected a positive odd number, but got -1"),
    "other kernel": ({"kernel_size": 3}, "expected shape.*kernel_size 3.*but got"),
    "huge kernel": ({"kernel_size": 2**40 + 1}, "expected shape.*but got"),
    "huge scale": ({"scale_factor": 2**62}, "expected shape.*but got"),
    "huge group": (
        {"features": zeros(1, 0, 5, 5), "group_size": 2**62},
        "expected shape.*but got",
    ),
    "scale": ({"scale_factor": 0}, "scale_factor: expected at least 1, but got 0"),
    "other scale": ({"scale_factor": 3}, "expected shape.*scale_factor 3.*but got"),
    "group": ({"group_size": 3}, "group_size: expected a divisor of the 4 channels.*but got 3"),
    "group 0": ({"group_size": 0}, "group_size: expected at least 1, but got 0"),
    "other group": ({"group_size": 2}, "expected shape.*group_size 2.*but got"),
}


def arguments_with(changes: dict, operator, device: str = "cpu") -> list:
    """Arguments of a valid call but for `changes`."""
    arguments = {
        "features": zeros(1, 4, 5, 5),
        "kernels": Case((1, 4, 5, 5), kernel=5, dtype=F32).inputs(operator)[1].detach(),
        "kernel_size": 5,
        "group_size": 1,
        "scale_factor": 2,
    } | changes
    return [a.to(device) if isinstance(a, Tensor) else a for a in arguments.values()]


@OPERATORS
@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("changes", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT)
def test_wrong_input_names_the_argument(operator, reference, changes, message, device):
    arguments = arguments_with(changes, operator, device)
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments)
    with pytest.raises(RuntimeError, match=message):
        backward_of(operator)(zeros(1, 4, 10, 10, device=device), *arguments, True, True)


with warnings.catch_warnings():  # some of these are prototypes, some on their way out
    warnings.simplefilter("ignore")
    # what PyTorch's dispatcher refuses before it comes to the operator
    FOREIGN_INPUT = {
        "sparse features": ({"features": zeros(1, 4, 5, 5).to_sparse()}, "SparseCPU"),
        "sparse kernels": ({"kernels": zeros(1, 25, 10, 10).to_sparse()}, "SparseCPU"),
        "quantized features": (
            {"features": torch.quantize_per_tensor(zeros(1, 4, 5, 5), 1.0, 0, torch.quint8)},
            "QuantizedCPU",
        ),
        "nested features": (
            {"features": torch.nested.nested_tensor([zeros(4, 5, 5), zeros(4, 6, 5)])},
            "NestedTensorCPU",
        ),
        "an array": ({"features": zeros(1, 4, 5, 5).numpy()}, "argument 'features'.*'ndarray'"),
        "no features": ({"features": None}, "features: expected a tensor"),
        "kernel 5.0": ({"kernel_size": 5.0}, "argument 'kernel_size'.*'float'"),
        "kernel '5'": ({"kernel_size": "5"}, "argument 'kernel_size'.*'str'"),
        "kernel None": ({"kernel_size": None}, "argument 'kernel_size'.*'NoneType'"),
        "group 1.0": ({"group_size": 1.0}, "argument 'group_size'.*'float'"),
        "scale 2.0": ({"scale_factor": 2.0}, "argument 'scale_factor'.*'float'"),
        "beyond int64": ({"kernel_size": 2**63 + 1}, "argument 'kernel_size'"),
    }


@OPERATORS
@pytest.mark.parametrize(("changes", "message"), FOREIGN_INPUT.values(), ids=FOREIGN_INPUT)
def test_foreign_input_is_refused(operator, reference, changes, message):
    arguments = arguments_with(changes, operator)
    with pytest.raises(RuntimeError, match=message):
        operator(*arguments)
    with pytest.raises(RuntimeError, match=message):
        backward_of(operator)(zeros(1, 4, 10, 10), *arguments, True, True)


@OPERATORS
@pytest.mark.parametrize(
    ("device", "kernels_device"),
    [
        ("cpu", "meta"),
        ("meta", "cpu"),
        pytest.param("cpu", "cuda:0", marks=pytest.mark.gpu),
        pytest.param("cuda:0", "cpu", marks=pytest.mark.gpu),
    ],
)
def test_tensors_on_two_devices_are_refused(operator, reference, device, kernels_device):
    features, kernels = Case().inputs(operator)
    message = rf"(masks|kernel_logits): expected a tensor on {device}.*but got {kernels_device}"
    with pytest.raises(RuntimeError, match=message):
        operator(features.to(device), kernels.to(kernels_device), *Case().parameters)


@OPERATORS
@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda right: right[..., :-1], r"grad_output: expected shape \(2, 6, "),
        (lambda right: right.float(), "grad_output: expected dtype"),
        (lambda right: right.long(), "grad_output: expected dtype"),
        (lambda right: right[0], "grad_output: expected a tensor of rank 4"),
    ],
)
def test_wrong_output_gradient_is_refused(operator, reference, change, message, device):
    inputs = [tensor.detach() for tensor in Case().inputs(operator, device)]
    grad_output = change(operator(*inputs, *Case().parameters))
    with pytest.raises(RuntimeError, match=message):
        backward_of(operator)(grad_output, *inputs, *Case().parameters, True, True)


@OPERATORS
def test_output_gradient_on_another_device_is_refused(operator, reference):
    inputs = [tensor.detach() for tensor in Case().inputs(operator)]
    grad_output = operator(*inputs, *Case().parameters).to("meta")
    with pytest.raises(RuntimeError, match="grad_output: expected a tensor on"):
        backward_of(operator)(grad_output, *inputs, *Case().parameters, True, True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_conversions_are_those_of_pytorch(dtype, device):
    """All 2^16 values in, and roundings, subnormals, overflow, infinities and NaN out."""
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    everything = everything.view(1, 1, 256, 256).to(device)
    one = torch.ones(1, 1, 256, 256, device=device)
    same = carafe(everything, one, 1, 1, 1)
    torch.testing.assert_close(same, everything, rtol=0, atol=0, equal_nan=True)

    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (65536,), generator=generator).to(torch.int32)
    values = torch.cat([bits.view(F32), everything.cpu().float().flatten() * (1 + 2**-11)])
    # features of one and masks that vary give the gradient of the features: a rounded sum of one
    values = values.view(1, 1, 256, 512).to(device)
    ones = torch.ones_like(values, dtype=dtype)
    rounded = carafe(ones, values, 1, 1, 1)
    torch.testing.assert_close(rounded, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_softmax_of_extreme_logits(device):
    """Large, very negative and infinite logits, as torch.softmax handles them."""
    logits = torch.randn(1, 9, 4, 4)
    logits[0, 0] = 3e4
    logits[0, 1] = -3e4
    logits[0, 2, :2] = -torch.inf
    logits[0, 3, 0, 0] = torch.nan
    logits[0, :, 1, 1] = torch.linspace(-110, 0, 9)
    features, logits = torch.randn(1, 2, 4, 4).to(device), logits.to(device)
    out = carafe_upsample(features, logits, 3, 1, 1)
    expected = carafe_upsample_naive(features, logits, 3, 1, 1)
    torch.testing.assert_close(out, expected, equal_nan=True)
