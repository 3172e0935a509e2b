"""The demo's text: Python's own standard library, or the files given, split into training and held-out bytes."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ._common import Usage

Bytes: TypeAlias = NDArray[np.uint8]
HELD_OUT = 10  # every tenth file, or the last tenth of a single one
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Training and held-out bytes, and where they come from."""

    train: Bytes
    held_out: Bytes
    source: str


def read(paths: Sequence[str], context: int) -> Text:
    """The text of ``paths``, or of the standard library where there are none.

    Raises:
        Usage: A file cannot be read, or there is too little text for windows of ``context`` + 1 bytes.
    """
    if paths:
        files = [_read_file(path) for path in paths]
        source = paths[0] if len(paths) == 1 else f"{len(paths)} files"
    else:
        files = _standard_library()
        source = f"the standard library of Python {sysconfig.get_python_version()}, {len(files)} files"
    if len(files) == 1:
        cut = len(files[0]) - len(files[0]) // HELD_OUT
        parts = [files[0][:cut]], [files[0][cut:]]
        rule = "its last tenth held out"
    else:
        parts = [f for n, f in enumerate(files) if n % HELD_OUT != 1], files[1::HELD_OUT]
        rule = "one file in ten held out"
    train, held_out = (np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in parts)
    for name, part in (("training", train), ("held-out", held_out)):
        if part.size < 2 * (context + 1):
            raise Usage(
                f"--text: got {part.size} bytes of {name} text; allowed: {2 * (context + 1)} or more, "
                f"two windows of --context {context} and the byte after it"
            )
    return Text(train, held_out, f"{source}, {rule}")


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Usage(f"--text: cannot read {path}: {error.strerror}") from None


def _standard_library() -> list[bytes]:
    """The sources of the standard library without its tests, in a fixed order."""
    files = []
    for folder, inside, names in os.walk(sysconfig.get_path("stdlib")):
        inside[:] = sorted(set(inside) - EXCLUDED)
        for name in sorted(names):
            if name.endswith(".py"):
                try:
                    files.append(Path(folder, name).read_bytes())
                except OSError:  # a dangling link or a private file is no reason not to train
                    continue
    if not files:
        raise Usage("--text: this Python has no sources of its standard library; give a file")
    return files


def windows(text: Bytes, starts: NDArray[np.int64], context: int) -> Bytes:
    """The ``context`` + 1 bytes from each of ``starts``, ``(len(starts), context + 1)``."""
    taken: Bytes = text[starts[:, None] + np.arange(context + 1)]
    return taken
