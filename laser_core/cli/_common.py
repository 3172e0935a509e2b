"""What the subcommands share: the two kinds of failure, and aligned text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


class Usage(Exception):
    """The command line asks for something that makes no sense: exit code 2."""


class Failure(Exception):
    """The command line is right, and the run failed: exit code 1."""


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Rows of text in aligned columns, those in ``right`` flush right, the last one without padding."""
    lines = [list(header)] if header else []
    lines += [list(row) for row in rows]
    widths = [max(_width(cell) for cell in column) for column in zip(*lines, strict=True)]
    if header:
        lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(
            _pad(cell, width, column in right) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _pad(cell: str, width: int, right: bool) -> str:
    space = " " * (width - _width(cell))
    return space + cell if right else cell + space


def _width(text: str) -> int:
    """Columns that ``text`` takes on a terminal: a combining mark takes none."""
    return sum(not unicodedata.combining(character) for character in text)
