// What all kernels share: the problem, what a query sees, scores, powers of two.
//
// Compiled for DP and EP, the head and value dims rounded up to a tile size, with CAP for a soft cap, and for the tile
// sizes of the forward pass: STRIPS, KEYS and FORWARD_BLOCKS. Rows of q and k have head_dim elements, a multiple of 8. Base 2 is used inside kernels only: scores carry log2(e), what is stored is in natural logarithms.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define LN2_HIGH 0.693359375f  // few bits, so that its products with integers are exact
#define LN2_LOW -2.12194440054690583e-4f
#define INF bits_as_float(0x7F800000u)
#define NOT_A_NUMBER bits_as_float(0x7FC00000u)
#define FULL_WARP 0xFFFFFFFFu
#define THREADS 128
#define BLOCK 64  // rows of a tile that a block owns in the backward pass, 16 for each warp
#define OUTSIDE 1  // flags of a key/value head: its values are outside the fast range
#define BROKEN 2  // it holds a value for which beta*v is NaN or +infinity

#if FLOAT16
#define P_SHIFT 15  // p is scaled up by so many bits: float16 has few
#define REST_SHIFT 11  // and what the rounding of X leaves by so many
#define MAX_BITS 27.f
#define SUM_BITS 28.f
#else
#define P_SHIFT 0
#define REST_SHIFT 0
#define MAX_BITS 99.5f
#define SUM_BITS 117.f
#endif

struct Problem {
  int query_heads, group, query_length, key_length, head_dim, value_dim;
  int low, high;  // query i sees keys i + low … i + high
  float scale, cap, beta;
  const int *query_lengths, *key_lengths;  // [B], or null
  const u8* mask;  // or null
  i64 mask_b, mask_h, mask_i, mask_j;  // its strides
};

#define PROBLEM                                                                                                  \
  int query_heads, int group, int query_length, int key_length, int head_dim, int value_dim, int low, int high,  \
      float scale, float cap, float beta, const int *query_lengths, const int *key_lengths, const u8 *mask,      \
      i64 mask_b, i64 mask_h, i64 mask_i, i64 mask_j
#define THE_PROBLEM                                                                                              \
  Problem {                                                                                                      \
    query_heads, group, query_length, key_length, head_dim, value_dim, low, high, scale, cap, beta,              \
        query_lengths, key_lengths, mask, mask_b, mask_h, mask_i, mask_j                                         \
  }

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int greatest(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ bool finite(float x) { return fabsf(x) < INF; }
__device__ __forceinline__ u16 round16(float x) { return (u16)pack(x, 0.f); }

// A query head, its key/value head, and where the sequences end.
struct Head {
  int b, h, query, key;  // query and key are indices over batch and heads
  int q_end, k_end;
  const u8* mask;
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
  return r;
}

__device__ __forceinline__ bool visible(const Problem& p, const Head& at, int i, int j) {
  return i < at.q_end && j < at.k_end && j - i >= p.low && j - i <= p.high &&
         (!at.mask || at.mask[i * p.mask_i + j * p.mask_j]);
}

// whether every query of i0 … i1 sees every key of j0 … j1 (ends not included)
__device__ __forceinline__ bool all_visible(const Problem& p, const Head& at, int i0, int i1, int j0, int j1) {
  return !at.mask && i1 <= at.q_end && j1 <= at.k_end && j0 - (i1 - 1) >= p.low && j1 - 1 - i0 <= p.high;
}

// the score in base 2 from a product of q and k; `slope` is the derivative of the cap
__device__ __forceinline__ float score(const Problem& p, float product, float& slope) {
#if CAP
  const float t = tanhf(product * p.scale / p.cap);
  slope = 1.f - t * t;
  return p.cap * t * LOG2E;
#else
  slope = 1.f;
  return product * (p.scale * LOG2E);
#endif
}

// x * 2^n, exactly where the result is normal
__device__ __forceinline__ float scaled(float x, int n) {
  n = greatest(-252, least(252, n));
  const int half = n / 2;
  return x * bits_as_float((u32)(half + 127) << 23) * bits_as_float((u32)(n - half + 127) << 23);
}

// two 16-bit numbers times 2^n
__device__ __forceinline__ u32 shifted(u32 x, int n) {
  return n ? pack(scaled(widen((u16)x), n), scaled(widen((u16)(x >> 16)), n)) : x;
}

// exp(y + rest) = x * 2^n with x in [2^-1/2, 2^1/2]; y is finite
__device__ __forceinline__ float split_exp(float y, float rest, int& n) {
  const float whole = rintf(fminf(fmaxf(y * LOG2E, -1e9f), 1e9f));
  n = (int)whole;
  return exp2f((fmaf(-whole, LN2_LOW, fmaf(-whole, LN2_HIGH, y)) + rest) * LOG2E);
}

// log(t * 2^c): the same bits for every c with the same t * 2^c; t >= 0, NaN stays NaN
__device__ __forceinline__ float split_log(float t, int c) {
  if (!(t > 0.f)) return t == 0.f ? -INF : NOT_A_NUMBER;
  const u32 bits = float_as_bits(t);
  int n = (int)(bits >> 23) - 127;
  float x = bits_as_float((bits & 0x7FFFFFu) | 0x3F800000u);
  if (x > 1.41421356f) { x *= 0.5f; n++; }
  const float whole = (float)(n + c);
  return fmaf(whole, LN2_HIGH, fmaf(whole, LN2_LOW, logf(x)));
}

__device__ __forceinline__ float row_sum(float x) {  // over the four lanes that hold a row
  x += __shfl_xor_sync(FULL_WARP, x, 1);
  return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
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

// begins to load rows [start, start + ROWS) of a matrix with `width` columns into a tile [ROWS, WIDTH]; zeros beyond
template <int ROWS, int WIDTH>
__device__ __forceinline__ void tile_begin(u16* tile, const u16* matrix, int start, int end, int width) {
  const u16* from = matrix + (i64)start * width;
  for (int n = threadIdx.x; n < ROWS * WIDTH / 8; n += THREADS) {
    const int row = n / (WIDTH / 8), column = n % (WIDTH / 8) * 8;
    const bool there = start + row < end && column < width;
    copy_begin(tile + row * (WIDTH + 8) + column, there ? from + row * width + column : matrix, there);
  }
}
