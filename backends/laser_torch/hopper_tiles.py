"""What a consumer of the Hopper forward kernel does with a tile, in Gluon: products, weights and logarithms.

Device code only: nothing of the host is imported here.
"""

# Gluon reads annotations as types of its own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, valid-type, operator, untyped-decorator, no-redef"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import hopper_values

ROWS = gl.constexpr(64)  # of a consumer warpgroup


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
def pack(weights, dtype: gl.constexpr):
    """Weights rounded, two in a word: carried around the loop as they are, they would take a register each."""
    even, odd = gl.split(weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]))
    return hopper_values.pack(even, odd, dtype)


@gluon.jit
def _unpack(packed, dtype: gl.constexpr, operand: gl.constexpr):
    pair = gl.join(packed.to(gl.int16), (packed >> 16).to(gl.int16))
    p = pair.reshape([packed.shape[0], packed.shape[1] * 2]).to(dtype, bitcast=True)
    return gl.convert_layout(p, operand)


@gluon.jit
def scores(q, k_s, k_full, it, STAGES: gl.constexpr, BLOCK_K: gl.constexpr, zero):
    """Start the score product of the it-th key tile."""
    stage = it % STAGES
    mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
    k = k_s.index(stage)._reinterpret(
        k_s.dtype, [BLOCK_K, k_s.shape[4]], gl.NVMMASharedLayout(k_s.layout.swizzle_byte_width, 16, 2)
    )
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def products(p, o, x_s, x_full, it, STAGES: gl.constexpr, BLOCK_K: gl.constexpr, operand: gl.constexpr):
    """Start the product of the weights with the it-th tile of x."""
    stage = it % STAGES
    mbarrier.wait(x_full.index(stage), (it // STAGES) & 1)
    x = x_s.index(stage)._reinterpret(
        x_s.dtype, [BLOCK_K, x_s.shape[4]], gl.NVMMASharedLayout(x_s.layout.swizzle_byte_width, 16, 2)
    )
    return warpgroup_mma(_unpack(p, x_s.dtype, operand), x, o, is_async=True)


@gluon.jit
def await_order(order, it, WHICH: gl.constexpr, ORDERED: gl.constexpr):
    """Consumers take turns in issuing products, so that the weights of one are worked out under those of the other."""
    if ORDERED:
        if WHICH == 0:
            mbarrier.wait(order.index(0), (it & 1) ^ 1)
        else:
            mbarrier.wait(order.index(WHICH), it & 1)


@gluon.jit
def pass_order(order, WHICH: gl.constexpr, CONSUMERS: gl.constexpr, ORDERED: gl.constexpr):
    """Let the next consumer issue its products."""
    if ORDERED:
        mbarrier.arrive(order.index((WHICH + 1) % CONSUMERS))


@gluon.jit
def step(
    q, p, o, m, l, k_s, x_s, bars, it, last, first, key, len_k, offset, scale2,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr, SHIFT: gl.constexpr, STAGES: gl.constexpr, BLOCK_K: gl.constexpr,
    s_layout: gl.constexpr, operand: gl.constexpr,
    WHICH: gl.constexpr, CONSUMERS: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """Scores of tile ``it`` and the product of tile ``it − 1``; the weights of the former under the latter.

    ``last``: q is not read again.
    """
    _q_full, q_free, k_full, k_free, x_full, x_free, _place_full, _place_free, order = bars
    zero = gl.zeros([ROWS, BLOCK_K], gl.float32, s_layout)
    await_order(order, it, WHICH, ORDERED)
    s = scores(q, k_s, k_full, it, STAGES, BLOCK_K, zero)
    o = products(p, o, x_s, x_full, it - 1, STAGES, BLOCK_K, operand)
    pass_order(order, WHICH, CONSUMERS, ORDERED)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(it % STAGES))
    mbarrier.arrive(q_free.index(WHICH), pred=last)
    if MASKED:
        s = _mask(s, first, key, len_k, offset, CAUSAL, s_layout)
    weights, m, alpha = _weights(s, m, scale2, SHIFT, MASKED)
    l = l * alpha + gl.sum(weights, 1)
    o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(x_free.index((it - 1) % STAGES))
    o_layout: gl.constexpr = o.type.layout
    o = o * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)
    p = pack(weights, x_s.dtype)
    return p, o, m, l


@gluon.jit
def _log2(a):
    """The hardware's logarithm, wrong by 2^−22: gl.log2 is an expansion of 30 instructions, once per output."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [a], gl.float32, True, 1)


@gluon.jit
def _log2_parts(a):
    """log2 of a normal number > 0 as an integer and the rest: a power of two changes only the integer."""
    bits = a.to(gl.int32, bitcast=True)
    mantissa = gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x007FFFFF, $2, 0xEA;", "=f,r,r", [bits, gl.full_like(bits, 0x3F800000)], gl.float32, True, 1
    )  # what is below the exponent, and that of 1
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
def first_weights(
    s, first, total, scale2, len_k, offset, CAUSAL: gl.constexpr, SHIFT: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """Weights of a tile's first scores, and the row maxima and sums."""
    s_layout: gl.constexpr = s.type.layout
    of_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    s = _mask(s, first, (total - 1) * s.shape[1], len_k, offset, CAUSAL, s_layout)
    m = gl.full([ROWS], float("-inf"), gl.float32, of_rows)
    weights, m, _ = _weights(s, m, scale2, SHIFT, True)
    return pack(weights, dtype), m, gl.sum(weights, 1)


@gluon.jit
def write_lse(m, l, lse_ptr, first, bh, len_q, scale2, SHIFT: gl.constexpr):
    """The log-sum-exps of rows of the batch·head ``bh``."""
    of_rows: gl.constexpr = l.type.layout
    row = first + gl.arange(0, ROWS, layout=of_rows)
    lse = gl.where(l > 0, m * scale2 + (_log2(gl.where(l > 0, l, 1.0)) - SHIFT), float("-inf")) * 0.6931471805599453
    gl.store(lse_ptr + bh.to(gl.int64) * len_q + row, lse, mask=row < len_q)


@gluon.jit
def write(o, l, c, o_scale, o_desc, rest_desc, o_s, rest_s, batch, head, first, REST: gl.constexpr):
    """o from its sums and those of the weights, in shared memory and on the way to where it belongs."""
    # exponents apart, so that the bits do not depend on c, which knows of keys that are not visible
    whole, part = _log2_parts(o)
    l_whole, l_part = _log2_parts(l)
    # of a row that sees no key, o is 0, and not −0
    l_whole = gl.where(l > 0, l_whole, -(1 << 30))
    scale = gl.where(l > 0, o_scale, 0.0)
    of_rows: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    l_whole = gl.expand_dims(gl.convert_layout(l_whole, of_rows), 1)
    l_part = gl.expand_dims(gl.convert_layout(l_part * scale, of_rows), 1)
    scale = gl.expand_dims(gl.convert_layout(scale, of_rows), 1) + gl.zeros_like(o)
    o = gl.fma((whole - l_whole + gl.expand_dims(c, 0)).to(gl.float32), scale, gl.fma(part, scale, -l_part))
    rounded, rest = _split(o, o_s.dtype)
    flat: gl.constexpr = gl.NVMMASharedLayout(o_s.layout.swizzle_byte_width, 16, 2)
    tma.store_wait(0)  # of the tile before
    gl.thread_barrier()
    o_s._reinterpret(o_s.dtype, o.shape, flat).store(rounded)
    if REST:
        rest_s._reinterpret(gl.int16, o.shape, flat).store(rest)
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [batch, head, first, 0], o_s)
    if REST:
        tma.async_copy_shared_to_global(rest_desc, [batch, head, first, 0], rest_s)
