"""torch: a tensor that carries autograd."""

import torch

import laser_core

torch.manual_seed(0)
query, key, value = (torch.randn(2, 8, 128, 64, requires_grad=True) for _ in range(3))

out = laser_core.laser_attention(query, key, value, is_causal=True)
out.sum().backward()

print(type(out).__name__, out.dtype, tuple(out.shape), tuple(query.grad.shape))
assert (out.dtype, out.shape, out.device) == (query.dtype, value.shape, query.device)
assert torch.isfinite(query.grad).all()
