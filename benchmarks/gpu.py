"""LASER attention on a GPU beside cuDNN's softmax attention, in one process: ``python benchmarks/gpu.py --help``.

Each time is one of a result that is right, and a ratio to a peer that was measured in the same turns. What is timed is
the public function with autograd: the value pass, the exact path and what is kept for the backward pass are all in it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import environment
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laser_core import explain, laser_attention

SHAPES = ((4, 16, 4096, 128), (4, 32, 4096, 64), (1, 16, 16384, 128), (16, 16, 1024, 128))
RANGES = (1, 3, 5, 10, 20, 50, 100, 400)  # standard deviations of the values
BUSY = 6_000_000  # cycles, some milliseconds
ROWS = 8  # queries of a head that are compared with float64
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}

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


def times(calls: dict[str, Callable[[], Any]], turns: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each call on the device, taken in turns, and the median that the host needs to launch one.

    The device is kept busy until the launches are queued: in a model, other work does that.
    """
    device: dict[str, list[float]] = {name: [] for name in calls}
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


def measure(shape: tuple[int, ...], causal: bool, dtype: torch.dtype, turns: int) -> list[dict[str, Any]]:
    """Records of every candidate, forward and backward, at one shape."""
    x = inputs(shape, dtype)
    leaves = [a.clone().requires_grad_() for a in x[:3]]
    outs = {name: run(*leaves, causal) for name, run in CANDIDATES.items()}
    dq = torch.autograd.grad(outs["laser"], leaves, x[3], retain_graph=True)[0]
    error, dq_error = errors(x, causal, outs["laser"].detach(), dq)
    if not (error <= 1 and dq_error is not None and dq_error <= 0.02):
        return [{"shape": shape, "causal": causal, "error": error, "dq error": dq_error, "not timed": "wrong"}]
    backward = {n: lambda o=o: torch.autograd.grad(o, leaves, x[3], retain_graph=True) for n, o in outs.items()}
    forward = {n: lambda run=run: run(*leaves, causal) for n, run in CANDIDATES.items()}
    work = 4 * math.prod(shape) * shape[2] / (2 if causal else 1)
    records = []
    for what, calls, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        seconds, host = times(calls, turns)
        for name, taken in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["softmax"], taken, strict=True))
            records.append(
                {
                    "shape": shape,
                    "causal": causal,
                    "dtype": str(dtype)[6:],
                    "pass": what,
                    "candidate": name,
                    "ms": statistics.median(taken) * 1e3,
                    "host ms": host[name] * 1e3,
                    "TFLOP/s": factor * work / statistics.median(taken) / 1e12,
                    "speed": ratio,
                    "error": error if name == "laser" else None,
                    "dq error": dq_error if name == "laser" else None,
                }
            )
    del outs, backward, forward
    for name, run in CANDIDATES.items():
        for record in records:
            if record["candidate"] == name:
                record.setdefault("memory", memory(run, x, causal))
    return records


def accuracy(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Worst error over the bound for growing ranges of the values, LASER's and the recipe's."""
    records = []
    for sigma in RANGES:
        x = inputs((2, 4, 1024, 128), dtype, sigma)
        for name in ("laser", "recipe"):
            out = CANDIDATES[name](*x[:3], True)
            error, _ = errors(x, True, out, None)
            lost = int((~out.isfinite()).sum())
            records.append({"dtype": str(dtype)[6:], "sigma": sigma, "candidate": name, "error": error, "lost": lost})
    return records


def ceiling() -> float:
    """TFLOP/s of an 8192³ bfloat16 product of random matrices."""
    a, b = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    seconds, _ = times({"product": lambda: a @ b}, 5)
    return 2 * 8192**3 / statistics.median(seconds["product"]) / 1e12


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7, help="timings of each, in turns (default: %(default)s)")
    parser.add_argument("--float16", action="store_true", help="the first two shapes in float16 too")
    parser.add_argument("--out", type=Path, help="result file to write, after every shape (default: none)")
    options = parser.parse_args()
    result = environment() | {"device": torch.cuda.get_device_name(), "product": ceiling()}
    result["records"], result["accuracy"] = [], []
    x = inputs(SHAPES[0], torch.bfloat16)
    result["chosen"] = explain(*x[:3], is_causal=True).chosen

    def keep(kind: str, records: list[dict[str, Any]]) -> None:
        result[kind] += records
        for record in records:
            print(json.dumps(record), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    for shape in SHAPES:
        for causal in (True, False):
            keep("records", measure(shape, causal, torch.bfloat16, options.turns))
    for dtype in (torch.bfloat16, torch.float16):
        keep("accuracy", accuracy(dtype))
    if options.float16:
        for causal in (True, False):
            keep("records", measure(SHAPES[0], causal, torch.float16, options.turns))


if __name__ == "__main__":
    main()
