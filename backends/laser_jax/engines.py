"""Which engine is taken on an NVIDIA GPU where none is named: from what was measured on the device.

Their times are in tables that ``python -m laser_jax.tune`` writes; ``laser_core._tables`` says where they are looked
for. JAX need not be there to ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from laser_core import Problem, _tables

from . import served

Pass = Literal["forward", "forward and backward"]  # without a gradient, or with one
PASSES: tuple[Pass, ...] = ("forward", "forward and backward")
ENGINES = ("jax-mosaic", "jax-cudnn", "jax-xla")  # where nothing was measured, in this order
_BEST, _STEP = 50, 5  # priorities; those of the others are lower


def order(which: Pass, problem: Problem) -> dict[str, str]:
    """The engines, the fastest first, each with what that rests on."""
    gpu = served.gpu()
    found = None if gpu is None else _tables.find("laser_jax", gpu.device_kind, served.capability() or ())
    known: dict[str, str] = {}
    for row, why in _tables.fastest_first(found, which, problem):
        known.setdefault(row["engine"], why)
    return known | {name: "not measured" for name in ENGINES if name not in known}


def priority(name: str, elsewhere: int) -> Callable[[Problem], int]:
    """The priority of an engine by its place in that order; ``elsewhere`` where the device is no GPU."""

    def of(problem: Problem) -> int:
        if problem.device != "cuda":
            return elsewhere
        return _BEST - _STEP * list(order(_pass(problem), problem)).index(name)

    return of


def how(name: str) -> Callable[[Problem], str | None]:
    """A line on what the place of an engine rests on."""

    def of(problem: Problem) -> str | None:
        if problem.device != "cuda":
            return None
        which = _pass(problem)
        return f"{which}: {order(which, problem)[name]}"

    return of


def _pass(problem: Problem) -> Pass:
    return PASSES[problem.gradient]
