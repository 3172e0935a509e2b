"""Measure every engine on this GPU and write the table that the automatic choice reads.

    python -m laser_jax.tune            # a table of one's own, which is used from then on
    python -m laser_jax.tune --out FILE # a file, to be shipped or looked at

A result is compared with float64 before it is timed, and a wrong one is not timed. Nothing is tuned at any other time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

from laser_core import Unsupported, _tables, laser_attention

from . import engines, served
from .engines import Pass
from .tiles import Array

WIDTHS = (64, 128)
LENGTHS = (1024, 4096, 16384)
ELEMENTS = 2**25  # of each array: B·H·L·D
ROWS = 8  # queries that are compared with float64
TOGETHER = 0.02  # seconds of calls that are launched together, so that the device never waits
LONG = 0.1


class Trial(NamedTuple):
    """A pass of a problem by an engine."""

    engine: str
    which: Pass
    causal: bool
    shape: tuple[int, int, int, int]  # of query, key, value and the cotangent of the output: (1, H, L, D)

    @property
    def row(self) -> dict[str, Any]:
        """As the table has it."""
        _, _, length, width = self.shape
        where = {"pass": self.which, "width": width, "length": length, "causal": self.causal}
        return where | {"engine": self.engine, "tile": None}

    @property
    def x(self) -> tuple[Array, ...]:
        """The arrays."""
        return _kept(self.shape)

    def compiled(self) -> tuple[Any, ...]:
        """The pass as a function of the arrays, to the output, or the output and dq, dk, dv: for another process."""

        def attend(q: Array, k: Array, v: Array) -> Array:
            out: Any = laser_attention(q, k, v, is_causal=self.causal, backend=self.engine)
            return out  # type: ignore[no-any-return]

        def run(q: Array, k: Array, v: Array, do: Array) -> tuple[Array, ...]:
            if self.which == "forward":
                return (attend(q, k, v),)
            out, pullback = jax.vjp(attend, q, k, v)
            return out, *pullback(do)

        like = jax.eval_shape(lambda: _arrays(self.shape))
        found: tuple[Any, ...] = serialize_executable.serialize(jax.jit(run).lower(*like).compile())
        return found

    def wrong(self, found: tuple[Array, ...]) -> str | None:
        """What is wrong with the output, or dq; None where nothing is."""
        length, width = self.shape[2:]
        rows = np.random.default_rng(0).permutation(length)[:ROWS]
        q, k, v, do, *got = (np.asarray(x[0, -1].astype(jnp.float32), np.float64) for x in (*self.x, *found[:2]))
        s = width**-0.5 * q[rows] @ k.T
        if self.causal:
            s = np.where(np.arange(length) > rows[:, None], -np.inf, s)
        log_p = s - np.log(np.exp(s).sum(-1, keepdims=True))
        t = log_p[..., None] + v
        o = np.log(np.exp(t).sum(1))
        error = float(np.max(np.abs(got[0][rows] - o) / (2.0**-8 * (np.abs(o) + 3))))
        if not error <= 1:
            return f"error {error:.2g} of the bound"
        if len(got) > 1:
            ds = np.einsum("ie,ije->ij", do[rows], np.exp(t - o[:, None]) - np.exp(log_p)[..., None])
            dq = width**-0.5 * ds @ k
            error = float(np.linalg.norm(got[1][rows] - dq) / np.linalg.norm(dq))
            if not error <= 0.02:
                return f"relative error {error:.2g} of dq"
        return None


def _arrays(shape: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


_kept = functools.lru_cache(1)(_arrays)  # trials of a shape follow each other


def milliseconds(call: Callable[[], Any], turns: int) -> float:
    """The median over turns, many calls being launched at a time; of a long call, one turn tells enough."""
    taken: list[float] = []
    count = 1
    wait: Callable[[Any], Any] = jax.block_until_ready
    wait(call())
    while len(taken) <= turns:
        start = time.perf_counter()
        for _ in range(count):
            results = call()
        wait(results)
        taken.append((time.perf_counter() - start) / count)
        if taken[0] > LONG:
            return taken[0] * 1e3
        count = max(1, min(50, round(TOGETHER / taken[0])))
    return statistics.median(taken[1:]) * 1e3


def trials(widths: tuple[int, ...], lengths: tuple[int, ...]) -> Iterator[Trial]:
    """Every engine at every problem."""
    for width in widths:
        for length in lengths:
            shape = (1, max(1, ELEMENTS // (length * width)), length, width)
            for causal in (True, False):
                for which, names in engines.ENGINES.items():
                    yield from (Trial(engine, which, causal, shape) for engine in names)


def measure(widths: tuple[int, ...], lengths: tuple[int, ...], turns: int, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of a table: every engine at every problem, or why it was not timed; all are compiled first."""
    found = list(trials(widths, lengths))
    apart = multiprocessing.get_context("spawn")  # threads would wait for each other: half of the time is Python's
    with ProcessPoolExecutor(min(len(found), jobs), apart) as pool:
        longest_first = sorted(found, key=lambda trial: trial.which, reverse=True)
        made = {trial: pool.submit(trial.compiled) for trial in longest_first}
    for trial in found:
        yield trial.row | _timed(trial, made[trial].result, turns)


def _timed(trial: Trial, compiled: Callable[[], tuple[Any, ...]], turns: int) -> dict[str, Any]:
    try:
        run = serialize_executable.deserialize_and_load(*compiled())
        reason = trial.wrong(run(*trial.x))
        return {"not timed": reason} if reason else {"ms": milliseconds(lambda: run(*trial.x), turns)}
    except Unsupported as refused:
        return {"not timed": str(refused)}
    except Exception as error:  # what does not fit this device
        return {"not timed": f"{type(error).__name__}: {error}"[:200]}


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m laser_jax.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="the table to write (default: where the automatic choice looks)")
    parser.add_argument("--turns", type=int, default=5, help="timings of each (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, choices=_tables.WIDTHS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: %(default)s)"
    )
    options = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes share the memory
    if jax.default_backend() != "gpu":
        print("laser_jax.tune: needs a GPU that JAX can use", file=sys.stderr)
        return 2
    with contextlib.suppress(ImportError):  # it tells XLA where the library is that Mosaic kernels are linked with
        importlib.import_module("jax.experimental.mosaic.gpu")
    name = str(served.gpu().device_kind)
    out = options.out or _tables.own("laser_jax", name)
    rows = measure(tuple(options.widths), tuple(options.lengths), options.turns, options.jobs)
    _tables.write(out, name, served.capability() or (), ("jax", "jaxlib", "nvidia-cudnn-cu13"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
