"""What makes an engine exact: one that is fast for well-behaved heads, mended for all others inside the same call.

An engine supplies the fast path for all heads at once, on finite operands. Around it, and decided on the device:

    exact    heads whose values span more than the fast range: the definition tile by tile, merged in the log domain
    mark     heads with a query, key or value that is not finite: what a query sees of it, its output shows
    poison   heads with an output or a cotangent that is not finite: its gradients go to what its query sees, no further

Each is a loop over the heads concerned, so that the others cost nothing; see ``tiles.for_heads``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from laser_core import Forward, Gradients, Inputs, Problem, _array, _gradient, _reference, _values
from laser_core._values import Forms, Values

from . import tiles
from .tiles import Array, Grid, Operands, Start


class Call(NamedTuple):
    """A call as an engine sees it."""

    problem: Problem
    inputs: Inputs
    grid: Grid
    ops: Operands
    which: Forms
    values: Values

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Call:
        """The operands in their layout, and the exponentiated values."""
        inputs = tiles.vary(inputs, inputs)
        grid = Grid.fast(problem)
        ops = tiles.operands(problem, inputs, grid)
        which = _values.forms(jnp, problem, inputs)
        values = _values.exponentiate(jnp, ops.v, ops.beta, which, tiles.sees_key(ops, grid))
        return cls(problem, inputs, grid, ops, which, values)

    @property
    def inside(self) -> Array:
        """``(..., Hkv)``: all query heads of the group are inside the fast range."""
        return jnp.all(self.values.inside, axis=-1)

    def laid_out(self, x: Array, trailing: int = 2, value: float = 0) -> Array:
        """An array ``(..., Hq, Lq, …)`` in the common layout and the compute dtype, padded."""
        problem = self.problem
        x = jnp.asarray(x, problem.compute_dtype)
        x = x if trailing == 2 else x[..., None]
        x = tiles.laid_out(x, problem.key_value_heads, problem.group, len(problem.batch) + 4)
        return tiles.pad_to(x, -2, self.grid.rows, value)


class State(NamedTuple):
    """Results and their cotangents, all finite: (..., Hkv, group, Lq, E), or 1 for E."""

    o: Array
    l: Array  # +∞ for a query that nothing flows through here: its p is 0
    do: Array
    dl: Array

    def only(self, heads: Array) -> State:
        """The same with everything but l set to zero in the other heads, so that they add nothing."""
        heads = heads[..., None, None, None]
        o, do, dl = (jnp.where(heads, x, 0) for x in (self.o, self.do, self.dl))
        return self._replace(o=o, do=do, dl=dl)


class Totals(NamedTuple):
    """The gradients under construction, in the common layout."""

    q: Array  # still without the scale
    k: Array
    v: Array
    bias: Array | None
    beta: Array  # (..., Hkv, group, 1, E)


FastForward = Callable[[Call], tuple[Array, Array]]
FastBackward = Callable[[Call, State, Totals], Totals]


def forward(problem: Problem, inputs: Inputs, fast: FastForward) -> Forward:
    """``fast``, mended. It returns o and l, ``(..., Hkv, group, Lq, E or 1)`` with Lq padded, for all heads."""
    dtype = jnp.dtype(problem.compute_dtype)
    if 0 in problem.score_shape:
        out, lse = jnp.zeros(problem.out_shape, dtype), jnp.full(problem.lse_shape, -jnp.inf, dtype)
    else:
        call = Call.of(problem, inputs)
        done = fast(call)
        done = tiles.for_heads(problem, ~call.inside, lambda at, done: _exact(call, at, done), done)
        o, l = tiles.for_heads(problem, _odd_heads(call), lambda at, done: _mark(call, at, done), done)
        out = jnp.reshape(o[..., : problem.query_length, :], problem.out_shape)
        lse = jnp.reshape(l[..., : problem.query_length, :], problem.lse_shape)
    if problem.dtype == problem.compute_dtype:
        return Forward(out, lse)
    return Forward(out.astype(problem.dtype), lse, residual=out)


def _odd_heads(call: Call) -> Array:
    """Heads with a query, key or value that is not finite."""
    ops = call.ops
    q, k, v = (jnp.any(x, axis=(-3, -2, -1)) for x in (ops.odd_q, ops.odd_k, ~jnp.isfinite(ops.beta * ops.v)))
    return q | k | v


def _exact(call: Call, at: Start, done: tuple[Array, Array]) -> tuple[Array, Array]:
    """o and l of one head for every finite input."""
    problem, grid = call.problem, call.grid.exact(call.problem)
    head = tiles.one_head(call.ops, at)
    shape = (*head.q.shape[:-2], grid.rows.block)

    def rows(i: Any, done: tuple[Array, Array]) -> tuple[Array, Array]:
        def column(j: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            s, _ = tiles.scores(problem, head, grid, i * grid.rows.block, j * grid.columns.block)
            v = tiles.cut(head.v, -2, j * grid.columns.block, grid.columns.block)[..., None, :, :]
            # what has been attended to so far is one more key, with score l and value o
            o, l = (x[..., None] for x in state)
            o = jnp.swapaxes(o, -2, -1)
            s = jnp.concat([l, s], axis=-1)
            v = jnp.concat([o, jnp.broadcast_to(v, (*o.shape[:-2], *v.shape[-2:]))], axis=-2)
            merged: tuple[Array, Array] = _reference.attend(jnp, s, v, head.beta, not call.which.expm1)
            return merged

        nothing = (
            tiles.full(head.q, (*shape, problem.value_dim), 0),
            tiles.full(head.q, shape, -jnp.inf),
        )
        o, l = tiles.loop(grid.columns_of(problem, i), column, nothing)
        start = (*at, 0, i * grid.rows.block, 0)
        return tiles.put(done[0], o, start), tiles.put(done[1], l[..., None], start)

    return tiles.loop((0, grid.rows.number), rows, done)


def _mark(call: Call, at: Start, done: tuple[Array, Array]) -> tuple[Array, Array]:
    """o and l of one head with what the queries see of NaN and infinities."""
    problem, grid = call.problem, call.grid
    head = tiles.one_head(call.ops, at)
    y = head.beta * head.v
    broken = jnp.concat([jnp.isnan(y), y == jnp.inf], axis=-1).astype(y.dtype)

    def rows(i: Any, done: tuple[Array, Array]) -> tuple[Array, Array]:
        row = i * grid.rows.block

        def column(j: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            column = j * grid.columns.block
            seen = tiles.seen_keys(problem, head, grid, row, column)
            odd = tiles.cut(head.odd_q, -2, row, grid.rows.block)
            odd = odd | tiles.cut(head.odd_k, -1, column, grid.columns.block)
            part = tiles.cut(broken, -2, column, grid.columns.block)
            count = state[0] + tiles.over_keys(seen.astype(part.dtype), part)
            return count, state[1] | jnp.any(seen & odd, axis=-1, keepdims=True)

        shape = (*head.q.shape[:-2], grid.rows.block)
        nothing = (
            tiles.full(head.q, (*shape, broken.shape[-1]), 0),
            tiles.full(head.q, (*shape, 1), False, bool),
        )
        count, bad = tiles.loop(grid.columns_of(problem, i), column, nothing)
        start = (*at, 0, row, 0)
        o, l = (tiles.take(x, start, (*shape, x.shape[-1])) for x in done)
        o = _values.mark_broken(jnp, o, count, head.beta)
        o, l = (jnp.where(bad, jnp.nan, x) for x in (o, l))
        return tiles.put(done[0], o, start), tiles.put(done[1], l, start)

    return tiles.loop((0, grid.rows.number), rows, done)


# --------------------------------------------------------------------------------------------------------- backward


def backward(
    problem: Problem, inputs: Inputs, done: Forward, d_out: Array, d_lse: Array | None, fast: FastBackward
) -> Gradients:
    """``fast``, mended: it adds the gradients of all heads whose cotangents are not zero."""
    if 0 in problem.score_shape:
        none: Gradients = _gradient.no_gradients(jnp, inputs)
        return none
    call = Call.of(problem, inputs)
    # A cotangent is often constant, and XLA takes seconds to fold reductions of a constant.
    d_out = lax.optimization_barrier(d_out)  # type: ignore[no-untyped-call]
    o = call.laid_out(done.out if done.residual is None else done.residual)
    l, do = call.laid_out(done.lse, 1), call.laid_out(d_out)
    dl = jnp.zeros_like(l) if d_lse is None else call.laid_out(d_lse, 1)
    silent = (l == -jnp.inf) | _gradient.silent(jnp, do, dl[..., 0])[..., None]
    fine = jnp.all(jnp.isfinite(o) & jnp.isfinite(do), axis=-1, keepdims=True) & jnp.isfinite(dl) & jnp.isfinite(l)
    state = State(
        o=jnp.where(fine, o, 0),
        l=jnp.where(fine & ~silent, l, jnp.inf),
        do=jnp.where(fine, do, 0),
        dl=jnp.where(fine, dl, 0),
    )
    ops = call.ops
    shape = (*ops.q.shape[:-2], 1, problem.value_dim)
    total = Totals(
        q=jnp.zeros_like(ops.q),
        k=jnp.zeros_like(ops.k),
        v=jnp.zeros_like(ops.v),
        bias=None if ops.bias is None else jnp.zeros_like(ops.bias),
        beta=tiles.full(ops.q, shape, 0),
    )
    total = fast(call, state.only(call.inside), total)
    total = tiles.for_heads(problem, ~call.inside, lambda at, total: _exact_backward(call, at, state, total), total)
    odd = ~fine & ~silent
    odd_heads = jnp.any(odd, axis=(-3, -2, -1))
    total = tiles.for_heads(problem, odd_heads, lambda at, total: _poison(call, at, odd, total), total)
    return _gradients(call, total)


def _gradients(call: Call, total: Totals) -> Gradients:
    """Each in the shape and dtype of its argument."""
    problem, inputs = call.problem, call.inputs

    def bring_back(x: Array, like: Array) -> Array:
        if x.ndim >= 2:
            x = x[..., : problem.query_length, :]
        return jnp.reshape(x, like.shape).astype(like.dtype)

    keys = (..., slice(0, problem.key_length), slice(None))
    bias, beta = None, None
    if inputs.bias is not None and total.bias is not None:
        bias = bring_back(total.bias[..., : problem.key_length], inputs.bias)
    if inputs.beta is not None:
        beta = jnp.reshape(total.beta, (*problem.batch, problem.query_heads, problem.value_dim))
        beta = _array.unbroadcast(jnp, beta, inputs.beta.shape).astype(inputs.beta.dtype)
    return Gradients(
        query=bring_back(total.q * problem.scale, inputs.query),
        key=jnp.reshape(total.k[keys], inputs.key.shape).astype(inputs.key.dtype),
        value=jnp.reshape(total.v[keys], inputs.value.shape).astype(inputs.value.dtype),
        bias=bias,
        beta=beta,
    )


def through_scores(
    ops: Operands, grid: Grid, at: Start, row: Any, column: Any, ds: Array, slope: Array | None, total: Totals
) -> tuple[Array, Totals]:
    """Pass a tile of ds on to the bias and the queries; returns the keys' share, ``(..., 1, D, block_k)``."""
    if total.bias is not None:
        place = tiles.place(total.bias, at, row, column)
        total = total._replace(bias=tiles.add(total.bias, tiles.to_bias(ds, total.bias), place))
    if slope is not None:
        ds = ds * slope
    dq = tiles.over_keys(ds, tiles.cut(ops.k, -2, column, grid.columns.block))
    total = total._replace(q=tiles.add(total.q, dq, (*at, 0, row, 0)))
    return tiles.over_queries(tiles.cut(ops.q, -2, row, grid.rows.block), ds, 1), total


def with_beta(call: Call, state: State, total: Totals, pg: Array) -> Totals:
    """The gradient of an array β, from pᵀ·g of all keys."""
    if call.problem.beta is not None:
        return total
    ops, which = call.ops, call.which
    of_queries, to_keys = _values.for_beta(jnp, ops.v, state.o, state.do, call.values, ops.beta, which)
    dbeta = jnp.sum(_values.sum_forms(jnp, to_keys * pg, which), axis=-2, keepdims=True)
    groups = dbeta.shape[-3]  # pg may be summed over the group
    return total._replace(beta=(total.beta + of_queries).at[..., :groups, :, :].add(dbeta))


def _exact_backward(call: Call, at: Start, state: State, total: Totals) -> Totals:
    """The gradients of one head, from the definition."""
    problem, grid = call.problem, call.grid.exact(call.problem)
    head, state = tiles.one_head((call.ops, state), at)

    def columns(j: Any, total: Totals) -> Totals:
        column = j * grid.columns.block
        v = tiles.cut(head.v, -2, column, grid.columns.block)[..., None, :, :]

        def row(i: Any, total: Totals) -> Totals:
            row = i * grid.rows.block
            s, slope = tiles.scores(problem, head, grid, row, column)
            o, l, do, dl = (tiles.cut(x, -2, row, grid.rows.block) for x in state)
            ds, dv, dbeta = _gradient.through_values(jnp, s, v, head.beta, o, l[..., 0], do, dl[..., 0])
            dk, total = through_scores(head, grid, at, row, column, ds, slope, total)
            return total._replace(
                k=tiles.add(total.k, jnp.matrix_transpose(dk), (*at, 0, column, 0)),
                v=tiles.add(total.v, jnp.sum(dv, axis=-3, keepdims=True), (*at, 0, column, 0)),
                beta=tiles.add(total.beta, dbeta[..., None, :], (*at, 0, 0, 0)),
            )

        return tiles.loop(grid.rows_of(problem, j), row, total)

    return tiles.loop((0, grid.columns.number), columns, total)


def _poison(call: Call, at: Start, odd: Array, total: Totals) -> Totals:
    """NaN for all that a query with a broken result or cotangent sees."""
    problem, grid = call.problem, call.grid
    head, odd = tiles.one_head((call.ops, odd), at)

    def columns(j: Any, total: Totals) -> Totals:
        column = j * grid.columns.block

        def row(i: Any, total: Totals) -> Totals:
            row = i * grid.rows.block
            reached = tiles.seen_keys(problem, head, grid, row, column)
            reached = reached & tiles.cut(odd, -2, row, grid.rows.block)
            nan = jnp.where(reached, jnp.nan, jnp.zeros((), head.q.dtype))  # products carry it to all it belongs to
            dk, total = through_scores(head, grid, at, row, column, nan, None, total)
            ones = tiles.full(head.q, (*nan.shape[:-1], problem.value_dim), 1)
            dv = jnp.matrix_transpose(tiles.over_queries(ones, nan, 1))
            dbeta = tiles.full(head.q, (*head.q.shape[:-2], 1, problem.value_dim), 1) * jnp.sum(nan)
            return total._replace(
                k=tiles.add(total.k, jnp.matrix_transpose(dk), (*at, 0, column, 0)),
                v=tiles.add(total.v, dv, (*at, 0, column, 0)),
                beta=tiles.add(total.beta, dbeta, (*at, 0, 0, 0)),
            )

        return tiles.loop(grid.rows_of(problem, j), row, total)

    return tiles.loop((0, grid.columns.number), columns, total)
