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
Saved: TypeAlias = tuple[Inputs, Forward]


def attention(problem: Problem, inputs: Inputs, backend: str | Sequence[str] | None) -> tuple[Array, Array]:
    """Output and log-sum-exp, with the analytic gradient unless the backend leaves differentiation to JAX."""
    chosen = _registry.select(problem, backend)
    split = partition.by_types(problem, inputs, lambda problem, inputs: attention(problem, inputs, backend))
    if split is not None:
        return split
    inputs = tiles.vary(inputs, inputs)  # so that shard_map sums what belongs to a replicated argument
    if chosen.native:
        with quiet():
            out, lse, _ = chosen.forward(problem, inputs)
        return out, lse
    alone = dataclasses.replace(problem, gradient=False)  # the fastest engine without a gradient may be another one
    steps = Step(alone, _registry.select(alone, backend)), Step(problem, chosen)
    result: tuple[Array, Array] = _attention(*steps, inputs)
    return result


def quiet() -> AbstractContextManager[object]:
    """Products of float32 in float32, which XLA rounds to less on GPU and TPU, unless the user has set a precision."""
    chosen = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return nullcontext() if chosen is not None else jax.default_matmul_precision("highest")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(alone: Step, step: Step, inputs: Inputs) -> tuple[Array, Array]:
    """By ``alone``, or by ``step`` where it is differentiated."""
    return _forward(step, alone, inputs)[0]


def _forward(_: Step, step: Step, inputs: Inputs) -> tuple[tuple[Array, Array], Saved]:
    with quiet():
        done = _run(step, Operands(inputs))
    return (done.out, done.lse), (inputs, done)


def _backward(_: Step, step: Step, saved: Saved, cotangents: tuple[Array, Array]) -> tuple[Inputs]:
    inputs, done = saved
    d_out, d_lse = cotangents
    with quiet():
        gradients = _run(step, Operands(inputs, done, d_out, d_lse if step.problem.return_lse else None))
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
