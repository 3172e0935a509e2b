// The value pass: what a matrix product can take in place of the values, for each key/value head and channel
//
//     EXP      X = exp(beta*v) * 2^-c                for |beta| >= 1, and where |beta*o| is large
//     EXPM1    X = (exp(beta*v) - 1)/beta * 2^-c     for |beta| < 1; at beta = 0 it is v
//
// with an integer c each. Scaling by a power of two is exact, so neither the result nor its bits depend on c: X is written with
// the first guess at once, when the values are read, and again for the heads where that is not in range. It is the sum of two
// 16-bit numbers: x is what the products take, and rest = X - x is added where a few keys carry a row, since the rounding of x
// alone would move the output by more than a rounding of the output does. Both are rounded before they are scaled, and fit: no
// subnormal number of float16 lets c into the bits. float32 has no rest.

#define GRID 4096.f  // float16: the expm1 form keeps multiples of 1/GRID
#define LARGEST_SHIFT 12  // of it; so that they are multiples of the least float16
#define VECTORS_OF_ROW (EP / PER)  // vectors of a row of values
#define ROWS_AT_ONCE (THREADS / VECTORS_OF_ROW)
#if FLOAT16
#define HARDLY 0x1p-9f  // of beta*v: four roundings of X
#define EASY_LOW -14.f  // bits of X with c = 0 that are in range
#define EASY_HIGH 15.f
#else
#define HARDLY 0x1p-6f
#define EASY_LOW -49.f
#define EASY_HIGH 49.f
#endif
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

// numbers as integers of the same order, all above 0
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = float_as_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number(u32 x) { return bits_as_float(x >> 31 ? x & 0x7FFFFFFFu : ~x); }

// the shift of the expm1 form, of elements that have the exponents of float32: sums over keys stay finite
__device__ __forceinline__ int shift_of(const Problem& p) { return 26 + (int)log2f((float)greatest(p.key_length, 1)); }

// exp(y + rest) as the first guess of X, with the bits that split_exp gives it; only where that is in range, for it is made again elsewhere
__device__ __forceinline__ float guess(float y, float rest) {
  const float whole = rintf(fminf(fmaxf(y * LOG2E, -120.f), 120.f));
  const float mantissa = exp2_near((fmaf(-whole, LN2_LOW, fmaf(-whole, LN2_HIGH, y)) + rest) * LOG2E);
  return bits_as_float(float_as_bits(rounded(mantissa)) + ((u32)(int)whole << 23));
}

// A vector of values in all forms, or what their rounding leaves; zero where beta*v is not finite. `e` is its first channel, c
// are the integers of the head, or null for the first guess
__device__ __forceinline__ void forms_of(const Problem& p, int head, const Vector& from, int e, const int* c, bool rest,
                                         Vector (&to)[EXP + EXPM1]) {
#pragma unroll
  for (int h = 0; h < PER; h++) {
    const float beta = beta_of(p, head, e + h), one = widen(from.x[h]), y = beta * one;
    if (EXP && !c && !FLOAT32) {
      const float x = guess(y, fmaf(beta, one, -y));
      to[0].x[h] = narrow(finite(y) ? x : 0.f);
    } else if (EXP) {
      int exponent;
      const float mantissa = split_exp(y, fmaf(beta, one, -y), exponent), coarse = rounded(mantissa);
      const float steps = 1 << 21;  // 11 bits of what is left
      exponent -= c ? c[e + h] : 0;
      const float x = rest ? scaled(rintf((mantissa - coarse) * steps) / steps, exponent + REST_SHIFT) : scaled(coarse, exponent);
      to[0].x[h] = narrow(finite(y) ? x : 0.f);
    }
    if (EXPM1) {
      float fine = finite(y) ? expm1_value(one, y) : y == -INF ? -1.f / beta : 0.f;
      fine = fminf(fmaxf(fine, -3e38f), 3e38f);
      const int shift = c ? c[XP - EP + e + h] : FLOAT16 ? 0 : shift_of(p);
#if FLOAT16
      const element coarse = narrow(scaled(rintf(fine * GRID) / GRID, -shift));
      const float lost = fine - scaled(widen(coarse), shift);
      to[EXP].x[h] = rest ? narrow(scaled(rintf(lost * (GRID * 2048)) / (GRID * 2048), REST_SHIFT - shift)) : coarse;
#else
      to[EXP].x[h] = narrow(scaled(rest ? fine - rounded(fine) : fine, -shift));
#endif
    }
  }
}

// x [B*Hkv, Lk, XP] by the first guess, of `chunk` keys; and the greatest value and minus the least one of each channel:
// ranges [B*Hkv, 2, EP], zero before
extern "C" __global__ void __launch_bounds__(THREADS) value_exp(
    PROBLEM, const element* v, int* flags, u32* ranges, element* x, int chunks, int chunk) {
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  float* room = (float*)raw;  // [2, ROWS_AT_ONCE, EP]
  const int kv = blockIdx.x / chunks, start = blockIdx.x % chunks * chunk;
  const int own = threadIdx.x / VECTORS_OF_ROW, e = threadIdx.x % VECTORS_OF_ROW * PER;
  const Head at = head_of(p, kv * p.group);
  float most[2][PER];
  for (int h = 0; h < PER; h++) most[0][h] = most[1][h] = -INF;
  bool odd = false;
  const int end = own < ROWS_AT_ONCE ? least(start + chunk, p.key_length) : 0;
#pragma unroll 4
  for (int j = start + own; j < end; j += ROWS_AT_ONCE) {
    const i64 row = (i64)kv * p.key_length + j;
    Vector from = {}, to[EXP + EXPM1] = {};
    if (j < at.k_end) {
      from = load_vector(v + row * p.value_dim, e, p.value_dim);
      forms_of(p, at.h, from, e, nullptr, false, to);
#pragma unroll
      for (int h = 0; h < PER; h++) {
        const float one = widen(from.x[h]), y = beta_of(p, at.h, e + h) * one;
        odd |= !(y < INF);
        if (finite(y)) { most[0][h] = fmaxf(most[0][h], one); most[1][h] = fmaxf(most[1][h], -one); }
      }
    }
    for (int form = 0; form < EXP + EXPM1; form++) *(Vector*)(x + row * XP + form * EP + e) = to[form];
  }
  if (own < ROWS_AT_ONCE)
#pragma unroll
    for (int h = 0; h < PER; h++)
      for (int side = 0; side < 2; side++) room[(side * ROWS_AT_ONCE + own) * EP + e + h] = most[side][h];
  const bool any = __syncthreads_or(odd);
  if (threadIdx.x == 0 && any) atomicOr(flags + kv, BROKEN);
  for (int n = threadIdx.x; n < 2 * EP; n += THREADS) {
    float top = -INF;
    for (int r = 0; r < ROWS_AT_ONCE; r++) top = fmaxf(top, room[(n / EP * ROWS_AT_ONCE + r) * EP + n % EP]);
    if (top > -INF) atomicMax(ranges + (i64)kv * 2 * EP + n, ordered(top));
  }
}

// The integers of each channel, and which heads are outside the fast range. c [B*Hkv, CP]; hard [B*Hkv]: where X is to be made
// with other integers than the first guess
extern "C" __global__ void __launch_bounds__(THREADS) value_decide(
    PROBLEM, const u32* ranges, int* c, int* flags, int* hard) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x, h = kv * p.group % p.query_heads;
  const float keys = log2f((float)greatest(p.key_length, 1));
  const float reach = fminf(MAX_BITS, SUM_BITS - keys);
  bool outside = false, easy = true;
  for (int e = threadIdx.x; e < p.value_dim; e += THREADS) {
    const u32 high = ranges[(i64)kv * 2 * EP + e], low = ranges[((i64)kv * 2 + 1) * EP + e];
    if (!high) continue;
    const float beta = beta_of(p, h, e), one = -number(low) * beta, other = number(high) * beta;
    if (EXP) {
      outside |= !(fabsf(other - one) * LOG2E <= reach);
      easy &= fminf(one, other) * LOG2E >= EASY_LOW && fmaxf(one, other) * LOG2E <= EASY_HIGH;
    }
  }
  const bool any_outside = __syncthreads_or(outside), any_hard = __syncthreads_or(!easy);
  bool shifts = false, far = false, narrow_span = false;
  for (int e = threadIdx.x; e < EP; e += THREADS) {
    const u32 high = ranges[(i64)kv * 2 * EP + e], low = ranges[((i64)kv * 2 + 1) * EP + e];
    const bool some = e < p.value_dim && high;
    const float beta = some ? beta_of(p, h, e) : 0.f, smallest = some ? -number(low) : 0.f, largest = some ? number(high) : 0.f;
    const float one = smallest * beta, other = largest * beta;
    if (EXP) {
      const float middle = 0.5f * one + 0.5f * other;
      narrow_span |= some && fabsf(beta) >= 1.f && fabsf(other - one) <= HARDLY && fmaxf(fabsf(one), fabsf(other)) < 1.f;
      c[(i64)kv * CP + e] = any_hard && !any_outside ? (int)rintf(fminf(fmaxf(middle * LOG2E, -1e9f), 1e9f)) : 0;
    }
    if (EXPM1) {
      c[(i64)kv * CP + XP + e] = (int)(float_as_bits(fmaxf(fabsf(smallest), fabsf(largest))) >> 23) - 126;
#if FLOAT16
      const float size = some ? fmaxf(fabsf(expm1_value(smallest, one)), fabsf(expm1_value(largest, other))) : 0.f;
      const int shift = greatest(0, (int)(float_as_bits(size) >> 23) - 127 - 14);
      far |= fabsf(beta) < 1.f && shift > LARGEST_SHIFT;
      shifts |= shift > 0;
      c[(i64)kv * CP + XP - EP + e] = least(shift, LARGEST_SHIFT);
#else
      c[(i64)kv * CP + XP - EP + e] = shift_of(p);
#endif
    }
  }
  const bool any_far = __syncthreads_or(far), any_shifts = __syncthreads_or(shifts);
  const bool any_narrow = __syncthreads_or(narrow_span);
  if (threadIdx.x) return;
  const int flag = (any_outside || any_far ? OUTSIDE : 0) | (any_narrow && !FLOAT32 ? NARROW : 0);
  if (flag) atomicOr(flags + kv, flag);
  hard[kv] = (any_hard || any_shifts) && !any_outside && !any_far;
}

// x with c, of hard heads: mostly there is nothing to do
extern "C" __global__ void __launch_bounds__(THREADS) value_again(
    PROBLEM, const element* v, const int* c, const int* hard, element* x, int workers) {
  const Problem p = THE_PROBLEM;
  const int kv = blockIdx.x / workers, own = threadIdx.x / VECTORS_OF_ROW, e = threadIdx.x % VECTORS_OF_ROW * PER;
  if (!hard[kv] || own >= ROWS_AT_ONCE) return;
  const Head at = head_of(p, kv * p.group);
  for (int j = blockIdx.x % workers * ROWS_AT_ONCE + own; j < at.k_end; j += workers * ROWS_AT_ONCE) {
    const i64 row = (i64)kv * p.key_length + j;
    Vector to[EXP + EXPM1] = {};
    forms_of(p, at.h, load_vector(v + row * p.value_dim, e, p.value_dim), e, c + (i64)kv * CP, false, to);
    for (int form = 0; form < EXP + EXPM1; form++) *(Vector*)(x + row * XP + form * EP + e) = to[form];
  }
}

// rest of the keys from j0 on as a tile [ROWS, XP]; `v` and `c` are those of the head
template <int ROWS>
__device__ __forceinline__ void make_rest(const Problem& p, const Head& at, element* tile, const element* v, const int* c, int j0) {
#pragma unroll 1
  for (int n = threadIdx.x * PER; n < ROWS * EP; n += THREADS * PER) {
    const int j = n / EP, e = n % EP;
    Vector to[EXP + EXPM1] = {};
    if (j0 + j < at.k_end) forms_of(p, at.h, load_vector(v + (i64)(j0 + j) * p.value_dim, e, p.value_dim), e, c, true, to);
    for (int form = 0; form < EXP + EXPM1; form++) *(Vector*)(tile + j * (XP + PAD) + form * EP + e) = to[form];
  }
}
