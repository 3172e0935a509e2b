"""The forms that JAX and Flax know: ``dot_product_attention`` and the ``attention_fn`` of a layer."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from laser_core import Unsupported, laser_attention

jax = pytest.importorskip("jax")
jnp = jax.numpy

from laser_jax import attention_fn, dot_product_attention  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


MASK = normal(2, 4, 7, 9, seed=5) < 0.8
LENGTHS = {"key_value_seq_lengths": jnp.asarray([9, 4], "int32")}
OPTIONS = {  # rank, key/value heads, options
    "plain": (4, 4, {}),
    "no batch": (3, 2, {"is_causal": True, "scale": 0.7}),
    "grouped, one window": (4, 2, {"local_window_size": 2}),
    "one head, two windows": (4, 1, {"local_window_size": (3, 1), "implementation": "xla"}),
    "bias and lengths": (4, 4, {"bias": normal(1, 4, 1, 9, seed=3)} | LENGTHS),
    "mask of rank 3": (4, 2, {"mask": MASK[0], "is_causal": True}),
    "bias and mask": (4, 2, {"bias": normal(2, 1, 7, 9, seed=3), "mask": MASK}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_is_jaxs_own_at_beta_zero(name):
    """At β = 0 LASER is softmax attention, so JAX itself says what each argument means."""
    rank, heads, options = OPTIONS[name]
    batch = (2,) * (rank - 3)
    q, k, v = normal(*batch, 7, 4, 5), normal(*batch, 9, heads, 5, seed=1), normal(*batch, 9, heads, 5, seed=2)
    got = jax.jit(lambda *a: dot_product_attention(*a, **options, beta=0.0))(q, k, v)
    want = jax.jit(lambda *a: jax.nn.dot_product_attention(*a, **options))(q, k, v)
    assert got.shape == want.shape
    assert np.allclose(got, want, atol=2e-5)


def test_beta_and_the_other_engines():
    q, k, v = normal(2, 7, 4, 5), normal(2, 9, 2, 5, seed=1), normal(2, 9, 2, 3, seed=2)
    heads_first = (np.asarray(jnp.swapaxes(x, 1, 2), np.float64) for x in (q, k, v))
    lengths = np.asarray([5, 7])
    want = laser_attention(*heads_first, beta=2.0, is_causal=True, query_seq_lengths=lengths)
    got = dot_product_attention(q, k, v, is_causal=True, query_seq_lengths=jnp.asarray(lengths, "int32"), beta=2.0)
    assert np.max(np.abs(np.swapaxes(got, 1, 2) - want)) <= 1e-5
    assert not got[0, 5:].any()
    for implementation in ("cudnn", "pallas"):  # on a CPU neither is there
        with pytest.raises(Unsupported, match=r"device cpu|implementation: got"):
            dot_product_attention(q, k, v, implementation=implementation)


Q = jnp.ones((2, 7, 4, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": Q[0, 0]}, r"query: got shape \(4, 5\); allowed: BTNH or TNH"),
        ({"key": Q[:, :, :, :3]}, r"key: got shape \(2, 7, 4, 3\); allowed: \(2, 7, 4, 5\)"),
        ({"key": Q[:, :, :3], "value": Q[:, :, :3]}, "query: got 4 heads; allowed: a multiple of the 3"),
        ({"value": Q[:1]}, r"value: got shape \(1, 7, 4, 5\)"),
        ({"bias": jnp.ones((3, 7, 7))}, r"bias: got shape \(1, 3, 7, 7\); .* \(B, N, T, S\) = \(2, 4, 7, 7\)"),
        ({"mask": jnp.ones((4, 7, 7))}, "mask: got dtype float32; allowed: bool"),
        ({"is_causal": "bottom_right"}, "is_causal: got 'bottom_right'; allowed: True or False"),
        ({"query_seq_lengths": jnp.ones((2,))}, r"query_seq_lengths: got float32 .* allowed: int32 of shape \(B,\)"),
        ({"local_window_size": -1}, "window_size: got"),
        ({"implementation": "triton"}, "implementation: got 'triton'; allowed: None, 'xla', 'cudnn', 'pallas'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dot_product_attention(**({"query": Q, "key": Q, "value": Q} | change))


# --------------------------------------------------------------------------------------------------------------- flax


def test_attention_fn_takes_what_flax_gives():
    q, mask = normal(2, 3, 7, 4, 5), normal(2, 3, 1, 7, 7, seed=1) < 0.8  # two axes of batch
    given = {"mask": mask.astype("float32"), "dropout_rng": None, "dropout_rate": 0.5, "broadcast_dropout": True,
             "deterministic": True, "dtype": jnp.bfloat16, "precision": jax.lax.Precision.HIGHEST, "module": None,
             "is_causal": True}  # fmt: skip
    got = functools.partial(attention_fn, beta=2.0, implementation="xla")(q, q, q, **given)
    heads_first = np.asarray(jnp.swapaxes(q, 2, 3).astype("bfloat16"), np.float64)
    want = laser_attention(*(heads_first,) * 3, np.asarray(mask), beta=2.0, is_causal=True)
    assert got.dtype == "bfloat16"
    assert np.all(np.abs(np.swapaxes(np.asarray(got, np.float64), 2, 3) - want) <= 2.0**-8 * (np.abs(want) + 3))
    with pytest.raises(ValueError, match=r"dropout_rate: got 0\.5"):
        attention_fn(q, q, q, dropout_rate=0.5)
    with pytest.raises(ValueError, match=r"module: got object; allowed: None \(sow_weights=False\)"):
        attention_fn(q, q, q, module=object())


def test_a_layer_of_flax_trains_one_step():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, qkv_features=8, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0)
    )
    x, target = normal(3, 6, 8), normal(3, 6, 8, seed=1)

    @nnx.jit
    def step(layer, x, target):
        def loss(layer):
            return jnp.mean((layer(x, is_causal=True) - target) ** 2)

        value, gradient = nnx.value_and_grad(loss)(layer)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(layer, nnx.Param), gradient))
        return value

    before, after = step(layer, x, target), step(layer, x, target)
    assert after < before
    assert np.isfinite(after)
