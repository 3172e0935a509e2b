"""Tables of times: which engine of a package runs a problem fastest, by what was measured on the device.

A *table* is the result file of a package's ``tune`` module: times of its engines at a grid of problems on one device. A
package ships tables in a folder of that name; a table of one's own takes their place. Without a table of the device,
one of the same compute capability serves.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from ._problem import Problem

Table: TypeAlias = dict[str, Any]

WIDTHS = (64, 128, 256)  # of tiles: head and value dims are padded to one


def variable(package: str) -> str:
    """The environment variable that names a table to be taken, whatever the device."""
    return f"{package.upper()}_TABLE"


def own(package: str, device: str) -> Path:
    """Where a table of one's own for a device of that name is looked for."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "laser-attention" / package / f"{slug(device)}.json"


def slug(device: str) -> str:
    """The name of a device as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def find(package: str, device: str, capability: tuple[int, ...]) -> Table | None:
    """The table for a device: the one :func:`variable` names, one's own, the shipped one, one of like capability.

    Raises:
        ValueError: A file that is no table; the message names it.
    """
    named = os.environ.get(variable(package))
    if named:
        return read(Path(named))
    if own(package, device).exists():
        return read(own(package, device))
    alike = [t for t in map(read, shipped(package)) if tuple(t["capability"]) == capability]
    return max(alike, key=lambda t: (t["device"] == device, t["date"]), default=None)


def shipped(package: str) -> list[Path]:
    """The tables in a package."""
    return sorted((Path(str(resources.files(package))) / "tables").glob("*.json"))


def read(path: Path) -> Table:
    """A table from a file."""
    try:
        found: Table = json.loads(path.read_text(encoding="utf-8"))
        missing = {"device", "capability", "date", "rows"} - set(found)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no table of engines: {error}") from error
    if missing:
        raise ValueError(f"{path}: no table of engines: it has no {', '.join(sorted(missing))}")
    return found


def write(
    path: Path, device: str, capability: tuple[int, ...], packages: tuple[str, ...], rows: Iterable[dict[str, Any]]
) -> None:
    """Write a table, and its rows to standard output, as they come: nothing is lost."""
    versions = {}
    for package in ("laser-attention", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    table: Table = {
        "device": device,
        "capability": capability,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": os.environ.get("LASER_COMMIT", ""),
        "versions": versions,
        "rows": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        print(json.dumps(row), flush=True)
        table["rows"].append(row)
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(path)


def width(problem: Problem) -> int | None:
    """The tile width of a problem among :data:`WIDTHS`, or None."""
    widest = max(problem.head_dim, problem.value_dim)
    return next((w for w in WIDTHS if w // 2 < widest <= w), None)


def fastest_first(found: Table | None, which: str, problem: Problem) -> list[tuple[Table, str]]:
    """What was timed for a pass of such a problem, with where and when in words.

    Times are those of the nearest length that was measured with this width and causality, in bfloat16: float16 is as
    fast. None is of float32.
    """
    if found is None or problem.dtype == "float32":
        return []
    key = (which, width(problem), problem.causal is not None)
    same = [row for row in found["rows"] if "ms" in row and (row["pass"], row["width"], row["causal"]) == key]
    length = max(problem.key_length, 1)
    nearest = min({row["length"] for row in same}, key=lambda n: (abs(math.log2(n / length)), n), default=None)
    rows = sorted((row for row in same if row["length"] == nearest), key=lambda row: float(row["ms"]))
    return [(r, f"{r['ms']:.3g} ms at L = {r['length']} on {found['device']}, {found['date']}") for r in rows]
