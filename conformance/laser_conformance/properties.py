"""Laws that need no reference, over problems that Hypothesis draws."""

from __future__ import annotations

from collections.abc import Callable

from .compare import Finding
from .problems import Data
from .subject import Subject

CHECKS: dict[str, Callable[[Subject, Data], list[Finding]]] = {}
