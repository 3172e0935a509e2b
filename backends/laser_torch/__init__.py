"""LASER attention for torch: the records of its backends. Importing this does not import torch."""

from __future__ import annotations

import importlib
import math
import os
from typing import TYPE_CHECKING, Any

from laser_core import Backend, Problem, deferred, unrounded_output
from laser_core._registry import Kept

if TYPE_CHECKING:
    from .functional import scaled_dot_product_attention as scaled_dot_product_attention
    from .paged import laser_attention_paged as laser_attention_paged
    from .varlen import laser_attention_varlen as laser_attention_varlen

_FUNCTIONS = {
    "laser_attention_paged": "paged",
    "laser_attention_varlen": "varlen",
    "scaled_dot_product_attention": "functional",
}  # public functions, in modules that import torch
MASK_BYTES = 2**28  # the additive mask that torch's kernel wants may take this much


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FUNCTIONS[name]}", __name__), name)


def causal(problem: Problem) -> bool | None:
    """Whether the band of a problem is causality from the top left (True) or hides nothing (False); else None."""
    low, high = problem.band
    if low is not None and low > 1 - problem.query_length:
        return None
    if high is None or high >= problem.key_length - 1:
        return False
    return True if high == 0 else None


def mask_shape(problem: Problem) -> tuple[int, ...] | None:
    """The shape of the mask that attn_mask and the key lengths make together, batch folded; None without one."""
    if problem.mask_shape is None and not problem.key_value_lengths:
        return None
    shape = problem.mask_shape or ()
    shape = (1,) * (len(problem.score_shape) - len(shape)) + shape
    own_batch = problem.key_value_lengths or any(n != 1 for n in shape[:-3])
    return (math.prod(problem.batch) if own_batch else 1, shape[-3], shape[-2], problem.key_length)


def _why_not(problem: Problem) -> str | None:
    if problem.beta is None:
        return "beta is an array: its channels may need both transformations of the values (supported: a number)"
    if 0 < abs(problem.beta) < 1:
        return f"beta = {problem.beta}: its expm1 form needs more columns (supported: 0, or |beta| ≥ 1)"
    if problem.bias_shape is not None:
        return "bias: torch's kernel returns no gradient for it"
    if problem.logits_soft_cap is not None:
        return "logits_soft_cap: torch's kernel has none"
    if causal(problem) is None:
        return "is_causal and window_size: torch's kernel knows causality from the top left alone"
    if causal(problem) and problem.scale <= 0:
        return f"scale = {problem.scale} and is_causal: torch's kernel scales −∞, too (supported: scale > 0)"
    shape = mask_shape(problem)
    if shape is not None and 8 * math.prod(shape) > MASK_BYTES:
        return f"attn_mask and lengths: the additive mask of shape {shape} would take over {MASK_BYTES >> 20} MiB"
    return None


SDPA = Backend(
    name="torch-sdpa",
    summary="torch's own flash attention on exponentiated values; heads outside the fast range take the exact path",
    forward=deferred("laser_torch.sdpa:forward"),
    backward=deferred("laser_torch.sdpa:backward"),
    frameworks=("torch",),
    devices=("cpu",),  # elsewhere torch cannot branch on the device: the exact path would need a host round trip
    requires=("torch",),
    why_not=_why_not,
    priority=lambda problem: 30,
    residual=unrounded_output,
)


INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton on the CPU: for tests
WIDEST = 256  # head and value dims of the Triton kernels
DECODE_QUERIES = 16


def _triton_residual(problem: Problem) -> Kept:
    """The low half of the output, which a half-precision dtype has no room for; c and the flags of heads for Hopper."""
    from . import hopper

    kept: Kept = () if problem.dtype == "float32" else ((problem.out_shape, "int16"),)
    if hopper.why_not(problem) is not None:
        return kept
    heads = (*problem.batch, problem.key_value_heads)
    return (*kept, ((*heads, problem.value_dim), "int32"), (heads, "int32"))


def _triton_why_not(problem: Problem) -> str | None:
    if problem.beta is None:
        return "beta is an array: its channels may need both transformations of the values (supported: a number)"
    if 0 < abs(problem.beta) < 1:
        return f"beta = {problem.beta}: its expm1 form needs more columns (supported: 0, or |beta| ≥ 1)"
    if problem.dtype == "float32" and problem.bias_shape is not None and problem.gradient:
        return "bias in float32 with a gradient: weights from a log-sum-exp of thousands have no more than four digits"
    if max(problem.head_dim, problem.value_dim) > WIDEST:
        return f"head dim D = {problem.head_dim}, value dim E = {problem.value_dim} (supported: 1 to {WIDEST})"
    if max(problem.query_length, problem.key_length) > 2**30:
        return f"Lq = {problem.query_length}, Lk = {problem.key_length}: positions are 32-bit (supported: up to 2³⁰)"
    return None


def _how(problem: Problem) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    from . import engines

    return engines.how(problem)


TRITON = Backend(
    name="torch-triton",
    summary="fused kernels in Triton: a flash kernel on exponentiated values, an exact one outside the fast range",
    forward=deferred("laser_torch.fused:forward"),
    backward=deferred("laser_torch.fused_backward:backward"),
    frameworks=("torch",),
    devices=("cuda", "cpu") if INTERPRETING else ("cuda",),
    dtypes=("float16", "bfloat16", "float32"),
    requires=("torch", "triton"),
    why_not=_triton_why_not,
    priority=lambda problem: 40 if problem.device == "cuda" else 0,
    how=_how,
    residual=_triton_residual,
)


def _decode_why_not(problem: Problem) -> str | None:
    if problem.query_length > DECODE_QUERIES:
        return f"{problem.query_length} queries: it is for decoding (supported: Lq ≤ {DECODE_QUERIES})"
    return _triton_why_not(problem)


def _decode_priority(problem: Problem) -> int:
    if problem.device != "cuda":
        return -10  # Triton's interpreter is for tests
    return 60 if problem.key_length >= 512 else 5


DECODE = Backend(
    name="torch-decode",
    summary="Triton, for few queries against a long cache: split over keys, merged in the log domain",
    forward=deferred("laser_torch.decode:forward"),
    backward=deferred("laser_torch.fused_backward:backward"),
    frameworks=("torch",),
    devices=("cuda", "cpu") if INTERPRETING else ("cuda",),
    dtypes=("float16", "bfloat16", "float32"),
    requires=("torch", "triton"),
    why_not=_decode_why_not,
    priority=_decode_priority,
    residual=unrounded_output,
)
