"""The value pass in Pallas (Mosaic GPU): x = 2^(βv·log2e − c), and what c and the range of a head are judged by.

All exponents are in base 2, and split into integer and fraction first, so that x for another c is the same bits times a
power of two. Device code only, in JAX 0.11 or later.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

ROWS = 64  # of a tile
TILES = 2  # of a block
COLUMNS = 64
LOW, HIGH, ODD, SUM = range(4)  # what is known of a block's columns; the least exponent is negative, for max to take
_LOG2E = math.log2(math.e)


def measure(k: Array, v: Array, length: int, beta: float, total: bool, interpreted: bool) -> tuple[Array, Array]:
    """x for c = 0, and what is known of the columns of every block of keys.

    Args:
        k: (B, H, Lk, W), float16 or bfloat16; W is 64 or 128 and Lk a multiple of 8.
        v: (B, H, Lk, W).
        length: Keys beyond it are padding; their x is 0.
        beta: β.
        total: Whether the sum of x is asked for.
        interpreted: By JAX, on the CPU.

    Returns:
        x (B, H, Lk, W), and (B, H, blocks, 4, W), float32: −1 times the least exponent of what is finite, the greatest,
        the number of entries of k and v that are not finite, and Σx where asked for.
    """
    batch, heads, keys, width = v.shape
    blocks = pl.cdiv(keys, ROWS * TILES)

    def block(k_ref: Ref, v_ref: Ref, x_ref: Ref, known_ref: Ref) -> None:
        b, h, index = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("block")
        tile = plgpu.SMEM((TILES, ROWS, width), v.dtype, transforms=_LAYOUT)
        bars = plgpu.Barrier(num_barriers=TILES)

        def work(k_s: Ref, v_s: Ref, known_s: Ref, k_full: Ref, v_full: Ref) -> None:
            first = index * (ROWS * TILES)
            for t in range(TILES):
                at = (b, h, pl.ds(first + t * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_s.at[t], v_full.at[t])
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_s.at[t], k_full.at[t])
            for t in range(TILES):
                plgpu.barrier_wait(v_full.at[t])
                plgpu.barrier_wait(k_full.at[t])
            for column in range(0, width, COLUMNS):  # a few at a time: all of them would not fit the registers
                columns = pl.ds(column, COLUMNS)
                known: tuple[Array, ...] | None = None
                for t in range(TILES):
                    v_t, k_t = (plgpu.load(s.at[t, :, columns], layout=plgpu.Layout.WGMMA) for s in (v_s, k_s))
                    row = plgpu.broadcasted_iota(jnp.int32, v_t.shape, 0, layout=plgpu.Layout.WGMMA)
                    y, fine = exponents(v_t, beta)
                    counts = (row < length - (first + t * ROWS)) & fine
                    x = jnp.where(counts, scaled_exp2(y, None), 0.0)
                    v_s.at[t, :, columns][...] = _rounded(x, v.dtype)
                    k_fine = _is_finite(k_t.astype(jnp.float32))
                    odd = jnp.where(fine, 0.0, 1.0) + jnp.where(k_fine, 0.0, 1.0)  # what is beyond the end is zero
                    part = (jnp.where(counts, -y, -jnp.inf), jnp.where(counts, y, -jnp.inf), odd, *([x] * total))
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

        pl.run_scoped(work, tile, tile, plgpu.SMEM((4, width), jnp.float32), bars, bars)

    x, known = plgpu.kernel(
        block,
        out_type=[
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, blocks, 4, width), jnp.float32),
        ],
        grid=(blocks, heads, batch),
        grid_names=("block", "head", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=2048),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}),
    )(k, v)
    return x, known


_LAYOUT = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def _is_finite(x: Array) -> Array:
    return jnp.abs(x) < jnp.inf


def _rounded(x: Array, dtype: Any) -> Array:
    return jnp.minimum(x, float(jnp.finfo(dtype).max)).astype(dtype)


def _merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1]), *(x + y for x, y in zip(a[2:], b[2:], strict=True))


def exponents(v: Array, beta: float) -> tuple[Array, Array]:
    """βv·log2e, 0 where βv is not finite, and where it is."""
    natural = v.astype(jnp.float32) * beta
    fine = _is_finite(natural)
    y = jnp.where(fine, natural, 0.0)
    return jnp.minimum(jnp.maximum(y, -1e38), 1e38) * _LOG2E, fine


def scaled_exp2(y: Array, c: Array | None) -> Array:
    """2^(y − c), the same bits times a power of two for every integer c."""
    n = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)
    exponent = n if c is None else n - c
    exponent = (jnp.minimum(jnp.maximum(exponent, -126.0), 127.0)).astype(jnp.int32) + 127
    return jnp.exp2(y - n) * lax.bitcast_convert_type(lax.shift_left(exponent, 23), jnp.float32)


def refer(x: Array, v: Array, c: Array, hard: Array, length: int, beta: float, interpreted: bool) -> Array:
    """``x`` with 2^(βv·log2e − c) in the heads that are ``hard``; the others are not touched.

    Args:
        x: As :func:`measure` returns it.
        v: As it took it.
        c: (B, H, W), float32, integers.
        hard: (B, H), int32.
        length: Keys beyond it are padding; their x is 0.
        beta: β.
        interpreted: By JAX, on the CPU.
    """
    batch, heads, keys, width = v.shape
    blocks = pl.cdiv(keys, ROWS)
    share = min(blocks, max(1, pl.cdiv(512, batch * heads)))  # most often there is nothing to do
    out = jax.new_ref(x)

    def block(v_ref: Ref, c_ref: Ref, hard_ref: Ref, x_ref: Ref) -> None:
        b, h = lax.axis_index("batch"), lax.axis_index("head")

        def work(tile: Ref, full: Ref) -> None:
            @pl.loop(lax.axis_index("share"), blocks, step=share)
            def _(index: Array) -> None:
                at = (b, h, pl.ds(index * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(v_ref.at[at], tile, full)
                plgpu.barrier_wait(full)
                for column in range(0, width, COLUMNS):
                    columns = pl.ds(column, COLUMNS)
                    v_t = plgpu.load(tile.at[:, columns], layout=plgpu.Layout.WGMMA)
                    c_t = plgpu.load(c_ref.at[b, h, columns], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                    row = plgpu.broadcasted_iota(jnp.int32, v_t.shape, 0, layout=plgpu.Layout.WGMMA)
                    y, fine = exponents(v_t, beta)
                    counts = (row < length - index * ROWS) & fine
                    x = jnp.where(counts, scaled_exp2(y, lax.broadcast_in_dim(c_t, y.shape, [1])), 0.0)
                    tile.at[:, columns][...] = _rounded(x, v.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, x_ref.at[at])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(hard_ref[b, h] != 0)
        def _() -> None:
            pl.run_scoped(work, plgpu.SMEM((ROWS, width), v.dtype, transforms=_LAYOUT), plgpu.Barrier())

    mesh = plgpu.Mesh(grid=(share, heads, batch), grid_names=("share", "head", "batch"))
    pl.kernel(block, out_type=(), mesh=mesh, compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}),
    )(v, c, hard, out)  # fmt: skip
    return jax.freeze(out)
