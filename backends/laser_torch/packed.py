"""Packed sequences in Triton kernels: what the host does. Tiles go by pointers: they may end in the next sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from laser_core import Forward, Problem

from . import fused, fused_backward, triton_finish
from .call import Call, Plan, cdiv, prepare_packed, value_pass, workers
from .engines import Choice
from .launch import Launch, on
from .tiles import Tile, backward_tiles


def prepare(problem: Problem, query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor) -> Call:
    """A call whose sequences are inside the arrays, whatever ``starts`` say."""
    starts = (x.clamp(0, t.shape[0]).to(torch.int32) for x, t in ((starts_q, query), (starts_k, key)))
    return prepare_packed(problem, query, key, value, *starts)


def _by_pointers(plan: Plan) -> bool:
    """Whether the tiles of other calls are made for hardware that copies them by itself, and smaller ones do better."""
    dtype, head_dim, value_dim, large = plan.tile_of()
    return large and dtype != torch.float32 and 64 < max(head_dim, value_dim) <= 128


def forward(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """``o (Tq, Hq, E)``, ``l (Hq, Tq)`` and the rest of o."""
    with on(call.plan.device):
        tile = Tile(64, 64, 4, 3) if _by_pointers(call.plan) else None
        out, l, rest, _ = fused.run(call, Choice("triton", tile, ""))
        _clear(call, out)
    if out.dtype != dtype:  # interpreted
        out, rest = fused.split(out, dtype)
    return out, l, rest


def backward(call: Call, state: Forward, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, packed."""
    plan, tiles = call.plan, None
    if _by_pointers(plan):
        tiles = (Tile(32, 64, 4, 2), backward_tiles(*plan.tile_of())[1])
    with on(plan.device):
        values = value_pass(call)  # the kernels clean what they read
        side = fused_backward.prepare_rows(call, values, state, d_out, d_lse)
        dq, dk, dv = fused_backward.run(call, values, side, Choice("triton", tiles, ""))
        if plan.problem.beta != 0:
            fused_backward._exact_backward(call, values, side, dq, dk, dv)
        _clear(call, dq)
        _clear(call, dk, keys=True)
        _clear(call, dv, keys=True)
    return dq, dk, dv


def _clear(call: Call, x: Tensor, keys: bool = False) -> None:
    """Zero the rows that belong to no sequence, and so were not written."""
    call.plan.prepared(_clear_launch, tuple(x.shape), keys)(x, call.key_lengths if keys else call.query_lengths)


def _clear_launch(plan: Plan, shape: tuple[int, ...], keys: bool) -> Launch:
    p, share = plan.problem, workers(plan.batch + 2, cdiv(shape[0] * shape[1] * shape[2], 4096))
    return Launch(
        triton_finish.clear, (plan.batch + 2) * share,
        (share, plan.batch, p.key_length if keys else p.query_length, shape[0]),
        WIDTH=shape[1] * shape[2], BLOCK=4096, num_warps=4,
    )  # fmt: skip
