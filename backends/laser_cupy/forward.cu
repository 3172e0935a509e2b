// Forward: flash attention over (q, k, X), and o from the row's result at the end (values.cu has the forms of X).
//
// A block of 4 warps owns QUERIES queries, a warp 16 * STRIPS of them, and walks over tiles of KEYS keys. acc, m and l stay
// in float32 registers. While the weights of a tile are made, the scores of the next one are, and K of the one after it and
// X of the next one are on their way. m may be up to SLACK bits behind the greatest score of its row: what it is subtracted
// from cancels, and acc is scaled rarely.

#define QUERIES (64 * STRIPS)
#define HELD_Q (!FLOAT32 && STRIPS == 1 && KEYS == 64 && DP <= 128)  // q stays in registers

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
    element* out, float* residual, float* lse, const u32* wanted) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  element* k_tiles = (element*)raw;                      // two of [KEYS, DP]
  element* x_tiles = k_tiles + 2 * KEYS * (DP + PAD);    // two of [KEYS, XP]
  const int blocks = (pr.query_length + QUERIES - 1) / QUERIES;
  const Head at = head_of(pr, blockIdx.x / blocks);
  if (flags[at.key] & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * QUERIES;  // causal: the longest first
  if (wanted) {  // bit 4 * (row % 8) + row / 8 of a word for 16 rows: only these, because another kernel has the others
    const int strips = (pr.query_length + 15) / 16;
    wanted += (i64)at.query * strips + i0 / 16;
    u32 any = 0;
    for (int n = 0; n < QUERIES / 16 && i0 / 16 + n < strips; n++) any |= wanted[n];
    if (!any) return;
  }
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
  const bool ordered = !CAP && pr.scale > 0.f;  // scores are products times one factor, in their order
  auto k_tile = [&](int tile) { return k_tiles + (tile - first) % 2 * KEYS * (DP + PAD); };
  auto x_tile = [&](int tile) { return x_tiles + (tile - first) % 2 * KEYS * (XP + PAD); };
  auto begin_k = [&](int tile) { if (tile < end) tile_begin<KEYS, DP, WIDTH>(k_tile(tile), k, tile * KEYS, at.k_end); };
  auto begin_x = [&](int tile) { if (tile < end) tile_begin<KEYS, XP, XP>(x_tile(tile), x, tile * KEYS, at.k_end); };

  // q where the second tile of k will be, or beside the others
  element* q_tile = HELD_Q ? k_tile(first + 1) : x_tiles + 2 * KEYS * (XP + PAD);  // [QUERIES, DP]
  tile_begin<QUERIES, DP, WIDTH>(q_tile, q, i0, pr.query_length);
  begin_k(first);
  copy_wait();
  __syncthreads();
#if HELD_Q
  Left held[DP / 16];
#pragma unroll
  for (int d = 0; d < DP / 16; d++) load_a(held[d], q_tile + warp * 16 * (DP + PAD) + d * 16, DP + PAD);
#endif

  // s += a part of q · kᵀ: the columns d * 16 … d * 16 + 15
  auto add_scores = [&](float (&s)[STRIPS][KEYS / 8][4], const element* tile, int d) {
    Left a[STRIPS];
#pragma unroll
    for (int w = 0; w < STRIPS; w++) {
#if HELD_Q
      a[w] = held[d];
#else
      load_a(a[w], q_tile + (warp * STRIPS + w) * 16 * (DP + PAD) + d * 16, DP + PAD);
#endif
    }
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
      Right b;
      load_b(b, tile + j * 16 * (DP + PAD) + d * 16, DP + PAD);
#pragma unroll
      for (int w = 0; w < STRIPS; w++) mma(s[w][2 * j], s[w][2 * j + 1], a[w], b);
    }
  };
  float s[STRIPS][KEYS / 8][4] = {};  // [16 * STRIPS, KEYS]
  if (first < end) {
#pragma unroll
    for (int d = 0; d < DP / 16; d++) add_scores(s, k_tile(first), d);
  }
  __syncthreads();  // nobody reads q any more
  begin_k(first + 1);
  begin_x(first);
  copy_wait();
  __syncthreads();

  Left p[STRIPS][KEYS / 16];
  bool few[STRIPS][2], any_few = false;
  for (int tile = first; tile < end; tile++) {
    const int j0 = tile * KEYS;
    begin_k(tile + 2);
    begin_x(tile + 1);

    // A product of q and k that is not finite makes NaN of a row that sees it, and nothing of one that does not. Where
    // few keys carry a row, the rounding of X does not average out; each row decides that for itself, so that its bits
    // do not depend on its neighbours.
    const bool whole = all_visible(pr, at, i0, least(i0 + QUERIES, pr.query_length), j0, j0 + KEYS);
    const bool direct = ordered && !at.mask && !at.bias;
    const float factor = direct ? pr.scale * UNIT : 1.f;
#pragma unroll
    for (int w = 0; w < STRIPS; w++) {
      if (whole && direct) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) l[w][r / 2] = fmaf(s[w][j][r], 0.f, l[w][r / 2]);
      } else if (direct) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int i = own + w * 16 + h * 8, from = i + pr.low - j0, to = i < at.q_end ? least(at.k_end - 1, i + pr.high) - j0 : -1;
#pragma unroll
          for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
              const int column = j * 8 + t * 2 + r;
              float& one = s[w][j][2 * h + r];
              const bool seen = column >= from && column <= to;
              l[w][h] = seen ? fmaf(one, 0.f, l[w][h]) : l[w][h];
              one = seen ? one : -INF;
            }
        }
      } else {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) {
            float slope, bias;
            const bool seen = visible(pr, at, own + w * 16 + r / 2 * 8, j0 + j * 8 + t * 2 + r % 2, bias);
            l[w][r / 2] = seen ? fmaf(s[w][j][r], 0.f, fmaf(bias, 0.f, l[w][r / 2])) : l[w][r / 2];
            s[w][j][r] = seen ? score(pr, s[w][j][r], slope) + bias : -INF;
          }
      }
    }
    float minus_m[STRIPS][2], ahead[STRIPS][2];
    bool grows = false;
#pragma unroll
    for (int w = 0; w < STRIPS; w++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = -INF;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(s[w][j][2 * h], s[w][j][2 * h + 1]));
        top = row_max(top);
        ahead[w][h] = top == -INF ? -INF : top * factor;
        grows |= ahead[w][h] > m[w][h] + SLACK;
      }
    if (warp_any(grows)) {
#pragma unroll
      for (int w = 0; w < STRIPS; w++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float next = ahead[w][h] > m[w][h] + SLACK ? ahead[w][h] : m[w][h];
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
    for (int w = 0; w < STRIPS; w++)
#pragma unroll
      for (int h = 0; h < 2; h++) minus_m[w][h] = P_SHIFT - (m[w][h] == -INF ? 0.f : m[w][h]);

    // The weights of this tile, step by step with the scores of the next one: exponentials and products overlap. Beyond the
    // last tile the scores are of no use, but of numbers that are there.
    float next_s[STRIPS][KEYS / 8][4] = {};
    constexpr int STEPS = DP / 16 > KEYS / 16 ? DP / 16 : KEYS / 16;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step < DP / 16) add_scores(next_s, k_tile(tile + 1), step);
#pragma unroll
      for (int j = step * (KEYS / 16) / STEPS; j < (step + 1) * (KEYS / 16) / STEPS; j++)
#pragma unroll
        for (int w = 0; w < STRIPS; w++) {
#pragma unroll
          for (int r = 0; r < 8; r++) {
            float& one = s[w][2 * j + r / 4][r % 4];
            one = exp_fast(fmaf(one, factor, minus_m[w][r % 4 / 2]));
            l[w][r % 4 / 2] += one;
          }
          left_of(p[w][j], s[w][2 * j], s[w][2 * j + 1]);
        }
    }
#if !FLOAT32
    any_few = false;
#pragma unroll
    for (int w = 0; w < STRIPS; w++) {
      const u32 one = pack(1.f, 1.f);
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) mma(total[w], p[w][j].x, one, one);
#pragma unroll
      for (int h = 0; h < 2; h++) {  // few keys are seen, or one of this tile is more than a quarter of all so far
        few[w][h] = !whole || total[w][2 * h] < 4.f * (1 << P_SHIFT) * exp_fast(ahead[w][h] - m[w][h]);
        any_few |= few[w][h];
      }
    }
#endif
    add_product(acc, p, x_tile(tile));
    copy_wait();
    const bool again = __syncthreads_or(any_few);  // k and x of the next tiles are there, and nobody reads those of this one
#if !FLOAT32
    if (again) {
#pragma unroll
      for (int w = 0; w < STRIPS; w++)
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) p[w][j].x[r] = few[w][r % 2] ? shifted(p[w][j].x[r], -REST_SHIFT) : 0;
      tile_begin<KEYS, XP, XP>(x_tile(tile), rest, j0, at.k_end);
      copy_wait();
      __syncthreads();  // rest is there
      add_product(acc, p, x_tile(tile));
      __syncthreads();  // nobody reads rest any more
    }
#endif
#pragma unroll
    for (int w = 0; w < STRIPS; w++)
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) s[w][j][r] = next_s[w][j][r];
  }
  copy_wait();

  const int* own_c = c + (i64)at.key * CP;
  const i64 row = (i64)at.query * pr.query_length + own;
  bool there[STRIPS][2], empty[STRIPS][2];
  float over_total[STRIPS][2];
#pragma unroll
  for (int w = 0; w < STRIPS; w++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = row_sum(l[w][h]);
      there[w][h] = own + w * 16 + h * 8 < pr.query_length && (!wanted || wanted[warp * STRIPS + w] >> 4 * g + h & 1);
      empty[w][h] = sum == 0.f;
      over_total[w][h] = sum == sum ? 1.f / (FLOAT32 ? sum : total[w][2 * h]) : NOT_A_NUMBER;
      if (t == 0 && there[w][h]) lse[row + w * 16 + h * 8] = empty[w][h] ? -INF : (m[w][h] - P_SHIFT) / UNIT + logf(sum);
    }
  const float inverse_of_beta = inverse_of(pr.beta);
  out += row * pr.value_dim;
  if (residual) residual += row * pr.value_dim;
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
          if (residual) store_two(residual + to, o[0], o[1]);
        } else if (there[w][h]) {
          for (int r = 0; r < 2; r++)
            if (channel + r < pr.value_dim) {
              out[to + r] = narrow(o[r]);
              if (residual) residual[to + r] = o[r];
            }
        }
      }
  }
}
