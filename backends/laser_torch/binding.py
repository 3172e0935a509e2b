"""LASER attention as torch operators: autograd, torch.compile, vmap, around any backend that takes torch tensors.

Two operators, ``laser_attention::forward`` and ``laser_attention::backward``, are all that torch sees where it traces,
transforms or watches a call. Inside them the call is described anew and a backend is chosen, so that tracing never
meets the registry. Where nothing of that is going on, the backend is called without them, which takes half the time.
The gradient is of first order. A backend named explicitly that torch itself can differentiate (``reference``) is called
directly instead, and has derivatives of every order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from laser_core import Backend, Forward, Gradients, Inputs, Problem, Unsupported, _problem, _registry


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
    gradient = _may_differentiate(inputs)
    if _is_plain(inputs):
        if not gradient:
            problem = _without_gradient(problem)
        chosen = _registry.select(problem, backend)
        if gradient:
            out, lse = _Direct.apply(problem, chosen, *inputs)  # type: ignore[no-untyped-call]
        else:
            out, lse, _ = _run_forward(problem, inputs, chosen)
        return out, lse
    names = None if backend is None else [backend] if isinstance(backend, str) else list(backend)
    run: Any = torch.ops.laser_attention.forward if torch.compiler.is_compiling() else _Attention.apply
    out, lse, *_ = run(*inputs, *_options(problem, gradient, None if names is None else ",".join(names)))
    return out, lse


def _may_differentiate(inputs: Inputs) -> bool:
    if not torch.is_grad_enabled():
        return False
    wrapped = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return wrapped or any(x is not None and x.requires_grad for x in inputs)


@functools.lru_cache(maxsize=1024)
def _without_gradient(problem: Problem) -> Problem:
    return dataclasses.replace(problem, gradient=False)


def _is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch neither traces, nor transforms, nor watches what is done to these tensors."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and all(x is None or type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
    )


def quiet() -> AbstractContextManager[Any]:
    """A context in which torch records nothing, and computes in the dtypes that it is given."""
    stack = ExitStack()
    if torch.is_grad_enabled():
        stack.enter_context(torch.no_grad())
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


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
    "bool return_lse, bool gradient, str? backend"
)
_N = len(Inputs._fields)
_Kept = tuple[Tensor, ...]  # what a backend has left in ``Forward.residual``


def _options(problem: Problem, gradient: bool, names: str | None) -> tuple[Any, ...]:
    """The options of an operator."""
    p = problem
    return (p.scale, p.beta, p.causal, *p.window, p.logits_soft_cap, p.return_lse, gradient, names)


def _describe(arrays: Sequence[Tensor | None], options: Sequence[Any]) -> tuple[Problem, Inputs, Backend]:
    """The call that an operator stands for, and the backend that runs it."""
    query, key, value, attn_mask, bias, beta, query_lengths, key_value_lengths = arrays
    scale, beta_number, causal, left, right, cap, return_lse, gradient, backend = options
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
    problem = dataclasses.replace(problem, gradient=gradient)
    return problem, inputs, _registry.select(problem, names)


def _run_forward(problem: Problem, inputs: Inputs, chosen: Backend) -> tuple[Tensor, Tensor, _Kept]:
    with quiet():
        out, lse, residual = chosen.forward(problem, inputs)
    kept = () if residual is None or not problem.gradient else residual if isinstance(residual, tuple) else (residual,)
    return out.contiguous(), lse.contiguous(), tuple(x.contiguous() for x in kept)


def _run_backward(
    problem: Problem, inputs: Inputs, chosen: Backend, state: tuple[Tensor, Tensor, _Kept],
    d_out: Tensor, d_lse: Tensor | None,
) -> Gradients:  # fmt: skip
    out, lse, kept = state
    residual = kept if len(kept) > 1 else kept[0] if kept else None
    with quiet():
        return chosen.backward(problem, inputs, Forward(out, lse, residual), d_out, d_lse)


def _forward(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    out, lse, kept = _run_forward(*_describe(args[:_N], args[_N:]))
    return out, lse, list(kept)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    problem, inputs, chosen = _describe(args[:_N], args[_N:])
    q = inputs.query
    kept = chosen.residual(problem) if problem.gradient else ()
    return (
        q.new_empty(problem.out_shape),
        q.new_empty(problem.lse_shape, dtype=getattr(torch, problem.compute_dtype)),
        [q.new_empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in kept],
    )


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arrays, (out, lse, d_out, d_lse), options, kept = args[:_N], args[_N : _N + 4], args[_N + 4 : -1], args[-1]
    gradients = _run_backward(*_describe(arrays, options), (out, lse, tuple(kept)), d_out, d_lse)
    dq, dk, dv, dbias, dbeta = (lse.new_empty(0) if g is None else g.contiguous() for g in gradients)
    return dq, dk, dv, dbias, dbeta


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    query, key, value, _, bias, beta = args[:6]
    lse = args[_N + 1]
    return tuple(lse.new_empty(0) if x is None else x.new_empty(x.shape) for x in (query, key, value, bias, beta))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    out, lse, *kept = output
    if kept and isinstance(kept[0], list):
        kept = kept[0]  # of the operator; the class below returns one by one
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_N], out, lse, *kept)
    ctx.options = inputs[_N:]


def _autograd(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_out is None and d_lse is None:
        return (None,) * (_N + len(ctx.options))
    saved = ctx.saved_tensors
    arrays, (out, lse), kept = saved[:_N], saved[_N : _N + 2], saved[_N + 2 :]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    given = (*arrays, out, lse, d_out, d_lse, *ctx.options)
    if torch.compiler.is_compiling():
        gradients = torch.ops.laser_attention.backward(*given, list(kept))
    else:
        gradients = _Gradient.apply(*given, *kept)  # type: ignore[no-untyped-call]
    return (*_wanted(arrays, gradients, ctx.needs_input_grad), *(None for _ in ctx.options))


def _wanted(arrays: Sequence[Any], gradients: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients in the order of the inputs, where they are needed and there is such an input."""
    dq, dk, dv, dbias, dbeta = gradients
    ordered = (dq, dk, dv, None, dbias, dbeta, None, None)
    return [g if x is not None and n else None for x, g, n in zip(arrays, ordered, needed, strict=False)]


def _second_order(ctx: Any, *_: Tensor | None) -> tuple[Any, ...]:
    raise Unsupported(
        "the analytic gradient of LASER attention is of first order only; "
        'backend="reference" is differentiable to any order'
    )


def _flat_forward(*args: Any) -> tuple[Tensor, ...]:
    out, lse, kept = torch.ops.laser_attention.forward(*args)
    return (out, lse, *kept)


def _flat_backward(*args: Any) -> tuple[Tensor, ...]:
    fixed = _N + 4 + len(_OPTIONS.split(","))
    gradients: tuple[Tensor, ...] = torch.ops.laser_attention.backward(*args[:fixed], list(args[fixed:]))
    return gradients


class _Attention(torch.autograd.Function):
    """The forward operator for torch.func, whose transforms know this class but not what operators register."""

    generate_vmap_rule = True
    forward = staticmethod(_flat_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_autograd)


class _Gradient(torch.autograd.Function):
    """The backward operator, likewise."""

    generate_vmap_rule = True
    forward = staticmethod(_flat_backward)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_second_order)


class _Direct(torch.autograd.Function):
    """A backend without the operators."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, chosen: Backend, *arrays: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        out, lse, kept = _run_forward(problem, Inputs(*arrays), chosen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arrays, out, lse, *kept)
        ctx.problem, ctx.chosen = problem, chosen
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the arrays."""
        if d_out is None and d_lse is None:
            return (None,) * (2 + _N)
        saved = ctx.saved_tensors
        arrays, (out, lse), kept = saved[:_N], saved[_N : _N + 2], saved[_N + 2 :]
        d_out = torch.zeros_like(out) if d_out is None else d_out
        if not torch.is_grad_enabled() and _is_plain((*saved, d_out, d_lse)):
            state = (out, lse, kept)
            gradients: Any = _run_backward(ctx.problem, Inputs(*arrays), ctx.chosen, state, d_out, d_lse)
        else:  # somebody watches, or wants to differentiate this
            given = (*arrays, out, lse, d_out, d_lse, *_options(ctx.problem, True, ctx.chosen.name))
            gradients = _Gradient.apply(*given, *kept)  # type: ignore[no-untyped-call]
        return (None, None, *_wanted(arrays, gradients, ctx.needs_input_grad[2:]))


def _vmap(operator: Any, expand_all: bool) -> Callable[..., Any]:
    """A batching rule: the new dimension becomes one more leading batch dimension."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, ...]:
        size = info.batch_size
        if in_dims[5] is not None or (args[5] is not None and expand_all):
            return _one_by_one(operator, size, in_dims, args)
        batched = [x if not isinstance(d, int) else x.movedim(d, 0) for x, d in zip(args, in_dims, strict=True)]
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
        if expand_all:  # what was kept is batched: it comes from the forward operator
            batched[-1] = [
                x.expand(size, *x.shape) if d is None else x.movedim(d, 0)
                for x, d in zip(args[-1], in_dims[-1], strict=True)
            ]
        results = list(operator(*batched))
        if expand_all and args[4] is not None:
            shape = args[4].shape if in_dims[4] is None else args[4].movedim(in_dims[4], 0).shape[1:]
            results[3] = results[3].reshape(size, *shape)
        return tuple(results), tuple(_batched(r) for r in results)

    return rule


def _batched(result: Any) -> Any:
    """Where the new dimension of a result is: in front, or nowhere in one that stands for nothing."""
    if isinstance(result, list | tuple):
        return [0 for _ in result]
    return None if result.ndim == 1 and result.numel() == 0 else 0


def _one_by_one(operator: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """β has no batch dimensions: a batch of them is as many calls."""

    def at(i: int, x: Any, d: Any) -> Any:
        if isinstance(x, list | tuple):
            return [at(i, *pair) for pair in zip(x, d, strict=True)]
        return x if d is None else x.select(d, i)

    calls = [operator(*(at(i, x, d) for x, d in zip(args, in_dims, strict=True))) for i in range(size)]
    results = tuple(
        [torch.stack(each) for each in zip(*parts, strict=True)]
        if isinstance(parts[0], list | tuple)
        else torch.stack(parts)
        for parts in zip(*calls, strict=True)
    )
    return results, tuple([0] * len(r) if isinstance(r, list) else 0 for r in results)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(f"laser_attention::{name}", run, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


_STATE = "Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse"
forward_operator = _define("forward", f"({_ARRAYS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor[])", _forward, _forward_fake)
backward_operator = _define(
    "backward",
    f"({_ARRAYS}, {_STATE}, {_OPTIONS}, Tensor[] kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
forward_operator.register_autograd(_autograd, setup_context=_setup_context)
backward_operator.register_autograd(_second_order)
forward_operator.register_vmap(_vmap(forward_operator, expand_all=False))
backward_operator.register_vmap(_vmap(backward_operator, expand_all=True))


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
