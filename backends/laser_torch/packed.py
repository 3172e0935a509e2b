"""Packed sequences in Triton kernels: what the host does. Tiles go by pointers: they may end in the next sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from laser_core import Forward, Problem

from . import fused, fused_backward
from .call import Call, prepare_packed, value_pass
from .engines import Choice
from .launch import on


def prepare(problem: Problem, query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor) -> Call:
    """A call whose sequences are inside the arrays, whatever ``starts`` say."""
    starts = (x.clamp(0, t.shape[0]).to(torch.int32) for x, t in ((starts_q, query), (starts_k, key)))
    return prepare_packed(problem, query, key, value, *starts)


def forward(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """``o (Tq, Hq, E)``, ``l (Hq, Tq)`` and the rest of o."""
    with on(call.plan.device):
        out, l, rest = fused.run(call, Choice("triton", None, ""))
    if out.dtype != dtype:  # interpreted
        out, rest = fused.split(out, dtype)
    return out, l, rest


def backward(call: Call, state: Forward, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, packed."""
    plan = call.plan
    with on(plan.device):
        values = value_pass(call, keys=False)  # the kernels clean what they read
        side = fused_backward.prepare_rows(call, values, state, d_out, d_lse)
        dq, dk, dv = fused_backward.run(call, values, side, Choice("triton", None, ""))
        if plan.problem.beta != 0:
            fused_backward._exact_backward(call, values, side, dq, dk, dv)
    return dq, dk, dv
