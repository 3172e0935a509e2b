"""Calls of the shared problems with torch tensors, and the comparison of what they return."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from laser_core import laser_attention

NAMES = ("query", "key", "value", "bias", "beta")


def tensors(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A call with torch tensors; those that are floating require gradients."""
    out: dict[str, Any] = {}
    for name, x in call.items():
        if isinstance(x, np.ndarray):
            t = torch.from_numpy(x)
            out[name] = t.to(dtype).requires_grad_() if t.is_floating_point() else t
        else:
            out[name] = x
    return out


def run(
    call: dict[str, Any],
    do: Any,
    dl: Any,
    dtype: torch.dtype,
    backend: str | None = None,
    via: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """out, lse and all gradients, in float64; ``via``: inputs are rounded to that dtype first."""
    args = tensors(call, dtype)
    if via is not None:
        rounded = tensors(call, via)
        args = {
            n: rounded[n].detach().to(dtype).requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
            for n, x in args.items()
        }
        do, dl = torch.from_numpy(np.asarray(do)).to(via), torch.from_numpy(np.asarray(dl)).float()
    out, lse = laser_attention(**args, return_lse=True, backend=backend)
    wrt = {n: args[n] for n in NAMES if torch.is_tensor(args.get(n))}
    cotangents = [torch.as_tensor(do).to(out.dtype), torch.as_tensor(dl).to(lse.dtype)]
    grads = torch.autograd.grad((out, lse), tuple(wrt.values()), cotangents)
    assert out.dtype == dtype
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, wrt.values(), strict=True))
    found = {"out": out, "lse": lse, **{f"d_{n}": g for n, g in zip(wrt, grads, strict=True)}}
    return {n: x.detach().double() for n, x in found.items()}


def agree(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], out: float, grad: float) -> None:
    """Outputs and lse elementwise, relative to 1 + |·|; gradients in the Frobenius norm."""
    assert got.keys() == want.keys()
    for name, w in want.items():
        g = got[name]
        if name.startswith("d_"):
            error, allowed = (g - w).norm().item(), grad * (w.norm().item() + 1e-3)
        else:
            assert torch.equal(g.isneginf(), w.isneginf()), name
            g, w = (x.masked_fill(w.isneginf(), 0) for x in (g, w))
            error, allowed = ((g - w).abs() / (1 + w.abs())).max().item() if w.numel() else 0.0, out
        assert not math.isnan(error), name
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"
