"""LASER attention on JAX: the engines' records. JAX itself is imported when the first of them runs."""

from __future__ import annotations

from laser_core import Backend, Forward, Gradients, Inputs, Problem
from laser_core._array import Array


def _residual_dtype(problem: Problem) -> str | None:
    """The output is kept unrounded: the weights w that it normalises must sum to one."""
    return None if problem.dtype == problem.compute_dtype else problem.compute_dtype


def _xla_forward(problem: Problem, inputs: Inputs) -> Forward:
    from . import xla

    done: Forward = xla.forward(problem, inputs)
    return done


def _xla_backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    from . import xla

    gradients: Gradients = xla.backward(problem, inputs, forward, d_out, d_lse)
    return gradients


XLA = Backend(
    name="jax-xla",
    summary="tile loops in lax on every device that XLA serves: every option, exact for all finite inputs, O(L) memory",
    forward=_xla_forward,
    backward=_xla_backward,
    frameworks=("jax",),
    requires=("jax",),
    priority=lambda problem: 30,
    residual_dtype=_residual_dtype,
)
