"""Whether outputs stay between the visible values of channels that hardly vary. Triton interprets its kernels."""

import torch
from torch import Tensor

from laser_core import laser_attention

SLACK, LEAST = 2 * 2.0**-11, 2.0**-20  # roundings of a float16 output, and of float32


def values(keys: int, channels: int) -> Tensor:
    """Constant channels; one of zeros, one that varies, and one that varies in its last bits."""
    v = torch.linspace(-0.4, 0.4, channels).half().expand(1, 2, keys, channels).clone()
    v[..., 3] = 0
    v[:, 1, :, 5] = torch.randn(keys).half()
    v[..., 7] += torch.rand(1, 2, keys).half() * 2**-10
    return v


def main() -> None:
    """Every alignment, with and without a gradient."""
    torch.manual_seed(0)
    for causal in (False, True, "bottom_right"):
        for rows, keys, width in ((70, 70, 16), (40, 90, 32), (90, 40, 16)):
            q, k = torch.randn(1, 4, rows, width).half(), torch.randn(1, 2, keys, width).half()
            v = values(keys, width)
            seen = v.repeat_interleave(2, 1).float()
            offset = keys - rows if causal == "bottom_right" else 0
            for gradient in (False, True):
                query = q.clone().requires_grad_(gradient)
                out = laser_attention(query, k, v, is_causal=causal, backend="torch-triton").detach().float()
                for i in range(rows):
                    count = keys if causal is False else min(keys, i + offset + 1)
                    if count <= 0:
                        assert not out[:, :, i].any()
                        continue
                    low, high = seen[:, :, :count].amin(2), seen[:, :, :count].amax(2)
                    o, narrow = out[:, :, i], high - low <= 2**-9
                    fits = (o >= low - SLACK * low.abs() - LEAST) & (o <= high + SLACK * high.abs() + LEAST)
                    assert fits[narrow].all(), (causal, rows, keys, i)


if __name__ == "__main__":
    main()
