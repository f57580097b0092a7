"""What the pages say is true: their commands, examples, links, and every error's entry.

Pages are the Markdown files of the root and of docs/. A command is a line of a block marked `sh`,
or code within a sentence that begins with the name of a program. What is not to be checked goes
into a block of another language.
"""

import argparse
import ast
import functools
import importlib.util
import inspect
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
from packaging.requirements import Requirement
from torch.distributed.run import get_args_parser

from carafe_d2.config import load_config
from carafe_d2.errors import UserError
from carafe_d2.lazy_config import load_lazy_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The blocks of a page that are marked with a language, and the line at which each begins."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        if block[2] == language:
            yield text.count("\n", 0, block.start(3)) + 1, textwrap.dedent(block[3])


def prose(page: Path) -> str:
    """A page without its blocks, line for line."""
    return FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- commands -----------------------------------------------------------------------------------

# What runs each program for real. The file has to exist and to mention the program.
RUNNERS = {
    "train_net.py": "tests/test_train_net.py",
    "torchrun": "tests/test_distributed.py",
    "setup.py": "tests/test_build.py",
    "carafe_d2.collect_env": "tests/test_collect_env.py",
    "carafe_d2.data.shapes": "tests/test_train_net.py",
    "carafe_d2.grad_check": "tests/test_grad_check.py",
    "python -m carafe_d2.benchmark": "tests/benchmark/test_benchmark.py",
    "dev/build_mmcv_carafe.py": "tests/dev/test_build_mmcv_carafe.py",
    "dev/compare.py": "tests/dev/test_compare.py",
    "python -m carafe_d2.benchmark.complexity": "tests/benchmark/test_complexity.py",
    "tools/convert_mmdet.py": "tests/tools/test_convert_mmdet.py",
    "dev/gpu_check.py": "tests/dev/test_gpu_check.py",
    "dev/install_detectron2.py": "tests/dev/test_install_detectron2.py",
    "tools/lazyconfig_train_net.py": "tests/test_train_net.py",
    "tools/plot_training.py": "tests/tools/test_plot_training.py",
    "tools/predict.py": "tests/tools/test_predict.py",
    "dev/reproduce.py": "tests/dev/test_reproduce.py",
    "tools/show_kernels.py": "tests/tools/test_show_kernels.py",
    "tools/visualize.py": "tests/tools/test_visualize.py",
}

# Programs whose commands run here, exactly as the pages give them: quick, and they write nothing.
RUN_HERE = {"python -m carafe_d2.benchmark.complexity"}

# What is neither ours nor run by anything, and why it may stand in a page all the same.
OTHERS = {
    "echo": "writes one line into a file",
    "head": "takes a line of scontrol's answer",
    "pip download": "needs a network; tests/dev/test_build_mmcv_carafe.py fakes it",
    "python -m build": "tests/test_packaging.py runs it",
    "python -m pip": "make quickstart runs it",
    "python -m pytest": "make test runs it",
    "python -m ruff": "make lint runs it",
    "scontrol": "needs SLURM",
}
WRAPPERS = {"srun"}  # the command begins behind it
# Scripts of the reader's, which a page shows, and the script of ours whose command line they take.
SHOWN = {"my_train_net.py": "train_net.py"}
PIP_OPTIONS = {"-e", "--editable", "--no-build-isolation", "--no-deps", "--upgrade", "-U"}


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a script, without assignments, redirections and comments."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"(^|\s)#.*$", r"\1", text, flags=re.MULTILINE)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        lexer.commenters = ""
        command: list[str] = []
        words = iter([*lexer, ";"])
        for word in words:
            if word in ("<", ">", ">>"):
                next(words)
            elif set(word) <= set(";|&"):
                if command:
                    yield command
                command = []
            elif not command and (assignment := re.match(r"\w+=(\$\()?", word)):
                # The command of NAME=$(command) counts, the value of NAME=value does not.
                command = [word[assignment.end() :]] if assignment[1] else []
            else:
                command.append(word)


def documented_commands() -> dict[tuple[str, ...], str]:
    """Every command of the pages, and the first place where it stands."""
    programs = ("make", "pip", "python", "torchrun")
    found: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for line, block in blocks(page, "sh"):
            for command in shell_commands(block):
                found.setdefault(tuple(command), f"{name_of(page)}:{line}")
        text = prose(page)
        for span in re.finditer(r"`([^`]+)`", text):
            if span[1].split()[0] in programs and len(span[1].split()) > 1:
                line = text.count("\n", 0, span.start()) + 1
                for command in shell_commands(" ".join(span[1].split())):
                    found.setdefault(tuple(command), f"{name_of(page)}:{line}")
    return found


COMMANDS = documented_commands()


@pytest.mark.parametrize("command", [pytest.param(c, id=place) for c, place in COMMANDS.items()])
def test_command_would_run(command, monkeypatch, capsys):
    """Its program exists and is run by a test or by CI, and takes these arguments."""
    monkeypatch.chdir(ROOT)
    try:
        check_command(list(command), monkeypatch)
    except (SystemExit, UserError) as error:
        pytest.fail(f"{shlex.join(command)}\n{capsys.readouterr().err}{error}")


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=place) for c, place in COMMANDS.items() if RUN_HERE & {*c}],
)
def test_command_runs(command):
    run = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout


def check_command(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless the command would run and something runs its program."""
    if command[0] in WRAPPERS:
        command = command[1:]
    if any(shlex.join(command[:length]) in OTHERS for length in (1, 2, 3)):
        return
    for path in command[1:]:
        if re.fullmatch(r"(configs|tests|tools)/[^*{}]+|docs/\S+\.md", path):
            assert (ROOT / path).exists(), f"{path} does not exist"
    program, *arguments = command
    if program == "make":
        check_make(arguments, monkeypatch)
    elif program == "pip":
        check_pip(arguments)
    elif program == "torchrun":
        check_runner("torchrun")
        args = get_args_parser().parse_args(arguments)
        check_python([args.training_script, *args.training_script_args], monkeypatch)
    elif program == "python":
        check_python(arguments, monkeypatch)
    else:
        pytest.fail(f"{program} is not known; explain it in OTHERS")


def check_runner(program: str) -> None:
    assert program in RUNNERS, f"nothing runs {program}; name in RUNNERS what does"
    name = program.removesuffix(".py").replace("/", ".").rpartition(".")[2]
    runner = (ROOT / RUNNERS[program]).read_text()
    assert re.search(rf"\b{name}\b", runner), f"{RUNNERS[program]} does not run {name}"


def test_every_program_is_run():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("carafe_d2/**/*.py")]
    for path in files:
        if '__name__ == "__main__"' in path.read_text():
            name = name_of(path)
            is_module = name.startswith("carafe_d2/")
            check_runner(name.removesuffix(".py").replace("/", ".") if is_module else name)


def check_make(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """CI runs the targets itself, or all that they do is checked as if a page said it."""
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    for argument in arguments:
        variable, is_variable, _ = argument.partition("=")
        pattern = rf"^{variable} \?=" if is_variable else rf"^{argument}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {argument}"
        if is_variable or re.search(rf"^make {argument}$", ci, re.MULTILINE):
            continue
        dry = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", "VENV=venv", argument],
            env={name: value for name, value in os.environ.items() if "MAKE" not in name},
            capture_output=True,
            text=True,
            check=True,
        )
        for command in shell_commands(dry.stdout):
            if command[0] == "venv/bin/python":
                check_command(["python", *command[1:]], monkeypatch)


def check_pip(arguments: list[str]) -> None:
    """Requirements are well formed, and extras of this package are known to pyproject.toml."""
    assert arguments[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) =", section, re.MULTILINE))
    for argument in arguments[1:]:
        ours = re.fullmatch(r"(?:\.|carafe[_-]d2|\S+\.whl)(?:\[(.*)\])?", argument)
        if ours:
            extras = {extra.strip() for extra in (ours[1] or "").split(",")} - {""}
            assert extras <= known, argument
        elif argument.startswith("-"):
            assert argument in PIP_OPTIONS, argument
        elif not argument.startswith("git+https://"):
            Requirement(argument)


def check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something runs the script or module, and it takes its arguments and its config."""
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
        return
    if arguments[0] == "-m":
        _, program, *arguments = arguments
        tool = importlib.import_module(program)
    else:
        program, *arguments = arguments
        program = SHOWN.get(program, program)
        tool = script(program)
    check_runner(program)
    if program == "setup.py":  # its command line is that of setuptools
        return
    args = parse(tool, [program, *arguments], monkeypatch)
    config = getattr(args, "config_file", None) or getattr(tool, "QUICK_START", None)
    if hasattr(args, "opts"):
        load = load_lazy_config if str(config).endswith(".py") else load_config
        load(str(config), args.opts)


@functools.cache
def script(path: str):
    """Imports a script of this repository."""
    sys.path.insert(0, str((ROOT / path).parent))  # as Python does that runs it
    try:
        spec = importlib.util.spec_from_file_location(f"documented_{Path(path).stem}", ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


class Parsed(Exception):
    """Ends a program as soon as it has read its command line."""


def parse(tool, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a program makes of its command line, by its own parser and its own checks."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*args):
        raise Parsed(parse_args(*args))

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        if hasattr(tool, "default_argument_parser"):  # Detectron2's
            return tool.default_argument_parser().parse_args()
        if hasattr(tool, "parse_args"):
            takes_arguments = inspect.signature(tool.parse_args).parameters
            return tool.parse_args(argv[1:]) if takes_arguments else tool.parse_args()
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed) as parsed:
            tool.main(argv[1:])
        return parsed.value.args[0]


# --- examples in Python -------------------------------------------------------------------------

# Files of the reader's that examples use.
FILES = {"my_config.yaml": "SOLVER:\n  BASE_LR: 0.01\n"}

PRINTS = re.compile(r"```python\n([^`]*)```\s+prints:?\s+```text\n([^`]*)```")

RUN_EXAMPLES = """
import contextlib, io, json, sys, traceback

failures = 0
for place, line, code, prints in json.load(sys.stdin):
    output = io.StringIO()
    try:
        # Empty lines in front, for line numbers in tracebacks to be those of the page.
        compiled = compile("\\n" * (line - 1) + code, place, "exec")
        with contextlib.redirect_stdout(output):
            exec(compiled, {"__name__": "example"})
        printed = "".join(text.rstrip() + "\\n" for text in output.getvalue().splitlines())
        assert prints in printed, f"{place}:{line} prints\\n{printed}"
    except BaseException:
        traceback.print_exc()
        failures += 1
sys.exit(failures)
"""


def examples() -> Iterator[tuple[str, int, str, str]]:
    """Page, line and code of each example, and what the page says that it prints."""
    for page in PAGES:
        outputs = dict(PRINTS.findall(page.read_text()))
        for line, code in blocks(page, "python"):
            yield name_of(page), line, code, outputs.get(code, "")


@pytest.mark.slow
def test_examples_run(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    run = subprocess.run(
        [sys.executable, "-c", RUN_EXAMPLES],
        input=json.dumps(list(examples())),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


# --- links --------------------------------------------------------------------------------------

# Whose addresses the pages may hold: sources and explanations, no place to install packages from.
HOSTS = {
    "arxiv.org",
    "cocodataset.org",
    "detectron2.readthedocs.io",
    "download.openmmlab.com",
    "github.com",
    "keepachangelog.com",
    "open-mmlab.s3.ap-northeast-2.amazonaws.com",
    "semver.org",
}


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
        assert target.exists(), link
        inside = target.relative_to(ROOT)  # raises where a link leaves the repository
        assert inside.parts[:1] not in [("output",), ("datasets",), ("build",)], link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_no_machine_and_no_package_index(page):
    text = page.read_text()
    assert not re.findall(r"(?<![\w.~/:}])/(?:home|root|work|tmp|mnt|scratch|Users)\b\S*", text)
    assert not re.findall(r"--(?:extra-)?index-url|--find-links", text)
    assert set(re.findall(r"https?://([\w.-]+)", text)) <= HOSTS


# --- errors -------------------------------------------------------------------------------------
#
# A message is written as a template: its fixed text, with … for whatever varies. The tables of the
# troubleshooting page whose first column is `message` give templates as well, where … may also
# stand for fixed text that was left out.

REPORTING = re.compile(r"(logger\.warning|warnings\.warn|parser\.error|sys\.exit)$")


def template(node: ast.AST, constants: dict[str, str]) -> str:
    """The template of an expression that gives a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value, constants) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, constants) + template(node.right, constants)
    if isinstance(node, ast.Name):
        return constants.get(node.id, "…")
    return "…"


def message_of(node: ast.AST) -> ast.AST | None:
    """The message of a statement or call that tells the user of something wrong."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        return node.exc.args[0]
    if isinstance(node, ast.Call) and node.args:
        function = ast.unparse(node.func)
        if function == "torch._check":
            return node.args[1].body  # of a lambda
        to_stderr = function == "print" and any(keyword.arg == "file" for keyword in node.keywords)
        return node.args[0] if to_stderr or REPORTING.search(function) else None
    return None


def python_templates(path: Path) -> tuple[set[str], set[str]]:
    """The templates of a file's messages, and of all its strings."""
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    nodes = list(ast.walk(tree))
    messages = {template(m, constants) for m in map(message_of, nodes) if m is not None}
    return messages, {template(node, constants) for node in nodes}


def cpp_templates(path: Path) -> set[str]:
    """The templates of what a file gives to check() and std::runtime_error()."""
    string = r'"(?:[^"\\]|\\.)*"'
    text = re.sub(rf"({string})|//.*", lambda match: match[1] or "", path.read_text())
    found = set()
    for call in re.finditer(r"\b(?:check|runtime_error)\(", text):
        depth, message = 1, ""
        for token in re.findall(rf"{string}|[()]|[^\"()]+", text[call.end() :]):
            depth += {"(": 1, ")": -1}.get(token, 0)
            if depth == 0:
                break
            if token.startswith('"'):
                message += token[1:-1]
            elif token.strip():
                message += "…"
        found.add(message)
    return found


def tidy(message: str) -> str:
    """One line, with one … for things that follow each other, none at the ends, and no prefix."""
    return re.sub("…+", "…", " ".join(message.split()).removeprefix("error: ")).strip("…")


@functools.cache
def templates() -> tuple[dict[str, str], set[str]]:
    """The templates of all messages with the file of each, and of all strings in the sources."""
    messages: dict[str, str] = {}
    strings: set[str] = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("carafe_d2/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        of_file, all_strings = python_templates(path)
        messages |= {tidy(message): name_of(path) for message in of_file}
        strings |= set(map(tidy, all_strings))
    for path in filter(Path.is_file, ROOT.glob("csrc/**/*")):
        messages |= {tidy(message): name_of(path) for message in cpp_templates(path)}
    strings |= set(map(tidy, (ROOT / "Makefile").read_text().splitlines()))
    # One without words of its own, such as "…: …", only passes on another message.
    return {message: path for message, path in messages.items() if has_words(message)}, strings


def has_words(message: str) -> bool:
    return len(re.findall("[A-Za-z]", message)) > 4


def entries() -> list[str]:
    """The messages that the troubleshooting page explains."""
    tables = re.findall(r"^\| message \|.*\n((?:\|.*\n)+)", TROUBLESHOOTING.read_text(), re.M)
    rows = [row for table in tables for row in table.splitlines()[1:]]
    cells = [re.findall(r"`([^`]+)`", row.split(" | ")[0]) for row in rows]
    assert cells and all(cells), "a row explains no message"
    return [entry for cell in cells for entry in cell]


def explains(entry: str, message: str) -> bool:
    pattern = ".*".join(map(re.escape, entry.split("…")))
    return re.fullmatch(pattern, message) is not None


def test_every_error_is_explained():
    known = entries()
    missing = [
        f"{path}: {message}"
        for message, path in templates()[0].items()
        if not any(explains(entry, message) for entry in known)
    ]
    assert not missing, f"{name_of(TROUBLESHOOTING)} does not explain\n" + "\n".join(missing)


def test_explained_errors_exist():
    messages, strings = templates()
    known = entries()
    assert sorted(set(known)) == sorted(known)
    assert all(map(has_words, known))
    stale = [e for e in known if not any(explains(e, text) for text in strings | messages.keys())]
    assert not stale, "no source has\n" + "\n".join(stale)
