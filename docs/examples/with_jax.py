"""JAX: an array that jit and grad know how to handle."""

import jax

import laser_core

query, key, value = (jax.random.normal(k, (2, 8, 128, 64)) for k in jax.random.split(jax.random.key(0), 3))


@jax.jit
def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return laser_core.laser_attention(query, key, value, is_causal=True).sum()


gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

print(type(gradients[0]).__name__, gradients[0].dtype, gradients[0].shape)
assert [g.shape for g in gradients] == [query.shape, key.shape, value.shape]
assert all(jax.numpy.isfinite(g).all() for g in gradients)
