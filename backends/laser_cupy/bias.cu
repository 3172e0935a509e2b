// Gradients of what is broadcast: parts of those of beta and of a bias, which the host adds up. Every sum has one order.

// What the rows of a head add to the gradient of beta: that of the keys is in backward_keys. parts [B*Hq, chunks, EP]
extern "C" __global__ void __launch_bounds__(THREADS) backward_beta(
    PROBLEM, const float* o, const element* d_out, const float* l, const int* c, const int* flags, float* parts, int chunks,
    int chunk) {
  const Problem p = THE_PROBLEM;
  const int query = blockIdx.x / chunks, start = blockIdx.x % chunks * chunk, kv = query / p.group;
  if (flags[kv] & OUTSIDE) return;
  for (int e = threadIdx.x; e < EP; e += THREADS) {
    const float beta = e < p.value_dim ? beta_of(p, query % p.query_heads, e) : 0.f;
    const float centre = EXP && beta != 0.f ? c[(i64)kv * CP + e] * LN2 / beta : 0.f;
    float sum = 0.f;
    for (int i = start; e < p.value_dim && i < least(start + chunk, p.query_length); i++) {
      const i64 row = (i64)query * p.query_length + i;
      const float mean = o[row * p.value_dim + e], one = widen(d_out[row * p.value_dim + e]), y = beta * mean;
      if (one == 0.f || l[row] == INF) continue;
      if (is_linear(beta, y)) {
        const float s = mean * expm1_over(y);
        sum -= one * expf(-y) * s * s * defect(beta * s);
      } else {
        sum -= one * (mean - centre) / beta;
      }
    }
    parts[(i64)blockIdx.x * EP + e] = sum;
  }
}

// ds for the gradient of a bias. A block owns 64 queries and `chunk` keys, and if `reduce_b`, `reduce_h`, goes through all of
// that axis. `rows`: there is a query axis, or else a row is the sum of 16 of a warp; `columns`: a key axis, or else one for each
// chunk. parts [B or 1, Hq or 1, Lq or 4 for each 64 of it, Lk or chunks], zero at the beginning.
extern "C" __global__ void __launch_bounds__(THREADS) backward_bias(
    PROBLEM, const element* q, const element* k, const element* v, const element* x, const element* g, float* o,
    const element* d_out, const float* d_lse, const float* l, const float* r, const float* marks, const int* scales,
    const int* flags, float* parts, int batch, int reduce_b, int reduce_h, int rows, int columns, int chunks, int chunk) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  const int blocks = (pr.query_length + BLOCK - 1) / BLOCK;
  const int part = blockIdx.x % chunks, block = blockIdx.x / chunks % blocks, head = blockIdx.x / chunks / blocks;
  const int own_heads = reduce_h ? 1 : pr.query_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * 16 + lane / 4, t = lane % 4;
  const int i0 = block * BLOCK, height = rows ? pr.query_length : 4 * blocks, width = columns ? pr.key_length : chunks;
  const int j_end = least(pr.key_length, (part + 1) * chunk);
  parts += (i64)head * height * width;
  for (int b = reduce_b ? 0 : head / own_heads; b < (reduce_b ? batch : head / own_heads + 1); b++)
    for (int h = reduce_h ? 0 : head % own_heads; h < (reduce_h ? pr.query_heads : head % own_heads + 1); h++) {
      const Head at = head_of(pr, b * pr.query_heads + h);
      float sums[2] = {0.f, 0.f};  // of rows, where there is no key axis
      auto use = [&](int j0, const float(&all)[1][INNER / 8][4], const element*) {
        const float(&ds)[INNER / 8][4] = all[0];
#pragma unroll
        for (int n = 0; n < INNER / 8; n++) {
          if (!columns) {
            for (int w = 0; w < 4; w++) sums[w / 2] += ds[n][w];
          } else if (rows) {
            for (int w = 0; w < 4; w++) {
              const int i = i0 + own + w / 2 * 8, j = j0 + n * 8 + t * 2 + w % 2;
              if (i < pr.query_length && j < pr.key_length) parts[(i64)i * width + j] += ds[n][w];
            }
          } else {
            for (int w = 0; w < 2; w++) {
              float sum = ds[n][w] + ds[n][w + 2];
              for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, other);
              const int j = j0 + n * 8 + t * 2 + w;
              if (lane < 4 && j < pr.key_length) parts[(i64)(block * 4 + warp) * width + j] += sum;
            }
          }
        }
      };
      __syncthreads();  // nobody reads tiles of another head any more
      if (flags[at.key] & OUTSIDE) {
        for (int j0 = part * chunk; j0 < j_end; j0 += INNER) {
          float ds[1][INNER / 8][4] = {};
#pragma unroll 1
          for (int n = 0; n < INNER / 2; n++) {
            const int i = i0 + own + n % 4 / 2 * 8, j = j0 + n / 4 * 8 + t * 2 + n % 2;
            if (i >= at.q_end || j >= at.k_end) continue;
            const i64 row = (i64)at.query * pr.query_length + i, key = (i64)at.key * pr.key_length + j;
            float product = 0.f, slope;
            for (int d = 0; d < WIDTH; d++) product = fmaf(widen(q[row * WIDTH + d]), widen(k[key * WIDTH + d]), product);
            const float log_p = log_weight(pr, at, product, marks[key], l[row], i, j, slope);
            if (log_p == -INF) continue;
            const float one = score_gradient(pr, at.h, log_p, d_lse ? d_lse[row] : 0.f, v + key * pr.value_dim,
                                             {o, nullptr}, nullptr, d_out, row * pr.value_dim);
#pragma unroll
            for (int w = 0; w < INNER / 2; w++) ds[0][w / 4][w % 4] = w == n ? one : ds[0][w / 4][w % 4];
          }
          use(j0, ds, nullptr);
        }
      } else {
        walk_over_keys<false, 1>(pr, raw, at, flags[at.key], i0, part * chunk, j_end, factors(scales + 2 * at.key), q, k, x, g, l, r,
                              marks, use);
      }
      if (columns) continue;
      for (int w = 0; w < 2; w++) {
        const int i = i0 + own + w * 8;
        const float sum = row_sum(sums[w]);
        if (t == 0 && i < pr.query_length) parts[(i64)i * width + part] += sum;
      }
    }
}
