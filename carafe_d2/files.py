"""What programs leave behind: whole files, tables, and blocks of a Markdown page."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:  # it is not installed where only the operator is used
    from matplotlib.figure import Figure


def write_file(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file so that under its name there is never a part of it.

    Folders above it that are missing are made. An interruption leaves the old file, or none.

    Raises:
        UserError: it cannot be written there.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save_figure(path: str | Path, figure: "Figure", dpi: int = 100) -> None:
    """Writes a plot of Matplotlib as a PNG.

    Raises:
        UserError: the file cannot be written.
    """
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    write_file(path, data.getvalue())


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    markdown: bool = False,
    text_columns: int = 1,
) -> str:
    """A table for the terminal or for a Markdown page.

    Args:
        header: of each column.
        rows: their cells.
        markdown: whether it is for a page.
        text_columns: columns at the left that hold text; the others hold numbers.
    """
    from tabulate import tabulate  # the rest of this module does without

    alignment = ["left" if i < text_columns else "right" for i in range(len(header))]
    style = "pipe" if markdown else "simple"
    return tabulate(rows, header, tablefmt=style, disable_numparse=True, colalign=alignment)


class MarkdownBlock:
    """What stands in a page between ``<!-- begin: NAME -->`` and the next ``<!-- end -->``.

    Made before anything is measured, for measuring takes minutes.

    Raises:
        UserError: the page cannot be read, or has no such block, or more than one.
    """

    def __init__(self, page: str | os.PathLike, name: str):
        self._page = page
        begin, self._end = f"<!-- begin: {name} -->", "<!-- end -->"
        try:
            self._before, after = Path(page).read_text().split(begin)
            _, self._after = after.split(self._end, 1)
        except OSError as error:
            raise UserError(f"cannot read {page}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{page} has no block {begin} {self._end}") from error
        self._before += begin

    def write(self, content: str) -> None:
        """Replaces what stands in the block; the page is written whole or not at all."""
        write_file(self._page, f"{self._before}\n\n{content.strip()}\n\n{self._end}{self._after}")
