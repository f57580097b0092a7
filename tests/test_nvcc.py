"""What nvcc makes of the CUDA kernels, for GPUs of every supported generation; needs no GPU.

Where `make` has just built the operator for all of them its compiler log and object files are
used, otherwise the kernels are compiled here, which takes minutes.
"""

import importlib.util
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from carafe_d2.collect_env import OLDEST_DRIVERS, build_info

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "operator-cuda"
ARCHS = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
SASS_ARCH = "sm_80"  # whose machine code is looked into

setup = runpy.run_path(str(ROOT / "setup.py"))
NVCC = setup["find_nvcc"]()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs nvcc"),
]


def find_tool(name: str) -> str:
    """Path of one of CUDA's tools; Triton, which PyTorch brings along, has some of them, too."""
    triton = importlib.util.find_spec("triton")
    candidates = [shutil.which(name), str(Path(NVCC).with_name(name))]
    if triton:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return candidate
    pytest.skip(f"needs {name}")


@dataclass(frozen=True)
class Compiled:
    logs: list[str]  # of `nvcc -Xptxas -v`
    objects: list[Path]  # which hold machine code for SASS_ARCH


def compiled_by_the_build() -> Compiled | None:
    """What setup.py left behind, unless it is out of date or for other GPUs."""
    library = BUILD / "operator.so"
    info = build_info(library) if library.is_file() else None
    if (
        info is None
        or info.get("sources") != setup["sources_digest"]()
        or not {*ARCHS} <= {*info["cuda_architectures"]}
    ):
        return None
    logs = [log.read_text() for log in BUILD.glob("*.cu.o.log")]
    return Compiled(logs, [*BUILD.glob("*.cu.o")])


def run_nvcc(source: Path, output: Path, *flags: str) -> str:
    """Compiles as setup.py does; returns nvcc's log."""
    command = [*setup["compile_command"](source, NVCC, []), *flags, source, "-o", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def compile_for(source: Path, arch: str, output: Path) -> str:
    return run_nvcc(
        source, output, *setup["gencode_flags"]([arch.removeprefix("sm_")], []), "-cubin"
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Compiled:
    if found := compiled_by_the_build():
        return found
    folder = tmp_path_factory.mktemp("nvcc")
    (source,) = ROOT.glob("csrc/cuda/*.cu")
    outputs = [folder / f"{arch}.cubin" for arch in ARCHS]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(compile_for, [source] * len(ARCHS), ARCHS, outputs))
    return Compiled(logs, [folder / f"{SASS_ARCH}.cubin"])


def demangled(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()


# ---------------------------------------------------------------------------------- resources


@dataclass(frozen=True)
class Resources:
    """What a kernel, or a function that it calls, takes on one architecture."""

    arch: str
    name: str  # mangled
    spilled_bytes: int  # written and read

    def __str__(self) -> str:
        return f"{self.arch}: {self.spilled_bytes} bytes spilled in {demangled(self.name)}"


def parse(log: str) -> Iterator[Resources]:
    """The functions in a log of ptxas; each follows the name of a kernel with its architecture."""
    arch = None
    for match in re.finditer(
        r"Compiling entry function '\S+' for '(?P<arch>\w+)'"
        r"|Function properties for (?P<name>\S+)\s+\d+ bytes stack frame, "
        r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads",
        log,
    ):
        if match["arch"]:
            arch = match["arch"]
        else:
            yield Resources(arch, match["name"], int(match["stores"]) + int(match["loads"]))


def test_no_kernel_spills_registers(compiled):
    functions = [function for log in compiled.logs for function in parse(log)]
    for arch in ARCHS:
        assert any("forward" in f.name for f in functions if f.arch == arch), arch
    spilling = [str(function) for function in functions if function.spilled_bytes]
    assert not spilling, "\n".join(spilling)


def test_spills_are_noticed(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) forward(float* x) {\n"
        "  float values[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) values[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[(95 - i) * 512 + threadIdx.x] = values[i];\n"
        "}\n"
    )
    log = compile_for(source, SASS_ARCH, tmp_path / "spilling.cubin")
    (function,) = parse(log)
    assert function.spilled_bytes > 0
    assert re.fullmatch(r"sm_80: \d+ bytes spilled in forward\(float\*\)", str(function))


# ------------------------------------------------------------------------------------ messages


def test_error_names_the_driver_that_is_needed(tmp_path):
    """Of a driver that is too old for the CUDA runtime; any driver or none is asked here."""
    source, program = tmp_path / "message.cu", tmp_path / "message"
    source.write_text(
        f'#include "{ROOT}/csrc/cuda/error.h"\n'
        "#include <cstdio>\n"
        "int main() {\n"
        "  std::puts(carafe_d2::error_message(cudaErrorInsufficientDriver).c_str());\n"
        "  std::puts(carafe_d2::error_message(cudaErrorInvalidValue).c_str());\n"
        "}\n"
    )
    run_nvcc(source, program, "-cudart", "static")
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    too_old, other = output.splitlines()
    message = re.fullmatch(
        r"the NVIDIA driver is too old: carafe_d2 was built with CUDA (\d+)\.\d, which needs "
        r"driver (\d+) or newer, and this one supports CUDA \d+\.\d",
        too_old,
    )
    assert int(message[2]) == OLDEST_DRIVERS[message[1]]
    assert other == "invalid argument"


# -------------------------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def machine_code(compiled) -> dict[str, str]:
    """SASS by the demangled name of the kernel."""
    cuobjdump = find_tool("cuobjdump")
    functions = {}
    for path in compiled.objects:
        command = [cuobjdump, "-sass", "-arch", SASS_ARCH, path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in listing.split("Function : ")[1:]:
            name, code = function.split("\n", 1)
            functions[demangled(name)] = code
    assert functions
    return functions


def test_no_kernel_uses_atomics(machine_code):
    """Sums in an order that changes from run to run would not be bitwise deterministic."""
    pattern = re.compile(r"\b(?:ATOM|ATOMG|ATOMS|RED)\.")
    assert not [name for name, code in machine_code.items() if pattern.search(code)]


# LD.E and ST.E, where LDG and STG are for global memory, LDS and STS for shared memory.
GENERIC = re.compile(r"\b(?:LD|ST)(?:\.\w+)* ")


def test_every_load_and_store_knows_its_memory(machine_code):
    """The others look at each address first, and wait for both global and shared memory."""
    assert not [name for name, code in machine_code.items() if GENERIC.search(code)]


def test_generic_loads_and_stores_are_noticed(tmp_path):
    source, output = tmp_path / "generic.cu", tmp_path / "generic.cubin"
    source.write_text('__global__ void generic(float* x) { asm("" : "+l"(x)); x[0] += 1; }\n')
    compile_for(source, SASS_ARCH, output)
    command = [find_tool("cuobjdump"), "-sass", output]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [found.split(".")[0] for found in GENERIC.findall(listing)] == ["LD", "ST"]


@pytest.mark.parametrize("kernel", ["forward", "backward_features", "backward_weights"])
def test_channels_last_float32_kernels_load_16_bytes_at_a_time(machine_code, kernel):
    """Of a contiguous map, a thread loads the value of its column; of this one, some channels."""
    other_types = re.compile(r"Half|BFloat16|double")
    candidates = {
        name: code
        for name, code in machine_code.items()
        if f"channels_last::{kernel}" in name and not other_types.search(name)
    }
    loads = re.compile(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*128\b")
    missing = [name for name, code in candidates.items() if not loads.search(code)]
    assert candidates
    assert not missing


@pytest.mark.parametrize(
    ("requested", "machine", "ptx"),
    [("8.0;9.0+PTX", ["sm_80", "sm_90"], ["sm_90"]), ("7.5 12.0", ["sm_75", "sm_120"], [])],
)
def test_holds_what_torch_cuda_arch_list_asks_for(requested, machine, ptx, tmp_path, monkeypatch):
    cuobjdump = find_tool("cuobjdump")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    source = tmp_path / "tiny.cu"
    source.write_text("__global__ void tiny(float* x) { *x = 1; }\n")
    output = tmp_path / "tiny.o"
    run_nvcc(source, output, *setup["gencode_flags"](*setup["cuda_archs"](NVCC)), "-c")

    def listed(option: str) -> list[str]:
        command = [cuobjdump, option, output]
        listing = subprocess.run(command, capture_output=True, text=True).stdout
        return sorted(re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", listing))

    assert listed("--list-elf") == sorted(machine)
    assert listed("--list-ptx") == ptx
