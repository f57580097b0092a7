"""The documentation: its links, its commands, its examples in Python."""

import argparse
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from carafe_d2.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """The blocks of a page that are marked with a language, each with its place."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        if block[2] == language:
            line = text.count("\n", 0, block.start(3)) + 1
            yield f"{name_of(page)}:{line}", textwrap.dedent(block[3])


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text())


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- commands -----------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """The command lines of all shell blocks that run a program of ours, each with its place."""
    for page in PAGES:
        for place, block in blocks(page, "sh"):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                command = re.sub(r"(^|\s)#.*|[|&;>].*", "", line).strip()
                command = re.sub(r"^(\w+=\S*\s+|srun\s+)+", "", command)
                if re.match(r"(python|torchrun|make)\b", command):
                    yield f"{place} {command}", command


class Parsed(Exception):
    """Ends a program as soon as it has read its command line."""


@pytest.mark.parametrize("command", [pytest.param(c, id=place) for place, c in commands()])
def test_command_names_a_program_and_its_options(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    if program == "make":
        makefile = Path("Makefile").read_text()
        for word in arguments:
            pattern = rf"^{word.split('=')[0]} \?=" if "=" in word else rf"^{word}:"
            assert re.search(pattern, makefile, re.MULTILINE), word
        return
    for path in filter(re.compile(r"(configs|tests)/[^*{}]+").fullmatch, arguments):
        assert Path(path).exists(), path
    if program == "torchrun":
        args = get_args_parser().parse_args(arguments)
        arguments = [args.training_script, *args.training_script_args]
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    module = arguments[1] if arguments[0] == "-m" else arguments[0].removesuffix(".py")
    if module in ("build", "pip", "pytest", "ruff", "setup") or module.startswith("my_"):
        return
    tool = importlib.import_module(module.replace("/", "."))
    if hasattr(tool, "config_file") or module.endswith(".shapes"):
        return
    if not hasattr(tool, "main"):
        tool = importlib.import_module(f"{module}.__main__")
    argv = arguments[2:] if arguments[0] == "-m" else arguments[1:]
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise Parsed(parse_args(parser, argv if args is None else args, namespace))

    monkeypatch.setattr(sys, "argv", [module, *argv])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    try:
        if hasattr(tool, "default_argument_parser"):  # Detectron2's
            tool.default_argument_parser().parse_args(argv)
        else:
            tool.main(argv)
    except Parsed:
        pass
    except (SystemExit, UserError) as error:
        pytest.fail(f"{command}\n{capsys.readouterr().err}{error}")


# --- examples in Python -------------------------------------------------------------------------

# A file of the reader's that examples use.
FILES = {"my_config.yaml": "SOLVER:\n  BASE_LR: 0.01\n"}
PRINTS = re.compile(r"```python\n([^`]*)```\s+prints:?\s+```text\n([^`]*)```")
RUN_EXAMPLES = """
import contextlib, io, json, sys, traceback

failures = 0
for place, code, prints in json.load(sys.stdin):
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(code, place, "exec"), {"__name__": "example"})
        printed = "".join(text.rstrip() + "\\n" for text in output.getvalue().splitlines())
        assert prints in printed, f"{place} prints\\n{printed}"
    except BaseException:
        traceback.print_exc()
        failures += 1
sys.exit(failures)
"""


@pytest.mark.slow
def test_examples_run(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    examples = [
        (place, code, dict(PRINTS.findall(page.read_text())).get(code, ""))
        for page in PAGES
        for place, code in blocks(page, "python")
    ]
    run = subprocess.run(
        [sys.executable, "-c", RUN_EXAMPLES],
        input=json.dumps(examples),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


# --- links and names ----------------------------------------------------------------------------


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "`code`", prose(page))
    links = re.findall(
        r"\]\(([^)\s]+)[^)]*\)|^\[[^\]]+\]: *(\S+)|(?:src|href)=\"(.*?)\"", text, re.MULTILINE
    )
    for link in filter(None, (target for groups in links for target in groups)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


# fidelity.md names files of MMDetection's.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "fidelity.md"], ids=name_of)
def test_files_that_are_named_exist(page):
    folders = r"(?:carafe_d2|configs|csrc|dev|docs|tests|tools)/"
    for name in re.findall(rf"`({folders}[\w./-]*\.\w+)`", prose(page)):
        assert "NAME" in name or (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_no_machine_and_no_package_index(page):
    text = page.read_text()
    assert not re.findall(r"(?<![\w.~/:}])/(?:home|root|work|tmp|mnt|scratch|Users)\b\S*", text)
    assert not re.findall(r"--(?:extra-)?index-url|--find-links", text)
