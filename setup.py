"""Builds carafe_d2 and its compiled operator: `pip install -e . --no-build-isolation`.

The operator is one shared library on LibTorch's stable ABI: it links no libpython and takes the
CUDA runtime statically, so the same file loads under any Python and any PyTorch from 2.10 on, with
CUDA or without. (torch.utils.cpp_extension ties a library to one PyTorch and its CUDA, and knows
no flags for single files.) Wheels are tagged accordingly: py3-none and the platform. The library
contains how it was built, as JSON, for `python -m carafe_d2.collect_env`.

Environment variables:
    CARAFE_D2_CUDA        0 builds for the CPU only, 1 insists on CUDA. Default: CUDA if there is
                          an nvcc.
    CUDA_HOME             The CUDA toolkit to use. Default: nvcc on the PATH, /usr/local/cuda, or
                          the toolkit that pip installs (nvidia-cuda-nvcc).
    TORCH_CUDA_ARCH_LIST  GPUs to build for, such as "8.0;9.0+PTX". Default: the GPUs of this
                          machine, or without one every architecture from 7.5 to 12.0, and PTX.
    CXX                   The C++ compiler. Default: g++.
    CXXFLAGS, LDFLAGS     Further flags for compiling C++ and for linking, e.g. for sanitizers.
    MAX_JOBS              How many files are compiled at a time. Default: one per processor.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH = Path(torch.__file__).parent
CXX = shlex.split(os.environ.get("CXX", "g++"))
TORCH_TARGET = (2, 10)  # the first PyTorch whose stable ABI has what we need
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads 2 -Xptxas -v"
DEFAULT_ARCHS = ("75", "80", "90", "100", "120")  # 8.6 and 8.9 run the code of 8.0
SHARED_PTX = ("80", "100")  # of the two compilers that nvcc 13 has; csrc/ asks for no newer one
CPU_FLAGS = {  # instruction sets that are chosen at run time, by source file
    "kernels_avx2.cpp": "-mavx2 -mfma -mf16c",
    "kernels_avx512.cpp": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl "
    "-mprefer-vector-width=512",
}
BUILD_INFO_SOURCE = """\
// Found in the library by this beginning, whether or not it can be loaded.
__attribute__((used)) static const char build_info[] =
    R"json(carafe_d2 build info: %s)json";
"""


# ------------------------------------------------------------------------------------------ CUDA


def find_nvcc() -> str | None:
    """Path of the CUDA compiler, or None where there is none or CARAFE_D2_CUDA=0."""
    choice = os.environ.get("CARAFE_D2_CUDA", "")
    if choice == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc"), Path("/opt/cuda/bin/nvcc")]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else []:
        candidates += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    if choice == "1":
        raise SystemExit("CARAFE_D2_CUDA=1, but no nvcc found: set CUDA_HOME to a CUDA toolkit")
    return None


def pip_toolkit_flags(nvcc: str) -> list[str]:
    """Headers and libraries of a toolkit that pip spread over several packages."""
    nvidia = Path(nvcc).parents[2]
    if nvidia.name != "nvidia":
        return []
    includes = [f"-I{folder}" for folder in sorted(nvidia.glob("*/include"))]
    libraries = [f"-L{path.parent}" for path in sorted(nvidia.glob("*/lib/libcudart_static.a"))]
    return includes + libraries


def cuda_archs(nvcc: str) -> tuple[list[str], list[str]]:
    """Architectures to compile machine code and PTX for, such as (["80", "90"], ["90"])."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if requested:
        machine, ptx = [], []
        for name in re.split(r"[;,\s]+", requested.strip()):
            match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
            if match is None:
                raise SystemExit(
                    f"TORCH_CUDA_ARCH_LIST: expected a list such as '8.0;9.0+PTX', got {name!r}"
                )
            machine.append(match[1] + match[2])
            ptx += [match[1] + match[2]] if match[3] else []
        return machine, ptx
    known = re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"]))
    if torch.cuda.is_available():
        gpus = range(torch.cuda.device_count())
        here = sorted({torch.cuda.get_device_capability(index) for index in gpus})
        machine = [f"{major}{minor}" for major, minor in here]
        if all(arch in known for arch in machine):
            return machine, machine[-1:]
    ptx = [arch for arch in SHARED_PTX if arch in known]
    return [arch for arch in DEFAULT_ARCHS if arch in known], ptx[-1:]


def gencode_flags(machine: Iterable[str], ptx: Iterable[str]) -> list[str]:
    """nvcc's flags for the architectures that `cuda_archs` gives.

    Machine code is made of the newest PTX in `SHARED_PTX` that it can be made of: to compile for
    all architectures takes a fifth less.
    """

    def source(arch: str) -> str:
        shared = [ptx for ptx in SHARED_PTX if arch.isdigit() and int(ptx) <= int(arch)]
        return shared[-1] if shared else arch

    codes = [(source(arch), f"sm_{arch}") for arch in machine]
    codes += [(arch, f"compute_{arch}") for arch in ptx]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]


# ------------------------------------------------------------------------------------- compiling


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_command(source: Path, nvcc: str | None, codes: list[str]) -> list[str]:
    """How to compile a file, but for its name and that of the object file."""
    major, minor = TORCH_TARGET
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"
    common = ["-isystem", str(TORCH / "include"), target]
    if nvcc:
        common += ["-DCARAFE_D2_WITH_CUDA", "-DUSE_CUDA"]
    if source.suffix == ".cu":
        return [nvcc, *NVCC_FLAGS.split(), *common, *pip_toolkit_flags(nvcc), *codes]
    own = f"{os.environ.get('CXXFLAGS', '')} {CPU_FLAGS.get(source.name, '')}"
    return [*CXX, *CXX_FLAGS.split(), *common, *own.split()]


def link_command(nvcc: str | None, codes: list[str]) -> list[str]:
    """How to link, but for the names of the files and of the library."""
    # libtorch brings in libtorch_cuda where PyTorch has it: it must stay, needed or not.
    libraries = ["-Wl,--no-as-needed", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
    flags = [*libraries, *os.environ.get("LDFLAGS", "").split()]
    if nvcc is None:
        return [*CXX, "-shared", "-fPIC", *flags]
    flags = [flag.replace("-Wl,", "-Xlinker=") for flag in flags] + pip_toolkit_flags(nvcc)
    return [nvcc, "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", *codes, *flags]


def digest(files: Iterable[Path], text: str = "") -> str:
    """A hash of a text, and of the names and contents of files."""
    result = hashlib.sha256(text.encode())
    for file in sorted(filter(Path.is_file, files)):
        result.update(file.name.encode() + b"\0" + file.read_bytes())
    return result.hexdigest()


def sources_digest() -> str:
    """What the library is built from; tests/conftest.py compares it with the library's."""
    return digest([*ROOT.glob("csrc/**/*"), ROOT / "setup.py"])


def compile_file(source: Path, folder: Path, command: list[str]) -> Path:
    """Makes the object file, unless one of the same text and command is there; returns its path."""
    target = folder / f"{source.name}.o"
    key_file, log_file = Path(f"{target}.key"), Path(f"{target}.log")
    nearby = [*source.parent.glob("*.*"), *ROOT.glob("csrc/*.*")]
    headers = [file for file in nearby if file.suffix not in (".cpp", ".cu")]
    key = digest([source, *headers], f"{command}, {torch.__version__}")
    if target.is_file() and key_file.is_file() and key_file.read_text() == key:
        return target
    print(f"compile {source.name}", flush=True)
    key_file.unlink(missing_ok=True)
    run = subprocess.run([*command, "-c", source, "-o", target], stderr=subprocess.PIPE, text=True)
    log_file.write_text(run.stderr)  # tests/test_nvcc.py reads in it whether registers were spilled
    print(re.sub(r"(?m)^(ptxas info.*| +\d+ bytes stack.*|)\n", "", run.stderr), end="", flush=True)
    if run.returncode:
        raise SystemExit(f"carafe_d2: {source.name} did not compile; see the messages above")
    key_file.write_text(key)
    return target


# --------------------------------------------------------------------------------- for setuptools


class BuildOperator(build_ext):
    """Compiles the extension into a library whose name does not depend on Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        machine, ptx = cuda_archs(nvcc) if nvcc else ([], [])
        codes = gencode_flags(machine, ptx)
        info = self.build_info(nvcc, machine, ptx)
        if nvcc:
            target = f"CPU and CUDA {info['cuda']} ({', '.join(info['cuda_architectures'])})"
        else:
            forced = os.environ.get("CARAFE_D2_CUDA") == "0"
            target = f"CPU only: {'CARAFE_D2_CUDA=0' if forced else 'no nvcc found'}"
        print(f"carafe_d2: building for {target}", flush=True)

        # Not the folder for temporary files, which is a new one each time in an editable build.
        build = Path(self.get_finalized_command("build").build_base).resolve()
        folder = build / ("operator-cuda" if nvcc else "operator-cpu")
        folder.mkdir(parents=True, exist_ok=True)
        sources = [ROOT / name for name in ext.sources if nvcc or not name.endswith(".cu")]
        commands = [compile_command(source, nvcc, codes) for source in sources]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_file, sources, [folder] * len(sources), commands))
        info_file, operator = folder / "build_info.cpp", folder / "operator.so"
        info_file.write_text(BUILD_INFO_SOURCE % json.dumps(info))
        link = [*link_command(nvcc, codes), info_file, *objects, "-o", operator]
        if subprocess.run(link).returncode:
            raise SystemExit("carafe_d2: the operator did not link; see the messages above")
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(operator), str(library))

    def build_info(self, nvcc: str | None, machine: list[str], ptx: list[str]) -> dict:
        """What the library tells of itself; no paths, so that it is the same on every machine."""
        nvcc_version = output_of([nvcc, "--version"]) if nvcc else ""
        if shutil.which(CXX[0]) is None:
            raise SystemExit(f"carafe_d2: no C++ compiler {CXX[0]}: install one or set CXX")
        return {
            "version": self.distribution.get_version(),
            "sources": sources_digest(),
            "torch": torch.__version__,
            "oldest_torch": "{}.{}".format(*TORCH_TARGET),
            "compiler": output_of([*CXX, "--version"]).partition("\n")[0],
            "cxxflags": f"{CXX_FLAGS} {os.environ.get('CXXFLAGS', '')}".strip(),
            "ldflags": os.environ.get("LDFLAGS", ""),
            "cuda": nvcc and re.search(r"release ([\d.]+)", nvcc_version)[1],
            "cuda_architectures": [f"sm_{arch}" for arch in machine]
            + [f"compute_{arch} (PTX)" for arch in ptx],
        }


class BuildWheel(bdist_wheel):
    """Tags the wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources() -> list[str]:
    found = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]
    if platform.machine() not in ("x86_64", "AMD64"):
        found = [source for source in found if source.name not in CPU_FLAGS]
    # CUDA's first, which takes longest
    return sorted((str(source.relative_to(ROOT)) for source in found), reverse=True)


if __name__ == "__main__":
    setup(
        # The configs lie at the top of a checkout, and inside the package where it is installed.
        packages=[*find_packages(include=["carafe_d2*"]), "carafe_d2.configs"],
        package_dir={"carafe_d2.configs": "configs"},
        package_data={"carafe_d2": ["py.typed"], "carafe_d2.configs": ["*.yaml"]},
        ext_modules=[Extension("carafe_d2._C", sources())],
        cmdclass={"build_ext": BuildOperator, "bdist_wheel": BuildWheel},
    )
