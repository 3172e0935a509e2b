"""Run the Mosaic kernels in JAX's interpreter, against the reference, and look for data races. Run by test_mosaic."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import laser_jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from laser_core import _problem, laser_attention, laser_attention_vjp

# batch, query heads, key heads, queries, keys, D, E, dtype, mean and standard deviation of the values, options
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "causal": (1, 2, 1, 200, 130, 64, 64, "bfloat16", 0, 1, {"is_causal": "bottom_right"}),
    "full": (1, 1, 1, 70, 264, 40, 64, "float16", 0, 1, {"beta": -2.0}),
    "reference": (1, 1, 1, 40, 133, 64, 64, "bfloat16", -200, 1, {"is_causal": True}),  # X of padding would be infinite
    "large": (1, 2, 1, 40, 133, 64, 64, "bfloat16", 1e4, 30, {}),  # 8 bits beside o are too few
    "larger": (1, 1, 1, 70, 72, 64, 64, "float16", 0, 1e4, {"beta": -1.5, "is_causal": True}),
    "hidden": (1, 2, 1, 20, 40, 16, 64, "bfloat16", 0, 1, {"is_causal": True}),  # NaN in what no query sees
    "odd": (1, 2, 2, 70, 72, 64, 64, "float16", 0, 1, {"is_causal": True}),  # a head outside the range, and infinities
}


def check(name: str) -> None:
    """One problem, forward and backward."""
    b, hq, hkv, lq, lk, d, e, dtype, mean, deviation, options = PROBLEMS[name]
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s) for s in ((b, hq, lq, d), (b, hkv, lk, d), (b, hkv, lk, e)))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v * deviation + mean))
    if name == "odd":
        k, v = k.at[0, 1, 5, 3].set(jnp.inf), v.at[0, 0].multiply(12).at[0, 1, 7, 2].set(jnp.nan)
    problem, inputs = _problem.describe(q, k, v, return_lse=True, **options)
    assert laser_jax.MOSAIC.refuses(problem) is None
    done = laser_jax.MOSAIC.forward(problem, inputs)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    o, l = laser_attention(*wide, return_lse=True, backend="reference", **options)
    got, want = (np.asarray(x, np.float64) for x in (done.out, o))
    bound = float(jnp.finfo(dtype).eps) / 2 * (np.abs(want) + 3)
    near = (np.abs(got - want) <= bound) | (np.isnan(got) & np.isnan(want))
    assert near.all(), (name, got[~near], want[~near])
    np.testing.assert_allclose(np.asarray(done.lse), np.asarray(l), rtol=1e-4, atol=1e-4)

    d_out, d_lse = jnp.asarray(rng.normal(size=done.out.shape), dtype), jnp.asarray(rng.normal(size=l.shape), l.dtype)
    gradients = laser_jax.MOSAIC.backward(problem, inputs, done, d_out, d_lse)
    _, pullback = laser_attention_vjp(*wide, return_lse=True, backend="reference", **options)
    for of, x, y in zip("qkv", gradients, pullback(d_out.astype(jnp.float32), d_lse), strict=False):
        x, y = (np.asarray(a.astype(jnp.float32)) for a in (x, y))
        assert (np.isnan(x) == np.isnan(y)).all(), (name, of)
        error = np.linalg.norm(np.nan_to_num(x - y)) / (np.linalg.norm(np.nan_to_num(y)) + 1e-6)
        assert error <= 4 * float(jnp.finfo(dtype).eps), (name, of, error)
    if name == "hidden":
        k, v = (x.at[:, :, lq:].set(jnp.nan) for x in (k, v))
        problem, inputs = _problem.describe(q, k, v, return_lse=True, **options)
        again = laser_jax.MOSAIC.forward(problem, inputs)
        others = laser_jax.MOSAIC.backward(problem, inputs, again, d_out, d_lse)
        for x, y in zip((done.out, done.lse, *gradients[:3]), (again.out, again.lse, *others[:3]), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
    assert not gpu_callbacks.get_races().races_found, name


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for name in sys.argv[1:]:
        check(name)
        print(name, "right, and without a race")
