"""LASER in Triton kernels, forward: what the host does. The kernels are in ``triton_*.py`` and ``hopper_forward.py``.

On the device alone and without a branch on the host: the value pass writes X and judges the range of every head, one
flash kernel serves the heads inside the fast range, and one that computes the definition serves the rest. It returns
at once where there is none.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from laser_core import Forward, Inputs, Problem

from . import cudnn, engines, hopper, triton_finish, triton_forward
from .call import Call, Plan, Values, cdiv, describe, layout, padded, prepare, processors, value_pass, workers
from .engines import Choice
from .launch import Launch, on
from .tiles import Tile, forward_tile, row_block

FEW = 16  # rows that see fewer keys are computed exactly where X is in half precision


def keeps_rest(problem: Problem) -> bool:
    """Whether a backward pass gets the low half of the output, which a half-precision dtype has no room for."""
    return problem.gradient and problem.dtype != "float32"


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output; no synchronisation with the device."""
    q = inputs.query
    keeps = keeps_rest(problem)
    if 0 in problem.score_shape:
        out = q.new_zeros(problem.out_shape)
        l = q.new_full(problem.lse_shape, -math.inf, dtype=torch.float32)
        return Forward(out, l, torch.zeros_like(out, dtype=torch.int16) if keeps else None)
    call = prepare(problem, inputs)
    with on(q.device):
        out, l, rest, values = run(call, call.plan.prepared(engines.chosen, "forward"))
    if out.dtype != q.dtype:  # interpreted
        out, rest = split(out, q.dtype)
    if out.shape != problem.out_shape:  # several batch axes, or none
        out, l = out.view(problem.out_shape), l.view(problem.lse_shape)
        rest = None if rest is None else rest.view(problem.out_shape)
    if rest is None or not call.plan.prepared(_hopper_serves):
        return Forward(out, l, rest)
    heads = (*problem.batch, problem.key_value_heads)
    return Forward(out, l, (rest, values.c.view(*heads, -1), values.flags.view(heads)))


def _hopper_serves(plan: Plan) -> bool:
    """Whether the kernel for Hopper may run the backward pass: it needs what is known of the values."""
    return hopper.why_not(plan.problem) is None


def run(call: Call, choice: Choice) -> tuple[Tensor, Tensor, Tensor | None, Values]:
    """The output, l, the rest of the output where it is kept, and the values, by an engine that serves the call."""
    narrow = call.plan.prepared(_few)[1]
    rest: Tensor | None = None
    count: Tensor | None = None
    if choice.engine == "hopper":
        made = call.plan.prepared(_hopper, choice.tile, narrow)
        if made.chunks:  # it does the value pass
            values = _unwritten(call)
        else:
            values = value_pass(call, narrow)
        out, l, rest = hopper.forward(made, call.q, call.k, call.v, *values)
    else:
        values = value_pass(call, narrow)
        if choice.engine == "cudnn":
            out, l = _cudnn_forward(call, values)
        else:
            out, l, rest, count = _portable_forward(call, values, choice.tile)
    _exact_forward(call, values, out, rest, l, count)
    return out, l, rest, values


def split(o: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 array rounded, and the rest as int16, so that ``joined`` has nearly all of its bits.

    The rest is the difference of the two as float32 in units of the last place, as far as 16 bits hold it.
    """
    out = o.to(dtype)
    bits = o.view(torch.int32).long() - out.float().view(torch.int32)
    return out, bits.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def joined(out: Tensor, rest: Tensor) -> Tensor:
    """The float32 array that was split."""
    return (out.float().view(torch.int32) + rest).view(torch.float32)


def _hopper(plan: Plan, tile: tuple[Any, ...] | None, narrow: bool) -> hopper.Prepared:
    """The launch of the kernel for Hopper."""
    p = plan.problem
    q = (plan.batch, p.query_heads, p.query_length, p.head_dim)
    k = (plan.batch, p.key_value_heads, p.key_length, p.head_dim)
    offset = hopper.causal_offset(p)
    cut = None if tile is None else hopper.Tiles(*tile)
    values = None
    if plan.fits("v"):
        limits = plan.limits
        of_range = (limits.range, limits.sum, *limits.easy, limits.top, limits.narrow if narrow else 0.0)
        b, h, n = plan.strides("v")
        values = hopper.Values((b, h, n), plan.y_scale, plan.sums, of_range)
    return hopper.prepare(
        q, k, k[1], plan.dtype, plan.device, p.beta or 0.0, p.scale, offset, keeps_rest(p), plan.strides("q"), cut,
        values,
    )  # fmt: skip


def _unwritten(call: Call) -> Values:
    """The arrays of a value pass that the kernel for Hopper does."""
    plan, (_, heads, length, width) = call.plan, call.v.shape
    every, new = plan.batch * heads, functools.partial(torch.empty, dtype=torch.int32, device=plan.device)
    counters = torch.zeros((3 + every,), dtype=torch.int32, device=plan.device)
    return Values(plan.new(heads, length, width), new((every, width)), new((every,)), counters)


def _cudnn_forward(call: Call, values: Values) -> tuple[Tensor, Tensor]:
    """Softmax attention by cuDNN over X, and o from what it returns."""
    plan = call.plan
    a, l = cudnn.attention(plan.problem, call.q, call.k, values.x)
    out = torch.empty(a.shape, dtype=plan.dtype, device=plan.device)
    plan.prepared(_finish_launch, layout(a))(a, values.c, out)
    return out, l.contiguous()


def _finish_launch(plan: Plan, lies: tuple[tuple[int, ...], bool]) -> Launch:
    p, width = plan.problem, padded(plan.problem.value_dim)
    block = row_block(width)
    return Launch(
        triton_finish.finish, plan.batch * p.query_heads * cdiv(p.query_length, block),
        (*lies[0][:3], p.query_heads, p.group, p.query_length, *plan.o_scale),
        E=p.value_dim, EP=width, BM=block, LINEAR=p.beta == 0, num_warps=8,
    )  # fmt: skip


def _portable_forward(
    call: Call, values: Values, cut: tuple[Any, ...] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The flash kernel on X: o, l, the rest of o, and how many keys a query sees where a mask or bias decides it."""
    plan = call.plan
    p, device = plan.problem, plan.device
    out = plan.new(p.query_heads, p.query_length, p.value_dim)
    if plan.packed is None:
        l = torch.empty(out.shape[:3], dtype=torch.float32, device=device)
    else:
        l = torch.full((p.query_heads, plan.total), -math.inf, dtype=torch.float32, device=device)
    keeps = keeps_rest(p) and plan.dtype != torch.float32
    rest = torch.empty(out.shape, dtype=torch.int16, device=device) if keeps else None
    counted = call.mask is not None or call.bias is not None
    count = torch.empty(l.shape, dtype=torch.int32, device=device) if counted else None
    tile = forward_tile(*plan.tile_of()) if cut is None else Tile(*cut)
    k, x = (describe(plan, a, tile.block_k) if tile.tma else None for a in (call.k, values.x))
    tma = k is not None and x is not None
    plan.prepared(_forward_launch, tile, tma, keeps)(
        call.q, k if tma else call.k, x if tma else values.x, values.c, values.flags, count, call.mask, call.bias,
        call.query_lengths, call.key_lengths, out, rest, l,
    )  # fmt: skip
    return out, l, rest, count


def _forward_launch(plan: Plan, tile: Tile, tma: bool, keeps: bool) -> Launch:
    p = plan.problem
    return Launch(
        triton_forward.forward, plan.batch * p.query_heads * cdiv(p.query_length, tile.block_q),
        (*plan.strides("q", "k", "mask", "bias"), *plan.geometry(), *plan.o_scale, plan.total),
        **plan.options(), EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k,
        FOLD=p.scale > 0 and p.logits_soft_cap is None, TMA=tma, SHIFT=0 if p.beta == 0 else plan.limits.shift,
        REST=keeps, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _exact_forward(
    call: Call, values: Values, out: Tensor, rest: Tensor | None, l: Tensor, count: Tensor | None
) -> None:
    """The definition, for heads outside the fast range and for what sees NaN or infinity."""
    call.plan.prepared(_exact_launch, rest is not None)(
        call.q, call.k, call.v, values.flags, count, call.mask, call.bias,
        call.query_lengths, call.key_lengths, out, rest, l,
    )  # fmt: skip


def _exact_launch(plan: Plan, keeps: bool) -> Launch:
    p = plan.problem
    heads, parts = plan.batch * p.query_heads, cdiv(p.value_dim, 16)
    share = workers(heads, cdiv(p.query_length, 16) * parts)
    few_end, first = plan.prepared(_few)
    programs = heads * share
    if first:  # mostly there is hardly anything to do: no more than run at a time
        programs = min(programs, 2 * processors(plan.device))
    return Launch(
        triton_forward.exact, programs,
        (*plan.strides("q", "k", "v", "mask", "bias"), share, heads, *plan.geometry(), p.beta or 0.0, few_end,
         plan.total),
        **plan.options(), BM=16, BN=16, BE=16, FEW=FEW, EP=padded(p.value_dim), FIRST=first, REST=keeps,
        num_warps=4, num_stages=1,
    )  # fmt: skip


def _few(plan: Plan) -> tuple[int, bool]:
    """Behind the last query that may see fewer than FEW keys, and whether all of those are the first FEW keys.

    None where X is not rounded, or is v itself.
    """
    p = plan.problem
    if plan.dtype == torch.float32 or p.beta == 0:
        return 0, True
    low, high = p.band
    left = low is not None and low > 1 - p.query_length
    if p.mask_shape is not None or p.bias_shape is not None or p.query_lengths or p.key_value_lengths or left:
        return p.query_length, False
    if p.key_length < FEW:
        return p.query_length, False
    return (0 if high is None else max(0, min(p.query_length, FEW - 1 - high))), True
