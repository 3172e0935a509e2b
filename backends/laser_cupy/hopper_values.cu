// X = exp(beta*v) * 2^-c for the Hopper kernels, made by single warps.
//
// values.cu reads the values twice: c has to be known before X is written. Here X is written with c = 0 at once, and again for
// the heads where that is not in range: c is in no bit of the result.

#define X_LANES (EP > 64 ? 16 : 8)  // of a row of values, 8 channels each
#define X_ROWS (32 / X_LANES)       // of a warp
#if FLOAT16
#define HARDLY 0x1p-9f  // of beta*v: four roundings of X
#define EASY_LOW -14.f  // bits of X with c = 0 that are in range
#define EASY_HIGH 15.f
#define PAIRS "f16x2"
#else
#define HARDLY 0x1p-6f
#define EASY_LOW -49.f
#define EASY_HIGH 49.f
#define PAIRS "bf16x2"
#endif

struct alignas(16) Eight {
  u32 x[4];
  __device__ __forceinline__ float operator[](int n) const { return widen((u16)(x[n / 2] >> n % 2 * 16)); }
};
__device__ __forceinline__ Eight rounded(const float (&x)[8]) {
  return {{pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])}};
}

// numbers as integers of the same order, all above 0
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = float_as_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number(u32 x) { return bits_as_float(x >> 31 ? x & 0x7FFFFFFFu : ~x); }

// beta in units of base 2, as the sum of two numbers
struct Base { float high, low; };
__device__ __forceinline__ Base base_of(float beta) {
  const float high = beta * LOG2E;
  return {high, fmaf(beta, LOG2E, -high) + beta * 1.92596299e-8f};  // what LOG2E lacks of log2(e)
}

#define SHIFTER 12582912.f  // 1.5 * 2^23: numbers below 2^22 that are added to it are rounded to integers

// exp(beta*v) * 2^-c; 0 where beta*v is not finite
__device__ __forceinline__ float value_of(float v, float beta, const Base& base, int c) {
  const float y = v * base.high;
  const float whole = fabsf(y) < 4e6f ? fmaf(v, base.high, SHIFTER) - SHIFTER : rintf(fminf(fmaxf(y, -1e9f), 1e9f));
  const float mantissa = exp2_fast(fmaf(v, base.low, fmaf(v, base.high, -whole)));
  return finite(beta * v) ? scaled(mantissa, (int)whole - c) : 0.f;
}
// the same bits for c = 0 where the result is normal
__device__ __forceinline__ float easy_value_of(float v, const Base& base) {
  const float shifted = fmaf(v, base.high, SHIFTER), whole = shifted - SHIFTER;
  const float mantissa = exp2_fast(fmaf(v, base.low, fmaf(v, base.high, -whole)));
  return bits_as_float(float_as_bits(mantissa) + (float_as_bits(shifted) << 23));
}

// What the integer of a channel, and the path of its head, rest on
struct Choice { bool outside, easy, narrow; int c; };
__device__ __forceinline__ Choice choose(const Problem& p, float high, float low) {  // of beta*v
  const float reach = fminf(MAX_BITS, SUM_BITS - log2f((float)greatest(p.key_length, 1)));
  const bool outside = !((high - low) * LOG2E <= reach);
  // p is rounded too, and its sum is not: from 4 on both together are less than half a rounding of o
  const bool narrow = high - low <= HARDLY && fmaxf(fabsf(low), fabsf(high)) < 4.f;
  return {outside, low * LOG2E >= EASY_LOW && high * LOG2E <= EASY_HIGH, narrow,
          outside ? 0 : (int)rintf(fminf(fmaxf((0.5f * low + 0.5f * high) * LOG2E, -1e9f), 1e9f))};
}

// of two numbers each; NaN if one is
__device__ __forceinline__ u32 max_pair(u32 a, u32 b) {
  u32 d;
  asm("max.NaN." PAIRS " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 min_pair(u32 a, u32 b) {
  u32 d;
  asm("min.NaN." PAIRS " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// the same, but the other one where one is NaN
__device__ __forceinline__ u32 greatest_pair(u32 a, u32 b) {
  u32 d;
  asm("max." PAIRS " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 least_pair(u32 a, u32 b) {
  u32 d;
  asm("min." PAIRS " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// The value pass as other work of a kernel that reads X. Integers are zero before, and ranges NaN.
struct ValuePass {
  const u16 *k, *v;
  u16* x;       // [rooms, Lk, EP]: head n has the room n % rooms
  u16* ranges;  // [B*Hkv, 2, EP]: the greatest and the least value of each channel, NaN where there is none
  int *c, *flags;
  int *done, *states, *again;  // [B*Hkv]: runs of keys of which X is written; what there is; runs that some warp makes again
  int* next;          // run
  int* used;          // [B*Hkv]: warps that have read X of a head for a tile of queries
  int first;          // key/value heads that are made by all warps together, before anything else; negative: all are there
  int rooms, readers; // readers: what `used` is in the end

  __device__ __forceinline__ u16* room(const Problem& p, int kv) const { return x + (i64)(kv % rooms) * p.key_length * EP; }
};

__device__ __forceinline__ Choice choose(const Problem& p, const ValuePass& pass, int kv, int e) {
  const u16* range = pass.ranges + (i64)kv * 2 * EP + e;
  const float high = widen(__ldcg(range)), low = widen(__ldcg(range + EP));
  if (!(low <= high)) return {false, true, false, 0};  // nothing is finite
  return choose(p, fmaxf(p.beta * high, p.beta * low), fminf(p.beta * high, p.beta * low));
}

// The least and the greatest values that a lane has met
struct Range {
  u32 low[4], high[4];
  __device__ __forceinline__ Range() {
#pragma unroll
    for (int n = 0; n < 4; n++) { low[n] = pack(INF, INF); high[n] = pack(-INF, -INF); }
  }
};

// X of eight values
__device__ __forceinline__ Eight made_of(const Eight& v, const Base& base, Range& range) {
  Eight made;
#pragma unroll
  for (int n = 0; n < 4; n++) {
    range.low[n] = min_pair(range.low[n], v.x[n]);
    range.high[n] = max_pair(range.high[n], v.x[n]);
    made.x[n] = pack(easy_value_of(v[2 * n], base), easy_value_of(v[2 * n + 1], base));
  }
  return made;
}

// Where something of a run is not finite: X is zero there, and it is no part of the range. `end`: of the keys of this lane
__device__ __forceinline__ Range odd_run(const Problem& p, const ValuePass& pass, int kv, int j0, int end) {
  const int lane = threadIdx.x % 32, e = lane % X_LANES * 8;
  bool odd = false;
  Range range;
#pragma unroll 1
  for (int j = j0 + lane / X_LANES; j < end; j += X_ROWS) {
    const Eight from = *(const Eight*)(pass.v + ((i64)kv * p.key_length + j) * p.value_dim + e);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      u32 kept = 0xFFFFFFFFu;  // NaN twice
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float y = p.beta * from[2 * n + h];
        odd |= !(y < INF);
        if (finite(y)) kept = h ? (kept & 0xFFFFu) | (from.x[n] & 0xFFFF0000u) : (kept & 0xFFFF0000u) | (from.x[n] & 0xFFFFu);
        else pass.room(p, kv)[(i64)j * EP + e + 2 * n + h] = 0;
      }
      range.low[n] = least_pair(range.low[n], kept);
      range.high[n] = greatest_pair(range.high[n], kept);
    }
  }
  if (__any_sync(FULL_WARP, odd) && lane == 0) atomicOr(pass.flags + kv, BROKEN);
  return range;
}

// where the keys end that a lane with these channels reads
__device__ __forceinline__ int end_of(const Problem& p, int kv, int e) {
  const int end = p.key_lengths ? least(p.key_lengths[kv * p.group / p.query_heads], p.key_length) : p.key_length;
  return e < p.value_dim ? end : 0;
}

// Adds the range of a run of keys [j0, end) to that of the head
__device__ __forceinline__ void run_met(const Problem& p, const ValuePass& pass, int kv, int j0, int end, Range range) {
  const int lane = threadIdx.x % 32, e = lane % X_LANES * 8, own = lane / X_LANES;
  bool fine = true;
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      fine &= finite(p.beta * widen((u16)(range.low[n] >> 16 * h))) && finite(p.beta * widen((u16)(range.high[n] >> 16 * h)));
  if (__any_sync(FULL_WARP, j0 + own < end && !fine)) range = odd_run(p, pass, kv, j0, end);
#pragma unroll
  for (int m = X_LANES; m < 32; m *= 2)
#pragma unroll
    for (int n = 0; n < 4; n++) {
      range.low[n] = least_pair(range.low[n], __shfl_xor_sync(FULL_WARP, range.low[n], m));
      range.high[n] = greatest_pair(range.high[n], __shfl_xor_sync(FULL_WARP, range.high[n], m));
    }
  if (own || j0 >= end) return;
  u16* to = pass.ranges + (i64)kv * 2 * EP + e;
  asm volatile("red.relaxed.gpu.global.max.noftz.v4." PAIRS " [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(range.high[0]), "r"(range.high[1]),
               "r"(range.high[2]), "r"(range.high[3]) : "memory");
  asm volatile("red.relaxed.gpu.global.min.noftz.v4." PAIRS " [%0], {%1, %2, %3, %4};" ::"l"(to + EP), "r"(range.low[0]), "r"(range.low[1]),
               "r"(range.low[2]), "r"(range.low[3]) : "memory");
}

#define MADE 1  // X of a head is there
#define HARD 2  // it is to be made again, with c

// What others write, without an order: acquiring loads empty the L1 cache, and those who wait look again and again
__device__ __forceinline__ int looked_at(const int* from) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
// what they wrote before what has been looked at is seen from here on
__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// What this warp has written can be copied by whoever learns of it from the first lane
__device__ __forceinline__ void release() {
  publish_global();  // X is read by the copy engine
  acquire();
  __syncwarp();
}

// Says that so many of `all` runs of a head are written. Who says the last makes the integers and the flags.
__device__ __forceinline__ void run_made(const Problem& p, const ValuePass& pass, int kv, int count, int all) {
  const int lane = threadIdx.x % 32;
  release();
  const int before = __shfl_sync(FULL_WARP, lane == 0 ? atomicAdd(pass.done + kv, count) : 0, 0);
  if (before + count < all) return;
  __threadfence();
  bool outside = false, easy = true, narrow = false;
  for (int e = lane; e < EP; e += 32) {
    const Choice one = choose(p, pass, kv, e);
    outside |= one.outside;
    easy &= one.easy;
    narrow |= one.narrow;
  }
  outside = __any_sync(FULL_WARP, outside);
  narrow = __any_sync(FULL_WARP, narrow);
  const bool hard = __any_sync(FULL_WARP, !easy);
  for (int e = lane; e < EP; e += 32) pass.c[(i64)kv * CP + e] = hard ? choose(p, pass, kv, e).c : 0;
  if ((outside || narrow) && lane == 0) atomicOr(pass.flags + kv, (outside ? OUTSIDE : 0) | (narrow ? NARROW : 0));
  release();
  if (lane == 0) atomicExch(pass.states + kv, hard && !outside ? HARD : MADE);
}

#ifndef RUN
#define RUN 64        // keys that a warp makes X of, in the background
#endif
#define SHORT_RUN 16  // and while all warps do it
#define CHUNK 8       // values of each lane, times 8, that are copied to shared memory ahead of their use
#define X_WARPS 3

struct alignas(16) ValueRoom { Eight v[X_WARPS][2][CHUNK][32]; };

// What comes first: by all warps of all blocks
__device__ __forceinline__ void first_values(const Problem& p, const ValuePass& pass) {
  const int all = (p.key_length + RUN - 1) / RUN * (RUN / SHORT_RUN), warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32, e = lane % X_LANES * 8, own = lane / X_LANES;
  const Base base = base_of(p.beta);
#pragma unroll 1
  for (int n = threadIdx.x / 32 * gridDim.x + blockIdx.x; n < pass.first * all; n += warps * gridDim.x) {
    const int kv = n / all, j0 = n % all * SHORT_RUN, j1 = e < EP ? least(j0 + SHORT_RUN, p.key_length) : 0, end = least(j1, end_of(p, kv, e));
    const u16* from = pass.v + ((i64)kv * p.key_length + j0 + own) * p.value_dim + e;
    u16* to = pass.room(p, kv) + (i64)(j0 + own) * EP + e;
    Eight some[SHORT_RUN / X_ROWS];
    Range range;
#pragma unroll
    for (int d = 0; d < SHORT_RUN / X_ROWS; d++)
      if (j0 + own + d * X_ROWS < end) some[d] = *(const Eight*)(from + d * X_ROWS * p.value_dim);
#pragma unroll
    for (int d = 0; d < SHORT_RUN / X_ROWS; d++)
      if (j0 + own + d * X_ROWS < j1) *(Eight*)(to + d * X_ROWS * EP) = j0 + own + d * X_ROWS < end ? made_of(some[d], base, range) : Eight{};
    run_met(p, pass, kv, j0, end, range);
    run_made(p, pass, kv, 1, all);
  }
}

// Takes part in making X of hard heads in begin … end once more, with c. Whether all of them have their states.
__device__ __forceinline__ bool values_again(const Problem& p, const ValuePass& pass, int begin, int end) {
  const int runs = (p.key_length + RUN - 1) / RUN, lane = threadIdx.x % 32, e = lane % X_LANES * 8;
  const Base base = base_of(p.beta);
  bool all = true;
#pragma unroll 1
  for (int start = begin; start < end; start += 32) {
    const int state = start + lane < end ? looked_at(pass.states + start + lane) : MADE;
    all &= state != 0;
    u32 hard = __ballot_sync(FULL_WARP, state == HARD);
    if (hard) acquire();
#pragma unroll 1
    while (hard) {
      const int kv = start + __ffs(hard) - 1, run = __shfl_sync(FULL_WARP, lane == 0 ? atomicAdd(pass.again + kv, 1) : 0, 0);
      if (run >= runs) {
        hard &= hard - 1;
        continue;
      }
      const int last = least(run * RUN + RUN, end_of(p, kv, e));
#pragma unroll 2
      for (int j = run * RUN + lane / X_LANES; j < last; j += X_ROWS) {
        const Eight from = *(const Eight*)(pass.v + ((i64)kv * p.key_length + j) * p.value_dim + e);
        Eight made;
#pragma unroll
        for (int n = 0; n < 4; n++) {
          const int* c = pass.c + (i64)kv * CP + e + 2 * n;
          made.x[n] = pack(value_of(from[2 * n], p.beta, base, __ldcg(c)), value_of(from[2 * n + 1], p.beta, base, __ldcg(c + 1)));
        }
        *(Eight*)(pass.room(p, kv) + (i64)j * EP + e) = made;
      }
      release();
      if (lane == 0 && atomicAdd(pass.done + kv, 1) + 1 == runs * (RUN / SHORT_RUN) + runs) {
        __threadfence();
        atomicExch(pass.states + kv, MADE);
      }
    }
  }
  return __all_sync(FULL_WARP, all);
}

// The rest, by warps that have nothing else to do. They wait for the readers of heads of earlier sections only, which are
// tiles of blocks that run, so everybody comes to an end, however many blocks run at the same time. What a lane reads it has
// copied to shared memory itself, a chunk ahead.
__device__ __forceinline__ void more_values(const Problem& p, const ValuePass& pass, int heads, Eight (&room)[2][CHUNK][32]) {
  constexpr int CHUNKS = RUN / X_ROWS / CHUNK;  // of a run
  const int runs = (p.key_length + RUN - 1) / RUN, lane = threadIdx.x % 32, e = lane % X_LANES * 8, own = lane / X_LANES;
  const Base base = base_of(p.beta);
  auto begin = [&](int run, int chunk) {
    const int kv = pass.first + run / runs, j0 = run % runs * RUN + chunk * CHUNK * X_ROWS + own;
    if (kv < heads) {
      const int end = end_of(p, kv, e);
      const u16* from = pass.v + ((i64)kv * p.key_length + j0) * p.value_dim + e;
#pragma unroll 1
      for (int d = 0; d < CHUNK; d++)
        if (j0 + d * X_ROWS < end) copy_begin(&room[chunk % 2][d][lane], from + d * X_ROWS * p.value_dim);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  auto draw = [&] { return lane == 0 ? atomicAdd(pass.next, 1) : 0; };
  // whether what is in the room of a head is there and nobody reads it any more
  auto room_free = [&](int kv) {
    const int before = kv - pass.rooms;
    return before < 0 || __all_sync(FULL_WARP, looked_at(pass.used + before) >= pass.readers && looked_at(pass.states + before) == MADE);
  };
  int run = __shfl_sync(FULL_WARP, draw(), 0), drawn = draw();
  begin(run, 0);
#pragma unroll 1
  for (;;) {
    const int kv = pass.first + run / runs, j0 = run % runs * RUN;
    const bool over = kv >= heads;
    if (over || !room_free(kv)) {  // whoever is waited for may wait for a hard head: `rooms` is no less than a section
      if (values_again(p, pass, over ? 0 : greatest(0, kv - 2 * pass.rooms), least(kv, heads)) && over) break;
      __nanosleep(100);
      continue;
    }
    if (kv >= pass.rooms) acquire();
    publish_global();  // X was read by the copy engine
    if (lane == 0) bytes_fetch(pass.k + ((i64)kv * p.key_length + j0) * WIDTH, least(RUN, p.key_length - j0) * WIDTH * 2);
    const int next = __shfl_sync(FULL_WARP, drawn, 0), end = end_of(p, kv, e);
    drawn = draw();
    Range range;
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      if (chunk + 1 < CHUNKS) begin(run, chunk + 1);
      else begin(next, 0);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      int j = j0 + chunk * CHUNK * X_ROWS + own;
      u16* to = pass.room(p, kv) + (i64)j * EP + e;
#pragma unroll 1
      for (int d = 0; d < CHUNK; d++, j += X_ROWS, to += X_ROWS * EP) {
        const Eight from = room[chunk % 2][d][lane];
        if (j < p.key_length && e < EP) *(Eight*)to = j < end ? made_of(from, base, range) : Eight{};
      }
    }
    run_met(p, pass, kv, j0, least(j0 + RUN, end), range);
    run_made(p, pass, kv, RUN / SHORT_RUN, runs * (RUN / SHORT_RUN));
    run = next;
  }
  copy_wait();
}

// says that a warp has read X of a head for a tile of queries: products with it are over, so that nothing has to be ordered
__device__ __forceinline__ void used(const ValuePass& pass, int kv) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(pass.used + kv) : "memory");
}

// until X of a head can be copied by this thread
__device__ __forceinline__ void wait_for_values(const ValuePass& pass, int kv) {
  if (pass.first < 0) return;
  while (looked_at(pass.states + kv) != MADE) __nanosleep(50);
  acquire();
  publish_global();
}
