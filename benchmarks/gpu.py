"""LASER attention on a GPU beside cuDNN's softmax attention, in one process: ``python benchmarks/gpu.py --help``.

Each time is one of a result that is right, and a ratio to a peer that was measured in the same turns. What is timed is
the public function with autograd: the value pass, the exact path and what is kept for the backward pass are all in it.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_common import ACCURACY_SHAPE, RANGES, ROWS, SHAPES, UNIT, Case, Record, Seconds, main
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laser_core import explain, laser_attention

BUSY = 6_000_000  # cycles, some milliseconds

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def softmax(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Softmax attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def recipe(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The published recipe on cuDNN, unguarded."""
    top = v.amax(-2, keepdim=True)
    return softmax(q, k, (v - top).exp(), causal).log() + top


def laser(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """LASER attention by what the automatic choice takes."""
    return laser_attention(q, k, v, is_causal=causal)


CANDIDATES: dict[str, Attention] = {"softmax": softmax, "recipe": recipe, "laser": laser}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, sigma: float = 1.0) -> list[Tensor]:
    """Query, key, value and the cotangent of the output."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.float32) for _ in range(4))
    return [x.to(dtype) for x in (q, k, v * sigma, do)]


def errors(x: list[Tensor], causal: bool, out: Tensor, dq: Tensor | None) -> tuple[float, float | None]:
    """The worst error of sampled rows over the bound of docs/numerics.md, and the relative error of dq there."""
    q, k, v, do = x
    rows = torch.randperm(q.shape[-2], device="cuda", generator=torch.Generator("cuda").manual_seed(1))[:ROWS]
    worst, wrong, size = 0.0, 0.0, 0.0
    scale = q.shape[-1] ** -0.5
    for b, h in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        keys, values = k[b, h].double(), v[b, h].double()
        s = scale * q[b, h, rows].double() @ keys.T
        if causal:
            s = s.masked_fill(torch.arange(s.shape[1], device="cuda") > rows[:, None], -math.inf)
        log_p = torch.log_softmax(s, -1)
        o = torch.logsumexp(log_p[..., None] + values, 1)
        slack = 2.0**-20 * scale * float(q[b, h].double().norm(dim=-1).max() * keys.norm(dim=-1).max())
        bound = UNIT[str(q.dtype)[6:]] * (o.abs() + 3) + slack
        error = float(((out[b, h, rows].double() - o).abs() / bound).nan_to_num(math.inf, math.inf).max())
        worst = max(worst, error)
        if dq is not None:
            w = (log_p[..., None] + values - o[:, None]).exp()
            ds = torch.einsum("ie,ije->ij", do[b, h, rows].double(), w - log_p.exp()[..., None])
            want = scale * ds @ keys
            wrong += float((dq[b, h, rows].double() - want).square().sum())
            size += float(want.square().sum())
    return worst, None if dq is None else math.sqrt(wrong / size)


def times(calls: dict[str, Callable[[], Any]], turns: int) -> tuple[Seconds, dict[str, float]]:
    """Seconds of each call on the device, taken in turns, and the median that the host needs to launch one.

    The device is kept busy until the launches are queued: in a model, other work does that.
    """
    device: Seconds = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY)  # type: ignore[no-untyped-call]
            begin.record()
            start = time.perf_counter()
            call()
            launched = time.perf_counter() - start
            end.record()
            end.synchronize()
            if turn >= 2:  # the first ones warm up
                device[name].append(begin.elapsed_time(end) / 1e3)
                host[name].append(launched)
    return device, {name: statistics.median(taken) for name, taken in host.items()}


def memory(run: Attention, x: list[Tensor], causal: bool) -> dict[str, int]:
    """Bytes beside inputs: held between the passes, output included, and at the peak of both."""
    leaves = [a.detach().clone().requires_grad_() for a in x[:3]]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(*leaves, causal)
    held = torch.cuda.memory_allocated() - before
    torch.autograd.grad(out, leaves, x[3])
    return {"held": held, "peak": torch.cuda.max_memory_allocated() - before}


def measure(cases: list[Case], options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records of every candidate, forward and backward, case by case."""
    for case in cases:
        causal = case.causal
        x = inputs(case.shape, getattr(torch, case.dtype))
        leaves = [a.clone().requires_grad_() for a in x[:3]]
        outs = {name: run(*leaves, causal) for name, run in CANDIDATES.items()}
        dq = torch.autograd.grad(outs["laser"], leaves, x[3], retain_graph=True)[0]
        error, dq_error = errors(x, causal, outs["laser"].detach(), dq)
        if (records := case.wrong(error, dq_error)) is None:
            backward = {n: functools.partial(_gradients, o, leaves, x[3]) for n, o in outs.items()}
            forward = {n: functools.partial(run, *leaves, causal) for n, run in CANDIDATES.items()}
            taken = {what: times(c, options.turns) for what, c in (("forward", forward), ("backward", backward))}
            del outs, backward, forward
            more: dict[str, Record] = {n: {"memory": memory(run, x, causal)} for n, run in CANDIDATES.items()}
            more["laser"] |= {"error": error, "dq error": dq_error}
            records = [r for what, (seconds, host) in taken.items() for r in case.compared(what, seconds, host, more)]
        yield records


def _gradients(out: Tensor, leaves: list[Tensor], do: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, do, retain_graph=True)


def accuracy(dtype: str, options: argparse.Namespace) -> list[Record]:
    """Worst error over the bound for growing ranges of the values, LASER's and the recipe's."""
    records = []
    for sigma in RANGES:
        x = inputs(ACCURACY_SHAPE, getattr(torch, dtype), sigma)
        for name in ("laser", "recipe"):
            out = CANDIDATES[name](*x[:3], True)
            error, _ = errors(x, True, out, None)
            lost = int((~out.isfinite()).sum())
            records.append({"dtype": dtype, "sigma": sigma, "candidate": name, "error": error, "lost": lost})
    return records


def ceiling() -> float:
    """TFLOP/s of an 8192³ bfloat16 product of random matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    seconds, _ = times({"product": lambda: a @ b}, 5)
    return 2 * 8192**3 / statistics.median(seconds["product"]) / 1e12


def about(options: argparse.Namespace) -> Record:
    """The device, and what the automatic choice takes there."""
    x = inputs(SHAPES[0], torch.bfloat16)
    chosen = explain(*x[:3], is_causal=True).chosen
    return {"device": torch.cuda.get_device_name(), "product": ceiling(), "chosen": chosen}


if __name__ == "__main__":
    main(str(__doc__), about, measure, accuracy)
