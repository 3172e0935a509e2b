"""LASER attention in CUDA C++ through CuPy: the record of its backend. Importing this needs neither CuPy nor a driver.

The kernels are the ``.cu`` files beside this one, compiled at run time: ``hardware`` (what they ask of a GPU),
``float32`` (products of it), ``common``, ``values`` (the value pass), ``forward``, ``rows`` and ``backward``, both
passes again as ``…_exact``, for heads outside the fast range; ``bias`` (gradients of what is broadcast) and
``decode`` (few queries against a long cache). ``host`` and ``decode`` launch them as ``build`` has compiled them, on
CuPy arrays through ``cuda``, and on NumPy arrays through ``emulated``: the same source on a CPU.
On Hopper GPUs ``hopper_passes``, ``hopper_forward`` and ``hopper_backward`` take the place of ``values``, ``rows`` and
the two passes where ``hopper.why_not`` has no objection; ``hopper.cu`` is what they ask of that hardware.
:func:`laser_attention` and :func:`laser_attention_vjp` take torch tensors, JAX arrays and all else on a CUDA device
that speaks DLPack.
"""

from __future__ import annotations

from laser_core import Backend, Problem, deferred, unrounded_output

from .build import LARGEST_DIM, SHARED, Build
from .dlpack import laser_attention, laser_attention_vjp

__all__ = ["CUDA", "laser_attention", "laser_attention_vjp", "why_not"]

LONGEST = 2**30 - 2**10  # positions are 32-bit integers, and so is their sum with the edge of a band


def why_not(problem: Problem) -> str | None:
    """Why the kernels cannot run a problem, or None."""
    for name, size in (("head dim D", problem.head_dim), ("value dim E", problem.value_dim)):
        if size > LARGEST_DIM:
            return f"{name} = {size} (supported: up to {LARGEST_DIM})"
    build = Build.of(problem)
    if build.wide > LARGEST_DIM:
        return (
            f"value dim E = {problem.value_dim} with |beta| < 1 or beta an array (supported: up to {LARGEST_DIM // 2})"
        )
    if build.largest > SHARED:
        dims = f"head dim D = {problem.head_dim} and value dim E = {problem.value_dim} of {problem.dtype}"
        return f"{dims} need {build.largest} bytes of shared memory (supported: up to {SHARED})"
    for name, size in (("Lq", problem.query_length), ("Lk", problem.key_length)):
        if size > LONGEST:
            return f"{name} = {size} (supported: up to {LONGEST})"
    return None


CUDA = Backend(
    name="cupy-cuda",
    summary="CUDA C++ for every GPU from sm_80 on; heads outside the fast range take an exact kernel in the same call",
    forward=deferred("laser_cupy.cuda:forward"),
    backward=deferred("laser_cupy.cuda:backward"),
    frameworks=("cupy",),
    devices=("cuda",),
    dtypes=("float16", "bfloat16", "float32"),
    requires=("cupy",),
    why_not=why_not,
    priority=lambda problem: 30,
    residual=unrounded_output,
)
