"""Device code: from p·X, as a kernel of softmax attention returns it, to o."""

import triton
import triton.language as tl

from .triton_values import scaled_log2


@triton.jit(do_not_specialize=["heads", "group", "query_length"])
def finish(
    A, C, O, a_b, a_h, a_n, heads, group, query_length, o_scale, o_rest,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, LINEAR: tl.constexpr,
):  # fmt: skip
    """o = log2(a·2^c)·(o_scale + o_rest); where nothing is seen a is 0, and so is o. Grid: B·Hq · blocks of queries.

    A: (B, Hq, Lq, E) of any strides of rows; C: (B·Hkv, EP), int32; O: (B, Hq, Lq, E), contiguous.
    """
    blocks = tl.cdiv(query_length, BM)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    i, e = block * BM + tl.arange(0, BM), tl.arange(0, EP)
    inside = (i < query_length)[:, None] & (e < E)[None, :]
    a = tl.load(A + b * a_b + h * a_h + i.to(tl.int64)[:, None] * a_n + e[None, :], mask=inside, other=0.0)
    a = a.to(tl.float32)
    if LINEAR:
        o = a
    else:
        c = tl.load(C + (head // group) * EP + e).to(tl.float32)
        o = tl.where(a == 0, 0.0, scaled_log2(a, c[None, :], o_scale, o_rest))
    at = O + (head.to(tl.int64) * query_length + i)[:, None] * E + e[None, :]
    tl.store(at, o.to(O.dtype.element_ty), mask=inside)
