"""LASER in Triton kernels, forward: what the host does. The kernels are in ``triton_*.py`` and ``hopper_forward.py``.

On the device alone and without a branch on the host: the value pass writes X, the range of every head is judged, one
flash kernel serves the heads inside the fast range, and one that computes the definition serves the rest. It returns
at once where there is none.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from laser_core import Forward, Inputs, Problem

from . import hopper, triton_forward
from .call import INTERPRETED, Call, Values, describe, describe_rows, padded, prepare, tile_of, value_pass, workers
from .tiles import forward_tile

FEW = 16  # rows that see fewer keys are computed exactly where X is in half precision


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output; no synchronisation with the device."""
    q, dtype = inputs.query, inputs.query.dtype
    wide = dtype != torch.float32
    if 0 in problem.score_shape:
        out = q.new_zeros(problem.out_shape)
        l = q.new_full(problem.lse_shape, -math.inf, dtype=torch.float32)
        return Forward(out, l, torch.zeros_like(out, dtype=torch.float32) if wide else None)
    call = prepare(problem, inputs)
    fast = _hopper_forward if _hopper_serves(call) else _portable_forward
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        values = value_pass(call)
        out, l, residual, count = fast(call, values, wide)
        _exact_forward(call, values, out, residual, l, count)
    return Forward(out.view(problem.out_shape).to(dtype), l, residual)


def _hopper_serves(call: Call) -> bool:
    """Whether the kernel for Hopper runs the call."""
    if INTERPRETED or hopper.why_not(call.problem) or hopper.missing(call.q.device):
        return False
    return hopper.fits(call.q) and hopper.fits(call.k)


def _hopper_forward(call: Call, values: Values, wide: bool) -> tuple[Tensor, Tensor, Tensor | None, None]:
    p = call.problem
    heads = (call.batch, p.key_value_heads)
    c = values.c.to(torch.int32).view(*heads, p.value_dim)
    out, l, residual = hopper.forward(
        call.q, call.k, values.x.view(*heads, *values.x.shape[1:]), c, p.beta or 0.0, p.scale,
        hopper.causal_offset(p), wide,
    )  # fmt: skip
    return out, l.view(p.lse_shape), None if residual is None else residual.view(p.out_shape), None


def _portable_forward(call: Call, values: Values, wide: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The flash kernel on X: o, l, o unrounded, and how many keys a query sees where a mask or bias decides it."""
    p, limits, options = call.problem, call.limits, call.options()
    out = torch.empty(p.out_shape, dtype=call.q.dtype, device=call.q.device)
    l = torch.empty(p.lse_shape, dtype=torch.float32, device=out.device)
    residual = torch.empty(p.out_shape, dtype=torch.float32, device=out.device) if wide else None
    tile = forward_tile(*tile_of(call))
    counted = call.mask is not None or call.bias is not None
    count = torch.empty(l.shape, dtype=torch.int32, device=l.device) if counted else None
    outputs = (call.query_lengths, call.key_lengths, out, residual, l)
    fold = p.scale > 0 and p.logits_soft_cap is None
    described, x = describe(call.k, tile.block_k), describe_rows(values.x, tile.block_k)
    tma = tile.tma and described is not None and x is not None
    k, k_strides = described if tma and described is not None else (call.k, call.strides("k"))
    triton_forward.forward[(call.batch * p.query_heads * triton.cdiv(p.query_length, tile.block_q),)](
        call.q, k, x if tma else values.x, values.c, values.flags, count, call.mask, call.bias, *outputs,
        *call.strides("q"), *k_strides, *call.strides("mask", "bias"), *call.geometry(), call.o_scale,
        **options, EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, FOLD=fold, TMA=tma,
        SHIFT=0 if p.beta == 0 else limits.shift, RESIDUAL=residual is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, l, residual, count


def _exact_forward(
    call: Call, values: Values, out: Tensor, residual: Tensor | None, l: Tensor, count: Tensor | None
) -> None:
    """The definition, for heads outside the fast range and for what sees NaN or infinity."""
    p, options = call.problem, call.options()
    heads = call.batch * p.query_heads
    outputs = (call.query_lengths, call.key_lengths, out, residual, l)
    share = workers(heads, triton.cdiv(p.query_length, 16) * triton.cdiv(p.value_dim, 16))
    triton_forward.exact[(heads * share,)](
        call.q, call.k, call.v, values.flags, count, call.mask, call.bias, *outputs,
        *call.strides("q", "k", "v", "mask", "bias"), share, *call.geometry(), p.beta or 0.0,
        **options, BM=16, BN=16, BE=16, FEW=FEW if residual is not None and p.beta != 0 else 0,
        RESIDUAL=residual is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
