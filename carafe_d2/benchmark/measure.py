"""Times of functions that take turns, so that whatever slows the machine slows all of them."""

import ctypes
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ROUNDS = 12
# A slow function takes part in every second or fourth round.
STRIDES = (1, 2, 4)
MAX_CALLS = 200  # of one function in one round
MOST_HEAD_START = 1e-3  # seconds that a GPU waits while the host launches
GPU_CYCLES = 3e9  # a second; no GPU makes more, so none waits for less than it is asked to

Function = Callable[[], object]


def keep_freed_memory() -> None:
    """Has this process reuse the memory that it frees, so that calls do not time page faults.

    glibc takes large tensors from the kernel at every call and gives them back after it; the
    kernel then clears each page at its first use, which takes longer than many a kernel of ours.
    The first GiB is used here, or the first calls would still meet new pages until the freed
    pieces are large enough. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_mmap_max, m_trim_threshold = -4, -1
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)  # never
        torch.ones(2**30, dtype=torch.uint8)


def give_back_memory() -> None:
    """Returns to the system the freed memory that glibc keeps."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def page_faults() -> int:
    """How many pages this process has used for the first time so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Clock:
    """Measures how long a call takes on a device.

    On a GPU it is the time between two events around every call, with the L2 cache overwritten
    before each. On a CPU it is wall time and the caches keep what the call before has left there.

    Args:
        device: what runs the functions.
        hide_host: on a GPU, leave out what the host needs for launching, as far as it is below
            ``MOST_HEAD_START``: a small kernel takes less time than its launch from Python. For
            this the GPU waits, before the first event, until all is launched.
    """

    def __init__(self, device: torch.device, hide_host: bool = True):
        self._hide_host = hide_host
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._l2_flush = torch.empty(4 * l2_bytes, dtype=torch.uint8, device=device)

    def __call__(self, function: Function, calls: int = 1) -> float:
        """Seconds that one call takes, averaged over `calls` calls."""
        if self._on_gpu:
            return self._gpu_seconds(function, calls) / calls
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def _gpu_seconds(self, function: Function, calls: int) -> float:
        events = []
        head_start = MOST_HEAD_START  # how long the first call's launches take is not known yet
        for _ in range(calls):
            self._l2_flush.zero_()
            if self._hide_host:
                torch.cuda._sleep(int(head_start * GPU_CYCLES))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            before = time.perf_counter()
            function()
            head_start = min(MOST_HEAD_START, 2 * (time.perf_counter() - before))
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3


@dataclass
class Timing:
    """What was measured of one function.

    Attributes:
        rounds: seconds a call in each of the rounds that it took part in.
        page_faults: in a call, likewise.
    """

    rounds: list[float] = field(default_factory=list)
    page_faults: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds a call: the median over the rounds. All ratios are those of medians."""
        return median(self.rounds)

    def as_dict(self) -> dict[str, Any]:
        """The fields of a :class:`Measurement`."""
        lower, _, upper = quantiles(self.rounds, n=4, method="inclusive")
        return {
            "milliseconds": 1e3 * self.seconds,
            "quartiles": (1e3 * lower, 1e3 * upper),
            "rounds": len(self.rounds),
            "page_faults": median(self.page_faults),
        }


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The times in a row of a table; None in a row that was not measured."""

    milliseconds: float | None = None  # a call; median over the rounds
    quartiles: tuple[float, float] | None = None  # in milliseconds, over the rounds
    rounds: int | None = None
    page_faults: float | None = None  # in a call; median over the rounds


def warm_up(function: Function, clock: Clock) -> float:
    """Calls a function for the first time; returns about how many seconds a call takes."""
    first = clock(function)
    return first if first > 1 else clock(function)


def interleave(
    functions: Mapping[str, Function], estimates: Mapping[str, float], clock: Clock, seconds: float
) -> dict[str, Timing]:
    """Measures functions in rounds; in each round they take their turns.

    Args:
        functions: what to measure.
        estimates: for each of them what :func:`warm_up` returned.
        clock: of the device that they run on.
        seconds: time for each function. A fast one fills its share of a round with several calls,
            a slow one leaves out rounds, but takes part in three at least.
    """
    plan = {}
    for name, estimate in estimates.items():
        calls = max(1, min(MAX_CALLS, int(seconds / ROUNDS / estimate)))
        rounds = seconds / (calls * estimate)
        stride = next((s for s in STRIDES if ROUNDS // s <= rounds), STRIDES[-1])
        plan[name] = calls, stride
    for function in functions.values():  # in turn, too, they find their memory from now on
        function()
    timings = {name: Timing() for name in functions}
    for current in range(ROUNDS):
        for name, function in functions.items():
            calls, stride = plan[name]
            if current % stride == 0:
                timing, faults_before = timings[name], page_faults()
                timing.rounds.append(clock(function, calls))
                timing.page_faults.append((page_faults() - faults_before) / calls)
    return timings


def count_flops(function: Function) -> int:
    """Floating-point operations of a call, as PyTorch counts them.

    Convolutions, matrix products and CARAFE count; interpolation and elementwise work do not.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Yardstick:
    """What a device can do: a rate that others are held against."""

    name: str
    function: Function
    moved_bytes: int
    flops: int


def yardsticks(device: torch.device, quick: bool = False) -> list[Yardstick]:
    """A large copy for the bandwidth, a large matrix product for the arithmetic, in float32.

    Args:
        quick: small ones, which say nothing of the device.
    """
    on_gpu = device.type == "cuda"
    numbers = 2**20 if quick else 2**28 if on_gpu else 2**26
    side = 128 if quick else 8192 if on_gpu else 1024
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(side, side, device=device)
    return [
        Yardstick("copy", lambda: target.copy_(source), source.nbytes + target.nbytes, 0),
        Yardstick("matmul", lambda: matrix @ matrix, 3 * matrix.nbytes, 2 * side**3),
    ]
