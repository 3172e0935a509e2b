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

from laser_core import Forward, Gradients, Inputs, Problem, _array, _gradient

from . import hopper, triton_backward, triton_exact, triton_forward, triton_values
from .tiles import ROWS, Tile, backward_tiles, forward_tile, is_large, value_block

INTERPRETED = not isinstance(triton_forward.forward, triton.runtime.JITFunction)
_FAR = 2**30  # a band edge that is beyond every position
_LOG2E = math.log2(math.e)
FEW = 16  # rows that see fewer keys are computed exactly where X is in half precision


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


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output; no synchronisation with the device."""
    q, dtype = inputs.query, inputs.query.dtype
    wide = dtype != torch.float32
    if 0 in problem.score_shape:
        out = q.new_zeros(problem.out_shape)
        l = q.new_full(problem.lse_shape, -math.inf, dtype=torch.float32)
        return Forward(out, l, torch.zeros_like(out, dtype=torch.float32) if wide else None)
    call = prepare(problem, inputs)
    fast = _hopper_forward if _hopper_serves(call) else _portable_forward
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        values = value_pass(call)
        out, l, residual, count = fast(call, values, wide)
        _exact_forward(call, values, out, residual, l, count)
    return Forward(out.view(problem.out_shape).to(dtype), l, residual)


def _hopper_serves(call: Call) -> bool:
    """Whether the kernel for Hopper runs the call."""
    if INTERPRETED or hopper.why_not(call.problem) or hopper.missing(call.q.device):
        return False
    return hopper.fits(call.q) and hopper.fits(call.k)


def _hopper_forward(call: Call, values: Values, wide: bool) -> tuple[Tensor, Tensor, Tensor | None, None]:
    p = call.problem
    heads = (call.batch, p.key_value_heads)
    c = values.c.to(torch.int32).view(*heads, p.value_dim)
    out, l, residual = hopper.forward(
        call.q, call.k, values.x.view(*heads, *values.x.shape[1:]), c, p.beta or 0.0, p.scale,
        hopper.causal_offset(p), wide,
    )  # fmt: skip
    return out, l.view(p.lse_shape), None if residual is None else residual.view(p.out_shape), None


def _copies_tiles(x: Tensor) -> bool:
    """Whether the hardware copies tiles of this matrix by itself: Hopper and later, and aligned rows."""
    if INTERPRETED or torch.version.hip is not None:
        return False
    aligned = x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return aligned and torch.cuda.get_device_capability(x.device)[0] >= 9


def _describe_rows(x: Tensor, block: int) -> TensorDescriptor | None:
    """A descriptor of a contiguous array ``(heads, L, E)`` as a matrix of rows; None where there can be none.

    No tile may reach into the next head: what is infinite there would be met by a weight of zero.
    """
    rows = math.prod(x.shape[:-1])
    if not _copies_tiles(x) or x.shape[-2] % block or rows >= 2**31:
        return None
    return TensorDescriptor(x, (rows, x.shape[-1]), (x.shape[-1], 1), [block, padded(x.shape[-1])])


def _describe(x: Tensor, block: int) -> tuple[TensorDescriptor, list[int]] | None:
    """The same of ``(B, H, L, D)`` in that order or with heads within rows, ``(B, L, H, D)``.

    And how many rows a batch entry and a head are apart, and how many columns a head.
    """
    b, h, n, d = x.shape
    if not _copies_tiles(x) or n % block or b * h * n >= 2**31:
        return None
    if x.is_contiguous():
        return TensorDescriptor(x, (b * h * n, d), (d, 1), [block, padded(d)]), [h * n, n, 0]
    if x.transpose(1, 2).is_contiguous() and padded(d) == d:
        return TensorDescriptor(x, (b * n, h * d), (h * d, 1), [block, d]), [n, 0, d]
    return None


def _tile_of(call: Call) -> tuple[torch.dtype, int, int, bool]:
    """What tile sizes depend on."""
    p = call.problem
    return call.q.dtype, padded(p.head_dim), padded(p.value_dim), is_large(call.q.device)


def _portable_forward(
    call: Call, values: Values, wide: bool, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The flash kernel on X: o, l, o unrounded, and how many keys a query sees where a mask or bias decides it."""
    p, limits, options = call.problem, call.limits, call.options()
    out = torch.empty(p.out_shape, dtype=call.q.dtype, device=call.q.device)
    l = torch.empty(p.lse_shape, dtype=torch.float32, device=out.device)
    residual = torch.empty(p.out_shape, dtype=torch.float32, device=out.device) if wide else None
    tile = tile or forward_tile(*_tile_of(call))
    counted = call.mask is not None or call.bias is not None
    count = torch.empty(l.shape, dtype=torch.int32, device=l.device) if counted else None
    outputs = (call.query_lengths, call.key_lengths, out, residual, l)
    fold = p.scale > 0 and p.logits_soft_cap is None
    described, x = _describe(call.k, tile.block_k), _describe_rows(values.x, tile.block_k)
    tma = tile.tma and described is not None and x is not None
    k, k_strides = described if tma and described is not None else (call.k, call.strides("k"))
    triton_forward.forward[(call.batch * p.query_heads * triton.cdiv(p.query_length, tile.block_q),)](
        call.q, k, x if tma else values.x, values.c, values.flags, count, call.mask, call.bias, *outputs,
        *call.strides("q"), *k_strides, *call.strides("mask", "bias"), *call.geometry(), call.o_scale,
        **options, EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, FOLD=fold, TMA=tma,
        SHIFT=0 if p.beta == 0 else limits.shift, RESIDUAL=residual is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, l, residual, count


def _exact_forward(
    call: Call, values: Values, out: Tensor, residual: Tensor | None, l: Tensor, count: Tensor | None
) -> None:
    """The definition, for heads outside the fast range and for what sees NaN or infinity."""
    p, options = call.problem, call.options()
    heads = call.batch * p.query_heads
    outputs = (call.query_lengths, call.key_lengths, out, residual, l)
    share = workers(heads, triton.cdiv(p.query_length, 16) * triton.cdiv(p.value_dim, 16))
    triton_forward.exact[(heads * share,)](
        call.q, call.k, call.v, values.flags, count, call.mask, call.bias, *outputs,
        *call.strides("q", "k", "v", "mask", "bias"), share, *call.geometry(), p.beta or 0.0,
        **options, BM=16, BN=16, BE=16, FEW=FEW if residual is not None and p.beta != 0 else 0,
        RESIDUAL=residual is not None, num_warps=4, num_stages=1,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- backward


class _Cotangents(NamedTuple):
    """What flows back, and what the kernels make of it."""

    o: Tensor  # unrounded, contiguous
    do: Tensor  # (B, Hq, Lq, E)
    dl: Tensor | None  # (B, Hq, Lq)
    g: Tensor  # (B·Hq, Lq, E)
    r: Tensor  # (B·Hq, Lq up to a multiple of ROWS)
    l2: Tensor

    def strides(self) -> list[int]:
        return [*self.do.stride()[:3], *((0, 0, 0) if self.dl is None else self.dl.stride())]


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """The gradients; no synchronisation with the device."""
    arguments = (inputs.query, inputs.key, inputs.value)
    if 0 in problem.score_shape:
        return _gradient.no_gradients(_array.namespace(inputs.query), inputs)
    call = prepare(problem, inputs)
    with torch.cuda.device_of(inputs.query):  # type: ignore[no-untyped-call]
        values = value_pass(call)
        side = _prepare_rows(call, values, forward, d_out, d_lse)
        dq, dk, dv = (torch.empty(x.shape, dtype=call.q.dtype, device=x.device) for x in arguments)
        for_keys, for_queries = backward_tiles(*_tile_of(call))
        _launch_keys(call, values, side, dk, dv, for_keys)
        _launch_queries(call, values, side, dq, for_queries)
        if problem.beta != 0:
            _launch_exact(call, values, side, dq, dk, dv)
        dbias = None if inputs.bias is None else _bias_gradient(call, values, side, inputs.bias)
    dq, dk, dv = (a.to(x.dtype) for a, x in zip((dq, dk, dv), arguments, strict=True))
    return Gradients(dq, dk, dv, dbias)


def _inverse_beta(problem: Problem) -> float:
    return 1 / problem.beta if problem.beta else 1.0


def _prepare_rows(call: Call, values: Values, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> _Cotangents:
    p, device = call.problem, call.q.device
    heads, width = call.batch * p.query_heads, padded(p.value_dim)
    do = _matrix(d_out.reshape(call.batch, *d_out.shape[-3:]))
    dl = None if d_lse is None else d_lse.reshape(call.batch, *d_lse.shape[-2:])
    o = (forward.out if forward.residual is None else forward.residual).contiguous()
    g = torch.empty((heads, p.query_length, p.value_dim), dtype=call.q.dtype, device=device)
    r, l2 = torch.empty((2, heads, triton.cdiv(p.query_length, ROWS) * ROWS), dtype=torch.float32, device=device)
    side = _Cotangents(o, do, dl, g, r, l2)
    block = value_block(width)
    triton_backward.prepare_rows[(heads * (r.shape[1] // block),)](
        o, do, dl, forward.lse.contiguous(), values.c, values.flags, g, r, l2, *side.strides(),
        p.query_heads, p.group, p.query_length, call.y_scale, _inverse_beta(p), r.shape[1],
        E=p.value_dim, EP=width, BM=block, LINEAR=p.beta == 0, WITH_DL=dl is not None, num_warps=8,
    )  # fmt: skip
    return side


def _launch_keys(call: Call, values: Values, side: _Cotangents, dk: Tensor, dv: Tensor, tile: Tile) -> None:
    p, g, q = call.problem, _describe_rows(side.g, tile.block_q), _describe(call.q, tile.block_q)
    tma = tile.tma and g is not None and q is not None
    source, strides = q if tma and q is not None else (call.q, call.strides("q"))
    triton_backward.backward_keys[(call.batch * p.key_value_heads * triton.cdiv(p.key_length, tile.block_k),)](
        source, call.k, values.x, g if tma else side.g, side.r, side.l2, values.flags, call.mask, call.bias,
        call.query_lengths, call.key_lengths, dk, dv, *strides, *call.strides("k", "mask", "bias"),
        *call.geometry(), _inverse_beta(p), side.r.shape[1], **call.options(),
        EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, TMA=tma,
        SHIFT=0 if p.beta == 0 else call.limits.shift, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _launch_queries(call: Call, values: Values, side: _Cotangents, dq: Tensor, tile: Tile) -> None:
    p, x, k = call.problem, _describe_rows(values.x, tile.block_k), _describe(call.k, tile.block_k)
    tma = tile.tma and x is not None and k is not None
    source, strides = k if tma and k is not None else (call.k, call.strides("k"))
    triton_backward.backward_queries[(call.batch * p.query_heads * triton.cdiv(p.query_length, tile.block_q),)](
        call.q, source, x if tma else values.x, side.g, side.r, side.l2, values.flags, call.mask, call.bias,
        call.query_lengths, call.key_lengths, dq, *call.strides("q"), *strides, *call.strides("mask", "bias"),
        *call.geometry(), _inverse_beta(p), side.r.shape[1], **call.options(),
        EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, TMA=tma,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _exact_arguments(call: Call, side: _Cotangents) -> list[Any]:
    return [*call.strides("q", "k", "v"), *side.strides(), *call.strides("mask", "bias")]


def _launch_exact(call: Call, values: Values, side: _Cotangents, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    p = call.problem
    options = call.options()
    del options["LINEAR"]
    options |= {"BM": 16, "BN": 16, "BE": 16, "WITH_DL": side.dl is not None, "num_warps": 4, "num_stages": 1}
    arrays = (call.q, call.k, call.v, side.o, side.do, side.dl, side.l2, values.flags, call.mask, call.bias)
    lengths = (call.query_lengths, call.key_lengths)
    scalars = (*call.geometry(), call.y_scale, _inverse_beta(p), side.r.shape[1])
    heads = call.batch * p.query_heads
    count = workers(heads, triton.cdiv(p.query_length, 16))
    triton_exact.exact_queries[(heads * count,)](
        *arrays, *lengths, dq, *_exact_arguments(call, side), count, *scalars, **options
    )
    heads = call.batch * p.key_value_heads
    count = workers(heads, triton.cdiv(p.key_length, 16) * (triton.cdiv(p.value_dim, 16) + 1))
    triton_exact.exact_keys[(heads * count,)](
        *arrays, *lengths, dk, dv, *_exact_arguments(call, side), count, *scalars, **options
    )


def _bias_gradient(call: Call, values: Values, side: _Cotangents, bias: Tensor) -> Tensor:
    p = call.problem
    shape = (1,) * (len(p.score_shape) - bias.ndim) + tuple(bias.shape)
    own_batch = call.batch if any(n != 1 for n in shape[:-3]) else 1
    sums = (shape[-2] == 1 and p.query_length > 1, shape[-1] == 1 and p.key_length > 1)
    found = torch.empty((own_batch, *shape[-3:]), dtype=torch.float32, device=bias.device)
    block_q, block_k = 32, 32
    tiles = triton.cdiv(shape[-2], block_q) * triton.cdiv(shape[-1], block_k)
    triton_exact.backward_bias[(own_batch * shape[-3] * tiles,)](
        call.q, call.k, call.v, values.x, side.g, side.r, side.o, side.do, side.dl, side.l2, values.flags,
        call.mask, call.bias, call.query_lengths, call.key_lengths, found, *_exact_arguments(call, side),
        shape[-3], call.batch // own_batch, p.query_heads // shape[-3],
        *call.geometry(), call.y_scale, _inverse_beta(p), side.r.shape[1],
        **call.options(), EP=padded(p.value_dim), BM=block_q, BN=block_k, BE=16, SUM_I=sums[0], SUM_J=sums[1],
        WITH_DL=side.dl is not None, num_warps=4, num_stages=1,
    )  # fmt: skip
    if own_batch > 1:  # (B, …) back to the batch axes that the bias has
        found = found.reshape(*p.batch, *shape[-3:])
    gradient: Tensor = _array.unbroadcast(_array.namespace(bias), found, tuple(bias.shape))
    return gradient.to(bias.dtype)
