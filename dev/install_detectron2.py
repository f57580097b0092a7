"""Installs Detectron2 into the environment of the Python that runs this file.

    python dev/install_detectron2.py
    python dev/install_detectron2.py 'git+https://github.com/facebookresearch/detectron2'
    python dev/install_detectron2.py path/to/detectron2

A Detectron2 that is there already is used as it is, and nothing is done.

With REQUIREMENT, anything that pip accepts, Detectron2 is built from source the way upstream means
it to be. Prefer this where the network allows it: upstream is maintained, and has the compiled
operators (rotated boxes, deformable convolution, faster COCO evaluation). It needs a C++ compiler
and some minutes, and includes the CUDA operators where there is a GPU and nvcc.

Without, it is version 0.6 from the package index, distribution `pb1-detectron2`. Its Python files
are upstream's byte for byte, but its C++ files are missing, so it cannot be built as it comes; and
it is older than today's Python, NumPy, Pillow and PyTorch. It becomes a pure-Python wheel with the
changes that the table MENDS in this file lists; the wheel is kept under build/.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.parse
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

INDEX_NAME = "pb1-detectron2"
SDIST = f"{INDEX_NAME}-0.6.tar.gz"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
VERSION = "0.6+carafe.1"  # raise the last number with every change of what the wheel contains
WHEEL = f"detectron2-{VERSION}-py3-none-any.whl"
UPSTREAM = "git+https://github.com/facebookresearch/detectron2"
CACHE = Path(__file__).resolve().parents[1] / "build" / "detectron2"

# Upstream's install_requires, except: no `future` and `pydot`, which only the Caffe2 export needs;
# no exact pin on black and no upper bound on iopath, which today's environments cannot meet.
REQUIRES = (
    "Pillow>=7.1",
    "black",
    "cloudpickle",
    "fvcore>=0.1.5,<0.1.6",
    "hydra-core>=1.1",
    "iopath>=0.1.7",
    "matplotlib",
    "omegaconf>=2.1",
    "pycocotools>=2.0.2",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

# Folders of the source archive, and where they go in the wheel.
FOLDERS = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}


class Mend(NamedTuple):
    """One change to Detectron2 0.6: why, which words become which, and how often in which file."""

    why: str
    old: str
    new: str
    places: Mapping[str, int]


MENDS = (
    Mend(
        "the compiled module is missing: say so when one of its operators is called, not on import",
        "from detectron2 import _C",
        "from detectron2.layers.compiled import _C",
        {
            "detectron2/layers/deform_conv.py": 1,
            "detectron2/layers/roi_align_rotated.py": 1,
            "detectron2/layers/rotated_boxes.py": 1,
        },
    ),
    Mend(
        "the compiled module is missing: the same for the operator that is called through PyTorch",
        "return torch.ops.detectron2.nms_rotated(",
        "from detectron2.layers.compiled import _C\n\n    return _C.nms_rotated(",
        {"detectron2/layers/nms.py": 1},
    ),
    Mend(
        "the compiled module is missing: COCO evaluation falls back to pycocotools, as upstream's",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "COCOeval_opt = COCOeval\n",
        {"detectron2/evaluation/coco_evaluation.py": 1},
    ),
    Mend(
        "the compiled module is missing: COCO evaluation names the implementation that it uses",
        "self._use_fast_impl = use_fast_impl",
        "self._use_fast_impl = False",
        {"detectron2/evaluation/coco_evaluation.py": 1},
    ),
    Mend(
        "NumPy 1.24 removed the alias np.bool",
        "np.bool",
        "bool",
        {
            "detectron2/evaluation/pascal_voc_evaluation.py": 2,
            "detectron2/structures/masks.py": 3,
            "detectron2/utils/video_visualizer.py": 1,
            "detectron2/utils/visualizer.py": 3,
        },
    ),
    Mend(
        "NumPy 1.24 removed the alias np.int",
        "np.int",
        "np.int64",
        {"detectron2/data/build.py": 2, "detectron2/evaluation/sem_seg_evaluation.py": 2},
    ),
    Mend(
        "NumPy 1.24 removed the alias np.float",
        "np.float",
        "np.float64",
        {"detectron2/evaluation/sem_seg_evaluation.py": 5},
    ),
    Mend(
        "NumPy 1.24 removed the alias np.str",
        "np.str",
        "str",
        {"detectron2/data/datasets/pascal_voc.py": 1},
    ),
    Mend(
        "NumPy 2 raises on copy=False where a copy is needed",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
        {"detectron2/layers/mask_ops.py": 1},
    ),
    Mend(
        "Pillow 10 removed the name Image.LINEAR",
        "Image.LINEAR",
        "Image.BILINEAR",
        {"detectron2/data/transforms/transform.py": 1},
    ),
    Mend(
        "setuptools 81 removed pkg_resources: its import",
        "import pkg_resources\n",
        "",
        {"detectron2/model_zoo/model_zoo.py": 1},
    ),
    Mend(
        "setuptools 81 removed pkg_resources: its use",
        'pkg_resources.resource_filename(\n        "detectron2.model_zoo", os.path.join("configs", '
        "config_path)\n    )",
        'os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", config_path)',
        {"detectron2/model_zoo/model_zoo.py": 1},
    ),
    Mend(
        "PyTorch 2.4 deprecates torch.cuda.amp, with a warning: the gradient scaler",
        "from torch.cuda.amp import GradScaler",
        "from torch.amp import GradScaler",
        {"detectron2/engine/train_loop.py": 1},
    ),
    Mend(
        "PyTorch 2.4 deprecates torch.cuda.amp, with a warning: autocast",
        "from torch.cuda.amp import autocast",
        "from torch.amp import autocast",
        {"detectron2/engine/train_loop.py": 1},
    ),
    Mend(
        "PyTorch 2.4 deprecates torch.cuda.amp: torch.amp wants the device named",
        "with autocast():",
        'with autocast("cuda"):',
        {"detectron2/engine/train_loop.py": 1},
    ),
    Mend(
        "PyTorch 1.10 warns when meshgrid is not told its indexing",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        {"detectron2/modeling/anchor_generator.py": 1},
    ),
    Mend(
        "PyTorch warns when it wraps a read-only array, as masks decoded by pycocotools are",
        "torch.from_numpy(np.ascontiguousarray(x))",
        'torch.from_numpy(np.array(x, order="C"))',
        {"detectron2/data/detection_utils.py": 1},
    ),
    Mend(
        "PyTorch 2 renamed the class: checkpoints left out the schedulers of PyTorch's own",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        {
            "detectron2/engine/hooks.py": 2,
            "detectron2/solver/build.py": 1,
            "detectron2/solver/lr_scheduler.py": 4,
            "detectron2/projects/deeplab/build_solver.py": 1,
            "detectron2/projects/deeplab/lr_scheduler.py": 1,
        },
    ),
    Mend(
        "Python 3.11 cannot sample from a set; the mapper does when it has to skip an image",
        "self._rng.sample(self._fallback_candidates, k=1)",
        "self._rng.sample(list(self._fallback_candidates), k=1)",
        {"detectron2/data/common.py": 1},
    ),
    Mend(
        "PyTorch no longer comes with Caffe2: let the rest of detectron2.export work without it",
        "from .api import *\n",
        "",
        {"detectron2/export/__init__.py": 1},
    ),
    Mend(
        "Python deprecates Logger.warn, with a warning",
        ".warn(",
        ".warning(",
        {
            "detectron2/data/datasets/coco.py": 2,
            "detectron2/engine/defaults.py": 1,
            "detectron2/evaluation/coco_evaluation.py": 2,
            "detectron2/evaluation/lvis_evaluation.py": 2,
            "detectron2/evaluation/sem_seg_evaluation.py": 2,
        },
    ),
)

# Files that the wheel has and the source archive has not.
ADDED = {
    "detectron2/layers/compiled.py": '''\
"""Stands in for the compiled module `detectron2._C`, which this build of Detectron2 lacks."""


class _Missing:
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"detectron2._C.{name} is a compiled operator, and this Detectron2 was installed "
            "without its compiled module. Install Detectron2 from source to have it: "
            "https://github.com/facebookresearch/detectron2"
        )


_C = _Missing()
''',
}


class InstallError(Exception):
    """Something that the user can mend; the message is one sentence that says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Installs what the command line asks for and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "requirement",
        nargs="?",
        metavar="REQUIREMENT",
        help="what to install instead of version 0.6: a git+https:// address, a folder, a wheel",
    )
    requirement = parser.parse_args(arguments).requirement
    try:
        check_environment()
        if requirement:
            install_requirement(requirement)
        else:
            install_default()
    except InstallError as error:
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    return 0


def say(message: str) -> None:
    """Prints one line of progress."""
    print(f"install_detectron2: {message}", flush=True)


def check_environment() -> None:
    """Raises an InstallError when Detectron2 could not work in this environment."""
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs it with an older one gets told
        raise InstallError(
            f"this is Python {sys.version.split()[0]}, but Detectron2 and today's PyTorch need "
            "3.10 or newer: run this file with a newer one."
        )
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise InstallError(
                f"{package} is missing in this environment, and Detectron2 needs it: install it "
                f"first, for example with `{sys.executable} -m pip install torch torchvision`."
            )


# --- version 0.6 from the package index ---------------------------------------------------------


def install_default() -> None:
    """Installs the mended version 0.6, unless there is a Detectron2 already."""
    location, version = installed_detectron2()
    outdated = version is not None and version.startswith("0.6+carafe.") and version != VERSION
    if location and not outdated:
        say(f"Detectron2 {version or 'of unknown version'} is installed in {location}")
        return
    wheel = cached_wheel(CACHE)
    say(f"installing {wheel.name} and what it requires")
    pip("install", str(wheel), doing=f"install {wheel.name}")
    say(f"Detectron2 {VERSION} is installed in {installed_detectron2()[0]}")


def installed_detectron2() -> tuple[Path | None, str | None]:
    """Finds the Detectron2 that `import detectron2` would take, without importing it.

    Returns:
        Its folder and its version; None for what is not there or not known.
    """
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name
        return None, None
    location = Path(spec.origin).parent
    distributions = importlib.metadata.packages_distributions().get("detectron2")
    if distributions:
        return location, importlib.metadata.version(distributions[0])
    if location.parent == Path(sysconfig.get_path("purelib")):  # left by an interrupted pip
        return None, None
    return location, None


def cached_wheel(cache: Path) -> Path:
    """Returns the mended wheel, building it where the cache has no intact one from this recipe."""
    wheel = cache / WHEEL
    stamp = cache / f"{WHEEL}.sha256"  # of this file, which is the recipe, and of the wheel
    recipe = sha256(Path(__file__).read_bytes())
    if wheel.is_file() and stamp.is_file():
        made = f"{recipe} {sha256(wheel.read_bytes())}\n"
        if stamp.read_text() == made:
            return wheel

    sdist = cached_sdist(cache)
    say(f"mending it and packing {WHEEL}")
    content = build_wheel(mend(read_sdist(sdist)))
    write_atomically(wheel, content)
    write_atomically(stamp, f"{recipe} {sha256(content)}\n".encode())
    return wheel


def cached_sdist(cache: Path) -> Path:
    """Returns the source archive, fetching it where the cache has no intact one."""
    sdist = cache / SDIST
    if sdist.is_file() and sha256(sdist.read_bytes()) == SDIST_SHA256:
        return sdist
    say(f"fetching {SDIST} from the package index")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fetched = fetch_sdist(Path(folder))
        check_sha256(fetched, SDIST_SHA256)
        fetched.replace(sdist)
    return sdist


# All that pip wants to know of the archive before it hands it out: its name and version.
BACKEND = """
import os

class __legacy__:
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        name = "pb1_detectron2-0.6.dist-info"
        os.mkdir(os.path.join(folder, name))
        with open(os.path.join(folder, name, "METADATA"), "w") as file:
            file.write("Metadata-Version: 2.1\\nName: pb1-detectron2\\nVersion: 0.6\\n")
        return name
"""


def fetch_sdist(folder: Path) -> Path:
    """Downloads the source archive into `folder` with pip, which checks its hash.

    Going through pip honors the user's mirrors, proxies and credentials. But even to download an
    archive pip has its build backend make its metadata: here that means to run a setup.py which
    imports torch, and which names an optional dependency by URL, for which pip 26 refuses the
    archive. We want neither, so a stand-in for setuptools answers pip, and no code of the archive
    runs.
    """
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{INDEX_NAME}==0.6 --hash=sha256:{SDIST_SHA256}\n")
    pip(
        "download",
        *("--no-deps", "--no-build-isolation", "--use-pep517", "--no-binary", ":all:"),
        *("--dest", str(folder), "--requirement", str(requirements)),
        doing=f"fetch {SDIST}",
        advice=f"check the network and pip's index settings, or name another source, such as "
        f"{UPSTREAM}",
        environment={"PYTHONPATH": str(backend.parent)},
    )
    return folder / SDIST


def read_sdist(sdist: Path) -> dict[str, str]:
    """Returns the text of every file that goes into the wheel, by its path in the wheel."""
    files = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if not member.isfile():
                continue
            if path == "LICENSE":
                files[path] = archive.extractfile(member).read().decode()
            for source, target in FOLDERS.items():
                if path.startswith(source):
                    name = target + path.removeprefix(source)
                    files[name] = archive.extractfile(member).read().decode()
    return files


def mend(files: Mapping[str, str], mends: Sequence[Mend] = MENDS) -> dict[str, str]:
    """Returns `files` with the mends applied.

    Raises:
        InstallError: A mend does not match as often as it says, so it was not written for these
            files.
    """
    mended = dict(files)
    for why, old, new, places in mends:
        # Whole words only: np.int must not match in np.int32.
        before = r"(?<!\w)" if old[0].isalnum() else ""
        after = r"(?!\w)" if old[-1].isalnum() else ""
        pattern = re.compile(before + re.escape(old) + after)
        for path, expected in places.items():
            mended[path], found = pattern.subn(lambda _, new=new: new, mended.get(path, ""))
            if found != expected:
                raise InstallError(
                    f"{path} has {old!r} {found} times where {expected} were expected, so the mend "
                    f"'{why}' does not fit this copy of Detectron2."
                )
    return mended


def build_wheel(files: Mapping[str, str]) -> bytes:
    """Packs `files` and what a wheel needs besides; the same files always give the same bytes."""
    info = f"detectron2-{VERSION}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2 0.6, its Python part, mended for current NumPy, Pillow and PyTorch",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "Requires-Python: >=3.10",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES),
    ]
    files = {**files, **ADDED}
    if "LICENSE" in files:
        files[f"{info}/licenses/LICENSE"] = files.pop("LICENSE")
    files[f"{info}/METADATA"] = "\n".join(metadata) + "\n"
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: carafe-d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = f"{info}/RECORD"
    files[record] = "".join(
        f"{path},sha256={record_hash(text)},{len(text.encode())}\n"
        for path, text in sorted(files.items())
    )
    files[record] += f"{record},,\n"

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: compressed bytes depend on the zlib
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)  # its default date is fixed
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, text)
    return buffer.getvalue()


def record_hash(text: str) -> str:
    """Returns the sha256 of `text` as a wheel's RECORD wants it."""
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


# --- any other requirement ----------------------------------------------------------------------


def install_requirement(requirement: str) -> None:
    """Builds and installs `requirement`, unless the installed Detectron2 was installed from it."""
    if not is_installed_from(requirement):
        ensure_build_tools()
        say(f"building and installing {requirement} (compiling takes minutes)")
        pip_install_source(requirement)
        if not is_installed_from(requirement):
            # Asked for another source of the version that is installed, pip changes nothing.
            pip_install_source("--no-deps", "--force-reinstall", requirement)
    location, version = installed_detectron2()
    say(f"Detectron2 {version} from {requirement} is installed in {location}")


def pip_install_source(*arguments: str) -> None:
    """Has pip install Detectron2 from source: the last argument."""
    pip(
        *("install", "--no-build-isolation", *arguments),  # its setup.py imports torch
        doing=f"install {arguments[-1]}",
        advice="check that it exists and can be reached, and that there is a C++ compiler; without "
        "a requirement this command installs version 0.6 from the package index",
        quiet=False,
    )


def is_installed_from(requirement: str) -> bool:
    """Whether the installed Detectron2 was installed from `requirement`, as pip recorded it."""
    try:
        recorded = importlib.metadata.distribution("detectron2").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    if recorded is None:
        return False
    source = json.loads(recorded)
    url = source["url"]
    if "vcs_info" in source:
        revision = source["vcs_info"].get("requested_revision")
        url = f"{source['vcs_info']['vcs']}+{url}" + (f"@{revision}" if revision else "")
    return url == as_url(requirement)


def as_url(requirement: str) -> str:
    """Returns the address that pip records for `requirement`."""
    requirement = requirement.partition(" @ ")[2] or requirement
    if urllib.parse.urlsplit(requirement).scheme:
        return requirement.partition("#")[0]
    return Path(requirement).resolve().as_uri()


def ensure_build_tools() -> None:
    """Installs the setuptools that Detectron2's setup.py needs: the last one with pkg_resources."""
    try:
        major = int(importlib.metadata.version("setuptools").partition(".")[0])
        importlib.metadata.version("wheel")
    except importlib.metadata.PackageNotFoundError:
        major = None
    if major is None or major >= 81:
        say("installing setuptools<81 and wheel, which building Detectron2 needs")
        pip("install", "setuptools<81", "wheel", doing="install setuptools and wheel")


# --- small helpers ------------------------------------------------------------------------------


def pip(
    *arguments: str,
    doing: str,
    advice: str = "check the network and pip's index settings",
    environment: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> None:
    """Runs pip in this environment.

    Args:
        *arguments: What comes after `pip`.
        doing: What it is for, as "cannot {doing}" needs it.
        advice: What the user can try when it fails.
        environment: Variables to set besides the present ones.
        quiet: Whether to keep its output back.

    Raises:
        InstallError: pip failed.
    """
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"this environment has no pip: add it with `{sys.executable} -m ensurepip`."
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    if result.returncode:
        output = result.stdout or ""
        if "DO NOT MATCH THE HASHES" in output:
            raise InstallError(f"cannot {doing}: {HASH_MISMATCH}")
        errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
        reason = f" ({errors[-1].removeprefix('ERROR: ')})" if errors else ""
        raise InstallError(f"cannot {doing}: pip failed{reason}; {advice}.")


HASH_MISMATCH = (
    "the file that the package index offers has another sha256 than the one that this tool was "
    "written for, so it is not used; check which index pip is set to."
)


def check_sha256(path: Path, expected: str) -> None:
    """Raises an InstallError unless the file has this hash."""
    if sha256(path.read_bytes()) != expected:
        raise InstallError(f"cannot use {path.name}: {HASH_MISMATCH}")


def sha256(content: bytes) -> str:
    """Returns the sha256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that an interruption leaves the old one or none, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(content)
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
