"""Engine ``jax-xla``: a flash kernel over exponentiated values, in ``lax`` loops, for any device that XLA serves.

All heads are in work at once, a tile of queries and a tile of keys at a time; loops over key tiles have bounds that
depend on the query tile, so that causality and windows skip what they hide. Memory is O(L). Heads that this fast path
cannot serve are mended by ``guard``. ``laser_core._streaming`` is the same algorithm on plain arrays, and explains it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from laser_core import Forward, Gradients, Inputs, Problem, _values

from . import guard, tiles
from .guard import Call, State, Totals
from .tiles import Array


@functools.partial(jax.jit, static_argnums=0)
def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output and the log-sum-exp."""
    return guard.forward(problem, inputs, fast_forward)


@functools.partial(jax.jit, static_argnums=0)
def backward(problem: Problem, inputs: Inputs, done: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """All gradients; p is recomputed tile by tile."""
    return guard.backward(problem, inputs, done, d_out, d_lse, fast_backward)


def fast_forward(call: Call) -> tuple[Array, Array]:
    """o and l of all heads: a flash kernel over X."""
    problem, grid, ops, x = call.problem, call.grid, call.ops, call.values.x
    shape = (*ops.q.shape[:-2], grid.rows.block)

    def rows(i: Any, done: tuple[Array, Array]) -> tuple[Array, Array]:
        row = i * grid.rows.block

        def column(j: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, l, acc = state
            column = j * grid.columns.block
            s, _ = tiles.scores(problem, ops, grid, row, column)
            m_new = jnp.maximum(m, jnp.max(s, axis=-1, keepdims=True))
            p = jnp.exp(s - jnp.where(m_new == -jnp.inf, 0, m_new))
            rescale = jnp.where(m == m_new, 1, jnp.exp(m - m_new))
            l = l * rescale + jnp.sum(p, axis=-1, keepdims=True)
            acc = acc * rescale + tiles.over_keys(p, tiles.cut(x, -2, column, grid.columns.block))
            return m_new, l, acc

        nothing = (
            tiles.full(ops.q, (*shape, 1), -jnp.inf),
            tiles.full(ops.q, (*shape, 1), 0),
            tiles.full(ops.q, (*shape, x.shape[-1]), 0),
        )
        m, l, acc = tiles.loop(grid.columns_of(problem, i), column, nothing)
        empty = l == 0
        safe_l = jnp.where(empty, 1, l)
        o = _values.finish(jnp, acc / safe_l, call.values, ops.beta, call.which)
        o = jnp.where(empty, 0, o)
        l = jnp.where(empty, -jnp.inf, m + jnp.log(safe_l))
        start = (0,) * (len(shape) - 1) + (row, 0)
        return tiles.put(done[0], o, start), tiles.put(done[1], l, start)

    whole = (*ops.q.shape[:-1], 1)
    nothing = (tiles.full(ops.q, (*whole[:-1], problem.value_dim), 0), tiles.full(ops.q, whole, -jnp.inf))
    return tiles.loop((0, grid.rows.number), rows, nothing)


def fast_backward(call: Call, state: State, total: Totals) -> Totals:
    """The gradients of all heads: a flash backward on (X, G)."""
    problem, grid, ops, which = call.problem, call.grid, call.ops, call.which
    side = _values.rows(jnp, state.o, state.do, state.dl[..., 0], call.values, ops.beta, which)
    other = _values.keys(jnp, ops.v, call.values, ops.beta, which)
    at = (0,) * (ops.q.ndim - 3)
    groups = other.to_dv.shape[-3]

    def columns(j: Any, total: Totals) -> Totals:
        column = j * grid.columns.block
        x, to_dv = (tiles.cut(x, -2, column, grid.columns.block) for x in other)

        def row(i: Any, state_: tuple[Totals, Array, Array]) -> tuple[Totals, Array, Array]:
            total, dk, pg = state_
            row = i * grid.rows.block
            s, slope = tiles.scores(problem, ops, grid, row, column)
            l, g, r = (tiles.cut(x, -2, row, grid.rows.block) for x in (state.l, side.g, side.r))
            p = jnp.exp(s - l)
            if ops.bias is not None:  # which may be NaN
                p = jnp.where(l == jnp.inf, 0, p)
            pg = pg + tiles.over_queries(g, p, groups)
            ds = p * (tiles.row_products(g, x) + r)
            dk_part, total = guard.through_scores(ops, grid, at, row, column, ds, slope, total)
            return total, dk + dk_part, pg

        nothing = (
            tiles.full(ops.q, (*ops.k.shape[:-2], problem.head_dim, grid.columns.block), 0),
            tiles.full(ops.q, (*to_dv.shape[:-2], to_dv.shape[-1], grid.columns.block), 0),
        )
        total, dk, pg = tiles.loop(grid.rows_of(problem, j), row, (total, *nothing))
        dk, pg = jnp.matrix_transpose(dk), jnp.matrix_transpose(pg)
        dv = jnp.sum(_values.sum_forms(jnp, to_dv * pg, which), axis=-3, keepdims=True)
        if for_beta is not None:
            to_keys = tiles.cut(for_beta.to_keys, -2, column, grid.columns.block)
            dbeta = jnp.sum(_values.sum_forms(jnp, to_keys * pg, which), axis=-2, keepdims=True)
            total = total._replace(beta=total.beta.at[..., :groups, :, :].add(dbeta))
        return total._replace(
            k=tiles.put(total.k, dk, (*at, 0, column, 0)), v=tiles.put(total.v, dv, (*at, 0, column, 0))
        )

    for_beta = None
    if problem.beta is None:
        for_beta = _values.for_beta(jnp, ops.v, state.o, state.do, call.values, ops.beta, which)
        total = total._replace(beta=total.beta + for_beta.of_queries)
    return tiles.loop((0, grid.columns.number), columns, total)
