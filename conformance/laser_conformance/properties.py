"""Laws that need no reference, over problems that Hypothesis draws.

Tolerances are the bounds of section 2.3 for both sides of an equation. Sums of gradients may be off by four roundings
of each term, where a rounding is the u of 2.3 (1e-5 in float32): those of p, exp(v), exp(−o) and the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

import laser_core

from .case import Case
from .compare import Finding
from .generate import Fill, Floats, rounded
from .problems import Data, Spec, build, visible
from .subject import Refused, Subject
from .tolerance import ROUNDOFF, out_bound
from .truth import Truth

EXAMPLES = 12
Law = Callable[[Subject, str, Spec, Any], None]
LAWS: dict[str, tuple[Law, str]] = {}


class Broken(AssertionError):
    """A law does not hold."""


def law(sentence: str) -> Callable[[Law], Law]:
    """Register a law under the name of its function."""

    def register(function: Law) -> Law:
        LAWS[function.__name__.replace("_", "-")] = (function, sentence)
        return function

    return register


_FORMS: tuple[dict[str, Any], ...] = (  # few, because frameworks that compile do so once for each
    {"heads": (2, 2), "lengths": (17, 24), "dims": (16, 16)},
    {"heads": (2, 2), "lengths": (17, 24), "dims": (16, 16), "causal": "top_left"},
    {"heads": (6, 2), "lengths": (5, 40), "dims": (8, 4), "causal": "top_left", "beta": 2.0},
    {"heads": (2, 1), "lengths": (24, 3), "dims": (20, 24), "beta": -1.0},
    {"heads": (1, 1), "lengths": (1, 33), "dims": (1, 1), "beta": 0.5},
)


@st.composite
def _specs(draw: Any) -> Spec:
    return Spec(
        **draw(st.sampled_from(_FORMS)),
        value=Fill("normal", draw(st.sampled_from((0.5, 1.0, 4.0)))),
        seed=f"law/{draw(st.integers(0, 999))}",
    )


def _check(function: Law) -> Callable[[Subject, Data], list[Finding]]:
    def check(subject: Subject, data: Data) -> list[Finding]:
        refusals: list[Refused] = []
        tried: list[Spec] = []

        @hypothesis.settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=EXAMPLES,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate,),
        )
        @hypothesis.given(spec=_specs(), more=st.data())
        def holds(spec: Spec, more: Any) -> None:
            try:
                function(subject, data.dtype, spec, more)
            except Refused as error:
                refusals.append(error)  # the backend's own, or that of a library that lacks something
                return
            except Broken as error:
                sizes = f"Hq, Hkv = {spec.heads}, Lq, Lk = {spec.lengths}, D, E = {spec.dims}"
                raise Broken(f"{error} ({sizes}, β = {spec.beta:g}, causal {spec.causal}, {spec.seed})") from None
            tried.append(spec)

        try:
            holds()
        except Broken as error:
            return [Finding("law", None, str(error))]
        if not tried:
            raise refusals[0]
        return [Finding("law")]

    return check


# ------------------------------------------------------------------------------------------------------------ helpers


def _roundoff(dtype: str) -> float:
    return {"float32": 1e-5, "float64": 1e-5 * 2.0**-29}.get(dtype, ROUNDOFF[dtype])


def _out(subject: Subject, data: Data) -> Floats:
    return _values(subject, data, gradients=False)["out"]


def _values(subject: Subject, data: Data, gradients: bool) -> dict[str, Floats]:
    results = subject.gradients(data) if gradients else subject.forward(data)
    for finding in results.findings:
        raise Broken(finding.problem or "")
    return {n: x.astype(np.float64) for n, x in results.values.items()}


def _bound(data: Data, out: Floats) -> Floats:
    """The bound of 2.3 about a result."""
    size = np.full(out.shape, float(np.max(np.abs(data.arrays["value"].astype(np.float64)), initial=0)))
    return out_bound(data, Truth(out, out[..., 0], out, out, size, {}))


def _equal(what: str, a: Floats, b: Floats, allowed: Floats) -> None:
    with np.errstate(invalid="ignore"):
        good = (a == b) | (np.abs(a - b) <= allowed)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        raise Broken(f"{what}: {a[at]:.6g} and {b[at]:.6g} at {at}")


def _with(spec: Spec, **changes: Any) -> Spec:
    return dataclasses.replace(spec, **changes)


def _replace_keys(data: Data, count: int, **arrays: Floats) -> Data:
    changed = data.with_arrays(**arrays)
    return dataclasses.replace(changed, spec=_with(data.spec, lengths=(data.spec.lengths[0], count)))


# --------------------------------------------------------------------------------------------------------------- laws


@law("o(v + c) = o(v) + c.")
def shift(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Shift equivariance."""
    data = build(spec, dtype)
    quarters = np.clip(np.round(4 * data.arrays["value"].astype(np.float64)), -16, 16) / 4  # so that v + c is exact
    c = more.draw(st.integers(-8, 8))
    here = data.with_arrays(value=rounded(quarters, dtype))
    there = data.with_arrays(value=rounded(quarters + c, dtype))
    a, b = _out(subject, here), _out(subject, there)
    seen = visible(data).any(axis=-1)[..., None]
    _equal("o(v) + c and o(v + c)", np.where(seen, a + c, 0), b, _bound(here, a) + _bound(there, b))


@law("o(2v; β) = 2·o(v; 2β).")
def scaling(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Values and β are in units of each other."""
    data, sharper = build(spec, dtype), build(_with(spec, beta=2 * spec.beta), dtype)
    doubled = data.with_arrays(value=rounded(2 * data.arrays["value"].astype(np.float64), dtype))
    a, b = _out(subject, doubled), _out(subject, sharper)
    _equal("o(2v; β) and 2·o(v; 2β)", a, 2 * b, _bound(doubled, a) + 2 * _bound(sharper, b))


@law("P·v ≤ o ≤ max v for β > 0, and min v ≤ o ≤ P·v for β < 0.")
def between(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Between the mean and the extreme."""
    data = build(spec, dtype)
    mean = _out(subject, build(_with(spec, beta=0.0), dtype))
    o = _out(subject, data)
    group = spec.heads[0] // spec.heads[1]
    v = np.repeat(data.arrays["value"].astype(np.float64), group, axis=-3)[..., None, :, :]
    seen = visible(data)[..., None]
    sign = 1 if spec.beta > 0 else -1
    top = np.where(seen, sign * v, -math.inf).max(axis=-2)
    slack = _bound(data, o) + _bound(build(_with(spec, beta=0.0), dtype), mean)
    if not (sign * o <= top + slack).all():
        raise Broken("o is beyond the extreme visible value")
    if not (sign * o >= sign * mean - slack).all():
        raise Broken("o is on the wrong side of the mean")


@law("o grows where a value grows.")
def monotone(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Monotone in v."""
    data = build(spec, dtype)
    step = np.abs(build(_with(spec, seed=spec.seed + "/step"), dtype).arrays["value"].astype(np.float64))
    there = data.with_arrays(value=rounded(data.arrays["value"].astype(np.float64) + step, dtype))
    a, b = _out(subject, data), _out(subject, there)
    if not (b >= a - _bound(data, a) - _bound(there, b)).all():
        raise Broken("o decreases although every value grows")


@law("o moves no further than the values do.")
def lipschitz(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """1-Lipschitz in v, in the maximum norm of each channel."""
    data = build(spec, dtype)
    v = data.arrays["value"].astype(np.float64)
    step = build(_with(spec, seed=spec.seed + "/step"), dtype).arrays["value"].astype(np.float64)
    there = data.with_arrays(value=rounded(v + step, dtype))
    a, b = _out(subject, data), _out(subject, there)
    group = spec.heads[0] // spec.heads[1]
    moved = np.repeat(np.abs(there.arrays["value"].astype(np.float64) - v).max(axis=-2, keepdims=True), group, axis=-3)
    _equal("o here and there", a, b, moved + _bound(data, a) + _bound(there, b))


@law("Σ_j dv_je = Σ_i do_ie.")
def sum_of_value_gradients(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """The weights w of a query sum to one."""
    data = build(spec, dtype)
    dv = _values(subject, data, gradients=True)["d_value"]
    group = spec.heads[0] // spec.heads[1]
    do = data.d_out.astype(np.float64).reshape((*spec.batch, spec.heads[1], group, *data.d_out.shape[-2:]))
    a, b = dv.sum(axis=-2), do.sum(axis=(-3, -2))
    u = _roundoff(dtype)
    _equal("Σ dv and Σ do", a, b, 4 * u * np.abs(do).sum(axis=(-3, -2)) + u * np.abs(dv).sum(axis=-2))


@law("Σ_j ds_ij = dl_i, read from the gradient of the bias.")
def sum_of_score_gradients(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """What is added to all scores of a query moves its log-sum-exp alone."""
    shape = (*spec.batch, spec.heads[0], *spec.lengths)
    data = build(_with(spec, bias_shape=shape, lse=True), dtype)
    assert data.d_lse is not None
    ds = _values(subject, data, gradients=True)["d_bias"]
    dl, do = data.d_lse.astype(np.float64), np.abs(data.d_out.astype(np.float64))
    u = _roundoff(dtype)
    stretch = 1 / abs(spec.beta) if abs(spec.beta) >= 1 else 1 + np.abs(data.arrays["value"].astype(np.float64)).max()
    allowed = 4 * u * (2 * stretch * do.sum(axis=-1) + np.abs(dl)) + u * np.abs(ds).sum(axis=-1)
    _equal("Σ ds and dl", ds.sum(axis=-1), dl, allowed)


@law("The order of the keys does not matter.")
def permutation(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Permutation of keys, values and the mask."""
    data = build(_with(spec, causal=None, mask_shape=spec.lengths), dtype)
    order = np.asarray(more.draw(st.permutations(range(spec.lengths[1]))))
    a = data.arrays
    other = data.with_arrays(
        key=a["key"][..., order, :], value=a["value"][..., order, :], attn_mask=a["attn_mask"][..., order]
    )
    x, y = _out(subject, data), _out(subject, other)
    _equal("o before and after", x, y, _bound(data, x) + _bound(other, y))


@law("Every key twice: the same output, log 2 more in the log-sum-exp.")
def duplication(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Duplication of keys."""
    data = build(_with(spec, causal=None, lse=True), dtype)
    twice = {n: np.concatenate([data.arrays[n]] * 2, axis=-2) for n in ("key", "value")}
    other = _replace_keys(data, 2 * spec.lengths[1], **twice)
    x, y = _values(subject, data, False), _values(subject, other, False)
    _equal("o before and after", x["out"], y["out"], _bound(data, x["out"]) + _bound(other, y["out"]))
    allowed = 2e-4 * (1 + np.abs(y["lse"])) * (2.0**-29 if dtype == "float64" else 1)
    _equal("l + log 2 and l", x["lse"] + math.log(2), y["lse"], allowed)


@law("Partial results over any split of the keys merge into the whole.")
def merging(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """``merge_states`` of what the backend returns for two parts."""
    data = build(_with(spec, causal=None, lse=True), dtype)
    at = more.draw(st.sampled_from((0, 1, spec.lengths[1] // 2, spec.lengths[1])))
    parts = []
    for some in (slice(0, at), slice(at, None)):
        own = {n: data.arrays[n][..., some, :] for n in ("key", "value")}
        part = _replace_keys(data, own["key"].shape[-2], **own)
        parts += [_values(subject, part, False)[n] for n in ("out", "lse")]
    out, lse = laser_core.merge_states(*parts, beta=spec.beta)
    whole = _values(subject, data, False)
    # a part's rounding reaches the whole with a weight of at most one
    slack = _bound(data, whole["out"]) + np.maximum(_bound(data, parts[0]), _bound(data, parts[2]))
    _equal("o merged and whole", out, whole["out"], slack)
    allowed = 3e-4 * (1 + np.abs(whole["lse"])) * (2.0**-29 if dtype == "float64" else 1)
    _equal("l merged and whole", lse, whole["lse"], allowed)


@law("Partial results over any two sets of keys that make up the whole merge into it.")
def merging_of_sets(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """The same for any set of keys and what is left: a mask says which."""
    data = build(_with(spec, lse=True), dtype)
    chosen = np.asarray(more.draw(st.lists(st.booleans(), min_size=spec.lengths[1], max_size=spec.lengths[1])))
    parts = []
    for some in (chosen, ~chosen):
        mask = np.broadcast_to(some, spec.lengths).copy()
        part = dataclasses.replace(data.with_arrays(attn_mask=mask), spec=_with(data.spec, mask_shape=spec.lengths))
        parts += [_values(subject, part, False)[n] for n in ("out", "lse")]
    out, lse = laser_core.merge_states(*parts, beta=spec.beta)
    whole = _values(subject, data, False)
    slack = _bound(data, whole["out"]) + np.maximum(_bound(data, parts[0]), _bound(data, parts[2]))
    _equal("o merged and whole", out, whole["out"], slack)
    allowed = 3e-4 * (1 + np.abs(whole["lse"])) * (2.0**-29 if dtype == "float64" else 1)
    _equal("l merged and whole", lse, whole["lse"], allowed)


@law("As β → 0, o → P·v, no further than β/8 times the squared range.")
def small_beta(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """The limit of softmax attention."""
    beta = more.draw(st.sampled_from((1e-2, -1e-2, 1e-3, 1e-6)))
    near, zero = build(_with(spec, beta=beta), dtype), build(_with(spec, beta=0.0), dtype)
    x, y = _out(subject, near), _out(subject, zero)
    v = near.arrays["value"].astype(np.float64)
    curvature = abs(beta) / 8 * (v.max() - v.min()) ** 2  # Hoeffding's lemma
    _equal("o at small β and at 0", x, y, curvature + _bound(near, x) + _bound(zero, y))


@law("As β → ±∞, o → the extreme: within log n/β for n equal scores.")
def large_beta(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """The limit of the maximum or minimum."""
    beta = more.draw(st.sampled_from((30.0, 300.0, -100.0)))
    spec = _with(spec, beta=beta, query=Fill("same", 0.0))
    data = build(spec, dtype)
    o = _out(subject, data)
    v = np.repeat(data.arrays["value"].astype(np.float64), spec.heads[0] // spec.heads[1], axis=-3)[..., None, :, :]
    seen = visible(data)[..., None]
    sign = math.copysign(1, beta)
    top = sign * np.where(seen, sign * v, -math.inf).max(axis=-2)
    count = seen.sum(axis=-2)
    _equal("o and the extreme", o, top, np.log(count) / abs(beta) + _bound(data, o))


@law("Grouped heads equal repeated heads.")
def groups(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Query head h reads key/value head h // (Hq/Hkv)."""
    data = build(spec, dtype)
    group = spec.heads[0] // spec.heads[1]
    hypothesis.assume(group > 1)
    repeated = {n: np.repeat(data.arrays[n], group, axis=-3) for n in ("key", "value")}
    other = data.with_arrays(**repeated)
    other = dataclasses.replace(other, spec=_with(spec, heads=(spec.heads[0], spec.heads[0])))
    x, y = _values(subject, data, True), _values(subject, other, True)
    _equal("o grouped and repeated", x["out"], y["out"], _bound(data, x["out"]) + _bound(other, y["out"]))
    u = _roundoff(dtype)
    shape = (*spec.batch, spec.heads[1], group, *data.arrays["value"].shape[-2:])
    parts = y["d_value"].reshape(shape)
    scale = np.abs(data.d_out.astype(np.float64)).sum(axis=-2).reshape((*spec.batch, spec.heads[1], group, 1, -1))
    allowed = (8 * u * scale).sum(axis=-3) + u * np.abs(x["d_value"])
    _equal("dv grouped and summed", x["d_value"], parts.sum(axis=-3), allowed)


@law("Causal: what comes later changes nothing.")
def prefix(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """The first n outputs are those of the first n queries and keys."""
    spec = _with(spec, causal="top_left", lengths=(spec.lengths[1], spec.lengths[1]))
    data = build(spec, dtype)
    n = more.draw(st.sampled_from((1, (1 + spec.lengths[1]) // 2, spec.lengths[1])))
    a = data.arrays
    short = data.with_arrays(**{name: a[name][..., :n, :] for name in ("query", "key", "value")})
    short = dataclasses.replace(short, spec=_with(spec, lengths=(n, n)))
    x, y = _out(subject, data)[..., :n, :], _out(subject, short)
    _equal("o of the whole and of the prefix", x, y, _bound(data, x) + _bound(short, y))


@law("Keys beyond the length of the keys, of any size, change nothing.")
def padding(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Padding with a sequence length equals no padding."""
    data = build(_with(spec, causal=None), dtype)
    extra = more.draw(st.sampled_from((1, 20)))
    count = spec.lengths[1]
    far = build(
        _with(spec, seed=spec.seed + "/pad", lengths=(spec.lengths[0], extra), value=Fill("normal", 500)), dtype
    )
    longer = {n: np.concatenate([data.arrays[n], far.arrays[n]], axis=-2) for n in ("key", "value")}
    lengths = np.full(spec.batch, count, dtype=np.int32)
    other = _replace_keys(data, count + extra, **longer, key_value_seq_lengths=lengths)
    y, x = _out(subject, other), _out(subject, data)
    _equal("o without and with padding", x, y, 2 * _bound(data, x))


@law("What a query does not see changes nothing, not one bit: outputs, log-sum-exp and gradients.")
def invisible(subject: Subject, dtype: str, spec: Spec, more: Any) -> None:
    """Keys that no query sees, and queries that see nothing, hold other numbers, NaN or ∞."""
    lq, lk = spec.lengths
    sees = np.asarray(more.draw(st.lists(st.booleans(), min_size=lq, max_size=lq)))
    seen = np.asarray(more.draw(st.lists(st.booleans(), min_size=lk, max_size=lk)))
    mask = sees[:, None] & seen
    near = Fill("normal", 1.0)  # bits are promised inside the fast range, which is narrow in float16
    data = build(_with(spec, lse=True, mask_shape=spec.lengths, value=near), dtype).with_arrays(attn_mask=mask)
    reach = visible(data)
    keys = ~reach.any(axis=tuple(range(reach.ndim - 1)))[:, None]
    queries = ~reach.any(axis=(*range(reach.ndim - 2), reach.ndim - 1))[:, None]
    what = more.draw(st.sampled_from((math.nan, math.inf, -math.inf, 1.0)))
    hidden = {"query": queries, "key": keys, "value": keys}
    changed = {
        n: np.where(where, np.asarray(what, data.arrays[n].dtype), data.arrays[n]) for n, where in hidden.items()
    }
    x, y = _values(subject, data, True), _values(subject, data.with_arrays(**changed), True)
    for name in x:
        if not np.array_equal(x[name], y[name], equal_nan=False):
            raise Broken(f"{name} changes where what is not visible becomes {what:g}")
    if not (x["out"][..., queries[:, 0], :] == 0).all():
        raise Broken("o is not 0 where a query sees nothing")


CHECKS = {f"law {name}": _check(function) for name, (function, _) in LAWS.items()}


def cases() -> Iterator[Case]:
    """The cases of the level laws."""
    for name, (_, sentence) in LAWS.items():
        yield Case(id=f"laws/{name}", sentence=sentence, check=f"law {name}")
