"""What the host does: operands as the kernels take them, and the launches, for any machine that runs the kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from laser_core import Forward, Gradients, Inputs, Problem
from laser_core._array import Array
from laser_core._gradient import no_gradients

THREADS = 128
BLOCK = 64  # rows of a tile that a block of the backward pass owns
INNER = 32  # rows of the tiles that the backward kernels walk over
WORKERS = 64  # blocks for each head of the exact path
CHUNK = 128  # keys of a block of the value pass
FAR = 2**30  # a band edge that is beyond every position
SOURCES = ("common", "values", "forward", "forward_exact", "backward", "backward_exact")
KERNELS = (
    "value_range",
    "value_decide",
    "value_exp",
    "forward",
    "forward_exact",
    "row_terms",
    "row_scales",
    "row_weights",
    "key_marks",
    "backward_keys",
    "backward_queries",
    "backward_queries_exact",
    "backward_keys_exact",
)


@dataclasses.dataclass(frozen=True)
class Build:
    """What is compiled in.

    Attributes:
        half: float16; otherwise bfloat16.
        head_dim, value_dim: D and E rounded up to one of ``DIMS``.
        cap: A soft cap of the scores.
        strips: Of the forward pass: a warp owns 16 queries times this.
        keys: Of the forward pass: keys of a tile.
        resident: Of the forward pass: blocks that share a multiprocessor, by registers.

    The tile sizes are the fastest that were tried on an H100 at D = E = 128.
    """

    half: bool
    head_dim: int
    value_dim: int
    cap: bool = False
    strips: int = 1
    keys: int = 64
    resident: int = 3

    DIMS: ClassVar = (32, 64, 128)

    def __post_init__(self) -> None:
        """Refuse dims that are not tile sizes."""
        for name in ("head_dim", "value_dim"):
            if getattr(self, name) not in self.DIMS:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: {self.DIMS}")
        for name, allowed in (("strips", (1, 2)), ("keys", (32, 64)), ("resident", (1, 2, 3))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: {allowed}")

    @classmethod
    def of(cls, problem: Problem) -> Build:
        """The build that runs a problem."""
        d, e = (next(n for n in cls.DIMS if n >= size) for size in (problem.head_dim, problem.value_dim))
        return cls(problem.dtype == "float16", d, e, problem.logits_soft_cap is not None)

    @property
    def definitions(self) -> tuple[str, ...]:
        """Compiler options."""
        values = {"FLOAT16": int(self.half), "DP": self.head_dim, "EP": self.value_dim, "CAP": int(self.cap)}
        values |= {"STRIPS": self.strips, "KEYS": self.keys, "FORWARD_BLOCKS": self.resident}
        return tuple(f"-D{name}={value}" for name, value in values.items())

    @property
    def queries(self) -> int:
        """Queries of a block of the forward pass."""
        return 64 * self.strips

    def shared(self, kernel: str) -> int:
        """Bytes of shared memory that a block of a kernel takes."""
        d, e = self.head_dim, self.value_dim
        both = 2 * (BLOCK * (d + 8 + e + 8) + 2 * INNER * (d + 8 + e + 8 + 4))
        return {
            "value_range": 8 * THREADS,
            "forward": 2 * (self.queries * (d + 8) + self.keys * (d + 8 + e + 8)),
            "forward_exact": 4 * (d + 2 * THREADS),
            "row_scales": 4 * THREADS,
            "backward_keys": both,
            "backward_queries": both,
            "backward_queries_exact": 4 * (d + THREADS),
            "backward_keys_exact": 4 * (d + 2 * THREADS),
        }.get(kernel, 0)


@functools.cache
def source(*, hardware: str = "hardware.cu") -> str:
    """The source of all kernels, in one piece."""
    folder = Path(__file__).parent
    names = (hardware, *(f"{name}.cu" for name in SOURCES))
    return "\n".join(f'#line 1 "{name}"\n' + (folder / name).read_text(encoding="utf-8") for name in names)


class Machine(Protocol):
    """What runs the kernels."""

    xp: Any

    def launch(self, build: Build, kernel: str, grid: int, arguments: Sequence[Any]) -> None:
        """Run ``grid`` blocks of a kernel; arguments are arrays and NumPy scalars."""

    def aligned(self, x: Array) -> bool:
        """Whether the memory of ``x`` begins at a multiple of 16 bytes."""


_NOTHING = np.uint64(0)  # a null pointer


class Call(NamedTuple):
    """A call as the kernels take it: batch folded into the heads, rows adjacent."""

    machine: Machine
    problem: Problem
    build: Build
    q: Array  # (B·Hq, Lq, D), D rounded up to a multiple of 8
    k: Array  # (B·Hkv, Lk, D)
    v: Array  # (B·Hkv, Lk, E)
    common: tuple[Any, ...]  # the arguments that all kernels begin with

    @property
    def heads(self) -> int:
        """B·Hq."""
        return math.prod(self.problem.batch) * self.problem.query_heads

    @property
    def key_value_heads(self) -> int:
        """B·Hkv."""
        return self.heads // self.problem.group

    def run(self, kernel: str, grid: int, *arguments: Any) -> None:
        """Launch a kernel."""
        self.machine.launch(self.build, kernel, grid, (*self.common, *arguments))

    def empty(self, *shape: int, dtype: Any = None) -> Array:
        """Uninitialised memory, of the dtype of the query unless another is named."""
        return self.machine.xp.empty(shape, dtype=self.q.dtype if dtype is None else dtype)


def call(machine: Machine, problem: Problem, inputs: Inputs) -> Call:
    """Operands in the layout of the kernels; copied only where they are not in it."""
    q, k = (matrix(machine, x, problem.head_dim, pad=True) for x in (inputs.query, inputs.key))
    v = matrix(machine, inputs.value, problem.value_dim)
    low, high = problem.band
    mask, strides = _mask(machine, problem, inputs.attn_mask)
    common = (
        *map(
            np.int32,
            (
                problem.query_heads,
                problem.group,
                problem.query_length,
                problem.key_length,
                q.shape[-1],
                problem.value_dim,
                -FAR if low is None else max(-FAR, min(low, FAR)),
                FAR if high is None else max(-FAR, min(high, FAR)),
            ),
        ),
        *map(np.float32, (problem.scale, problem.logits_soft_cap or 0.0, problem.beta)),
        _lengths(machine, problem, inputs.query_seq_lengths, problem.query_length),
        _lengths(machine, problem, inputs.key_value_seq_lengths, problem.key_length),
        mask,
        *map(np.int64, strides),
    )
    return Call(machine, problem, Build.of(problem), q, k, v, common)


def matrix(machine: Machine, x: Array, width: int, pad: bool = False) -> Array:
    """``x (..., H, L, width)`` with one leading axis and adjacent rows; ``pad``: of a multiple of 8 columns."""
    xp = machine.xp
    x = x.reshape((math.prod(x.shape[:-2]), *x.shape[-2:]))
    if pad and width % 8:
        padded = xp.zeros((*x.shape[:-1], -(-width // 8) * 8), dtype=x.dtype)
        padded[..., :width] = x
        return padded
    x = xp.ascontiguousarray(x)
    return x if machine.aligned(x) else x.copy()


def _lengths(machine: Machine, problem: Problem, lengths: Array | None, limit: int) -> Any:
    if lengths is None:
        return _NOTHING
    xp = machine.xp
    clipped = xp.clip(lengths.astype(xp.int64), 0, limit).astype(xp.int32)
    return xp.ascontiguousarray(xp.broadcast_to(clipped, problem.batch)).reshape(-1)


def _mask(machine: Machine, problem: Problem, mask: Array | None) -> tuple[Any, tuple[int, ...]]:
    """The mask as bytes ``(B or 1, Hq or 1, Lq or 1, Lk or 1)``, and its strides; 0 where it is broadcast."""
    if mask is None:
        return _NOTHING, (0, 0, 0, 0)
    xp = machine.xp
    mask = mask.reshape((1,) * (len(problem.score_shape) - mask.ndim) + tuple(mask.shape))
    if any(n != 1 for n in mask.shape[:-3]):
        mask = xp.broadcast_to(mask, (*problem.batch, *mask.shape[-3:]))
    mask = xp.ascontiguousarray(mask.reshape((-1 if mask.size else 0, *mask.shape[-3:])))
    strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.strides, strict=True))
    return mask.view(xp.uint8), strides


class Values(NamedTuple):
    """What the value pass makes."""

    x: Array  # (B·Hkv, Lk, EP)
    rest: Array
    c: Array  # (B·Hkv, EP)
    flags: Array  # (B·Hkv,)


def values(x: Call) -> Values:
    """The value pass: X, its integers, and which heads are inside the fast range."""
    xp, heads, keys = x.machine.xp, x.key_value_heads, x.problem.key_length
    width = x.build.value_dim
    chunks = max(1, -(-keys // CHUNK))
    lows, highs = (x.empty(heads, chunks, width, dtype=xp.float32) for _ in range(2))
    broken = x.empty(heads, chunks, dtype=xp.int32)
    c, flags = x.empty(heads, width, dtype=xp.int32), x.empty(heads, dtype=xp.int32)
    x.run("value_range", heads * chunks, x.v, lows, highs, broken, np.int32(chunks), np.int32(CHUNK))
    x.run("value_decide", heads, lows, highs, broken, c, flags, np.int32(chunks))
    made, rest = x.empty(heads, keys, width), x.empty(heads, keys, width)
    rows = heads * keys
    x.run("value_exp", -(-rows * width // (2 * THREADS)), x.v, c, flags, made, rest, np.int64(rows))
    return Values(made, rest, c, flags)


def forward(machine: Machine, problem: Problem, inputs: Inputs) -> Forward:
    """The output, its float32 form, and the log-sum-exp."""
    xp = machine.xp
    if 0 in problem.score_shape:
        out = xp.zeros(problem.out_shape, dtype=inputs.query.dtype)
        lse = xp.full(problem.lse_shape, -math.inf, dtype=xp.float32)
        return Forward(out, lse, xp.zeros(problem.out_shape, dtype=xp.float32))
    x = call(machine, problem, inputs)
    v = values(x)
    out = x.empty(*problem.out_shape)
    residual = x.empty(*problem.out_shape, dtype=xp.float32)
    lse = x.empty(*problem.lse_shape, dtype=xp.float32)
    blocks = -(-problem.query_length // x.build.queries)
    x.run("forward", x.heads * blocks, x.q, x.k, v.x, v.rest, v.c, v.flags, out, residual, lse)
    workers = min(WORKERS, problem.query_length)
    x.run("forward_exact", x.heads * workers, x.q, x.k, x.v, v.flags, out, residual, lse, np.int32(workers))
    return Forward(out, lse, residual)


def backward(
    machine: Machine, problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None
) -> Gradients:
    """The gradients of query, key and value."""
    xp = machine.xp
    if 0 in problem.score_shape:
        return no_gradients(xp, inputs)
    x = call(machine, problem, inputs)
    v = values(x)
    do = matrix(machine, d_out, problem.value_dim)
    o = matrix(machine, forward.residual, problem.value_dim)
    lse = xp.ascontiguousarray(forward.lse).reshape(-1)
    dl: Any = _NOTHING if d_lse is None else xp.ascontiguousarray(d_lse).reshape(-1)
    rows, keys = x.heads * problem.query_length, x.key_value_heads * problem.key_length
    l, r, sizes, bounds = (x.empty(rows, dtype=xp.float32) for _ in range(4))
    scales = x.empty(x.key_value_heads, 2, dtype=xp.int32)
    g, marks = x.empty(rows, x.build.value_dim), x.empty(keys, dtype=xp.float32)
    per_warp = THREADS // 32
    terms = (x.q, o, do, lse, dl, v.c, v.flags, l, r, sizes, bounds, g)
    x.run("row_terms", -(-rows // per_warp), *terms, np.int64(rows))
    x.run("row_scales", x.key_value_heads, sizes, bounds, scales)
    if x.build.half:
        grid = -(-rows * x.build.value_dim // (2 * THREADS))
        x.run("row_weights", grid, o, do, l, v.c, v.flags, scales, g, np.int64(rows))
    x.run("key_marks", -(-keys // per_warp), x.k, marks, np.int64(keys))

    dq, dk, dv = (xp.empty_like(a) for a in (x.q, x.k, x.v))
    q_blocks, k_blocks = (-(-n // BLOCK) for n in (problem.query_length, problem.key_length))
    pairs = (l, r, marks, scales, v.flags)
    x.run("backward_keys", x.key_value_heads * k_blocks, x.q, x.k, v.x, v.rest, g, *pairs, dk, dv)
    x.run("backward_queries", x.heads * q_blocks, x.q, x.k, v.x, g, *pairs, dq)
    exact = (x.q, x.k, x.v, o, do, dl, l, marks, v.flags)
    workers = [min(WORKERS, n) for n in (problem.query_length, problem.key_length)]
    x.run("backward_queries_exact", x.heads * workers[0], *exact, dq, np.int32(workers[0]))
    x.run("backward_keys_exact", x.key_value_heads * workers[1], *exact, dk, dv, np.int32(workers[1]))
    arguments = (inputs.query, inputs.key, inputs.value)
    return Gradients(*(a[..., : y.shape[-1]].reshape(y.shape) for a, y in zip((dq, dk, dv), arguments, strict=True)))
