"""All cases, and how to choose among them."""

from __future__ import annotations

import difflib

from . import frameworks, properties
from .case import EACH, LEVELS, TWO, Case
from .cases_hard import SIGMAS, determinism, hostile, isolation, layout, precision, scale
from .cases_plain import masks, options, plain
from .cases_wide import wide

__all__ = ["EACH", "LEVELS", "SIGMAS", "TWO", "Case", "all_cases", "choose"]


def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of the levels."""
    makers = (
        plain,
        masks,
        options,
        precision,
        hostile,
        isolation,
        determinism,
        layout,
        scale,
        wide,
        frameworks.cases,
        properties.cases,
    )
    found = [case for maker in makers for case in maker()]
    order = list(LEVELS)
    return tuple(sorted(found, key=lambda case: order.index(case.level)))


def choose(levels: tuple[str, ...] = (), only: tuple[str, ...] = (), quick: bool = False) -> tuple[Case, ...]:
    """Cases by level and by id (or the beginning of one).

    Raises:
        ValueError: An unknown level or case; names the known ones, or those that are most like it.
    """
    cases = all_cases()
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"level: got {level!r}; allowed: {', '.join(LEVELS)}")
    for name in only:
        if not any(case.id.startswith(name) for case in cases):
            near = difflib.get_close_matches(name, [case.id for case in cases], n=3, cutoff=0.3)
            like = f", such as {', '.join(near)}" if near else ""
            raise ValueError(
                f"only: got {name!r}; allowed: the id of a case or the beginning of one{like} (see `list`)"
            )
    return tuple(
        case
        for case in cases
        if (not levels or case.level in levels)
        and (not only or any(case.id.startswith(name) for name in only))
        and (not quick or case.quick)
    )
