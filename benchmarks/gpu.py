"""Time of the Triton kernels beside cuDNN's softmax attention, on one GPU: ``python benchmarks/gpu.py --json FILE``.

Both run in turns in one process, forward and backward, in bfloat16. A figure is only written when the result that was
timed is right: one head of the output and of all gradients is compared with the formulas in float64. The GPU is kept
busy before each measurement, so that what the host needs for a launch is not in the figures; it is given beside them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from laser_torch import fused
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laser_core._problem import describe

SHAPES = [  # batch, heads, length, dim
    (4, 16, 4096, 128),
    (4, 32, 4096, 64),
    (1, 16, 16384, 128),
    (16, 16, 1024, 128),
]
ROWS = 2048  # queries of the head that is checked
OUTPUT_BOUND = 3 * 2.0**-8  # section 2.3 of the contract: u·(|o| + 3), at its least
GRADIENT_BOUND = 0.02  # of the Frobenius norm
BUSY = 3_000_000  # cycles

Run = Callable[[], Any]


def formulas(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """o and dq of one head ``(L, D)`` in float64, for the first ROWS queries."""
    q, k, v, do = (x.double() for x in (q[:ROWS], k, v, do[:ROWS]))
    s = q @ k.T / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf)
    p, x = s.softmax(-1), v.exp()
    o = (p @ x).log()
    ds = p * ((do * (-o).exp()) @ x.T - do.sum(-1, keepdim=True))
    return o, ds @ k / math.sqrt(q.shape[-1])


def milliseconds(run: Run) -> float:
    """Time of one run on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(BUSY)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_microseconds(run: Run) -> float:
    """Time that the host needs to launch one run."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken


def measure(shape: tuple[int, int, int, int], causal: bool, repeats: int) -> dict[str, Any]:
    """One row of the table: medians, their least and greatest, and TFLOP/s.

    Raises:
        RuntimeError: The result is not right.
    """
    batch, heads, length, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = torch.randn((4, *shape), generator=generator, device="cuda").bfloat16()
    problem, inputs = describe(q, k, v, is_causal=causal)
    forward = fused.forward(problem, inputs)
    gradients = fused.backward(problem, inputs, forward, do, None)
    o, dq = formulas(q[0, 0], k[0, 0], v[0, 0], do[0, 0], causal)
    error = float(((forward.out[0, 0, :ROWS] - o).abs() / (1 + o.abs() / 3)).max())
    gradient_error = float((gradients.query[0, 0, :ROWS] - dq).norm() / dq.norm())
    if not (error <= OUTPUT_BOUND and gradient_error <= GRADIENT_BOUND):
        raise RuntimeError(f"{shape}, causal {causal}: errors {error:.2g} of o, {gradient_error:.2g} of dq")

    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        softmax = scaled_dot_product_attention(*leaves, is_causal=causal)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    runs: dict[str, Run] = {
        "softmax cuDNN forward": cudnn,
        "LASER forward": lambda: fused.forward(problem, inputs),
        "softmax cuDNN backward": lambda: torch.autograd.grad(softmax, leaves, do, retain_graph=True),
        "LASER backward": lambda: fused.backward(problem, inputs, forward, do, None),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            taken = milliseconds(run)
            if turn >= 2:  # the first ones warm up
                times[name].append(taken)
    operations = 4 * batch * heads * length**2 * dim * (0.5 if causal else 1)
    row: dict[str, Any] = {"shape": shape, "causal": causal, "error": error, "gradient error": gradient_error}
    for name, taken in times.items():
        median = statistics.median(taken)
        factor = 2.5 if name.endswith("backward") else 1
        row[name] = {
            "ms": median,
            "range": [min(taken), max(taken)],
            "TFLOP/s": factor * operations / median / 1e9,
            "host us": host_microseconds(runs[name]),
        }
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
        "rows": [],
    }
    for shape in SHAPES:
        for causal in (True, False):
            row = measure(shape, causal, arguments.repeats)
            record["rows"].append(row)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n")
            figures = (f"{name} {x['ms']:.3f} ms" for name, x in row.items() if isinstance(x, dict))
            print(shape, "causal" if causal else "full", *figures, sep=" · ", flush=True)


if __name__ == "__main__":
    main()
