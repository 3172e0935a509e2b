"""Few queries against a long cache: splits over the keys, and their merge. The kernels are in ``decode_kernels``."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from laser_core import Forward, Inputs, Problem, _streaming

from . import decode_kernels
from .launch import ALIGNMENT, Launch, on

_INTERPRET: bool = triton.knobs.runtime.interpret


class Tiles(NamedTuple):
    """How the work is cut: keys at a time, keys per program, and what a program is made of."""

    block_k: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class Pages:
    """A paged cache: ``table (B, blocks)`` of block numbers, blocks of ``size`` keys."""

    table: Tensor
    size: int


class Device(NamedTuple):
    """What the sizes depend on."""

    processors: int
    shared: int  # bytes that a program may have
    warps: int = 4  # of a program with few rows


@functools.cache
def device_of(device: torch.device) -> Device:
    """The sizes of a device; interpreted, those of a small one."""
    if device.type == "cpu":
        return Device(8, 2**17)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    major = 0 if torch.version.hip is not None else torch.cuda.get_device_capability(index)[0]
    return Device(properties["multiprocessor_count"], properties["max_shared_mem"], warps_on(major))


def warps_on(major: int) -> int:
    """Warps of a program with few rows, by the major compute capability: the fewest that hold it in registers."""
    return 8 if major == 10 else 4


def tiles(problem: Problem, device: Device) -> Tiles:
    """Tile sizes from sizes alone, so that a call can be captured in a CUDA graph."""
    row = (problem.head_dim + problem.value_dim) * (4 if problem.dtype == "float32" else 2)
    block_k = 64 if row <= 512 else 32 if row <= 1024 else 16
    stages = 3 if device.shared >= 4 * block_k * row else 2
    programs = math.prod(problem.batch) * problem.key_value_heads
    programs *= triton.cdiv(problem.group * problem.query_length, block_r(problem))
    splits = _splits(programs, triton.cdiv(problem.key_length, 256), 2 * device.processors)
    keys = triton.cdiv(triton.cdiv(problem.key_length, splits), block_k) * block_k
    return Tiles(block_k, keys, device.warps if block_r(problem) <= 32 else 8, stages)


@functools.cache
def _splits(programs: int, most: int, slots: int) -> int:
    """The fewest splits, of 4096 keys at most, that keep the slots busy to the end, or else the best there is."""
    best, busiest = most, 0.0
    for splits in range(triton.cdiv(most, 16), most + 1):
        total = programs * splits
        busy = total / (triton.cdiv(total, slots) * slots)
        if busy > busiest:
            best, busiest = splits, busy
        if busy >= 0.95:
            break
    return best


def block_r(problem: Problem) -> int:
    """Rows of a tile: the queries of all heads of a group; products want 16 at least."""
    return int(max(16, min(64, triton.next_power_of_2(problem.group * problem.query_length))))


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output, merged from runs of keys."""
    if 0 in problem.score_shape:
        return _streaming.forward(problem, inputs)
    out, wide, lse = launch(problem, inputs, None, tiles(problem, device_of(inputs.query.device)), problem.gradient)
    return Forward(out, lse, residual=wide)


def launch(
    problem: Problem, inputs: Inputs, pages: Pages | None, cut: Tiles, residual: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Output, the same before rounding where that is wider and asked for, and log-sum-exp.

    With ``pages``, key and value are caches ``(blocks, size, Hkv, D or E)``, and the causal diagonal and window are
    relative to each sequence's own length.
    """
    batch = math.prod(problem.batch)
    query, key, value = (_adjacent(x) for x in inputs[:3])
    if len(problem.batch) != 1:
        query = query.reshape(batch, *query.shape[-3:])
        if pages is None:
            key, value = (x.reshape(batch, *x.shape[-3:]) for x in (key, value))
    mask, bias = (_scores_like(problem, x) for x in (inputs.attn_mask, inputs.bias))
    if mask is not None:
        mask = mask.view(torch.uint8)
    q_lengths, k_lengths = (_lengths(problem, x) for x in (inputs.query_seq_lengths, inputs.key_value_seq_lengths))
    table = None if pages is None else pages.table.contiguous()

    arrays = (query, key, value, mask, bias, q_lengths, k_lengths, table)
    lies = tuple(None if x is None else (x.stride(), x.data_ptr() % ALIGNMENT == 0, x.dtype) for x in arrays)
    tf32 = problem.dtype == "float32" and torch.backends.cuda.matmul.allow_tf32
    device = query.device
    by_runs, merge, shape = _prepared(problem, device, cut, lies, 0 if pages is None else pages.size, tf32)
    w = torch.empty(shape, dtype=torch.float32, device=device)
    l = torch.empty(shape[:-1], dtype=torch.float32, device=device)
    out = torch.empty(problem.out_shape, dtype=query.dtype, device=device)
    lse = torch.empty(problem.lse_shape, dtype=torch.float32, device=device)
    wide = None
    if problem.dtype != "float32" and (residual or _INTERPRET):
        wide = torch.empty(problem.out_shape, dtype=torch.float32, device=device)
    rounded_here = _INTERPRET and wide is not None  # the interpreter cuts bits off where it should round
    with on(device):
        by_runs(*(query if x is None else x for x in arrays), w, l)
        merge[wide is not None](w, l, None if rounded_here else out, wide, lse)
    return wide.to(out.dtype) if wide is not None and rounded_here else out, wide, lse


@functools.lru_cache(maxsize=1024)
def _prepared(
    problem: Problem, device: torch.device, cut: Tiles, lies: tuple[Any, ...], page: int, tf32: bool
) -> tuple[Launch, tuple[Launch, Launch], tuple[int, ...]]:
    """The launch over runs of keys, that of the merge without and with the wide output, and the shape of w."""
    p, e, beta = problem, problem.value_dim, problem.beta or 0.0
    rows, block = p.group * p.query_length, block_r(p)
    splits = triton.cdiv(p.key_length, cut.keys)
    entries = math.prod(p.batch) * p.key_value_heads
    low, high = p.band
    to_length = page > 0 and p.causal == "bottom_right"
    if to_length:  # without the offset of the arrays, which the kernel replaces by that of the sequence
        low, high = (None if x is None else x - p.offset for x in (low, high))
    strides: list[Any] = [() if x is None else x[0] for x in lies]
    query, key, value, mask, bias, q_lengths, k_lengths, table = strides
    if page:  # (blocks, size, Hkv, dim)
        key, value = ((x[0], x[2], x[1]) for x in (key, value))
    block_e = max(16, triton.next_power_of_2(e))
    nothing = (0, 0, 0, 0)
    by_runs = Launch(
        decode_kernels.decode_kernel, (splits * entries, triton.cdiv(rows, block)),
        (
            *query[:3], *key[:3], *value[:3], *(mask or nothing), *(bias or nothing), table[0] if table else 0,
            p.key_value_heads, p.group, p.query_length, p.key_length, splits, cut.keys, _int32(low), _int32(high),
            p.scale, beta, p.logits_soft_cap or 1.0,
        ),
        D=p.head_dim, E=e, BLOCK_D=max(16, triton.next_power_of_2(p.head_dim)), BLOCK_E=block_e, BLOCK_R=block,
        BLOCK_K=cut.block_k, LINEAR=beta == 0, HAS_MASK=mask != (), HAS_BIAS=bias != (),
        HAS_Q_LENGTHS=q_lengths != (), HAS_K_LENGTHS=k_lengths != (), HAS_LOW=low is not None,
        HAS_HIGH=high is not None, HAS_CAP=p.logits_soft_cap is not None, TO_LENGTH=to_length, PAGE=page,
        PRECISION="tf32" if tf32 else "ieee", WIDE=p.dtype == "float32" or _INTERPRET, LANES=16, STAGES=cut.stages,
        num_warps=cut.warps, **({} if cut.registers is None else {"maxnreg": cut.registers}),
    )  # fmt: skip
    narrow, wide = (
        Launch(
            decode_kernels.merge_kernel, entries * rows, (splits, beta or 1.0),
            E=e, BLOCK_E=block_e, BLOCK_S=16, LINEAR=beta == 0, num_warps=4,
        )
        for _ in range(2)
    )  # fmt: skip
    return by_runs, (narrow, wide), (entries, rows, splits, e)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _int32(x: int | None) -> int:
    return 0 if x is None else max(min(x, 2**30), -(2**30))


def _scores_like(problem: Problem, x: Tensor | None) -> Tensor | None:
    """A mask or bias as a view of shape ``(B, Hq, Lq, Lk)``, with strides of zero where it broadcasts."""
    return None if x is None else x.expand(problem.score_shape).reshape(-1, *problem.score_shape[-3:])


def _lengths(problem: Problem, x: Tensor | None) -> Tensor | None:
    if x is None or (len(problem.batch) == 1 and x.shape == problem.batch and x.is_contiguous()):
        return x
    return x.expand(problem.batch).reshape(-1).contiguous()
