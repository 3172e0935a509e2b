"""The value pass in Pallas (Mosaic GPU): x = 2^(βv·log2e − c), and what c and the range of a head are judged by.

All exponents are in base 2, and split into integer and fraction first, so that x for another c is the same bits times a
power of two. Device code only, in JAX 0.11 or later.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import values

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

ROWS = 64  # of a tile
TILES = 2  # of a block
COLUMNS = 32  # worked on at a time: few, so that many blocks find registers
FAR = 2.0**22  # exponents beyond it have no fraction
LARGE = 256  # below it the 8 bits of what rounding took from o keep βo, and so the logarithm of Σ_j w, to half of u
_MAGIC = 1.5 * 2.0**23  # added to a float, it leaves the nearest integer in the low bits
LOW, HIGH, ODD, SUM = range(4)  # what is known of a block's columns
_LOG2E = math.log2(math.e)


def measure(v: Array, length: int, beta: float, total: bool, interpreted: bool) -> tuple[Array, Array]:
    """x for c = 0, and what is known of the columns of every block of keys.

    Args:
        v: (B, H, Lk, W), float16 or bfloat16; W is 64 or 128 and Lk a multiple of 8.
        length: Keys beyond it are padding; their x is 0.
        beta: β.
        total: Whether the sum of x is asked for.
        interpreted: By JAX, on the CPU.

    Returns:
        x (B, H, Lk, W), and (B, H, blocks, 4, W), float32: the greatest −βv and the greatest βv of what is finite, zero
        or NaN where some βv is not finite, and Σx where asked for.
    """
    batch, heads, keys, width = v.shape
    blocks = pl.cdiv(keys, ROWS * TILES)

    def block(v_ref: Ref, x_ref: Ref, known_ref: Ref) -> None:
        b, h, index = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("block")
        tile = plgpu.SMEM((TILES, ROWS, width), v.dtype, transforms=LAYOUT)

        def work(v_s: Ref, known_s: Ref, full: Ref) -> None:
            first = index * (ROWS * TILES)
            for t in range(TILES):
                at = (b, h, pl.ds(first + t * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_s.at[t], full.at[t])
            for t in range(TILES):
                plgpu.barrier_wait(full.at[t])
            for column in range(0, width, COLUMNS):  # a few at a time: all of them would not fit the registers
                columns = pl.ds(column, COLUMNS)
                known: tuple[Array, ...] | None = None
                for t in range(TILES):
                    v_t = plgpu.load(v_s.at[t, :, columns], layout=plgpu.Layout.WGMMA)
                    v32 = v_t.astype(jnp.float32)
                    natural = v32 if beta == 1 else v32 * beta
                    counts = _is_finite(natural)
                    if length % (ROWS * TILES):
                        row = plgpu.broadcasted_iota(jnp.int32, v_t.shape, 0, layout=plgpu.Layout.WGMMA)
                        counts = counts & (row < length - (first + t * ROWS))
                    low, high = (jnp.where(counts, a, -jnp.inf) for a in (-natural, natural))
                    x = jnp.where(counts, scaled_exp2(natural * _LOG2E, None), 0.0)
                    v_s.at[t, :, columns][...] = _rounded(x, v.dtype)
                    part = (low, high, natural * 0.0, *([x] * total))
                    known = part if known is None else _merge(known, part)
                assert known is not None
                known_s.at[LOW, columns][...] = known[0].max(axis=0)
                known_s.at[HIGH, columns][...] = known[1].max(axis=0)
                known_s.at[ODD, columns][...] = known[2].sum(axis=0)
                if total:
                    known_s.at[SUM, columns][...] = known[3].sum(axis=0)
            plgpu.commit_smem()
            for t in range(TILES):
                plgpu.copy_smem_to_gmem(v_s.at[t], x_ref.at[b, h, pl.ds(first + t * ROWS, ROWS)])
            plgpu.copy_smem_to_gmem(known_s, known_ref.at[b, h, index])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(work, tile, plgpu.SMEM((4, width), jnp.float32), plgpu.Barrier(num_barriers=TILES))

    x, known = plgpu.kernel(
        block,
        out_type=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, blocks, 4, width), jnp.float32),
        ],
        grid=(blocks, heads, batch),
        grid_names=("block", "head", "batch"),
        kernel_name="laser_values",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=6144),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}),
    )(v)
    return x, known


LAYOUT = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(2 * COLUMNS))


def _is_finite(x: Array) -> Array:
    return jnp.abs(x) < jnp.inf


def _rounded(x: Array, dtype: Any) -> Array:
    return (jnp.minimum(x, 65504.0) if dtype == jnp.float16 else x).astype(dtype)


def _merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1]), *(x + y for x, y in zip(a[2:], b[2:], strict=True))


def exponentiated(v: Array, c: Array, beta: float, last: Array | None) -> Array:
    """2^(βv·log2e − c) of a tile ``(keys, channels)`` in the dtype of v; 0 for what is not finite, or not before a row.

    Args:
        v: In the layout ``WGMMA``.
        c: (channels,).
        beta: β.
        last: The row from which on there is padding; None: there is none.
    """
    natural = v.astype(jnp.float32) * beta
    counts = _is_finite(natural)
    if last is not None:
        row = plgpu.broadcasted_iota(jnp.int32, v.shape, 0, layout=plgpu.Layout.WGMMA)
        counts = counts & (row < last)
    y = jnp.minimum(jnp.maximum(natural * _LOG2E, -FAR), FAR)
    return _rounded(jnp.where(counts, scaled_exp2(y, lax.broadcast_in_dim(c, y.shape, [1])), 0.0), v.dtype)


def scaled_exp2(y: Array, c: Array | None) -> Array:
    """2^(y − c), the same bits times a power of two for every integer c; clipped where they are far."""
    if c is None:
        y = jnp.minimum(jnp.maximum(y, -125.0), 126.0)
    shifted = lax.optimization_barrier(y + _MAGIC)  # XLA, in the interpreter, would make y of (y + a) − a
    whole = shifted - _MAGIC
    fraction = lax.bitcast_convert_type(jnp.exp2(y - whole), jnp.int32)
    if c is not None:
        shifted = jnp.minimum(jnp.maximum(whole - c, -125.0), 126.0) + _MAGIC
    exponent = lax.shift_left(lax.bitcast_convert_type(shifted, jnp.int32), 23)
    return lax.bitcast_convert_type(fraction + exponent, jnp.float32)


def rest_tile(rows: int, width: int) -> Any:
    """Shared memory for what rounding took."""
    return plgpu.SMEM((rows, width), jnp.int8, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(32)))


def split(o: Array, dtype: Any) -> tuple[Array, Array]:
    """A float32 tile rounded to a dtype, and what that took from it: integers of 8 bits, 1/256 of the last place."""
    if dtype == jnp.bfloat16:  # rounded to 16 bits of its own first, and then in the middle, upwards: bytes of the bits
        bits = jnp.minimum(_bits(o), _NAN) + 0x80
        rounded = lax.shift_right_logical(bits + 0x8000, 16).astype(jnp.int16)
        return lax.bitcast_convert_type(rounded, jnp.bfloat16), lax.shift_right_logical(bits, 8)
    rounded = o.astype(dtype)
    rest = _bits(o) - _bits(rounded.astype(jnp.float32))
    places = _LOST[jnp.dtype(dtype).name] - 8
    rest = lax.shift_right_arithmetic(rest + (1 << (places - 1)), places)
    return rounded, jnp.minimum(jnp.maximum(rest, -128), 127)


def joined(rounded: Array, rest: Array) -> Array:
    """The float32 tile that was split, with the 8 bits that were kept."""
    places = _LOST[jnp.dtype(rounded.dtype).name] - 8
    bits = _bits(rounded.astype(jnp.float32)) + lax.shift_left(rest.astype(jnp.int32), places)
    return lax.bitcast_convert_type(bits, jnp.float32)


_NAN = 0x7FC00000  # as an integer no less than any other float32 that is not negative
_LOST = {"bfloat16": 16, "float16": 13}  # bits of float32


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def settle(
    x: Array, v: Array, most: Array, sums: Array | None, length: int, beta: float, narrow: int, interpreted: bool
) -> tuple[Array, Array, Array]:  # fmt: skip
    """``x`` with 2^(βv·log2e − c) in the heads where some c is not 0, c, and the flags of all heads.

    Args:
        x: As :func:`measure` returns it.
        v: As it took it.
        most: (B, H, 3, W), float32, of all that it knows the greatest.
        sums: (B, H, W), float32, Σx where asked for.
        length: Keys beyond it are padding; their x is 0.
        beta: β.
        narrow: Of so many channels it is told whether they hardly vary.
        interpreted: By JAX, on the CPU.

    Returns:
        x; c (B, H, W), float32, integers; flags (B, H), int32.
    """
    batch, heads, keys, width = v.shape
    blocks = pl.cdiv(keys, ROWS)
    share = min(blocks, max(1, pl.cdiv(512, batch * heads)))  # most often there is nothing to do
    of_channels = plgpu.Layout.WGMMA.reduce(0)
    limits = values.LIMITS[jnp.dtype(v.dtype).name]

    def block(v_ref: Ref, most_ref: Ref, *refs: Ref) -> None:
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        *sums_ref, x_ref, c_ref, flags_ref = refs

        def load(ref: Ref, *at: int) -> Array:
            loaded: Array = plgpu.load(ref.at[b, h, *at], layout=of_channels, optimized=False)
            return loaded

        low, high, odd = -load(most_ref, 0), load(most_ref, 1), load(most_ref, 2)
        total = load(sums_ref[0]) if sums_ref else None
        c, outside = values.decide(low * _LOG2E, high * _LOG2E, total, length, limits)
        size = jnp.maximum(high, -low)
        found = [
            (outside, values.OUTSIDE),
            (odd != odd, values.BROKEN),
            (size >= LARGE, values.FAR),
            (c != 0, values.MOVED),
        ]
        if narrow:
            channel = plgpu.broadcasted_iota(jnp.int32, c.shape, 0, layout=of_channels)
            found.append(((high - low <= limits.narrow) & (size < 1) & (channel < narrow), values.NARROW))
        in_any = [jnp.max(jnp.where(is_so, float(flag), 0.0)).astype(jnp.int32) for is_so, flag in found]
        flags = functools.reduce(jnp.bitwise_or, in_any)

        def work(c_s: Ref, tile: Ref, full: Ref) -> None:
            @pl.loop(lax.axis_index("share"), blocks, step=share)
            def _(index: Array) -> None:
                at = (b, h, pl.ds(index * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(v_ref.at[at], tile, full)
                plgpu.barrier_wait(full)
                for column in range(0, width, COLUMNS):
                    columns = pl.ds(column, COLUMNS)
                    v_t = plgpu.load(tile.at[:, columns], layout=plgpu.Layout.WGMMA)
                    c_t = plgpu.load(c_s.at[columns], layout=of_channels, optimized=False)
                    tile.at[:, columns][...] = exponentiated(v_t, c_t, beta, length - index * ROWS)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, x_ref.at[at])
                plgpu.wait_smem_to_gmem(0)

        def tell(c_s: Ref) -> None:
            c_s[...] = c
            plgpu.commit_smem()

            @pl.when(lax.axis_index("share") == 0)
            def _() -> None:
                flags_ref[b, h] = flags
                plgpu.copy_smem_to_gmem(c_s, c_ref.at[b, h])
                plgpu.wait_smem_to_gmem(0)

            @pl.when(flags & values.MOVED != 0)
            def _() -> None:
                tile = plgpu.SMEM((ROWS, width), v.dtype, transforms=LAYOUT)
                pl.run_scoped(functools.partial(work, c_s), tile, plgpu.Barrier())

        pl.run_scoped(tell, plgpu.SMEM((width,), jnp.float32))

    mesh = plgpu.Mesh(grid=(share, heads, batch), grid_names=("share", "head", "batch"))
    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}
    parameters = plgpu.CompilerParams(approx_math=True)

    given = (v, most, *([] if sums is None else [sums]))

    def write(written: tuple[Ref, ...]) -> None:
        pl.kernel(block, out_type=(), mesh=mesh, compiler_params=parameters, name="laser_settle", **options)(
            *given, *written
        )

    return pl.run_state(write)((x, lax.empty((batch, heads, width), jnp.float32), lax.empty((batch, heads), jnp.int32)))
