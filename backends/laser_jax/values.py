"""Around a kernel that attends over exponentiated values: what it is told of them, in XLA.

X = 2^(βv·log2e − c) with an integer c per head and channel; ``laser_core._values`` explains it. In base 2 throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array

# flags of a head: beyond the fast range; NaN or infinity; values that hardly vary, or that are large; c is not 0
OUTSIDE, BROKEN, NARROW, FAR, MOVED = 1, 2, 4, 8, 16
_LOG2E = math.log2(math.e)


class Limits(NamedTuple):
    """Of the fast range, in bits.

    Attributes:
        range: Of βv·log2e within a channel.
        sum: Of ΣX over its least X. What is lost of a p below the least (sub)normal number, times ΣX, stays below the
            rounding of a sum of least X.
        easy: c is 0 for channels between these.
        top: Where c brings the greatest exponent; 0: the middle of the range is brought to 0 instead.
        shift: p is scaled up by so many bits.
        narrow: Not in bits: small values hardly vary in a channel that spans no more. Four roundings of X.
    """

    range: float
    sum: float
    easy: tuple[float, float]
    top: int
    shift: int
    narrow: float


LIMITS = {
    "float16": Limits(28, 29, (-14, 15), 15, 15, 2.0**-9),
    "bfloat16": Limits(99.5, 117, (-49, 49), 0, 0, 2.0**-6),
}


def needs_sum(keys: int, limits: Limits) -> bool:
    """Whether the number of keys alone does not settle ``limits.sum``."""
    return limits.range + math.log2(max(keys, 1)) > limits.sum


def _floor(x: Array) -> Array:
    """Of what is known to Mosaic."""
    small = jnp.abs(x) < 2.0**23  # what is not, is an integer
    whole = jnp.where(small, x, 0).astype(jnp.int32).astype(x.dtype)
    return jnp.where(small, jnp.where(whole > x, whole - 1, whole), x)


def decide(low: Array, high: Array, total: Array | None, keys: int, limits: Limits) -> tuple[Array, Array]:
    """c of every channel, and which are outside the fast range.

    Args:
        low: ``(..., E)``, the least exponent βv·log2e that is finite; +∞ where none is.
        high: The greatest; −∞ where none is.
        total: Σ_j 2^exponent; None: the number of keys says enough.
        keys: Their number.
        limits: Of the dtype.
    """
    spread = high - low + math.log2(max(keys, 1))
    if total is not None:
        tame = (high < 120) & (low > -120)
        spread = jnp.where(tame, jnp.log2(jnp.where(tame, total, 1)) - low, spread)
    some = high >= low
    outside = some & ((high - low > limits.range) | (spread > limits.sum))  # Mosaic cannot negate
    hard = some & ((low < limits.easy[0]) | (high > limits.easy[1]))
    middle = -_floor(-high) - limits.top if limits.top else _floor(low + (high - low) * 0.5 + 0.5)
    return jnp.where(hard, middle, 0), outside
