"""LASER on eight virtual devices of JAX, split over batch and heads: run in a process of its own, a case its argument.

Prints the collective operations of the compiled gradient; fails where a result is not that of the definition.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from laser_core import laser_attention, laser_attention_vjp

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

CASES = {  # query heads, key/value heads, mesh, kind of its axes; whether bias and β are split as well
    "shard_map": (4, 2, (4, 2), AxisType.Auto, False),
    "automatic": (4, 2, (4, 2), AxisType.Auto, False),
    "heads of a group": (4, 1, (2, 4), AxisType.Auto, True),
    "too few heads": (8, 2, (2, 4), AxisType.Auto, True),
    "explicit": (4, 1, (2, 4), AxisType.Explicit, True),
}
NAMES = ("query", "key", "value", "bias", "beta", "lengths")


def attend(q, k, v, bias, beta, lengths):
    return laser_attention(
        q, k, v, None, bias, beta=beta, is_causal=True, key_value_seq_lengths=lengths, backend="jax-xla"
    )


def main(case: str) -> None:
    hq, hkv, shape, kind, split = CASES[case]
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    arrays = [normal((4, hq, 7, 4)), normal((4, hkv, 9, 4)), normal((4, hkv, 9, 3))]
    arrays += [normal((hq, 7, 9) if split else (7, 9)), np.linspace(0.5, 2, hq * 3).reshape(hq, 3)]
    arrays[4] = arrays[4] if split else arrays[4][1]
    arrays += [np.array([9, 4, 0, 7])]
    arrays[2][1, 0] *= 100  # one head beyond the fast range
    *inputs, bias, beta, lengths = arrays
    options = {"beta": beta, "is_causal": True, "key_value_seq_lengths": lengths}
    out, pullback = laser_attention_vjp(*inputs, None, bias, backend="reference", **options)
    want = (out, *pullback(2 * out))

    mesh = jax.make_mesh(shape, ("batch", "heads"), axis_types=(kind,) * 2)
    kv = "heads" if hkv % shape[1] == 0 else None
    shared = P("heads") if split else P()
    specs = [P("batch", "heads"), P("batch", kv), P("batch", kv), shared, shared, P("batch")]
    function = attend
    if case == "shard_map":
        function = jax.shard_map(attend, mesh=mesh, in_specs=tuple(specs), out_specs=P("batch", "heads"))

    def loss(*arrays):
        out = function(*arrays)
        return (out**2).sum(), out

    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
        step = jax.jit(jax.value_and_grad(loss, tuple(range(5)), has_aux=True)).lower(*placed).compile()
        (_, out), gradients = step(*placed)
    for name, got, expected in zip(("out", *NAMES), (out, *gradients), want, strict=False):
        assert got.dtype == jnp.float64, name
        error = np.linalg.norm(np.asarray(got) - expected)
        assert error <= 1e-11 * (1 + np.linalg.norm(expected)), (name, error)
    print(*sorted(set(re.findall(r" (all-\w+|collective-\w+|reduce-scatter)\(", step.as_text()))))


if __name__ == "__main__":
    main(sys.argv[1])
