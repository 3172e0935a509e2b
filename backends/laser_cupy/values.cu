// The value pass: X = exp(beta*v) * 2^-c with an integer c for each key/value head and channel.
//
// Scaling by a power of two is exact, so neither the result nor its bits depend on c. X is stored as the sum of two
// 16-bit numbers: x is what the products take, and rest = X - x is added where a few keys carry a row, since the
// rounding of x alone would move the output by more than a rounding of the output does. Both are made of the mantissa
// before it is scaled, and fit: no subnormal number of float16 lets c into the bits.

// The least and greatest beta*v of each channel, over a chunk of keys. low, high [B*Hkv, chunks, EP]
extern "C" __global__ void __launch_bounds__(THREADS) value_range(
    PROBLEM, const u16* v, float* lows, float* highs, int* broken, int chunks, int chunk) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* room = (float*)raw;
  const int kv = blockIdx.x / chunks, part = blockIdx.x % chunks;
  const Head at = head_of(p, kv * p.group);
  const int columns = EP / 2, rows = THREADS / columns;  // pairs of channels side by side, and keys one above another
  const int start = part * chunk, end = least(start + chunk, at.k_end), e = threadIdx.x % columns * 2;
  const bool paired = p.value_dim % 2 == 0;
  float smallest[2] = {INF, INF}, largest[2] = {-INF, -INF};
  bool odd = false;
  for (int j = start + threadIdx.x / columns; j < end; j += rows) {
    const u16* from = v + ((i64)kv * p.key_length + j) * p.value_dim + e;
    u32 both = 0;
    if (paired && e < p.value_dim) both = *(const u32*)from;
    for (int h = 0; h < 2; h++) {
      if (e + h >= p.value_dim) continue;
      const float y = p.beta * widen(paired ? (u16)(both >> 16 * h) : from[h]);
      odd |= !(y < INF);
      if (finite(y)) { smallest[h] = fminf(smallest[h], y); largest[h] = fmaxf(largest[h], y); }
    }
  }
  for (int h = 0; h < 2; h++) {
    room[threadIdx.x] = smallest[h];
    room[THREADS + threadIdx.x] = largest[h];
    __syncthreads();
    if (threadIdx.x < columns) {
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

// The integer of each channel, and the flags of each head. c [B*Hkv, EP], flags [B*Hkv]
extern "C" __global__ void __launch_bounds__(THREADS) value_decide(
    PROBLEM, const float* lows, const float* highs, const int* broken, int* c, int* flags, int chunks) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x;
  const float reach = fminf(MAX_BITS, SUM_BITS - log2f((float)greatest(p.key_length, 1)));
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
    const bool fits = !some || (high - low) * LOG2E <= reach;
    outside |= !fits;
    const float middle = 0.5f * low + 0.5f * high;
    c[(i64)kv * EP + e] = some && fits ? (int)rintf(fminf(fmaxf(middle * LOG2E, -1e9f), 1e9f)) : 0;
  }
  const int any_outside = __syncthreads_or(outside);
  const int any_odd = __syncthreads_or(odd);
  if (threadIdx.x == 0) flags[kv] = (any_outside ? OUTSIDE : 0) | (any_odd ? BROKEN : 0);
}

// x and rest [B*Hkv, Lk, EP]; zero where beta*v is not finite, beyond the value dim and for heads outside
extern "C" __global__ void __launch_bounds__(THREADS) value_exp(
    PROBLEM, const u16* v, const int* c, const int* flags, u16* x, u16* rest, i64 rows) {
  const Problem p = THE_PROBLEM;
  const i64 n = ((i64)blockIdx.x * THREADS + threadIdx.x) * 2;
  if (n >= rows * EP) return;
  const i64 row = n / EP;
  const int kv = (int)(row / p.key_length), j = (int)(row % p.key_length);
  const int b = kv * p.group / p.query_heads;
  const bool inside = !(flags[kv] & OUTSIDE) && (!p.key_lengths || j < p.key_lengths[b]);
  float value[2] = {0.f, 0.f}, left[2] = {0.f, 0.f};
  for (int h = 0; h < 2; h++) {
    const int e = (int)(n % EP) + h;
    if (!inside || e >= p.value_dim) continue;
    const float one = widen(v[row * p.value_dim + e]), y = p.beta * one;
    if (!finite(y)) continue;
    int exponent;
    const float mantissa = split_exp(y, fmaf(p.beta, one, -y), exponent), rounded = widen(round16(mantissa));
    const float steps = 1 << 21;  // 11 bits of what is left
    exponent -= c[(i64)kv * EP + e];
    value[h] = scaled(rounded, exponent);
    left[h] = scaled(rintf((mantissa - rounded) * steps) / steps, exponent + REST_SHIFT);
  }
  *(u32*)(x + n) = pack(value[0], value[1]);
  *(u32*)(rest + n) = pack(left[0], left[1]);
}
