"""The value pass inside the Hopper forward kernel, in Gluon: X = 2^(βv·log2e − c), beside the products.

It does what ``triton_values.value_pass`` and ``decide`` do, and comes to the same c, flags and X. The keys of a head
are cut into chunks, numbered in the order in which the heads are worked on. A program draws the next chunk from a
counter, writes its X for c = 0 and its range; whoever finishes the last chunk of a head decides for it, writes
its X once more if c is not 0 or something is not finite, and lets the products of that head begin.

All programs begin with the chunks of the first heads; then a few go on with the others, and join in the products when
there are no more. Products wait for X of their head, and they never wait in vain: a chunk is drawn by a program that
runs and waits for nothing until it is done, whatever the other programs are up to, or if they have not even started.

Two values are one word of 32 bits throughout, and their range is kept rounded as they are: in few registers.

Device code only: nothing of the host is imported here.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, valid-type, operator, untyped-decorator, no-redef"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MAGIC = gl.constexpr(12582912.0)  # 1.5·2^23, see triton_values
OUTSIDE = gl.constexpr(1)
BROKEN = gl.constexpr(2)
NARROW_SPAN = gl.constexpr(4)
DECIDED = gl.constexpr(1 << 30)
DEPTH = gl.constexpr(8)  # vectors of 16 bytes that a thread has on the way


@gluon.jit
def pack(even, odd, dtype: gl.constexpr):
    """Two float32 numbers rounded, in a word."""
    if dtype == gl.bfloat16:
        rounding: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        rounding: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(rounding, "=r,r,r", [even, odd], gl.int32, True, 1)


@gluon.jit
def unpack(word, dtype: gl.constexpr):
    """The two numbers of a word, as float32."""
    if dtype == gl.bfloat16:
        even = (word << 16).to(gl.float32, bitcast=True)
        odd = (word & -65536).to(gl.float32, bitcast=True)
    else:
        even = word.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        odd = (word >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return even, odd


@gluon.jit
def _greater_bf16(a, b):
    return gl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, True, 1)


@gluon.jit
def _greater_fp16(a, b):
    return gl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, True, 1)


@gluon.jit
def _greatest(words, dtype: gl.constexpr):
    """The greatest of each of the two numbers along the first axis, NaN where there is one."""
    if dtype == gl.bfloat16:
        found = gl.reduce(words, 0, _greater_bf16)
    else:
        found = gl.reduce(words, 0, _greater_fp16)
    return found


@gluon.jit
def _greater(a, b, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        found = _greater_bf16(a, b)
    else:
        found = _greater_fp16(a, b)
    return found


@gluon.jit
def _negated(words):
    return words ^ -2147450880  # both signs


@gluon.jit
def _near_exp2(v, scale):
    """2^(v·scale) between 2^−126 and 2^126: ``triton_values.near_exp2``, the same bits."""
    scale = gl.full_like(v, 0.0) + scale
    t = gl.fma(v, scale, gl.full_like(v, MAGIC))
    power = gl.exp2(gl.fma(v, scale, MAGIC - t)).to(gl.int32, bitcast=True)
    return (power + (t.to(gl.int32, bitcast=True) << 23)).to(gl.float32, bitcast=True)


@gluon.jit
def _scaled_exp2(v, scale, c):
    """2^(v·scale − c): ``triton_values.scaled_exp2``, the same bits."""
    scale = gl.full_like(v, 0.0) + scale
    t = gl.fma(v, scale, gl.full_like(v, MAGIC))
    power = gl.exp2(gl.fma(v, scale, MAGIC - t))
    n = gl.minimum(gl.maximum((t - MAGIC) - c, -126.0), 127.0) + MAGIC
    return power * ((n.to(gl.int32, bitcast=True) + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def fence_async():
    """What this thread wrote, or saw of others, is before what the copy engine reads of global memory from here on."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [gl.arange(0, 32 * gl.num_warps(), layout=lanes)],
        gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def await_head(head_ptr):
    """Wait until X of a head is there for the copy engine."""
    while gl.atomic_add(head_ptr, 0, sem="acquire", scope="gpu") < DECIDED:
        pass
    fence_async()


@gluon.jit
def _rows(ptr, row, stride, w):
    """Addresses of words w of rows, in (rows, words) or with an axis in front."""
    return ptr + row.to(gl.int64) * stride + w


@gluon.jit
def _place(chunk, v_ptr, v_b, v_h, heads, len_k, blocks, span):
    """The head of a chunk, its values, and its first key and where it ends."""
    head = chunk // blocks
    first = (chunk - head * blocks) * span
    v = v_ptr + ((head // heads).to(gl.int64) * v_b + (head % heads).to(gl.int64) * v_h) * 4
    return head, v, first, gl.minimum(first + span, len_k)


@gluon.jit
def _prefetch(v, v_n, first, end, WORDS: gl.constexpr):
    """Ask for values to be brought into the L2 cache."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, 32 * gl.num_warps(), layout=lanes)
    for start in range(first, end, 32 * gl.num_warps()):
        row = v + gl.minimum(start + lane, end - 1).to(gl.int64) * (v_n * 4)
        if WORDS == 64:
            lines: gl.constexpr = "prefetch.global.L2 [$1]; prefetch.global.L2 [$1+128]; mov.b32 $0, 0;"
        else:
            lines: gl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        gl.inline_asm_elementwise(lines, "=r,l", [row.to(gl.int64)], gl.int32, False, 1)


@gluon.jit
def make(
    drawn, which, values, WARPGROUPS: gl.constexpr,
    WORDS: gl.constexpr, dtype: gl.constexpr, SUMS: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """X, c and the flags of all heads, by several warpgroups of all programs.

    Args:
        drawn: What was drawn for the program, in steps of WARPGROUPS.
        which: Which of its warpgroups this is.
        values: The following, as a tuple.
        counter_ptr: The chunks that were drawn of the first heads, and of the others.
        heads_ptr: For each head 0; the chunks of it that are done, and DECIDED where all is.
        v_ptr: The values, strides v_b, v_h and v_n in units of eight.
        x_ptr: X, contiguous.
        c_ptr: Of each head and channel.
        flags_ptr: Of each head.
        partial_ptr: Of each chunk the greatest v and −v, as words; then, with SUMS, the sums of X, even and odd.
        heads: Of a batch entry.
        len_k: Keys of a head.
        blocks: Chunks of a head.
        span: Keys of a chunk.
        ahead: The first heads, that all programs begin with.
        chunks: Of all heads.
        y_scale: βv·log2e = v·y_scale.
        makers: Programs that go on with the others; in chunks that are ``several`` times as long.
        WORDS: Of a row.
        dtype: Of the values.
        SUMS: Whether the sums of X can matter.
        LIMITS: Of the fast range, see ``triton_values.decide``.
    """
    (
        counter_ptr, heads_ptr, v_ptr, x_ptr, c_ptr, flags_ptr, partial_ptr,
        v_b, v_h, v_n, heads, len_k, blocks, span, ahead, chunks, y_scale, makers, several,
    ) = values  # fmt: skip
    word_ptr = gl.pointer_type(gl.int32)
    common = (
        heads_ptr, v_ptr.to(word_ptr, bitcast=True), x_ptr.to(word_ptr, bitcast=True), c_ptr, flags_ptr, partial_ptr,
        v_b, v_h, v_n, heads, len_k, blocks, chunks, y_scale,
    )  # fmt: skip
    chunk = drawn + which
    base = 0
    limit = ahead * blocks
    own_blocks = blocks
    own_span = span
    for phase in range(0, gl.where(drawn < makers * WARPGROUPS, 2, 1)):
        if phase > 0:
            own_blocks = gl.cdiv(blocks, several)
            own_span = span * several
            base = ahead * own_blocks
            limit = chunks // blocks * own_blocks
            chunk = base + gl.atomic_add(counter_ptr + 1, 1, sem="relaxed", scope="gpu")
        _work(chunk, base, limit, counter_ptr + phase, own_blocks, own_span, common, WORDS, dtype, SUMS, LIMITS)


@gluon.jit
def _work(
    chunk, base, limit, counter_ptr, blocks, span, common,
    WORDS: gl.constexpr, dtype: gl.constexpr, SUMS: gl.constexpr, LIMITS: gl.constexpr,
):  # fmt: skip
    """Chunks from ``chunk``, which was drawn before, up to ``limit``."""
    heads_ptr, v_ptr, x_ptr, c_ptr, flags_ptr, partial_ptr, v_b, v_h, v_n, heads, len_k, pitch, chunks, y_scale = common
    ACROSS: gl.constexpr = WORDS // 4
    STEP: gl.constexpr = gl.num_warps() * 32 // ACROSS
    ROWS: gl.constexpr = DEPTH * STEP
    lies: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 // ACROSS, ACROSS], [1, gl.num_warps(), 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(0, lies)
    of_words: gl.constexpr = gl.SliceLayout(0, flat)
    if dtype == gl.bfloat16:
        LEAST: gl.constexpr = -8323200  # −∞ twice
    else:
        LEAST: gl.constexpr = -67044352
    w = gl.arange(0, WORDS, layout=of_words)
    w3 = gl.expand_dims(gl.expand_dims(w, 0), 0)
    deep = gl.expand_dims(gl.expand_dims(gl.arange(0, DEPTH, layout=gl.SliceLayout(1, gl.SliceLayout(2, lies))), 1), 2)
    step = gl.expand_dims(gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(0, gl.SliceLayout(2, lies))), 0), 2)
    rows = deep * STEP + step
    head, v, first, end = _place(gl.minimum(chunk, limit - 1), v_ptr, v_b, v_h, heads, len_k, blocks, span)
    # beyond the last key, that one again: no extreme changes by it
    words = gl.load(_rows(v, gl.minimum(first + rows, end - 1), v_n * 4, w3))
    while chunk < limit:
        following = base + gl.atomic_add(counter_ptr, 1, sem="relaxed", scope="gpu")
        next_head, next_v, next_first, next_end = _place(
            gl.minimum(following, limit - 1), v_ptr, v_b, v_h, heads, len_k, blocks, span
        )
        _prefetch(next_v, v_n, next_first, next_end, WORDS)
        x = x_ptr + head.to(gl.int64) * len_k * WORDS
        top = gl.full([STEP, WORDS], LEAST, gl.int32, flat)
        bottom = gl.full([STEP, WORDS], LEAST, gl.int32, flat)
        total_even = gl.zeros([STEP, WORDS], gl.float32, flat)
        total_odd = gl.zeros([STEP, WORDS], gl.float32, flat)
        for start in range(first, end, ROWS):
            held = words
            if start + ROWS < end:  # what comes next is on its way meanwhile
                words = gl.load(_rows(v, gl.minimum(start + ROWS + rows, end - 1), v_n * 4, w3))
            else:
                words = gl.load(_rows(next_v, gl.minimum(next_first + rows, next_end - 1), v_n * 4, w3))
            even, odd = unpack(held, dtype)
            even = _near_exp2(even, y_scale)
            odd = _near_exp2(odd, y_scale)
            there = start + rows < end
            gl.store(_rows(x, start + rows, WORDS, w3), pack(even, odd, dtype), mask=there)
            top = _greater(top, _greatest(held, dtype), dtype)
            bottom = _greater(bottom, _greatest(_negated(held), dtype), dtype)
            if SUMS:
                total_even += gl.sum(gl.where(there, even, 0.0), 0)
                total_odd += gl.sum(gl.where(there, odd, 0.0), 0)
        place = head * pitch + chunk - head * blocks
        own = partial_ptr + place.to(gl.int64) * (2 * WORDS) + w
        gl.store(own, _greatest(top, dtype))
        gl.store(own + WORDS, _greatest(bottom, dtype))
        if SUMS:
            sums = partial_ptr + (chunks + place).to(gl.int64) * (2 * WORDS)
            sums = sums.to(gl.pointer_type(gl.float32), bitcast=True) + w
            gl.store(sums, gl.sum(total_even, 0))
            gl.store(sums + WORDS, gl.sum(total_odd, 0))
        fence_async()
        gl.thread_barrier()  # all of this chunk is written
        if gl.atomic_add(heads_ptr + head, 1, sem="acq_rel", scope="gpu") == blocks - 1:
            _decide(
                head, v, x, c_ptr, flags_ptr, partial_ptr, v_n, len_k, pitch, blocks, chunks, y_scale,
                WORDS, dtype, SUMS, LIMITS, flat,
            )  # fmt: skip
            fence_async()
            gl.thread_barrier()
            gl.atomic_add(heads_ptr + head, DECIDED, sem="release", scope="gpu")
        chunk, head, v, first, end = following, next_head, next_v, next_first, next_end


@gluon.jit
def _decide(
    head, v, x, c_ptr, flags_ptr, partial_ptr, v_n, len_k, pitch, blocks, chunks, y_scale,
    WORDS: gl.constexpr, dtype: gl.constexpr, SUMS: gl.constexpr, LIMITS: gl.constexpr, flat: gl.constexpr,
):  # fmt: skip
    """c and the flags of a head whose chunks are all done, and its X once more if need be: ``triton_values.decide``."""
    of_words: gl.constexpr = gl.SliceLayout(0, flat)
    STEP: gl.constexpr = gl.num_warps() * 128 // WORDS
    w = gl.arange(0, WORDS, layout=of_words)
    n = gl.expand_dims(gl.arange(0, STEP, layout=gl.SliceLayout(1, flat)), 1)
    w2 = gl.expand_dims(w, 0)
    own = partial_ptr + (head * pitch).to(gl.int64) * (2 * WORDS)
    sums = (own + chunks.to(gl.int64) * (2 * WORDS)).to(gl.pointer_type(gl.float32), bitcast=True)
    at = gl.minimum(n, blocks - 1) * (2 * WORDS) + w2
    top = gl.load(own + at, cache_modifier=".cg")
    bottom = gl.load(own + at + WORDS, cache_modifier=".cg")
    total_even = gl.zeros([STEP, WORDS], gl.float32, flat)
    total_odd = gl.zeros([STEP, WORDS], gl.float32, flat)
    for first in range(0, blocks, STEP):
        at = gl.minimum(first + n, blocks - 1) * (2 * WORDS) + w2
        top = _greater(top, gl.load(own + at, cache_modifier=".cg"), dtype)
        bottom = _greater(bottom, gl.load(own + at + WORDS, cache_modifier=".cg"), dtype)
        if SUMS:
            total_even += gl.load(sums + at, mask=first + n < blocks, other=0.0, cache_modifier=".cg")
            total_odd += gl.load(sums + at + WORDS, mask=first + n < blocks, other=0.0, cache_modifier=".cg")
    top_even, top_odd = unpack(_greatest(top, dtype), dtype)
    low_even, low_odd = unpack(_negated(_greatest(bottom, dtype)), dtype)
    total_even = gl.sum(total_even, 0)
    total_odd = gl.sum(total_odd, 0)
    fine = (top_even < float("inf")) & (top_odd < float("inf"))
    fine = fine & (low_even > float("-inf")) & (low_odd > float("-inf"))  # not so if NaN
    broken = gl.max((~fine).to(gl.int32), 0)
    if broken > 0:  # the same without what is not finite
        low_even, top_even, total_even = _finite_range(v, w2, n, v_n, len_k, y_scale, 0, STEP, WORDS, dtype, flat)
        low_odd, top_odd, total_odd = _finite_range(v, w2, n, v_n, len_k, y_scale, 1, STEP, WORDS, dtype, flat)
    c_even, flags_even = _judge(low_even, top_even, total_even, len_k, y_scale, SUMS, LIMITS)
    c_odd, flags_odd = _judge(low_odd, top_odd, total_odd, len_k, y_scale, SUMS, LIMITS)
    outside = gl.max((flags_even | flags_odd) & OUTSIDE, 0)
    flags = outside | (broken * BROKEN) | gl.max((flags_even | flags_odd) & NARROW_SPAN, 0)
    gl.store(c_ptr + head * (2 * WORDS) + w * 2, c_even.to(gl.int32))
    gl.store(c_ptr + head * (2 * WORDS) + w * 2 + 1, c_odd.to(gl.int32))
    gl.store(flags_ptr + head, flags)
    again = gl.max(gl.maximum(gl.abs(c_even), gl.abs(c_odd)), 0)
    if ((broken > 0) | (again > 0)) & (outside == 0):
        for first in range(0, len_k, STEP):
            row = first + n
            even, odd = unpack(gl.load(_rows(v, gl.minimum(row, len_k - 1), v_n * 4, w2)), dtype)
            even = gl.where(gl.abs(even) < float("inf"), _scaled_exp2(even, y_scale, gl.expand_dims(c_even, 0)), 0.0)
            odd = gl.where(gl.abs(odd) < float("inf"), _scaled_exp2(odd, y_scale, gl.expand_dims(c_odd, 0)), 0.0)
            gl.store(_rows(x, row, WORDS, w2), pack(even, odd, dtype), mask=row < len_k)


@gluon.jit
def _finite_range(
    v, w, n, v_n, len_k, y_scale, ODD: gl.constexpr,
    STEP: gl.constexpr, WORDS: gl.constexpr, dtype: gl.constexpr, flat: gl.constexpr,
):  # fmt: skip
    """The least and greatest finite value of even or odd channels, and the sum of X."""
    low = gl.full([STEP, WORDS], float("inf"), gl.float32, flat)
    top = gl.full([STEP, WORDS], float("-inf"), gl.float32, flat)
    total = gl.zeros([STEP, WORDS], gl.float32, flat)
    for first in range(0, len_k, STEP):
        row = first + n
        pair = unpack(gl.load(_rows(v, gl.minimum(row, len_k - 1), v_n * 4, w)), dtype)
        value = pair[ODD]
        fine = (gl.abs(value) < float("inf")) & (row < len_k)
        low = gl.minimum(low, gl.where(fine, value, float("inf")))
        top = gl.maximum(top, gl.where(fine, value, float("-inf")))
        total += gl.where(fine, _near_exp2(value, y_scale), 0.0)
    return gl.min(low, 0), gl.max(top, 0), gl.sum(total, 0)


@gluon.jit
def _judge(least, greatest, total, len_k, y_scale, SUMS: gl.constexpr, LIMITS: gl.constexpr):
    """c and flags of channels."""
    RANGE: gl.constexpr = LIMITS[0]
    SUM: gl.constexpr = LIMITS[1]
    EASY_LOW: gl.constexpr = LIMITS[2]
    EASY_HIGH: gl.constexpr = LIMITS[3]
    TOP: gl.constexpr = LIMITS[4]
    NARROW: gl.constexpr = LIMITS[5]
    some = greatest >= least
    low = gl.minimum(least * y_scale, greatest * y_scale)
    high = gl.maximum(least * y_scale, greatest * y_scale)
    far = some & ((high - low <= RANGE) == 0)
    if SUMS:
        # where X for c = 0 is out of float32, its sum says nothing; the count is used instead
        tame = some & (high < 120) & (low > -120)
        count = gl.log2(gl.full_like(low, 0.0) + len_k.to(gl.float32))
        spread = gl.where(tame, gl.log2(gl.where(tame, total, 1.0)) - low, high - low + count)
        far = far | (some & ((spread <= SUM) == 0))
    flags = far.to(gl.int32) * OUTSIDE
    if NARROW > 0:
        unit = gl.abs(y_scale)
        narrow = some & (high - low <= NARROW * unit) & (gl.maximum(high, -low) < unit)
        flags = flags | narrow.to(gl.int32) * NARROW_SPAN
    hard = some & (((low >= EASY_LOW) & (high <= EASY_HIGH)) == 0)
    if TOP == 0:
        middle = gl.floor(low + (high - low) * 0.5 + 0.5)
    else:
        middle = gl.ceil(high) - TOP
    return gl.where(hard, gl.minimum(gl.maximum(middle, -1073741824.0), 1073741824.0), 0.0), flags
