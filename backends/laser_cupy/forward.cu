// Forward: flash attention over (q, k, X), and o = log(acc/l * 2^c)/beta at the end.
//
// A block of 4 warps owns QUERIES queries, a warp 16 * STRIPS of them, and walks over tiles of KEYS keys. acc, m and l stay
// in float32 registers. K of the next tile is on its way while this one's weights are made, X while its scores are.

#define QUERIES (64 * STRIPS)

// acc [16 * STRIPS, EP] += p [16 * STRIPS, KEYS] · x [KEYS, EP]
__device__ __forceinline__ void add_product(float (&acc)[STRIPS][EP / 8][4], const u32 (&p)[STRIPS][KEYS / 16][4],
                                            const u16* x) {
#pragma unroll
  for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
    for (int e = 0; e < EP / 16; e++) {
      u32 b[4];
      load_b_transposed(b, x + k * 16 * (EP + 8) + e * 16, EP + 8);
#pragma unroll
      for (int w = 0; w < STRIPS; w++) {
        mma(acc[w][2 * e], p[w][k], b[0], b[1]);
        mma(acc[w][2 * e + 1], p[w][k], b[2], b[3]);
      }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(
    PROBLEM, const u16* q, const u16* k, const u16* x, const u16* rest, const int* c, const int* flags, u16* out,
    float* residual, float* lse) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  u16* q_tile = (u16*)raw;                      // [QUERIES, DP]
  u16* k_tile = q_tile + QUERIES * (DP + 8);    // [KEYS, DP]
  u16* x_tile = k_tile + KEYS * (DP + 8);       // [KEYS, EP]
  const int blocks = (pr.query_length + QUERIES - 1) / QUERIES;
  const Head at = head_of(pr, blockIdx.x / blocks);
  if (flags[at.key] & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * QUERIES;  // causal: the longest first
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int own = i0 + warp * 16 * STRIPS + g;  // the first row of this thread; others are 8 * n further
  const i64 keys = (i64)at.key * pr.key_length;
  q += (i64)at.query * pr.query_length * pr.head_dim;
  k += keys * pr.head_dim;
  x += keys * EP;
  rest += keys * EP;

  float acc[STRIPS][EP / 8][4] = {}, total[STRIPS][4] = {};  // total: the sum of the rounded weights
  float m[STRIPS][2], l[STRIPS][2];
  for (int w = 0; w < STRIPS; w++)
    for (int h = 0; h < 2; h++) { m[w][h] = -INF; l[w][h] = 0.f; }
  const int i1 = least(i0 + QUERIES, at.q_end);
  const int first = greatest(0, i0 + pr.low) / KEYS;
  const int end = i1 <= i0 ? 0 : (least(at.k_end, i1 + pr.high) + KEYS - 1) / KEYS;
  tile_begin<QUERIES, DP>(q_tile, q, i0, pr.query_length, pr.head_dim);
  if (first < end) tile_begin<KEYS, DP>(k_tile, k, first * KEYS, at.k_end, pr.head_dim);
  for (int tile = first; tile < end; tile++) {
    const int j0 = tile * KEYS;
    copy_wait();
    __syncthreads();  // k is there, and nobody reads x any more
    tile_begin<KEYS, EP>(x_tile, x, j0, at.k_end, EP);

    float s[STRIPS][KEYS / 8][4] = {};  // [16 * STRIPS, KEYS]
#pragma unroll
    for (int d = 0; d < DP / 16; d++) {
      u32 a[STRIPS][4];
#pragma unroll
      for (int w = 0; w < STRIPS; w++) load_a(a[w], q_tile + (warp * STRIPS + w) * 16 * (DP + 8) + d * 16, DP + 8);
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) {
        u32 b[4];
        load_b(b, k_tile + j * 16 * (DP + 8) + d * 16, DP + 8);
#pragma unroll
        for (int w = 0; w < STRIPS; w++) {
          mma(s[w][2 * j], a[w], b[0], b[1]);
          mma(s[w][2 * j + 1], a[w], b[2], b[3]);
        }
      }
    }
    copy_wait();
    __syncthreads();  // x is there, and nobody reads k any more
    if (tile + 1 < end) tile_begin<KEYS, DP>(k_tile, k, j0 + KEYS, at.k_end, pr.head_dim);

    // A product of q and k that is not finite makes NaN of a row that sees it, and nothing of one that does not. Where
    // few keys carry a row, the rounding of X does not average out; each row decides that for itself, so that its bits
    // do not depend on its neighbours.
    const bool partial = !all_visible(pr, at, i0, least(i0 + QUERIES, pr.query_length), j0, j0 + KEYS);
    const bool direct = !partial && !CAP && pr.scale >= 0.f;  // scores are products times one factor, in their order
    const float factor = direct ? pr.scale * LOG2E : 1.f;
    u32 p[STRIPS][KEYS / 16][4];  // the left operand [16 * STRIPS, KEYS]
    bool few[STRIPS][2], any_few = false;
#pragma unroll
    for (int w = 0; w < STRIPS; w++) {
      if (partial) {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) {
            float slope;
            const bool seen = visible(pr, at, own + w * 16 + r / 2 * 8, j0 + j * 8 + t * 2 + r % 2);
            l[w][r / 2] = seen ? fmaf(s[w][j][r], 0.f, l[w][r / 2]) : l[w][r / 2];
            s[w][j][r] = seen ? score(pr, s[w][j][r], slope) : -INF;
          }
      } else {
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) {
            float slope;
            l[w][r / 2] = fmaf(s[w][j][r], 0.f, l[w][r / 2]);
            if (!direct) s[w][j][r] = score(pr, s[w][j][r], slope);
          }
      }
      float minus_m[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float top = -INF;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(s[w][j][2 * h], s[w][j][2 * h + 1]));
        top = fmaxf(m[w][h], row_max(top * factor));
        const float reference = top == -INF ? 0.f : top;
        minus_m[h] = P_SHIFT - reference;
        const float shrink = exp2_fast(m[w][h] - reference);
        m[w][h] = top;
        l[w][h] *= shrink;
        total[w][2 * h] *= shrink;
#pragma unroll
        for (int e = 0; e < EP / 8; e++) {
          acc[w][e][2 * h] *= shrink;
          acc[w][e][2 * h + 1] *= shrink;
        }
      }
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
          s[w][j][r] = exp2_fast(fmaf(s[w][j][r], factor, minus_m[r / 2]));
          l[w][r / 2] += s[w][j][r];
        }
        p[w][j / 2][j % 2 * 2] = pack(s[w][j][0], s[w][j][1]);
        p[w][j / 2][j % 2 * 2 + 1] = pack(s[w][j][2], s[w][j][3]);
      }
      const u32 one = pack(1.f, 1.f);
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) mma(total[w], p[w][j], one, one);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        few[w][h] = partial || total[w][2 * h] < 4.f * (1 << P_SHIFT);
        any_few |= few[w][h];
      }
    }
    add_product(acc, p, x_tile);
    if (__syncthreads_or(any_few)) {
#pragma unroll
      for (int w = 0; w < STRIPS; w++)
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
          for (int r = 0; r < 4; r++) p[w][j][r] = few[w][r % 2] ? shifted(p[w][j][r], -REST_SHIFT) : 0;
      tile_begin<KEYS, EP>(x_tile, rest, j0, at.k_end, EP);
      copy_wait();
      __syncthreads();
      add_product(acc, p, x_tile);
    }
  }
  copy_wait();

#pragma unroll
  for (int w = 0; w < STRIPS; w++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = row_sum(l[w][h]);
      const int i = own + w * 16 + h * 8;
      if (i >= pr.query_length) continue;
      const i64 row = (i64)at.query * pr.query_length + i;
      const bool empty = sum == 0.f;
      if (t == 0) lse[row] = empty ? -INF : (m[w][h] - P_SHIFT) * LN2 + logf(sum);
#pragma unroll
      for (int e = 0; e < EP / 8; e++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int channel = e * 8 + t * 2 + r;
          if (channel >= pr.value_dim) continue;
          const float a = sum == sum ? acc[w][e][2 * h + r] / total[w][2 * h] : NOT_A_NUMBER;
          const float o = empty ? 0.f : split_log(a, c[(i64)at.key * EP + channel]) / pr.beta;
          out[row * pr.value_dim + channel] = round16(o);
          residual[row * pr.value_dim + channel] = o;
        }
    }
}
