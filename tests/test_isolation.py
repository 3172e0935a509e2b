"""What a query cannot see does not exist for it: section 2.2, on NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from laser_core import laser_attention_vjp

BACKENDS = ("reference", "streaming")
CUT = 270  # inside the second tile of the streaming form
LENGTH = 290
HIDE = {
    "causal": lambda rng: {"is_causal": True},
    "window": lambda rng: {"window_size": (None, 0)},
    "lengths": lambda rng: {"query_seq_lengths": np.array([CUT]), "key_value_seq_lengths": np.array([CUT])},
    "mask": lambda rng: {"attn_mask": (np.arange(LENGTH) < CUT)[None, :] & (rng.random((LENGTH, LENGTH)) < 0.9)},
    "bias": lambda rng: {"bias": np.where(np.arange(LENGTH) < CUT, 0, -np.inf).astype(np.float32)},
}
BAD = (np.nan, np.inf, -np.inf, 20.0, -30.0)


def arrays(rng, sigma):
    shape = (1, 2, LENGTH, 4)
    q, k, v, do = (rng.standard_normal(shape).astype(np.float32) for _ in range(4))
    do[..., CUT:, :] = 0  # these queries see the hidden keys by causality, and are not asked
    return q, k, sigma * v, do


def run(q, k, v, do, **options):
    (out, lse), pullback = laser_attention_vjp(q, k, v, return_lse=True, **options)
    gradients = pullback(do)
    kept = [x[..., :CUT, :] for x in (out, *gradients[:3])]
    return [*kept, lse[..., :CUT]]


@pytest.mark.parametrize("sigma", [1.0, 5.0])
@pytest.mark.parametrize("hide", HIDE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_and_values_change_no_bit(backend, hide, sigma):
    rng = np.random.default_rng(0)
    q, k, v, do = arrays(rng, np.float32(sigma))
    options = HIDE[hide](rng) | {"backend": backend}
    want = run(q, k, v, do, **options)
    assert all(np.isfinite(x).all() for x in want)
    for bad in BAD:
        poisoned_k, poisoned_v = k.copy(), v.copy()
        poisoned_k[..., CUT:, :] = poisoned_v[..., CUT:, :] = bad
        got = run(q, poisoned_k, poisoned_v, do, **options)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), bad


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_values_beyond_the_fast_range_change_nothing_within_tolerance(backend):
    rng = np.random.default_rng(0)
    q, k, v, do = arrays(rng, np.float32(1))
    want = run(q, k, v, do, is_causal=True, backend=backend)
    v[..., CUT:, :] = 1e30
    got = run(q, k, v, do, is_causal=True, backend=backend)
    assert all(np.max(np.abs(a - b)) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_heads_change_no_bit(backend):
    rng = np.random.default_rng(0)
    q, k, v, do = arrays(rng, np.float32(1))
    want = run(q, k, v, do, backend=backend)
    for bad in (*BAD, 1e30):
        v[:, 1] = k[:, 1] = q[:, 1] = bad
        got = run(q, k, v, do, backend=backend)
        assert all(np.array_equal(a[:, 0], b[:, 0]) for a, b in zip(got, want, strict=True)), bad


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_of_everything_at_once(backend):
    rng = np.random.default_rng(0)
    q, k, v, do = arrays(rng, np.float32(1))
    lengths = np.array([CUT])
    options = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths, "backend": backend}
    want = run(q, k, v, do, **options)
    for x in (q, k, v, do):
        x[..., CUT:, :] = np.nan
    got = run(q, k, v, do, **options)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
    _, pullback = laser_attention_vjp(q, k, v, **options)
    assert not any(g[..., CUT:, :].any() for g in pullback(do)[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_visible_and_not_finite_is_seen(backend):
    rng = np.random.default_rng(0)
    q, k, v, _ = arrays(rng, np.float32(1))
    v[..., 7, 0], v[..., 7, 1], v[..., 7, 2] = np.nan, np.inf, -np.inf
    out, _ = laser_attention_vjp(q, k, v, is_causal=True, backend=backend)
    assert np.isfinite(out[..., :7, :]).all()
    assert np.isnan(out[..., 7:, 0]).all()
    assert np.isposinf(out[..., 7:, 1]).all()
    assert np.isfinite(out[..., 7:, 2]).all()  # exp(−∞) adds nothing
    k[..., 7, 0] = np.nan
    out, _ = laser_attention_vjp(q, k, v, is_causal=True, backend=backend)
    assert np.isnan(out[..., 7:, :]).all()
    assert np.isfinite(out[..., :7, :]).all()
