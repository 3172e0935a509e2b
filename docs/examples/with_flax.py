"""Flax: a layer whose attention is LASER, and one step of its training; the layout is JAX's own (B, T, N, H)."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import laser_jax

layer = nnx.MultiHeadAttention(
    num_heads=4,
    in_features=32,
    decode=False,
    attention_fn=functools.partial(laser_jax.attention_fn, beta=1.5),
    rngs=nnx.Rngs(0),
)
x, target = jax.random.normal(jax.random.key(0), (2, 8, 64, 32))


@nnx.jit
def step(layer: nnx.MultiHeadAttention) -> jax.Array:
    def loss(layer: nnx.MultiHeadAttention) -> jax.Array:
        return jnp.mean((layer(x, is_causal=True) - target) ** 2)

    value, gradients = nnx.value_and_grad(loss)(layer)
    nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(layer, nnx.Param), gradients))
    return value


before, after = step(layer), step(layer)
print(before, after)
assert after < before

# the function beneath it takes the arguments of jax.nn.dot_product_attention
query, key, value = jax.random.normal(jax.random.key(1), (3, 2, 128, 8, 64))
out = laser_jax.dot_product_attention(query, key, value, is_causal=True, local_window_size=(32, 0))
assert out.shape == query.shape
