"""Decode kernels in Triton: few queries against a long cache of raw values.

One program takes one key/value head of one batch entry and a run of its keys. All queries that read this head are the
rows of its tile, r = g·Lq + i. It keeps a flash kernel's m, l and acc = Σ p·x with x = exp2(y), y = β·v·log2e, taken on
the fly. Where every |y| is at most ``REACH`` bits, no weight that matters underflows. A run of keys with a greater one,
or with one that is not finite, goes over them again, key by key about the greatest term so far: exact, and slow. Only
rows and channels that see such a value take that result, so what is hidden changes no bit.

Runs are merged by a second kernel in the log domain. Scores, m and l are of base 2 here, β·o is not. Tiles have keys
or channels first and rows last, so that keys reach the tensor cores of sm_90 from shared memory, and 16 rows do.

At β = 0 (``LINEAR``) x is v, and the merge is linear. Products take operands that are finite; what is not finite
travels in p, which is zero where a key is hidden.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
REACH = tl.constexpr(44.0)  # bits: 2^-126, below which p is flushed, times 2^44 is nothing beside 2^-44
P_SCALE = tl.constexpr(2.0**-24)  # at β = 0: sums of up to 2^24 of the largest numbers stay finite


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    e = tl.exp2(a * (-2 * LOG2E))
    far = (1 - e) / (1 + e)
    z = x * x
    near = a * (1 + z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315 + z * (62 / 2835)))))
    t = tl.where(a < 0.25, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """x ≥ 0 with as many bits as an operand of ``_product`` has."""
    if dtype == tl.float16:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x < float("inf"), ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _product(x, p, acc, dtype: tl.constexpr):
    """acc + x·p on matrix units. The exponents of float16 do not suffice: TF32 has more, and as many bits."""
    if dtype == tl.float16:
        return tl.dot(x, p, acc, input_precision="tf32")
    else:
        return tl.dot(x.to(dtype), p.to(dtype), acc)


@triton.constexpr_function
def _count(page, block_k):
    """In how many blocks of a cache a tile lies: 1, 2 or 4; 0 for other numbers, and without blocks."""
    if page % block_k == 0:
        return int(page > 0)
    return block_k // page if block_k % page == 0 and block_k // page in (2, 4) else 0


@triton.jit
def _pages_of(columns, end, table_ptr, PAGE: tl.constexpr):
    """The numbers of the blocks that hold these keys of a paged cache."""
    if PAGE:
        return tl.load(table_ptr + columns // PAGE, mask=columns < end, other=0)
    else:
        return columns


@triton.jit
def _page(start, n, last, table_ptr, PAGE: tl.constexpr):
    """The number of the n-th block of a tile of keys."""
    return tl.load(table_ptr + start // PAGE + n, mask=start + n * PAGE < last, other=0)


@triton.jit
def _few_pages(start, last, table_ptr, PAGE: tl.constexpr, COUNT: tl.constexpr):
    """The numbers of up to four blocks that a tile of keys lies in."""
    first = _page(start, 0, last, table_ptr, PAGE)
    second, third, fourth = first, first, first
    if COUNT > 1:
        second = _page(start, 1, last, table_ptr, PAGE)
    if COUNT > 2:
        third = _page(start, 2, last, table_ptr, PAGE)
        fourth = _page(start, 3, last, table_ptr, PAGE)
    return first, second, third, fourth


@triton.jit
def _one_of(n, first, second, third, fourth, PAGE: tl.constexpr, COUNT: tl.constexpr):
    """Those of each key."""
    pages = first
    if COUNT > 1:
        pages = tl.where(n >= PAGE, second, pages)
    if COUNT > 2:
        pages = tl.where(n >= 3 * PAGE, fourth, tl.where(n >= 2 * PAGE, third, pages))
    return pages


@triton.jit
def _rows_of(columns, pages, stride_block, stride_row, PAGE: tl.constexpr):
    """Offsets of keys in a cache, with or without a block table."""
    if PAGE:
        return pages.to(tl.int64) * stride_block + (columns % PAGE).to(tl.int64) * stride_row
    else:
        return columns.to(tl.int64) * stride_row


@triton.jit
def _scores(s, columns, shown, HAS: tl.constexpr):
    """Scores in base 2; −∞ where hidden, NaN where a query or a key that is seen is not finite.

    Args:
        s: Plain products.
        columns: Keys, along the first axis of s.
        shown: What both loops over keys have in common; rows along the last axis of s.
        HAS: Whether there is a mask, a bias, a lower and an upper bound of the band, a cap.
    """
    i, counts, end, mask_rows, stride_mask, bias_rows, stride_bias, low, high, scale, cap = shown
    HAS_MASK, HAS_BIAS, HAS_LOW, HAS_HIGH, HAS_CAP = HAS
    seen = counts & (columns < end)
    distance = columns - i
    if HAS_LOW:
        seen = seen & (distance >= low)
    if HAS_HIGH:
        seen = seen & (distance <= high)
    if HAS_MASK:
        allowed = tl.load(mask_rows + columns.to(tl.int64) * stride_mask, mask=seen, other=0)
        seen = seen & (allowed != 0)
    s = s * scale
    s = tl.where(tl.abs(s) < float("inf"), s, float("nan"))
    if HAS_CAP:
        s = cap * _tanh(s / cap)
    if HAS_BIAS:
        s += tl.load(bias_rows + columns.to(tl.int64) * stride_bias, mask=seen, other=0).to(tl.float32)
    return tl.where(seen, s * LOG2E, -float("inf"))


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    bias_ptr,
    q_lengths_ptr,
    k_lengths_ptr,
    table_ptr,
    w_ptr,
    l_ptr,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    stride_bb,
    stride_bh,
    stride_bq,
    stride_bk,
    stride_table,
    heads,
    group,
    query_length,
    key_length,
    splits,
    keys_per_split,
    low,
    high,
    scale,
    beta,
    cap,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINEAR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Q_LENGTHS: tl.constexpr,
    HAS_K_LENGTHS: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_HIGH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    TO_LENGTH: tl.constexpr,  # the diagonal ends at the sequence's own length
    PAGE: tl.constexpr,  # keys per block of a paged cache; 0: none
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # products of float32 operands
    LANES: tl.constexpr,  # keys that threads hold side by side: the minimum over the others needs no exchange
    STAGES: tl.constexpr,
):
    """w = β·o and l in bits of a run of keys, ``(B·Hkv, group·Lq, splits, E)`` and without E."""
    h = tl.program_id(0) % heads  # heads come first: in caches their keys are side by side
    split = tl.program_id(0) // heads % splits
    b = (tl.program_id(0) // (heads * splits)).to(tl.int64)
    entry = b * heads + h
    rows = group * query_length
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i = r % query_length
    head = (h * group + r // query_length).to(tl.int64)
    counts = r < rows
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_E)

    end = key_length
    if HAS_K_LENGTHS:
        length = tl.load(k_lengths_ptr + b).to(tl.int64)
        length = tl.minimum(tl.maximum(length, 0), key_length).to(tl.int32)
        if TO_LENGTH:
            low += length - query_length
            high += length - query_length
        end = tl.minimum(end, length)
    q_rows = q_ptr + b * stride_qb + head * stride_qh + i.to(tl.int64) * stride_ql
    q = tl.load(q_rows[None, :] + d[:, None], mask=counts[None, :] & (d < D)[:, None], other=0)  # [D, block_r]
    if HAS_Q_LENGTHS:
        counts = counts & (i < tl.load(q_lengths_ptr + b).to(tl.int64))
    mask_rows = mask_ptr + b * stride_mb + head * stride_mh + i.to(tl.int64) * stride_mq
    bias_rows = bias_ptr + b * stride_bb + head * stride_bh + i.to(tl.int64) * stride_bq
    if not PAGE:
        k_ptr += b * stride_kb
        v_ptr += b * stride_vb
    k_ptr += h.to(tl.int64) * stride_kh
    v_ptr += h.to(tl.int64) * stride_vh
    table_ptr += b * stride_table

    first = split * keys_per_split
    last = tl.minimum(end, first + keys_per_split)
    if HAS_HIGH:
        last = tl.minimum(last, query_length + high)
    if HAS_LOW:
        first += tl.maximum(low - first, 0) // BLOCK_K * BLOCK_K

    m = tl.full([BLOCK_R], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_R], tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)  # l of the rounded p: an average of values stays between them
    acc = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    least = tl.full([BLOCK_E, LANES], 1.0, tl.float32)
    factor = beta * LOG2E
    shown = (
        i[None, :], counts[None, :], end, mask_rows[None, :], stride_mk, bias_rows[None, :], stride_bk,
        low, high, scale, cap,
    )  # fmt: skip
    HAS: tl.constexpr = (HAS_MASK, HAS_BIAS, HAS_LOW, HAS_HIGH, HAS_CAP)
    if WIDE:
        q = q.to(tl.float32)
    n = tl.arange(0, BLOCK_K)
    # a tile in few blocks has their numbers as scalars: as one of each key they would change layout
    COUNT: tl.constexpr = _count(PAGE, BLOCK_K)
    if COUNT:
        one, two, three, four = _few_pages(first, last, table_ptr, PAGE, COUNT)
    else:
        pages = _pages_of(first + n, last, table_ptr, PAGE)
    for start in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        columns = start + n
        inside = columns < last
        # the next ones are loaded a tile ahead: loads that wait for other loads are not pipelined as deeply
        if COUNT:
            here = _one_of(n, one, two, three, four, PAGE, COUNT)
            one, two, three, four = _few_pages(start + BLOCK_K, last, table_ptr, PAGE, COUNT)
        else:
            here = pages
            pages = _pages_of(start + BLOCK_K + n, last, table_ptr, PAGE)
        k_rows = k_ptr + _rows_of(columns, here, stride_kb, stride_kl, PAGE)
        k = tl.load(k_rows[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0)  # [block_k, D]
        v_rows = v_ptr + _rows_of(columns, here, stride_vb, stride_vl, PAGE)
        v = tl.load(v_rows[None, :] + e[:, None], mask=inside[None, :] & (e < E)[:, None], other=0)  # [E, block_k]
        if WIDE:
            k = k.to(tl.float32)
        s = _scores(tl.dot(k, q, input_precision=PRECISION), columns[:, None], shown, HAS)  # [block_k, block_r]
        m_new = tl.maximum(m, tl.max(s, axis=0))
        reference = tl.where(m_new == -float("inf"), 0.0, m_new)
        rescale = tl.exp2(m - reference)
        p = tl.exp2(s - reference[None, :])
        l = l * rescale + tl.sum(p, axis=0)
        if not WIDE:
            p = _round(p, v.dtype)
        weight = weight * rescale + tl.sum(p, axis=0)
        m = m_new
        x = v.to(tl.float32)
        if LINEAR:
            fine = tl.abs(x) < float("inf")
            x = tl.where(fine, x, 0.0)
            checked = tl.where(fine, 1.0, 0.0)
            p *= P_SCALE  # exactly
        else:
            x *= factor
            x = tl.where(tl.abs(x) <= REACH, tl.exp2(x), 0.0)
            checked = x
        least = tl.minimum(least, tl.min(tl.reshape(checked, [BLOCK_E, BLOCK_K // LANES, LANES]), axis=1))
        acc *= rescale[None, :]
        if WIDE:
            acc = tl.dot(x, p, acc, input_precision=PRECISION)
        elif LINEAR:
            acc = _product(x, p, acc, v.dtype)
        else:
            rounded = _round(x, v.dtype)
            acc = _product(rounded, p, acc, v.dtype)
            # rounded to half precision alone, equal values would average to another
            acc = _product(x - rounded, p, acc, v.dtype)

    empty = l == 0
    total = tl.where(empty, 1.0, l)
    w = acc / tl.where(weight == 0, 1.0, weight)[None, :]
    if LINEAR:
        w *= 1 / P_SCALE
    else:
        w = tl.log2(w) * LN2

    if tl.min(tl.min(least, axis=0), axis=0) == 0:
        q32 = q.to(tl.float32)
        reference = tl.where(m == -float("inf"), 0.0, m)
        top = tl.full([BLOCK_E, BLOCK_R], -float("inf"), tl.float32)
        terms = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
        spoilt = tl.zeros([BLOCK_E, BLOCK_R], tl.int32)
        for j in tl.range(first, last, 1, num_stages=1):
            columns = j + tl.arange(0, 1)
            page = _pages_of(columns, last, table_ptr, PAGE)
            k_row = k_ptr + _rows_of(columns, page, stride_kb, stride_kl, PAGE)
            k1 = tl.load(k_row[None, :] + d[:, None], mask=(d < D)[:, None], other=0).to(tl.float32)  # [D, 1]
            v_row = v_ptr + _rows_of(columns, page, stride_vb, stride_vl, PAGE)
            y = tl.load(v_row[None, :] + e[:, None], mask=(e < E)[:, None], other=0).to(tl.float32)  # [E, 1]
            s = _scores(tl.sum(q32 * k1, axis=0)[None, :], columns[:, None], shown, HAS)
            hidden = s == -float("inf")
            if LINEAR:
                fine = tl.abs(y) < float("inf")
            else:
                fine = tl.abs(y * factor) <= REACH
                y *= beta
            spoilt = spoilt | ((hidden == 0) & (fine == 0)).to(tl.int32)
            if not LINEAR:
                t = tl.where(hidden, -float("inf"), (s - reference[None, :]) * LN2 + y)
                top_new = tl.maximum(top, t)
                about = tl.where(tl.abs(top_new) < float("inf"), top_new, 0.0)
                terms = terms * tl.exp2((top - about) * LOG2E) + tl.exp2((t - about) * LOG2E)
                top = top_new
        if LINEAR:
            w = tl.where(spoilt != 0, float("nan"), w)
        else:
            about = tl.where(tl.abs(top) < float("inf"), top, 0.0)
            exact = about + (tl.log2(terms) - tl.log2(total)[None, :]) * LN2
            w = tl.where(spoilt != 0, exact, w)

    w = tl.where(empty[None, :], 0.0, w)
    at = (entry * rows + r) * splits + split
    tl.store(l_ptr + at, tl.where(empty, -float("inf"), m + tl.log2(total)), mask=r < rows)
    tl.store(w_ptr + at[None, :] * E + e[:, None], w, mask=(r < rows)[None, :] & (e < E)[:, None])


@triton.jit
def merge_kernel(
    w_ptr,
    l_ptr,
    o_ptr,  # in the dtype of the query; None where it is rounded elsewhere
    wide_ptr,  # in float32; None where nobody asks for it
    lse_ptr,
    splits,
    beta,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LINEAR: tl.constexpr,
):
    """The output of one row from those of its runs of keys."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    run = tl.arange(0, BLOCK_S)
    l_ptr += row * splits
    w_ptr += row * splits * E

    m = tl.full([BLOCK_S], -float("inf"), tl.float32)
    for start in range(0, splits, BLOCK_S):
        m = tl.maximum(m, tl.load(l_ptr + start + run, mask=start + run < splits, other=-float("inf")))
    highest = tl.max(m, axis=0)
    reference = tl.where(highest == -float("inf"), 0.0, highest)

    total = tl.zeros([BLOCK_S], tl.float32)
    top = tl.full([BLOCK_E], -float("inf"), tl.float32)
    terms = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, splits, BLOCK_S):
        inside = start + run < splits
        l = tl.load(l_ptr + start + run, mask=inside, other=-float("inf")) - reference
        at = (start + run)[:, None] * E + e[None, :]
        w = tl.load(w_ptr + at, mask=inside[:, None] & (e < E)[None, :], other=0)  # [block_s, E]
        total += tl.exp2(l)
        nothing = (l == -float("inf"))[:, None]
        if LINEAR:
            terms += tl.sum(tl.where(nothing, 0.0, tl.exp2(l)[:, None] * (w * P_SCALE)), axis=0)
        else:
            t = tl.where(nothing, -float("inf"), l[:, None] * LN2 + w)
            top_new = tl.maximum(top, tl.max(t, axis=0))
            about = tl.where(tl.abs(top_new) < float("inf"), top_new, 0.0)
            terms = terms * tl.exp2((top - about) * LOG2E) + tl.sum(tl.exp2((t - about[None, :]) * LOG2E), axis=0)
            top = top_new
    l = tl.sum(total, axis=0)
    empty = l == 0
    l = tl.where(empty, 1.0, l)
    if LINEAR:
        o = terms / l * (1 / P_SCALE)
    else:
        about = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        o = (about + (tl.log2(terms) - tl.log2(l)) * LN2) / beta
    o = tl.where(empty, 0.0, o)
    if o_ptr is not None:
        tl.store(o_ptr + row * E + e, o.to(o_ptr.dtype.element_ty), mask=e < E)
    if wide_ptr is not None:
        tl.store(wide_ptr + row * E + e, o, mask=e < E)
    tl.store(lse_ptr + row, tl.where(empty, -float("inf"), (highest + tl.log2(l)) * LN2))
