// Forward: flash attention over (q, k, X), and o from the row's result at the end (values.cu has the forms of X).
//
// A block of 4 warps owns QUERIES queries, a warp 16 * STRIPS of them, and walks over tiles of KEYS keys. acc, m and l stay
// in float32 registers. K of the next tile is on its way while this one's weights are made, X while its scores are. m may be
// up to SLACK bits behind the greatest score of its row: what it is subtracted from cancels, and acc is scaled rarely.

#define QUERIES (64 * STRIPS)

// acc [16 * STRIPS, XP] += p [16 * STRIPS, KEYS] · x [KEYS, XP]
__device__ __forceinline__ void add_product(float (&acc)[STRIPS][XP / 8][4], const Left (&p)[STRIPS][KEYS / 16],
                                            const element* x) {
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
    for (int e = 0; e < XP / 16; e++) {
      Right b;
      load_b_transposed(b, x + k * 16 * (XP + PAD) + e * 16, XP + PAD);
#pragma unroll
      for (int w = 0; w < STRIPS; w++) mma(acc[w][2 * e], acc[w][2 * e + 1], p[w][k], b);
    }
}

#if !FLOAT32
// two 16-bit numbers times 2^n
__device__ __forceinline__ u32 shifted(u32 x, int n) {
  return n ? pack(scaled(widen((u16)x), n), scaled(widen((u16)(x >> 16)), n)) : x;
}
#endif

// o of a channel from the forms' results, sums over keys divided by the row's
__device__ __forceinline__ float output_of(float exp_form, float expm1_form, const int* c, int e, float beta, float inverse) {
  if (EXPM1) {
    float s = scaled(expm1_form, c[XP - EP + e]);
    if (s == s) s = fminf(fmaxf(s, -3e38f), 3e38f);
    if (is_linear(beta, beta * s)) return s * log1p_over(beta * s);
  }
  return split_log(exp_form, EXP ? c[e] : 0) * inverse;
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(
    PROBLEM, const element* q, const element* k, const element* x, const element* rest, const int* c, const int* flags,
    element* out, float* residual, float* lse) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  element* q_tile = (element*)raw;                  // [QUERIES, DP]
  element* k_tile = q_tile + QUERIES * (DP + PAD);  // [KEYS, DP]
  element* x_tile = k_tile + KEYS * (DP + PAD);     // [KEYS, XP]
  const int blocks = (pr.query_length + QUERIES - 1) / QUERIES;
  const Head at = head_of(pr, blockIdx.x / blocks);
  if (flags[at.key] & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * QUERIES;  // causal: the longest first
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int own = i0 + warp * 16 * STRIPS + g;  // the first row of this thread; others are 8 * n further
  const i64 keys = (i64)at.key * pr.key_length;
  q += (i64)at.query * pr.query_length * WIDTH;
  k += keys * WIDTH;
  x += keys * XP;
  rest += keys * XP;

  float acc[STRIPS][XP / 8][4] = {};
  float m[STRIPS][2], l[STRIPS][2], total[STRIPS][4] = {};  // total: the sum of the rounded weights
  for (int w = 0; w < STRIPS; w++)
    for (int h = 0; h < 2; h++) { m[w][h] = -INF; l[w][h] = 0.f; }
  const int i1 = least(i0 + QUERIES, at.q_end);
  const int first = greatest(0, i0 + pr.low) / KEYS;
  const int end = i1 <= i0 ? 0 : (least(at.k_end, i1 + pr.high) + KEYS - 1) / KEYS;
  const bool ordered = !CAP && pr.scale >= 0.f;  // scores are products times one factor, in their order
  tile_begin<QUERIES, DP, WIDTH>(q_tile, q, i0, pr.query_length);
  if (first < end) tile_begin<KEYS, DP, WIDTH>(k_tile, k, first * KEYS, at.k_end);
  copy_wait();
  __syncthreads();
  for (int tile = first; tile < end; tile++) {
    const int j0 = tile * KEYS;
    tile_begin<KEYS, XP, XP>(x_tile, x, j0, at.k_end);
    float s[STRIPS][KEYS / 8][4] = {};  // [16 * STRIPS, KEYS]
#pragma unroll
    for (int d = 0; d < DP / 16; d++) {
      Left a[STRIPS];
#pragma unroll
      for (int w = 0; w < STRIPS; w++) load_a(a[w], q_tile + (warp * STRIPS + w) * 16 * (DP + PAD) + d * 16, DP + PAD);
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) {
        Right b;
        load_b(b, k_tile + j * 16 * (DP + PAD) + d * 16, DP + PAD);
#pragma unroll
        for (int w = 0; w < STRIPS; w++) mma(s[w][2 * j], s[w][2 * j + 1], a[w], b);
      }
    }
    copy_wait();
    __syncthreads();  // x is there, and nobody reads k any more
    if (tile + 1 < end) tile_begin<KEYS, DP, WIDTH>(k_tile, k, j0 + KEYS, at.k_end);

    // A product of q and k that is not finite makes NaN of a row that sees it, and nothing of one that does not. Where
    // few keys carry a row, the rounding of X does not average out; each row decides that for itself, so that its bits
    // do not depend on its neighbours.
    const bool partial = !all_visible(pr, at, i0, least(i0 + QUERIES, pr.query_length), j0, j0 + KEYS);
    const bool direct = !partial && ordered;
    const float factor = direct ? pr.scale * UNIT : 1.f;
    Left p[STRIPS][KEYS / 16];
    bool few[STRIPS][2], any_few = false;
#pragma unroll
    for (int w = 0; w < STRIPS; w++) {
      if (direct) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) l[w][r / 2] = fmaf(s[w][j][r], 0.f, l[w][r / 2]);
      } else {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) {
            float slope, bias = 0.f;
            const bool seen = !partial || visible(pr, at, own + w * 16 + r / 2 * 8, j0 + j * 8 + t * 2 + r % 2, bias);
            l[w][r / 2] = seen ? fmaf(s[w][j][r], 0.f, fmaf(bias, 0.f, l[w][r / 2])) : l[w][r / 2];
            s[w][j][r] = seen ? score(pr, s[w][j][r], slope) + bias : -INF;
          }
      }
      float minus_m[2], ahead[2];
      bool grows = false;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = -INF;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(s[w][j][2 * h], s[w][j][2 * h + 1]));
        ahead[h] = row_max(top * factor);
        grows |= ahead[h] > m[w][h] + SLACK;
      }
      if (warp_any(grows)) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float next = ahead[h] > m[w][h] + SLACK ? ahead[h] : m[w][h];
          const float shrink = m[w][h] == next ? 1.f : exp_fast(m[w][h] - next);
          m[w][h] = next;
          l[w][h] *= shrink;
          total[w][2 * h] *= shrink;
#pragma unroll
          for (int e = 0; e < XP / 8; e++) {
            acc[w][e][2 * h] *= shrink;
            acc[w][e][2 * h + 1] *= shrink;
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) minus_m[h] = P_SHIFT - (m[w][h] == -INF ? 0.f : m[w][h]);
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          s[w][j][r] = exp_fast(fmaf(s[w][j][r], factor, minus_m[r / 2]));
          l[w][r / 2] += s[w][j][r];
        }
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) left_of(p[w][j], s[w][2 * j], s[w][2 * j + 1]);
#if !FLOAT32
      const u32 one = pack(1.f, 1.f);
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) mma(total[w], p[w][j].x, one, one);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        // a weight of 2^SLACK may be one key, and a row whose m has just moved has one of 1
        few[w][h] = partial || total[w][2 * h] < 4.f * (1 << P_SHIFT) * (SLACK > 0.f ? fmaxf(1.f, exp_fast(ahead[h] - m[w][h])) : 1.f);
        any_few |= few[w][h];
      }
#endif
    }
    add_product(acc, p, x_tile);
    copy_wait();
    const bool again = __syncthreads_or(any_few);  // k is there, and nobody reads x any more
#if !FLOAT32
    if (again) {
#pragma unroll
      for (int w = 0; w < STRIPS; w++)
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) p[w][j].x[r] = few[w][r % 2] ? shifted(p[w][j].x[r], -REST_SHIFT) : 0;
      tile_begin<KEYS, XP, XP>(x_tile, rest, j0, at.k_end);
      copy_wait();
      __syncthreads();
      add_product(acc, p, x_tile);
      __syncthreads();
    }
#endif
  }

  const int* own_c = c + (i64)at.key * CP;
  const i64 row = (i64)at.query * pr.query_length + own;
  bool there[STRIPS][2], empty[STRIPS][2];
  float over_total[STRIPS][2];
#pragma unroll
  for (int w = 0; w < STRIPS; w++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = row_sum(l[w][h]);
      there[w][h] = own + w * 16 + h * 8 < pr.query_length;
      empty[w][h] = sum == 0.f;
      over_total[w][h] = sum == sum ? 1.f / (FLOAT32 ? sum : total[w][2 * h]) : NOT_A_NUMBER;
      if (t == 0 && there[w][h]) lse[row + w * 16 + h * 8] = empty[w][h] ? -INF : (m[w][h] - P_SHIFT) / UNIT + logf(sum);
    }
  const float inverse_of_beta = inverse_of(pr.beta);
  out += row * pr.value_dim;
  residual += row * pr.value_dim;
#pragma unroll
  for (int e = 0; e < EP / 8; e++) {
    const int channel = e * 8 + t * 2;
    float beta[2] = {pr.beta, pr.beta}, inverse[2] = {inverse_of_beta, inverse_of_beta};
    if (EXP && EXPM1)
      for (int r = 0; r < 2; r++) {
        if (channel + r < pr.value_dim) beta[r] = beta_of(pr, at.h, channel + r);
        inverse[r] = inverse_of(beta[r]);
      }
#pragma unroll
    for (int w = 0; w < STRIPS; w++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float o[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float one = acc[w][e][2 * h + r] * over_total[w][h];
          const float other = acc[w][XP / 8 - EP / 8 + e][2 * h + r] * over_total[w][h];
          o[r] = empty[w][h] ? 0.f : output_of(one, other, own_c, channel + r, beta[r], inverse[r]);
        }
        const int to = (w * 16 + h * 8) * pr.value_dim + channel;
        if (there[w][h] && pr.value_dim % 2 == 0 && channel < pr.value_dim) {
          store_pair(out + to, o[0], o[1]);
          store_two(residual + to, o[0], o[1]);
        } else if (there[w][h]) {
          for (int r = 0; r < 2; r++)
            if (channel + r < pr.value_dim) { out[to + r] = narrow(o[r]); residual[to + r] = o[r]; }
        }
      }
  }
}
