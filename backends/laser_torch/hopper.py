"""Host side of the Hopper kernels: what they serve, their tiles, and the launch."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_core import Problem

from . import launch

WIDTHS = (64, 128)
ROWS = 64  # of a consumer warpgroup
L2_BYTES = 24 << 20  # keys and values of the heads that run together should fit in this much


class Tiles(NamedTuple):
    """How a problem is cut: ``consumers`` warpgroups of 64 queries, ``stages`` tiles of ``block_k`` keys in flight."""

    block_k: int
    consumers: int
    stages: int
    registers: int
    ordered: bool
    schedule: (
        str  # of the programs: 'static', one per processor, 'dynamic', drawn from a counter, or 'grid', one a tile
    )


def tiles(width: int, causal: bool) -> Tiles:
    """The tile sizes for head dimension ``width``: see docs/hopper-log.md for what they rest on."""
    if width == 64 and not causal:
        return Tiles(128, 3, 4, 160, True, "static")
    return Tiles(128, 2, 4 if width == 64 else 2, 240, False, "dynamic" if causal else "static")


def why_not(problem: Problem) -> str | None:
    """Why the Hopper forward kernel does not serve a problem, from its description alone; None if it does."""
    if problem.dtype not in ("float16", "bfloat16"):
        return f"dtype {problem.dtype}: the Hopper kernel multiplies float16 and bfloat16"
    if problem.head_dim != problem.value_dim or problem.head_dim not in WIDTHS:
        return f"head dimensions {problem.head_dim} and {problem.value_dim}: the Hopper kernel serves 64 and 128, equal"
    if 0 in problem.score_shape:
        return "an empty problem: there is nothing to launch"
    if problem.scale <= 0:
        return f"scale = {problem.scale}: the Hopper kernel's row maximum needs scale > 0"
    if problem.beta is None:
        return "beta is an array: its channels may need both transformations of the values (supported: a number)"
    if abs(problem.beta) < 1:
        return f"beta = {problem.beta}: its expm1 form needs more columns (supported: |beta| ≥ 1)"
    for name in ("mask_shape", "bias_shape", "logits_soft_cap"):
        if getattr(problem, name) is not None:
            return f"{name.removesuffix('_shape')}: the Hopper kernel has none"
    if problem.query_lengths or problem.key_value_lengths:
        return "sequence lengths: the Hopper kernel has none"
    low, _ = problem.band
    if low is not None and low > 1 - problem.query_length:
        return "window_size: the Hopper kernel knows no left bound"
    if max(problem.query_length, problem.key_length) >= 2**30:
        return "lengths of 2^30 and more: the Hopper kernel counts rows in 32 bits"
    return None


def causal_offset(problem: Problem) -> int | None:
    """Query i of a problem that is served sees the keys ≤ i + offset; None: all keys."""
    high = problem.band[1]
    return None if high is None or high >= problem.key_length - 1 else high


def missing(device: torch.device) -> str | None:
    """What a device or its software lacks for the kernel; None if nothing."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return "the Hopper kernel is built for NVIDIA GPUs of compute capability 9.0"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.experimental") is None:
        return "the Hopper kernel needs Triton 3.6 with Gluon (triton.experimental.gluon)"
    return None


def constants(cut: Tiles, causal: bool, half: bool, keeps: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    return {
        "CAUSAL": causal,
        "DYNAMIC": cut.schedule == "dynamic",
        "CONSUMERS": cut.consumers,
        "STAGES": cut.stages,
        "SHIFT": 15 if half else 0,  # float16 needs its whole range of exponents for the weights
        "REST": keeps,
        "ORDERED": cut.ordered,
        "REGISTERS": cut.registers,
    }


def _tiles(rows: int, width: int, dtype: torch.dtype) -> launch.Tiles:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    types = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int16: gl.int16}
    block = [1, 1, rows, width]
    lies = gl.NVMMASharedLayout.get_default_for(block, types[dtype])  # in shared memory
    return launch.Tiles(lambda x: TensorDescriptor(x, list(x.shape), launch.strides_of(x), block, lies))


class Prepared(NamedTuple):
    """A launch, and how its arrays are cut into tiles."""

    launch: launch.Launch
    q: launch.Tiles
    k: launch.Tiles
    x: launch.Tiles
    out: launch.Tiles
    rest: launch.Tiles | None


Shape = Sequence[int]


def prepare(
    q: Shape, k: Shape, heads_x: int, dtype: torch.dtype, device: torch.device,
    beta: float, scale: float, causal_offset: int | None, keeps: bool, cut: Tiles | None = None,
) -> Prepared:  # fmt: skip
    """What :func:`forward` needs, for one form of call.

    Args:
        q: The shape (B, Hq, Lq, D) of the queries.
        k: (B, Hk, Lk, D), Hq a multiple of Hk.
        heads_x: Hx, of which Hq is a multiple.
        dtype: float16 or bfloat16.
        device: Where they are.
        beta: The inverse temperature.
        scale: Of the scores, > 0.
        causal_offset: Query i sees the keys ≤ i + offset; None: all.
        keeps: Whether the rest of o is asked for: what its dtype has no room for, as ``fused.split`` defines it.
        cut: The tiles; None: :func:`tiles`.
    """
    from . import hopper_forward

    batch, heads, len_q, width = q
    causal = causal_offset is not None
    cut = cut or tiles(width, causal)
    q_tiles = -(-len_q // (cut.consumers * ROWS))
    count = q_tiles * batch * heads
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    group = heads // k[1]
    span = max(1, L2_BYTES // (4 * k[2] * width)) * group
    made = launch.Launch(
        hopper_forward.forward_kernel, count if cut.schedule == "grid" else min(count, processors),
        (len_q, k[2], causal_offset or 0, scale * math.log2(math.e), math.log(2) / beta, heads, batch * heads, group,
         heads // heads_x, q_tiles, count, min(span, batch * heads)),
        **constants(cut, causal, dtype == torch.float16, keeps), num_warps=4,
    )  # fmt: skip
    few, many = (functools.partial(_tiles, rows, width) for rows in (ROWS, cut.block_k))
    return Prepared(made, few(dtype), many(dtype), many(dtype), few(dtype), few(torch.int16) if keeps else None)


def forward(
    made: Prepared, q: Tensor, k: Tensor, x: Tensor, c: Tensor, counter: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o = (ln2/β)·(log2 Σ_j p_ij x_je + c_e − log2 Σ_j p_ij), the log-sum-exp, and the rest of o where asked for.

    Args:
        made: By :func:`prepare` for arrays like these.
        q: (B, Hq, Lq, D), of any strides that ``launch.fits``.
        k: (B, Hk, Lk, D), likewise.
        x: (B, Hx, Lk, D), contiguous, 2^(βv·log2e − c), finite (a hidden NaN would leak: 0·NaN).
        c: (B, Hx, D), int32, contiguous.
        counter: An int32 that is 0, which the kernel counts up.

    Returns:
        o of q's shape and dtype; l (B, Hq, Lq), float32; the rest of o, int16, or None.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    to = to_rest = made.out.of(out)
    rest = None
    if made.rest is not None:
        rest = torch.empty(q.shape, dtype=torch.int16, device=q.device)
        to_rest = made.rest.of(rest)
    made.launch(made.q.of(q), made.k.of(k), made.x.of(x), to, to_rest, lse, c, counter)
    return out, lse, rest
