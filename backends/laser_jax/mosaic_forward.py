"""Forward kernel for Hopper, in Pallas (Mosaic GPU): softmax attention over x = 2^(βv·log2e − c), then a logarithm.

    o_ie = (log Σ_j p_ij x_je − log Σ_j p_ij + c_e·ln2)/β          l_i = log Σ_j exp(s_ij)

A block is a producer warpgroup, which brings tiles through the tensor memory accelerator, and two consumers of 64 query
rows each. A consumer issues the score product of key tile j, then the product of the weights of tile j+1 with x, and
works out the weights of tile j while the latter runs. Key tiles go from the last to the first, so that the tiles that
need a mask (the diagonal and the ragged end) come first and the rest of the loop has none.

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

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

ROWS = 64  # of a consumer
CONSUMERS = 2
_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


class Tiles(NamedTuple):
    """How a problem is cut: tiles of ``block_k`` keys, ``stages`` of them in flight; consumers may take ``turns``."""

    block_k: int
    stages: int
    turns: bool


class Form(NamedTuple):
    """What is compiled in."""

    cut: Tiles
    query_length: int
    key_length: int  # keys beyond it are padding
    offset: int | None  # query i sees the keys ≤ i + offset; None: all
    scale: float
    beta: float
    shift: int  # weights are scaled up by so many bits
    interpreted: bool


class _Place(NamedTuple):
    """Where a block works."""

    batch: Array
    head: Array
    kv_head: Array
    first: Array  # query row
    total: Array  # key tiles seen by some row of the block; at least one is worked on
    full: Array  # of these, the first so many need no mask


class _State(NamedTuple):
    """Of a consumer between two key tiles."""

    o: Array  # (ROWS, E), without the tile that p belongs to
    m: Array  # (ROWS,), greatest score so far, without the scale
    l: Array  # (ROWS,)
    p: Array  # (ROWS, block_k), weights of the last tile


def forward(form: Form, q: Array, k: Array, x: Array, c: Array) -> tuple[Array, Array, Array]:
    """o in the dtype of q, what rounding took from it in that dtype, and the log-sum-exp.

    Args:
        form: What is compiled in.
        q: (B, Hq, Lq, D), float16 or bfloat16. D and E: 64 or 128; Lq and Lk: multiples of 8.
        k: (B, Hkv, Lk, D).
        x: (B, Hkv, Lk, E), 2^(βv·log2e − c), finite: 0·NaN would leak.
        c: (B, Hkv, E), float32, integers.

    Returns:
        o and its remainder, (B, Hq, Lq, E); l (B, Hq, Lq), float32.
    """
    batch, heads, rows, _ = q.shape
    kv_heads, keys, width = x.shape[1:]
    q_tiles = pl.cdiv(rows, CONSUMERS * ROWS)
    group = heads // kv_heads
    cut, dtype = form.cut, q.dtype

    def block(*refs: Ref) -> None:
        pl.run_scoped(lambda *scoped: _block(form, group, _place(form, q_tiles, heads, group), refs, scoped),
            *_scratch(form, q.shape[-1], width, dtype), collective_axes="wg")  # fmt: skip

    kernel = plgpu.kernel(
        block,
        out_type=[
            jax.ShapeDtypeStruct((batch, heads, rows, width), dtype),
            jax.ShapeDtypeStruct((batch, heads, rows, width), dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        grid=(batch * heads * q_tiles,),
        grid_names=("tile",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if form.interpreted else {}),
    )
    o, rest, l = kernel(q, k, x, c)
    return o, rest, l


def _scratch(form: Form, d: int, e: int, dtype: Any) -> list[Any]:
    """Shared memory and barriers of a block."""
    cut = form.cut

    def tiles(number: int, rows: int, columns: int) -> Any:
        layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((number, rows, columns), dtype, transforms=layout)

    full = plgpu.Barrier(num_barriers=cut.stages)
    free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=cut.stages)
    return [
        tiles(CONSUMERS, ROWS, d),
        tiles(cut.stages, cut.block_k, d),
        tiles(cut.stages, cut.block_k, e),
        tiles(CONSUMERS, ROWS, e),
        plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        tiles(CONSUMERS, ROWS, cut.block_k) if form.interpreted else None,
        plgpu.Barrier(num_barriers=CONSUMERS),
        full,
        free,
        full,
        free,
        plgpu.Barrier(num_barriers=CONSUMERS) if cut.turns else None,
    ]


def _place(form: Form, q_tiles: int, heads: int, group: int) -> _Place:
    """The block's share: heavy tiles first where they differ, and heads that share keys side by side."""
    index = lax.axis_index("tile")
    if form.offset is None:
        head, tile = lax.div(index, q_tiles), lax.rem(index, q_tiles)
    else:
        everything = lax.axis_size("tile") // q_tiles
        tile, head = q_tiles - 1 - lax.div(index, everything), lax.rem(index, everything)
    first = tile * (CONSUMERS * ROWS)
    block = form.cut.block_k
    total, full = jnp.int32(pl.cdiv(form.key_length, block)), jnp.int32(form.key_length // block)
    if form.offset is not None:
        last = first + (CONSUMERS * ROWS + form.offset)  # one beyond what the last row sees
        total = jnp.maximum(jnp.minimum(total, lax.div(jnp.maximum(last, 0) + (block - 1), block)), 1)
        full = jnp.minimum(full, lax.div(jnp.maximum(first + form.offset + 1, 0), block))
    b, h = lax.div(head, heads), lax.rem(head, heads)
    return _Place(b, h, lax.div(h, group), first, total, full)


def _block(form: Form, group: int, place: _Place, refs: tuple[Ref, ...], scoped: tuple[Ref, ...]) -> None:
    q_ref, k_ref, x_ref, c_ref, o_ref, rest_ref, l_ref = refs
    q_s, k_s, x_s, o_s, l_s, p_s, q_full, k_full, k_free, x_full, x_free, turn = scoped
    which = lax.axis_index("wg")

    @pl.when(which == CONSUMERS)
    def _() -> None:
        if not form.interpreted:
            plgpu.set_max_registers(24, action="decrease")
        _produce(form, place, (q_ref, k_ref, x_ref), (q_s, k_s, x_s), (q_full, k_full, k_free, x_full, x_free))

    @pl.when(which < CONSUMERS)
    def _() -> None:
        if not form.interpreted:
            plgpu.set_max_registers(240, action="increase")
        q, o, l = q_s.at[which], o_s.at[which], l_s.at[which]
        p = None if p_s is None else p_s.at[which]
        plgpu.barrier_wait(q_full.at[which])
        _consume(form, place, which, (q, k_s, x_s, o, l, p), c_ref, (o_ref, rest_ref, l_ref),
            (k_full, k_free, x_full, x_free, turn))  # fmt: skip


def _produce(
    form: Form, place: _Place, sources: tuple[Ref, ...], tiles: tuple[Ref, ...], bars: tuple[Ref, ...]
) -> None:
    """Bring the tiles of q, then those of k and x as they become free."""
    q_ref, k_ref, x_ref = sources
    q_s, k_s, x_s = tiles
    q_full, k_full, k_free, x_full, x_free = bars
    block, stages = form.cut.block_k, form.cut.stages
    for w in range(CONSUMERS):
        rows = pl.ds(place.first + w * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[place.batch, place.head, rows], q_s.at[w], q_full.at[w])

    def bring(i: Array, wait: bool) -> None:
        slot = lax.rem(i, stages)
        keys = pl.ds((place.total - 1 - i) * block, block)
        for ref, tile, full, free in ((k_ref, k_s, k_full, k_free), (x_ref, x_s, x_full, x_free)):
            if wait:
                plgpu.barrier_wait(free.at[slot])
            source = ref.at[place.batch, place.kv_head, keys]
            plgpu.copy_gmem_to_smem(source, tile.at[slot], full.at[slot], oob_mode=plgpu.OOBFillMode.ZEROS)

    filled = jnp.minimum(place.total, stages)
    pl.loop(0, filled)(lambda i: bring(i, False))
    pl.loop(filled, place.total)(lambda i: bring(i, True))

    @pl.loop(place.total - filled, place.total)
    def _(i: Array) -> None:  # every arrival is waited for
        slot = lax.rem(i, stages)
        plgpu.barrier_wait(k_free.at[slot])
        plgpu.barrier_wait(x_free.at[slot])


def _consume(form: Form, place: _Place, which: Array, tiles: tuple[Ref, ...], c_ref: Ref, results: tuple[Ref, ...],
    bars: tuple[Ref, ...]) -> None:  # fmt: skip
    """The rows of one consumer, from the first key tile to the stored output."""
    q_s, k_s, x_s, o_s, l_s, p_s = tiles
    k_full, k_free, x_full, x_free, turn = bars
    block, stages = form.cut.block_k, form.cut.stages
    width = x_s.shape[-1]
    first = place.first + which * ROWS

    def wait_turn() -> None:
        if turn is not None:
            plgpu.barrier_wait(turn.at[which])

    def pass_turn() -> None:
        if turn is not None:
            plgpu.barrier_arrive(turn.at[1 - which])

    def scores(i: Array, masked: bool, s: Array) -> Array:
        return _mask(form, s, first, (place.total - 1 - i) * block) if masked else s

    if turn is not None:
        pl.when(which == 1)(pass_turn)
    zero = jnp.int32(0)

    def start(s_acc: Ref) -> Array:
        plgpu.barrier_wait(k_full.at[zero])
        wait_turn()
        plgpu.wgmma(s_acc, q_s, k_s.at[zero].transpose((1, 0)))
        pass_turn()
        return s_acc[...]

    s = pl.run_scoped(start, plgpu.ACC((ROWS, block), jnp.float32))
    plgpu.barrier_arrive(k_free.at[zero])
    s = scores(zero, True, s)
    m = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    p, m, _ = _weights(form, s, m, True)
    o = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
    state = _State(o, m, p.sum(axis=1), p.astype(q_s.dtype))

    def step(i: Array, state: _State, masked: bool) -> _State:
        slot, before = lax.rem(i, stages), lax.rem(i - 1, stages)

        def products(s_acc: Ref, o_acc: Ref) -> _State:
            plgpu.barrier_wait(k_full.at[slot])
            plgpu.barrier_wait(x_full.at[before])
            wait_turn()
            if not form.interpreted:
                o_acc[...] = state.o
            plgpu.wgmma(s_acc, q_s, k_s.at[slot].transpose((1, 0)))
            add = _start_values(form, o_acc, state, p_s, x_s.at[before])
            pass_turn()
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            plgpu.barrier_arrive(k_free.at[slot])
            p, m, alpha = _weights(form, scores(i, masked, s), state.m, masked)
            l = state.l * alpha + p.sum(axis=1)
            p, m, l, alpha = lax.optimization_barrier((p, m, l, alpha))
            o = add(plgpu.wgmma_accumulator_load(o_acc, wait_n=0))
            plgpu.barrier_arrive(x_free.at[before])
            o, p = lax.optimization_barrier((o, p))  # no rounding before: it would write to what the product reads
            return _State(o * lax.broadcast_in_dim(alpha, o.shape, [0]), m, l, p.astype(q_s.dtype))

        accumulators = (plgpu.ACC((ROWS, block), jnp.float32), plgpu.ACC((ROWS, width), jnp.float32))
        return pl.run_scoped(products, *accumulators)

    masked = jnp.maximum(place.total - place.full, 1)
    state = lax.fori_loop(1, masked, lambda i, state: step(i, state, True), state)
    state = lax.fori_loop(masked, place.total, lambda i, state: step(i, state, False), state)
    if turn is not None:
        pl.when(which == 0)(wait_turn)

    last = lax.rem(place.total - 1, stages)

    def finish(o_acc: Ref) -> Array:
        plgpu.barrier_wait(x_full.at[last])
        if not form.interpreted:
            o_acc[...] = state.o
        return _start_values(form, o_acc, state, p_s, x_s.at[last])(o_acc[...])

    attended = pl.run_scoped(finish, plgpu.ACC((ROWS, width), jnp.float32))
    plgpu.barrier_arrive(x_free.at[last])
    _store(form, place, first, state._replace(o=attended), (q_s, o_s, l_s), c_ref, results)


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
    seen = column < form.key_length - key
    if form.offset is not None:
        row = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=plgpu.Layout.WGMMA)
        seen = seen & (column - row <= first + form.offset - key)
    return jnp.where(seen, s, -jnp.inf)


def _weights(form: Form, s: Array, m: Array, masked: bool) -> tuple[Array, Array, Array]:
    """Weights of a tile, the new row maximum, and what the old sums are to be multiplied with."""
    scale = form.scale * _LOG2E
    new = jnp.maximum(m, s.max(axis=1))
    about = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
    alpha = jnp.exp2((m - about) * scale)
    p = jnp.exp2(s * scale - lax.broadcast_in_dim(about * scale - form.shift, s.shape, [0]))
    return p, new, alpha


def _log_parts(a: Array) -> tuple[Array, Array]:
    """log2 of a normal number > 0 as an integer and the rest: a power of two changes only the integer."""
    bits = lax.bitcast_convert_type(a, jnp.int32)
    mantissa = lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F800000, jnp.float32)
    return (lax.shift_right_logical(bits, 23) - 127).astype(jnp.float32), lax.log2(mantissa)


def _store(form: Form, place: _Place, first: Array, state: _State, tiles: tuple[Ref, ...], c_ref: Ref,
    results: tuple[Ref, ...]) -> None:  # fmt: skip
    """The end of a tile of queries: the logarithms, and out."""
    rest_s, o_s, l_s = tiles
    o_ref, rest_ref, l_ref = results
    shape = state.o.shape
    row = plgpu.broadcasted_iota(jnp.int32, (shape[0], 8), 0, layout=plgpu.Layout.WGMMA).max(axis=1) + first
    del row
    sees = state.l > 0
    l = jnp.where(sees, state.l, 1.0)
    l_whole, l_rest = _log_parts(l)
    l_s[...] = jnp.where(sees, (state.m * (form.scale * _LOG2E) + (l_whole - form.shift + l_rest)) * _LN2, -jnp.inf)
    c = plgpu.load(c_ref.at[place.batch, place.kv_head], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    whole, rest = _log_parts(state.o)
    whole = whole - lax.broadcast_in_dim(l_whole, shape, [0]) + lax.broadcast_in_dim(c, shape, [1])
    rest = rest - lax.broadcast_in_dim(l_rest, shape, [0])
    o = (whole + rest) * (_LN2 / form.beta)
    o = jnp.where(lax.broadcast_in_dim(sees, shape, [0]), o, 0.0)
    rounded = o.astype(o_s.dtype)
    o_s[...] = rounded
    rest_s[...] = (o - rounded.astype(jnp.float32)).astype(o_s.dtype)
    plgpu.commit_smem()
    at = (place.batch, place.head, pl.ds(first, ROWS))
    plgpu.copy_smem_to_gmem(o_s, o_ref.at[at])
    plgpu.copy_smem_to_gmem(rest_s, rest_ref.at[at])
    plgpu.copy_smem_to_gmem(l_s, l_ref.at[at])
    plgpu.wait_smem_to_gmem(0)


def tiles(causal: bool, width: int) -> Tiles:
    """The tile sizes for a width: see docs/jax-log.md for what they rest on."""
    del causal
    return Tiles(128, 4 if width == 64 else 2, False)
