"""The reference says what section 1 says: checked against 50 digits, by hand, and by what must hold."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from problems import OPTIONS, SHAPES, error, make

from laser_core import laser_attention, merge_states


def fifty_digits(call):
    """Section 1, read aloud, in 50-digit arithmetic: no stabilisation, no vectorisation."""
    q, k, v = call["query"], call["key"], call["value"]
    *batch, hq, lq, d = q.shape
    hkv, lk, e = *k.shape[-3:-1], v.shape[-1]
    scale = call.get("scale", None)
    mp = mpmath.mpf
    scale = mp(1) / mpmath.sqrt(d) if scale is None else mp(float(scale))
    cap = call.get("logits_soft_cap")
    causal, (left, right) = call.get("is_causal", False), call.get("window_size") or (None, None)
    offset = lk - lq if causal == "bottom_right" else 0
    full = (*batch, hq, lq, lk)
    mask = np.broadcast_to(call.get("attn_mask", np.True_), full)
    bias = np.broadcast_to(call.get("bias", np.float64(0)), full)
    beta = np.broadcast_to(np.asarray(call.get("beta", 1.0)), (hq, e))
    q_len = np.broadcast_to(call.get("query_seq_lengths", lq), batch)
    k_len = np.broadcast_to(call.get("key_value_seq_lengths", lk), batch)
    out, lse = np.zeros((*batch, hq, lq, e)), np.full((*batch, hq, lq), -np.inf)
    with mpmath.workdps(50):
        for index in np.ndindex(*batch, hq, lq):
            *b, h, i = index
            b, g = tuple(b), h // (hq // hkv)
            weights = {}
            for j in range(lk):
                seen = mask[(*b, h, i, j)] and i < q_len[b] and j < k_len[b]
                seen = seen and (not causal or j <= i + offset)
                seen = seen and (left is None or j >= i + offset - left)
                seen = seen and (right is None or j <= i + offset + right)
                if seen:
                    s = scale * mpmath.fsum(
                        mp(float(x)) * mp(float(y)) for x, y in zip(q[index], k[(*b, g, j)], strict=True)
                    )
                    s = s if cap is None else cap * mpmath.tanh(s / cap)
                    weights[j] = mpmath.exp(s + mp(float(bias[(*b, h, i, j)])))
            if not weights:
                continue
            total = mpmath.fsum(weights.values())
            lse[index] = float(mpmath.log(total))
            for c in range(e):
                at = mp(float(beta[h, c]))
                values = {j: mp(float(v[(*b, g, j, c)])) for j in weights}
                if at == 0:
                    o = mpmath.fsum(w * values[j] for j, w in weights.items()) / total
                else:
                    o = mpmath.log(mpmath.fsum(w * mpmath.exp(at * values[j]) for j, w in weights.items()) / total) / at
                out[(*index, c)] = float(o)
    return out, lse


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_against_fifty_digits(options, backend):
    call, _, _ = make("grouped", options)
    out, lse = laser_attention(**call, return_lse=True, backend=backend)
    want_out, want_lse = fifty_digits(call)
    assert error(out, want_out) < 1e-13
    assert error(lse, want_lse) < 1e-13


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_against_fifty_digits(shape):
    call, _, _ = make(shape, "causal")
    out, lse = laser_attention(**call, return_lse=True, backend="reference")
    want_out, want_lse = fifty_digits(call)
    assert error(out, want_out) < 1e-13
    assert error(lse, want_lse) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "streaming"])
@pytest.mark.parametrize(("sigma", "beta"), [(20.0, 1.0), (400.0, 1.0), (400.0, -0.5), (1e6, 1e-3), (30.0, 1e-3)])
def test_wide_values_against_fifty_digits(backend, sigma, beta):
    call, _, _ = make("square", "causal", sigma=sigma)
    out = laser_attention(**call, beta=beta, backend=backend)
    want, _ = fifty_digits(call | {"beta": beta})
    assert np.max(np.abs(out - want) / (1 + np.abs(want))) < 1e-12


def test_by_hand():
    # two keys of equal score and values 0 and log 3: log((1 + 3)/2) = log 2; softmax attention gives log(3)/2
    q, k = np.zeros((1, 1, 1)), np.zeros((1, 2, 1))
    v = np.array([[[0.0], [math.log(3)]]])
    out, lse = laser_attention(q, k, v, return_lse=True)
    assert out.item() == pytest.approx(math.log(2), abs=1e-15)
    assert lse.item() == pytest.approx(math.log(2), abs=1e-15)
    assert laser_attention(q, k, v, beta=0.0).item() == pytest.approx(math.log(3) / 2, abs=1e-15)


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_a_query_that_sees_nothing(backend):
    call, _, _ = make("square", "plain")
    mask = np.ones((9, 9), bool)
    mask[4] = False
    out, lse = laser_attention(**call, attn_mask=mask, return_lse=True, backend=backend)
    assert not out[..., 4, :].any()
    assert np.isneginf(lse[..., 4]).all()
    assert np.isfinite(np.delete(lse, 4, axis=-1)).all()


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_no_keys_and_no_queries(backend):
    call, _, _ = make("square", "plain")
    nothing = call | {"key": call["key"][..., :0, :], "value": call["value"][..., :0, :]}
    out, lse = laser_attention(**nothing, return_lse=True, backend=backend)
    assert out.shape == (2, 2, 9, 4)
    assert not out.any()
    assert np.isneginf(lse).all()
    out, lse = laser_attention(**call | {"query": call["query"][..., :0, :]}, return_lse=True, backend=backend)
    assert (out.shape, lse.shape) == ((2, 2, 0, 4), (2, 2, 0))


def test_a_bias_of_minus_infinity_hides_a_key():
    call, _, _ = make("square", "plain")
    mask = np.tril(np.ones((9, 9), bool), -1)  # the first query sees nothing
    bias = np.where(mask, 0.0, -np.inf)
    for backend in ("reference", "streaming"):
        out, lse = laser_attention(**call, bias=bias, return_lse=True, backend=backend)
        want, want_lse = laser_attention(**call, attn_mask=mask, return_lse=True, backend=backend)
        assert error(out, want) == 0
        assert error(lse, want_lse) == 0


@pytest.mark.parametrize("beta", [1.0, 0.0, 1e-3, -2.0, "array"])
class TestMerge:
    """Partial results over disjoint keys merge into the whole."""

    def parts(self, beta, cuts):
        call, _, _ = make("grouped", "plain", sigma=3)
        beta = np.linspace(-2, 2, 12).reshape(4, 3) if beta == "array" else beta
        states = []
        for start, stop in zip([0, *cuts], [*cuts, 11], strict=True):
            part = call | {n: call[n][..., start:stop, :] for n in ("key", "value")}
            states.append(laser_attention(**part, beta=beta, return_lse=True))
        return states, laser_attention(**call, beta=beta, return_lse=True), beta

    @pytest.mark.parametrize("cut", [0, 1, 5, 11])
    def test_any_split(self, beta, cut):
        (a, b), whole, beta = self.parts(beta, [cut])
        for merged in (merge_states(*a, *b, beta=beta), merge_states(*b, *a, beta=beta)):
            assert error(merged[0], whole[0]) < 1e-14
            assert error(merged[1], whole[1]) < 1e-14

    def test_associative(self, beta):
        (a, b, c), whole, beta = self.parts(beta, [3, 7])
        left = merge_states(*merge_states(*a, *b, beta=beta), *c, beta=beta)
        right = merge_states(*a, *merge_states(*b, *c, beta=beta), beta=beta)
        assert error(left[0], right[0]) < 1e-14
        assert error(left[0], whole[0]) < 1e-14

    def test_two_empty_states_are_empty(self, beta):
        (a, _), _, beta = self.parts(beta, [0])
        out, lse = merge_states(*a, *a, beta=beta)
        assert not out.any()
        assert np.isneginf(lse).all()


def test_merge_refuses_what_does_not_fit():
    o, l = np.zeros((2, 3, 4)), np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"lse_a: got shape \(3,\); allowed: \(2, 3\)"):
        merge_states(o, l[0], o, l)
    with pytest.raises(ValueError, match="out_b: got shape"):
        merge_states(o, l, o[:1], l)
    with pytest.raises(TypeError, match="lse_b: got dtype float32; allowed: float64"):
        merge_states(o, l, o, l.astype(np.float32))
    with pytest.raises(TypeError, match="out_b: got list"):
        merge_states(o, l, [1.0], l)
    with pytest.raises(ValueError, match="beta: got nan"):
        merge_states(o, l, o, l, beta=float("nan"))
