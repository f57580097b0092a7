"""What the pages say is true: their links, paths, names, commands and Python examples.

A command is a line of a block marked `sh`, or code within a sentence that begins with the name of
a program. What is not to be checked goes into a block of another language.
"""

import contextlib
import functools
import importlib
import io
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from carafe_d2.config import load_config
from carafe_d2.errors import UserError
from carafe_d2.lazy_config import load_lazy_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?:carafe_d2|configs|csrc|dev|docs|tests|tools)/[\w./-]*")
# Where the command line of a script is read that only passes it on; one is the reader's own.
PROGRAMS = dict.fromkeys(["train_net.py", "my_train_net.py"], "carafe_d2/train_net.py")
# What takes seconds, other tests run: of export, configs, replacing. LazyConfigs are no scripts.
NOT_RUN = re.compile(
    r"(?:torch|carafe_d2)\.onnx|build_model|torchvision|YOLO|^from \.", re.MULTILINE
)
PRINTS = re.compile(r"```python\n([^`]*)```\s+prints:?\s+```text\n([^`]*)```")


def blocks(language: str) -> Iterator:
    """Parameters of a test: the blocks of all pages that are marked with a language."""
    for page in PAGES:
        text = page.read_text()
        for block in FENCE.finditer(text):
            if block[2] == language:
                line = text.count("\n", 0, block.start(3)) + 1
                yield pytest.param(textwrap.dedent(block[3]), id=f"{page.name}:{line}")


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text())


def code_spans(page: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


@EVERY_PAGE
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "`code`", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_relative_to(ROOT) and target.exists(), link
            assert not anchor or anchor in anchors(target), link


@EVERY_PAGE
def test_paths_and_names_exist(page):
    spans = code_spans(page)
    paths = [span for span in spans if PATH.fullmatch(span) and "NAME" not in span]
    assert not [path for path in paths if not (ROOT / path).exists()]
    for name in filter(re.compile(r"carafe_d2(\.\w+)+").fullmatch, spans):
        pkgutil.resolve_name(name)  # raises where there is none


@EVERY_PAGE
def test_pages_name_no_machine_and_no_package_index(page):
    text = page.read_text()
    assert not re.findall(r"(?<![\w.~/:}])/(?:home|root|work|tmp|mnt|scratch|Users)\b\S*", text)
    assert not re.findall(r"--(?:extra-)?index-url|--find-links", text)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a script that runs something of this repository's."""
    for line in re.sub(r"\\\n", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>()")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            # An assignment, and what starts the same command elsewhere, are no part of it.
            if word and set(word) <= set(";|&<>()"):
                if command and command[0] in ("make", "python", "torchrun"):
                    yield command
                command = []
            elif command or not re.match(r"\w+=|srun$", word):
                command.append(word)


INLINE = [
    pytest.param(span, id=f"{page.name}: {span}")
    for page in PAGES
    for span in code_spans(page)
    if re.match(r"(?:\w+=\S* )*(?:make|python|torchrun) [\w./-]", span)
]


@pytest.mark.parametrize("script", [*blocks("sh"), *INLINE])
def test_commands_would_run(script, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for command in commands(script):
        try:
            check_command(command)
        except (SystemExit, UserError) as error:
            pytest.fail(f"{shlex.join(command)}\n{capsys.readouterr().err}{error}")


def check_command(command: list[str]) -> None:
    """The program exists, takes these arguments by its own parser, and finds its config."""
    program, *arguments = command
    if program == "make":
        for argument in arguments:
            name, equals, _ = argument.partition("=")
            pattern = rf"^{name} \?=|\$\({name}\)" if equals else rf"^{name}:"
            assert re.search(pattern, (ROOT / "Makefile").read_text(), re.MULTILINE), argument
        return
    missing = [a for a in arguments if PATH.fullmatch(a) and not (ROOT / a).exists()]
    assert not missing, missing
    if program == "torchrun":
        args = get_args_parser().parse_args(arguments)
        arguments = [args.training_script, *args.training_script_args]
    is_module = arguments[0] == "-m"
    program, *arguments = arguments[is_module:]
    if is_module:
        spec = find_spec(program)
        assert spec, f"there is no module {program}"
        name = f"{program}.__main__" if spec.submodule_search_locations else program
    else:
        path = PROGRAMS.get(program, program)
        assert (ROOT / path).is_file(), f"there is no {path}"
        name = path.removesuffix(".py").replace("/", ".")
    if name.partition(".")[0] not in ("carafe_d2", "dev", "tools"):
        return  # pip, pytest and the like, or setup.py
    module = importlib.import_module(name)
    if hasattr(module, "parse_args"):
        args = module.parse_args(arguments)
    elif hasattr(module, "default_argument_parser"):  # Detectron2's
        args = module.default_argument_parser().parse_args(arguments)
    else:
        return
    if getattr(args, "config_file", None) and hasattr(args, "opts"):
        load = load_lazy_config if str(args.config_file).endswith(".py") else load_config
        load(str(args.config_file), args.opts)


@pytest.mark.parametrize("code", list(blocks("python")))
def test_examples_run(code, tmp_path, monkeypatch, request):
    """They run and print what the page says; of those that take long, only the imports do."""
    monkeypatch.chdir(tmp_path)
    if "ultralytics" in code:
        request.getfixturevalue("ultralytics")
    if NOT_RUN.search(code):
        compile(code, "example", "exec")
        code = "\n".join(re.findall(r"^(?:import|from) \w.*$", code, re.MULTILINE))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {"__name__": "example"})
    printed = "".join(line.rstrip() + "\n" for line in output.getvalue().splitlines())
    prints = dict(pair for page in PAGES for pair in PRINTS.findall(page.read_text()))
    assert prints.get(code, "") in printed
