"""LASER attention as torch operators: autograd, torch.compile, vmap, around any backend that takes torch tensors.

Two operators, ``laser_attention::forward`` and ``laser_attention::backward``, are all that torch sees. Inside them,
where nothing is traced, the call is described anew and a backend is chosen, so that tracing never meets the registry.
The gradient is of first order. A backend named explicitly that torch itself can differentiate (``reference``) is called
directly instead, and has derivatives of every order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from laser_core import Forward, Inputs, Problem, Unsupported, _problem, _registry


def attention(problem: Problem, inputs: Inputs, backend: str | Sequence[str] | None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, differentiable by torch."""
    query, key, value = autocast(*inputs[:3])
    if query is not inputs.query:
        problem = dataclasses.replace(problem, dtype=str(query.dtype).rpartition(".")[2])
    inputs = inputs._replace(query=query, key=key, value=value)
    if isinstance(backend, str) and _is_native(backend):
        if not torch.compiler.is_compiling():
            _registry.select(problem, backend)  # says why, where it cannot run
        with torch.autocast(query.device.type, enabled=False):
            out, lse, _ = _native[backend](problem, inputs)
        return out, lse
    names = None if backend is None else [backend] if isinstance(backend, str) else list(backend)
    run: Any = torch.ops.laser_attention.forward if torch.compiler.is_compiling() else _Attention.apply
    out, lse, _ = run(
        *inputs,
        problem.scale,
        problem.beta,
        problem.causal,
        *problem.window,
        problem.logits_soft_cap,
        problem.return_lse,
        None if names is None else ",".join(names),
    )
    return out, lse


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which torch records nothing, and computes in the dtypes that it is given."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under ``torch.autocast`` the three in its dtype, as torch's own attention takes them; float64 stays."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    return query, key, value


_native: dict[str, Callable[[Problem, Inputs], Forward]] = {}  # a plain table: torch.compile reads through it


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_native(name: str) -> bool:
    backend = _registry.named(name)[0]
    if backend.native:
        _native[name] = backend.forward
    return backend.native


# -------------------------------------------------------------------------------------------------------- operators

_ARRAYS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? bias, Tensor? beta, "
    "Tensor? query_seq_lengths, Tensor? key_value_seq_lengths"
)
_OPTIONS = (
    "float scale, float? beta_number, str? causal, SymInt? left, SymInt? right, float? logits_soft_cap, "
    "bool return_lse, str? backend"
)
_N = len(Inputs._fields)


def _describe(arrays: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Problem, Inputs, _registry.Backend]:
    """The call that an operator stands for, and the backend that runs it."""
    query, key, value, attn_mask, bias, beta, query_lengths, key_value_lengths = arrays
    scale, beta_number, causal, left, right, cap, return_lse, backend = options
    problem, inputs = _problem.describe(
        query,
        key,
        value,
        attn_mask,
        bias,
        scale=scale,
        beta=beta_number if beta is None else beta,
        is_causal=causal or False,
        window_size=(left, right),
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_value_lengths,
        logits_soft_cap=cap,
        return_lse=return_lse,
    )
    names = None if backend is None else backend.split(",") if backend else []
    return problem, inputs, _registry.select(problem, names)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, inputs, chosen = _describe(args[:_N], args[_N:])
    with quiet():
        out, lse, residual = chosen.forward(problem, inputs)
    return out.contiguous(), lse.contiguous(), out.new_empty(0) if residual is None else residual.contiguous()


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem, inputs, chosen = _describe(args[:_N], args[_N:])
    q, residual = inputs.query, chosen.residual_dtype(problem)
    return (
        q.new_empty(problem.out_shape),
        q.new_empty(problem.lse_shape, dtype=getattr(torch, problem.compute_dtype)),
        q.new_empty(0) if residual is None else q.new_empty(problem.out_shape, dtype=getattr(torch, residual)),
    )


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arrays, (out, lse, residual, d_out, d_lse), options = args[:_N], args[_N : _N + 5], args[_N + 5 :]
    problem, inputs, chosen = _describe(arrays, options)
    has_residual = chosen.residual_dtype(problem) is not None
    with quiet():
        kept = Forward(out, lse, residual if has_residual else None)
        gradients = chosen.backward(problem, inputs, kept, d_out, d_lse)
    dq, dk, dv, dbias, dbeta = (lse.new_empty(0) if g is None else g.contiguous() for g in gradients)
    return dq, dk, dv, dbias, dbeta


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    query, key, value, _, bias, beta = args[:6]
    lse = args[_N + 1]
    return tuple(lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in (query, key, value, bias, beta))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_N], *output)
    ctx.options = inputs[_N:]


def _autograd(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, d_residual: Tensor | None) -> tuple[Any, ...]:
    if d_out is None and d_lse is None:
        return (None,) * (_N + len(ctx.options))
    saved = ctx.saved_tensors
    arrays, out = saved[:_N], saved[_N]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    run: Any = torch.ops.laser_attention.backward if torch.compiler.is_compiling() else _Gradient.apply
    dq, dk, dv, dbias, dbeta = run(*saved, d_out, d_lse, *ctx.options)
    gradients = (dq, dk, dv, None, None if arrays[4] is None else dbias, None if arrays[5] is None else dbeta)
    return tuple(
        g if needed else None
        for g, needed in zip((*gradients, None, None, *(None for _ in ctx.options)), ctx.needs_input_grad, strict=True)
    )


def _second_order(ctx: Any, *_: Tensor | None) -> tuple[Any, ...]:
    raise Unsupported(
        "the analytic gradient of LASER attention is of first order only; "
        'backend="reference" is differentiable to any order'
    )


class _Attention(torch.autograd.Function):
    """The forward operator for torch.func, whose transforms know this class but not what operators register."""

    generate_vmap_rule = True
    forward = staticmethod(lambda *args: torch.ops.laser_attention.forward(*args))
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)


class _Gradient(torch.autograd.Function):
    """The backward operator, likewise."""

    generate_vmap_rule = True
    forward = staticmethod(lambda *args: torch.ops.laser_attention.backward(*args))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_second_order)


def _vmap(operator: Any, outputs: int, expand_all: bool) -> Callable[..., Any]:
    """A batching rule: the new dimension becomes one more leading batch dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, ...]:
        size = info.batch_size
        if in_dims[5] is not None or (args[5] is not None and expand_all):
            return _one_by_one(operator, size, in_dims, args)
        batched = [x if d is None else x.movedim(d, 0) for x, d in zip(args, in_dims, strict=True)]
        rank = args[0].ndim - (in_dims[0] is not None)
        for i, (x, d) in enumerate(zip(batched, in_dims, strict=True)):
            if not isinstance(x, Tensor) or i == 5:
                continue
            broadcasts = 3 <= i < _N
            if d is None and (not broadcasts or (expand_all and i == 4)):
                x, d = x.expand(size, *x.shape), 0
            if d is not None and broadcasts:  # mask, bias and lengths align with the right end of the batch
                full = rank if i < 6 else rank - 3
                x = x.reshape(size, *(1,) * (full - (x.ndim - 1)), *x.shape[1:])
            batched[i] = x
        results = list(operator(*batched))
        if expand_all and args[4] is not None:
            shape = args[4].shape if in_dims[4] is None else args[4].movedim(in_dims[4], 0).shape[1:]
            results[3] = results[3].reshape(size, *shape)
        return tuple(results), tuple(None if r.ndim == 1 and r.numel() == 0 else 0 for r in results)

    return rule


def _one_by_one(operator: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """β has no batch dimensions: a batch of them is as many calls."""
    calls = [
        operator(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True))) for i in range(size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return results, (0,) * len(results)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(f"laser_attention::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_STATE = "Tensor out, Tensor lse, Tensor residual, Tensor d_out, Tensor? d_lse"
forward_operator = _define("forward", f"({_ARRAYS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
backward_operator = _define(
    "backward",
    f"({_ARRAYS}, {_STATE}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
forward_operator.register_autograd(_autograd, setup_context=_setup_context)
backward_operator.register_autograd(_second_order)
forward_operator.register_vmap(_vmap(forward_operator, 3, expand_all=False))
backward_operator.register_vmap(_vmap(backward_operator, 5, expand_all=True))


@register_flop_formula(torch.ops.laser_attention.forward)
def _forward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products, q·kᵀ and p·x, hidden keys included: as torch counts its own attention."""
    return _products(query, key, value, 1, 1)


@register_flop_formula(torch.ops.laser_attention.backward)
def _backward_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Five products: q·kᵀ once more, g·xᵀ, pᵀ·g, ds·k, dsᵀ·q."""
    return _products(query, key, value, 3, 2)


def _products(query: Any, key: Any, value: Any, over_d: int, over_e: int) -> int:
    *rows, d = (int(n) for n in query)
    return 2 * math.prod(rows) * int(key[-2]) * (over_d * d + over_e * int(value[-1]))
