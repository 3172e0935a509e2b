"""How a problem is cut: blocks of heads, tiles of queries and keys, and the scores of one tile."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from . import _array, _reference, _values
from ._array import Array, Namespace
from ._problem import Inputs, Problem
from ._values import Forms, Values


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes: how many queries and keys of how many heads are in work at a time.

    They bound the memory in use, and a tile of scores should stay in the cache; the result does not depend on them
    beyond rounding.
    """

    block_q: int
    block_k: int
    heads: int

    def __post_init__(self) -> None:
        """Refuse sizes that are not positive."""
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise ValueError(f"{field.name}: got {size}; allowed: 1 or more")

    @classmethod
    def fast(cls, problem: Problem) -> Tiles:
        """Tiles of the fast path: about a megabyte of scores, smaller where a band lets whole tiles be skipped."""
        side = 512 if problem.band == (None, None) else 256
        block_q, block_k = min(side, max(problem.query_length, 1)), min(side, max(problem.key_length, 1))
        heads = min(
            2**18 // (block_q * block_k * problem.group), 2**19 // max(problem.key_length * problem.value_dim, 1)
        )
        return cls(block_q, block_k, max(1, heads))

    @classmethod
    def exact(cls, problem: Problem) -> Tiles:
        """Tiles of the exact path, which has a term for each query, key and channel of all heads in work."""
        block_k = min(128, max(problem.key_length, 1))
        block_q = 2**19 // (problem.query_heads * block_k * problem.value_dim)
        return cls(min(max(block_q, 1), max(problem.query_length, 1)), block_k, problem.key_value_heads)


Index: TypeAlias = tuple[int | slice, ...]


class Block(NamedTuple):
    """Some key/value heads of one batch entry, with the query heads that read them, in the compute dtype.

    Arrays have the layout ``(heads, group or 1, length, dim)``; ``problem`` and ``inputs`` describe these heads alone.
    """

    problem: Problem
    inputs: Inputs
    at_query_heads: Index  # where these heads are in the arrays of the call
    at_key_value_heads: Index
    q: Array  # finite, times the scale
    k: Array  # finite
    v: Array
    beta: Array
    broken: tuple[Array, Array] | None  # queries, keys that are not finite; None where it is known that all are


def blocks(
    xp: Namespace, problem: Problem, inputs: Inputs, which: Forms, heads: int
) -> Iterator[tuple[Block, Values, bool]]:
    """Blocks of heads with their transformed values, and whether some of them may need the exact path.

    Heads that are known to need it come once more, alone, and what the block made of them does not count: so no head
    pays for another, and none has other bits because of another.
    """
    if problem.key_length == 0 or problem.query_length == 0:
        return
    for index in itertools.product(*map(range, problem.batch)):
        for span in spans(problem.key_value_heads, heads):
            block, values = _transformed(xp, problem, inputs, which, index, span)
            inside = _array.known(xp.all(values.inside))
            if inside is not False or span.stop - span.start == 1:
                yield block, values, inside is not True
                continue
            yield block, values, False
            for h in range(span.start, span.stop):
                if not bool(xp.all(values.inside[h - span.start, ...])):
                    yield *_transformed(xp, problem, inputs, which, index, slice(h, h + 1)), True


def _transformed(
    xp: Namespace, problem: Problem, inputs: Inputs, which: Forms, index: tuple[int, ...], span: slice
) -> tuple[Block, Values]:
    block = _block(xp, problem, inputs, index, span)
    return block, _values.exponentiate(xp, block.v, block.beta, which, within_lengths(xp, block))


def part(problem: Problem, inputs: Inputs, index: tuple[int, ...], span: slice) -> tuple[Problem, Inputs]:
    """The problem of some key/value heads of one batch entry, and of the query heads that read them."""
    queries = slice(span.start * problem.group, span.stop * problem.group)
    count = span.stop - span.start
    own = dataclasses.replace(problem, batch=(), key_value_heads=count, query_heads=count * problem.group)
    return own, Inputs(
        inputs.query[(*index, queries, ...)],
        inputs.key[(*index, span, ...)],
        inputs.value[(*index, span, ...)],
        _part(inputs.attn_mask, index, queries),
        _part(inputs.bias, index, queries),
        _part(inputs.beta, (), queries, trailing=1),
        _part(inputs.query_seq_lengths, index, None, trailing=0),
        _part(inputs.key_value_seq_lengths, index, None, trailing=0),
    )


def _block(xp: Namespace, problem: Problem, inputs: Inputs, index: tuple[int, ...], span: slice) -> Block:
    dtype = _array.dtype(xp, problem.compute_dtype)
    query_span = slice(span.start * problem.group, span.stop * problem.group)
    own, few = part(problem, inputs, index, span)
    q = _reference.group_heads(xp, xp.astype(few.query, dtype, copy=False), own.key_value_heads, problem.group)
    k, v = (xp.astype(x, dtype, copy=False)[:, None, :, :] for x in (few.key, few.value))
    broken = (_reference.any_nonfinite(xp, q)[..., :, None], _reference.any_nonfinite(xp, k)[..., None, :])
    clean = _array.known(xp.any(broken[0]) | xp.any(broken[1])) is False
    k = _reference.finite(xp, k)  # always: where an array lies in memory can change the bits of a product with it
    if not clean:
        q = _reference.finite(xp, q)
    return Block(
        problem=own,
        inputs=few,
        at_query_heads=(*index, query_span),
        at_key_value_heads=(*index, span),
        q=q * problem.scale,
        k=k,
        v=v,
        beta=_reference.beta_of(xp, own, few),
        broken=None if clean else broken,
    )


def _part(x: Array | None, index: tuple[int, ...], span: slice | None, trailing: int = 2) -> Array | None:
    """One batch entry and some heads of an array that broadcasts over either."""
    if x is None:
        return None
    with_heads = trailing + (span is not None)
    leading = max(x.ndim - with_heads, 0)
    own = index[len(index) - leading :]
    pick: list[int | slice] = [i if n != 1 else 0 for i, n in zip(own, x.shape, strict=False)]
    if span is not None and x.ndim >= with_heads:
        pick.append(span if x.shape[leading] != 1 else slice(None))
    return x[(*pick, ...)] if pick else x


def spans(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def key_spans(problem: Problem, rows: slice, block_k: int) -> list[slice]:
    """The key tiles of which a query of ``rows`` may see something, by causality and window."""
    low, high = problem.band
    first = 0 if low is None else max(0, rows.start + low)
    last = problem.key_length if high is None else min(problem.key_length, rows.stop + high)
    return [slice(s.start, s.stop) for s in spans(problem.key_length, block_k) if s.stop > first and s.start < last]


def within_lengths(xp: Namespace, block: Block) -> Array | None:
    """Which keys are inside the sequence length, or None where there is no such length."""
    if block.inputs.key_value_seq_lengths is None:
        return None
    only = block.inputs._replace(attn_mask=None, query_seq_lengths=None)
    free = dataclasses.replace(block.problem, causal=None, window=(None, None))
    seen = _reference.visible(xp, free, only, slice(0, 1), slice(0, block.problem.key_length))
    return None if seen is None else seen[..., 0, :]


class Tile(NamedTuple):
    s: Array  # (heads, group, block_q, block_k); −∞ where hidden
    slope: Array | None  # of the soft cap
    partial: bool  # some of it may be hidden


def scores(xp: Namespace, block: Block, rows: slice, columns: slice) -> Tile:
    problem, inputs = block.problem, block.inputs
    s = xp.matmul(block.q[..., rows, :], xp.matrix_transpose(block.k[..., columns, :]))
    slope = None
    if problem.logits_soft_cap is not None:
        t = xp.tanh(s / problem.logits_soft_cap)
        s, slope = problem.logits_soft_cap * t, 1 - t * t
    if inputs.bias is not None:
        bias = _reference.window_of(inputs.bias, rows, columns)
        s = s + _reference.group_heads(xp, xp.astype(bias, s.dtype, copy=False), problem.key_value_heads, problem.group)
    if block.broken is not None:
        broken = block.broken[0][..., rows, :] | block.broken[1][..., columns]
        s = xp.where(broken & (s != -math.inf), xp.full_like(s, math.nan), s)
    seen = _reference.visible(xp, problem, inputs, rows, columns)
    if seen is not None:
        seen = _reference.group_heads(xp, seen, problem.key_value_heads, problem.group)
        s = xp.where(seen, s, xp.full_like(s, -math.inf))
    return Tile(s, slope, partial=seen is not None or inputs.bias is not None)
