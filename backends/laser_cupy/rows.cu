// What the backward pass needs of queries and keys: G, the row term r, l, and what is not finite. backward.cu says what for.

#define HEADROOM 13  // the greatest G and the greatest possible ds are brought to 2^13 … 2^14

// exp(-beta*o) * 2^n
__device__ __forceinline__ float inverse_exp(float beta, float o, int n) {
  const float y = -beta * o;
  int exponent;
  const float mantissa = split_exp(y, fmaf(-beta, o, -y), exponent);
  return scaled(mantissa, exponent + n);
}

// G of a channel in the exp form (form = 0) or the expm1 form (1), times 2^n
__device__ __forceinline__ float weight_of(float one, float o, float beta, bool expm1_form, int n) {
  if (one == 0.f || is_linear(beta, beta * o) != expm1_form) return 0.f;
  return one * inverse_exp(beta, o, n) * (expm1_form ? 1.f : inverse_of(beta));
}

// Per query: l as scores are, or what stands for it; r; the greatest |G|; a bound of |ds|; and G itself, where it needs no scale
// of the head. A warp for each row.
extern "C" __global__ void __launch_bounds__(THREADS) row_terms(
    PROBLEM, const element* q, const float* o, const element* d_out, const float* lse, const float* d_lse, const int* c,
    int* flags, float* l, float* r, float* sizes, float* bounds, element* g, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32, query = (int)(row / p.query_length), kv = query / p.group;
  const bool outside = flags[kv] & OUTSIDE;
  float sum = 0.f, total = 0.f, size = 0.f, odd = 0.f, any = 0.f;
  float weight[EXP + EXPM1][(EP + 31) / 32];
#pragma unroll
  for (int n = 0; n < (EP + 31) / 32; n++) {
    const int e = lane + n * 32;
    for (int form = 0; form < EXP + EXPM1; form++) weight[form][n] = 0.f;
    if (e >= p.value_dim) continue;
    const float mean = o[row * p.value_dim + e], one = widen(d_out[row * p.value_dim + e]);
    const float beta = beta_of(p, query % p.query_heads, e);
    if (!finite(mean) || !finite(one)) odd = 1.f;
    if (one != 0.f) any = 1.f;
    sum += is_linear(beta, beta * mean) ? one * mean * expm1_over(-beta * mean) : one * inverse_of(beta);
    float reach = beta == 0.f ? INF : fabsf(1.f / beta);  // of (w - p)/beta, which is no more than p times a distance of values
    if (EXPM1) reach = fminf(reach, scaled(2.f, c[(i64)kv * CP + XP + e]));
    total += 2.f * fabsf(one) * reach;
    if (!outside && finite(mean) && finite(one))
      for (int form = 0; form < EXP + EXPM1; form++) {
        weight[form][n] = weight_of(one, mean, beta, form == EXP, c[(i64)kv * CP + form * EP + e]);
        size = fmaxf(size, fminf(fabsf(weight[form][n]), 1e38f));
      }
  }
  for (int d = lane; d < WIDTH; d += 32) if (!finite(widen(q[row * WIDTH + d]))) odd = 1.f;
  sum = warp_sum(sum);
  total = warp_sum(total);
  odd = warp_max(odd);
  any = warp_max(any);
  const float dl = d_lse ? d_lse[row] : 0.f;
  const bool nothing = lse[row] == -INF || (any == 0.f && dl == 0.f);
  const bool broken = odd > 0.f || !(lse[row] < INF) || !finite(dl);
  const bool live = !nothing && !broken;
#if FLOAT16
  size = warp_max(size);
#else
  for (int form = 0; form < EXP + EXPM1; form++)
#pragma unroll
    for (int n = 0; n < (EP + 31) / 32; n++)
      if (lane + n * 32 < EP) g[row * XP + form * EP + lane + n * 32] = narrow(live ? weight[form][n] : 0.f);
#endif
  if (lane) return;
  l[row] = nothing ? INF : broken ? NOT_A_NUMBER : lse[row] * UNIT;
  r[row] = live ? dl - sum : 0.f;
  sizes[row] = live ? size : 0.f;
  bounds[row] = live ? fminf(total + fabsf(dl), 1e38f) : 0.f;
  if (broken) atomicOr(flags + kv, ODD);  // a query that sees nothing may hold NaN
}

// the exponent that brings x to 2^HEADROOM … 2^(HEADROOM + 1)
__device__ __forceinline__ int exponent_of(float x) {
  return x >= 1.17549435e-38f ? (int)(float_as_bits(x) >> 23) - 127 - HEADROOM : -126 - HEADROOM;
}

// Per key/value head: the exponents of G and of ds. scales [B*Hkv, 2]
extern "C" __global__ void __launch_bounds__(THREADS) row_scales(
    PROBLEM, const float* sizes, const float* bounds, int* scales) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  const i64 count = (i64)p.group * p.query_length;
  float size = 0.f, bound = 0.f;
  for (i64 n = threadIdx.x; n < count; n += THREADS) {
    size = fmaxf(size, sizes[blockIdx.x * count + n]);
    bound = fmaxf(bound, bounds[blockIdx.x * count + n]);
  }
  size = block_max(size, (float*)raw);
  bound = block_max(bound, (float*)raw);
  if (threadIdx.x) return;
  scales[2 * blockIdx.x] = FLOAT16 ? exponent_of(size) : 0;  // the others have the exponents of float32
  scales[2 * blockIdx.x + 1] = FLOAT16 ? exponent_of(bound) : 0;
}

// float16: G * 2^-scale [B*Hq, Lq, XP]; zero in rows that are not live
extern "C" __global__ void __launch_bounds__(THREADS) row_weights(
    PROBLEM, const float* o, const element* d_out, const float* l, const int* c, const int* flags, const int* scales,
    element* g, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 n = ((i64)blockIdx.x * THREADS + threadIdx.x) * 2;
  if (n >= rows * XP) return;
  const i64 row = n / XP;
  const int query = (int)(row / p.query_length), kv = query / p.group;
  float value[2] = {0.f, 0.f};
  if (finite(l[row]) && !(flags[kv] & OUTSIDE))
    for (int h = 0; h < 2; h++) {
      const int column = (int)(n % XP) + h, e = column % EP;
      if (e >= p.value_dim) continue;
      const float one = widen(d_out[row * p.value_dim + e]), beta = beta_of(p, query % p.query_heads, e);
      value[h] = weight_of(one, o[row * p.value_dim + e], beta, column / EP == EXP, c[(i64)kv * CP + column] - scales[2 * kv]);
    }
  store_pair(g + n, value[0], value[1]);
}

// Per key: 0, or NaN where the key is not finite. A warp for each. `exact`: only what the exact path reads
extern "C" __global__ void __launch_bounds__(THREADS) key_marks(
    PROBLEM, const element* k, float* marks, int* flags, i64 rows, int exact) {
  const Problem p = THE_PROBLEM;
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= rows || (exact && !(flags[row / p.key_length] & OUTSIDE))) return;
  float odd = 0.f;
  for (int d = threadIdx.x % 32; d < WIDTH; d += 32) if (!finite(widen(k[row * WIDTH + d]))) odd = 1.f;
  odd = warp_max(odd);
  if (threadIdx.x % 32) return;
  marks[row] = odd > 0.f ? NOT_A_NUMBER : 0.f;
  if (odd > 0.f) atomicOr(flags + row / p.key_length, ODD);
}

