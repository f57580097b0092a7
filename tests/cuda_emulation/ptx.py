"""Runs the PTX that nvcc makes of the CUDA kernels, on the emulator's threads.

PTX becomes C++: a kernel is a function, a register a variable and an instruction a statement, after
one line of the tables below. What they lack is an error, loads and stores that do not say their
space of memory included. `ptx.h` has what C++ does not; it checks every access to global memory.
"""

import ctypes
import functools
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent

# How PTX calls its types: registers and operands of that many bits.
TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "address": "uint64_t",
    **{"f16": "f16", "bf16": "bf16", "f32": "float", "f64": "double"},
}

SPECIAL_REGISTERS = {
    "tid": "threadIdx",
    "ntid": "blockDim",
    "ctaid": "blockIdx",
    "nctaid": "gridDim",
}

# Words of the opcodes below that stand for the types which an instruction takes. Expressions have
# the type under the name T or U.
CLASSES = {
    "T": "{T=pred|[bsu](8|16|32|64)|b?f16|f32|f64}",
    "U": "{U=[bsu](8|16|32|64)|b?f16|f32|f64}",
    "N": "{T=[su](16|32|64)|f32|f64}",
    "I": "{T=[su](16|32|64)}",
    "F": "{T=f32|f64}",
    "B": "{T=pred|b16|b32|b64}",
}

# Instructions that put a value into a register, or into several. In an opcode, {name=choices} gives
# a word a name, and one with ? behind it may be missing. In an expression, a, b, c are the operands
# after the registers: {a:f32} is one as a type, {a:[f32]} several in braces, {a:[]} an address, and
# {at} is the place in the PTX.
VALUES = {
    # Moves
    "mov.T": "{a:T}",
    "cvta.to?.(global|shared|local).T": "{a:T}",  # addresses are the same in every space
    "cvt.sat.f32.f32": "saturated({a:f32})",
    "cvt.rn?.U.T": "convert<{U}>({a:T})",
    "cvt.rn.{U=b?f16}x2.f32": "packed(convert<{U}>({b:f32}), convert<{U}>({a:f32}))",
    "selp.T": "{c:pred} ? {a:T} : {b:T}",
    "prmt.b32": "cuda_emulation::permuted_bytes({a:b32}, {b:b32}, {c:b32})",
    # Arithmetic
    "add.rn?.N": "{T}({a:T} + {b:T})",
    "sub.rn?.N": "{T}({a:T} - {b:T})",
    "mul.rn?.F": "{a:T} * {b:T}",
    "mul.lo.I": "{T}({a:T} * {b:T})",
    "mul.hi.I": "{T}(wide({a:T}) * {b:T} >> 8 * sizeof({T}))",
    "mul.wide.I": "wide({a:T}) * {b:T}",
    "mad.lo.I": "{T}({a:T} * {b:T} + {c:T})",
    "div.I": "divided({a:T}, {b:T})",
    "rem.I": "{T}({a:T} - divided({a:T}, {b:T}) * {b:T})",
    "{f=min|max}.I": "std::{f}({a:T}, {b:T})",
    "{f=min|max}.F": "std::f{f}({a:T}, {b:T})",
    "neg.N": "{T}(-{a:T})",
    "abs.F": "std::fabs({a:T})",
    "fma.rn.F": "std::fma({a:T}, {b:T}, {c:T})",
    "fma.rm.F": "fma_rounded_down({a:T}, {b:T}, {c:T})",
    "ex2.approx.ftz.f32": "flushed(std::exp2(flushed({a:f32})))",
    "rcp.rn.F": "1 / {a:T}",
    "rcp.approx.ftz.f32": "flushed(1 / flushed({a:f32}))",
    # Bits
    "and.B": "{T}({a:T} & {b:T})",
    "or.B": "{T}({a:T} | {b:T})",
    "xor.B": "{T}({a:T} ^ {b:T})",
    "not.pred": "!{a:pred}",
    "not.B": "{T}(~{a:T})",
    "shl.T": "left({a:T}, {b:u32})",
    "shr.T": "right({a:T}, {b:u32})",
    "bfe.{T=u32|u64}": "bit_field({a:T}, {b:u32}, {c:u32})",
    "bfi.b32": "with_bits({a:b32}, {b:b32}, {c:u32}, {d:u32})",
    # Comparisons; a u behind them means: or one of the two is NaN
    "setp.eq.T": "{a:T} == {b:T}",
    "setp.ne.F": "{a:T} < {b:T} || {a:T} > {b:T}",
    "setp.(ne|neu).T": "{a:T} != {b:T}",
    "setp.lt.N": "{a:T} < {b:T}",
    "setp.le.N": "{a:T} <= {b:T}",
    "setp.gt.N": "{a:T} > {b:T}",
    "setp.ge.N": "{a:T} >= {b:T}",
    "setp.ltu.F": "!({a:T} >= {b:T})",
    "setp.leu.F": "!({a:T} > {b:T})",
    "setp.gtu.F": "!({a:T} <= {b:T})",
    "setp.geu.F": "!({a:T} < {b:T})",
    # Memory and warps
    "ld.shared.v{n=2|4}?.T": "shared.load<{T}, {n}>({a:[]}, {at})",
    "ld.{space=param|global|local}.nc?.v{n=2|4}?.T": "load_{space}<{T}, {n}>({a:[]}, {at})",
    "shfl.sync.{mode=up|down|bfly|idx}.b32": "shuffled(Shuffle::{mode}, {a:b32}, "
    "{b:b32}, {c:b32}, {d:b32}, {at})",
    "vote.sync.any.pred": 'cuda_emulation::vote("vote.sync", {at}, {b:b32}, {a:pred}) != 0',
    "mma.sync.aligned.m16n8k16.row.col.f32.{T=b?f16}.{T}.f32": "multiply_add<{T}>({a:[b32]}, "
    "{b:[b32]}, {c:[f32]}, {at})",
}

# The others; here a is the first operand.
EFFECTS = {
    "st.shared.v{n=2|4}?.T": "shared.store<{T}, {n}>({a:[]}, {b:[T]}, {at})",
    "st.{space=global|local}.v{n=2|4}?.T": "store_{space}<{T}, {n}>({a:[]}, {b:[T]}, {at})",
    "cp.async.ca.shared.global": "shared.copy<{c:u32}>({a:[]}, {b:[]}, {d:u32}, {at})",
    "cp.async.wait_all": "Block::current().wait_for_copies()",
    "bar.sync": "synchronize<{a:u32}>({at})",
    "bar.warp.sync": "synchronize_warp({a:b32}, {at})",
    "bra.uni?": "goto {a:label}",
    "ret": "return",
}

SOURCE = """#include "ptx.h"

namespace ptx {{
extern "C" void kernel([[maybe_unused]] void* const* parameters) {{
  [[maybe_unused]] const Shared shared({shared_bytes}, {element});
  {statements}
}}
}}  // namespace ptx
"""


@functools.cache
def find_instruction(opcode: str) -> tuple[str, dict[str, str], bool]:
    """Its C++, the names that it gave to words, and whether it gives a value."""
    for table in (VALUES, EFFECTS):
        for line, code in table.items():
            pattern = ""
            for word in line.split("."):
                choices = CLASSES.get(word.rstrip("?"), word.rstrip("?"))
                choices = re.sub(r"\{(\w+)=(.+)\}", r"(?P<\1>\2)", choices)
                choices = re.sub(r"\{(\w+)\}", r"(?P=\1)", choices)
                pattern += rf"(\.{choices}){'?' * word.endswith('?')}"
            if match := re.fullmatch(pattern, f".{opcode}"):
                return code, match.groupdict("1"), table is VALUES
    raise ValueError(f"no instruction {opcode} in ptx.py")


def parts_of(text: str, separator: str = ",") -> list[str]:
    """Operands, or the registers in one; a comma in braces or brackets separates no operands."""
    parts = re.findall(rf"(?:\{{[^}}]*\}}|\[[^]]*\]|[^{separator}{{[])+", text)
    return [part.strip() for part in parts]


def registers_of(operand: str) -> list[str]:
    """Of `{a, b}`, of `value|predicate` or of one register."""
    return parts_of(operand.strip("{}"), ",|")


def variable(name: str) -> str:
    """In C++, a register, label or array."""
    if not re.fullmatch(r"[%$]?[A-Za-z_]\w*", name):
        raise ValueError(f"{name} is no name")
    return "r_" + name.strip("%$")


class Operand:
    """Formats itself as the tables want it."""

    def __init__(self, text: str, kernel: "Kernel", types: dict[str, str]):
        self.text, self.kernel, self.types = text, kernel, types

    def __format__(self, wanted: str) -> str:
        if wanted == "label":
            return variable(self.text)
        if wanted == "[]":
            base, offset = re.fullmatch(r"\[([%\w]+)(?:\+(-?\d+))?\]", self.text).groups("0")
            return f"{self.value(base, 'address')} + {offset}ll"
        type_ = wanted.strip("[]")
        type_ = self.types.get(type_, type_)
        if wanted.startswith("["):
            values = [self.value(part, type_) for part in registers_of(self.text)]
            return f"{{{', '.join(values)}}}"
        if self.text.startswith("{"):
            parts = registers_of(self.text)
            part_type = f"b{int(type_[1:]) // len(parts)}"
            return f"packed({', '.join(self.value(part, part_type) for part in parts)})"
        return self.value(self.text, type_)

    def value(self, text: str, type_: str) -> str:
        cpp = TYPES[type_]
        if match := re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", text):
            return f"{cpp}({SPECIAL_REGISTERS[match[1]]}.{match[2]})"
        if match := re.fullmatch(r"0[fd]([0-9a-f]+)", text, re.IGNORECASE):
            return f"as<{cpp}>(uint{4 * len(match[1])}_t(0x{match[1]}))"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            return f"{cpp}({text}ll)"
        if text in self.kernel.addresses:
            return f"{cpp}({self.kernel.addresses[text]})"
        return (
            variable(text) if self.kernel.types.get(text) == cpp else f"as<{cpp}>({variable(text)})"
        )


class Kernel:
    """A kernel of a PTX file, and the function in C++ that it becomes."""

    def __init__(self, name: str, parameters: str, body: str, line: int):
        self.name = name
        self.types = {}  # of registers, in C++
        self.shared_bytes = 0  # so far
        # In C++, by the names of parameters and arrays; shared memory begins at 0.
        self.addresses = {
            parameter: f"reinterpret_cast<uint64_t>(parameters[{i}])"
            for i, parameter in enumerate(re.findall(r"\w+_param_\d+", parameters))
        }
        statements = "\n".join(self.translate(body, line))
        shared_bits = [int(bits) for bits in re.findall(r"\.shared(?:\.v\d)?\.[a-z](\d+)", body)]
        self.source = SOURCE.format(
            statements=statements,
            shared_bytes=self.shared_bytes,
            element=min(shared_bits, default=32) // 8,
        )

    def translate(self, body: str, line: int) -> Iterator[str]:
        for match in re.finditer(r"([{}])|([$\w]+):(?!:)|(\S[^;]*);", body):
            brace, label, code = match.groups()
            if not code:
                yield brace or f"{variable(label)}:;"
                continue
            place = line + body.count("\n", 0, match.start())
            try:
                yield self.declaration(code) if code[0] == "." else self.statement(code, place)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{self.name}, ptx:{place}: {code}: {error}") from error

    def declaration(self, code: str) -> str:
        if code.startswith(".pragma"):
            return ""
        if match := re.fullmatch(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?", code):
            type_, name, count = match.groups()
            names = [f"{name}{i}" for i in range(int(count))] if count else [name]
            self.types |= dict.fromkeys(names, TYPES[type_])
            return f"{TYPES[type_]} {', '.join(map(variable, names))};"
        space, alignment, name, size = re.fullmatch(
            r"\.(shared|local) \.align (\d+) \.b8\s+(\w+)\[(\d+)\]", code
        ).groups()
        if space == "local":
            self.addresses[name] = f"reinterpret_cast<uint64_t>({variable(name)})"
            return f"alignas({alignment}) unsigned char {variable(name)}[{size}];"
        begin = -(-self.shared_bytes // int(alignment)) * int(alignment)
        self.addresses[name] = str(begin)
        self.shared_bytes = begin + int(size)
        return ""

    def statement(self, code: str, place: int) -> str:
        inverse, predicate, opcode, rest = re.fullmatch(
            r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)", code, re.DOTALL
        ).groups()
        expression, names, has_value = find_instruction(opcode)
        operands = parts_of(rest)
        target = operands.pop(0) if has_value else ""
        operands = [Operand(text, self, names) for text in operands]
        result = expression.format(
            **{name: TYPES.get(word, word) for name, word in names.items()},
            **dict(zip("abcd", operands, strict=False)),
            at=f'{{"ptx", {place}}}',
        )
        if has_value:
            result = self.put(registers_of(target), result)
        return f"if ({inverse}{variable(predicate)}) {{ {result}; }}" if predicate else f"{result};"

    def put(self, registers: list[str], value: str) -> str:
        """Puts a value into a register, or several into as many."""
        if len(registers) == 1:
            return f"{variable(registers[0])} = as<{self.types[registers[0]]}>({value})"
        puts = "; ".join(
            self.put([register], f"std::get<{i}>(values)")
            for i, register in enumerate(registers)
            if register != "_"
        )
        return f"{{ const auto values = parts<{len(registers)}>({value}); {puts}; }}"


class Translation:
    """The kernels of a PTX file, each translated and compiled when it is first asked for."""

    # To compile a kernel takes longer than to run it, so it is not optimized.
    FLAGS = ["-std=c++17", "-O0", "-march=native", "-ffp-contract=off", "-fwrapv", "-w"]

    def __init__(self, ptx: str, folder: Path):
        self.folder = folder
        self.libraries = {}
        self.texts = {}  # by name: parameters, body, line where that begins
        ptx = re.sub(r"//.*", "", ptx)
        for match in re.finditer(r"\.entry (\w+)\(([^)]*)\)[^{]*", ptx):
            body = ptx[match.end() : ptx.index("\n}\n", match.end()) + 2]
            self.texts[match[1]] = match[2], body, ptx.count("\n", 0, match.end()) + 1

    def __call__(self, name: bytes) -> int:
        """Address of the compiled kernel, a `ptx::Kernel`."""
        if name not in self.libraries:
            source = Kernel(name.decode(), *self.texts[name.decode()]).source
            precompiled = self.folder / "ptx.h.gch"
            if not precompiled.exists():
                self.compile(HERE / "ptx.h", precompiled)
            # Another translation may have compiled the same: most of a PTX file with a fault.
            file = self.folder / f"{hashlib.sha256(source.encode()).hexdigest()}.cpp"
            library = file.with_suffix(".so")
            if not library.exists():
                file.write_text(source)
                self.compile(file, library)
            self.libraries[name] = ctypes.CDLL(str(library))
        return ctypes.cast(self.libraries[name].kernel, ctypes.c_void_p).value

    def compile(self, source: Path, target: Path) -> None:
        subprocess.run(
            ["g++", *self.FLAGS, "-shared", "-fPIC", f"-I{HERE}", source, "-o", target], check=True
        )
