"""Up- and downsamplers and the operators inside them, with their peers, over cases of shapes."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..downsample import CARAFEDownsamplePack
from ..ops import carafe, carafe_downsample, carafe_downsample_softmax, carafe_upsample
from ..reference import downsampled
from ..upsample import UPSAMPLERS, build_upsampler
from .measure import (
    Clock,
    Measurement,
    Timing,
    count_flops,
    give_back_memory,
    interleave,
    warm_up,
    yardsticks,
)
from .peers import PEERS, Peer, compiled_peers, down_pack, mmcv_peers

FORWARD, FORWARD_BACKWARD = PASSES = ("forward", "forward+backward")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """Features (N, C, H, W) and the sizes of the reassembly.

    Attributes:
        compiled: whether the peers that torch.compile makes take part, half a minute for each.
        downsampling: whether the scale is that of downsampling.
    """

    name: str
    shape: tuple[int, int, int, int]
    kernel: int = 5
    group: int = 1
    scale: int = 2
    compiled: bool = False
    downsampling: bool = False

    @property
    def output_size(self) -> tuple[int, ...]:
        sides = self.shape[2:]
        if self.downsampling:
            return tuple(downsampled(side, self.scale) for side in sides)
        return tuple(self.scale * side for side in sides)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.kernel, self.group, self.scale

    @property
    def patch_elements(self) -> int:
        """All neighbors of all output values: what an unfold for each of them holds."""
        return math.prod((*self.shape[:2], *self.output_size)) * self.kernel**2

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.name}: features {shape}, kernel {self.kernel}, group {self.group}, " + (
            f"scale {'1/' * self.downsampling}{self.scale}"
        )


# p3 to p6 are what the upsamplers of the published pyramids get for an image of 800 x 1333, padded
# to 832 x 1344.
PYRAMID = {"p6": (13, 21), "p5": (26, 42), "p4": (52, 84), "p3": (104, 168)}


# What CARAFE gets in the same image: in a ResNet-50, and of c5 for p6.
DOWNSAMPLED = {
    "down_res3": (256, 208, 336),
    "down_res4": (512, 104, 168),
    "down_p6": (2048, 26, 42),
}


def standard_cases(device: torch.device, batch: int | None = None) -> dict[str, Case]:
    """The cases by name; a GPU gets larger batches.

    Args:
        batch: images of the pyramid's cases; default: 1 on a CPU, 2 on a GPU.
    """
    on_gpu = device.type == "cuda"
    batch = batch or (2 if on_gpu else 1)
    cases = [
        Case("base", (1, 256, 50, 68), compiled=True),
        *(Case(n, (batch, 256, *size), compiled=n == "p3") for n, size in PYRAMID.items()),
        Case("mask_head", (256 if on_gpu else 128, 256, 14, 14), compiled=True),
        Case("grouped", (1, 256, 50, 68), group=4),
        Case("image", (1, 3, 128, 128)),
        # what the operator's grad_check in MMDetection times
        Case("grad_check", (2, 1024, 100, 100)),
        *(Case(n, (batch, *s), downsampling=True) for n, s in DOWNSAMPLED.items()),
    ]
    return {case.name: case for case in cases}


QUICK_CASES = {
    case.name: case
    for case in (
        Case("tiny", (1, 8, 6, 7)),
        Case("tiny_grouped", (2, 8, 5, 4), 3, 2, 3),
        Case("tiny_down", (2, 8, 5, 4), 3, 2, 3, downsampling=True),
    )
}


# ------------------------------------------------------------------------------- candidates


def _upsampler(
    name: str, channels: int, scale_factor: int, kernel_size: int, group_size: int
) -> nn.Module:
    options = {"up_kernel": kernel_size, "up_group": group_size} if name == "carafe" else {}
    return build_upsampler(name, channels, scale_factor, **options)


OURS: dict[str, Callable] = {
    "operator/carafe": carafe,
    "fused/carafe_upsample": carafe_upsample,
    **{f"upsampler/{name}": partial(_upsampler, name) for name in UPSAMPLERS},
    "down_operator/carafe_downsample": carafe_downsample,
    "down_fused/carafe_downsample_softmax": carafe_downsample_softmax,
    "downsampler/carafe": down_pack(CARAFEDownsamplePack),
}

# Groups differ in what they are given: features and masks, features and kernel logits, features.
# Of each, the candidate whose speed-up over the others is reported.
GROUPS = {
    "operator": "operator/carafe",
    "fused": "fused/carafe_upsample",
    "upsampler": "upsampler/carafe",
    "down_operator": "down_operator/carafe_downsample",
    "down_fused": "down_fused/carafe_downsample_softmax",
    "downsampler": "downsampler/carafe",
}


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: its group, a slash, its name in the group.
        build: as in :class:`Peer`.
        peer: None for what carafe_d2 offers.
    """

    name: str
    build: Callable
    peer: Peer | None = None

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    def suits(self, case: Case) -> bool:
        """Whether it is of those that take part in a case."""
        compiles = self.peer is not None and self.peer.compiles
        return case.downsampling == self.group.startswith("down") and case.compiled >= compiles

    @property
    def is_reference(self) -> bool:
        """Whether it is the CARAFE that the others are compared with; it is never left out."""
        return self.name in GROUPS.values()

    @property
    def source(self) -> str:
        return self.peer.source if self.peer else "carafe_d2"

    def obstacle(self, inputs: "Inputs", pass_: str, available: int) -> str | None:
        """Says why it cannot run in that many bytes of memory, if so."""
        if self.peer is None:
            return None
        patches = self.peer.patches[PASSES.index(pass_)]
        memory = patches * inputs.case.patch_elements * inputs.dtype.itemsize
        # Half of the rest is left to pieces of freed memory that nothing else fits into.
        if memory > 0.4 * available:
            return f"needs about {memory / 2**30:.0f} GiB of memory"
        return self.peer.limits(inputs.case.shape[1], inputs.case.group, inputs.device)


def standard_candidates(with_peers: bool = True) -> dict[str, Candidate]:
    """The candidates by name, group by group; if wanted, also what CARAFE is compared with."""
    candidates = [Candidate(name, build) for name, build in OURS.items()]
    if with_peers:
        peers = PEERS | compiled_peers() | mmcv_peers()
        candidates += [Candidate(name, peer.build, peer) for name, peer in peers.items()]
    groups = list(GROUPS)
    candidates.sort(key=lambda candidate: groups.index(candidate.group))
    return {candidate.name: candidate for candidate in candidates}


def available_memory(device: torch.device) -> int:
    """Bytes that new tensors can take."""
    if device.type == "cuda":
        kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept_by_torch
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return 1024 * int(fields["MemAvailable"].split()[0])


# --------------------------------------------------------------------------------- workloads


class Inputs:
    """The tensors of one case, shared by all its candidates."""

    def __init__(self, case: Case, dtype: torch.dtype, layout: str, device: torch.device):
        self.case, self.dtype, self.layout, self.device = case, dtype, layout, device
        n, _, h, w = case.shape
        taps = case.group * case.kernel**2
        masks = n, taps, *case.output_size
        self.features = self._random(case.shape)
        self.masks = self._random(masks)
        self.logits = self._random(masks if case.downsampling else (n, taps * case.scale**2, h, w))
        self._grad_outputs: dict[torch.Size, Tensor] = {}

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(shape, dtype=self.dtype, device=self.device)
        return tensor.to(memory_format=LAYOUTS[self.layout]).requires_grad_()

    def grad_output(self, out: Tensor) -> Tensor:
        """A gradient to start a backward with, in the features' layout."""
        if out.shape not in self._grad_outputs:
            self._grad_outputs[out.shape] = self._random(out.shape).detach()
        return self._grad_outputs[out.shape]


class Workload:
    """A candidate on the tensors of a case.

    Attributes:
        reads: all that it reads: inputs and, of a module, parameters. All want gradients.
    """

    def __init__(self, group: str, build: Callable, inputs: Inputs):
        case = inputs.case
        self._inputs = inputs
        self._arguments: tuple
        if group in ("upsampler", "downsampler"):
            self._function = build(case.shape[1], case.scale, case.kernel, case.group)
            self._function.to(
                device=inputs.device, dtype=inputs.dtype, memory_format=LAYOUTS[inputs.layout]
            )
            self._arguments = (inputs.features,)
            self.reads = (inputs.features, *self._function.parameters())
        else:
            kernels = inputs.masks if group.endswith("operator") else inputs.logits
            self._function = build
            self._arguments = (inputs.features, kernels, *case.sizes)
            self.reads = (inputs.features, kernels)

    def function(self, pass_: str) -> Callable[[], object]:
        """What to call; a forward alone is that of inference, without autograd."""
        if isinstance(self._function, nn.Module):
            self._function.train(pass_ == FORWARD_BACKWARD)
        return self.forward if pass_ == FORWARD else self.forward_backward

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self._function(*self._arguments)

    def forward_backward(self) -> None:
        for tensor in self.reads:
            tensor.grad = None
        out = self._function(*self._arguments)
        out.backward(self._inputs.grad_output(out))

    def fewest_bytes(self, pass_: str) -> int:
        """Bytes that have to move even if all between input and output stays in registers.

        A forward reads every input and writes the output. A backward reads the output's gradient
        and writes that of every input, for which it reads all inputs again; but not where the
        features are the only input: interpolation is linear in them.
        """
        inputs = sum(tensor.nbytes for tensor in self.reads)
        output = self.forward().nbytes
        if pass_ == FORWARD:
            return inputs + output
        reads_again = inputs if len(self.reads) > 1 else 0
        return (inputs + output) + (output + reads_again + inputs)


def demands(
    candidate: Candidate, case: Case, dtype: torch.dtype, layout: str, pass_: str
) -> tuple[int, int]:
    """The fewest bytes and the FLOPs of a candidate; found on shapes alone, nothing is computed.

    Those of a peer that computes the same as CARAFE are CARAFE's, however it does it.
    """
    is_carafe = candidate.peer is not None and candidate.peer.is_carafe
    build = OURS[GROUPS[candidate.group]] if is_carafe else candidate.build
    workload = Workload(candidate.group, build, Inputs(case, dtype, layout, torch.device("meta")))
    return workload.fewest_bytes(pass_), count_flops(workload.function(pass_))


# -------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Result(Measurement):
    """One row; a row without a time says in `skipped` why there is none."""

    case: str
    dtype: str
    layout: str
    pass_: str
    candidate: str
    source: str
    skipped: str | None = None
    speedup: float | None = None  # of the group's CARAFE over this candidate
    fewest_bytes: int | None = None
    gbytes: float | None = None  # 1e9 of the fewest bytes a second
    copy_share: float | None = None  # gbytes relative to the copy's
    flops: int | None = None
    gflops: float | None = None  # 1e9 operations a second

    def as_dict(self) -> dict[str, Any]:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


class Benchmark:
    """Measures candidates on cases.

    Args:
        candidates: what to measure.
        device: where.
        seconds: time for each candidate, pass and case.
        skip: seconds a call above which a candidate is left out; CARAFE itself never is.
        quick: measure the device's own rates in no time, and wrongly.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate],
        device: torch.device,
        seconds: float,
        skip: float,
        quick: bool = False,
    ):
        self._candidates = list(candidates)
        self._device = device
        self._seconds = seconds
        self._skip = skip
        self._clock = Clock(device)
        self._yardsticks = yardsticks(device, quick)
        # Seconds a call for each element of all patches, in a candidate's last case.
        self._pace: dict[tuple, float] = {}

    def run(self, case: Case, dtype: torch.dtype, layout: str) -> Iterator[Result]:
        """Measures all candidates on a case.

        Yields:
            For each pass a row for each yardstick, then one for every candidate.
        """
        inputs = Inputs(case, dtype, layout, self._device)
        candidates = [candidate for candidate in self._candidates if candidate.suits(case)]
        for pass_ in PASSES:
            give_back_memory()
            available = available_memory(self._device)
            functions = {y.name: y.function for y in self._yardsticks}
            estimates = {y.name: warm_up(y.function, self._clock) for y in self._yardsticks}
            left_out = {}
            for candidate in candidates:
                name = candidate.name
                try:
                    if obstacle := candidate.obstacle(inputs, pass_, available):
                        raise LeftOut(obstacle)
                    functions[name], estimates[name] = self._warm_up(candidate, inputs, pass_)
                except LeftOut as reason:
                    left_out[name] = str(reason)
            timings = interleave(functions, estimates, self._clock, self._seconds)

            dtype_name = str(dtype).removeprefix("torch.")
            row = partial(Result, case.name, dtype_name, layout, pass_)
            for y in self._yardsticks:
                yield row(y.name, "PyTorch", **self._rates(y.name, timings, y.moved_bytes, y.flops))
            for candidate in candidates:
                if candidate.name in left_out:
                    yield row(candidate.name, candidate.source, left_out[candidate.name])
                else:
                    needs = demands(candidate, case, dtype, layout, pass_)
                    rates = self._rates(candidate.name, timings, *needs)
                    yield row(candidate.name, candidate.source, **rates)

    def _warm_up(
        self, candidate: Candidate, inputs: Inputs, pass_: str
    ) -> tuple[Callable[[], object], float]:
        """Returns what to measure, and about how many seconds a call of it takes.

        Raises:
            LeftOut: it fails, or takes too long, and is not a reference.
        """
        key, forward_key = (
            (candidate.name, inputs.dtype, inputs.layout, name) for name in (pass_, FORWARD)
        )
        elements = inputs.case.patch_elements
        # Forward and backward take longer than the forward, which was first.
        pace = self._pace.get(key) or self._pace.get(forward_key, 0)
        self._check_time(candidate, pace * elements)
        try:
            function = Workload(candidate.group, candidate.build, inputs).function(pass_)
            if candidate.peer and candidate.peer.compiles:
                function()
            seconds = warm_up(function, self._clock)
        except (RuntimeError, ValueError) as error:
            if candidate.is_reference:
                raise
            if isinstance(error, torch.OutOfMemoryError):
                raise LeftOut("out of memory") from error
            raise LeftOut(str(error).strip().splitlines()[0]) from error
        self._pace[key] = seconds / elements
        self._check_time(candidate, seconds)
        return function, seconds

    def _check_time(self, candidate: Candidate, seconds: float) -> None:
        if seconds > self._skip and not candidate.is_reference:
            raise LeftOut(f"takes about {seconds:.0f} s a call")

    def _rates(
        self, name: str, timings: dict[str, Timing], fewest_bytes: int, flops: int
    ) -> dict[str, Any]:
        """The fields of a Result that are numbers."""
        seconds = timings[name].seconds
        reference = timings.get(GROUPS.get(name.split("/")[0], ""))
        copy = self._yardsticks[0]
        copy_rate = copy.moved_bytes / timings[copy.name].seconds
        return {
            **timings[name].as_dict(),
            "speedup": seconds / reference.seconds if reference else None,
            "fewest_bytes": fewest_bytes,
            "gbytes": fewest_bytes / seconds / 1e9,
            "copy_share": fewest_bytes / seconds / copy_rate,
            "flops": flops,
            "gflops": flops / seconds / 1e9,
        }


class LeftOut(Exception):
    """Why a candidate is not measured."""
