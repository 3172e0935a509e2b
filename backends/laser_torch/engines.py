"""Which engine runs a pass of a problem, and how it is cut: from what was measured on the device.

The times of every engine and tile are in tables that ``python -m laser_torch.tune`` writes; ``laser_core._tables`` says
where they are looked for. Without a table of such a device it is the defaults of the kernels.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from laser_core import Problem, _tables

from . import cudnn, hopper
from .call import INTERPRETED, Plan

Pass = Literal["forward", "backward"]
ENGINES: dict[Pass, tuple[str, ...]] = {  # where nothing was measured, the first of these that serves a problem
    "forward": ("hopper", "triton", "cudnn"),
    "backward": ("hopper", "triton"),
}


class Choice(NamedTuple):
    """An engine, its tile sizes (None: its own default), and in words what the choice rests on."""

    engine: str
    tile: tuple[Any, ...] | None
    why: str


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
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        found = _tables.find("laser_torch", name, capability)
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

    Times are without a gradient: what is kept for one costs every engine the same.
    """
    order: dict[str, Choice] = {}
    for row, where in _tables.fastest_first(found, which, problem):
        tile = None if row["tile"] is None else tuple(tuple(x) if isinstance(x, list) else x for x in row["tile"])
        order.setdefault(row["engine"], Choice(row["engine"], tile, where))
    for engine in ENGINES[which]:
        order.setdefault(engine, Choice(engine, None, "not measured: the first that serves the problem"))
    return list(order.values())
