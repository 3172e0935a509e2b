"""What is compiled: the source, and the one record of all that is compiled in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from laser_core import Problem

THREADS = 128
WARPS = THREADS // 32
BLOCK = 64  # rows of a tile that a block of the backward pass owns
SHARED = 99 << 10  # bytes that every device from sm_80 on lends to a block
LARGEST_DIM = 256
_EXACT = ("values", "forward_exact")
PARTS = {  # what is compiled together, when it is needed: files, which may hold kernels of others too, and kernels
    "forward": (
        (*_EXACT, "forward", "forward_few"),
        ("value_exp", "value_decide", "value_again", "forward", "forward_exact", "forward_few"),
    ),
    "backward": (
        (*_EXACT, "rows", "backward_products", "backward", "backward_exact"),
        (
            "row_terms",
            "row_scales",
            "row_weights",
            "key_marks",
            "backward_keys",
            "backward_values",
            "backward_queries",
            "backward_queries_exact",
            "backward_keys_exact",
        ),
    ),
    "bias": (
        (*_EXACT, "rows", "backward_products", "backward", "backward_exact", "bias"),
        ("backward_beta", "backward_bias"),
    ),
    "decode": (("decode",), ("decode", "decode_merge")),
}
KERNELS = {kernel: part for part, (_, kernels) in PARTS.items() for kernel in kernels}
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_PAD = 8
_LEAST = 32  # columns: narrower matrices are padded rather than compiled for


@dataclasses.dataclass(frozen=True)
class Build:
    """What is compiled in.

    Attributes:
        dtype: Of the matrices: float16, bfloat16 or float32.
        columns: Of q and k: D rounded up to 16 bytes, and no less than 32.
        value_dim: E rounded up to 16, and no less than 32.
        exp, expm1: The forms of the values; ``values.cu`` has them.
        cap: A soft cap of the scores.
        general: Scores are more than products times a positive factor: there is a mask, a bias or a cap.
        strips: Of the forward pass: a warp owns 16 queries times this.
        keys: Of the forward pass: keys of a tile.
        resident: Of the forward pass: blocks that share a multiprocessor, by registers.
        owned: Of the backward pass: a warp owns 16 keys or queries times this.
        inner: Of the backward pass: rows of the tiles that are walked over.
        stages: How many of them are in shared memory, there or on their way.
    """

    dtype: str
    columns: int
    value_dim: int
    exp: bool = True
    expm1: bool = False
    cap: bool = False
    general: bool = False
    strips: int = 1
    keys: int = 64
    resident: int = 2
    owned: int = 1
    inner: int = 32
    stages: int = 2

    def __post_init__(self) -> None:
        """Refuse what the kernels cannot be compiled for."""
        for name, allowed in (
            ("dtype", tuple(_BYTES)),
            ("columns", range(8, LARGEST_DIM + 1, 8) if self.narrow else range(4, LARGEST_DIM + 1, 4)),
            ("value_dim", range(16, LARGEST_DIM + 1, 16)),
            ("strips", (1, 2)),
            ("keys", (16, 32, 64, 128)),
            ("resident", (1, 2, 3)),
            ("owned", (1, 2)),
            ("inner", (16, 32)),
            ("stages", (1, 2, 3)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: {', '.join(map(str, allowed))}")

    @classmethod
    def of(cls, problem: Problem) -> Build:
        """The build that runs a problem: the fastest tile sizes that were tried on an H100, or what fits."""
        beta = problem.beta
        narrow = problem.dtype != "float32"
        unit = 8 if narrow else 4
        build = cls(
            problem.dtype,
            max(_LEAST, -(-problem.head_dim // unit) * unit),
            max(_LEAST, -(-problem.value_dim // 16) * 16),
            exp=beta is None or beta != 0,
            expm1=beta is None or abs(beta) < 1,
            cap=problem.logits_soft_cap is not None,
            general=problem.mask_shape is not None
            or problem.bias_shape is not None
            or problem.logits_soft_cap is not None
            or problem.scale <= 0,
        )
        if narrow and build.wide <= 128 and build.padded <= 128:
            if max(build.wide, build.padded) <= 64:
                return dataclasses.replace(build, strips=2, keys=128, owned=2)
            return dataclasses.replace(build, strips=2, stages=3)
        for keys, inner, stages in ((64, 32, 2), (32, 32, 2), (32, 32, 1), (32, 16, 1), (16, 16, 1)):
            build = dataclasses.replace(build, keys=keys, inner=inner, stages=stages)
            if build.largest <= SHARED:
                break
        return build

    @property
    def narrow(self) -> bool:
        """Whether elements have 16 bits."""
        return self.dtype != "float32"

    @property
    def bytes(self) -> int:
        """Of an element."""
        return _BYTES[self.dtype]

    @property
    def padded(self) -> int:
        """Columns of tiles of q and k."""
        return -(-self.columns // 16) * 16

    @property
    def wide(self) -> int:
        """Columns of X: those of all forms."""
        return self.value_dim * (self.exp + self.expm1)

    @property
    def split(self) -> bool:
        """Whether dk and dv are made by kernels of their own."""
        return self.padded + self.wide > 256

    @property
    def queries(self) -> int:
        """Queries of a block of the forward pass."""
        return 64 * self.strips

    @property
    def lanes(self) -> int:
        """Of a row of queries in the pass over them."""
        widest, per = max(self.columns, self.value_dim), 16 // self.bytes
        return 32 if widest > 16 * per else 16 if widest > 8 * per else 8

    @property
    def definitions(self) -> tuple[str, ...]:
        """Compiler options."""
        values: dict[str, int] = {"FLOAT16": self.dtype == "float16", "FLOAT32": self.dtype == "float32"}
        values |= {"WIDTH": self.columns, "EP": self.value_dim, "EXP": self.exp, "EXPM1": self.expm1}
        values |= {"CAP": self.cap, "GENERAL": self.general or self.cap}
        values |= {"STRIPS": self.strips, "KEYS": self.keys, "FORWARD_BLOCKS": self.resident}
        values |= {"OWNED": self.owned, "INNER": self.inner, "STAGES": self.stages, "LANES": self.lanes}
        return tuple(f"-D{name}={int(value)}" for name, value in values.items())

    def shared(self, kernel: str) -> int:
        """Bytes of shared memory that a block of a kernel takes."""
        d, x = self.padded + _PAD, self.wide + _PAD
        walked = self.stages * self.inner * (self.bytes * (d + x) + 8)
        tiles, rows = self.bytes * BLOCK * (d + x), 4 * BLOCK * (self.wide + 8)
        backward = max(tiles * self.owned + walked, rows + 16 * self.value_dim)
        return {
            "value_exp": 8 * THREADS * (16 // self.bytes),
            "forward": max(self.bytes * (self.queries * d + self.keys * (d + x)) + 48 * THREADS, rows),
            "forward_exact": 4 * (self.padded + 2 * THREADS),
            "forward_few": self._few,
            "row_scales": 4 * THREADS,
            "backward_keys": backward,
            "backward_values": backward,
            "backward_queries": backward,
            "backward_bias": tiles + walked,
            "decode": WARPS * 2 * 16 * self.bytes * (d + self.value_dim + _PAD),
            "decode_merge": 3 * 4 * THREADS * WARPS,
            "backward_queries_exact": 4 * (self.padded + THREADS),
            "backward_keys_exact": 4 * (self.padded + 2 * THREADS),
        }.get(kernel, 0)

    @property
    def _few(self) -> int:
        """Of forward_few.cu: tiles of q and k, two of x, one of rest, weights, and what is known of rows."""
        if not self.narrow or self.expm1 or max(self.padded, self.value_dim) > 128:
            return 0
        d, x, keys = self.padded + _PAD, self.value_dim + _PAD, 32
        tiles = max(2 * ((64 + keys) * d + 3 * keys * x), 4 * 64 * (self.value_dim + 4))
        return tiles + 2 * 64 * (keys + _PAD) + 4 * (64 + 64 + self.value_dim + THREADS + 2)

    @property
    def largest(self) -> int:
        """The most shared memory that a kernel takes that every problem needs."""
        return max(self.shared(kernel) for kernel in KERNELS if kernel != "decode")


@functools.cache
def source(*parts: str, hardware: str = "hardware.cu") -> str:
    """The source of some parts, or of all kernels, in one piece."""
    files = dict.fromkeys(file for part in parts or PARTS for file in PARTS[part][0])
    names = (hardware, *(f"{name}.cu" for name in ("float32", "common", *files)))
    return joined(names)


def joined(names: Sequence[str]) -> str:
    """Files of this folder in one piece."""
    folder = Path(__file__).parent
    return "\n".join(f'#line 1 "{name}"\n' + (folder / name).read_text(encoding="utf-8") for name in names)
