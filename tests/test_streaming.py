"""The streaming form where it differs from the reference: tiles, memory, dtypes, layouts, determinism."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from problems import OPTIONS, error, make

from laser_core import _streaming, laser_attention, laser_attention_vjp
from laser_core._tiles import Tiles


def small_tiles(block_q, block_k, heads):
    return classmethod(lambda cls, problem: Tiles(block_q, block_k, heads))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 3, 1), (5, 64, 2)])
def test_tiles_of_any_size_agree(monkeypatch, options, sizes):
    monkeypatch.setattr(Tiles, "fast", small_tiles(*sizes))
    monkeypatch.setattr(Tiles, "exact", small_tiles(*sizes))
    for sigma in (1.0, 100.0):
        call, d_out, d_lse = make("grouped", options, sigma=sigma)
        (out, lse), pullback = laser_attention_vjp(**call, return_lse=True, backend="streaming")
        (want, want_lse), want_pullback = laser_attention_vjp(**call, return_lse=True, backend="reference")
        assert error(out, want) < 1e-12 * sigma
        assert error(lse, want_lse) < 1e-13
        for got, w in zip(pullback(d_out, d_lse), want_pullback(d_out, d_lse), strict=True):
            assert (got is None) == (w is None)
            assert w is None or np.linalg.norm(got - w) <= 1e-11 * (1 + np.linalg.norm(w))


def test_tiles_refuse_a_size_that_is_not_positive():
    with pytest.raises(ValueError, match="block_k: got 0; allowed: 1 or more"):
        Tiles(1, 0, 1)


def bound(out, q, k, unit):
    slack = 2.0**-20 * q.shape[-1] ** -0.5 * np.abs(q).max() * np.abs(k).max()
    return (unit * (np.abs(out) + 3) if unit else 1e-5 * (1 + np.abs(out))) + slack


@pytest.mark.parametrize("sigma", [1.0, 5.0, 20.0, 60.0, 400.0])
@pytest.mark.parametrize("scores", [1.0, 30.0])
@pytest.mark.parametrize(("dtype", "unit"), [("float32", 0), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_error_bound(dtype, unit, scores, sigma):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    rng = np.random.default_rng(0)
    q, k, v = ((factor * rng.standard_normal((1, 2, 300, 16))).astype(kind) for factor in (scores, scores, sigma))
    got, lse = laser_attention(q, k, v, is_causal=True, return_lse=True, backend="streaming")
    assert (got.dtype, lse.dtype) == (kind, np.float32)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    want, want_lse = laser_attention(q, k, v, is_causal=True, return_lse=True, backend="reference")
    assert np.all(np.abs(got.astype(np.float64) - want) <= bound(want, q, k, unit))
    assert np.all(np.abs(lse - want_lse) <= 1e-4 * (1 + np.abs(want_lse)))


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1e-3, 0.1, -0.9])
def test_small_beta_keeps_its_signal(beta):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 300, 16)).astype(np.float32) for _ in range(3))
    got = laser_attention(q, k, v, beta=beta, backend="streaming")
    want = laser_attention(*(x.astype(np.float64) for x in (q, k, v)), beta=beta, backend="reference")
    assert np.all(np.abs(got - want) <= bound(want, q, k, 0))
    softmax = laser_attention(*(x.astype(np.float64) for x in (q, k, v)), beta=0.0, backend="reference")
    if beta == 1e-3:  # what the naive float32 formula loses whole is resolved
        assert np.max(np.abs(got - want)) < 0.01 * np.max(np.abs(want - softmax))


@pytest.mark.parametrize("beta", [1.0, 0.0, -0.3])
@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_finite_in_finite_out_near_the_largest_float(backend, beta):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 40, 8)).astype(np.float32) for _ in range(2))
    v = np.where(rng.random((2, 40, 8)) < 0.5, 3e38, -3e38).astype(np.float32)
    out = laser_attention(q, k, v, beta=beta, backend=backend)
    assert np.all(np.abs(out) <= 3e38 * (1 + 1e-6))


def test_bitwise_deterministic():
    call, d_out, _ = make("grouped", "all together", sigma=30)
    first = laser_attention_vjp(**call, backend="streaming")
    again = laser_attention_vjp(**call, backend="streaming")
    assert np.array_equal(first[0], again[0])
    assert all(np.array_equal(a, b) for a, b in zip(first[1](d_out), again[1](d_out), strict=True))


def test_layout_does_not_matter_and_nothing_is_written_to():
    call, d_out, _ = make("grouped", "bias")
    want, want_pullback = laser_attention_vjp(**call, backend="streaming")
    want_gradients = want_pullback(d_out)
    odd = {
        n: np.asfortranarray(np.repeat(x, 2, axis=-1))[..., ::2] if isinstance(x, np.ndarray) else x
        for n, x in call.items()
    }
    for x in odd.values():
        x.flags.writeable = False
    out, pullback = laser_attention_vjp(**odd, backend="streaming")
    assert np.array_equal(out, want)
    for got, w in zip(pullback(np.asfortranarray(d_out))[:4], want_gradients[:4], strict=True):
        assert np.allclose(got, w, rtol=1e-12, atol=1e-14)


def test_stride_0_inputs():
    call, d_out, _ = make("square", "causal")
    repeated = call | {n: np.broadcast_to(call[n][:, :1], call[n].shape) for n in ("query", "key", "value")}
    copied = repeated | {n: repeated[n].copy() for n in ("query", "key", "value")}
    got, want = (laser_attention_vjp(**c, backend="streaming") for c in (repeated, copied))
    assert np.array_equal(got[0], want[0])
    assert all(np.array_equal(a, b) for a, b in zip(got[1](d_out)[:3], want[1](d_out)[:3], strict=True))


def test_memory_is_linear_in_the_length():
    peaks = {}
    for length in (512, 2048):
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((1, 1, length, 16), dtype=np.float32) for _ in range(3))
        tracemalloc.start()
        out, pullback = laser_attention_vjp(q, k, v, is_causal=True, backend="streaming")
        pullback(out)
        peaks[length] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[2048] < 4 * peaks[512]  # the scores alone would have grown 16 times


def test_a_users_error_state_is_not_disturbed():
    call, d_out, _ = make("square", "causal", sigma=50)
    with np.errstate(all="raise"):
        _, pullback = laser_attention_vjp(**call, backend="streaming")
        pullback(d_out)
        with pytest.raises(FloatingPointError):
            np.float32(1e38) * np.float32(10)


def test_strict_arrays_of_every_device():
    strict = pytest.importorskip("array_api_strict")
    call, d_out, _ = make("grouped", "all together")
    for name, dtype in (("CPU_DEVICE", "float64"), ("device1", "float32"), ("no_float64", "float32")):
        device = strict.Device(name)

        def to(x, dtype=dtype, device=device):
            kind = x.astype(dtype) if x.dtype == np.float64 else x
            return strict.asarray(kind, device=device)

        moved = {n: to(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
        for backend in ("reference", "streaming"):
            out, pullback = laser_attention_vjp(**moved, backend=backend)
            gradients = pullback(to(d_out))
            assert all(x.device == device and str(x.dtype).endswith(dtype) for x in (out, *gradients))
            want = laser_attention(**call, backend="reference")
            assert error(np.asarray(out.to_device(strict.Device("CPU_DEVICE"))).astype(np.float64), want) < 1e-5


def test_the_automatic_choice_on_numpy():
    call, _, _ = make("square", "plain")
    from laser_core import explain

    assert explain(call["query"], call["key"], call["value"]).chosen == "reference"
    long = np.zeros((1, 1024, 16))
    assert explain(long, long, long).chosen == "streaming"
    assert _streaming.BACKEND.name == "streaming"


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_what_does_not_count_does_not_touch_values_far_from_zero(offset):
    """Padding, hidden NaN and queries that see nothing stand at 0, far from such values."""
    call, d_out, d_lse = make("square", "lengths")
    call["value"] += offset
    call["value"][..., -1, :] = 0
    call["key_value_seq_lengths"][:] = (8, 6)
    call["attn_mask"] = np.ones((9, 9), dtype=bool)
    call["attn_mask"][0, :] = call["attn_mask"][:, 4] = False
    call["value"][..., 4, :] = np.nan
    (out, lse), pullback = laser_attention_vjp(**call, return_lse=True, backend="streaming")
    (want, want_lse), want_pullback = laser_attention_vjp(**call, return_lse=True, backend="reference")
    assert error(out, want) < 1e-12 * abs(offset)
    assert error(lse, want_lse) < 1e-13
    for got, w in zip(pullback(d_out, d_lse)[:3], want_pullback(d_out, d_lse)[:3], strict=True):
        assert error(got, w) < 1e-14 * abs(offset) * 10
