"""Run the Mosaic backward kernel in JAX's interpreter, against the equations. Run by test_mosaic_backward."""

from __future__ import annotations

import math
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu
from laser_jax import mosaic_backward

# batch, query heads, key heads, queries, keys, D, dtype, offset of the causal diagonal, β
PROBLEMS: dict[str, tuple[Any, ...]] = {
    "full": (1, 1, 1, 200, 100, 64, "bfloat16", None, 1.0),
    "grouped": (1, 2, 1, 130, 200, 128, "float16", 70, -0.5),
    "blind": (1, 1, 1, 300, 150, 64, "bfloat16", -100, 2.0),
}


def check(name: str) -> None:
    """One problem: errors in the Frobenius norm within twice those of the rounding of x, g, p and ds."""
    batch, heads, heads_kv, length_q, length_k, width, dtype, offset, beta = PROBLEMS[name]
    group, scale = heads // heads_kv, width**-0.5
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, g = drawn(batch, heads, length_q, width), drawn(batch, heads, length_q, width)
    k, x = drawn(batch, heads_kv, length_k, width), jnp.exp2(drawn(batch, heads_kv, length_k, width))
    r = jnp.asarray(rng.normal(size=(batch, heads, length_q)), jnp.float32)
    q_, k_, x_, g_, r_ = (np.asarray(a, np.float64) for a in (q, k, x, g, r))
    s = scale * np.einsum("bkgid,bkjd->bkgij", q_.reshape(batch, heads_kv, group, length_q, width), k_)
    if offset is not None:
        s = np.where(np.arange(length_k) <= np.arange(length_q)[:, None] + offset, s, -math.inf)
    with np.errstate(divide="ignore"):
        l = np.log(np.exp(s).sum(-1, keepdims=True))
    l[np.isneginf(l)] = math.inf
    p = np.exp(s - l)
    g_ = g_.reshape((*p.shape[:-1], width))
    ds = p * (np.einsum("bkgie,bkje->bkgij", g_, x_) / beta + r_.reshape(p.shape[:-1])[..., None])
    want = (
        scale * np.einsum("bkgij,bkjd->bkgid", ds, k_).reshape(q.shape),
        scale * np.einsum("bkgij,bkgid->bkjd", ds, q_.reshape(g_.shape)),
        x_ * np.einsum("bkgij,bkgie->bkje", p, g_),
    )
    got = mosaic_backward.backward(
        q, k, x, g, r, jnp.asarray(l.reshape(r.shape) * math.log2(math.e), jnp.float32),
        scale=scale, causal_offset=offset, inverse_beta=1 / beta, shift=15 if dtype == "float16" else 0,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    unit = float(jnp.finfo(dtype).eps) / 2
    for label, a, b in zip(("dq", "dk", "dv"), got, want, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert a.dtype == q.dtype
        assert error <= 2 * unit, (name, label, error)
    assert not gpu_callbacks.get_races().races_found, name


if __name__ == "__main__":
    for name in sys.argv[1:]:
        check(name)
        print(name, "right, and without a race")
