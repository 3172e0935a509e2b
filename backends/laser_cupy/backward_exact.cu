// The exact path backward, for heads outside the fast range: with w = p * exp(beta*(v - o)) for each channel
//
//     ds = Σ_e do_e (w_e - p)/beta + dl p        dv = Σ_i do w        dq = ds·K        dk = dsᵀ·Q
//
// p is kept as its logarithm, so that w is finite wherever p alone would be zero. A block takes a row at a time.

// log p of one pair; −infinity where hidden or where nothing flows. `slope` is that of the cap
__device__ __forceinline__ float log_weight(const Problem& p, const Head& at, float product, float mark, float l, int i,
                                            int j, float& slope) {
  slope = 1.f;
  if (!visible(p, at, i, j) || l == INF) return -INF;
  return (score(p, product, slope) + mark - l) * LN2;
}

// ds of one pair, without the slope of the cap
__device__ __forceinline__ float score_gradient(const Problem& p, float log_p, float dl, const u16* v, const float* o,
                                                const u16* d_out) {
  const float weight = expf(log_p);
  float sum = 0.f;
  for (int e = 0; e < p.value_dim; e++) {
    const float one = widen(d_out[e]);
    if (one == 0.f) continue;
    const float y = p.beta * (widen(v[e]) - o[e]);
    sum = fmaf(one, fabsf(y) <= 1.f ? weight * expm1f(y) : expf(log_p + y) - weight, sum);
  }
  return sum / p.beta + dl * weight;
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_queries_exact(
    PROBLEM, const u16* q, const u16* k, const u16* v, const float* o, const u16* d_out, const float* d_lse,
    const float* l, const float* marks, const int* flags, u16* dq, int workers) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* row = (float*)raw;  // [DP] the query
  float* ds = row + DP;      // [THREADS]
  const Head at = head_of(p, blockIdx.x / workers);
  if (!(flags[at.key] & OUTSIDE)) return;
  const i64 keys = (i64)at.key * p.key_length;
  const int tid = threadIdx.x;
  for (int i = blockIdx.x % workers; i < p.query_length; i += workers) {
    const i64 from = (i64)at.query * p.query_length + i;
    __syncthreads();
    load_row(row, q + from * p.head_dim, p.head_dim);
    float acc = 0.f;
    const int first = greatest(0, i + p.low), end = least(at.k_end, i + p.high + 1);
    for (int j0 = first; j0 < end; j0 += THREADS) {
      const int j = j0 + tid;
      __syncthreads();
      float slope, own = 0.f;
      if (j < end) {
        const float product = product_of(row, k + (keys + j) * p.head_dim, p.head_dim);
        const float log_p = log_weight(p, at, product, marks[keys + j], l[from], i, j, slope);
        if (!(log_p == -INF))
          own = slope * score_gradient(p, log_p, d_lse ? d_lse[from] : 0.f, v + (keys + j) * p.value_dim,
                                       o + from * p.value_dim, d_out + from * p.value_dim);
      }
      ds[tid] = own;
      __syncthreads();
      if (tid < p.head_dim)
        for (int n = 0; n < least(THREADS, end - j0); n++)
          if (ds[n] != 0.f) acc = fmaf(ds[n], widen(k[(keys + j0 + n) * p.head_dim + tid]), acc);
    }
    if (tid < p.head_dim) dq[from * p.head_dim + tid] = round16(acc * p.scale);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) backward_keys_exact(
    PROBLEM, const u16* q, const u16* k, const u16* v, const float* o, const u16* d_out, const float* d_lse,
    const float* l, const float* marks, const int* flags, u16* dk, u16* dv, int workers) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* row = (float*)raw;            // [DP] the key
  float* ds = row + DP;                // [THREADS]
  float* log_weights = ds + THREADS;   // [THREADS]
  const int kv = blockIdx.x / workers;
  if (!(flags[kv] & OUTSIDE)) return;
  const int tid = threadIdx.x;
  for (int j = blockIdx.x % workers; j < p.key_length; j += workers) {
    const i64 to = (i64)kv * p.key_length + j;
    __syncthreads();
    load_row(row, k + to * p.head_dim, p.head_dim);
    const float value = tid < p.value_dim ? widen(v[to * p.value_dim + tid]) : 0.f;
    float dk_acc = 0.f, dv_acc = 0.f;
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
          const float product = product_of(row, q + from * p.head_dim, p.head_dim);
          log_p = log_weight(p, at, product, marks[to], l[from], i, j, slope);
          if (!(log_p == -INF))
            own = slope * score_gradient(p, log_p, d_lse ? d_lse[from] : 0.f, v + to * p.value_dim,
                                         o + from * p.value_dim, d_out + from * p.value_dim);
        }
        ds[tid] = own;
        log_weights[tid] = log_p;
        __syncthreads();
        for (int n = 0; n < least(THREADS, end - i0); n++) {
          if (log_weights[n] == -INF) continue;
          const i64 from = queries + i0 + n;
          if (tid < p.head_dim) dk_acc = fmaf(ds[n], widen(q[from * p.head_dim + tid]), dk_acc);
          if (tid < p.value_dim) {
            const float one = widen(d_out[from * p.value_dim + tid]);
            dv_acc = fmaf(one, expf(log_weights[n] + p.beta * (value - o[from * p.value_dim + tid])), dv_acc);
          }
        }
      }
    }
    if (tid < p.head_dim) dk[to * p.head_dim + tid] = round16(dk_acc * p.scale);
    if (tid < p.value_dim) dv[to * p.value_dim + tid] = round16(dv_acc);
  }
}
