"""What an array library does with functions: automatic differentiation, compilation, vectorisation."""

from __future__ import annotations

from collections.abc import Callable

from .compare import Finding
from .problems import Data
from .subject import Subject

CHECKS: dict[str, Callable[[Subject, Data], list[Finding]]] = {}
