"""The truth and the generator are checked against 50-digit arithmetic, finite differences and pinned bits."""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
from laser_conformance.compare import entries, in_norm, same_bits
from laser_conformance.generate import DTYPES, Fill, checksum, fill, normal, words
from laser_conformance.problems import Spec, build, visible
from laser_conformance.tolerance import bounds, plain_gradients, significand
from laser_conformance.truth import truth

SMALL = {"heads": (2, 1), "lengths": (4, 5), "dims": (3, 2)}
PROBLEMS = {
    "plain": Spec(seed="t", **SMALL),
    "masked": Spec(seed="t", **SMALL, causal="bottom_right", window=(2, None), mask_shape=(4, 5), mask_density=0.8),
    "cap and bias": Spec(seed="t", **SMALL, soft_cap=1.5, bias_shape=(2, 1, 5), lse=True),
    "betas": Spec(seed="t", **SMALL, beta_shape=(2, 2), betas=(0.0, 1e-3, -2.0, 0.5), lse=True),
    "wide": Spec(seed="t", **SMALL, value=Fill("normal", 200), query=Fill("normal", 30)),
    "lengths": Spec(seed="t", **SMALL, key_lengths=(3,), query_lengths=(2,), beta=-0.7),
}


def in_50_digits(data):
    """Outputs and log-sum-exp, straight from the definition."""
    s = data.spec
    seen = visible(data)
    q, k, v = (data.arrays[n].astype(float) for n in ("query", "key", "value"))
    group = s.heads[0] // s.heads[1]
    beta = np.broadcast_to(data.arrays.get("beta", np.asarray(s.beta)).astype(float), (s.heads[0], s.dims[1]))
    bias = np.broadcast_to(data.arrays.get("bias", np.zeros(())), seen.shape).astype(float)
    out, lse = np.zeros(s.out_shape), np.full(s.out_shape[:-1], -math.inf)
    with mpmath.workdps(50):
        for b, h, i in np.ndindex(*s.out_shape[:-1]):
            keys = [j for j in range(s.lengths[1]) if seen[b, h, i, j]]
            if not keys:
                continue
            scores = []
            for j in keys:
                x = mpmath.mpf(data.scale) * mpmath.fdot(q[b, h, i].tolist(), k[b, h // group, j].tolist())
                if s.soft_cap is not None:
                    x = s.soft_cap * mpmath.tanh(x / s.soft_cap)
                scores.append(x + mpmath.mpf(bias[b, h, i, j]))
            l = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in scores))
            lse[b, h, i] = l
            for e in range(s.dims[1]):
                bt = mpmath.mpf(beta[h, e])
                values = [mpmath.mpf(v[b, h // group, j, e]) for j in keys]
                p = [mpmath.exp(x - l) for x in scores]
                if bt == 0:
                    out[b, h, i, e] = mpmath.fdot(p, values)
                else:
                    out[b, h, i, e] = mpmath.log(mpmath.fdot(p, [mpmath.exp(bt * x) for x in values])) / bt
    return out, lse


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_truth_against_50_digits(name, dtype):
    data = build(PROBLEMS[name], dtype)
    expected = truth(data)
    out, lse = in_50_digits(data)
    # one rounding of scores of up to 10⁴, and of the double that 50 digits are brought back to
    for got, want in ((expected.out, out), (expected.lse, lse)):
        finite = np.isfinite(want)
        assert np.array_equal(finite, np.isfinite(got))
        assert np.all(
            np.abs(got[finite] - want[finite]) <= 1e-15 * (10 + np.abs(want[finite]) + 10 * (name == "wide") * 1e3)
        )


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_against_finite_differences(name):
    data = build(PROBLEMS[name], "float64")
    expected = truth(data, gradients=True)

    def loss(data):
        result = truth(data)
        total = np.sum(np.where(data.d_out != 0, data.d_out * result.out, 0), dtype=np.longdouble)
        if data.d_lse is not None:
            total += np.sum(np.where(np.isfinite(result.lse), data.d_lse * result.lse, 0), dtype=np.longdouble)
        return total

    step = 1e-5
    for argument, gradient in expected.gradients.items():
        x = data.arrays[argument]
        numeric = np.zeros(x.shape)
        for at in np.ndindex(*x.shape):
            ends = []
            for sign in (1, -1):
                moved = x.copy()
                moved[at] += sign * step
                ends.append((loss(data.with_arrays(**{argument: moved})), moved[at]))
            numeric[at] = (ends[0][0] - ends[1][0]) / (ends[0][1] - ends[1][1])
        scale = 1 + np.max(np.abs(numeric))
        assert np.max(np.abs(numeric - gradient)) <= 3e-8 * scale * (100 if name == "wide" else 1), argument


def test_nothing_hidden_reaches_the_truth():
    data = build(PROBLEMS["lengths"], "float32")
    clean = truth(data, gradients=True)
    dirty = {n: data.arrays[n].copy() for n in ("query", "key", "value")}
    dirty["key"][..., 3:, :] = np.nan
    dirty["value"][..., 3:, :] = np.inf
    dirty["query"][..., 2:, :] = np.nan
    again = truth(data.with_arrays(**dirty), gradients=True)
    assert np.array_equal(clean.out, again.out)
    assert all(np.array_equal(clean.gradients[n], again.gradients[n]) for n in clean.gradients)


def test_rows_alone_are_the_same():
    spec = dataclasses.replace(PROBLEMS["masked"], lengths=(9, 12), mask_shape=(9, 12))
    data = build(spec, "float32")
    assert np.array_equal(truth(data, rows=(3, 7)).out, truth(data).out[..., 3:7, :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_plain_formula_is_within_a_few_roundings(name, dtype):
    """The yardstick measures rounding, not a mistake: it is right up to a few times u·norm·(size of the exponents)."""
    data = build(PROBLEMS[name], dtype)
    expected = truth(data, gradients=True)
    allowed = bounds(data, expected)
    with np.errstate(all="ignore"):
        plain = plain_gradients(data)
    u = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    for n, gradient in expected.gradients.items():
        size = float(np.sqrt(np.sum(gradient.astype(float) ** 2)))
        error = float(np.sqrt(np.sum((plain[n] - gradient).astype(float) ** 2)))
        assert error <= allowed.gradients[n]
        exponents = 1e4 if name == "wide" else 20
        assert error <= u * exponents * (1 + size), n


def test_bits_are_those_of_every_machine():
    assert [int(w) for w in words(0, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert checksum({"x": words(1, 4), "y": normal(2, (3, 5))}) == PINNED["numbers"]
    data = build(PROBLEMS["betas"], "bfloat16")
    assert checksum(dict(data.arrays)) == PINNED["problem"]


PINNED = {
    "numbers": "1bf36d0967a2a1fe6584c5564379fa7369b3133355e88f738e6484f7cf4b429c",
    "problem": "18fc579d3ec230d519c041b814258dd8d27eb55a04454986ba9be7e0df5f52dc",
}


def test_normal_numbers_are_normal():
    x = normal(7, (200_000,))
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert 4 < np.abs(x).max() <= 6
    assert abs(np.mean(np.abs(x) < 1) - 0.6827) < 0.005


@pytest.mark.parametrize("kind", ["normal", "same", "columns", "spikes", "future", "subnormal", "largest", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fills_are_finite(kind, dtype):
    x = fill(Fill(kind), "x", (2, 8, 6), dtype)
    assert x.dtype == DTYPES[dtype]
    assert np.isfinite(x.astype(np.float64)).all()


def test_significand_keeps_any_exponent():
    x = np.float32(1.2345678e-30)
    assert abs(significand(np.asarray([x]), "float16")[0] / x - 1) <= 2.0**-11


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 2.0])
def test_comparison_accepts_no_nan(wrong):
    expected, allowed = np.ones(3), np.full(3, 1e-3)
    got = np.asarray([1.0, wrong, 1.0])
    assert entries("x", expected, expected, allowed).problem is None
    assert entries("x", got, expected, allowed).problem is not None
    assert in_norm("x", got, expected, 1e-3).problem is not None
    assert same_bits("x", got, expected, "differ").problem is not None


def test_infinities_have_to_agree():
    expected = np.asarray([-math.inf, 0.0])
    assert entries("lse", expected, expected, np.ones(2)).problem is None
    assert entries("lse", -expected, expected, np.ones(2)).problem is not None
    assert entries("lse", np.asarray([-1e30, 0.0]), expected, np.ones(2)).problem is not None
