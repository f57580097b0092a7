"""What several test files share; and skips what the machine or the environment cannot run."""

import copy
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import runpy
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from carafe_d2 import collect_env

ROOT = Path(__file__).parents[1]


def pytest_report_header():
    return f"carafe_d2: {collect_env.LIBRARY}"


def pytest_sessionstart():
    """Stops where this checkout's library was built from other sources than are in it now."""
    library = collect_env.LIBRARY
    if not library.is_relative_to(ROOT) or not (ROOT / "csrc").is_dir():
        return  # an installed one
    info = collect_env.build_info(library) if library.is_file() else None
    if info is None or info.get("sources") != runpy.run_path(ROOT / "setup.py")["sources_digest"]():
        pytest.exit(
            f"{library} is missing, or csrc/ or setup.py changed since it was built: "
            "python setup.py build_ext --inplace",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_configure():
    """Shares the threads among the workers of pytest-xdist; programs that tests start inherit it.

    PyTorch's threads spin while they wait, so more of them than cores slow everything tenfold.
    """
    # In C it takes a tenth of the time, and every training begins with reading and writing configs.
    if yaml.__with_libyaml__:
        yaml.SafeLoader, yaml.SafeDumper = yaml.CSafeLoader, yaml.CSafeDumper
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    # Long files first, or one worker is left alone with them at the end.
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Where Detectron2 is missing, files that cannot be imported without it are skipped."""
    report = yield
    if report.failed and "detectron2" in str(report.longrepr) and not find_spec("detectron2"):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs Detectron2")
    return report


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """Undoes what Detectron2's setup, and ours, does to loggers.

    They would print each line once more for every training before, and keep it from caplog.
    """
    yield
    for name in ("detectron2", "fvcore", "carafe_d2"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


class Program:
    """A Python script, or "-m" and a module, with arguments, in a fork of a process that has
    imported Detectron2.

    To import that and PyTorch takes longer than most of what tests start programs for. Nothing of
    carafe_d2 is imported before the fork.
    """

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["detectron2.engine", "detectron2.model_zoo"])

    def __init__(self, arguments, output: Path, **environment):
        self.output = output
        settings = {
            "arguments": list(map(str, arguments)),
            "environment": {**os.environ, **environment},
            "output": output,
        }
        run = str(Path(__file__).with_name("run_program.py"))
        self.process = self._context.Process(target=runpy.run_path, args=(run, settings))
        self.process.start()

    def finish(self, exitcode: int = 0) -> str:
        """Waits for its end, checks the exit code, and returns stdout and stderr in one."""
        self.process.join()
        output = self.output.read_text()
        assert self.process.exitcode == exitcode, output
        return output


@pytest.fixture(scope="session")
def start_program(tmp_path_factory):
    """Starts a `Program`: start_program(*arguments, **environment)."""
    folder = tmp_path_factory.mktemp("programs")
    numbers = itertools.count()

    def start(*arguments, **environment) -> Program:
        return Program(arguments, folder / f"{next(numbers)}.txt", **environment)

    return start


@pytest.fixture(scope="session")
def make_shapes(tmp_path_factory):
    """Generates the `shapes` dataset with images of 64 pixels; returns its DETECTRON2_DATASETS."""

    def make(train: int, val: int):
        from carafe_d2.data import shapes

        root = tmp_path_factory.mktemp("datasets")
        sizes = ["--size", "64", "--train", str(train), "--val", str(val)]
        shapes.main(["--root", str(root), *sizes])
        return root

    return make


@pytest.fixture(scope="module")
def register_shapes(make_shapes):
    """Generates the dataset, and registers it for a test file and the programs that it starts."""
    from carafe_d2.data import register_shapes

    with pytest.MonkeyPatch.context() as patch:

        def register(train: int, val: int) -> None:
            patch.setenv("DETECTRON2_DATASETS", str(make_shapes(train, val)))
            register_shapes()

        yield register
    register_shapes()


@pytest.fixture(scope="session")
def sanitizer_runtimes():
    """Of a compiler, the value of LD_PRELOAD that loads its sanitizers' runtimes before Python."""

    def find(compiler: str) -> str:
        paths = []
        for name in ("libasan.so", "libubsan.so"):
            command = [compiler, f"-print-file-name={name}"]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            paths.append(run.stdout.strip())
            if not os.path.isabs(paths[-1]):
                pytest.skip(f"the compiler comes without {name}")
        return ":".join(paths)

    return find


@pytest.fixture(scope="session")
def ultralytics(tmp_path_factory):
    """The package, which fetches nothing and keeps its settings out of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        opened = Image.open
        package = pytest.importorskip("ultralytics")
        Image.open = opened  # or whatever is no image would make it ask for a package
        yield package


def _through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(params=[copy.deepcopy, _through_pickle, _through_torch_save])
def clone(request):
    """Every way to copy a module."""
    return request.param
