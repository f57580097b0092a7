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
it is older than today's Python, NumPy, Pillow and PyTorch. dev/detectron2-0.6.patch mends it, and
says why.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

from carafe_d2.errors import UserError, exit_on_user_error

SDIST = "pb1-detectron2-0.6.tar.gz"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
PATCH = Path(__file__).resolve().with_name("detectron2-0.6.patch")
VERSION = "0.6+carafe.2"  # as in the patch


def main(argv: Sequence[str] | None = None) -> None:
    """Installs what the command line asks for.

    Raises:
        UserError: It cannot be installed; the message says what to do about it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "requirement",
        nargs="?",
        metavar="REQUIREMENT",
        help="what to install instead of version 0.6: a git+https:// address, a folder, a wheel",
    )
    requirement = parser.parse_args(argv).requirement
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{package} is missing in this environment, and Detectron2 needs it: install it "
                f"first, for example with `{sys.executable} -m pip install torch torchvision`"
            )
    if requirement:
        install_requirement(requirement)
    else:
        install_default()


def install_default() -> None:
    """Installs the mended version 0.6, unless there is a Detectron2 already."""
    location, version = installed_detectron2()
    outdated = (version or "").startswith("0.6+carafe.") and version != VERSION
    if location and not outdated:
        print(f"Detectron2 {version or 'of unknown version'} is installed in {location}")
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"fetching {SDIST}, mending and installing it with what it requires", flush=True)
        source = unpack(fetch_sdist(Path(folder)))
        pip("install", "--use-pep517", str(source), doing=f"install Detectron2 {VERSION}")
    print(f"Detectron2 {VERSION} is installed in {installed_detectron2()[0]}")


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


# A stand-in for setuptools: all that pip wants to know of the archive before it hands it out.
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
    archive pip has its build backend make its metadata: here by a setup.py which imports torch,
    and names an optional dependency by URL, for which pip 26 refuses the archive. So BACKEND
    answers pip, and no code of the archive runs.
    """
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(BACKEND)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"pb1-detectron2==0.6 --hash=sha256:{SDIST_SHA256}\n")
    pip(
        "download",
        *("--no-deps", "--no-build-isolation", "--use-pep517", "--no-binary", ":all:"),
        *("--dest", str(folder), "--requirement", str(requirements)),
        doing=f"fetch {SDIST}",
        advice="check the network and pip's index settings, or name another source, such as "
        "git+https://github.com/facebookresearch/detectron2",
        environment={"PYTHONPATH": str(backend.parent)},
    )
    return folder / SDIST


def unpack(sdist: Path) -> Path:
    """Unpacks the source archive beside itself and applies the patch; returns the folder."""
    commands = (["git", "apply"], ["patch", "--strip=1", "--silent", "--input"])
    command = next((command for command in commands if shutil.which(command[0])), None)
    if command is None:
        raise UserError("Detectron2 0.6 needs mending, with git or patch: install one of them")
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    source = sdist.with_name(SDIST.removesuffix(".tar.gz"))
    (source / "setup.py").unlink()
    # In a folder of some repository, git would pass over the files.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(source.parent)}
    result = subprocess.run(
        [*command, str(PATCH)], cwd=source, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        raise UserError(f"{PATCH} does not fit {SDIST}: {(result.stdout + result.stderr).strip()}")
    return source


def install_requirement(requirement: str) -> None:
    """Builds and installs `requirement`, unless the installed Detectron2 was installed from it."""
    # Asked for another source of the version that is installed, pip changes nothing at first.
    for options in ([], ["--no-deps", "--force-reinstall"]):
        if is_installed_from(requirement):
            break
        ensure_build_tools()
        print(f"building and installing {requirement} (compiling takes minutes)", flush=True)
        pip(
            *("install", "--no-build-isolation", *options, requirement),  # setup.py imports torch
            doing=f"install {requirement}",
            advice="check that it exists and can be reached, and that there is a C++ compiler; "
            "without a requirement this command installs version 0.6 from the package index",
            quiet=False,
        )
    location, version = installed_detectron2()
    print(f"Detectron2 {version} from {requirement} is installed in {location}")


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
    requirement = requirement.partition(" @ ")[2] or requirement
    if urllib.parse.urlsplit(requirement).scheme:
        return url == requirement.partition("#")[0]
    return url == Path(requirement).resolve().as_uri()


def ensure_build_tools() -> None:
    """Installs the setuptools that Detectron2's setup.py needs: the last one with pkg_resources."""
    try:
        importlib.metadata.version("wheel")
        if int(importlib.metadata.version("setuptools").partition(".")[0]) < 81:
            return
    except importlib.metadata.PackageNotFoundError:
        pass
    print("installing setuptools<81 and wheel, which building Detectron2 needs", flush=True)
    pip("install", "setuptools<81", "wheel", doing="install setuptools and wheel")


def pip(
    *arguments: str,
    doing: str,
    advice: str = "check the network and pip's index settings",
    environment: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> None:
    """Runs pip in this environment, with variables besides the present ones.

    Raises:
        UserError: pip is missing, or failed at `doing`; `advice` is what the user can try.
    """
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"this environment has no pip: add it with `{sys.executable} -m ensurepip`")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
    )
    if result.returncode:
        output = result.stdout or ""
        if "DO NOT MATCH THE HASHES" in output:
            raise UserError(
                f"cannot {doing}: the file that the package index offers has another sha256 than "
                "the one that the patch was written for; check which index pip is set to"
            )
        errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
        reason = f" ({errors[-1].removeprefix('ERROR: ')})" if errors else ""
        raise UserError(f"cannot {doing}: pip failed{reason}; {advice}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
