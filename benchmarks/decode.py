"""Decode beside softmax attention and a copy, in one run on one GPU: ``python benchmarks/decode.py --help``.

One query against a long cache, 32 query heads on 8 key/value heads, D = 128, bfloat16. A time is only taken of a result
that is right: sampled heads are compared with the formula in float64 first. Times are medians of CUDA graph replays.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from laser_torch import decode, laser_attention_paged
from torch.nn.attention import SDPBackend, sdpa_kernel

from laser_core import _problem, explain, laser_attention

SHAPES = {"B64-L8192": (64, 8192), "B1-L131072": (1, 131072), "B16-L4096": (16, 4096)}
HEADS, KV_HEADS, DIM = 32, 8, 128
PAGES = (64, 16)  # keys per page
SWEEP = [
    (block_k, keys, warps, stages)
    for block_k, warps, stages in ((64, 4, 3), (64, 4, 2), (64, 8, 3), (64, 8, 4), (128, 8, 2), (128, 8, 3), (32, 4, 4))
    for keys in (512, 1024, 2048, 4096)
]


def seconds(call: Callable[[], Any], calls: int = 10, turns: int = 7) -> float:
    """Median time of a call: a CUDA graph of ``calls`` of them, replayed ``turns`` times."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # CuPy has memory of each stream, which it may not ask for during a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(turns):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(times)


def eager_seconds(call: Callable[[], Any], calls: int = 50) -> float:
    """Time of a call from Python, launches included."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def worst(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, laser: bool = True) -> float:
    """The greatest error of some heads over its bound u·(|o| + 3)."""
    found = 0.0
    for b, h in ((0, 0), (q.shape[0] - 1, HEADS - 1), (q.shape[0] // 2, 13)):
        g = h // (HEADS // KV_HEADS)
        s = (q[b, h].double() @ k[b, g].double().T) / math.sqrt(DIM)
        p = torch.softmax(s, -1)
        want = (p @ v[b, g].double().exp()).log() if laser else p @ v[b, g].double()
        error = (out[b, h].double() - want).abs() / (2**-8 * (want.abs() + 3))
        found = max(found, float(error.max())) if bool(error.isfinite().all()) else math.inf
    return found


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x), calls=4)


def measure(name: str, candidates: dict[str, tuple[Callable[[], Any], float]], size: int, copy: float) -> list[Any]:
    """A record for each candidate; ``size`` is what has to be read."""
    records = []
    for who, (call, error) in candidates.items():
        if not error <= 1:
            records.append({"shape": name, "who": who, "error": error})
            continue
        try:
            t = seconds(call)
        except Exception as failure:  # a peer that cannot be captured has no figure, and says so
            records.append({"shape": name, "who": who, "failed": str(failure).splitlines()[0][:200]})
            continue
        rate = size / t
        records.append({"shape": name, "who": who, "us": t * 1e6, "TB/s": rate / 1e12, "of copy": rate / copy,
                        "error": error})  # fmt: skip
    return records


def in_cupy(*x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """LASER attention of the same memory by CuPy's kernels, on torch's stream."""
    import cupy
    import ml_dtypes

    arrays = [cupy.from_dlpack(a.view(torch.int16)).view(ml_dtypes.bfloat16) for a in x]

    def call() -> torch.Tensor:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            return torch.from_dlpack(laser_attention(*arrays).view("int16")).view(torch.bfloat16)

    return call


def shape(name: str, sweep: bool, copy: float) -> list[Any]:
    """All candidates at one shape."""
    batch, length = SHAPES[name]
    torch.manual_seed(0)
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, KV_HEADS, length, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    size = 2 * k.numel() * k.element_size()
    problem, inputs = _problem.describe(q, k, v)
    candidates: dict[str, tuple[Callable[[], Any], float]] = {}

    def add(who: str, call: Callable[[], Any], laser: bool = True) -> None:
        try:
            candidates[who] = (call, worst(call(), q, k, v, laser))
        except Exception as failure:
            print(f"{name} {who}: {str(failure).splitlines()[0][:200]}")

    def softmax(kind: SDPBackend) -> Callable[[], Any]:
        def call() -> Any:
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call

    add("softmax cudnn", softmax(SDPBackend.CUDNN_ATTENTION), laser=False)
    add("softmax flash", softmax(SDPBackend.FLASH_ATTENTION), laser=False)
    cut = decode.tiles(problem, decode.device_of(q.device))
    add("laser decode", lambda: decode.launch(problem, inputs, None, cut, residual=False)[0])
    if not sweep:
        add("laser_attention", lambda: laser_attention(q, k, v))
        if importlib.util.find_spec("cupy"):
            add("laser_attention, CuPy", in_cupy(q, k, v))
        print(name, explain(q, k, v).chosen, cut)
    lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    for page in PAGES:
        blocks = batch * length // page
        table = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(batch, -1)
        paged = []
        for x in (k, v):
            cache = torch.empty(blocks, page, KV_HEADS, DIM, device="cuda", dtype=x.dtype)
            cache[table.flatten().long()] = x.transpose(1, 2).reshape(blocks, page, KV_HEADS, DIM)
            paged.append(cache)
        add(f"laser paged, {page}", lambda p=paged, t=table: laser_attention_paged(q, *p, t, lengths))
    if sweep:
        for config in SWEEP:
            if config[1] < length:
                tiles = decode.Tiles(*config)
                add(f"{config}", lambda t=tiles: decode.launch(problem, inputs, None, t, residual=False)[0])
    records = measure(name, candidates, size, copy)
    if not sweep:
        for who in (
            "softmax cudnn",
            "laser_attention",
            "laser_attention, CuPy",
            *(f"laser paged, {page}" for page in PAGES),
        ):
            if who in candidates:
                records.append({"shape": name, "who": f"{who}, eager", "us": eager_seconds(candidates[who][0]) * 1e6})
    return records


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="all tile sizes of a list, to choose from")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: all")
    parser.add_argument("--commit", default="", help="the commit, where there is no git")
    parser.add_argument("--json", type=Path, help="write the results")
    options = parser.parse_args()
    commit = options.commit
    if not commit:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    copy = copy_rate()
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "problem": f"one query, {HEADS}:{KV_HEADS} heads, D = {DIM}, bfloat16",
        "copy TB/s": copy / 1e12,
        "records": [],
    }
    print(result["device"], f"copy {copy / 1e12:.2f} TB/s", result["versions"])
    for name in options.shape or SHAPES:
        records = shape(name, options.sweep, copy)
        result["records"] += records
        shown = [r for r in records if not r["who"].startswith("(")]
        best = sorted((r for r in records if r["who"].startswith("(") and "us" in r), key=lambda r: r["us"])
        for r in shown + best[:12]:
            print("  ".join(f"{n} {x:.3f}" if isinstance(x, float) else str(x) for n, x in r.items()), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
