"""Flaws of outputs and memory; the docstring of a class says what is wrong."""

from __future__ import annotations

import math

import numpy as np

from laser_core import Inputs, Problem

from .honest import Floats, Honest
from .registry import flaw, half


@flaw("forward")
class LinearMerge(Honest):
    """Partial results of two halves of the keys are merged linearly, as in softmax attention."""

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        middle = problem.key_length // 2
        if middle == 0:
            return super().average(problem, inputs, s, p, l, v)
        parts = []
        for keys in (slice(0, middle), slice(middle, None)):
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
        return l.astype(half(problem) or l.dtype)


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
        narrow = half(problem)
        if narrow is None or p.size == 0:
            return p, l
        total = np.zeros(p.shape[:-1], narrow)
        for j in range(p.shape[-1]):
            total = total + p[..., j].astype(narrow)
        total = np.where(total == 0, 1, total).astype(np.float32)
        return (p.astype(narrow).astype(np.float32) / total[..., None]), l + np.log(total)

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            return super().average(problem, inputs, np.log(p), p, np.zeros_like(l), v)


@flaw("precision")
class ReducedPrecisionScores(Honest):
    """Operands of float32 products are rounded to 10 bits, as a tensor core does unless told otherwise."""

    def products(self, problem: Problem, q: Floats, k: Floats) -> Floats:
        return super().products(problem, self._ten_bits(q), self._ten_bits(k))

    def _ten_bits(self, x: Floats) -> Floats:
        if x.dtype != np.float32:
            return x
        return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


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


@flaw("isolation")
class TileReachesNextHead(Honest):
    """The last tile of keys reaches into the next head, and meets with weight zero what is infinite or NaN there."""

    tile = 64

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        o = super().average(problem, inputs, s, p, l, v)
        beyond = v[..., 1:, : -problem.key_length % self.tile, :]
        x = np.exp(self.beta(problem, inputs)[1:, None, :] * beyond)
        o[..., :-1, :, :] += (0 * x).sum(axis=-2, keepdims=True)
        return np.asarray(o)


@flaw("isolation")
class NanTimesZeroInGradients(Honest):
    """Weights of zero meet with keys that are NaN in the product that makes the gradient of the queries."""

    def through_scores(self, problem: Problem, dx: Floats, q: Floats, k: Floats) -> tuple[Floats, Floats]:
        _, dk = super().through_scores(problem, dx, q, k)
        return problem.scale * (dx @ k), dk
