"""dev/gpu_check.py: stages, what they need, and the report. Nothing here needs a GPU."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from carafe_d2.benchmark import __main__ as benchmark
from carafe_d2.files import MarkdownBlock
from dev import gpu_check
from dev.gpu_check import Stage

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"date": "2020-02-02", "commit": "abc", "gpu": "a fast one", "torch": "2.99"}


def stages(*arguments: str) -> dict[str, Stage]:
    return gpu_check.make_stages(gpu_check.parse_args(arguments))


def run(folder: Path, *commands: list[str], timeout: float = 60, **environment: str) -> Stage:
    stage = Stage("stage", "something", commands, environment=environment)
    gpu_check.run_stage(stage, folder, timeout)
    return stage


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ------------------------------------------------------------------------------ a single stage


def test_passing_stage(tmp_path):
    code = "import os; [print(i) for i in range(99)]; print(os.environ['WHERE'])"
    stage = run(tmp_path, program("print('first')"), program(code), WHERE="here")
    assert stage.result == "passed"
    assert stage.seconds > 0
    assert stage.shown().startswith("WHERE=here python -c 'print(")
    assert stage.output.endswith("\n98\nhere")
    assert len(stage.output.splitlines()) == gpu_check.TAIL_LINES
    assert (tmp_path / "stage.log").read_text().startswith("first\n0\n1\n")


@pytest.mark.parametrize(
    ("command", "result"),
    [
        (program("import sys; sys.exit('broken')"), "failed: exit code 1"),
        (program("import os; os.abort()"), "failed: ended by SIGABRT"),
        (["no/such/program"], "failed: .*No such file or directory: 'no/such/program'"),
    ],
)
def test_failing_stage_ends_at_once(command, result, tmp_path):
    stage = run(tmp_path, command, program("print('not reached')"))
    assert re.fullmatch(result, stage.result)
    assert "not reached" not in stage.output


def test_stage_that_hangs_is_ended_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    stage = run(tmp_path, program(code), timeout=3)
    assert stage.result == "failed: took longer than 0.05 minutes"
    command_line = Path("/proc", stage.output, "cmdline")
    deadline = time.monotonic() + 10
    while command_line.exists() and command_line.read_bytes():  # a zombie has none
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------- a whole run


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs three stages, the first of which fails and the second of which lacks something."""

    def check(*arguments: str, training: str = "print('all is well')") -> dict:
        stages = (
            Stage("build", "about build", [program("print('oh no'); raise SystemExit(3)")]),
            Stage("tests", "about tests", [], "no moon tonight"),
            Stage("training", "about training", [program(training)]),
        )
        monkeypatch.setattr(gpu_check, "make_stages", lambda _: {s.name: s for s in stages})
        monkeypatch.setattr(gpu_check, "describe_gpu_machine", lambda: MACHINE)
        gpu_check.main(["--output", str(tmp_path), *arguments])

    return check


def results(folder: Path) -> dict[str, str]:
    content = json.loads((folder / "report.json").read_text())
    assert content["machine"] == MACHINE
    return {stage["name"]: stage["result"] for stage in content["stages"]}


def test_a_failure_stops_nothing_but_shows_in_the_exit_code(check, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        check()
    assert exit_.value.code == 1
    expected = {
        "build": "failed: exit code 3",
        "tests": "skipped: no moon tonight",
        "training": "passed",
    }
    assert results(tmp_path) == expected
    printed = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert ["gpu", "a fast one"] in rows
    for name, result in expected.items():
        assert [name, f"about {name}", result] in [row[:3] for row in rows]
        assert f"{name}: about {name} ... {result} (" in printed
    assert "\n1 passed, 1 failed, 1 skipped\n" in report
    failure = report.split("\n## build: failed\n")[1].split("\n## ")[0]
    assert "\npython -c " in failure
    assert "\noh no\n" in failure
    assert str(ROOT) not in report


def test_stages_may_be_run_one_by_one(check, tmp_path):
    for name in ("training", "tests"):
        check("--stages", name)
    assert results(tmp_path) == {"tests": "skipped: no moon tonight", "training": "passed"}
    with pytest.raises(SystemExit, match=r"error: --stages: expected some of build, .*'lunch'"):
        check("--stages", "lunch")


def test_report_is_there_before_the_end(check, tmp_path, monkeypatch):
    """Whoever is interrupted keeps what was found."""
    run_stage = gpu_check.run_stage

    def interrupted(stage, *arguments):
        if stage.name == "training":
            raise KeyboardInterrupt
        run_stage(stage, *arguments)

    monkeypatch.setattr(gpu_check, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check()
    found = results(tmp_path)
    assert (found["build"], found["training"]) == ("failed: exit code 3", "not run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_in_one_line_that_there_is_no_gpu():
    command = [sys.executable, ROOT / "dev" / "gpu_check.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    message = r"error: gpu-check needs a CUDA GPU: there is no GPU that PyTorch \S+ can use\n"
    assert re.fullmatch(message, result.stderr)


def test_quick_figures_are_not_written():
    with pytest.raises(SystemExit, match="error: --quick measures nothing"):
        gpu_check.main(["--quick", "--write-docs"])


# --------------------------------------------------------------------------- the real stages


def test_commands_name_things_that_exist():
    for quick in ([], ["--quick"]):
        for stage in stages("--mmcv", "mmcv.tar.gz", *quick).values():
            for command in stage.commands:
                paths = [w for w in command if re.fullmatch(r"[\w/]+\.(py|yaml)|tests", w)]
                assert all((ROOT / path).exists() for path in paths), command
    assert "def test_small_shapes(" in (ROOT / "tests" / "test_gpu.py").read_text()
    assert gpu_check.EXPECTED_RESULTS in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("option", ["--no-build", "--quick", "--write-docs"])
@pytest.mark.parametrize("name", ["benchmark", "benchmark_half", "detectors"])
def test_benchmark_takes_its_options(name, option):
    (command,) = stages(option)[name].commands
    assert command[1:3] == ["-m", "carafe_d2.benchmark"]
    args = benchmark.parse_args(command[3:])
    assert args.device == "cuda"
    assert args.quick == (option == "--quick")
    assert (args.detector is not None) == (name == "detectors")
    if option == "--write-docs":
        MarkdownBlock(ROOT / args.markdown, args.block)
    else:
        assert args.markdown is None


def test_mixed_precision_is_what_sets_the_trainings_apart():
    full, mixed = (stages()[name].commands[-1] for name in ("training", "training_amp"))
    differences = [pair for pair in zip(full, mixed, strict=True) if pair[0] != pair[1]]
    assert differences[0] == ("False", "True")
    assert len(differences) == 2  # the other is the folder
    assert gpu_check.EXPECTED_RESULTS in full


def test_what_is_missing_is_an_obstacle(monkeypatch):
    for function in ("find_nvcc", "find_sanitizer"):
        monkeypatch.setattr(gpu_check, function, lambda: None)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    expected = {
        None: ["environment", "tests", "slow_tests", "grad_check", "benchmark", "benchmark_half"],
        "no nvcc found": ["build", "nvcc"],
        "compute-sanitizer is neither": ["memcheck", "racecheck", "initcheck", "synccheck"],
        "Detectron2 and pycocotools and OpenCV": ["detectors", "training", "training_amp"],
        "no --mmcv given; the benchmark runs without mmcv": ["mmcv"],
    }
    here = stages()
    assert {name for names in expected.values() for name in names} == set(here)
    for obstacle, names in expected.items():
        for name in names:
            assert str(here[name].obstacle).startswith(str(obstacle)), name
    assert stages("--mmcv", "mmcv.tar.gz")["mmcv"].obstacle.startswith("no nvcc found")
    assert stages("--no-build")["build"].obstacle == "--no-build"
    assert "--no-plot" in here["benchmark"].commands[0]


def test_benchmark_meets_the_mmcv_that_was_built(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    arguments = ["--output", str(tmp_path)]
    assert stages(*arguments)["benchmark"].environment == {}
    library = tmp_path / "mmcv" / "mmcv" / "carafe.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (folder,) = stages(*arguments)["benchmark"].environment.values()
    assert (ROOT / folder).resolve() == tmp_path / "mmcv"


@pytest.mark.parametrize("part", ["bin", "compute-sanitizer"])
def test_finds_compute_sanitizer(part, tmp_path, monkeypatch):
    path = tmp_path / part / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert stages()["racecheck"].commands[0][:3] == [str(path), "--tool", "racecheck"]
