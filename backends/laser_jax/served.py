"""What the engines for NVIDIA GPUs serve; JAX need not be there to ask."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from importlib.metadata import version
from typing import Any

from laser_core import Problem

WIDTHS = (64, 128)  # of the kernels' tiles; narrower heads are padded
INTERPRETING = os.environ.get("LASER_MOSAIC_INTERPRET", "0") == "1"  # on the CPU, by JAX's interpreter: for tests


def why_not(problem: Problem) -> str | None:
    """Why the kernels do not serve a problem, from its description alone; None if they do."""
    if problem.beta is None:
        return "beta is an array: its channels may need both transformations of the values (supported: a number)"
    if abs(problem.beta) < 1:
        return f"beta = {problem.beta}: its expm1 form needs more columns (supported: |beta| ≥ 1)"
    if max(problem.head_dim, problem.value_dim) > WIDTHS[-1]:
        return f"head dim D = {problem.head_dim}, value dim E = {problem.value_dim} (supported: 1 to {WIDTHS[-1]})"
    if problem.scale <= 0:
        return f"scale = {problem.scale}: the kernel's row maximum needs scale > 0"
    for name in ("mask_shape", "bias_shape", "logits_soft_cap"):
        if getattr(problem, name) is not None:
            return f"{name.removesuffix('_shape')}: the kernel has none"
    if problem.query_lengths or problem.key_value_lengths:
        return "sequence lengths: the kernel has none"
    low, _ = problem.band
    if low is not None and low > 1 - problem.query_length:
        return "window_size: the kernel knows no left bound"
    if max(problem.query_length, problem.key_length) >= 2**24:
        return "lengths of 2^24 and more: the kernel counts rows in 32 bits"
    return None


def missing() -> str | None:
    """What this installation lacks for the kernels."""
    if importlib.util.find_spec("jax") is None:
        return "needs jax, which is not installed"
    if tuple(int(part) for part in version("jax").split(".")[:2]) < (0, 11):
        return f"needs jax 0.11 or later for its Mosaic GPU kernels; {version('jax')} is installed"
    return None


def wrong_device() -> str | None:
    """Why the GPUs that JAX has found cannot run the kernels; None where they can, or none has been looked for."""
    found = capability()
    return None if found in (None, (9, 0)) else f"GPU of compute capability {_dotted(found)} (supported: 9.0, Hopper)"


def cudnn_why_not(problem: Problem) -> str | None:
    """Why cuDNN does not serve a problem, from its description alone; None if it does."""
    if causal_offset(problem) not in (None, 0):
        return "is_causal and window_size: cuDNN knows causality from the top left alone"
    return why_not(problem)


def cudnn_wrong_device() -> str | None:
    """As :func:`wrong_device`, for cuDNN's attention."""
    found = capability()
    if found is None or found >= (8, 0):
        return None
    return f"GPU of compute capability {_dotted(found)} (supported: 8.0 and later)"


def gpu() -> Any:
    """The GPU that JAX has found; None where there is none, or none has been looked for."""
    jax = sys.modules.get("jax")
    return jax.devices()[0] if jax is not None and jax.default_backend() == "gpu" else None


def capability() -> tuple[int, ...] | None:
    """Its compute capability, () where it has no such number; None without a GPU."""
    device = gpu()
    if device is None:
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return () if found is None else tuple(map(int, found.groups()))


def _dotted(found: tuple[int, ...] | None) -> str:
    return ".".join(map(str, found or ("unknown",)))


def causal_offset(problem: Problem) -> int | None:
    """Query i of a problem that is served sees the keys ≤ i + offset; None: all keys."""
    high = problem.band[1]
    return None if high is None or high >= problem.key_length - 1 else max(high, -problem.query_length)
