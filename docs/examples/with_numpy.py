"""NumPy: the output, and the gradient of every argument."""

import numpy as np

import laser_core

rng = np.random.default_rng(0)
query, key, value = (rng.standard_normal((2, 8, 128, 64), dtype=np.float32) for _ in range(3))

out, pullback = laser_core.laser_attention_vjp(query, key, value, is_causal=True)
gradients = pullback(np.ones_like(out))

print(type(out).__name__, out.dtype, out.shape, gradients.query.shape)
assert (out.dtype, out.shape) == (query.dtype, value.shape)
assert np.all(out <= value.max(axis=-2, keepdims=True) + 1e-6)  # an average of exponentials: never above the maximum
