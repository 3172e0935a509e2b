"""Engine ``jax-cudnn``: the published recipe on cuDNN's softmax attention, with X for exp(v), and guarded.

cuDNN attends over X = exp(βv)·2^−c and returns p·X, rounded. That is one more unit of rounding, relative to p·X and so
absolute in o, for which the error bound of o has room in bfloat16; in float16, whose exponents p needs for itself, it
has none. Heads outside the fast range, or with NaN or infinity, are computed exactly in the same call, chosen on the
device. It computes outputs alone: dq of cuDNN's own backward pass differs from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused  # the public function rounds the log-sum-exp

from laser_core import Forward, Inputs, Problem, _reference

from . import served, tiles, xla
from .mosaic import FEW, padded
from .served import causal_offset
from .tiles import Array, Start, unchecked
from .values import BROKEN, LIMITS, OUTSIDE, decide, needs_sum

_LOG2E = math.log2(math.e)


class Call(NamedTuple):
    """The arrays of a call with one batch axis, without the keys that no query sees, and what is made of the values."""

    problem: Problem
    q: Array  # (B, Hq, Lq, D)
    k: Array  # (B, Hkv, Lk, D)
    v: Array  # (B, Hkv, Lk, E)
    x: Array
    c: Array  # (B, Hkv, E), float32, integers
    ends: tuple[Array, Array]  # (B, Hkv, E), float32: the least and the greatest βv that is finite
    outside: Array  # (B, Hkv), boolean: beyond the fast range
    broken: Array  # (B, Hkv), boolean: a value is NaN or infinite

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Call:
        """The value pass: one to measure, one to write X."""
        length = problem.key_length if causal_offset(problem) is None else min(problem.key_length, problem.query_length)
        problem = dataclasses.replace(problem, batch=(math.prod(problem.batch),), key_length=length)
        q, k, v = (jnp.reshape(x, (*problem.batch, *x.shape[-3:])) for x in inputs[:3])
        k, v = k[:, :, :length], v[:, :, :length]
        y = v.astype(jnp.float32) * (problem.beta or 0.0)
        counts = jnp.isfinite(y)
        limits = LIMITS[problem.dtype]
        low = jnp.min(jnp.where(counts, y, jnp.inf), axis=2)
        high = jnp.max(jnp.where(counts, y, -jnp.inf), axis=2)
        total = None
        if needs_sum(length, limits):
            total = jnp.sum(jnp.where(counts, jnp.exp2(y * _LOG2E), 0), axis=2)
        c, outside = decide(low * _LOG2E, high * _LOG2E, total, length, limits)
        x = jnp.where(counts, _scaled_exp2(y * _LOG2E, c[:, :, None]), 0).astype(v.dtype)
        return cls(problem, q, k, v, x, c, (low, high), jnp.any(outside, axis=-1), ~jnp.all(counts, axis=(2, 3)))

    def head(self, at: Start) -> tuple[Problem, Inputs]:
        """One key/value head and its queries as a problem of its own."""
        problem = dataclasses.replace(self.problem, batch=(), query_heads=self.problem.group, key_value_heads=1)
        q, k, v = (self.cut(x, at) for x in (self.q, self.k, self.v))
        return problem, Inputs(q, k, v, None, None, None, None, None)

    def cut(self, x: Array, at: Start) -> Array:
        """Of an array ``(B, H, …)`` what belongs to one key/value head, ``(H/Hkv, …)``."""
        heads = x.shape[1] // self.problem.key_value_heads
        part: Array = tiles.take(x, self._start(x, at), (1, heads, *x.shape[2:]))[0]
        return part

    def put(self, x: Array, part: Array, at: Start) -> Array:
        """``x`` with that replaced."""
        return tiles.put(x, part[None].astype(x.dtype), self._start(x, at))

    def _start(self, x: Array, at: Start) -> Start:
        return (at[0], at[1] * (x.shape[1] // self.problem.key_value_heads), *(0,) * (x.ndim - 2))


def _scaled_exp2(y: Array, c: Array) -> Array:
    """2^(y − c), the same bits times a power of two for every integer c."""
    n = jnp.floor(y + 0.5)
    exponent = jnp.clip(n - c, -126, 127).astype(jnp.int32) + 127
    return jnp.exp2(y - n) * jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def attend(problem: Problem, q: Array, k: Array, x: Array) -> tuple[Array, Array]:
    """p·x, rounded, and the log-sum-exp in float32, by cuDNN.

    Args:
        problem: That is served.
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D).
        x: (B, Hkv, Lk, E), finite.
    """
    q, k, wide = _one_width(q, k, x)
    out, l = fused.dot_product_attention(
        q, k, wide, scale=problem.scale, mask_type=_mask(problem), qkv_layout="BNTH", return_residual=True
    )
    return out[..., : x.shape[-1]], l


def _mask(problem: Problem) -> Any:
    return fused.MaskType.NO_MASK if causal_offset(problem) is None else fused.MaskType.CAUSAL


def _one_width(*arrays: Array) -> list[Array]:
    """With zeros up to one width, a multiple of 8."""
    width = max(x.shape[-1] for x in arrays)
    width += -width % 8
    return [jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]) if x.shape[-1] < width else x for x in arrays]


@unchecked
@functools.partial(jax.jit, static_argnums=0)
def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output and the log-sum-exp."""
    if 0 in problem.score_shape:
        out = jnp.zeros(problem.out_shape, problem.dtype)
        return Forward(out, jnp.full(problem.lse_shape, -jnp.inf, jnp.float32))
    call = Call.of(problem, inputs)
    p = call.problem
    a, l = attend(p, call.q, call.k, call.x)
    o, l = _mended(call, _finished(call, a).astype(problem.dtype), l)
    return Forward(jnp.reshape(o, problem.out_shape), jnp.reshape(l, problem.lse_shape))


def _finished(call: Call, a: Array) -> Array:
    """log(a·2^c)/β in float32, the same bits for every c; inside the values of its channel where no key is hidden."""
    beta = call.problem.beta or 0.0
    c, low, high = (jnp.repeat(x, call.problem.group, axis=1)[:, :, None] for x in (call.c, *call.ends))
    bits = jax.lax.bitcast_convert_type(a.astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23).astype(jnp.float32) - 127 + c
    mantissa = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | 0x3F800000, jnp.float32)
    y = (exponent + jnp.log2(mantissa)) * (1 / _LOG2E)
    if causal_offset(call.problem) is None:
        y = jnp.clip(y, low, high)
    return jnp.where((a > 0) & (a < jnp.inf), y * (1 / beta), jnp.nan)  # the others: for _mended


def _mended(call: Call, o: Array, l: Array) -> tuple[Array, Array]:
    """o and l with the heads that cuDNN cannot serve, and rows that see few keys, from the definition."""
    p = call.problem
    odd = jnp.any(~jnp.isfinite(jnp.reshape(l, (*call.outside.shape, -1))), axis=-1)
    flags = jnp.where(call.outside, OUTSIDE, 0) | jnp.where(call.broken | odd, BROKEN, 0)
    causal = causal_offset(p) is not None
    if (served.missing() or served.why_not(p) or served.wrong_device()) is None and p.device == "cuda":
        from . import mosaic_exact

        width = next(w for w in served.WIDTHS if w >= max(p.head_dim, p.value_dim))
        few = (0, p.query_length if p.key_length < FEW else FEW - 1 if causal else 0, p.key_length)
        form = mosaic_exact.Form(
            p.query_length, p.key_length, 0 if causal else None, p.scale, p.beta or 0.0, few, interpreted=False
        )
        q, k, v = (padded(x, width) for x in (call.q, call.k, call.v))
        whole = jnp.pad(l, ((0, 0), (0, 0), (0, -p.query_length % 8)))
        flags = jnp.repeat(flags.astype(jnp.int32), p.group, axis=1)
        _, o, l = mosaic_exact.rewrite(form, q, k, v, None, flags, padded(o, width), whole)
        return o[:, :, : p.query_length, : p.value_dim], l[:, :, : p.query_length]
    if p.key_length < FEW:
        flags = jnp.full_like(flags, OUTSIDE)
    elif causal:
        o = o.at[:, :, : FEW - 1].set(_first_rows(call).astype(o.dtype))

    def again(at: Start, done: tuple[Array, Array]) -> tuple[Array, Array]:
        found = xla.forward(*call.head(at))
        o, l = (_merged(flags[at] & OUTSIDE != 0, call.cut(x, at), y) for x, y in zip(done, found[:2], strict=True))
        return call.put(done[0], o, at), call.put(done[1], l, at)

    return tiles.for_heads(p, flags != 0, again, (o, l))


def _merged(outside: Array, fast: Array, exact: Array) -> Array:
    """Of a head beyond the fast range what is exact; of one with NaN or infinity only what these have come to."""
    return jnp.where(outside | ~jnp.isfinite(fast) | ~jnp.isfinite(exact), exact, fast)


def _first_rows(call: Call) -> Array:
    """o of the queries that see few keys for causality."""
    rows = min(FEW - 1, call.problem.query_length)
    q, k, v = (x[:, :, :rows].astype(jnp.float32) for x in (call.q, call.k, call.v))
    k, v = (jnp.repeat(x, call.problem.group, axis=1) for x in (k, v))
    s = jnp.einsum("bhid,bhjd->bhij", q * call.problem.scale, k)
    s = jnp.where(jnp.tril(jnp.ones((rows, k.shape[2]), bool)), s, -jnp.inf)
    beta = jnp.full((1, 1, 1, 1), call.problem.beta or 0.0, jnp.float32)
    o: Array = _reference.attend(jnp, s, v[:, :, None], beta, large_beta=True)[0]
    return o
