"""What is done with the problem of a case: each check calls the subject and returns what it found."""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import compare
from .compare import Finding
from .generate import Fill, Floats, fill, rounded
from .problems import Data, Spec, build, visible
from .subject import NotThere, Refused, Results, Subject
from .tolerance import ROUNDOFF, Bounds, bounds
from .truth import Truth, truth

Check = Callable[[Subject, Data], list[Finding]]


@functools.lru_cache(maxsize=256)
def _known(spec: Spec, dtype: str, gradients: bool, rows: tuple[int, int] | None) -> tuple[Truth, Bounds]:
    data = build(spec, dtype)
    expected = truth(data, gradients=gradients, rows=rows)
    return expected, bounds(data, expected, rows=rows)


def judged(data: Data, results: Results, rows: tuple[int, int] | None = None, known: bool = True) -> list[Finding]:
    """Results against the truth; ``known`` where the data is what :func:`build` makes, so that the truth is kept."""
    gradients = any(name.startswith("d_") for name in results.values)
    if known:
        expected, allowed = _known(data.spec, data.dtype, gradients, rows)
    else:
        expected = truth(data, gradients=gradients, rows=rows)
        allowed = bounds(data, expected, rows=rows)
    return [*results.findings, *against(data, results.values, expected, allowed, rows)]


def against(
    data: Data, values: Mapping[str, Floats], expected: Truth, allowed: Bounds, rows: tuple[int, int] | None = None
) -> list[Finding]:
    """NumPy results against a truth that is there already."""
    found = []
    some = slice(*rows) if rows else slice(None)
    for name, got in values.items():
        if name == "out":
            found.append(compare.entries(name, got[..., some, :], expected.out, allowed.out))
            found.append(_between(data, got[..., some, :], expected))
        elif name == "lse":
            found.append(compare.entries(name, got[..., some], expected.lse, allowed.lse))
        else:
            own = name.removeprefix("d_")
            found.append(compare.in_norm(name, got, expected.gradients[own], allowed.gradients[own]))
    return found


def _between(data: Data, got: Floats, expected: Truth) -> Finding:
    """The output lies between the least and the greatest visible value, up to one rounding of a half precision dtype.

    In float32 and float64 the bound on the error says as much.
    """
    if data.dtype not in ("float16", "bfloat16") or got.size == 0:
        return Finding("out")
    slack = 2 * ROUNDOFF[data.dtype]
    least = 2.0**-20  # what evaluation in float32 costs, as in the bound on scores
    got = got.astype(np.float64)
    outside = ~(
        (got >= expected.low - slack * np.abs(expected.low) - least)
        & (got <= expected.high + slack * np.abs(expected.high) + least)
    )
    if outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        return Finding(
            "out",
            None,
            f"out: {int(outside.sum())} entries are not between the least and the greatest visible value; at {at}: got "
            f"{got[at]:.6g}, visible are {float(expected.low[at]):.6g} … {float(expected.high[at]):.6g}",
        )
    return Finding("out")


def forward(subject: Subject, data: Data) -> list[Finding]:
    """Outputs against the truth."""
    return judged(data, subject.forward(data))


def gradients(subject: Subject, data: Data) -> list[Finding]:
    """Outputs and all gradients against the truth."""
    return judged(data, subject.gradients(data))


def deterministic(subject: Subject, data: Data) -> list[Finding]:
    """Four runs on fresh copies of the same data, bit for bit."""
    first = subject.gradients(data)
    found = list(first.findings)
    for _ in range(3):
        again = subject.gradients(data.with_arrays(**{n: x.copy() for n, x in data.arrays.items()}))
        found += again.findings
        for name, x in first.values.items():
            if name in again.values:
                found.append(compare.same_bits(name, again.values[name], x, "two runs on the same data differ"))
    return found


# ---------------------------------------------------------------------------------------------------------- isolation


def hidden_from_all(data: Data) -> tuple[Floats, Floats]:
    """Which keys no query sees (..., Hkv, Lk), and which queries see nothing (..., Hq, Lq)."""
    seen = visible(data)
    hq, hkv = data.spec.heads
    grouped = seen.any(axis=-2).reshape((*data.spec.batch, hkv, hq // hkv, -1)).any(axis=-2)
    return ~grouped, ~seen.any(axis=-1)


def _overwritten(data: Data, what: Floats | float) -> Data:
    """The data with something else in keys and values that no query sees, and in queries that see nothing."""
    keys, queries = hidden_from_all(data)
    new = {}
    for name, where in (("query", queries), ("key", keys), ("value", keys)):
        x = data.arrays[name]
        other = (
            np.broadcast_to(np.asarray(what), x.shape)
            if np.ndim(what) == 0
            else fill(Fill(), name, x.shape, data.dtype)
        )
        new[name] = np.where(where[..., None], other.astype(x.dtype), x)
    return data.with_arrays(**new)


def isolation(subject: Subject, data: Data) -> list[Finding]:
    """What no query sees is NaN, ∞, other numbers, and far-away numbers: the same bits, the last within tolerance."""
    base = subject.gradients(data)
    found = judged(data, base)
    another: Any = np.zeros(1)
    for what, name in ((math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"), (another, "another number")):
        changed = subject.gradients(_overwritten(data, what))
        found += _same(base, changed, f"{name} in what no query sees changes it")
    for far in (3e4, -3e4):
        changed = subject.gradients(_overwritten(data, far))
        found += against(data, changed.values, *_known(data.spec, data.dtype, True, None))
    return found


def _same(base: Results, changed: Results, why: str) -> list[Finding]:
    found = list(changed.findings)
    for name, x in base.values.items():
        if name in changed.values:
            found.append(compare.same_bits(name, changed.values[name], x, why))
    return found


def isolation_of_rows(subject: Subject, data: Data) -> list[Finding]:
    """Anything in the last keys: queries that do not see them keep the bits of their results and of their gradients.

    NaN and ∞ in keys and in values; and other values, such that a channel stays well inside the range of its dtype.
    """
    base = subject.gradients(data)
    found = judged(data, base)
    count = max(1, data.spec.lengths[1] // 8)
    late = np.zeros(data.spec.lengths[1], dtype=bool)
    late[-count:] = True
    untouched = ~(visible(data) & late).any(axis=-1)
    shape = data.arrays["value"].shape
    shifts = (0, 4 if data.dtype == "float16" else 8)
    others = [(fill(Fill("normal", 1, shift), "late", shape, data.dtype), f"N({shift}, 1)") for shift in shifts]
    contents = [(argument, what) for argument in ("key", "value") for what in (math.nan, math.inf, -math.inf)]
    for argument, what, name in (*((a, w, str(w)) for a, w in contents), *(("value", *other) for other in others)):
        x = data.arrays[argument]
        changed = subject.gradients(
            data.with_arrays(**{argument: np.where(late[:, None], np.asarray(what, x.dtype), x)})
        )
        found += changed.findings
        for result in ("out", "lse", "d_query"):
            if result in changed.values:
                a, b = base.values[result], changed.values[result]
                why = f"{name} in the {argument} of positions that it does not see changes a query's result"
                found.append(compare.same_bits(result, b[untouched], a[untouched], why))
    return found


def isolation_of_entries(subject: Subject, data: Data) -> list[Finding]:
    """Entries of bias and mask that other conditions hide may hold anything: NaN, ∞, True."""
    base = subject.gradients(data)
    found = judged(data, base)
    free = ("bias", "attn_mask")
    rest = build(_without(data.spec), data.dtype)
    hidden = ~visible(rest)
    for argument, contents in (("bias", (math.nan, math.inf, 3e4)), ("attn_mask", (True, False))):
        if argument not in data.arrays or argument not in free:
            continue
        x = data.arrays[argument]
        where = hidden.reshape((-1, *hidden.shape[-2:])).all(axis=0)  # of every batch entry and head
        for what in contents:
            changed = subject.gradients(data.with_arrays(**{argument: np.where(where, np.asarray(what, x.dtype), x)}))
            why = f"{what} in entries of {argument} that other conditions hide changes it"
            found += _same(base, changed, why)
    return found


def _without(spec: Spec) -> Spec:
    return dataclasses.replace(spec, bias_shape=None, mask_shape=None)


def isolation_of_batches(subject: Subject, data: Data) -> list[Finding]:
    """NaN in all of one batch entry: the others keep their bits, outputs and gradients."""
    base = subject.gradients(data)
    found = judged(data, base)
    changed = {}
    for name in ("query", "key", "value"):
        changed[name] = data.arrays[name].copy()
        changed[name][0] = np.nan
    other = subject.gradients(data.with_arrays(**changed))
    found += other.findings
    for name in other.values:
        if name not in ("d_bias", "d_beta"):
            why = "NaN in another batch entry changes it"
            found.append(compare.same_bits(name, other.values[name][1:], base.values[name][1:], why))
    return found


def isolation_of_heads(subject: Subject, data: Data) -> list[Finding]:
    """The second of four key/value heads is outside the fast range, the last holds NaN and ∞ where no query sees them.

    All are right, and the first and third keep the bits that they have among heads like them.
    """
    base = subject.gradients(data)
    found = judged(data, base)
    group = data.spec.heads[0] // data.spec.heads[1]
    keys, queries = hidden_from_all(data)
    new = {}
    for name, where, own in (("query", queries, group), ("key", keys, 1), ("value", keys, 1)):
        x = data.arrays[name].copy()
        broken = where[..., None] & (np.arange(x.shape[-3]) >= 3 * own)[:, None, None]
        odd = (np.arange(x.shape[-2]) % 2)[:, None]
        new[name] = np.where(broken, np.where(odd, math.inf, math.nan).astype(x.dtype), x)
    new["value"][..., 1, :, :] = fill(Fill("normal", 300), f"{data.spec.seed}/wide", x.shape, data.dtype)[..., 1, :, :]
    mixed = data.with_arrays(**new)
    changed = subject.gradients(mixed)
    found += judged(mixed, changed, known=False)
    for name in changed.values:
        kept = [slice(n * own, (n + 1) * own) for own in [1 if name in ("d_key", "d_value") else group] for n in (0, 2)]
        axis = -2 if name == "lse" else -3
        for heads in kept:
            a, b = (np.moveaxis(r.values[name], axis, 0)[heads] for r in (base, changed))
            why = "what its neighbours hold changes a head inside the fast range"
            found.append(compare.same_bits(name, np.ascontiguousarray(b), np.ascontiguousarray(a), why))
    return found


# ------------------------------------------------------------------------------------------------------------- layout


def _laid_out(x: Floats, how: str) -> Floats:
    """The same array with other strides."""
    if x.ndim < 3:
        return x
    if how == "heads inside":  # stored (..., L, H, D)
        return np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3)
    if how == "columns":  # stored (..., D, L)
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if how == "gaps":  # every second row and column of a larger array full of NaN
        store = np.full((*x.shape[:-2], 2 * x.shape[-2] + 1, 2 * x.shape[-1] + 1), np.nan).astype(x.dtype)
        view = store[..., 1::2, 1::2]
        view[...] = x
        return view
    raise ValueError(f"layout: got {how!r}")


def _need_strides(subject: Subject) -> None:
    if not subject.library.strided:
        raise NotThere(f"arrays of {subject.library.name} have no strides of their own")


def strides(how: str) -> Check:
    """Arrays, cotangents too, with strides other than those of C order."""

    def check(subject: Subject, data: Data) -> list[Finding]:
        _need_strides(subject)
        arranged = dataclasses.replace(
            data,
            arrays={n: _laid_out(x, how) if x.dtype != bool else x for n, x in data.arrays.items()},
            d_out=_laid_out(data.d_out, how),
        )
        return judged(data, subject.gradients(arranged))

    return check


def stride_zero(subject: Subject, data: Data) -> list[Finding]:
    """Keys and values of one head broadcast to all, one query broadcast to all, a constant cotangent: stride 0."""
    _need_strides(subject)
    arrays = dict(data.arrays)
    for name, axis in (("key", -3), ("value", -3), ("query", -2)):
        x = arrays[name]
        arrays[name] = np.broadcast_to(np.take(x, [0], axis=axis), x.shape)
    d_out = np.broadcast_to(rounded(np.asarray(0.5), data.dtype), data.d_out.shape)
    data = dataclasses.replace(data, arrays=arrays, d_out=d_out)
    return judged(data, subject.gradients(data), known=False)


# -------------------------------------------------------------------------------------------------------------- scale


def long(subject: Subject, data: Data) -> list[Finding]:
    """Long sequences: the outputs of a few queries, and all gradients of cotangents that are zero elsewhere."""
    lq = data.spec.lengths[0]
    rows = (lq - min(16, lq), lq)
    d_out = data.d_out.copy()
    d_out[..., : rows[0], :] = 0
    data = dataclasses.replace(data, d_out=d_out)
    return judged(data, subject.gradients(data), rows)


def far_apart(subject: Subject, data: Data) -> list[Finding]:
    """Two heads 2³¹ elements apart in one allocation: addresses that 32 bits do not hold."""
    _need_strides(subject)
    key = data.arrays["key"]
    count, item = key[..., 0, :, :].size, key.itemsize
    size = (2**31 + 2 * count) * item
    try:
        # mapped, not allocated: of these bytes only the corners are ever touched
        store = np.frombuffer(mmap.mmap(-1, size), np.uint8).view(key.dtype)
    except OSError as error:
        raise Refused(f"no {size / 2**30:.0f} GiB of address space for the test") from error
    arrays = {}
    for name, start in (("key", 0), ("value", count)):
        x = data.arrays[name]
        arrays[name] = np.lib.stride_tricks.as_strided(
            store[start:], x.shape, (0, 2**31 * item, x.shape[-1] * item, item), writeable=True
        )
        arrays[name][...] = x
    return judged(data, subject.forward(data.with_arrays(**arrays)))


CHECKS: dict[str, Check] = {
    "forward": forward,
    "gradients": gradients,
    "deterministic": deterministic,
    "isolation": isolation,
    "isolation of rows": isolation_of_rows,
    "isolation of entries": isolation_of_entries,
    "isolation of batches": isolation_of_batches,
    "isolation of heads": isolation_of_heads,
    "heads inside": strides("heads inside"),
    "columns": strides("columns"),
    "gaps": strides("gaps"),
    "stride 0": stride_zero,
    "long": long,
    "far apart": far_apart,
}
