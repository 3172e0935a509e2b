"""What the host does: operands as the kernels take them, and the launches, for any machine that runs the kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from laser_core import Forward, Gradients, Inputs, Problem
from laser_core._array import Array, unbroadcast
from laser_core._gradient import no_gradients

from .build import BLOCK, THREADS, Build

WORKERS = 4  # blocks for each multiprocessor of a kernel that mostly has nothing to do
EXACT = 64  # blocks for each head of the exact path of gradients
AGAIN = 16  # blocks for each head of the second value pass, which mostly does nothing
CHUNK = 128  # keys of a block of the passes over them, and queries of one of dβ
BIAS_CHUNK = 512  # keys of a block that makes the gradient of a bias
FAR = 2**30  # a band edge that is beyond every position


class Machine(Protocol):
    """What runs the kernels."""

    xp: Any

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""

    def launch(self, build: Build, kernel: str, grid: int, arguments: Sequence[Any]) -> None:
        """Run ``grid`` blocks of a kernel; arguments are arrays and NumPy scalars."""

    def aligned(self, x: Array) -> bool:
        """Whether the memory of ``x`` begins at a multiple of 16 bytes."""

    def special_forward(self, x: Call, out: Array, lse: Array, keep: bool) -> tuple[Values, Array] | None:
        """The value pass and the heads inside the fast range by kernels for this machine alone, if some serve the call.

        Returns:
            What the value pass makes, and what is kept of the unrounded output, or a null pointer.
        """

    def special_backward(
        self, x: Call, forward: Forward, d_out: Array, d_lse: Array | None, dq: Array, dk: Array, dv: Array
    ) -> tuple[Values, Rows] | None:
        """The same of the gradients."""


NOTHING = np.uint64(0)  # a null pointer


class Call(NamedTuple):
    """A call as the kernels take it: batch folded into the heads, rows adjacent."""

    machine: Machine
    problem: Problem
    build: Build
    q: Array  # (B·Hq, Lq, D), D rounded up to 16 bytes
    k: Array  # (B·Hkv, Lk, D)
    v: Array  # (B·Hkv, Lk, E)
    common: tuple[Any, ...]  # the arguments that all kernels begin with

    @property
    def heads(self) -> int:
        """B·Hq."""
        return math.prod(self.problem.batch) * self.problem.query_heads

    @property
    def key_value_heads(self) -> int:
        """B·Hkv."""
        return self.heads // self.problem.group

    def run(self, kernel: str, grid: int, *arguments: Any) -> None:
        """Launch a kernel."""
        self.machine.launch(self.build, kernel, grid, (*self.common, *arguments))

    def empty(self, *shape: int, dtype: Any = None) -> Array:
        """Uninitialised memory, of the dtype of the query unless another is named."""
        return self.machine.xp.empty(shape, dtype=self.q.dtype if dtype is None else dtype)


def call(machine: Machine, problem: Problem, inputs: Inputs) -> Call:
    """Operands in the layout of the kernels; copied only where they are not in it."""
    xp = machine.xp
    build = Build.of(problem)
    q, k = (matrix(machine, x, build.columns) for x in (inputs.query, inputs.key))
    v = matrix(machine, inputs.value, problem.value_dim)
    low, high = problem.band
    betas: Any = NOTHING
    if inputs.beta is not None:
        betas = xp.zeros((problem.query_heads, build.value_dim), dtype=xp.float32)
        betas[:, : problem.value_dim] = inputs.beta
    mask, mask_strides = _scores_like(machine, problem, inputs.attn_mask)
    bias = inputs.bias
    if bias is not None and bias.dtype not in (q.dtype, xp.float32):
        bias = bias.astype(xp.float32)
    bias, bias_strides = _scores_like(machine, problem, bias)
    common = (
        *map(
            np.int32,
            (
                problem.query_heads,
                problem.group,
                problem.query_length,
                problem.key_length,
                problem.value_dim,
                -FAR if low is None else max(-FAR, min(low, FAR)),
                FAR if high is None else max(-FAR, min(high, FAR)),
            ),
        ),
        *map(np.float32, (problem.scale, problem.logits_soft_cap or 0.0, problem.beta or 0.0)),
        betas,
        _lengths(machine, problem, inputs.query_seq_lengths, problem.query_length),
        _lengths(machine, problem, inputs.key_value_seq_lengths, problem.key_length),
        mask,
        *mask_strides,
        bias,
        np.int32(inputs.bias is not None and bias.dtype == xp.float32),
        *bias_strides,
    )
    return Call(machine, problem, build, q, k, v, common)


def matrix(machine: Machine, x: Array, columns: int) -> Array:
    """``x (..., H, L, width)`` with one leading axis and adjacent rows of so many columns."""
    xp = machine.xp
    x = x.reshape((math.prod(x.shape[:-2]), *x.shape[-2:]))
    if x.shape[-1] < columns:
        padded = xp.zeros((*x.shape[:-1], columns), dtype=x.dtype)
        padded[..., : x.shape[-1]] = x
        return padded
    x = xp.ascontiguousarray(x)
    return x if machine.aligned(x) else x.copy()


def _lengths(machine: Machine, problem: Problem, lengths: Array | None, limit: int) -> Any:
    if lengths is None:
        return NOTHING
    xp = machine.xp
    clipped = xp.clip(lengths.astype(xp.int64), 0, limit).astype(xp.int32)
    return xp.ascontiguousarray(xp.broadcast_to(clipped, problem.batch)).reshape(-1)


def _scores_like(machine: Machine, problem: Problem, x: Array | None) -> tuple[Any, tuple[np.int64, ...]]:
    """A mask or bias ``(B or 1, Hq or 1, Lq or 1, Lk or 1)``, and its strides in bytes; 0 where it is broadcast."""
    if x is None:
        return NOTHING, (np.int64(0),) * 4
    xp = machine.xp
    x = x.reshape((1,) * (len(problem.score_shape) - x.ndim) + tuple(x.shape))
    if any(n != 1 for n in x.shape[:-3]):
        x = xp.broadcast_to(x, (*problem.batch, *x.shape[-3:]))
    x = xp.ascontiguousarray(x.reshape((-1 if x.size else 0, *x.shape[-3:])))
    return x, tuple(np.int64(0 if n == 1 else s) for n, s in zip(x.shape, x.strides, strict=True))


def _one_beta_per_head(machine: Machine, problem: Problem, inputs: Inputs) -> tuple[Problem, Inputs]:
    """Where β differs among the query heads of a group, each has keys and values of its own."""
    shape = problem.beta_shape
    if problem.group == 1 or shape is None or len(shape) < 2 or shape[-2] == 1:
        return problem, inputs
    key, value = (machine.xp.repeat(x, problem.group, axis=-3) for x in (inputs.key, inputs.value))
    return dataclasses.replace(problem, key_value_heads=problem.query_heads), inputs._replace(key=key, value=value)


class Values(NamedTuple):
    """What the value pass makes."""

    x: Array  # (B·Hkv, Lk, XP)
    c: Array  # (B·Hkv, CP)
    flags: Array  # (B·Hkv,)


def values(x: Call) -> Values:
    """The value pass: X, its integers, and which heads are inside the fast range."""
    xp, heads, keys, build = x.machine.xp, x.key_value_heads, x.problem.key_length, x.build
    chunks = max(1, -(-keys // CHUNK))
    zeros = xp.zeros(heads * (2 * build.value_dim + 1), dtype=xp.uint32)  # ranges and flags
    ranges, flags = zeros[heads:], zeros[:heads].view(xp.int32)
    c = x.empty(heads, build.wide + build.expm1 * build.value_dim, dtype=xp.int32)
    hard = x.empty(heads, dtype=xp.int32)
    made = x.empty(heads, keys, build.wide)
    x.run("value_exp", heads * chunks, x.v, flags, ranges, made, np.int32(chunks), np.int32(CHUNK))
    x.run("value_decide", heads, ranges, c, flags, hard)
    x.run("value_again", heads * AGAIN, x.v, c, hard, made, np.int32(AGAIN))
    return Values(made, c, flags)


def forward(machine: Machine, problem: Problem, inputs: Inputs) -> Forward:
    """The output, its float32 form where that is another, and the log-sum-exp."""
    xp = machine.xp
    keep = problem.dtype != "float32" and problem.gradient
    if 0 in problem.score_shape:
        out = xp.zeros(problem.out_shape, dtype=inputs.query.dtype)
        lse = xp.full(problem.lse_shape, -math.inf, dtype=xp.float32)
        return Forward(out, lse, xp.zeros(problem.out_shape, dtype=xp.float32) if keep else None)
    problem, inputs = _one_beta_per_head(machine, problem, inputs)
    x = call(machine, problem, inputs)
    out = x.empty(*problem.out_shape)
    lse = x.empty(*problem.lse_shape, dtype=xp.float32)
    special = machine.special_forward(x, out, lse, keep)
    residual: Any
    if special is not None:
        v, residual = special
    else:
        v = values(x)
        residual = x.empty(*problem.out_shape, dtype=xp.float32) if keep else NOTHING
        blocks = -(-problem.query_length // x.build.queries)
        x.run("forward", x.heads * blocks, x.q, x.k, x.v, v.x, v.c, v.flags, out, residual, lse)
    workers = min(WORKERS * machine.processors, x.heads * problem.query_length)
    sizes = (np.int32(x.heads), np.int32(workers))
    x.run("forward_exact", workers, x.q, x.k, x.v, v.flags, out, *unrounded(residual), lse, *sizes)
    kept = residual if special is None else (residual, v.c, v.flags)  # the special kernels backward make X from them
    return Forward(out, lse, kept if keep else None)


def unrounded(residual: Any) -> tuple[Any, Any]:
    """What is kept of the unrounded output: all of it, or what its rounding left; a null pointer for the other."""
    return (NOTHING, residual) if getattr(residual, "dtype", None) == np.int16 else (residual, NOTHING)


def outputs(x: Call, forward: Forward) -> tuple[Any, Any, Any]:
    """The output in float32, or what its rounding left of it, and the output."""
    kept = forward.residual[0] if isinstance(forward.residual, tuple) else forward.residual
    whole, rest = unrounded(matrix(x.machine, forward.out if kept is None else kept, x.problem.value_dim))
    return whole, rest, NOTHING if rest is NOTHING else matrix(x.machine, forward.out, x.problem.value_dim)


class Rows(NamedTuple):
    """What the backward pass needs of queries and keys beside their values."""

    o: Any  # (B·Hq, Lq, E) in float32, or a null pointer
    do: Array
    dl: Any  # (B·Hq·Lq,), or a null pointer
    l: Array
    r: Array
    g: Array  # (B·Hq·Lq, XP)
    marks: Array  # (B·Hkv·Lk,)
    scales: Array  # (B·Hkv, 2)
    rest: tuple[Any, Any] = (NOTHING, NOTHING)  # where o is not there: what its rounding left, and the rounded one


def rows(x: Call, v: Values, forward: Forward, d_out: Array, d_lse: Array | None) -> Rows:
    """The passes over queries and over keys."""
    xp, build, problem = x.machine.xp, x.build, x.problem
    do = matrix(x.machine, d_out, problem.value_dim)
    o, rest, out = outputs(x, forward)
    if rest is not NOTHING:  # of a forward pass by other kernels
        o = ((out.view(np.int16).astype(np.int32) << 16) + rest).view(np.float32)
    lse = xp.ascontiguousarray(forward.lse).reshape(-1)
    dl: Any = NOTHING if d_lse is None else xp.ascontiguousarray(d_lse).reshape(-1)
    queries, keys = x.heads * problem.query_length, x.key_value_heads * problem.key_length
    l, r, sizes, bounds = (x.empty(queries, dtype=xp.float32) for _ in range(4))
    g, marks = x.empty(queries, build.wide), x.empty(keys, dtype=xp.float32)
    scales = xp.zeros((x.key_value_heads, 2), dtype=xp.int32)
    terms = (x.q, o, do, lse, dl, v.c, v.flags, l, r, sizes, bounds, g)
    x.run("row_terms", -(-queries * build.lanes // THREADS), *terms, np.int64(queries))
    if problem.dtype == "float16":
        x.run("row_scales", x.key_value_heads, sizes, bounds, scales)
        grid = -(-queries * build.wide // (2 * THREADS))
        x.run("row_weights", grid, o, do, l, v.c, v.flags, scales, g, np.int64(queries))
    blocks = -(-problem.key_length // CHUNK)
    x.run("key_marks", x.key_value_heads * blocks, x.k, marks, v.flags, np.int32(blocks))
    return Rows(o, do, dl, l, r, g, marks, scales)


def _with_rows(x: Call, forward: Forward, d_out: Array, d_lse: Array | None) -> tuple[Values, Rows]:
    v = values(x)
    return v, rows(x, v, forward, d_out, d_lse)


def backward(
    machine: Machine, problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None
) -> Gradients:
    """The gradients of query, key and value, and of bias and β where they are arrays."""
    xp = machine.xp
    if 0 in problem.score_shape:
        return no_gradients(xp, inputs)
    grouped, given = problem, inputs
    problem, inputs = _one_beta_per_head(machine, problem, inputs)
    x = call(machine, problem, inputs)
    dq, dk, dv = (xp.empty_like(a) for a in (x.q, x.k, x.v))
    q_blocks, k_blocks = (-(-n // (BLOCK * x.build.owned)) for n in (problem.query_length, problem.key_length))
    workers = EXACT if given.beta is not None else WORKERS * machine.processors  # the former have room for dβ
    dbetas: Any = [NOTHING, NOTHING]
    if given.beta is not None:
        shapes = ((x.key_value_heads, n, x.build.value_dim) for n in (k_blocks, workers))
        dbetas = [xp.zeros(shape, dtype=xp.float32) for shape in shapes]
    made = machine.special_backward(x, forward, d_out, d_lse, dq, dk, dv)
    v, r = made or _with_rows(x, forward, d_out, d_lse)
    if made is None:
        pairs = (r.l, r.r, r.marks)
        of_keys = (x.q, x.k, x.v, v.x, r.g, *pairs, v.c, r.scales, v.flags, dk, dv, dbetas[0])
        x.run("backward_keys", x.key_value_heads * k_blocks, *of_keys)
        if x.build.split:
            x.run("backward_values", x.key_value_heads * k_blocks, *of_keys)
        x.run("backward_queries", x.heads * q_blocks, x.q, x.k, v.x, r.g, *pairs, r.scales, v.flags, dq)
    exact = (x.q, x.k, x.v, r.o, *r.rest, r.do, r.dl, r.l, r.marks, v.flags)
    sizes = (np.int32(x.key_value_heads), np.int32(workers))
    x.run("backward_queries_exact", workers, *exact, dq, *sizes)
    x.run("backward_keys_exact", workers, *exact, dk, dv, dbetas[1], *sizes)

    dq = dq[..., : problem.head_dim].reshape(given.query.shape)
    dk, dv = (
        _over_group(xp, a[..., : like.shape[-1]], like, problem.query_heads if problem != grouped else 0)
        for a, like in ((dk, given.key), (dv, given.value))
    )
    dbias = None if given.bias is None else _bias_gradient(x, v, r).astype(given.bias.dtype)
    dbeta = None if given.beta is None else _beta_gradient(x, v, r, dbetas, given.beta)
    return Gradients(dq, dk, dv, dbias, dbeta)


def _over_group(xp: Any, x: Array, like: Array, heads: int) -> Array:
    """``x`` in the shape of ``like``, summed over the heads of a group where there were ``heads`` copies."""
    if not heads:
        return x.reshape(like.shape)
    *batch, own, length, width = like.shape
    return x.reshape((*batch, own, heads // own, length, width)).astype(xp.float32).sum(axis=-3).astype(like.dtype)


def _beta_gradient(x: Call, v: Values, r: Rows, of_keys: list[Array], beta: Array) -> Array:
    xp, problem = x.machine.xp, x.problem
    chunks = -(-problem.query_length // CHUNK)
    of_rows = xp.zeros((x.heads, chunks, x.build.value_dim), dtype=xp.float32)
    x.run("backward_beta", x.heads * chunks, r.o, r.do, r.l, v.c, v.flags, of_rows, np.int32(chunks), np.int32(CHUNK))
    total: Any = 0
    for parts in (of_rows, *of_keys):
        heads = parts.shape[0] // math.prod(problem.batch)
        parts = parts.reshape((-1, heads, *parts.shape[1:])).sum(axis=(0, 2))[:, : problem.value_dim]
        total = total + unbroadcast(xp, parts, tuple(beta.shape))
    return total.astype(beta.dtype)


def _bias_gradient(x: Call, v: Values, r: Rows) -> Array:
    """Parts of it, as large as the bias or far smaller than the scores, and their sum."""
    xp, problem = x.machine.xp, x.problem
    assert problem.bias_shape is not None
    batch, lq, lk = math.prod(problem.batch), problem.query_length, problem.key_length
    shape = (1,) * (len(problem.score_shape) - len(problem.bias_shape)) + problem.bias_shape
    over_queries, over_keys = (shape[a] == 1 and n > 1 for a, n in ((-2, lq), (-1, lk)))
    whole = not over_queries and not over_keys  # then an axis of heads can be summed in place
    reduce_b = whole and all(n == 1 for n in shape[:-3])
    reduce_h = whole and shape[-3] == 1
    chunks = -(-lk // BIAS_CHUNK)
    axes = (
        *((1,) * len(problem.batch) if reduce_b else problem.batch),
        1 if reduce_h else problem.query_heads,
        lq if over_keys or not over_queries else 4 * -(-lq // BLOCK),
        chunks if over_keys else lk,
    )
    parts = xp.zeros(axes, dtype=xp.float32)
    grid = math.prod(axes[:-2]) * -(-lq // BLOCK) * chunks
    operands = (x.q, x.k, x.v, v.x, r.g, r.o, r.do, r.dl, r.l, r.r, r.marks, r.scales, v.flags, parts)
    flags = (batch, reduce_b, reduce_h, over_keys or not over_queries, not over_keys, chunks, BIAS_CHUNK)
    x.run("backward_bias", grid, *operands, *map(np.int32, flags))
    return unbroadcast(xp, parts, problem.bias_shape)
