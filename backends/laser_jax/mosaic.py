"""Engine ``jax-mosaic``: LASER in Pallas kernels for Hopper GPUs; what the host does. The kernels are ``mosaic_*.py``.

On the device alone and without a branch on the host: the value pass writes X and measures every head, one kernel serves
all heads, and another mends those outside the fast range, or that hold NaN or infinity; it returns at once where there
is none. Backward, likewise: a pass over rows, one kernel for all heads, and others for those outside the fast range
and for large values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from laser_core import Forward, Gradients, Inputs, Problem, _gradient

from .served import WIDTHS, causal_offset
from .tiles import unchecked
from .values import BROKEN, FAR, LIMITS, NARROW, OUTSIDE, needs_sum

Array: TypeAlias = jax.Array

FEW = 16  # a mean of fewer rounded X may well leave the range of the values


class Kept(NamedTuple):
    """What the backward pass needs beside inputs and results."""

    rest: Array  # (..., Hq, Lq, E), int8, what rounding took from the output
    c: Array  # (..., Hkv, E), float32, integers
    flags: Array  # (..., Hq), int32


class Call(NamedTuple):
    """The arrays of a call with one batch axis, padded to what the kernels take."""

    problem: Problem  # with that batch axis
    q: Array  # (B, Hq, Lq, W)
    k: Array  # (B, Hkv, Lk, W)
    v: Array

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Call:
        """Without a copy where lengths and widths are those of tiles."""
        size = math.prod(problem.batch)
        width = next(w for w in WIDTHS if w >= max(problem.head_dim, problem.value_dim))
        q, k, v = (padded(jnp.reshape(x, (size, *x.shape[-3:])), width) for x in inputs[:3])
        return cls(dataclasses.replace(problem, batch=(size,)), q, k, v)

    @property
    def width(self) -> int:
        """Of the padded heads."""
        return int(self.q.shape[-1])


def padded(x: Array, width: int) -> Array:
    """An array ``(B, H, L, D)`` with zeros up to that width and a multiple of 8 rows."""
    missing = (-x.shape[-2] % 8, width - x.shape[-1])
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else x


class Values(NamedTuple):
    """What the value pass makes."""

    x: Array  # (B, Hkv, Lk, W)
    c: Array  # (B, Hkv, W), float32, integers
    most: Array  # (B, Hkv, 3, W), float32, the greatest −βv and the greatest βv that are finite; NaN where some is not
    flags: Array  # (B, Hkv), int32

    @classmethod
    def of(cls, call: Call) -> Values:
        """The value pass."""
        from . import mosaic_values

        problem = call.problem
        keys, beta, interpreted = problem.key_length, problem.beta or 0.0, problem.device == "cpu"
        limits = LIMITS[problem.dtype]
        total = needs_sum(keys, limits)
        x, known = mosaic_values.measure(call.v, keys, beta, total, interpreted)
        most = jnp.max(known[:, :, :, :3], axis=2)
        sums = jnp.sum(known[:, :, :, 3], axis=2) if total else None
        # elsewhere the fast kernel puts o between the least and the greatest value
        narrow = problem.value_dim if causal_offset(problem) is not None else 0
        x, c, flags = mosaic_values.settle(x, call.v, most, sums, keys, beta, narrow, interpreted)
        return cls(x, c, most, flags)


@unchecked
@functools.partial(jax.jit, static_argnums=0)
def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output, the log-sum-exp, and what is kept."""
    heads = (*problem.batch, problem.key_value_heads)
    if 0 in problem.score_shape:
        out, c = jnp.zeros(problem.out_shape, problem.dtype), jnp.zeros((*heads, problem.value_dim), jnp.float32)
        kept = Kept(jnp.zeros_like(out, jnp.int8), c, jnp.zeros(problem.lse_shape[:-1], jnp.int32))
        return Forward(out, jnp.full(problem.lse_shape, -jnp.inf, jnp.float32), kept if problem.gradient else None)
    call = Call.of(problem, inputs)
    values = Values.of(call)
    o, l, odd, rest_ = fast_forward(call, values)
    flags, o, l, *rest = exact_forward(call, values.flags, odd, o, l, rest_)
    o, *rest = (x[..., : problem.query_length, : problem.value_dim] for x in (o, *rest))
    o, *rest = (jnp.reshape(x, problem.out_shape) for x in (o, *rest))
    l = jnp.reshape(l[..., : problem.query_length], problem.lse_shape)
    if not rest:
        return Forward(o, l)
    c = jnp.reshape(values.c[..., : problem.value_dim], (*heads, problem.value_dim))
    return Forward(o, l, Kept(rest[0], c, jnp.reshape(flags, problem.lse_shape[:-1])))


def fast_forward(call: Call, values: Values, cut: Any = None) -> tuple[Array, Array, Array, Array | None]:
    """The flash kernel, for all heads: o, l, odd and, if it is kept, the remainder of o, of the padded shapes."""
    from . import mosaic_forward

    p = call.problem
    offset = causal_offset(p)
    form = mosaic_forward.Form(
        cut=cut or mosaic_forward.tiles(offset is not None, call.width),
        query_length=p.query_length,
        key_length=p.key_length,
        offset=offset,
        scale=p.scale,
        beta=p.beta or 0.0,
        shift=LIMITS[p.dtype].shift,
        processors=_processors(p),
        keeps=p.gradient,
        few=FEW,
        interpreted=p.device == "cpu",
    )
    return mosaic_forward.forward(form, call.q, call.k, call.v, *values[:3])


def _processors(problem: Problem) -> int:
    """Of the device, or of an H100 or H200 where none is there to be asked."""
    found = [d for d in jax.devices() if d.platform == "gpu"] if problem.device == "cuda" else []
    return int(getattr(found[0], "core_count", 132)) if found else 3 if problem.device == "cpu" else 132


def _interpreter(problem: Problem) -> Any:
    """JAX's, for problems on the CPU."""
    if problem.device != "cpu":
        return None
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined]  # JAX 0.10 has none


def exact_forward(
    call: Call, flags: Array, odd: Array, o: Array, l: Array, rest: Array | None
) -> tuple[Array, ...]:  # fmt: skip
    """Flags of query heads, and the same with heads that have one from the definition."""
    from . import mosaic_exact

    p = call.problem
    offset = causal_offset(p)
    no_rows, interpreted = (0, 0, 0), p.device == "cpu"  # that see few keys: the fast kernel has done them
    form = mosaic_exact.Form(
        p.query_length, p.key_length, offset, p.scale, p.beta or 0.0, no_rows, interpreted=interpreted
    )
    flags = flags if p.group == 1 else jnp.repeat(flags, p.group, axis=1)
    return mosaic_exact.rewrite(form, call.q, call.k, call.v, odd, flags, o, l, *([] if rest is None else [rest]))


@unchecked
@functools.partial(jax.jit, static_argnums=0)
def backward(problem: Problem, inputs: Inputs, done: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """All gradients."""
    from . import mosaic_backward, mosaic_exact_backward, mosaic_rows

    if 0 in problem.score_shape:
        none: Gradients = _gradient.no_gradients(jnp, inputs)
        return none
    call = Call.of(problem, inputs)
    p, beta = call.problem, problem.beta or 0.0
    heads, rows, keys = (*p.batch, p.key_value_heads), p.query_length, p.key_length
    out, rest, do = (
        padded(jnp.reshape(x, (*p.batch, *x.shape[-3:])), call.width) for x in (done.out, done.residual.rest, d_out)
    )
    length = mosaic_backward.rows(rows, call.width)
    ends = ((0, 0), (0, 0), (0, length - rows))
    l = jnp.pad(jnp.reshape(done.lse, (*p.batch, p.query_heads, rows)), ends, constant_values=-jnp.inf)
    dl = None if d_lse is None else jnp.pad(jnp.reshape(d_lse, (*p.batch, p.query_heads, rows)), ends)
    c = jnp.reshape(done.residual.c, (*heads, p.value_dim))
    c = jnp.pad(c, ((0, 0), (0, 0), (0, call.width - p.value_dim)))
    flags, shift = jnp.reshape(done.residual.flags, (*heads, -1)), LIMITS[p.dtype].shift
    flags = jax.lax.reduce(flags, jnp.int32(0), jax.lax.bitwise_or, (2,)) if p.group > 1 else flags[..., 0]
    interpreted = p.device == "cpu"
    g, r, l2 = mosaic_rows.prepare(call.q, out, rest, do, l, dl, c, beta, shift, interpreted)
    offset = causal_offset(p)
    blind = 0 if offset is None else max(0, -offset)
    q = call.q.at[:, :, :blind].set(0) if blind else call.q  # whatever they hold

    def of_heads(x: Array) -> Array:
        most: Array = jnp.max(jnp.reshape(x, (*heads, -1)), axis=-1)
        return most

    odd = (l2 >= mosaic_rows.ODD) & (l2 < jnp.inf)
    sees = jnp.minimum(jnp.arange(1, length + 1, dtype=jnp.int32) + (keys if offset is None else offset), keys)
    reach = of_heads(jnp.where(odd, sees, 0))
    apart = (flags & (OUTSIDE | NARROW | FAR) != 0) | of_heads(l2 == mosaic_rows.ODD_QUERY)
    dq, dk, dv = mosaic_backward.backward(
        q, call.k, call.v, c, g, r, l2, flags & BROKEN, reach,
        scale=p.scale, beta=beta, causal_offset=offset, key_length=keys, shift=shift, interpret=_interpreter(p),
    )  # fmt: skip
    dq = jnp.where(odd[..., None], jnp.nan, dq * p.scale).astype(p.dtype)
    form = mosaic_exact_backward.Form(keys, offset, p.scale, beta, shift, interpreted)
    of_rows = mosaic_exact_backward.Rows(q, out, do, r, l2)
    dq, dk, dv = mosaic_exact_backward.rewrite(
        form, apart.astype(jnp.int32), reach, of_rows, call.k, call.v, dq, dk, dv
    )
    sizes = ((rows, p.head_dim), (keys, p.head_dim), (keys, p.value_dim))
    return Gradients(
        *(
            jnp.reshape(x[:, :, :length, :width], like.shape)
            for x, (length, width), like in zip((dq, dk, dv), sizes, inputs[:3], strict=True)
        )
    )
