"""The engine on cuDNN without a GPU: what it refuses, and its own part, with cuDNN's attention emulated."""

import dataclasses

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from laser_jax import CUDNN, cudnn, served  # noqa: E402

from laser_core import Problem, _problem, _streaming  # noqa: E402

FINE = Problem(
    framework="jax", device="cuda", dtype="bfloat16", batch=(2,), query_heads=4, key_value_heads=2,
    query_length=100, key_length=70, head_dim=128, value_dim=64, scale=0.1, causal="top_left", gradient=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "float16"}, "dtype float16"),
        ({"device": "cpu"}, "device cpu"),
        ({"beta": 0.5}, "expm1"),
        ({"head_dim": 192}, "head dim D = 192"),
        ({"causal": "bottom_right"}, "top left alone"),
        ({"window": (None, 3), "causal": None}, "top left alone"),
        ({"key_value_lengths": True}, "sequence lengths"),
        ({"gradient": True}, "another order in every run"),
    ],
)
def test_says_what_it_leaves_to_others(change, told, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert CUDNN.refuses(FINE) is None
    assert told in str(CUDNN.refuses(dataclasses.replace(FINE, **change)))


def test_gradients_where_xla_is_told_to_be_deterministic(monkeypatch):
    for flags, told in (("--xla_gpu_deterministic_ops=false", True), ("-x --xla_gpu_deterministic_ops=true", False)):
        monkeypatch.setenv("XLA_FLAGS", flags)
        assert (CUDNN.refuses(dataclasses.replace(FINE, gradient=True)) is not None) == told


def _scores(problem, q, k):
    s = problem.scale * jnp.einsum("bhid,bhjd->bhij", *(x.astype(jnp.float32) for x in (q, k)))
    return s if served.causal_offset(problem) is None else jnp.where(jnp.tril(jnp.ones(s.shape[2:], bool)), s, -jnp.inf)


def _wide(x, group):
    return jnp.repeat(x, group, axis=1).astype(jnp.float32)


def attend(problem, q, k, x):
    """As cuDNN rounds: p and x before their product, and the result."""
    s = _scores(problem, q, _wide(k, problem.group))
    m = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - m)
    total = jnp.sum(p, axis=-1, keepdims=True)
    a = jnp.einsum("bhij,bhje->bhie", p.astype(x.dtype).astype(jnp.float32), _wide(x, problem.group)) / total
    return a.astype(x.dtype), (m + jnp.log(total))[..., 0]


def pull(problem, q, k, x, out, l, g):
    """The same backward: ds is rounded too, and the row term is that of the rounded output."""
    k, x = (_wide(y, problem.group) for y in (k, x))
    p = jnp.exp(_scores(problem, q, k) - l[..., None])
    g = g.astype(jnp.float32)
    row = jnp.sum(g * out.astype(jnp.float32), axis=-1, keepdims=True)
    ds = (p * (jnp.einsum("bhie,bhje->bhij", g, x) - row)).astype(out.dtype).astype(jnp.float32)
    dq = problem.scale * jnp.einsum("bhij,bhjd->bhid", ds, k)
    dk = problem.scale * jnp.einsum("bhij,bhid->bhjd", ds, q.astype(jnp.float32))
    dx = jnp.einsum("bhij,bhie->bhje", p.astype(out.dtype).astype(jnp.float32), g)
    dk, dx = (jnp.sum(jnp.reshape(y, (y.shape[0], -1, problem.group, *y.shape[2:])), axis=2) for y in (dk, dx))
    return tuple(y.astype(out.dtype) for y in (dq, dk, dx))


@pytest.fixture
def _emulated(monkeypatch):
    monkeypatch.setattr(cudnn, "attend", attend)
    monkeypatch.setattr(cudnn, "pull", pull)
    jax.clear_caches()
    yield
    jax.clear_caches()


def arrays(rows, keys, spread):
    draws = (jax.random.normal(key, (2, h, n, 16)) for key, h, n in zip(
        jax.random.split(jax.random.key(0), 4), (4, 2, 2, 4), (rows, keys, keys, rows), strict=True))  # fmt: skip
    q, k, v, do = draws
    v = v * jnp.asarray([[1.0, spread], [1.0, 1.0]])[:, :, None, None]  # one head of four
    return [x.astype(jnp.bfloat16) for x in (q, k, v, do)]


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize(
    ("rows", "keys", "spread", "options"),
    [
        (40, 56, 1.0, {"is_causal": True, "return_lse": True}),
        (40, 40, 60.0, {"is_causal": True}),
        (40, 9, 1.0, {"beta": -2.0}),
    ],
)
def test_is_right_whatever_the_range(rows, keys, spread, options):
    *inputs, do = arrays(rows, keys, spread)
    problem, given = _problem.describe(*inputs, **options)
    dl = jnp.sin(jnp.arange(2 * 4 * rows, dtype=jnp.float32)).reshape(2, 4, rows) if problem.return_lse else None
    done = CUDNN.forward(problem, given)
    found = CUDNN.backward(problem, given, done, do, dl)
    wide = [np.asarray(x).astype(np.float64) for x in (*inputs, do)]
    exact, exact_given = _problem.describe(*wide[:3], **options)
    with np.errstate(all="ignore"):  # it tries the fast path with numbers that are not for it
        right = _streaming.BACKEND.forward(exact, exact_given)
        wanted = _streaming.BACKEND.backward(exact, exact_given, right, wide[3], None if dl is None else np.float64(dl))
    out, lse, *found = (np.asarray(x).astype(np.float64) for x in (done.out, done.lse, *found[:3]))
    assert np.all(np.abs(out - right.out) <= 2.0**-8 * (np.abs(right.out) + 3))
    assert np.all(np.abs(lse - right.lse) <= 1e-4 * (1 + np.abs(right.lse)))
    for name, a, b in zip(("dq", "dk", "dv"), found, wanted[:3], strict=True):
        assert np.linalg.norm(a - b) <= 2.0**-6 * np.linalg.norm(b), name


@pytest.mark.usefixtures("_emulated")
def test_what_no_query_sees_changes_no_bit():
    """Nor does NaN that one head sees change the others."""
    *inputs, do = arrays(40, 56, 1.0)

    def run(spoilt, at):
        q, k, v = (x.at[at].set(spoilt) if i else x for i, x in enumerate(inputs))
        problem, given = _problem.describe(q, k, v, is_causal=True)
        done = CUDNN.forward(problem, given)
        return done.out, *CUDNN.backward(problem, given, done, do, None)[:3]

    plain = run(1.0, (slice(None), slice(None), slice(40, None)))
    for a, b in zip(plain, run(jnp.nan, (slice(None), slice(None), slice(40, None))), strict=True):
        assert bool(jnp.all(a == b))
    out, dq, dk, dv = run(jnp.nan, (0, 1, 30))
    clean, *gradients = run(inputs[1][0, 1, 30], (0, 1, 30))
    assert bool(jnp.all(jnp.isnan(out[0, 2:, 30:])))
    assert bool(jnp.all(out[0, 2:, :30] == clean[0, 2:, :30]))
    for a, b in zip((dq, dk, dv), gradients, strict=True):
        assert bool(jnp.all(a[1] == b[1]))
        assert bool(jnp.all(jnp.isnan(a[0, -1, 35:40])))
