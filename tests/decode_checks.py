"""The decode kernels in Triton's interpreter: run with TRITON_INTERPRET=1, in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import torch
from laser_torch import DECODE, laser_attention_paged

from laser_core import laser_attention
from laser_core._problem import describe

U = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make(dtype: torch.dtype, lq: int, lk: int, d: int, e: int, sigma: float) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, lq, d), torch.randn(2, 2, lk, d), sigma * torch.randn(2, 2, lk, e)
    return [x.to(dtype) for x in (q, k, v)]


def decode(q: Any, k: Any, v: Any, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    problem, inputs = describe(q, k, v, return_lse=True, **call)
    problem = dataclasses.replace(problem, gradient=False)
    assert DECODE.refuses(problem) is None
    out, lse, _ = DECODE.forward(problem, inputs)
    return out, lse


def judge(name: str, got: Any, q: Any, k: Any, v: Any, **call: Any) -> None:
    """Compare with the reference in float64, by the bounds of docs/numerics.md."""
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in call.items()}
    o, l = laser_attention(q.double(), k.double(), v.double(), return_lse=True, backend="reference", **wide)
    out, lse = (x.double() for x in got)
    u = U[q.dtype]
    r = 1 if call.get("beta", 1.0) != 0 else 1 + v.double().abs().nan_to_num(0, 0, 0).max()
    products = q.double().norm(dim=-1).nan_to_num(0, 0, 0).max() * k.double().norm(dim=-1).nan_to_num(0, 0, 0).max()
    allowed = (u * (o.abs() + 3 * r) if u else 1e-5 * (o.abs() + r)) + r * 2**-20 * products / math.sqrt(q.shape[-1])
    for what, x, y, bound in (("out", out, o, allowed), ("lse", lse, l, 1e-4 * (1 + l.abs()))):
        same = (x == y) | (x.isnan() & y.isnan())
        right = same | ((x - y).abs() <= bound)
        assert bool(right.all()), f"{name}, {what}: {x[~right][:3]} instead of {y[~right][:3]}"
    print("ok", name, q.dtype)


def lengths() -> None:
    q, k, v = make(torch.float32, 1, 40, 16, 16, 1.0)
    want = decode(q, k, v, key_value_seq_lengths=torch.tensor([17, 40]))
    for dtype, large in ((torch.uint64, 2**63), (torch.int64, 2**40), (torch.uint8, 200), (torch.int16, 1000)):
        got = decode(q, k, v, key_value_seq_lengths=torch.tensor([17, large], dtype=dtype))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), dtype
    print("ok lengths")


def spoil(k: torch.Tensor, v: torch.Tensor) -> None:
    v[:, :, 10, 5], v[:, 1, 11, 7], v[:, :, 12, 8], k[:, 1, 20, 3] = math.nan, math.inf, -math.inf, math.inf


def everything(lk: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "logits_soft_cap": 2.0,
        "bias": torch.randn(4, 3, lk).to(dtype),
        "attn_mask": torch.rand(3, lk) > 0.5,
        "key_value_seq_lengths": torch.tensor([lk - 23, 0]),
        "query_seq_lengths": torch.tensor([2, 3]),
    }


def outputs() -> None:
    plain: dict[str, Any] = {"lq": 1, "lk": 300, "d": 64, "e": 64, "sigma": 1.0}
    for dtype in U:
        cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
            ("plain", {}, {}),
            ("beyond the fast range", {"lk": 25, "sigma": 40.0}, {}),
            ("beta 0", {}, {"beta": 0.0}),
            ("beta 0, large", {"sigma": 6e3}, {"beta": 0.0}),
            ("sizes", {"lq": 3, "d": 40, "e": 80}, {"beta": -2.0, "is_causal": "bottom_right", "window_size": (70, 0)}),
            ("causal", {"lq": 3}, {"is_causal": True}),
            ("everything", {"lq": 3}, everything(300, dtype)),
        ]
        for name, sizes, call in cases if dtype != torch.float16 else cases[:3]:
            x = make(dtype, **plain | sizes)
            judge(name, decode(*x, **call), *x, **call)
        for beta in (-1.0, 0.0) if dtype != torch.float16 else ():
            q, k, v = make(dtype, **plain | {"lq": 4, "lk": 30})
            spoil(k, v)
            judge(f"visible NaN and infinity, beta {beta}", decode(q, k, v, beta=beta), q, k, v, beta=beta)


def isolation() -> None:
    """What is hidden does not change a bit, not even where it is NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = make(dtype, 2, 40, 32, 32, 1.0)
        mask = torch.ones(40, dtype=torch.bool)
        mask[[10, 11, 12, 20]] = False
        want = decode(q, k, v, attn_mask=mask)
        spoil(k, v)
        v[:, :, 20] = 60.0  # of a range that the head may have, but beyond the reach of one exponential
        for got, x in zip(decode(q, k, v, attn_mask=mask), want, strict=True):
            assert torch.equal(got, x)
    print("ok isolation")


def paged() -> None:
    torch.manual_seed(0)
    for size, causal, window, lq in (
        (16, False, None, 1),
        (7, "bottom_right", None, 3),
        (64, "bottom_right", (20, 0), 3),
        (16, True, (None, 5), 2),
    ):
        q, table = torch.randn(3, 4, lq, 32), torch.randperm(15)[:12].view(3, 4).to(torch.int32)
        caches = [torch.randn(15, size, 2, n) for n in (32, 48)]
        lengths = torch.tensor([4 * size - 3, 0, size + 2])
        table[2, 2:] = 10**6  # stands for nothing
        call: dict[str, Any] = {"is_causal": causal, "window_size": window, "return_lse": True}
        kernel = laser_attention_paged(q, *caches, table, lengths, **call)
        gathered = laser_attention_paged(q.clone().requires_grad_(), *caches, table, lengths, **call)
        for b, n in enumerate(lengths.tolist()):
            k, v = (c[table[b][: -(-n // size)].long()].flatten(0, 1)[:n].transpose(0, 1) for c in caches)
            want = laser_attention(*(x.double() for x in (q[b], k, v)), backend="reference", **call)
            for got in (kernel, gathered):
                for x, y in zip(got, want, strict=True):
                    assert torch.allclose(x[b].double(), y, atol=1e-5)
    print("ok paged")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
