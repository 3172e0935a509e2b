"""Host side of the Hopper backward kernel: its tiles and the launch. It serves what the forward kernel does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .hopper import L2_BYTES, ROWS

Shape = Sequence[int]
ROOM = 32 << 20  # bytes that the sums of dq may take, however small a problem is


class Tiles(NamedTuple):
    """How a problem is cut: ``stages`` tiles of queries in flight."""

    stages: int
    early: bool  # whether dv's product starts before ds is worked out
    registers: int
    chains: int  # in which the parts of dq are added, each in its order
    heads: int  # that are worked on by turns
    places: int  # of heads among the sums of dq, which are used again


HEADS = (6, 8)  # at least so many are worked on by turns, causal: key tiles of one follow one another at a distance
PIECES = 96  # of work of the heads in turn, where they are not causal: more is no better


def tiles(q: Shape, k: Shape, causal: bool) -> Tiles:
    """The tiles for (B, Hq, Lq, D) and (B, Hk, Lk, D): see docs/hopper-log.md for what they rest on."""
    (batch, heads_q, len_q, width), (_, heads_k, len_k, _) = q, k
    count, k_tiles = batch * heads_k, -(-len_k // (2 * ROWS))
    size = 4 * -(-len_q // queries(width)) * queries(width) * width * (heads_q // heads_k)  # of the sums of a head
    share = L2_BYTES
    if causal and k_tiles >= 16:  # not all rows of a head are in use at a time
        share = L2_BYTES * 4 // 3
    heads = max(HEADS[causal], share // (2 * size))
    if not causal:
        heads = min(heads, max(2 * HEADS[causal], PIECES // k_tiles))
    # softmax attention holds sums of the size of two arrays of queries, and no rest of o: so here there is room for one
    room = max(ROOM, count * size // 2) * 15 // 16
    chains = 2 if causal and width == 128 and k_tiles >= 32 and room >= 2 * HEADS[causal] * size else 1
    places = max(1, min(count, room // (chains * size), 2 * heads))
    return Tiles(2, False, 240, chains, min(heads, places), places)


def queries(width: int) -> int:
    """Of a tile."""
    return 8192 // width


def constants(cut: Tiles, causal: bool, half: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    return {
        "CAUSAL": causal,
        "STAGES": cut.stages,
        "SHIFT": 15 if half else 0,  # float16 needs its whole range of exponents for the weights
        "EARLY": cut.early,
        "REGISTERS": cut.registers,
        "CHAINS": cut.chains,
    }


def blocks(width: int) -> dict[str, tuple[list[int], int]]:
    """The tiles by the name of the argument, and how many bytes are swizzled in shared memory."""
    of_queries, of_keys = ([1, 1, queries(width), width], 128), ([1, 1, ROWS, width], 128)
    return {
        "q_desc": of_queries,
        "g_desc": of_queries,
        "rows_desc": ([2, 1, queries(width)], 0),
        "k_desc": of_keys,
        "v_desc": of_keys,
        "sums_desc": ([ROWS, ROWS], 0),  # of a warpgroup, in an order of its own
        "dq_desc": ([1, 1, ROWS, ROWS], 128),
        "dk_desc": of_keys,
        "dv_desc": of_keys,
    }


def lies(block: list[int], swizzled: int, size: int) -> Any:
    """How a tile of elements of so many bytes lies in shared memory."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzled, 8 * size, len(block))


def _tiles(block: list[int], swizzled: int) -> launch.Tiles:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return launch.Tiles(
        lambda x: TensorDescriptor(x, list(x.shape), launch.strides_of(x), block, lies(block, swizzled, x.itemsize))
    )


class Prepared(NamedTuple):
    """The launches, and how their arrays are cut into tiles."""

    launch: launch.Launch
    tiles: list[launch.Tiles]  # of q, g, rows, k, v, the sums, dq, dk and dv
    sums: int  # rows of dq's sums: of as many heads as are worked on
    turns: int  # how many counters


def prepare(
    q: Shape, k: Shape, dtype: torch.dtype, device: torch.device,
    beta: float, scale: float, causal_offset: int | None, cut: Tiles | None = None,
) -> Prepared:  # fmt: skip
    """What :func:`backward` needs, for one form of call.

    Args:
        q: The shape (B, Hq, Lq, D) of the queries.
        k: (B, Hk, Lk, D), Hq a multiple of Hk.
        dtype: float16 or bfloat16.
        device: Where they are.
        beta: The inverse temperature, not 0.
        scale: Of the scores, > 0.
        causal_offset: Query i sees the keys ≤ i + offset; None: all.
        cut: The tiles; None: :func:`tiles`.
    """
    from . import hopper_backward

    (batch, heads, len_q, width), (_, heads_k, len_k, _) = q, k
    causal, offset, half = causal_offset is not None, causal_offset or 0, dtype == torch.float16
    q_tiles, k_tiles, group = -(-len_q // queries(width)), -(-len_k // (2 * ROWS)), heads // heads_k
    cut = cut or tiles(q, k, causal)
    scale2, unit = scale * math.log2(math.e), 2.0 ** -(15 if half else 0) / beta
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    main = launch.Launch(
        hopper_backward.backward_kernel, min(batch * heads_k * k_tiles, processors),
        (len_k, offset, scale, scale2, unit, beta * math.log2(math.e), heads_k, batch * heads_k, group,
         q_tiles, k_tiles, cut.heads, cut.places),
        **constants(cut, causal, half), num_warps=4,
    )  # fmt: skip
    sums = cut.chains * cut.places * group * q_tiles * 2 * ROWS
    return Prepared(main, [_tiles(*b) for b in blocks(width).values()], sums, 1 + cut.chains * batch * heads * q_tiles)


def backward(
    made: Prepared, q: Tensor, k: Tensor, v: Tensor, c: Tensor, g: Tensor, rows: Tensor, flags: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, of the heads that are not flagged: what those of the others hold is for another to write.

    p = 2^(scale·log2e·<q_i, k_j> − l2)    ds = p ∘ (G·Xᵀ/β + r)
    dv = X ∘ (pᵀ·G)    dq = scale·ds·K    dk = scale·dsᵀ·Q    X = 2^(βv·log2e − c)

    Args:
        made: By :func:`prepare` for arrays like these.
        q: (B, Hq, Lq, D), of any strides that ``launch.fits``.
        k: (B, Hk, Lk, D), likewise.
        v: (B, Hk, Lk, D), likewise.
        c: (B·Hk, D), int32.
        g: (B, Hq, Lq, D), contiguous, do·2^(c − βo·log2e), finite; dq takes its place in the end.
        rows: (2, B·Hq, L), float32, L ≥ Lq a multiple of 128: r, and the log-sum-exp in base 2, +∞ from Lq on and
            where nothing flows through a query.
        flags: (B·Hk,), int32; odd: not this head; 4: its queries may not be finite.
        turns: So many zeros, int32.
    """
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    sums = torch.empty((made.sums, ROWS), dtype=torch.float32, device=q.device)
    arrays = (q, g, rows, k, v, sums, g, dk, dv)
    made.launch(*(t.of(a) for t, a in zip(made.tiles, arrays, strict=True)), c, flags, turns)
    return g, dk, dv
