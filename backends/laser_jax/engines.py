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
ENGINES: dict[Pass, tuple[str, ...]] = {  # where nothing was measured, in this order
    "forward": ("jax-mosaic", "jax-cudnn", "jax-xla"),
    "forward and backward": ("jax-mosaic", "jax-xla"),
}
_BEST, _STEP, _NEVER = 50, 5, -20  # priorities; those of the others are lower than any but the last


def order(which: Pass, problem: Problem) -> dict[str, str]:
    """The engines, the fastest first, each with what that rests on."""
    gpu = served.gpu()
    found = None if gpu is None else _tables.find("laser_jax", gpu.device_kind, served.capability() or ())
    known: dict[str, str] = {}
    for row, why in _tables.fastest_first(found, which, problem):
        known.setdefault(row["engine"], why)
    return known | {name: "not measured" for name in ENGINES[which] if name not in known}


def priority(name: str, elsewhere: int) -> Callable[[Problem], int]:
    """The priority of an engine by its place in that order; ``elsewhere`` where the device is no GPU."""

    def of(problem: Problem) -> int:
        if problem.device != "cuda":
            return elsewhere
        places = list(order(_pass(problem), problem))
        return _BEST - _STEP * places.index(name) if name in places else _NEVER

    return of


def how(name: str) -> Callable[[Problem], str | None]:
    """A line for each pass on what the place of an engine rests on."""

    def of(problem: Problem) -> str | None:
        if problem.device != "cuda":
            return None
        found = ((which, order(which, problem).get(name, "not by this one")) for which in PASSES)
        return "\n".join(f"{which}: {why}" for which, why in found)

    return of


def _pass(problem: Problem) -> Pass:
    return PASSES[problem.gradient]
