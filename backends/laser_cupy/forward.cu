// Forward: flash attention over (q, k, X), and o = log(acc/l * 2^c)/beta at the end.
//
// A block of 4 warps owns 64 queries, a warp 16 of them, and walks over tiles of 64 keys. acc, m and l stay in float32
// registers. K of the next tile is on its way while this one's weights are made, X while its scores are.

// acc [16, EP] += p [16, 64] · x [64, EP]
__device__ __forceinline__ void add_product(float (&acc)[EP / 8][4], const u32 (&p)[BLOCK / 16][4], const u16* x) {
#pragma unroll
  for (int k = 0; k < BLOCK / 16; k++)
#pragma unroll
    for (int e = 0; e < EP / 16; e++) {
      u32 b[4];
      load_b_transposed(b, x + k * 16 * (EP + 8) + e * 16, EP + 8);
      mma(acc[2 * e], p[k], b[0], b[1]);
      mma(acc[2 * e + 1], p[k], b[2], b[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(
    PROBLEM, const u16* q, const u16* k, const u16* x, const u16* rest, const int* c, const int* flags, u16* out,
    float* residual, float* lse) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  u16* q_tile = (u16*)raw;                       // [64, DP]
  u16* k_tile = q_tile + BLOCK * (DP + 8);       // [64, DP]
  u16* x_tile = k_tile + BLOCK * (DP + 8);       // [64, EP]
  const int blocks = (pr.query_length + BLOCK - 1) / BLOCK;
  const Head at = head_of(pr, blockIdx.x / blocks);
  if (flags[at.key] & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * BLOCK;  // causal: the longest first
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const i64 keys = (i64)at.key * pr.key_length;
  q += (i64)at.query * pr.query_length * pr.head_dim;
  k += keys * pr.head_dim;
  x += keys * EP;
  rest += keys * EP;

  float acc[EP / 8][4] = {}, total[4] = {};  // total: the sum of the rounded weights
  float m[2] = {-INF, -INF}, l[2] = {0.f, 0.f};
  const int i1 = least(i0 + BLOCK, at.q_end);
  const int first = greatest(0, i0 + pr.low) / BLOCK;
  const int end = i1 <= i0 ? 0 : (least(at.k_end, i1 + pr.high) + BLOCK - 1) / BLOCK;
  tile_begin<BLOCK, DP>(q_tile, q, i0, pr.query_length, pr.head_dim);
  if (first < end) tile_begin<BLOCK, DP>(k_tile, k, first * BLOCK, at.k_end, pr.head_dim);
  for (int tile = first; tile < end; tile++) {
    const int j0 = tile * BLOCK;
    copy_wait();
    __syncthreads();  // k is there, and nobody reads x any more
    tile_begin<BLOCK, EP>(x_tile, x, j0, at.k_end, EP);

    float s[BLOCK / 8][4] = {};  // [16, 64]
#pragma unroll
    for (int d = 0; d < DP / 16; d++) {
      u32 a[4];
      load_a(a, q_tile + warp * 16 * (DP + 8) + d * 16, DP + 8);
#pragma unroll
      for (int j = 0; j < BLOCK / 16; j++) {
        u32 b[4];
        load_b(b, k_tile + j * 16 * (DP + 8) + d * 16, DP + 8);
        mma(s[2 * j], a, b[0], b[1]);
        mma(s[2 * j + 1], a, b[2], b[3]);
      }
    }
    copy_wait();
    __syncthreads();  // x is there, and nobody reads k any more
    if (tile + 1 < end) tile_begin<BLOCK, DP>(k_tile, k, j0 + BLOCK, at.k_end, pr.head_dim);

    // a product of q and k that is not finite makes NaN of a row that sees it, and nothing of one that does not
    const bool partial = !all_visible(pr, at, i0, least(i0 + BLOCK, pr.query_length), j0, j0 + BLOCK);
    float top[2] = {m[0], m[1]};
    if (partial) {
#pragma unroll
      for (int j = 0; j < BLOCK / 8; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float slope;
          const bool seen = visible(pr, at, i0 + warp * 16 + g + r / 2 * 8, j0 + j * 8 + t * 2 + r % 2);
          l[r / 2] = seen ? fmaf(s[j][r], 0.f, l[r / 2]) : l[r / 2];
          s[j][r] = seen ? score(pr, s[j][r], slope) : -INF;
        }
    } else {
#pragma unroll
      for (int j = 0; j < BLOCK / 8; j++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          float slope;
          l[r / 2] = fmaf(s[j][r], 0.f, l[r / 2]);
          s[j][r] = score(pr, s[j][r], slope);
        }
    }
#pragma unroll
    for (int j = 0; j < BLOCK / 8; j++)
#pragma unroll
      for (int r = 0; r < 4; r++) top[r / 2] = fmaxf(top[r / 2], s[j][r]);
    float minus_m[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] = row_max(top[h]);
      const float reference = top[h] == -INF ? 0.f : top[h];
      minus_m[h] = P_SHIFT - reference;
      const float shrink = exp2_fast(m[h] - reference);
      m[h] = top[h];
      l[h] *= shrink;
      total[2 * h] *= shrink;
#pragma unroll
      for (int e = 0; e < EP / 8; e++) {
        acc[e][2 * h] *= shrink;
        acc[e][2 * h + 1] *= shrink;
      }
    }
    u32 p[BLOCK / 16][4];  // the left operand [16, 64]
#pragma unroll
    for (int j = 0; j < BLOCK / 8; j++) {
#pragma unroll
      for (int r = 0; r < 4; r++) {
        s[j][r] = exp2_fast(s[j][r] + minus_m[r / 2]);
        l[r / 2] += s[j][r];
      }
      p[j / 2][j % 2 * 2] = pack(s[j][0], s[j][1]);
      p[j / 2][j % 2 * 2 + 1] = pack(s[j][2], s[j][3]);
    }
    const u32 one = pack(1.f, 1.f);
#pragma unroll
    for (int j = 0; j < BLOCK / 16; j++) mma(total, p[j], one, one);
    add_product(acc, p, x_tile);
    // Where few keys carry a row, the rounding of X does not average out. Each row decides for itself, so that its bits
    // do not depend on its neighbours.
    bool few[2];
#pragma unroll
    for (int h = 0; h < 2; h++) few[h] = partial || total[2 * h] < 4.f * (1 << P_SHIFT);
    if (__syncthreads_or(few[0] || few[1])) {
#pragma unroll
      for (int j = 0; j < BLOCK / 16; j++)
#pragma unroll
        for (int r = 0; r < 4; r++)
          p[j][r] = few[r % 2] ? pack(scaled(widen((u16)p[j][r]), -REST_SHIFT), scaled(widen((u16)(p[j][r] >> 16)), -REST_SHIFT)) : 0;
      tile_begin<BLOCK, EP>(x_tile, rest, j0, at.k_end, EP);
      copy_wait();
      __syncthreads();
      add_product(acc, p, x_tile);
    }
  }
  copy_wait();

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = row_sum(l[h]);
    const int i = i0 + warp * 16 + g + h * 8;
    if (i >= pr.query_length) continue;
    const i64 row = (i64)at.query * pr.query_length + i;
    const bool empty = sum == 0.f;
    if (t == 0) lse[row] = empty ? -INF : (m[h] - P_SHIFT) * LN2 + logf(sum);
#pragma unroll
    for (int e = 0; e < EP / 8; e++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int channel = e * 8 + t * 2 + r;
        if (channel >= pr.value_dim) continue;
        const float a = sum == sum ? acc[e][2 * h + r] / total[2 * h] : NOT_A_NUMBER;
        const float o = empty ? 0.f : split_log(a, c[(i64)at.key * EP + channel]) / pr.beta;
        out[row * pr.value_dim + channel] = round16(o);
        residual[row * pr.value_dim + channel] = o;
      }
  }
}
