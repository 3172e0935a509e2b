"""A call as the Triton kernels take it, and the value pass, which forward and backward begin with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from laser_core import Inputs, Problem

from . import triton_values
from .tiles import is_large, value_block

INTERPRETED = not isinstance(triton_values.value_pass, triton.runtime.JITFunction)
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
        """The size of the one batch axis."""
        return self.q.shape[0]

    @property
    def limits(self) -> _Limits:
        """Of the fast range in this dtype."""
        return _LIMITS[self.q.dtype]

    @property
    def precision(self) -> str:
        """Of the matrix products."""
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
    return int(max(16, triton.next_power_of_2(width)))


def prepare(problem: Problem, inputs: Inputs) -> Call:
    """The arguments as the kernels take them; copies only what has no adjacent columns."""
    size = math.prod(problem.batch)
    q, k, v = (matrix(x.reshape(size, *x.shape[-3:])) for x in (inputs.query, inputs.key, inputs.value))
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


def matrix(x: Tensor) -> Tensor:
    """An array with adjacent columns, copied only if it has none."""
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
    block = value_block(max(width, padded(p.head_dim)))
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
        num_warps=8,
    )  # fmt: skip
    triton_values.decide[(heads,)](
        v, x, *partial, odd, c, flags, call.key_lengths, *call.strides("v"),
        p.key_value_heads, p.key_length, blocks, call.y_scale,
        E=p.value_dim, EP=width, BLOCK=block, WIDE=16, LENGTHS=lengths, LINEAR=linear,
        RANGE=limits.range, SUM=limits.sum, EASY_LOW=limits.easy[0], EASY_HIGH=limits.easy[1], TOP=limits.top,
        num_warps=4,
    )  # fmt: skip
    return Values(x, c, flags)


def workers(heads: int, work: int) -> int:
    """Programs per head of a kernel that mostly has nothing to do."""
    return int(max(1, min(work, triton.cdiv(1024, heads))))


def copies_tiles(x: Tensor) -> bool:
    """Whether the hardware copies tiles of this matrix by itself: Hopper and later, and aligned rows."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    aligned = x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and torch.cuda.get_device_capability(x.device)[0] >= 9


def describe_rows(x: Tensor, block: int) -> TensorDescriptor | None:
    """A descriptor of a contiguous array ``(heads, L, E)`` as a matrix of rows; None where there can be none.

    No tile may reach into the next head: what is infinite there would be met by a weight of zero.
    """
    rows = math.prod(x.shape[:-1])
    if not copies_tiles(x) or x.shape[-2] % block or rows >= 2**31:
        return None
    return TensorDescriptor(x, (rows, x.shape[-1]), (x.shape[-1], 1), [block, padded(x.shape[-1])])


def describe(x: Tensor, block: int) -> tuple[TensorDescriptor, list[int]] | None:
    """The same of ``(B, H, L, D)`` in that order or with heads within rows, ``(B, L, H, D)``.

    And how many rows a batch entry and a head are apart, and how many columns a head.
    """
    b, h, n, d = x.shape
    if not copies_tiles(x) or n % block or b * h * n >= 2**31:
        return None
    if x.is_contiguous():
        return TensorDescriptor(x, (b * h * n, d), (d, 1), [block, padded(d)]), [h * n, n, 0]
    if x.transpose(1, 2).is_contiguous() and padded(d) == d:
        return TensorDescriptor(x, (b * n, h * d), (h * d, 1), [block, d]), [n, 0, d]
    return None


def tile_of(call: Call) -> tuple[torch.dtype, int, int, bool]:
    """What tile sizes depend on."""
    p = call.problem
    return call.q.dtype, padded(p.head_dim), padded(p.value_dim), is_large(call.q.device)
