"""The translator of PTX, with small kernels in PTX of their own. It needs no nvcc."""

import ctypes
import math
import platform
import re
import runpy
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "cuda_emulation"
Translation = runpy.run_path(str(FOLDER / "ptx.py"))["Translation"]

# %rd1 is the address of the input, %rd2 that of the output, %r0 a number and %r1 the thread.
KERNEL = """
.visible .entry toy(
    .param .u64 toy_param_0,
    .param .u64 toy_param_1,
    .param .u32 toy_param_2
)
{{
    .reg .pred %p<4>;
    .reg .b32 %r<32>;
    .reg .f32 %f<8>;
    .reg .b64 %rd<8>;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %rd1, [toy_param_0];
    ld.param.u64 %rd2, [toy_param_1];
    ld.param.u32 %r0, [toy_param_2];
    mov.u32 %r1, %tid.x;
    {body}
    ret;
}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ptx")


@pytest.fixture(scope="module")
def launcher(folder) -> ctypes.CDLL:
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs g++, and a processor for which the emulator has fibers")
    library = folder / "launcher.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, FOLDER / "launch_ptx.cpp", "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.launch.restype = ctypes.c_char_p
    return loaded


class Toy:
    """A kernel of this body; a launch raises what is reported."""

    def __init__(self, launcher: ctypes.CDLL, body: str, folder: Path):
        self.launcher = launcher
        self.translation = Translation(KERNEL.format(body=body), folder)

    def __call__(self, source: Tensor, target: Tensor, number=0, order=0, threads=32) -> Tensor:
        memory = [
            pointer_or_size
            for tensor in (source, target)
            for pointer_or_size in (
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_size_t(tensor.nbytes),
            )
        ]
        kernel = ctypes.c_void_p(self.translation(b"toy"))
        report = self.launcher.launch(order, kernel, threads, *memory, number)
        if report is not None:
            raise RuntimeError(report.decode())
        return target


# ----------------------------------------------------------------------------- one instruction each

NAN, LARGEST, SMALLEST = "0f7FC00000", 2**31 - 1, -(2**31)


def f32(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def f64(value: float) -> str:
    return f"0d{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


# The type of what it gives, the instruction, its operands but for the first, and what it gives.
INSTRUCTIONS = [
    ("s32", "add.s32", f"{LARGEST}, 1", SMALLEST),
    ("s64", "sub.s64", f"{SMALLEST}, 1", SMALLEST - 1),
    ("s32", "mul.lo.s32", "65537, 65537", 131073),
    ("s32", "mul.hi.s32", "-3, 1073741824", -1),
    ("u32", "mul.hi.u32", "-1, -1", 2**32 - 2),
    ("s64", "mul.hi.s64", "-3, 4611686018427387904", -1),
    ("s64", "mul.wide.s32", "-3, 1073741824", -3 * 2**30),
    ("u32", "mul.wide.u16", "-1, 2", 2 * 65535),
    ("s32", "mad.lo.s32", "65536, 65536, 5", 5),
    ("s32", "div.s32", "-7, 2", -3),
    ("s32", "rem.s32", "-7, 2", -1),
    ("s32", "div.s32", f"{SMALLEST}, -1", SMALLEST),
    ("u32", "div.u32", "-1, 2", LARGEST),
    ("s32", "min.s32", "-1, 1", -1),
    ("u32", "min.u32", "-1, 1", 1),
    ("f32", "max.f32", f"{NAN}, {f32(1)}", 1),
    ("s32", "neg.s32", "5", -5),
    ("f32", "abs.f32", f32(-5), 5),
    ("f64", "fma.rn.f64", f"{f64(1 + 2**-40)}, {f64(1 - 2**-40)}, {f64(-1)}", -(2.0**-80)),
    ("f32", "fma.rn.f32", f"{f32(1)}, {f32(1)}, {f32(-(2**-30))}", 1),
    ("f32", "fma.rm.f32", f"{f32(1)}, {f32(1)}, {f32(-(2**-30))}", 1 - 2**-24),
    ("f32", "ex2.approx.ftz.f32", f32(3), 8),
    ("f32", "ex2.approx.ftz.f32", f32(-127), 0),
    ("f32", "rcp.approx.ftz.f32", f32(-4), -0.25),
    ("f32", "rcp.approx.ftz.f32", f32(2**-130), math.inf),
    ("f64", "rcp.rn.f64", f64(3), 1 / 3),
    ("b32", "shl.b32", "1, 32", 0),
    ("b64", "shl.b64", "1, 32", 2**32),
    ("s32", "shr.s32", "-8, 1", -4),
    ("s32", "shr.s32", "-8, 40", -1),
    ("u32", "shr.u32", "-8, 40", 0),
    ("u32", "bfe.u32", "0x12345678, 8, 12", 0x456),
    ("u32", "bfe.u32", "0x12345678, 8, 40", 0x123456),
    ("b32", "bfi.b32", "0xFF5, 0x12345678, 8, 4", 0x12345578),
    ("b32", "bfi.b32", "-1, 0, 28, 40", 0xF0000000),
    ("b32", "prmt.b32", "0x33221180, 0x77665544, 0x7518", 0x775511FF),
    ("b32", "and.b32", "12, 10", 8),
    ("b32", "or.b32", "12, 10", 14),
    ("b32", "xor.b32", "12, 10", 6),
    ("b32", "not.b32", "0", 2**32 - 1),
    ("s64", "cvt.s64.s32", "-1", -1),
    ("u64", "cvt.u64.u32", "-1", 2**32 - 1),
    ("s32", "cvt.s32.s8", "255", -1),
    ("f32", "cvt.rn.f32.s32", "16777217", 16777216),
    ("f32", "cvt.sat.f32.f32", f32(7), 1),
    ("f32", "cvt.sat.f32.f32", NAN, 0),
    ("b16", "cvt.rn.f16.f32", f32(65519), 0x7BFF),
    ("b16", "cvt.rn.bf16.f32", f32(1 + 2**-8), 0x3F80),
    ("b32", "cvt.rn.f16x2.f32", f"{f32(1)}, {f32(2)}", 0x3C004000),
    ("b32", "cvt.rn.bf16x2.f32", f"{f32(1 + 2**-8)}, {f32(-2)}", 0x3F80C000),
    ("pred", "setp.lt.s32", "-1, 1", True),
    ("pred", "setp.lt.u32", "-1, 1", False),
    ("pred", "setp.ge.f32", f"{NAN}, {NAN}", False),
    ("pred", "setp.geu.f32", f"{NAN}, {NAN}", True),
    ("pred", "setp.ne.f32", f"{NAN}, {NAN}", False),
    ("pred", "setp.neu.f32", f"{NAN}, {NAN}", True),
    ("pred", "setp.ltu.f32", f"{f32(2)}, {f32(1)}", False),
]
FORMATS = {"pred": "?", "b16": "H", "b32": "I", "u32": "I", "s32": "i", "b64": "Q", "u64": "Q"}
FORMATS |= {"s64": "q", "f32": "f", "f64": "d"}


def test_instructions(launcher, folder):
    body = []
    for i, (type_, opcode, operands, _) in enumerate(INSTRUCTIONS):
        body += [f"{{ .reg .{type_} x;", f"{opcode} x, {operands};"]
        if type_ == "pred":
            body += [".reg .b16 y;", "selp.b16 y, 1, 0, x;", f"st.global.u16 [%rd2+{8 * i}], y; }}"]
        else:
            body += [f"st.global.{type_} [%rd2+{8 * i}], x; }}"]
    results = torch.zeros(len(INSTRUCTIONS), dtype=torch.int64)
    Toy(launcher, "\n".join(body), folder)(torch.zeros(1), results)
    for (type_, *instruction, expected), bits in zip(INSTRUCTIONS, results.tolist(), strict=True):
        (result,) = struct.unpack_from("<" + FORMATS[type_], struct.pack("<q", bits))
        assert result == expected, instruction


def test_registers_of_parts_and_predicates(launcher, folder):
    body = """
        mov.b64 %rd3, {%r0, %r1};
        mov.b64 {_, %r2}, %rd3;
        setp.eq.u32 %p1, %r2, 5;
        @%p1 mov.b32 %r2, 100;
        @!%p1 add.s32 %r2, %r2, %r0;
        mul.wide.u32 %rd4, %r1, 4;
        add.s64 %rd5, %rd2, %rd4;
        setp.gt.u32 %p2, %r1, 9;
        @%p2 bra $end;
        st.global.u32 [%rd5], %r2;
        $end:
    """
    result = Toy(launcher, body, folder)(torch.zeros(1), torch.zeros(12).int(), number=7)
    assert result.tolist() == [7, 8, 9, 10, 11, 100, 13, 14, 15, 16, 0, 0]


# ------------------------------------------------------------------------------------------- warps

MATRIX_PRODUCT = """
    // A, 16 x 16 with zeros below so many rows, and columns of B to shared memory
    shl.b32 %r2, %r1, 4;
    cvt.u64.u32 %rd3, %r2;
    add.s64 %rd3, %rd1, %rd3;
    mov.u32 %r3, tile;
    add.s32 %r4, %r3, %r2;
    shr.u32 %r5, %r1, 1;
    setp.lt.u32 %p1, %r5, %r0;
    selp.b32 %r5, 16, 0, %p1;
    cp.async.ca.shared.global [%r4], [%rd3], 16, %r5;
    shl.b32 %r2, %r1, 3;
    cvt.u64.u32 %rd3, %r2;
    add.s64 %rd3, %rd1, %rd3;
    add.s32 %r4, %r3, %r2;
    mov.b32 %r5, 8;
    cp.async.ca.shared.global [%r4+512], [%rd3+512], 8, %r5;
    cp.async.wait_all;
    bar.warp.sync -1;
    // Words lane % 4, and 4 beyond, of rows lane / 4, and 8 below
    shr.u32 %r6, %r1, 2;
    and.b32 %r7, %r1, 3;
    mad.lo.s32 %r8, %r6, 8, %r7;
    mad.lo.s32 %r8, %r8, 4, %r3;
    ld.shared.u32 %r10, [%r8];
    ld.shared.u32 %r11, [%r8+256];
    ld.shared.u32 %r12, [%r8+16];
    ld.shared.u32 %r13, [%r8+272];
    ld.shared.u32 %r14, [%r8+512];
    ld.shared.u32 %r15, [%r8+528];
    mov.f32 %f0, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {%f1, %f2, %f3, %f4},
        {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f0, %f0, %f0, %f0};
    shl.b32 %r9, %r1, 3;
    cvt.u64.u32 %rd4, %r9;
    add.s64 %rd4, %rd2, %rd4;
    st.global.v2.f32 [%rd4], {%f1, %f2};
    st.global.v2.f32 [%rd4+256], {%f3, %f4};
"""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_product_of_a_warp(launcher, dtype, folder):
    a, b = torch.randn(384, generator=torch.Generator().manual_seed(0)).to(dtype).split([256, 128])
    body = MATRIX_PRODUCT.replace("TYPE", "f16" if dtype == torch.float16 else "bf16")
    toy = Toy(launcher, body, folder)
    expected = 1 + a.view(16, 16).float() @ b.view(8, 16).float().T
    expected[11:] = 1
    for order in (0, 1, 7):
        result = toy(torch.cat([a, b]), torch.full((16, 8), torch.nan), number=11, order=order)
        torch.testing.assert_close(result, expected)


def test_votes(launcher, folder):
    """Of all lanes, and of the first four."""
    body = """
        setp.eq.u32 %p1, %r1, %r0;
        vote.sync.any.pred %p2, %p1, -1;
        selp.u32 %r2, 1, 0, %p2;
        setp.gt.u32 %p2, %r1, 3;
        @%p2 bra $end;
        vote.sync.any.pred %p2, %p1, 15;
        @%p2 add.u32 %r2, %r2, 2;
        $end:
        mul.wide.u32 %rd3, %r1, 4;
        add.s64 %rd3, %rd3, %rd2;
        st.global.u32 [%rd3], %r2;
    """
    toy = Toy(launcher, body, folder)
    for lane, of_four, of_all in ((2, 2, 1), (31, 0, 1), (32, 0, 0)):
        result = toy(torch.zeros(1), torch.full((32,), -1).int(), number=lane)
        assert result.tolist() == [of_all + of_four] * 4 + [of_all] * 28


def shuffled(mode: str, lane: int, b: int, c: int) -> int:
    """The lane that is read, or -1 where that is none of the segment: PTX ISA, shfl.sync."""
    segment = c >> 8
    first, limit = lane & segment, (lane & segment) | (c & 31 & ~segment)
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b}.get(mode, first | (b & ~segment))
    return source if (source >= limit if mode == "up" else source <= limit) else -1


def test_shuffles(launcher, folder):
    """The second register says whether the lane is one of the segment."""
    cases = [
        (mode, b, c)
        for mode in ("up", "down", "bfly", "idx")
        for b, c in ((1, 0), (1, 31), (3, 16 << 8 | 31), (3, 16 << 8), (5, 24 << 8 | 31), (17, 31))
    ]
    body = ["mul.wide.u32 %rd3, %r1, 4;", "add.s64 %rd3, %rd3, %rd2;"]
    for i, (mode, b, c) in enumerate(cases):
        body += [
            f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1;",
            "@!%p1 mov.b32 %r2, -1;",
            f"st.global.u32 [%rd3+{128 * i}], %r2;",
        ]
    results = torch.zeros(len(cases), 32, dtype=torch.int32)
    Toy(launcher, "\n".join(body), folder)(torch.zeros(1), results)
    for (mode, b, c), result in zip(cases, results.tolist(), strict=True):
        assert result == [shuffled(mode, lane, b, c) for lane in range(32)], (mode, b, c)


# -------------------------------------------------------------------------------- what is noticed

# Bodies, and what is reported; input and output have 256 bytes.
MISTAKES = {
    "before": (
        "ld.global.u32 %r2, [%rd1+-4];",
        "4-byte load from global memory at ptx:%d is out of range, at byte -4 of input",
    ),
    "beyond": (
        "st.global.v2.u32 [%rd2+256], {%r0, %r0};",
        "8-byte store to global memory at ptx:%d is out of range, at byte 256 of output, which "
        "has 256",
    ),
    "misaligned": (
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%rd1+8];",
        "16-byte load from global memory at ptx:%d is misaligned",
    ),
    "input": (
        "st.global.u32 [%rd1], %r0;",
        "4-byte store to global memory at ptx:%d overwrites input",
    ),
    "misaligned shared": (
        "ld.shared.u32 %r2, [tile+1022];",
        "4-byte load from shared memory at ptx:%d is misaligned",
    ),
    "shared beyond": ("st.shared.u32 [tile+1024], %r0;", "shared memory[256] is out of range"),
    "unwritten": ("ld.shared.u32 %r2, [tile+4];", "shared memory[1] is read before it was written"),
    "race": ("st.shared.u32 [tile], %r0;", "data race on shared memory[0]: overwrites what thread"),
    "copy beyond": (
        "cp.async.ca.shared.global [tile], [%rd1+-16], 16, 4;",
        "4-byte asynchronous copy at ptx:%d is out of range, at byte -16 of input",
    ),
    "misaligned copy": (
        "cp.async.ca.shared.global [tile+8], [%rd1], 16, 0;",
        "16-byte asynchronous copy at ptx:%d is misaligned",
    ),
    "copy without waiting": (
        "cp.async.ca.shared.global [tile], [%rd1], 4, 4; bar.sync 0; ld.shared.u32 %r2, [tile];",
        "shared memory[0] is read before it was written",
    ),
    "copy without a barrier": (
        """
        setp.ne.u32 %p2, %r1, 3;
        @%p2 bra $other;
        cp.async.ca.shared.global [tile], [%rd1], 4, 4;
        cp.async.wait_all;
        $other:
        shfl.sync.idx.b32 %r2|%p2, %r2, 3, 31, -1;
        ld.shared.u32 %r2, [tile];
        """,
        "data race on shared memory[0]: reads what thread (3, 0, 0) wrote",
    ),
    "not in the mask": (
        "shfl.sync.idx.b32 %r2|%p2, %r2, 3, 31, 1;",
        "shfl.sync at ptx:%d with mask 0x00000001 is called by lane ",
    ),
    "division": ("sub.s32 %r2, %r1, %r1; div.s32 %r2, %r1, %r2;", "division by zero"),
}


@pytest.fixture(scope="module")
def mistakes(launcher, folder) -> Toy:
    """Makes the mistake of the number that it is launched with."""
    body = [
        f"setp.ne.u32 %p1, %r0, {i}; @%p1 bra $next{i}; {code} $next{i}:"
        for i, (code, _) in enumerate(MISTAKES.values())
    ]
    return Toy(launcher, "\n".join(body), folder)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistakes, mistake, order):
    number = list(MISTAKES).index(mistake)
    report = re.escape(MISTAKES[mistake][1]).replace("%d", r"\d+")
    memory = torch.zeros(2, 64, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=report) as error:
        mistakes(memory[0], memory[1], number, order)
    assert str(error.value).startswith("toy, block (0, 0, 0), thread (")


@pytest.mark.parametrize(
    "instruction", ["ld.u32 %r2, [%rd1];", "st.u32 [%rd2], %r0;", "brev.b32 %r2, %r0;"]
)
def test_what_it_does_not_know_is_an_error(instruction, folder):
    """Loads and stores that leave the space of memory open are among that."""
    translation = Translation(KERNEL.format(body=instruction), folder)
    with pytest.raises(ValueError, match=f"no instruction {instruction.split()[0]}"):
        translation(b"toy")
