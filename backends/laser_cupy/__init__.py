"""LASER attention in CUDA C++ through CuPy: the record of its backend. Importing this needs neither CuPy nor a driver.

The kernels are the ``.cu`` files beside this one, compiled at run time: ``hardware`` (what they ask of a GPU),
``common``, ``values`` (the value pass), ``forward`` and ``backward``, and both again as ``…_exact``, for heads outside
the fast range. ``host`` launches them, on CuPy arrays through ``cuda``, and on NumPy arrays through ``emulated``: the
same source on a CPU.
"""

from __future__ import annotations

from laser_core import Backend, Forward, Gradients, Inputs, Problem, unrounded_output
from laser_core._array import Array

LARGEST_DIM = 128
LONGEST = 2**30 - 2**10  # positions are 32-bit integers, and so is their sum with the edge of a band


def _forward(problem: Problem, inputs: Inputs) -> Forward:
    from . import cuda

    return cuda.forward(problem, inputs)


def _backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    from . import cuda

    return cuda.backward(problem, inputs, forward, d_out, d_lse)


def why_not(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem, or None."""
    if problem.beta is None:
        return "beta is an array: its channels may need both transformations of the values (supported: a number)"
    if abs(problem.beta) < 1:
        return f"beta = {problem.beta}: the kernels have no expm1 form (supported: |beta| ≥ 1)"
    if problem.bias_shape is not None:
        return "bias: the kernels add none, and have no gradient for it"
    for name, size in (("head dim D", problem.head_dim), ("value dim E", problem.value_dim)):
        if size > LARGEST_DIM:
            return f"{name} = {size} (supported: up to {LARGEST_DIM})"
    for name, size in (("Lq", problem.query_length), ("Lk", problem.key_length)):
        if size > LONGEST:
            return f"{name} = {size} (supported: up to {LONGEST})"
    return None


CUDA = Backend(
    name="cupy-cuda",
    summary="CUDA C++ for every GPU from sm_80 on; heads outside the fast range take an exact kernel in the same call",
    forward=_forward,
    backward=_backward,
    frameworks=("cupy",),
    devices=("cuda",),
    dtypes=("float16", "bfloat16"),
    requires=("cupy",),
    why_not=why_not,
    priority=lambda problem: 30,
    residual=unrounded_output,
)
