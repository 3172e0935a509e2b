"""The query side of the backward pass in Pallas (Mosaic GPU): what the backward kernel reads of every row.

    g = do·2^(c − βo·log2e)     r = dl − Σ_e do/β     l2 = l·log2e

A row that nothing flows through has l2 = +∞, so that its weights are 0. One whose result or cotangent is not finite has
``ODD``, so huge that they are 0 too, or ``ODD_QUERY`` if the query is not finite either. Device code only, in JAX 0.11
or later.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_values import COLUMNS, FAR, LAYOUT, ROWS, joined, rest_tile, scaled_exp2

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

ODD, ODD_QUERY = 2.0**126, 2.0**127
_LOG2E = math.log2(math.e)


def prepare(
    q: Array, o: Array, rest: Array, do: Array, l: Array, dl: Array | None, c: Array, beta: float, shift: int,
    interpreted: bool,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """g in the dtype of do, r·2^−shift and l2 − shift, all with as many rows as l.

    Args:
        q: (B, Hq, Lq, W), float16 or bfloat16; W is 64 or 128 and Lq a multiple of 8.
        o: (B, Hq, Lq, W).
        rest: (B, Hq, Lq, W), int8, what rounding took from o.
        do: (B, Hq, Lq, W).
        l: (B, Hq, L), float32; L is Lq in whole tiles of 64 rows, with −∞ behind Lq.
        dl: Like l, or None for zeros.
        c: (B, Hkv, W), float32, integers.
        beta: β.
        shift: Weights are scaled up by so many bits.
        interpreted: By JAX, on the CPU.
    """
    batch, heads, _, width = o.shape
    group = heads // c.shape[1]
    numbers = [l] if dl is None else [l, dl]
    asked = jnp.any(jnp.isnan(l), axis=-1).astype(jnp.int32)  # heads of which queries are looked at
    row, both = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA

    def block(q_ref: Ref, o_ref: Ref, rest_ref: Ref, do_ref: Ref, c_ref: Ref, asked_ref: Ref, *refs: Ref) -> None:
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        rows = pl.ds(lax.axis_index("tile") * ROWS, ROWS)
        *numbers, g_ref, r_ref, l2_ref = refs

        def work(o_s: Ref, rest_s: Ref, do_s: Ref, r_s: Ref, l2_s: Ref, full: Ref, q_full: Ref) -> None:
            for ref, tile in ((o_ref, o_s), (rest_ref, rest_s), (do_ref, do_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, h, rows], tile, full)
            l_t, *dl_t = (plgpu.load(ref.at[b, h, rows], layout=row, optimized=False) for ref in numbers)
            plgpu.barrier_wait(full)

            def load(tile: Ref, column: int) -> Array:
                loaded: Array = plgpu.load(tile.at[:, pl.ds(column, COLUMNS)], layout=both)
                return loaded

            def part(tile: Ref, column: int) -> Array:
                return load(tile, column).astype(jnp.float32)

            odd, total, size = part(o_s, 0) * 0.0, part(do_s, 0), jnp.abs(part(do_s, 0))
            for column in range(COLUMNS, width, COLUMNS):
                do_t = part(do_s, column)
                odd, total, size = odd + part(o_s, column) * 0.0, total + do_t, size + jnp.abs(do_t)
            odd, total, size = (x.sum(axis=1) for x in (odd, total, size))
            odd = odd + size * 0.0  # NaN in a row where something is not finite
            flows = size != 0.0
            if dl_t:
                odd, flows = odd + dl_t[0] * 0.0, flows | (dl_t[0] != 0.0)
            flows = flows & (l_t != -jnp.inf)
            live = (odd == 0.0) & (jnp.abs(l_t) < jnp.inf) & flows
            r = dl_t[0] - total * (1 / beta) if dl_t else total * (-1 / beta)
            r_s[...] = jnp.where(live, r * 2.0**-shift, 0.0)
            l2_s[...] = jnp.where(live, l_t * _LOG2E - shift, jnp.where(flows, ODD, jnp.inf))
            for column in range(0, width, COLUMNS):
                columns = pl.ds(column, COLUMNS)
                c_t = plgpu.load(c_ref.at[b, lax.div(h, group), columns], layout=plgpu.Layout.WGMMA.reduce(0),
                    optimized=False)  # fmt: skip
                o_t = joined(load(o_s, column), load(rest_s, column))
                y = jnp.minimum(jnp.maximum(o_t * (-beta * _LOG2E), -FAR), FAR)
                g = part(do_s, column) * scaled_exp2(y, -lax.broadcast_in_dim(c_t, y.shape, [1]))
                g = jnp.where(lax.broadcast_in_dim(live, y.shape, [0]), g, 0.0)
                do_s.at[:, columns][...] = g.astype(do.dtype)

            @pl.when(asked_ref[b, h] != 0)
            def _() -> None:
                plgpu.commit_smem()  # all have read their part of o before q comes in its place
                plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], o_s, q_full)
                plgpu.barrier_wait(q_full)
                odd = part(o_s, 0) * 0.0
                for column in range(COLUMNS, width, COLUMNS):
                    odd = odd + part(o_s, column) * 0.0
                l2 = plgpu.load(l2_s, layout=row, optimized=False)
                l2_s[...] = jnp.where((odd.sum(axis=1) == 0.0) | (l2 != ODD), l2, ODD_QUERY)

            plgpu.commit_smem()
            for tile, ref in ((do_s, g_ref), (r_s, r_ref), (l2_s, l2_ref)):
                plgpu.copy_smem_to_gmem(tile, ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

        tile, numbers_s = plgpu.SMEM((ROWS, width), do.dtype, transforms=LAYOUT), plgpu.SMEM((ROWS,), jnp.float32)
        pl.run_scoped(work, tile, rest_tile(ROWS, width), tile, numbers_s, numbers_s, plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier())  # fmt: skip

    g, r, l2 = plgpu.kernel(
        block,
        out_type=[jax.ShapeDtypeStruct((*l.shape, width), do.dtype), *[jax.ShapeDtypeStruct(l.shape, jnp.float32)] * 2],
        grid=(l.shape[2] // ROWS, heads, batch),
        grid_names=("tile", "head", "batch"),
        kernel_name="laser_rows",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpreted else {}),
    )(q, o, rest, do, c, asked, *numbers)
    return g, r, l2
