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
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_values import exponentiated

Array: TypeAlias = jax.Array

_WARPGROUPS = 2  # that compute; each owns 64 keys
_BLOCK_K = 64 * _WARPGROUPS
_STAGES = 2  # of q and g in shared memory
_REGISTERS = 240, 24  # of a thread that computes and of one that moves data: 168 each are there, and more never come
_TOGETHER = 16 << 20  # bytes of q, g and dq of heads whose programs run at a time: they should stay in the L2 cache


class _Walk(NamedTuple):
    """The sizes of a problem in whole tiles, and the queries that see a block of keys."""

    group: int
    tiles: int  # of queries
    blocks: int  # of keys
    block_q: int
    span: int  # heads in turn
    key_length: int  # without padding
    causal_offset: int | None

    def first(self, n0: Array) -> Array:
        """The first tile that sees some of the keys from n0 on."""
        if self.causal_offset is None:
            return jnp.int32(0)
        first = jnp.clip(lax.div(n0 - self.causal_offset, self.block_q), 0, self.tiles)
        return jnp.where(n0 == 0, 0, first)  # the first keys give every tile of dq its first value, seen or not


def _kernel(
    q: Any, k: Any, v: Any, c: Any, g: Any, r: Any, l2: Any, careful: Any, reach: Any, dq: Any, dk: Any, dv: Any,
    *scratch: Any, walk: _Walk, scale: float, beta: float, shift: int, interpreted: bool,
) -> None:  # fmt: skip
    (ks, xs, qs, gs, rs, ls, dss, dqs), ps, owned, q_full, g_full, empty, ds_full, dq_full, dq_empty, cleaned = scratch
    inverse_beta = 2.0**-shift / beta
    heads_kv = lax.axis_index("section") * walk.span + lax.axis_index("head")
    block = lax.axis_index("block")
    warpgroup = lax.axis_index("warpgroup")
    block_q = walk.block_q
    head_dim, dtype = q.shape[1], q.dtype
    n0 = block * _BLOCK_K
    key_rows = pl.ds(heads_kv * (walk.blocks * _BLOCK_K) + n0, _BLOCK_K)
    each = walk.tiles - walk.first(n0)  # tiles of each query head
    total = each * walk.group
    rows_q = q.shape[0]
    turns = None if interpreted else pl.get_global(plgpu.SemaphoreType.REGULAR((rows_q // block_q,)))

    def tile_of(step: Array) -> Array:
        """The tile of a step, among those of all heads."""
        member = lax.div(step, each)
        return (heads_kv * walk.group + member + 1) * walk.tiles - 1 - (step - member * each)

    def compute(part: int) -> None:
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        own = pl.ds(part * 64, 64)

        def meet(barrier: Any) -> None:
            """The warpgroups see what each has written to shared memory."""
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        def accumulate(dk_acc: Any, dv_acc: Any) -> None:
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
                    tile = ks.at[own, pl.ds(column, 64)]
                    k_t = plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                    tile[...] = jnp.where(jnp.abs(k_t) < jnp.inf, k_t, 0.0).astype(dtype)
                meet(cleaned)

            end = None if walk.key_length % _BLOCK_K == 0 else walk.key_length - n0 - part * 64
            for channels, c_t in zip(parts, cs, strict=True):
                v_t = plgpu.load(xs.at[own, channels], layout=plgpu.Layout.WGMMA)
                xs[own, channels] = exponentiated(v_t, c_t, beta, end)
            plgpu.commit_smem()

            def places(axis: int) -> Array:
                """Along an axis of a tile of scores."""
                return plgpu.broadcasted_iota(jnp.int32, (64,), 0, layout=plgpu.Layout.WGMMA.reduce(1 - axis))

            def along(x: Array, axis: int) -> Array:
                return lax.broadcast_in_dim(x, (64, 64), [axis])

            def step(index: Array, tile: Array) -> None:
                slot, twin = lax.rem(index, jnp.int32(_STAGES)), lax.rem(index, jnp.int32(2))
                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_wait(g_full.at[slot])

                def weights(half: int, s_acc: Any, dp_acc: Any) -> Array:
                    """dsᵀ of 64 queries; their part of dv is begun."""
                    columns = pl.ds(half * 64, 64)
                    plgpu.wgmma(s_acc, ks.at[own], qs.at[slot, columns].T)
                    plgpu.wgmma(dp_acc, xs.at[own], gs.at[slot, columns].T)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    if half == 0:  # dk of the tile before is complete

                        @pl.when(index > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(empty.at[lax.rem(index + (_STAGES - 1), jnp.int32(_STAGES))])

                    l = plgpu.load(ls.at[slot, columns], layout=plgpu.Layout.WGMMA.reduce(0))
                    p = jnp.exp2(s * (scale * math.log2(math.e)) - along(l, 1))
                    # every tile is masked: a second loop without would cost the registers that products need
                    if walk.causal_offset is not None:
                        last = places(1) + (tile * block_q + (half * 64 + walk.causal_offset) - n0 - part * 64)
                        p = jnp.where(along(places(0), 0) <= along(last, 1), p, 0.0)
                    if walk.key_length % _BLOCK_K:
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
                    dss[twin, own, columns] = ds
                    return ds

                def keys(half: int, ds: Array) -> None:
                    columns = pl.ds(half * 64, 64)
                    plgpu.wgmma(dk_acc, dss.at[twin, own, columns] if interpreted else ds, qs.at[slot, columns])

                halves = block_q // 64
                tile_acc = plgpu.ACC((64, 64), jnp.float32)
                for half in range(halves):
                    ds = pl.run_scoped(functools.partial(weights, half), tile_acc, tile_acc)
                    if half < halves - 1:
                        if interpreted:
                            plgpu.commit_smem()
                        keys(half, ds)
                meet(ds_full)

                def queries(dq_acc: Any) -> Array:
                    """This warpgroup's part of dq, while dk is still being computed."""
                    if head_dim == 64:
                        plgpu.wgmma(dq_acc, dss.at[twin, :, own].T, ks)
                    else:
                        plgpu.wgmma(dq_acc, dss.at[twin].T, ks.at[:, own])
                    keys(halves - 1, ds)
                    return plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)

                dq_part = pl.run_scoped(queries, tile_acc)
                plgpu.barrier_wait(dq_empty)
                dqs[part] = dq_part
                plgpu.commit_smem()
                plgpu.barrier_arrive(dq_full)

            @pl.loop(0, walk.group)
            def _member(member: Array) -> None:
                @pl.loop(0, each)
                def _tile(index: Array) -> None:
                    step(member * each + index, walk.tiles - 1 - index)

            before = reach[heads_kv] - n0 - part * 64
            values = plgpu.wgmma_accumulator_load(dv_acc, wait_n=0)

            @pl.when(total > 0)
            def _() -> None:
                plgpu.barrier_arrive(empty.at[lax.rem(total + (_STAGES - 1), jnp.int32(_STAGES))])

            plgpu.barrier_wait(dq_empty)  # every phase of a barrier is waited for
            x_tile = plgpu.load(xs.at[own], layout=plgpu.Layout.WGMMA).astype(jnp.float32)

            def times(x: Array, factor: float) -> Array:
                """NaN for keys that are to be so."""
                factors = jnp.where(places(0) < before, jnp.nan, factor)
                return x * lax.broadcast_in_dim(factors, x.shape, [0])

            xs[own, :] = (values * times(x_tile, 2.0**-shift)).astype(dtype)
            plgpu.barrier_arrive(ds_full)  # the other warpgroup no longer reads k
            plgpu.barrier_wait(ds_full)
            ks[own, :] = times(plgpu.wgmma_accumulator_load(dk_acc, wait_n=0), scale).astype(dtype)
            plgpu.commit_smem()
            rows = pl.ds(heads_kv * (walk.blocks * _BLOCK_K) + n0 + part * 64, 64)
            plgpu.copy_smem_to_gmem(xs.at[own], dv.at[rows])
            plgpu.copy_smem_to_gmem(ks.at[own], dk.at[rows])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(accumulate, plgpu.ACC((64, head_dim), jnp.float32), plgpu.ACC((64, v.shape[1]), jnp.float32))

    def load() -> None:
        plgpu.copy_gmem_to_smem(k.at[key_rows], ks, owned)
        plgpu.copy_gmem_to_smem(v.at[key_rows], xs, owned)

        @pl.loop(0, total)
        def _tile(step: Array) -> None:
            slot = lax.rem(step, jnp.int32(_STAGES))

            @pl.when(step >= _STAGES)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            rows = pl.ds(tile_of(step) * block_q, block_q)
            plgpu.copy_gmem_to_smem(q.at[rows], qs.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(l2.at[rows], ls.at[slot], q_full.at[slot])
            plgpu.copy_gmem_to_smem(g.at[rows], gs.at[slot], g_full.at[slot])
            plgpu.copy_gmem_to_smem(r.at[rows], rs.at[slot], g_full.at[slot])

        @pl.loop(jnp.maximum(total - _STAGES, 0), total)
        def _drain(step: Array) -> None:
            plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(_STAGES))])

    def store() -> None:
        plgpu.barrier_arrive(dq_empty)

        @pl.loop(0, total)
        def _tile(step: Array) -> None:
            tile = tile_of(step)
            plgpu.barrier_wait(dq_full)
            row = tile * block_q
            if interpreted:
                row += block * rows_q
            else:
                plgpu.semaphore_wait(turns.at[tile], block, decrement=False, memory_scope="gpu")
            places = [
                dq.at[pl.ds(row + part * 64, 64)] if head_dim == 64 else dq.at[pl.ds(row, 64), pl.ds(part * 64, 64)]
                for part in range(_WARPGROUPS)
            ]

            @pl.when((block == 0) | interpreted)
            def _first() -> None:
                for part, place in enumerate(places):
                    plgpu.copy_smem_to_gmem(dqs.at[part], place)

            if not interpreted:

                @pl.when(block > 0)
                def _next() -> None:
                    for part, place in enumerate(places):
                        plgpu.copy_smem_to_gmem(dqs.at[part], place, reduction_op="add")

            plgpu.wait_smem_to_gmem(0)
            if not interpreted:
                plgpu.semaphore_signal(turns.at[tile], 1, memory_scope="gpu")
            plgpu.barrier_arrive(dq_empty)

    for part in range(_WARPGROUPS):  # each has code of its own: places in shared memory are constants in it
        pl.when(warpgroup == part)(functools.partial(compute, part))
    if interpreted:  # it runs the warps of a warpgroup one after the other
        pl.when(warpgroup == _WARPGROUPS)(load)
        pl.when(warpgroup == _WARPGROUPS + 1)(store)
    else:

        @pl.when(warpgroup == _WARPGROUPS)
        def _move() -> None:
            plgpu.set_max_registers(_REGISTERS[1], action="decrease")

            @plgpu.warp_map
            def _warps(warp: Array) -> None:
                pl.when(warp == 0)(load)
                pl.when(warp == 1)(store)


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
    """Gradients of query, key and value; that of query in float32, still without the scale.

        p = 2^(scale·log2e·q·kᵀ − l2)    ds = p ∘ (g·xᵀ/β + r)    dq = ds·k    dk = scale·dsᵀ·q    dv = x ∘ (pᵀ·g)

    Args:
        q: ``(B, Hq, Lq, D)``, bfloat16 or float16, D 64 or 128; finite.
        k: ``(B, Hkv, Lk, D)``; query head h belongs to head h // (Hq/Hkv) of it.
        v: ``(B, Hkv, Lk, D)``; x = 2^(βv·log2e − c), and 0 where βv is not finite.
        c: ``(B, Hkv, D)``, float32, integers.
        g: ``(B, Hq, L, D)``, do·2^(c − βo·log2e), finite. L: Lq in whole tiles, see ``rows``.
        r: ``(B, Hq, L)``, float32: (dl − Σ_e do/β)·2^−shift, finite.
        l2: ``(B, Hq, L)``, float32: log-sum-exp of the scores in base 2, minus shift; +∞ or huge where nothing flows
            through a row.
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
    tiles, blocks = padded_q // block_q, pl.cdiv(length_k, _BLOCK_K)
    room = _TOGETHER * (2 if causal_offset is not None and head_dim == 64 else 1)  # as measured
    together = max(2, room // (tiles * block_q * (6 * head_dim + 2 * value_dim)))
    span = math.gcd(batch * heads_kv, 1 << (together.bit_length() - 1))
    walk = _Walk(heads // heads_kv, tiles, blocks, block_q, span, key_length or length_k, causal_offset)
    padded_k = blocks * _BLOCK_K

    wide = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tile = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=wide)
    scratch = [
        [
            tile((_BLOCK_K, head_dim)),
            tile((_BLOCK_K, value_dim)),
            tile((_STAGES, block_q, head_dim)),
            tile((_STAGES, block_q, value_dim)),
            plgpu.SMEM((_STAGES, block_q), jnp.float32),
            plgpu.SMEM((_STAGES, block_q), jnp.float32),
            tile((2, _BLOCK_K, block_q)),
            plgpu.SMEM(
                (_WARPGROUPS, 64, 64), jnp.float32,
                transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
            ),
        ],
        tile((_BLOCK_K, 64)) if interpret is not None else None,
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        plgpu.Barrier(num_arrivals=_WARPGROUPS),
        plgpu.Barrier(num_arrivals=_WARPGROUPS),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=_WARPGROUPS),
    ]  # fmt: skip
    parts = 1 if interpret is None else blocks  # the interpreter knows neither turns nor sums in global memory
    kernel = plgpu.kernel(
        functools.partial(
            _kernel, walk=walk, scale=scale, beta=beta, shift=shift, interpreted=interpret is not None
        ),
        out_type=(
            jax.ShapeDtypeStruct((parts * batch * heads * padded_q, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch * heads_kv * padded_k, head_dim), q.dtype),
            jax.ShapeDtypeStruct((batch * heads_kv * padded_k, value_dim), q.dtype),
        ),
        scratch_types=scratch,
        grid=(batch * heads_kv // span, blocks, span),  # a block waits for earlier ones of its head alone
        grid_names=("section", "block", "head"),
        num_threads=_WARPGROUPS + (1 if interpret is None else 2),
        thread_name="warpgroup",
        kernel_name="laser_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )  # fmt: skip
    dq, dk, dv = kernel(
        _pad(q, padded_q), _pad(k, padded_k), _pad(v, padded_k), c.reshape(-1, value_dim),
        _pad(g, padded_q), _pad(r, padded_q), _pad(l2, padded_q), careful.reshape(-1), reach.reshape(-1),
    )  # fmt: skip
    if interpret is not None:
        first = jax.vmap(walk.first)(jnp.arange(blocks) * _BLOCK_K)
        written = (jnp.arange(tiles) >= first[:, None])[:, None, :, None, None]
        dq = jnp.where(written, dq.reshape(blocks, batch * heads, tiles, block_q, head_dim), 0.0).sum(0)
    dk, dv = (x.reshape(batch, heads_kv, padded_k, -1) for x in (dk, dv))
    return dq.reshape(batch, heads, padded_q, head_dim), dk, dv
