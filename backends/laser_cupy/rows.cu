// What the backward pass needs of queries and keys: G, the row term r, l, and what is not finite. backward.cu says what for.

#define WIDEST (WIDTH > EP ? WIDTH : EP)
#define STEPS_OF_ROW ((WIDEST + LANES * PER - 1) / (LANES * PER))
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

// PER floats of a row from column e on; zeros beyond `columns`
__device__ __forceinline__ void load_floats(float (&to)[PER], const float* row, int e, int columns) {
#pragma unroll
  for (int h = 0; h < PER; h += 4) {
    Floats four = {};
    if (columns % 4 == 0) {
      if (e + h < columns) four = *(const Floats*)(row + e + h);
    } else {
      for (int n = 0; n < 4; n++) if (e + h + n < columns) four.x[n] = row[e + h + n];
    }
#pragma unroll
    for (int n = 0; n < 4; n++) to[h + n] = four.x[n];
  }
}

// Per query: l as scores are, or what stands for it; r; for float16 the greatest |G| and a bound of |ds|; and G itself, where it
// needs no scale of the head. LANES lanes for each row, PER columns at a time.
extern "C" __global__ void __launch_bounds__(THREADS) row_terms(
    PROBLEM, const element* q, const float* o, const element* d_out, const float* lse, const float* d_lse, const int* c,
    int* flags, float* l, float* r, float* sizes, float* bounds, element* g, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 place = (i64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, row = place < rows ? place : rows - 1;
  const int lane = threadIdx.x % LANES, query = (int)(row / p.query_length), kv = query / p.group;
  const bool outside = flags[kv] & OUTSIDE;
  float sum = 0.f, total = 0.f, size = 0.f, odd = 0.f, any = 0.f;
  float weight[EXP + EXPM1][STEPS_OF_ROW][PER];
#pragma unroll
  for (int n = 0; n < STEPS_OF_ROW; n++) {
    const int e = (n * LANES + lane) * PER;
    float mean[PER] = {};
    Vector from = {}, of_q = {};
    if (e < EP) {
      from = load_vector(d_out + row * p.value_dim, e, p.value_dim);
      load_floats(mean, o + row * p.value_dim, e, p.value_dim);
    }
    if (e < WIDTH) of_q = *(const Vector*)(q + row * WIDTH + e);
#pragma unroll
    for (int h = 0; h < PER; h++) {
      for (int form = 0; form < EXP + EXPM1; form++) weight[form][n][h] = 0.f;
      if (!finite(widen(of_q.x[h]))) odd = 1.f;
      const float one = widen(from.x[h]);
      const bool fine = finite(mean[h]) && finite(one);
      if (!fine) odd = 1.f;
      if (one == 0.f) continue;
      any = 1.f;
      const float beta = beta_of(p, query % p.query_heads, e + h);
      sum += is_linear(beta, beta * mean[h]) ? one * mean[h] * expm1_over(-beta * mean[h]) : one * inverse_of(beta);
#if FLOAT16
      float reach = beta == 0.f ? INF : fabsf(1.f / beta);  // of (w - p)/beta, no more than p times a distance of values
      if (EXPM1) reach = fminf(reach, scaled(2.f, c[(i64)kv * CP + XP + e + h]));
      total += 2.f * fabsf(one) * reach;
#endif
      if (!outside && fine)
        for (int form = 0; form < EXP + EXPM1; form++) {
          weight[form][n][h] = weight_of(one, mean[h], beta, form == EXP, c[(i64)kv * CP + form * EP + e + h]);
          size = fmaxf(size, fminf(fabsf(weight[form][n][h]), 1e38f));
        }
    }
  }
#pragma unroll
  for (int n = 1; n < LANES; n *= 2) {
    sum += __shfl_xor_sync(FULL_WARP, sum, n);
    odd = fmaxf(odd, __shfl_xor_sync(FULL_WARP, odd, n));
    any = fmaxf(any, __shfl_xor_sync(FULL_WARP, any, n));
#if FLOAT16
    total += __shfl_xor_sync(FULL_WARP, total, n);
    size = fmaxf(size, __shfl_xor_sync(FULL_WARP, size, n));
#endif
  }
  if (place >= rows) return;
  const float dl = d_lse ? d_lse[row] : 0.f;
  const bool nothing = lse[row] == -INF || (any == 0.f && dl == 0.f);
  const bool broken = odd > 0.f || !(lse[row] < INF) || !finite(dl);
  const bool live = !nothing && !broken;
#if !FLOAT16
#pragma unroll
  for (int n = 0; n < STEPS_OF_ROW; n++) {
    const int e = (n * LANES + lane) * PER;
    for (int form = 0; form < EXP + EXPM1; form++) {
      Vector to;
#pragma unroll
      for (int h = 0; h < PER; h++) to.x[h] = narrow(live ? weight[form][n][h] : 0.f);
      if (e < EP) *(Vector*)(g + row * XP + form * EP + e) = to;
    }
  }
#endif
  if (lane) return;
  l[row] = nothing ? INF : broken ? NOT_A_NUMBER : lse[row] * UNIT;
  r[row] = live ? dl - sum : 0.f;
#if FLOAT16
  sizes[row] = live ? size : 0.f;
  bounds[row] = live ? fminf(total + fabsf(dl), 1e38f) : 0.f;
#endif
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

// Per key: 0, or NaN where the key is not finite; a warp for each, KEYS_OF_BLOCK of them for a block
#define KEYS_OF_BLOCK 128
extern "C" __global__ void __launch_bounds__(THREADS) key_marks(
    PROBLEM, const element* k, float* marks, int* flags, int blocks) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x / blocks, start = blockIdx.x % blocks * KEYS_OF_BLOCK;
  bool some = false;
  for (int j = start + threadIdx.x / 32; j < least(start + KEYS_OF_BLOCK, p.key_length); j += THREADS / 32) {
    const i64 row = (i64)kv * p.key_length + j;
    bool odd = false;
    for (int d = threadIdx.x % 32; d < WIDTH; d += 32) odd |= !finite(widen(k[row * WIDTH + d]));
    odd = warp_any(odd);
    some |= odd;
    if (threadIdx.x % 32 == 0) marks[row] = odd ? NOT_A_NUMBER : 0.f;
  }
  if (some && threadIdx.x % 32 == 0) atomicOr(flags + kv, ODD);
}
