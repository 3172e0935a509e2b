"""LASER through torch's own flash attention on the CPU, guarded by the range of the values.

LASER is softmax attention over X = exp(βv), and o = log(p·X)/β. Its gradient is that of softmax attention too: with
G = do·exp(−βo) as the cotangent of p·X, X/β as the values and 1/exp(−βo)/β as the output,

    ds = p ∘ (G·(X/β)ᵀ − rowsum(G ∘ out)) = p ∘ (G·(X/β)ᵀ − rowsum(do)/β)          dv = X ∘ (pᵀ·G)

A cotangent of the log-sum-exp adds p∘dl to ds: one more column, dl in G and 1 in X. At β = 0, X = v and o = p·X.

The guard. A head in which some channel of βv spans more than ``reach`` is computed by the streaming form, in the same
call. A head that holds NaN or ±∞ is computed twice: here with zeros in their place, and by the streaming form, which
says where they are seen. Only what is not finite there is taken from there, so a hidden NaN changes no bit of the rest.
Each pass over the values counts, so a call that holds nothing unusual makes only the few that it needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from laser_core import Forward, Gradients, Inputs, Problem, _array, _streaming, _tiles, _values
from laser_core._values import Forms, Values

from . import causal

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_EXP = Forms(exp=True, expm1=False)


def reach(dtype: torch.dtype, keys: int) -> float:
    """How far βv may spread in a channel, in nats.

    The kernel drops weights below the least normal number. With Lk of them, each on an X that is exp(reach) times that
    of the key of weight 1, what is lost stays below the rounding of the sum.
    """
    info = torch.finfo(dtype)
    return min(_values.RANGE, math.log(info.eps) - math.log(info.tiny) - math.log(keys))


class _Operands(NamedTuple):
    """The arguments of a call as the kernel takes them: batch folded into one axis, in the compute dtype."""

    q: Tensor  # (B, Hq, Lq, D), finite
    k: Tensor  # (B, Hkv, Lk, D), finite
    values: Values  # of (B, Hkv, Lk, E); at β = 0, x is v
    mask: Tensor | None  # additive, broadcastable to (B, Hq, Lq, Lk)
    seeing: Tensor | None  # broadcastable to (B, Hq, Lq): the query sees a key; None: all do
    outside: Tensor  # (B, Hkv): the head needs the exact path
    odd: Tensor  # (B, Hkv): the head holds NaN or ±∞


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output, by torch's kernel where the values are inside the fast range."""
    if 0 in problem.score_shape:
        return _streaming.forward(problem, inputs)
    x = _operands(problem, inputs)
    if x.outside.all():
        return _streaming.forward(problem, inputs)
    width = max(problem.head_dim, problem.value_dim)
    q, k, values = (_pad(a, width) for a in (x.q, x.k, x.values.x))
    a, l = _flash(q, k, values, 0.0, causal(problem), attn_mask=x.mask, scale=problem.scale)
    out, l = _finish(problem, a[..., : problem.value_dim].contiguous(), x.values), l.contiguous()
    if x.seeing is not None:
        out.masked_fill_(~x.seeing[..., None], 0)
        l.masked_fill_(~x.seeing, -math.inf)
    out, l = out.view(problem.out_shape), l.view(problem.lse_shape)

    for head in _exceptions(problem, x.outside | x.odd):
        exact = _streaming.forward(*_tiles.part(problem, inputs, head.entry, head.span))
        o = exact.out if exact.residual is None else exact.residual
        replace = bool(x.outside[head.folded])
        _settle(out[head.queries], o, replace)
        _settle(l[head.queries], exact.lse, replace)
    if problem.dtype == problem.compute_dtype:
        return Forward(out, l)
    return Forward(out.to(inputs.query.dtype), l, residual=out)


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """The gradients, by torch's kernel where the values are inside the fast range."""
    if 0 in problem.score_shape:
        return _streaming.backward(problem, inputs, forward, d_out, d_lse)
    x = _operands(problem, inputs)
    if x.outside.all():
        return _streaming.backward(problem, inputs, forward, d_out, d_lse)
    x, o, do, l, dl = _rows(problem, x, forward, d_out, d_lse)

    beta = problem.beta or 0.0
    g, out, weighted = do, o, x.values.x
    if beta:
        e = _inverse(problem, o, x.values)
        g, out = do * e, e.mul_(beta).reciprocal_()
        weighted = weighted if beta == 1 else weighted / beta
    if dl is not None:
        g, out = torch.cat((g, dl), -1), _pad(out, problem.value_dim + 1)
        weighted = torch.cat((weighted, torch.ones_like(weighted[..., :1])), -1)
    width = max(problem.head_dim, g.shape[-1])
    g, q, k, weighted, out = (_pad(a, width) for a in (g, x.q, x.k, weighted, out))
    dq, dk, dx = _flash_backward(
        g, q, k, weighted, out, l[..., 0], 0.0, causal(problem), attn_mask=x.mask, scale=problem.scale
    )
    dx = dx[..., : problem.value_dim]
    found = (dq[..., : problem.head_dim], dk[..., : problem.head_dim], dx * x.values.x if beta else dx)
    arguments = (inputs.query, inputs.key, inputs.value)
    dq, dk, dv = (a.reshape(like.shape) for a, like in zip(found, arguments, strict=True))

    for head in _exceptions(problem, x.outside | x.odd):
        exact = _streaming.backward(
            *_tiles.part(problem, inputs, head.entry, head.span),
            Forward(*(None if a is None else a[head.queries] for a in forward)),
            d_out[head.queries],
            None if d_lse is None else d_lse[head.queries],
        )
        replace = bool(x.outside[head.folded])
        _settle(dq[head.queries], exact.query, replace)
        _settle(dk[head.keys], exact.key, replace)
        _settle(dv[head.keys], exact.value, replace)
    return Gradients(*(a.to(like.dtype) for a, like in zip((dq, dk, dv), arguments, strict=True)))


# --------------------------------------------------------------------------------------------------------- operands


def _operands(problem: Problem, inputs: Inputs) -> _Operands:
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    queries = _within(problem, inputs.query_seq_lengths, problem.query_length)
    keys = _within(problem, inputs.key_value_seq_lengths, problem.key_length)
    q, k, v = (_fold(x, dtype) for x in (inputs.query, inputs.key, inputs.value))
    if queries is not None:
        q = torch.where(queries[..., None], q, 0)
    if keys is not None:
        k, v = (torch.where(keys[..., None], x, 0) for x in (k, v))
    values, outside, odd = _guarded(problem, v, keys)
    # A sum is finite only if all terms are. Where it overflows, all terms are looked at in vain.
    odd = odd | ~(q.sum((-2, -1)).reshape(*odd.shape, -1).sum(-1) + k.sum((-2, -1))).isfinite()
    if odd.any():
        q, k = (torch.where(x.isfinite(), x, 0) for x in (q, k))
    mask, seeing = _masks(problem, inputs, queries, keys, dtype)
    return _Operands(q, k, values, mask, seeing, outside, odd)


def _guarded(problem: Problem, v: Tensor, keys: Tensor | None) -> tuple[Values, Tensor, Tensor]:
    """The values that the kernel takes, which heads are outside the fast range, and which hold NaN or ±∞."""
    beta = problem.beta or 0.0
    y = v if beta in (0, 1) else v * beta
    low, high = y.amin(-2), y.amax(-2)
    odd = ~(low.isfinite() & high.isfinite()).all(-1)
    if not beta:
        x = torch.where(v.isfinite(), v, 0) if odd.any() else v
        return Values(x, None, ~odd, None), torch.zeros_like(odd), odd
    if torch.maximum(high, -low).max() <= _values.EASY:
        return Values(y.exp(), None, ~odd, None), torch.zeros_like(odd), odd
    values = _values.exponentiate(_namespace(v), v, v.new_full((1, 1), beta), _EXP, keys)
    counts = y.isfinite() if keys is None else y.isfinite() & keys[..., None]
    spread = torch.where(counts, y, -math.inf).amax(-2) - torch.where(counts, y, math.inf).amin(-2)
    inside = values.inside & (spread <= reach(v.dtype, problem.key_length)).all(-1)
    return values, ~inside, odd


def _finish(problem: Problem, a: Tensor, values: Values) -> Tensor:
    """o from a = p·X, which may be overwritten."""
    beta = problem.beta or 0.0
    if not beta:
        return a
    if values.c is not None:
        values = values._replace(c=values.c.repeat_interleave(problem.group, dim=1))
        o: Tensor = _values.finish(_namespace(a), a, values, a.new_full((1, 1), beta), _EXP)
        return o
    return a.log_() if beta == 1 else a.log_().div_(beta)


def _inverse(problem: Problem, o: Tensor, values: Values) -> Tensor:
    """1/(p·X), from o."""
    if values.c is None:
        return torch.exp(o * -(problem.beta or 0.0))
    values = values._replace(c=values.c.repeat_interleave(problem.group, dim=1))
    beta, ones = o.new_full((1, 1), problem.beta or 0.0), torch.ones_like(o)
    e: Tensor = _values.rows(_namespace(o), o, ones, o.new_zeros(o.shape[:-1]), values, beta, _EXP).g
    return e


def _namespace(x: Tensor) -> _array.Namespace:
    return _array.namespace(x)


def _fold(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x (..., H, L, D)`` with one batch axis."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]).to(dtype)


def _within(problem: Problem, lengths: Tensor | None, size: int) -> Tensor | None:
    """Which positions are inside the sequence lengths, ``(B, 1, size)``."""
    if lengths is None:
        return None
    return torch.arange(size) < lengths.to(torch.int64).expand(problem.batch).reshape(-1, 1, 1)


def _masks(
    problem: Problem, inputs: Inputs, queries: Tensor | None, keys: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask, and which queries see a key."""
    visible, seeing = None, queries
    if inputs.attn_mask is not None:
        m = inputs.attn_mask
        m = m.reshape((1,) * (len(problem.score_shape) - m.ndim) + tuple(m.shape))
        if any(n != 1 for n in m.shape[:-3]):
            m = m.expand(*problem.batch, *m.shape[-3:])
        visible = m.reshape(-1 if m.numel() else 0, *m.shape[-3:]).expand(-1, -1, -1, problem.key_length)
    if keys is not None:
        visible = keys[:, None] if visible is None else visible & keys[:, None]
    if visible is None:
        return None, seeing
    some = visible.any(-1)
    if causal(problem):
        first = visible.to(torch.uint8).argmax(-1)
        some = some & (first <= torch.arange(problem.query_length))
    seeing = some if seeing is None else seeing & some
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -math.inf), seeing


def _rows(
    problem: Problem, x: _Operands, forward: Forward, d_out: Tensor, d_lse: Tensor | None
) -> tuple[_Operands, Tensor, Tensor, Tensor, Tensor | None]:
    """o, its cotangent, l and its, as the kernel takes them.

    Rows that see nothing, or hold NaN or ±∞, are taken out: no cotangent, and no weight on any key.
    """
    dtype = x.q.dtype
    out = forward.out if forward.residual is None else forward.residual
    o, do, l = (_fold(a, dtype) for a in (out, d_out, forward.lse[..., None]))
    dl = None if d_lse is None else _fold(d_lse[..., None], dtype)
    keep = None if x.seeing is None else x.seeing[..., None].expand(l.shape)
    sums = o.sum((-2, -1)) + do.sum((-2, -1))
    if dl is not None:
        sums = sums + dl.sum((-2, -1))
    if not sums.isfinite().all():
        fine = o.isfinite().all(-1, keepdim=True) & do.isfinite().all(-1, keepdim=True)
        if dl is not None:
            fine = fine & dl.isfinite()
        if keep is not None:
            fine = fine | ~keep
        odd = ~fine.reshape(*x.odd.shape, -1).all(-1)
        x = x._replace(odd=x.odd | odd)
        keep = fine if keep is None else keep & fine
    if keep is not None:
        # o stays within reach of the values: powers of two are taken relative to the least exponent
        rest = 0 if x.values.c is None else x.values.c * (math.log(2) / (problem.beta or 1.0))
        rest = rest if isinstance(rest, int) else rest.repeat_interleave(problem.group, dim=1)
        o, do = torch.where(keep, o, rest), torch.where(keep, do, 0)
        l = torch.where(keep, l, torch.finfo(dtype).max)
        dl = None if dl is None else torch.where(keep, dl, 0)
    return x, o, do, l, dl


def _pad(x: Tensor, width: int) -> Tensor:
    """Zero columns up to the one width that the kernel wants of all its operands; it takes columns to be adjacent."""
    if x.shape[-1] != width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


# ------------------------------------------------------------------------------------------------------- exceptions


class _Head(NamedTuple):
    """Where a key/value head and the query heads that read it are."""

    entry: tuple[int, ...]  # of the batch
    span: slice
    folded: tuple[int, int]  # in arrays with one batch axis
    queries: tuple[int | slice, ...]
    keys: tuple[int | slice, ...]


def _exceptions(problem: Problem, flags: Tensor) -> Iterator[_Head]:
    """The heads that need the streaming form."""
    if not flags.any():
        return
    for b, index in enumerate(itertools.product(*map(range, problem.batch))):
        for h in range(problem.key_value_heads):
            if flags[b, h]:
                queries = slice(h * problem.group, (h + 1) * problem.group)
                yield _Head(index, slice(h, h + 1), (b, h), (*index, queries), (*index, slice(h, h + 1)))


def _settle(ours: Tensor, exact: Tensor, replace: bool) -> None:
    """Write the streaming form's result into ours: all of it, or what is not finite."""
    exact = exact.to(ours.dtype)
    ours.copy_(exact if replace else torch.where(exact.isfinite(), ours, exact))
