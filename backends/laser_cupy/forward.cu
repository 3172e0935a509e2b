// Forward: flash attention over (q, k, X), and o from the row's result at the end (values.cu has the forms of X).
//
// A block of 4 warps owns QUERIES queries, a warp 16 * STRIPS of them, and walks over tiles of KEYS keys. acc, m and l stay
// in float32 registers, and the weights of a tile take the place of its scores. X of a tile is on its way during the product
// of q and k, and k of the next one during the rest. m may be up to SLACK bits behind the greatest score of its row: what it
// is subtracted from cancels, and acc is scaled rarely.

#define QUERIES (64 * STRIPS)
#define MOVES (DP >= 64 ? DP / 32 : 1)  // steps of a product between which the next tile is fetched

// whether a key whose score is so far above m is more than a quarter of the row
__device__ __forceinline__ bool is_heavy(float above, float total) { return total < 4.f * (1 << P_SHIFT) * exp_fast(above); }

// o of a channel from the forms' results, sums over keys divided by the row's
__device__ __forceinline__ float output_of(float exp_form, float expm1_form, const int* c, int e, float beta, float inverse) {
  if (EXPM1) {
    float s = scaled(expm1_form, c[XP - EP + e]);
    if (s == s) s = fminf(fmaxf(s, -3e38f), 3e38f);
    if (is_linear(beta, beta * s)) return s * log1p_over(beta * s);
  }
  return split_log(exp_form, EXP ? c[e] : 0) * inverse;
}

struct alignas(16) RowEnd { float over_total, nothing; i64 to; };  // of a row: 1/Σp; o where acc is 0 or NaN; where o goes, or -1

// o of 16 rows from `results` [16, XP]. Mostly a lane has four channels of every row
__device__ __forceinline__ void write_rows(const Problem& pr, const Head& at, const float* results, const RowEnd* ends, const int* c,
                                           element* out, float* residual) {
  const int lane = threadIdx.x % 32;
  if (EXP && !EXPM1 && !FLOAT32 && pr.value_dim % 4 == 0) {
    const float per_beta = inverse_of(pr.beta) * LN2;
#pragma unroll 1
    for (int e = lane * 4; e < pr.value_dim; e += 128) {
      int own_c[4];
      for (int h = 0; h < 4; h++) own_c[h] = c[e + h] - 127 + 0x4B400000;  // and 1.5 * 2^23, which makes floats of integers
#pragma unroll 4
      for (int r = 0; r < 16; r++) {
        const RowEnd end = ends[r];
        const Floats acc = *(const Floats*)(results + r * (XP + 4) + e);
        Floats o;
#pragma unroll
        for (int h = 0; h < 4; h++) {  // the exponent apart, so that c is not in the bits of o
          const float one = acc.x[h] * end.over_total;
          const u32 bits = float_as_bits(one);
          const float whole = bits_as_float((bits >> 23) + (u32)own_c[h]) - 12582912.f;
          const float log_x = log2_fast(bits_as_float((bits & 0x7FFFFFu) | 0x3F800000u));
          o.x[h] = one > 0.f ? (whole + log_x) * per_beta : end.nothing;
        }
        if (end.to < 0) continue;
        store_pair(out + end.to + e, o.x[0], o.x[1]);
        store_pair(out + end.to + e + 2, o.x[2], o.x[3]);
        if (residual) *(Floats*)(residual + end.to + e) = o;
      }
    }
    return;
  }
#pragma unroll 1
  for (int n = lane; n < 16 * EP; n += 32) {
    const int r = n / EP, e = n % EP;
    const RowEnd end = ends[r];
    if (e >= pr.value_dim || end.to < 0) continue;
    const float* from = results + r * (XP + 4) + e;
    const float beta = beta_of(pr, at.h, e);
    float o = output_of(from[0] * end.over_total, from[XP - EP] * end.over_total, c, e, beta, inverse_of(beta));
    if (end.nothing == 0.f) o = 0.f;
    out[end.to + e] = narrow(o);
    if (residual) residual[end.to + e] = o;
  }
}

struct alignas(16) Pairs { float x[2][2]; };  // of the rows of a thread: strips, and the two halves of each
// and of one row, of which each of its four lanes has another: the greatest score, the sum of the rounded weights, and tiles in
// which it had, then, a key of more than a quarter of all so far; a bit for 1 << `span` tiles
struct alignas(16) Single { float top, total; u32 heavy; };
struct Rows { Pairs m, l; Single one; };
#define LOWEST -3.40282347e38f  // below all scores; what it is subtracted from stays what it is, -infinity too

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) forward(
    PROBLEM, const element* q, const element* k, const element* v, const element* x, const int* c,
    const int* flags, element* out, float* residual, float* lse) {
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  element* q_tile = (element*)raw;                   // [QUERIES, DP]
  element* k_tile = q_tile + QUERIES * (DP + PAD);   // [KEYS, DP]
  element* x_tile = k_tile + KEYS * (DP + PAD);      // [KEYS, XP]
  const int blocks = (pr.query_length + QUERIES - 1) / QUERIES;
  const Head at = head_of(pr, blockIdx.x / blocks);
  const int flag = flags[at.key];
  if (flag & OUTSIDE) return;
  const int i0 = (blocks - 1 - blockIdx.x % blocks) * QUERIES;  // causal: the longest first
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int rows = i0 + warp * 16 * STRIPS, rows_end = least(rows + 16 * STRIPS, at.q_end);
  const int own = rows + g;  // the first row of this thread; others are 8 * n further
  const i64 keys = (i64)at.key * pr.key_length;
  q += (i64)at.query * pr.query_length * WIDTH;
  k += keys * WIDTH;
  x += keys * XP;
  v += keys * pr.value_dim;

  float acc[STRIPS][XP / 8][4] = {};
  // What a thread knows of its rows is in shared memory: there are few registers, and storing the sums makes the compiler add at
  // once, instead of keeping weights in float32 until all products are made. Nobody else reads it
  Rows& rows_of = ((Rows*)(x_tile + KEYS * (XP + PAD)))[threadIdx.x];
  rows_of = {{LOWEST, LOWEST, LOWEST, LOWEST}, {}, {-INF, 0.f, 0}};
  auto pick = [&](const Pairs& rows) {
    const float one = t % 2 ? rows.x[0][1] : rows.x[0][0], other = t % 2 ? rows.x[STRIPS - 1][1] : rows.x[STRIPS - 1][0];
    return t / 2 ? other : one;
  };
  auto total_of = [&](float total, int w, int h) { return __shfl_sync(FULL_WARP, total, threadIdx.x % 32 / 4 * 4 + w * 2 + h); };
  const int i1 = least(i0 + QUERIES, at.q_end);
  const int first = greatest(0, i0 + pr.low) / KEYS * KEYS, end = i1 <= i0 ? 0 : least(at.k_end, i1 + pr.high);
  // keys whose tiles every query of the block sees
  const int whole_from = least(i0 + QUERIES, pr.query_length) > at.q_end ? end : greatest(0, i0 + QUERIES - 1 + pr.low);
  const int whole_end = least(at.k_end, i0 + pr.high + 1) - KEYS;
  int span = 0;
  while (pr.key_length > KEYS * 32 << span) span++;
  const Spot own_q = spot_a(q_tile + warp * STRIPS * 16 * (DP + PAD), DP + PAD), all_k = spot_b(k_tile, DP + PAD);
  const Spot all_x = spot_b_transposed(x_tile, XP + PAD);
  tile_begin<QUERIES, DP, WIDTH>(q_tile, q, i0, pr.query_length);

  // One walk over the keys. Unless GENERAL, scores are products times one factor, in their order, and what is seen are columns
  // from one to another. AGAIN: with m and total as the first walk has left them, adds what the rounding of X has lost, for the keys
  // of which it does not average out: those in tiles with a key of more than a quarter of the row. Each row decides that for
  // itself, so that its bits do not depend on its neighbours.
  auto walk = [&](auto again, u32 tiles) {
    const float factor = GENERAL ? 1.f : pr.scale * UNIT;
    Mover<KEYS, DP, WIDTH> next_k(k_tile, k, first, at.k_end);
    Mover<KEYS, XP, XP> next_x(x_tile, x, first, at.k_end);
    next_k.part(0, 1, first, first < end);
    copy_wait();
    __syncthreads();
    for (int j0 = first; j0 < end; j0 += KEYS) {
      const u32 tile = 1u << (j0 / KEYS >> span);
      if (again.value) {
        if (!(tiles & tile)) {
          __syncthreads();
          next_k.part(0, 1, j0 + KEYS, j0 + KEYS < end);
          copy_wait();
          __syncthreads();
          continue;
        }
        make_rest<KEYS>(pr, at, x_tile, v, c + (i64)at.key * CP, j0);
      }
      float s[STRIPS][KEYS / 8][4];  // [16 * STRIPS, KEYS]
      Pairs minus_m;
      float own_above;
      bool carries[STRIPS][2];
      // whether a query of this warp sees a key of this tile
      const bool whole = j0 >= whole_from && j0 <= whole_end;
      const bool some = whole || (j0 < rows_end + pr.high && j0 + KEYS > rows + pr.low);
      if (some) {
#pragma unroll
        for (int w = 0; w < STRIPS; w++)
#pragma unroll
          for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int r = 0; r < 4; r++) s[w][j][r] = 0.f;
#pragma unroll
        for (int d = 0; d < DP / 16; d++) {
          Left a[STRIPS];
#pragma unroll
          for (int w = 0; w < STRIPS; w++) load_a(a[w], own_q, w * 16 * (DP + PAD) + d * 16, DP + PAD);
#pragma unroll
          for (int j = 0; j < KEYS / 16; j++) {
            Right b;
            load_b(b, all_k, j * 16 * (DP + PAD) + d * 16, DP + PAD);
#pragma unroll
            for (int w = 0; w < STRIPS; w++) mma(s[w][2 * j], s[w][2 * j + 1], a[w], b);
          }
          if (!again.value && d < MOVES) next_x.part(d, MOVES, j0, true);
        }
        if constexpr (GENERAL) {
          Pairs odd = rows_of.l;
#pragma unroll
          for (int w = 0; w < STRIPS; w++)
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
              for (int r = 0; r < 4; r++) {
                float slope, bias, &one = s[w][j][r];
                const bool seen = visible(pr, at, own + w * 16 + r / 2 * 8, j0 + j * 8 + t * 2 + r % 2, bias);
                odd.x[w][r / 2] = seen ? fmaf(one, 0.f, odd.x[w][r / 2]) : odd.x[w][r / 2];  // a cap would make a number of infinity
                one = seen ? score(pr, one, bias, slope) : -INF;
              }
          rows_of.l = odd;
        } else if (!whole) {
#pragma unroll
          for (int w = 0; w < STRIPS; w++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int i = own + w * 16 + h * 8, from = i + pr.low - j0 - t * 2;
              const int to = (i < at.q_end ? least(at.k_end - 1, i + pr.high) - j0 : -1) - t * 2;
#pragma unroll
              for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                  float& one = s[w][j][2 * h + r];
                  one = j * 8 + r >= from && j * 8 + r <= to ? one : -INF;
                }
            }
        }

        const Pairs m = rows_of.m;
        Pairs ahead;  // the greatest score of this tile
        bool grows = false;
#pragma unroll
        for (int w = 0; w < STRIPS; w++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float most[2];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
              const float one = fmaxf(s[w][j][2 * h], s[w][j][2 * h + 1]);
              most[j % 2] = j < 2 ? one : fmaxf(most[j % 2], one);
            }
            ahead.x[w][h] = row_max(fmaxf(most[0], most[1])) * factor;
            minus_m.x[w][h] = -m.x[w][h];
            grows |= ahead.x[w][h] > m.x[w][h] + SLACK;
          }
        const float own_ahead = pick(ahead);
        if (!again.value && warp_any(grows)) {
          Pairs shrink, next, l = rows_of.l;
#pragma unroll
          for (int w = 0; w < STRIPS; w++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              next.x[w][h] = ahead.x[w][h] > m.x[w][h] + SLACK ? ahead.x[w][h] : m.x[w][h];
              shrink.x[w][h] = m.x[w][h] == next.x[w][h] ? 1.f : exp_fast(m.x[w][h] - next.x[w][h]);
              minus_m.x[w][h] = -next.x[w][h];
              l.x[w][h] *= shrink.x[w][h];
#pragma unroll
              for (int e = 0; e < XP / 8; e++) {
                acc[w][e][2 * h] *= shrink.x[w][h];
                acc[w][e][2 * h + 1] *= shrink.x[w][h];
              }
            }
          rows_of.m = next;
          rows_of.l = l;
          rows_of.one.total *= pick(shrink);
        }
        if (!again.value) rows_of.one.top = fmaxf(rows_of.one.top, own_ahead);
        own_above = own_ahead + pick(minus_m);
#pragma unroll
        for (int w = 0; w < STRIPS; w++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            if (again.value) carries[w][h] = flag & NARROW || is_heavy(ahead.x[w][h] + minus_m.x[w][h], total_of(rows_of.one.total, w, h));
            minus_m.x[w][h] += P_SHIFT - (again.value ? REST_SHIFT : 0);
          }
      } else if (!again.value) {
        next_x.part(0, 1, j0, true);
      }
      copy_wait();
      __syncthreads();  // x is there, and nobody reads k any more
      if (some) {
        float sums[STRIPS][4] = {};
        Right b[2];
        load_b_transposed(b[0], all_x, 0, XP + PAD);
        Left p[KEYS / 16][STRIPS];
        auto weigh = [&](int k, Pairs& l) {
#pragma unroll
          for (int w = 0; w < STRIPS; w++) {
#pragma unroll
            for (int r = 0; r < 8; r++) {
              float& one = s[w][2 * k + r / 4][r % 4];
              one = exp_fast(fmaf(one, factor, minus_m.x[w][r % 4 / 2]));
              if (!again.value) l.x[w][r % 4 / 2] += one;
            }
            left_of(p[k][w], s[w][2 * k], s[w][2 * k + 1]);
#if !FLOAT32
#pragma unroll
            for (int h = 0; h < 2; h++)
              if (again.value && !carries[w][h]) p[k][w].x[h] = p[k][w].x[h + 2] = 0;
#endif
          }
        };
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
          Pairs l = rows_of.l;
          weigh(k, l);
          rows_of.l = l;
          if (k < KEYS / 16 / 2 || KEYS < 32) next_k.part(k, KEYS < 32 ? 1 : KEYS / 16 / 2, j0 + KEYS, j0 + KEYS < end);
#if !FLOAT32
          const u32 ones = pack(1.f, 1.f);
#pragma unroll
          for (int w = 0; w < STRIPS; w++)
            if (!again.value) mma(sums[w], p[k][w].x, ones, ones);
#endif
#pragma unroll
          for (int e = 0; e < XP / 16; e++) {
            constexpr int STEPS = XP / 16;
            const int n = k * STEPS + e + 1;  // the next step's values are loaded before this one's product
            if (n < KEYS / 16 * STEPS) load_b_transposed(b[n % 2], all_x, n / STEPS * 16 * (XP + PAD) + n % STEPS * 16, XP + PAD);
#pragma unroll
            for (int w = 0; w < STRIPS; w++) mma(acc[w][2 * e], acc[w][2 * e + 1], p[k][w], b[(n + 1) % 2]);
          }
        }
        if (!again.value) {
          Pairs both;
          for (int w = 0; w < STRIPS; w++)
            for (int h = 0; h < 2; h++) both.x[w][h] = sums[w][2 * h];
          Single one = rows_of.one;
          one.total += pick(both);
          if (is_heavy(own_above, one.total)) one.heavy |= tile;
          rows_of.one = one;
        }
      } else {
        next_k.part(0, 1, j0 + KEYS, j0 + KEYS < end);
      }
      copy_wait();
      __syncthreads();  // k of the next tile is there, and nobody reads x any more
    }
  };
  walk(Flag<false>(), 0);
#if !FLOAT32
  bool few = flag & NARROW;
  few |= is_heavy(rows_of.one.top - pick(rows_of.m), rows_of.one.total);
  if (__syncthreads_or(few)) {
    u32* room = (u32*)k_tile;
    room[threadIdx.x] = flag & NARROW ? ~0u : few ? rows_of.one.heavy : 0;
    __syncthreads();
    u32 tiles = 0;
    for (int n = 0; n < THREADS; n++) tiles |= room[n];
    __syncthreads();
    walk(Flag<true>(), tiles);
  }
#endif

  const Rows own_rows = rows_of;
  // o by way of shared memory: a warp writes whole rows
  float* results = (float*)raw + warp * 16 * (XP + 8);  // [16, XP] of a warp: sums over keys
  RowEnd* ends = (RowEnd*)(results + 16 * (XP + 4));
#pragma unroll
  for (int w = 0; w < STRIPS; w++) {
    __syncthreads();  // nobody reads the last tiles, or the strip before, any more
#pragma unroll
    for (int e = 0; e < XP / 8; e++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        store_two(results + (g + h * 8) * (XP + 4) + e * 8 + t * 2, acc[w][e][2 * h], acc[w][e][2 * h + 1]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float sum = row_sum(own_rows.l.x[w][h]), rounded_sum = total_of(own_rows.one.total, w, h);
      const int i = own + w * 16 + h * 8;
      const i64 row = (i64)at.query * pr.query_length + i;
      const bool there = i < pr.query_length;
      if (t) continue;
      const float over_total = sum == sum ? 1.f / (FLOAT32 ? sum : rounded_sum) : NOT_A_NUMBER;
      const float nothing = sum == 0.f ? 0.f : sum == sum ? -INF * inverse_of(pr.beta) : NOT_A_NUMBER;
      ends[g + h * 8] = {over_total, nothing, there ? row * pr.value_dim : -1};
      if (there) lse[row] = sum == 0.f ? -INF : (own_rows.m.x[w][h] - P_SHIFT) / UNIT + logf(sum);
    }
    __syncwarp();
    write_rows(pr, at, results, ends, c + (i64)at.key * CP, out, residual);
  }
}
