"""Engine ``jax-dpa``: LASER through ``jax.nn.dot_product_attention``, on exponentiated values.

JAX's own function attends over X, and its own gradient is LASER's: with the cotangent G of p·X it returns
ds = p ∘ (G·Xᵀ − rowsum(G ∘ p·X)), whose last term is the row term of ``laser_core._values``, and pᵀ·G. It materialises
the scores, so memory is O(Lq·Lk). Heads outside the fast range, and what is not finite, are mended by ``guard``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from laser_core import Forward, Gradients, Inputs, Problem, _values

from . import guard, tiles
from .guard import Call, State, Totals
from .tiles import Array, Axis, Grid


@functools.partial(jax.jit, static_argnums=0)
def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output and the log-sum-exp."""
    return guard.forward(problem, inputs, fast_forward)


@functools.partial(jax.jit, static_argnums=0)
def backward(problem: Problem, inputs: Inputs, done: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """All gradients, by those of JAX's function."""
    return guard.backward(problem, inputs, done, d_out, d_lse, fast_backward)


def fast_forward(call: Call) -> tuple[Array, Array]:
    """o and l of all heads."""
    seen = _seen(call)
    a, l = _attend(call, seen)(call.ops.q, call.ops.k, call.values.x)
    empty = False if seen is None else ~jnp.any(seen, axis=-1, keepdims=True)
    o = _values.finish(jnp, a, call.values, call.ops.beta, call.which)
    return jnp.where(empty, 0, o), jnp.where(empty, -jnp.inf, l)


def fast_backward(call: Call, state: State, total: Totals) -> Totals:
    """The gradients of all heads; a row without cotangents adds nothing."""
    ops, which = call.ops, call.which
    side = _values.rows(jnp, state.o, state.do, state.dl[..., 0], call.values, ops.beta, which)
    other = _values.keys(jnp, ops.v, call.values, ops.beta, which)
    attend = _attend(call, _seen(call))

    def weighted(q: Array, k: Array, x: Array) -> Array:
        return attend(q, k, x)[0]

    _, pull = jax.vjp(weighted, ops.q, ops.k, other.x)
    dq, dk, pg = pull(side.g)
    if call.problem.return_lse:  # ds = p∘dl: its products with k and q are attention over k, and the gradient of that
        attended, pull = jax.vjp(lambda x: weighted(ops.q, ops.k, x), ops.k)
        dq = dq + state.dl * attended
        dk = dk + pull(state.dl * ops.q)[0]
    dv = _values.sum_forms(jnp, other.to_dv * pg, which)
    return guard.with_beta(call, state, total, pg)._replace(q=dq, k=dk, v=jnp.sum(dv, axis=-3, keepdims=True))


def _seen(call: Call) -> Array | None:
    """Which keys the queries see, ``(..., Hkv, group, Lq, Lk)`` with 1 for axes that broadcast; None is all."""
    rows, columns = (Axis(axis.length, axis.padded, 1) for axis in call.grid)
    return tiles.sees(call.problem, call.ops, Grid(rows, columns), 0, 0)


def _attend(call: Call, seen: Array | None) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """``attend(q, k, x)``: p·x and l by JAX's function, all in the common layout."""
    mask = None if seen is None else _heads_first(jnp.reshape(seen, (1,) * (call.ops.q.ndim - seen.ndim) + seen.shape))

    def attend(q: Array, k: Array, x: Array) -> tuple[Array, Array]:
        if x.shape[-3] != k.shape[-3]:  # β differs between the query heads of a group, and so do their values
            k = jnp.broadcast_to(k, (*x.shape[:-2], *k.shape[-2:]))
        width = max(q.shape[-1], x.shape[-1])  # the function wants one width
        padded = [jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])]) for a in (q, k, x)]
        bq, bk, bx = (jnp.swapaxes(_heads_first(a), 1, 2) for a in padded)
        a, l = jax.nn.dot_product_attention(
            bq, bk, bx, mask=mask, scale=1.0, implementation="xla", return_residual=True
        )
        a = jnp.swapaxes(a, 1, 2)[..., : x.shape[-1]]
        return jnp.reshape(a, (*q.shape[:-1], x.shape[-1])), jnp.reshape(jnp.swapaxes(l, 1, 2), (*q.shape[:-1], 1))

    return attend


def _heads_first(x: Array) -> Array:
    """``(..., Hkv, group, length, dim)`` as ``(B, heads, length, dim)``; axes that broadcast together stay 1."""
    *batch, heads, group, rows, columns = x.shape
    return jnp.reshape(x, (math.prod(batch), heads * group, rows, columns))
