"""The emulator that runs CUDA kernels on the host, with the kernels of toy_kernels.cpp.

Correct ones have to compute what they should for every order of threads; each of the others breaks
a rule of CUDA's execution model, and the emulator has to say which.
"""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parent / "cuda_emulation" / "toy_kernels.cpp"
ORDERS = [0, 1, 7]  # forward, backward, shuffled


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The kernels: functions that raise what the emulator reports."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs g++, and a processor for which the emulator has fibers")
    library = tmp_path_factory.mktemp("toys") / "toys.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, "-shared", "-fPIC", SOURCE, "-o", library], check=True)
    return Toys(ctypes.CDLL(str(library)))


class Toys:
    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def __getattr__(self, name: str):
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p

        def call(*arguments):
            report = function(*map(pointer_or_value, arguments))
            if report is not None:
                raise RuntimeError(report.decode())

        return call


def pointer_or_value(argument):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument.encode() if isinstance(argument, str) else argument


# ------------------------------------------------------------------------------- correct kernels


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 8, 21])
def test_matrix_product_in_shared_memory(toys, n, order):
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(n))
    c = torch.full((n, n), torch.nan)
    toys.matrix_product(order, a, b, c, n)
    torch.testing.assert_close(c, a @ b)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_sums_by_shuffles_and_shared_memory(toys, threads, order):
    values = torch.arange(1000, dtype=torch.float64)
    sums = torch.full((-(-1000 // threads),), torch.nan, dtype=torch.float64)
    toys.block_sums(order, values, sums, 1000, threads)
    assert sums.tolist() == [part.sum().item() for part in values.split(threads)]


UNDEFINED = -1  # the value of a lane that does not exist; for floats, NaN


def shuffled(thread: int, threads: int, lane: int, width: int) -> list[int]:
    """What the four shuffles give a thread, after the CUDA programming guide."""
    warp, own = thread - thread % 32, thread % 32
    first, last = own - own % width, own - own % width + width - 1
    sources = [
        first + lane % width,
        own - lane if own - lane >= first else own,
        own + lane if own + lane <= last else own,
        own ^ lane if own ^ lane <= last else own,
    ]
    return [warp + s if warp + s < threads else UNDEFINED for s in sources]


@pytest.mark.parametrize("threads", [32, 64, 50, 5])
def test_shuffles(toys, threads):
    integers = torch.empty(threads, 4, dtype=torch.int64)
    floats = torch.empty(threads, 4)
    for order in ORDERS:
        for width in (1, 2, 4, 8, 16, 32):
            for lane in (0, 1, 3, 8, 17, 31, 45):
                expected = torch.tensor([shuffled(t, threads, lane, width) for t in range(threads)])
                toys.shuffle_integers(order, integers, threads, lane, width)
                assert torch.equal(integers, expected), (lane, width)
                toys.shuffle_floats(order, floats, threads, lane, width)
                assert torch.equal(floats.nan_to_num(UNDEFINED), expected.float()), (lane, width)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 40, 64])
def test_votes(toys, threads, order):
    for participants in (1, 20, 32):
        for bound in (0, 1, 7, 32):
            votes = torch.full((threads, 3), -1, dtype=torch.int32)
            toys.votes(order, votes, threads, participants, bound)
            for first in range(0, threads, 32):
                lanes = min(participants, threads - first)
                yes = min(lanes, bound)
                ballot = (1 << yes) - 1
                expected = [ballot - (ballot >> 31 << 32), int(yes > 0), int(yes == lanes)]
                assert votes[first : first + lanes].tolist() == [expected] * lanes


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_of_half_a_warp(toys, order):
    values = torch.empty(64, dtype=torch.int32)
    toys.half_warps(order, values)
    assert values.tolist() == [t // 16 * 16 + (t + 1) % 16 + 2 for t in range(64)]


@pytest.mark.parametrize("order", ORDERS)
def test_vectors_in_shared_memory(toys, order):
    values = torch.empty(32, dtype=torch.int32)
    toys.vectors(order, values)
    assert values.tolist() == [100 * (31 - t + 2) + 31 - t for t in range(32)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrix_product_on_tensor_cores(toys, dtype, order):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(16, 16, generator=generator).to(getattr(torch, dtype))
    columns_of_b = torch.randn(8, 16, generator=generator).to(a.dtype)
    for rows in (16, 11):
        product = torch.empty(16, 8)
        getattr(toys, f"tensor_cores_{dtype}")(order, a, columns_of_b, product, rows)
        expected = a.float() @ columns_of_b.float().T
        expected[rows:] = 0
        torch.testing.assert_close(product, expected)


def test_permuted_bytes(toys):
    a, b = torch.tensor([[0x03020100, 0x01234567], [0x07060504, 0x456789AB]], dtype=torch.int32)
    result = torch.empty_like(a)
    toys.bytes(0, a, b, result, 2)
    assert result.tolist() == [0x07060100, 0x45674567]


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_of_a_grid_of_three_dimensions_runs_once(toys, order):
    grid, block = (ctypes.c_uint * 3)(2, 3, 4), (ctypes.c_uint * 3)(5, 3, 2)
    runs = torch.zeros(24, 30, dtype=torch.int32)
    toys.indices(order, grid, block, runs)
    assert torch.equal(runs, torch.ones_like(runs))


def test_orders_of_threads(toys):
    turns = torch.empty(4, 6, 40, dtype=torch.int32)
    for order, result in enumerate(turns):
        toys.turns(order, result, 6, 40)
    forward, backward, *shuffled = (turn.flatten().tolist() for turn in turns)
    assert forward == list(range(240))
    assert backward == forward[::-1]
    assert shuffled[0] != shuffled[1]
    for turn in shuffled:
        assert turn not in (forward, backward)
        assert sorted(turn) == forward


# ----------------------------------------------------------------------------- broken kernels

REPORTS = {
    # Barriers, shuffles and votes
    "missed_barrier": r"wait for ever: threads 0-4, 6-63 at __syncthreads\(\) at toy_kernels.cpp:"
    r"\d+; thread 5 ended",
    "divergent_barriers": r"divergent barrier: threads 0-31 at __syncthreads\(\) at toy_kernels.cpp"
    r":(\d+); threads 32-63 at __syncthreads\(\) at toy_kernels.cpp:(?!\1)\d+$",
    "barrier_against_shuffle": r"wait for ever: threads 0-15 at __shfl_sync\(\) at toy_kernels.cpp:"
    r"\d+ with mask 0xffffffff; threads 16-63 at __syncthreads\(\) at toy_kernels.cpp:\d+$",
    "different_masks": r"wait for ever: thread 3 at __any_sync\(\) at toy_kernels.cpp:\d+ with "
    r"mask 0x0000000f; threads 0-2, 4-31 at __any_sync\(\) at .* with mask 0xffffffff; thread",
    "different_operations": r"wait for ever: .* at __all_sync\(\) .* at __any_sync\(\)",
    "dead_lane": r"wait for ever: threads 0-6, 8-31 at __shfl_xor_sync\(\) at toy_kernels.cpp:\d+ "
    r"with mask 0xffffffff; threads 7, 32-63 ended",
    "caller_not_in_mask": r"__ballot_sync\(\) at toy_kernels.cpp:\d+ with mask 0x0000ffff is "
    r"called by lane (16|31), which the mask lacks",
    "odd_width": r"__shfl_down_sync\(\) at toy_kernels.cpp:\d+ has width 12",
    # Shared memory
    "unwritten": r"thread \(9, 0, 0\): tile\[9\] is read before it was written",
    "copies_without_wait": r"tile\[\d+\] is read before it was written",
    "copies_too_early": r"data race on tile|tile\[\d+\] is read before it was written",
    "copies_without_barrier": r"tile\[\d+\] is read before it was written|data race on tile",
    "left_by_another_block": r"block \(1, 0, 0\), .* tile\[\d+\] is read before it was written",
    "read_after_write": r"data race on tile\[39\]: (reads what thread \(39, 0, 0\) wrote|"
    r"overwrites what thread \(40, 0, 0\) read), without a barrier in between",
    "write_after_read": r"data race on tile\[20\]: overwrites what thread \((0|21), 0, 0\) read",
    "write_after_reads_of_warps": r"data race on tile\[20\]: overwrites what several warps read",
    "two_writers": r"data race on tile\[\d+\]: overwrites what thread \(\d+, 0, 0\) wrote",
    "shuffle_for_barrier": r"data race on tile\[\d+\]: reads what thread \(\d+, 0, 0\) wrote",
    "warp_barrier_for_block": r"data race on tile\[\d+\]: reads what thread \(\d+, 0, 0\) wrote",
    "out_of_range": r"thread \(63, 0, 0\): tile\[64\] is out of range, it has 64 elements",
    "negative_index": r"thread \(0, 0, 0\): tile\[-1\] is out of range",
    "misaligned": r"tile\[\d+\.\.\d+\] is misaligned, as a vector of 4",
    "too_much_shared_memory": r"with second the block has 49168 bytes of shared memory",
}


@pytest.mark.parametrize("order", ORDERS[:2])
@pytest.mark.parametrize("kernel", REPORTS)
def test_reports(toys, kernel, order):
    with pytest.raises(RuntimeError, match=REPORTS[kernel]) as error:
        toys.mistake(kernel, order)
    assert str(error.value).startswith(f"toys::{kernel}, block (")
    toys.many_barriers(3, 64)  # the next launch is none the worse for it


@pytest.mark.parametrize(
    ("grid", "block", "problem"),
    [
        ((1, 1, 1), (1025, 1, 1), "a block of (1025, 1, 1)"),
        ((1, 1, 1), (64, 32, 1), "at most 1024 threads"),
        ((1, 1, 1), (1, 1, 65), "a block of (1, 1, 65)"),
        ((1, 65536, 1), (1, 1, 1), "a grid of (1, 65536, 1)"),
        ((0, 1, 1), (1, 1, 1), "a grid of (0, 1, 1)"),
    ],
)
def test_sizes_of_a_launch(toys, grid, block, problem):
    with pytest.raises(RuntimeError) as error:
        toys.indices(0, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), None)
    assert problem in str(error.value)


def test_stacks_are_used_again(toys):
    """Far more blocks than there could be stacks."""
    turns = torch.empty(5000, 64, dtype=torch.int32)
    toys.turns(0, turns, 5000, 64)
    assert torch.equal(turns.flatten(), torch.arange(320000, dtype=torch.int32))
