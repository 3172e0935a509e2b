"""One flaw per class; the docstring says what is wrong and ``caught_by`` names the level that has to notice."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import ml_dtypes
import numpy as np
from laser_core import Forward, Gradients, Inputs, Problem

from .honest import Floats, Honest

FLAWS: dict[str, type[Honest]] = {}


def flaw(caught_by: str) -> Any:
    """Register a sabotaged implementation."""

    def register(cls: type[Honest]) -> type[Honest]:
        cls.caught_by = caught_by
        FLAWS[cls().name()] = cls
        return cls

    return register


def _half(problem: Problem) -> Any:
    return {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}.get(problem.dtype)


# ------------------------------------------------------------------------------------------------------------- output


@flaw("forward")
class LinearMerge(Honest):
    """Partial results of two halves of the keys are merged linearly, as in softmax attention."""

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        half = problem.key_length // 2
        if half == 0:
            return super().average(problem, inputs, s, p, l, v)
        parts = []
        for keys in (slice(0, half), slice(half, None)):
            own, own_l = self.softmax(problem, s[..., keys])
            o = super().average(problem, inputs, s[..., keys], own, own_l, v[..., keys, :])
            parts.append((o, np.exp(np.where(np.isfinite(l), own_l - l, -math.inf))[..., None]))
        return np.asarray(sum(o * weight for o, weight in parts))


class Recipe(Honest):
    """The published recipe: exp of the values less their maximum over the whole sequence, attend, log."""

    floor = 0.0

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        beta = self.beta(problem, inputs)[:, None, :]
        if (beta == 0).any() or problem.key_length == 0:
            return super().average(problem, inputs, s, p, l, v)
        y = beta * v
        top = y.max(axis=-2, keepdims=True)
        o = (np.log(np.maximum(p @ np.exp(y - top), self.floor)) + top) / beta
        return np.where((s == -math.inf).all(axis=-1, keepdims=True), 0, o)


@flaw("hostile")
class WholeSequenceMaximum(Recipe):
    """The maximum of the values over the whole sequence, with a floor before the log."""

    floor = 1e-30


@flaw("hostile")
class NoMaximum(Recipe):
    """exp(v) without any reference: it overflows."""

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        beta = self.beta(problem, inputs)[:, None, :]
        o = np.log(p @ np.exp(beta * v)) / np.where(beta == 0, 1, beta)
        o = np.where(beta == 0, p @ v, o)
        return np.where((s == -math.inf).all(axis=-1, keepdims=True), 0, o)


@flaw("precision")
class SoftClamp(Honest):
    """Values go through 30·tanh(v/30), so that exp stays in range."""

    def load(self, x: Floats) -> Floats:
        return (30 * np.tanh(x.astype(np.float32) / 30)).astype(x.dtype) if x.ndim >= 3 and self._is_value else x

    _is_value = False

    def prepare(self, problem: Problem, inputs: Inputs) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        value = inputs.value.astype(problem.compute_dtype)
        return super().prepare(problem, inputs._replace(value=30 * np.tanh(value / 30)))


@flaw("options")
class NaiveSmallBeta(Honest):
    """log and exp at small β, where 1/β magnifies their rounding."""

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        beta = self.beta(problem, inputs)[:, None, :]
        o = np.log(p @ np.exp(beta * v)) / np.where(beta == 0, 1, beta)
        small = (np.abs(beta) < 0.1) & (beta != 0)
        o = np.where(small, o, super().average(problem, inputs, s, p, l, v))
        return np.where((s == -math.inf).all(axis=-1, keepdims=True), 0, o)


@flaw("options")
class BetaIgnored(Honest):
    """β is taken to be 1."""

    def beta(self, problem: Problem, inputs: Inputs) -> Floats:
        return np.ones((problem.query_heads, problem.value_dim), dtype=problem.compute_dtype)


@flaw("options")
class LseInBaseTwo(Honest):
    """The log-sum-exp is a log2."""

    def store_lse(self, problem: Problem, l: Floats) -> Floats:
        return l / np.asarray(math.log(2), l.dtype)


@flaw("options")
class LseOfHalfPrecision(Honest):
    """The log-sum-exp has the dtype of the query."""

    def store_lse(self, problem: Problem, l: Floats) -> Floats:
        return l.astype(_half(problem) or l.dtype)


@flaw("forward")
class AnotherDtype(Honest):
    """The output stays in the compute dtype."""

    def store(self, problem: Problem, o: Floats) -> Floats:
        return o


@flaw("layout")
class UnwrittenTail(Honest):
    """Rows beyond the last whole tile of 64 queries are not written."""

    def store(self, problem: Problem, o: Floats) -> Floats:
        out = np.empty(o.shape, super().store(problem, o).dtype)
        whole = o.shape[-2] if o.shape[-2] < 64 else o.shape[-2] // 64 * 64
        out[..., :whole, :] = o[..., :whole, :]
        return out


@flaw("layout")
class TailOfKeysIgnored(Honest):
    """Keys beyond the last whole tile of 64 are not read."""

    def visible(self, problem: Problem, inputs: Inputs) -> Floats:
        seen = super().visible(problem, inputs)
        if problem.key_length > 64:
            seen[..., problem.key_length // 64 * 64 :] = False
        return seen


@flaw("masks")
class NanOnEmptyRows(Honest):
    """0/0 where a query sees nothing."""

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        o = super().average(problem, inputs, s, p, l, v)
        return np.where((s == -math.inf).all(axis=-1, keepdims=True), math.nan, o)


@flaw("precision")
class WeightsInTheInputDtype(Honest):
    """p is kept, and summed along the row, in the input dtype."""

    def softmax(self, problem: Problem, s: Floats) -> tuple[Floats, Floats]:
        p, l = super().softmax(problem, s)
        half = _half(problem)
        if half is None or p.size == 0:
            return p, l
        total = np.zeros(p.shape[:-1], half)
        for j in range(p.shape[-1]):
            total = total + p[..., j].astype(half)
        total = np.where(total == 0, 1, total).astype(np.float32)
        return (p.astype(half).astype(np.float32) / total[..., None]), l + np.log(total)

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return super().average(problem, inputs, np.log(p), p, np.zeros_like(l), v)


@flaw("precision")
class ReducedPrecisionScores(Honest):
    """Operands of float32 products are rounded to 10 bits, as a tensor core does unless told otherwise."""

    def products(self, problem: Problem, q: Floats, k: Floats) -> Floats:
        ten_bits = lambda x: x if x.dtype != np.float32 else (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)  # noqa: E731
        return super().products(problem, ten_bits(np.ascontiguousarray(q)), ten_bits(np.ascontiguousarray(k)))


@flaw("forward")
class InputMutated(Honest):
    """The greatest value is subtracted in place."""

    def prepare(self, problem: Problem, inputs: Inputs) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        found = super().prepare(problem, inputs)
        if inputs.value.size:
            inputs.value[...] -= inputs.value.max()
        return found


@flaw("layout")
class StridesIgnored(Honest):
    """The memory of an array is read as if it were in C order."""

    def load(self, x: Floats) -> Floats:
        base = x if x.flags.c_contiguous or x.base is None else x.base
        return base.ravel(order="K")[: x.size].reshape(x.shape) if base.size >= x.size else x


@flaw("scale")
class AddressesOf32Bits(Honest):
    """Offsets are 32-bit integers: from 2³¹ on they wrap around."""

    def load(self, x: Floats) -> Floats:
        strides = tuple((s // x.itemsize + 2**31) % 2**32 - 2**31 for s in x.strides)
        strides = tuple(s % 2**31 * x.itemsize for s in strides)
        return np.lib.stride_tricks.as_strided(x, x.shape, strides) if x.size else x


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
        return o.astype(_half(problem) or o.dtype).astype(o.dtype)


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
