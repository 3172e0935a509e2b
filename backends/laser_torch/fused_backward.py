"""LASER in Triton kernels, backward: what the host does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from laser_core import Forward, Gradients, Inputs, Problem, _array, _gradient

from . import hopper, hopper_gradient, triton_backward, triton_exact
from .call import (
    INTERPRETED,
    Call,
    Values,
    describe,
    describe_rows,
    matrix,
    padded,
    prepare,
    tile_of,
    value_pass,
    workers,
)
from .tiles import ROWS, Tile, backward_tiles, value_block


class Cotangents(NamedTuple):
    """What flows back, and what the kernels make of it."""

    o: Tensor  # unrounded, contiguous
    do: Tensor  # (B, Hq, Lq, E)
    dl: Tensor | None  # (B, Hq, Lq)
    g: Tensor  # (B·Hq, Lq, E)
    rows: Tensor  # (2, B·Hq, Lq up to a multiple of ROWS): r and l in base 2

    @property
    def r(self) -> Tensor:
        """The part of ds that a row has in common."""
        return self.rows[0]

    @property
    def l2(self) -> Tensor:
        """The log-sum-exp in base 2, +∞ where nothing flows through a row."""
        return self.rows[1]

    def strides(self) -> list[int]:
        """Of do and dl."""
        return [*self.do.stride()[:3], *((0, 0, 0) if self.dl is None else self.dl.stride())]


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """The gradients; no synchronisation with the device."""
    arguments = (inputs.query, inputs.key, inputs.value)
    if 0 in problem.score_shape:
        return _gradient.no_gradients(_array.namespace(inputs.query), inputs)
    call = prepare(problem, inputs)
    with torch.cuda.device_of(inputs.query):  # type: ignore[no-untyped-call]
        values = value_pass(call)
        side = _prepare_rows(call, values, forward, d_out, d_lse)
        run = _hopper_backward if _hopper_serves(call) else _portable_backward
        dq, dk, dv = run(call, values, side)
        if problem.beta != 0:
            _launch_exact(call, values, side, dq, dk, dv)
        dbias = None if inputs.bias is None else _bias_gradient(call, values, side, inputs.bias)
    dq, dk, dv = (a.view(x.shape).to(x.dtype) for a, x in zip((dq, dk, dv), arguments, strict=True))
    return Gradients(dq, dk, dv, dbias)


def _inverse_beta(problem: Problem) -> float:
    return 1 / problem.beta if problem.beta else 1.0


def _prepare_rows(call: Call, values: Values, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> Cotangents:
    p, device = call.problem, call.q.device
    heads, width = call.batch * p.query_heads, padded(p.value_dim)
    do = matrix(d_out.reshape(call.batch, *d_out.shape[-3:]))
    dl = None if d_lse is None else d_lse.reshape(call.batch, *d_lse.shape[-2:])
    o = (forward.out if forward.residual is None else forward.residual).contiguous()
    g = torch.empty((heads, p.query_length, p.value_dim), dtype=call.q.dtype, device=device)
    rows = torch.empty((2, heads, triton.cdiv(p.query_length, ROWS) * ROWS), dtype=torch.float32, device=device)
    side = Cotangents(o, do, dl, g, rows)
    r, l2 = rows
    block = value_block(width)
    triton_backward.prepare_rows[(heads * (r.shape[1] // block),)](
        o, do, dl, forward.lse.contiguous(), values.c, values.flags, g, r, l2, *side.strides(),
        p.query_heads, p.group, p.query_length, call.y_scale, _inverse_beta(p), r.shape[1],
        E=p.value_dim, EP=width, BM=block, LINEAR=p.beta == 0, WITH_DL=dl is not None, num_warps=8,
    )  # fmt: skip
    return side


def _hopper_serves(call: Call) -> bool:
    if INTERPRETED or hopper.why_not(call.problem) or hopper.missing(call.q.device):
        return False
    return hopper.fits(call.q) and hopper.fits(call.k)


def _hopper_backward(call: Call, values: Values, side: Cotangents) -> tuple[Tensor, Tensor, Tensor]:
    p = call.problem
    rows, columns = (p.query_length, p.value_dim), (p.key_length, p.value_dim)
    return hopper_gradient.backward(
        call.q, call.k, values.x.view(call.batch, p.key_value_heads, *columns),
        side.g.view(call.batch, p.query_heads, *rows), side.rows, values.flags, p.beta or 1.0, p.scale,
        hopper.causal_offset(p),
    )  # fmt: skip


def _portable_backward(call: Call, values: Values, side: Cotangents) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the heads inside the fast range, contiguous."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
    for_keys, for_queries = backward_tiles(*tile_of(call))
    _launch_keys(call, values, side, dk, dv, for_keys)
    _launch_queries(call, values, side, dq, for_queries)
    return dq, dk, dv


def _launch_keys(call: Call, values: Values, side: Cotangents, dk: Tensor, dv: Tensor, tile: Tile) -> None:
    p, g, q = call.problem, describe_rows(side.g, tile.block_q), describe(call.q, tile.block_q)
    tma = tile.tma and g is not None and q is not None
    source, strides = q if tma and q is not None else (call.q, call.strides("q"))
    triton_backward.backward_keys[(call.batch * p.key_value_heads * triton.cdiv(p.key_length, tile.block_k),)](
        source, call.k, values.x, g if tma else side.g, side.r, side.l2, values.flags, call.mask, call.bias,
        call.query_lengths, call.key_lengths, dk, dv, *strides, *call.strides("k", "mask", "bias"),
        *call.geometry(), _inverse_beta(p), side.r.shape[1], **call.options(),
        EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, TMA=tma,
        SHIFT=0 if p.beta == 0 else call.limits.shift, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _launch_queries(call: Call, values: Values, side: Cotangents, dq: Tensor, tile: Tile) -> None:
    p, x, k = call.problem, describe_rows(values.x, tile.block_k), describe(call.k, tile.block_k)
    tma = tile.tma and x is not None and k is not None
    source, strides = k if tma and k is not None else (call.k, call.strides("k"))
    triton_backward.backward_queries[(call.batch * p.query_heads * triton.cdiv(p.query_length, tile.block_q),)](
        call.q, source, x if tma else values.x, side.g, side.r, side.l2, values.flags, call.mask, call.bias,
        call.query_lengths, call.key_lengths, dq, *call.strides("q"), *strides, *call.strides("mask", "bias"),
        *call.geometry(), _inverse_beta(p), side.r.shape[1], **call.options(),
        EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, TMA=tma,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _exact_arguments(call: Call, side: Cotangents) -> list[Any]:
    return [*call.strides("q", "k", "v"), *side.strides(), *call.strides("mask", "bias")]


def _launch_exact(call: Call, values: Values, side: Cotangents, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    p = call.problem
    options = call.options()
    del options["LINEAR"]
    options |= {"BM": 16, "BN": 16, "BE": 16, "WITH_DL": side.dl is not None, "num_warps": 4, "num_stages": 1}
    arrays = (call.q, call.k, call.v, side.o, side.do, side.dl, side.l2, values.flags, call.mask, call.bias)
    lengths = (call.query_lengths, call.key_lengths)
    scalars = (*call.geometry(), call.y_scale, _inverse_beta(p), side.r.shape[1])
    heads = call.batch * p.query_heads
    count = workers(heads, triton.cdiv(p.query_length, 16))
    triton_exact.exact_queries[(heads * count,)](
        *arrays, *lengths, dq, *_exact_arguments(call, side), count, *scalars, **options
    )
    heads = call.batch * p.key_value_heads
    count = workers(heads, triton.cdiv(p.key_length, 16) * (triton.cdiv(p.value_dim, 16) + 1))
    triton_exact.exact_keys[(heads * count,)](
        *arrays, *lengths, dk, dv, *_exact_arguments(call, side), count, *scalars, **options
    )


def _bias_gradient(call: Call, values: Values, side: Cotangents, bias: Tensor) -> Tensor:
    p = call.problem
    shape = (1,) * (len(p.score_shape) - bias.ndim) + tuple(bias.shape)
    own_batch = call.batch if any(n != 1 for n in shape[:-3]) else 1
    sums = (shape[-2] == 1 and p.query_length > 1, shape[-1] == 1 and p.key_length > 1)
    found = torch.empty((own_batch, *shape[-3:]), dtype=torch.float32, device=bias.device)
    block_q, block_k = 32, 32
    tiles = triton.cdiv(shape[-2], block_q) * triton.cdiv(shape[-1], block_k)
    triton_exact.backward_bias[(own_batch * shape[-3] * tiles,)](
        call.q, call.k, call.v, values.x, side.g, side.r, side.o, side.do, side.dl, side.l2, values.flags,
        call.mask, call.bias, call.query_lengths, call.key_lengths, found, *_exact_arguments(call, side),
        shape[-3], call.batch // own_batch, p.query_heads // shape[-3],
        *call.geometry(), call.y_scale, _inverse_beta(p), side.r.shape[1],
        **call.options(), EP=padded(p.value_dim), BM=block_q, BN=block_k, BE=16, SUM_I=sums[0], SUM_J=sums[1],
        WITH_DL=side.dl is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    if own_batch > 1:  # (B, …) back to the batch axes that the bias has
        found = found.reshape(*p.batch, *shape[-3:])
    gradient: Tensor = _array.unbroadcast(_array.namespace(bias), found, tuple(bias.shape))
    return gradient.to(bias.dtype)
