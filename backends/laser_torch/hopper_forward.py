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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS = gl.constexpr(64)  # of a consumer warpgroup


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
def _place(index, heads, HEAVY_FIRST: gl.constexpr, head_span, q_tiles):
    """(tile of the queries, batch·head) of a piece of work: heads in sections whose keys share the L2 cache."""
    section = index // (head_span * q_tiles)
    within = index - section * head_span * q_tiles
    span = gl.minimum(head_span, heads - section * head_span)
    if HEAVY_FIRST:
        q_tile = q_tiles - 1 - within // span
        head = within % span
    else:
        q_tile = within % q_tiles
        head = within // q_tiles
    return q_tile, section * head_span + head


@gluon.jit
def _draw(turn, counter_ptr, place_s, place_full, place_free, DYNAMIC: gl.constexpr):
    """The producer's next piece of work; drawn from a counter, it is passed on to the consumers."""
    if DYNAMIC:
        index = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        slot = turn % 2
        mbarrier.wait(place_free.index(slot), ((turn // 2) & 1) ^ 1)
        place_s.index(slot).store(gl.full([1], index, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(place_full.index(slot))
    else:
        index = gl.program_id(0) + turn * gl.num_programs(0)
    return index


@gluon.jit
def _follow(turn, place_s, place_full, place_free, DYNAMIC: gl.constexpr):
    """A consumer's next piece of work: the producer's."""
    if DYNAMIC:
        slot = turn % 2
        mbarrier.wait(place_full.index(slot), (turn // 2) & 1)
        index = gl.max(place_s.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
        gl.thread_barrier()  # all warps have read
        mbarrier.arrive(place_free.index(slot))
    else:
        index = gl.program_id(0) + turn * gl.num_programs(0)
    return index


@gluon.jit
def _producer(
    common, CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    (
        q_desc, k_desc, x_desc, q_s, k_s, x_s, place_s, bars, counter_ptr,
        len_k, offset, heads_q, heads, group_k, group_x, q_tiles, tiles, head_span,
    ) = common  # fmt: skip
    q_full, q_free, k_full, k_free, x_full, x_free, place_full, place_free, _order = bars
    BLOCK_K: gl.constexpr = k_desc.block_type.shape[2]
    loads = 0
    turn = 0
    index = _draw(turn, counter_ptr, place_s, place_full, place_free, DYNAMIC)
    while index < tiles:
        q_tile, bh = _place(index, heads, CAUSAL, head_span, q_tiles)
        batch = bh // heads_q
        head = bh % heads_q
        first = q_tile * (CONSUMERS * ROWS)
        total, _ = _span(first, CONSUMERS * ROWS, BLOCK_K, len_k, offset, CAUSAL)
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(q_free.index(w), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [batch, head, first + w * ROWS, 0], q_full.index(w), q_s.index(w))
        for i in range(total):
            row = (total - 1 - i) * BLOCK_K
            stage = loads % STAGES
            phase = ((loads // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [batch, head // group_k, row, 0], k_full.index(stage), k_s.index(stage)
            )
            mbarrier.wait(x_free.index(stage), phase)
            mbarrier.expect(x_full.index(stage), x_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                x_desc, [batch, head // group_x, row, 0], x_full.index(stage), x_s.index(stage)
            )
            loads += 1
        turn += 1
        index = _draw(turn, counter_ptr, place_s, place_full, place_free, DYNAMIC)


@gluon.jit
def _mask(s, first, key, len_k, offset, CAUSAL: gl.constexpr, layout: gl.constexpr):
    """Scores of the keys from ``key``, −∞ where the queries from ``first`` do not see them."""
    column = gl.expand_dims(gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout)), 0)
    if CAUSAL:
        row = first + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, layout))
        last = gl.minimum(row + offset, len_k - 1) - key
        masked = gl.where(column <= gl.expand_dims(last, 1), s, float("-inf"))
    else:
        masked = gl.where(column < len_k - key, s, float("-inf"))
    return masked


@gluon.jit
def _weights(s, m, scale2, SHIFT: gl.constexpr, MASKED: gl.constexpr):
    """Weights of a tile, the new row maximum and what the old sums are to be multiplied with."""
    m_new = gl.maximum(m, gl.max(s, 1))
    reference = m_new
    if MASKED:
        reference = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2((m - reference) * scale2)
    p = gl.exp2(s * scale2 - gl.expand_dims(reference * scale2 - SHIFT, 1))
    return p, m_new, alpha


@gluon.jit
def _pack(weights, dtype: gl.constexpr):
    """Weights rounded, two in a word: carried around the loop as they are, they would take a register each."""
    even, odd = gl.split(weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        rounding: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        rounding: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(rounding, "=r,r,r", [even, odd], gl.int32, True, 1)


@gluon.jit
def _unpack(packed, dtype: gl.constexpr, operand: gl.constexpr):
    pair = gl.join(packed.to(gl.int16), (packed >> 16).to(gl.int16))
    p = pair.reshape([packed.shape[0], packed.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(p, operand)


@gluon.jit
def _scores(q, k_s, k_full, it, STAGES: gl.constexpr, BLOCK_K: gl.constexpr, zero):
    """Start the score product of the it-th key tile."""
    stage = it % STAGES
    mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
    k = k_s.index(stage)._reinterpret(
        k_s.dtype, [BLOCK_K, k_s.shape[4]], gl.NVMMASharedLayout(k_s.layout.swizzle_byte_width, 16, 2)
    )
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _values(p, o, x_s, x_full, it, STAGES: gl.constexpr, BLOCK_K: gl.constexpr, operand: gl.constexpr):
    """Start the product of the weights with the it-th tile of x."""
    stage = it % STAGES
    mbarrier.wait(x_full.index(stage), (it // STAGES) & 1)
    x = x_s.index(stage)._reinterpret(
        x_s.dtype, [BLOCK_K, x_s.shape[4]], gl.NVMMASharedLayout(x_s.layout.swizzle_byte_width, 16, 2)
    )
    return warpgroup_mma(_unpack(p, x_s.dtype, operand), x, o, is_async=True)


@gluon.jit
def _await_order(order, it, WHICH: gl.constexpr, ORDERED: gl.constexpr):
    """Consumers take turns in issuing products, so that the weights of one are worked out under those of the other."""
    if ORDERED:
        if WHICH == 0:
            mbarrier.wait(order.index(0), (it & 1) ^ 1)
        else:
            mbarrier.wait(order.index(WHICH), it & 1)


@gluon.jit
def _pass_order(order, WHICH: gl.constexpr, CONSUMERS: gl.constexpr, ORDERED: gl.constexpr):
    if ORDERED:
        mbarrier.arrive(order.index((WHICH + 1) % CONSUMERS))


@gluon.jit
def _step(
    q, p, o, m, l, k_s, x_s, bars, it, first, key, len_k, offset, scale2,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr, SHIFT: gl.constexpr, STAGES: gl.constexpr, BLOCK_K: gl.constexpr,
    s_layout: gl.constexpr, operand: gl.constexpr,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """Scores of tile ``it`` and the product of tile ``it − 1``; the weights of the former under the latter."""
    _q_full, _q_free, k_full, k_free, x_full, x_free, _place_full, _place_free, order = bars
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    _await_order(order, it, WHICH, ORDERED)
    s = _scores(q, k_s, k_full, it, STAGES, BLOCK_K, zero)
    o = _values(p, o, x_s, x_full, it - 1, STAGES, BLOCK_K, operand)
    _pass_order(order, WHICH, CONSUMERS, ORDERED)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(it % STAGES))
    if MASKED:
        s = _mask(s, first, key, len_k, offset, CAUSAL, s_layout)
    weights, m, alpha = _weights(s, m, scale2, SHIFT, MASKED)
    l = l * alpha + gl.sum(weights, 1)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(x_free.index((it - 1) % STAGES))
    o_layout: gl.constexpr = o.type.layout
    o = o * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)
    p = _pack(weights, x_s.dtype)
    return p, o, m, l


@gluon.jit
def _log2(a):
    """The hardware's logarithm, wrong by 2^−22: gl.log2 is an expansion of 30 instructions, once per output."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [a], gl.float32, True, 1)


@gluon.jit
def _log2_parts(a):
    """log2 of a normal number > 0 as an integer and the rest: a power of two changes only the integer."""
    bits = a.to(gl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(gl.float32, bitcast=True)
    return (bits >> 23) - 127, _log2(mantissa)


@gluon.jit
def _split(o, dtype: gl.constexpr):
    """o rounded, and the rest: see ``triton_values.split``."""
    bits = o.to(gl.int32, bitcast=True)
    if dtype == gl.bfloat16:  # the rest is the low half, unless o is half-way: with its last bit set it never is
        bits = bits | 1
        rounded = bits.to(gl.float32, bitcast=True).to(dtype)
        rest = bits.to(gl.int16)
    else:
        rounded = o.to(dtype)
        rest = bits - rounded.to(gl.float32).to(gl.int32, bitcast=True)
        rest = gl.minimum(gl.maximum(rest, -32768), 32767).to(gl.int16)
    return rounded, rest


@gluon.jit
def _consumer(
    common, WHICH: gl.constexpr, CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, SHIFT: gl.constexpr, REST: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    (
        o_desc, rest_desc, q_s, k_s, x_s, o_s, rest_s, place_s, bars, lse_ptr, c_ptr,
        len_q, len_k, offset, scale2, o_scale, heads_q, heads, group_x, q_tiles, tiles, head_span,
    ) = common  # fmt: skip
    q_full, q_free, k_full, k_free, x_full, x_free, place_full, place_free, order = bars
    BLOCK_K: gl.constexpr = k_s.shape[3]
    E: gl.constexpr = x_s.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    flat: gl.constexpr = gl.NVMMASharedLayout(q_s.layout.swizzle_byte_width, 16, 2)
    q = q_s.index(WHICH)._reinterpret(q_s.dtype, [ROWS, E], flat)
    out = o_s.index(WHICH)._reinterpret(o_s.dtype, [ROWS, E], flat)
    it = 0
    turn = 0
    index = _follow(turn, place_s, place_full, place_free, DYNAMIC)
    while index < tiles:
        q_tile, bh = _place(index, heads, CAUSAL, head_span, q_tiles)
        batch = bh // heads_q
        head = bh % heads_q
        first_of_tile = q_tile * (CONSUMERS * ROWS)
        first = first_of_tile + WHICH * ROWS
        total, full = _span(first_of_tile, CONSUMERS * ROWS, BLOCK_K, len_k, offset, CAUSAL)

        mbarrier.wait(q_full.index(WHICH), turn & 1)
        zero = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
        _await_order(order, it, WHICH, ORDERED)
        s = _scores(q, k_s, k_full, it, STAGES, BLOCK_K, zero)
        _pass_order(order, WHICH, CONSUMERS, ORDERED)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_free.index(it % STAGES))
        s = _mask(s, first, (total - 1) * BLOCK_K, len_k, offset, CAUSAL, s_layout)
        m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        weights, m, _ = _weights(s, m, scale2, SHIFT, True)
        l = gl.sum(weights, 1)
        p = _pack(weights, x_s.dtype)
        o = gl.zeros([ROWS, E], gl.float32, o_layout)
        it += 1
        for i in range(1, total - full):
            p, o, m, l = _step(
                q, p, o, m, l, k_s, x_s, bars, it, first, (total - 1 - i) * BLOCK_K, len_k, offset, scale2,
                CAUSAL, True, SHIFT, STAGES, BLOCK_K, s_layout, operand, WHICH, CONSUMERS, ORDERED,
            )  # fmt: skip
            it += 1
        for _ in range(gl.maximum(total - full, 1), total):
            p, o, m, l = _step(
                q, p, o, m, l, k_s, x_s, bars, it, first, 0, len_k, offset, scale2,
                CAUSAL, False, SHIFT, STAGES, BLOCK_K, s_layout, operand, WHICH, CONSUMERS, ORDERED,
            )  # fmt: skip
            it += 1
        mbarrier.arrive(q_free.index(WHICH))
        o = _values(p, o, x_s, x_full, it - 1, STAGES, BLOCK_K, operand)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(x_free.index((it - 1) % STAGES))

        sees = l > 0
        row = first + gl.arange(0, ROWS, layout=row_layout)
        rows64 = bh.to(gl.int64) * len_q
        safe = gl.where(sees, l, 1.0)
        lse = gl.where(sees, m * scale2 + (_log2(safe) - SHIFT), float("-inf")) * 0.6931471805599453
        gl.store(lse_ptr + rows64 + row, lse, mask=row < len_q)

        channel = gl.arange(0, E, layout=gl.SliceLayout(0, o_layout))
        l_o = gl.expand_dims(gl.convert_layout(safe, gl.SliceLayout(1, o_layout)), 1)
        # exponents apart, so that the bits do not depend on c, which knows of keys that are not visible
        whole, part = _log2_parts(o)
        l_whole, l_part = _log2_parts(l_o)
        c = gl.load(c_ptr + (batch * (heads_q // group_x) + head // group_x) * E + channel)
        o = ((whole - l_whole + gl.expand_dims(c, 0)).to(gl.float32) + (part - l_part)) * o_scale
        if CAUSAL:
            o_sees = gl.convert_layout(sees, gl.SliceLayout(1, o_layout))
            o = gl.where(gl.expand_dims(o_sees, 1), o, 0.0)
        rounded, rest = _split(o, o_s.dtype)
        tma.store_wait(0)  # of the tile before
        gl.thread_barrier()
        out.store(rounded)
        if REST:
            rest_s.index(WHICH)._reinterpret(gl.int16, [ROWS, E], flat).store(rest)
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, first, 0], o_s.index(WHICH))
        if REST:
            tma.async_copy_shared_to_global(rest_desc, [batch, head, first, 0], rest_s.index(WHICH))
        turn += 1
        index = _follow(turn, place_s, place_full, place_free, DYNAMIC)
    tma.store_wait(0)


# the sizes are not specialised for: one kernel per form of problem, whatever its sizes
@gluon.jit(
    do_not_specialize=[
        "len_q", "len_k", "offset", "heads_q", "heads", "group_k", "group_x", "q_tiles", "tiles", "head_span",
    ]
)  # fmt: skip
def forward_kernel(
    q_desc, k_desc, x_desc, o_desc, rest_desc, lse_ptr, c_ptr, counter_ptr,
    len_q, len_k, offset, scale2, o_scale, heads_q, heads, group_k, group_x, q_tiles, tiles, head_span,
    CAUSAL: gl.constexpr, DYNAMIC: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SHIFT: gl.constexpr,
    REST: gl.constexpr, ORDERED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """The forward pass of all heads; the arguments are those that ``hopper.forward`` passes."""
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    x_s = gl.allocate_shared_memory(x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    o_s = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS] + o_desc.block_type.shape, o_desc.layout)
    rest_s = o_s
    if REST:
        rest_s = gl.allocate_shared_memory(gl.int16, [CONSUMERS] + rest_desc.block_type.shape, rest_desc.layout)
    place_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    place_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    place_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_free.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(place_full.index(i), count=1)
        mbarrier.init(place_free.index(i), count=CONSUMERS)
    bars = (q_full, q_free, k_full, k_free, x_full, x_free, place_full, place_free, order)
    common = (
        o_desc, rest_desc, q_s, k_s, x_s, o_s, rest_s, place_s, bars, lse_ptr, c_ptr,
        len_q, len_k, offset, scale2, o_scale, heads_q, heads, group_x, q_tiles, tiles, head_span,
    )  # fmt: skip
    producer = (
        q_desc, k_desc, x_desc, q_s, k_s, x_s, place_s, bars, counter_ptr,
        len_k, offset, heads_q, heads, group_k, group_x, q_tiles, tiles, head_span,
    )  # fmt: skip
    # the compile-time arguments are written out: in a variable they would become run-time ones
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (common, 0, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED)),
                (_consumer, (common, 1, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED)),
                (_producer, (producer, CAUSAL, DYNAMIC, CONSUMERS, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (common, 0, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED)),
                (_consumer, (common, 1, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED)),
                (_consumer, (common, 2, CAUSAL, DYNAMIC, CONSUMERS, STAGES, SHIFT, REST, ORDERED)),
                (_producer, (producer, CAUSAL, DYNAMIC, CONSUMERS, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    # fmt: on
