"""Backward kernel for Hopper (sm_90a), in Gluon: five matrix products per tile, and the same bits every time.

    p = 2^(s − l)    ds = p ∘ (G·Xᵀ/β + r)    dv = X ∘ (pᵀ·G)    dk = scale·dsᵀ·Q    dq = scale·ds·K

A program owns 128 keys, 64 for each of its two warpgroups, which work out X from v where it lies in shared memory, and
walks over the queries in tiles of 64; dk and dv stay in registers. What a tile adds to dq goes through shared memory to
a warp of its own, the adder, which has the tensor memory accelerator add it to a float32 array. The last key tile of a
query tile gets the sum so far instead, and gives dq rounded. dv and dk go to the adder too: stored from the registers,
a piece of work would take longer by several tiles.

The order of these additions is fixed: a query tile takes the parts of its key tiles from the first to the last, and
counts them (``turns``). So a key tile waits for none but earlier ones of the same head, and the first one for a head of
an earlier section, whose place among the sums it takes. Work is drawn from a counter, earlier key tiles of a head
before later ones, and a program finishes what it has drawn before it draws again: of the
key tiles drawn and not finished, the one that was drawn first waits for nobody, whatever the number of programs that
run at a time. Hence there is no deadlock. All walk over the queries from the last to the first, so that they follow one
another at a distance of one step, and with a causal mask the shortest walks come last.

Device code only: nothing of the host is imported here.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, valid-type, operator, untyped-decorator, no-redef"
# ruff: noqa: RUF005, SIM114

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_movers import ADDERS, KEYS, ROWS, adder, first_queries, follow, place_of_dv, producer, stay_open


@gluon.jit
def _flat(tile):
    """A tile as a matrix."""
    rows: gl.constexpr = tile.shape[2]
    width: gl.constexpr = tile.shape[3]
    return tile._reinterpret(tile.dtype, [rows, width], gl.NVMMASharedLayout(tile.layout.swizzle_byte_width, 16, 2))


@gluon.jit
def _half(tile, WHICH: gl.constexpr):
    """Half of the columns of a tile: it lies in shared memory as panels of as many columns as are swizzled."""
    rows: gl.constexpr = tile.shape[len(tile.shape) - 2]
    width: gl.constexpr = tile.shape[len(tile.shape) - 1]
    layout: gl.constexpr = gl.NVMMASharedLayout(tile.layout.swizzle_byte_width, 16, 2)
    return tile._reinterpret(tile.dtype, [2, rows, width // 2], layout).index(WHICH)


@gluon.jit
def _clean(tile):
    """Zero what is not finite: where a pair is hidden, ds is 0, and 0·NaN would be NaN.

    A tile of queries is cleaned by both warpgroups, each before its first use, without a word to the other: what one
    writes the other has written, or will. That is what racecheck finds in these lines.
    """
    D: gl.constexpr = tile.shape[3]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    matrix = _flat(tile)
    a = matrix.load(layout)
    matrix.store(gl.where(gl.abs(a.to(gl.float32)) < float("inf"), a, 0.0).to(tile.dtype))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _exponentiate(tile, c_ptr, y_scale, there):
    """x in the place of v: the bits of ``triton_values.near_exp2``, times 2^−c; zero where v is not finite or no row.

    The values of a head inside the fast range leave no exponent beyond that of float32.
    """
    D: gl.constexpr = tile.shape[3]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    matrix = _flat(tile)
    v = matrix.load(layout).to(gl.float32)
    c = gl.load(c_ptr + gl.arange(0, D, layout=gl.SliceLayout(0, layout)))
    magic = gl.full(v.shape, 12582912.0, gl.float32, layout)  # 1.5·2^23: the lowest bits of a sum show its integer
    scale = gl.full(v.shape, y_scale, gl.float32, layout)
    t = gl.fma(v, scale, magic)
    power = gl.exp2(gl.fma(v, scale, magic - t)).to(gl.int32, bitcast=True)
    x = (power + ((t.to(gl.int32, bitcast=True) - gl.expand_dims(c, 0)) << 23)).to(gl.float32, bitcast=True)
    row = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), 1)
    x = gl.where((gl.abs(v) < float("inf")) & (row < there), x, 0.0)
    matrix.store(x.to(tile.dtype))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _zero():
    """0, of which the compiler does not know: what rests on it is worked out where it stands, not ahead of a loop."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _row(rows_s, stage, WHICH: gl.constexpr, layout: gl.constexpr):
    """Row 0 or 1 of what came with a tile of queries, in every row of a tile."""
    width: gl.constexpr = rows_s.shape[3]
    rows = rows_s.index(stage)._reinterpret(gl.float32, [2, width], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return gl.expand_dims(rows.index(WHICH).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def _scores(k_s, q_s, q_full, it, wanted, WHICH: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr):
    """Start the product of the keys with the it-th tile of queries; not wanted: with whatever is there."""
    stage = it % STAGES
    mbarrier.wait(q_full.index(stage), (it // STAGES) & 1, pred=wanted)
    QUERIES: gl.constexpr = q_s.shape[3]
    zero = gl.zeros([ROWS, QUERIES], gl.float32, layout)
    k = _flat(k_s.index(WHICH + _zero()))
    return warpgroup_mma(k, _flat(q_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _queries(k_s, ds_s, it, WHICH: gl.constexpr, QUERIES: gl.constexpr):
    """Start the product of ds with the keys: half of the columns, or of the queries, of the it-th tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dq = gl.zeros([ROWS, ROWS], gl.float32, layout)
    base = _zero()
    for w in gl.static_range(2):
        ds = ds_s.index(it % 2 * 2 + w)
        if QUERIES > ROWS:
            part = _half(ds, WHICH)
            k = _flat(k_s.index(base + w))
        else:
            part = ds._reinterpret(ds.dtype, [ROWS, ROWS], ds.layout)
            k = _half(k_s.index(base + w), WHICH)
        dq = warpgroup_mma(part.permute((1, 0)), k, dq, use_acc=w > 0, is_async=True)
    return dq


@gluon.jit
def _hand_over(dq, dq_s, bars, it, turn, closing, scale, WHICH: gl.constexpr):
    """Give a part of dq to the adder, as the it-th; closing, it is rounded, and 1: added to what the adder brought."""
    _q_full, _g_full, _k_full, _k_free, _x_full, _x_free, _done, dq_full, dq_free, _drawn, _taken = bars
    part = it % ADDERS
    mbarrier.wait(dq_free.index(part), (it // ADDERS + turn) & 1)
    # the elements of a thread lie together, in which no two meet in a bank; so they lie in global memory too
    layout: gl.constexpr = gl.SharedLinearLayout(
        [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0], [0, 8], [0, 16], [0, 32]]
    )
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    slot = dq_s.index(part * 2 + WHICH)._reinterpret(gl.float32, [ROWS, ROWS], layout)
    if closing > 0:
        if closing == 1:
            dq += slot.load(dq.type.layout)
            gl.thread_barrier()  # all have read
        rounded = (dq * scale).to(dq_s.dtype)
        dq_s.index(part * 2 + WHICH)._reinterpret(dq_s.dtype, [ROWS, ROWS], flat).store(rounded)
    else:
        slot.store(dq)
    fence_async_shared()
    mbarrier.arrive(dq_full.index(part))


@gluon.jit
def _hand_result(tile, dq_s, bars, it, turn, WHICH: gl.constexpr):
    """Give dv or dk to the adder, rounded: the next after what the tiles of queries add to dq."""
    _q_full, _g_full, _k_full, _k_free, _x_full, _x_free, _done, dq_full, dq_free, _drawn, _taken = bars
    part = it % ADDERS
    mbarrier.wait(dq_free.index(part), (it // ADDERS + turn) & 1)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dq_s.index(part * 2 + WHICH)._reinterpret(dq_s.dtype, tile.shape, layout).store(tile.to(dq_s.dtype))
    fence_async_shared()
    mbarrier.arrive(dq_full.index(part))


@gluon.jit
def _step(
    s, dk, dv, q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, bars, it, turn, last, first_key, first_query, len_k, offset,
    scale, scale2, unit, careful, closing,
    WHICH: gl.constexpr, CAUSAL: gl.constexpr, FIRST: gl.constexpr, MASKED: gl.constexpr,
    SHIFT: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The ``it``-th tile of queries, whose scores are there; the scores of the next, and dq of the one before.

    So none of the warpgroups waits for what the other does in the same tile.
    """
    q_full, g_full, _k_full, _k_free, _x_full, _x_free, done, _dq_full, _dq_free, _drawn, _taken = bars
    s_layout: gl.constexpr = s.type.layout
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    UNSHIFT: gl.constexpr = 2.0**-SHIFT
    QUERIES: gl.constexpr = q_s.shape[3]
    stage = it % STAGES
    q = _flat(q_s.index(stage))
    g = _flat(g_s.index(stage))

    if careful & (it + 1 < last):
        mbarrier.wait(q_full.index((it + 1) % STAGES), ((it + 1) // STAGES) & 1)
        _clean(q_s.index((it + 1) % STAGES))
    zero = gl.zeros([ROWS, QUERIES], gl.float32, s_layout)
    mbarrier.wait(g_full.index(stage), (it // STAGES) & 1)
    x = _flat(x_s.index(WHICH + _zero()))
    dp = warpgroup_mma(x, g.permute((1, 0)), zero, use_acc=False, is_async=True)
    p = gl.exp2(s * scale2 - (_row(rows_s, stage, 1, s_layout) - SHIFT))
    if MASKED:
        key = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout)) + _zero(), 1)
        if CAUSAL:  # from which query on a key is seen
            seen = gl.where(key < len_k - first_key, key + (first_key - first_query - offset), QUERIES)
            query = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(0, s_layout)) + _zero(), 0)
            p = gl.where(query >= seen, p, 0.0)
        else:
            p = gl.where(key < len_k - first_key, p, 0.0)
    if EARLY:
        dv = warpgroup_mma(gl.convert_layout(p.to(g_s.dtype), operand), g, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
    else:
        dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = p * (dp * unit + _row(rows_s, stage, 0, s_layout) * UNSHIFT)
    if not EARLY:
        dv = warpgroup_mma(gl.convert_layout(p.to(g_s.dtype), operand), g, dv, is_async=True)
    rounded = ds.to(q_s.dtype)
    dk = warpgroup_mma(gl.convert_layout(rounded, operand), q, dk, is_async=True)
    # the other warpgroup has gone through the tile before: its part of ds is there, and none of the one before is read
    mbarrier.wait(done.index((it - 1) % STAGES), ((it - 1) // STAGES) & 1, pred=it > 0)
    ds_s.index(it % 2 * 2 + WHICH).store(rounded)
    dv = warpgroup_mma_wait(1, deps=(dv,))  # its weights need registers no longer
    if FIRST:
        dk = warpgroup_mma_wait(0, deps=(dk,))
        s = _scores(k_s, q_s, q_full, it + 1, it + 1 < last, WHICH, STAGES, s_layout)
    else:
        dq = _queries(k_s, ds_s, it - 1, WHICH, QUERIES)
        dk = warpgroup_mma_wait(2, deps=(dk,))
        s = _scores(k_s, q_s, q_full, it + 1, it + 1 < last, WHICH, STAGES, s_layout)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        _hand_over(dq, dq_s, bars, it - 1, turn, closing, scale, WHICH)
    if FIRST:  # otherwise that of what is handed over serves for ds too
        fence_async_shared()
    mbarrier.arrive(done.index(stage))
    s = warpgroup_mma_wait(0, deps=(s,))
    return s, dk, dv


@gluon.jit
def _closes(t, k_tile, walk, opened):
    """Whether the tile of queries before the t-th takes its last part from this key tile; 2: its only one."""
    before = gl.where(t > 0, t, walk) - 1
    return gl.where(before >= opened, gl.where(k_tile > 0, 1, 2), 0)


@gluon.jit
def _consumer(
    q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, place_s, bars, c_ptr,
    len_k, offset, scale, scale2, unit, y_scale, group, q_tiles, k_tiles,
    WHICH: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    SHIFT: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    q_full, _g_full, k_full, k_free, x_full, x_free, done, _dq_full, _dq_free, drawn, taken = bars
    D: gl.constexpr = k_s.shape[4]
    UNSHIFT: gl.constexpr = 2.0**-SHIFT
    QUERIES: gl.constexpr = q_s.shape[3]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    it = 0
    served = 0
    turn = 0
    k_tile, kv, odd = follow(turn, place_s, drawn, taken)
    while kv >= 0:
        first_key = k_tile * KEYS + WHICH * ROWS
        first = first_queries(k_tile * KEYS, offset, CAUSAL, QUERIES)
        opened = stay_open(k_tile, k_tiles, q_tiles, offset, CAUSAL, QUERIES)
        # from which tile on no query is without one of these keys
        full = first
        if CAUSAL:
            full = gl.maximum(first, gl.cdiv(gl.maximum(first_key + ROWS - 1 - offset, 0), QUERIES))
        full = gl.minimum(gl.where(first_key + ROWS > len_k, q_tiles, full), q_tiles)
        dk = gl.zeros([ROWS, D], gl.float32, layout)
        dv = gl.zeros([ROWS, D], gl.float32, layout)
        if first < q_tiles:
            # a row is not finite, or one that sees no key, of which nobody knows, may be among those of a tile
            careful = odd
            if CAUSAL:
                careful = odd | (first * QUERIES + offset < 0)
            mbarrier.wait(k_full, served & 1)
            if CAUSAL:
                _clean(k_s.index(WHICH))
            elif odd:  # whoever sees a key that is not finite tells
                _clean(k_s.index(WHICH))
            if careful:
                mbarrier.wait(q_full.index(it % STAGES), (it // STAGES) & 1)
                _clean(q_s.index(it % STAGES))
            s = _scores(k_s, q_s, q_full, it, True, WHICH, STAGES, s_layout)
            mbarrier.wait(x_full, served & 1)
            _exponentiate(x_s.index(WHICH), c_ptr + kv * D, y_scale, len_k - first_key)
            s = warpgroup_mma_wait(0, deps=(s,))
            last = it + group * (q_tiles - first)
            s, dk, dv = _step(
                s, dk, dv, q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, bars, it, turn, last, first_key,
                (q_tiles - 1) * QUERIES, len_k, offset, scale, scale2, unit, careful, 0,
                WHICH, CAUSAL, True, True, SHIFT, STAGES, EARLY,
            )  # fmt: skip
            it += 1
            for member in range(group):
                begin = gl.where(member == 0, 1, 0)
                for t in range(begin, q_tiles - full):
                    s, dk, dv = _step(
                        s, dk, dv, q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, bars, it, turn, last, first_key, 0,
                        len_k, offset, scale, scale2, unit, careful, _closes(t, k_tile, q_tiles - first, opened),
                        WHICH, CAUSAL, False, False, SHIFT, STAGES, EARLY,
                    )  # fmt: skip
                    it += 1
                for t in range(gl.maximum(begin, q_tiles - full), q_tiles - first):
                    s, dk, dv = _step(
                        s, dk, dv, q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, bars, it, turn, last, first_key,
                        (q_tiles - 1 - t) * QUERIES, len_k, offset, scale, scale2, unit, careful,
                        _closes(t, k_tile, q_tiles - first, opened),
                        WHICH, CAUSAL, False, True, SHIFT, STAGES, EARLY,
                    )  # fmt: skip
                    it += 1
            dv *= _flat(x_s.index(WHICH)).load(layout).to(gl.float32) * UNSHIFT
        _hand_result(dv, dq_s, bars, place_of_dv(it, first, q_tiles), turn, WHICH)
        if first < q_tiles:
            mbarrier.arrive(x_free)  # all of x has been read: what came of it has been handed over
            mbarrier.wait(done.index((it - 1) % STAGES), ((it - 1) // STAGES) & 1)
            dq = warpgroup_mma_wait(0, deps=(_queries(k_s, ds_s, it - 1, WHICH, QUERIES),))
            mbarrier.arrive(k_free)
            _hand_over(dq, dq_s, bars, it, turn, _closes(0, k_tile, q_tiles - first, opened), scale, WHICH)
            served += 1
        _hand_result(dk * scale, dq_s, bars, it + 1, turn, WHICH)
        turn += 1
        k_tile, kv, odd = follow(turn, place_s, drawn, taken)


# the sizes are not specialised for: one kernel per form of problem, whatever its sizes
@gluon.jit(
    do_not_specialize=[
        "len_k", "offset", "heads_k", "heads", "group", "q_tiles", "k_tiles", "head_span", "places",
    ]
)  # fmt: skip
def backward_kernel(
    q_desc, g_desc, rows_desc, k_desc, v_desc, sums_desc, dq_desc, dk_desc, dv_desc, c_ptr, flags_ptr, turns_ptr,
    len_k, offset, scale, scale2, unit, y_scale, heads_k, heads, group, q_tiles, k_tiles, head_span, places,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
    SHIFT: gl.constexpr, EARLY: gl.constexpr,
    REGISTERS: gl.constexpr, CHAINS: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv of the heads that are not flagged; arguments as ``hopper_gradient.backward`` has."""
    dtype: gl.constexpr = q_desc.dtype
    QUERIES: gl.constexpr = q_desc.block_type.shape[2]
    q_s = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    g_s = gl.allocate_shared_memory(dtype, [STAGES] + g_desc.block_type.shape, g_desc.layout)
    rows_s = gl.allocate_shared_memory(gl.float32, [STAGES] + rows_desc.block_type.shape, rows_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [2] + k_desc.block_type.shape, k_desc.layout)
    x_s = gl.allocate_shared_memory(dtype, [2] + v_desc.block_type.shape, v_desc.layout)
    ds_s = gl.allocate_shared_memory(dtype, [4, ROWS, QUERIES], gl.NVMMASharedLayout(128, 16, 2))
    dq_s = gl.allocate_shared_memory(dtype, [2 * ADDERS, ROWS, 2 * ROWS], gl.NVMMASharedLayout(128, 16, 2))
    place_s = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dq_full = gl.allocate_shared_memory(gl.int64, [ADDERS, 1], mbarrier.MBarrierLayout())
    dq_free = gl.allocate_shared_memory(gl.int64, [ADDERS, 1], mbarrier.MBarrierLayout())
    fetched = gl.allocate_shared_memory(gl.int64, [ADDERS, 1], mbarrier.MBarrierLayout())
    drawn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(done.index(i), count=2)
        mbarrier.init(g_full.index(i), count=1)
    for i in gl.static_range(ADDERS):
        mbarrier.init(dq_free.index(i), count=1)
        mbarrier.init(fetched.index(i), count=1)
        mbarrier.init(dq_full.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(drawn.index(i), count=1)
        mbarrier.init(taken.index(i), count=2 + ADDERS)
    mbarrier.init(k_full, count=1)
    mbarrier.init(k_free, count=2)
    mbarrier.init(x_full, count=1)
    mbarrier.init(x_free, count=2)
    bars = (q_full, g_full, k_full, k_free, x_full, x_free, done, dq_full, dq_free, drawn, taken)
    # the arguments are written out: in a variable, the compile-time ones would become run-time ones
    # fmt: off
    gl.warp_specialize(
        [
            (_consumer, (
                q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, place_s, bars, c_ptr,
                len_k, offset, scale, scale2, unit, y_scale, group, q_tiles, k_tiles,
                0, CAUSAL, STAGES, SHIFT, EARLY,
            )),
            (_consumer, (
                q_s, g_s, rows_s, k_s, x_s, ds_s, dq_s, place_s, bars, c_ptr,
                len_k, offset, scale, scale2, unit, y_scale, group, q_tiles, k_tiles,
                1, CAUSAL, STAGES, SHIFT, EARLY,
            )),
            (producer, (
                q_desc, g_desc, rows_desc, k_desc, v_desc, q_s, g_s, rows_s, k_s, x_s, place_s, bars,
                turns_ptr, flags_ptr,
                offset, heads_k, heads, group, q_tiles, k_tiles, head_span,
                CAUSAL, STAGES,
            )),
            (adder, (
                sums_desc, dq_desc, dk_desc, dv_desc, dq_s, place_s, bars, fetched, turns_ptr, flags_ptr,
                offset, heads_k, group, q_tiles, k_tiles, places,
                0, QUERIES, CAUSAL, CHAINS,
            )),
            (adder, (
                sums_desc, dq_desc, dk_desc, dv_desc, dq_s, place_s, bars, fetched, turns_ptr, flags_ptr,
                offset, heads_k, group, q_tiles, k_tiles, places,
                1, QUERIES, CAUSAL, CHAINS,
            )),
        ],
        [4, 1, 1, 1],
        [REGISTERS, 24, 24, 24],
    )
    # fmt: on
