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
CHUNK = 16384  # values of a head that are worked on at a time
SEVERAL = 4  # chunks in one, where few programs work on them
MAKERS = 2  # times as many programs make X as would just keep up
SPAN = 2  # heads of a section that are worked on together, in those that keep the processors busy once


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
    return Tiles(128, 2, 4 if width == 64 else 2, 232, False, "dynamic" if causal else "static")


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


class Values(NamedTuple):
    """The value pass that the kernel does: see ``hopper_values``."""

    strides: tuple[int, int, int]  # of v
    y_scale: float  # βv·log2e = v·y_scale
    sums: bool  # whether the sums of X can matter
    limits: tuple[float, ...]  # RANGE, SUM, EASY_LOW, EASY_HIGH, TOP and NARROW of ``triton_values.decide``


def constants(cut: Tiles, causal: bool, half: bool, keeps: bool, values: Values | None) -> dict[str, Any]:
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
        "VALUES": values is not None,
        "SUMS": values is not None and values.sums,
        "LIMITS": () if values is None else values.limits,
    }


def sections(heads: int, work: int, processors: int, most: int) -> tuple[int, int]:
    """Heads of the first section, about as many as keep the processors busy once, and of each later one, up to most.

    Args:
        heads: There are.
        work: Pieces of work of a head.
        processors: There are.
        most: Heads of a section.
    """
    lead = min(heads, max(1, processors // work))
    most = max(1, min(most, SPAN * lead))
    left, span = min(((heads - lead) % n, -n) for n in range(most // 2 + 1, most + 1))
    return lead + left, -span


def _tiles(rows: int, width: int, dtype: torch.dtype) -> launch.Tiles:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    types = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int16: gl.int16}
    block = [1, 1, rows, width]
    lies = gl.NVMMASharedLayout.get_default_for(block, types[dtype])  # in shared memory
    return launch.Tiles(lambda x: TensorDescriptor(x, list(x.shape), launch.strides_of(x), block, lies))


def worthwhile(count: int, work: int, processors: int) -> bool:
    """Whether there is enough to do beside the value pass: pieces of work, and of them in a head."""
    return count >= 2 * processors and work >= 16


class Prepared(NamedTuple):
    """A launch, how its arrays are cut into tiles, and into how many chunks the values (0: X is given)."""

    launch: launch.Launch
    q: launch.Tiles
    k: launch.Tiles
    x: launch.Tiles
    out: launch.Tiles
    rest: launch.Tiles | None
    chunks: int


Shape = Sequence[int]


def prepare(
    q: Shape, k: Shape, heads_x: int, dtype: torch.dtype, device: torch.device, beta: float, scale: float,
    causal_offset: int | None, keeps: bool, strides: Sequence[int], cut: Tiles | None = None,
    values: Values | None = None,
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
        strides: (3,), of the queries, without that of adjacent columns.
        cut: The tiles; None: :func:`tiles`.
        values: The value pass, where the kernel may do it: it does where there is enough to do beside it.
    """
    from . import hopper_forward

    batch, heads, len_q, width = q
    causal = causal_offset is not None
    cut = cut or tiles(width, causal)
    q_tiles = -(-len_q // (cut.consumers * ROWS))
    count = q_tiles * batch * heads
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    group = heads // k[1]
    group_x = heads // heads_x
    work = q_tiles * group_x
    if cut.schedule == "grid" or cut.consumers > 2 or not worthwhile(count, work, processors):
        values = None  # three consumers have no registers to spare
    if values is not None:  # programs come to the products at different times
        cut = cut._replace(schedule="dynamic")
    most = max(1, L2_BYTES // (4 * k[2] * width))
    lead, span = sections(batch * heads_x, work, processors, most)
    ahead = lead if causal else min(batch * heads_x, -(-processors // work))
    chunk = CHUNK // width
    chunk *= -(-k[2] // (64 * chunk))
    blocks = -(-k[2] // chunk)
    chunks = 0 if values is None else batch * heads_x * blocks
    makers = max(1, min(processors // 4, processors * MAKERS * (2 if causal else 1) // work))
    of_v, y_scale = ((0, 0, 0), 0.0) if values is None else (values.strides, values.y_scale)
    made = launch.Launch(
        hopper_forward.forward_kernel, count if cut.schedule == "grid" else min(count, processors),
        (len_q, k[2], causal_offset or 0, scale * math.log2(math.e), math.log(2) / beta, heads, heads_x, group,
         group_x, q_tiles, count, lead, span, *(n // 8 for n in (*strides, *of_v)), blocks, chunk, ahead, chunks,
         y_scale, makers, SEVERAL),
        **constants(cut, causal, dtype == torch.float16, keeps, values), num_warps=4,
    )  # fmt: skip
    few, many = (functools.partial(_tiles, rows, width) for rows in (ROWS, cut.block_k))
    rest = few(torch.int16) if keeps else None
    return Prepared(made, few(dtype), many(dtype), many(dtype), few(dtype), rest, chunks)


def forward(
    made: Prepared, q: Tensor, k: Tensor, v: Tensor, x: Tensor, c: Tensor, flags: Tensor, counter: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """o = (ln2/β)·(log2 Σ_j p_ij x_je + c_e − log2 Σ_j p_ij), the log-sum-exp, and the rest of o where asked for.

    Args:
        made: By :func:`prepare` for arrays like these. Where it does the value pass, x, c and flags are written.
        q: (B, Hq, Lq, D), of any strides that ``launch.fits``.
        k: (B, Hk, Lk, D), likewise.
        v: (B, Hx, Lk, D), likewise.
        x: (B, Hx, Lk, D), contiguous, 2^(βv·log2e − c), finite (a hidden NaN would leak: 0·NaN).
        c: (B, Hx, D), int32, contiguous.
        flags: (B, Hx), int32, contiguous.
        counter: An int32 that is 0, and where the kernel does the value pass three, and one for each head.

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
    partial = flags
    if made.chunks:
        partial = torch.empty((2 * made.chunks, q.shape[-1]), dtype=torch.int32, device=q.device)
    to_x = made.x.of(x.view(1, -1, *x.shape[-2:]))
    made.launch(made.q.of(q), made.k.of(k), to_x, to, to_rest, lse, c, counter, q, v, x, flags, partial)
    return out, lse, rest
