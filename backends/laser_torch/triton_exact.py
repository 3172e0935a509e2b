"""Device code: the backward pass of heads outside the fast range, and the gradient of a bias::

w_ije = 2^(s_ij − l_i + β(v_je − o_ie)·log2e) ≤ 1 + rounding, term by term
ds_ij = Σ_e do_ie (w_ije − p_ij)/β + dl_i p_ij          dv_je = Σ_i do_ie w_ije
"""

import triton
import triton.language as tl

from .triton_backward import probabilities
from .triton_values import (
    BEHIND,
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
    to_scores,
)


@triton.jit
def _values(V, start, v_n, n, e, k_end, E: tl.constexpr):
    """A tile of v, zero where it is not finite."""
    at = V + tl.cast(start, tl.int64) * v_n + (n[:, None] * v_n + e[None, :])
    v = tl.load(at, mask=(start + n < k_end)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    return tl.where(is_finite(v), v, 0.0)


@triton.jit
def _of_rows(DL, base, i, dl_n, q_end, BM: tl.constexpr, WITH_DL: tl.constexpr):
    """The cotangents of the log-sum-exps of a tile, zero where there are none."""
    if WITH_DL:
        return tl.load(DL + base + i.to(tl.int64) * dl_n, mask=i < q_end, other=0.0).to(tl.float32)
    else:
        return tl.zeros((BM,), tl.float32)


@triton.jit
def _rows(O, Rest, DO, own, own_n, do_base, do_n, m0, m_, e, q_end, E: tl.constexpr, REST: tl.constexpr):
    """o and do of a tile, zero where they are not finite or not there."""
    keep = (m0 + m_ < q_end)[:, None] & (e < E)[None, :]
    at = own + tl.cast(m0, tl.int64) * own_n + (m_[:, None] * own_n + e[None, :])
    o = tl.load(O + at, mask=keep, other=0.0)
    if REST:
        o = joined(o, tl.load(Rest + at, mask=keep, other=0))
    o = o.to(tl.float32)
    at = DO + do_base + tl.cast(m0, tl.int64) * do_n + (m_[:, None] * do_n + e[None, :])
    do = tl.load(at, mask=keep, other=0.0).to(tl.float32)
    return tl.where(is_finite(o), o, 0.0), tl.where(is_finite(do), do, 0.0)


@triton.jit
def _weights(s, l2, o, v, y_scale):
    """w (queries, keys, channels); zero where a key is hidden or nothing flows through the query."""
    t = (s - l2[:, None])[:, :, None] + (v[None, :, :] - o[:, None, :]) * y_scale
    hidden = (s == float("-inf")) | (l2 == float("inf"))[:, None]
    return tl.where(hidden[:, :, None], 0.0, tl.exp2(t))


@triton.jit
def _score_cotangents(
    s, l2, dl, O, Rest, DO, V, own, own_n, do_base, do_n, v_n, m0, start, m_, n, q_end, k_end, y_scale, inverse_beta,
    E: tl.constexpr, BE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """ds of a tile."""
    p = tl.where((s == float("-inf")) | (l2 == float("inf"))[:, None], 0.0, tl.exp2(s - l2[:, None]))
    ds = p * dl[:, None]
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        o, do = _rows(O, Rest, DO, own, own_n, do_base, do_n, m0, m_, e, q_end, E, REST)
        w = _weights(s, l2, o, _values(V, start, v_n, n, e, k_end, E), y_scale)
        ds += tl.sum((w - p[:, :, None]) * do[:, None, :], 2) * inverse_beta
    return ds


@triton.jit
def _exact_queries(
    Q, K, V, O, Rest, DO, DL, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DQ,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dl_b, dl_h, dl_n,
    m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    program, workers,
    heads, group, query_length, key_length, low, high, scale, cap, y_scale, inverse_beta, padded_length,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, WITH_DL: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq; B·Hq · workers programs."""
    head = program // workers
    if tl.load(Flags + head // group) % 2 == 0:
        return
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    h_kv = h // group
    q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
    k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
    m_, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    b_q, b_k = place_of(QueryLengths, b, QUERY_LENGTHS), place_of(KeyLengths, b, KEY_LENGTHS)
    own, own_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
    dq_at, dq_n = own_rows(b_q, h, heads, query_length, D, QUERY_LENGTHS)
    own_row = own_numbers(b_q, b, h, heads, padded_length, BEHIND, QUERY_LENGTHS)
    if QUERY_LENGTHS >= PACKED:
        query_length = q_end
    if QUERY_LENGTHS == TO_ENDS:
        low += k_end - q_end
        high += k_end - q_end
    K += b_k * k_b + h_kv * k_h
    V += b_k * v_b + h_kv * v_h
    do_at = b_q * do_b + h * do_h
    for work in range(program % workers, tl.cdiv(query_length, BM), workers):
        m0 = work * BM
        i = m0 + m_
        q = load_rows(Q + b_q * q_b + h * q_h, m0, q_n, m_[:, None], d[None, :], q_end, D, True, D != DP)
        l2 = tl.load(L2 + own_row + i)
        dl = _of_rows(DL, b_q * dl_b + h * dl_h, i, dl_n, q_end, BM, WITH_DL)
        dq = tl.zeros((BM, DP), tl.float32)
        first, inner_first, inner_last, last = key_range(m0, q_end, k_end, low, high, BM, BN, BAND_LOW, BAND_HIGH, True)
        for start in range(first, last, BN):
            k = load_rows(K, start, k_n, n[:, None], d[None, :], k_end, D, True, D != DP)
            s, slope = to_scores(tl.dot(q, k.T, input_precision=PRECISION), i[:, None], (start + n)[None, :], b, h,
                Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, (q_end, k_end), low, high, scale, cap,
                BAND_LOW, BAND_HIGH, MASK, BIAS, CAP)  # fmt: skip
            ds = _score_cotangents(s, l2, dl, O, Rest, DO, V, own, own_n, do_at, do_n, v_n, m0, start, m_, n,
                q_end, k_end, y_scale, inverse_beta, E, BE, REST)  # fmt: skip
            if CAP:
                ds = tl.where(s == float("-inf"), 0.0, ds * slope)
            dq = tl.dot(ds, tl.where(is_finite(k), k, 0.0).to(tl.float32), dq, input_precision="ieee")
        tl.store(DQ + dq_at + i.to(tl.int64)[:, None] * dq_n + d[None, :], (dq * scale).to(DQ.dtype.element_ty),
            mask=(i < query_length)[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def _exact_keys(
    Q, K, V, O, Rest, DO, DL, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dl_b, dl_h, dl_n,
    m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    program, workers,
    heads, group, query_length, key_length, low, high, scale, cap, y_scale, inverse_beta, padded_length,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, WITH_DL: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, and dv of a few channels at a time; B·Hkv · workers programs."""
    kv = program // workers
    if tl.load(Flags + kv) % 2 == 0:
        return
    heads_kv = heads // group
    b, h_kv = (kv // heads_kv).to(tl.int64), (kv % heads_kv).to(tl.int64)
    q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
    k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
    m_, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP)
    b_q, b_k = place_of(QueryLengths, b, QUERY_LENGTHS), place_of(KeyLengths, b, KEY_LENGTHS)
    dk_at, dk_n = own_rows(b_k, h_kv, heads_kv, key_length, D, KEY_LENGTHS)
    dv_at, dv_n = own_rows(b_k, h_kv, heads_kv, key_length, E, KEY_LENGTHS)
    if KEY_LENGTHS >= PACKED:
        key_length = k_end
    if QUERY_LENGTHS == TO_ENDS:
        low += k_end - q_end
        high += k_end - q_end
    V += b_k * v_b + h_kv * v_h
    parts: tl.constexpr = (E + BE - 1) // BE + 1  # the last part is dk
    for work in range(program % workers, tl.cdiv(key_length, BN) * parts, workers):
        n0 = work // parts * BN
        part = work % parts
        e = part * BE + tl.arange(0, BE)
        j = n0 + n
        k = load_rows(K + b_k * k_b + h_kv * k_h, n0, k_n, n[:, None], d[None, :], k_end, D, True, D != DP)
        v = _values(V, n0, v_n, n, e, k_end, E)
        dk = tl.zeros((BN, DP), tl.float32)
        dv = tl.zeros((BN, BE), tl.float32)
        first, inner_first, inner_last, last = key_range(
            n0, k_end, q_end, -high, -low, BN, BM, BAND_HIGH, BAND_LOW, True
        )
        for member in range(0, group):
            h = h_kv * group + member
            own, own_n = own_rows(b_q, h, heads, query_length, E, QUERY_LENGTHS)
            own_row = own_numbers(b_q, b, h, heads, padded_length, BEHIND, QUERY_LENGTHS)
            do_at = b_q * do_b + h * do_h
            for start in range(first, last, BM):
                i = start + m_
                q = load_rows(Q + b_q * q_b + h * q_h, start, q_n, m_[:, None], d[None, :], q_end, D, True, D != DP)
                l2 = tl.load(L2 + own_row + i)
                s, slope = to_scores(tl.dot(q, k.T, input_precision=PRECISION), i[:, None], j[None, :], b, h,
                    Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, (q_end, k_end), low, high, scale, cap,
                    BAND_LOW, BAND_HIGH, MASK, BIAS, CAP)  # fmt: skip
                if part == parts - 1:
                    dl = _of_rows(DL, b_q * dl_b + h * dl_h, i, dl_n, q_end, BM, WITH_DL)
                    ds = _score_cotangents(s, l2, dl, O, Rest, DO, V, own, own_n, do_at, do_n, v_n, start, n0,
                        m_, n, q_end, k_end, y_scale, inverse_beta, E, BE, REST)  # fmt: skip
                    if CAP:
                        ds = tl.where(s == float("-inf"), 0.0, ds * slope)
                    dk = tl.dot(ds.T, tl.where(is_finite(q), q, 0.0).to(tl.float32), dk, input_precision="ieee")
                else:
                    o, do = _rows(O, Rest, DO, own, own_n, do_at, do_n, start, m_, e, q_end, E, REST)
                    dv += tl.sum(_weights(s, l2, o, v, y_scale) * do[:, None, :], 0)
        if part == parts - 1:
            tl.store(DK + dk_at + j.to(tl.int64)[:, None] * dk_n + d[None, :], (dk * scale).to(DK.dtype.element_ty),
                mask=(j < key_length)[:, None] & (d < D)[None, :])  # fmt: skip
        else:
            tl.store(DV + dv_at + j.to(tl.int64)[:, None] * dv_n + e[None, :], dv.to(DV.dtype.element_ty),
                mask=(j < key_length)[:, None] & (e < E)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def exact_gradients(
    Q, K, V, O, Rest, DO, DL, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DQ, DK, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dl_b, dl_h, dl_n,
    m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    count, q_workers, k_workers,
    heads, group, query_length, key_length, low, high, scale, cap, y_scale, inverse_beta, padded_length,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, WITH_DL: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv. Grid: the ``count`` programs of queries, and those of keys."""
    if tl.program_id(0) < count:
        _exact_queries(Q, K, V, O, Rest, DO, DL, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DQ,
            q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dl_b, dl_h, dl_n,
            m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, tl.program_id(0), q_workers,
            heads, group, query_length, key_length, low, high, scale, cap, y_scale, inverse_beta, padded_length,
            D, E, DP, BM, BN, BE, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, QUERY_LENGTHS, KEY_LENGTHS, WITH_DL, REST,
            PRECISION)  # fmt: skip
    else:
        _exact_keys(Q, K, V, O, Rest, DO, DL, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DK, DV,
            q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dl_b, dl_h, dl_n,
            m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, tl.program_id(0) - count, k_workers,
            heads, group, query_length, key_length, low, high, scale, cap, y_scale, inverse_beta, padded_length,
            D, E, DP, BM, BN, BE, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, QUERY_LENGTHS, KEY_LENGTHS, WITH_DL, REST,
            PRECISION)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_bias(
    Q, K, V, X, G, Row, O, Rest, DO, DL, L2, Flags, Mask, Bias, QueryLengths, KeyLengths, DB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dl_b, dl_h, dl_n,
    m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j,
    own_heads, sum_batch, sum_heads,
    heads, group, query_length, key_length, low, high, scale, cap, y_scale, inverse_beta, padded_length,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, SUM_I: tl.constexpr, SUM_J: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
    QUERY_LENGTHS: tl.constexpr, KEY_LENGTHS: tl.constexpr, LINEAR: tl.constexpr, WITH_DL: tl.constexpr,
    REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a bias: ds, summed in one order over the axes that the bias was broadcast along.

    Grid: one program for each tile of the bias's own shape ``(own_batch, own_heads, …)``; a program walks over
    ``sum_batch · sum_heads`` heads, and over all queries or keys where SUM_I or SUM_J says so.
    """
    walk_i = tl.cdiv(query_length, BM)
    walk_j = tl.cdiv(key_length, BN)
    tiles_i, tiles_j = walk_i, walk_j
    if SUM_I:
        tiles_i = 1
    else:
        walk_i = 1
    if SUM_J:
        tiles_j = 1
    else:
        walk_j = 1
    tile = tl.program_id(0)
    own_j = tile % tiles_j
    own_i = tile // tiles_j % tiles_i
    own_h = tile // (tiles_j * tiles_i) % own_heads
    own_b = tile // (tiles_j * tiles_i) // own_heads
    m_, n, d, e = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, EP)
    total = tl.zeros((BM, BN), tl.float32)
    for walk in range(0, sum_batch * sum_heads * walk_i * walk_j):
        n0 = (own_j + walk % walk_j) * BN
        m0 = (own_i + walk // walk_j % walk_i) * BM
        h = (own_h + walk // (walk_j * walk_i) % sum_heads).to(tl.int64)
        b = (own_b + walk // (walk_j * walk_i) // sum_heads).to(tl.int64)
        h_kv = h // group
        kv = b * (heads // group) + h_kv
        own = (b * heads + h) * query_length
        own_row = (b * heads + h) * padded_length
        q_end = length_of(QueryLengths, b, query_length, QUERY_LENGTHS)
        k_end = length_of(KeyLengths, b, key_length, KEY_LENGTHS)
        i = m0 + m_
        q = load_rows(Q + b * q_b + h * q_h, m0, q_n, m_[:, None], d[None, :], q_end, D, True, D != DP)
        k = load_rows(K + b * k_b + h_kv * k_h, n0, k_n, n[:, None], d[None, :], k_end, D, True, D != DP)
        l2 = tl.load(L2 + own_row + i)
        qk = tl.dot(q, k.T, input_precision=PRECISION)
        if tl.load(Flags + kv) % 2 == 1:
            if not LINEAR:
                s, slope = to_scores(qk, i[:, None], (n0 + n)[None, :], b, h, Mask, Bias, m_b, m_h, m_i, m_j,
                    b_b, b_h, b_i, b_j, (q_end, k_end), low, high, scale, cap,
                    BAND_LOW, BAND_HIGH, MASK, BIAS, CAP)  # fmt: skip
                dl = _of_rows(DL, b * dl_b + h * dl_h, i, dl_n, q_end, BM, WITH_DL)
                total += _score_cotangents(s, l2, dl, O, Rest, DO, V + b * v_b + h_kv * v_h, own * E, E,
                    b * do_b + h * do_h, do_n, v_n, m0, n0, m_, n, q_end, k_end, y_scale, inverse_beta,
                    E, BE, REST)  # fmt: skip
        else:
            x = load_rows(X + kv * key_length * E, n0, E, n[:, None], e[None, :], k_end, E, True, E != EP)
            g = load_rows(G + own * E, m0, E, m_[:, None], e[None, :], q_end, E, True, E != EP)
            r = tl.load(Row + own_row + i)
            p, slope = probabilities(qk, i[:, None], (n0 + n)[None, :], l2[:, None], b, h, Mask, Bias,
                m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, q_end, k_end, low, high, scale, cap,
                True, BAND_LOW, BAND_HIGH, MASK, BIAS, CAP, 0)  # fmt: skip
            total += p * (tl.dot(g, x.T, input_precision=PRECISION) * inverse_beta + r[:, None])
    i = own_i * BM + m_
    j = own_j * BN + n
    size_i, size_j = query_length, key_length
    if SUM_I:
        total = tl.where(m_[:, None] == 0, tl.sum(total, 0)[None, :], 0.0)
        size_i = 1
    if SUM_J:
        total = tl.where(n[None, :] == 0, tl.sum(total, 1)[:, None], 0.0)
        size_j = 1
    rows = (own_b * own_heads + own_h).to(tl.int64) * size_i + i
    tl.store(DB + rows[:, None] * size_j + j[None, :], total, mask=(i < size_i)[:, None] & (j < size_j)[None, :])
