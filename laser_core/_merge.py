"""Merging partial results over disjoint sets of keys, in the log domain."""

from __future__ import annotations

import numbers

from . import _array, _problem, _reference
from ._array import Array, Namespace


def merge(xp: Namespace, o_a: Array, l_a: Array, o_b: Array, l_b: Array, beta: Array) -> tuple[Array, Array]:
    """``merge_states`` on checked arrays, with ``beta`` broadcastable to o.

    Two partial results are two keys: their scores are l_a and l_b, and their values o_a and o_b.
    """
    s = xp.stack([l_a, l_b], axis=-1)
    v = xp.stack([o_a, o_b], axis=-2)
    return _reference.attend(xp, s, v, beta)


def merge_states(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, *, beta: float | Array = 1.0
) -> tuple[Array, Array]:
    r"""Merge LASER attention over two disjoint sets of keys into that over their union, exactly.

    .. math::
        l = \log(e^{l_a} + e^{l_b}), \qquad
        o = \frac1\beta \Bigl(\log\bigl(e^{l_a + \beta o_a} + e^{l_b + \beta o_b}\bigr) - l\Bigr)

    Associative and commutative up to rounding. The linear merge of softmax attention would be wrong here, except at
    β = 0, where this is it. A partial result over no keys (o = 0, l = −∞) changes nothing.

    Args:
        out_a: ``(..., Hq, Lq, E)``, floating.
        lse_a: ``(..., Hq, Lq)``, natural log, floating.
        out_b: As ``out_a``, the same shape and dtype.
        lse_b: As ``lse_a``, the same shape and dtype.
        beta: The inverse temperature that the parts were computed with: a finite number, or an array that
            broadcasts to ``(Hq, E)``.

    Returns:
        ``(out, lse)``, in the dtypes of ``out_a`` and ``lse_a``; computed in float32 or wider.

    Raises:
        TypeError: No arrays, arrays of different namespaces, or a dtype that is not floating.
        ValueError: Shapes that do not fit, or a ``beta`` that is not finite.
    """
    beta_array = None if isinstance(beta, numbers.Real) else beta
    arrays = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b, "beta": beta_array}
    _problem.check_states(arrays, beta)
    xp = _array.namespace(out_a)
    wide = "float64" if "float64" in (_array.dtype_name(out_a), _array.dtype_name(lse_a)) else "float32"
    dtype = _array.dtype(xp, wide)
    o_a, l_a, o_b, l_b = (xp.astype(x, dtype) for x in (out_a, lse_a, out_b, lse_b))
    if beta_array is None:
        b = xp.full((1, 1, 1), float(beta), dtype=dtype, device=_array.device(out_a))
    else:
        b = xp.astype(beta_array, dtype)
        b = xp.reshape(b, (1,) * (2 - b.ndim) + tuple(b.shape))[..., None, :]
    with _array.quiet(_array.framework(xp)):
        o, l = merge(xp, o_a, l_a, o_b, l_b, b)
    return xp.astype(o, out_a.dtype), xp.astype(l, lse_a.dtype)
