"""Device code: the backward pass of heads inside the fast range.

    p = 2^(s − l)    ds = p ∘ (G·Xᵀ/β + r)    dv = X ∘ (pᵀ·G)    dq = scale·ds·K    dk = scale·dsᵀ·Q

with G = do·2^(c − βo·log2e) and r = dl − Σ_e do/β; at β = 0, X = v, G = do and r = dl − Σ_e do·o. Every sum has one
order: one kernel owns its keys and walks over queries, another owns its queries and walks over keys.

A row that nothing flows through has l = +∞, which makes its p zero, and one that is not finite has l = NaN. Tiles in
which something may be hidden clean Q and K before they meet ds, since 0·NaN is NaN.
"""

import triton
import triton.language as tl

from .triton_values import (
    BEHIND,
    MAGIC,
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
    parted,
    place_of,
    pow2,
    tile_count,
    tile_start,
    to_scores,
)

CAREFUL = tl.constexpr(4)  # a flag of a head: some row is not finite, and all tiles are treated as partly hidden


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_rows(
    O, Rest, DO, DL, L, C, Flags, G, Row, L2, Counter, QueryLengths,
    do_b, do_h, do_n, dl_b, dl_h, dl_n,
    heads, group, query_length, y_scale, inverse_beta, padded_length, total, count,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, LINEAR: tl.constexpr, WITH_DL: tl.constexpr,
    REST: tl.constexpr, QUERY_LENGTHS: tl.constexpr,
):  # fmt: skip
    """G, r and l in base 2; r and l behind a sequence too, with l = +∞, up to a multiple of BEHIND; zeros in Counter.

    Grid: B·Hq · blocks of that length.
    """
    n = tl.program_id(0) + tl.arange(0, 2) * tl.num_programs(0)
    tl.store(Counter + n, tl.zeros((2,), tl.int32), mask=n < count)  # at most two for each program
    blocks = tl.cdiv(query_length, BEHIND) * (BEHIND // BM)
    head = tl.program_id(0) // blocks
    m0 = tl.program_id(0) % blocks * BM
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    m_, e = tl.arange(0, BM), tl.arange(0, EP)
    b_q = place_of(QueryLengths, b, QUERY_LENGTHS)
    own, own_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
    if QUERY_LENGTHS >= PACKED:
        query_length = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
        if m0 >= tl.cdiv(query_length, BEHIND) * BEHIND:
            return
    inside = m0 + m_ < query_length
    l = tl.load(L + own_numbers(b_q, b, h, heads, total, 0, QUERY_LENGTHS) + m0 + m_, mask=inside, other=float("-inf"))
    o = load_rows(O + own, m0, own_n, m_[:, None], e[None, :], query_length, E, True, E != EP)
    if REST:
        o = joined(o, load_rows(Rest + own, m0, own_n, m_[:, None], e[None, :], query_length, E, True, E != EP))
    o = o.to(tl.float32)
    do = load_rows(DO + b_q * do_b + h * do_h, m0, do_n, m_[:, None], e[None, :], query_length, E, True, E != EP)
    do = do.to(tl.float32)
    dl = tl.zeros((BM,), tl.float32)
    if WITH_DL:
        dl = tl.load(DL + b_q * dl_b + h * dl_h + (m0 + m_).to(tl.int64) * dl_n, mask=inside, other=0.0).to(tl.float32)

    fine = (tl.min((is_finite(o) & is_finite(do)).to(tl.int32), 1) > 0) & is_finite(dl) & is_finite(l)
    silent = (tl.max((do != 0).to(tl.int32), 1) == 0) & (dl == 0)
    nothing = silent | (l == float("-inf"))
    if tl.max((~fine & (l != float("-inf"))).to(tl.int32)) > 0:
        tl.atomic_or(Flags + head // group, CAREFUL)
    live = fine & ~nothing
    o = tl.where(live[:, None], o, 0.0)
    do = tl.where(live[:, None], do, 0.0)
    if LINEAR:
        g = do
        r = tl.where(live, dl, 0.0) - tl.sum(do * o, 1)
    else:
        c = tl.load(C + head // group * EP + e)[None, :].to(tl.float32)
        t, rest = parted(o, y_scale)  # as values: what o is rounded by is all that is lost
        g = do * tl.where(live[:, None], tl.exp2(-rest) * pow2(c - (t - MAGIC)), 0.0)
        r = tl.where(live, dl, 0.0) - tl.sum(do, 1) * inverse_beta
    l2 = tl.where(nothing, float("inf"), tl.where(fine, l * 1.4426950408889634, float("nan")))
    own_row = own_numbers(b_q, b, h, heads, padded_length, BEHIND, QUERY_LENGTHS) + m0
    tl.store(L2 + own_row + m_, tl.where(inside, l2, float("inf")))
    tl.store(Row + own_row + m_, tl.where(inside, r, 0.0))
    at = G + own + tl.cast(m0, tl.int64) * own_n + (m_[:, None] * own_n + e[None, :])
    tl.store(at, g.to(G.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


@triton.jit
def probabilities(
    qk, i, j, l2, b, h, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, q_end, k_end, low, high, scale, cap,
    MASKED: tl.constexpr, BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """p·2^SHIFT from q·k, and the slope of the soft cap; i, j and l2 in the layout of the tile."""
    if MASKED:
        s, slope = to_scores(qk, i, j, b, h, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, (q_end, k_end),
            low, high, scale, cap, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP)  # fmt: skip
        if CAP or BIAS:
            power = s - (l2 - SHIFT)
        else:  # as without a mask, bit for bit; infinite scores are NaN
            power = tl.fma(qk + qk * 0.0, scale * 1.4426950408889634, -(l2 - SHIFT))
        p = tl.where((s == float("-inf")) | (l2 == float("inf")), 0.0, tl.exp2(power))
    else:
        if CAP:
            s, slope = to_scores(qk, i, j, b, h, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, (q_end, k_end),
                low, high, scale, cap, False, False, False, False, CAP)  # fmt: skip
            p = tl.exp2(s - (l2 - SHIFT))
        else:
            slope = qk
            p = tl.exp2(tl.fma(qk, scale * 1.4426950408889634, -(l2 - SHIFT)))
    return p, slope


@triton.jit
def _count(first, full_first, full_last, last, careful, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """How many tiles a walk has: where care is needed, the masked one has them all."""
    inner = tile_count(first, full_first, full_last, last, SIZE, False)
    if MASKED:
        return tile_count(first, full_first, full_last, last, SIZE, True) + tl.where(careful, inner, 0)
    else:
        return tl.where(careful, 0, inner)


@triton.jit
def _start(index, first, full_first, full_last, last, careful, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where a tile starts; in the same order with care and without, so that sums have the same bits."""
    if MASKED:
        inner = tl.where(careful, tile_count(first, full_first, full_last, last, SIZE, False), 0)
        outer = tile_start(index - inner, first, full_first, full_last, SIZE, True)
        return tl.where(index < inner, full_first + index * SIZE, outer)
    else:
        return tile_start(index, first, full_first, full_last, SIZE, False)


@triton.jit
def _walk_queries(
    dk, dv, k, x, Q, G, Row, L2, first, full_first, full_last, last, careful, q_end, k_end, j, b, h,
    q_n, g_n, own_row,
    m_, d, e, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, low, high, scale, cap, inverse_beta,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for index in tl.range(0, _count(first, full_first, full_last, last, careful, BM, MASKED)):
        start = _start(index, first, full_first, full_last, last, careful, BM, MASKED)
        if TMA:
            q = Q.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(BM, DP)
            g = G.load([b.to(tl.int32), h.to(tl.int32), start, 0]).reshape(BM, EP)
        else:
            q = load_rows(Q, start, q_n, m_[:, None], d[None, :], q_end, D, MASKED, D != DP)
            g = load_rows(G, start, g_n, m_[:, None], e[None, :], q_end, E, MASKED, E != EP)
        i = start + m_
        # padded: no bounds
        l2 = tl.load(L2 + own_row + i)
        r = tl.load(Row + own_row + i)
        qk = tl.dot(k, q.T, input_precision=PRECISION)
        p, slope = probabilities(qk, i[None, :], j[:, None], l2[None, :], b, h, Mask, Bias, m_b, m_h, m_i, m_j,
            b_b, b_h, b_i, b_j, q_end, k_end, low, high, scale, cap,
            MASKED, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, SHIFT)  # fmt: skip
        dp = tl.dot(x, g.T, input_precision=PRECISION)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (dp * (inverse_beta * 2.0**-SHIFT) + (r * 2.0**-SHIFT)[None, :])
        if CAP:
            ds *= slope
        if MASKED:
            if CAP:  # 0·NaN, where the score was not finite
                ds = tl.where(p == 0, 0.0, ds)
            q = tl.where(is_finite(q), q, 0.0).to(q.dtype)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_keys(
    Q, K, X, G, Row, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    heads, group, query_length, key_length, low, high, scale, cap, inverse_beta, padded_length,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, TMA: tl.constexpr, LINEAR: tl.constexpr,
    SHIFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys, summed over the query heads of its group. Grid: B·Hkv · blocks."""
    blocks = tl.cdiv(key_length, BN)
    kv = tl.program_id(0) // blocks
    n0 = tl.program_id(0) % blocks * BN
    flags = tl.load(Flags + kv)
    if flags % 2 == 1:
        return
    heads_kv = heads // group
    b, h_kv = (kv // heads_kv).to(tl.int64), (kv % heads_kv).to(tl.int64)
    q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
    k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
    m_, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, EP)
    j = n0 + n
    b_q, b_k = place_of(QueryLengths, b, QUERY_LENGTHS), place_of(KeyLengths, b, KEY_LENGTHS)
    dk_at, dk_n = own_rows(b_k, h_kv, heads_kv, key_length, D, KEY_LENGTHS)
    dv_at, dv_n = own_rows(b_k, h_kv, heads_kv, key_length, E, KEY_LENGTHS)
    if KEY_LENGTHS >= PACKED:
        key_length = k_end
        if n0 >= k_end:
            return
    if QUERY_LENGTHS == TO_ENDS:
        low += k_end - q_end
        high += k_end - q_end
    k = load_rows(K + b_k * k_b + h_kv * k_h, n0, k_n, n[:, None], d[None, :], k_end, D, True, D != DP)
    x = load_rows(X + dv_at, n0, dv_n, n[:, None], e[None, :], k_end, E, True, E != EP)
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, EP), tl.float32)
    # the queries that see these keys: the band seen from the other side
    first, full_first, full_last, last = key_range(
        n0, k_end, q_end, -high, -low, BN, BM, BAND_HIGH, BAND_LOW, MASK or BIAS
    )
    careful = flags >= CAREFUL
    for member in range(0, group):
        h = h_kv * group + member
        own_row = own_numbers(b_q, b, h, heads, padded_length, BEHIND, QUERY_LENGTHS)
        g_at, g_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
        if TMA:
            Qh, Gh = Q, G
        else:
            Qh, Gh = Q + b_q * q_b + h * q_h, G + g_at
        if not (MASK or BIAS):
            dk, dv = _walk_queries(dk, dv, k, x, Qh, Gh, Row, L2, first, full_first, full_last, last,
                careful, q_end, k_end, j, b, h,
                q_n, g_n, own_row, m_, d, e, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
                low, high, scale, cap, inverse_beta, D, E, DP, EP, BM, False, TMA,
                BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, SHIFT, PRECISION)  # fmt: skip
        dk, dv = _walk_queries(dk, dv, k, x, Qh, Gh, Row, L2, first, full_first, full_last, last,
            careful, q_end, k_end, j, b, h,
            q_n, g_n, own_row, m_, d, e, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
            low, high, scale, cap, inverse_beta, D, E, DP, EP, BM, True, TMA,
            BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, SHIFT, PRECISION)  # fmt: skip
    dv *= 2.0**-SHIFT
    if not LINEAR:  # read again rather than held in registers all along
        x = load_rows(X + dv_at, n0, dv_n, n[:, None], e[None, :], k_end, E, True, E != EP)
        dv *= x.to(tl.float32)
    inside = j < key_length
    j = j.to(tl.int64)[:, None]
    tl.store(DK + dk_at + j * dk_n + d[None, :], (dk * scale).to(DK.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :])  # fmt: skip
    tl.store(DV + dv_at + j * dv_n + e[None, :], dv.to(DV.dtype.element_ty),
        mask=inside[:, None] & (e < E)[None, :])  # fmt: skip


@triton.jit
def _walk_keys(
    dq, q, g, l2, r, K, X, first, full_first, full_last, last, careful, q_end, k_end, i, b, h, k_n, x_n, h_kv,
    n, d, e, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, low, high, scale, cap, inverse_beta,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    for index in tl.range(0, _count(first, full_first, full_last, last, careful, BN, MASKED)):
        start = _start(index, first, full_first, full_last, last, careful, BN, MASKED)
        if TMA:
            k = K.load([b.to(tl.int32), h_kv, start, 0]).reshape(BN, DP)
            x = X.load([b.to(tl.int32), h_kv, start, 0]).reshape(BN, EP)
        else:
            k = load_rows(K, start, k_n, n[:, None], d[None, :], k_end, D, MASKED, D != DP)
            x = load_rows(X, start, x_n, n[:, None], e[None, :], k_end, E, MASKED, E != EP)
        qk = tl.dot(q, k.T, input_precision=PRECISION)
        p, slope = probabilities(qk, i[:, None], (start + n)[None, :], l2[:, None], b, h, Mask, Bias,
            m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, q_end, k_end, low, high, scale, cap,
            MASKED, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, 0)  # fmt: skip
        dp = tl.dot(g, x.T, input_precision=PRECISION)
        ds = p * (dp * inverse_beta + r[:, None])
        if CAP:
            ds *= slope
        if MASKED:
            if CAP:
                ds = tl.where(p == 0, 0.0, ds)
            k = tl.where(is_finite(k), k, 0.0).to(k.dtype)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_queries(
    Q, K, X, G, Row, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DQ,
    q_b, q_h, q_n, k_b, k_h, k_n, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    heads, group, query_length, key_length, low, high, scale, cap, inverse_beta, padded_length,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, TMA: tl.constexpr, LINEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries. Grid: B·Hq · blocks."""
    blocks = tl.cdiv(query_length, BM)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if BAND_HIGH:
        block = blocks - 1 - block
    m0 = block * BM
    kv = head // group
    flags = tl.load(Flags + kv)
    if flags % 2 == 1:
        return
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    h_kv = (h // group).to(tl.int32)
    q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
    k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
    m_, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, EP)
    i = m0 + m_
    b_q, b_k = place_of(QueryLengths, b, QUERY_LENGTHS), place_of(KeyLengths, b, KEY_LENGTHS)
    dq_at, dq_n = own_rows(b_q, h, heads, query_length, D, QUERY_LENGTHS)
    g_at, g_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
    x_at, x_n = own_rows(b_k, h_kv, heads // group, key_length, E, KEY_LENGTHS)
    if QUERY_LENGTHS >= PACKED:
        query_length = q_end
        if m0 >= q_end:
            return
    if QUERY_LENGTHS == TO_ENDS:
        low += k_end - q_end
        high += k_end - q_end
    if not TMA:
        K += b_k * k_b + h_kv * k_h
        X += x_at
    q = load_rows(Q + b_q * q_b + h * q_h, m0, q_n, m_[:, None], d[None, :], q_end, D, True, D != DP)
    g = load_rows(G + g_at, m0, g_n, m_[:, None], e[None, :], q_end, E, True, E != EP)
    own_row = own_numbers(b_q, b, h, heads, padded_length, BEHIND, QUERY_LENGTHS)
    l2 = tl.load(L2 + own_row + i)
    r = tl.load(Row + own_row + i)
    dq = tl.zeros((BM, DP), tl.float32)
    first, full_first, full_last, last = key_range(
        m0, q_end, k_end, low, high, BM, BN, BAND_LOW, BAND_HIGH, MASK or BIAS
    )
    careful = flags >= CAREFUL
    if not (MASK or BIAS):
        dq = _walk_keys(dq, q, g, l2, r, K, X, first, full_first, full_last, last, careful, q_end, k_end, i, b, h,
            k_n, x_n, h_kv,
            n, d, e, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, low, high, scale, cap, inverse_beta,
            D, E, DP, EP, BN, False, TMA, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, PRECISION)  # fmt: skip
    dq = _walk_keys(dq, q, g, l2, r, K, X, first, full_first, full_last, last, careful, q_end, k_end, i, b, h,
        k_n, x_n, h_kv, n, d, e,
        Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, low, high, scale, cap, inverse_beta,
        D, E, DP, EP, BN, True, TMA, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, PRECISION)  # fmt: skip
    tl.store(DQ + dq_at + i.to(tl.int64)[:, None] * dq_n + d[None, :], (dq * scale).to(DQ.dtype.element_ty),
        mask=(i < query_length)[:, None] & (d < D)[None, :])  # fmt: skip
