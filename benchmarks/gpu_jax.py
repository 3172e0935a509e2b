"""LASER attention in JAX beside cuDNN's softmax attention, in one process: ``python benchmarks/gpu_jax.py --help``.

The counterpart of ``gpu.py``, with records of the same form. What is timed is the public function under ``jit``: the
forward pass is that of ``jax.vjp``, which keeps what its pullback needs, and the backward pass is the pullback.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench import environment

from laser_core import explain, laser_attention

SHAPES = ((4, 16, 4096, 128), (4, 32, 4096, 64), (1, 16, 16384, 128), (16, 16, 1024, 128))
CASES = [(shape, causal) for shape in SHAPES for causal in (True, False)]
RANGES = (1, 3, 5, 10, 20, 50, 100, 400)  # standard deviations of the values
BUSY = 0.02  # seconds of calls that are launched together
ROWS = 8  # queries of a head that are compared with float64
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}

Array = jax.Array
Attention = Callable[[Array, Array, Array], Array]


def swapped(x: Array) -> Array:
    """Heads and length the other way round: JAX's own function has them so."""
    return jnp.swapaxes(x, 1, 2)


def softmax(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """Softmax attention by cuDNN, in its own layout."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def recipe(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """The published recipe on cuDNN, unguarded, in its layout."""
    top = jax.lax.stop_gradient(jnp.max(v, axis=1, keepdims=True))
    return jnp.log(softmax(q, k, jnp.exp(v - top), causal)) + top


def laser(q: Array, k: Array, v: Array, causal: bool, backend: str | None = None) -> Array:
    """LASER attention by what the automatic choice takes."""
    return laser_attention(q, k, v, is_causal=causal, backend=backend)


def inputs(shape: tuple[int, ...], dtype: str, sigma: float = 1.0) -> list[Array]:
    """Query, key, value and the cotangent of the output, ``(B, H, L, D)``."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (jax.random.normal(key, shape, jnp.float32) for key in keys)
    return [x.astype(dtype) for x in (q, k, v * sigma, do)]


def errors(x: list[Array], causal: bool, out: Array, dq: Array | None) -> tuple[float, float | None]:
    """The worst error of sampled rows over the bound of docs/numerics.md, and the relative error of dq there."""
    batch, heads, length, width = x[0].shape
    rows = np.random.default_rng(1).permutation(length)[:ROWS]
    worst, wrong, size = 0.0, 0.0, 0.0
    scale = width**-0.5
    for b, h in {(0, 0), (batch - 1, heads - 1)}:
        wide = (np.asarray(a[b, h].astype(jnp.float32), np.float64) for a in (*x, out, *([] if dq is None else [dq])))
        q, k, v, do, got, *got_dq = wide
        s = scale * q[rows] @ k.T
        if causal:
            s = np.where(np.arange(length) > rows[:, None], -np.inf, s)
        log_p = s - s.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        t = log_p[..., None] + v
        top = t.max(1)
        o = top + np.log(np.exp(t - top[:, None]).sum(1))
        slack = 2.0**-20 * scale * float(np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max())
        bound = UNIT[str(x[0].dtype)] * (np.abs(o) + 3) + slack
        worst = max(worst, float(np.nan_to_num(np.abs(got[rows] - o) / bound, nan=math.inf).max()))
        for found in got_dq:
            ds = np.einsum("ie,ije->ij", do[rows], np.exp(t - o[:, None]) - np.exp(log_p)[..., None])
            want = scale * ds @ k
            wrong += float(np.square(found[rows] - want).sum())
            size += float(np.square(want).sum())
    return worst, None if dq is None else math.sqrt(wrong / size)


def times(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns; many are launched at a time, so that the device never waits."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    count: dict[str, int] = {}
    for turn in range(turns + 1):
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(count.get(name, 1))][-1])
            seconds = (time.perf_counter() - start) / count.get(name, 1)
            count.setdefault(name, max(3, min(50, round(BUSY / seconds))))
            if turn:
                taken[name].append(seconds)
    return taken


class Passes:
    """The two passes of a function, compiled. What is kept between them is what is neither argument nor output."""

    def __init__(self, run: Attention, x: tuple[Array, ...]) -> None:
        """Compile for arguments like ``x``: query, key, value and the cotangent."""
        self.x = x
        self.tree: Any = None
        self.known: list[int | None] = []

        def forward(*arguments: Array) -> tuple[Array, list[Array]]:
            out, pullback = jax.vjp(run, *arguments)
            leaves, self.tree = jax.tree.flatten(pullback)
            sources = (*arguments, out)
            self.known = [next((i for i, y in enumerate(sources) if leaf is y), None) for leaf in leaves]
            return out, [leaf for leaf, i in zip(leaves, self.known, strict=True) if i is None]

        def backward(sources: tuple[Array, ...], kept: list[Array], do: Array) -> Any:
            rest = iter(kept)
            leaves = [next(rest) if i is None else sources[i] for i in self.known]
            return jax.tree.unflatten(self.tree, leaves)(do)

        self.forward = jax.jit(forward).lower(*x[:3]).compile()
        self.out, self.kept = self.forward(*x[:3])
        self.backward = jax.jit(backward).lower((*x[:3], self.out), self.kept, x[3]).compile()

    def run_forward(self) -> Any:
        """The output, and what is kept."""
        return self.forward(*self.x[:3])

    def run_backward(self) -> Any:
        """The gradients."""
        return self.backward((*self.x[:3], self.out), self.kept, self.x[3])

    def memory(self) -> dict[str, int]:
        """Bytes beside inputs, by the compiler's account: held between the passes, and at the peak of both."""
        first, second = self.forward.memory_analysis(), self.backward.memory_analysis()
        held = first.output_size_in_bytes
        later = held + second.temp_size_in_bytes + second.output_size_in_bytes
        return {"held": held, "peak": max(held + first.temp_size_in_bytes, later)}


def measure(shape: tuple[int, ...], causal: bool, dtype: str, turns: int, backend: str | None) -> list[dict[str, Any]]:
    """Records of every candidate, forward and backward, at one shape."""
    ours = tuple(inputs(shape, dtype))
    theirs = tuple(map(swapped, ours))
    passes = {
        "softmax": Passes(functools.partial(softmax, causal=causal), theirs),
        "recipe": Passes(functools.partial(recipe, causal=causal), theirs),
        "laser": Passes(functools.partial(laser, causal=causal, backend=backend), ours),
    }
    found = passes["laser"]
    error, dq_error = errors(list(ours), causal, found.out, found.run_backward()[0])
    if not (error <= 1 and dq_error is not None and dq_error <= 0.02):
        return [{"shape": shape, "causal": causal, "error": error, "dq error": dq_error, "not timed": "wrong"}]
    forward = {name: one.run_forward for name, one in passes.items()}
    backward = {name: one.run_backward for name, one in passes.items()}
    work = 4 * math.prod(shape) * shape[2] / (2 if causal else 1)
    records = []
    for what, calls, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        seconds = times(calls, turns)
        for name, taken in seconds.items():
            records.append(
                {
                    "shape": shape,
                    "causal": causal,
                    "dtype": dtype,
                    "pass": what,
                    "candidate": name,
                    "ms": statistics.median(taken) * 1e3,
                    "TFLOP/s": factor * work / statistics.median(taken) / 1e12,
                    "speed": statistics.median(a / b for a, b in zip(seconds["softmax"], taken, strict=True)),
                    "error": error if name == "laser" else None,
                    "dq error": dq_error if name == "laser" else None,
                    "memory": passes[name].memory(),
                }
            )
    return records


def accuracy(dtype: str, backend: str | None) -> list[dict[str, Any]]:
    """Worst error over the bound for growing ranges of the values, LASER's and the recipe's."""
    records = []
    for sigma in RANGES:
        x = inputs((2, 4, 1024, 128), dtype, sigma)
        outs = {
            "laser": jax.jit(functools.partial(laser, causal=True, backend=backend))(*x[:3]),
            "recipe": swapped(jax.jit(functools.partial(recipe, causal=True))(*map(swapped, x[:3]))),
        }
        for name, out in outs.items():
            error, _ = errors(x, True, out, None)
            lost = int(jnp.sum(~jnp.isfinite(out)))
            records.append({"dtype": dtype, "sigma": sigma, "candidate": name, "error": error, "lost": lost})
    return records


def ceiling() -> float:
    """TFLOP/s of an 8192³ bfloat16 product of random matrices."""
    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    return 2 * 8192**3 / statistics.median(times({"product": lambda: product(a, b)}, 5)["product"]) / 1e12


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=7, help="timings of each, in turns (default: %(default)s)")
    parser.add_argument("--backend", help="which to measure (default: what the automatic choice takes)")
    parser.add_argument("--cases", type=int, nargs="*", choices=range(len(CASES)), default=range(len(CASES)),
        help="which shapes, causal and full in turn (default: all)")  # fmt: skip
    parser.add_argument("--no-accuracy", action="store_true", help="leave out the table of growing ranges")
    parser.add_argument("--out", type=Path, help="result file to write, after every shape (default: none)")
    options = parser.parse_args()
    result = environment() | {"device": jax.devices()[0].device_kind, "product": ceiling()}
    result["records"], result["accuracy"] = [], []
    result["chosen"] = options.backend or explain(*inputs(SHAPES[0], "bfloat16")[:3], is_causal=True).chosen

    def keep(kind: str, records: list[dict[str, Any]]) -> None:
        result[kind] += records
        for record in records:
            print(json.dumps(record), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    for case in options.cases:
        keep("records", measure(*CASES[case], "bfloat16", options.turns, options.backend))
    for dtype in () if options.no_accuracy else ("bfloat16", "float16"):
        keep("accuracy", accuracy(dtype, options.backend))


if __name__ == "__main__":
    main()
