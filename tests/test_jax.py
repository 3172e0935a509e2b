"""JAX: the engines against the float64 definition, and the binding under JAX's transformations."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from problems import error, make

from laser_core import Unsupported, _problem, backends, explain, laser_attention, laser_attention_vjp

jax = pytest.importorskip("jax")
jnp = jax.numpy

ENGINE = "jax-xla"


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    """These problems are small, and XLA's optimiser is not under test."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def run_alone(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rounded(call, dtype="float32"):
    """The call in JAX arrays of ``dtype``, and the same numbers in float64 for the reference."""
    cast = {n: jnp.asarray(x, dtype) for n, x in call.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    other = {n: jnp.asarray(x) for n, x in call.items() if isinstance(x, np.ndarray) and x.dtype.kind != "f"}
    exact = {n: np.asarray(x, np.float64) for n, x in cast.items()}
    return call | cast | other, call | exact


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def numpy64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("grouped", "window"),
        ("grouped", "lengths"),
        ("two batch axes", "bias per head"),
        ("more queries", "soft cap and bias"),
        ("grouped", "beta 0"),
        ("grouped", "beta per channel"),
        ("grouped", "all together"),
    ],
)
def test_agrees_with_the_definition(shape, options):
    for sigma in (1.0, 12.0, 100.0):
        call, d_out, d_lse = make(shape, options, sigma=sigma)
        call, exact = rounded(call)
        (out, lse), pullback = laser_attention_vjp(**call, return_lse=True, backend=ENGINE)
        (want, want_lse), want_pullback = laser_attention_vjp(**exact, return_lse=True, backend="reference")
        assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
        assert error(np.asarray(out), want) <= 1e-5 * (1 + np.abs(want).max())
        assert error(np.asarray(lse), want_lse) <= 1e-5
        got = pullback(jnp.asarray(d_out, "float32"), jnp.asarray(d_lse, "float32"))
        for g, w in zip(got, want_pullback(d_out, d_lse), strict=True):
            assert (g is None) == (w is None)
            assert w is None or np.linalg.norm(g - w) <= 1e-6 * (10 + sigma) * (1 + np.linalg.norm(w))


@pytest.mark.parametrize(("dtype", "unit"), [("float32", 0), ("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_error_bound_on_hostile_ranges(dtype, unit):
    for sigma, spread in ((1, 1), (5, 1), (20, 30), (60, 1), (400, 30)):
        q, k, v = (f * normal(1, 2, 150, 16, seed=i) for i, f in enumerate((spread, spread, sigma)))
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out, lse = laser_attention(q, k, v, is_causal=True, return_lse=True, backend=ENGINE)
        assert (out.dtype, lse.dtype) == (q.dtype, jnp.float32)
        q, k, v = numpy64((q, k, v))
        want, want_lse = laser_attention(q, k, v, is_causal=True, return_lse=True, backend="reference")
        slack = 2.0**-20 * 16**-0.5 * np.abs(q).max() * np.abs(k).max()
        bound = (unit * (np.abs(want) + 3) if unit else 1e-5 * (1 + np.abs(want))) + slack
        assert np.all(np.abs(np.asarray(out, np.float64) - want) <= bound)
        assert np.all(np.abs(lse - want_lse) <= 1e-4 * (1 + np.abs(want_lse)))


def test_gradients_in_half_precision_keep_the_weights_normalised():
    q, k, v, do = (normal(1, 2, 64, 16, seed=i, dtype="bfloat16") for i in range(4))
    f = lambda v: (laser_attention(q, k, v, is_causal=True, backend=ENGINE) * do).sum()  # noqa: E731
    dv = np.asarray(jax.grad(f)(v), np.float64)
    want = np.asarray(do, np.float64).sum(-2)  # Σ_j dv_je = Σ_i do_ie
    assert np.all(np.abs(dv.sum(-2) - want) <= 2.0**-8 * np.abs(dv).sum(-2))


LENGTH, CUT = 300, 270  # three query tiles and two key tiles where causal
HIDE = {
    "causal": {"is_causal": True},
    "bias": {"bias": jnp.where(jnp.arange(LENGTH) < CUT, 0.0, -jnp.inf)},
}


@pytest.mark.parametrize("hide", HIDE)
def test_what_is_hidden_changes_no_bit(hide):
    def run(q, k, v):
        (out, lse), pullback = laser_attention_vjp(q, k, v, return_lse=True, backend=ENGINE, **HIDE[hide])
        kept = (out, *pullback(do)[:3])
        return [*(np.asarray(x)[..., :CUT, :] for x in kept), np.asarray(lse)[..., :CUT]]

    q, k, v, do = (normal(1, 2, LENGTH, 4, seed=i) for i in range(4))
    do = do.at[..., CUT:, :].set(0)
    want = run(q, k, v)
    assert all(np.isfinite(x).all() for x in want)
    for bad in (np.nan, np.inf, -np.inf, 20.0, -30.0):
        got = run(q, k.at[..., CUT:, :].set(bad), v.at[..., CUT:, :].set(bad))
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True)), bad
    got = run(q, k, v.at[..., CUT:, :].set(1e30))  # beyond the fast range
    assert all(np.max(np.abs(a - b)) <= 1e-5 for a, b in zip(got, want, strict=True))
    for bad in (np.nan, 1e30):  # another head
        got = run(*(x.at[:, 1].set(bad) for x in (q, k, v)))
        assert all(np.array_equal(a[:, 0], b[:, 0]) for a, b in zip(got, want, strict=True)), bad


def test_what_is_visible_and_not_finite_is_seen():
    q, k, v = (normal(1, 2, LENGTH, 4, seed=i) for i in range(3))
    v = v.at[0, 0, 7, :3].set(jnp.asarray([jnp.nan, jnp.inf, -jnp.inf]))
    (out, _), pullback = laser_attention_vjp(q, k, v, is_causal=True, return_lse=True, backend=ENGINE)
    assert np.isfinite(out[:, 0, :7]).all()
    assert np.isfinite(out[:, 1]).all()
    assert np.isnan(out[:, 0, 7:, 0]).all()
    assert np.isposinf(out[:, 0, 7:, 1]).all()
    assert np.isfinite(out[:, 0, 7:, 2:]).all()
    gradients = pullback(jnp.ones_like(out))
    assert np.isnan(gradients.value[:, 0]).all()  # every key is seen by the last query, whose output is NaN
    assert np.isfinite(gradients.query[:, 0, :7]).all()
    assert np.isnan(gradients.query[:, 0, 7:]).all()
    assert all(np.isfinite(g[:, 1]).all() for g in gradients[:3])
    k = k.at[0, 0, 9, 0].set(jnp.nan)
    out, lse = laser_attention(q, k, v, is_causal=True, return_lse=True, backend=ENGINE)
    assert np.isnan(out[:, 0, 9:]).all()
    assert np.isnan(lse[:, 0, 9:]).all()
    assert np.isfinite(lse[:, 0, :9]).all()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_empty(lengths):
    q, k = normal(2, 2, lengths[0], 4), normal(2, 2, lengths[1], 4)
    (out, lse), pullback = laser_attention_vjp(q, k, k, return_lse=True, backend=ENGINE)
    assert out.shape == q.shape
    assert not out.any()
    assert np.isneginf(lse).all()
    assert not any(g.any() for g in pullback(out)[:3])


# ---------------------------------------------------------------------------------------------- transformations


def problem_for_transforms():
    q, k, v = normal(4, 2, 9, 4), normal(4, 1, 9, 4, seed=1), normal(4, 1, 9, 3, seed=2)
    return q, k, v.at[2].multiply(200)  # one example is beyond the fast range


def test_jit_does_not_retrace():
    traces = []

    def f(q, k, v):
        traces.append(1)
        return laser_attention(q, k, v, is_causal=True, backend=ENGINE).sum()

    step = jax.jit(jax.value_and_grad(f, (0, 1, 2)))
    q, k, v = problem_for_transforms()
    first, second = step(q, k, v), step(q, k, v)
    assert len(traces) == 1
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_vmap_over_any_mixture_of_arguments():
    q, k, v = problem_for_transforms()
    bias, beta = normal(4, 1, 9, seed=3), jnp.linspace(0.5, 2, 12).reshape(4, 3)
    mask = normal(4, 9, 9, seed=4) < 0.8
    weight = normal(2, 9, 3, seed=5)

    def loss(q, k, v, mask, bias, beta):
        return (laser_attention(q, k, v, mask, bias, beta=beta, backend=ENGINE) * weight).sum()

    step = jax.vmap(jax.grad(loss, (0, 1, 2, 4, 5)), (0, None, 0, 0, 0, 0))
    got = jax.jit(step)(q, k[0], v, mask, bias, beta)
    for n in range(4):
        arrays = numpy64((q[n], k[0], v[n], bias[n], beta[n]))
        options = {"attn_mask": np.asarray(mask[n]), "bias": arrays[3], "beta": arrays[4], "backend": "reference"}
        _, pullback = laser_attention_vjp(*arrays[:3], **options)
        for g, want in zip(got, pullback(np.asarray(weight, np.float64)), strict=True):
            assert np.linalg.norm(np.asarray(g[n], np.float64) - want) <= 1e-4 * (1 + np.linalg.norm(want))


def test_checkpoint_and_integer_cotangents():
    q, k, v = problem_for_transforms()
    mask = jnp.tril(jnp.ones((9, 9), bool))
    f = lambda q, mask: laser_attention(q, k, v, mask, backend=ENGINE).sum()  # noqa: E731
    dq, dmask = jax.jit(jax.grad(jax.checkpoint(f), (0, 1), allow_int=True))(q, mask)
    out, pullback = laser_attention_vjp(*numpy64((q, k, v)), np.asarray(mask), backend="reference")
    want = pullback(np.ones_like(out)).query
    assert np.linalg.norm(dq - want) <= 1e-3 * np.linalg.norm(want)
    assert dmask.dtype == jax.dtypes.float0


def test_second_derivatives_are_refused_by_the_analytic_path_and_given_by_the_reference():
    q, k, v = (x[0] for x in problem_for_transforms())
    f = lambda q, backend: (laser_attention(q, k, v, backend=backend) ** 2).sum()  # noqa: E731
    once = jax.grad(f)
    twice = jax.jit(jax.grad(lambda q, backend: (once(q, backend) ** 2).sum()), static_argnums=1)
    message = "first order.*backend='reference' is differentiable to any order"
    with pytest.raises(Unsupported, match=message):
        twice(q, ENGINE)
    with pytest.raises(Unsupported, match=message):
        jax.jit(jax.hessian(f), static_argnums=1)(q, ENGINE)
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's own words for any custom_vjp
        jax.jvp(lambda q: f(q, ENGINE), (q,), (q,))
    assert np.isfinite(twice(q, "reference")).all()


def test_products_are_not_rounded_below_float32_unless_asked():
    q, k, v = problem_for_transforms()
    f = lambda q: laser_attention(q, k, v, backend=ENGINE)  # noqa: E731
    assert "HIGHEST" in str(jax.make_jaxpr(f)(q))
    with jax.default_matmul_precision("tensorfloat32"):
        assert "HIGHEST" not in str(jax.make_jaxpr(f)(q))


def test_memory_is_linear_in_the_length():
    shape = jax.ShapeDtypeStruct((1, 2, 16384, 16), "float32")
    f = lambda q, k, v: laser_attention(q, k, v, backend=ENGINE).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(shape, shape, shape).compile()
    scores = 2 * 16384**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 40


# ---------------------------------------------------------------------------------------------------- records


def test_the_records_do_not_import_jax():
    run_alone("import laser_jax, sys; assert 'jax' not in sys.modules; laser_jax.XLA.why_not")


def test_it_is_the_automatic_choice():
    q, k, v = problem_for_transforms()
    assert explain(q, k, v).chosen == ENGINE
    problem, _ = _problem.describe(*(np.asarray(x) for x in (q, k, v)))
    assert "arrays of numpy" in str(backends()[ENGINE].refuses(problem))
