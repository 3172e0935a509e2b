"""The backward pass of heads inside the fast range, for Hopper GPUs: one kernel in Pallas, lowered by Mosaic GPU.

    p = 2^(s − l)    ds = p ∘ (G·Xᵀ/β + r)    dv = X ∘ (pᵀ·G)    dq = scale·ds·K    dk = scale·dsᵀ·Q

with G = do·2^(c − βo·log2e), X = 2^(βv·log2e − c) and r = dl − Σ_e do/β. A program owns a block of keys, of whose
values it makes X, and walks over the queries that see it, from the last tile to the first, so that each tile pair costs
five matrix products. dk and dv stay in registers; the program adds its part of dq to global memory when its turn comes,
block after block of keys. So every sum has one order, and the same bits come out of every run.

Of a head that may hold NaN or infinity, keys are cleaned of them in shared memory: 0·NaN is NaN. What it should reach,
dk and dv of the keys before a given one, is set to NaN at the end.
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

from .mosaic_movers import BLOCK_K, NUMBERS, SECTIONS, STAGES, WARPGROUPS, Place, Shared, Walk, add, bring
from .mosaic_rows import ODD
from .mosaic_values import exponentiated

Array: TypeAlias = jax.Array

_REGISTERS = 240, 24  # of a thread that computes and of one that moves data: 168 each are there, and more never come
_TOGETHER = 16 << 20  # bytes of q, g and dq of heads whose programs run at a time: they should stay in the L2 cache


def _kernel(
    q: Any, k: Any, v: Any, c: Any, g: Any, r: Any, l2: Any, careful: Any, reach: Any, sums: Any, dq: Any,
    dk: Any, dv: Any, *scratch: Any, walk: Walk, scale: float, beta: float, shift: int, interpreted: bool,
) -> None:  # fmt: skip
    shared, (ks, xs, dss, ps, owned, ds_full, cleaned) = Shared(*scratch[:12]), scratch[12:]
    qs, gs, rs, ls, dqs, rounded, q_full, g_full, empty, dq_full, dq_empty, _ = shared
    inverse_beta = 2.0**-shift / beta
    section, head, block, warpgroup = (lax.axis_index(name) for name in ("section", "head", "block", "warpgroup"))
    block_q = walk.block_q
    head_dim, dtype = q.shape[1], q.dtype
    n0 = block * BLOCK_K
    place = Place(walk, section, head, block, walk.tiles - walk.first(n0))
    heads_kv, each, total = place.heads_kv, place.each, place.each * walk.group
    turns = None if interpreted else pl.get_global(plgpu.SemaphoreType.REGULAR((WARPGROUPS * q.shape[0] // block_q,)))

    def compute(part: int) -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        own = pl.ds(part * 64, 64)

        def meet(barrier: Any) -> None:
            """The warpgroups see what each has written to shared memory."""
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        def accumulate(dk_acc: Any, dv_acc: Any, s_acc: Any) -> None:
            odd = careful[heads_kv] != 0
            parts = [pl.ds(column, 64) for column in range(0, v.shape[1], 64)]
            cs = [
                plgpu.load(c.at[heads_kv, part_], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                for part_ in parts
            ]
            plgpu.barrier_wait(owned)

            @pl.when(odd)
            def _clean_keys() -> None:
                for column in range(0, head_dim, 64):
                    tile = ks.at[part, :, pl.ds(column, 64)]
                    k_t = plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                    tile[...] = jnp.where(jnp.abs(k_t) < jnp.inf, k_t, 0.0).astype(dtype)
                meet(cleaned)

            end = None if walk.key_length % BLOCK_K == 0 else walk.key_length - n0 - part * 64
            for channels, c_t in zip(parts, cs, strict=True):
                v_t = plgpu.load(xs.at[part, :, channels], layout=plgpu.Layout.WGMMA)
                xs[part, :, channels] = exponentiated(v_t, c_t, beta, end)
            plgpu.commit_smem()

            def places(axis: int) -> Array:
                """Along an axis of a tile of scores."""
                return plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=plgpu.Layout.WGMMA.reduce(1 - axis))

            def along(x: Array, axis: int) -> Array:
                return lax.broadcast_in_dim(x, (64, 64), [axis])

            tile_acc = plgpu.ACC((64, 64), jnp.float32)
            halves = block_q // 64

            def far(index: Array) -> Array:
                """0, of which the compiler does not know: it works out in the loop where k and x lie."""
                return lax.shift_right_logical(index, jnp.int32(30))

            def scores(index: Array, slot: Array, half: int) -> None:
                """Begun."""
                if interpreted:  # it cannot store what an accumulator is to begin with
                    return
                s_acc[...] = plgpu.layout_cast(jnp.zeros((64, 64), jnp.float32), plgpu.Layout.WGMMA)
                plgpu.wgmma(s_acc, ks.at[part + far(index)], qs.at[slot, pl.ds(half * 64, 64)].T)

            def weights(
                half: int, index: Array, slot: Array, number: Array, tile: Array, dp_acc: Any, again: Any = s_acc
            ) -> Array:
                """dsᵀ of 64 queries, whose scores are begun; their part of dv and dk is begun."""
                columns = pl.ds(half * 64, 64)
                plgpu.wgmma(dp_acc, xs.at[part + far(index)], gs.at[slot, columns].T)
                if interpreted:
                    plgpu.wgmma(again, ks.at[part], qs.at[slot, columns].T)
                s = plgpu.wgmma_accumulator_load(again, wait_n=None if half == 0 else 1)
                l = plgpu.load(ls.at[number, columns], layout=plgpu.Layout.WGMMA.reduce(0))
                p = jnp.exp2(s * (scale * math.log2(math.e)) - along(l, 1))
                # every tile is masked: a second loop without would cost the registers that products need
                if walk.causal_offset is not None:
                    last = places(1) + (tile * block_q + (half * 64 + walk.causal_offset) - n0 - part * 64)
                    p = jnp.where(along(places(0), 0) <= along(last, 1), p, 0.0)
                if walk.key_length % BLOCK_K:
                    p = jnp.where(along(places(0), 0) < walk.key_length - n0 - part * 64, p, 0.0)
                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                if inverse_beta != 1:
                    dp *= inverse_beta
                row = plgpu.load(rs.at[slot, columns], layout=plgpu.Layout.WGMMA.reduce(0))
                ds, p = (p * (dp + along(row, 1))).astype(dtype), p.astype(dtype)
                if interpreted:
                    ps[own, :] = p
                    plgpu.commit_smem()
                plgpu.wgmma(dv_acc, ps.at[own] if interpreted else p, gs.at[slot, columns])
                if not interpreted:
                    plgpu.wgmma(dk_acc, ds, qs.at[slot, columns])
                return ds

            def closes(tile: Array) -> Array:
                """Whether no later block of keys adds to dq of a tile."""
                return jnp.bool_(False) if interpreted else walk.closing(tile) == block

            def queries(twin: Array, step: Array, tile: Array, dq_acc: Any) -> None:
                """This warpgroup's part of dq of a tile is begun, from the sum so far if it is the last part."""
                if not interpreted:

                    @pl.when(closes(tile))
                    def _() -> None:
                        plgpu.barrier_wait(dq_empty.at[part])

                        @pl.when(block > 0)
                        def _() -> None:
                            dq_acc[...] = plgpu.load(dqs.at[part], layout=plgpu.Layout.WGMMA)

                for of in range(WARPGROUPS):
                    if head_dim == 64:
                        plgpu.wgmma(dq_acc, dss.at[twin, of, :, own].T, ks.at[of + far(step)])
                    else:
                        plgpu.wgmma(dq_acc, dss.at[twin, of].T, ks.at[of + far(step), :, own])

            def hand_over(dq_part: Array, step: Array, tile: Array) -> None:
                @pl.when(~closes(tile))
                def _() -> None:
                    plgpu.barrier_wait(dq_empty.at[part])
                    dqs[part] = dq_part

                @pl.when(closes(tile))
                def _() -> None:
                    columns = pl.ds(part * 64 if head_dim == 64 else 0, 64)
                    numbers = ls.at[lax.rem(step, jnp.int32(NUMBERS)), columns]
                    l = plgpu.load(numbers, layout=plgpu.Layout.WGMMA.reduce(1))
                    factors = jnp.where((l >= ODD) & (l < jnp.inf), jnp.nan, scale)
                    rounded[part] = (dq_part * lax.broadcast_in_dim(factors, (64, 64), [0])).astype(dtype)

                plgpu.commit_smem()
                plgpu.barrier_arrive(dq_full.at[part])

            def step(index: Array, tile: Array, before: Array) -> None:
                """Of the tile at hand the scores are begun; dq of the one before is handed over."""
                slot, twin = lax.rem(index, jnp.int32(STAGES)), lax.rem(index, jnp.int32(2))
                number = lax.rem(index, jnp.int32(NUMBERS))
                plgpu.barrier_wait(g_full.at[slot])
                for half in range(halves):
                    run = functools.partial(weights, half, index, slot, number, tile)
                    ds = pl.run_scoped(run, *[tile_acc] * (1 + interpreted))
                    if half == 0:  # of the tile before, ds is complete, and of the one before that it is read
                        plgpu.barrier_wait(ds_full)
                    ds_s, q_s = dss.at[twin, part, :, pl.ds(half * 64, 64)], qs.at[slot, pl.ds(half * 64, 64)]
                    ds_s[...] = ds
                    if interpreted:
                        plgpu.commit_smem()
                        plgpu.wgmma(dk_acc, ds_s, q_s)
                    if half < halves - 1:
                        scores(index, slot, half + 1)

                def rest(dq_acc: Any) -> Array:
                    plgpu.wgmma_wait(1)  # p needs registers no longer
                    queries(1 - twin, index, before, dq_acc)
                    plgpu.wgmma_wait(WARPGROUPS)
                    plgpu.barrier_arrive(empty.at[slot])
                    following = lax.rem(index + 1, jnp.int32(STAGES))
                    plgpu.barrier_wait(q_full.at[following])
                    scores(index, following, 0)
                    return plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)

                hand_over(pl.run_scoped(rest, tile_acc), index - 1, before)
                plgpu.barrier_arrive(ds_full)
                plgpu.wgmma_wait(0)

            plgpu.barrier_arrive(ds_full)
            plgpu.barrier_wait(q_full.at[0])
            scores(jnp.int32(0), jnp.int32(0), 0)
            plgpu.wgmma_wait(0)

            @pl.loop(0, walk.group)
            def _member(member: Array) -> None:
                @pl.loop(0, each)
                def _tile(index: Array) -> None:
                    tile = walk.tiles - 1 - index
                    step(member * each + index, tile, jnp.where(index > 0, tile + 1, walk.tiles - each))

            def last(dq_acc: Any) -> Array:
                queries(lax.rem(total + 1, jnp.int32(2)), total, walk.tiles - each, dq_acc)
                return plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)

            plgpu.barrier_wait(ds_full)
            plgpu.barrier_arrive(empty.at[lax.rem(total, jnp.int32(STAGES))])
            hand_over(pl.run_scoped(last, tile_acc), total - 1, walk.tiles - each)
            before = reach[heads_kv] - n0 - part * 64
            values = plgpu.wgmma_accumulator_load(dv_acc, wait_n=0)
            plgpu.barrier_wait(dq_empty.at[part])  # every phase of a barrier is waited for
            x_tile = plgpu.load(xs.at[part], layout=plgpu.Layout.WGMMA).astype(jnp.float32)

            def times(x: Array, factor: float) -> Array:
                """NaN for keys that are to be so."""
                factors = jnp.where(places(0) < before, jnp.nan, factor)
                return x * lax.broadcast_in_dim(factors, x.shape, [0])

            xs[part] = (values * times(x_tile, 2.0**-shift)).astype(dtype)
            plgpu.barrier_arrive(ds_full)  # the other warpgroup no longer reads k
            plgpu.barrier_wait(ds_full)
            ks[part] = times(plgpu.wgmma_accumulator_load(dk_acc, wait_n=0), scale).astype(dtype)
            plgpu.commit_smem()
            rows = pl.ds(heads_kv * (walk.blocks * BLOCK_K) + n0 + part * 64, 64)
            plgpu.copy_smem_to_gmem(xs.at[part], dv.at[rows])
            plgpu.copy_smem_to_gmem(ks.at[part], dk.at[rows])
            plgpu.wait_smem_to_gmem(0)

        accs = [plgpu.ACC((64, width), jnp.float32) for width in (head_dim, v.shape[1], 64)]
        pl.run_scoped(accumulate, *accs)

    def load() -> None:
        for part in range(WARPGROUPS):
            rows = pl.ds(heads_kv * (walk.blocks * BLOCK_K) + n0 + part * 64, 64)
            plgpu.copy_gmem_to_smem(k.at[rows], ks.at[part], owned)
            plgpu.copy_gmem_to_smem(v.at[rows], xs.at[part], owned)
        bring(place, q, g, r, l2, shared)

    def store(part: int) -> None:
        add(place, sums, dq, turns, shared, part)

    for part in range(WARPGROUPS):  # each has code of its own: places in shared memory are constants in it
        pl.when(warpgroup == part)(functools.partial(compute, part))
    if interpreted:  # it runs the warps of a warpgroup one after the other
        pl.when(warpgroup == WARPGROUPS)(load)
        for part in range(WARPGROUPS):
            pl.when(warpgroup == WARPGROUPS + 1 + part)(functools.partial(store, part))
    else:

        @pl.when(warpgroup == WARPGROUPS)
        def _move() -> None:
            plgpu.set_max_registers(_REGISTERS[1], action="decrease")

            @plgpu.warp_map
            def _warps(warp: Array) -> None:
                pl.when(warp == 0)(load)
                for part in range(WARPGROUPS):
                    pl.when(warp == 1 + part)(functools.partial(store, part))


def rows(length: int, width: int) -> int:
    """A number of queries in whole tiles."""
    block = 64 if width > 64 else 128
    return pl.cdiv(length, block) * block


def _pad(a: Array, length: int) -> Array:
    """With ``length`` rows, and all rows of all heads in one axis."""
    missing = length - a.shape[2]
    if missing:
        a = jnp.pad(a, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 3))
    return a.reshape(-1, *a.shape[3:])


@functools.partial(jax.jit, static_argnames=("scale", "beta", "causal_offset", "key_length", "shift", "interpret"))
def backward(
    q: Array, k: Array, v: Array, c: Array, g: Array, r: Array, l2: Array, careful: Array, reach: Array, *,
    scale: float, beta: float = 1.0, causal_offset: int | None = None, key_length: int | None = None, shift: int = 0,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of query, key and value.

        p = 2^(scale·log2e·q·kᵀ − l2)    ds = p ∘ (g·xᵀ/β + r)    dq = scale·ds·k    dk = scale·dsᵀ·q    dv = x ∘ (pᵀ·g)

    Args:
        q: ``(B, Hq, Lq, D)``, bfloat16 or float16, D 64 or 128; finite.
        k: ``(B, Hkv, Lk, D)``; query head h belongs to head h // (Hq/Hkv) of it.
        v: ``(B, Hkv, Lk, D)``; x = 2^(βv·log2e − c), and 0 where βv is not finite.
        c: ``(B, Hkv, D)``, float32, integers.
        g: ``(B, Hq, L, D)``, do·2^(c − βo·log2e), finite. L: Lq in whole tiles, see ``rows``.
        r: ``(B, Hq, L)``, float32: (dl − Σ_e do/β)·2^−shift, finite.
        l2: ``(B, Hq, L)``, float32: log-sum-exp of the scores in base 2, minus shift; +∞ where nothing flows through
            a row, finite and at least ``ODD`` where its dq is NaN.
        careful: ``(B, Hkv)``, int32: not 0 where k may not be finite.
        reach: ``(B, Hkv)``, int32: dk and dv of keys before it are NaN.
        scale: Of the scores.
        beta: β.
        causal_offset: Query i sees the keys up to i + causal_offset; None: all keys.
        key_length: The rows of k and v behind these are padding; None: there is none.
        shift: p is held as p·2^shift.
        interpret: Parameters of the interpreter of Pallas.

    Returns:
        dq ``(B, Hq, L, D)``; dk and dv like k and v, with keys in whole tiles, summed over the query heads of a group.
    """
    batch, heads, length_q, head_dim = q.shape
    heads_kv, length_k, value_dim = v.shape[1:]
    padded_q = rows(length_q, head_dim)
    block_q = rows(1, head_dim)
    tiles, blocks = padded_q // block_q, pl.cdiv(length_k, BLOCK_K)
    together = max(2, _TOGETHER // (tiles * block_q * (6 * head_dim + 2 * value_dim)))
    span = math.gcd(batch * heads_kv, 1 << (together.bit_length() - 1))
    walk = Walk(heads // heads_kv, tiles, blocks, block_q, span, key_length or length_k, causal_offset)
    padded_k = blocks * BLOCK_K

    wide = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tile = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=wide)
    plain = functools.partial(plgpu.SMEM, dtype=jnp.float32)
    narrow = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    each = functools.partial(plgpu.Barrier, num_barriers=STAGES)
    interpreted = interpret is not None
    shared = Shared(
        q=tile((STAGES, block_q, head_dim)),
        g=tile((STAGES, block_q, value_dim)),
        r=plain((STAGES, block_q)),
        l=plain((NUMBERS, block_q)),
        dq=plain((WARPGROUPS, 64, 64), transforms=narrow),
        rounded=tile((WARPGROUPS, 64, 64)),
        q_full=each(num_arrivals=2),
        g_full=each(num_arrivals=2),
        empty=each(num_arrivals=WARPGROUPS),
        dq_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        dq_empty=plgpu.Barrier(num_barriers=WARPGROUPS),
        fetched=plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    scratch = [
        *shared,
        tile((WARPGROUPS, 64, head_dim)),
        tile((WARPGROUPS, 64, value_dim)),
        tile((2, WARPGROUPS, 64, block_q)),
        tile((BLOCK_K, 64)) if interpreted else None,
        plgpu.Barrier(num_arrivals=2 * WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
        plgpu.Barrier(num_arrivals=WARPGROUPS),
    ]
    # the interpreter knows neither turns nor sums in global memory
    room = blocks * batch * heads if interpreted else min(SECTIONS * span, batch * heads_kv) * walk.group
    kernel = plgpu.kernel(
        functools.partial(
            _kernel, walk=walk, scale=scale, beta=beta, shift=shift, interpreted=interpreted
        ),
        out_type=(
            jax.ShapeDtypeStruct((room * padded_q, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch * heads * padded_q, head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch * heads_kv * padded_k, head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch * heads_kv * padded_k, value_dim), q.dtype),
        ),
        scratch_types=scratch,
        grid=(batch * heads_kv // span, blocks, span),  # a block waits for earlier ones of its head alone
        grid_names=("section", "block", "head"),
        num_threads=WARPGROUPS + 1 + WARPGROUPS * interpreted,
        thread_name="warpgroup",
        kernel_name="laser_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip
    sums, dq, dk, dv = kernel(
        _pad(q, padded_q), _pad(k, padded_k), _pad(v, padded_k), c.reshape(-1, value_dim),
        _pad(g, padded_q), _pad(r, padded_q), _pad(l2, padded_q), careful.reshape(-1), reach.reshape(-1),
    )  # fmt: skip
    if interpreted:
        first = jax.vmap(walk.first)(jnp.arange(blocks) * BLOCK_K)
        written = (jnp.arange(tiles) >= first[:, None])[:, None, :, None, None]
        sums = jnp.where(written, sums.reshape(blocks, batch * heads, tiles, block_q, head_dim), 0.0).sum(0)
        odd = (l2 >= ODD) & (l2 < jnp.inf)
        dq = jnp.where(odd.reshape(-1, 1), jnp.nan, sums.reshape(dq.shape) * scale).astype(dq.dtype)
    dk, dv = (x.reshape(batch, heads_kv, padded_k, -1) for x in (dk, dv))
    return dq.reshape(batch, heads, padded_q, head_dim), dk, dv
