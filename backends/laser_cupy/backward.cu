// Backward: with G = do * exp(-beta*o)/beta * 2^c in the exp form and do * exp(-beta*o) * 2^c in the expm1 form, the rest is
// that of flash attention on (X, G),
//
//     p = exp(s - l)    ds = p * (G·Xᵀ + r)    dv = exp(beta*v) * (pᵀ·G), beta times that in the exp form
//     dq = ds·K    dk = dsᵀ·Q    r = dl - Σ do/beta in the exp form, dl - Σ do (1 - exp(-beta*o))/beta in the other
//
// in two kernels without atomics: one owns keys and walks over queries, the query heads of a group included; one owns
// queries and walks over keys. Every sum has one order. Operands of products are finite: what is not finite travels in l
// of a query (NaN) and in the mark of a key (0 or NaN), which are added to the scores that a query sees. l = +infinity
// stands for a query that nothing flows through. Powers of two per head keep G and ds within float16.

#define STAGE_BYTES (INNER * (sizeof(element) * (DP + PAD + XP + PAD) + 8))  // two tiles and two rows of floats
#define OWNED_ROWS (64 * OWNED)  // keys or queries of a block
#ifndef HELD
#define HELD (!FLOAT32 && DP + XP <= 256)  // queries stay in registers
#endif
#ifndef HELD_KEYS
#define HELD_KEYS (HELD && !SPLIT)  // and keys, for which queries are taken 16 at a time
#endif
#define AT_ONCE (HELD_KEYS ? 16 : INNER)
#define AHEAD (STAGES > 1 ? STAGES - 1 : 1)  // tiles that are on their way, or there
#define SPLIT (DP + XP > 256)  // dk and dv in kernels of their own: one thread cannot hold both

// without the power of two that keeps float16 in range
__device__ __forceinline__ float restored(float x, int n) { return FLOAT16 ? scaled(x, n) : x; }

// How products of G and X become ds: ds = p * (gx * in + r); and ds an element, times `out`; both as two, which are in range
struct Factors { float in, in2, out, out2; };

__device__ __forceinline__ Factors factors(const int* scales) {
#if FLOAT16
  return {scaled(1.f, scales[0] / 2), scaled(1.f, scales[0] - scales[0] / 2), scaled(1.f, -(scales[1] / 2)),
          scaled(1.f, -(scales[1] - scales[1] / 2))};
#else
  return {1.f, 1.f, 1.f, 1.f};
#endif
}

// ds of a tile [16 * W, 8 * N] whose rows are queries or keys, from products of q and k, G and X: p in place of s and ds, by
// which its slope is not multiplied, in place of gx. `at_pair` says what is seen, with its bias, l, r and the key's mark.
// DIRECT: everything is seen, and nothing else changes scores.
template <bool SLOPE, bool DIRECT, int W, int N, class AtPair>
__device__ __forceinline__ void weigh_all(const Problem& pr, const Factors& f, float (&s)[W][N][4], float (&gx)[W][N][4], AtPair at_pair) {
  const float factor = pr.scale * UNIT;
#pragma unroll
  for (int m = 0; m < W * N * 4; m++) {
    const int w = m / (4 * N), n = m / 4 % N, h = m % 4;
    float l, r, mark, bias, slope = 1.f, p = 0.f, ds = 0.f;
    const bool seen = at_pair(w, n, h, !DIRECT, l, r, mark, bias);
    if (DIRECT) {
      p = exp_fast(fmaf(s[w][n][h], factor, -l));
      ds = p * (FLOAT16 ? fmaf(gx[w][n][h] * f.in, f.in2, r) : gx[w][n][h] + r);
    } else {
      const bool flows = seen && l != INF;
      const float above = GENERAL ? score(pr, s[w][n][h], bias, slope) - l : fmaf(s[w][n][h], factor, -l);  // the bits of DIRECT
      const float weight = exp_fast(above + mark);
      ds = weight * (FLOAT16 ? fmaf(gx[w][n][h] * f.in, f.in2, r) : gx[w][n][h] + r);
      p = flows ? weight : 0.f;
      ds = flows ? SLOPE ? ds * slope : ds : 0.f;
    }
    s[w][n][h] = p;
    gx[w][n][h] = FLOAT16 && SLOPE ? ds * f.out * f.out2 : ds;
  }
}
template <bool SLOPE, int W, int N, class AtPair>
__device__ __forceinline__ void weigh(const Problem& pr, const Factors& f, bool direct, float (&s)[W][N][4], float (&gx)[W][N][4],
                                      AtPair at_pair) {
  if (direct) weigh_all<SLOPE, true>(pr, f, s, gx, at_pair);
  else weigh_all<SLOPE, false>(pr, f, s, gx, at_pair);
}

// dv of a value in channel e, from the sums over queries of both forms; and what it adds to dβ
__device__ __forceinline__ float value_gradient(float exp_form, float expm1_form, float beta, float v, const int* c, int e, int g_scale,
                                                float& dbeta) {
  const float y = beta * v;
  float sum = 0.f;
  dbeta = 0.f;
  if (EXP) {
    const float part = scaled(exp_form, g_scale - P_SHIFT) * (finite(y) ? fminf(inverse_exp(-beta, v, -c[e]), 3e38f) : 0.f);
    sum = part * beta;
    if (beta != 0.f && finite(y)) dbeta += part * (v - c[e] * LN2 / beta);
  }
  if (EXPM1) {
    const float part = scaled(expm1_form, g_scale - P_SHIFT - c[XP - EP + e]);
    sum += part * (finite(y) ? expf(fminf(y, CLIP)) : 0.f);
    if (finite(y)) dbeta += part * v * v * curvature(fminf(y, CLIP));
  }
  return sum;
}

// exp(beta*v) * 2^-c of a head inside the fast range, by the hardware's exponential; c is not in the bits before the exponent
__device__ __forceinline__ float exp_of_value(float beta, float v, int c) {
  const float y = beta * v, whole = rintf(y * LOG2E);
  const float rest = fmaf(-whole, LN2_LOW, fmaf(-whole, LN2_HIGH, y)) + fmaf(beta, v, -y);
  const int n = least(127, greatest(-126, (int)whole - c));
  return finite(y) ? exp2_fast(rest * LOG2E) * bits_as_float((u32)(n + 127) << 23) : 0.f;
}

struct alignas(4 * sizeof(element)) Quad { element x[4]; };

// dv of up to 16 keys from `results` [16, XP], sums over queries; and sums [EP] over the keys of what they add to dβ, or null
__device__ __forceinline__ void write_values(const Problem& pr, int head, const float* results, int keys, const element* v, const int* c,
                                             int g_scale, element* dv, float* sums, bool add) {
  const int lane = threadIdx.x % 32;
  if (EXP && !EXPM1 && !FLOAT32 && pr.value_dim % 4 == 0) {
#pragma unroll 1
    for (int e = lane * 4; e < pr.value_dim; e += 128) {
      int own_c[4];
      for (int h = 0; h < 4; h++) own_c[h] = c[e + h];
#pragma unroll 4
      for (int j = 0; j < keys; j++) {
        const Quad from = *(const Quad*)(v + (i64)j * pr.value_dim + e);
        Floats to = *(const Floats*)(results + j * (XP + 4) + e);
#pragma unroll
        for (int h = 0; h < 4; h++)
          to.x[h] = restored(to.x[h], g_scale - P_SHIFT) * exp_of_value(pr.beta, widen(from.x[h]), own_c[h]) * pr.beta;
        store_pair(dv + (i64)j * pr.value_dim + e, to.x[0], to.x[1]);
        store_pair(dv + (i64)j * pr.value_dim + e + 2, to.x[2], to.x[3]);
      }
    }
    return;
  }
#pragma unroll 1
  for (int e = lane; e < EP; e += 32) {
    const float beta = e < pr.value_dim ? beta_of(pr, head, e) : 0.f;
    float sum = add && sums ? sums[e] : 0.f;
#pragma unroll 1
    for (int j = 0; j < keys && e < pr.value_dim; j++) {
      const float* from = results + j * (XP + 4) + e;
      const i64 at = (i64)j * pr.value_dim + e;
      float dbeta;
      dv[at] = narrow(value_gradient(from[0], from[XP - EP], beta, widen(v[at]), c, e, g_scale, dbeta));
      sum += dbeta;
    }
    if (sums) sums[e] = sum;
  }
}

// dk and dv of a block's keys; one of them where SPLIT has a thread hold no more. dbetas [B*Hkv, blocks, EP], or null
template <bool DK, bool DV>
__device__ __forceinline__ void backward_of_keys(
    const Problem& pr, u8* raw, const element* q, const element* k, const element* v, const element* x, const element* g,
    const float* l, const float* r, const float* marks, const int* c, const int* scales, const int* flags, element* dk,
    element* dv, float* dbetas) {
  element* k_tile = (element*)raw;                // [OWNED_ROWS, DP]
  element* x_tile = k_tile + OWNED_ROWS * (DP + PAD);  // [OWNED_ROWS, XP]
  u8* stages = (u8*)(x_tile + OWNED_ROWS * (XP + PAD));  // of: q [32, DP], G [32, XP], l [32], r [32]
  const int blocks = (pr.key_length + OWNED_ROWS - 1) / OWNED_ROWS;
  const int kv = blockIdx.x / blocks, j0 = blockIdx.x % blocks * OWNED_ROWS;
  const int flag = flags[kv];
  if (flag & OUTSIDE) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 * OWNED + lane / 4, t = lane % 4;
  const i64 keys = (i64)kv * pr.key_length;
  const int g_scale = scales[2 * kv], ds_scale = scales[2 * kv + 1];
  const Factors f = factors(scales + 2 * kv);
  tile_begin<OWNED_ROWS, DP, WIDTH>(k_tile, k + keys * WIDTH, j0, pr.key_length);
  if (DK) tile_begin<OWNED_ROWS, XP, XP>(x_tile, x + keys * XP, j0, pr.key_length);
  copy_wait();
  if (flag & ODD) tile_clean<OWNED_ROWS, DP>(k_tile);
  float mark[2 * OWNED];
  for (int h = 0; h < 2 * OWNED; h++) mark[h] = j0 + own + h * 8 < pr.key_length ? marks[keys + j0 + own + h * 8] : 0.f;

  const element *own_k = k_tile + warp * 16 * OWNED * (DP + PAD), *own_x = x_tile + warp * 16 * OWNED * (XP + PAD);
#if HELD_KEYS
  __syncthreads();
  Left held_k[OWNED][DP / 16], held_x[OWNED][XP / 16];
  hold<DP>(held_k, own_k);
  hold<XP>(held_x, own_x);
#endif
  constexpr bool EARLY = OWNED == 1;  // else there are no registers for it
  float dk_acc[OWNED][DP / 8][4] = {}, dv_acc[OWNED][XP / 8][4] = {};
  for (int member = 0; member < pr.group; member++) {
    const Head at = head_of(pr, kv * pr.group + member);
    const i64 queries = (i64)at.query * pr.query_length;
    const int first = greatest(0, j0 - pr.high) / INNER * INNER;
    const int end = j0 < at.k_end ? least(at.q_end, j0 + OWNED_ROWS - pr.low) : 0;
    auto stage = [&](int i0) { return stages + i0 / INNER % STAGES * STAGE_BYTES; };
    Mover<INNER, DP, WIDTH> next_q((element*)stages, q + queries * WIDTH, first, at.q_end);
    Mover<INNER, XP, XP> next_g((element*)stages + INNER * (DP + PAD), g + queries * XP, first, at.q_end);
    auto begin = [&](int i0, int n, int parts, bool wanted) {  // part n of what it takes to copy the tile from i0 on
      const int shift = i0 / INNER % STAGES * (STAGE_BYTES / (int)sizeof(element));
      next_q.part(n, parts, i0, wanted, shift);
      next_g.part(n, parts, i0, wanted, shift);
      if (n == 0 && wanted && threadIdx.x < 2 * INNER) {
        const int i = i0 + threadIdx.x % INNER;
        float* l_tile = (float*)((element*)stage(i0) + INNER * (DP + PAD + XP + PAD));
        copy_begin_float(l_tile + threadIdx.x, (threadIdx.x < INNER ? l : r) + queries + least(i, pr.query_length - 1),
                         i < at.q_end);
      }
    };
    copy_wait();
    __syncthreads();  // nobody reads the last tile of another head any more
#pragma unroll
    for (int n = 0; n < AHEAD; n++) {
      begin(first + n * INNER, 0, 1, first + n * INNER < end);
      copy_end();
    }
    for (int i0 = first; i0 < end; i0 += INNER) {
      element* q_tile = (element*)stage(i0);
      const element* g_tile = q_tile + INNER * (DP + PAD);
      const float* l_tile = (const float*)(g_tile + INNER * (XP + PAD));
      const float* r_tile = l_tile + INNER;
      copy_wait_but<AHEAD - 1>();
      if (flag & ODD) tile_clean<INNER, DP>(q_tile);
      __syncthreads();  // this tile is there, and nobody reads the one before
      auto between = [&](int n, int parts) { if (STAGES > 1) begin(i0 + AHEAD * INNER, n, parts, i0 + AHEAD * INNER < end); };
      const bool direct = !CAP && !(flag & ODD) && all_visible(pr, at, i0, i0 + INNER, j0, j0 + OWNED_ROWS);
#pragma unroll
      for (int n0 = 0; n0 < INNER; n0 += AT_ONCE) {
        const element *q_rows = q_tile + n0 * (DP + PAD), *g_rows = g_tile + n0 * (XP + PAD);
        float s[OWNED][AT_ONCE / 8][4] = {}, gx[OWNED][AT_ONCE / 8][4] = {};  // [keys, queries]
#if HELD_KEYS
        multiply_both<EARLY>(s, gx, held_k, held_x, q_rows, g_rows, [&](int n, int parts) { if (n0 == 0) between(n, parts); });
#else
        multiply<DP>(s, own_k, q_rows, between);
        if (DK) multiply<XP>(gx, own_x, g_rows, [](int, int) {});
#endif
        weigh<true>(pr, f, direct, s, gx,
                    [&](int w, int n, int h, bool look, float& one_l, float& one_r, float& one_mark, float& bias) {
                      const int column = n0 + n * 8 + t * 2 + h % 2;
                      one_l = l_tile[column];
                      one_r = r_tile[column];
                      one_mark = mark[w * 2 + h / 2];
                      const int j = j0 + own + w * 16 + h / 2 * 8;
                      if (GENERAL && look) return visible(pr, at, i0 + column, j, bias);
                      const int from = j - pr.high - i0 - t * 2;  // queries that see key j, up to `to`
                      const int to = (j < at.k_end ? least(at.q_end, j - pr.low + 1) : 0) - i0 - t * 2;
                      return !look || (column - t * 2 >= from && column - t * 2 < to);
                    });
        if (DV && P_SHIFT) {
#pragma unroll
          for (int m = 0; m < OWNED * AT_ONCE / 2; m++) s[m / (AT_ONCE / 2)][m / 4 % (AT_ONCE / 8)][m % 4] *= 1 << P_SHIFT;
        }
        if (DV) accumulate<XP, EARLY>(dv_acc, s, g_rows);
        if (DK) accumulate<DP, EARLY>(dk_acc, gx, q_rows);
      }
      if (STAGES == 1) {
        __syncthreads();
        begin(i0 + INNER, 0, 1, i0 + INNER < end);
      }
      copy_end();
    }
  }
  copy_wait();
#pragma unroll
  for (int h = 0; h < 2 * OWNED; h++) {
    const int j = j0 + own + h * 8;
    if (!DK || j >= pr.key_length) continue;
#pragma unroll
    for (int n = 0; n < DP / 8; n++) {
      const int d = n * 8 + t * 2;
      if (d < WIDTH)
        store_pair(dk + (keys + j) * WIDTH + d, restored(dk_acc[h / 2][n][h % 2 * 2] * pr.scale, ds_scale),
                   restored(dk_acc[h / 2][n][h % 2 * 2 + 1] * pr.scale, ds_scale));
    }
  }
  if (!DV) return;
  // by way of shared memory: a warp writes whole rows
  float* results = (float*)raw + warp * 16 * (XP + 4);
  float* sums = (float*)raw + 64 * (XP + 4);  // [4 warps, EP] of dβ
  __syncthreads();
#pragma unroll
  for (int w = 0; w < OWNED; w++) {
#pragma unroll
    for (int n = 0; n < XP / 8; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        store_two(results + (lane / 4 + h * 8) * (XP + 4) + n * 8 + t * 2, dv_acc[w][n][2 * h], dv_acc[w][n][2 * h + 1]);
    __syncwarp();
    const int j = j0 + (warp * OWNED + w) * 16;
    write_values(pr, kv * pr.group % pr.query_heads, results, least(16, pr.key_length - j), v + (keys + j) * pr.value_dim,
                 c + (i64)kv * CP, g_scale, dv + (keys + j) * pr.value_dim, dbetas ? sums + warp * EP : nullptr, w > 0);
    __syncwarp();
  }
  if (!dbetas) return;
  __syncthreads();
  for (int e = threadIdx.x; e < EP; e += THREADS)
    dbetas[(i64)blockIdx.x * EP + e] = sums[e] + sums[EP + e] + (sums[2 * EP + e] + sums[3 * EP + e]);
}

#define OF_KEYS                                                                                                 \
  PROBLEM, const element *q, const element *k, const element *v, const element *x, const element *g, const float *l, \
      const float *r, const float *marks, const int *c, const int *scales, const int *flags, element *dk, element *dv, \
      float *dbetas
extern "C" __global__ void __launch_bounds__(THREADS) backward_keys(OF_KEYS) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  backward_of_keys<true, !SPLIT>(pr, raw, q, k, v, x, g, l, r, marks, c, scales, flags, dk, dv, dbetas);
}
// after backward_keys, where that has left dv out
extern "C" __global__ void __launch_bounds__(THREADS) backward_values(OF_KEYS) {
#if SPLIT
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  backward_of_keys<false, true>(pr, raw, q, k, v, x, g, l, r, marks, c, scales, flags, dk, dv, dbetas);
#endif
}

// ds of 64 * W queries and the keys from j_first to j_end; `use` takes each tile [16 * W, INNER] of a warp, with its keys. With SLOPE
// it is that of the products, times f.out; without that of the scores.
template <bool SLOPE, int W, class Use>
__device__ __forceinline__ void walk_over_keys(
    const Problem& pr, u8* raw, const Head& at, int flag, int i0, int j_first, int j_end, const Factors& f, const element* q,
    const element* k, const element* x, const element* g, const float* l, const float* r, const float* marks, Use use) {
  element* q_tile = (element*)raw;                // [64 * W, DP]
  element* g_tile = q_tile + 64 * W * (DP + PAD);  // [64 * W, XP]
  u8* stages = (u8*)(g_tile + 64 * W * (XP + PAD));  // of: k [32, DP], X [32, XP], marks [32]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 * W + lane / 4, t = lane % 4;
  const i64 queries = (i64)at.query * pr.query_length, keys = (i64)at.key * pr.key_length;
  tile_begin<64 * W, DP, WIDTH>(q_tile, q + queries * WIDTH, i0, pr.query_length);
  tile_begin<64 * W, XP, XP>(g_tile, g + queries * XP, i0, pr.query_length);
  float l_row[2 * W], r_row[2 * W];
  for (int h = 0; h < 2 * W; h++) {
    const bool there = i0 + own + h * 8 < at.q_end;
    l_row[h] = there ? l[queries + i0 + own + h * 8] : INF;
    r_row[h] = there ? r[queries + i0 + own + h * 8] : 0.f;
  }
  const int i1 = least(i0 + 64 * W, at.q_end);
  const int first = greatest(j_first, (i0 + pr.low) / INNER * INNER);
  const int end = i1 <= i0 ? 0 : least(least(j_end, at.k_end), i1 + pr.high);
  auto stage = [&](int j0) { return stages + j0 / INNER % STAGES * STAGE_BYTES; };
  Mover<INNER, DP, WIDTH> next_k((element*)stages, k + keys * WIDTH, first, at.k_end);
  Mover<INNER, XP, XP> next_x((element*)stages + INNER * (DP + PAD), x + keys * XP, first, at.k_end);
  auto begin = [&](int j0, int n, int parts, bool wanted) {  // part n of what it takes to copy the tile from j0 on
    const int shift = j0 / INNER % STAGES * (STAGE_BYTES / (int)sizeof(element));
    next_k.part(n, parts, j0, wanted, shift);
    next_x.part(n, parts, j0, wanted, shift);
    if (n == 0 && wanted && threadIdx.x < INNER) {
      const int j = j0 + threadIdx.x;
      float* mark = (float*)((element*)stage(j0) + INNER * (DP + PAD + XP + PAD));
      copy_begin_float(mark + threadIdx.x, marks + keys + least(j, pr.key_length - 1), j < at.k_end);
    }
  };
#pragma unroll
  for (int n = 0; n < AHEAD; n++) {
    begin(first + n * INNER, 0, 1, first + n * INNER < end);
    copy_end();
  }
  const element *own_q = q_tile + warp * 16 * W * (DP + PAD), *own_g = g_tile + warp * 16 * W * (XP + PAD);
#if HELD
  Left held_q[W][DP / 16], held_g[W][XP / 16];
#endif
  for (int j0 = first; j0 < end; j0 += INNER) {
    element* k_tile = (element*)stage(j0);
    const element* x_tile = k_tile + INNER * (DP + PAD);
    const float* mark = (const float*)(x_tile + INNER * (XP + PAD));
    copy_wait_but<AHEAD - 1>();
    if (flag & ODD) {
      if (j0 == first) tile_clean<64 * W, DP>(q_tile);
      tile_clean<INNER, DP>(k_tile);
    }
    __syncthreads();  // this tile is there, and nobody reads the one before
    auto between = [&](int n, int parts) { if (STAGES > 1) begin(j0 + AHEAD * INNER, n, parts, j0 + AHEAD * INNER < end); };
    float s[W][INNER / 8][4] = {}, gx[W][INNER / 8][4] = {};  // [queries, keys]
#if HELD
    if (j0 == first) {
      hold<DP>(held_q, own_q);
      hold<XP>(held_g, own_g);
    }
    multiply_both<true>(s, gx, held_q, held_g, k_tile, x_tile, between);
#else
    multiply<DP>(s, own_q, k_tile, between);
    multiply<XP>(gx, own_g, x_tile, [](int, int) {});
#endif
    const bool direct = !CAP && !(flag & ODD) && all_visible(pr, at, i0, i0 + 64 * W, j0, j0 + INNER);
    weigh<SLOPE>(pr, f, direct, s, gx,
                 [&](int w, int n, int h, bool look, float& one_l, float& one_r, float& one_mark, float& bias) {
                   const int column = n * 8 + t * 2 + h % 2;
                   one_l = l_row[w * 2 + h / 2];
                   one_r = r_row[w * 2 + h / 2];
                   one_mark = look ? mark[column] : 0.f;
                   const int i = i0 + own + w * 16 + h / 2 * 8;
                   if (GENERAL && look) return visible(pr, at, i, j0 + column, bias);
                   const int from = i + pr.low - j0 - t * 2;  // keys that query i sees, up to `to`
                   const int to = (i < at.q_end ? least(at.k_end, i + pr.high + 1) : 0) - j0 - t * 2;
                   return !look || (column - t * 2 >= from && column - t * 2 < to);
                 });
    use(j0, gx, k_tile);
    if (STAGES == 1) {
      __syncthreads();
      begin(j0 + INNER, 0, 1, j0 + INNER < end);
    }
    copy_end();
  }
  copy_wait();
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_queries(
    PROBLEM, const element* q, const element* k, const element* x, const element* g, const float* l, const float* r,
    const float* marks, const int* scales, const int* flags, element* dq) {
  const Problem pr = THE_PROBLEM;
  const int blocks = (pr.query_length + OWNED_ROWS - 1) / OWNED_ROWS;
  const Head at = head_of(pr, blockIdx.x / blocks);
  const int flag = flags[at.key];
  if (flag & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * OWNED_ROWS;
  const int own = threadIdx.x / 32 * 16 * OWNED + threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int ds_scale = scales[2 * at.key + 1];
  SHARED_MEMORY(raw);
  float acc[OWNED][DP / 8][4] = {};
  walk_over_keys<true, OWNED>(
      pr, raw, at, flag, i0, 0, pr.key_length, factors(scales + 2 * at.key), q, k, x, g, l, r, marks,
      [&](int, const float(&ds)[OWNED][INNER / 8][4], const element* k_tile) { accumulate<DP, true>(acc, ds, k_tile); });
#pragma unroll
  for (int h = 0; h < 2 * OWNED; h++) {
    const int i = i0 + own + h * 8;
    if (i >= pr.query_length) continue;
#pragma unroll
    for (int n = 0; n < DP / 8; n++) {
      const int d = n * 8 + t * 2;
      if (d < WIDTH)
        store_pair(dq + ((i64)at.query * pr.query_length + i) * WIDTH + d, restored(acc[h / 2][n][h % 2 * 2] * pr.scale, ds_scale),
                   restored(acc[h / 2][n][h % 2 * 2 + 1] * pr.scale, ds_scale));
    }
  }
}
