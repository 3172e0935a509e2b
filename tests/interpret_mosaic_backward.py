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
    "blind": (1, 1, 1, 200, 150, 64, "bfloat16", -100, 2.0),
}


def check(name: str) -> None:
    """One problem: errors in the Frobenius norm within twice those of the rounding of x, g, p and ds."""
    batch, heads, heads_kv, length_q, length_k, width, dtype, offset, beta = PROBLEMS[name]
    group, scale = heads // heads_kv, width**-0.5
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, g = drawn(batch, heads, length_q, width), drawn(batch, heads, length_q, width)
    k, v = drawn(batch, heads_kv, length_k, width), drawn(batch, heads_kv, length_k, width)
    x = jnp.exp(beta * v.astype(jnp.float32)).astype(dtype)
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
        np.einsum("bkgij,bkjd->bkgid", ds, k_).reshape(q.shape),
        scale * np.einsum("bkgij,bkgid->bkjd", ds, q_.reshape(g_.shape)),
        x_ * np.einsum("bkgij,bkgie->bkje", p, g_),
    )
    shift = 15 if dtype == "float16" else 0
    odd, reach = name == "blind", 20 if name == "grouped" else 0
    if odd:  # keys that no query sees
        k = k.at[:, :, length_q + offset :].set(jnp.nan)
    ends = ((0, 0), (0, 0), (0, mosaic_backward.rows(length_q, width) - length_q))
    l2 = jnp.asarray(l.reshape(r.shape) * math.log2(math.e), jnp.float32) - shift
    heads_of_keys = (batch, heads_kv)
    dq, *rest = mosaic_backward.backward(
        q, k, v, jnp.zeros((*heads_of_keys, width)), jnp.pad(g, (*ends, (0, 0))), jnp.pad(r * 2.0**-shift, ends),
        jnp.pad(l2, ends, constant_values=jnp.inf), jnp.full(heads_of_keys, int(odd), jnp.int32),
        jnp.full(heads_of_keys, reach, jnp.int32), scale=scale, causal_offset=offset, beta=beta, shift=shift,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )  # fmt: skip
    unit = float(jnp.finfo(dtype).eps) / 2
    for label, a, b in zip(
        ("dq", "dk", "dv"), (dq[:, :, :length_q], *(x[:, :, :length_k] for x in rest)), want, strict=True
    ):
        hidden = reach if label != "dq" else 0
        assert np.isnan(np.asarray(a[:, :, :hidden], np.float64)).all(), (name, label)
        a, b = np.asarray(a[:, :, hidden:], np.float64), b[:, :, hidden:]
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= 2 * unit, (name, label, error)
    assert not gpu_callbacks.get_races().races_found, name


if __name__ == "__main__":
    for name in sys.argv[1:]:
        check(name)
        print(name, "right, and without a race")
