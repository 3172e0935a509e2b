// What comes before the Hopper kernels: passes over values, queries and keys that take as long as reading and writing them.

#define VECTORS (EP / 8)                // of a row of values, 16 bytes each
#define ROWS (THREADS / VECTORS)        // of values that a block reads at once
#define LANES (WIDTH > 64 || EP > 64 ? 16 : 8)  // of a row of queries
#define HEADROOM 13                     // float16: the greatest possible ds is brought to 2^13 … 2^14

// X [B*Hkv, Lk, EP] with c = 0, and the greatest beta*v and -beta*v of each channel: ranges [B*Hkv, 2, EP], zero before
extern "C" __global__ void __launch_bounds__(THREADS) hopper_values(
    PROBLEM, const u16* v, int* flags, u32* ranges, u16* x, int blocks, int chunk) {
  const Problem p = THE_PROBLEM;
  __shared__ float room[2][ROWS * EP];
  const int kv = blockIdx.x / blocks, start = blockIdx.x % blocks * chunk, own = threadIdx.x / VECTORS, e = threadIdx.x % VECTORS * 8;
  const Head at = head_of(p, kv * p.group);
  const Base base = base_of(p.beta);
  float most[2][8];
  for (int h = 0; h < 8; h++) most[0][h] = most[1][h] = -INF;
  bool odd = false;
  const int end = own < ROWS ? least(start + chunk, p.key_length) : 0;
#pragma unroll 4
  for (int j = start + own; j < end; j += ROWS) {
    const i64 row = (i64)kv * p.key_length + j;
    const bool inside = j < at.k_end && e < p.value_dim;
    Eight from = {};
    if (inside) from = *(const Eight*)(v + row * p.value_dim + e);
    float to[8];
#pragma unroll
    for (int h = 0; h < 8; h++) {
      const float y = p.beta * from[h];
      to[h] = inside ? value_of(from[h], p.beta, base, 0) : 0.f;
      odd |= !(y < INF);
      if (inside && finite(y)) { most[0][h] = fmaxf(most[0][h], y); most[1][h] = fmaxf(most[1][h], -y); }
    }
    *(Eight*)(x + row * EP + e) = rounded(to);
  }
  if (own < ROWS)
#pragma unroll
    for (int h = 0; h < 8; h++)
      for (int side = 0; side < 2; side++) room[side][own * EP + e + h] = most[side][h];
  const bool any = __syncthreads_or(odd);
  if (threadIdx.x == 0 && any) atomicOr(flags + kv, BROKEN);
  for (int n = threadIdx.x; n < 2 * EP; n += THREADS) {
    float top = -INF;
    for (int r = 0; r < ROWS; r++) top = fmaxf(top, room[n / EP][r * EP + n % EP]);
    if (top > -INF) atomicMax(ranges + (i64)kv * 2 * EP + n, ordered(top));
  }
}

// The integers of each channel, and which heads are outside the fast range. hard [B*Hkv]: where X is to be made with c
extern "C" __global__ void __launch_bounds__(THREADS) hopper_decide(PROBLEM, const u32* ranges, int* c, int* flags, int* hard) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x, e = threadIdx.x;
  Choice own = {false, true, false, 0};
  if (e < EP && ranges[(i64)kv * 2 * EP + e]) own = choose(p, number(ranges[(i64)kv * 2 * EP + e]), -number(ranges[((i64)kv * 2 + 1) * EP + e]));
  const bool any_outside = __syncthreads_or(own.outside), any_hard = __syncthreads_or(!own.easy);
  const bool any_narrow = __syncthreads_or(own.narrow);
  if (e < EP) c[(i64)kv * CP + e] = any_hard ? own.c : 0;
  if (e) return;
  if (any_outside || any_narrow) atomicOr(flags + kv, (any_outside ? OUTSIDE : 0) | (any_narrow ? NARROW : 0));
  hard[kv] = any_hard && !any_outside;
}

// X with c, of hard heads. Mostly there is nothing to do: `workers` blocks for a head.
extern "C" __global__ void __launch_bounds__(THREADS) hopper_values_again(
    PROBLEM, const u16* v, const int* c, const int* hard, u16* x, int workers) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x / workers, own = threadIdx.x / VECTORS, e = threadIdx.x % VECTORS * 8;
  if (own >= ROWS || !hard[kv]) return;
  const Head at = head_of(p, kv * p.group);
  const Base base = base_of(p.beta);
  for (int j = blockIdx.x % workers * ROWS + own; j < p.key_length; j += workers * ROWS) {
    const i64 row = (i64)kv * p.key_length + j;
    const bool inside = j < at.k_end && e < p.value_dim;
    Eight from = {};
    if (inside) from = *(const Eight*)(v + row * p.value_dim + e);
    float to[8];
#pragma unroll
    for (int h = 0; h < 8; h++) to[h] = inside ? value_of(from[h], p.beta, base, c[(i64)kv * CP + e + h]) : 0.f;
    *(Eight*)(x + row * EP + e) = rounded(to);
  }
}

// the exponent that brings x to 2^HEADROOM … 2^(HEADROOM + 1)
__device__ __forceinline__ int exponent_of(float x) {
  return x >= 1.17549435e-38f ? (int)(float_as_bits(x) >> 23) - 127 - HEADROOM : -126 - HEADROOM;
}
__device__ __forceinline__ u32 warp_most(u32 x) {
  u32 most;
  asm volatile("redux.sync.max.u32 %0, %1, 0xFFFFFFFF;" : "=r"(most) : "r"(x));
  return most;
}

// the outputs of the forward pass
struct Outputs {
  const float* o;  // in float32, or null: then
  const short* rest;  // what rounding left of them, and
  const u16* out;  // the rounded ones
};
#define OUTPUTS const float *o, const short *rest, const u16 *out
#define THE_OUTPUTS (Outputs{o, rest, out})

// What a lane makes of eight channels of a query, and what all LANES lanes of it know: as row_terms of rows.cu
struct Row {
  float g[8];  // G * 2^n; zeros where nothing flows
  float l, r;
  float bound;  // float16: of |ds|
  bool live, odd;  // odd: something is not finite
};
__device__ __forceinline__ Row row_of(const Problem& p, const Head& at, int i, int e, const u16* q, const Outputs& of, const u16* d_out,
                                      const float* lse, const float* d_lse, const int* c, bool outside, int n) {
  const i64 row = (i64)at.query * p.query_length + i;
  const bool there = i < p.query_length;
  Eight from = {}, of_q = {};
  float mean[8] = {};
  if (there && e < p.value_dim) {
    from = *(const Eight*)(d_out + row * p.value_dim + e);
    if (of.rest) {
      const Eight high = *(const Eight*)(of.out + row * p.value_dim + e), low = *(const Eight*)(of.rest + row * p.value_dim + e);
#pragma unroll
      for (int h = 0; h < 8; h++) mean[h] = bits_as_float(float_as_bits(high[h]) + (u32)(int)(short)(low.x[h / 2] >> h % 2 * 16));
    } else {
      const float4 first = *(const float4*)(of.o + row * p.value_dim + e), second = *(const float4*)(of.o + row * p.value_dim + e + 4);
      mean[0] = first.x; mean[1] = first.y; mean[2] = first.z; mean[3] = first.w;
      mean[4] = second.x; mean[5] = second.y; mean[6] = second.z; mean[7] = second.w;
    }
  }
  int shift[8] = {};
  if (e < EP) {
    const int4 low = *(const int4*)(c + (i64)at.key * CP + e), high = *(const int4*)(c + (i64)at.key * CP + e + 4);
    shift[0] = low.x; shift[1] = low.y; shift[2] = low.z; shift[3] = low.w;
    shift[4] = high.x; shift[5] = high.y; shift[6] = high.z; shift[7] = high.w;
  }
  const float own_lse = there ? lse[row] : -INF;
  // a query that is not finite and sees a key has no log-sum-exp; those without one are few
  if (there && !finite(own_lse) && e < WIDTH) of_q = *(const Eight*)(q + row * WIDTH + e);
  const float inverse = 1.f / p.beta;
  Row own;
  float sum = 0.f, total = 0.f, odd_o = 0.f, odd_q = 0.f;  // NaN where something is not finite
#pragma unroll
  for (int h = 0; h < 8; h++) {
    const float one = from[h], y = -p.beta * mean[h], whole = rintf(y * LOG2E);
    const float part = fmaf(-whole, LN2_LOW, fmaf(-whole, LN2_HIGH, y)) + fmaf(-p.beta, mean[h], -y);
    // in range in live rows, since o lies between values. The integer is in the last bits of its sum with 1.5 * 2^23
    const float steps = fminf(127.f, fmaxf(-126.f, whole + (float)(shift[h] + n))) + 12582912.f;
    own.g[h] = one * (exp2_fast(part * LOG2E) * bits_as_float((float_as_bits(steps) << 23) + 0x3F800000u)) * inverse;
    sum = fmaf(one, inverse, sum);
    total += fabsf(one);
    odd_o = fmaf(one, 0.f, fmaf(mean[h], 0.f, odd_o));
    odd_q = fmaf(of_q[h], 0.f, odd_q);
  }
  // bits: q is not finite, o or do is not, do is not zero
  u32 seen = (odd_q == 0.f ? 0 : 1) | (odd_o == 0.f ? 0 : 2) | ((from.x[0] | from.x[1] | from.x[2] | from.x[3]) & 0x7FFF7FFFu ? 4 : 0);
#pragma unroll
  for (int m = 1; m < LANES; m *= 2) {
    sum += __shfl_xor_sync(FULL_WARP, sum, m);
    if (FLOAT16) total += __shfl_xor_sync(FULL_WARP, total, m);
    seen |= __shfl_xor_sync(FULL_WARP, seen, m);
  }
  const float dl = d_lse && there ? d_lse[row] : 0.f;
  const bool nothing = own_lse == -INF || (!(seen & 4) && dl == 0.f), broken = (seen & 3) || !finite(own_lse) || !finite(dl);
  own.live = !nothing && !broken;
  own.odd = (seen & 1) || (!nothing && broken);
  own.l = nothing ? INF : broken ? NOT_A_NUMBER : own_lse * LOG2E;
  own.r = own.live ? dl - sum : 0.f;
  own.bound = own.live ? fminf(2.f * total * fabsf(inverse) + fabsf(dl), 1e38f) : 0.f;
#pragma unroll
  for (int h = 0; h < 8; h++) if (!own.live || outside) own.g[h] = 0.f;
  return own;
}
__device__ __forceinline__ float greatest_of(const Row& own) {
  float top = 0.f;
#pragma unroll
  for (int h = 0; h < 8; h++) top = fmaxf(top, fabsf(own.g[h]));
  return fminf(top, 1e38f);
}

// float16: an exponent of G for each key/value head, from some of its queries: with it most heads are in range at once.
// guesses [B*Hkv]
#define SAMPLES 64
#define GUESSED 10  // the greatest G of them is brought to 2^10 … 2^11
extern "C" __global__ void __launch_bounds__(THREADS) hopper_guess(
    PROBLEM, const u16* q, OUTPUTS, const u16* d_out, const float* lse, const float* d_lse, const int* c, const int* flags,
    int* guesses) {
  const Problem p = THE_PROBLEM;
  __shared__ float room[THREADS];
  const int kv = blockIdx.x;
  const i64 rows = (i64)p.group * p.query_length;
  float top = 0.f;
#pragma unroll 4
  for (int n = threadIdx.x / LANES; n < SAMPLES; n += THREADS / LANES) {
    const i64 row = rows * n / SAMPLES;
    const Head at = head_of(p, kv * p.group + (int)(row / p.query_length));
    const int i = (int)(row % p.query_length);
    top = fmaxf(top, greatest_of(row_of(p, at, i, threadIdx.x % LANES * 8, q, THE_OUTPUTS, d_out, lse, d_lse, c, flags[kv] & OUTSIDE, 0)));
  }
  top = block_max(top, room);
  if (threadIdx.x == 0) guesses[kv] = top >= 1.17549435e-38f ? (int)(float_as_bits(top) >> 23) - 127 - GUESSED : 0;
}

// What row_terms of rows.cu makes, and the records [heads, tiles][2][tile] of P_SHIFT - l and r that the Hopper kernel reads.
// LANES lanes for a row. float16: G with the guessed exponent; r has no scale yet; tops [warps][2], the greatest G and bound
extern "C" __global__ void __launch_bounds__(THREADS) hopper_terms(
    PROBLEM, const u16* q, OUTPUTS, const u16* d_out, const float* lse, const float* d_lse, const int* c, const int* flags,
    int* odd, float* l, float* rows, u16* g, int tiles, int tile, const int* guesses, float* tops) {
  const Problem p = THE_PROBLEM;
  constexpr int PER_BLOCK = THREADS / LANES;  // rows; it divides a tile
  const u32 blocks = (u32)(tiles * tile) / PER_BLOCK;
  const int lane = threadIdx.x % LANES, e = lane * 8, query = (int)(blockIdx.x / blocks);
  const int i = (int)(blockIdx.x % blocks) * PER_BLOCK + threadIdx.x / LANES;
  const Head at = head_of(p, query);
  const bool there = i < p.query_length;
  const Row own = row_of(p, at, i, e, q, THE_OUTPUTS, d_out, lse, d_lse, c, flags[at.key] & OUTSIDE, FLOAT16 ? -guesses[at.key] : 0);
  const i64 row = (i64)query * p.query_length + i;
  if (there && e < EP) *(Eight*)(g + row * EP + e) = rounded(own.g);
  if (lane == 0) {
    float* record = rows + ((i64)query * tiles + i / tile) * 2 * tile + i % tile;
    record[0] = i < at.q_end ? P_SHIFT - own.l : -INF;
    record[tile] = own.r;
    if (there) l[row] = own.l;
    if (there && own.odd) odd[at.key] = ODD;
  }
#if FLOAT16
  const u32 top = warp_most(float_as_bits(greatest_of(own))), bound = warp_most(float_as_bits(own.bound));
  if (threadIdx.x % 32 == 0)
    ((float2*)tops)[(i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32] = make_float2(bits_as_float(top), bits_as_float(bound));
#endif
}

// float16: the exponents of G and of ds of each key/value head, scales [B*Hkv, 2]; r with that of ds; and G once more, where the
// guess was a bad one. `workers` blocks for a head, each of whose query heads has `warps` tops.
extern "C" __global__ void __launch_bounds__(THREADS) hopper_scales(
    PROBLEM, const u16* q, OUTPUTS, const u16* d_out, const float* lse, const float* d_lse, const int* c, const int* flags,
    const int* guesses, const float* tops, int* scales, float* rows, u16* g, int tiles, int tile, int warps, int workers) {
  const Problem p = THE_PROBLEM;
  __shared__ float room[THREADS];
  const int kv = blockIdx.x / workers, worker = blockIdx.x % workers, count = p.group * warps;
  float top = 0.f, bound = 0.f;
#pragma unroll 4
  for (int n = threadIdx.x; n < count; n += THREADS) {
    const float2 own = *(const float2*)(tops + 2 * ((i64)kv * count + n));
    top = fmaxf(top, own.x);
    bound = fmaxf(bound, own.y);
  }
  top = block_max(top, room);  // of G with the guess
  bound = block_max(bound, room);
  const bool good = top == 0.f || (top >= 64.f && top < 65504.f);
  const int guess = guesses[kv], of_g = good ? guess : guess + exponent_of(top), of_ds = exponent_of(bound);
  if (worker == 0 && threadIdx.x == 0) { scales[2 * kv] = of_g; scales[2 * kv + 1] = of_ds; }
  float* records = rows + (i64)kv * p.group * tiles * 2 * tile;
  for (int n = worker * THREADS + threadIdx.x; n < p.group * tiles * tile; n += workers * THREADS) {
    float* r = records + (i64)(n / tile) * 2 * tile + tile + n % tile;
    *r = scaled(*r, -P_SHIFT - of_ds);
  }
  if (good) return;
  const int e = threadIdx.x % LANES * 8;
  for (int member = 0; member < p.group; member++) {
    const Head at = head_of(p, kv * p.group + member);
    for (int start = worker * (THREADS / LANES); start < p.query_length; start += workers * (THREADS / LANES)) {
      const int i = start + threadIdx.x / LANES;
      const Row own = row_of(p, at, i, e, q, THE_OUTPUTS, d_out, lse, d_lse, c, flags[kv] & OUTSIDE, -of_g);
      if (i < p.query_length && e < EP) *(Eight*)(g + ((i64)at.query * p.query_length + i) * EP + e) = rounded(own.g);
    }
  }
}

// NaN for keys that are not finite, otherwise 0, of heads outside the fast range: what the exact kernels read
extern "C" __global__ void __launch_bounds__(THREADS) hopper_marks(PROBLEM, const u16* k, const int* flags, float* marks, int blocks) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x / blocks, j = blockIdx.x % blocks * THREADS + threadIdx.x;
  if (!(flags[kv] & OUTSIDE) || j >= p.key_length) return;
  const i64 row = (i64)kv * p.key_length + j;
  bool odd = false;
  for (int d = 0; d < WIDTH; d++) odd |= !finite(widen(k[row * WIDTH + d]));
  marks[row] = odd ? NOT_A_NUMBER : 0.f;
}
