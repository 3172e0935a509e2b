"""Values in a form that a matrix product can take: LASER as softmax attention on exponentiated values.

Since ``Σ_j p_ij exp(β v_je)`` is linear in p, LASER is softmax attention over transformed values X, and a function of
one row's result. Two transformations are in use, per channel:

    exp     X = exp(βv) · 2^−c,   A = p·X,   o = (log A + c·log 2)/β       for |β| ≥ 1, and where |βo| is large
    expm1   X = (exp(βv) − 1)/β,  S = p·X,   o = log1p(βS)/β               for |β| < 1; at β = 0 it is p·v

c is an integer per head and channel. Scaling by a power of two is exact, so neither the result nor its bits depend on
which c was chosen: what a query cannot see may move c, and does not move the output. A head is *inside* the fast range
when every channel's βv spans no more than ``RANGE``: since the greatest weight of a row is at least 1/Lk, nothing that
matters can then underflow or overflow in float32. The others need the exact path. Where all |βv| ≤ 22, c is 0 and all
this is X = exp(βv), o = log(A)/β, bit for bit.

Backward, with ``G = do · exp(−βo) · 2^c`` the rest is that of softmax attention on (X, G), where the row term
Σ_j p_ij dP_ij of softmax attention has become the row sum of do (``_gradient`` has the mathematics):

    exp     ds = p ∘ (G·(X/β)ᵀ − Σ_e do/β),          dv = X ∘ (pᵀ·G)
    expm1   ds = p ∘ (G·Xᵀ + Σ_e do (e^−βo − 1)/β),  dv = exp(βv) ∘ (pᵀ·G)
"""

from __future__ import annotations

import math
from typing import NamedTuple

from . import _array
from ._array import Array, Namespace
from ._problem import Inputs, Problem

RANGE = 69.0  # nats
_CLIP = 80.0  # exp(80) is finite in float32; see ``_expm1_columns`` for why clipping βv there loses nothing
_STEP = 64  # exponents are split off in steps of so many bits: a value of less than 22 nats stays as it is
EASY = 22.0  # nats; below _STEP/2 bits
_LN2 = {  # log 2 in two parts; the first has few bits, so that its products with integers are exact
    "float32": (0.693359375, -2.12194440054690583e-4),
    "float64": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}


class Forms(NamedTuple):
    """Which of the two transformations the channels of a problem need; both where β is not known to need one."""

    exp: bool
    expm1: bool

    @property
    def linear(self) -> bool:
        """β is the number 0: X = v and o = p·v, and no function of β need be evaluated."""
        return not self.exp


class Values(NamedTuple):
    """Transformed values of some heads.

    Attributes:
        x: ``(..., Lk, W)``: the exp columns, then the expm1 columns; W is E or 2E. Finite.
        c: ``(..., 1, E)``, integers in a floating dtype; None where all are 0 because all |βv| ≤ 22.
        inside: ``(...)`` boolean: the head is inside the fast range.
        broken: Columns that say where the value is NaN and where βv is +∞, ``(..., Lk, 2E)`` of 0 and 1; None
            where there is none. Finite matrix products cannot carry them.
    """

    x: Array
    c: Array | None
    inside: Array
    broken: Array | None


def forms(xp: Namespace, problem: Problem, inputs: Inputs) -> Forms:
    """The transformations that the β of a problem needs."""
    if problem.beta is not None:
        return Forms(exp=problem.beta != 0, expm1=abs(problem.beta) < 1)
    large = _array.known(xp.all(xp.abs(inputs.beta) >= 1))
    return Forms(exp=True, expm1=large is not True)


def exponentiate(xp: Namespace, v: Array, beta: Array, which: Forms, inside_lengths: Array | None = None) -> Values:
    """The value pass: X, its integer references, and which heads are inside the fast range.

    Args:
        xp: The namespace of the arrays.
        v: ``(..., Lk, E)`` in the compute dtype.
        beta: Broadcastable to ``(..., 1, E)``.
        which: The transformations to make.
        inside_lengths: ``(..., Lk)`` boolean: keys that any query can see; the others do not count for the range.
    """
    y = beta * v
    easy = _array.known(xp.all(xp.abs(y) <= EASY)) is True
    if easy:
        c, broken, fits = None, None, None
        inside = xp.ones(y.shape[:-2], dtype=xp.bool, device=_array.device(y))
    else:
        counts = xp.isfinite(y)
        broken = None
        if _array.known(xp.all(counts)) is not True:
            broken = xp.astype(xp.concat([xp.isnan(y), y == math.inf], axis=-1), v.dtype)
        if inside_lengths is not None:
            counts = counts & inside_lengths[..., None]
        top = xp.max(xp.where(counts, y, xp.full_like(y, -math.inf)), axis=-2, keepdims=True)
        low = xp.min(xp.where(counts, y, xp.full_like(y, math.inf)), axis=-2, keepdims=True)
        inside = xp.all(top - low <= RANGE, axis=(-2, -1))  # none that counts: −∞ − ∞
        fits = counts & inside[..., None, None]
        middle = xp.where(inside[..., None, None] & (top >= low), (top + low) / 2, xp.zeros_like(top))
        c = xp.floor(middle * math.log2(math.e) + 0.5)

    columns = []
    if which.exp:
        columns.append(xp.exp(y) if c is None else _scaled_exp(xp, xp.where(fits, y, middle), c, fits))
    if which.expm1:
        columns.append(_expm1_columns(xp, v, y, beta, which))
    return Values(columns[0] if len(columns) == 1 else xp.concat(columns, axis=-1), c, inside, broken)


def _expm1_columns(xp: Namespace, v: Array, y: Array, beta: Array, which: Forms) -> Array:
    """(exp(βv) − 1)/β, scaled so that a sum over keys stays finite.

    βv is clipped: o is read from these columns only while ½ ≤ p·exp(βv) ≤ 1½, and inside the fast range a key with
    βv > 80 then has a weight of less than e^−80; what it adds is below the rounding of the sum.
    """
    finite = xp.isfinite(y)
    v = xp.where(finite, v, xp.zeros_like(y))
    if which.linear:
        return v * _expm1_scale(v.shape[-2])
    clipped = xp.where(finite, xp.clip(y, max=_CLIP), xp.zeros_like(y))
    x = v * _array.expm1_over(xp, clipped)
    x = xp.where(y == -math.inf, -1 / xp.where(beta == 0, xp.ones_like(beta), beta), x)
    largest = float(xp.finfo(v.dtype).max)
    return xp.clip(x, -largest, largest) * _expm1_scale(v.shape[-2])


def _expm1_scale(keys: int) -> float:
    return 2.0 ** -(keys.bit_length() + 24)  # 24: a kernel may keep p that many bits above 1


def finish(xp: Namespace, attended: Array, values: Values, beta: Array, which: Forms) -> Array:
    """The output from ``attended = p·X (..., Lq, W)``; rows that see no key are the caller's."""
    width = attended.shape[-1] // (which.exp + which.expm1)
    safe = xp.where(beta == 0, xp.ones_like(beta), beta)
    o = None
    if which.exp:
        a = attended[..., :width]
        o = (xp.log(a) if values.c is None else _log(xp, a, values.c)) / safe
    if which.expm1:
        largest = float(xp.finfo(attended.dtype).max)
        s = xp.clip(attended[..., -width:] / _expm1_scale(values.x.shape[-2]), -largest, largest)
        if which.linear:
            return s
        u = beta * s
        usable = (xp.abs(u) <= 0.5) & (xp.abs(beta) < 1)
        linear = s * _array.log1p_over(xp, xp.where(usable, u, xp.zeros_like(u)))
        o = linear if o is None else xp.where(usable, linear, o)
    return o


def mark_broken(xp: Namespace, o: Array, seen: Array, beta: Array) -> Array:
    """``o`` with what NaN and infinite visible values make of it; ``seen`` counts them, ``(..., Lq, 2E)``."""
    width = o.shape[-1]
    infinity = xp.where(beta < 0, xp.full_like(beta, -math.inf), xp.full_like(beta, math.inf))
    o = xp.where((seen[..., width:] > 0) & ~xp.isnan(o), infinity, o)
    return xp.where(seen[..., :width] > 0, xp.full_like(o, math.nan), o)


class Rows(NamedTuple):
    """What the backward pass needs of a query: ``g (..., Lq, W)`` and the row term ``r (..., Lq, 1)``."""

    g: Array
    r: Array


class Keys(NamedTuple):
    """What the backward pass needs of a key: all ``(..., Lk, W)``."""

    x: Array  # ds = p ∘ (g·xᵀ + r)
    to_dv: Array  # dv = to_dv ∘ (pᵀ·g), summed over the forms


def rows(xp: Namespace, o: Array, do: Array, dl: Array, values: Values, beta: Array, which: Forms) -> Rows:
    """The query side of the backward pass, from o, do ``(..., Lq, E)`` and dl ``(..., Lq)``, all finite."""
    if which.linear:
        r = dl[..., None] - xp.sum(do * o, axis=-1, keepdims=True)
        return Rows(do, r)
    y = beta * o
    safe = xp.where(beta == 0, xp.ones_like(beta), beta)
    zero = xp.zeros_like(y)
    linear = _linear(xp, y, beta, which)
    columns, r = [], zero
    if which.exp:
        d = xp.where(linear, zero, do)
        if values.c is None:
            columns.append(d * xp.exp(-y))
        else:  # a row that does not count may be far from the values
            near = xp.where(d == 0, values.c * math.log(2), y)
            columns.append(d * _scaled_exp(xp, -near, -values.c))
        r = r - d / safe
    if which.expm1:
        d = xp.where(linear, do, zero)
        t = xp.where(linear, y, zero)
        columns.append(d * xp.exp(-t))
        r = r - d * o * _array.expm1_over(xp, -t)
    g = columns[0] if len(columns) == 1 else xp.concat(columns, axis=-1)
    return Rows(g, xp.sum(r, axis=-1, keepdims=True) + dl[..., None])


def _linear(xp: Namespace, y: Array, beta: Array, which: Forms) -> Array:
    """Where o is read from the expm1 form, for ``y = β·o``."""
    return (xp.abs(y) <= 0.5) & (xp.abs(beta) < 1) if which.expm1 else xp.zeros_like(y, dtype=xp.bool)


def keys(xp: Namespace, v: Array, values: Values, beta: Array, which: Forms) -> Keys:
    """The key side of the backward pass."""
    y = beta * v
    finite = xp.isfinite(y)
    v = xp.where(finite, v, xp.zeros_like(y))
    if which.linear:
        return Keys(v, xp.ones_like(v))
    safe = xp.where(beta == 0, xp.ones_like(beta), beta)
    width = v.shape[-1]
    x, to_dv = [], []
    if which.exp:
        part = values.x[..., :width]
        x.append(part / safe)
        to_dv.append(part)
    if which.expm1:
        t = xp.where(finite, xp.clip(y, max=_CLIP), xp.zeros_like(y))
        x.append(values.x[..., -width:] / _expm1_scale(v.shape[-2]))
        to_dv.append(xp.where(finite, xp.exp(t), xp.zeros_like(t)))
    together = [a[0] if len(a) == 1 else xp.concat(a, axis=-1) for a in (x, to_dv)]
    return Keys(*together)


class ForBeta(NamedTuple):
    """dβ = of_queries + Σ_j to_keys ∘ (pᵀ·g), ``to_keys (..., Lk, W)`` summed over the forms."""

    of_queries: Array  # (..., 1, E)
    to_keys: Array


def for_beta(xp: Namespace, v: Array, o: Array, do: Array, values: Values, beta: Array, which: Forms) -> ForBeta:
    """What the gradient of an array β needs beside g.

    o follows v where all values are shifted, and dβ stays: both are taken about the middle of the outputs, or the
    digits of values far from zero would be lost in a difference. The middle depends on nothing that no query sees.
    """
    y = beta * v
    v = xp.where(xp.isfinite(y), v, xp.zeros_like(y))
    y = beta * o
    safe = xp.where(beta == 0, xp.ones_like(beta), beta)
    linear, zero = _linear(xp, y, beta, which), xp.zeros_like(y)
    shared = (-3, -2) if beta.ndim > 2 and beta.shape[-3] == 1 else (-2,)  # pᵀ·g may be summed over a group of heads
    of_queries, to_keys = xp.zeros_like(zero[..., :1, :]), []
    if which.exp:
        d = xp.where(linear, zero, do)
        centre = _middle(xp, o, d != 0, shared)
        of_queries = of_queries - xp.sum(d * (o - centre) / safe, axis=-2, keepdims=True)
        to_keys.append(values.x[..., : v.shape[-1]] * (v - centre) / safe)
    if which.expm1:
        d = xp.where(linear, do, zero)
        centre = _middle(xp, o, d != 0, shared)
        z = xp.where(linear, o - centre, zero)
        s = z * _array.expm1_over(xp, beta * z)
        defect = d * xp.exp(-beta * z) * s * s * _array.log1p_defect(xp, beta * s)
        of_queries = of_queries - xp.sum(defect, axis=-2, keepdims=True)
        z = v - centre
        curve = z * (z * _array.exp_minus_g_over(xp, xp.clip(beta * z, max=_CLIP))) * xp.exp(beta * centre)
        largest = float(xp.finfo(v.dtype).max)  # keys so large have no weight where o is read from these columns
        to_keys.append(xp.clip(curve, -largest, largest))
    return ForBeta(of_queries, to_keys[0] if len(to_keys) == 1 else xp.concat(to_keys, axis=-1))


def _middle(xp: Namespace, o: Array, counts: Array, axes: tuple[int, ...]) -> Array:
    """Between the least and the greatest output that counts; 0 where none does."""
    infinity = xp.full_like(o, math.inf)
    top = xp.max(xp.where(counts, o, -infinity), axis=axes, keepdims=True)
    low = xp.min(xp.where(counts, o, infinity), axis=axes, keepdims=True)
    return xp.where(top >= low, top / 2 + low / 2, xp.zeros_like(top))


def sum_forms(xp: Namespace, x: Array, which: Forms) -> Array:
    """``(..., W)`` columns added up to ``(..., E)``."""
    if not (which.exp and which.expm1):
        return x
    width = x.shape[-1] // 2
    return x[..., :width] + x[..., width:]


def _scaled_exp(xp: Namespace, y: Array, c: Array, where: Array | None = None) -> Array:
    """``exp(y)·2^−c``, the same bits times a power of two for every c; zero outside ``where``."""
    high, low = _LN2[_array.dtype_name(y)]
    steps = xp.floor(y / (_STEP * math.log(2)) + 0.5)
    x = xp.exp((y - steps * (_STEP * high)) - steps * (_STEP * low))
    first = xp.min(steps, axis=-2, keepdims=True)
    result = x * _pow2(xp, _STEP * first - c)
    for further in (1.0, 2.0):  # inside the fast range there are no more
        result = xp.where(steps == first + further, x * _pow2(xp, _STEP * (first + further) - c), result)
    return result if where is None else xp.where(where, result, xp.zeros_like(result))


def _log(xp: Namespace, a: Array, c: Array) -> Array:
    """``log(a·2^c)``, the same bits for every c with the same ``a·2^c``; log 0 = −∞, and NaN stays NaN."""
    high, low = _LN2[_array.dtype_name(a)]
    steps = xp.floor(c / _STEP + 0.5)
    a = a * _pow2(xp, c - _STEP * steps)
    steps = steps + xp.zeros_like(a)
    edge = 2.0 ** (_STEP // 2)
    for outside, step in ((a >= edge, 1), (a < 1 / edge, -1)):  # comparisons are exact: one class for one number
        steps = xp.where(outside, steps + step, steps)
        a = xp.where(outside, a * 2.0 ** (-_STEP * step), a)
    return steps * (_STEP * high) + (steps * (_STEP * low) + xp.log(a))


def _pow2(xp: Namespace, n: Array) -> Array:
    """``2^n`` for integral n, exactly; frameworks' ``exp2`` need not be. Beyond ±126 it stays there."""
    table = xp.asarray([2.0**i for i in range(-126, 127)], dtype=n.dtype, device=_array.device(n))
    index = xp.astype(xp.clip(n, -126.0, 126.0) + 126.0, xp.int32)
    return xp.reshape(xp.take(table, xp.reshape(index, (-1,))), n.shape)
