"""LASER attention (arXiv 2411.03493): the definition, its analytic gradient, and the choice of a backend."""

from ._attention import Report, explain, laser_attention, laser_attention_vjp
from ._merge import merge_states
from ._problem import Inputs, Problem
from ._registry import Backend, Forward, Gradients, Unsupported, backends, deferred, unrounded_output

__all__ = [
    "Backend",
    "Forward",
    "Gradients",
    "Inputs",
    "Problem",
    "Report",
    "Unsupported",
    "backends",
    "deferred",
    "explain",
    "laser_attention",
    "laser_attention_vjp",
    "merge_states",
    "unrounded_output",
]
