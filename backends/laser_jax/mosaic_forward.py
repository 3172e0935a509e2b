"""Forward kernel for Hopper, in Pallas (Mosaic GPU): softmax attention over x = 2^(βv·log2e − c), then a logarithm.

    o_ie = (log Σ_j p_ij x_je − log Σ_j p_ij + c_e·ln2)/β          l_i = log Σ_j exp(s_ij)

A block is a producer warpgroup, which brings tiles through the tensor memory accelerator, and two or three consumers of
64 query rows each. A consumer issues the score product of key tile j, then the product of the weights of tile j+1 with
x, and works out the weights of tile j while the latter runs. Key tiles go from the last to the first, so that the tiles
that need a mask (the diagonal and the ragged end) come first and the rest of the loop has none. There is a block for
every processor, which works on one tile of queries after another: the next one's q, k and x come while one is stored.

Device code only, in JAX 0.11 or later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_finish import of_channels, store
from .mosaic_order import Place, Work

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

ROWS = 64  # of a consumer
REGISTERS = {2: (24, 240), 3: (32, 160)}  # of the producer's threads and the consumers', by the number of these
_LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """How a problem is cut: tiles of ``block_k`` keys, ``stages`` of them in flight; consumers may take ``turns``."""

    block_k: int
    stages: int
    turns: bool
    consumers: int = 2


class Form(NamedTuple):
    """What is compiled in."""

    cut: Tiles
    query_length: int
    key_length: int  # keys beyond it are padding
    offset: int | None  # query i sees the keys ≤ i + offset; None: all
    scale: float
    beta: float
    shift: int  # weights are scaled up by so many bits
    processors: int
    keeps: bool  # what rounding takes from o
    few: int  # o of rows that see fewer keys is put between the least and the greatest value that they see
    interpreted: bool


class _State(NamedTuple):
    """Of a consumer between two key tiles."""

    o: Array  # (ROWS, E), without the tile that p belongs to
    m: Array  # (ROWS,), greatest score so far, without the scale
    l: Array  # (ROWS,)
    p: Array  # (ROWS, block_k), weights of the last tile
    odd: Array  # (ROWS,), NaN where a score was not finite, of the tiles where that is looked at


def forward(
    form: Form, q: Array, k: Array, v: Array, x: Array, c: Array, most: Array
) -> tuple[Array, Array, Array, Array | None]:
    """o in the dtype of q, the log-sum-exp, odd, and what rounding took from o in that dtype, if that is kept.

    Args:
        form: What is compiled in.
        q: (B, Hq, Lq, D), float16 or bfloat16. D and E: 64 or 128; Lq and Lk: multiples of 8.
        k: (B, Hkv, Lk, D).
        v: (B, Hkv, Lk, E).
        x: (B, Hkv, Lk, E), 2^(βv·log2e − c), finite: 0·NaN would leak.
        c: (B, Hkv, E), float32, integers.
        most: (B, Hkv, 2 or more, E), float32, the greatest −βv and the greatest βv.

    Returns:
        o (B, Hq, Lq, E); l (B, Hq, Lq or more), float32; odd (B, Hq, rows), float32, NaN somewhere if a score is not
        finite that some query sees; the remainder, int8 like o: ``mosaic_values.split``.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, _, width = x.shape[1:]
    sizes = (form.processors, form.cut.consumers * ROWS, form.cut.block_k, form.key_length, form.offset)
    work = Work(*sizes, batch * heads, heads, heads // kv_heads, pl.cdiv(rows, form.cut.consumers * ROWS))
    dtype = q.dtype

    def block(*refs: Ref) -> None:
        scratch = _scratch(form, q.shape[-1], width, dtype)
        pl.run_scoped(lambda *scoped: _block(form, work, refs, scoped), *scratch, collective_axes="wg")

    out = jax.ShapeDtypeStruct((batch, heads, rows, width), dtype)
    # a copy of one axis is not cut off where that axis ends
    lse = jax.ShapeDtypeStruct((batch, heads, work.q_tiles * form.cut.consumers * ROWS), jnp.float32)
    odd = jax.ShapeDtypeStruct((batch, heads, form.cut.consumers * ROWS), jnp.float32)
    kernel = plgpu.kernel(
        block,
        out_type=[out, lse, odd, *([jax.ShapeDtypeStruct(out.shape, jnp.int8)] * form.keeps)],
        grid=(work.blocks,),
        grid_names=("block",),
        num_threads=form.cut.consumers + 1,
        thread_name="wg",
        kernel_name="laser_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if form.interpreted else {}),
    )
    o, l, found, *rest = kernel(q, k, x, v, c, most)
    return o, l, found, rest[0] if rest else None


def _scratch(form: Form, d: int, e: int, dtype: Any) -> list[Any]:
    """Shared memory and barriers of a block."""
    cut = form.cut

    def tiles(number: int, rows: int, columns: int) -> Any:
        layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((number, rows, columns), dtype, transforms=layout)

    rest = plgpu.SMEM(
        (cut.consumers, ROWS, e), jnp.int8, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(32))
    )
    full = plgpu.Barrier(num_barriers=cut.stages)
    free = plgpu.Barrier(num_arrivals=cut.consumers, num_barriers=cut.stages)
    return [
        tiles(cut.consumers, ROWS, d),
        tiles(cut.stages, cut.block_k, d),
        tiles(cut.stages, cut.block_k, e),
        tiles(cut.consumers, ROWS, e),
        plgpu.SMEM((cut.consumers, ROWS), jnp.float32),
        plgpu.SMEM((cut.consumers, ROWS), jnp.float32),
        rest if form.keeps else None,
        tiles(cut.consumers, ROWS, cut.block_k) if form.interpreted else None,
        plgpu.Barrier(num_barriers=cut.consumers),
        plgpu.Barrier(num_barriers=cut.consumers),
        full,
        free,
        full,
        free,
        plgpu.Barrier(num_barriers=cut.consumers) if cut.turns else None,
    ]


def _block(form: Form, work: Work, refs: tuple[Ref, ...], scoped: tuple[Ref, ...]) -> None:
    q_ref, k_ref, x_ref, *known = refs[:6]
    results = refs[6:]
    q_s, k_s, x_s, o_s, l_s, odd_s, rest_s, p_s, q_full, q_free, k_full, k_free, x_full, x_free, turn = scoped
    which = lax.axis_index("wg")
    consumers = form.cut.consumers

    @pl.when(which == consumers)
    def _() -> None:
        if not form.interpreted:
            plgpu.set_max_registers(REGISTERS[consumers][0], action="decrease")
        _produce(form, work, (q_ref, k_ref, x_ref), (q_s, k_s, x_s), (q_full, q_free, k_full, k_free, x_full, x_free))

    @pl.when(which < consumers)
    def _() -> None:
        if not form.interpreted:
            plgpu.set_max_registers(REGISTERS[consumers][1], action="increase")
        own = [s if s is None else s.at[which] for s in (q_s, o_s, l_s, odd_s, rest_s, p_s)]
        tiles = _Tiles(own[0], k_s, x_s, *own[1:])
        bars = _Bars(q_full.at[which], q_free.at[which], k_full, k_free, x_full, x_free, turn)
        plgpu.barrier_arrive(bars.q_free)
        for slot in range(form.cut.stages):
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(x_free.at[slot])
        if turn is not None:
            pl.when(which == consumers - 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

        def one(index: Array, used: Array) -> Array:
            place = work.place(index)
            _consume(form, place, which, used, tiles, bars, known, results)
            return used + place.total

        lax.fori_loop(0, work.turns(), one, jnp.int32(0))
        if turn is not None:
            pl.when(which == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
        plgpu.wait_smem_to_gmem(0)


class _Tiles(NamedTuple):
    """Shared memory, of one consumer but for k and x."""

    q: Ref
    k: Ref
    x: Ref
    o: Ref
    l: Ref
    odd: Ref
    rest: Ref
    p: Ref


class _Bars(NamedTuple):
    """Barriers, of one consumer but for those of k and x; and whose turn it is to issue products."""

    q_full: Ref
    q_free: Ref
    k_full: Ref
    k_free: Ref
    x_full: Ref
    x_free: Ref
    turn: Ref


def _produce(form: Form, work: Work, sources: tuple[Ref, ...], tiles: tuple[Ref, ...], bars: tuple[Ref, ...]) -> None:
    """Bring the tiles of q, k and x as their places become free."""
    q_ref, k_ref, x_ref = sources
    q_s, k_s, x_s = tiles
    q_full, q_free, k_full, k_free, x_full, x_free = bars
    block, stages = form.cut.block_k, form.cut.stages

    def one(index: Array, used: Array) -> Array:
        place = work.place(index)
        for w in range(form.cut.consumers):
            rows = pl.ds(place.first + w * ROWS, ROWS)
            plgpu.barrier_wait(q_free.at[w])
            plgpu.copy_gmem_to_smem(q_ref.at[place.batch, place.head, rows], q_s.at[w], q_full.at[w])

        @pl.loop(0, place.total)
        def _(i: Array) -> None:
            slot = lax.rem(used + i, stages)
            keys = pl.ds((place.total - 1 - i) * block, block)
            for ref, tile, full, free in ((k_ref, k_s, k_full, k_free), (x_ref, x_s, x_full, x_free)):
                plgpu.barrier_wait(free.at[slot])
                plgpu.copy_gmem_to_smem(ref.at[place.batch, place.kv_head, keys], tile.at[slot], full.at[slot])

        return used + place.total

    used = lax.fori_loop(0, work.turns(), one, jnp.int32(0))
    for w in range(form.cut.consumers):  # every arrival is waited for
        plgpu.barrier_wait(q_free.at[w])

    @pl.loop(used, used + stages)
    def _(i: Array) -> None:
        plgpu.barrier_wait(k_free.at[lax.rem(i, stages)])
        plgpu.barrier_wait(x_free.at[lax.rem(i, stages)])


def _consume(form: Form, place: Place, which: Array, used: Array, tiles: _Tiles, bars: _Bars, known: list[Ref],
    results: list[Ref]) -> None:  # fmt: skip
    """The rows of one consumer, from the first key tile to the stored output."""
    block, stages = form.cut.block_k, form.cut.stages
    width, dtype = tiles.x.shape[-1], tiles.q.dtype
    first = place.first + which * ROWS

    def wait_turn() -> None:
        if bars.turn is not None:
            plgpu.barrier_wait(bars.turn.at[which])

    def pass_turn() -> None:
        if bars.turn is not None:
            plgpu.barrier_arrive(bars.turn.at[lax.rem(which + 1, form.cut.consumers)])

    def scores(i: Array, masked: bool, s: Array) -> Array:
        return _mask(form, s, first, (place.total - 1 - i) * block) if masked else s

    slot = lax.rem(used, stages)

    def start(s_acc: Ref) -> Array:
        plgpu.barrier_wait(bars.k_full.at[slot])
        wait_turn()
        plgpu.wgmma(s_acc, tiles.q, tiles.k.at[slot].transpose((1, 0)))
        pass_turn()
        found: Array = s_acc[...]
        return found

    plgpu.barrier_wait(bars.q_full)
    s = pl.run_scoped(start, plgpu.ACC((ROWS, block), jnp.float32))
    plgpu.barrier_arrive(bars.k_free.at[slot])
    m, zero = (
        plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1)) for x in (-jnp.inf, 0.0)
    )
    odd = lax.cond(place.asks, lambda: s.sum(axis=1) * 0.0, lambda: zero)
    ends = form.offset is not None or form.key_length % block != 0
    p, m, _ = _weights(form, scores(jnp.int32(0), ends, s), m, ends)
    o = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
    state = _State(o, m, p.sum(axis=1), p.astype(dtype), odd)

    def step(i: Array, state: _State, masked: bool, looks: bool = True) -> _State:
        slot, before = lax.rem(used + i, stages), lax.rem(used + i - 1, stages)

        def products(s_acc: Ref, o_acc: Ref) -> _State:
            plgpu.barrier_wait(bars.k_full.at[slot])
            plgpu.barrier_wait(bars.x_full.at[before])
            wait_turn()
            if not form.interpreted:
                o_acc[...] = state.o
            plgpu.wgmma(s_acc, tiles.q, tiles.k.at[slot].transpose((1, 0)))
            add = _start_values(form, o_acc, state, tiles.p, tiles.x.at[before])
            pass_turn()
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            plgpu.barrier_arrive(bars.k_free.at[slot])
            odd = state.odd + s.sum(axis=1) * 0.0 if looks else state.odd
            p, m, alpha = _weights(form, scores(i, masked, s), state.m, masked)
            l = state.l * alpha + p.sum(axis=1)
            p, m, l, alpha = lax.optimization_barrier((p, m, l, alpha))
            o = add(plgpu.wgmma_accumulator_load(o_acc, wait_n=0))
            plgpu.barrier_arrive(bars.x_free.at[before])
            o, p = lax.optimization_barrier((o, p))  # no rounding before: it would write to what the product reads
            return _State(o * lax.broadcast_in_dim(alpha, o.shape, [0]), m, l, p.astype(dtype), odd)

        accumulators = (plgpu.ACC((ROWS, block), jnp.float32), plgpu.ACC((ROWS, width), jnp.float32))
        stepped: _State = pl.run_scoped(products, *accumulators)
        return stepped

    masked = jnp.maximum(place.total - place.full, 1)
    state = lax.fori_loop(1, masked, lambda i, state: step(i, state, True), state)
    plain = jnp.where(place.asks, masked, place.total)  # a loop that looks, and one that does not and is faster
    state = lax.fori_loop(masked, plain, lambda i, state: step(i, state, False, False), state)
    state = lax.fori_loop(plain, place.total, lambda i, state: step(i, state, False), state)
    plgpu.barrier_arrive(bars.q_free)

    last = lax.rem(used + place.total - 1, stages)

    def finish(o_acc: Ref) -> tuple[Array, list[Array]]:
        plgpu.barrier_wait(bars.x_full.at[last])
        if not form.interpreted:
            o_acc[...] = state.o
        add = _start_values(form, o_acc, state, tiles.p, tiles.x.at[last])
        asked = [(known[1],), *([(known[2], 0), (known[2], 1)] if form.offset is None else [])]
        ends = [of_channels(ref, place, (ROWS, width), *at) for ref, *at in asked]  # meanwhile
        return add(o_acc[...]), ends

    attended, ends = pl.run_scoped(finish, plgpu.ACC((ROWS, width), jnp.float32))
    plgpu.barrier_arrive(bars.x_free.at[last])
    o_ref, l_ref, odd_ref, *rest_ref = results
    store(form, place, first, state._replace(o=attended), tiles, known, ends, [o_ref, l_ref, *rest_ref])

    @pl.when(place.asks)
    def _() -> None:
        plgpu.copy_smem_to_gmem(tiles.odd, odd_ref.at[place.batch, place.head, pl.ds(which * ROWS, ROWS)])


def _start_values(form: Form, o_acc: Ref, state: _State, p_s: Ref, x: Ref) -> Callable[[Array], Array]:
    """Start o + p·x; returns what makes that of the accumulator's content."""
    if not form.interpreted:
        plgpu.wgmma(o_acc, state.p, x)
        return lambda o: o
    p_s[...] = state.p  # JAX's interpreter multiplies out of shared memory alone, and starts from zero
    plgpu.commit_smem()
    plgpu.wgmma(o_acc, p_s, x)
    return lambda o: state.o + o


def _mask(form: Form, s: Array, first: Array, key: Array) -> Array:
    """Scores of the keys from ``key``, −∞ where the queries from ``first`` do not see them."""
    column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
    if form.offset is None:
        return jnp.where(column < form.key_length - key, s, -jnp.inf)
    row = plgpu.broadcasted_iota(jnp.int32, s.shape[:1], 0, layout=plgpu.Layout.WGMMA.reduce(1))
    last = jnp.minimum(row + (first + form.offset), form.key_length - 1) - key
    return jnp.where(column <= lax.broadcast_in_dim(last, s.shape, [0]), s, -jnp.inf)


def _weights(form: Form, s: Array, m: Array, masked: bool) -> tuple[Array, Array, Array]:
    """Weights of a tile, the new row maximum, and what the old sums are to be multiplied with."""
    scale = form.scale * _LOG2E
    new = jnp.maximum(m, s.max(axis=1))
    about = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
    alpha = jnp.exp2((m - about) * scale)
    p = jnp.exp2(s * scale - lax.broadcast_in_dim(about * scale - form.shift, s.shape, [0]))
    return p, new, alpha


def tiles(causal: bool, width: int) -> Tiles:
    """The tile sizes for a width: see docs/jax-log.md for what they rest on."""
    if width == 64 and not causal:
        return Tiles(128, 4, True, 3)
    return Tiles(128, 4 if width == 64 else 2, False)
