"""Run the Mosaic kernels in JAX's interpreter, against the reference, and look for data races. Run by test_mosaic."""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from laser_core import laser_attention

# batch, query heads, key heads, queries, keys, D, E, dtype, standard deviation of the values, options
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "causal": (1, 2, 1, 200, 130, 64, 64, "bfloat16", 1, {"is_causal": "bottom_right"}),
    "full": (1, 1, 1, 70, 264, 40, 64, "float16", 1, {"beta": -2.0}),
    "far": (1, 2, 2, 70, 72, 64, 64, "float16", 12, {"is_causal": True}),
    "reference": (1, 1, 1, 40, 136, 64, 64, "bfloat16", (1, 40), {"is_causal": True}),
}


def check(name: str) -> None:
    """One problem."""
    b, hq, hkv, lq, lk, d, e, dtype, deviation, options = PROBLEMS[name]
    rng = np.random.default_rng(0)
    spread, middle = deviation if isinstance(deviation, tuple) else (deviation, 0)
    q, k, v = (rng.normal(size=s) for s in ((b, hq, lq, d), (b, hkv, lk, d), (b, hkv, lk, e)))
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v * spread + middle))
    if name == "full":
        k, v = k.at[0, 0, 5, 3].set(jnp.inf), v.at[0, 0, 7, 2].set(jnp.nan)
    o, l = laser_attention(q, k, v, return_lse=True, backend="jax-mosaic", **options)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    o_true, l_true = laser_attention(*wide, return_lse=True, backend="reference", **options)
    bound = float(jnp.finfo(dtype).eps) / 2 * (jnp.abs(o_true) + 3)
    got, want = (np.asarray(x, np.float64) for x in (o, o_true))
    near = (np.abs(got - want) <= np.asarray(bound)) | ((got == want) | (np.isnan(got) & np.isnan(want)))
    assert near.all(), (name, got[~near], want[~near])
    np.testing.assert_allclose(np.asarray(l), np.asarray(l_true), rtol=1e-4, atol=1e-4)
    assert not gpu_callbacks.get_races().races_found, name


if __name__ == "__main__":
    for name in sys.argv[1:]:
        check(name)
        print(name, "right, and without a race")
