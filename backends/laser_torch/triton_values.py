"""Device code: tiles and scores that all kernels share, and the value pass.

The value pass writes X = 2^(βv·log2e − c), c an integer per key/value head and channel. The exponent is split into
integer and fraction first, so that X for another c is the same bits times a power of two. In base 2 throughout.
"""

# Triton evaluates the annotations of a kernel: no postponed ones here.
import triton
import triton.language as tl

OUTSIDE = tl.constexpr(1)  # flags of a head: some channel spans more than the fast range
BROKEN = tl.constexpr(2)  # a value inside the key length is NaN or infinite, or a key, if they were looked at

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Sizes for which no kernel of their own is compiled
UNSPECIALIZED = (
    "workers q_workers k_workers all_heads heads group query_length key_length low high blocks span few_end total "
    "count own_heads sum_batch sum_heads dl_b dl_h dl_n m_b m_h m_i b_b b_h b_i"
).split()


MAGIC = tl.constexpr(12582912.0)  # 1.5·2^23: a sum with it is rounded to an integer, which its lowest bits show


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def fused(a, b, c):
    """a·b + c in one rounding. Triton's interpreter makes two of it."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def pow2(n):
    """2^n of an integer as float32, exactly; n from −126 to 127."""
    bits = (tl.minimum(tl.maximum(n, -126.0), 127.0) + MAGIC).to(tl.int32, bitcast=True)
    return ((bits + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    """Whether x is finite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def parted(v, scale):
    """v·scale as an integer, beside MAGIC, and a rest. Each is one rounding, which no compiler may place elsewhere."""
    scale = tl.zeros(v.shape, tl.float32) + scale
    t = fused(v, scale, tl.full(v.shape, MAGIC, tl.float32))
    return t, fused(v, scale, MAGIC - t)


@triton.jit
def near_exp2(v, scale):
    """2^(v·scale), if that is from −126 to 126: ``scaled_exp2`` but for a power of two, bit for bit."""
    t, rest = parted(v, scale)
    power = tl.exp2(rest).to(tl.int32, bitcast=True)
    return (power + (t.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_exp2(v, scale, c):
    """2^(v·scale − c), the same bits times a power of two for every integer c."""
    t, rest = parted(v, scale)
    return tl.exp2(rest) * pow2((t - MAGIC) - c)


@triton.jit
def scaled_log2(t, c, scale, rest):
    """log2(t·2^c)·(scale + rest) of positive normal t, in one rounding; NaN stays NaN.

    The same bits for every c with the same t·2^c.
    """
    bits = t.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    n = (((bits >> 23) & 0xFF) - 127).to(tl.float32) + c
    scale, rest = tl.zeros(t.shape, tl.float32) + scale, tl.zeros(t.shape, tl.float32) + rest
    return tl.where(t == t, fused(n, scale, fused(n, rest, tl.log2(mantissa) * scale)), t)


@triton.jit
def split(o, dtype: tl.constexpr):
    """o rounded, and the rest: the difference in units of the last place of float32, as far as int16 holds it."""
    rounded = o.to(dtype)
    rest = o.to(tl.int32, bitcast=True) - rounded.to(tl.float32).to(tl.int32, bitcast=True)
    return rounded, tl.minimum(tl.maximum(rest, -32768), 32767).to(tl.int16)


@triton.jit
def joined(rounded, rest):
    """The float32 number that was split."""
    bits = rounded.to(tl.float32).to(tl.int32, bitcast=True) + rest.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """tanh, with small relative error at small x too."""
    a = tl.abs(x)
    far = 1 - 2 / (tl.exp2(a * (2 * 1.4426950408889634)) + 1)
    q = x * x
    near = a * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    t = tl.where(a < 0.25, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def load_rows(base, start, stride, rows, columns, end, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile ``[start + rows, columns]`` of a matrix with adjacent columns; zero where it ends, if that is asked.

    Args:
        base: Pointer to row 0.
        start: The first row.
        stride: Of rows, in elements.
        rows: ``arange``, as a column or a row of indices.
        columns: ``arange``, the other way round.
        end: The number of rows there are.
        width: The number of columns there are.
        ROWS: Rows may end inside of the tile.
        COLUMNS: Columns do.
    """
    at = base + tl.cast(start, tl.int64) * stride + (rows * stride + columns)
    if ROWS and COLUMNS:
        return tl.load(at, mask=(start + rows < end) & (columns < width), other=0.0)
    elif ROWS:
        return tl.load(at, mask=start + rows < end, other=0.0)
    elif COLUMNS:
        return tl.load(at, mask=columns < width, other=0.0)
    else:
        return tl.load(at)


# What the lengths of a call are, beside 0, none, and 1, one for each batch entry:
PACKED = tl.constexpr(2)  # where the sequences start in arrays (T, H, D), and where the last one ends
TO_ENDS = tl.constexpr(3)  # the same, and diagonals run to the ends of the sequences
BEHIND = tl.constexpr(128)  # rows behind each packed sequence in arrays that tiles read without bounds


@triton.jit
def length_of(Lengths, b, limit, GIVEN: tl.constexpr):
    """A sequence length, between 0 and the size of its axis."""
    if GIVEN:
        n = tl.load(Lengths + b).to(tl.int32)
        if GIVEN >= PACKED:
            n = tl.load(Lengths + b + 1).to(tl.int32) - n
        return tl.minimum(tl.maximum(n, 0), limit)
    else:
        return limit


@triton.jit
def place_of(Lengths, b, GIVEN: tl.constexpr):
    """What the stride of the batch axis is multiplied by; where packed, that is the stride of rows."""
    if GIVEN >= PACKED:
        return tl.load(Lengths + b).to(tl.int64)
    else:
        return b


@triton.jit
def own_rows(place, h, heads, length, WIDTH: tl.constexpr, GIVEN: tl.constexpr):
    """Where a head's rows begin in a contiguous array, (B, H, L, WIDTH) or packed (T, H, WIDTH), and their distance."""
    if GIVEN >= PACKED:
        return (place * heads + h) * WIDTH, heads * WIDTH
    else:
        return (place * heads + h) * length * WIDTH, WIDTH


@triton.jit
def own_numbers(place, b, h, heads, length, SPACE: tl.constexpr, GIVEN: tl.constexpr):
    """Where a head's numbers begin in an array (B, H, length), or packed (H, length) with space behind sequences."""
    if GIVEN >= PACKED:
        return h * length + place + b * SPACE
    else:
        return (b * heads + h) * length


@triton.jit
def _rows_to(base, start, stride, n, e, final, width, COLUMNS: tl.constexpr):
    """The tile of rows ``start + n``; beyond the final row, that one again: no extreme changes by it."""
    at = base + tl.minimum(start + n, final).to(tl.int64)[:, None] * stride + e[None, :]
    if COLUMNS:
        return tl.load(at, mask=(e < width)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def value_pass(
    V, X, Partial, Counter, KeyLengths,
    v_b, v_h, v_n,
    heads, key_length, blocks, span, y_scale,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr,
    LENGTHS: tl.constexpr, LINEAR: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """X for c = 0, as if all were finite and near. Grid: B·Hkv · blocks, each of ``span`` keys.

    And of each block the range of βv·log2e, the sum of X if that can matter (SUMS), and whether all is finite; and 0
    in Counter, for a kernel that comes later. That a head's last program decides for it would cost all of them a wait
    for their stores, which is more than a kernel that decides.

    Partial: ``(B·Hkv, blocks, 3, EP)``, then ``(B·Hkv, blocks)``.
    """
    if tl.program_id(0) == 0:
        tl.store(Counter, 0)
    block, head = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n, e = tl.arange(0, BLOCK), tl.arange(0, EP)
    end = length_of(KeyLengths, b, key_length, LENGTHS)
    place = place_of(KeyLengths, b, LENGTHS)
    if LENGTHS >= PACKED:
        key_length = end
        if end == 0:  # there is not even a row to read
            return
    final = tl.maximum(end - 1, 0)
    last = tl.minimum((block + 1) * span, key_length)
    V += place * v_b + h * v_h
    if LENGTHS >= PACKED:
        x_n = heads * E
        X += (place * heads + h) * E
    else:
        x_n: tl.constexpr = E
        X += head.to(tl.int64) * key_length * E
    Own = Partial + (head * blocks).to(tl.int64) * (3 * EP)
    Odd = Partial + tl.num_programs(0).to(tl.int64) * (3 * EP) + head * blocks

    # of half a tile each: a thread has both halves; what is left along keys is reduced behind the loop
    HALF: tl.constexpr = BLOCK // 2
    low = tl.full((HALF, EP), float("inf"), tl.float32)
    high = tl.full((HALF, EP), float("-inf"), tl.float32)
    total = tl.zeros((HALF, EP), tl.float32)
    odd = tl.zeros((BLOCK, EP // 8), tl.float32)  # NaN where something is not finite
    v = _rows_to(V, block * span, v_n, n, e, final, E, E != EP)
    for start in range(block * span, last, BLOCK):
        x = v.to(tl.float32)
        v = _rows_to(V, start + BLOCK, v_n, n, e, final, E, E != EP)  # on its way meanwhile
        odd += tl.sum((x * 0.0).reshape(BLOCK, EP // 8, 8), 2)
        if not LINEAR:
            y = x * y_scale
            x = near_exp2(x, y_scale)
            low = tl.minimum(low, tl.min(y.reshape(2, HALF, EP), 0))
            high = tl.maximum(high, tl.max(y.reshape(2, HALF, EP), 0))
            if SUMS:
                total += tl.sum(tl.where((start + n < end)[:, None], x, 0.0).reshape(2, HALF, EP), 0)
        at = X + tl.cast(start, tl.int64) * x_n + (n[:, None] * x_n + e[None, :])
        tl.store(at, x.to(X.dtype.element_ty), mask=(start + n < last)[:, None] & (e < E)[None, :])
    if not LINEAR:
        own = Own + block * (3 * EP) + e
        tl.store(own, tl.min(low, 0))
        tl.store(own + EP, tl.max(high, 0))
        if SUMS:
            tl.store(own + 2 * EP, tl.sum(total, 0))
    tl.store(Odd + block, tl.sum(odd))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decide(
    V, X, Partial, C, Flags, KeyLengths,
    v_b, v_h, v_n, workers, heads, key_length, blocks, y_scale,
    E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr,
    LINEAR: tl.constexpr, SUMS: tl.constexpr, RANGE: tl.constexpr, SUM: tl.constexpr,
    EASY_LOW: tl.constexpr, EASY_HIGH: tl.constexpr, TOP: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """c and the flags of a head, and its X once more where c is not zero or something is not finite.

    Grid: B·Hkv · workers, all of which decide, and share what there is to write.

    All limits in bits. Inside: every channel spans at most RANGE, and ΣX is at most 2^SUM times its least X.
    Small values that span at most NARROW, as constant ones do, are flagged too: rounded X leave such a span.
    c = 0 where βv·log2e is between EASY_LOW and EASY_HIGH; otherwise it brings the top to TOP, or the middle to 0
    where TOP is 0.
    """
    head, worker = tl.program_id(0) // workers, tl.program_id(0) % workers
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n, e = tl.arange(0, BLOCK), tl.arange(0, EP)
    end = length_of(KeyLengths, b, key_length, LENGTHS)
    place = place_of(KeyLengths, b, LENGTHS)
    V += place * v_b + h * v_h
    if LENGTHS >= PACKED:
        key_length = end
        x_n = heads * E
        X += (place * heads + h) * E
        if end == 0:  # nothing was found out
            tl.store(C + head * EP + e, tl.zeros((EP,), tl.int32))
            tl.store(Flags + head, 0)
            return
    else:
        x_n: tl.constexpr = E
        X += head.to(tl.int64) * key_length * E
    Odd = Partial + (tl.num_programs(0) // workers * blocks).to(tl.int64) * (3 * EP) + head * blocks
    Partial += (head * blocks).to(tl.int64) * (3 * EP)
    odd = 0.0
    low = tl.full((EP,), float("inf"), tl.float32)
    high = tl.full((EP,), float("-inf"), tl.float32)
    total = tl.zeros((EP,), tl.float32)
    w = tl.arange(0, WIDE)
    for first in range(0, blocks, WIDE):
        there = first + w < blocks
        odd += tl.sum(tl.load(Odd + first + w, mask=there, other=0.0))
        if not LINEAR:
            at, there = Partial + (first + w)[:, None] * (3 * EP) + e[None, :], there[:, None]
            lows = tl.load(at, mask=there, other=float("inf"))
            highs = tl.load(at + EP, mask=there, other=float("-inf"))
            low = tl.minimum(low, tl.min(lows, 0))
            high = tl.maximum(high, tl.max(highs, 0))
            if SUMS:
                total += tl.sum(tl.load(at + 2 * EP, mask=there, other=0.0), 0)
    again = odd != odd
    flags = tl.where(again, 2, 0)
    c = tl.zeros((EP,), tl.float32)
    if not LINEAR:
        if again:  # the same without what is not finite
            low = tl.full((EP,), float("inf"), tl.float32)
            high = tl.full((EP,), float("-inf"), tl.float32)
            total = tl.zeros((EP,), tl.float32)
            for start in range(0, end, BLOCK):
                v = load_rows(V, start, v_n, n[:, None], e[None, :], end, E, True, E != EP).to(tl.float32)
                fine = is_finite(v) & (start + n < end)[:, None]
                v = tl.where(fine, v, 0.0)
                y = v * y_scale
                low = tl.minimum(low, tl.min(tl.where(fine, y, float("inf")), 0))
                high = tl.maximum(high, tl.max(tl.where(fine, y, float("-inf")), 0))
                total += tl.sum(tl.where(fine, near_exp2(v, y_scale), 0.0), 0)
        some = (high >= low) & (e < E)
        far = some & ~(high - low <= RANGE)
        if SUMS:
            # where X for c = 0 is out of float32, its sum says nothing; the count is used instead
            tame = some & (high < 120) & (low > -120)
            spread = tl.where(tame, tl.log2(tl.where(tame, total, 1.0)) - low, high - low + tl.log2(key_length + 0.0))
            far = far | (some & ~(spread <= SUM))
        flags |= tl.max(far.to(tl.int32))
        if NARROW > 0:
            unit = tl.abs(y_scale)
            narrow = some & (high - low <= NARROW * unit) & (tl.maximum(high, -low) < unit)
            flags |= tl.max(narrow.to(tl.int32)) * 4
        hard = some & ~((low >= EASY_LOW) & (high <= EASY_HIGH))
        if TOP == 0:
            middle = tl.floor(low + (high - low) * 0.5 + 0.5)
        else:
            middle = tl.ceil(high) - TOP
        c = tl.where(hard, tl.minimum(tl.maximum(middle, -(2.0**30)), 2.0**30), 0.0)
        again |= tl.max(tl.abs(c)) > 0
    if worker == 0:
        tl.store(C + head * EP + e, c.to(tl.int32))
        tl.store(Flags + head, flags)
    if again & (flags % 2 == 0):
        for start in range(worker * BLOCK, key_length, workers * BLOCK):
            v = load_rows(V, start, v_n, n[:, None], e[None, :], end, E, True, E != EP).to(tl.float32)
            fine = is_finite(v)
            if LINEAR:
                x = tl.where(fine, v, 0.0)
            else:
                x = tl.where(fine, scaled_exp2(tl.where(fine, v, 0.0), y_scale, c[None, :]), 0.0)
            to = X + tl.cast(start, tl.int64) * x_n + (n[:, None] * x_n + e[None, :])
            tl.store(to, x.to(X.dtype.element_ty), mask=(start + n < key_length)[:, None] & (e < E)[None, :])


@triton.jit
def to_scores(x, i, j, b, h, Mask, Bias, m_b, m_h, m_i, m_j, b_b, b_h, b_i, b_j, limits, low, high, scale, cap,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 from q·k, −∞ where hidden; and the slope of the soft cap."""
    q_end, k_end = limits
    x += x * 0.0  # what is infinite came from an infinite query or key, and is NaN
    if CAP:
        t = tanh(x * (scale / cap))
        s = t * (cap * 1.4426950408889634)
        slope = 1 - t * t
    else:
        s = x * (scale * 1.4426950408889634)
        slope = s
    seen = (i < q_end) & (j < k_end)
    if BAND_LOW:
        seen = seen & (j - i >= low)
    if BAND_HIGH:
        seen = seen & (j - i <= high)
    if MASK:
        at = Mask + b * m_b + h * m_h + i.to(tl.int64) * m_i + j.to(tl.int64) * m_j
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    if BIAS:
        at = Bias + b * b_b + h * b_h + i.to(tl.int64) * b_i + j.to(tl.int64) * b_j
        bias = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        seen = seen & (bias != float("-inf"))  # which hides a key, NaN or not
        s += bias * 1.4426950408889634
    return tl.where(seen, s, float("-inf")), slope


@triton.jit
def key_range(m0, q_end, k_end, low, high, BM: tl.constexpr, BN: tl.constexpr,
    BAND_LOW: tl.constexpr, BAND_HIGH: tl.constexpr, ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """``first, full_first, full_last, last``: keys that queries from m0 see; none is hidden between the inner two."""
    first = 0
    last = tl.where(m0 < q_end, k_end, 0)
    full_first = 0
    full_last = tl.where(m0 + BM <= q_end, k_end // BN * BN, 0)
    if BAND_LOW:
        first = tl.maximum(m0 + low, 0) // BN * BN
        full_first = (tl.maximum(m0 + BM - 1 + low, 0) + BN - 1) // BN * BN
    if BAND_HIGH:
        last = tl.minimum(last, tl.maximum(m0 + BM + high, 0))
        full_last = tl.minimum(full_last, tl.maximum(m0 + high + 1, 0) // BN * BN)
    if ALL_MASKED:
        full_last = 0
    empty = full_last <= full_first
    full_first = tl.where(empty, first, full_first)
    full_last = tl.where(empty, first, full_last)
    return first, full_first, full_last, last


@triton.jit
def tile_count(first, full_first, full_last, last, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """How many tiles there are between the inner two bounds, or outside of them where MASKED."""
    if MASKED:
        return (full_first - first) // SIZE + tl.maximum(last - full_last + SIZE - 1, 0) // SIZE
    else:
        return (full_last - full_first) // SIZE


@triton.jit
def tile_start(index, first, full_first, full_last, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Where the tile of this index starts."""
    if MASKED:
        start = first + index * SIZE
        return start + tl.where(start >= full_first, full_last - full_first, 0)
    else:
        return full_first + index * SIZE
