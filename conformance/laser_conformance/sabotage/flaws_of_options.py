"""Flaws of masks, options, gradients and behaviour; the docstring of a class says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np

from laser_core import Forward, Gradients, Inputs, Problem

from .honest import Floats, Honest
from .registry import flaw, half

# -------------------------------------------------------------------------------------------------------------- masks


@flaw("masks")
class TopLeftForBottomRight(Honest):
    """The causal diagonal starts at the top left, whatever was asked for."""

    def band(self, problem: Problem, i: Floats, j: Floats) -> Floats:
        causal = problem.causal and "top_left"
        return super().band(dataclasses.replace(problem, causal=causal), i, j)


@flaw("masks")
class DiagonalOffByOne(Honest):
    """A query does not see the key on its diagonal."""

    def band(self, problem: Problem, i: Floats, j: Floats) -> Floats:
        return super().band(problem, i, j + 1) if problem.causal else super().band(problem, i, j)


@flaw("masks")
class RightOfWindowIgnored(Honest):
    """A window has only a left side."""

    def band(self, problem: Problem, i: Floats, j: Floats) -> Floats:
        return super().band(dataclasses.replace(problem, window=(problem.window[0], None)), i, j)


@flaw("masks")
class WindowFromTopLeft(Honest):
    """The window is relative to the top-left diagonal although the causal one is at the bottom right."""

    def band(self, problem: Problem, i: Floats, j: Floats) -> Floats:
        free = dataclasses.replace(problem, causal=None)
        whole = dataclasses.replace(problem, window=(None, None))
        return super().band(free, i, j) & super().band(whole, i, j)


@flaw("masks")
class KeyLengthsIgnored(Honest):
    """All keys exist."""

    def within_lengths(self, problem: Problem, inputs: Inputs, i: Floats, j: Floats) -> Floats:
        return super().within_lengths(problem, inputs._replace(key_value_seq_lengths=None), i, j)


@flaw("masks")
class QueryLengthsIgnored(Honest):
    """All queries exist."""

    def within_lengths(self, problem: Problem, inputs: Inputs, i: Floats, j: Floats) -> Floats:
        return super().within_lengths(problem, inputs._replace(query_seq_lengths=None), i, j)


@flaw("masks")
class GroupsByModulo(Honest):
    """Query head h reads key/value head h mod Hkv."""

    def repeat(self, problem: Problem, x: Floats) -> Floats:
        return np.concatenate([x] * problem.group, axis=-3)

    def fold(self, problem: Problem, x: Floats) -> Floats:
        shape = (*x.shape[:-3], problem.group, problem.key_value_heads, *x.shape[-2:])
        return x.reshape(shape).sum(axis=-4)


@flaw("masks")
class MaskAfterSoftmax(Honest):
    """The mask is applied to the probabilities, which then do not sum to one."""

    def softmax(self, problem: Problem, s: Floats) -> tuple[Floats, Floats]:
        p, l = super().softmax(problem, np.where(s == -math.inf, 0, s))
        return np.where(s == -math.inf, 0, p), l


# ------------------------------------------------------------------------------------------------------------ options


@flaw("options")
class BiasBeforeCap(Honest):
    """The bias is added before the soft cap."""

    def scores(self, problem: Problem, inputs: Inputs, x: Floats, seen: Floats) -> tuple[Floats, Floats]:
        if inputs.bias is not None:
            x = x + np.where(seen, inputs.bias, 0).astype(x.dtype)
        s, slope = self.cap(problem, x)
        return np.where(seen, s, -math.inf), slope


@flaw("forward")
class ScaleTwice(Honest):
    """The scale is applied to the queries and to the product."""

    def products(self, problem: Problem, q: Floats, k: Floats) -> Floats:
        return super().products(problem, problem.scale * q, k)


@flaw("options")
class ScaleZeroIsDefault(Honest):
    """``scale or 1/√D``: zero is taken for absent."""

    def products(self, problem: Problem, q: Floats, k: Floats) -> Floats:
        return super().products(dataclasses.replace(problem, scale=problem.scale or q.shape[-1] ** -0.5), q, k)


@flaw("options")
class MaskBeforeScale(Honest):
    """What is hidden is −∞ before it is scaled: NaN where the scale is 0, +∞ where it is negative."""

    def scores(self, problem: Problem, inputs: Inputs, x: Floats, seen: Floats) -> tuple[Floats, Floats]:
        s, slope = super().scores(problem, inputs, x, seen)
        hidden = -math.inf if problem.scale > 0 else math.nan if problem.scale == 0 else math.inf
        return np.where(seen, s, hidden), slope


@flaw("options")
class MaximumBeforeScale(Honest):
    """The row maximum is that of the products: the least score where the scale is negative."""

    def softmax(self, problem: Problem, s: Floats) -> tuple[Floats, Floats]:
        if problem.scale >= 0:
            return super().softmax(problem, s)
        least = np.where(np.isfinite(s), s, math.inf).min(axis=-1, keepdims=True, initial=math.inf)
        m = np.where(np.isfinite(least), least, 0)
        p = np.exp(s - m)
        l = p.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore"):
            return p / np.where(l == 0, 1, l), (np.log(l) + m)[..., 0]


@flaw("options")
class NoCapDerivative(Honest):
    """The derivative of the soft cap is dropped."""

    def cap(self, problem: Problem, x: Floats) -> tuple[Floats, Floats]:
        s, slope = super().cap(problem, x)
        return s, np.ones_like(slope)


# ---------------------------------------------------------------------------------------------------------- gradients


@flaw("masks")
class GroupNotSummed(Honest):
    """dv and dk are those of the first query head of each group."""

    def fold(self, problem: Problem, x: Floats) -> Floats:
        return x[..., :: problem.group, :, :]


@flaw("options")
class BetaGradientNegated(Honest):
    """dβ has the wrong sign."""

    def through_values(self, *arguments: Any) -> tuple[Floats, Floats, Floats]:
        ds, dv, dbeta = super().through_values(*arguments)
        return ds, dv, -dbeta


@flaw("options")
class LseGradientDropped(Honest):
    """The cotangent of the log-sum-exp is ignored."""

    def through_lse(self, p: Floats, dl: Floats) -> Floats:
        return np.zeros_like(p)


@flaw("options")
class BiasGradientNotSummed(Honest):
    """The gradient of a broadcast bias is that of the first entry."""

    def reduce(self, x: Floats, shape: tuple[int, ...]) -> Floats:
        extra = x.ndim - len(shape)
        x = x[(0,) * extra]
        return x[tuple(slice(0, 1) if n == 1 else slice(None) for n in shape)].reshape(shape)


@flaw("gradients")
class SoftmaxGradientOfValues(Honest):
    """dv is pᵀ·do, that of softmax attention."""

    def through_values(self, *arguments: Any) -> tuple[Floats, Floats, Floats]:
        ds, _, dbeta = super().through_values(*arguments)
        p, do = arguments[1], arguments[6]
        return ds, p.swapaxes(-1, -2) @ do, dbeta


@flaw("gradients")
class ScaleMissingBackward(Honest):
    """dq is not multiplied by the scale."""

    def through_scores(self, problem: Problem, dx: Floats, q: Floats, k: Floats) -> tuple[Floats, Floats]:
        _, dk = super().through_scores(problem, dx, q, k)
        return dx @ k, dk


@flaw("precision")
class RoundedResidual(Honest):
    """The backward pass reads the rounded output: the weights no longer sum to one."""

    def residual(self, problem: Problem, o: Floats) -> Floats:
        return o.astype(half(problem) or o.dtype).astype(o.dtype)


# ---------------------------------------------------------------------------------------------------------- behaviour


@flaw("isolation")
class HiddenNan(Honest):
    """Hidden keys and values take part in products with weight zero: 0·NaN is NaN."""

    def clean(self, q: Floats, k: Floats, v: Floats, seen: Floats) -> tuple[Floats, Floats, Floats]:
        return q, k, v

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        return super().average(problem, inputs, s, p, l, v) + 0 * (p @ v)


@flaw("isolation")
class ReferenceMovesBits(Honest):
    """Values are exponentiated relative to a real maximum over all keys, so hidden values move the last bits."""

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        whole = self.repeat(problem, self.load(inputs.value).astype(v.dtype))
        c = np.where(np.isfinite(whole), whole, -math.inf).max(axis=-2, keepdims=True, initial=-math.inf)
        c = np.where(np.abs(c) < 50, c, 0)
        return super().average(problem, inputs, s, p, l, v - c) + c * (p.sum(axis=-1, keepdims=True) > 0)


@flaw("determinism")
class RandomOrder(Honest):
    """Keys are accumulated in an order that differs from run to run, as with atomic additions."""

    def through_scores(self, problem: Problem, dx: Floats, q: Floats, k: Floats) -> tuple[Floats, Floats]:
        order = np.asarray(random.sample(range(k.shape[-2]), k.shape[-2]), dtype=int)
        dq, _ = super().through_scores(problem, dx[..., order], q, k[..., order, :])
        rows = np.asarray(random.sample(range(q.shape[-2]), q.shape[-2]), dtype=int)
        _, dk = super().through_scores(problem, dx[..., rows, :], q[..., rows, :], k)
        return dq, dk


@flaw("gradients")
class NoneForGradient(Honest):
    """The gradient of the values is not returned."""

    def backward(
        self, problem: Problem, inputs: Inputs, forward: Forward, d_out: Floats, d_lse: Floats | None
    ) -> Gradients:
        return super().backward(problem, inputs, forward, d_out, d_lse)._replace(value=None)


@flaw("gradients")
class UnbroadcastGradient(Honest):
    """The gradient of the keys has all query heads instead of the key/value heads, or one leading axis too many."""

    def fold(self, problem: Problem, x: Floats) -> Floats:
        return super().fold(problem, x)[None]
