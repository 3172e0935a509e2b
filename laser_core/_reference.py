"""The definition of LASER attention (arXiv 2411.03493), exact for every option, in array-API calls only.

    s_ij = cap(scale · <q_i, k_j>) + bias_ij                      −∞ where key j is not visible to query i
    l_i  = log Σ_j exp(s_ij)
    o_ie = (1/β_e) · log Σ_j exp(s_ij − l_i) · exp(β_e · v_je)

Everything is materialised, and nothing is hidden in a kernel: this is the truth that the others are judged by.
Differentiable by the framework, to any order. Memory is O(Lq · Lk · E).
"""

from __future__ import annotations

import math

from . import _array, _gradient
from ._array import Array, Namespace
from ._problem import Inputs, Problem
from ._registry import Backend, Forward, Gradients


def attend(xp: Namespace, s: Array, v: Array, beta: Array, large_beta: bool = False) -> tuple[Array, Array]:
    """LASER attention over given scores.

    Args:
        xp: The namespace of the arrays.
        s: Scores ``(..., K)``; −∞ hides a key, and what a hidden key's value is does not matter.
        v: Values, broadcastable to ``(..., K, E)``.
        beta: Inverse temperature, broadcastable to ``(..., E)``.
        large_beta: All |β| ≥ 1: the log form is all that is needed.

    Returns:
        ``o (..., E)`` and ``l (...)``. A row that sees no key has o = 0 and l = −∞.
    """
    hidden = s == -math.inf
    empty = xp.all(hidden, axis=-1)
    v = xp.where(hidden[..., None], xp.zeros_like(s[..., None]), v)

    m = xp.where(empty, xp.zeros_like(s[..., 0]), xp.max(s, axis=-1))
    weights = xp.exp(s - m[..., None])
    total = xp.sum(weights, axis=-1)
    log_total = xp.log(xp.where(empty, xp.ones_like(total), total))
    l = xp.where(empty, xp.full_like(total, -math.inf), m + log_total)

    # log form: log Σ exp((s − m) + βv), about its greatest term
    t = (s - m[..., None])[..., None] + beta[..., None, :] * v
    top = xp.max(t, axis=-2)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    terms = xp.sum(xp.exp(t - top[..., None, :]), axis=-2)
    nothing = terms == 0
    log_terms = xp.log(xp.where(nothing, xp.ones_like(terms), terms))
    # not in empty rows: what is divided by β should be finite there, or autodiff makes NaN of it
    log_terms = xp.where(nothing & ~empty[..., None], xp.full_like(terms, -math.inf), log_terms)
    zero = beta == 0
    from_log = (top + log_terms - log_total[..., None]) / xp.where(zero, xp.ones_like(beta), beta)
    if large_beta:
        return xp.where(empty[..., None], xp.zeros_like(from_log), from_log), l

    # expm1 form: S = Σ p (exp(βv) − 1)/β and o = log1p(βS)/β, which has no 1/β to lose digits by
    near = xp.max(xp.abs(beta[..., None, :] * v), axis=-2) <= 1
    v_near = xp.where(near[..., None, :], v, xp.zeros_like(v))
    p = weights / xp.where(empty, xp.ones_like(total), total)[..., None]
    mean = xp.sum(p[..., None] * v_near * _array.expm1_over(xp, beta[..., None, :] * v_near), axis=-2)
    from_expm1 = mean * _array.log1p_over(xp, beta * mean)

    return xp.where(empty[..., None], xp.zeros_like(from_log), xp.where(near, from_expm1, from_log)), l


def visible(xp: Namespace, problem: Problem, inputs: Inputs, rows: slice, columns: slice) -> Array | None:
    """Which keys ``columns`` the queries ``rows`` see, broadcastable to (..., Hq, rows, columns); None is all.

    visible = mask AND causal AND window AND inside the sequence lengths.
    """
    device = _array.device(inputs.query)
    i = xp.arange(rows.start, rows.stop, dtype=xp.int32, device=device)[:, None]
    j = xp.arange(columns.start, columns.stop, dtype=xp.int32, device=device)[None, :]
    conditions = []
    if inputs.attn_mask is not None:
        conditions.append(window_of(inputs.attn_mask, rows, columns))
    low, high = problem.band
    if low is not None and columns.start < rows.stop - 1 + low:
        conditions.append(j - i >= low)
    if high is not None and columns.stop - 1 > rows.start + high:
        conditions.append(j - i <= high)
    for lengths, position, limit in (
        (inputs.query_seq_lengths, i, problem.query_length),
        (inputs.key_value_seq_lengths, j, problem.key_length),
    ):
        if lengths is not None:
            conditions.append(position < _positions(xp, lengths, limit)[..., None, None, None])
    together = None
    for condition in conditions:
        together = condition if together is None else together & condition
    return together


def _positions(xp: Namespace, lengths: Array, limit: int) -> Array:
    """Sequence lengths as int32, which the positions are in; what does not fit is beyond the end anyway."""
    if xp.iinfo(lengths.dtype).max > limit:
        lengths = xp.clip(lengths, 0, limit)
    return xp.astype(lengths, xp.int32)


def window_of(x: Array, rows: slice, columns: slice) -> Array:
    """The part of a mask or bias for a range of queries and keys; axes that broadcast stay as they are."""
    if x.ndim >= 1 and x.shape[-1] != 1:
        x = x[..., columns]
    if x.ndim >= 2 and x.shape[-2] != 1:
        x = x[..., rows, :]
    return x


def group_heads(xp: Namespace, x: Array, heads: int, group: int, trailing: int = 2) -> Array:
    """The head axis of ``x``, before its ``trailing`` last ones, split into (Hkv, group); it may be 1 or absent."""
    if x.ndim <= trailing:
        return x
    axis = x.ndim - trailing - 1
    split = (heads, group) if x.shape[axis] != 1 else (1, 1)
    return xp.reshape(x, (*x.shape[:axis], *split, *x.shape[axis + 1 :]))


def finite(xp: Namespace, x: Array) -> Array:
    """``x`` with zeros for NaN and ±∞: 0 · NaN is NaN, so no matrix product may meet one that is hidden."""
    return xp.where(xp.isfinite(x), x, xp.zeros_like(x))


def any_nonfinite(xp: Namespace, x: Array) -> Array:
    """Which rows of ``x (..., L, D)`` hold a NaN or ±∞."""
    return ~xp.all(xp.isfinite(x), axis=-1)


def beta_of(xp: Namespace, problem: Problem, inputs: Inputs) -> Array:
    """β as an array that broadcasts to (Hkv, group, 1, E), in the compute dtype."""
    dtype = _array.dtype(xp, problem.compute_dtype)
    if inputs.beta is None:
        return xp.full((1, 1, 1, 1), problem.beta, dtype=dtype, device=_array.device(inputs.query))
    beta = xp.astype(inputs.beta, dtype)
    beta = xp.reshape(beta, (1,) * (2 - beta.ndim) + tuple(beta.shape))
    return group_heads(xp, beta[..., None, :], problem.key_value_heads, problem.group)


def scores(xp: Namespace, problem: Problem, inputs: Inputs) -> tuple[Array, Array, Array, Array]:
    """``s (..., Hkv, group, Lq, Lk)``, the slope of the soft cap, and the finite parts of q and k in that layout."""
    dtype = _array.dtype(xp, problem.compute_dtype)
    heads, group = problem.key_value_heads, problem.group
    q = group_heads(xp, xp.astype(inputs.query, dtype), heads, group)
    k = xp.astype(inputs.key, dtype)[..., None, :, :]
    # A query or key that is not finite makes its visible scores NaN; what is hidden never meets it.
    broken = any_nonfinite(xp, q)[..., :, None] | any_nonfinite(xp, k)[..., None, :]
    q, k = finite(xp, q), finite(xp, k)
    s = problem.scale * xp.matmul(q, xp.matrix_transpose(k))
    slope = xp.ones_like(s)
    if problem.logits_soft_cap is not None:
        t = xp.tanh(s / problem.logits_soft_cap)
        s, slope = problem.logits_soft_cap * t, 1 - t * t
    if inputs.bias is not None:
        s = s + group_heads(xp, xp.astype(inputs.bias, dtype), heads, group)
    s = xp.where(broken & (s != -math.inf), xp.full_like(s, math.nan), s)
    seen = visible(xp, problem, inputs, slice(0, problem.query_length), slice(0, problem.key_length))
    if seen is not None:
        s = xp.where(group_heads(xp, seen, heads, group), s, xp.full_like(s, -math.inf))
    return s, slope, q, k


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """Section 1 of the contract, as it stands."""
    xp = _array.namespace(inputs.query)
    dtype = _array.dtype(xp, problem.compute_dtype)
    if problem.key_length == 0:
        o = xp.zeros(problem.out_shape, dtype=inputs.query.dtype, device=_array.device(inputs.query))
        return Forward(o, xp.full(problem.lse_shape, -math.inf, dtype=dtype, device=_array.device(inputs.query)))
    s, _, _, _ = scores(xp, problem, inputs)
    v = xp.astype(inputs.value, dtype)[..., None, None, :, :]
    o, l = attend(xp, s, v, beta_of(xp, problem, inputs))
    return Forward(
        xp.reshape(xp.astype(o, inputs.query.dtype), problem.out_shape),
        xp.reshape(l, problem.lse_shape),
    )


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """The analytic gradient, with o and l recomputed in full precision (see ``_gradient``)."""
    return _gradient.backward(problem, inputs, d_out, d_lse)


TINY = 2**16  # elements of the materialised (Lq, Lk, E) terms below which tiling only costs
LARGEST = 2**27  # elements beyond which they take gigabytes: a backward pass holds about ten such arrays


def _terms(problem: Problem) -> int:
    return math.prod(problem.score_shape) * problem.value_dim


def _why_not(problem: Problem) -> str | None:
    if _terms(problem) > LARGEST:
        shape = (*problem.score_shape, problem.value_dim)
        return f"it materialises terms of shape {shape}, {_terms(problem)} elements (supported: up to {LARGEST})"
    return None


def _priority(problem: Problem) -> int:
    return 20 if _terms(problem) <= TINY else 0


BACKEND = Backend(
    name="reference",
    summary="the definition, materialised: exact, differentiable to any order, O(Lq·Lk·E) memory",
    forward=forward,
    backward=backward,
    why_not=_why_not,
    priority=_priority,
    native=True,
)
