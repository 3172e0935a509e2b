"""A complete backend to copy: LASER attention in tiles on NumPy arrays, written as a kernel would be.

docs/porting.md walks through it. The loops over heads and query tiles are what a kernel launches in parallel; what is
inside of them is the kernel. It refuses what it does not have, and passes every level of the suite with the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from laser_core import Backend, Forward, Gradients, Inputs, Problem, unrounded_output

Array = np.ndarray[Any, Any]
BLOCK = 64
RANGE = 34.0  # nats: where all |βv| are below, exp(βv) and its sums neither overflow nor lose what matters


# --- record: what is served ---
def why_not(problem: Problem) -> str | None:
    """The reason for not running a problem, from shapes and options alone."""
    if problem.beta is None or abs(problem.beta) < 1:
        return "beta: its expm1 form is not written yet (supported: a number with |beta| ≥ 1)"
    if problem.bias_shape is not None:
        return "bias: not written yet"
    if problem.logits_soft_cap is not None:
        return "logits_soft_cap: not written yet"
    return None


# --- head: the value pass ---
class Head(NamedTuple):
    """A query head of one batch entry and the key/value head that it reads, in the compute dtype."""

    at: tuple[int, ...]  # where its q, o and l are
    reads: tuple[int, ...]  # where its k and v are
    q: Array  # (Lq, D), finite
    k: Array  # (Lk, D), finite
    y: Array  # (Lk, E), βv
    x: Array | None  # exp(βv), finite; None outside the fast range
    odd_q: Array  # (Lq, 1), queries that are not finite
    odd_k: Array  # (1, Lk)
    odd_y: Array  # (Lk, E), NaN and +∞ of βv as ones
    mask: Array | None  # (Lq, Lk)
    lengths: tuple[int, int]


def heads(problem: Problem, inputs: Inputs) -> Iterator[Head]:
    """Every query head."""
    assert problem.beta is not None
    for at in np.ndindex(*problem.batch, problem.query_heads):
        reads = (*at[:-1], at[-1] // problem.group)
        wide = (inputs.query[at], inputs.key[reads], inputs.value[reads])
        q, k, v = (x.astype(problem.compute_dtype) for x in wide)
        mask = None if inputs.attn_mask is None else np.broadcast_to(inputs.attn_mask, problem.score_shape)[at]
        limits = (problem.query_length, problem.key_length)
        given = (inputs.query_seq_lengths, inputs.key_value_seq_lengths)
        lengths = [
            n if x is None else int(np.broadcast_to(x, problem.batch)[at[:-1]])
            for n, x in zip(limits, given, strict=True)
        ]
        y = problem.beta * v
        counts = np.isfinite(y) & (np.arange(len(y)) < lengths[1])[:, None]  # the others no query sees
        x = np.exp(np.where(counts, y, 0)) * counts if np.abs(y[counts]).max(initial=0) <= RANGE else None
        odd_q, odd_k = (~np.isfinite(a).all(axis=-1) for a in (q, k))
        q, k = (np.where(np.isfinite(a), a, 0) for a in (q, k))
        odd_y = (np.isnan(y) | (y == math.inf)).astype(y.dtype)
        yield Head(at, reads, q, k, y, x, odd_q[:, None], odd_k[None, :], odd_y, mask, (lengths[0], lengths[1]))


# --- tiles: what is visible ---
def tiles(length: int) -> list[slice]:
    """Tiles of queries or keys."""
    return [slice(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def key_tiles(problem: Problem, rows: slice) -> list[slice]:
    """Those of which a query of ``rows`` may see something, by causality and window."""
    low, high = problem.band
    first = 0 if low is None else rows.start + low
    last = problem.key_length if high is None else rows.stop + high
    return [t for t in tiles(problem.key_length) if t.stop > first and t.start < last]


def scores(problem: Problem, head: Head, rows: slice, columns: slice) -> Array:
    """s (rows, columns): −∞ where hidden, and only there; NaN where visible and made of what is not finite."""
    i, j = np.arange(rows.start, rows.stop)[:, None], np.arange(columns.start, columns.stop)[None, :]
    low, high = problem.band
    seen = (i < head.lengths[0]) & (j < head.lengths[1])
    seen &= (j - i >= low) if low is not None else True
    seen &= (j - i <= high) if high is not None else True
    seen &= head.mask[rows, columns] if head.mask is not None else True
    s = problem.scale * (head.q[rows] @ head.k[columns].T)
    s = np.where(head.odd_q[rows] | head.odd_k[:, columns], math.nan, s)
    return np.where(seen, s, -math.inf)


# --- forward: one tile of queries ---
def attend(problem: Problem, head: Head, rows: slice) -> tuple[Array, Array]:
    """o (rows, E) and l (rows): a walk over key tiles, with running maxima."""
    assert problem.beta is not None
    shape, dtype = (rows.stop - rows.start, head.y.shape[-1]), head.y.dtype
    m, l = np.full((shape[0], 1), -math.inf, dtype), np.zeros((shape[0], 1), dtype)
    top, acc = np.full(shape, -math.inf, dtype), np.zeros(shape, dtype)
    odd = np.zeros(shape, dtype)
    for columns in key_tiles(problem, rows):
        s = scores(problem, head, rows, columns)
        old, (m, reference, rescale) = m, raised(m, s.max(axis=1, keepdims=True))
        p = np.exp(s - reference)
        l = l * rescale + p.sum(axis=1, keepdims=True)  # l·exp(m) = Σ exp(s)
        if head.x is not None:
            acc = acc * rescale + p @ head.x[columns]  # acc·exp(m) = Σ exp(s + βv)
            odd += (s != -math.inf).astype(dtype) @ head.odd_y[columns]
        else:
            t = np.where(s[:, :, None] == -math.inf, -math.inf, (s - reference)[:, :, None] + head.y[columns])
            top = np.where(top == -math.inf, top, top + (old - reference))  # it is relative to m
            top, highest, rescale = raised(top, t.max(axis=1))
            acc = acc * rescale + np.exp(t - highest[:, None]).sum(axis=1)  # acc·exp(m + top) = Σ exp(s + βv)
    empty = l == 0
    l = np.where(empty, 1, l)
    o = np.log(acc / l) / problem.beta if head.x is not None else (top + np.log(acc / l)) / problem.beta
    o = np.where(odd > 0, math.nan, o)
    return np.where(empty, 0, o), np.where(empty, -math.inf, m + np.log(l))[:, 0]


def raised(maximum: Array, other: Array) -> tuple[Array, Array, Array]:
    """The new maximum, itself or 0 to subtract where it is −∞, and the factor of what was summed about the old one."""
    new = np.maximum(maximum, other)
    reference = np.where(new == -math.inf, 0, new)
    return new, reference, np.exp(maximum - reference)


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Output and log-sum-exp; the output is kept in the compute dtype too, for the backward pass."""
    out, lse = np.empty(problem.out_shape, problem.compute_dtype), np.empty(problem.lse_shape, problem.compute_dtype)
    for head in heads(problem, inputs):
        for rows in tiles(problem.query_length):
            out[head.at][rows], lse[head.at][rows] = attend(problem, head, rows)
    if problem.dtype == problem.compute_dtype:
        return Forward(out, lse)
    return Forward(out.astype(inputs.query.dtype), lse, residual=out)


# --- backward ---
def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """dq, dk and dv; p is computed again from l, and every sum has one order."""
    beta, dtype = problem.beta, problem.compute_dtype
    assert beta is not None
    outputs = forward.out if forward.residual is None else forward.residual
    dq, dk, dv = (np.zeros(x.shape, dtype) for x in inputs[:3])
    for head in heads(problem, inputs):
        o, l, do = outputs[head.at], forward.lse[head.at][:, None], d_out[head.at].astype(dtype)
        dl = np.zeros_like(l) if d_lse is None else d_lse[head.at].astype(dtype)[:, None]
        fine = np.isfinite(np.concatenate([o, do, dl, l], axis=1)).all(axis=1, keepdims=True)
        head = head._replace(odd_q=head.odd_q | (~fine & (l != -math.inf)))  # NaN travels in p, not in operands
        o, do, dl, l = (np.where(fine, a, 0) for a in (o, do, dl, l))
        for rows in tiles(problem.query_length):
            for columns in key_tiles(problem, rows):
                s = scores(problem, head, rows, columns)
                p = np.exp(s - l[rows])
                row = do[rows].sum(axis=1, keepdims=True) / beta
                if head.x is not None:
                    x, g = head.x[columns], do[rows] * np.exp(-beta * o[rows])
                    dv[head.reads][columns] += x * (p.T @ g)
                    ds = p * (g @ x.T / beta - row + dl[rows])
                else:
                    log_w = s[:, :, None] - l[rows][:, :, None] + (head.y[columns] - beta * o[rows][:, None])
                    w = np.where(s[:, :, None] == -math.inf, 0, np.exp(log_w)) * do[rows][:, None]
                    dv[head.reads][columns] += w.sum(axis=0)
                    ds = w.sum(axis=2) / beta + p * (dl[rows] - row)
                dq[head.at][rows] += problem.scale * (ds @ head.k[columns])
                dk[head.reads][columns] += problem.scale * (ds.T @ head.q[rows])
    return Gradients(*(g.astype(x.dtype) for g, x in zip((dq, dk, dv), inputs[:3], strict=True)))


BACKEND = Backend(
    name="example",
    summary="tiles in NumPy: an example to copy, in a distribution of its own",
    forward=forward,
    backward=backward,
    frameworks=("numpy",),
    why_not=why_not,
    residual=unrounded_output,
)
