// The value pass: what a matrix product can take in place of the values, for each key/value head and channel
//
//     EXP      X = exp(beta*v) * 2^-c                for |beta| >= 1, and where |beta*o| is large
//     EXPM1    X = (exp(beta*v) - 1)/beta * 2^-c     for |beta| < 1; at beta = 0 it is v
//
// with an integer c each. Scaling by a power of two is exact, so neither the result nor its bits depend on c. X is stored as
// the sum of two 16-bit numbers: x is what the products take, and rest = X - x is added where a few keys carry a row, since
// the rounding of x alone would move the output by more than a rounding of the output does. Both are rounded before they
// are scaled, and fit: no subnormal number of float16 lets c into the bits. float32 has no rest.

#define GRID 4096.f  // float16: the expm1 form keeps multiples of 1/GRID
#define LARGEST_SHIFT 12  // of it; so that they are multiples of the least float16
#define CLIP 80.f  // of beta*v in the expm1 form: o is read from it only where such a key has a weight of nothing

struct alignas(16) Vector { element x[PER]; };

// The elements of a row from column e on; zeros beyond `columns`
__device__ __forceinline__ Vector load_vector(const element* row, int e, int columns) {
  Vector v = {};
  if (columns % PER == 0) {
    if (e < columns) v = *(const Vector*)(row + e);
  } else {
    for (int h = 0; h < PER; h++) if (e + h < columns) v.x[h] = row[e + h];
  }
  return v;
}

// (exp(beta*v) - 1)/beta
__device__ __forceinline__ float expm1_value(float v, float y) { return v * expm1_over(fminf(y, CLIP)); }

// The least and greatest value of each channel, over a chunk of keys. lows, highs [B*Hkv, chunks, EP]
extern "C" __global__ void __launch_bounds__(THREADS) value_range(
    PROBLEM, const element* v, float* lows, float* highs, int* broken, int chunks, int chunk) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* room = (float*)raw;
  const int kv = blockIdx.x / chunks, part = blockIdx.x % chunks;
  const Head at = head_of(p, kv * p.group);
  const int columns = EP / PER, rows = THREADS / columns;  // vectors side by side, and keys one above another
  const int own = threadIdx.x / columns, e = threadIdx.x % columns * PER;
  const int start = part * chunk, end = own < rows ? least(start + chunk, at.k_end) : 0;
  float smallest[PER], largest[PER], beta[PER];
  for (int h = 0; h < PER; h++) {
    smallest[h] = INF;
    largest[h] = -INF;
    beta[h] = e + h < p.value_dim ? beta_of(p, at.h, e + h) : 0.f;
  }
  bool odd = false;
#pragma unroll 4
  for (int j = start + own; j < end; j += rows) {
    const Vector vector = load_vector(v + ((i64)kv * p.key_length + j) * p.value_dim, e, p.value_dim);
#pragma unroll
    for (int h = 0; h < PER; h++) {
      const float one = widen(vector.x[h]), y = beta[h] * one;
      odd |= !(y < INF);
      if (finite(y)) { smallest[h] = fminf(smallest[h], one); largest[h] = fmaxf(largest[h], one); }
    }
  }
#pragma unroll
  for (int h = 0; h < PER; h++) {
    room[threadIdx.x] = smallest[h];
    room[THREADS + threadIdx.x] = largest[h];
    __syncthreads();
    if (own == 0) {
      for (int r = 1; r < rows; r++) {
        smallest[h] = fminf(smallest[h], room[threadIdx.x + r * columns]);
        largest[h] = fmaxf(largest[h], room[THREADS + threadIdx.x + r * columns]);
      }
      const i64 to = ((i64)kv * chunks + part) * EP + e + h;
      lows[to] = smallest[h];
      highs[to] = largest[h];
    }
    __syncthreads();
  }
  const int any = __syncthreads_or(odd);
  if (threadIdx.x == 0) broken[blockIdx.x] = any != 0;
}

// The integers of each channel, and the flags of each head. c [B*Hkv, CP], flags [B*Hkv]
extern "C" __global__ void __launch_bounds__(THREADS) value_decide(
    PROBLEM, const float* lows, const float* highs, const int* broken, int* c, int* flags, int chunks) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x, h = kv * p.group % p.query_heads;
  const float keys = log2f((float)greatest(p.key_length, 1));
  const float reach = fminf(MAX_BITS, SUM_BITS - keys);
  bool outside = false, odd = false;
  for (int n = threadIdx.x; n < chunks; n += THREADS) odd |= broken[kv * chunks + n] != 0;
  for (int e = threadIdx.x; e < EP; e += THREADS) {
    float low = INF, high = -INF;
    for (int part = 0; part < chunks; part++) {
      const i64 from = ((i64)kv * chunks + part) * EP + e;
      low = fminf(low, lows[from]);
      high = fmaxf(high, highs[from]);
    }
    const bool some = low <= high;
    const float beta = e < p.value_dim ? beta_of(p, h, e) : 0.f, one = low * beta, other = high * beta;
    if (EXP) {
      const bool fits = !some || fabsf(other - one) * LOG2E <= reach;
      outside |= !fits;
      const float middle = 0.5f * one + 0.5f * other;
      c[(i64)kv * CP + e] = some && fits ? (int)rintf(fminf(fmaxf(middle * LOG2E, -1e9f), 1e9f)) : 0;
    }
    if (EXPM1) {
      const float greatest_value = some ? fmaxf(fabsf(low), fabsf(high)) : 0.f;
      c[(i64)kv * CP + XP + e] = (int)(float_as_bits(greatest_value) >> 23) - 126;
#if FLOAT16
      const float size = some ? fmaxf(fabsf(expm1_value(low, one)), fabsf(expm1_value(high, other))) : 0.f;
      const int shift = greatest(0, (int)(float_as_bits(size) >> 23) - 127 - 14);
      outside |= fabsf(beta) < 1.f && shift > LARGEST_SHIFT;
      c[(i64)kv * CP + XP - EP + e] = least(shift, LARGEST_SHIFT);
#else
      c[(i64)kv * CP + XP - EP + e] = 26 + (int)keys;  // sums over keys stay finite
#endif
    }
  }
  const int any_outside = __syncthreads_or(outside);
  const int any_odd = __syncthreads_or(odd);
  if (threadIdx.x == 0) flags[kv] = (any_outside ? OUTSIDE : 0) | (any_odd ? BROKEN : 0);
}

// x and rest [B*Hkv, Lk, XP]; zero where beta*v is not finite, beyond the value dim and for heads outside
extern "C" __global__ void __launch_bounds__(THREADS) value_exp(
    PROBLEM, const element* v, const int* c, const int* flags, element* x, element* rest, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 n = ((i64)blockIdx.x * THREADS + threadIdx.x) * PER;
  if (n >= rows * EP) return;
  const i64 row = n / EP;
  const int kv = (int)(row / p.key_length), j = (int)(row % p.key_length), e = (int)(n % EP);
  const int first = kv * p.group, b = first / p.query_heads, head = first % p.query_heads;
  const bool inside = !(flags[kv] & OUTSIDE) && (!p.key_lengths || j < p.key_lengths[b]);
  Vector from = {}, value[2] = {}, left[2] = {};
  if (inside) from = load_vector(v + row * p.value_dim, e, p.value_dim);
#pragma unroll
  for (int h = 0; h < PER; h++) {
    if (!inside || e + h >= p.value_dim) continue;
    const float beta = beta_of(p, head, e + h), one = widen(from.x[h]), y = beta * one;
    if (EXP && finite(y)) {
      int exponent;
      const float mantissa = split_exp(y, fmaf(beta, one, -y), exponent), coarse = rounded(mantissa);
      const float steps = 1 << 21;  // 11 bits of what is left
      exponent -= c[(i64)kv * CP + e + h];
      value[0].x[h] = narrow(scaled(coarse, exponent));
      left[0].x[h] = narrow(scaled(rintf((mantissa - coarse) * steps) / steps, exponent + REST_SHIFT));
    }
    if (EXPM1) {
      float fine = finite(y) ? expm1_value(one, y) : y == -INF ? -1.f / beta : 0.f;
      fine = fminf(fmaxf(fine, -3e38f), 3e38f);
      const int shift = c[(i64)kv * CP + XP - EP + e + h];
#if FLOAT16
      const float kept = rintf(fine * GRID) / GRID;
      element& to = value[EXP].x[h];
      to = narrow(scaled(kept, -shift));
      const float lost = fine - scaled(widen(to), shift);
      left[EXP].x[h] = narrow(scaled(rintf(lost * (GRID * 2048)) / (GRID * 2048), REST_SHIFT - shift));
#else
      value[EXP].x[h] = narrow(scaled(fine, -shift));
      left[EXP].x[h] = narrow(scaled(fine - rounded(fine), -shift));
#endif
    }
  }
  for (int form = 0; form < EXP + EXPM1; form++) {
    const i64 to = row * XP + form * EP + e;
    *(Vector*)(x + to) = value[form];
#if !FLOAT32
    *(Vector*)(rest + to) = left[form];
#endif
  }
}
