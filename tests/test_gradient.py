"""The analytic gradients against finite differences, torch autograd and JAX autodiff, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from problems import OPTIONS, make

from laser_core import laser_attention, laser_attention_vjp

BACKENDS = ("reference", "streaming")
ARRAYS = ("query", "key", "value", "bias", "beta")


def differentiable(call):
    return [n for n in ARRAYS if isinstance(call.get(n), np.ndarray)]


def gradients(call, d_out, d_lse, backend):
    _, pullback = laser_attention_vjp(**call, return_lse=True, backend=backend)
    return pullback(d_out, d_lse)


def relative(got, want):
    return np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_finite_differences(options, backend):
    call, d_out, d_lse = make("grouped", options)
    got = gradients(call, d_out, d_lse, backend)
    rng = np.random.default_rng(1)

    def loss(at):
        out, lse = laser_attention(**at, return_lse=True, backend="reference")
        return np.sum(out * d_out) + np.sum(np.where(np.isneginf(lse), 0, lse) * d_lse)

    for name in differentiable(call):
        direction = rng.standard_normal(call[name].shape)
        step = 1e-3  # Richardson's rule on central differences: the error is O(step⁴)
        slopes = [
            (loss(call | {name: call[name] + h * direction}) - loss(call | {name: call[name] - h * direction}))
            / (2 * h)
            for h in (step, 2 * step)
        ]
        want = (4 * slopes[0] - slopes[1]) / 3
        assert np.sum(getattr(got, name) * direction) == pytest.approx(want, rel=1e-7, abs=1e-8), name


@pytest.mark.parametrize("options", OPTIONS)
def test_against_torch_autograd(options):
    torch = pytest.importorskip("torch")
    call, d_out, d_lse = make("grouped", options)
    names = differentiable(call)
    tensors = {n: torch.tensor(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    for name in names:
        tensors[name].requires_grad_()
    out, lse = laser_attention(**tensors, return_lse=True, backend="reference")
    seen = torch.where(torch.isneginf(lse), 0.0, lse)
    loss = (out * torch.tensor(d_out)).sum() + (seen * torch.tensor(d_lse)).sum()
    want = torch.autograd.grad(loss, [tensors[n] for n in names])
    for backend in BACKENDS:
        got = gradients(call, d_out, d_lse, backend)
        for name, w in zip(names, want, strict=True):
            assert relative(getattr(got, name), w.numpy()) < 1e-12, (backend, name)


@pytest.mark.parametrize("options", ["plain", "all together", "beta 0", "lengths"])
def test_against_jax_autodiff(options):
    jax = pytest.importorskip("jax")
    call, d_out, d_lse = make("grouped", options)
    names = differentiable(call)
    with jax.enable_x64(True):
        arrays = {n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}

        def loss(changed):
            out, lse = laser_attention(**arrays | changed, return_lse=True, backend="reference")
            seen = jax.numpy.where(jax.numpy.isneginf(lse), 0.0, lse)
            return (out * d_out).sum() + (seen * d_lse).sum()

        want = jax.grad(loss)({n: arrays[n] for n in names})
        for backend in BACKENDS:
            got = gradients(call, d_out, d_lse, backend)
            for name in names:
                assert relative(getattr(got, name), np.asarray(want[name])) < 1e-12, (backend, name)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
def test_second_derivatives_of_the_reference(beta):
    torch = pytest.importorskip("torch")
    call, _, _ = make("square", "causal")
    q, k, v = (torch.tensor(call[n][:1, :1, :3, :2]).requires_grad_() for n in ("query", "key", "value"))
    b = torch.tensor(beta, dtype=torch.float64, requires_grad=True)

    def attention(q, k, v, b):
        return laser_attention(q, k, v, is_causal=True, beta=b, backend="reference")

    assert torch.autograd.gradcheck(attention, (q, k, v, b))
    assert torch.autograd.gradgradcheck(attention, (q, k, v, b))


@pytest.mark.parametrize("sigma", [1.0, 20.0, 400.0])
@pytest.mark.parametrize("beta", [1.0, -0.5, 0.0])
def test_streaming_is_the_reference_for_every_range(sigma, beta):
    call, d_out, d_lse = make("grouped", "causal", sigma=sigma)
    call["beta"] = np.asarray(beta)
    got = gradients(call, d_out, d_lse, "streaming")
    want = gradients(call, d_out, d_lse, "reference")
    for name in differentiable(call):
        assert relative(getattr(got, name), getattr(want, name)) < 1e-11, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_flows_through_a_query_that_sees_nothing(backend):
    call, d_out, d_lse = make("square", "plain")
    mask = np.ones((9, 9), bool)
    mask[4] = False
    got = gradients(call | {"attn_mask": mask}, np.where(mask[:, :1], d_out, np.nan), d_lse, backend)
    kept = [i for i in range(9) if i != 4]
    fewer = call | {"query": call["query"][..., kept, :]}
    want = gradients(fewer, d_out[..., kept, :], d_lse[..., kept], backend)
    assert not got.query[..., 4, :].any()
    assert relative(got.key, want.key) < 1e-13
    assert relative(got.value, want.value) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pullback_checks_its_cotangents(backend):
    call, d_out, d_lse = make("square", "plain")
    _, pullback = laser_attention_vjp(**call, return_lse=True, backend=backend)
    with pytest.raises(ValueError, match="d_out: got shape"):
        pullback(d_out[..., :1])
    with pytest.raises(TypeError, match="d_out: got dtype float32; allowed: float64"):
        pullback(d_out.astype(np.float32))
    with pytest.raises(TypeError, match="d_lse: got list"):
        pullback(d_out, [1.0])
    assert pullback(d_out).beta is None
    once, again = pullback(d_out, d_lse), pullback(d_out, d_lse)
    assert all(np.array_equal(a, b) for a, b in zip(once[:3], again[:3], strict=True))
