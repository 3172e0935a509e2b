"""LASER attention over packed sequences: one row after the other in one array, found by where each begins.

The Triton kernels take packed arrays as they are. Any other backend is called on a padded batch, made and undone by
gathering alone, so that nothing waits for the device and results are the same bits from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_core import Backend, Forward, Inputs, Problem, Unsupported, _array, _problem, _registry
from laser_core._problem import Alignment

from . import TRITON
from .binding import _define, _is_plain, _second_order, autocast, quiet

_refuse = _problem._refuse
_ARRAYS = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")


def laser_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    beta: float | Tensor = 1.0,
    is_causal: bool | Alignment = False,
    window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    backend: str | Sequence[str] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""LASER attention of packed sequences; :func:`laser_core.laser_attention` has the equation.

    Sequence n has the queries ``query[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]``, which see keys of the same range of
    ``cu_seqlens_k`` alone: the layout of FlashAttention's ``flash_attn_varlen_func`` and of
    ``torch.nn.attention.varlen.varlen_attn``. Differentiable, under ``torch.compile`` too. Nothing waits for the
    device, so that a call can be captured in a CUDA graph, with other lengths in each replay.

    Sequences may be empty. A query without a key, and a row of ``query`` that belongs to no sequence, has output 0,
    log-sum-exp −∞ and gradient 0; so have keys and values that belong to none. Where the kernels in Triton cannot run
    the call (``beta`` is a tensor or below 1, float64, D above 256, no GPU), it runs as a padded batch of
    ``max_seqlen_q`` by ``max_seqlen_k``; with ``is_causal="bottom_right"`` that needs a mask of this size for each
    sequence.

    Args:
        query: ``(Tq, Hq, D)``.
        key: ``(Tk, Hkv, D)``, where Hkv divides Hq.
        value: ``(Tk, Hkv, E)``.
        cu_seqlens_q: ``(sequences + 1,)``, int32 or int64, from 0 to at most Tq, not decreasing.
        cu_seqlens_k: The same for keys and values.
        max_seqlen_q: At least the length of the longest sequence of queries; what is longer is cut off.
        max_seqlen_k: The same for keys and values.
        scale: Factor of the scores; default 1/√D.
        beta: Inverse temperature: a finite number, or a tensor that broadcasts to ``(Hq, E)``.
        is_causal: ``"bottom_right"``: the last query of each sequence sees its last key, as in FlashAttention. True or
            ``"top_left"``: query i of a sequence sees keys ≤ i of it.
        window_size: ``(left, right)`` relative to the same diagonal, or None.
        logits_soft_cap: c > 0: scores pass through c·tanh(·/c).
        return_lse: Whether to return ``(out, lse)``.
        backend: None for the best that can, a name, or names in order of preference.

    Returns:
        ``out (Tq, Hq, E)`` in the dtype of query; with ``return_lse`` also ``lse (Hq, Tq)``, in float32 or wider.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A shape, device or option that does not fit. What is in ``cu_seqlens`` is not checked: that would
            wait for the device. Values beyond the arrays are taken as their end.
        Unsupported: No backend that was asked for can run the call.
    """
    arrays: dict[str, Any] = dict(zip(_ARRAYS, (query, key, value, cu_seqlens_q, cu_seqlens_k), strict=True))
    given = None if isinstance(beta, int | float) else beta
    _check(arrays, {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}, given)
    query, key, value = autocast(query, key, value)
    names = None if backend is None else [b.name for b in _registry.named(backend)]
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, given))
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, given)
    options = (
        max_seqlen_q,
        max_seqlen_k,
        1 / math.sqrt(query.shape[2]) if scale is None else _problem._number("scale", scale),
        None if given is not None else _problem._number("beta", beta),
        _problem._causal(is_causal),
        *_problem._window(window_size),
        _problem._soft_cap(logits_soft_cap),
        recorded,
        None if names is None else ",".join(names),
    )
    if not _is_plain(tensors):
        out, lse, _ = torch.ops.laser_attention.varlen_forward(*tensors, *options)
    elif recorded:
        out, lse = _Direct.apply(*tensors, *options)  # type: ignore[no-untyped-call]
    else:
        out, lse, _ = _forward(*tensors, *options)
    return (out, lse) if _problem._flag("return_lse", return_lse) else out


def _check(arrays: dict[str, Any], longest: dict[str, Any], beta: Any) -> None:
    _problem._check_arrays(arrays | {"beta": beta}, required=_ARRAYS)
    for name, x in arrays.items():
        layout = "(sequences + 1,)" if name.startswith("cu") else "(T, heads, dim)"
        rank = 1 if name.startswith("cu") else 3
        if x.ndim != rank or (rank == 1 and x.shape[0] < 1):
            raise ValueError(_refuse(name, f"shape {tuple(x.shape)}", f"rank {rank}, {layout}"))
        got = _array.dtype_name(x)
        if rank == 1 and got not in ("int32", "int64"):
            raise TypeError(_refuse(name, f"dtype {got}", "int32, int64"))
    query, key, value, starts_q, starts_k = arrays.values()
    _problem._check_dtypes({"query": query, "key": key, "value": value, "beta": beta})
    _problem._sizes(query.transpose(0, 1), *(x.transpose(0, 1) for x in (key, value)))
    if starts_k.shape != starts_q.shape:
        raise ValueError(_refuse("cu_seqlens_k", f"shape {tuple(starts_k.shape)}", f"{tuple(starts_q.shape)}"))
    for name, n in longest.items():
        if not isinstance(n, int | torch.SymInt) or isinstance(n, bool):
            raise TypeError(_refuse(name, repr(n), "a non-negative integer"))
        if n < 0:
            raise ValueError(_refuse(name, repr(n), "a non-negative integer"))
    if beta is not None:
        _problem._check_broadcast("beta", tuple(beta.shape), (query.shape[1], value.shape[2]), "(Hq, E)")


# ------------------------------------------------------------------------------------------------- the padded batch


class _Rows(NamedTuple):
    """Where the rows of a padded batch are among those of packed sequences, and the way back."""

    source: Tensor  # (B, longest): row of the packed array
    inside: Tensor  # (B, longest): whether there is such a row
    entry: Tensor  # (T,): batch entry of a row
    position: Tensor  # (T,): and its place there
    known: Tensor  # (T,): whether it belongs to a sequence

    @classmethod
    def of(cls, starts: Tensor, total: int, longest: int) -> _Rows:
        """Of sequences that begin at ``starts``, the last of which is where the last one ends."""
        starts = starts.to(torch.int64).clamp(0, total)
        length = (starts[1:] - starts[:-1]).clamp(0, longest)
        place = torch.arange(longest, device=starts.device)
        source = (starts[:-1, None] + place).clamp(max=max(total - 1, 0))
        row = torch.arange(total, device=starts.device)
        entry = torch.searchsorted(starts[1:].contiguous(), row, right=True).clamp(max=starts.shape[0] - 2)
        position = row - starts[entry]
        known = (position >= 0) & (position < length[entry])
        return cls(source, place < length[:, None], entry, position.clamp(0, max(longest - 1, 0)), known)

    def pad(self, x: Tensor, beyond: float = 0.0) -> Tensor:
        """(T, H, …) as (B, H, longest, …)."""
        inside = self.inside.view(*self.inside.shape, *(1,) * (x.ndim - 1))
        return torch.where(inside, x[self.source], beyond).transpose(1, 2)

    def pack(self, x: Tensor, beyond: float = 0.0) -> Tensor:
        """(B, H, longest, …) as (T, H, …)."""
        known = self.known.view(-1, *(1,) * (x.ndim - 2))
        return torch.where(known, x[self.entry, :, self.position], beyond)

    @property
    def lengths(self) -> Tensor:
        """Of the sequences."""
        return self.inside.sum(1)


def _padded(problem: Problem) -> Problem:
    """What a backend is asked that knows nothing of packed sequences."""
    if problem.causal != "bottom_right":
        return problem
    mask = (*problem.batch, 1, problem.query_length, problem.key_length)
    return dataclasses.replace(problem, causal=None, window=(None, None), mask_shape=mask)


def _pad(problem: Problem, call: _Call) -> tuple[Inputs, _Rows, _Rows]:
    queries = _Rows.of(call.starts_q, call.query.shape[0], problem.query_length)
    keys = _Rows.of(call.starts_k, call.key.shape[0], problem.key_length)
    seen = None
    if problem.causal == "bottom_right":
        i = torch.arange(problem.query_length, device=call.query.device)[:, None]
        diagonal = i + (keys.lengths - queries.lengths)[:, None, None, None]
        distance = torch.arange(problem.key_length, device=call.query.device) - diagonal
        seen = distance <= 0
        if problem.window[0] is not None:
            seen &= distance >= -problem.window[0]
    arrays = (queries.pad(call.query), keys.pad(call.key), keys.pad(call.value))
    return Inputs(*arrays, seen, None, call.beta, queries.lengths, keys.lengths), queries, keys


# -------------------------------------------------------------------------------------------------------- operators

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? beta"
_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float? beta_number, str? causal, SymInt? left, "
    "SymInt? right, float? logits_soft_cap, bool gradient, str? backend"
)
_N, _M = len(_TENSORS.split(",")), len(_OPTIONS.split(","))


class _Call(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    starts_q: Tensor
    starts_k: Tensor
    beta: Tensor | None


def _describe(args: Sequence[Any]) -> tuple[_Call, Problem, Backend, bool]:
    """The arrays of a call, its problem, who runs it, and whether packed as it is."""
    call, options = _Call(*args[:_N]), args[_N : _N + _M]
    query, value = call.query, call.value
    about = (
        *(_array.device_kind(query), query.dtype, call.starts_q.shape[0] - 1),
        *(query.shape[1], value.shape[1], query.shape[2], value.shape[2]),
        None if call.beta is None else tuple(call.beta.shape),
        *options,
    )
    try:
        return call, *_known(*about)
    except TypeError:  # sizes that are being traced have no hash
        return call, *_chosen(*about)


def _chosen(
    device: str, dtype: torch.dtype, sequences: int, query_heads: int, key_value_heads: int, head_dim: int,
    value_dim: int, beta_shape: tuple[int, ...] | None, longest_q: int, longest_k: int, scale: float,
    beta: float | None, causal: Alignment | None, left: int | None, right: int | None, cap: float | None,
    gradient: bool, names: str | None,
) -> tuple[Problem, Backend, bool]:  # fmt: skip
    """The problem of a call, who runs it, and whether packed as it is."""
    problem = Problem(
        framework="torch",
        device=device,
        dtype=str(dtype).rpartition(".")[2],
        batch=(sequences,),
        query_heads=query_heads,
        key_value_heads=key_value_heads,
        query_length=longest_q,
        key_length=longest_k,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=scale,
        beta=beta,
        causal=causal,
        window=(left, right),
        beta_shape=beta_shape,
        query_lengths=True,
        key_value_lengths=True,
        logits_soft_cap=cap,
        return_lse=True,
        gradient=gradient,
    )
    reason = TRITON.refuses(problem)
    if names is None:
        packed = reason is None and TRITON.priority(problem) > 0
        return problem, TRITON if packed else _registry.select(_padded(problem)), packed
    asked = _registry.named(names.split(",") if names else [])
    reasons = [(b, reason if b.name == TRITON.name else b.refuses(_padded(problem))) for b in asked]
    for chosen, why in reasons:
        if why is None:
            return problem, chosen, chosen.name == TRITON.name
    raise Unsupported("; ".join(f"backend {b.name!r} cannot run this: {why}" for b, why in reasons))


_known = functools.lru_cache(maxsize=1024)(_chosen)


def _is_empty(call: _Call, problem: Problem) -> bool:
    """Whether no query sees a key, as sizes alone say."""
    return 0 in problem.score_shape or 0 in (call.query.shape[0], call.key.shape[0])


def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, problem, chosen, packed = _describe(args)
    if _is_empty(call, problem):
        return _forward_fake(*args, of=torch.zeros)
    with quiet():
        if packed:
            from . import packed as kernels

            out, lse, residual = kernels.forward(kernels.prepare(problem, *call[:5]), call.query.dtype)
        else:
            inputs, queries, _ = _pad(problem, call)
            out, lse, residual = chosen.forward(_padded(problem), inputs)
            out, lse = queries.pack(out), queries.pack(lse, -math.inf).T
    kept = () if residual is None or not problem.gradient else residual if isinstance(residual, tuple) else (residual,)
    return out.contiguous(), lse.contiguous(), [x.contiguous() for x in kept]


def _forward_fake(*args: Any, of: Any = None) -> tuple[Tensor, Tensor, list[Tensor]]:
    call, problem, chosen, packed = _describe(args)
    query, rows = call.query, (call.query.shape[0], call.query.shape[1], call.value.shape[2])
    kept: Any = ()
    if problem.gradient:
        kept = chosen.residual(problem if packed else _padded(problem))
        if packed:
            kept = tuple((rows, dtype) for _, dtype in kept)

    def new(shape: Sequence[int], dtype: torch.dtype, fill: float = 0.0) -> Tensor:
        return query.new_empty(shape, dtype=dtype) if of is None else query.new_full(shape, fill, dtype=dtype)

    lse = new(rows[1::-1], getattr(torch, problem.compute_dtype), -math.inf)
    return new(rows, query.dtype), lse, [new(shape, getattr(torch, dtype)) for shape, dtype in kept]


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, problem, chosen, packed = _describe(args)
    out, lse, d_out, d_lse, kept = args[_N + _M :]
    nothing = lse.new_empty(0)
    if _is_empty(call, problem):
        arrays = (call.query, call.key, call.value, call.beta)
        dq, dk, dv, dbeta = (nothing if x is None else torch.zeros_like(x) for x in arrays)
        return dq, dk, dv, dbeta
    residual = tuple(kept) if len(kept) > 1 else kept[0] if kept else None
    with quiet():
        if packed:
            from . import packed as kernels

            state = Forward(out, lse, residual)
            found = kernels.backward(kernels.prepare(problem, *call[:5]), state, d_out, d_lse)
            dq, dk, dv = (g.to(call.query.dtype) for g in found)
            return dq, dk, dv, nothing
        inputs, queries, keys = _pad(problem, call)
        state = Forward(queries.pad(out), queries.pad(lse.T, -math.inf), residual)
        do, dl = queries.pad(d_out), None if d_lse is None else queries.pad(d_lse.T)
        gradients = chosen.backward(_padded(problem), inputs, state, do, dl)
        dq, dk, dv = (rows.pack(g).contiguous() for rows, g in zip((queries, keys, keys), gradients[:3], strict=True))
        return dq, dk, dv, nothing if gradients.beta is None else gradients.beta.contiguous()


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    query, key, value, _, _, beta = args[:_N]
    lse = args[_N + _M + 1]
    return tuple(lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in (query, key, value, beta))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    out, lse, kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_N], out, lse, *kept)
    ctx.options = inputs[_N:]


def _autograd(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    rest = (None,) * (_N + _M - 3)
    if d_out is None and d_lse is None:
        return (None, None, None, *rest)
    saved = ctx.saved_tensors
    arrays, (out, lse), kept = saved[:_N], saved[_N : _N + 2], list(saved[_N + 2 :])
    d_out = torch.zeros_like(out) if d_out is None else d_out
    plain = not torch.is_grad_enabled() and _is_plain((*saved, d_out, d_lse))
    backward = _backward if plain else torch.ops.laser_attention.varlen_backward
    dq, dk, dv, dbeta = backward(*arrays, *ctx.options, out, lse, d_out, d_lse, kept)
    return (dq, dk, dv, None, None, None if arrays[5] is None else dbeta, *(None for _ in ctx.options))


class _Direct(torch.autograd.Function):
    """The same without the operators, where torch neither traces nor watches."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        found = _forward(*args)
        _setup_context(ctx, args, found)
        return found[:2]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the arrays."""
        return _autograd(ctx, d_out, d_lse)


forward_operator = _define(
    "varlen_forward", f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor[])", _forward, _forward_fake
)
backward_operator = _define(
    "varlen_backward",
    f"({_TENSORS}, {_OPTIONS}, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, Tensor[] kept)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
forward_operator.register_autograd(_autograd, setup_context=_setup_context)
backward_operator.register_autograd(_second_order)
