"""How a problem is cut for XLA: operands in one layout, and tiles of them at places that only the device knows.

All arrays have the layout ``(..., Hkv, group, length, dim)``, with 1 for an axis along which they broadcast. Lengths
are padded to whole tiles; padded keys are hidden, and padded queries have no cotangent. What is cut out of one head
keeps the layout, with leading axes of 1, so that the same code serves all heads at once and one head alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config

from laser_core import Inputs, Problem, _array, _reference

Array: TypeAlias = jax.Array
T = TypeVar("T")
Start: TypeAlias = tuple[Any, ...]  # where something begins, one integer for each leading axis


class Axis(NamedTuple):
    """A length cut into ``number`` blocks; the last one may reach beyond its end."""

    length: int
    block: int
    number: int

    @classmethod
    def cut(cls, length: int, most: int) -> Axis:
        """Blocks of equal size, of which each is at most ``most``, itself a multiple of 32."""
        unit = 1 if length <= 8 else 8 if length <= 64 else 32
        count = math.ceil(length / most)
        block = unit * math.ceil(length / (count * unit))
        return cls(length, block, math.ceil(length / block))

    def finer(self, most: int) -> Axis:
        """The same padded length in smaller blocks; ``most`` is a power of two."""
        block = self.block if self.block <= most else math.gcd(self.block, most)
        return Axis(self.length, block, self.padded // block)

    @property
    def padded(self) -> int:
        """The length in whole blocks."""
        return self.block * self.number


class Grid(NamedTuple):
    """Query tiles and key tiles of a problem, for some head count at a time."""

    rows: Axis
    columns: Axis

    @classmethod
    def fast(cls, problem: Problem) -> Grid:
        """Tiles of the fast path: a few megabytes of scores for all heads together."""
        block_q, block_k = 256, 512
        if problem.band != (None, None) and problem.query_length <= 512:
            block_q, block_k = 128, 256  # smaller, to skip more of them
        heads = problem.query_heads * math.prod(n for n in problem.batch if isinstance(n, int))  # or exported for any n
        while heads * block_q * block_k > 2**20 and block_q > 32:
            block_q, block_k = block_q // 2, max(block_k // 2, 64)
        return cls(Axis.cut(problem.query_length, block_q), Axis.cut(problem.key_length, block_k))

    def exact(self, problem: Problem) -> Grid:
        """Tiles of the exact path, which has a term for each query, key and channel of one head."""
        columns = self.columns.finer(128)
        most = max(1, 2**19 // (columns.block * problem.group * problem.value_dim))
        return Grid(self.rows.finer(1 << (most.bit_length() - 1)), columns)

    def columns_of(self, problem: Problem, i: Any) -> tuple[Any, Any]:
        """First and last + 1 of the key tiles of which query tile ``i`` may see something, by causality and window."""
        low, high = _band(problem)
        start = i * self.rows.block
        return self._range(self.columns, start, start + self.rows.block - 1, low, high)

    def rows_of(self, problem: Problem, j: Any) -> tuple[Any, Any]:
        """First and last + 1 of the query tiles that may see something of key tile ``j``."""
        low, high = _band(problem)
        start = j * self.columns.block
        back = (None if high is None else -high, None if low is None else -low)
        return self._range(self.rows, start, start + self.columns.block - 1, *back)

    @staticmethod
    def _range(axis: Axis, start: Any, stop: Any, low: int | None, high: int | None) -> tuple[Any, Any]:
        def block(at: Any) -> Any:  # lax.div, not //: kernels for TPUs have no other
            at = jnp.maximum(at, 0)
            return jnp.minimum(lax.div(at, jnp.asarray(axis.block, at.dtype)), axis.number)

        first = 0 if low is None else block(start + low)
        last = axis.number if high is None else block(stop + high + axis.block)
        return first, last


def _band(problem: Problem) -> tuple[int | None, int | None]:
    """``problem.band`` in integers of 32 bits."""
    far = problem.query_length + problem.key_length
    low, high = (None if x is None else min(max(x, -far), far) for x in problem.band)
    return low, high


class Operands(NamedTuple):
    """The arguments of a call in the compute dtype and the common layout."""

    q: Array  # (..., Hkv, group, Lq, D), finite, times the scale
    k: Array  # (..., Hkv, 1, Lk, D), finite
    v: Array  # (..., Hkv, 1, Lk, E)
    beta: Array  # (..., Hkv, group, 1, E)
    mask: Array | None  # (..., Hkv, group, Lq, Lk)
    bias: Array | None
    query_lengths: Array | None  # (..., 1, 1, 1, 1)
    key_lengths: Array | None
    odd_q: Array  # (..., Hkv, group, Lq, 1): queries that are not finite
    odd_k: Array  # (..., Hkv, 1, 1, Lk)


def operands(problem: Problem, inputs: Inputs, grid: Grid) -> Operands:
    """The arguments of a call as the tiles are cut from them."""
    rank = len(problem.batch) + 4
    dtype = jnp.dtype(problem.compute_dtype)
    heads, group = problem.key_value_heads, problem.group
    q, k, v = (
        pad_to(laid_out(x.astype(dtype), heads, g, rank), -2, axis)
        for x, g, axis in (
            (inputs.query, group, grid.rows),
            (inputs.key, 1, grid.columns),
            (inputs.value, 1, grid.columns),
        )
    )
    masks = []
    for x in (inputs.attn_mask, inputs.bias):
        if x is not None:
            x = laid_out(x if x.dtype == bool else x.astype(dtype), heads, group, rank)
            x = pad_to(pad_to(x, -2, grid.rows), -1, grid.columns)
        masks.append(x)
    lengths = []
    for n, limit in (
        (inputs.query_seq_lengths, problem.query_length),
        (inputs.key_value_seq_lengths, problem.key_length),
    ):
        if n is not None:
            n = _reference._positions(jnp, n, limit)
            n = jnp.reshape(n, (1,) * (rank - 4 - n.ndim) + n.shape + (1,) * 4)
        lengths.append(n)
    beta = _reference.beta_of(jnp, problem, inputs)
    return Operands(
        q=_reference.finite(jnp, q) * problem.scale,
        k=_reference.finite(jnp, k),
        v=v,
        beta=jnp.reshape(beta, (1,) * (rank - 4) + beta.shape),
        mask=masks[0],
        bias=masks[1],
        query_lengths=lengths[0],
        key_lengths=lengths[1],
        odd_q=_reference.any_nonfinite(jnp, q)[..., :, None],
        odd_k=_reference.any_nonfinite(jnp, k)[..., None, :],
    )


def laid_out(x: Array, heads: int, group: int, rank: int) -> Array:
    """``x (..., H, length, dim)``, of any rank below too, as ``(..., Hkv, group, length, dim)`` of the given rank."""
    x = jnp.reshape(x, (1,) * (rank - 1 - x.ndim) + x.shape)
    out: Array = _reference.group_heads(jnp, x, heads, group)
    return out


def pad_to(x: Array, dim: int, axis: Axis, value: float = 0) -> Array:
    """``x`` with dimension ``dim`` in whole blocks; a dimension of 1 that broadcasts stays."""
    missing = axis.padded - axis.length
    if missing == 0 or x.shape[dim] != axis.length or axis.length == 1:
        return x
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def take(x: Array, start: Start, shape: tuple[int, ...]) -> Array:
    """The block of ``x`` of that shape at ``start``."""
    return lax.dynamic_slice(x, tuple(jnp.asarray(i, jnp.int32) for i in start), shape)


def cut(x: Array, dim: int, start: Any, size: int) -> Array:
    """A block of one dimension of ``x``, or ``x`` itself where that dimension broadcasts."""
    return x if x.shape[dim] in (1, size) else lax.dynamic_slice_in_dim(x, start, size, dim)


def leading(problem: Problem) -> tuple[int, ...]:
    """The axes that tell key/value heads apart."""
    return (*problem.batch, problem.key_value_heads)


def one_head(tree: Any, at: Start) -> Any:
    """The arrays of ``tree`` for one key/value head alone, with leading axes of 1."""
    return jax.tree.map(lambda x: take(x, place(x, at), (1,) * len(at) + x.shape[len(at) :]), tree)


def place(x: Array, at: Start, rows: Any = 0, columns: Any = 0) -> Start:
    """The start indices of a block in ``x``; zero for axes that broadcast."""
    wanted = (*at, 0, rows, columns)
    return tuple(0 if n == 1 else i for n, i in zip(x.shape, wanted, strict=True))


def add(total: Array, part: Array, start: Start) -> Array:
    """``total`` with ``part`` added at ``start``."""
    return put(total, take(total, start, part.shape) + part, start)


def put(total: Array, part: Array, start: Start) -> Array:
    """``total`` with ``part`` put at ``start``."""
    return lax.dynamic_update_slice(total, part, tuple(jnp.asarray(i, jnp.int32) for i in start))


def loop(bounds: tuple[Any, Any], body: Callable[[Any, T], T], carry: T) -> T:
    """``lax.fori_loop`` with its type."""
    done: T = lax.fori_loop(*bounds, body, carry)
    return done


def for_heads(problem: Problem, chosen: Array, body: Callable[[Start, T], T], carry: T) -> T:
    """Run ``body(at, carry)`` for the key/value heads of which ``chosen`` is true; the others cost nothing.

    A loop, and no ``lax.cond``: under vmap a cond computes both sides for everyone.
    """
    shape = leading(problem)
    left = jnp.ravel(jnp.broadcast_to(chosen, shape))
    heads = jnp.arange(left.size, dtype=jnp.int32)

    def step(state: tuple[Array, T]) -> tuple[Array, T]:
        left, carry = state
        head = jnp.argmax(left).astype(jnp.int32)
        return left & (heads != head), body(jnp.unravel_index(head, shape), carry)

    return lax.while_loop(lambda state: jnp.any(state[0]), step, (left, carry))[1]


def full(like: Any, shape: tuple[int, ...], value: float, dtype: Any = None) -> Array:
    """A constant array that may be carried through a loop with ``like``, inside shard_map too."""
    constant: Array = vary(jnp.full(shape, value, dtype or like.dtype), like)
    return constant


def vary(tree: Any, like: Any) -> Any:
    """``tree``, with every array marked as varying over the mesh axes that any array of ``like`` varies over."""
    axes: frozenset[Any] = frozenset().union(*(_varying(x) for x in jax.tree.leaves(like)))

    def cast(x: Array) -> Array:
        missing = tuple(axes - _varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree) if axes else tree


def unchecked(run: Callable[..., T]) -> Callable[..., T]:
    """``run(problem, *operands)`` without shard_map's account of what varies: it knows no kernels that write in place.

    Everything in the result varies as anything in the operands does.
    """

    @functools.wraps(run)
    def without(problem: Problem, *operands: Any) -> T:
        axes: frozenset[Any] = frozenset().union(*(_varying(x) for x in jax.tree.leaves(operands)))
        if not axes:
            return run(problem, *operands)
        with config._check_vma(False):  # as jax.shard_map(…, check_vma=False) does
            plain = jax.tree.map(lambda x: x & True if x.dtype == bool else x * jnp.ones((), x.dtype), operands)
            result = run(problem, *plain)
        done: T = vary(result, operands)
        return done

    return without


def _varying(x: Array) -> frozenset[Any]:
    axes: frozenset[Any] = jax.typeof(x).manual_axis_type.varying
    return axes


# ----------------------------------------------------------------------------------------------------------- scores


def sees(problem: Problem, ops: Operands, grid: Grid, rows: Any, columns: Any) -> Array | None:
    """Which of the keys from ``columns`` on the queries from ``rows`` on see, broadcastable to a tile; None is all."""
    i = rows + jnp.arange(grid.rows.block, dtype=jnp.int32)[:, None]
    j = columns + jnp.arange(grid.columns.block, dtype=jnp.int32)[None, :]
    low, high = _band(problem)
    conditions = []
    if ops.mask is not None:
        conditions.append(_tile(ops.mask, grid, rows, columns))
    if low is not None:
        conditions.append(j - i >= low)
    if high is not None:
        conditions.append(j - i <= high)
    if ops.query_lengths is not None:
        conditions.append(i < ops.query_lengths)
    if ops.key_lengths is not None:
        conditions.append(j < ops.key_lengths)
    for position, axis in ((i, grid.rows), (j, grid.columns)):
        if axis.padded != axis.length:
            conditions.append(position < axis.length)
    together = None
    for condition in conditions:
        together = condition if together is None else together & condition
    return together


def sees_key(ops: Operands, grid: Grid) -> Array | None:
    """Keys that any query may see, ``(..., Lk)``, or None for all."""
    j = jnp.arange(grid.columns.padded, dtype=jnp.int32)
    inside = None
    if ops.key_lengths is not None:
        inside = j < ops.key_lengths[..., 0]
    if grid.columns.padded != grid.columns.length:
        inside = j < grid.columns.length if inside is None else inside & (j < grid.columns.length)
    return inside


def _tile(x: Array, grid: Grid, rows: Any, columns: Any) -> Array:
    return cut(cut(x, -2, rows, grid.rows.block), -1, columns, grid.columns.block)


def scores(problem: Problem, ops: Operands, grid: Grid, rows: Any, columns: Any) -> tuple[Array, Array | None]:
    """A tile of scores, −∞ where hidden, and the slope of the soft cap.

    Scores of queries and keys that are not finite are those of zeros: ``guard`` mends what sees them.
    """
    s = row_products(cut(ops.q, -2, rows, grid.rows.block), cut(ops.k, -2, columns, grid.columns.block))
    slope = None
    if problem.logits_soft_cap is not None:
        t = jnp.tanh(s / problem.logits_soft_cap)
        s, slope = problem.logits_soft_cap * t, 1 - t * t
    if ops.bias is not None:
        s = s + _tile(ops.bias, grid, rows, columns)
    seen = sees(problem, ops, grid, rows, columns)
    return (s if seen is None else jnp.where(seen, s, -jnp.inf)), slope


def seen_keys(problem: Problem, ops: Operands, grid: Grid, rows: Any, columns: Any) -> Array:
    """Which scores of a tile are not −∞, bias included; of the full shape of the tile."""
    shape = (*ops.q.shape[:-2], grid.rows.block, grid.columns.block)
    seen = sees(problem, ops, grid, rows, columns)
    seen = full(ops.q, shape, True, bool) if seen is None else jnp.broadcast_to(seen, shape)
    return seen if ops.bias is None else seen & (_tile(ops.bias, grid, rows, columns) != -jnp.inf)


# --------------------------------------------------------------------------------------------------------- products
# ``x`` holds one array for a whole group of query heads (group axis of 1) or one for each.


def row_products(a: Array, x: Array) -> Array:
    """``a·xᵀ``: (..., g, q, d) and (..., g or 1, k, d) to (..., g, q, k)."""
    if x.shape[-3] == 1:
        return jnp.einsum("...gqd,...kd->...gqk", a, x[..., 0, :, :])
    return jnp.einsum("...qd,...kd->...qk", a, x)


def over_keys(p: Array, x: Array) -> Array:
    """``p·x``: (..., g, q, k) and (..., g or 1, k, d) to (..., g, q, d)."""
    if x.shape[-3] == 1:
        return jnp.einsum("...gqk,...kd->...gqd", p, x[..., 0, :, :])
    return jnp.einsum("...qk,...kd->...qd", p, x)


def over_queries(a: Array, p: Array, groups: int) -> Array:
    """``aᵀ·p``: (..., g, q, d) and (..., g, q, k) to (..., g, d, k), or summed over the group to (..., 1, d, k).

    Not ``pᵀ·a``: XLA would transpose the larger of the two on a CPU.
    """
    if groups == 1:
        return jnp.einsum("...gqd,...gqk->...dk", a, p)[..., None, :, :]
    return jnp.einsum("...qd,...qk->...dk", a, p)


def to_bias(ds: Array, bias: Array) -> Array:
    """A tile of ds summed over the axes along which ``bias`` broadcasts."""
    shape = tuple(1 if n == 1 else m for n, m in zip(bias.shape, ds.shape, strict=True))
    out: Array = _array.unbroadcast(jnp, ds, shape)
    return out
