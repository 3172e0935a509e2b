"""LASER in Triton kernels: what the host does. The kernels are in ``triton_*.py``.

Forward, on the device alone and without a branch on the host: the value pass writes X, the range of every head is
judged, one flash kernel serves the heads inside the fast range, and one that computes the definition serves the rest.
It returns at once where there is none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from laser_core import Forward, Gradients, Inputs, Problem

from . import triton_forward, triton_values
from .tiles import VALUE_BLOCK, Tile, forward_tile

INTERPRETED = not isinstance(triton_forward.forward, triton.runtime.JITFunction)
_FAR = 2**30  # a band edge that is beyond every position
_LOG2E = math.log2(math.e)


class _Limits(NamedTuple):
    """Of the fast range, in bits; ``triton_values.decide`` says what they mean."""

    range: float
    sum: float
    easy: tuple[float, float]
    top: int
    shift: int  # p is scaled up by so many bits


# What is lost of a p below the least (sub)normal number, times ΣX, stays below the rounding of a sum of least X.
_LIMITS = {
    torch.float16: _Limits(28, 29, (-14, 15), 15, 15),
    torch.bfloat16: _Limits(99.5, 117, (-49, 49), 0, 0),
    torch.float32: _Limits(99.5, 108, (-49, 49), 0, 0),
}


class Call(NamedTuple):
    """The arrays of a call with one batch axis and adjacent columns, and what all kernels are told."""

    problem: Problem
    q: Tensor  # (B, Hq, Lq, D)
    k: Tensor  # (B, Hkv, Lk, D)
    v: Tensor  # (B, Hkv, Lk, E)
    mask: Tensor | None  # bytes, (B, Hq, Lq, Lk), most likely with strides of 0
    bias: Tensor | None
    query_lengths: Tensor | None  # int32
    key_lengths: Tensor | None

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def limits(self) -> _Limits:
        return _LIMITS[self.q.dtype]

    @property
    def precision(self) -> str:
        tf32 = self.q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        return "tf32" if tf32 else "ieee"

    def strides(self, *names: str) -> list[int]:
        """Of arrays by name, without that of adjacent columns."""
        found: list[int] = []
        for name in names:
            x, count = getattr(self, name), 4 if name in ("mask", "bias") else 3
            found += [0] * count if x is None else x.stride()[:count]
        return found

    def geometry(self) -> list[Any]:
        """heads, group, query_length, key_length, low, high, scale, cap."""
        p = self.problem
        low, high = p.band
        return [
            p.query_heads,
            p.group,
            p.query_length,
            p.key_length,
            -_FAR if low is None else max(-_FAR, min(low, _FAR)),
            _FAR if high is None else max(-_FAR, min(high, _FAR)),
            p.scale,
            p.logits_soft_cap or 0.0,
        ]

    def options(self) -> dict[str, Any]:
        """What is compiled in."""
        p = self.problem
        low, high = p.band
        return {
            "D": p.head_dim,
            "E": p.value_dim,
            "DP": padded(p.head_dim),
            "BAND_LOW": low is not None and low > 1 - p.query_length,
            "BAND_HIGH": high is not None and high < p.key_length - 1,
            "MASK": self.mask is not None,
            "BIAS": self.bias is not None,
            "CAP": p.logits_soft_cap is not None,
            "QUERY_LENGTHS": self.query_lengths is not None,
            "KEY_LENGTHS": self.key_lengths is not None,
            "LINEAR": p.beta == 0,
            "PRECISION": self.precision,
        }

    @property
    def y_scale(self) -> float:
        """βv·log2e = v · y_scale."""
        return (self.problem.beta or 0.0) * _LOG2E

    @property
    def o_scale(self) -> float:
        """O = log2(…) · o_scale."""
        return math.log(2) / self.problem.beta if self.problem.beta else 1.0


def padded(width: int) -> int:
    """The width of a tile that holds so many columns."""
    return max(16, triton.next_power_of_2(width))


def prepare(problem: Problem, inputs: Inputs) -> Call:
    """The arguments as the kernels take them; copies only what has no adjacent columns."""
    size = math.prod(problem.batch)
    q, k, v = (_matrix(x.reshape(size, *x.shape[-3:])) for x in (inputs.query, inputs.key, inputs.value))
    mask, bias = (_broadcast(problem, x) for x in (inputs.attn_mask, inputs.bias))
    return Call(
        problem,
        q,
        k,
        v,
        None if mask is None else mask.view(torch.uint8),
        bias,
        _lengths(problem, inputs.query_seq_lengths, problem.query_length),
        _lengths(problem, inputs.key_value_seq_lengths, problem.key_length),
    )


def _matrix(x: Tensor) -> Tensor:
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()  # Triton's interpreter takes the bits of a bfloat16 for an integer
    near = x.stride(-2) < 2**22  # offsets within a tile are 32-bit
    return x if near and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def _broadcast(problem: Problem, x: Tensor | None) -> Tensor | None:
    """A mask or bias as ``(B, Hq, Lq, Lk)`` without a copy of what broadcasts along heads, queries or keys."""
    if x is None:
        return None
    x = x.reshape((1,) * (len(problem.score_shape) - x.ndim) + tuple(x.shape))
    if any(n != 1 for n in x.shape[:-3]):
        x = x.expand(*problem.batch, *x.shape[-3:])
    x = x.reshape(-1, *x.shape[-3:])
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()
    return x.expand(math.prod(problem.batch), *problem.score_shape[-3:])


def _lengths(problem: Problem, lengths: Tensor | None, limit: int) -> Tensor | None:
    if lengths is None:
        return None
    if lengths.dtype == torch.uint64:
        lengths = lengths.view(torch.int64)
        lengths = torch.where(lengths < 0, limit, lengths)
    return lengths.to(torch.int64).clamp(0, limit).to(torch.int32).expand(problem.batch).contiguous().view(-1)


class Values(NamedTuple):
    """What the value pass makes of the values."""

    x: Tensor  # (B·Hkv, Lk, E)
    c: Tensor  # (B·Hkv, EP)
    flags: Tensor  # (B·Hkv,)


def value_pass(call: Call) -> Values:
    """X, c, and which heads need what."""
    p, v = call.problem, call.v
    heads, width = call.batch * p.key_value_heads, padded(p.value_dim)
    block = VALUE_BLOCK
    blocks = triton.cdiv(p.key_length, block)
    x = torch.empty((heads, p.key_length, p.value_dim), dtype=v.dtype, device=v.device)
    partial = torch.empty((3, heads, blocks, width), dtype=torch.float32, device=v.device)
    odd = torch.empty((heads, blocks), dtype=torch.int32, device=v.device)
    c = torch.empty((heads, width), dtype=torch.float32, device=v.device)
    flags = torch.empty((heads,), dtype=torch.int32, device=v.device)
    linear, lengths = p.beta == 0, call.key_lengths is not None
    limits = call.limits
    triton_values.value_pass[(heads * blocks,)](
        call.k, v, x, *partial, odd, call.key_lengths, *call.strides("k", "v"),
        p.key_value_heads, p.key_length, call.y_scale,
        D=p.head_dim, E=p.value_dim, DP=padded(p.head_dim), EP=width, BLOCK=block, LENGTHS=lengths, LINEAR=linear,
        num_warps=4,
    )  # fmt: skip
    triton_values.decide[(heads,)](
        v, x, *partial, odd, c, flags, call.key_lengths, *call.strides("v"),
        p.key_value_heads, p.key_length, blocks, call.y_scale,
        E=p.value_dim, EP=width, BLOCK=block, LENGTHS=lengths, LINEAR=linear,
        RANGE=limits.range, SUM=limits.sum, EASY_LOW=limits.easy[0], EASY_HIGH=limits.easy[1], TOP=limits.top,
        num_warps=4,
    )  # fmt: skip
    return Values(x, c, flags)


def workers(heads: int, work: int) -> int:
    """Programs per head of a kernel that mostly has nothing to do."""
    return max(1, min(work, triton.cdiv(1024, heads)))


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output; no synchronisation with the device."""
    q, dtype = inputs.query, inputs.query.dtype
    wide = dtype != torch.float32
    if 0 in problem.score_shape:
        out = q.new_zeros(problem.out_shape)
        l = q.new_full(problem.lse_shape, -math.inf, dtype=torch.float32)
        return Forward(out, l, torch.zeros_like(out, dtype=torch.float32) if wide else None)
    call = prepare(problem, inputs)
    tile = forward_tile(call.q.dtype, padded(problem.head_dim), padded(problem.value_dim))
    out = torch.empty(problem.out_shape, dtype=call.q.dtype, device=q.device)
    l = torch.empty(problem.lse_shape, dtype=torch.float32, device=q.device)
    residual = torch.empty(problem.out_shape, dtype=torch.float32, device=q.device) if wide else None
    launch_forward(call, value_pass(call), out, residual, l, tile)
    return Forward(out.to(dtype), l, residual)


def _described(call: Call, x: Tensor, block: int) -> tuple[TensorDescriptor, TensorDescriptor, list[int]] | None:
    """Descriptors of K and X as matrices, for hardware that copies tiles by itself; None where it cannot.

    And how many rows a batch entry and a head of K are apart, and how many columns a head: rows follow each other
    within heads (B, H, L, D), or heads within rows (B, L, H, D).
    """
    p, k = call.problem, call.k
    width, value_width, size = padded(p.head_dim), padded(p.value_dim), k.element_size()
    if INTERPRETED or torch.cuda.get_device_capability(k.device)[0] < 9:
        return None
    rows = call.batch * p.key_value_heads * p.key_length
    if rows >= 2**31 or p.value_dim * size % 16 or p.head_dim * size % 16 or k.data_ptr() % 16:
        return None
    if k.is_contiguous():
        matrix, strides = (rows, p.head_dim), [p.key_value_heads * p.key_length, p.key_length, 0]
    elif k.transpose(1, 2).is_contiguous() and width == p.head_dim:
        matrix = (call.batch * p.key_length, p.key_value_heads * p.head_dim)
        strides = [p.key_length, 0, p.head_dim]
    else:
        return None
    return (
        TensorDescriptor(k, matrix, (matrix[1], 1), [block, width]),
        TensorDescriptor(x, (rows, p.value_dim), (p.value_dim, 1), [block, value_width]),
        strides,
    )


def launch_forward(call: Call, values: Values, out: Tensor, residual: Tensor | None, l: Tensor, tile: Tile) -> None:
    """The fast kernel and the exact one."""
    p, limits, options = call.problem, call.limits, call.options()
    heads = call.batch * p.query_heads
    outputs = (call.query_lengths, call.key_lengths, out, residual, l)
    fold = p.scale > 0 and p.logits_soft_cap is None
    described = _described(call, values.x, tile.block_k) if tile.tma else None
    k, x, k_strides = described or (call.k, values.x, call.strides("k"))
    triton_forward.forward[(heads * triton.cdiv(p.query_length, tile.block_q),)](
        call.q, k, x, values.c, values.flags, call.mask, call.bias, *outputs,
        *call.strides("q"), *k_strides, *call.strides("mask", "bias"), *call.geometry(), call.o_scale,
        **options, EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, FOLD=fold, TMA=described is not None,
        SHIFT=0 if p.beta == 0 else limits.shift, RESIDUAL=residual is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    count = workers(heads, triton.cdiv(p.query_length, 16) * triton.cdiv(p.value_dim, 16))
    triton_forward.exact[(heads * count,)](
        call.q, call.k, call.v, values.flags, call.mask, call.bias, *outputs,
        *call.strides("q", "k", "v", "mask", "bias"), count, *call.geometry(), call.y_scale, call.o_scale,
        **options, BM=16, BN=16, BE=16, RESIDUAL=residual is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
