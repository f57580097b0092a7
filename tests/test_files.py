"""Whole files, tables, and blocks of a page."""

import pytest

from carafe_d2.errors import UserError
from carafe_d2.files import MarkdownBlock, format_table, write_file

PAGE = "before\n<!-- begin: {} -->\nold\n<!-- end -->\nafter\n"


def test_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    write_file(path, "text")
    write_file(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    with pytest.raises(UserError, match=r"cannot write .*file/below: Not a directory|File exists"):
        write_file(path / "below", "text")
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_block_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("a") + PAGE.format("b"))
    MarkdownBlock(page, "b").write("new\n")
    assert page.read_text() == PAGE.format("a") + PAGE.format("b").replace("old", "\nnew\n")
    for name in ("c", "a -->\n<!-- begin: a"):
        with pytest.raises(UserError, match="has no block"):
            MarkdownBlock(page, name)
    page.write_text("<!-- begin: a -->\nbut no end")
    with pytest.raises(UserError, match="has no block"):
        MarkdownBlock(page, "a")
    with pytest.raises(UserError, match=r"cannot read .*absent\.md: No such file"):
        MarkdownBlock(tmp_path / "absent.md", "a")


def test_table_aligns_text_left_and_numbers_right():
    rows = [["a", "1.50"], ["long", "-"]]
    assert format_table(["", "ms"], rows).splitlines()[2:] == ["a     1.50", "long     -"]
    lines = format_table(["", "ms"], rows, markdown=True).splitlines()
    assert lines == ["|      |   ms |", "|:-----|-----:|", "| a    | 1.50 |", "| long |    - |"]
