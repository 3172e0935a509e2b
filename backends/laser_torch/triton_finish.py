"""Device code that comes last: from p·X, as softmax attention returns it, to o; and rows of no packed sequence."""

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


@triton.jit(do_not_specialize=["workers", "sequences", "longest", "rows"])
def clear(X, Starts, workers, sequences, longest, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows of X ``(rows, WIDTH)`` before the first sequence, behind the last, and where one is cut off.

    Grid: (sequences + 2) · workers, the programs of a gap.
    """
    gap, worker = tl.program_id(0) // workers, tl.program_id(0) % workers
    end = tl.load(Starts + gap, mask=gap <= sequences, other=rows)
    begin = tl.load(Starts + gap - 1, mask=gap > 0, other=0)  # of the sequence in front of the gap
    if (gap > 0) & (gap <= sequences):
        begin += longest
    begin, end = begin.to(tl.int64) * WIDTH, end.to(tl.int64) * WIDTH
    nothing = tl.zeros((BLOCK,), X.dtype.element_ty)
    for at in range(begin + worker * BLOCK, end, workers * BLOCK):
        i = at + tl.arange(0, BLOCK)
        tl.store(X + i, nothing, mask=i < end)
