"""Builds carafe_d2 and its compiled operator: `pip install -e . --no-build-isolation`.

The operator is one shared library on LibTorch's stable ABI: it links no libpython and takes the
CUDA runtime statically, so the same file loads under any Python and any PyTorch from 2.10 on, with
CUDA or without. Wheels are tagged accordingly: py3-none and the platform. The library contains how
it was built, as JSON, for `python -m carafe_d2.collect_env`.

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

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = (2, 10)  # the first PyTorch whose stable ABI has what we need
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
DEFAULT_ARCHS = ("75", "80", "86", "90", "100", "120")  # 8.9 runs the code of 8.6
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


def pip_toolkit_flags(nvcc: str) -> str:
    """Headers and libraries of a toolkit that pip spread over several packages."""
    nvidia = Path(nvcc).parents[2]
    if nvidia.name != "nvidia":
        return ""
    folders = sorted(nvidia.iterdir())
    includes = [f"-I{folder}/include" for folder in folders if (folder / "include").is_dir()]
    libraries = [
        f"-L{folder}/lib" for folder in folders if list(folder.glob("lib/libcudart_static.a"))
    ]
    return " ".join(includes + libraries)


def cuda_archs(nvcc: str) -> tuple[list[str], list[str]]:
    """Architectures to compile machine code and PTX for, such as (["80", "90"], ["90"])."""
    import torch

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
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = re.findall(r"compute_(\d+)", listed.stdout)
    if torch.cuda.is_available():
        capabilities = {
            torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())
        }
        here = [f"{major}{minor}" for major, minor in sorted(capabilities)]
        if all(arch in known for arch in here):
            return here, here[-1:]
    machine = [arch for arch in DEFAULT_ARCHS if arch in known]
    return machine, machine[-1:]


def output_of(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def write_if_changed(path: Path, text: str) -> None:
    """Leaves a file alone that is as it should be, so that ninja does not build it again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def ninja_file(sources: list[str], nvcc: str | None, machine: list[str], ptx: list[str]) -> str:
    """The build file that makes operator.so of the sources."""
    import torch

    torch_folder = Path(torch.__file__).parent
    includes = f"-isystem {torch_folder}/include"
    major, minor = TORCH_TARGET
    defines = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000ULL"
    if nvcc:
        defines += " -DCARAFE_D2_WITH_CUDA -DUSE_CUDA"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in machine]
    codes += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ptx]
    pip_flags = pip_toolkit_flags(nvcc) if nvcc else ""
    # libtorch brings in libtorch_cuda where PyTorch has it: it must stay, needed or not.
    link = f"-Wl,--no-as-needed -L{torch_folder}/lib -ltorch -ltorch_cpu "
    link += f"{os.environ.get('LDFLAGS', '')} {pip_flags}"
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"cxxflags = {CXX_FLAGS} {defines} {includes} {os.environ.get('CXXFLAGS', '')}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
        "  description = compile $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    if nvcc:
        lines += [
            f"nvcc = {nvcc}",
            f"nvccflags = {NVCC_FLAGS} --threads 2 "
            f"{defines} {includes} {pip_flags} {' '.join(codes)}",
            "rule nvcc",
            # tests/test_nvcc.py reads in the log whether registers were spilled
            "  command = $nvcc -MD -MF $out.d $nvccflags -Xptxas -v -c $in -o $out "
            "2> $out.log; "
            "status=$$?; grep -Ev '^ptxas info|^ +[0-9]+ bytes stack|^$$' $out.log; "
            "exit $$status",
            "  description = compile $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  description = link $out",
            f"  command = $nvcc -shared -cudart static {' '.join(codes)} $in -o $out "
            + link.replace("-Wl,", "-Xlinker "),
        ]
    else:
        lines += [
            "rule link",
            "  description = link $out",
            f"  command = $cxx -shared $in -o $out {link}",
        ]
    objects = ["build_info.o"]
    lines.append("build build_info.o: cxx build_info.cpp")
    for source in map(Path, sources):
        is_cuda = source.suffix == ".cu"
        if is_cuda and not nvcc:
            continue
        objects.append(f"{source.stem}{source.suffix}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if is_cuda else 'cxx'} {ROOT / source}")
        if source.name in CPU_FLAGS:
            lines.append(f"  flags = {CPU_FLAGS[source.name]}")
    lines.append(f"build operator.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildOperator(build_ext):
    """Compiles the extension with ninja, into a library whose name does not depend on Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        machine, ptx = cuda_archs(nvcc) if nvcc else ([], [])
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
        write_if_changed(folder / "build_info.cpp", BUILD_INFO_SOURCE % json.dumps(info))
        write_if_changed(folder / "build.ninja", ninja_file(ext.sources, nvcc, machine, ptx))
        if importlib.util.find_spec("ninja"):
            ninja = [sys.executable, "-m", "ninja"]
        elif shutil.which("ninja"):
            ninja = ["ninja"]
        else:
            raise SystemExit("carafe_d2: ninja is needed to build the operator: pip install ninja")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        if subprocess.run([*ninja, "-C", str(folder), "-j", jobs]).returncode:
            raise SystemExit("carafe_d2: the operator did not compile; see the messages above")

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(folder / "operator.so"), str(library))

    def build_info(self, nvcc: str | None, machine: list[str], ptx: list[str]) -> dict:
        """What the library tells of itself; no paths, so that it is the same on every machine."""
        import torch

        release = None
        if nvcc:
            release = re.search(r"release ([\d.]+)", output_of([nvcc, "--version"]))[1]
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(cxx[0]) is None:
            raise SystemExit(f"carafe_d2: no C++ compiler {cxx[0]}: install one or set CXX")
        return {
            "version": self.distribution.get_version(),
            "torch": torch.__version__,
            "oldest_torch": "{}.{}".format(*TORCH_TARGET),
            "compiler": output_of([*cxx, "--version"]).partition("\n")[0],
            "cxxflags": f"{CXX_FLAGS} {os.environ.get('CXXFLAGS', '')}".strip(),
            "ldflags": os.environ.get("LDFLAGS", ""),
            "cuda": release,
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
    return sorted(str(source.relative_to(ROOT)) for source in found)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("carafe_d2._C", sources())],
        cmdclass={"build_ext": BuildOperator, "bdist_wheel": BuildWheel},
    )
