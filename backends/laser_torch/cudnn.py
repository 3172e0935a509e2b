"""The published recipe on cuDNN's softmax attention, with X for exp(v) and guarded by the flags of the value pass.

It rounds p·X to bfloat16 before the logarithm: one more unit of rounding, which the error bound of o has room for, but
Σ_j w_ij = 1 has not. So it computes outputs of which no gradient is asked. In float16, whose exponents p needs for
itself, it would leave the bound.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laser_core import Problem

from . import causal

WIDEST = 128  # of cuDNN's kernels for every architecture


def why_not(problem: Problem) -> str | None:
    """Why cuDNN does not serve a problem, from its description alone; None if it does."""
    if problem.gradient:
        return "a gradient may be asked for: p·X rounded by cuDNN has no weights that sum to one"
    if problem.dtype != "bfloat16":
        return f"dtype {problem.dtype}: the recipe on cuDNN holds its error bound in bfloat16 alone"
    if max(problem.head_dim, problem.value_dim) > WIDEST or problem.head_dim % 8 or problem.value_dim % 8:
        return f"D = {problem.head_dim}, E = {problem.value_dim}: cuDNN takes multiples of 8 up to {WIDEST}"
    if 0 in problem.score_shape:
        return "an empty problem: there is nothing to launch"
    if problem.scale <= 0:
        return f"scale = {problem.scale}: cuDNN's kernels are made for scale > 0"
    for name in ("mask_shape", "bias_shape", "logits_soft_cap"):
        if getattr(problem, name) is not None:
            return f"{name.removesuffix('_shape')}: not on cuDNN"
    if problem.query_lengths or problem.key_value_lengths:
        return "sequence lengths: not on cuDNN"
    if causal(problem) is None:
        return "is_causal and window_size: cuDNN knows causality from the top left alone"
    return None


def missing(device: torch.device) -> str | None:
    """What a device or its software lacks; None if nothing."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] < 8:
        return "cuDNN's attention needs an NVIDIA GPU of compute capability 8.0 or later"
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch has no cuDNN"
    return None


def attention(problem: Problem, q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """p·X, ``(B, Hq, Lq, E)`` in the dtype of X, and the log-sum-exp, ``(B, Hq, Lq)``, by cuDNN.

    Args:
        problem: That is served.
        q: (B, Hq, Lq, D).
        k: (B, Hkv, Lk, D).
        x: (B, Hkv, Lk, E), finite.
    """
    run: Any = torch.ops.aten._scaled_dot_product_cudnn_attention
    a, l, *_ = run(q, k, x, None, True, 0.0, bool(causal(problem)), False, scale=problem.scale)
    return a, l.view(math.prod(problem.batch), problem.query_heads, problem.query_length)
