// What all kernels share: the problem, what a query sees, scores, powers of two.
//
// Compiled for a dtype (FLOAT16, FLOAT32), for WIDTH and EP, the columns of q and k, a multiple of 16 bytes, and the value
// dim rounded up to 16; for CAP, a soft cap; for GENERAL, scores that are more than products times a factor; for the forms that
// the values take (EXP, EXPM1: see values.cu); for the tile sizes of the forward pass: STRIPS, KEYS and FORWARD_BLOCKS; and for
// LANES, those of a row of queries. Base 2 is used inside kernels only: scores carry log2(e), those of float32 excepted; what is
// stored is in natural logarithms.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#if FLOAT32
#define UNIT 1.f  // of scores: of base 2 they would be rounded once more
#else
#define UNIT LOG2E
#endif
#define LN2_HIGH 0.693359375f  // few bits, so that its products with integers are exact
#define LN2_LOW -2.12194440054690583e-4f
#define INF bits_as_float(0x7F800000u)
#define NOT_A_NUMBER bits_as_float(0x7FC00000u)
#define FULL_WARP 0xFFFFFFFFu
#define THREADS 128
#define BLOCK 64  // rows of a tile that a block owns in the backward pass, 16 for each warp
#define DP ((WIDTH + 15) / 16 * 16)  // columns of tiles of q and k
#define XP ((EXP + EXPM1) * EP)  // and of x: the exp form, then the expm1 form
#define CP (XP + EXPM1 * EP)  // integers of a head: c of these columns, and exponents of the greatest values
#define PAD 8  // elements between rows of a tile, so that eight rows lie in different banks
#define PER ((int)(16 / sizeof(element)))  // elements of a copy

// flags of a key/value head
#define OUTSIDE 1  // its values are outside the fast range
#define BROKEN 2  // it holds a value for which beta*v is NaN or +infinity
#define NARROW 8  // the small values of a channel hardly vary: the mean of any number of rounded X can leave their span
#define ODD 4  // backward: one of its keys, or a query that reads it, is not finite

#if FLOAT16
#define P_SHIFT 15  // p is scaled up by so many bits: float16 has few
#define SLACK 0.f
#define REST_SHIFT 11  // and what the rounding of X leaves by so many
#define MAX_BITS 27.f
#define SUM_BITS 28.f
#else
#define P_SHIFT 0
#define SLACK 8.f  // the running maximum of a row may be so many bits behind
#define REST_SHIFT 0
#define MAX_BITS 99.5f
#define SUM_BITS 117.f
#endif

struct Problem {
  int query_heads, group, query_length, key_length, value_dim;
  int low, high;  // query i sees keys i + low … i + high
  float scale, cap, beta;
  const float* betas;  // [Hq, EP], or null
  const int *query_lengths, *key_lengths;  // [B], or null
  const u8* mask;  // or null
  i64 mask_b, mask_h, mask_i, mask_j;  // its strides
  const u8* bias;  // or null; of float32 or of elements
  int bias_wide;
  i64 bias_b, bias_h, bias_i, bias_j;  // its strides in bytes
};

#define PROBLEM                                                                                                  \
  int query_heads, int group, int query_length, int key_length, int value_dim, int low, int high, float scale,   \
      float cap, float number_beta, const float *betas, const int *query_lengths, const int *key_lengths,               \
      const u8 *mask, i64 mask_b, i64 mask_h, i64 mask_i, i64 mask_j, const u8 *bias, int bias_wide, i64 bias_b, \
      i64 bias_h, i64 bias_i, i64 bias_j
#define THE_PROBLEM                                                                                              \
  Problem {                                                                                                      \
    query_heads, group, query_length, key_length, value_dim, low, high, scale, cap, number_beta, betas, query_lengths,  \
        key_lengths, mask, mask_b, mask_h, mask_i, mask_j, bias, bias_wide, bias_b, bias_h, bias_i, bias_j       \
  }

template <bool VALUE> struct Flag { static constexpr bool value = VALUE; };
struct alignas(16) Floats { float x[4]; };
struct alignas(8) Two { float x[2]; };
__device__ __forceinline__ void store_two(float* to, float first, float second) { *(Two*)to = {first, second}; }

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int greatest(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ bool finite(float x) { return fabsf(x) < INF; }
__device__ __forceinline__ float rounded(float x) { return widen(narrow(x)); }

// o before it was rounded, as it is kept for the backward pass: in float32, or, of bfloat16, what the rounded one has no room for
struct Unrounded {
  float* whole;  // or null
  short* rest;   // in units of the last place of float32; or null

  __device__ __forceinline__ float load(const element* out, i64 n) const {
    if (whole) return whole[n];
    const float o = widen(out[n]);
    return rest ? bits_as_float(float_as_bits(o) + (u32)(int)rest[n]) : o;
  }
  __device__ __forceinline__ void store(i64 n, float o) const {
    if (whole) whole[n] = o;
    if (rest) rest[n] = finite(o) ? (short)least(0x7FFF, (int)(float_as_bits(o) - float_as_bits(rounded(o)))) : 0;
  }
};

// A query head, its key/value head, and where the sequences end.
struct Head {
  int b, h, query, key;  // query and key are indices over batch and heads
  int q_end, k_end;
  const u8 *mask, *bias;
};

__device__ __forceinline__ Head head_of(const Problem& p, int query) {
  Head r;
  r.query = query;
  r.b = query / p.query_heads;
  r.h = query % p.query_heads;
  r.key = query / p.group;
  r.q_end = p.query_lengths ? least(p.query_lengths[r.b], p.query_length) : p.query_length;
  r.k_end = p.key_lengths ? least(p.key_lengths[r.b], p.key_length) : p.key_length;
  r.mask = p.mask ? p.mask + r.b * p.mask_b + r.h * p.mask_h : nullptr;
  r.bias = p.bias ? p.bias + r.b * p.bias_b + r.h * p.bias_h : nullptr;
  return r;
}

__device__ __forceinline__ float beta_of(const Problem& p, int h, int e) {
  return EXP && EXPM1 && p.betas ? p.betas[h * EP + e] : p.beta;
}
__device__ __forceinline__ float inverse_of(float beta) { return beta == 0.f ? 1.f : 1.f / beta; }

// Whether a query sees a key, and the bias of their score: what −infinity hides is not seen.
__device__ __forceinline__ bool visible(const Problem& p, const Head& at, int i, int j, float& bias) {
  bias = 0.f;
  if (!(i < at.q_end && j < at.k_end && j - i >= p.low && j - i <= p.high)) return false;
#if GENERAL
  if (at.mask && !at.mask[i * p.mask_i + j * p.mask_j]) return false;
  if (!at.bias) return true;
  const u8* from = at.bias + i * p.bias_i + j * p.bias_j;
  bias = p.bias_wide ? *(const float*)from : widen(*(const element*)from);
  if (bias == -INF) return false;
  bias *= UNIT;
#endif
  return true;
}

// whether every query of i0 … i1 sees every key of j0 … j1 (ends not included), without a bias
__device__ __forceinline__ bool all_visible(const Problem& p, const Head& at, int i0, int i1, int j0, int j1) {
  return !at.mask && !at.bias && i1 <= at.q_end && j1 <= at.k_end && j0 - (i1 - 1) >= p.low && j1 - 1 - i0 <= p.high;
}

// the score from a product of q and k, with its bias; `slope` is the derivative of the cap. It is rounded in the same way
// everywhere: what the sum with a large bias loses is in l as well, so that it cancels in exp(s - l)
__device__ __forceinline__ float score(const Problem& p, float product, float bias, float& slope) {
#if CAP
  const float t = tanhf(product * p.scale / p.cap);
  slope = 1.f - t * t;
  return fmaf(p.cap * t, UNIT, bias);
#else
  slope = 1.f;
  return fmaf(product, p.scale * UNIT, bias);
#endif
}

__device__ __forceinline__ float exp_fast(float score) { return exp2_fast(score * (LOG2E / UNIT)); }

// x * 2^n, exactly where the result is normal
__device__ __forceinline__ float scaled(float x, int n) {
  n = greatest(-252, least(252, n));
  const int half = n / 2;
  return x * bits_as_float((u32)(half + 127) << 23) * bits_as_float((u32)(n - half + 127) << 23);
}

// (exp(t) - 1)/t, log(1 + u)/u, (exp(t) - (exp(t) - 1)/t)/t and ((1 + u) log(1 + u) - u)/u^2, smooth through 0
__device__ __forceinline__ float expm1_over(float t) {
  return fabsf(t) < 1e-2f ? fmaf(t, fmaf(t, fmaf(t, 1.f / 24, 1.f / 6), 0.5f), 1.f) : expm1f(t) / t;
}
__device__ __forceinline__ float log1p_over(float u) {
  return fabsf(u) < 1e-2f ? fmaf(u, fmaf(u, fmaf(u, -0.25f, 1.f / 3), -0.5f), 1.f) : log1pf(u) / u;
}
__device__ __forceinline__ float curvature(float t) {
  if (fabsf(t) < 0.1f) return fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.f / 144, 1.f / 30), 1.f / 8), 1.f / 3), 0.5f);
  return (expf(t) - expm1f(t) / t) / t;
}
__device__ __forceinline__ float defect(float u) {
  if (fabsf(u) < 0.1f)
    return fmaf(u, fmaf(u, fmaf(u, fmaf(u, fmaf(u, -1.f / 42, 1.f / 30), -1.f / 20), 1.f / 12), -1.f / 6), 0.5f);
  return ((1.f + u) * log1pf(u) - u) / (u * u);
}
// o is read from the expm1 form where |beta*o| is small
__device__ __forceinline__ bool is_linear(float beta, float y) { return EXPM1 && (!EXP || (fabsf(beta) < 1.f && fabsf(y) <= 0.5f)); }

// 2^x for x near 0, by the hardware where elements have 16 bits
__device__ __forceinline__ float exp2_near(float x) { return FLOAT32 ? exp2f(x) : exp2_fast(x); }

// exp(y + rest) = x * 2^n with x in [2^-1/2, 2^1/2]; y is finite
__device__ __forceinline__ float split_exp(float y, float rest, int& n) {
  const float whole = rintf(fminf(fmaxf(y * LOG2E, -1e9f), 1e9f));
  n = (int)whole;
  return exp2_near((fmaf(-whole, LN2_LOW, fmaf(-whole, LN2_HIGH, y)) + rest) * LOG2E);
}

// log(t * 2^c): the same bits for every c with the same t * 2^c; t >= 0, NaN stays NaN
__device__ __forceinline__ float split_log(float t, int c) {
  const u32 bits = float_as_bits(t), over = ((bits & 0x7FFFFFu) > 0x3504F3u) ? 1u : 0u;  // the mantissa is above 2^1/2
  const float x = bits_as_float((bits & 0x7FFFFFu) | (127u - over) << 23);
  const float whole = (float)((int)(bits >> 23) - 127 + (int)over + c);
#if FLOAT32
  const float log_x = logf(x);
#else
  const float log_x = log2_fast(x) * LN2;
#endif
  const float result = fmaf(whole, LN2_HIGH, fmaf(whole, LN2_LOW, log_x));
  return t > 0.f ? result : t == 0.f ? -INF : NOT_A_NUMBER;
}

__device__ __forceinline__ float row_sum(float x) {  // over the four lanes that hold a row
  x += __shfl_xor_sync(FULL_WARP, x, 1);
  return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

// over all lanes
__device__ __forceinline__ float warp_sum(float x) {
  for (int n = 16; n; n /= 2) x += __shfl_xor_sync(FULL_WARP, x, n);
  return x;
}

// over all threads of the block; every thread gets the result. `room` is one float per thread
__device__ __forceinline__ float block_max(float x, float* room) {
  const int tid = threadIdx.x;
  room[tid] = x;
  __syncthreads();
  for (int n = THREADS / 2; n; n /= 2) {
    if (tid < n) room[tid] = fmaxf(room[tid], room[tid + n]);
    __syncthreads();
  }
  x = room[0];
  __syncthreads();
  return x;
}
__device__ __forceinline__ float block_sum(float x, float* room) {
  const int tid = threadIdx.x;
  room[tid] = x;
  __syncthreads();
  for (int n = THREADS / 2; n; n /= 2) {
    if (tid < n) room[tid] = room[tid] + room[tid + n];
    __syncthreads();
  }
  x = room[0];
  __syncthreads();
  return x;
}

// begins to load rows [start, start + ROWS) of a matrix with COLUMNS columns into a tile [ROWS, CELLS]; zeros beyond
template <int ROWS, int CELLS, int COLUMNS>
__device__ __forceinline__ void tile_begin(element* tile, const element* matrix, int start, int end) {
  constexpr int CHUNKS = CELLS / PER;  // of a row
  if constexpr (THREADS % CHUNKS == 0) {
    constexpr int STEP = THREADS / CHUNKS;
    const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * PER;
    const element* from = matrix + (i64)(start + row) * COLUMNS + column;
    element* to = tile + row * (CELLS + PAD) + column;
    if (ROWS % STEP == 0 && CELLS == COLUMNS && start + ROWS <= end) {
#pragma unroll
      for (int r = 0; r < ROWS; r += STEP) copy_begin(to + r * (CELLS + PAD), from + r * COLUMNS);
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; r += STEP) {
        const bool there = start + row + r < end && column < COLUMNS;
        if (row + r < ROWS) copy_begin(to + r * (CELLS + PAD), there ? from + r * COLUMNS : matrix, there);
      }
    }
  } else {
    const element* from = matrix + (i64)start * COLUMNS;
    for (int n = threadIdx.x; n < ROWS * CHUNKS; n += THREADS) {
      const int row = n / CHUNKS, column = n % CHUNKS * PER;
      const bool there = start + row < end && column < COLUMNS;
      copy_begin(tile + row * (CELLS + PAD) + column, there ? from + row * COLUMNS + column : matrix, there);
    }
  }
}

// The copies of the tiles [ROWS, CELLS] of a matrix one after the other, in parts: between other work, the unit that loads and
// stores does not keep that waiting
template <int ROWS, int CELLS, int COLUMNS> struct Mover {
  static constexpr int CHUNKS = CELLS / PER, STEP = THREADS % CHUNKS ? ROWS + 1 : THREADS / CHUNKS;
  static constexpr bool APART = ROWS % STEP == 0;
  element *tile, *to;
  const element *matrix, *from;  // `from` goes over the whole matrix
  int end, edge;  // edge: of this thread's rows

  __device__ __forceinline__ Mover(element* tile, const element* matrix, int start, int end) : tile(tile), matrix(matrix), end(end) {
    const int row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS * PER;
    to = tile + row * (CELLS + PAD) + column;
    from = matrix + (i64)(start + row) * COLUMNS + column;
    edge = column < COLUMNS ? end - row : 0;
  }
  // part `n` of `parts` of the tile from row `start` on, the one after the last; nothing is read unless it is wanted. The tile in
  // shared memory is `shift` elements further
  __device__ __forceinline__ void part(int n, int parts, int start, bool wanted, int shift = 0) {
    if constexpr (APART) {
      constexpr int COUNT = ROWS / STEP;
      const int left = wanted ? edge - start : 0;
#pragma unroll
      for (int r = 0; r < COUNT; r++) {
        if (r < COUNT * n / parts || r >= COUNT * (n + 1) / parts) continue;
        copy_begin(to + shift + r * STEP * (CELLS + PAD), from, r * STEP < left);
        from += STEP * COLUMNS;
      }
    } else if (n == 0 && wanted) {
      tile_begin<ROWS, CELLS, COLUMNS>(tile + shift, matrix, start, end);
    }
  }
};

// STEPS fragments: load(to, n), use(fragment, n). EARLY: each is loaded a step before it is used, which takes registers
template <int STEPS, bool EARLY, class Load, class Use> __device__ __forceinline__ void each_fragment(Load load, Use use) {
  Right b[2];
  if (EARLY) load(b[0], 0);
#pragma unroll
  for (int n = 0; n < STEPS; n++) {
    if (!EARLY) load(b[n % 2], n);
    if (EARLY && n + 1 < STEPS) load(b[(n + 1) % 2], n + 1);
    use(b[n % 2], n);
  }
}
