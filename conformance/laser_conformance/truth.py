"""The truth: the definition and its gradient, written out once more, in float64 or wider, head by head.

    s_ij = cap(scale·<q_i, k_j>) + bias_ij     l_i = log Σ_j exp(s_ij)     p_ij = exp(s_ij − l_i)
    o_ie = (1/β_e)·log Σ_j p_ij·exp(β_e v_je)  w_ije = p_ij·exp(β_e (v_je − o_ie))
    dv_je = Σ_i do_ie w_ije     ds_ij = Σ_e do_ie (w_ije − p_ij)/β_e + dl_i p_ij     dβ_e = Σ_i do_ie ∂o_ie/∂β_e

It shares no code with the implementations that it judges. Its own tests compare it with 50-digit arithmetic and with
finite differences. float64 problems are evaluated in the machine's ``long double``, where that is wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .generate import Floats
from .problems import Data, visible

_TERMS = 2**21  # of p_ij·exp(βv_je) in memory at a time


@dataclass(frozen=True)
class Truth:
    """Expected results, in float64 or wider.

    ``gradients`` holds query, key, value, bias and beta; it is empty where they were not asked for. ``low`` and
    ``high`` are the least and greatest value that a query sees, per channel; ``size`` the greatest magnitude.
    """

    out: Floats
    lse: Floats
    low: Floats
    high: Floats
    size: Floats
    gradients: dict[str, Floats]


def wide(dtype: str) -> type[np.floating[Any]]:
    """The dtype to evaluate the truth for ``dtype`` in."""
    return np.longdouble if dtype == "float64" else np.float64


@dataclass(frozen=True)
class Head:
    """One query head of one batch entry, with some of its queries, in the dtype of the evaluation.

    What no query sees is replaced by zero, NaN included.
    """

    at: tuple[int, ...]  # (*batch, query head)
    kv: tuple[int, ...]  # (*batch, key/value head)
    rows: slice
    q: Floats
    k: Floats
    v: Floats
    seen: Floats
    bias: Floats | None
    beta: Floats  # (E,)
    scale: float
    cap: float | None

    def scores(self) -> tuple[Floats, Floats]:
        """``s (Lq, Lk)``, −∞ where hidden, and the slope of the soft cap."""
        s = self.scale * (self.q @ self.k.T)
        slope = np.ones_like(s)
        if self.cap is not None:
            t = np.tanh(s / self.cap)
            s, slope = self.cap * t, 1 - t * t
        if self.bias is not None:
            s = s + np.where(self.seen, self.bias, 0)
        return np.where(self.seen, s, -math.inf), slope


def heads(data: Data, dtype: Any, rows: tuple[int, int] | None = None) -> Iterator[Head]:
    """The heads of a problem, with no more queries at a time than memory should hold terms for."""
    s = data.spec
    (hq, hkv), (lq, lk), e = s.heads, s.lengths, s.dims[1]
    first, last = rows or (0, lq)
    step = max(1, _TERMS // max(lk * e, 1))
    betas = np.broadcast_to(data.arrays["beta"].astype(dtype) if "beta" in data.arrays else dtype(s.beta), (hq, e))
    bias = np.broadcast_to(data.arrays["bias"], (*s.batch, hq, lq, lk)) if "bias" in data.arrays else None
    for start in range(first, last, step):
        part = slice(start, min(start + step, last))
        seen_by = visible(data, part)
        for at in np.ndindex(*s.batch, hq):
            kv = (*at[:-1], at[-1] // (hq // hkv))
            seen = seen_by[at]
            some_query, some_key = seen.any(axis=1)[:, None], seen.any(axis=0)[:, None]
            yield Head(
                at=at,
                kv=kv,
                rows=part,
                q=np.where(some_query, data.arrays["query"][at][part], 0).astype(dtype),
                k=np.where(some_key, data.arrays["key"][kv], 0).astype(dtype),
                v=np.where(some_key, data.arrays["value"][kv], 0).astype(dtype),
                seen=seen,
                bias=None if bias is None else bias[at][part].astype(dtype),
                beta=betas[at[-1]],
                scale=data.scale,
                cap=s.soft_cap,
            )


def truth(data: Data, *, gradients: bool = False, rows: tuple[int, int] | None = None) -> Truth:
    """Expected results of a problem; with ``rows``, of these queries alone, the cotangents of the others being zero."""
    dtype = wide(data.dtype)
    with np.errstate(all="ignore"):
        return _truth(data, dtype, gradients, rows)


def _truth(data: Data, dtype: Any, gradients: bool, rows: tuple[int, int] | None) -> Truth:
    s = data.spec
    first, last = rows or (0, s.lengths[0])
    shape = (*s.out_shape[:-2], last - first, s.out_shape[-1])
    out, low, high, size = (np.zeros(shape, dtype=dtype) for _ in range(4))
    lse = np.full(shape[:-1], -math.inf, dtype=dtype)
    grads = {n: np.zeros(x.shape, dtype=dtype) for n, x in data.arrays.items() if n in _DIFFERENTIABLE and gradients}
    dbias = np.zeros((*s.out_shape[:-1], s.lengths[1]), dtype=dtype) if "bias" in grads else None
    dbeta = np.zeros((s.heads[0], s.dims[1]), dtype=dtype)
    for head in heads(data, dtype, rows):
        here: Any = (*head.at, slice(head.rows.start - first, head.rows.stop - first))
        some = head.seen.any(axis=1)
        if not some.any():
            continue
        scores, slope = head.scores()
        o, l, p = attend(scores, head.v, head.beta)
        out[here], lse[here] = o, l
        shown = np.where(head.seen[:, :, None], head.v, np.nan)[some]
        lo, hi = np.nanmin(shown, axis=1), np.nanmax(shown, axis=1)
        low[here][some], high[here][some], size[here][some] = lo, hi, np.maximum(np.abs(lo), np.abs(hi))
        if not gradients:
            continue
        do = np.where(some[:, None], data.d_out[head.at][head.rows], 0).astype(dtype)
        dl = np.zeros(do.shape[0], dtype=dtype)
        if data.d_lse is not None:
            dl = np.where(some, data.d_lse[head.at][head.rows], 0).astype(dtype)
        ds, dv, db = through_values(scores, head.v, head.beta, o, l, p, do, dl)
        dx = head.scale * ds * slope
        grads["query"][head.at][head.rows] = dx @ head.k
        grads["key"][head.kv] += dx.T @ head.q
        grads["value"][head.kv] += dv
        dbeta[head.at[-1]] += db
        if dbias is not None:
            dbias[head.at][head.rows] = ds
    if dbias is not None:
        grads["bias"] = unbroadcast(dbias, grads["bias"].shape)
    if "beta" in grads:
        grads["beta"] = unbroadcast(dbeta, grads["beta"].shape)
    return Truth(out, lse, low, high, size, grads)


_DIFFERENTIABLE = ("query", "key", "value", "bias", "beta")


def attend(s: Floats, v: Floats, beta: Floats) -> tuple[Floats, Floats, Floats]:
    """o, l and p from scores ``(Lq, Lk)``, values ``(Lk, E)`` and ``beta (E,)``; 0, −∞ and 0 where nothing is seen."""
    empty = np.all(s == -math.inf, axis=1)
    m = np.where(empty, 0, np.max(s, axis=1))[:, None]
    total = np.sum(np.exp(s - m), axis=1)[:, None]
    log_total = np.log(np.where(empty[:, None], 1, total))
    l = np.where(empty[:, None], -math.inf, m + log_total)
    log_p = s - np.where(empty[:, None], 0, l)
    p = np.exp(log_p)

    y = beta * v
    t = log_p[:, :, None] + y
    top = np.max(t, axis=1)
    top = np.where(np.isfinite(top), top, 0)
    by_log = (top + np.log(np.sum(np.exp(t - top[:, None, :]), axis=1))) / np.where(beta == 0, 1, beta)
    mild = np.max(np.abs(y), axis=0, initial=0) <= 1  # there 1/β would only lose digits
    y = np.where(mild, y, 0)
    mean = p @ np.where(beta == 0, v, np.expm1(y) / np.where(beta == 0, 1, beta))
    by_mean = np.where(beta == 0, mean, np.log1p(np.where(mild, beta * mean, 0)) / np.where(beta == 0, 1, beta))
    o = np.where(empty[:, None], 0, np.where(mild | (beta == 0), by_mean, by_log))
    return o, l[:, 0], p


def through_values(
    s: Floats, v: Floats, beta: Floats, o: Floats, l: Floats, p: Floats, do: Floats, dl: Floats
) -> tuple[Floats, Floats, Floats]:
    """``ds (Lq, Lk)``, ``dv (Lk, E)`` and ``dβ (E,)``, sums over the queries given."""
    hidden = s == -math.inf
    log_p = s - np.where(l == -math.inf, 0, l)[:, None]
    z = np.where(hidden[:, :, None], 0, v[None, :, :] - o[:, None, :])
    t = beta * z
    w = np.exp(log_p[:, :, None] + t)
    safe = np.where(beta == 0, 1, beta)
    near = np.abs(t) <= 1
    t_near = np.where(near, t, 0)
    g = np.where(t_near == 0, 1, np.expm1(t_near) / np.where(t_near == 0, 1, t_near))
    far_slope = (w - p[:, :, None]) / safe
    slope = np.where(near, p[:, :, None] * z * g, far_slope)
    ds = np.einsum("ie,ije->ij", do, slope) + dl[:, None] * p
    dv = np.einsum("ie,ije->je", do, w)
    curve = np.where(near, p[:, :, None] * z * z * curvature(t_near), (w * z - far_slope) / safe)
    return ds, dv, np.einsum("ie,ije->e", do, curve)


def curvature(t: Floats, below: float = 0.3) -> Floats:
    """``(eᵗ − (eᵗ − 1)/t)/t``, which is ½ at 0; by its series Σ_n (n+1)/(n+2)!·tⁿ where |t| < ``below``."""
    series = [(n + 1) / math.factorial(n + 2) for n in range(26)]
    return _by_series(t, series, lambda t: (np.exp(t) - np.expm1(t) / t) / t, below)


def defect(u: Floats, below: float = 0.3) -> Floats:
    """``((1 + u)·log(1 + u) − u)/u²``, which is ½ at 0; by its series Σ_n (−u)ⁿ/((n+1)(n+2)) where |u| < ``below``."""
    series = [(-1) ** n / ((n + 1) * (n + 2)) for n in range(40)]
    return _by_series(u, series, lambda u: ((1 + u) * np.log1p(u) - u) / (u * u), below)


def _by_series(t: Floats, coefficients: list[float], direct: Callable[[Floats], Floats], below: float) -> Floats:
    near = np.abs(t) < below
    small = np.where(near, t, 0)
    total = np.zeros_like(small)
    for c in reversed(coefficients):
        total = total * small + t.dtype.type(c)
    return np.where(near, total, direct(np.where(near, 1, t)))


def unbroadcast(x: Floats, shape: tuple[int, ...]) -> Floats:
    """``x`` summed over the axes along which an array of ``shape`` was broadcast."""
    extra = x.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + a for a, n in enumerate(shape) if n == 1 and x.shape[extra + a] != 1)
    return x.sum(axis=axes).reshape(shape) if axes else x.reshape(shape)
