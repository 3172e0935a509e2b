// Decode: few queries against a long cache of raw values. All queries that read a key/value head, 16 at most, are the rows of
// a tile, and a warp owns them and a run of the keys; runs are merged in the log domain by a second kernel. Each value is read
// once, so exp(beta*v) is taken on the fly, with c = 0: where beta*v is beyond REACH, or not finite, the warp goes over its run
// again, about the greatest term of each channel, and writes that for the queries and channels that see such a value alone.
//
// Compiled for EXP, or for EXPM1, which is beta = 0: then X is v, and the merge is linear. A warp waits for nobody.

#define DECODE_STAGE (16 * (DP + PAD + EP + PAD))  // elements: k [16, DP] and v [16, EP]
#define ROWS 16
#if FLOAT16
#define REACH 13.f  // bits
#define LINEAR_SHIFT 0
#else
#define REACH 44.f
#define LINEAR_SHIFT 24  // at beta = 0: sums of so many of the greatest numbers stay finite
#endif

#if !FLOAT32
// X of two values and what its rounding leaves; `far` becomes true where it cannot be had
__device__ __forceinline__ void exponentiate(u32 v, float factor, u32& x, u32& rest, bool& far) {
  float value[2], left[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float one = widen((u16)(v >> 16 * h)), y = one * factor;
    const bool fine = EXP ? fabsf(y) <= REACH : finite(one);
    far |= !fine;
    value[h] = !fine ? 0.f : EXP ? exp2_fast(y) : one;
  }
  x = pack(value[0], value[1]);
#pragma unroll
  for (int h = 0; h < 2; h++) left[h] = (value[h] - widen((u16)(x >> 16 * h))) * (1 << REST_SHIFT);
  rest = pack(left[0], left[1]);
}
#endif

// w = beta*o [B*Hq, Lq, splits, E] and l [B*Hq, Lq, splits] of runs of keys; at beta = 0 w is o
extern "C" __global__ void __launch_bounds__(THREADS) decode(
    PROBLEM, const element* q, const element* k, const element* v, float* w, float* l, int heads, int splits, int run) {
#if !FLOAT32
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  element* stages = (element*)raw + warp * 2 * DECODE_STAGE;
  const int kv = (blockIdx.x * (THREADS / 32) + warp) / splits, split = (blockIdx.x * (THREADS / 32) + warp) % splits;
  if (kv >= heads) return;
  const int count = pr.group * pr.query_length;
  Head at[2];
  int i[2];
  for (int h = 0; h < 2; h++) {
    const int row = least(g + h * 8, count - 1);
    at[h] = head_of(pr, kv * pr.group + row / pr.query_length);
    i[h] = row % pr.query_length;
    if (g + h * 8 >= count) at[h].q_end = 0;
  }
  const i64 rows = (i64)kv * count, keys = (i64)kv * pr.key_length;
  const int start = split * run, last = least(least(at[0].k_end, start + run), pr.query_length + pr.high);
  const int first = start + greatest(pr.low - start, 0) / 16 * 16;

  auto begin = [&](int j0) {
    element* k_tile = stages + (j0 - first) / 16 % 2 * DECODE_STAGE;
    element* v_tile = k_tile + 16 * (DP + PAD);
#pragma unroll 4
    for (int n = lane; n < 16 * (DP / PER); n += 32) {
      const int j = n / (DP / PER), d = n % (DP / PER) * PER;
      const bool there = j0 + j < last && d < WIDTH;
      copy_begin(k_tile + j * (DP + PAD) + d, there ? k + (keys + j0 + j) * WIDTH + d : k, there);
    }
#pragma unroll 4
    for (int n = lane; n < 16 * (EP / PER); n += 32) {
      const int j = n / (EP / PER), e = n % (EP / PER) * PER;
      const bool there = j0 + j < last && e < pr.value_dim;
      copy_begin(v_tile + j * (EP + PAD) + e, there ? v + (keys + j0 + j) * pr.value_dim + e : v, there);
    }
  };
  for (int n = lane; n < ROWS * (DP / PER); n += 32) {
    const int r = n / (DP / PER), d = n % (DP / PER) * PER;
    const bool there = r < count && d < WIDTH;
    copy_begin(stages + DECODE_STAGE + r * (DP + PAD) + d, there ? q + (rows + r) * WIDTH + d : q, there);
  }
  if (first < last) begin(first);
  copy_wait();
  __syncwarp();
  Left own_q[DP / 16];
#pragma unroll
  for (int d = 0; d < DP / 16; d++) load_a(own_q[d], stages + DECODE_STAGE + d * 16, DP + PAD);

  const float factor = pr.beta * LOG2E;
  float acc[EP / 8][4] = {}, m[2] = {-INF, -INF}, sum[2] = {0.f, 0.f}, total[4] = {};
  bool far = false;
  for (int j0 = first; j0 < last; j0 += 16) {
    const element* k_tile = stages + (j0 - first) / 16 % 2 * DECODE_STAGE;
    const element* v_tile = k_tile + 16 * (DP + PAD);
    copy_wait();
    __syncwarp();  // this tile is there, and no lane reads the one before
    if (j0 + 16 < last) begin(j0 + 16);
    float s[2][4] = {};  // [16 rows, 16 keys]
#pragma unroll
    for (int d = 0; d < DP / 16; d++) {
      Right b;
      load_b(b, k_tile + d * 16, DP + PAD);
      mma(s[0], s[1], own_q[d], b);
    }
    float top[2] = {-INF, -INF};
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        float slope, bias;
        const bool seen = visible(pr, at[r / 2], i[r / 2], j0 + n * 8 + t * 2 + r % 2, bias) && j0 + n * 8 + t * 2 + r % 2 < last;
        sum[r / 2] = seen ? fmaf(s[n][r], 0.f, fmaf(bias, 0.f, sum[r / 2])) : sum[r / 2];
        s[n][r] = seen ? score(pr, s[n][r], bias, slope) : -INF;
        top[r / 2] = fmaxf(top[r / 2], s[n][r]);
      }
    bool grows = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] = row_max(top[h]);
      grows |= top[h] > m[h] + SLACK;
    }
    if (warp_any(grows)) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float next = top[h] > m[h] + SLACK ? top[h] : m[h];
        const float shrink = m[h] == next ? 1.f : exp_fast(m[h] - next);
        m[h] = next;
        sum[h] *= shrink;
        total[2 * h] *= shrink;
#pragma unroll
        for (int e = 0; e < EP / 8; e++) { acc[e][2 * h] *= shrink; acc[e][2 * h + 1] *= shrink; }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        s[n][r] = exp_fast(s[n][r] + (P_SHIFT - (m[r / 2] == -INF ? 0.f : m[r / 2])));
        sum[r / 2] += s[n][r];
        if (!EXP) s[n][r] *= 1.f / (1 << LINEAR_SHIFT);
      }
    Left p, less;
    left_of(p, s[0], s[1]);
    const u32 one = pack(1.f, 1.f);
    mma(total, p.x, one, one);
#pragma unroll
    for (int r = 0; r < 4; r++) s[r / 2][r % 2 * 2] *= 1.f / (1 << REST_SHIFT), s[r / 2][r % 2 * 2 + 1] *= 1.f / (1 << REST_SHIFT);
    left_of(less, s[0], s[1]);
#pragma unroll
    for (int e = 0; e < EP / 16; e++) {
      Right b, x, rest;
      load_b_transposed(b, v_tile + e * 16, EP + PAD);
#pragma unroll
      for (int r = 0; r < 4; r++) exponentiate(b.x[r], factor, x.x[r], rest.x[r], far);
      mma(acc[2 * e], acc[2 * e + 1], p, x);
      if (EXP) mma(acc[2 * e], acc[2 * e + 1], less, rest);
    }
  }
  copy_wait();

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float whole = row_sum(sum[h]);
    const int row = g + h * 8;
    if (row >= count) continue;
    const i64 to = (rows + row) * splits + split;
    const bool empty = whole == 0.f;
    if (t == 0) l[to] = empty ? -INF : (m[h] - P_SHIFT) / UNIT + logf(whole);
    const float over_total = whole == whole ? 1.f / total[2 * h] : NOT_A_NUMBER;
#pragma unroll
    for (int e = 0; e < EP / 8; e++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int channel = e * 8 + t * 2 + r;
        const float mean = acc[e][2 * h + r] * over_total;
        if (channel < pr.value_dim) w[to * pr.value_dim + channel] = empty ? 0.f : EXP ? split_log(mean, 0) : mean;
      }
  }
  if (!warp_any(far)) return;

  __syncwarp();
  for (int row = 0; row < count; row++) {
    const Head own = head_of(pr, kv * pr.group + row / pr.query_length);
    const i64 to = (rows + row) * splits + split;
    const float log_l = l[to];
    float tops[(EP + 31) / 32], sums[(EP + 31) / 32];
    int spoilt = 0, odd = 0, infinite = 0;  // a bit for each channel of this lane
    for (int n = 0; n < (EP + 31) / 32; n++) { tops[n] = -INF; sums[n] = 0.f; }
    for (int j = first; j < last; j++) {
      float product = 0.f, slope, bias;
      if (!visible(pr, own, row % pr.query_length, j, bias)) continue;
      for (int d = lane; d < WIDTH; d += 32)
        product = fmaf(widen(q[(rows + row) * WIDTH + d]), widen(k[(keys + j) * WIDTH + d]), product);
      const float s = score(pr, warp_sum(product), bias, slope) / UNIT;
      for (int n = 0; n < (EP + 31) / 32; n++) {
        const int e = lane + n * 32;
        if (e >= pr.value_dim) continue;
        const float one = widen(v[(keys + j) * pr.value_dim + e]), y = pr.beta * one, term = s - log_l + y;
        if (!(EXP ? fabsf(one * factor) <= REACH : finite(one))) spoilt |= 1 << n;
        if (y == INF) infinite |= 1 << n;
        else if (term != term) odd |= 1 << n;
        if (!finite(term)) continue;
        const float next = fmaxf(tops[n], term);
        sums[n] = sums[n] * expf(tops[n] - next) + expf(term - next);
        tops[n] = next;
      }
    }
    for (int n = 0; n < (EP + 31) / 32; n++) {
      const int e = lane + n * 32;
      if (e >= pr.value_dim || !(spoilt >> n & 1)) continue;
      const float exact = odd >> n & 1 || !EXP ? NOT_A_NUMBER : infinite >> n & 1 ? INF : tops[n] + logf(sums[n]);
      w[to * pr.value_dim + e] = log_l == log_l ? exact : NOT_A_NUMBER;
    }
  }
#endif
}

// The output of a row from those of its runs of keys: each warp has a part of the runs, each lane four channels of 128
#define AT_ONCE 8  // runs of a warp whose loads are under way together
extern "C" __global__ void __launch_bounds__(THREADS) decode_merge(
    PROBLEM, const float* w, const float* l, element* out, float* residual, float* lse, int splits) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* room = (float*)raw;  // [3][THREADS / 32][128]: top, terms, special of each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 row = blockIdx.x;
  l += row * splits;
  w += row * splits * p.value_dim;
  float m = -INF, sum = 0.f;
  for (int n = lane; n < splits; n += 32) m = fmaxf(m, l[n]);
  for (int n = 16; n; n /= 2) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, n));
  const float reference = m == -INF ? 0.f : m;
  for (int n = lane; n < splits; n += 32) sum += expf(l[n] - reference);
  sum = warp_sum(sum);
  const bool empty = sum == 0.f;
  const float log_l = reference + logf(sum);
  if (threadIdx.x == 0) lse[row] = empty ? -INF : log_l;
  for (int e0 = 0; e0 < p.value_dim; e0 += 128) {
    const int e = e0 + lane * 4;
    float top[4], terms[4] = {}, special[4] = {};  // special: infinity or NaN where a run is
#pragma unroll
    for (int h = 0; h < 4; h++) top[h] = -INF;
    if (e < p.value_dim)
      for (int n0 = warp; n0 < splits; n0 += AT_ONCE * (THREADS / 32)) {
        Floats from[AT_ONCE];
        float share[AT_ONCE];  // log of the part that a run has in the row
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
          const int n = n0 + u * (THREADS / 32);
          share[u] = n < splits ? l[n] - log_l : -INF;
          from[u] = *(const Floats*)(w + (i64)least(n, splits - 1) * p.value_dim + e);
        }
#pragma unroll
        for (int h = 0; h < 4; h++) {
          if (!EXP) {
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) terms[h] = share[u] > -INF ? fmaf(expf(share[u]), from[u].x[h], terms[h]) : terms[h];
            continue;
          }
          float next = top[h];
#pragma unroll
          for (int u = 0; u < AT_ONCE; u++) {
            const float one = from[u].x[h];
            special[h] += share[u] > -INF && !(one < INF) ? one : 0.f;
            from[u].x[h] = share[u] > -INF && finite(one) ? share[u] + one : -INF;
            next = fmaxf(next, from[u].x[h]);
          }
          const float about = next == -INF ? 0.f : next;
          terms[h] *= expf(top[h] - about);
#pragma unroll
          for (int u = 0; u < AT_ONCE; u++) terms[h] += expf(from[u].x[h] - about);
          top[h] = next;
        }
      }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 4; h++) {
      float* own = room + warp * 128 + lane * 4 + h;
      own[0] = top[h];
      own[THREADS * 4] = terms[h];
      own[THREADS * 8] = special[h];
    }
    __syncthreads();
    const float* all = room + threadIdx.x;
    float highest = -INF, total = 0.f, odd = 0.f;
    for (int n = 0; n < THREADS / 32; n++) highest = fmaxf(highest, all[n * 128]);
    const float about = highest == -INF ? 0.f : highest;
    for (int n = 0; n < THREADS / 32; n++) {
      total = fmaf(all[THREADS * 4 + n * 128], EXP ? expf(all[n * 128] - about) : 1.f, total);
      odd += all[THREADS * 8 + n * 128];
    }
    float o = EXP ? (odd == 0.f ? highest + logf(total) : odd) * inverse_of(p.beta) : total;
    if (sum != sum) o = NOT_A_NUMBER;
    if (empty) o = 0.f;
    const int channel = e0 + threadIdx.x;
    if (channel >= p.value_dim) continue;
    out[row * p.value_dim + channel] = narrow(o);
    if (residual) residual[row * p.value_dim + channel] = o;
  }
}
