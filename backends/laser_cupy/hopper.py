"""The Hopper kernels: what they serve, their tiles, how they are compiled, and the launches."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from laser_core import Forward, Problem
from laser_core._array import Array

from . import host
from .build import THREADS, WARPS, Build, joined

CAPABILITY = 90
SMALLEST = 33  # head or value dim: tiles have 64 columns, which pays for more than half of them
WARPGROUP = 128
SHARED = 227 << 10  # bytes that a block may have
L2_BYTES = 24 << 20  # q, G and the sums of dq of the heads that run together backward should fit in this much
HEADS = {False: 6, True: 24}  # worked on by turns backward, at least: without a band of keys and with one
BEHIND = 1024  # queries that read a key/value head, from which on its X is made in the background of the forward kernel
COMMON = ("hardware.cu", "common.cu")
OPTIONS: tuple[str, ...] = ("-std=c++17", "-arch=sm_90a")
VALUE_ROOM = 3 * 2 * 8 * 32 * 16  # bytes of shared memory in which values wait, in the forward kernel
ROOMS = 6  # sections of heads of which X is there, forward
CHUNK = 64  # keys of a block of a pass over the values
WORKERS = 16  # blocks for a head of a pass that mostly has nothing to do
FEW_WORKERS = 2  # blocks for each multiprocessor, which have room side by side


def why_not(problem: Problem) -> str | None:
    """Why the Hopper kernels do not serve a problem that the portable ones do; None if they do."""
    if problem.dtype not in ("float16", "bfloat16"):
        return f"dtype {problem.dtype} (supported: float16, bfloat16)"
    for name, size in (("head dim D", problem.head_dim), ("value dim E", problem.value_dim)):
        if not SMALLEST <= size <= 128:
            return f"{name} = {size} (supported: {SMALLEST} … 128)"
    if problem.value_dim % 8:
        return f"value dim E = {problem.value_dim} (supported: multiples of 8)"
    if problem.beta is None or abs(problem.beta) < 1:
        return "beta (supported: a number with |beta| ≥ 1)"
    for name in ("mask_shape", "bias_shape", "logits_soft_cap"):
        if getattr(problem, name) is not None:
            return f"{name.removesuffix('_shape')} (supported: none)"
    if problem.scale <= 0:
        return f"scale = {problem.scale}: the row maximum is taken before it is multiplied (supported: > 0)"
    return None


@dataclasses.dataclass(frozen=True)
class Operands:
    """What is compiled into all of these kernels, and all that is into those of ``hopper_passes.cu``.

    Attributes:
        half: float16; otherwise bfloat16.
        columns: Of q and k: D rounded up to 8.
        value_dim: E rounded up to 16.
    """

    half: bool
    columns: int
    value_dim: int

    SOURCES: ClassVar[tuple[str, ...]] = (*COMMON, "hopper.cu", "hopper_values.cu", "hopper_passes.cu")
    ALLOWED: ClassVar[dict[str, Any]] = {"columns": range(8, 129, 8), "value_dim": range(16, 129, 16)}

    def __post_init__(self) -> None:
        """Refuse what the kernels or the hardware do not have."""
        for name, values in self.ALLOWED.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: {', '.join(map(str, values))}")
        if self.shared > SHARED:
            raise ValueError(f"shared memory of a block: got {self.shared} bytes; allowed: {SHARED}")

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of tiles of q and k, and of X."""
        d, e = (64 if n <= 64 else 128 for n in (self.columns, self.value_dim))
        return d, e

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block, with room to begin at a multiple of 1024."""
        return 0

    @property
    def values(self) -> dict[str, int]:
        """The definitions by name."""
        return {
            "FLOAT16": int(self.half),
            "FLOAT32": 0,
            "WIDTH": self.columns,
            "EP": self.value_dim,
            "EXP": 1,
            "EXPM1": 0,
            "CAP": 0,
        }

    @property
    def definitions(self) -> tuple[str, ...]:
        """Compiler options."""
        return tuple(f"-D{name}={value}" for name, value in self.values.items())


@dataclasses.dataclass(frozen=True)
class ForwardTiles(Operands):
    """What is compiled into the forward kernel.

    Attributes:
        consumers: Warpgroups of 64 queries.
        keys: Of a tile.
        stages: Tiles of k, and of x, in shared memory.
        turns: Consumers take turns in issuing products.
        lazy: Bits that the running maximum of a row may be behind, so that sums are seldom made smaller.
    """

    consumers: int = 2
    keys: int = 128
    stages: int = 2
    turns: bool = False
    lazy: int = 0

    # of a producer's and of a consumer's thread; together no more than a block is launched with
    REGISTERS: ClassVar = {2: (72, 216), 3: (32, 160)}
    SOURCES: ClassVar = (*COMMON, "hopper.cu", "hopper_values.cu", "hopper_forward.cu")
    ALLOWED: ClassVar = Operands.ALLOWED | {
        "consumers": (2, 3),
        "keys": (64, 128),
        "stages": range(2, 9),
        "lazy": (0, 8),
    }

    def __post_init__(self) -> None:
        """Refuse what the kernels or the hardware do not have."""
        super().__post_init__()
        if self.half and self.lazy:
            raise ValueError(f"lazy: got {self.lazy}; allowed: 0, because float16 has no bits to spare")

    @classmethod
    def of(cls, problem: Problem) -> ForwardTiles:
        """The tiles for a problem: docs/cuda-hopper-log.md says what they rest on."""
        build, half = Build.of(problem), problem.dtype == "float16"
        small = max(build.columns, build.value_dim) <= 64
        tiles = cls(half, build.columns, build.value_dim, turns=True, lazy=0 if half else 8)
        return dataclasses.replace(tiles, consumers=3, stages=4) if small else tiles

    @property
    def queries(self) -> int:
        """Queries of a block."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARPGROUP * (1 + self.consumers)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, with room to begin at a multiple of 1024."""
        d, e = self.widths
        tiles = 2 * (2 * self.queries * max(d, e) + self.stages * self.keys * (d + e))
        return tiles + VALUE_ROOM + 8 * (8 + 4 * self.stages) + 2 * 32 + 1024

    @property
    def values(self) -> dict[str, int]:
        """The definitions by name."""
        producer, consumer = self.REGISTERS[self.consumers]
        return super().values | {
            "CONSUMERS": self.consumers,
            "KEYS": self.keys,
            "STAGES": self.stages,
            "TURNS": int(self.turns),
            "LAZY": self.lazy,
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
        }


@dataclasses.dataclass(frozen=True)
class BackwardTiles(Operands):
    """What is compiled into the backward kernels."""

    KEYS: ClassVar = 128
    THREADS: ClassVar = 3 * WARPGROUP
    SOURCES: ClassVar = (*COMMON, "hopper.cu", "hopper_movers.cu", "hopper_backward.cu", "hopper_queries.cu")

    @classmethod
    def of(cls, problem: Problem) -> BackwardTiles:
        """The tiles for a problem."""
        build = Build.of(problem)
        return cls(problem.dtype == "float16", build.columns, build.value_dim)

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return 64 if sum(self.widths) > 128 else 128

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        d, e = self.widths
        operands = 2 * (self.KEYS + 2 * self.queries) * (d + e)
        exchanged = 2 * 2 * self.KEYS * self.queries + 2 * 4 * self.queries * d
        return operands + exchanged + 4 * 2 * 2 * self.queries + 8 * 20 + self.KEYS

    @property
    def values(self) -> dict[str, int]:
        """The definitions by name."""
        return super().values | {"SHARED_BYTES": self.shared}


@functools.cache
def kernel(tiles: Operands, name: str, device: int) -> Any:
    """A kernel; CuPy keeps the machine code on disk. ``device`` is the current one."""
    function = _module(tiles, device).get_function(name)
    if name in ("hopper_forward", "hopper_backward"):
        function.max_dynamic_shared_size_bytes = tiles.shared
    return function


@functools.cache
def _module(tiles: Operands, device: int) -> Any:
    import cupy

    return cupy.RawModule(code=joined(tiles.SOURCES), options=(*OPTIONS, *tiles.definitions))


@functools.cache
def _encode() -> Any:
    """The driver's function that writes a tensor map: CuPy has no binding of it."""
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


def tensor_map(x: Array, rows: int, half: bool) -> Any:
    """A tensor map of ``x (heads, L, width)``, adjacent, whose tiles are of so many rows and of 64 columns.

    Raises:
        RuntimeError: The driver refuses.
    """
    return _tensor_map(x.data.ptr, x.shape, rows, half)


@functools.lru_cache(maxsize=256)
def _tensor_map(pointer: int, shape: tuple[int, int, int], rows: int, half: bool) -> Any:
    heads, length, width = shape
    room = np.zeros(192, dtype=np.uint8)
    start = -room.ctypes.data % 64
    sizes = (ctypes.c_uint64 * 3)(width, length, heads)
    strides = (ctypes.c_uint64 * 2)(2 * width, 2 * width * length)
    box, steps = (ctypes.c_uint32 * 3)(64, rows, 1), (ctypes.c_uint32 * 3)(1, 1, 1)
    kind, plain, swizzle, promotion, zeros = (6 if half else 9), 0, 3, 2, 0  # float16, bfloat16; 128 bytes; 128 bytes
    to, data = ctypes.c_void_p(room.ctypes.data + start), ctypes.c_void_p(pointer)
    error = _encode()(to, kind, 3, data, sizes, strides, box, steps, plain, swizzle, promotion, zeros)
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for a matrix of {shape}")
    return room[start : start + 128].view("V128")


def _passes(x: host.Call) -> Operands:
    return Operands(x.problem.dtype == "float16", x.build.columns, x.build.value_dim)


def _run(
    x: host.Call, tiles: Operands, name: str, grid: int, *arguments: Any, threads: int = THREADS, shared: int = 0
) -> None:
    function = kernel(tiles, name, x.q.device.id)
    function((grid,), (threads,), (*x.common, *arguments), shared_mem=shared)


def values(x: host.Call) -> host.Values:
    """The value pass."""
    xp, heads, keys, width = x.machine.xp, x.key_value_heads, x.problem.key_length, x.build.value_dim
    blocks = -(-keys // CHUNK)
    zeros = xp.zeros(heads * (2 * width + 1), dtype=xp.int32)
    flags, ranges = zeros[:heads], zeros[heads:]
    c, hard = x.empty(heads, width, dtype=xp.int32), x.empty(heads, dtype=xp.int32)
    made = x.empty(heads, keys, width)
    sizes = (np.int32(blocks), np.int32(CHUNK))
    _run(x, _passes(x), "hopper_values", heads * blocks, x.v, flags, ranges, made, *sizes)
    _run(x, _passes(x), "hopper_decide", heads, ranges, c, flags, hard)
    _run(x, _passes(x), "hopper_values_again", heads * WORKERS, x.v, c, hard, made, np.int32(WORKERS))
    return host.Values(made, c, flags)


def forward(x: host.Call, out: Array, lse: Array, keep: bool) -> tuple[host.Values, Array]:
    """The value pass, and the output of heads inside the fast range.

    Returns:
        What the value pass makes, and what is kept of the unrounded output: of bfloat16 16 bits of each, otherwise all.
    """
    residual: Any = host.NOTHING
    if keep:
        residual = x.empty(*out.shape, dtype=x.machine.xp.float32 if x.problem.dtype == "float16" else np.int16)
    v, counts, few = forward_alone(x, out, residual, lse)
    workers = FEW_WORKERS * x.machine.processors
    sizes = (np.int32(x.heads), np.int32(workers))
    x.run("forward_few", workers, x.q, x.k, x.v, v.c, counts, few, out, *host.unrounded(residual), lse, *sizes)
    return v, residual


def forward_alone(
    x: host.Call, out: Array, residual: Any, lse: Array, tiles: ForwardTiles | None = None
) -> tuple[host.Values, Array, Array]:
    """The forward kernel, which makes X too where that is hidden behind its products.

    Returns:
        What the value pass makes, how many rows of each head are left to ``forward_few``, because few keys carry their
        weight, and which.
    """
    xp, problem, kv_heads, width = x.machine.xp, x.problem, x.key_value_heads, x.build.value_dim
    tiles = tiles or ForwardTiles.of(problem)
    blocks = -(-problem.query_length // tiles.queries)
    # heads whose tiles of queries together are a wave of blocks: they share the L2 cache
    section = -(-x.machine.processors // (blocks * problem.group))
    zeros = xp.zeros(5 * kv_heads + x.heads + 2, dtype=xp.int32)
    flags, done, states, again, used = (zeros[n * kv_heads : (n + 1) * kv_heads] for n in range(5))
    counts, work, runs = zeros[5 * kv_heads : -2], zeros[-2:-1], zeros[-1:]
    few = x.empty(x.heads, problem.query_length, dtype=xp.int32)
    if problem.group * problem.query_length >= BEHIND:
        rooms = min(ROOMS * section, kv_heads)
        made, c = x.empty(rooms, problem.key_length, width), x.empty(kv_heads, width, dtype=xp.int32)
        v, first, ranges = host.Values(made, c, flags), min(section, kv_heads), x.empty(kv_heads, 2, width)
        ranges.data.memset_async(0xFF, ranges.nbytes)  # NaN
    else:
        rooms, v, first, ranges = kv_heads, values(x), -1, host.NOTHING
    of_heads = out.reshape(x.heads, problem.query_length, problem.value_dim)
    operands = ((x.q, 64), (x.k, tiles.keys), (v.x, tiles.keys), (of_heads, 16))
    whole, rest = host.unrounded(residual)
    of_rest = of_heads if rest is host.NOTHING else rest.reshape(of_heads.shape)
    maps = [tensor_map(a, rows, tiles.half) for a, rows in (*operands, (of_rest, 16))]
    passes = (x.k, x.v, v.x, ranges, v.c, v.flags, done, states, again, runs, used, np.int32(first), np.int32(rooms))
    outputs = (whole, rest, lse, few, counts, work)
    scalars = (np.int32(x.heads), np.int32(blocks), np.int32(min(section * problem.group, x.heads)))
    arguments = (*maps, *passes, *outputs, *scalars)
    shape = {"threads": tiles.threads, "shared": tiles.shared}
    _run(x, tiles, "hopper_forward", x.machine.processors, *arguments, **shape)
    return v, counts, few


def backward(
    x: host.Call, forward: Forward, d_out: Array, d_lse: Array | None, dq: Array, dk: Array, dv: Array
) -> tuple[host.Values, host.Rows]:
    """The gradients of heads inside the fast range.

    Returns:
        What the passes make; X is not among it: the kernel makes its own.
    """
    if isinstance(forward.residual, tuple):
        v = host.Values(host.NOTHING, *forward.residual[1:])
    else:  # of a pass by other kernels
        v = values(x)
    tiles = BackwardTiles.of(x.problem)
    r, odd = rows(x, v, forward, d_out, d_lse, tiles)
    backward_alone(x, v, r, odd, dq, dk, dv, tiles)
    return v, r


def rows(
    x: host.Call, v: host.Values, forward: Forward, d_out: Array, d_lse: Array | None, tiles: BackwardTiles
) -> tuple[host.Rows, Array]:
    """The passes over queries and keys.

    Returns:
        What they make, with ``r`` as the records of queries that the backward kernel reads; and (B·Hkv,), flags of
        which one says that a query that reads a head may be not finite.
    """
    xp, problem, heads, kv_heads = x.machine.xp, x.problem, x.heads, x.key_value_heads
    do = host.matrix(x.machine, d_out, problem.value_dim)
    o, *rest = host.outputs(x, forward)
    lse = xp.ascontiguousarray(forward.lse).reshape(-1)
    dl: Any = host.NOTHING if d_lse is None else xp.ascontiguousarray(d_lse).reshape(-1)
    q_tiles, count = -(-problem.query_length // tiles.queries), heads * problem.query_length
    lanes = 16 if max(x.build.columns, x.build.value_dim) > 64 else 8
    blocks = q_tiles * tiles.queries * lanes // THREADS  # for a head
    records = x.empty(heads * q_tiles, 2, tiles.queries, dtype=xp.float32)
    l, g = x.empty(count, dtype=xp.float32), x.empty(count, x.build.value_dim)
    odd = xp.zeros(kv_heads, dtype=xp.int32)
    given, sizes = (x.q, o, *rest, do, lse, dl, v.c, v.flags), (np.int32(q_tiles), np.int32(tiles.queries))
    guesses: Any = host.NOTHING
    tops: Any = host.NOTHING
    scales: Any = host.NOTHING
    if tiles.half:  # G needs an exponent of each head, which is known when all of it has been seen
        guesses, scales = x.empty(kv_heads, dtype=xp.int32), x.empty(kv_heads, 2, dtype=xp.int32)
        tops = x.empty(heads * blocks * WARPS, 2, dtype=xp.float32)
        _run(x, _passes(x), "hopper_guess", kv_heads, *given, guesses)
    _run(x, _passes(x), "hopper_terms", heads * blocks, *given, odd, l, records, g, *sizes, guesses, tops)
    if tiles.half:
        made = (guesses, tops, scales, records, g)
        workers = (np.int32(blocks * WARPS), np.int32(WORKERS))
        _run(x, _passes(x), "hopper_scales", kv_heads * WORKERS, *given, *made, *sizes, *workers)
    marks = x.empty(kv_heads * problem.key_length, dtype=xp.float32)
    blocks = -(-problem.key_length // THREADS)
    _run(x, _passes(x), "hopper_marks", kv_heads * blocks, x.k, v.flags, marks, np.int32(blocks))
    return host.Rows(o, do, dl, l, records, g, marks, scales, (rest[0], rest[1])), odd


def backward_alone(
    x: host.Call,
    v: host.Values,
    r: host.Rows,
    odd: Array,
    dq: Array,
    dk: Array,
    dv: Array,
    tiles: BackwardTiles | None = None,
) -> None:
    """The backward kernel, and what its sums are turned into dq by."""
    xp, problem = x.machine.xp, x.problem
    tiles = tiles or BackwardTiles.of(problem)
    (d, _), heads = tiles.widths, x.key_value_heads
    q_tiles, k_tiles = -(-problem.query_length // tiles.queries), -(-problem.key_length // tiles.KEYS)
    count, parts = x.heads * q_tiles, q_tiles * tiles.queries // 64
    zeros = xp.zeros(count + 1, dtype=xp.int32)
    sums = x.empty(count, tiles.queries * d, dtype=xp.float32)
    section = max(HEADS[problem.band != (None, None)], L2_BYTES // (8 * d * q_tiles * tiles.queries * problem.group))
    g = r.g.reshape(x.heads, problem.query_length, -1)
    operands = ((x.q, tiles.queries), (x.k, tiles.KEYS), (x.v, tiles.KEYS), (g, tiles.queries), (dk, 64), (dv, 64))
    maps = [tensor_map(a, rows, tiles.half) for a, rows in operands]
    side = (v.c, r.r, r.scales, v.flags, odd, sums, zeros[:count], zeros[count:], dk, dv)
    sizes = map(np.int32, (heads * k_tiles, k_tiles, min(section, heads), q_tiles))
    blocks, shape = min(heads * k_tiles, x.machine.processors), {"threads": tiles.THREADS, "shared": tiles.shared}
    _run(x, tiles, "hopper_backward", blocks, *maps, *side, *sizes, **shape)
    _run(x, tiles, "hopper_queries", x.heads * parts, sums, r.scales, v.flags, dq, np.int32(parts))
