"""dev/gpu_check.py: stages, what they need, and the report. Nothing here needs a GPU."""

import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from carafe_d2.benchmark import __main__ as benchmark
from carafe_d2.files import MarkdownBlock
from dev import gpu_check
from dev.gpu_check import Outcome, Plan

ROOT = Path(__file__).resolve().parents[2]

MACHINE = {"date": "2020-02-02", "commit": "abc", "GPU": "a fast one", "PyTorch": "2.99"}


def plan_of(stage: str, *arguments: str) -> Plan:
    return gpu_check.STAGES[stage][1](gpu_check.parse_args(arguments))


def run(plan: Plan, folder: Path, timeout: float = 60) -> Outcome:
    outcome = Outcome("stage", "something")
    gpu_check.run_stage(outcome, plan, folder, timeout)
    return outcome


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ------------------------------------------------------------------------------ a single stage


def test_passing_stage(tmp_path):
    code = "import os; [print(i) for i in range(99)]; print(os.environ['WHERE'])"
    outcome = run(Plan([program("print('first')"), program(code)], {"WHERE": "here"}), tmp_path)
    assert outcome.result == "passed"
    assert outcome.seconds > 0
    assert outcome.commands[0] == "WHERE=here python -c 'print('\"'\"'first'\"'\"')'"
    assert outcome.output.endswith("\n98\nhere")
    assert len(outcome.output.splitlines()) == gpu_check.TAIL_LINES
    assert (tmp_path / "stage.log").read_text().startswith("first\n0\n1\n")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (program("import sys; sys.exit('broken')"), "exit code 1"),
        (program("import os; os.abort()"), "ended by SIGABRT"),
        (["no/such/program"], r".*No such file or directory: 'no/such/program'"),
    ],
)
def test_failing_stage_ends_at_once(command, reason, tmp_path):
    outcome = run(Plan([command, program("print('not reached')")]), tmp_path)
    assert outcome.result == "failed"
    assert re.fullmatch(reason, outcome.reason)
    assert "not reached" not in outcome.output


def test_stage_that_hangs_is_ended_with_its_children(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    outcome = run(Plan([program(code)]), tmp_path, timeout=3)
    assert outcome.verdict == "failed: took longer than 0.05 minutes"
    command_line = Path("/proc", outcome.output, "cmdline")
    deadline = time.monotonic() + 10
    while command_line.exists() and command_line.read_bytes():  # a zombie has none
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stage_with_an_obstacle_is_skipped_and_says_why(tmp_path):
    outcome = run(Plan(obstacle="no moon tonight"), tmp_path)
    assert outcome.verdict == "skipped: no moon tonight"
    assert not (tmp_path / "stage.log").exists()


# ------------------------------------------------------------------------------- a whole run


@pytest.fixture
def fake_stages(monkeypatch):
    """Three stages, the first of which fails and the second of which lacks something."""
    plans = {
        "build": Plan([program("print('oh no'); raise SystemExit(3)")]),
        "tests": Plan(obstacle="no moon tonight"),
        "training": Plan([program("print('all is well')")]),
    }
    stages = {name: (f"about {name}", partial(lambda p, _: p, p)) for name, p in plans.items()}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "describe_gpu_machine", lambda: MACHINE)


def test_a_failure_stops_nothing_but_shows_in_the_exit_code(fake_stages, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        gpu_check.main(["--output", str(tmp_path)])
    assert exit_.value.code == 1
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "build: about build ... failed: exit code 3",
        "tests: about tests ... skipped: no moon tonight",
        "training: about training ... passed",
    ]
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["machine"] == MACHINE
    assert [(s["stage"], s["result"]) for s in content["stages"]] == [
        ("build", "failed"),
        ("tests", "skipped"),
        ("training", "passed"),
    ]
    gpu_check.main(["--output", str(tmp_path), "--stages", "training", "tests"])


def test_report(fake_stages, tmp_path):
    with pytest.raises(SystemExit):
        gpu_check.main(["--output", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    for row in (MACHINE.items(), [("tests", "about tests", "skipped: no moon tonight", "0")]):
        for cells in row:
            assert re.search(r"^\| " + r" +\| +".join(cells) + r" +\|$", report, re.MULTILINE)
    assert "\n1 passed, 1 failed, 1 skipped\n" in report
    failure = report.split("\n## build: failed\n")[1].split("\n## ")[0]
    assert "\npython -c " in failure
    assert "\noh no\n" in failure
    assert str(ROOT) not in report


def test_stages_may_be_run_one_by_one(fake_stages, tmp_path):
    for stage in ("training", "tests"):
        gpu_check.main(["--output", str(tmp_path), "--stages", stage])
    content = json.loads((tmp_path / "report.json").read_text())
    outcomes = [(s["stage"], s["result"]) for s in content["stages"]]
    assert outcomes == [("tests", "skipped"), ("training", "passed")]
    assert "\n1 passed, 0 failed, 1 skipped\n" in (tmp_path / "report.md").read_text()


def test_report_is_there_before_the_end(fake_stages, tmp_path, monkeypatch):
    """Whoever is interrupted keeps what was found."""

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_check.STAGES, "training", ("about", interrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--output", str(tmp_path)])
    content = json.loads((tmp_path / "report.json").read_text())
    assert [s["result"] for s in content["stages"]] == ["failed", "skipped", "not run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_says_in_one_line_that_there_is_no_gpu():
    command = [sys.executable, ROOT / "dev" / "gpu_check.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(
        r"error: gpu-check needs a CUDA GPU: there is no GPU that PyTorch \S+ can use\n",
        result.stderr,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "lunch"], "error: argument --stages: invalid choice: 'lunch'"),
        (["--quick", "--write-docs"], "error: --quick measures nothing"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse_args(arguments)
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------- the real stages


def test_commands_name_things_that_exist():
    for stage in gpu_check.STAGES:
        for quick in ([], ["--quick"]):
            for command in plan_of(stage, "--mmcv", "mmcv.tar.gz", *quick).commands:
                paths = [w for w in command if re.fullmatch(r"[\w/]+\.(py|yaml)|tests", w)]
                assert all((ROOT / path).exists() for path in paths), command
    assert "def test_small_shapes(" in (ROOT / "tests" / "test_gpu.py").read_text()
    assert gpu_check.EXPECTED_RESULTS in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("arguments", [(), ("--quick",), ("--write-docs",)])
@pytest.mark.parametrize("stage", ["benchmark", "benchmark_half", "detectors"])
def test_benchmark_takes_its_options(stage, arguments, monkeypatch):
    monkeypatch.setattr(gpu_check, "missing_for_training", lambda: None)
    (command,) = plan_of(stage, *arguments).commands
    assert command[1:3] == ["-m", "carafe_d2.benchmark"]
    args = benchmark.parse_args(command[3:])
    assert args.device == "cuda"
    assert (args.detector is not None) == (stage == "detectors")
    if "--write-docs" in arguments:
        MarkdownBlock(ROOT / args.markdown, args.block)
    else:
        assert args.markdown is None


def test_mixed_precision_is_what_sets_the_trainings_apart(monkeypatch):
    monkeypatch.setattr(gpu_check, "missing_for_training", lambda: None)
    full, mixed = (plan_of(stage).commands[-1] for stage in ("training", "training_amp"))
    differences = [pair for pair in zip(full, mixed, strict=True) if pair[0] != pair[1]]
    assert differences[0] == ("False", "True")
    assert [Path(path).name for path in differences[1]] == ["training_float32", "training_amp"]
    assert gpu_check.EXPECTED_RESULTS in full


def test_what_is_missing_is_an_obstacle(monkeypatch):
    for function in ("find_nvcc", "find_sanitizer"):
        monkeypatch.setattr(gpu_check, function, lambda: None)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    needing = {
        "no nvcc found": ["build", "nvcc"],
        "compute-sanitizer is neither": ["memcheck", "racecheck", "initcheck", "synccheck"],
        "Detectron2 and pycocotools and OpenCV": ["detectors", "training", "training_amp"],
        "no --mmcv given; the benchmark runs without mmcv": ["mmcv"],
    }
    for obstacle, stages in needing.items():
        for stage in stages:
            assert (plan_of(stage).obstacle or "").startswith(obstacle), stage
    assert plan_of("mmcv", "--mmcv", "mmcv.tar.gz").obstacle.startswith("no nvcc found")
    assert plan_of("build", "--no-build").obstacle == "--no-build"
    for stage in ("tests", "grad_check", "benchmark"):
        assert plan_of(stage).obstacle is None
    assert "--no-plot" in plan_of("benchmark").commands[0]


def test_benchmark_meets_the_mmcv_that_was_built(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    arguments = ["--output", str(tmp_path)]
    assert plan_of("benchmark", *arguments).environment == {}
    library = tmp_path / "mmcv" / "mmcv" / "carafe.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (folder,) = plan_of("benchmark", *arguments).environment.values()
    assert (ROOT / folder).resolve() == tmp_path / "mmcv"


@pytest.mark.parametrize("part", ["bin", "compute-sanitizer"])
def test_finds_compute_sanitizer(part, tmp_path, monkeypatch):
    path = tmp_path / part / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.find_sanitizer() == str(path)
    command = plan_of("racecheck").commands[0]
    assert command[:3] == [str(path), "--tool", "racecheck"]
