"""JAX: the analytic gradient as a ``custom_vjp``, under jit, grad, vmap, checkpoint, export and sharding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import jax

from laser_core import Forward, Inputs, Problem, Unsupported, _registry

from . import partition, tiles
from .partition import Operands, Step

Array: TypeAlias = jax.Array
Asked: TypeAlias = str | tuple[str, ...] | None  # backends by name
Saved: TypeAlias = tuple[Inputs, Forward]


def attention(problem: Problem, inputs: Inputs, backend: str | Sequence[str] | None) -> tuple[Array, Array]:
    """Output and log-sum-exp, with the analytic gradient unless the backend leaves differentiation to JAX."""
    if backend is None and not all(isinstance(n, int) for n in problem.batch):
        backend = "jax-xla"  # exported for any batch; the others compare sizes, or compile for them
    chosen = _registry.select(_alone(problem), backend)
    split = partition.by_types(problem, inputs, lambda problem, inputs: attention(problem, inputs, backend))
    if split is not None:
        return split
    inputs = tiles.vary(inputs, inputs)  # so that shard_map sums what belongs to a replicated argument
    if chosen.native:
        with quiet():
            out, lse, _ = chosen.forward(problem, inputs)
        return out, lse
    asked = backend if backend is None or isinstance(backend, str) else tuple(backend)
    result: tuple[Array, Array] = _attention(problem, asked, inputs)
    return result


def _alone(problem: Problem) -> Problem:
    """Without a gradient: the engine may be another one."""
    return dataclasses.replace(problem, gradient=False)


def quiet() -> AbstractContextManager[object]:
    """Products of float32 in float32, which XLA rounds to less on GPU and TPU, unless the user has set a precision."""
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return nullcontext() if chosen is not None else jax.default_matmul_precision("highest")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(problem: Problem, asked: Asked, inputs: Inputs) -> tuple[Array, Array]:
    return _forward(_alone(problem), asked, inputs)[0]


def _forward(problem: Problem, asked: Asked, inputs: Inputs) -> tuple[tuple[Array, Array], Saved]:
    with quiet():
        done = _run(Step(problem, _registry.select(problem, asked)), Operands(inputs))
    return (done.out, done.lse), (inputs, done)


def _backward(problem: Problem, asked: Asked, saved: Saved, cotangents: tuple[Array, Array]) -> tuple[Inputs]:
    inputs, done = saved
    d_out, d_lse = cotangents
    with quiet():
        operands = Operands(inputs, done, d_out, d_lse if problem.return_lse else None)
        gradients = _run(Step(problem, _registry.select(problem, asked)), operands)
    none = Inputs(*(None,) * len(Inputs._fields))
    return (none._replace(**gradients._asdict()),)  # None: masks and lengths have no cotangent


_attention.defvjp(_forward, _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(step: Step, operands: Operands) -> Any:
    """The pass, which says so when it is differentiated itself."""
    return partition.run(step, operands)


@_run.defjvp
def _refuse(step: Step, *_: Any) -> Any:
    raise Unsupported(
        f"backend {step.backend.name!r}: its gradient is analytic and of first order, and a derivative of it was asked "
        "for; backend='reference' is differentiable to any order"
    )
