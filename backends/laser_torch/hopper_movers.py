"""Device code of the Hopper backward pass that moves data: what brings tiles, adds up dq, and rounds it.

Device code only: nothing of the host is imported here.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, valid-type, operator, untyped-decorator, no-redef"

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_forward import _follow

ROWS = gl.constexpr(64)  # keys of a warpgroup
KEYS = gl.constexpr(128)  # of a program
ADDERS = gl.constexpr(2)  # one for each tile of dq that is on its way


@builtin
def _add_to_global(descriptor, coordinates, source, _semantic=None):
    """Add a tile in shared memory to one in global memory: the copy engine's reduction, for which Gluon has no name."""
    at = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, at, source.handle)


@gluon.jit
def _written():
    """Wait until what this warp had the copy engine write is there for others: ``tma.store_wait`` waits for less."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1
    )


@gluon.jit
def _acquire(pointer):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [pointer.to(gl.int64)], gl.int32, False, 1
    )


@gluon.jit
def place(index, heads, head_span, k_tiles):
    """(tile of keys, batch·head) of a piece of work: in turn of the heads that share the L2 cache."""
    section = index // (head_span * k_tiles)
    within = index - section * head_span * k_tiles
    span = gl.minimum(head_span, heads - section * head_span)
    return within // span, section * head_span + within % span


@gluon.jit
def first_queries(first_key, offset, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """The first tile of queries of which one sees a key from ``first_key`` on."""
    if CAUSAL:
        first = gl.maximum(first_key - offset, 0) // QUERIES
    else:
        first = 0
    return first


@gluon.jit
def _draw(turn, turns_ptr, flags_ptr, place_s, drawn, taken, heads, head_span, k_tiles, tiles):
    """The producer's next piece of work, which it passes on; heads that are left to other kernels are passed over."""
    index = gl.atomic_add(turns_ptr, 1, sem="relaxed")
    _, kv = place(index, heads, head_span, k_tiles)
    while gl.load(flags_ptr + kv, mask=index < tiles, other=0) % 2 == 1:
        index = gl.atomic_add(turns_ptr, 1, sem="relaxed")
        _, kv = place(index, heads, head_span, k_tiles)
    slot = turn % 2
    mbarrier.wait(taken.index(slot), ((turn // 2) & 1) ^ 1)
    place_s.index(slot).store(gl.full([1], index, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(drawn.index(slot))
    return index


@gluon.jit
def producer(
    q_desc, g_desc, rows_desc, k_desc, v_desc, q_s, g_s, rows_s, k_s, x_s, place_s, bars, turns_ptr, flags_ptr,
    offset, heads_k, heads, group, q_tiles, k_tiles, tiles, head_span,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings keys, x, queries and their cotangents, of one piece of work after the other."""
    q_full, g_full, k_full, k_free, x_full, x_free, done, _dq_full, _dq_free, drawn, taken = bars
    QUERIES: gl.constexpr = q_desc.block_type.shape[2]
    loads = 0
    served = 0
    turn = 0
    index = _draw(turn, turns_ptr, flags_ptr, place_s, drawn, taken, heads, head_span, k_tiles, tiles)
    while index < tiles:
        k_tile, kv = place(index, heads, head_span, k_tiles)
        batch = kv // heads_k
        head = kv % heads_k
        first = first_queries(k_tile * KEYS, offset, CAUSAL, QUERIES)
        if first < q_tiles:
            mbarrier.wait(k_free, (served & 1) ^ 1)
            mbarrier.expect(k_full, 2 * k_desc.block_type.nbytes)
            for w in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    k_desc, [batch, head, k_tile * KEYS + w * ROWS, 0], k_full, k_s.index(w)
                )
            for member in range(group):
                own = head * group + member
                for t in range(q_tiles - first):
                    i = q_tiles - 1 - t
                    stage = loads % STAGES
                    mbarrier.wait(done.index(stage), ((loads // STAGES) & 1) ^ 1)
                    mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, own, i * QUERIES, 0], q_full.index(stage), q_s.index(stage)
                    )
                    tma.async_copy_global_to_shared(
                        rows_desc, [0, batch * heads_k * group + own, i * QUERIES], q_full.index(stage),
                        rows_s.index(stage),
                    )  # fmt: skip
                    if (member == 0) & (t == 0):
                        mbarrier.wait(x_free, (served & 1) ^ 1)
                        mbarrier.expect(x_full, 2 * v_desc.block_type.nbytes)
                        for w in gl.static_range(2):
                            tma.async_copy_global_to_shared(
                                v_desc, [batch, head, k_tile * KEYS + w * ROWS, 0], x_full, x_s.index(w)
                            )
                    mbarrier.expect(g_full.index(stage), g_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        g_desc, [batch, own, i * QUERIES, 0], g_full.index(stage), g_s.index(stage)
                    )
                    loads += 1
            served += 1
        turn += 1
        index = _draw(turn, turns_ptr, flags_ptr, place_s, drawn, taken, heads, head_span, k_tiles, tiles)


@gluon.jit
def adder(
    dq_desc, dk_desc, dv_desc, dq_s, place_s, bars, turns_ptr,
    offset, heads_k, heads, group, q_tiles, k_tiles, tiles, head_span,
    WHICH: gl.constexpr, QUERIES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Adds what the warpgroups hand over to dq in global memory, when it is the turn of this key tile.

    One of several, that take tiles by turns: it takes a while until an addition is there for others to see.
    """
    _q_full, _g_full, _k_full, _k_free, _x_full, _x_free, _done, dq_full, dq_free, drawn, taken = bars
    it = 0
    turn = 0
    index = _follow(turn, place_s, drawn, taken, True)
    while index < tiles:
        k_tile, kv = place(index, heads, head_span, k_tiles)
        first = first_queries(k_tile * KEYS, offset, CAUSAL, QUERIES)
        for member in range(group):
            head = kv * group + member
            for t in range(q_tiles - first):
                if it % ADDERS == WHICH:
                    i = q_tiles - 1 - t
                    counter = turns_ptr + 1 + head * q_tiles + i
                    row = (head * q_tiles + i) * (2 * ROWS)
                    seen = k_tile
                    if k_tile > 0:
                        seen = _acquire(counter)
                    while seen != k_tile:
                        seen = _acquire(counter)
                    mbarrier.wait(dq_full.index(WHICH), (it // ADDERS + turn) & 1)
                    for w in gl.static_range(2):
                        part = dq_s.index(WHICH * 2 + w)._reinterpret(gl.float32, [ROWS, ROWS], dq_desc.layout)
                        if k_tile == 0:  # nothing is there yet
                            tma.async_copy_shared_to_global(dq_desc, [row + w * ROWS, 0], part)
                        else:
                            _add_to_global(dq_desc, [row + w * ROWS, 0], part)
                    tma.store_wait(0)
                    mbarrier.arrive(dq_free.index(WHICH))
                    _written()
                    gl.thread_barrier()
                    gl.atomic_add(counter, 1, sem="release", scope="gpu")
                it += 1
        batch = kv // heads_k
        head = kv % heads_k
        for which in gl.static_range(2):  # dv, dk
            if (it + which) % ADDERS == WHICH:
                mbarrier.wait(dq_full.index(WHICH), ((it + which) // ADDERS + turn) & 1)
                for w in gl.static_range(2):
                    tile = dq_s.index(WHICH * 2 + w)._reinterpret(dq_s.dtype, dk_desc.block_type.shape, dk_desc.layout)
                    if which == 0:
                        tma.async_copy_shared_to_global(dv_desc, [batch, head, k_tile * KEYS + w * ROWS, 0], tile)
                    else:
                        tma.async_copy_shared_to_global(dk_desc, [batch, head, k_tile * KEYS + w * ROWS, 0], tile)
                tma.store_wait(0)
                mbarrier.arrive(dq_free.index(WHICH))
        turn += 1
        index = _follow(turn, place_s, drawn, taken, True)


@gluon.jit(do_not_specialize=["len_q", "q_tiles", "offset", "group"])
def round_kernel(
    sums_ptr, dq_ptr, flags_ptr, len_q, q_tiles, offset, scale, group,
    QUERIES: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """dq = scale·Σ, rounded; zero where a tile of queries sees no key. Grid: B·Hq · tiles of queries."""
    head = gl.program_id(0) // q_tiles
    first = gl.program_id(0) % q_tiles * QUERIES
    if gl.load(flags_ptr + head // group) % 2 == 0:
        sees = True
        if CAUSAL:
            sees = first + QUERIES - 1 + offset >= 0
        element = gl.arange(0, QUERIES * D, layout=gl.BlockedLayout([4], [32], [4], [0]))
        begin = gl.program_id(0).to(gl.int64) * (QUERIES * D)
        sums = gl.load(sums_ptr + begin + element, mask=(element >= 0) & sees, other=0.0)
        # half, columns by 8, warp, lane by 4, lane, 8 rows further, 1 column further: as the accumulators of a product
        sums = (sums * scale).reshape([2, 8, 4, 8, 4, 2, 2])
        if D == 128:
            sums = sums.permute([2, 5, 3, 0, 1, 4, 6])
        else:
            sums = sums.permute([0, 2, 5, 3, 1, 4, 6])
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        dq = gl.convert_layout(sums.reshape([QUERIES, D]).to(dq_ptr.dtype.element_ty), layout)
        row = gl.expand_dims(gl.arange(0, QUERIES, layout=gl.SliceLayout(1, layout)), 1)
        column = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, layout)), 0)
        at = (head.to(gl.int64) * len_q + first) * D + (row * D + column)
        gl.store(dq_ptr + at, dq, mask=(row < len_q - first) & (column < D))
