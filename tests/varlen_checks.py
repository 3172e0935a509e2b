"""Packed sequences beside each sequence alone: for every form of the call, here and in a process of its own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from laser_torch import laser_attention_varlen

from laser_core import laser_attention

LENGTHS = ([0, 21, 1, 0, 40, 5], [3, 21, 19, 7, 0, 37])  # of queries and keys; none divides by a tile
SPARE = 4  # rows behind the last sequence
U = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 1e-5, torch.float64: 1e-12}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": "bottom_right"},
    "window": {"window_size": (3, 5)},
    "everything": {"is_causal": "bottom_right", "window_size": (9, None), "logits_soft_cap": 2.0, "scale": 0.3},
    "beta 0": {"beta": 0.0, "is_causal": "bottom_right"},
    "beta -2": {"beta": -2.0},
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> dict[str, Any]:
    """The arrays of a call; every third sequence is of another range of values."""
    rng = torch.Generator().manual_seed(0)
    (hq, hkv), (d, e) = heads, (16, 24)
    total = [sum(n) + SPARE for n in LENGTHS]
    q, k, v = (
        torch.randn(t, h, n, generator=rng) for t, h, n in ((total[0], hq, d), (total[1], hkv, d), (total[1], hkv, e))
    )
    starts = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in LENGTHS]
    for n in range(2, len(LENGTHS[0]), 3):
        v[starts[1][n] : starts[1][n + 1], 0] *= 200
    q[-SPARE:], k[-SPARE:], v[-SPARE:] = torch.nan, torch.inf, torch.nan
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    starts = [x.to(DEVICE) for x in starts]
    return {"query": q, "key": k, "value": v, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}


def run(arrays: dict[str, Any], do: Any, dl: Any, **call: Any) -> dict[str, torch.Tensor]:
    """Results and gradients, NumPy-like names."""
    own = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in arrays.items()}
    own |= {"max_seqlen_q": max(LENGTHS[0]), "max_seqlen_k": max(LENGTHS[1])}
    out, lse = laser_attention_varlen(**own, return_lse=True, **call)
    wanted = [x for x in (own["query"], own["key"], own["value"])]
    beta = call.get("beta")
    if torch.is_tensor(beta):
        wanted.append(beta)
    grads = torch.autograd.grad([out, lse], wanted, [do, dl])
    names = ("out", "lse", "query", "key", "value", "beta")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=False))


def cotangents(arrays: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of output and log-sum-exp."""
    rng = torch.Generator().manual_seed(1)
    q, v = arrays["query"], arrays["value"]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    do, dl = torch.randn(*q.shape[:2], v.shape[2], generator=rng), torch.randn(q.shape[1], q.shape[0], generator=rng)
    return do.to(DEVICE, q.dtype), dl.to(DEVICE, wide)


def judge(name: str, dtype: torch.dtype, backend: Any, **call: Any) -> None:
    """Each sequence against the reference in float64; what belongs to no sequence against 0."""
    arrays = make(dtype, (2, 2) if name == "bottom right" else (4, 2))
    do, dl = cotangents(arrays)
    got = run(arrays, do, dl, backend=backend, **call)
    want = {n: torch.zeros_like(x, dtype=torch.float64) for n, x in got.items()}
    want["lse"].fill_(-torch.inf)
    starts_q, starts_k = (arrays[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k"))
    for b in range(len(LENGTHS[0])):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = [
            arrays[n][part].transpose(0, 1).double().requires_grad_()
            for n, part in (("query", rows), ("key", keys), ("value", keys))
        ]
        wide = {n: x.detach().double().requires_grad_() if torch.is_tensor(x) else x for n, x in call.items()}
        out, lse = laser_attention(*own, return_lse=True, backend="reference", **wide)
        want["out"][rows], want["lse"][:, rows] = out.detach().transpose(0, 1), lse.detach()
        if 0 in (own[0].shape[1], own[1].shape[1]):
            continue
        beta = [wide["beta"]] if torch.is_tensor(wide.get("beta")) else []
        seen = torch.isfinite(lse)
        cotangent = [do[rows].transpose(0, 1).double(), torch.where(seen, dl[:, rows].double(), 0)]
        grads = torch.autograd.grad([out, torch.where(seen, lse, 0)], own + beta, cotangent)
        want["query"][rows], want["key"][keys], want["value"][keys] = (g.transpose(0, 1) for g in grads[:3])
        if beta:
            want["beta"] += grads[3]
    u = U[dtype]
    for what, x in got.items():
        x, y = x.double(), want[what]
        if what in ("out", "lse"):
            right = (x == y) | ((x - y).abs() <= 4 * u * (1 + y.abs()) + 1e-5)
            assert bool(right.all()), f"{name} {dtype} {what}: {x[~right][:3]} instead of {y[~right][:3]}"
        else:
            error = float((x - y).norm() / y.norm())
            assert error <= 6 * u + 1e-6, f"{name} {dtype} gradient of {what}: {error}"
    print("ok", name, dtype)


def leaks(backend: Any, dtype: torch.dtype = torch.float32) -> None:
    """What is in one sequence does not change a bit of another, and two runs are the same."""
    arrays = make(dtype)
    do, dl = cotangents(arrays)
    call = {"is_causal": "bottom_right", "backend": backend}
    base = run(arrays, do, dl, **call)
    starts = [arrays[n].tolist() for n in ("cu_seqlens_q", "cu_seqlens_k")]
    again = run(arrays, do, dl, **call)
    for name, x in base.items():
        assert torch.equal(x, again[name]), name
    spoilt = {n: x.clone() for n, x in arrays.items()}
    for b, what in ((1, torch.nan), (2, torch.inf)):  # the latter was outside the fast range
        spoilt["query"][starts[0][b] : starts[0][b + 1]] = what
        for n in ("key", "value"):
            spoilt[n][starts[1][b] : starts[1][b + 1]] = what
    other = run(spoilt, do, dl, **call)
    for name, x in base.items():
        s = starts[0] if name in ("out", "lse", "query") else starts[1]
        a, b = (y.transpose(0, 1) if name == "lse" else y for y in (x, other[name]))
        for keep in (slice(0, s[1]), slice(s[3], None)):
            assert torch.equal(a[keep], b[keep]), name
    print("ok leaks")


if __name__ == "__main__":
    part = sys.argv[1]
    if part == "leaks":
        leaks("torch-triton")
    else:
        for name in sys.argv[2:]:
            judge(name, getattr(torch, part), "torch-triton", **CALLS[name])
