"""LASER attention in JAX beside cuDNN's softmax attention, in one process: ``python benchmarks/gpu_jax.py --help``.

The counterpart of ``gpu.py``, with records of the same form. What is timed is the public function under ``jit``: the
forward pass is that of ``jax.vjp``, which keeps what its pullback needs, and the backward pass is the pullback. All is
compiled before anything is timed, in processes of their own: half of that time is Python's. ``example`` is JAX's own
Pallas kernel of softmax attention, which has no causal backward pass.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_common import ACCURACY_SHAPE, RANGES, ROWS, SHAPES, UNIT, Case, Record, Seconds, main
from jax.experimental import serialize_executable
from jax.experimental.pallas.ops.gpu import attention_mgpu

from laser_core import explain, laser_attention

BUSY = 0.02  # seconds of calls that are launched together
CANDIDATES = ("laser", "example", "recipe", "softmax")
EXAMPLE_GROUPS = 2  # warpgroups of the example's backward kernels: the faster of 1 and 2

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


def example(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """Softmax attention by JAX's example kernel, in the same layout; the scale is in q. It takes float16 alone."""
    block = 128 if q.shape[-1] == 128 else 256
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=block, max_concurrent_steps=2, causal=causal, compute_wgs_bwd=EXAMPLE_GROUPS,
        block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
    )  # fmt: skip
    return attention_mgpu.attention(q, k, v, config)


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


def times(calls: dict[str, Callable[[], Any]], turns: int) -> tuple[Seconds, dict[str, float]]:
    """Seconds of each call, taken in turns, and the median that the host needs to launch one.

    Many are launched at a time, so that the device never waits.
    """
    taken: Seconds = {name: [] for name in calls}
    host: Seconds = {name: [] for name in calls}
    count: dict[str, int] = {}
    for turn in range(turns + 1):
        for name, call in calls.items():
            jax.block_until_ready(call())
            results, launched = [], [time.perf_counter()]
            for _ in range(count.get(name, 1)):
                results = [call()]
                launched.append(time.perf_counter())
            jax.block_until_ready(results)
            seconds = (time.perf_counter() - launched[0]) / count.get(name, 1)
            count.setdefault(name, max(3, min(50, round(BUSY / seconds))))
            if turn:
                taken[name].append(seconds)
                host[name].append(statistics.median(b - a for a, b in itertools.pairwise(launched)))
    return taken, {name: statistics.median(seconds) for name, seconds in host.items()}


def arguments(name: str, case: Case, sigma: float = 1.0) -> tuple[Array, ...]:
    """Query, key, value and cotangent as a candidate takes them."""
    ours = tuple(inputs(case.shape, case.dtype, sigma))
    if name == "laser":
        return ours
    q, *rest = map(swapped, ours)
    if name == "example":
        return tuple(x.astype("float16") for x in (q * case.shape[-1] ** -0.5, *rest))
    return q, *rest


class Compiled(NamedTuple):
    """The two passes of a candidate, as another process hands them over."""

    forward: tuple[Any, ...]
    backward: tuple[Any, ...] | None
    memory: dict[str, int]


def compiled(name: str, case: Case, backend: str | None) -> Compiled:
    """Compile both passes. What is kept between them is what is neither argument nor output."""
    runs: dict[str, Callable[..., Array]] = {
        "softmax": softmax,
        "recipe": recipe,
        "example": example,
        "laser": functools.partial(laser, backend=backend),
    }
    x = jax.eval_shape(lambda: arguments(name, case))
    tree: Any = None
    known: list[int | None] = []

    def forward(*arguments: Array) -> tuple[Array, list[Array]]:
        nonlocal tree, known
        out, pullback = jax.vjp(functools.partial(runs[name], causal=case.causal), *arguments)
        leaves, tree = jax.tree.flatten(pullback)
        sources = (*arguments, out)
        known = [next((i for i, y in enumerate(sources) if leaf is y), None) for leaf in leaves]
        return out, [leaf for leaf, i in zip(leaves, known, strict=True) if i is None]

    def backward(sources: tuple[Array, ...], kept: list[Array], do: Array) -> Any:
        rest = iter(kept)
        leaves = [next(rest) if i is None else sources[i] for i in known]
        return jax.tree.unflatten(tree, leaves)(do)

    lowered = jax.jit(forward).lower(*x[:3])
    first = lowered.compile()
    if case.shape == ACCURACY_SHAPE or (name == "example" and case.causal):
        return Compiled(serialize_executable.serialize(first), None, {})
    out, kept = lowered.out_info
    second = jax.jit(backward).lower((*x[:3], out), kept, x[3]).compile()
    memory = _memory(first.memory_analysis(), second.memory_analysis())
    return Compiled(serialize_executable.serialize(first), serialize_executable.serialize(second), memory)


def _memory(first: Any, second: Any) -> dict[str, int]:
    """Bytes beside inputs, by the compiler's account: held between the passes, and at the peak of both."""
    held = first.output_size_in_bytes
    later = held + second.temp_size_in_bytes + second.output_size_in_bytes
    return {"held": held, "peak": max(held + first.temp_size_in_bytes, later)}


@functools.cache
def processes() -> ProcessPoolExecutor:
    """Where all is compiled."""
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))


@functools.cache
def making(name: str, case: Case, backend: str | None) -> Future[Compiled]:
    """A candidate, compiled or in the making."""
    return processes().submit(compiled, name, case, backend)


class Passes:
    """The two passes of a candidate on its arrays."""

    def __init__(self, made: Compiled, x: tuple[Array, ...]) -> None:
        """Load them, and run the first."""
        self.x, self.memory = x, made.memory
        self.forward = serialize_executable.deserialize_and_load(*made.forward)
        self.out, self.kept = self.forward(*x[:3])
        self.backward = None if made.backward is None else serialize_executable.deserialize_and_load(*made.backward)

    def run_forward(self) -> Any:
        """The output, and what is kept."""
        return self.forward(*self.x[:3])

    def run_backward(self) -> Any:
        """The gradients."""
        assert self.backward is not None
        return self.backward((*self.x[:3], self.out), self.kept, self.x[3])


def measure(cases: list[Case], options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records of every candidate, forward and backward, case by case."""
    wanted = [(name, case) for name in CANDIDATES for case in cases]  # what takes longest first
    if not options.no_accuracy:
        wanted += [(name, Case(ACCURACY_SHAPE, True, dtype)) for dtype in UNIT for name in ("laser", "recipe")]
    wait([making(name, case, options.backend) for name, case in wanted])  # nothing else may run beside what is timed
    processes().shutdown()
    for case in cases:
        made = {name: making(name, case, options.backend) for name in reversed(CANDIDATES)}
        if made["example"].exception() is not None:  # what it takes is up to the version of JAX
            del made["example"]
        passes = {name: Passes(future.result(), arguments(name, case)) for name, future in made.items()}
        found = passes["laser"]
        error, dq_error = errors(list(found.x), case.causal, found.out, found.run_backward()[0])
        records = case.wrong(error, dq_error)
        if records is None:
            more: dict[str, Record] = {name: {"memory": one.memory} for name, one in passes.items() if one.backward}
            engine = explain(*found.x[:3], is_causal=case.causal, backend=options.backend).chosen
            more["laser"] |= {"error": error, "dq error": dq_error, "engine": engine}
            forward = {name: one.run_forward for name, one in passes.items()}
            backward = {name: one.run_backward for name, one in passes.items() if one.backward}
            records = []
            for what, calls in (("forward", forward), ("backward", backward)):
                records += case.compared(what, *times(calls, options.turns), more)
        yield records


def accuracy(dtype: str, options: argparse.Namespace) -> list[Record]:
    """Worst error over the bound for growing ranges of the values, LASER's and the recipe's."""
    case = Case(ACCURACY_SHAPE, True, dtype)
    records = []
    for name in ("laser", "recipe"):
        run = serialize_executable.deserialize_and_load(*making(name, case, options.backend).result().forward)
        for sigma in RANGES:
            out, _ = run(*arguments(name, case, sigma)[:3])
            out = out if name == "laser" else swapped(out)
            error, _ = errors(inputs(case.shape, dtype, sigma), True, out, None)
            lost = int(np.sum(~np.isfinite(np.asarray(out, np.float32))))
            records.append({"dtype": dtype, "sigma": sigma, "candidate": name, "error": error, "lost": lost})
    return records


def ceiling() -> float:
    """TFLOP/s of an 8192³ bfloat16 product of random matrices."""
    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds, _ = times({"product": lambda: product(a, b)}, 5)
    return 2 * 8192**3 / statistics.median(seconds["product"]) / 1e12


def about(options: argparse.Namespace) -> Record:
    """The device, and what the automatic choice takes there."""
    report = explain(*inputs(SHAPES[0], "bfloat16")[:3], is_causal=True, backend=options.backend)
    return {"device": jax.devices()[0].device_kind, "product": ceiling(), "chosen": report.chosen}


if __name__ == "__main__":
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the memory
    main(str(__doc__), about, measure, accuracy, backend={"help": "which to measure (default: the automatic choice)"})
