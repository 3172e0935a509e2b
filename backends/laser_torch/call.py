"""A call as the Triton kernels take it, and the value pass, which forward and backward begin with."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from laser_core import Inputs, Problem

from . import triton_values
from .driver import Placed
from .launch import ALIGNMENT, Launch, Tiles, fits, strides_of
from .tiles import ROWS, is_large

INTERPRETED = not isinstance(triton_values.value_pass, triton.runtime.JITFunction)
_FAR = 2**30  # a band edge that is beyond every position
_LOG2E = math.log2(math.e)
_VALUE_PROGRAMS = 512  # of the value pass: one wave of four for each multiprocessor, see docs/performance-log.md


class _Limits(NamedTuple):
    """Of the fast range, in bits; ``triton_values.decide`` says what they mean."""

    range: float
    sum: float
    easy: tuple[float, float]
    top: int
    shift: int  # p is scaled up by so many bits
    narrow: float  # not in bits: four roundings of X, as a span of the values


# What is lost of a p below the least (sub)normal number, times ΣX, stays below the rounding of a sum of least X.
_LIMITS = {
    torch.float16: _Limits(28, 29, (-14, 15), 15, 15, 2.0**-9),
    torch.bfloat16: _Limits(99.5, 117, (-49, 49), 0, 0, 2.0**-6),
    torch.float32: _Limits(99.5, 108, (-49, 49), 0, 0, 0.0),
}

_Layout = tuple[tuple[int, ...], bool]  # strides, and whether the array begins where compiled kernels like it


class Packed(NamedTuple):
    """How many rows the arrays of a packed call have; its problem is that of a batch of sequences as long as any."""

    queries: int
    keys: int


class Plan:
    """All of a call but its data, and the launches that were prepared for it."""

    def __init__(  # noqa: D107
        self,
        problem: Problem,
        device: torch.device,
        dtype: torch.dtype,
        layouts: dict[str, _Layout],
        tf32: bool,
        packed: Packed | None,
    ) -> None:
        self.problem, self.device, self.dtype, self._layouts, self.packed = problem, device, dtype, layouts, packed
        self.batch = math.prod(problem.batch)
        self.limits = _LIMITS[dtype]
        self.precision = "tf32" if tf32 else "ieee"
        self._prepared: dict[Any, Any] = {}

    def prepared(self, make: Callable[..., Any], *args: Any) -> Any:
        """What ``make(plan, *args)`` returns, made once."""
        key = (make, *args)
        try:
            return self._prepared[key]
        except KeyError:
            found = self._prepared[key] = make(self, *args)
            return found

    def strides(self, *names: str) -> list[int]:
        """Of arrays by name, without that of adjacent columns; zeros for those that are not there."""
        found: list[int] = []
        for name in names:
            count = 4 if name in ("mask", "bias") else 3
            found += self._layouts[name][0][:count] if name in self._layouts else [0] * count
        return found

    def fits(self, name: str) -> bool:
        """Whether the hardware can copy tiles of an array."""
        p = self.problem
        rows = (p.query_heads, p.query_length) if name == "q" else (p.key_value_heads, p.key_length)
        return fits((self.batch, *rows, p.head_dim), *self._layouts[name], self.dtype.itemsize)

    @property
    def _to_ends(self) -> bool:
        """Whether the diagonal of each packed sequence runs to its own end."""
        return self.packed is not None and self.problem.causal == "bottom_right"

    @property
    def band(self) -> tuple[int | None, int | None]:
        """The band of the problem; without the offset that kernels add for each sequence."""
        low, high = self.problem.band
        offset = self.problem.offset if self._to_ends else 0
        return (None if low is None else low - offset, None if high is None else high - offset)

    @property
    def total(self) -> int:
        """Rows of queries from one head to the next in the log-sum-exp."""
        return self.problem.query_length if self.packed is None else self.packed.queries

    @property
    def padded_length(self) -> int:
        """The same in arrays that tiles read without bounds; packed, each sequence has so many rows behind it."""
        if self.packed is not None:
            return self.packed.queries + self.batch * ROWS
        return cdiv(self.problem.query_length, ROWS) * ROWS

    def new(self, heads: int, length: int, width: int, keys: bool = False) -> Tensor:
        """An array (B, heads, length, width) to be written; packed, (T, heads, width) of queries or keys, not whole."""
        shape: tuple[int, ...] = (self.batch, heads, length, width)
        if self.packed is not None:
            shape = (self.packed.keys if keys else self.packed.queries, heads, width)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def geometry(self) -> list[Any]:
        """heads, group, query_length, key_length, low, high, scale, cap."""
        p = self.problem
        low, high = self.band
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
        low, high = self.band
        lengths = (p.key_length, p.query_length) if self._to_ends else (p.query_length, p.key_length)
        return {
            "D": p.head_dim,
            "E": p.value_dim,
            "DP": padded(p.head_dim),
            "BAND_LOW": low is not None and low > 1 - lengths[0],
            "BAND_HIGH": high is not None and high < lengths[1] - 1,
            "MASK": p.mask_shape is not None,
            "BIAS": p.bias_shape is not None,
            "CAP": p.logits_soft_cap is not None,
            **self.lengths(),
            "LINEAR": p.beta == 0,
            "PRECISION": self.precision,
        }

    def lengths(self) -> dict[str, Any]:
        """What the lengths are, compiled in; ``triton_values`` has the meaning of the numbers."""
        if self.packed is None:
            return {"QUERY_LENGTHS": self.problem.query_lengths, "KEY_LENGTHS": self.problem.key_value_lengths}
        return dict.fromkeys(("QUERY_LENGTHS", "KEY_LENGTHS"), 3 if self._to_ends else 2)

    @property
    def sums(self) -> bool:
        """Whether a head inside of the range can have a sum of X that is not."""
        return self.limits.range + math.log2(self.problem.key_length) > self.limits.sum

    @property
    def y_scale(self) -> float:
        """βv·log2e = v · y_scale."""
        return (self.problem.beta or 0.0) * _LOG2E

    @property
    def o_scale(self) -> tuple[float, float]:
        """O = log2(…) · o_scale in two float32 numbers: the inverse of y_scale as kernels have it, rounded."""
        exact = 1 / _float32(self.y_scale) if self.problem.beta else 1.0
        return _float32(exact), exact - _float32(exact)

    @property
    def inverse_beta(self) -> float:
        """1/β, and 1 at β = 0."""
        return 1 / self.problem.beta if self.problem.beta else 1.0

    def tile_of(self) -> tuple[torch.dtype, int, int, bool]:
        """What tile sizes depend on."""
        return self.dtype, padded(self.problem.head_dim), padded(self.problem.value_dim), is_large(self.device)


class Call(NamedTuple):
    """The arrays of a call with one batch axis and adjacent columns, and the plan for it.

    Those of a packed call are (T, H, D), and instead of lengths it has where its sequences begin and the last one ends.
    """

    plan: Plan
    q: Tensor  # (B, Hq, Lq, D)
    k: Tensor  # (B, Hkv, Lk, D)
    v: Tensor  # (B, Hkv, Lk, E)
    mask: Tensor | None  # bytes, (B, Hq, Lq, Lk), most likely with strides of 0
    bias: Tensor | None
    query_lengths: Tensor | None  # int32
    key_lengths: Tensor | None


def padded(width: int) -> int:
    """The width of a tile that holds so many columns."""
    return max(16, 1 << (width - 1).bit_length())


def _float32(x: float) -> float:
    """A number rounded as an argument of a kernel is."""
    return ctypes.c_float(x).value


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def prepare(problem: Problem, inputs: Inputs) -> Call:
    """The arguments as the kernels take them; copies only what has no adjacent columns."""
    q, k, v = (matrix(x) for x in inputs[:3])
    mask, bias = (_broadcast(problem, x) for x in (inputs.attn_mask, inputs.bias))
    if mask is not None:
        mask = mask.view(torch.uint8)
    layouts = tuple((n, layout(x)) for n, x in zip("qkv", (q, k, v), strict=True))
    if mask is not None:
        layouts += (("mask", layout(mask)),)
    if bias is not None:
        layouts += (("bias", layout(bias)),)
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return Call(
        _plan(problem, q.device, q.dtype, layouts, tf32, None),
        q,
        k,
        v,
        mask,
        bias,
        _lengths(problem, inputs.query_seq_lengths, problem.query_length),
        _lengths(problem, inputs.key_value_seq_lengths, problem.key_length),
    )


def prepare_packed(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor
) -> Call:
    """The same of packed sequences; ``starts`` of the sequences, and of what is behind the last, are int32."""
    q, k, v = (adjacent(x, 0) for x in (query, key, value))
    layouts = tuple((n, layout(x, packed=True)) for n, x in zip("qkv", (q, k, v), strict=True))
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    plan = _plan(problem, q.device, q.dtype, layouts, tf32, Packed(q.shape[0], k.shape[0]))
    return Call(plan, q, k, v, None, None, starts_q, starts_k)


@functools.lru_cache(maxsize=1024)
def _plan(
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    layouts: tuple[tuple[str, _Layout], ...],
    tf32: bool,
    packed: Packed | None,
) -> Plan:
    return Plan(problem, device, dtype, dict(layouts), tf32, packed)


def layout(x: Tensor, packed: bool = False) -> _Layout:
    """What a prepared launch depends on of an array, beside its shape; packed sequences are rows apart."""
    strides = x.stride()
    if packed:
        strides = (*strides[:2], strides[0], *strides[2:])
    return strides, x.data_ptr() % ALIGNMENT == 0


def matrix(x: Tensor) -> Tensor:
    """An array with one batch axis and adjacent columns, copied only if it has none."""
    if x.ndim != 4:
        x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    return adjacent(x, -2)


def adjacent(x: Tensor, rows: int) -> Tensor:
    """An array with adjacent columns, and rows along that axis not too far apart."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        x = x.float()  # Triton's interpreter takes the bits of a bfloat16 for an integer
    near = x.stride(rows) < 2**22  # offsets within a tile are 32-bit
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
    return lengths.to(torch.int64).clamp(0, limit).to(torch.int32).expand(problem.batch).contiguous().view(-1)


class Values(NamedTuple):
    """What the value pass makes of the values."""

    x: Tensor  # (B, Hkv, Lk, E); v itself for a kernel that works X out on its way
    c: Tensor  # (B·Hkv, EP), int32
    flags: Tensor  # (B·Hkv,), int32
    counter: Tensor  # int32 that are 0, for whom they may serve


def value_pass(call: Call, narrow: bool = False) -> Values:
    """X, c, and which heads need what.

    Args:
        call: The arrays.
        narrow: Whether to flag heads with a channel of small values that hardly vary.
    """
    plan, v = call.plan, call.v
    heads, width = plan.batch * v.shape[1], padded(v.shape[-1])
    write, decide, blocks = plan.prepared(_value_launches, narrow)
    x = plan.new(v.shape[1], plan.problem.key_length, v.shape[-1], keys=True)
    partial = torch.empty((heads * blocks * (3 * width + 1),), dtype=torch.float32, device=v.device)
    c = torch.empty((heads, width), dtype=torch.int32, device=v.device)
    flags = torch.empty((heads,), dtype=torch.int32, device=v.device)
    counter = torch.empty((1,), dtype=torch.int32, device=v.device)
    write(v, x, partial, counter, call.key_lengths)
    decide(v, x, partial, c, flags, call.key_lengths)
    return Values(x, c, flags, counter)


def _value_launches(plan: Plan, narrow: bool) -> tuple[Launch, Launch, int]:
    """The two launches of the value pass, and into how many blocks it cuts the keys of a head."""
    p, limits = plan.problem, plan.limits
    heads, width = plan.batch * p.key_value_heads, padded(p.value_dim)
    block = 4096 // width
    span = cdiv(cdiv(p.key_length, max(1, _VALUE_PROGRAMS // heads)), block) * block
    blocks = cdiv(p.key_length, span)
    lengths = plan.lengths()["KEY_LENGTHS"]
    common = {"E": p.value_dim, "EP": width, "LENGTHS": lengths, "LINEAR": p.beta == 0, "SUMS": plan.sums}
    write = Launch(
        triton_values.value_pass, heads * blocks,
        (*plan.strides("v"), p.key_value_heads, p.key_length, blocks, span, plan.y_scale),
        **common, BLOCK=block, num_warps=8, **_registers(64),
    )  # fmt: skip
    share = min(cdiv(256, heads), cdiv(p.key_length, block))
    decide = Launch(
        triton_values.decide, heads * share,
        (*plan.strides("v"), share, p.key_value_heads, p.key_length, blocks, plan.y_scale),
        **common, BLOCK=block, WIDE=8, RANGE=limits.range, SUM=limits.sum,
        EASY_LOW=limits.easy[0], EASY_HIGH=limits.easy[1], TOP=limits.top, NARROW=limits.narrow if narrow else 0.0,
        num_warps=8,
    )  # fmt: skip
    return write, decide, blocks


def _registers(most: int) -> dict[str, int]:
    """The option that makes room for more blocks on a multiprocessor, where the compiler has it."""
    cuda = not INTERPRETED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return {"maxnreg": most} if cuda else {}


def workers(heads: int, work: int) -> int:
    """Programs per head of a kernel that mostly has nothing to do."""
    return max(1, min(work, cdiv(1024, heads)))


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a CPU, where Triton is interpreted, has two."""
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def copies_tiles(device: torch.device) -> bool:
    """Whether the hardware of a device copies tiles by itself: NVIDIA's, from Hopper on."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


def describe(plan: Plan, x: Tensor, rows: int) -> Placed | None:
    """Tiles of so many rows of an array (B, H, L, D), zero beyond the end of a head; None where there can be none."""
    if plan.packed is not None:  # a tile would reach into the next sequence
        return None
    tiles = plan.prepared(_tiles, x.shape, layout(x), rows)
    return None if tiles is None else tiles.of(x)


def _tiles(plan: Plan, shape: torch.Size, lies: _Layout, rows: int) -> Tiles | None:
    if not copies_tiles(plan.device) or not fits(shape, *lies, plan.dtype.itemsize):
        return None
    block = [1, 1, rows, padded(shape[-1])]
    return Tiles(lambda x: TensorDescriptor(x, list(x.shape), strides_of(x), block))
