// Backward on Hopper, what moves data: the record in shared memory, how the work is cut, the thread that brings tiles, the
// two that have the copy engine add up dq, and how dk and dv leave. What is computed with the tiles is in hopper_backward.cu,
// which says how it all goes together.

#define QUERIES (DT + ET > 128 ? 64 : 128)
#define KEYS 128
#define STAGES 2  // of q and g
#define WAITING (QUERIES == 64)  // whether there are registers for dv's product to run while ds is made, and for taking turns
#define Q_BYTES (QUERIES * DT * 2)
#define G_BYTES (QUERIES * ET * 2)
#define K_BYTES (KEYS * DT * 2)
#define X_BYTES (KEYS * ET * 2)
#define ROWS_BYTES (2 * QUERIES * 4)
#define SUMS (QUERIES * DT)  // floats of a tile of dq
#define DQ_PARTS (SUMS / 1024)  // groups of 8 columns that a warpgroup makes of it, for 64 queries
#define ALL_ONES (FLOAT16 ? 0x7C00u : 0x7F80u)  // the exponent of what is not finite

// a key tile; kv is negative at the end
struct alignas(8) Place { int kv, j0; };

struct Shared {  // offsets of tiles are multiples of 1024 bytes
  u8 k[K_BYTES];              // [DT/64][KEYS][64]
  u8 x[X_BYTES];              // [ET/64][KEYS][64], values at first
  u8 q[STAGES][Q_BYTES];      // [DT/64][QUERIES][64]
  u8 g[STAGES][G_BYTES];      // [ET/64][QUERIES][64]
  u8 ds[2][KEYS * QUERIES * 2];  // [QUERIES/64][KEYS][64]
  float4 dq[2][2][DQ_PARTS][128];
  float rows[STAGES][2][QUERIES];  // minus l, r
  u64 k_full, k_free, x_full, x_free;
  u64 q_full[STAGES], g_full[STAGES], done[STAGES];  // done: by all consumers; q and g are free, ds is there
  u64 dq_full[2], dq_free[2], drawn_full[2], drawn_free[2];
  Place drawn[2];
  bool odd[KEYS];  // whether a key is not finite
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "hopper.py has another size of it");

// the tiles of queries that see some key of j0 … j0 + KEYS
struct Span { int first, end; };
__device__ __forceinline__ Span span_of(const Problem& p, const Head& at, int j0) {
  const int first = greatest(0, j0 - p.high) / QUERIES, last = least(at.q_end - 1, j0 + KEYS - 1 - p.low);
  return {first, j0 < at.k_end && last >= 0 ? greatest(first, last / QUERIES + 1) : first};
}
// the first key tile that a tile of queries sees, and the last one; negative where it sees none
__device__ __forceinline__ int first_of(const Problem& p, int tile) { return greatest(0, tile * QUERIES + p.low) / KEYS; }
__device__ __forceinline__ int last_of(const Problem& p, const Head& at, int tile) {
  const int last = least(at.k_end - 1, tile * QUERIES + QUERIES - 1 + p.high);
  return last < 0 ? -1 : last / KEYS;
}

// Work: the key tiles of `section` heads, the first ones of all of them before the second ones, and so on
struct Work { int count, blocks, section, tiles; };
__device__ __forceinline__ Place place_of(const Work& w, int index) {
  const int begin = index / (w.section * w.blocks) * w.section, within = index - begin * w.blocks;
  const int heads = least(w.section, w.count / w.blocks - begin);
  return {begin + within % heads, within / heads * KEYS};
}

// what all roles do with the work that the producer has drawn
#define FOR_EACH_DRAWN(arrive)                                                             \
  for (int turn = 0;; turn++) {                                                            \
    barrier_wait(&sm.drawn_full[turn % 2], turn / 2 % 2);                                  \
    const Place place = sm.drawn[turn % 2];                                                \
    if (place.kv < 0) {                                                                    \
      if (WAITING) floats_read();                                                          \
      return;                                                                              \
    }                                                                                      \
    arrive(&sm.drawn_free[turn % 2]);                                                      \
    const Span span = span_of(pr, head_of(pr, place.kv * pr.group), place.j0);


__device__ __forceinline__ void produce(const Problem& pr, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                                        const TensorMap* g_map, const float* rows, const int* flags, int* counter,
                                        const Work& work, Shared& sm) {
  Ring<STAGES> ring;
  for (int turn = 0, uses = 0;; turn++) {
    int index;
    Place place;
    do {  // heads outside the fast range are left to others
      index = atomicAdd(counter, 1);
      place = place_of(work, index);
    } while (index < work.count && flags[place.kv] & OUTSIDE);
    barrier_wait(&sm.drawn_free[turn % 2], turn / 2 % 2 ^ 1);
    if (index >= work.count) place.kv = -1;
    sm.drawn[turn % 2] = place;
    barrier_arrive(&sm.drawn_full[turn % 2]);
    if (place.kv < 0) return;
    const Span span = span_of(pr, head_of(pr, place.kv * pr.group), place.j0);
    if (span.first == span.end) continue;
    tile_fetch<KEYS, DT>(k_map, place.j0, place.kv);
    tile_fetch<KEYS, ET>(v_map, place.j0, place.kv);
    bool begun = false;
    for (int member = 0; member < pr.group; member++) {
      const int head = place.kv * pr.group + member;
#pragma unroll 1
      for (int tile = span.end - 1; tile >= span.first; tile--) {
        barrier_wait(&sm.done[ring.stage], ring.parity ^ 1);
        u64* bar = &sm.q_full[ring.stage];
        barrier_expect(bar, Q_BYTES + ROWS_BYTES);
        tile_copy<QUERIES, DT>(sm.q[ring.stage], q_map, tile * QUERIES, head, bar);
        bytes_copy(sm.rows[ring.stage], rows + ((i64)head * work.tiles + tile) * 2 * QUERIES, ROWS_BYTES, bar);
        if (!begun) {
          barrier_wait(&sm.x_free, uses % 2 ^ 1);
          barrier_expect(&sm.x_full, X_BYTES);
          tile_copy<KEYS, ET>(sm.x, v_map, place.j0, place.kv, &sm.x_full);
          barrier_wait(&sm.k_free, uses % 2 ^ 1);
          barrier_expect(&sm.k_full, K_BYTES);
          tile_copy<KEYS, DT>(sm.k, k_map, place.j0, place.kv, &sm.k_full);
          uses++;
          begun = true;
        }
        bar = &sm.g_full[ring.stage];
        barrier_expect(bar, G_BYTES);
        tile_copy<QUERIES, ET>(sm.g[ring.stage], g_map, tile * QUERIES, head, bar);
        ring.next();
      }
    }
  }
}

// Two threads take turns in adding tiles of dq: one waits for the end of an addition, to tell the next block of it, while
// the other begins the next.
__device__ __forceinline__ void add(const Problem& pr, float* sums, int* turns, const Work& work, int which, Shared& sm) {
  int n = 0;
  FOR_EACH_DRAWN(barrier_arrive)
    for (int member = 0; member < pr.group; member++) {
      const int head = place.kv * pr.group + member;
#pragma unroll 1
      for (int tile = span.end - 1; tile >= span.first; tile--, n++) {
        if (n % 2 != which) continue;
        barrier_wait(&sm.dq_full[which], n / 2 % 2);
        const i64 to = (i64)head * work.tiles + tile;
        const int rank = place.j0 / KEYS - first_of(pr, tile);
        int seen;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turns + to) : "memory");
        while (seen != rank);
        publish_global();
        if (rank == 0) floats_write(sums + to * SUMS, sm.dq[which], SUMS * 4);
        else floats_add(sums + to * SUMS, sm.dq[which], SUMS * 4);
        floats_read();
        barrier_arrive(&sm.dq_free[which]);
        floats_done();
        publish_global();
        asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns + to), "r"(rank + 1) : "memory");
      }
    }
  }
}

// Four lanes have a pair of columns each of four groups of 8: then each has one group.
__device__ __forceinline__ uint4 one_group(const u32 (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const u32 a = __shfl_xor_sync(FULL_WARP, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(FULL_WARP, odd ? w[2] : w[3], 1);
  const u32 x[4] = {odd ? a : w[0], odd ? w[1] : a, odd ? b : w[2], odd ? w[3] : b};
  const u32 c = __shfl_xor_sync(FULL_WARP, high ? x[0] : x[2], 2), d = __shfl_xor_sync(FULL_WARP, high ? x[1] : x[3], 2);
  return high ? make_uint4(c, d, x[2], x[3]) : make_uint4(x[0], x[1], c, d);
}

#if WAITING
// puts rows of a gradient, [64, 8N] as results of products have it, times 2^n, into a tile
template <int N> __device__ __forceinline__ void stage_rows(u8* tile, const float (&d)[N][4], int n) {
  const int offset = matrices_offset(threadIdx.x % 128 / 32 * 16);
#pragma unroll
  for (int m = 0; m < N / 2; m++) {
    u32 a[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float* x = &d[2 * m + w / 2][w % 2 * 2];
      a[w] = FLOAT16 ? pack(scaled(x[0], n), scaled(x[1], n)) : pack(x[0], x[1]);
    }
    store_matrices(tile + m / 4 * BLOCK_BYTES(64) + (offset ^ m % 4 * 32), a);
  }
}
#else  // there are no registers for the other way
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
      const u32 first = t % 2 ? got : even, second = t % 2 ? odd : got;
      // as a branch it would keep the exchanges of lanes from running side by side
      asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %0, 0;\n@there st.global.v2.b32 [%1], {%2, %3};\n}\n" ::"r"(
                       (int)(row < end && column < width)),
                   "l"(to + (i64)row * width + column), "r"(first), "r"(second)
                   : "memory");
    }
}
#endif
