"""The engine on ``jax.nn.dot_product_attention``, in float32, against the reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from problems import OPTIONS, make

from laser_core import Unsupported, explain, laser_attention, laser_attention_vjp

jax = pytest.importorskip("jax")
REFUSED = {name for name, options in OPTIONS.items() if "bias" in options or "logits_soft_cap" in options}


@pytest.fixture(autouse=True)
def _compile_faster() -> Any:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def narrow(call: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x for n, x in call.items()
    }


def on_jax(call: dict[str, Any]) -> dict[str, Any]:
    return {n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}


def widened(call: dict[str, Any]) -> dict[str, Any]:
    return {
        n: x.astype(np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x for n, x in call.items()
    }


CASES = [(name, 1.0) for name in sorted(set(OPTIONS) - REFUSED)]
CASES += [("causal", 60.0), ("lengths", 60.0), ("beta per head and channel", 60.0)]


@pytest.mark.parametrize(("options", "sigma"), CASES)
def test_against_the_reference(options: str, sigma: float) -> None:
    call, d_out, d_lse = make("grouped", options, sigma=sigma)
    call, d_out, d_lse = narrow(call), d_out.astype(np.float32), d_lse.astype(np.float32)
    (out, lse), pullback = laser_attention_vjp(**on_jax(call), return_lse=True, backend="jax-dpa")
    (want, want_lse), want_pullback = laser_attention_vjp(**widened(call), return_lse=True, backend="reference")
    assert np.all(np.abs(out - want) <= 1e-5 * (1 + np.abs(want)))
    finite = np.isfinite(want_lse)
    assert np.array_equal(np.isneginf(lse), ~finite)
    assert np.allclose(np.asarray(lse)[finite], want_lse[finite], rtol=1e-4, atol=1e-4)
    gradients = pullback(jax.numpy.asarray(d_out), jax.numpy.asarray(d_lse))
    for got, w in zip(gradients, want_pullback(d_out.astype(np.float64), d_lse.astype(np.float64)), strict=True):
        assert (got is None) == (w is None)
        assert w is None or np.linalg.norm(np.asarray(got) - w) <= 3e-5 * (np.linalg.norm(w) + 1e-3 * sigma)


def test_under_jit_grad_and_vmap() -> None:
    call, _, _ = make("grouped", "causal")
    arrays = [jax.numpy.asarray(call[n].astype(np.float32)) for n in ("query", "key", "value")]

    def loss(backend: str, *arrays: Any) -> Any:
        return (laser_attention(*arrays, is_causal=True, backend=backend) ** 2).sum()

    for got, want in zip(
        *(jax.jit(jax.vmap(jax.grad(loss, (1, 2, 3)), (None, 0, 0, 0)), static_argnums=0)(b, *arrays) for b in
          ("jax-dpa", "reference")), strict=True
    ):  # fmt: skip
        assert np.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 20.0, 1e30])
def test_what_is_hidden_does_not_leak(bad: float) -> None:
    call, d_out, _ = make("square", "causal")
    call = narrow(call)
    d_out = d_out.astype(np.float32)
    d_out[..., 6:, :] = 0
    poisoned = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in call.items()}
    poisoned["key"][..., 6:, :] = poisoned["value"][..., 6:, :] = bad
    kept = []
    for c in (call, poisoned):
        out, pullback = laser_attention_vjp(**on_jax(c), backend="jax-dpa")
        kept.append([np.asarray(x)[..., :6, :] for x in (out, *pullback(jax.numpy.asarray(d_out))[:3])])
    for a, b in zip(*kept, strict=True):
        assert np.array_equal(a, b) if bad != 1e30 else np.allclose(a, b, atol=1e-5)


def test_what_it_refuses_runs_elsewhere() -> None:
    call, _, _ = make("grouped", "bias")
    call = on_jax(narrow(call))
    with pytest.raises(Unsupported, match="backend 'jax-dpa' cannot run this: bias"):
        laser_attention(**call, backend="jax-dpa")
    assert explain(**call).chosen not in (None, "jax-dpa")
