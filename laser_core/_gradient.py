"""The analytic gradient of LASER attention: derivation and code, line by line.

With ``w_ije = p_ij · exp(β_e (v_je − o_ie))``, which is ≥ 0 and sums to one over j,

    dv_je = Σ_i do_ie w_ije                              o is a log-mean-exp: ∂o_ie/∂v_je = w_ije
    ds_ij = Σ_e do_ie (w_ije − p_ij)/β_e + dl_i p_ij     ∂o_ie/∂s_ij = (w_ije − p_ij)/β_e,  ∂l_i/∂s_ij = p_ij
    dβ_e  = Σ_i do_ie (Σ_j w_ije v_je − o_ie)/β_e

and from the scores by the chain rule. At β = 0 the quotients are limits: ds is that of softmax attention and
dβ = Σ_i do_ie ½ Var_p(v). With z = v − o and g(t) = (eᵗ − 1)/t they are written without one, from

    (w − p)/β = p z g(βz)          and          Σ_j p z g(βz) = Σ_j (w − p)/β = 0,      so that
    (Σ_j w v − o)/β = Σ_j w z/β − Σ_j p z g(βz)/β = Σ_j p z² k(βz),      k(t) = (eᵗ − g(t))/t.
"""

from __future__ import annotations

import math

from . import _array, _reference
from ._array import Array, Namespace
from ._problem import Inputs, Problem
from ._registry import Gradients


def through_values(
    xp: Namespace, s: Array, v: Array, beta: Array, o: Array, l: Array, do: Array, dl: Array
) -> tuple[Array, Array, Array]:
    """From cotangents of o and l to those of the scores, the values and β.

    Args:
        xp: The namespace of the arrays.
        s: Scores ``(..., Lq, Lk)``, −∞ where hidden.
        v: Values, broadcastable to ``(..., 1, Lk, E)``.
        beta: Broadcastable to ``(..., 1, E)``.
        o: ``(..., Lq, E)``.
        l: ``(..., Lq)``, the log-sum-exp over all keys, of which these may be a part.
        do: ``(..., Lq, E)``.
        dl: ``(..., Lq)``.

    Returns:
        ``ds (..., Lq, Lk)``, ``dv (..., Lk, E)`` and ``dβ (..., E)``, for these queries and keys.
    """
    hidden = (s == -math.inf) | silent(xp, do, dl)[..., None]
    empty = l == -math.inf
    do = xp.where(empty[..., None], xp.zeros_like(do), do)[..., None, :]  # (..., Lq, 1, E)
    dl = xp.where(empty, xp.zeros_like(dl), dl)[..., None]
    log_p = s - xp.where(empty, xp.zeros_like(l), l)[..., None]
    p = xp.exp(log_p)
    beta = beta[..., None, :]

    z = xp.where(hidden[..., None], xp.zeros_like(log_p[..., None]), v - o[..., None, :])
    t = beta * z
    w = xp.exp(log_p[..., None] + t)
    near = xp.abs(t) <= 1
    t_near = xp.where(near, t, xp.zeros_like(t))
    over_beta = 1 / xp.where(beta == 0, xp.ones_like(beta), beta)

    far_slope = (w - p[..., None]) * over_beta
    slope = xp.where(near, p[..., None] * z * _array.expm1_over(xp, t_near), far_slope)
    curve = xp.where(near, p[..., None] * z * z * _array.exp_minus_g_over(xp, t_near), (w * z - far_slope) * over_beta)

    hide = hidden[..., None]
    zero = xp.zeros_like(w)
    ds = xp.sum(xp.where(hide, zero, do * slope), axis=-1) + xp.where(hidden, xp.zeros_like(p), dl * p)
    dv = xp.sum(xp.where(hide, zero, do * w), axis=-3)
    dbeta = xp.sum(xp.where(hide, zero, do * curve), axis=(-3, -2))
    return ds, dv, dbeta


def silent(xp: Namespace, do: Array, dl: Array) -> Array:
    """Which queries have cotangents of zero: nothing flows through them, not even where they are NaN."""
    return xp.all(do == 0, axis=-1) & (dl == 0)


def backward(problem: Problem, inputs: Inputs, d_out: Array, d_lse: Array | None) -> Gradients:
    """Cotangents of all arguments from those of the output and the log-sum-exp."""
    xp = _array.namespace(inputs.query)
    dtype = _array.dtype(xp, problem.compute_dtype)
    heads, group = problem.key_value_heads, problem.group
    if problem.key_length == 0:
        return no_gradients(xp, inputs)

    s, slope, q, k = _reference.scores(xp, problem, inputs)
    v = xp.astype(inputs.value, dtype)[..., None, :, :]
    beta = _reference.beta_of(xp, problem, inputs)
    o, l = _reference.attend(xp, s, v[..., None, :, :], beta)
    do = _reference.group_heads(xp, xp.astype(d_out, dtype), heads, group)
    dl = xp.zeros_like(l) if d_lse is None else _reference.group_heads(xp, xp.astype(d_lse, dtype), heads, group, 1)

    ds, dv, dbeta = through_values(xp, s, v[..., None, :, :], beta, o, l, do, dl)
    dbias = ds  # s = cap(x) + bias
    dx = problem.scale * ds * slope  # cap'(x) = 1 − tanh²(x/c)
    dq = xp.matmul(dx, k)  # x = scale · q kᵀ
    dk = xp.matmul(xp.matrix_transpose(dx), q)

    return Gradients(
        query=xp.astype(xp.reshape(dq, inputs.query.shape), inputs.query.dtype),
        key=xp.astype(xp.sum(dk, axis=-3), inputs.key.dtype),  # over the query heads of the group
        value=xp.astype(xp.sum(dv, axis=-3), inputs.value.dtype),
        bias=_to(xp, xp.reshape(dbias, problem.score_shape), inputs.bias),
        beta=_to(xp, xp.reshape(dbeta, (*problem.batch, problem.query_heads, problem.value_dim)), inputs.beta),
    )


def no_gradients(xp: Namespace, inputs: Inputs) -> Gradients:
    """Zero for every argument: where there is no key, nothing depends on anything."""
    q, k, v, bias, beta = (
        None if x is None else xp.zeros_like(x)
        for x in (inputs.query, inputs.key, inputs.value, inputs.bias, inputs.beta)
    )
    return Gradients(q, k, v, bias, beta)


def _to(xp: Namespace, gradient: Array, x: Array | None) -> Array | None:
    """A gradient in the shape and dtype of the argument that was broadcast."""
    return None if x is None else xp.astype(_array.unbroadcast(xp, gradient, tuple(x.shape)), x.dtype)
