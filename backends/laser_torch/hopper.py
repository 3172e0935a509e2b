"""Host side of the Hopper kernels: what they serve, their tiles, and the launch."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_core import Problem

WIDTHS = (64, 128)
ALIGNMENT = 16  # bytes, of the tensor memory accelerator
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


def fits(a: Tensor) -> bool:
    """Whether the tensor memory accelerator can read a (B, H, L, D) tensor as it lies."""
    size = a.element_size()
    lies = all(n == 1 or (s > 0 and s * size % ALIGNMENT == 0) for n, s in zip(a.shape[:-1], a.stride(), strict=False))
    return lies and a.stride(-1) == 1 and a.data_ptr() % ALIGNMENT == 0


@functools.cache
def _block(rows: int, width: int, dtype: torch.dtype) -> tuple[list[int], Any]:
    """A tile, and how it lies in shared memory."""
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, width]
    return block, gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _descriptor(a: Tensor, rows: int) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block, layout = _block(rows, a.shape[-1], a.dtype)
    # a dimension of one element may have any stride, of which the hardware wants to hear nothing
    strides = [a.shape[-1] if n == 1 else s for n, s in zip(a.shape[:-1], a.stride(), strict=False)] + [1]
    return TensorDescriptor(a, list(a.shape), strides, block, layout)


def constants(cut: Tiles, causal: bool, half: bool, residual: bool, reference: bool, factor: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel."""
    return {
        "CAUSAL": causal,
        "DYNAMIC": cut.schedule == "dynamic",
        "CONSUMERS": cut.consumers,
        "STAGES": cut.stages,
        "SHIFT": 15 if half else 0,  # float16 needs its whole range of exponents for the weights
        "RESIDUAL": residual,
        "HAS_C": reference,
        "HAS_FACTOR": factor,
        "ORDERED": cut.ordered,
        "REGISTERS": cut.registers,
    }


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs of such kernels run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    c: Tensor | None,
    beta: float | Tensor,
    scale: float,
    causal_offset: int | None,
    residual: bool,
    cut: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o = (ln2/β)·(log2 Σ_j p_ij x_je + c_e − log2 Σ_j p_ij), the log-sum-exp, and o unrounded where asked for.

    Args:
        q: (B, Hq, Lq, D), float16 or bfloat16, of any strides that :func:`fits`.
        k: (B, Hk, Lk, D), Hq a multiple of Hk.
        x: (B, Hx, Lk, D), 2^(βv·log2e − c), finite (a hidden NaN would leak: 0·NaN), Hq a multiple of Hx.
        c: (B, Hx, D), int32, contiguous; None: all 0.
        beta: A number, or a float32 tensor that broadcasts to (Hq, D).
        scale: Of the scores, > 0.
        causal_offset: Query i sees the keys ≤ i + offset; None: all.
        residual: Whether to return o in float32 too.
        cut: The tiles; None: :func:`tiles`.

    Returns:
        o of q's shape and dtype; l (B, Hq, Lq), float32; o in float32, or None.
    """
    from . import hopper_forward

    batch, heads, len_q, width = q.shape
    len_k = k.shape[2]
    cut = cut or tiles(width, causal_offset is not None)
    out = torch.empty((batch, heads, len_q, width), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, len_q), dtype=torch.float32, device=q.device)
    unrounded = torch.empty(out.shape, dtype=torch.float32, device=q.device) if residual else None
    factor = None
    if isinstance(beta, Tensor):
        factor = (math.log(2) / beta.to(torch.float32)).expand(heads, width).contiguous()
    elif beta != 1:
        factor = torch.full((heads, width), math.log(2) / beta, dtype=torch.float32, device=q.device)

    q_tiles = -(-len_q // (cut.consumers * ROWS))
    count = q_tiles * batch * heads
    programs = count if cut.schedule == "grid" else min(count, processors(q.device))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device) if cut.schedule == "dynamic" else lse
    group = heads // k.shape[1]
    span = max(1, L2_BYTES // (4 * len_k * width)) * group
    causal = causal_offset is not None
    hopper_forward.forward_kernel[(programs,)](
        _descriptor(q, ROWS),
        _descriptor(k, cut.block_k),
        _descriptor(x, cut.block_k),
        _descriptor(out, ROWS),
        lse,
        lse if unrounded is None else unrounded,
        lse if c is None else c,
        lse if factor is None else factor,
        counter,
        len_q,
        len_k,
        causal_offset or 0,
        scale * math.log2(math.e),
        heads,
        batch * heads,
        group,
        heads // x.shape[1],
        q_tiles,
        count,
        min(span, batch * heads),
        **constants(cut, causal, q.dtype == torch.float16, residual, c is not None, factor is not None),
        num_warps=4,
    )
    return out, lse, unrounded
