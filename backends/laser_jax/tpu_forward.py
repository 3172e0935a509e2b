"""Device code for TPUs: tiles and scores that all kernels share, and the flash forward on exponentiated values.

Keys lie along the sublanes of a tile and queries along its lanes: m, l and what else a query has one of are rows of
lanes, reductions over keys add whole registers, and every product but one is of the form that the matrix unit takes.
The grid walks over the key tiles of a query tile one after the other, with m, l and acc in VMEM; tiles that hide
everything are neither loaded nor computed. Scores are in base 2 here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

_NN, _NT, _TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is compiled in.

    Attributes:
        block_q: Queries of a tile, a multiple of 128.
        block_k: Keys of a tile, a multiple of 128.
        query_length: Lq; what is beyond it in a tile has no cotangent and is thrown away.
        key_length: Lk; what is beyond it is hidden.
        low, high: Query i sees keys i + low … i + high; None is unbounded.
        factor: Of the products of queries and keys, to scores in base 2; before a soft cap, to scores over the cap.
        cap: The bound of scores in base 2, or None.
        lengths: Whether sequence lengths are given.
        mask: Whether a mask is.
        batch: The batch axes.
    """

    block_q: int
    block_k: int
    query_length: int
    key_length: int
    low: int | None
    high: int | None
    factor: float
    cap: float | None
    lengths: bool
    mask: bool
    batch: tuple[int, ...]

    def ends(self, lengths: Ref | None, at: tuple[Any, ...]) -> tuple[Any, Any]:
        """Where the sequence lengths end, for the queries and for the keys; ``at`` is a place in the batch."""
        if lengths is None:
            return self.query_length, self.key_length
        place: Any = 0
        for index, size in zip(at, self.batch, strict=True):
            place = place * size + index
        return lengths[place], lengths[place + math.prod(self.batch)]

    def shows(self, row: Any, column: Any, query_end: Any, key_end: Any) -> tuple[Any, Any]:
        """Whether a tile shows anything, and whether it shows all."""
        last_row, last_column = row + self.block_q - 1, column + self.block_k - 1
        some, every = [column < key_end], [last_column < key_end]
        if self.lengths:
            some.append(row < query_end)
            every.append(last_row < query_end)
        if self.low is not None:
            some.append(last_column - row >= self.low)
            every.append(column - last_row >= self.low)
        if self.high is not None:
            some.append(column - last_row <= self.high)
            every.append(last_column - row <= self.high)
        return _all(some), False if self.mask else _all(every)

    def seen(self, row: Any, column: Any, query_end: Any, key_end: Any, mask: Array | None) -> Array:
        """Which keys the queries of a tile see, ``(block_k, block_q)``."""
        j = column + lax.broadcasted_iota(jnp.int32, (self.block_k, self.block_q), 0)
        i = row + lax.broadcasted_iota(jnp.int32, (self.block_k, self.block_q), 1)
        conditions = [j < key_end]
        if self.lengths:
            conditions.append(i < query_end)
        if self.low is not None:
            conditions.append(j - i >= self.low)
        if self.high is not None:
            conditions.append(j - i <= self.high)
        if mask is not None:
            conditions.append(jnp.broadcast_to(mask.astype(jnp.int32), j.shape) != 0)
        seen: Array = _all(conditions)
        return seen


def _all(conditions: list[Any]) -> Any:
    together = conditions[0]
    for condition in conditions[1:]:
        together = together & condition
    return together


def product(a: Array, b: Array, form: Any) -> Array:
    """A product in float32: of float32 as JAX is set to, of bfloat16 exact."""
    precision = None if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, form, precision=precision, preferred_element_type=jnp.float32)


def scores(tile: Tile, q: Array, k: Array, seen: Array | None) -> tuple[Array, Array | None]:
    """Scores in base 2 ``(block_k, block_q)``, −∞ where hidden, and the slope of the soft cap."""
    s, slope = product(k, q, _NT) * tile.factor, None
    if tile.cap is not None:
        t = jnp.tanh(s)
        s, slope = tile.cap * t, 1 - t * t
    return (s if seen is None else jnp.where(seen, s, -jnp.inf)), slope


def walk(
    tile: Tile, lengths: Ref | None, mask: Ref | None, at: tuple[Any, ...], i: Any, j: Any, step: Callable[..., None]
) -> None:
    """``step(seen)`` where the tile shows something; with None where it shows all."""
    row, column = i * tile.block_q, j * tile.block_k
    ends = tile.ends(lengths, at)
    some, every = tile.shows(row, column, *ends)
    if every is False:
        pl.when(some)(lambda: step(tile.seen(row, column, *ends, None if mask is None else mask[...])))
        return
    pl.when(some & every)(lambda: step(None))
    pl.when(some & ~every)(lambda: step(tile.seen(row, column, *ends, None)))


def forward(tile: Tile, *refs: Ref) -> None:
    """o-to-be and the log-sum-exp of a tile of queries.

    Grid: batch …, Hkv, group, query tiles, key tiles. In: lengths, q ``(block_q, D)``, k ``(block_k, D)``,
    X transposed ``(W, block_k)``, mask ``(block_k, block_q)``. Out: p·X/l transposed ``(W, block_q)``, lse
    ``(1, block_q)``. Scratch: m and l ``(1, block_q)``, acc ``(W, block_q)``.
    """
    lengths, (q_ref, k_ref, x_ref, *others) = (refs[0], refs[1:]) if tile.lengths else (None, refs)
    mask, (a_ref, lse_ref, m_ref, l_ref, acc_ref) = (others[0], others[1:]) if tile.mask else (None, others)
    at = tuple(pl.program_id(axis) for axis in range(len(tile.batch)))
    i, j = pl.program_id(len(tile.batch) + 2), pl.program_id(len(tile.batch) + 3)

    @pl.when(j == 0)
    def start() -> None:
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(seen: Array | None) -> None:
        s, _ = scores(tile, q_ref[...], k_ref[...], seen)
        m = m_ref[...]
        m_new = jnp.maximum(m, jnp.max(s, axis=0, keepdims=True))
        reference = m_new if seen is None else jnp.where(m_new == -jnp.inf, 0, m_new)
        p = jnp.exp2(s - reference)
        rescale = jnp.exp2(m - reference)
        l_ref[...] = l_ref[...] * rescale + jnp.sum(p, axis=0, keepdims=True)
        x = x_ref[...]
        acc_ref[...] = acc_ref[...] * rescale + product(x, p.astype(x.dtype), _NN)
        m_ref[...] = m_new

    walk(tile, lengths, mask, at, i, j, step)

    @pl.when(j == pl.num_programs(len(tile.batch) + 3) - 1)
    def finish() -> None:
        l = l_ref[...]
        empty = l == 0
        l = jnp.where(empty, 1, l)
        a_ref[...] = acc_ref[...] / l
        lse_ref[...] = jnp.where(empty, -jnp.inf, m_ref[...] * math.log(2) + jnp.log(l))
