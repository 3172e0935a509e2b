// The exact path backward, for heads outside the fast range: with w = p * exp(beta*(v - o)) for each channel
//
//     ds = Σ_e do_e (w_e - p)/beta + dl p        dv = Σ_i do w        dq = ds·K        dk = dsᵀ·Q
//
// p is kept as its logarithm, so that w is finite wherever p alone would be zero. A block takes a row at a time, and all blocks
// share the rows of all such heads: mostly there are none.

// log p of one pair; −infinity where hidden or where nothing flows. `slope` is that of the cap
__device__ __forceinline__ float log_weight(const Problem& p, const Head& at, float product, float mark, float l, int i,
                                            int j, float& slope) {
  float bias;
  slope = 1.f;
  if (!visible(p, at, i, j, bias) || l == INF) return -INF;
  return (score(p, product, bias, slope) - l + mark) / UNIT;
}

// (w - p)/beta of one channel, and w
__device__ __forceinline__ float slope_of(float log_p, float weight, float beta, float v, float o, float& w) {
  const float z = v - o, y = beta * z;
  w = expf(log_p + y);
  return fabsf(y) <= 1.f ? weight * z * expm1_over(y) : (w - weight) / beta;
}

// ds of one pair, without the slope of the cap
__device__ __forceinline__ float score_gradient(const Problem& p, int head, float log_p, float dl, const element* v,
                                                const Unrounded& kept, const element* out, const element* d_out, i64 row) {
  const float weight = expf(log_p);
  float sum = 0.f, w;
  for (int e = 0; e < p.value_dim; e++) {
    const float one = widen(d_out[row + e]);
    if (one != 0.f) sum = fmaf(one, slope_of(log_p, weight, beta_of(p, head, e), widen(v[e]), kept.load(out, row + e), w), sum);
  }
  return fmaf(dl, weight, sum);
}

__device__ __forceinline__ bool any_outside(const int* flags, int heads) {
  int all = 0;
  for (int n = threadIdx.x; n < heads; n += THREADS) all |= flags[n];
  return __syncthreads_or(all & OUTSIDE);
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_queries_exact(
    PROBLEM, const element* q, const element* k, const element* v, float* o, short* rest, const element* out,
    const element* d_out, const float* d_lse, const float* l, const float* marks, const int* flags, element* dq, int heads,
    int workers) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* row = (float*)raw;  // [DP] the query
  float* ds = row + DP;      // [THREADS]
  if (!any_outside(flags, heads)) return;
  const int tid = threadIdx.x;
  int i = blockIdx.x;  // the next row of this block, counted from the first one of a head
  for (int head = 0; head < heads * p.group; head++) {
    const Head at = head_of(p, head);
    if (!(flags[at.key] & OUTSIDE)) continue;
    const i64 keys = (i64)at.key * p.key_length;
    for (; i < p.query_length; i += workers) {
      const i64 from = (i64)at.query * p.query_length + i;
      __syncthreads();
      load_row(row, q + from * WIDTH, WIDTH);
      float acc[(WIDTH + THREADS - 1) / THREADS] = {};
      const int first = greatest(0, i + p.low), end = least(at.k_end, i + p.high + 1);
      for (int j0 = first; j0 < end; j0 += THREADS) {
        const int j = j0 + tid;
        __syncthreads();
        float slope, own = 0.f;
        if (j < end) {
          const float product = product_of(row, k + (keys + j) * WIDTH, WIDTH);
          const float log_p = log_weight(p, at, product, marks[keys + j], l[from], i, j, slope);
          if (!(log_p == -INF))
            own = slope * score_gradient(p, at.h, log_p, d_lse ? d_lse[from] : 0.f, v + (keys + j) * p.value_dim,
                                        {o, rest}, out, d_out, from * p.value_dim);
        }
        ds[tid] = own;
        __syncthreads();
        for (int d = tid; d < WIDTH; d += THREADS)
          for (int n = 0; n < least(THREADS, end - j0); n++)
            if (ds[n] != 0.f) acc[d / THREADS] = fmaf(ds[n], widen(k[(keys + j0 + n) * WIDTH + d]), acc[d / THREADS]);
      }
      for (int d = tid; d < WIDTH; d += THREADS) dq[from * WIDTH + d] = narrow(acc[d / THREADS] * p.scale);
    }
    i -= p.query_length;
  }
}

// dbetas [B*Hkv, workers, EP], or null
extern "C" __global__ void __launch_bounds__(THREADS) backward_keys_exact(
    PROBLEM, const element* q, const element* k, const element* v, float* o, short* rest, const element* out,
    const element* d_out, const float* d_lse, const float* l, const float* marks, const int* flags, element* dk, element* dv, float* dbetas,
    int heads, int workers) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* row = (float*)raw;            // [DP] the key
  float* ds = row + DP;                // [THREADS]
  float* log_weights = ds + THREADS;   // [THREADS]
  if (!any_outside(flags, heads)) return;
  const int tid = threadIdx.x;
  int j = blockIdx.x;  // the next row of this block, counted from the first one of a head
  for (int kv = 0; kv < heads; kv++) {
    if (!(flags[kv] & OUTSIDE)) continue;
    float dbeta[(EP + THREADS - 1) / THREADS] = {};
    for (; j < p.key_length; j += workers) {
      const i64 to = (i64)kv * p.key_length + j;
      __syncthreads();
      load_row(row, k + to * WIDTH, WIDTH);
      float dk_acc[(WIDTH + THREADS - 1) / THREADS] = {}, dv_acc[(EP + THREADS - 1) / THREADS] = {};
      for (int member = 0; member < p.group; member++) {
        const Head at = head_of(p, kv * p.group + member);
        const i64 queries = (i64)at.query * p.query_length;
        const int first = greatest(0, j - p.high), end = least(at.q_end, j - p.low + 1);
        for (int i0 = first; i0 < end; i0 += THREADS) {
          const int i = i0 + tid;
          __syncthreads();
          float slope, own = 0.f, log_p = -INF;
          if (i < end) {
            const i64 from = queries + i;
            const float product = product_of(row, q + from * WIDTH, WIDTH);
            log_p = log_weight(p, at, product, marks[to], l[from], i, j, slope);
            if (!(log_p == -INF))
              own = slope * score_gradient(p, at.h, log_p, d_lse ? d_lse[from] : 0.f, v + to * p.value_dim,
                                          {o, rest}, out, d_out, from * p.value_dim);
          }
          ds[tid] = own;
          log_weights[tid] = log_p;
          __syncthreads();
          for (int n = 0; n < least(THREADS, end - i0); n++) {
            if (log_weights[n] == -INF) continue;
            const i64 from = queries + i0 + n;
            for (int d = tid; d < WIDTH; d += THREADS)
              dk_acc[d / THREADS] = fmaf(ds[n], widen(q[from * WIDTH + d]), dk_acc[d / THREADS]);
            for (int e = tid; e < p.value_dim; e += THREADS) {
              const float one = widen(d_out[from * p.value_dim + e]), mean = Unrounded{o, rest}.load(out, from * p.value_dim + e);
              const float value = widen(v[to * p.value_dim + e]), beta = beta_of(p, at.h, e);
              const float weight = expf(log_weights[n]), z = value - mean;
              float w;
              const float part = slope_of(log_weights[n], weight, beta, value, mean, w);
              if (one == 0.f) continue;
              dv_acc[e / THREADS] = fmaf(one, w, dv_acc[e / THREADS]);
              const float curve = fabsf(beta * z) <= 1.f ? weight * z * z * curvature(beta * z) : (w * z - part) / beta;
              if (dbetas) dbeta[e / THREADS] = fmaf(one, curve, dbeta[e / THREADS]);
            }
          }
        }
      }
      for (int d = tid; d < WIDTH; d += THREADS) dk[to * WIDTH + d] = narrow(dk_acc[d / THREADS] * p.scale);
      for (int e = tid; e < p.value_dim; e += THREADS) dv[to * p.value_dim + e] = narrow(dv_acc[e / THREADS]);
    }
    j -= p.key_length;
    if (dbetas)
      for (int e = tid; e < EP; e += THREADS) dbetas[((i64)kv * workers + blockIdx.x) * EP + e] = dbeta[e / THREADS];
  }
}
