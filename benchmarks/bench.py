"""Time and memory of LASER attention beside softmax attention, in one process: ``python benchmarks/bench.py --help``.

Each figure is a ratio to a peer that was measured in the same run, in turns with it, and a figure is only written when
the result that was timed is right: a sample of rows of the output and of dq is compared with the formulas in float64.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from laser_core import explain, laser_attention, laser_attention_vjp

BATCH, HEADS, DIM = 1, 8, 64
ROWS = 16  # rows of each head that are compared with float64
BOUND = 1e-5  # times (1 + |o|), section 2.3 of the contract, without what the scores cost

Run = Callable[[], Any]


def problem(length: int) -> dict[str, np.ndarray]:
    """Query, key, value and the cotangent of the output."""
    rng = np.random.default_rng(0)
    shape = (BATCH, HEADS, length, DIM)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name in ("query", "key", "value", "d_out")}


# ------------------------------------------------------------------------------------ the candidates, by framework


def numpy_candidates(arrays: dict[str, np.ndarray], causal: bool) -> dict[str, tuple[Run, Run]]:
    """Plain NumPy softmax attention, as a person would write it, and laser_attention: (forward, forward+backward)."""
    q, k, v, do = arrays.values()
    scale = np.float32(DIM**-0.5)
    mask = np.tril(np.ones((q.shape[-2], k.shape[-2]), bool)) if causal else None

    def probabilities() -> np.ndarray:
        s = q @ k.swapaxes(-1, -2) * scale
        if mask is not None:
            s = np.where(mask, s, -np.inf)
        s = np.exp(s - s.max(-1, keepdims=True))
        return s / s.sum(-1, keepdims=True)

    def softmax() -> np.ndarray:
        return probabilities() @ v

    def softmax_both() -> tuple[np.ndarray, ...]:
        p = probabilities()
        o = p @ v
        dv = p.swapaxes(-1, -2) @ do
        ds = p * (do @ v.swapaxes(-1, -2) - (do * o).sum(-1, keepdims=True)) * scale
        return o, ds @ k, ds.swapaxes(-1, -2) @ q, dv

    def laser() -> np.ndarray:
        return laser_attention(q, k, v, is_causal=causal)

    def laser_both() -> tuple[np.ndarray, ...]:
        out, pullback = laser_attention_vjp(q, k, v, is_causal=causal)
        return (out, *pullback(do)[:3])

    return {"softmax": (softmax, softmax_both), "laser": (laser, laser_both)}


def torch_candidates(arrays: dict[str, np.ndarray], causal: bool) -> dict[str, tuple[Run, Run]]:
    """``scaled_dot_product_attention``, the unguarded recipe on it, and laser_attention."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    q, k, v, do = (torch.from_numpy(x) for x in arrays.values())
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    def recipe(q: Any, k: Any, v: Any) -> Any:
        top = v.amax(-2, keepdim=True)
        return attention(q, k, (v - top).exp(), is_causal=causal).log() + top

    def pair(function: Callable[..., Any]) -> tuple[Run, Run]:
        def forward() -> Any:
            with torch.no_grad():
                return function(q, k, v)

        def both() -> tuple[Any, ...]:
            out = function(*inputs)
            return (out.detach(), *torch.autograd.grad(out, inputs, do))

        return forward, both

    return {
        "softmax": pair(lambda q, k, v: attention(q, k, v, is_causal=causal)),
        "recipe": pair(recipe),
        "laser": pair(lambda q, k, v: laser_attention(q, k, v, is_causal=causal)),
    }


def jax_candidates(arrays: dict[str, np.ndarray], causal: bool) -> dict[str, tuple[Run, Run]]:
    """``jax.nn.dot_product_attention`` and laser_attention, jitted."""
    import jax

    q, k, v, do = (jax.numpy.asarray(x) for x in arrays.values())
    swap = jax.numpy.swapaxes
    transposed = [jax.block_until_ready(swap(x, 1, 2)) for x in (q, k, v, do)]

    def pair(function: Callable[..., Any], q: Any, k: Any, v: Any, do: Any) -> tuple[Run, Run]:
        def with_gradients(q: Any, k: Any, v: Any, do: Any) -> tuple[Any, ...]:
            out, pullback = jax.vjp(function, q, k, v)
            return (out, *pullback(do))

        forward, both = jax.jit(function), jax.jit(with_gradients)
        run = (
            lambda: jax.block_until_ready(forward(q, k, v)),
            lambda: jax.block_until_ready(both(q, k, v, do)),
        )
        for one, compiled in zip(run, (forward.lower(q, k, v), both.lower(q, k, v, do)), strict=True):
            one.temporary = compiled.compile().memory_analysis().temp_size_in_bytes  # type: ignore[attr-defined]
        return run

    def softmax(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def laser(q: Any, k: Any, v: Any) -> Any:
        return laser_attention(q, k, v, is_causal=causal)

    return {"softmax": pair(softmax, *transposed), "laser": pair(laser, q, k, v, do)}


FRAMEWORKS = {"numpy": numpy_candidates, "torch": torch_candidates, "jax": jax_candidates}


# ---------------------------------------------------------------------------------------------- right, then timed


def worst(arrays: dict[str, np.ndarray], causal: bool, result: tuple[Any, ...]) -> tuple[float, float]:
    """The worst error of sampled rows over the bound, and the relative error of dq there, against float64."""
    q, k, v, do = (x[0].astype(np.float64) for x in arrays.values())
    out, dq = (np.asarray(x)[0] for x in result[:2])
    rows = np.random.default_rng(1).choice(q.shape[1], ROWS, replace=False)
    s = q[:, rows] @ k.swapaxes(-1, -2) * DIM**-0.5
    if causal:
        s = np.where(np.arange(k.shape[1]) <= rows[:, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    x = np.exp(v)
    o = np.log(p @ x)
    g = do[:, rows] * np.exp(-o)
    ds = p * (g @ x.swapaxes(-1, -2) - do[:, rows].sum(-1, keepdims=True))
    want = ds @ k * DIM**-0.5
    error = np.max(np.abs(out[:, rows] - o) / (BOUND * (1 + np.abs(o))))
    return float(error), float(np.linalg.norm(dq[:, rows] - want) / np.linalg.norm(want))


def turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(framework: str, length: int, causal: bool, rounds: int) -> list[dict[str, Any]]:
    """One record for the forward pass and one for both, of every candidate at one shape."""
    arrays = problem(length)
    candidates = FRAMEWORKS[framework](arrays, causal)
    error, dq_error = worst(arrays, causal, candidates["laser"][1]())
    if not (error <= 1 and dq_error <= 1e-4):
        raise SystemExit(f"{framework}, L = {length}: wrong, not timed: error/bound {error}, dq {dq_error}")
    records = []
    for which, what in enumerate(("forward", "forward and backward")):
        runs = {name: pair[which] for name, pair in candidates.items()}
        if not (framework == "numpy" and rounds == 1):  # nothing to compile, and minutes to wait
            turns(runs, 1)
        seconds = turns(runs, rounds)
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds["softmax"], strict=True)]
            records.append(
                {
                    "framework": framework,
                    "length": length,
                    "causal": causal,
                    "pass": what,
                    "candidate": name,
                    "rounds": rounds,
                    "seconds": statistics.median(times),
                    "ratio": statistics.median(ratios),
                    "memory": memory(framework, runs[name]) if name != "recipe" else None,
                    "error_over_bound": error if name == "laser" else None,
                    "dq_error": dq_error if name == "laser" else None,
                }
            )
            print(json.dumps(records[-1]), flush=True)
    return records


def memory(framework: str, run: Run) -> int | None:
    """Bytes in use at the peak beside inputs and results; None where the framework does not say."""
    if framework == "jax":
        return int(run.temporary)  # type: ignore[attr-defined]
    if framework == "numpy":
        tracemalloc.start()
        result = run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak - sum(x.nbytes for x in (result if isinstance(result, tuple) else (result,)))
    return None


def import_cost() -> dict[str, float]:
    """Median seconds of ``import laser_core`` beside ``import numpy``, each in a process of its own."""
    cost = {}
    for name, code in (("numpy", "import numpy"), ("laser_core", "import numpy, laser_core")):
        script = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
        runs = [float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(7)]
        cost[name] = statistics.median(runs)
    return cost


def environment() -> dict[str, Any]:
    """Date, commit, versions and machine."""
    commit = os.environ.get("LASER_COMMIT")  # where there is no working tree to ask
    if not commit:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changes = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True).strip()
        commit += " with changes" if changes else ""
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().split("\n") if "model name" in x), ""
    )
    versions = {}
    for name in ("laser-attention", "numpy", "array-api-compat", "torch", "triton", "jax"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "python": platform.python_version(),
        "versions": versions,
        "device": f"{cpu}, {os.cpu_count()} cores",
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frameworks", default="numpy,torch,jax", help="comma-separated (default: %(default)s)")
    parser.add_argument("--lengths", default="512,2048,8192", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each, in turns (default: %(default)s)")
    parser.add_argument("--long-rounds", type=int, default=1, help="the same from L = 8192 on (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file to write (default: none)")
    options = parser.parse_args()
    result = environment() | {"shape": [BATCH, HEADS, "L", DIM], "dtype": "float32", "import": import_cost()}
    result["records"], result["backends"] = [], {}
    for framework in options.frameworks.split(","):
        for length in map(int, options.lengths.split(",")):
            rounds = options.rounds if length < 8192 else options.long_rounds
            for causal in (False, True):
                result["records"] += measure(framework, length, causal, rounds)
        result["backends"][framework] = chosen(framework)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def chosen(framework: str) -> str | None:
    """The backend that the automatic choice takes for these shapes."""
    x: Any = problem(2048)["query"]
    if framework == "torch":
        import torch

        x = torch.from_numpy(x)
    elif framework == "jax":
        import jax

        x = jax.numpy.asarray(x)
    return explain(x, x, x).chosen


if __name__ == "__main__":
    main()
