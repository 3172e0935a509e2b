// The exact path, for heads outside the fast range: the definition in float32, every sum about its own greatest term.
//
// An exponential for each query, key and channel: slow, and meant to be rare. A block takes a row at a time. Heads inside
// the fast range are passed over; those that hold NaN or infinity are computed too, but only what is not finite is
// written, so that what does not see it keeps its bits.
//
// Here too, because it is as rare: of heads with a channel whose small values hardly vary, o is put back between the least and
// the greatest value that its query sees, which the rounding of X and of weights can leave.

// <q, k> for one key, with q in shared memory as float32
__device__ __forceinline__ float product_of(const float* q, const element* k, int columns) {
  float s = 0.f;
  for (int d = 0; d < columns; d++) s = fmaf(q[d], widen(k[d]), s);
  return s;
}

__device__ __forceinline__ void load_row(float* to, const element* from, int width) {
  for (int n = threadIdx.x; n < width; n += THREADS) to[n] = widen(from[n]);
}

// s of query i and key j in natural logarithms; −infinity where hidden, NaN where q or k is not finite
__device__ __forceinline__ float natural_score(const Problem& p, const Head& at, const float* q, const element* k, int i,
                                               int j) {
  float slope, bias;
  if (!visible(p, at, i, j, bias)) return -INF;
  const float product = product_of(q, k + (i64)j * WIDTH, WIDTH);
  return finite(product) && bias < INF ? score(p, product, bias, slope) / UNIT : NOT_A_NUMBER;
}

// the rows begin, begin + step, … of a head
__device__ __forceinline__ void exact_rows(const Problem& p, const Head& at, int flag, const element* q, const element* k, const element* v,
                                           element* out, const Unrounded& kept, float* lse, int begin, int step, u8* raw) {
  float* row = (float*)raw;      // [DP] the query
  float* weights = row + DP;     // [THREADS] s - m
  float* room = weights + THREADS;
  k += (i64)at.key * p.key_length * WIDTH;
  v += (i64)at.key * p.key_length * p.value_dim;
  const int tid = threadIdx.x;
  for (int i = begin; i < p.query_length; i += step) {
    const i64 to = (i64)at.query * p.query_length + i;
    load_row(row, q + to * WIDTH, WIDTH);
    __syncthreads();
    const int first = greatest(0, i + p.low), end = least(at.k_end, i + p.high + 1);
    float m = -INF, nan = 0.f;
    for (int j = first + tid; j < end; j += THREADS) {
      const float s = natural_score(p, at, row, k, i, j);
      if (s != s) nan = 1.f;
      m = fmaxf(m, s);
    }
    m = block_max(m, room);
    nan = block_max(nan, room);
    float l = 0.f;
    for (int j = first + tid; j < end; j += THREADS) {
      const float s = natural_score(p, at, row, k, i, j);
      if (s > -INF) l += expf(s - m);
    }
    l = block_sum(l, room);
    const bool empty = l == 0.f && nan == 0.f;
    const float log_l = nan > 0.f ? NOT_A_NUMBER : logf(l);
    if (tid == 0 && (flag & OUTSIDE)) lse[to] = empty ? -INF : m + log_l;

    // per channel: log Σ exp(s − m + βv) about its greatest term so far; a row that sees nothing has no m
    const float reference = m == -INF ? 0.f : m, shift = empty ? 0.f : log_l;
    for (int e0 = 0; e0 < EP; e0 += THREADS) {
      const int e = e0 + tid;
      const float beta = e < p.value_dim ? beta_of(p, at.h, e) : 1.f;
      float top = -INF, sum = 0.f, linear = 0.f;
      bool infinite = false, odd = false;
      for (int j0 = first; j0 < end; j0 += THREADS) {
        __syncthreads();
        weights[tid] = j0 + tid < end ? natural_score(p, at, row, k, i, j0 + tid) - reference : -INF;
        __syncthreads();
        if (e >= p.value_dim) continue;
        for (int n = 0; n < least(THREADS, end - j0); n++) {
          if (weights[n] == -INF) continue;
          const float one = widen(v[(i64)(j0 + n) * p.value_dim + e]), y = beta * one;
          const float term = weights[n] + y;
          if (EXPM1 && finite(one)) linear = fmaf(expf(weights[n] - shift), expm1_value(one, y), linear);
          odd |= term != term;
          infinite |= y == INF;
          if (!(finite(term))) continue;
          if (term > top) {
            sum = sum * expf(top - term) + 1.f;
            top = term;
          } else {
            sum += expf(term - top);
          }
        }
      }
      if (e < p.value_dim) {
        float o = 0.f;
        if (odd || nan > 0.f) o = NOT_A_NUMBER;
        else if (infinite) o = beta > 0.f ? INF : -INF;
        else if (!empty && is_linear(beta, beta * linear)) o = linear * log1p_over(beta * linear);
        else if (!empty) o = (top + logf(sum) - log_l) / beta;
        if ((flag & OUTSIDE) || !finite(o)) {
          out[to * p.value_dim + e] = narrow(o);
          kept.store(to * p.value_dim + e, o);
        }
      }
    }
    __syncthreads();
  }
}

#define ROWS_WITHIN 64  // that a block takes at a time
#define WITHIN (GENERAL ? 0 : NARROW)  // a mask would hide values here: there `forward` adds what the rounding lost

// Rows begin … end of a head. What exact_rows writes of it is what this leaves: o that is not finite, or of such values
__device__ __forceinline__ void rows_within(const Problem& p, const Head& at, const element* v, element* out, const Unrounded& kept,
                                            int begin, int end) {
  v += (i64)at.key * p.key_length * p.value_dim;
  const int common = greatest(0, end - 1 + p.low);  // all of these rows see the keys from here to their last ones
  for (int e = threadIdx.x; e < p.value_dim; e += THREADS) {
    const float beta = beta_of(p, at.h, e);
    auto meet = [&](int j, float& least_value, float& greatest_value) {
      const float one = widen(v[(i64)j * p.value_dim + e]);
      const bool there = finite(beta * one);
      least_value = fminf(least_value, there ? one : -INF);
      greatest_value = fmaxf(greatest_value, there ? one : INF);
    };
    float low = INF, high = -INF;  // of the keys common … next
    int next = common;
    for (int i = begin; i < end; i++) {
      const int last = least(at.k_end - 1, i + p.high);
#pragma unroll 4
      for (; next <= last; next++) meet(next, low, high);
      float own_low = low, own_high = high;
#pragma unroll 4
      for (int j = greatest(0, i + p.low); j <= least(common - 1, last); j++) meet(j, own_low, own_high);
      const i64 to = ((i64)at.query * p.query_length + i) * p.value_dim + e;
      const float o = kept.load(out, to);
      const bool outside = o < own_low || o > own_high;
      if (!finite(o) || !outside || own_low > own_high) continue;
      const float inside = o < own_low ? own_low : own_high;
      out[to] = narrow(inside);
      kept.store(to, inside);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) forward_exact(
    PROBLEM, const element* q, const element* k, const element* v, const int* flags, element* out, float* residual, short* rest,
    float* lse, int heads, int workers) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  bool any = false;
  for (int n = threadIdx.x; n < heads / p.group; n += THREADS) any |= (flags[n] & (OUTSIDE | BROKEN | WITHIN)) != 0;
  if (!__syncthreads_or(any)) return;
  int part = blockIdx.x;  // of the rows of a head
  for (int n = 0; n < heads; n++) {
    if ((flags[n / p.group] & (OUTSIDE | WITHIN)) != WITHIN || !WITHIN) continue;
    const Head at = head_of(p, n);
    const int end = least(at.q_end, p.query_length), parts = (end + ROWS_WITHIN - 1) / ROWS_WITHIN;
    for (; part < parts; part += workers)
      rows_within(p, at, v, out, {residual, rest}, part * ROWS_WITHIN, least(end, part * ROWS_WITHIN + ROWS_WITHIN));
    part -= parts;
  }
  for (int n = 0; n < heads; n++) {  // of all rows of all heads every block has the same share
    const int flag = flags[n / p.group] & (OUTSIDE | BROKEN), begin = (int)((blockIdx.x + (i64)n * (workers - p.query_length % workers)) % workers);
    if (flag) exact_rows(p, head_of(p, n), flag, q, k, v, out, {residual, rest}, lse, begin, workers, raw);
  }
}
