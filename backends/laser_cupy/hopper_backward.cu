// Backward on Hopper: what backward.cu computes, in one kernel for dq, dk and dv.
//
//     p = exp(s - l)    ds = p * (G·Xᵀ + r)    dv = beta * exp(beta*v) * (pᵀ·G)    dk = dsᵀ·Q    dq = ds·K
//
// A block owns 128 keys, a warpgroup 64 of them, and walks over tiles of 64 queries. Scores are computed transposed,
// [keys, queries], so that pᵀ and dsᵀ are left operands in registers as they come; dk and dv stay in registers. ds goes
// through shared memory, because dq sums over the keys of both warpgroups, each of which makes half of its columns.
//
// dq of a tile of queries is a sum over blocks. Its parts are added in global memory by the copy engine, in one order, so
// that every run gives the same bits: `turns` has a counter for each tile of queries, and the key tiles take their turns
// from the last one to the first. Blocks draw their work in that order too, so a block waits only for blocks that have
// begun, and all go through the queries upwards: whoever comes first in the order is ahead in time as well.
// In `sums` a tile of dq lies as the threads have it: [half of the columns][DT/16][128 threads][4].

#define QUERIES 64
#define KEYS 128
#define Q_BYTES (QUERIES * DT * 2)
#define G_BYTES (QUERIES * ET * 2)
#define K_BYTES (KEYS * DT * 2)
#define X_BYTES (KEYS * ET * 2)
#define ROWS_BYTES (2 * QUERIES * 4)
#define SUMS (QUERIES * DT)  // floats of a tile of dq
#define ALL_ONES (FLOAT16 ? 0x7C00u : 0x7F80u)  // the exponent of what is not finite

struct Shared {  // offsets of tiles are multiples of 1024 bytes
  u8 k[K_BYTES];              // [DT/64][KEYS][64]
  u8 x[X_BYTES];              // [ET/64][KEYS][64]
  u8 q[STAGES][Q_BYTES];      // [DT/64][QUERIES][64]
  u8 g[STAGES][G_BYTES];      // [ET/64][QUERIES][64]
  u8 ds[2][KEYS * 128];       // [KEYS][64 queries]
  float4 dq[2][DT / 16][128];
  float rows[STAGES][2][QUERIES];  // minus l, r
  u64 keys_full, keys_free, full[STAGES], free[STAGES], dq_full[2], dq_free, drawn_full[2], drawn_free[2];
  int drawn[2];
  bool odd[KEYS];  // whether a key is not finite
};

// the tiles of queries that see some key of j0 … j0 + KEYS
struct Span { int first, end; };
__device__ __forceinline__ Span span_of(const Problem& p, const Head& at, int j0) {
  const int first = greatest(0, j0 - p.high) / QUERIES, last = least(at.q_end - 1, j0 + KEYS - 1 - p.low);
  return {first, j0 < at.k_end && last >= 0 ? greatest(first, last / QUERIES + 1) : first};
}
// the last key tile that a tile of queries sees; negative where it sees none
__device__ __forceinline__ int last_of(const Problem& p, const Head& at, int tile) {
  const int last = least(at.k_end - 1, tile * QUERIES + QUERIES - 1 + p.high);
  return last < 0 ? -1 : last / KEYS;
}

// Work: key tiles, the last of a head first
struct Place { int kv, j0; };
__device__ __forceinline__ Place place_of(int index, int blocks) {
  return {index / blocks, (blocks - 1 - index % blocks) * KEYS};
}

// What all roles do with the work that the producer has drawn: nothing for heads outside the fast range
#define FOR_EACH_DRAWN(threads_of_role)                                                    \
  for (int turn = 0;; turn++) {                                                            \
    barrier_wait(&sm.drawn_full[turn % 2], turn / 2 % 2);                                  \
    const int index = sm.drawn[turn % 2];                                                  \
    __syncwarp(threads_of_role);                                                           \
    if (threadIdx.x % 32 == 0) barrier_arrive(&sm.drawn_free[turn % 2]);                   \
    if (index >= work) return;                                                             \
    const Place place = place_of(index, blocks);                                           \
    if (flags[place.kv] & OUTSIDE) continue;                                               \
    const Span span = span_of(pr, head_of(pr, place.kv * pr.group), place.j0);

// ------------------------------------------------------------------------------------------------------------- roles

__device__ __forceinline__ void produce(const Problem& pr, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* x_map,
                                        const TensorMap* g_map, const float* rows, const int* flags, int* counter, int work,
                                        int blocks, int tiles, Shared& sm) {
  Ring<STAGES> ring;
  for (int turn = 0, uses = 0;; turn++) {
    const int index = atomicAdd(counter, 1);
    barrier_wait(&sm.drawn_free[turn % 2], turn / 2 % 2 ^ 1);
    sm.drawn[turn % 2] = index;
    barrier_arrive(&sm.drawn_full[turn % 2]);
    if (index >= work) return;
    const Place place = place_of(index, blocks);
    if (flags[place.kv] & OUTSIDE) continue;
    const Span span = span_of(pr, head_of(pr, place.kv * pr.group), place.j0);
    if (span.first == span.end) continue;
    barrier_wait(&sm.keys_free, uses++ % 2 ^ 1);
    barrier_expect(&sm.keys_full, K_BYTES + X_BYTES);
    tile_copy<KEYS, DT>(sm.k, k_map, place.j0, place.kv, &sm.keys_full);
    tile_copy<KEYS, ET>(sm.x, x_map, place.j0, place.kv, &sm.keys_full);
    for (int member = 0; member < pr.group; member++) {
      const int head = place.kv * pr.group + member;
#pragma unroll 1
      for (int tile = span.first; tile < span.end; tile++) {
        barrier_wait(&sm.free[ring.stage], ring.parity ^ 1);
        u64* bar = &sm.full[ring.stage];
        barrier_expect(bar, Q_BYTES + G_BYTES + ROWS_BYTES);
        tile_copy<QUERIES, DT>(sm.q[ring.stage], q_map, tile * QUERIES, head, bar);
        bytes_copy(sm.rows[ring.stage], rows + ((i64)head * tiles + tile) * 2 * QUERIES, ROWS_BYTES, bar);
        tile_copy<QUERIES, ET>(sm.g[ring.stage], g_map, tile * QUERIES, head, bar);
        ring.next();
      }
    }
  }
}

// Two threads take turns in adding tiles of dq: one waits for the end of an addition, to tell the next block of it, while
// the other begins the next.
__device__ __forceinline__ void add(const Problem& pr, const int* flags, float* sums, int* turns, int work, int blocks, int tiles,
                                    int which, Shared& sm) {
  int n = 0;
  FOR_EACH_DRAWN(1)
    for (int member = 0; member < pr.group; member++) {
      const Head at = head_of(pr, place.kv * pr.group + member);
#pragma unroll 1
      for (int tile = span.first; tile < span.end; tile++, n++) {
        if (n % 2 != which) continue;
        barrier_wait(&sm.dq_full[which], n / 2 % 2);
        const i64 to = (i64)at.query * tiles + tile;
        const int rank = last_of(pr, at, tile) - place.j0 / KEYS;
        int seen;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turns + to) : "memory");
        while (seen != rank);
        publish_global();
        if (rank == 0) floats_write(sums + to * SUMS, sm.dq, SUMS * 4);
        else floats_add(sums + to * SUMS, sm.dq, SUMS * 4);
        floats_read();
        barrier_arrive(&sm.dq_free);
        floats_done();
        publish_global();
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns + to), "r"(rank + 1) : "memory");
      }
    }
  }
}

// zeros for what is not finite in a tile; all consumers together
__device__ __forceinline__ void tile_clean(u8* tile, int bytes) {
  for (int n = threadIdx.x - 128; n < bytes / 4; n += 256) {
    u32 x = ((u32*)tile)[n];
    if ((x & ALL_ONES) == ALL_ONES) x &= 0xFFFF0000u;
    if ((x >> 16 & ALL_ONES) == ALL_ONES) x &= 0xFFFFu;
    ((u32*)tile)[n] = x;
  }
  publish();
  named_wait(2, 256);
}

// Whether some key is not finite, and which: sm.odd. All consumers together; two threads look at a row.
__device__ __forceinline__ bool find_odd(Shared& sm) {
  const int row = (threadIdx.x - 128) / 2, half = threadIdx.x % 2;
  const u8* from = sm.k + (DT == 128 ? half * BLOCK_BYTES(KEYS) : half * 64) + row * 128;
  constexpr int PIECES = DT / 16;
  bool odd = false;
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    const uint4 x = *(const uint4*)(from + (n + row) % PIECES * 16);  // neighbours look at different banks
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int m = 0; m < 4; m++) odd |= (words[m] & ALL_ONES) == ALL_ONES || (words[m] >> 16 & ALL_ONES) == ALL_ONES;
  }
  odd |= __shfl_xor_sync(FULL_WARP, (int)odd, 1) != 0;
  if (half == 0) sm.odd[row] = odd;
  return named_any(2, 256, odd);
}

// exp(y) * 2^-c for heads inside the fast range, 0 where y is not finite; for what is not rounded to X
__device__ __forceinline__ float value_of(float y, int c) {
  const float shift = 12582912.f;  // 1.5 * 2^23: a sum with it is rounded to an integer, which is in its last bits
  const float sum = fmaf(y, LOG2E, shift), whole = sum - shift;
  const float x = exp2_fast(fmaf(-whole, LN2_LOW, fmaf(-whole, LN2_HIGH, y)) * LOG2E);
  return finite(y) ? x * bits_as_float((float_as_bits(sum) - float_as_bits(shift) - c + 127) << 23) : 0.f;
}

// writes rows of a gradient, [64, 8N] as results of products have it, times 2^n
template <int N>
__device__ __forceinline__ void write_rows(u16* to, float (&d)[N][4], int width, int own, int end, int n) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < N; m += 2)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x[4] = {d[m][2 * h], d[m][2 * h + 1], d[m + 1][2 * h], d[m + 1][2 * h + 1]};
#if FLOAT16
#pragma unroll
      for (int w = 0; w < 4; w++) x[w] = scaled(x[w], n);
#endif
      const u32 even = pack(x[0], x[1]), odd = pack(x[2], x[3]);
      const u32 got = __shfl_xor_sync(FULL_WARP, t % 2 ? even : odd, 1);
      const int row = own + h * 8, column = (m + t % 2) * 8 + t / 2 * 4;
      if (row < end && column < width) *(uint2*)(to + (i64)row * width + column) = t % 2 ? make_uint2(got, odd) : make_uint2(even, got);
    }
}

// zeros in place of p where a key is hidden. Where a key is not finite and its query yet has a sum, it had no weight in it.
__device__ __forceinline__ void mask_tile(float (&p)[QUERIES / 8][4], const Problem& pr, const Head& at, int i0, int own,
                                          bool unclean, const bool (&bad)[2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int j = own + h * 8, first = j - pr.high - i0 - t * 2;
    const int last = j < at.k_end ? least(j - pr.low, at.q_end - 1) - i0 - t * 2 : -1;
#pragma unroll
    for (int m = 0; m < QUERIES / 8; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) p[m][2 * h + r] = m * 8 + r >= first && m * 8 + r <= last ? p[m][2 * h + r] : 0.f;
  }
  if (unclean)
#pragma unroll
    for (int m = 0; m < QUERIES / 8; m++)
#pragma unroll
      for (int h = 0; h < 4; h++) p[m][h] = bad[h / 2] && p[m][h] == p[m][h] ? 0.f : p[m][h];
}

__device__ __forceinline__ void consume(const Problem& pr, const u16* v, const int* c,
                                        const int* scales, const int* flags, u16* dk_out, u16* dv_out, int work, int blocks,
                                        Shared& sm) {
  const int which = warpgroup() - 1, t = threadIdx.x % 4;  // warpgroup 0 has the other roles
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // of the warpgroup's keys
  const bool first_lane = threadIdx.x % 32 == 0;
  const float factor = pr.scale * LOG2E;
  const int ds_offset = matrices_offset(which * 64 + threadIdx.x % 128 / 32 * 16);
  Ring<STAGES> ring;
  int n_tiles = 0, uses = 0;
  FOR_EACH_DRAWN(FULL_WARP)
    const int own = place.j0 + which * 64 + row;
    const i64 keys = (i64)place.kv * pr.key_length;
    const int g_scale = scales[2 * place.kv], ds_scale = scales[2 * place.kv + 1];
#if FLOAT16
    const int steps = g_scale - ds_scale - P_SHIFT;
    const float in = scaled(1.f, steps / 2), in2 = scaled(1.f, steps - steps / 2);  // in range, both
#endif
    float dk[DT / 8][4] = {}, dv[ET / 8][4] = {};
    if (span.first < span.end) {
      barrier_wait(&sm.keys_full, uses++ % 2);
      const bool odd_keys = find_odd(sm), unclean = odd_keys || flags[place.kv] & ODD;
      bool bad[2] = {false, false};
      if (odd_keys) {
        for (int h = 0; h < 2; h++) bad[h] = sm.odd[which * 64 + row + h * 8];
        tile_clean(sm.k, K_BYTES);
      }
      const Head at = head_of(pr, place.kv * pr.group);  // the sequences of the group end where this one's do
      float s[QUERIES / 8][4], gx[QUERIES / 8][4];       // [64 keys, 64 queries]
      float dq[DT / 16][4];                              // [64 queries, DT/2]
      auto begin_s = [&] {  // the first products of the next tile of queries
        const int group = warpgroup() - 1;  // anew: the compiler would keep the operands of all products in registers
        barrier_wait(&sm.full[ring.stage], ring.parity);
        if (unclean) tile_clean(sm.q[ring.stage], Q_BYTES);
        pin(s);
        products_fence();
        multiply_rows<KEYS, QUERIES, DT>(s, sm.k + group * BLOCK_BYTES(64), sm.q[ring.stage]);
        products_commit();
      };
      auto begin_gx = [&] {
        pin(gx);
        products_fence();
        multiply_rows<KEYS, QUERIES, ET>(gx, sm.x + (warpgroup() - 1) * BLOCK_BYTES(64), sm.g[ring.stage]);
        products_commit();
      };
      auto hand_over = [&](int n) {  // dq of the n-th tile
        barrier_wait(&sm.dq_free, n % 2 ^ 1);
#pragma unroll
        for (int m = 0; m < DT / 16; m++) sm.dq[which][m][threadIdx.x % 128] = make_float4(dq[m][0], dq[m][1], dq[m][2], dq[m][3]);
        publish();
        __syncwarp();
        if (first_lane) barrier_arrive(&sm.dq_full[n % 2]);
      };
      begin_s();
      begin_gx();
      const int end = n_tiles + pr.group * (span.end - span.first);
#pragma unroll 1
      for (int tile = span.first;; tile = tile + 1 < span.end ? tile + 1 : span.first) {
        const int i0 = tile * QUERIES, j0 = place.j0;
        const u8 *q_tile = sm.q[ring.stage], *g_tile = sm.g[ring.stage];
        const float *minus_l = sm.rows[ring.stage][0] + t * 2, *r = sm.rows[ring.stage][1] + t * 2;
        u8* ds_tile = sm.ds[n_tiles % 2];
        u32 p[QUERIES / 16][4], ds[QUERIES / 16][4];
        products_wait<1>();
        pin(s);
#pragma unroll
        for (int m = 0; m < QUERIES / 8; m++) {
          const float2 shift = *(const float2*)(minus_l + m * 8);
#pragma unroll
          for (int h = 0; h < 4; h++) s[m][h] = exp2_fast(fmaf(s[m][h], factor, h % 2 ? shift.y : shift.x));
        }
        if (j0 + KEYS > at.k_end || j0 - (i0 + QUERIES - 1) < pr.low || j0 + KEYS - 1 - i0 > pr.high || unclean)
          mask_tile(s, pr, at, i0, own, unclean, bad);
        as_operand(p, s);
        pin(p);
        pin(dv);
        products_fence();
        multiply_columns(dv, p, g_tile);
        products_commit();
        products_wait<1>();
        pin(gx);
#pragma unroll
        for (int m = 0; m < QUERIES / 8; m++) {
          const float2 term = *(const float2*)(r + m * 8);
#pragma unroll
          for (int h = 0; h < 4; h++) {
#if FLOAT16
            gx[m][h] = s[m][h] * fmaf(gx[m][h] * in, in2, h % 2 ? term.y : term.x);
#else
            gx[m][h] = s[m][h] * (gx[m][h] + (h % 2 ? term.y : term.x));
#endif
          }
        }
        as_operand(ds, gx);
#pragma unroll
        for (int m = 0; m < QUERIES / 16; m++) store_matrices(ds_tile + (ds_offset ^ m * 32), ds[m]);
        publish();
        pin(ds);
        pin(dk);
        products_fence();
        multiply_columns(dk, ds, q_tile);
        products_commit();
        named_wait(1, 256);  // ds of both warpgroups is there
        const u64 left = operand_transposed(ds_tile, 0);
        const u64 right = operand_transposed(sm.k + (warpgroup() - 1) * (DT == 128 ? BLOCK_BYTES(KEYS) : 64), 0);
        pin(dq);
        products_fence();
#pragma unroll
        for (int m = 0; m < KEYS / 16; m++) product<1, 1>(dq, moved(left, m * 2048), moved(right, m * 2048), m > 0);
        products_commit();
        products_wait<0>();
        pin(dq);
        pin(dk);
        pin(dv);
        pin(p);
        pin(ds);
        __syncwarp();  // all lanes have read their rows
        if (first_lane) barrier_arrive(&sm.free[ring.stage]);
        ring.next();
        if (++n_tiles == end) break;
        begin_s();
        hand_over(n_tiles - 1);  // while these products run
        begin_gx();
      }
      if (first_lane) barrier_arrive(&sm.keys_free);
      hand_over(n_tiles - 1);
    }
#pragma unroll
    for (int m = 0; m < DT / 8; m++)
#pragma unroll
      for (int h = 0; h < 4; h++) dk[m][h] *= pr.scale;
    const int* own_c = c + (i64)place.kv * CP;
    write_rows(dk_out + keys * WIDTH, dk, WIDTH, own, pr.key_length, ds_scale);
#pragma unroll
    for (int m = 0; m < ET / 8; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int j = own + h * 8, e = m * 8 + t * 2;
        if (j >= pr.key_length || e >= pr.value_dim) continue;
        const u32 both = *(const u32*)(v + (keys + j) * pr.value_dim + e);
#pragma unroll
        for (int w = 0; w < 2; w++) dv[m][2 * h + w] *= pr.beta * value_of(pr.beta * widen((u16)(both >> 16 * w)), own_c[e + w]);
      }
    write_rows(dv_out + keys * pr.value_dim, dv, pr.value_dim, own, pr.key_length, g_scale - P_SHIFT);
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) hopper_backward(
    PROBLEM, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap g_map, const u16* v, const int* c,
    const float* rows, const int* scales, const int* flags, float* sums, int* turns,
    int* counter, u16* dk, u16* dv, int work, int blocks, int tiles) {
  const Problem pr = THE_PROBLEM;
  extern __shared__ u8 memory[];
  Shared& sm = *(Shared*)(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    barrier_init(&sm.keys_full, 1);
    barrier_init(&sm.keys_free, 8);
    for (int n = 0; n < STAGES; n++) {
      barrier_init(&sm.full[n], 1);
      barrier_init(&sm.free[n], 8);
    }
    for (int n = 0; n < 2; n++) {
      barrier_init(&sm.dq_full[n], 8);
      barrier_init(&sm.drawn_full[n], 1);
      barrier_init(&sm.drawn_free[n], 10);
    }
    barrier_init(&sm.dq_free, 1);
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0)
      produce(pr, &q_map, &k_map, &x_map, &g_map, rows, flags, counter, work, blocks, tiles, sm);
    else if (threadIdx.x % 32 == 0 && warp < 3)
      add(pr, flags, sums, turns, work, blocks, tiles, warp - 1, sm);
  } else {
    registers_take<240>();
    consume(pr, v, c, scales, flags, dk, dv, work, blocks, sm);
  }
}
