"""Around a kernel that attends over exponentiated values: what it is told of values and queries, in XLA.

X = 2^(βv·log2e − c) with an integer c per head and channel; ``laser_core._values`` explains it. In base 2 throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array

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
    """

    range: float
    sum: float
    easy: tuple[float, float]
    top: int
    shift: int


LIMITS = {
    "float16": Limits(28, 29, (-14, 15), 15, 15),
    "bfloat16": Limits(99.5, 117, (-49, 49), 0, 0),
}


def needs_sum(keys: int, limits: Limits) -> bool:
    """Whether the number of keys alone does not settle ``limits.sum``."""
    return limits.range + math.log2(max(keys, 1)) > limits.sum


def decide(low: Array, high: Array, total: Array | None, keys: int, limits: Limits) -> tuple[Array, Array]:
    """c of every channel, and which heads are outside the fast range.

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
    outside = jnp.any(some & ~((high - low <= limits.range) & (spread <= limits.sum)), axis=-1)
    hard = some & ~((low >= limits.easy[0]) & (high <= limits.easy[1]))
    middle = jnp.ceil(high) - limits.top if limits.top else jnp.floor(low + (high - low) * 0.5 + 0.5)
    return jnp.where(hard, middle, 0), outside


def _scaled_exp2(y: Array, c: Array) -> Array:
    """2^(y − c), the same bits times a power of two for every integer c."""
    n = jnp.floor(y + 0.5)
    exponent = jnp.clip(n - c, -126, 127).astype(jnp.int32) + 127
    return jnp.exp2(y - n) * jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


class Rows(NamedTuple):
    """What the backward pass needs of a query: all of them finite."""

    g: Array  # (..., Lq, E), do·2^(c − βo·log2e) in the dtype of do
    r: Array  # (..., Lq), float32, dl − Σ_e do/β
    l2: Array  # (..., Lq), float32, l in base 2; +∞ for a query that nothing flows through here
    odd: Array  # (..., Lq), boolean: its results or cotangents are not finite


def row_pass(o: Array, l: Array, c: Array, do: Array, dl: Array | None, beta: float) -> Rows:
    """The query side of the backward pass.

    Args:
        o: (..., Lq, E), float32, unrounded.
        l: (..., Lq).
        c: (..., 1, E), of the values that the query sees.
        do: (..., Lq, E).
        dl: (..., Lq), or None for zeros.
        beta: β, not 0.
    """
    dtype = do.dtype
    do = do.astype(jnp.float32)
    dl = jnp.zeros_like(l) if dl is None else dl.astype(jnp.float32)
    fine = jnp.all(jnp.isfinite(o) & jnp.isfinite(do), axis=-1) & jnp.isfinite(dl) & jnp.isfinite(l)
    nothing = (l == -jnp.inf) | (jnp.all(do == 0, axis=-1) & (dl == 0))
    live = fine & ~nothing
    z = jnp.where(live[..., None], o * (beta * _LOG2E), c)
    do = jnp.where(live[..., None], do, 0)
    r = jnp.where(live, dl, 0) - jnp.sum(do, axis=-1) * (1 / beta)
    l2 = jnp.where(live, l * _LOG2E, jnp.inf)
    return Rows((do * _scaled_exp2(-z, -c)).astype(dtype), r, l2, ~fine & ~nothing)
