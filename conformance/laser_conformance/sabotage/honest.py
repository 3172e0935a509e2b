"""A plain, honest implementation in NumPy, in steps that a sabotaged one can replace one at a time."""

from __future__ import annotations

import math
from typing import Any, ClassVar, TypeAlias

import ml_dtypes
import numpy as np

import laser_core
from laser_core import Forward, Gradients, Inputs, Problem

Floats: TypeAlias = Any


class Honest:
    """LASER attention with everything materialised, in float32 (float64 for float64).

    Arrays in the steps have all query heads: ``q (..., Hq, Lq, D)``, ``s (..., Hq, Lq, Lk)``, ``v (..., Hq, Lk, E)``.
    """

    caught_by: ClassVar[str] = ""  # the level that rejects it

    @classmethod
    def backend(cls) -> laser_core.Backend:
        """The record."""
        own = cls()
        return laser_core.Backend(
            name=own.name(),
            summary=(cls.__doc__ or "").splitlines()[0],
            forward=own.forward,
            backward=own.backward,
            frameworks=own.frameworks(),
        )

    def name(self) -> str:
        """The class name with hyphens."""
        words = "".join(f" {c.lower()}" if c.isupper() else c for c in type(self).__name__).split()
        return "-".join(words)

    def frameworks(self) -> tuple[str, ...]:
        """Whose arrays it takes."""
        return ("numpy",)

    # -------------------------------------------------------------------------------------------------------- forward

    def forward(self, problem: Problem, inputs: Inputs) -> Forward:
        """Output and log-sum-exp."""
        s, _, _, _, v = self.prepare(problem, inputs)
        p, l = self.softmax(problem, s)
        o = self.average(problem, inputs, s, p, l, v)
        return Forward(self.store(problem, o), self.store_lse(problem, l))

    def prepare(self, problem: Problem, inputs: Inputs) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Scores, the slope of the cap, and q, k, v for all query heads; zeros where nothing is seen."""
        dtype = np.dtype(problem.compute_dtype)
        q, k, v = (self.load(x).astype(dtype) for x in (inputs.query, inputs.key, inputs.value))
        k, v = self.repeat(problem, k), self.repeat(problem, v)
        seen = self.visible(problem, inputs)
        q, k, v = self.clean(q, k, v, seen)
        x = self.products(problem, q, k)
        s, slope = self.scores(problem, inputs, x, seen)
        return s, slope, q, k, v

    def load(self, x: Floats) -> Floats:
        """An argument as it is read."""
        return x

    def repeat(self, problem: Problem, x: Floats) -> Floats:
        """Keys or values for all query heads."""
        return np.repeat(x, problem.group, axis=-3)

    def visible(self, problem: Problem, inputs: Inputs) -> Floats:
        """mask AND causal AND window AND lengths."""
        i, j = np.arange(problem.query_length)[:, None], np.arange(problem.key_length)[None, :]
        seen = np.ones(problem.score_shape, dtype=bool) & self.band(problem, i, j)
        if inputs.attn_mask is not None:
            seen &= inputs.attn_mask
        if inputs.bias is not None:
            seen &= inputs.bias != -math.inf
        return seen & self.within_lengths(problem, inputs, i, j)

    def band(self, problem: Problem, i: Floats, j: Floats) -> Floats:
        """Causality and window."""
        low, high = problem.band
        seen = np.ones((i + j).shape, dtype=bool)
        if low is not None:
            seen &= j - i >= low
        if high is not None:
            seen &= j - i <= high
        return seen

    def within_lengths(self, problem: Problem, inputs: Inputs, i: Floats, j: Floats) -> Floats:
        """Sequence lengths."""
        seen = np.ones((*problem.batch, 1, 1, 1), dtype=bool)
        for lengths, position in ((inputs.query_seq_lengths, i), (inputs.key_value_seq_lengths, j)):
            if lengths is not None:
                seen = seen & (position < np.broadcast_to(lengths, problem.batch)[..., None, None, None])
        return seen

    def clean(self, q: Floats, k: Floats, v: Floats, seen: Floats) -> tuple[Floats, Floats, Floats]:
        """What is not finite is taken out of the products; it is put back into the scores where it is seen."""
        query, key = seen.any(axis=-1)[..., None], seen.any(axis=-2)[..., None]
        return np.where(query, q, 0), np.where(key, k, 0), np.where(key, v, 0)

    def products(self, problem: Problem, q: Floats, k: Floats) -> Floats:
        """scale·q·kᵀ."""
        broken = ~np.isfinite(q).all(axis=-1)[..., :, None] | ~np.isfinite(k).all(axis=-1)[..., None, :]
        x = problem.scale * (
            np.nan_to_num(q, posinf=0, neginf=0) @ np.nan_to_num(k, posinf=0, neginf=0).swapaxes(-1, -2)
        )
        return np.where(broken, np.nan, x)

    def scores(self, problem: Problem, inputs: Inputs, x: Floats, seen: Floats) -> tuple[Floats, Floats]:
        """Cap, then bias, then mask."""
        s, slope = self.cap(problem, x)
        if inputs.bias is not None:
            s = s + np.where(seen, inputs.bias, 0).astype(s.dtype)
        return np.where(seen, s, -math.inf), slope

    def cap(self, problem: Problem, x: Floats) -> tuple[Floats, Floats]:
        """The soft cap and its derivative."""
        c = problem.logits_soft_cap
        if c is None:
            return x, np.ones_like(x)
        t = np.tanh(x / c)
        return c * t, 1 - t * t

    def softmax(self, problem: Problem, s: Floats) -> tuple[Floats, Floats]:
        """p and l."""
        empty = (s == -math.inf).all(axis=-1, keepdims=True)
        m = np.where(empty, 0, s.max(axis=-1, keepdims=True, initial=-math.inf))
        p = np.exp(s - m)
        total = np.where(empty, 1, p.sum(axis=-1, keepdims=True))
        return p / total, np.where(empty, -math.inf, m + np.log(total))[..., 0]

    def beta(self, problem: Problem, inputs: Inputs) -> Floats:
        """β (Hq, E)."""
        beta = problem.beta if inputs.beta is None else inputs.beta
        shape = (problem.query_heads, problem.value_dim)
        return np.broadcast_to(np.asarray(beta, dtype=np.dtype(problem.compute_dtype)), shape)

    def average(self, problem: Problem, inputs: Inputs, s: Floats, p: Floats, l: Floats, v: Floats) -> Floats:
        """o, the log-mean-exp of the values; about the greatest term of each row, or by expm1 where βv is small."""
        beta = self.beta(problem, inputs)[:, None, :]
        safe = np.where(beta == 0, 1, beta)
        hidden = (s == -math.inf)[..., None]
        v = np.where(hidden, 0, v[..., None, :, :])
        y = beta[..., None, :] * v
        log_p = np.where(hidden, -math.inf, (s - np.where(np.isfinite(l), l, 0)[..., None])[..., None])
        top = (log_p + y).max(axis=-2, keepdims=True, initial=-math.inf)
        top = np.where(np.isfinite(top), top, 0)
        total = np.exp(log_p + y - top).sum(axis=-2)
        by_log = (top[..., 0, :] + np.log(np.where(total == 0, 1, total))) / safe
        near = np.abs(y).max(axis=-2, initial=0) <= 1
        y = np.where(near[..., None, :], y, 0)
        mean = (p[..., None] * np.where(beta[..., None, :] == 0, v, np.expm1(y) / safe[..., None, :])).sum(axis=-2)
        by_mean = np.where(beta == 0, mean, np.log1p(np.where(near, beta * mean, 0)) / safe)
        o = np.where(near | (beta == 0), by_mean, by_log)
        return np.where(hidden[..., 0].all(axis=-1, keepdims=True), 0, o)

    def store(self, problem: Problem, o: Floats) -> Floats:
        """The output as it is written."""
        return o.astype(ml_dtypes.bfloat16 if problem.dtype == "bfloat16" else problem.dtype)

    def store_lse(self, problem: Problem, l: Floats) -> Floats:
        """The log-sum-exp as it is written."""
        return l

    # ------------------------------------------------------------------------------------------------------- backward

    def backward(
        self, problem: Problem, inputs: Inputs, forward: Forward, d_out: Floats, d_lse: Floats | None
    ) -> Gradients:
        """All gradients, with o and l computed again."""
        s, slope, q, k, v = self.prepare(problem, inputs)
        p, l = self.softmax(problem, s)
        o = self.residual(problem, self.average(problem, inputs, s, p, l, v))
        beta = self.beta(problem, inputs)
        empty = (l == -math.inf)[..., None]
        do = np.where(empty, 0, d_out).astype(o.dtype)
        ds, dv, dbeta = self.through_values(s, p, l, v, o, beta, do)
        if d_lse is not None:
            ds = ds + self.through_lse(p, np.where(empty[..., 0], 0, d_lse))
        dx = ds * slope
        dq, dk = self.through_scores(problem, dx, q, k)
        bias, own_beta = inputs.bias, inputs.beta
        return Gradients(
            query=dq.astype(inputs.query.dtype),
            key=self.fold(problem, dk).astype(inputs.key.dtype),
            value=self.fold(problem, dv).astype(inputs.value.dtype),
            bias=None if bias is None else self.reduce(ds, bias.shape).astype(bias.dtype),
            beta=None if own_beta is None else self.reduce(dbeta, own_beta.shape).astype(own_beta.dtype),
        )

    def residual(self, problem: Problem, o: Floats) -> Floats:
        """o as the backward pass gets it."""
        return o

    def through_values(
        self, s: Floats, p: Floats, l: Floats, v: Floats, o: Floats, beta: Floats, do: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """ds, dv for all query heads and dβ (..., Hq, E)."""
        hidden = (s == -math.inf)[..., None]
        log_p = s - np.where(np.isfinite(l), l, 0)[..., None]
        z = np.where(hidden, 0, v[..., None, :, :] - o[..., :, None, :])
        b = beta[:, None, None, :]
        safe = np.where(b == 0, 1, b).astype(s.dtype)
        t = b * z
        w = np.exp(log_p[..., None] + t)
        near = np.abs(t) <= 1
        t_near = np.where(near, t, 0)
        g = np.where(t_near == 0, 1, np.expm1(t_near) / np.where(t_near == 0, 1, t_near))
        series = 0.5 + t_near * (1 / 3 + t_near * (1 / 8 + t_near * (1 / 30 + t_near * (1 / 144 + t_near / 840))))
        direct = (np.exp(t_near) - g) / np.where(t_near == 0, 1, t_near)
        k = np.where(np.abs(t_near) < 0.1, series, direct)
        far = (w - p[..., None]) / safe
        ds = (do[..., None, :] * np.where(near, p[..., None] * z * g, far)).sum(axis=-1)
        dv = (do[..., None, :] * w).sum(axis=-3)
        curve = np.where(near, p[..., None] * z * z * k, (w * z - far) / safe)
        dbeta = (do[..., None, :] * curve).sum(axis=(-3, -2))
        return ds, dv, dbeta

    def through_lse(self, p: Floats, dl: Floats) -> Floats:
        """What the cotangent of l adds to ds."""
        return np.asarray(dl[..., None] * p, dtype=p.dtype)

    def through_scores(self, problem: Problem, dx: Floats, q: Floats, k: Floats) -> tuple[Floats, Floats]:
        """dq and dk for all query heads; dx is NaN where a query sees NaN or ∞, and zero where it does not."""
        q, k = (np.nan_to_num(x, nan=0, posinf=0, neginf=0) for x in (q, k))
        return problem.scale * (dx @ k), problem.scale * (dx.swapaxes(-1, -2) @ q)

    def fold(self, problem: Problem, x: Floats) -> Floats:
        """Summed over the query heads of each group."""
        shape = (*x.shape[:-3], problem.key_value_heads, problem.group, *x.shape[-2:])
        return x.reshape(shape).sum(axis=-3)

    def reduce(self, x: Floats, shape: tuple[int, ...]) -> Floats:
        """Summed over the axes along which an argument of ``shape`` was broadcast."""
        extra = x.ndim - len(shape)
        axes = [a for a in range(x.ndim) if a < extra or (shape[a - extra] == 1 and x.shape[a] != 1)]
        return x.sum(axis=tuple(axes)).reshape(shape) if axes else x.reshape(shape)
