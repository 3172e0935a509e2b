"""Device code: the forward pass."""

import triton
import triton.language as tl

from .triton_values import (
    PACKED,
    TO_ENDS,
    UNSPECIALIZED,
    is_finite,
    joined,
    key_range,
    length_of,
    load_rows,
    own_numbers,
    own_rows,
    place_of,
    scaled_log2,
    split,
    tile_count,
    tile_start,
    to_scores,
)


@triton.jit
def _tiles(
    acc, l, m, count, q, K, X, first, full_first, full_last, last, k_end, i, b, h,
    k_n, x_n, h_kv, n, d, e,
    Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, q_end, low, high, scale, cap,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, FOLD: tl.constexpr, TMA: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for index in tl.range(0, tile_count(first, full_first, full_last, last, BN, MASKED)):
        start = tile_start(index, first, full_first, full_last, BN, MASKED)
        if TMA:  # zero beyond the end of a head
            k = K.load([b.to(tl.int32), h_kv, start, 0]).reshape(BN, DP).T
        else:
            k = load_rows(K, start, k_n, n[None, :], d[:, None], k_end, D, MASKED, D != DP)
        qk = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            j = start + n
            s, slope = to_scores(qk, i[:, None], j[None, :], b, h, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
                (q_end, k_end), low, high, scale, cap, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP)  # fmt: skip
            if MASK or BIAS:
                count += tl.sum((s != float("-inf")).to(tl.int32), 1)
            m_new = tl.maximum(m, tl.max(s, 1))
            reference = tl.where(m_new == float("-inf"), 0.0, m_new) - SHIFT
            p = tl.exp2(s - reference[:, None])
        elif FOLD:
            m_new = tl.maximum(m, tl.max(qk, 1) * (scale * 1.4426950408889634))
            reference = m_new - SHIFT
            p = tl.exp2(qk * (scale * 1.4426950408889634) - reference[:, None])
        else:
            s, slope = to_scores(qk, i[:, None], (start + n)[None, :], b, h, Mask, Bias, m_b, m_h, m_i, m_j,
                b_b, b_h, b_i, b_j, (q_end, k_end), low, high, scale, cap, False, False, False, False, CAP)  # fmt: skip
            m_new = tl.maximum(m, tl.max(s, 1))
            reference = m_new - SHIFT
            p = tl.exp2(s - reference[:, None])
        rescale = tl.exp2(m - (reference + SHIFT))
        l = l * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        if TMA:
            x = X.load([b.to(tl.int32), h_kv, start, 0]).reshape(BN, EP)
        else:
            x = load_rows(X, start, x_n, n[:, None], e[None, :], k_end, E, MASKED, E != EP)
        acc = tl.dot(p.to(x.dtype), x, acc, input_precision=PRECISION)
        m = m_new
    return acc, l, m, count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward(
    Q, K, X, C, Flags, Count, Mask, Bias, QueryLengths, KeyLengths, O, R, L,
    q_b, q_h, q_n, k_b, k_h, k_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    heads, group, query_length, key_length, low, high, scale, cap, o_scale, o_rest, total,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, FOLD: tl.constexpr, TMA: tl.constexpr, LINEAR: tl.constexpr,
    REST: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, its rest and l of one block of queries, for heads inside the fast range. Grid: B·Hq · blocks.

    acc = Σ p·X and l = Σ p with p = 2^(s − m + SHIFT), then o = log2(acc/l · 2^c)·o_scale. Where there is a mask or a
    bias, the keys that each row sees are counted.
    """
    blocks = tl.cdiv(query_length, BM)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    kv = head // group
    h_kv = (h // group).to(tl.int32)
    if tl.load(Flags + kv) % 2 == 1:
        return
    if BAND_HIGH:  # the longest first
        m0 = (blocks - 1 - block) * BM
    else:
        m0 = block * BM
    q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
    k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
    m_, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, EP)
    i = m0 + m_
    b_q, b_k = place_of(QueryLengths, b, QUERY_LENGTHS), place_of(KeyLengths, b, KEY_LENGTHS)
    rows = own_numbers(b_q, b, h, heads, total, 0, QUERY_LENGTHS) + m0
    o_at, o_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
    if QUERY_LENGTHS >= PACKED:  # what is behind the sequence is another's
        query_length = q_end
        if m0 >= q_end:
            return
    if QUERY_LENGTHS == TO_ENDS:
        low += k_end - q_end
        high += k_end - q_end
    x_at, x_n = own_rows(b_k, h_kv, heads // group, key_length, E, KEY_LENGTHS)
    if not TMA:  # otherwise K and X are descriptors
        K += b_k * k_b + h_kv * k_h
        X += x_at
    q = load_rows(Q + b_q * q_b + h * q_h, m0, q_n, m_[:, None], d[None, :], q_end, D, True, D != DP)

    acc = tl.zeros((BM, EP), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    m = tl.full((BM,), float("-inf"), tl.float32)
    count = tl.zeros((BM,), tl.int32)
    first, full_first, full_last, last = key_range(
        m0, q_end, k_end, low, high, BM, BN, BAND_LOW, BAND_HIGH, MASK or BIAS
    )
    if not (MASK or BIAS):
        acc, l, m, count = _tiles(acc, l, m, count, q, K, X, first, full_first, full_last, last, k_end, i, b, h,
            k_n, x_n, h_kv, n, d, e, Mask, Bias,
            m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, q_end, low, high, scale, cap, D, E, DP, EP, BN, False, FOLD, TMA,
            BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, SHIFT, PRECISION)  # fmt: skip
    acc, l, m, count = _tiles(acc, l, m, count, q, K, X, first, full_first, full_last, last, k_end, i, b, h,
            k_n, x_n, h_kv, n, d, e, Mask, Bias,
        m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, q_end, low, high, scale, cap, D, E, DP, EP, BN, True, FOLD, TMA,
        BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, SHIFT, PRECISION)  # fmt: skip

    empty = l == 0
    odd = tl.max((~is_finite(q)).to(tl.int32), 1) > 0  # an infinite query makes NaN of what it sees, as a NaN does
    l = tl.where(odd & ~empty, float("nan"), tl.where(empty, 1.0, l))
    t = acc / l[:, None]
    if LINEAR:
        o = t
    else:
        c = tl.load(C + kv * EP + e)
        o = scaled_log2(t, c[None, :].to(tl.float32), o_scale, o_rest)
    o = tl.where(empty[:, None], 0.0, o)
    l = tl.where(empty, float("-inf"), (m - SHIFT + tl.log2(l)) * 0.6931471805599453)
    inside = i < query_length
    tl.store(L + rows + m_, l, mask=inside)
    if MASK or BIAS:
        tl.store(Count + rows + m_, count, mask=inside)
    at, keep = o_at + i.to(tl.int64)[:, None] * o_n + e[None, :], inside[:, None] & (e < E)[None, :]
    rounded, rest = split(o, O.dtype.element_ty)
    tl.store(O + at, rounded, mask=keep)
    if REST:
        tl.store(R + at, rest, mask=keep)


@triton.jit
def _values_of(V, head, heads, group, v_b, v_h):
    """Where the values that a query head reads begin."""
    return V + tl.cast(head // heads, tl.int64) * v_b + tl.cast(head % heads // group, tl.int64) * v_h


@triton.jit
def _within_range(
    V, v_n, O, R, own, few_end, high, E: tl.constexpr, EP: tl.constexpr, FEW: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """o of the queries before few_end, which see the keys ≤ i + high, put back between the values that they see."""
    e = tl.arange(0, EP)
    there = e < E
    for first in range(tl.maximum(-high, 0), few_end, FEW):  # fewer than FEW rows: those that see one key and more
        i = first + tl.arange(0, FEW)
        keep = (i < few_end)[:, None] & there[None, :]
        at = own + i.to(tl.int64)[:, None] * E + e[None, :]
        rounded = tl.load(O + at, mask=keep, other=0.0)
        o = rounded.to(tl.float32)
        if REST:
            o = joined(rounded, tl.load(R + at, mask=keep, other=0))
        low = tl.full((FEW, EP), float("inf"), tl.float32)
        top = tl.full((FEW, EP), float("-inf"), tl.float32)
        for j in tl.static_range(FEW - 1):
            v = tl.load(V + j * v_n + e, mask=there, other=0.0).to(tl.float32)[None, :]
            seen = (j <= i + high)[:, None]
            low = tl.where(seen, tl.minimum(low, v), low)
            top = tl.where(seen, tl.maximum(top, v), top)
        within = tl.minimum(tl.maximum(o, low), top)
        rounded, rest = split(tl.where(o == o, within, o), O.dtype.element_ty)
        tl.store(O + at, rounded, mask=keep)
        if REST:
            tl.store(R + at, rest, mask=keep)


@triton.jit
def _within_seen(
    V, v_n, O, R, own, worker, workers, query_length, key_length, high,
    E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, BAND_HIGH: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The same of all queries of a head, shared out to workers: where the values of a channel hardly vary."""
    n, e = tl.arange(0, ROWS), tl.arange(0, EP)
    there = e < E
    share = tl.cdiv(tl.cdiv(query_length, workers), ROWS) * ROWS
    first = worker * share
    seen = key_length  # keys that are in low and top
    if BAND_HIGH:
        seen = tl.minimum(tl.maximum(first + high + 1, 0), key_length)
    low = tl.full((EP,), float("inf"), tl.float32)
    top = tl.full((EP,), float("-inf"), tl.float32)
    for start in range(0, seen, ROWS):
        j = tl.minimum(start + n, seen - 1)
        v = tl.load(V + j.to(tl.int64)[:, None] * v_n + e[None, :], mask=there[None, :], other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(v, 0))
        top = tl.maximum(top, tl.max(v, 0))
    for m0 in range(first, tl.minimum(first + share, query_length), ROWS):
        i = m0 + n
        lows, tops = low[None, :] + tl.zeros((ROWS, 1), tl.float32), top[None, :] + tl.zeros((ROWS, 1), tl.float32)
        if BAND_HIGH:
            for step in tl.static_range(1, ROWS + 1):
                j = m0 + high + step
                inside = (j >= 0) & (j < key_length)
                v = tl.load(V + tl.cast(j, tl.int64) * v_n + e, mask=there & inside, other=0.0).to(tl.float32)
                sees = (n >= step)[:, None] & inside
                lows = tl.where(sees, tl.minimum(lows, v[None, :]), lows)
                tops = tl.where(sees, tl.maximum(tops, v[None, :]), tops)
                low = tl.where(inside, tl.minimum(low, v), low)
                top = tl.where(inside, tl.maximum(top, v), top)
        keep = (i < query_length)[:, None] & there[None, :]
        at = own + i.to(tl.int64)[:, None] * E + e[None, :]
        rounded = tl.load(O + at, mask=keep, other=0.0)
        o = rounded.to(tl.float32)
        if REST:
            o = joined(rounded, tl.load(R + at, mask=keep, other=0))
        within = tl.minimum(tl.maximum(o, lows), tops)
        rounded, rest = split(tl.where((o == o) & (lows <= tops), within, o), O.dtype.element_ty)
        tl.store(O + at, rounded, mask=keep)
        if REST:
            tl.store(R + at, rest, mask=keep)


@triton.jit
def _exact_head(
    head, flags, worker, workers,
    Q, K, V, Count, Mask, Bias, QueryLengths, KeyLengths, O, R, L,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    heads, group, query_length, key_length, low, high, scale, cap, beta, few_end, total,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, LINEAR: tl.constexpr, FEW: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What of a head's rows is to be computed exactly, shared out to workers."""
    b = tl.cast(head // heads, tl.int64)
    h = tl.cast(head % heads, tl.int64)
    h_kv = h // group
    whole = flags % 2 == 1
    q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
    k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
    b_q, b_k = place_of(QueryLengths, b, QUERY_LENGTHS), place_of(KeyLengths, b, KEY_LENGTHS)
    numbers = own_numbers(b_q, b, h, heads, total, 0, QUERY_LENGTHS)
    o_at, o_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
    if QUERY_LENGTHS >= PACKED:
        query_length = q_end
    if QUERY_LENGTHS == TO_ENDS:
        low += k_end - q_end
        high += k_end - q_end
    rows_end = tl.where(flags == 0, tl.minimum(few_end, query_length), query_length)
    m_, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    parts: tl.constexpr = (E + BE - 1) // BE
    for work in range(worker, tl.cdiv(rows_end, BM) * parts, workers):
        m0 = work // parts * BM
        e = work % parts * BE + tl.arange(0, BE)
        i = m0 + m_
        wanted = (flags != 0) & (i < query_length)
        if MASK or BIAS:
            count = tl.load(Count + numbers + i, mask=i < query_length, other=0)
        else:
            count = tl.maximum(k_end, 0) + i * 0
            if BAND_HIGH:
                count = tl.minimum(count, i + high + 1)
            if BAND_LOW:
                count -= tl.maximum(i + low, 0)
        few = (count > 0) & (count < FEW) & (i < q_end) & (i < few_end)
        if tl.max((wanted | few).to(tl.int32)) > 0:
            q = load_rows(Q + b_q * q_b + h * q_h, m0, q_n, m_[:, None], d[None, :], q_end, D, True, D != DP)
            q_odd = tl.max((~is_finite(q)).to(tl.int32), 1) > 0
            m = tl.full((BM,), float("-inf"), tl.float32)
            l = tl.zeros((BM,), tl.float32)
            top = tl.full((BM, BE), float("-inf"), tl.float32)
            acc = tl.zeros((BM, BE), tl.float32)
            first, inner_first, inner_last, last = key_range(
                m0, q_end, k_end, low, high, BM, BN, BAND_LOW, BAND_HIGH, True
            )
            for start in range(first, last, BN):
                k = load_rows(K + b_k * k_b + h_kv * k_h, start, k_n, n[None, :], d[:, None], k_end, D, True, D != DP)
                k_odd = tl.max((~is_finite(k)).to(tl.int32), 0) > 0
                qk = tl.where(q_odd[:, None] | k_odd[None, :], float("nan"), tl.dot(q, k, input_precision=PRECISION))
                s, slope = to_scores(qk, i[:, None], (start + n)[None, :], b, h, Mask, Bias, m_b, m_h, m_i, m_j,
                    b_b, b_h, b_i, b_j, (q_end, k_end), low, high, scale, cap,
                    BAND_LOW, BAND_HIGH, MASK, BIAS, CAP)  # fmt: skip
                at = V + b_k * v_b + h_kv * v_h + tl.cast(start, tl.int64) * v_n + (n[:, None] * v_n + e[None, :])
                v = tl.load(at, mask=(start + n < k_end)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)

                m_new = tl.maximum(m, tl.max(s, 1))
                safe = tl.where(m_new == float("-inf"), 0.0, m_new)
                p = tl.exp2(s - safe[:, None])
                l = l * tl.exp2(m - safe) + tl.sum(p, 1)
                if LINEAR:
                    seen = s != float("-inf")
                    terms = tl.where(seen[:, :, None], p[:, :, None] * v[None, :, :], 0.0)
                    acc = acc * tl.exp2(m - safe)[:, None] + tl.sum(terms, 1)
                else:
                    natural = (s * 0.6931471805599453)[:, :, None]
                    y = (v * beta)[None, :, :]
                    hidden = (s == float("-inf"))[:, :, None]
                    top_new = tl.maximum(top, tl.max(tl.where(hidden, float("-inf"), natural + y), 1))
                    about = tl.where(tl.abs(top_new) == float("inf"), 0.0, top_new)
                    # y is large, and so is what is taken off it: their sum with a score would be rounded
                    t = tl.where(hidden, float("-inf"), (y - about[:, None, :]) + natural)
                    acc *= tl.exp2((top - about) * 1.4426950408889634)
                    acc += tl.sum(tl.exp2(t * 1.4426950408889634), 1)
                    top = top_new
                m = m_new
            empty = l == 0
            l = tl.where(empty, 1.0, l)
            if LINEAR:
                o = acc / l[:, None]
            else:
                about = tl.where(tl.abs(top) == float("inf"), 0.0, top)
                sum_log2 = tl.where(acc == 0, float("-inf"), tl.log2(tl.where(acc == 0, 1.0, acc)))
                o = (about + (sum_log2 - (m + tl.log2(l))[:, None]) * 0.6931471805599453) / beta
            o = tl.where(empty[:, None], 0.0, o)
            l = tl.where(empty, float("-inf"), (m + tl.log2(l)) * 0.6931471805599453)
            inside = i < query_length
            to = o_at + i.to(tl.int64)[:, None] * o_n + e[None, :]
            if FIRST:  # as rows of a head without NaN: the same bits
                if not whole:
                    there = few[:, None] & (e < E)[None, :]
                    fast = tl.load(O + to, mask=there, other=0.0)
                    within = fast.to(tl.float32)
                    if REST:
                        within = joined(fast, tl.load(R + to, mask=there, other=0))
                    least = tl.full((BM, BE), float("inf"), tl.float32)
                    greatest = tl.full((BM, BE), float("-inf"), tl.float32)
                    for j in tl.static_range(FEW - 1):
                        v = tl.load(V + b_k * v_b + h_kv * v_h + j * v_n + e, mask=e < E, other=0.0).to(tl.float32)
                        sees = (j <= i + high)[:, None]
                        least = tl.where(sees, tl.minimum(least, v[None, :]), least)
                        greatest = tl.where(sees, tl.maximum(greatest, v[None, :]), greatest)
                    within = tl.minimum(tl.maximum(within, least), greatest)
                    o = tl.where(there & is_finite(o), within, o)
            exactly = few & ((not FIRST) | whole)
            tl.store(L + numbers + i, l, mask=inside & (whole | exactly | ((l != l) & (flags != 0))))
            keep = inside[:, None] & (e < E)[None, :] & (whole | few[:, None] | (~is_finite(o) & (flags != 0)))
            rounded, rest = split(o, O.dtype.element_ty)
            tl.store(O + to, rounded, mask=keep)
            if REST:
                tl.store(R + to, rest, mask=keep)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def exact(
    Q, K, V, Flags, Count, Mask, Bias, QueryLengths, KeyLengths, O, R, L,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    workers, all_heads, heads, group, query_length, key_length, low, high, scale, cap, beta, few_end, total,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, LINEAR: tl.constexpr, FEW: tl.constexpr,
    EP: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same from log Σ exp(s + βv), per channel about its own greatest term. Each head is shared out to ``workers``.

    The exponents are natural here: βv·log2e need not be finite where βv is.

    Heads outside the fast range are written whole; of heads that hold NaN or ±∞ only what is not finite. Of all heads,
    rows that see fewer than FEW keys, which are before few_end, and all rows where a channel hardly varies (4): where X
    is rounded, such a mean can leave the range of the values. Where the few are the first FEW keys (FIRST), heads
    inside the range only have them put back.

    Grid: B·Hq · workers; with FIRST any number of programs.
    """
    if FIRST:
        flagged = 0
        kv = tl.arange(0, 128)
        for start in range(0, all_heads // group, 128):
            found = tl.load(Flags + start + kv, mask=start + kv < all_heads // group, other=0)
            flagged = tl.maximum(flagged, tl.max(found))
        if few_end > 0:
            for head in range(tl.program_id(0), all_heads, tl.num_programs(0)):
                if tl.load(Flags + head // group) == 0:
                    _within_range(
                        _values_of(V, head, heads, group, v_b, v_h), v_n, O, R,
                        tl.cast(head, tl.int64) * query_length * E, few_end, high, E, EP, FEW, REST,
                    )  # fmt: skip
        if flagged > 0:
            for work in range(tl.program_id(0), all_heads * workers, tl.num_programs(0)):
                head, worker = work // workers, work % workers
                flags = tl.load(Flags + head // group)
                if flags == 4:
                    _within_seen(
                        _values_of(V, head, heads, group, v_b, v_h), v_n, O, R,
                        tl.cast(head, tl.int64) * query_length * E, worker, workers, query_length, key_length, high,
                        E, EP, FEW, BAND_HIGH, REST,
                    )  # fmt: skip
                elif flags != 0:
                    _exact_head(
                        head, flags, worker, workers,
                        Q, K, V, Count, Mask, Bias, QueryLengths, KeyLengths, O, R, L,
                        q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
                        heads, group, query_length, key_length, low, high, scale, cap, beta, few_end, total,
                        D, E, DP, BM, BN, BE, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP,
                        QUERY_LENGTHS, KEY_LENGTHS, LINEAR, FEW, FIRST, REST, PRECISION,
                    )  # fmt: skip
    else:
        head = tl.program_id(0) // workers
        _exact_head(
            head, tl.load(Flags + head // group), tl.program_id(0) % workers, workers,
            Q, K, V, Count, Mask, Bias, QueryLengths, KeyLengths, O, R, L,
            q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
            heads, group, query_length, key_length, low, high, scale, cap, beta, few_end, total,
            D, E, DP, BM, BN, BE, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP,
            QUERY_LENGTHS, KEY_LENGTHS, LINEAR, FEW, FIRST, REST, PRECISION,
        )  # fmt: skip
