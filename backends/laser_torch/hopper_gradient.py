"""Host side of the Hopper backward kernel: its tiles and the launch. What it serves is what the forward kernel does."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hopper import L2_BYTES, ROWS, processors


class Tiles(NamedTuple):
    """``stages`` tiles of 64 or 128 queries in flight, ``parts`` of dq that wait to be added, no more than stages."""

    queries: int
    stages: int
    parts: int
    early: bool  # whether dv's product starts before ds is worked out
    registers: int


def tiles(width: int) -> Tiles:
    """How the backward kernel is cut for head dimension ``width``."""
    return Tiles(128 if width == 64 else 64, 2, 2, False, 240)


def constants(cut: Tiles, causal: bool, half: bool) -> dict[str, Any]:
    """The compile-time arguments of the backward kernel."""
    return {
        "CAUSAL": causal,
        "STAGES": cut.stages,
        "PARTS": cut.parts,
        "SHIFT": 15 if half else 0,
        "EARLY": cut.early,
        "REGISTERS": cut.registers,
    }


def tile_layout(block: list[int], size: int, swizzle: int) -> Any:
    """How a tile of elements of so many bytes lies in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle, 8 * size, len(block))


def _tile(a: Tensor, block: list[int], swizzle: int = 128) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [a.shape[-1] if n == 1 else s for n, s in zip(a.shape[:-1], a.stride(), strict=False)] + [1]
    return TensorDescriptor(a, list(a.shape), strides, block, tile_layout(block, a.element_size(), swizzle))


def backward(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    g: Tensor,
    rows: Tensor,
    flags: Tensor,
    beta: float,
    scale: float,
    causal_offset: int | None,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, of the heads that are not flagged: what those of the others hold is for another to write.

    p = 2^(scale·log2e·<q_i, k_j> − l2)    ds = p ∘ (G·Xᵀ/β + r)
    dv = X ∘ (pᵀ·G)    dq = scale·ds·K    dk = scale·dsᵀ·Q

    Args:
        q: (B, Hq, Lq, D), float16 or bfloat16, of any strides that :func:`.hopper.fits`.
        k: (B, Hk, Lk, D), Hq a multiple of Hk.
        x: (B, Hk, Lk, D), 2^(βv·log2e − c), finite.
        g: (B, Hq, Lq, D), do·2^(c − βo·log2e), finite.
        rows: (2, B·Hq, L), float32, L ≥ Lq a multiple of 64: r, and the log-sum-exp in base 2, +∞ from Lq on and
            where nothing flows through a query.
        flags: (B·Hk,), int32; odd: not this head.
        beta: The inverse temperature, not 0.
        scale: Of the scores, > 0.
        causal_offset: Query i sees the keys ≤ i + offset; None: all.
        cut: The tiles; None: :func:`tiles`.
    """
    from . import hopper_backward as kernels

    batch, heads, len_q, width = q.shape
    heads_k, len_k = k.shape[1:3]
    cut = cut or tiles(width)
    queries, half_width = cut.queries, cut.queries == ROWS
    q_tiles, k_tiles, group = -(-len_q // queries), -(-len_k // (2 * ROWS)), heads // heads_k
    dq, dk, dv = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (q, k, x))
    sums = torch.empty((batch * heads, q_tiles * queries, width), dtype=torch.float32, device=q.device)
    turns = torch.zeros(1 + batch * heads * q_tiles, dtype=torch.int32, device=q.device)
    of_queries, of_keys = [1, 1, queries, width], [1, 1, ROWS, width]
    count = batch * heads_k * k_tiles
    span = max(1, L2_BYTES // (8 * q_tiles * queries * width * group))
    half = q.dtype == torch.float16
    unit = 1 / beta * 2.0**-15
    scale_ds = scale if half else scale / beta
    offset = causal_offset or 0
    kernels.backward_kernel[(min(count, processors(q.device)),)](
        _tile(q, of_queries),
        _tile(g, of_queries),
        _tile(rows, [2, 1, queries], 0),
        _tile(k, of_keys, width if half_width else 128),
        _tile(x, of_keys),
        _tile(sums, [1, ROWS, width // 2 if half_width else width]),
        x,
        dk,
        dv,
        flags,
        turns,
        turns[1:],
        len_k,
        offset,
        scale_ds,
        scale * math.log2(math.e),
        -1 / (scale * math.log2(math.e)),
        beta,
        unit,
        heads_k,
        batch * heads_k,
        group,
        q_tiles,
        k_tiles,
        count,
        min(span, batch * heads_k),
        **constants(cut, causal_offset is not None, half),
        num_warps=4,
    )
    kernels.round_kernel[(q_tiles, batch * heads)](
        sums, dq, flags, len_q, q_tiles * queries, offset, scale_ds, group,
        QUERIES=queries, D=width, CAUSAL=causal_offset is not None, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv
