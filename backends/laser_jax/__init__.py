"""LASER attention on JAX: the engines' records. JAX itself is imported when the first of them runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from laser_core import Backend, Forward, Gradients, Inputs, Problem, Unsupported, deferred, unrounded_output
from laser_core._array import Array
from laser_core._registry import Kept

from . import engines, served

if TYPE_CHECKING:
    from .functional import attention_fn as attention_fn
    from .functional import dot_product_attention as dot_product_attention


def __getattr__(name: str) -> Any:
    if name not in ("attention_fn", "dot_product_attention"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".functional", __name__), name)


def _dpa_why_not(problem: Problem) -> str | None:
    if problem.bias_shape is not None:
        return "bias: its gradient would need the probabilities, which JAX's function does not return"
    if problem.logits_soft_cap is not None:
        return "logits_soft_cap: JAX's function has none"
    return None


def _mosaic_residual(problem: Problem) -> Kept:
    """What rounding took from the output, the references of the channels, and the flags of the heads."""
    heads = (*problem.batch, problem.key_value_heads)
    return (problem.out_shape, "int8"), ((*heads, problem.value_dim), "float32"), (heads, "int32")


def _cudnn_backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    raise Unsupported("backend 'jax-cudnn': dq of cuDNN's backward pass is not the same bits in every run; it has none")


def _tpu_why_not(problem: Problem) -> str | None:
    if problem.bias_shape is not None:
        return "bias: its gradient is a sum over what it broadcasts along, for which there is no kernel"
    for name, size in (("D", problem.head_dim), ("E", problem.value_dim)):
        if size > 256:
            return f"head dim {name} = {size}: tiles of up to 256 fit into VMEM"
    return None


XLA = Backend(
    name="jax-xla",
    summary="tile loops in lax on every device that XLA serves: every option, exact for all finite inputs, O(L) memory",
    forward=deferred("laser_jax.xla:forward"),
    backward=deferred("laser_jax.xla:backward"),
    frameworks=("jax",),
    requires=("jax",),
    priority=engines.priority("jax-xla", elsewhere=30),
    how=engines.how("jax-xla"),
    residual=unrounded_output,
)

DPA = Backend(
    name="jax-dpa",
    summary="jax.nn.dot_product_attention on exponentiated values; heads outside the fast range take the exact path",
    forward=deferred("laser_jax.dpa:forward"),
    backward=deferred("laser_jax.dpa:backward"),
    frameworks=("jax",),
    dtypes=("float16", "bfloat16", "float32"),  # JAX's function takes the softmax in float32 whatever it is given
    requires=("jax",),
    why_not=_dpa_why_not,
    priority=lambda problem: 15,  # it materialises the scores, and was the slower of the two wherever both were timed
    residual=unrounded_output,
)

MOSAIC = Backend(
    name="jax-mosaic",
    summary="fused kernels in Pallas for NVIDIA Hopper: a flash kernel on exponentiated values, exact where it is not",
    forward=deferred("laser_jax.mosaic:forward"),
    backward=deferred("laser_jax.mosaic:backward"),
    frameworks=("jax",),
    devices=("cuda", "cpu") if served.INTERPRETING else ("cuda",),
    dtypes=("float16", "bfloat16"),
    requires=("jax",),
    why_not=lambda problem: served.missing() or served.why_not(problem) or served.wrong_device(),
    priority=engines.priority("jax-mosaic", elsewhere=-10),  # JAX's interpreter is for tests
    how=engines.how("jax-mosaic"),
    residual=_mosaic_residual,
)

CUDNN = Backend(
    name="jax-cudnn",
    summary="cuDNN's attention on exponentiated values; outputs alone, without gradients",
    forward=deferred("laser_jax.cudnn:forward"),
    backward=_cudnn_backward,
    frameworks=("jax",),
    devices=("cuda",),
    dtypes=("bfloat16",),  # what cuDNN rounds before the logarithm, the error bound has room for in this one alone
    requires=("jax",),
    why_not=lambda problem: served.cudnn_why_not(problem) or served.cudnn_wrong_device(),
    priority=engines.priority("jax-cudnn", elsewhere=0),
    how=engines.how("jax-cudnn"),
)

TPU = Backend(
    name="jax-tpu",
    summary="Pallas kernels for TPUs, forward and backward: compiled for them and interpreted, not yet run",
    forward=deferred("laser_jax.tpu:forward"),
    backward=deferred("laser_jax.tpu:backward"),
    frameworks=("jax",),
    devices=("tpu",),
    dtypes=("bfloat16", "float32"),  # a TPU has no float16
    requires=("jax",),
    why_not=_tpu_why_not,
    priority=lambda problem: 20,  # below jax-xla: the automatic choice is one of what has been measured
    residual=unrounded_output,
)
