"""Which engine runs a pass of a problem, and how it is cut: from what was measured on the device.

A *table* is the result file of ``python -m laser_torch.tune``: times of every engine and tile at a grid of problems on
one device. The package ships tables; a table of one's own takes their place (:data:`VARIABLE`, or :func:`own_table`).
Without a table of the device, one of the same compute capability serves, and without that the defaults of the kernels.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from laser_core import Problem

from . import cudnn, hopper
from .call import INTERPRETED, Plan

Pass = Literal["forward", "backward"]
VARIABLE = "LASER_TORCH_TABLE"  # the path of a table that is taken, whatever the device
ENGINES: dict[Pass, tuple[str, ...]] = {  # where nothing was measured, the first of these that serves a problem
    "forward": ("hopper", "triton", "cudnn"),
    "backward": ("hopper", "triton"),
}
WIDTHS = (64, 128, 256)  # of tiles: head and value dims are padded to one


class Choice(NamedTuple):
    """An engine, its tile sizes (None: its own default), and in words what the choice rests on."""

    engine: str
    tile: tuple[Any, ...] | None
    why: str


def own_table(device: str) -> Path:
    """Where a table of one's own for a device of that name is looked for."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "laser-attention" / f"{slug(device)}.json"


def slug(device: str) -> str:
    """The name of a device as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def table(device: str, capability: tuple[int, int]) -> dict[str, Any] | None:
    """The table for a device: the one :data:`VARIABLE` names, one's own, the shipped one, one of like capability.

    Raises:
        ValueError: A file that is no table; the message names it.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return _read(Path(named))
    if own_table(device).exists():
        return _read(own_table(device))
    shipped = [_read(path) for path in _shipped()]
    alike = [t for t in shipped if tuple(t["capability"]) == capability]
    return max(alike, key=lambda t: (t["device"] == device, t["date"]), default=None)


def _shipped() -> list[Path]:
    folder = Path(str(resources.files(__package__))) / "tables"
    return sorted(folder.glob("*.json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"device", "capability", "date", "rows"} - set(found)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no table of engines: {error}") from error
    if missing:
        raise ValueError(f"{path}: no table of engines: it has no {', '.join(sorted(missing))}")
    return found


def chosen(plan: Plan, which: Pass) -> Choice:
    """The fastest engine that serves a pass of a call. Made by ``plan.prepared(chosen, which)``."""
    able = ENGINES[which]
    if INTERPRETED:
        able = ("triton",)
    elif not (plan.fits("q") and plan.fits("k")):  # the hardware cannot copy tiles of the arrays as they lie
        able = tuple(engine for engine in able if engine != "hopper")
    return _fastest(which, plan.problem, plan.device, able)


def how(problem: Problem) -> str:
    """A line for each pass: which engine would run it on the current device, and why."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = ((which, _fastest(which, problem, device, able)) for which, able in ENGINES.items())
    return "\n".join(f"{which}: {choice.engine} ({choice.why})" for which, choice in found)


def _fastest(which: Pass, problem: Problem, device: torch.device, able: tuple[str, ...]) -> Choice:
    """The fastest of these engines that serves a pass of a problem on a device."""
    found = None
    if device.type == "cuda":
        found = table(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    serving = (c for c in choices(which, problem, found) if c.engine in able)
    return next(choice for choice in serving if why_not(choice.engine, problem, device) is None)


def why_not(engine: str, problem: Problem, device: torch.device) -> str | None:
    """Why an engine does not serve a problem on a device; None if it does."""
    if engine == "triton":
        return None
    if engine == "cudnn":
        return cudnn.why_not(problem) or cudnn.missing(device)
    return hopper.why_not(problem) or hopper.missing(device)


def choices(which: Pass, problem: Problem, found: dict[str, Any] | None) -> list[Choice]:
    """The engines for a pass, the fastest first, each once with its best tile; then those that were not measured.

    Times are those of the nearest length that was measured with this width and causality, in bfloat16 without a
    gradient: float16 is as fast, and what is kept for a gradient costs every engine the same.
    """
    order: dict[str, Choice] = {}
    rows = [] if found is None else _alike(which, problem, found["rows"])
    for row in sorted(rows, key=lambda row: row["ms"]):
        where = f"{row['ms']:.3g} ms at L = {row['length']} on {found['device']}, {found['date']}" if found else ""
        tile = None if row["tile"] is None else tuple(tuple(x) if isinstance(x, list) else x for x in row["tile"])
        order.setdefault(row["engine"], Choice(row["engine"], tile, where))
    for engine in ENGINES[which]:
        order.setdefault(engine, Choice(engine, None, "not measured: the first that serves the problem"))
    return list(order.values())


def width(problem: Problem) -> int | None:
    """The tile width of a problem among :data:`WIDTHS`, or None."""
    widest = max(problem.head_dim, problem.value_dim)
    return next((w for w in WIDTHS if w // 2 < widest <= w), None)


def _alike(which: Pass, problem: Problem, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a problem's pass, width and causality, at the measured length that is nearest to its own."""
    if problem.dtype == "float32":
        return []
    key = (which, width(problem), problem.causal is not None)
    same = [row for row in rows if "ms" in row and (row["pass"], row["width"], row["causal"]) == key]
    length = max(problem.key_length, 1)
    nearest = min({row["length"] for row in same}, key=lambda n: (abs(math.log2(n / length)), n), default=None)
    return [row for row in same if row["length"] == nearest]
