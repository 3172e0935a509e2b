"""Few queries against a long cache: which problems, how the keys are split, and the two launches."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from laser_core import Forward, Inputs, Problem

from .build import SHARED, WARPS, Build
from .host import NOTHING, Machine, call

ROWS = 16  # queries of all heads of a group
SHORTEST = 256  # keys of a run, if there are more
RESIDENT = 8  # warps that share a multiprocessor


def fits(problem: Problem) -> bool:
    """Whether the queries of a key/value head are a tile, and the values can be exponentiated on the fly."""
    beta = problem.beta
    return (
        problem.group * problem.query_length <= ROWS
        and 0 not in problem.score_shape
        and problem.dtype in ("float16", "bfloat16")
        and beta is not None
        and (beta == 0 or abs(beta) >= 1)
        and problem.value_dim % 8 == 0
        and Build.of(problem).shared("decode") <= SHARED
    )


@functools.cache
def splits(heads: int, keys: int, slots: int) -> int:
    """The fewest runs of keys that keep all slots busy to the end, or the best there is."""
    most = max(1, -(-keys // SHORTEST))

    def busy(n: int) -> float:
        return heads * n / (-(-heads * n // slots) * slots)

    return next((n for n in range(1, most + 1) if busy(n) >= 0.98), max(range(1, most + 1), key=busy))


def forward(machine: Machine, problem: Problem, inputs: Inputs) -> Forward:
    """The output, merged from runs of keys."""
    xp = machine.xp
    x = call(machine, problem, inputs)
    heads = x.key_value_heads
    count = splits(heads, problem.key_length, machine.processors * RESIDENT)
    run = -(-problem.key_length // (16 * count)) * 16
    count = -(-problem.key_length // run)
    rows = math.prod(problem.lse_shape)
    w = x.empty(rows, count, problem.value_dim, dtype=xp.float32)
    l = x.empty(rows, count, dtype=xp.float32)
    x.run("decode", -(-heads * count // WARPS), x.q, x.k, x.v, w, l, *map(np.int32, (heads, count, run)))
    out = x.empty(*problem.out_shape)
    residual: Any = x.empty(*problem.out_shape, dtype=xp.float32) if problem.gradient else NOTHING
    lse = x.empty(*problem.lse_shape, dtype=xp.float32)
    x.run("decode_merge", rows, w, l, out, residual, lse, np.int32(count))
    return Forward(out, lse, residual if problem.gradient else None)
