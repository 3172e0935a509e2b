"""Comparison in the order in which things go wrong: namespace, shape, dtype, device, then values.

Written so that NaN cannot pass: what is accepted is an error of which ``error <= allowed`` is true.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat
import numpy as np

from .generate import Floats
from .tolerance import norm


@dataclass(frozen=True)
class Finding:
    """What a comparison found.

    Attributes:
        what: The result that was compared: ``out``, ``lse``, ``d_key``, ….
        ratio: Worst error over what is allowed; None where the question is yes or no.
        problem: What is wrong, as a sentence; None where nothing is.
    """

    what: str
    ratio: float | None = None
    problem: str | None = None


def like(what: str, got: Any, argument: Any, shape: tuple[int, ...], dtype: str) -> Finding:
    """Whether a result is an array of the namespace and device of ``argument`` and of this shape and dtype."""
    try:
        own, other = (array_api_compat.array_namespace(x).__name__ for x in (argument, got))
    except TypeError:
        return Finding(what, None, f"{what} is a {type(got).__name__}, not an array of the namespace of the query")
    if own != other:
        return Finding(what, None, f"{what} is an array of {other}; the query's namespace is {own}")
    if tuple(got.shape) != tuple(shape):
        return Finding(what, None, f"{what} has shape {tuple(got.shape)}; it should have {tuple(shape)}")
    name = str(getattr(got.dtype, "name", got.dtype)).rpartition(".")[2]
    if name != dtype:
        return Finding(what, None, f"{what} has dtype {name}; it should have {dtype}")
    here, there = array_api_compat.device(argument), array_api_compat.device(got)
    if here != there:
        return Finding(what, None, f"{what} is on device {there}; the query is on {here}")
    return Finding(what)


def entries(what: str, got: Floats, expected: Floats, allowed: Floats) -> Finding:
    """Entry by entry: |got − expected| ≤ allowed; infinities have to agree."""
    if got.size == 0:
        return Finding(what, 0.0)
    got = got.astype(expected.dtype)
    with np.errstate(all="ignore"):
        error = np.where(got == expected, 0, np.abs(got - expected)) / allowed
    error = np.where(np.isnan(error), math.inf, error)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    ratio = float(error[worst])
    if not (ratio <= 1):
        bad = int(np.sum(~(error <= 1)))
        at = tuple(int(i) for i in worst)
        return Finding(
            what,
            ratio,
            f"{what}: {bad} of {error.size} entries are off; worst at {at}: got {float(got[worst]):.6g}, expected "
            f"{float(expected[worst]):.6g}, allowed error {float(np.broadcast_to(allowed, error.shape)[worst]):.3g}",
        )
    return Finding(what, ratio)


def in_norm(what: str, got: Floats, expected: Floats, allowed: float) -> Finding:
    """In the Frobenius norm: ‖got − expected‖ ≤ allowed."""
    if got.size == 0:
        return Finding(what, 0.0)
    with np.errstate(all="ignore"):
        error = norm(got.astype(expected.dtype) - expected)
    ratio = 0.0 if error == 0 else (error / allowed if allowed else math.inf)
    if not (ratio <= 1):
        broken = int(np.sum(~np.isfinite(got.astype(np.float64))))
        detail = f" ({broken} of {got.size} entries are not finite)" if broken else ""
        return Finding(
            what,
            math.inf if math.isnan(ratio) else ratio,
            f"{what}: error {error:.4g} in the Frobenius norm, allowed {allowed:.4g}, of {norm(expected):.4g}{detail}",
        )
    return Finding(what, ratio)


def same_bits(what: str, got: Floats, expected: Floats, why: str) -> Finding:
    """Bit for bit."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return Finding(what, None, f"{what}: {why}: shape or dtype differ")
    different = got.view(f"u{got.itemsize}") != expected.view(f"u{got.itemsize}") if got.size else np.zeros(0, bool)
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        return Finding(
            what,
            None,
            f"{what}: {why}: {int(different.sum())} of {different.size} entries have other bits, the first at {at}: "
            f"{float(got[at]):.9g} and {float(expected[at]):.9g}",
        )
    return Finding(what)
