"""Device code of the Hopper backward pass that moves data: what brings tiles, adds up dq, and writes.

Device code only: nothing of the host is imported here.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, valid-type, operator, untyped-decorator, no-redef"

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

ROWS = gl.constexpr(64)  # keys of a warpgroup
KEYS = gl.constexpr(128)  # of a program
ODD = gl.constexpr(1 << 30)  # is added to the number of a key tile, which is less
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
def _await(pointer, count):
    """Wait until so many have had their turn."""
    seen = _acquire(pointer)
    while seen != count:
        seen = _acquire(pointer)


@gluon.jit
def _visible():
    """What was acquired is there for the copy engine too."""
    gl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _acquire(pointer):
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [pointer.to(gl.int64)], gl.int32, False, 1
    )


@gluon.jit
def _place(index, heads, head_span, k_tiles):
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
def stay_open(k_tile, k_tiles, q_tiles, offset, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """How many of the tiles of queries, from the last on, later key tiles have a part in too."""
    later = first_queries((k_tile + 1) * KEYS, offset, CAUSAL, QUERIES)
    return gl.where(k_tile + 1 < k_tiles, gl.maximum(q_tiles - later, 0), 0)


@gluon.jit
def _parts(i, k_tiles, offset, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """How many key tiles have a part in a tile of queries that sees a key."""
    parts = k_tiles
    if CAUSAL:
        parts = gl.minimum(k_tiles, (i * QUERIES + QUERIES - 1 + offset) // KEYS + 1)
    return parts


@gluon.jit
def _before(kv, flags_ptr, places):
    """The head that has had a head's place among the sums; negative: none."""
    before = kv - places
    while gl.load(flags_ptr + before, mask=before >= 0, other=0) % 2 == 1:
        before -= places
    return before


@gluon.jit
def place_of_dv(it, first, q_tiles):
    """Where dv comes among what is handed over: before the last part of dq, if there is one."""
    return it - gl.where(first < q_tiles, 1, 0)


@gluon.jit
def _draw(turn, turns_ptr, flags_ptr, place_s, drawn, taken, heads, head_span, k_tiles):
    """The producer's next piece of work, which it passes on; heads that are left to other kernels are passed over.

    (tile of keys, batch·head): the latter is −1 where nothing is left.
    """
    tiles = heads * k_tiles
    index = gl.atomic_add(turns_ptr, 1, sem="relaxed")
    k_tile, kv = _place(index, heads, head_span, k_tiles)
    flags = gl.load(flags_ptr + kv, mask=index < tiles, other=0)
    while flags % 2 == 1:
        index = gl.atomic_add(turns_ptr, 1, sem="relaxed")
        k_tile, kv = _place(index, heads, head_span, k_tiles)
        flags = gl.load(flags_ptr + kv, mask=index < tiles, other=0)
    kv = gl.where(index < tiles, kv, -1)
    slot = turn % 2
    mbarrier.wait(taken.index(slot), ((turn // 2) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place_s.index(2 * slot).store(gl.full([1], k_tile + gl.where(flags >= 4, ODD, 0), gl.int32, layout))
    place_s.index(2 * slot + 1).store(gl.full([1], kv, gl.int32, layout))
    mbarrier.arrive(drawn.index(slot))
    return k_tile, kv


@gluon.jit
def follow(turn, place_s, drawn, taken):
    """What the producer has drawn, and whether a row of the queries of that head may not be finite."""
    slot = turn % 2
    mbarrier.wait(drawn.index(slot), (turn // 2) & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    k_tile = gl.max(place_s.index(2 * slot).load(layout), 0)
    kv = gl.max(place_s.index(2 * slot + 1).load(layout), 0)
    gl.thread_barrier()  # all warps have read
    mbarrier.arrive(taken.index(slot))
    return k_tile % ODD, kv, k_tile >= ODD


@gluon.jit
def producer(
    q_desc, g_desc, rows_desc, k_desc, v_desc, q_s, g_s, rows_s, k_s, x_s, place_s, bars, turns_ptr, flags_ptr,
    offset, heads_k, heads, group, q_tiles, k_tiles, head_span,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings keys, x, queries and their cotangents, of one piece of work after the other."""
    q_full, g_full, k_full, k_free, x_full, x_free, done, _dq_full, _dq_free, drawn, taken = bars
    QUERIES: gl.constexpr = q_desc.block_type.shape[2]
    loads = 0
    served = 0
    turn = 0
    k_tile, kv = _draw(turn, turns_ptr, flags_ptr, place_s, drawn, taken, heads, head_span, k_tiles)
    while kv >= 0:
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
        k_tile, kv = _draw(turn, turns_ptr, flags_ptr, place_s, drawn, taken, heads, head_span, k_tiles)


@gluon.jit
def _slot(dq_s, w: gl.constexpr, WHICH: gl.constexpr, descriptor):
    """Where a warpgroup hands over a tile."""
    block: gl.constexpr = descriptor.block_type
    return dq_s.index(WHICH * 2 + w)._reinterpret(block.element_ty, block.shape, descriptor.layout)


@gluon.jit
def adder(
    sums_desc, dq_desc, dk_desc, dv_desc, dq_s, place_s, bars, fetched, turns_ptr, flags_ptr,
    offset, heads_k, group, q_tiles, k_tiles, places,
    WHICH: gl.constexpr, QUERIES: gl.constexpr, CAUSAL: gl.constexpr, CHAINS: gl.constexpr,
):  # fmt: skip
    """Adds what the warpgroups hand over to dq in global memory, when it is the turn of this key tile; then dv and dk.

    The last key tile of a tile of queries does not add: the adder brings the sum so far, and writes what comes of it.
    One of several, that take tiles by turns: it takes a while until an addition is there for others to see.
    """
    _q_full, _g_full, _k_full, _k_free, _x_full, _x_free, _done, dq_full, dq_free, drawn, taken = bars
    DOWN: gl.constexpr = ROWS if QUERIES > ROWS else 0  # the warpgroups make rows of dq, or columns
    it = 0
    turn = 0
    fetches = 0
    k_tile, kv, _ = follow(turn, place_s, drawn, taken)
    while kv >= 0:
        first = first_queries(k_tile * KEYS, offset, CAUSAL, QUERIES)
        batch = kv // heads_k
        opened = stay_open(k_tile, k_tiles, q_tiles, offset, CAUSAL, QUERIES)
        before = kv
        if k_tile < CHAINS:
            before = _before(kv, flags_ptr, places)
        chain = k_tile % CHAINS
        for member in range(group):
            for t in range(q_tiles - first):
                # before the last part of dq comes dv
                at = it + gl.where((member + 1 == group) & (t + 1 == q_tiles - first), 1, 0)
                if at % ADDERS == WHICH:
                    i = q_tiles - 1 - t
                    row = ((chain * places + kv % places) * group + member) * q_tiles * (2 * ROWS) + i * (2 * ROWS)
                    other = row + (1 - 2 * chain) * places * group * q_tiles * (2 * ROWS)
                    counters = turns_ptr + 1 + ((kv * group + member) * q_tiles + i) * CHAINS
                    brings = (t >= opened) & (k_tile > 0)
                    if not brings:
                        mbarrier.arrive(dq_free.index(WHICH))
                    if k_tile >= CHAINS:
                        _await(counters + chain, k_tile // CHAINS)
                    elif before >= 0:  # all of the sum that lay there has been taken
                        last = _parts(i, k_tiles, offset, CAUSAL, QUERIES) - 1
                        theirs = turns_ptr + 1 + ((before * group + member) * q_tiles + i) * CHAINS
                        _await(theirs + last % CHAINS, last // CHAINS + 1)
                    if brings:
                        if CHAINS == 2:
                            _await(counters + (1 - chain), (k_tile + 1) // CHAINS)
                        _visible()
                        if CHAINS == 1:
                            other = row
                        elif k_tile >= CHAINS:
                            mbarrier.expect(fetched.index(WHICH), 2 * sums_desc.block_type.nbytes)
                            for w in gl.static_range(2):
                                tma.async_copy_global_to_shared(
                                    sums_desc, [other + w * ROWS, 0], fetched.index(WHICH),
                                    _slot(dq_s, w, WHICH, sums_desc),
                                )  # fmt: skip
                            mbarrier.wait(fetched.index(WHICH), fetches & 1)
                            fetches += 1
                            for w in gl.static_range(2):
                                _add_to_global(sums_desc, [row + w * ROWS, 0], _slot(dq_s, w, WHICH, sums_desc))
                            _written()
                            other = row
                        mbarrier.expect(dq_free.index(WHICH), 2 * sums_desc.block_type.nbytes)
                        for w in gl.static_range(2):
                            tma.async_copy_global_to_shared(
                                sums_desc, [other + w * ROWS, 0], dq_free.index(WHICH), _slot(dq_s, w, WHICH, sums_desc)
                            )
                    mbarrier.wait(dq_full.index(WHICH), (at // ADDERS + turn) & 1)
                    if t >= opened:
                        for w in gl.static_range(2):
                            own = (kv - batch * heads_k) * group + member
                            tma.async_copy_shared_to_global(
                                dq_desc, [batch, own, i * QUERIES + w * DOWN, w * (ROWS - DOWN)],
                                _slot(dq_s, w, WHICH, dq_desc),
                            )  # fmt: skip
                        tma.store_wait(0)
                    else:
                        for w in gl.static_range(2):
                            if k_tile < CHAINS:  # nothing is there yet
                                tma.async_copy_shared_to_global(
                                    sums_desc, [row + w * ROWS, 0], _slot(dq_s, w, WHICH, sums_desc)
                                )
                            else:
                                _add_to_global(sums_desc, [row + w * ROWS, 0], _slot(dq_s, w, WHICH, sums_desc))
                        _written()
                    gl.thread_barrier()
                    gl.atomic_add(counters + chain, 1, sem="release", scope="gpu")
                it += 1
        for which in gl.static_range(2):
            at = it + 1
            if which == 0:
                at = place_of_dv(it, first, q_tiles)
            if at % ADDERS == WHICH:
                mbarrier.arrive(dq_free.index(WHICH))
                mbarrier.wait(dq_full.index(WHICH), (at // ADDERS + turn) & 1)
                for w in gl.static_range(2):
                    of_keys = [batch, kv - batch * heads_k, k_tile * KEYS + w * ROWS, 0]
                    if which == 0:
                        tma.async_copy_shared_to_global(dv_desc, of_keys, _slot(dq_s, w, WHICH, dv_desc))
                    else:
                        tma.async_copy_shared_to_global(dk_desc, of_keys, _slot(dq_s, w, WHICH, dk_desc))
                tma.store_wait(0)
        turn += 1
        k_tile, kv, _ = follow(turn, place_s, drawn, taken)
