// Rows in which few keys carry the weight, for the Hopper kernel, which leaves them: the rounding of X does not average out
// there, so X is the sum of two 16-bit numbers (values.cu), made from the values on the fly.
//
// rows [B*Hq, Lq] lists such rows of each head in any order, and counts [B*Hq] says how many. A block takes 64 of a head at a
// time, and walks over tiles of 32 keys: a warp makes the weights of 16 rows, and then a quarter of the channels of all rows.
// No bit of a row depends on the others of its block. Mostly there is one tile: short code matters, for it is read once.

#if !FLOAT32 && EXP && !EXPM1 && DP <= 128 && EP <= 128
#define FEW_TILE 32

struct FewTiles {
  union {
    struct {
      element q[64 * (DP + PAD)], k[FEW_TILE * (DP + PAD)], x[2][FEW_TILE * (EP + PAD)], rest[FEW_TILE * (EP + PAD)];  // x: first v
    };
    float results[64 * (EP + 4)];  // at the end
  };
  element p[64 * (FEW_TILE + PAD)];
  float factor[64];  // of a row
  int row[64], c[EP], groups[THREADS], head, group;  // groups: of heads up to this one
};

// begins to copy rows of a matrix with so many columns, a multiple of 8, into a tile; zeros beyond
__device__ __forceinline__ void few_begin(element* tile, int cells, const element* from, int start, int end, int columns) {
#pragma unroll 2
  for (int n = threadIdx.x; n < FEW_TILE * cells / PER; n += THREADS) {
    const int j = n / (cells / PER), e = n % (cells / PER) * PER;
    const bool there = start + j < end && e < columns;
    copy_begin(tile + j * (cells + PAD) + e, there ? from + (i64)(start + j) * columns + e : from, there);
  }
}

// x and rest of the values of so many keys, in place
__device__ __forceinline__ void few_values(const Problem& p, element* x, element* rest, const int* c, int keys) {
#pragma unroll 1
  for (int n = threadIdx.x; n < FEW_TILE * EP / PER; n += THREADS) {
    const int j = n / (EP / PER), e = n % (EP / PER) * PER, at = j * (EP + PAD) + e;
    Vector made = {}, left = {};
    if (j < keys && e < p.value_dim) {
      const Vector from = *(const Vector*)(x + at);
#pragma unroll
      for (int h = 0; h < PER; h++) {
        const float one = widen(from.x[h]), y = p.beta * one, steps = 1 << 21;  // 11 bits of what is left
        int exponent;
        const float mantissa = split_exp(y, fmaf(p.beta, one, -y), exponent), coarse = rounded(mantissa);
        exponent -= c[e + h];
        made.x[h] = finite(y) ? narrow(scaled(coarse, exponent)) : 0;
        left.x[h] = finite(y) ? narrow(scaled(rintf((mantissa - coarse) * steps) / steps, exponent + REST_SHIFT)) : 0;
      }
    }
    *(Vector*)(x + at) = made;
    *(Vector*)(rest + at) = left;
  }
}

__device__ __forceinline__ void few_rows(const Problem& p, const Head& at, const element* q, const element* k, const element* v, const int* c,
                                         const int* rows, int count, element* out, const Unrounded& kept, float* lse, FewTiles& sm) {
  const int tid = threadIdx.x, warp = tid / 32, g = tid % 32 / 4, t = tid % 4;
  __syncthreads();  // nobody reads the tiles any more
  if (tid < 64) sm.row[tid] = tid < count ? rows[tid] : -1;
  for (int e = tid; e < EP; e += THREADS) sm.c[e] = c[e];
  __syncthreads();
  int least_row = sm.row[0], greatest_row = sm.row[0];
#pragma unroll 4
  for (int n = 1; n < count; n++) {
    least_row = least(least_row, sm.row[n]);
    greatest_row = greatest(greatest_row, sm.row[n]);
  }
  const int last = least(at.k_end, greatest_row + p.high + 1);
  const int first = greatest(0, least_row + p.low) / FEW_TILE, end = (last + FEW_TILE - 1) / FEW_TILE;
  auto begin_k = [&](int tile) { few_begin(sm.k, DP, k, tile * FEW_TILE, last, WIDTH); };
  auto begin_v = [&](int tile) { few_begin(sm.x[(tile - first) % 2], EP, v, tile * FEW_TILE, last, p.value_dim); };
#pragma unroll 2
  for (int n = tid; n < 64 * (DP / PER); n += THREADS) {
    const int i = n / (DP / PER), d = n % (DP / PER) * PER;
    const bool there = sm.row[i] >= 0 && d < WIDTH;
    copy_begin(sm.q + i * (DP + PAD) + d, there ? q + (i64)sm.row[i] * WIDTH + d : q, there);
  }
  begin_k(first);
  begin_v(first);

  const int own = warp * 16 + g;  // and 8 further: the rows of which this thread makes weights
  const bool some = warp * 16 < count;
  const float factor = p.scale * LOG2E;
  float m[2] = {-INF, -INF}, l[2] = {0.f, 0.f}, total[2] = {0.f, 0.f};  // total: the sum of the rounded weights
  float acc[4][4][4] = {};  // of 16 rows each: the channels 16 * warp … + 15, and those 64 further
#pragma unroll 1
  for (int tile = first; tile < end; tile++) {
    const int j0 = tile * FEW_TILE, stage = (tile - first) % 2;
    copy_wait();
    __syncthreads();  // this tile is there, and nobody reads the x before
    if (tile + 1 < end) begin_v(tile + 1);
    few_values(p, sm.x[stage], sm.rest, sm.c, last - j0);
    if (some) {
      float s[FEW_TILE / 8][4] = {};
#pragma unroll 1
      for (int d = 0; d < DP; d += 16) {
        Left a;
        load_a(a, sm.q + warp * 16 * (DP + PAD) + d, DP + PAD);
#pragma unroll
        for (int j = 0; j < FEW_TILE / 16; j++) {
          Right b;
          load_b(b, sm.k + j * 16 * (DP + PAD) + d, DP + PAD);
          mma(s[2 * j], s[2 * j + 1], a, b);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int i = sm.row[own + h * 8], from = i + p.low - j0, to = i < 0 ? -1 : least(at.k_end - 1, i + p.high) - j0;
        float top = -INF;
#pragma unroll
        for (int j = 0; j < FEW_TILE / 8; j++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const int column = j * 8 + t * 2 + r;
            float& one = s[j][2 * h + r];
            one = column >= from && column <= to ? one : -INF;
            top = fmaxf(top, one);
          }
        top = row_max(top);
        const float next = fmaxf(m[h], top == -INF ? -INF : top * factor), minus_m = P_SHIFT - (next == -INF ? 0.f : next);
        const float shrink = m[h] == next ? 1.f : exp2_fast(m[h] - next);
        m[h] = next;
        l[h] *= shrink;
        total[h] *= shrink;
        if (t == 0) sm.factor[own + h * 8] = shrink;
#pragma unroll
        for (int j = 0; j < FEW_TILE / 8; j++) {
          const float one = exp2_fast(fmaf(s[j][2 * h], factor, minus_m)), two = exp2_fast(fmaf(s[j][2 * h + 1], factor, minus_m));
          l[h] += one + two;
          total[h] += rounded(one) + rounded(two);
          store_pair(sm.p + (own + h * 8) * (FEW_TILE + PAD) + j * 8 + t * 2, one, two);
        }
      }
    }
    __syncthreads();  // weights, x and rest are there, and nobody reads k any more
    if (tile + 1 < end) begin_k(tile + 1);
#pragma unroll
    for (int w = 0; w < 4; w++) {
      if (w * 16 >= count) continue;
#pragma unroll
      for (int n = 0; n < 4; n++)
#pragma unroll
        for (int r = 0; r < 4; r++) acc[w][n][r] *= sm.factor[w * 16 + g + r / 2 * 8];
#pragma unroll
      for (int j = 0; j < FEW_TILE; j += 16) {
        Left a, less;
        load_a(a, sm.p + w * 16 * (FEW_TILE + PAD) + j, FEW_TILE + PAD);
#pragma unroll
        for (int r = 0; r < 4; r++)  // rest is scaled by 2^REST_SHIFT
          less.x[r] = pack(widen((u16)a.x[r]) / (1 << REST_SHIFT), widen((u16)(a.x[r] >> 16)) / (1 << REST_SHIFT));
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int e = (warp + 4 * h) * 16;
          if (e >= EP) continue;
          Right b;
          load_b_transposed(b, sm.x[stage] + j * (EP + PAD) + e, EP + PAD);
          mma(acc[w][2 * h], acc[w][2 * h + 1], a, b);
          load_b_transposed(b, sm.rest + j * (EP + PAD) + e, EP + PAD);
          mma(acc[w][2 * h], acc[w][2 * h + 1], less, b);
        }
      }
    }
  }
  __syncthreads();  // nobody reads tiles and factors any more
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = row_sum(l[h]), all = row_sum(total[h]);
    const int i = sm.row[own + h * 8];
    if (t != 0 || i < 0) continue;
    lse[i] = (m[h] - P_SHIFT) / UNIT + logf(sum);
    sm.factor[own + h * 8] = 1.f / all;
  }
#pragma unroll
  for (int w = 0; w < 4; w++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = w * 16 + g + h * 8, e = (warp + n / 2 * 4) * 16 + n % 2 * 8 + t * 2;
        if (e < EP && w * 16 < count) *(Two*)(sm.results + row * (EP + 4) + e) = {acc[w][n][2 * h], acc[w][n][2 * h + 1]};
      }
  __syncthreads();
  const float inverse_of_beta = inverse_of(p.beta);
#pragma unroll 1
  for (int n = tid; n < count * (EP / 2); n += THREADS) {
    const int row = n / (EP / 2), e = n % (EP / 2) * 2;
    if (e >= p.value_dim) continue;
    float o[2];
    for (int r = 0; r < 2; r++) o[r] = split_log(sm.results[row * (EP + 4) + e + r] * sm.factor[row], sm.c[e + r]) * inverse_of_beta;
    const i64 to = (i64)sm.row[row] * p.value_dim + e;
    store_pair(out + to, o[0], o[1]);
#pragma unroll
    for (int r = 0; r < 2; r++) kept.store(to + r, o[r]);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) forward_few(
    PROBLEM, const element* q, const element* k, const element* v, const int* c, const int* counts, const int* rows, element* out,
    float* residual, short* rest, float* lse, int heads, int workers) {
#if !FLOAT32 && EXP && !EXPM1 && DP <= 128 && EP <= 128
  const Problem p = THE_PROBLEM;
  SHARED_MEMORY(raw);
  FewTiles& sm = *(FewTiles*)raw;
  const int tid = threadIdx.x;
  int part = blockIdx.x;  // of 64 rows, counted from the head `start`
  for (int start = 0; start < heads; start += THREADS) {
    const int own = start + tid < heads ? (counts[start + tid] + 63) / 64 : 0;
    if (!__syncthreads_or(own)) continue;
    int end = own;
    for (int n = 1; n < THREADS; n *= 2) {
      sm.groups[tid] = end;
      __syncthreads();
      if (tid >= n) end += sm.groups[tid - n];
      __syncthreads();
    }
    sm.groups[tid] = end;
    __syncthreads();
    const int all = sm.groups[THREADS - 1];
    for (; part < all; part += workers) {
      if (end - own <= part && part < end) {
        sm.head = start + tid;
        sm.group = part - (end - own);
      }
      __syncthreads();
      const Head at = head_of(p, sm.head);
      const i64 first = (i64)at.query * p.query_length, keys = (i64)at.key * p.key_length;
      const int done = sm.group * 64, count = least(64, counts[at.query] - done);
      few_rows(p, at, q + first * WIDTH, k + keys * WIDTH, v + keys * p.value_dim, c + at.key * CP, rows + first + done, count,
               out + first * p.value_dim,
               {residual ? residual + first * p.value_dim : nullptr, rest ? rest + first * p.value_dim : nullptr}, lse + first,
               sm);
    }
    part -= all;
    __syncthreads();
  }
#endif
}
