"""How far an implementation may be from the truth: section 2 of the contract, and nothing tuned per case.

Outputs. With u the unit roundoff of the dtype (float16 2⁻¹¹, bfloat16 2⁻⁸), entry by entry,

    float16, bfloat16     u·(|o| + 3)     + ε_s
    float32               1e-5·(1 + |o|)  + ε_s         log-sum-exp: 1e-4·(1 + |l|)
    float64               the float32 bounds, times 2⁻²⁹

ε_s = 2⁻²⁰·S is what float32 scores cost, S = scale·max|q_i|·max|k_j| + max|bias|: adding a bias of 1000 in float32
rounds as much as a product of 1000 does. For |β| < 1, where expm1 takes the place of exp and an error of the scores is
no longer divided by β, the constant terms and ε_s are multiplied by 1 + max|v| over what the query sees.

Gradients. In the Frobenius norm of each, at most 2 × what the plain formula loses when its matrix products take
operands rounded to the dtype, plus u times the norm, plus what flushing subnormal numbers to zero costs. The plain
formula is that of a kernel, evaluated in float32 (float64 problems: in float64), forward with p = exp(s − m), backward
with p = exp(s − l) from l and from scores that are computed again, in another order:

    P·X,  pᵀ·G,  G·Xᵀ,  dS·K,  dSᵀ·Q        with X = exp(βv) or (exp(βv) − 1)/β,  G = do·exp(−βo)

in which each operand keeps the significand of the dtype and any exponent, so that it has a loss for every range of
values. Where the references m and c lie is up to an implementation, and so is its luck with a few roundings: the loss
is the greatest of 8 evaluations (2 of large problems) with shifted references. Where no float wider than float64
exists to measure the loss of float64 with, it is that of float32, times 2⁻²⁹.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .generate import DTYPES, Floats, limits, rounded
from .problems import Data
from .truth import Truth, curvature, defect, heads, truth, unbroadcast

ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
_FEW_TERMS = 2**17
_FLOAT64 = 2.0**-29  # u of float64 over u of float32


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Allowed errors: arrays for out and lse, a Frobenius norm for each gradient."""

    out: Floats
    lse: Floats
    gradients: dict[str, float]


def bounds(data: Data, expected: Truth, *, rows: tuple[int, int] | None = None) -> Bounds:
    """What is allowed for a problem of which the truth is known."""
    gradients = {}
    if expected.gradients:
        losses = gradient_losses(data, rows)
        u = ROUNDOFF[data.dtype]
        gradients = {n: 2 * losses[n] + u * norm(g) + _flush(data.dtype, g.size) for n, g in expected.gradients.items()}
    return Bounds(out_bound(data, expected), lse_bound(data, expected), gradients)


def out_bound(data: Data, expected: Truth) -> Floats:
    """The allowed error of each output."""
    hq, e = data.spec.heads[0], data.spec.dims[1]
    beta = np.broadcast_to(data.arrays.get("beta", np.asarray(data.spec.beta)).astype(np.float64), (hq, e))
    stretch = np.where(np.abs(beta)[:, None, :] >= 1, 1.0, 1 + expected.size)
    o = np.abs(expected.out)
    e_s = 2.0**-20 * score_size(data)
    if data.dtype in ("float16", "bfloat16"):
        return np.asarray(ROUNDOFF[data.dtype] * (o + 3 * stretch) + e_s * stretch)
    return np.asarray((1e-5 * (o + stretch) + e_s * stretch) * (_FLOAT64 if data.dtype == "float64" else 1.0))


def lse_bound(data: Data, expected: Truth) -> Floats:
    """The allowed error of each log-sum-exp."""
    l = np.where(np.isfinite(expected.lse), np.abs(expected.lse), 0)
    return np.asarray(1e-4 * (1 + l) * (_FLOAT64 if data.dtype == "float64" else 1.0))


def score_size(data: Data) -> float:
    """scale·max|q_i|·max|k_j| + max|bias|, over what is finite."""
    size = abs(data.scale)
    for name in ("query", "key"):
        lengths = np.sqrt(np.sum(data.arrays[name].astype(np.float64) ** 2, axis=-1))
        size *= float(np.max(lengths[np.isfinite(lengths)], initial=0.0))
    if "bias" in data.arrays:
        bias = np.abs(data.arrays["bias"].astype(np.float64))
        size += float(np.max(bias[np.isfinite(bias)], initial=0.0))
    return size


def norm(x: Floats) -> float:
    """The Frobenius norm, in float64; squares neither overflow nor underflow."""
    x = np.abs(x.astype(np.float64))
    top = float(np.max(x, initial=0.0))
    return top * math.sqrt(float(np.sum(np.square(x / top)))) if 0 < top < math.inf else top


def _flush(dtype: str, size: int) -> float:
    """What results that are flushed to zero, or rounded to a multiple of the least number, may lose in norm."""
    least = max(
        float(limits(dtype).smallest_subnormal),
        float(limits("float64" if dtype == "float64" else "float32").smallest_normal),
    )
    return math.sqrt(size) * least


# ------------------------------------------------------------------------------------------------- the plain formula


def gradient_losses(data: Data, rows: tuple[int, int] | None = None) -> dict[str, float]:
    """‖plain − truth‖ of each gradient, where the plain formula takes operands rounded to the dtype."""
    factor = 1.0
    if data.dtype == "float64" and np.finfo(np.longdouble).nmant == np.finfo(np.float64).nmant:
        arrays = {n: rounded(x, "float32") if x.dtype == np.float64 else x for n, x in data.arrays.items()}
        d_lse = None if data.d_lse is None else rounded(data.d_lse, "float32")
        data = dataclasses.replace(
            data, dtype="float32", arrays=arrays, d_out=rounded(data.d_out, "float32"), d_lse=d_lse
        )
        factor = _FLOAT64
    exact = truth(data, gradients=True, rows=rows).gradients
    evaluations = 8 if data.spec.terms <= _FEW_TERMS else 2
    losses = dict.fromkeys(exact, 0.0)
    with np.errstate(all="ignore"):
        for n in range(evaluations):
            plain = plain_gradients(data, rows, n * 0.37)
            losses = {name: max(loss, factor * norm(plain[name] - exact[name])) for name, loss in losses.items()}
    return losses


def significand(x: Floats, dtype: str) -> Floats:
    """``x`` rounded to the significand of a dtype, with any exponent."""
    if dtype in ("float32", "float64"):
        return x
    m, exponent = np.frexp(x)
    return np.ldexp(m.astype(DTYPES[dtype]).astype(np.float32), exponent)


def plain_gradients(data: Data, rows: tuple[int, int] | None = None, shift: float = 0.0) -> dict[str, Floats]:
    """All gradients by the plain formula with rounded operands, the references of the exponentials shifted."""
    compute: Any = np.float64 if data.dtype == "float64" else np.float32
    s = data.spec
    grads = {n: np.zeros(x.shape, np.float64) for n, x in data.arrays.items() if n in ("query", "key", "value")}
    dbias = np.zeros((*s.out_shape[:-1], s.lengths[1])) if "bias" in data.arrays else None
    dbeta = np.zeros((s.heads[0], s.dims[1]))
    for head in heads(data, compute, rows):
        some = head.seen.any(axis=1)
        if not some.any():
            continue
        scores, slope = head.scores()
        again, _ = dataclasses.replace(head, q=head.q[:, ::-1], k=head.k[:, ::-1]).scores()
        do = np.where(some[:, None], data.d_out[head.at][head.rows], 0).astype(compute)
        dl = np.zeros(do.shape[0], compute)
        if data.d_lse is not None:
            dl = np.where(some, data.d_lse[head.at][head.rows], 0).astype(compute)
        ds, dv, db = _plain_head(scores, again, head.v, head.beta, do, dl, data.dtype, compute(shift))
        dx = significand(ds * slope, data.dtype)
        grads["query"][head.at][head.rows] = head.scale * (dx @ head.k)
        grads["key"][head.kv] += head.scale * (dx.T @ head.q)
        grads["value"][head.kv] += dv
        dbeta[head.at[-1]] += db
        if dbias is not None:
            dbias[head.at][head.rows] = ds
    if dbias is not None:
        grads["bias"] = unbroadcast(dbias, data.arrays["bias"].shape)
    if "beta" in data.arrays:
        grads["beta"] = unbroadcast(dbeta, data.arrays["beta"].shape)
    return grads


def _plain_head(
    s: Floats, again: Floats, v: Floats, beta: Floats, do: Floats, dl: Floats, dtype: str, shift: Any
) -> tuple[Floats, Floats, Floats]:
    """ds, dv and dβ of one head; channels with |βv| ≤ 1 and |β| < 1 in the expm1 form, the others in the exp form.

    A product of exponentials is kept as the exponential of a sum, times one plus the relative rounding of each factor.
    """
    empty = np.all(s == -math.inf, axis=1)
    m = np.where(empty, 0, np.max(s, axis=1))[:, None].astype(s.dtype) + shift
    p, loss_p = _rounded_exp(s - m, s.dtype.type(0), dtype)
    log_total = np.log(np.where(empty[:, None], 1, np.sum(p, axis=1, keepdims=True)))
    forward_log_p = s - m - log_total
    log_p = again - (m + log_total)  # backward there is l alone, in float32, and scores that are computed again
    p_forward, p = np.exp(forward_log_p), np.exp(log_p)

    y = beta * v
    form = (np.abs(beta) < 1) & (np.max(np.abs(y), axis=0, initial=0) <= 1)  # of the channel: expm1
    safe = np.where(beta == 0, 1, beta)
    _, loss_x = _rounded_exp(y, shift, dtype)
    x1 = np.where(beta == 0, v, np.expm1(np.where(form, y, 0)) / safe)
    x1_rounded = significand(x1, dtype)

    # forward: P·X
    t = forward_log_p[:, :, None] + y
    top = np.max(t, axis=1)
    top = np.where(np.isfinite(top), top, 0)
    keep = (1 + loss_p)[:, :, None] * (1 + loss_x)
    by_exp = (top + np.log(np.sum(np.exp(t - top[:, None, :]) * keep, axis=1))) / safe
    mean = (p_forward * (1 + loss_p)) @ x1_rounded
    by_expm1 = np.where(beta == 0, mean, np.log1p(np.where(form, beta * mean, 0)) / safe)
    o = np.where(empty[:, None], 0, np.where(form, by_expm1, by_exp)).astype(s.dtype)

    # backward: pᵀ·G, G·Xᵀ with G = do·exp(−βo)
    g = significand(do * np.exp(np.where(form, -beta * o, 0)), dtype)
    _, loss_g = _rounded_exp(-beta * o, -shift, dtype)
    hidden = (s == -math.inf)[:, :, None]
    z = np.where(hidden, 0, v[None] - o[:, None, :])
    w = np.exp(log_p[:, :, None] + beta * z)
    dv_exp = np.einsum("ie,ije->je", do * (1 + loss_g), w * (1 + loss_p)[:, :, None])
    dv_expm1 = np.exp(np.where(form, y, 0)) * ((p * (1 + loss_p)).T @ g)
    ds_exp = np.einsum("ie,ije->ij", np.where(form, 0, do) * (1 + loss_g), w * (1 + loss_x) / safe)
    ds_exp -= p * np.sum(np.where(form, 0, do / safe), axis=1, keepdims=True)
    into_form = np.where(form, g, 0)
    row = np.where(beta == 0, -do * o, do * np.expm1(np.where(form, -beta * o, 0)) / safe)
    ds_expm1 = p * (into_form @ np.where(form, x1_rounded, 0).T + np.sum(np.where(form, row, 0), axis=1, keepdims=True))
    ds = ds_exp + ds_expm1 + dl[:, None] * p

    # dβ = (Σ_j v_je dv_je − Σ_i do_ie o_ie)/β; in the expm1 form Σ_i g_ie (P·X₂ − S²·h(βS)), where at β = 0 X₂ is ½v²
    dbeta_exp = (np.sum(v * dv_exp, axis=0) - np.sum(do * o, axis=0)) / safe
    x2 = significand(v * v * curvature(np.where(form, y, 0), 2**-5), dtype)
    second = (p * (1 + loss_p)) @ x2 - mean * mean * defect(np.where(form, beta * mean, 0), 2**-5)
    dbeta_expm1 = np.sum(g * second, axis=0)
    return ds, np.where(form, dv_expm1, dv_exp), np.where(form, dbeta_expm1, dbeta_exp)


def _rounded_exp(y: Floats, shift: Any, dtype: str) -> tuple[Floats, Floats]:
    """``exp(y − shift)`` and the relative error of its evaluation and rounding; the latter exists for every y."""
    wider: Any = np.longdouble if dtype == "float64" else np.float64
    argument = np.where(np.isfinite(y), y, 0) - shift
    exact = np.where(np.isfinite(y), y, 0).astype(wider) - wider(shift)
    n = np.floor(exact * wider(math.log2(math.e)))  # 2ⁿ is taken out: it changes no significand
    mild = np.abs(argument) < 80
    x = np.where(
        mild, np.exp(np.where(mild, argument, 0)), np.exp2((exact * wider(math.log2(math.e)) - n).astype(y.dtype))
    )
    scaled = np.where(mild, np.exp(np.where(mild, exact, 0)), np.exp2(exact * wider(math.log2(math.e)) - n))
    return np.exp(y - shift), (significand(x.astype(y.dtype), dtype) / scaled - 1).astype(y.dtype)
