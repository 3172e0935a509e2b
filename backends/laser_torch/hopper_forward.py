"""Forward kernel for Hopper (sm_90a), in Gluon: softmax attention over x = 2^(βv·log2e − c), then a logarithm.

    o_ie = (ln2/β_e)·(log2 Σ_j p_ij x_je − log2 Σ_j p_ij + c_e)          l_i = ln Σ_j exp(s_ij)

A program is a producer warp, which brings tiles through the tensor memory accelerator, and ``CONSUMERS`` warpgroups of
64 query rows each. A consumer issues the score product of key tile j−1, then the product of the weights of tile j, and
works out the weights of tile j−1 while the latter runs. Key tiles go from the last to the first, so that the
tiles that need a mask (the diagonal and the ragged end) come first and the rest of the loop has none.

Device code only: nothing of the host is imported here.
"""

# Gluon reads annotations as types of its own, and knows no starred expressions.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, valid-type, operator, untyped-decorator, no-redef"
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from . import hopper_values
from .hopper_tiles import (
    ROWS,
    await_order,
    first_weights,
    pass_order,
    products,
    scores,
    step,
    write,
    write_lse,
)


@gluon.jit
def _span(first, rows: gl.constexpr, block_k: gl.constexpr, len_k, offset, CAUSAL: gl.constexpr):
    """Key tiles that the query rows from ``first`` see (at least one is worked on), and how many need no mask."""
    total = gl.cdiv(len_k, block_k)
    full = len_k // block_k
    if CAUSAL:
        total = gl.maximum(gl.minimum(total, gl.cdiv(gl.maximum(first + rows + offset, 0), block_k)), 1)
        full = gl.minimum(full, gl.maximum(first + offset + 1, 0) // block_k)
    return total, full


@gluon.jit
def _place(index, order, HEAVY_FIRST: gl.constexpr):
    """(tile of the queries, batch·head) of a piece of work: ``lead`` heads, then in sections of ``span``.

    The keys of a section share the L2 cache. All heads but the lead are a multiple of a section.
    """
    group, q_tiles, lead, span = order
    if HEAVY_FIRST:
        lead = lead * group
        span = span * group
        later = gl.maximum(index - lead * q_tiles, 0)
        section = later // (span * q_tiles)
        in_lead = index < lead * q_tiles
        first = gl.where(in_lead, 0, lead + section * span)
        count = gl.where(in_lead, lead, span)
        within = index - first * q_tiles
        q_tile = q_tiles - 1 - within // count
        head = first + within % count
    else:
        q_tile = index % q_tiles
        head = index // q_tiles
    return q_tile, head


@gluon.jit
def _draw(counter_ptr, index, DYNAMIC: gl.constexpr):
    """The piece of work that follows: drawn from a counter, or in a fixed order."""
    if DYNAMIC:
        following = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    else:
        following = index + gl.num_programs(0)
    return following


@gluon.jit
def _tell(turn, q_tile, bh, place_s, place_full, place_free, DYNAMIC: gl.constexpr):
    """Pass a piece of work on to the consumers; a negative batch·head is the end."""
    if DYNAMIC:
        slot = turn % 2
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        mbarrier.wait(place_free.index(slot), ((turn // 2) & 1) ^ 1)
        place_s.index(2 * slot).store(gl.full([1], q_tile, gl.int32, layout))
        place_s.index(2 * slot + 1).store(gl.full([1], bh, gl.int32, layout))
        mbarrier.arrive(place_full.index(slot))


@gluon.jit
def _follow(turn, place_s, place_full, place_free, order, pieces, CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr):
    """A consumer's next piece of work: the producer's."""
    if DYNAMIC:
        slot = turn % 2
        mbarrier.wait(place_full.index(slot), (turn // 2) & 1)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        q_tile = gl.max(place_s.index(2 * slot).load(layout), 0)
        bh = gl.max(place_s.index(2 * slot + 1).load(layout), 0)
        gl.thread_barrier()  # all warps have read
        mbarrier.arrive(place_free.index(slot))
    else:
        index = gl.program_id(0) + turn * gl.num_programs(0)
        q_tile, bh = _place(index, order, CAUSAL)
        bh = gl.where(index < pieces, bh, -1)
    return q_tile, bh


@gluon.jit
def _prefetch(ptr, of_rows, batch, head, first, length, ROWS: gl.constexpr, WORDS: gl.constexpr):
    """Ask for rows to be brought into the L2 cache; strides are in units of eight."""
    of_batch, of_head, of_row = of_rows
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    ptr += (batch.to(gl.int64) * of_batch + head.to(gl.int64) * of_head) * 8
    if WORDS == 64:
        lines: gl.constexpr = "prefetch.global.L2 [$1]; prefetch.global.L2 [$1+128]; mov.b32 $0, 0;"
    else:
        lines: gl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    for rows in gl.static_range(0, ROWS, 32):
        row = gl.minimum(first + rows + lane, length - 1).to(gl.int64) * (of_row * 8)
        gl.inline_asm_elementwise(lines, "=r,l", [(ptr + row).to(gl.int64)], gl.int32, False, 1)


@gluon.jit
def _producer(
    common, order, CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    VALUES: gl.constexpr,
):  # fmt: skip
    (
        q_desc, k_desc, x_desc, q_s, k_s, x_s, place_s, bars, counter_ptr, q_ptr,
        len_q, len_k, offset, heads_q, group_k, group_x, pieces, of_q,
    ) = common  # fmt: skip
    q_full, q_free, k_full, k_free, x_full, x_free, place_full, place_free, _order = bars
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    WORDS: gl.constexpr = k_desc.block_type.shape[3] // 2
    loads = 0
    turn = 0
    index = gl.program_id(0)
    if DYNAMIC:
        index = _draw(counter_ptr, index, DYNAMIC)
    q_tile, bh = _place(index, order, CAUSAL)
    while index < pieces:
        _tell(turn, q_tile, bh, place_s, place_full, place_free, DYNAMIC)
        next_tile, next_bh = q_tile, bh
        batch = bh // heads_q
        head = bh % heads_q
        of_x = bh // group_x
        first = q_tile * (CONSUMERS * ROWS)
        total, _ = _span(first, CONSUMERS * ROWS, BLOCK_K, len_k, offset, CAUSAL)
        for i in range(total):
            row = (total - 1 - i) * BLOCK_K
            stage = loads % STAGES
            phase = ((loads // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [batch, head // group_k, row, 0], k_full.index(stage), k_s.index(stage)
            )
            if i == 0:
                for w in gl.static_range(CONSUMERS):
                    mbarrier.wait(q_free.index(w), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        q_desc, [batch, head, first + w * ROWS, 0], q_full.index(w), q_s.index(w)
                    )
                if VALUES:
                    hopper_values.await_head(counter_ptr + 3 + of_x)
            if i == total - 1:  # the consumers are busy, and the next tile of x has time
                index = _draw(counter_ptr, index, DYNAMIC)
                next_tile, next_bh = _place(index, order, CAUSAL)
                if DYNAMIC and index < pieces:
                    _prefetch(
                        q_ptr, of_q, next_bh // heads_q, next_bh % heads_q, next_tile * (CONSUMERS * ROWS), len_q,
                        CONSUMERS * ROWS, WORDS,
                    )  # fmt: skip
            mbarrier.wait(x_free.index(stage), phase)
            mbarrier.expect(x_full.index(stage), x_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(x_desc, [0, of_x, row, 0], x_full.index(stage), x_s.index(stage))
            loads += 1
        turn += 1
        q_tile, bh = next_tile, next_bh
    _tell(turn, 0, -1, place_s, place_full, place_free, DYNAMIC)


@gluon.jit
def _consumer(
    common, order, drawn, values, WHICH: gl.constexpr, CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr, REST: gl.constexpr, ORDERED: gl.constexpr,
    VALUES: gl.constexpr, SUMS: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    (
        o_desc, rest_desc, q_s, k_s, x_s, o_s, rest_s, place_s, bars, lse_ptr, c_ptr,
        len_q, len_k, offset, scale2, o_scale, heads_q, group_x, pieces,
    ) = common  # fmt: skip
    q_full, q_free, k_full, k_free, x_full, x_free, place_full, place_free, in_order = bars
    BLOCK_K: gl.constexpr = k_s.shape[3]
    E: gl.constexpr = x_s.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    flat: gl.constexpr = gl.NVMMASharedLayout(q_s.layout.swizzle_byte_width, 16, 2)
    q = q_s.index(WHICH)._reinterpret(q_s.dtype, [ROWS, E], flat)
    channel = gl.arange(0, E, layout=gl.SliceLayout(0, o_layout))
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    if VALUES:
        hopper_values.make(drawn, WHICH, values, CONSUMERS, E // 2, x_s.dtype, SUMS, LIMITS)
    it = 0
    turn = 0
    q_tile, bh = _follow(turn, place_s, place_full, place_free, order, pieces, CAUSAL, DYNAMIC)
    while bh >= 0:
        batch = bh // heads_q
        head = bh % heads_q
        first = (q_tile * CONSUMERS + WHICH) * ROWS
        total, full = _span(q_tile * (CONSUMERS * ROWS), CONSUMERS * ROWS, BLOCK_K, len_k, offset, CAUSAL)
        mbarrier.wait(q_full.index(WHICH), turn & 1)
        await_order(in_order, it, WHICH, ORDERED)
        s = scores(q, k_s, k_full, it, STAGES, BLOCK_K, zero)
        pass_order(in_order, WHICH, CONSUMERS, ORDERED)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(it % STAGES))
        mbarrier.arrive(q_free.index(WHICH), pred=total == 1)
        p, m, l = first_weights(s, first, total, scale2, len_k, offset, CAUSAL, SHIFT, x_s.dtype)
        o = gl.zeros([ROWS, E], gl.float32, o_layout)
        it += 1
        for i in range(1, total - full):
            key = (total - 1 - i) * BLOCK_K
            p, o, m, l = step(
                q, p, o, m, l, k_s, x_s, bars, it, i == total - 1, first, key, len_k, offset, scale2,
                CAUSAL, True, SHIFT, STAGES, BLOCK_K, s_layout, operand, WHICH, CONSUMERS, ORDERED,
            )  # fmt: skip
            it += 1
        for i in range(gl.maximum(total - full, 1), total):
            p, o, m, l = step(
                q, p, o, m, l, k_s, x_s, bars, it, i == total - 1, first, 0, len_k, offset, scale2,
                CAUSAL, False, SHIFT, STAGES, BLOCK_K, s_layout, operand, WHICH, CONSUMERS, ORDERED,
            )  # fmt: skip
            it += 1
        o = products(p, o, x_s, x_full, it - 1, STAGES, BLOCK_K, operand)
        # meanwhile; c may have been written by this kernel
        c = gl.load(c_ptr + (bh // group_x) * E + channel, cache_modifier=".cg")
        write_lse(m, l, lse_ptr, first, bh, len_q, scale2, SHIFT)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(x_free.index((it - 1) % STAGES))
        write(o, l, c, o_scale, o_desc, rest_desc, o_s.index(WHICH), rest_s.index(WHICH), batch, head, first, REST)
        turn += 1
        q_tile, bh = _follow(turn, place_s, place_full, place_free, order, pieces, CAUSAL, DYNAMIC)
    tma.store_wait(0)


# the sizes are not specialised for: one kernel per form of problem, whatever its sizes
@gluon.jit(
    do_not_specialize=[
        "len_q", "len_k", "offset", "heads_q", "heads_x", "group_k", "group_x", "q_tiles", "pieces", "lead",
        "head_span", "q_b", "q_h", "q_n", "v_b", "v_h", "v_n", "blocks", "span", "ahead", "chunks", "makers",
        "several",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, x_desc, o_desc, rest_desc, lse_ptr, c_ptr, counter_ptr, q_ptr, v_ptr, x_ptr, flags_ptr, partial_ptr,
    len_q, len_k, offset, scale2, o_scale, heads_q, heads_x, group_k, group_x, q_tiles, pieces, lead, head_span,
    q_b, q_h, q_n, v_b, v_h, v_n, blocks, span, ahead, chunks, y_scale, makers, several,
    CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr,
    REST: gl.constexpr, ORDERED: gl.constexpr, REGISTERS: gl.constexpr, VALUES: gl.constexpr,
    SUMS: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """The forward pass of all heads; the arguments are those that ``hopper.forward`` passes.

    counter_ptr: What was drawn of the work; with VALUES two and one for each head beside, for ``hopper_values.make``.
    """
    drawn = 0
    if VALUES:
        drawn = gl.atomic_add(counter_ptr + 1, CONSUMERS, sem="relaxed", scope="gpu")
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    o_s = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS] + o_desc.block_type.shape, o_desc.layout)
    rest_s = o_s
    if REST:
        rest_s = gl.allocate_shared_memory(gl.int16, [CONSUMERS] + rest_desc.block_type.shape, rest_desc.layout)
    place_s = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    place_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    place_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    in_order = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(in_order.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_free.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(place_full.index(i), count=1)
        mbarrier.init(place_free.index(i), count=CONSUMERS)
    bars = (q_full, q_free, k_full, k_free, x_full, x_free, place_full, place_free, in_order)
    order = (group_x, q_tiles, lead, head_span)
    common = (
        o_desc, rest_desc, q_s, k_s, x_s, o_s, rest_s, place_s, bars, lse_ptr, c_ptr,
        len_q, len_k, offset, scale2, o_scale, heads_q, group_x, pieces,
    )  # fmt: skip
    values = (
        counter_ptr + 1, counter_ptr + 3, v_ptr, x_ptr, c_ptr, flags_ptr, partial_ptr,
        v_b, v_h, v_n, heads_x, len_k, blocks, span, ahead, chunks, y_scale, makers, several,
    )  # fmt: skip
    producer = (
        q_desc, k_desc, x_desc, q_s, k_s, x_s, place_s, bars, counter_ptr, q_ptr,
        len_q, len_k, offset, heads_q, group_k, group_x, pieces, (q_b, q_h, q_n),
    )  # fmt: skip
    # the compile-time arguments are written out: in a variable they would become run-time ones
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (common, order, drawn, values, 0, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED,
                    VALUES, SUMS, LIMITS)),
                (_consumer, (common, order, drawn, values, 1, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED,
                    VALUES, SUMS, LIMITS)),
                (_producer, (producer, order, CAUSAL, DYNAMIC, CONSUMERS, STAGES, VALUES)),
            ],
            [4, 1],
            [REGISTERS, 504 - 2 * REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (common, order, drawn, values, 0, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED,
                    VALUES, SUMS, LIMITS)),
                (_consumer, (common, order, drawn, values, 1, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED,
                    VALUES, SUMS, LIMITS)),
                (_consumer, (common, order, drawn, values, 2, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED,
                    VALUES, SUMS, LIMITS)),
                (_producer, (producer, order, CAUSAL, DYNAMIC, CONSUMERS, STAGES, VALUES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 512 - 3 * REGISTERS],
        )
    # fmt: on
