"""Where sabotaged implementations are listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from laser_core import Problem

from .honest import Honest

FLAWS: dict[str, type[Honest]] = {}


def flaw(caught_by: str) -> Callable[[type[Honest]], type[Honest]]:
    """Register a sabotaged implementation, and the level that has to notice."""

    def register(cls: type[Honest]) -> type[Honest]:
        cls.caught_by = caught_by
        FLAWS[cls().name()] = cls
        return cls

    return register


def half(problem: Problem) -> Any:
    """The dtype of a half precision problem, or None."""
    return {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(problem.dtype)
