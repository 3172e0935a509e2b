// Backward: with G = do * exp(-beta*o) * 2^c the rest is that of flash attention on (X, G),
//
//     p = exp(s - l)    ds = p * (G·Xᵀ/beta + dl - rowsum(do)/beta)    dv = X * (pᵀ·G)    dq = ds·K    dk = dsᵀ·Q
//
// in two kernels without atomics: one owns keys and walks over queries, the query heads of a group included; one owns
// queries and walks over keys. Every sum has one order. Operands of products are finite: what is not finite travels in l
// of a query (NaN) and in the mark of a key (0 or NaN), which are added to the scores that a query sees. l = +infinity
// stands for a query that nothing flows through. Powers of two per head keep G and ds within float16.

#define INNER 32  // rows of the tiles that are walked over
#if FLOAT16
#define EXPONENT 0x7C00u
#else
#define EXPONENT 0x7F80u
#endif
#define STAGE (INNER * (DP + 8 + EP + 8 + 4))  // 16-bit numbers of a tile and two rows of floats
#define HEADROOM 13  // the greatest G and the greatest possible ds are brought to 2^13 … 2^14

struct alignas(16) Eight { u32 x[4]; };  // 16-bit numbers

__device__ __forceinline__ u32 finite_or_zero(u32 x) {
  if ((x & EXPONENT) == EXPONENT) x &= 0xFFFF0000u;
  if ((x >> 16 & EXPONENT) == EXPONENT) x &= 0xFFFFu;
  return x;
}

// zeros for what is not finite in a tile that tile_begin has loaded: in what this thread has copied itself
template <int ROWS, int WIDTH> __device__ __forceinline__ void tile_clean(u16* tile) {
#pragma unroll 1
  for (int n = threadIdx.x; n < ROWS * WIDTH / 8; n += THREADS) {
    Eight* at = (Eight*)(tile + n / (WIDTH / 8) * (WIDTH + 8) + n % (WIDTH / 8) * 8);
    Eight x = *at;
    u32 changed = 0;
    for (int h = 0; h < 4; h++) {
      const u32 clean = finite_or_zero(x.x[h]);
      changed |= clean ^ x.x[h];
      x.x[h] = clean;
    }
    if (changed) *at = x;
  }
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int n = 16; n; n /= 2) x += __shfl_xor_sync(FULL_WARP, x, n);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int n = 16; n; n /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, n));
  return x;
}

// exp(-beta*o) * 2^n
__device__ __forceinline__ float inverse(const Problem& p, float o, int n) {
  const float y = -p.beta * o;
  int exponent;
  const float mantissa = split_exp(y, fmaf(-p.beta, o, -y), exponent);
  return scaled(mantissa, exponent + n);
}

// Per query: l in base 2, or what stands for it; the row term; the greatest |G|; a bound of |ds|; and G itself, where it
// needs no scale of the head (bfloat16). A warp for each row.
extern "C" __global__ void __launch_bounds__(THREADS) row_terms(
    PROBLEM, const u16* q, const float* o, const u16* d_out, const float* lse, const float* d_lse, const int* c,
    const int* flags, float* l, float* r, float* sizes, float* bounds, u16* g, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32, kv = (int)(row / p.query_length) / p.group;
  const bool outside = flags[kv] & OUTSIDE;
  float sum = 0.f, total = 0.f, size = 0.f, odd = 0.f;
  float weight[EP / 32];
#pragma unroll
  for (int n = 0; n < EP / 32; n++) {
    const int e = lane + n * 32;
    weight[n] = 0.f;
    if (e >= p.value_dim) continue;
    const float mean = o[row * p.value_dim + e], one = widen(d_out[row * p.value_dim + e]);
    if (!finite(mean) || !finite(one)) odd = 1.f;
    sum += one;
    total += fabsf(one);
    if (one != 0.f && !outside && finite(mean)) weight[n] = one * inverse(p, mean, c[(i64)kv * EP + e]);
    size = fmaxf(size, fminf(fabsf(weight[n]), 1e38f));
  }
  for (int d = lane; d < p.head_dim; d += 32) if (!finite(widen(q[row * p.head_dim + d]))) odd = 1.f;
  sum = warp_sum(sum);
  total = warp_sum(total);
  odd = warp_max(odd);
  const float dl = d_lse ? d_lse[row] : 0.f;
  const bool nothing = lse[row] == -INF || (total == 0.f && dl == 0.f);
  const bool broken = odd > 0.f || !finite(lse[row]) || !finite(dl);
  const bool live = !nothing && !broken;
#if FLOAT16
  size = warp_max(size);
#else
#pragma unroll
  for (int n = 0; n < EP / 32; n++) g[row * EP + lane + n * 32] = live ? round16(weight[n]) : (u16)0;
#endif
  if (lane) return;
  l[row] = nothing ? INF : broken ? NOT_A_NUMBER : lse[row] * LOG2E;
  r[row] = live ? dl - sum / p.beta : 0.f;
  sizes[row] = live ? size : 0.f;
  bounds[row] = live ? fminf(2.f * total / fabsf(p.beta) + fabsf(dl), 1e38f) : 0.f;
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
  scales[2 * blockIdx.x] = FLOAT16 ? exponent_of(size) : 0;  // bfloat16 has the exponents of float32
  scales[2 * blockIdx.x + 1] = FLOAT16 ? exponent_of(bound) : 0;
}

// float16: G * 2^-scale [B*Hq, Lq, EP]; zero in rows that are not live
extern "C" __global__ void __launch_bounds__(THREADS) row_weights(
    PROBLEM, const float* o, const u16* d_out, const float* l, const int* c, const int* flags, const int* scales,
    u16* g, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 n = ((i64)blockIdx.x * THREADS + threadIdx.x) * 2;
  if (n >= rows * EP) return;
  const i64 row = n / EP;
  const int kv = (int)(row / p.query_length) / p.group;
  float value[2] = {0.f, 0.f};
  if (finite(l[row]) && !(flags[kv] & OUTSIDE))
    for (int h = 0; h < 2; h++) {
      const int e = (int)(n % EP) + h;
      if (e >= p.value_dim) continue;
      const float one = widen(d_out[row * p.value_dim + e]);
      if (one != 0.f) value[h] = one * inverse(p, o[row * p.value_dim + e], c[(i64)kv * EP + e] - scales[2 * kv]);
    }
  *(u32*)(g + n) = pack(value[0], value[1]);
}

// Per key: 0, or NaN where the key is not finite. A warp for each.
extern "C" __global__ void __launch_bounds__(THREADS) key_marks(PROBLEM, const u16* k, float* marks, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 row = (i64)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  float odd = 0.f;
  for (int d = threadIdx.x % 32; d < p.head_dim; d += 32) if (!finite(widen(k[row * p.head_dim + d]))) odd = 1.f;
  odd = warp_max(odd);
  if (threadIdx.x % 32 == 0) marks[row] = odd > 0.f ? NOT_A_NUMBER : 0.f;
}

// product [16, INNER] = a [16, WIDTH] · bᵀ, for b [INNER, WIDTH]
template <int WIDTH>
__device__ __forceinline__ void multiply(float (&product)[INNER / 8][4], const u16* a_tile, const u16* b_tile) {
#pragma unroll
  for (int d = 0; d < WIDTH / 16; d++) {
    u32 a[4];
    load_a(a, a_tile + d * 16, WIDTH + 8);
#pragma unroll
    for (int j = 0; j < INNER / 16; j++) {
      u32 b[4];
      load_b(b, b_tile + j * 16 * (WIDTH + 8) + d * 16, WIDTH + 8);
      mma(product[2 * j], a, b[0], b[1]);
      mma(product[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// acc [16, WIDTH] += a [16, INNER] · b, for b [INNER, WIDTH]; a comes as the result of a product
template <int WIDTH>
__device__ __forceinline__ void accumulate(float (&acc)[WIDTH / 8][4], const float (&a)[INNER / 8][4], const u16* b_tile) {
#pragma unroll
  for (int j = 0; j < INNER / 16; j++) {
    const u32 left[4] = {pack(a[2 * j][0], a[2 * j][1]), pack(a[2 * j][2], a[2 * j][3]),
                         pack(a[2 * j + 1][0], a[2 * j + 1][1]), pack(a[2 * j + 1][2], a[2 * j + 1][3])};
#pragma unroll
    for (int e = 0; e < WIDTH / 16; e++) {
      u32 b[4];
      load_b_transposed(b, b_tile + j * 16 * (WIDTH + 8) + e * 16, WIDTH + 8);
      mma(acc[2 * e], left, b[0], b[1]);
      mma(acc[2 * e + 1], left, b[2], b[3]);
    }
  }
}

// How products of G and X become ds: ds = p * (gx * in + r) * out; both factors as two, which are in range
struct Factors { float in, in2, out, out2; };

__device__ __forceinline__ Factors factors(const Problem& p, const int* scales) {
#if FLOAT16
  return {scaled(1.f, scales[0] / 2), scaled(1.f / p.beta, scales[0] - scales[0] / 2), scaled(1.f, -(scales[1] / 2)),
          scaled(1.f, -(scales[1] - scales[1] / 2))};
#else
  return {1.f / p.beta, 1.f, 1.f, 1.f};
#endif
}

// p and ds of one pair of query and key, from products of q and k, G and X
__device__ __forceinline__ void weigh(const Problem& pr, const Factors& f, float l, float r, float mark, float product,
                                      float gx, float& p, float& ds) {
  float slope;
  p = exp2_fast(score(pr, product, slope) + (mark - l));
#if FLOAT16
  ds = p * fmaf(gx * f.in, f.in2, r) * slope * f.out * f.out2;
#else
  ds = p * fmaf(gx, f.in, r) * slope;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_keys(
    PROBLEM, const u16* q, const u16* k, const u16* x, const u16* rest, const u16* g, const float* l, const float* r,
    const float* marks, const int* scales, const int* flags, u16* dk, u16* dv) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  u16* k_tile = (u16*)raw;                   // [64, DP]
  u16* x_tile = k_tile + BLOCK * (DP + 8);   // [64, EP]
  u16* stages = x_tile + BLOCK * (EP + 8);   // two of: q [32, DP], G [32, EP], l [32], r [32]
  const int blocks = (pr.key_length + BLOCK - 1) / BLOCK;
  const int kv = blockIdx.x / blocks, j0 = blockIdx.x % blocks * BLOCK;
  if (flags[kv] & OUTSIDE) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 + lane / 4, t = lane % 4;
  const i64 keys = (i64)kv * pr.key_length;
  const int g_scale = scales[2 * kv], ds_scale = scales[2 * kv + 1];
  const Factors f = factors(pr, scales + 2 * kv);
  tile_begin<BLOCK, DP>(k_tile, k + keys * pr.head_dim, j0, pr.key_length, pr.head_dim);
  tile_begin<BLOCK, EP>(x_tile, x + keys * EP, j0, pr.key_length, EP);
  copy_wait();
  tile_clean<BLOCK, DP>(k_tile);
  float mark[2];
  for (int h = 0; h < 2; h++) mark[h] = j0 + own + h * 8 < pr.key_length ? marks[keys + j0 + own + h * 8] : 0.f;

  float dk_acc[DP / 8][4] = {}, dv_acc[EP / 8][4] = {};
  for (int member = 0; member < pr.group; member++) {
    const Head at = head_of(pr, kv * pr.group + member);
    const i64 queries = (i64)at.query * pr.query_length;
    const int first = greatest(0, j0 - pr.high) / INNER * INNER;
    const int end = j0 < at.k_end ? least(at.q_end, j0 + BLOCK - pr.low) : 0;
    auto begin = [&](int i0) {
      u16* q_tile = stages + i0 / INNER % 2 * STAGE;
      u16* g_tile = q_tile + INNER * (DP + 8);
      float* l_tile = (float*)(g_tile + INNER * (EP + 8));
      tile_begin<INNER, DP>(q_tile, q + queries * pr.head_dim, i0, at.q_end, pr.head_dim);
      tile_begin<INNER, EP>(g_tile, g + queries * EP, i0, at.q_end, EP);
      if (threadIdx.x < 2 * INNER) {
        const int i = i0 + threadIdx.x % INNER;
        copy_begin(l_tile + threadIdx.x, (threadIdx.x < INNER ? l : r) + queries + least(i, pr.query_length - 1),
                   i < at.q_end);
      }
    };
    __syncthreads();  // nobody reads the last tile of another head any more
    if (first < end) begin(first);
    for (int i0 = first; i0 < end; i0 += INNER) {
      u16* q_tile = stages + i0 / INNER % 2 * STAGE;
      const u16* g_tile = q_tile + INNER * (DP + 8);
      const float* l_tile = (const float*)(g_tile + INNER * (EP + 8));
      const float* r_tile = l_tile + INNER;
      copy_wait();
      tile_clean<INNER, DP>(q_tile);
      __syncthreads();  // this tile is there, and nobody reads the one before
      if (i0 + INNER < end) begin(i0 + INNER);
      float s[INNER / 8][4] = {}, gx[INNER / 8][4] = {};  // [16 keys, 32 queries]
      multiply<DP>(s, k_tile + warp * 16 * (DP + 8), q_tile);
      multiply<EP>(gx, x_tile + warp * 16 * (EP + 8), g_tile);
      const bool all = all_visible(pr, at, i0, i0 + INNER, j0, j0 + BLOCK);
#pragma unroll
      for (int n = 0; n < INNER / 8; n++)
#pragma unroll
        for (int h = 0; h < 4; h++) {
          const int column = n * 8 + t * 2 + h % 2;
          float p = 0.f, ds = 0.f;
          if ((all || visible(pr, at, i0 + column, j0 + own + h / 2 * 8)) && l_tile[column] != INF)
            weigh(pr, f, l_tile[column], r_tile[column], mark[h / 2], s[n][h], gx[n][h], p, ds);
          s[n][h] = p * (1 << P_SHIFT);
          gx[n][h] = ds;
        }
      accumulate<EP>(dv_acc, s, g_tile);
      accumulate<DP>(dk_acc, gx, q_tile);
    }
  }
  copy_wait();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int j = j0 + own + h * 8;
    if (j >= pr.key_length) continue;
#pragma unroll
    for (int n = 0; n < DP / 8; n++) {
      const int d = n * 8 + t * 2;
      if (d < pr.head_dim)
        *(u32*)(dk + (keys + j) * pr.head_dim + d) =
            pack(scaled(dk_acc[n][2 * h] * pr.scale, ds_scale), scaled(dk_acc[n][2 * h + 1] * pr.scale, ds_scale));
    }
#pragma unroll
    for (int n = 0; n < EP / 8; n++)
#pragma unroll
      for (int w = 0; w < 2; w++) {
        const int e = n * 8 + t * 2 + w;
        if (e >= pr.value_dim) continue;
        const float weight = widen(x[(keys + j) * EP + e]) + scaled(widen(rest[(keys + j) * EP + e]), -REST_SHIFT);
        dv[(keys + j) * pr.value_dim + e] = round16(scaled(dv_acc[n][2 * h + w] * weight, g_scale - P_SHIFT));
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_queries(
    PROBLEM, const u16* q, const u16* k, const u16* x, const u16* g, const float* l, const float* r,
    const float* marks, const int* scales, const int* flags, u16* dq) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  u16* q_tile = (u16*)raw;                   // [64, DP]
  u16* g_tile = q_tile + BLOCK * (DP + 8);   // [64, EP]
  u16* stages = g_tile + BLOCK * (EP + 8);   // two of: k [32, DP], X [32, EP], marks [32]
  const int blocks = (pr.query_length + BLOCK - 1) / BLOCK;
  const Head at = head_of(pr, blockIdx.x / blocks);
  if (flags[at.key] & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * BLOCK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 + lane / 4, t = lane % 4;
  const i64 queries = (i64)at.query * pr.query_length, keys = (i64)at.key * pr.key_length;
  const int ds_scale = scales[2 * at.key + 1];
  const Factors f = factors(pr, scales + 2 * at.key);
  tile_begin<BLOCK, DP>(q_tile, q + queries * pr.head_dim, i0, pr.query_length, pr.head_dim);
  tile_begin<BLOCK, EP>(g_tile, g + queries * EP, i0, pr.query_length, EP);
  float l_row[2], r_row[2];
  for (int h = 0; h < 2; h++) {
    const bool there = i0 + own + h * 8 < at.q_end;
    l_row[h] = there ? l[queries + i0 + own + h * 8] : INF;
    r_row[h] = there ? r[queries + i0 + own + h * 8] : 0.f;
  }
  float acc[DP / 8][4] = {};
  const int i1 = least(i0 + BLOCK, at.q_end);
  const int first = greatest(0, i0 + pr.low) / INNER * INNER;
  const int end = i1 <= i0 ? 0 : least(at.k_end, i1 + pr.high);
  auto begin = [&](int j0) {
    u16* k_tile = stages + j0 / INNER % 2 * STAGE;
    u16* x_tile = k_tile + INNER * (DP + 8);
    tile_begin<INNER, DP>(k_tile, k + keys * pr.head_dim, j0, at.k_end, pr.head_dim);
    tile_begin<INNER, EP>(x_tile, x + keys * EP, j0, at.k_end, EP);
    if (threadIdx.x < INNER) {
      const int j = j0 + threadIdx.x;
      copy_begin((float*)(x_tile + INNER * (EP + 8)) + threadIdx.x, marks + keys + least(j, pr.key_length - 1), j < at.k_end);
    }
  };
  if (first < end) begin(first);
  for (int j0 = first; j0 < end; j0 += INNER) {
    u16* k_tile = stages + j0 / INNER % 2 * STAGE;
    const u16* x_tile = k_tile + INNER * (DP + 8);
    const float* mark = (const float*)(x_tile + INNER * (EP + 8));
    copy_wait();
    if (j0 == first) tile_clean<BLOCK, DP>(q_tile);
    tile_clean<INNER, DP>(k_tile);
    __syncthreads();  // this tile is there, and nobody reads the one before
    if (j0 + INNER < end) begin(j0 + INNER);
    float s[INNER / 8][4] = {}, gx[INNER / 8][4] = {};  // [16 queries, 32 keys]
    multiply<DP>(s, q_tile + warp * 16 * (DP + 8), k_tile);
    multiply<EP>(gx, g_tile + warp * 16 * (EP + 8), x_tile);
    const bool all = all_visible(pr, at, i0, i0 + BLOCK, j0, j0 + INNER);
#pragma unroll
    for (int n = 0; n < INNER / 8; n++)
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const int column = n * 8 + t * 2 + h % 2;
        float p, ds = 0.f;
        if ((all || visible(pr, at, i0 + own + h / 2 * 8, j0 + column)) && l_row[h / 2] != INF)
          weigh(pr, f, l_row[h / 2], r_row[h / 2], mark[column], s[n][h], gx[n][h], p, ds);
        gx[n][h] = ds;
      }
    accumulate<DP>(acc, gx, k_tile);
  }
  copy_wait();
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int i = i0 + own + h * 8;
    if (i >= pr.query_length) continue;
#pragma unroll
    for (int n = 0; n < DP / 8; n++) {
      const int d = n * 8 + t * 2;
      if (d < pr.head_dim)
        *(u32*)(dq + (queries + i) * pr.head_dim + d) =
            pack(scaled(acc[n][2 * h] * pr.scale, ds_scale), scaled(acc[n][2 * h + 1] * pr.scale, ds_scale));
    }
  }
}
