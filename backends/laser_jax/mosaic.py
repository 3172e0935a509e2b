"""Engine ``jax-mosaic``: LASER in Pallas kernels for Hopper GPUs; what the host does. The kernels are ``mosaic_*.py``.

On the device alone: XLA exponentiates the values and judges the range of every head, one kernel serves all heads, and
those outside the fast range, or that hold NaN or infinity, are done again by ``jax-xla``, in a loop over such heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from laser_core import Forward, Gradients, Inputs, Problem, _gradient, _reference

from . import tiles, xla
from .served import WIDTHS
from .tiles import Array, Start

FEW = 16  # rows that see fewer keys are computed exactly: a mean of so few rounded X can leave the range of the values
OUTSIDE, BROKEN = 1, 2  # flags of a head: beyond the fast range; NaN or infinity
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


class Values(NamedTuple):
    """What the value pass makes of the values."""

    x: Array  # (..., Lk, E), 2^(βv·log2e − c) in the dtype of v, finite
    c: Array  # (..., E), float32, integers
    outside: Array  # (...), boolean: some channel spans more than the fast range
    broken: Array  # (...), boolean: some βv is not finite


def value_pass(v: Array, beta: float, limits: Limits) -> Values:
    """X, its integer references, and which heads are outside the fast range; ``v (..., Lk, E)``.

    The exponent is split into integer and fraction first, so that X for another c is the same bits times a power of 2.
    """
    y, fine = _exponents(v, beta)
    low, high, total, broken = _judge(v, beta)
    count = math.log2(max(v.shape[-2], 1))
    spread = high - low + count
    if limits.range + count > limits.sum:  # the count alone may not settle it
        tame = (high < 120) & (low > -120)
        spread = jnp.where(tame, jnp.log2(jnp.where(tame, total, 1)) - low, spread)
    some = high >= low
    outside = jnp.any(some & ~((high - low <= limits.range) & (spread <= limits.sum)), axis=-1)
    hard = some & ~((low >= limits.easy[0]) & (high <= limits.easy[1])) & ~outside[..., None]
    middle = jnp.ceil(high) - limits.top if limits.top else jnp.floor(low + (high - low) * 0.5 + 0.5)
    c = jnp.where(hard, middle, 0)
    x = jnp.where(fine, _scaled_exp2(y, c[..., None, :]), 0)
    largest = float(jnp.finfo(v.dtype).max)
    return Values(jnp.clip(x, 0, largest).astype(v.dtype), c, outside, broken)


def _exponents(v: Array, beta: float) -> tuple[Array, Array]:
    """βv·log2e, 0 where βv is not finite, and where it is."""
    natural = v.astype(jnp.float32) * beta
    fine = jnp.isfinite(natural)
    return jnp.clip(jnp.where(fine, natural, 0), -1e38, 1e38) * _LOG2E, fine


def _judge(v: Array, beta: float) -> tuple[Array, Array, Array, Array]:
    """Per channel the least and the greatest exponent of what is finite, and Σ2^y; per head, whether all is.

    In two steps of which the first is short: XLA then makes one loop of all that it reads.
    """
    *heads, keys, width = v.shape
    short = 32
    if keys % short:
        v = jnp.pad(v, [(0, 0)] * len(heads) + [(0, -keys % short), (0, 0)], constant_values=jnp.inf)
    y, fine = _exponents(jnp.reshape(v, (*heads, -1, short, width)), beta)
    low = jnp.min(jnp.where(fine, y, jnp.inf), axis=-2)
    high = jnp.max(jnp.where(fine, y, -jnp.inf), axis=-2)
    total = jnp.sum(jnp.where(fine, jnp.exp2(jnp.clip(y, -126, 126)), 0), axis=-2)
    number = jnp.sum(fine, axis=-2, dtype=jnp.int32)
    low, high, total, number = jax.lax.optimization_barrier((low, high, total, number))
    broken = jnp.sum(number, axis=(-2, -1)) != keys * width
    return jnp.min(low, axis=-2), jnp.max(high, axis=-2), jnp.sum(total, axis=-2), broken


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


# -------------------------------------------------------------------------------------------------------- the passes


def causal_offset(problem: Problem) -> int | None:
    """Query i of a problem that is served sees the keys ≤ i + offset; None: all keys."""
    high = problem.band[1]
    return None if high is None or high >= problem.key_length - 1 else max(high, -problem.query_length)


class Call(NamedTuple):
    """The arrays of a call with one batch axis, as they are and as the kernels take them."""

    problem: Problem  # with that batch axis
    q: Array  # (B, Hq, Lq, D)
    k: Array  # (B, Hkv, Lk, D)
    v: Array  # (B, Hkv, Lk, E)
    values: Values
    flags: Array  # (B, Hkv), int32

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Call:
        """The value pass, and the keys judged."""
        size = math.prod(problem.batch)
        q, k, v = (jnp.reshape(x, (size, *x.shape[-3:])) for x in (inputs.query, inputs.key, inputs.value))
        values = value_pass(v, problem.beta or 0.0, LIMITS[problem.dtype])
        broken = values.broken | ~jnp.all(jnp.isfinite(k), axis=(-2, -1))
        flags = jnp.where(values.outside, OUTSIDE, 0) | jnp.where(broken, BROKEN, 0)
        return cls(dataclasses.replace(problem, batch=(size,)), q, k, v, values, flags.astype(jnp.int32))

    def head(self, at: Start) -> tuple[Problem, Inputs]:
        """One key/value head and its queries as a problem of its own."""
        p = self.problem
        problem = dataclasses.replace(p, batch=(), query_heads=p.group, key_value_heads=1)
        q, k, v = (self.cut(x, at) for x in (self.q, self.k, self.v))
        return problem, Inputs(q, k, v, None, None, None, None, None)

    def cut(self, x: Array, at: Start) -> Array:
        """Of an array ``(B, H, …)`` what belongs to one key/value head, ``(H/Hkv, …)``."""
        heads = x.shape[1] // self.problem.key_value_heads
        return tiles.take(x, self._start(x, at), (1, heads, *x.shape[2:]))[0]

    def put(self, x: Array, part: Array, at: Start) -> Array:
        """``x`` with that replaced."""
        return tiles.put(x, part[None].astype(x.dtype), self._start(x, at))

    def _start(self, x: Array, at: Start) -> Start:
        return (at[0], at[1] * (x.shape[1] // self.problem.key_value_heads), *(0,) * (x.ndim - 2))


def padded(x: Array, rows: int = 8, widths: tuple[int, ...] = WIDTHS) -> Array:
    """An array ``(B, H, L, D)`` with zeros up to a length and a width that the kernels take."""
    width = next(w for w in widths if w >= x.shape[-1])
    missing = (-x.shape[-2] % rows, width - x.shape[-1])
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else x


@functools.partial(jax.jit, static_argnums=0)
def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output, the log-sum-exp, and what rounding took from the output."""
    if 0 in problem.score_shape:
        out = jnp.zeros(problem.out_shape, problem.dtype)
        return Forward(out, jnp.full(problem.lse_shape, -jnp.inf, jnp.float32), jnp.zeros_like(out))
    call = Call.of(problem, inputs)
    done = exact_rows(call, fast_forward(call))

    def again(at: Start, done: Forward) -> Forward:
        part = _two_parts(xla.forward(*call.head(at)))
        whole = call.flags[at] & OUTSIDE != 0  # of a head that holds NaN or infinity only what shows it
        odd = ~jnp.isfinite(part.out)
        parts = zip(done, part, (odd, jnp.isnan(part.lse), odd), strict=True)
        return Forward(*(call.put(x, jnp.where(whole | z, y, call.cut(x, at)), at) for x, y, z in parts))

    done = tiles.for_heads(call.problem, call.flags != 0, again, done)
    shapes = (problem.out_shape, problem.lse_shape, problem.out_shape)
    return Forward(*(jnp.reshape(x, shape) for x, shape in zip(done, shapes, strict=True)))


def _two_parts(done: Forward) -> Forward:
    """A result with its unrounded output as a result with the remainder of it."""
    return done._replace(residual=done.residual - done.out.astype(jnp.float32))


def fast_forward(call: Call, cut: Any = None) -> Forward:
    """The kernel, for all heads."""
    from . import mosaic_forward

    p, width = call.problem, next(w for w in WIDTHS if w >= call.problem.value_dim)
    form = mosaic_forward.Form(
        cut=cut or mosaic_forward.tiles(causal_offset(p) is not None, width),
        query_length=p.query_length,
        key_length=p.key_length,
        offset=causal_offset(p),
        scale=p.scale,
        beta=p.beta or 0.0,
        shift=LIMITS[p.dtype].shift,
        interpreted=p.device == "cpu",
    )
    c = jnp.pad(call.values.c, ((0, 0), (0, 0), (0, width - p.value_dim)))
    o, rest, l = mosaic_forward.forward(form, *(padded(x) for x in (call.q, call.k, call.values.x)), c)
    o, rest = (x[..., : p.query_length, : p.value_dim] for x in (o, rest))
    return Forward(o, l[..., : p.query_length], rest)


def exact_rows(call: Call, done: Forward) -> Forward:
    """``done`` with the rows that see few keys computed from the definition."""
    p, offset = call.problem, causal_offset(call.problem)
    first, last, keys = 0, p.query_length, p.key_length
    if offset is not None:
        first, last = max(0, -offset), min(last, FEW - 1 - offset if keys >= FEW else last)
        keys = min(keys, last + offset)
    if last <= first or keys >= FEW:
        return done
    group = (p.group, last - first)
    q = jnp.reshape(call.q[:, :, first:last].astype(jnp.float32) * p.scale, (*call.k.shape[:2], *group, p.head_dim))
    k, v = (x[:, :, None, :keys].astype(jnp.float32) for x in (call.k, call.v))
    s = jnp.einsum("bhgqd,bhgkd->bhgqk", q, jnp.broadcast_to(k, (*q.shape[:3], *k.shape[3:])))
    s = jnp.where(jnp.isfinite(s), s, jnp.nan)
    if offset is not None:
        seen = jnp.arange(keys)[None, :] <= jnp.arange(first, last)[:, None] + offset
        s = jnp.where(seen, s, -jnp.inf)
    beta = jnp.full((1, p.value_dim), p.beta, jnp.float32)
    o, l = _reference.attend(jnp, s, v[:, :, :, None], beta, True)
    out = o.astype(p.dtype)
    parts = (out, l, o - out.astype(jnp.float32))
    shapes = ((*x.shape[:2], last - first, *x.shape[3:]) for x in done)
    rows = [jnp.reshape(x, shape) for x, shape in zip(parts, shapes, strict=True)]
    return Forward(*(x.at[:, :, first:last].set(y.astype(x.dtype)) for x, y in zip(done, rows, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def backward(problem: Problem, inputs: Inputs, done: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """All gradients."""
    from . import mosaic_backward

    if 0 in problem.score_shape:
        none: Gradients = _gradient.no_gradients(jnp, inputs)
        return none
    call = Call.of(problem, inputs)
    p = call.problem
    shape = (*p.batch, p.query_heads, p.query_length)
    out, rest, do = (jnp.reshape(x, (*shape, p.value_dim)) for x in (done.out, done.residual, d_out))
    l = jnp.reshape(done.lse, shape)
    dl = None if d_lse is None else jnp.reshape(d_lse, shape)
    o = out.astype(jnp.float32) + rest.astype(jnp.float32)
    c = jnp.repeat(call.values.c, p.group, axis=1)[:, :, None]
    rows = row_pass(o, l, c, do, dl, p.beta or 0.0)
    odd = jnp.any(jnp.reshape(rows.odd | _odd_queries(call, l), (*call.flags.shape, -1)), axis=-1)
    flags = call.flags | jnp.where(odd, BROKEN, 0)
    d, e = p.head_dim, p.value_dim
    gap = -p.query_length % 8
    r, l2 = (jnp.pad(x, ((0, 0), (0, 0), (0, gap)), constant_values=y) for x, y in ((rows.r, 0), (rows.l2, jnp.inf)))
    arrays = (padded(x) for x in (call.q, call.k, call.values.x, rows.g))
    dq, dk, dv = mosaic_backward.backward(*arrays, r, l2, flags, causal_offset(p), p.scale, p.beta or 0.0)
    total = (dq[..., : p.query_length, :d], dk[..., : p.key_length, :d], dv[..., : p.key_length, :e])

    def again(at: Start, total: tuple[Array, ...]) -> tuple[Array, ...]:
        head_problem, head = call.head(at)
        o_, l_, do_ = (call.cut(x, at) for x in (out, l, do))
        part = Forward(o_, l_, o_.astype(jnp.float32) + call.cut(rest, at).astype(jnp.float32))
        dl_ = None if dl is None else call.cut(dl, at)
        found = xla.backward(head_problem, head, part, do_, dl_)
        return tuple(call.put(x, y, at) for x, y in zip(total, found[:3], strict=True))

    total = tiles.for_heads(p, flags != 0, again, total)
    return Gradients(*(jnp.reshape(x, y.shape) for x, y in zip(total, inputs[:3], strict=True)))


def _odd_queries(call: Call, l: Array) -> Array:
    """Queries that are not finite: a query that sees something has said so in l."""
    offset = causal_offset(call.problem)
    blind = 0 if offset is None else max(0, -offset)
    odd = jnp.isnan(l)
    return odd.at[:, :, :blind].set(jnp.any(~jnp.isfinite(call.q[:, :, :blind]), axis=-1)) if blind else odd
