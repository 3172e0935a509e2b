"""Inputs that are the same bits on every machine: integers from a counter, exact arithmetic, one rounding at the end.

Word n of the stream with key κ is splitmix64's output function applied to κ + n·0x9E3779B97F4A7C15 (mod 2⁶⁴), n ≥ 1.
A normal number is the sum of the twelve 16-bit parts of three words, less its mean, over 2¹⁶ (variance 1 − 2⁻³²): an
integer of 20 bits over a power of two, so no library function that may differ between machines is involved.
It is scaled in float64, then rounded to nearest even to float32 and from there to the dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = Any  # NumPy arrays; of bfloat16, which is no NumPy dtype, static types know nothing

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Kind = Literal["normal", "same", "columns", "spikes", "future", "subnormal", "largest", "uniform"]


@dataclass(frozen=True)
class Fill:
    """How an array of shape (..., length, dim) is filled.

    Attributes:
        kind: ``normal``: N(offset, scale²), no entry further than six deviations out. ``uniform``: between ± scale.
            ``same``: every entry is ``scale``. ``columns``: constant along the length. ``spikes``: N(0, 1) with one
            entry in 16 multiplied by ``scale``. ``future``: N(0, 1), the last quarter of the length multiplied by
            ``scale``. ``subnormal``: below the least normal number of the dtype. ``largest``: of either sign, between
            half the largest number of the dtype and nine tenths of it.
        scale: See ``kind``.
        offset: Added to ``normal``.
    """

    kind: Kind = "normal"
    scale: float = 1.0
    offset: float = 0.0


def key_of(name: str) -> int:
    """The key of the stream for an array, from a name: the first 8 bytes of its SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def words(key: int, count: int) -> NDArray[np.uint64]:
    """``count`` words of the stream."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def normal(key: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal numbers, in float64 and exact."""
    count = int(np.prod(shape, dtype=np.int64))
    parts = words(key, 3 * count).astype("<u8").view("<u2").reshape(count, 12)
    sums: NDArray[np.int64] = parts.sum(axis=1, dtype=np.int64)
    return ((sums - 6 * 65535) / 65536.0).reshape(shape)


def uniform(key: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Multiples of 2⁻⁵³ in [0, 1)."""
    bits = words(key, int(np.prod(shape, dtype=np.int64))) >> np.uint64(11)
    return (bits.astype(np.float64) * 2.0**-53).reshape(shape)


def limits(dtype: str) -> Any:
    """``finfo`` of a dtype by name."""
    return ml_dtypes.finfo(DTYPES[dtype])  # type: ignore[no-untyped-call]


def rounded(x: Floats, dtype: str) -> Floats:
    """``x`` in a dtype; by way of float32 to those below it."""
    if dtype in ("float16", "bfloat16"):
        x = x.astype(np.float32)
    return np.ascontiguousarray(x.astype(DTYPES[dtype]))


def fill(how: Fill, name: str, shape: tuple[int, ...], dtype: str) -> Floats:
    """An array of the given shape and dtype, from the stream of that name."""
    key = key_of(name)
    if how.kind == "same":
        x = np.full(shape, how.scale)
    elif how.kind == "columns":
        x = np.broadcast_to(how.scale * normal(key, (*shape[:-2], 1, shape[-1])), shape)
    elif how.kind == "uniform":
        x = how.scale * (2 * uniform(key, shape) - 1)
    elif how.kind == "spikes":
        x = normal(key, shape) * np.where(uniform(key_of(name + "/spikes"), shape) < 1 / 16, how.scale, 1.0)
    elif how.kind == "future":
        late = np.arange(shape[-2])[:, None] >= shape[-2] - shape[-2] // 4
        x = normal(key, shape) * np.where(late, how.scale, 1.0)
    elif how.kind == "subnormal":
        x = (2 * uniform(key, shape) - 1) * float(limits(dtype).smallest_normal)
    elif how.kind == "largest":
        u = 2 * uniform(key, shape) - 1
        x = np.where(u < 0, u * 0.4 - 0.5, u * 0.4 + 0.5) * min(float(limits(dtype).max), _FLOAT32_MAX)
    else:
        x = how.scale * normal(key, shape) + how.offset
    return rounded(np.ascontiguousarray(x), dtype)


_FLOAT32_MAX = float(np.finfo(np.float32).max)


def checksum(arrays: Mapping[str, Floats]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = arrays[name]
        digest.update(f"{name} {x.dtype.name} {x.shape}\n".encode())
        digest.update(little_endian(x))
    return digest.hexdigest()


def little_endian(x: Floats) -> bytes:
    """The bytes of an array in C order, the least significant first."""
    x = np.ascontiguousarray(x)
    if x.dtype.byteorder == ">" or (x.dtype.byteorder == "=" and not np.little_endian):
        x = x.byteswap()
    return bytes(x.tobytes())
