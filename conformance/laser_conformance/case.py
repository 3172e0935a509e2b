"""The levels, each a promise with a name, and what a case is."""

from __future__ import annotations

from dataclasses import dataclass, field

from .problems import Spec

LEVELS = {
    "forward": "Outputs of plain problems are right.",
    "gradients": "So are the gradients of query, key and value.",
    "masks": "Causality both ways, windows, grouped heads, lengths, boolean masks, queries that see nothing.",
    "options": "Bias, soft cap, β as a number and as an array, log-sum-exp, scale; with their gradients.",
    "precision": "Each dtype served is as precise as promised, at every range of values.",
    "hostile": "Numbers that break naive implementations: large scores, outliers, subnormals, the largest numbers.",
    "isolation": "What a query cannot see does not change its results, NaN and ∞ included.",
    "determinism": "The same bits from run to run, forward and backward.",
    "layout": "Any strides, any size: odd, around tile edges, one, none.",
    "laws": "What holds for every problem and needs no reference: shifts, limits, permutations, merging, prefixes.",
    "framework": "What the array library does with functions: automatic differentiation, compilation, vectorisation.",
    "scale": "Long sequences, and addresses beyond 2³¹.",
}

EACH = "each"  # in every dtype that is served
TWO = "two"  # in one wide and one narrow dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question to an implementation.

    Attributes:
        id: ``level/name``, plus ``+grad`` where gradients are asked for.
        sentence: What it is about.
        spec: The problem.
        check: The name of what is done with it, in :mod:`laser_conformance.checks` and its neighbours.
        dtypes: ``EACH`` or ``TWO``.
        quick: Whether it is part of the quick subset.
        libraries: Array libraries for which it makes sense; empty is all.
        memory: Bytes that it needs beside the implementation's own.
    """

    id: str
    sentence: str
    spec: Spec = field(default_factory=Spec)
    check: str = "forward"
    dtypes: str = TWO
    quick: bool = False
    libraries: tuple[str, ...] = ()
    memory: int = 0

    @property
    def level(self) -> str:
        """The level that the case belongs to."""
        return self.id.partition("/")[0]
