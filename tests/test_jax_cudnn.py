"""The engine on cuDNN without a GPU: what it refuses, and its own part, with cuDNN's attention emulated."""

import dataclasses

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from laser_jax import CUDNN, cudnn, served  # noqa: E402

from laser_core import Problem, Unsupported, _problem, _streaming  # noqa: E402

FINE = Problem(
    framework="jax", device="cuda", dtype="bfloat16", batch=(2,), query_heads=4, key_value_heads=2,
    query_length=100, key_length=70, head_dim=128, value_dim=64, scale=0.1, causal="top_left",
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
    ],
)
def test_says_what_it_leaves_to_others(change, told):
    assert CUDNN.refuses(FINE) is None
    assert told in str(CUDNN.refuses(dataclasses.replace(FINE, **change)))


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


@pytest.fixture
def _emulated(monkeypatch):
    monkeypatch.setattr(cudnn, "attend", attend)
    jax.clear_caches()
    yield
    jax.clear_caches()


def arrays(rows, keys, spread):
    draws = (jax.random.normal(key, (2, h, n, 16)) for key, h, n in zip(
        jax.random.split(jax.random.key(0), 3), (4, 2, 2), (rows, keys, keys), strict=True))  # fmt: skip
    q, k, v = draws
    v = v * jnp.asarray([[1.0, spread], [1.0, 1.0]])[:, :, None, None]  # one head of four
    return [x.astype(jnp.bfloat16) for x in (q, k, v)]


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
    inputs = arrays(rows, keys, spread)
    problem, given = _problem.describe(*inputs, **options)
    done = CUDNN.forward(problem, given)
    wide = [np.asarray(x).astype(np.float64) for x in inputs]
    with np.errstate(all="ignore"):  # it tries the fast path with numbers that are not for it
        right = _streaming.BACKEND.forward(*_problem.describe(*wide, **options))
    out, lse = (np.asarray(x).astype(np.float64) for x in (done.out, done.lse))
    assert np.all(np.abs(out - right.out) <= 2.0**-8 * (np.abs(right.out) + 3))
    assert np.all(np.abs(lse - right.lse) <= 1e-4 * (1 + np.abs(right.lse)))
    with pytest.raises(Unsupported, match="not the same bits in every run"):
        CUDNN.backward(problem, given, done, done.out, None)


@pytest.mark.usefixtures("_emulated")
def test_what_no_query_sees_changes_no_bit():
    """Nor does NaN that a head sees change another, or queries that do not see it."""
    inputs = arrays(40, 56, 1.0)

    def run(spoilt, at):
        q, k, v = (x.at[at].set(spoilt) if i else x for i, x in enumerate(inputs))
        return CUDNN.forward(*_problem.describe(q, k, v, is_causal=True)).out

    late = (slice(None), slice(None), slice(40, None))
    assert bool(jnp.all(run(1.0, late) == run(jnp.nan, late)))
    spoilt, clean = run(jnp.nan, (0, 1, 30)), run(inputs[1][0, 1, 30], (0, 1, 30))
    assert bool(jnp.all(jnp.isnan(spoilt[0, 2:, 30:])))
    for at in ((0, slice(2, None), slice(30)), (0, slice(2)), (1,)):
        assert bool(jnp.all(spoilt[at] == clean[at]))
