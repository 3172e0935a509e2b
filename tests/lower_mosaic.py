"""Lower the Mosaic backend under shard_map, whose checks do not know the references that its kernels write through."""

from __future__ import annotations

import dataclasses
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from laser_jax import binding

from laser_core import _problem


def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """Output and gradients, as on a GPU."""

    def attend(*x: jax.Array) -> jax.Array:
        problem, inputs = _problem.describe(*x, is_causal=True)
        return binding.attention(dataclasses.replace(problem, device="cuda"), inputs, "jax-mosaic")[0]

    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(out)


mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
whole = PartitionSpec("x")
split = jax.shard_map(gradients, mesh=mesh, in_specs=whole, out_specs=whole)
x = jax.ShapeDtypeStruct((2, 2, 128, 64), jnp.bfloat16)
lowered = jax.jit(split).trace(x, x, x).lower(lowering_platforms=("cuda",))
print([y.shape for y in jax.tree.leaves(lowered.out_info)])
