"""The exact path in Pallas (Mosaic GPU): log Σ_j exp(s_ij + βv_je) per query and channel about its own greatest term.

It writes over what the fast kernel left: heads outside the fast range whole, and those whose values hardly vary, for a
mean of rounded X can leave their range; of heads that hold NaN or infinity only what is not finite; and of all heads
the rows that see few keys, where the same can happen. A block returns at once where there is nothing of these. Device
code only, JAX 0.11 or later.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_values import rest_tile, split
from .values import BROKEN, NARROW, OUTSIDE

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

BLOCK = 64  # queries, keys and channels at a time
_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


class Form(NamedTuple):
    """What is compiled in."""

    query_length: int
    key_length: int
    offset: int | None  # query i sees the keys ≤ i + offset; None: all
    scale: float
    beta: float
    few: tuple[int, int, int]  # rows from, to, and how many keys they see at most
    interpreted: bool


def rewrite(
    form: Form, q: Array, k: Array, v: Array, odd: Array | None, flags: Array, *results: Array
) -> tuple[Array, ...]:
    """Flags, with those that ``odd`` adds, o, l and, if it is there, the remainder of o, mended.

    Args:
        form: What is compiled in.
        q: (B, Hq, Lq, W), float16 or bfloat16; W is 64 or 128, and Lq and Lk are multiples of 8.
        k: (B, Hkv, Lk, W).
        v: (B, Hkv, Lk, W).
        odd: (B, Hq, rows), float32, NaN in heads where some score is not finite; rows are a multiple of 64.
            None: the flags say all.
        flags: (B, Hq), int32.
        results: o (B, Hq, Lq, W); l (B, Hq, Lq or more), float32; the remainder, int8.
    """
    batch, heads, rows, width = q.shape
    group = heads // k.shape[1]
    tiles, parts = pl.cdiv(rows, BLOCK), width // BLOCK
    share = min(tiles * parts, max(1, pl.cdiv(512, batch * heads)))
    scratch = _scratch(width, q.dtype, len(results) > 2)

    def block(q_ref: Ref, k_ref: Ref, v_ref: Ref, flags_ref: Ref, *refs: Ref) -> None:
        odd_ref, found_ref, *results = (None, *refs) if odd is None else refs
        b, h = lax.axis_index("batch"), lax.axis_index("head")
        broken = jnp.int32(0)
        for row in range(0, 0 if odd is None else odd.shape[2], BLOCK):
            part = plgpu.load(odd_ref.at[b, h, pl.ds(row, BLOCK)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            broken |= jnp.max(jnp.where(part == part, 0.0, float(BROKEN))).astype(jnp.int32)
        found = flags_ref[b, h] | broken

        @pl.when(lax.axis_index("share") == 0)
        def _() -> None:
            found_ref[b, h] = found

        flag = found & (OUTSIDE | BROKEN | NARROW)

        @pl.loop(lax.axis_index("share"), tiles * parts, step=share)
        def _(work: Array) -> None:
            first = lax.div(work, parts) * BLOCK
            few = (first < form.few[1]) & (first + BLOCK > form.few[0])

            @pl.when((flag != 0) | few)
            def _() -> None:
                pl.run_scoped(
                    lambda *scoped: _tile(form, (b, h, lax.div(h, group)), flag, first, lax.rem(work, parts) * BLOCK,
                        (q_ref, k_ref, v_ref), results, scoped),
                    *scratch,
                )  # fmt: skip

    mesh = plgpu.Mesh(grid=(share, heads, batch), grid_names=("share", "head", "batch"))

    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if form.interpreted else {}
    parameters = plgpu.CompilerParams(approx_math=True)
    given = () if odd is None else (odd,)

    def write(written: tuple[Ref, ...]) -> None:
        pl.kernel(block, out_type=(), mesh=mesh, compiler_params=parameters, name="laser_exact", **options)(
            q, k, v, flags, *given, *written
        )

    # with references of its own: shard_map cannot resolve those of a caller
    return pl.run_state(write)((lax.empty(flags.shape, flags.dtype), *results))


def _scratch(width: int, dtype: Any, rest: bool) -> list[Any]:
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    operand = plgpu.SMEM((BLOCK, width), dtype, transforms=layout)
    part = plgpu.SMEM((BLOCK, BLOCK), dtype, transforms=layout)
    results = [part, plgpu.SMEM((BLOCK,), jnp.float32), *([rest_tile(BLOCK, BLOCK)] * rest)]
    return [operand, operand, plgpu.SMEM((BLOCK, BLOCK), dtype), plgpu.SMEM((BLOCK, BLOCK), jnp.float32),
        plgpu.Barrier(), plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=len(results)), *results]  # fmt: skip


def _tile(form: Form, at: tuple[Array, ...], flag: Array, first: Array, channel: Array, inputs: tuple[Ref, ...],
    results: tuple[Ref, ...], scoped: tuple[Ref, ...]) -> None:  # fmt: skip
    """Some rows and channels of one head."""
    q_ref, k_ref, v_ref = inputs
    q_s, k_s, v_s, s_s, q_full, kv_full, old_full, *own = scoped
    b, h, h_kv = at
    rows, channels = pl.ds(first, BLOCK), pl.ds(channel, BLOCK)
    places = [ref.at[b, h, rows] if i == 1 else ref.at[b, h, rows, channels] for i, ref in enumerate(results)]
    plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], q_s, q_full)
    for place, tile in zip(places, own, strict=True):
        plgpu.copy_gmem_to_smem(place, tile, old_full)
    plgpu.barrier_wait(q_full)

    end = jnp.int32(form.key_length)
    if form.offset is not None:
        end = jnp.clip(first + (BLOCK + form.offset), 0, end)
    end = jnp.where(flag != 0, end, jnp.minimum(end, form.few[2]))

    def keys(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        start = index * BLOCK
        plgpu.copy_gmem_to_smem(k_ref.at[b, h_kv, pl.ds(start, BLOCK)], k_s, kv_full)
        plgpu.copy_gmem_to_smem(v_ref.at[b, h_kv, pl.ds(start, BLOCK), channels], v_s, kv_full)
        plgpu.barrier_wait(kv_full)
        s_s[...] = _scores(form, q_s, k_s, first, start)
        plgpu.commit_smem()

        def key(j: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            m, l, top, acc = state
            s_j = plgpu.load(s_s.at[j], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            v_j = plgpu.load(v_s.at[j], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            m, l = _add(m, l, s_j)
            s_j = lax.broadcast_in_dim(s_j, top.shape, [0])
            t = s_j + lax.broadcast_in_dim(v_j.astype(jnp.float32) * form.beta, top.shape, [1])
            return m, l, *_add(top, acc, jnp.where(s_j == -jnp.inf, -jnp.inf, t))

        state = lax.fori_loop(0, jnp.minimum(end - start, BLOCK), key, state)
        plgpu.commit_smem()  # all have read their values before the next ones come
        return state

    def constant(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        filled: Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
        return filled

    row, both = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
    nothing = (constant((BLOCK,), -jnp.inf, row), constant((BLOCK,), 0.0, row),
        constant((BLOCK, BLOCK), -jnp.inf, both), constant((BLOCK, BLOCK), 0.0, both))  # fmt: skip
    m, l, top, acc = lax.fori_loop(0, lax.div(end + (BLOCK - 1), BLOCK), keys, nothing)
    plgpu.barrier_wait(old_full)
    _store(form, flag, first, (m, l, top, acc), own, places)


def _scores(form: Form, q_s: Ref, k_s: Ref, first: Array, start: Array) -> Array:
    """Scores of a tile (keys, queries), natural; −∞ where hidden, NaN where visible and not finite."""

    def product(acc: Ref) -> Array:
        plgpu.wgmma(acc, k_s, q_s.transpose((1, 0)))
        found: Array = acc[...]
        return found

    s = pl.run_scoped(product, plgpu.ACC((BLOCK, BLOCK), jnp.float32))
    s = jnp.where(jnp.abs(s) < jnp.inf, s * form.scale, jnp.nan)
    column, row = (plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    seen = column < form.key_length - start
    if form.offset is not None:
        seen = seen & (column - row <= first + form.offset - start)
    return jnp.where(seen, s, -jnp.inf)


def _add(top: Array, total: Array, t: Array) -> tuple[Array, Array]:
    """exp(top)·total + exp(t) as such a pair."""
    higher = jnp.maximum(top, t)
    about = jnp.where(jnp.abs(higher) == jnp.inf, 0.0, higher)
    return higher, total * jnp.exp2((top - about) * _LOG2E) + jnp.exp2((t - about) * _LOG2E)


def _store(form: Form, flag: Array, first: Array, state: tuple[Array, ...], tiles: list[Ref],
    places: list[Ref]) -> None:  # fmt: skip
    """What is to be written, over what is there."""
    m, l, top, acc = state
    o_s, l_s, *rest_s = tiles
    whole = (flag & (OUTSIDE | NARROW)) != 0
    empty = l == 0
    l = m + lax.log2(jnp.where(empty, 1.0, l)) * _LN2
    about = jnp.where(jnp.abs(top) == jnp.inf, 0.0, top)
    nothing = acc == 0
    total = jnp.where(nothing, -jnp.inf, lax.log2(jnp.where(nothing, 1.0, acc))) * _LN2
    o = (about + total - lax.broadcast_in_dim(l, acc.shape, [0])) * (1 / form.beta)
    o = jnp.where(lax.broadcast_in_dim(empty, acc.shape, [0]), 0.0, o)
    l = jnp.where(empty, -jnp.inf, l)

    # nothing that is not finite is new in a head without a flag, so that it need not be asked for here
    wanted = [jnp.where(whole, all_rows, few) - first for all_rows, few in zip((0, 2**30), form.few, strict=False)]
    row = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=plgpu.Layout.WGMMA)
    keep = (row >= wanted[0]) & (row < wanted[1])
    for tile, new in zip((o_s, *rest_s), split(o, o_s.dtype), strict=False):
        old = plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(new.dtype)
        tile[...] = jnp.where(keep, new, jnp.where(jnp.abs(o) < jnp.inf, old, new)).astype(tile.dtype)
    row = plgpu.broadcasted_iota(jnp.int32, l.shape, 0, layout=plgpu.Layout.WGMMA.reduce(1))
    old = plgpu.load(l_s, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    l_s[...] = jnp.where((row >= wanted[0]) & (row < wanted[1]), l, jnp.where(l == l, old, l))
    plgpu.commit_smem()
    for tile, place in zip(tiles, places, strict=True):
        plgpu.copy_smem_to_gmem(tile, place)
    plgpu.wait_smem_to_gmem(0)
