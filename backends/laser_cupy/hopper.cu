// What the Hopper kernels ask of the hardware beside hardware.cu: sm_90a, compute capability 9.0.
//
// Four things are new against sm_80, and the kernels are built around them:
//  - The tensor memory accelerator copies a tile by one instruction of one thread, and arrives at a barrier when the
//    bytes are there. What is outside of the matrix reads as zero. The host describes a matrix by a TensorMap.
//  - An mbarrier is a counter in shared memory with a phase: it flips when all have arrived and all bytes have. One waits
//    for the parity of a phase. Barriers come in pairs: `full`, filled by a copy, and `free`, when nobody reads any more.
//  - wgmma multiplies 64 rows by up to 256 columns, by the four warps of a warpgroup together, asynchronously. The right
//    operand is read from shared memory, the left one from there or from registers; the result is in registers.
//  - setmaxnreg moves registers from the warps that only copy to those that multiply.
//
// A tile in shared memory is [CELLS / 64][ROWS][64]: blocks of 64 columns, whose rows are 128 bytes, with the 16-byte
// pieces of row r in the order piece ^ (r % 8) (the 128-byte swizzle: no bank conflicts). Tiles begin at multiples of
// 1024 bytes.

typedef unsigned long long u64;

struct alignas(64) TensorMap { u64 opaque[16]; };

#define BLOCK_BYTES(rows) ((rows) * 128)  // of 64 columns of a tile
#define DT (WIDTH > 64 ? 128 : 64)  // columns of tiles of q and k
#define ET (EP > 64 ? 128 : 64)  // and of X and G

// -------------------------------------------------------------------------------------------------------- mbarriers

__device__ __forceinline__ void barrier_init(u64* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// arrives, and has the phase wait for so many bytes too
__device__ __forceinline__ void barrier_expect(u64* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
// Arrives for a warp: what its lanes have done is over for whoever waits. One lane does, after all of them; under racecheck,
// which does not follow that order through __syncwarp, every lane does.
#ifndef EVERY_LANE
#define EVERY_LANE 0
#endif
#define ARRIVALS (EVERY_LANE ? 32 : 1)  // of a warp
__device__ __forceinline__ void warp_arrive(u64* bar) {
  if (!EVERY_LANE) __syncwarp();
  if (EVERY_LANE || threadIdx.x % 32 == 0) barrier_arrive(bar);
}
// waits for the end of the phase of this parity; the phase before the first one counts as ended, with parity 1
__device__ __forceinline__ void barrier_wait(u64* bar, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ended;\n"
      "bra again;\n"
      "ended:\n"
      "}\n" ::"r"(shared_address(bar)), "r"(parity) : "memory");
}

// named barriers of `count` threads: wait, or only arrive
__device__ __forceinline__ void named_wait(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// waits, and whether x holds for one of the threads
__device__ __forceinline__ bool named_any(int id, int count, bool x) {
  int any;
  asm volatile("{\n.reg .pred one, all;\nsetp.ne.b32 one, %3, 0;\nbar.red.or.pred all, %1, %2, one;\nselp.b32 %0, 1, 0, all;\n}\n"
               : "=r"(any) : "r"(id), "r"(count), "r"((int)x) : "memory");
  return any;
}

// A ring of SIZE tiles: the n-th use is of stage n % SIZE, and its phase has the parity n / SIZE % 2.
template <int SIZE> struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == SIZE) { stage = 0; parity ^= 1; }
  }
};

// ----------------------------------------------------------------------------------------------------------- copies

// begins to copy rows [row, row + ROWS) of matrix `head` into a tile; one thread, which has told the barrier of the bytes
template <int ROWS, int CELLS>
__device__ __forceinline__ void tile_copy(u8* tile, const TensorMap* map, int row, int head, u64* bar) {
#pragma unroll
  for (int n = 0; n < CELLS / 64; n++)
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            shared_address(tile + n * BLOCK_BYTES(ROWS))),
        "l"(map), "r"(shared_address(bar)), "r"(n * 64), "r"(row), "r"(head)
        : "memory");
}

// the same for what nobody will read again soon
template <int ROWS, int CELLS>
__device__ __forceinline__ void tile_copy_once(u8* tile, const TensorMap* map, int row, int head, u64* bar) {
#pragma unroll
  for (int n = 0; n < CELLS / 64; n++)
    asm volatile(
        "{\n.reg .b64 first;\ncreatepolicy.fractional.L2::evict_first.b64 first, 1.0;\n"
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], "
        "first;\n}\n" ::"r"(shared_address(tile + n * BLOCK_BYTES(ROWS))),
        "l"(map), "r"(shared_address(bar)), "r"(n * 64), "r"(row), "r"(head)
        : "memory");
}

// begins to bring them into the L2 cache
template <int ROWS, int CELLS> __device__ __forceinline__ void tile_fetch(const TensorMap* map, int row, int head) {
#pragma unroll
  for (int n = 0; n < CELLS / 64; n++)
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(n * 64), "r"(row), "r"(head)
                 : "memory");
}

__device__ __forceinline__ void bytes_fetch(const void* from, int bytes) {  // a multiple of 16
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// the same for adjacent bytes, a multiple of 16
__device__ __forceinline__ void bytes_copy(void* to, const void* from, int bytes, u64* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(bar)) : "memory");
}

// begins to write a tile to rows [row, row + ROWS) of matrix `head`; one thread, after publish() of those that filled it.
// What is outside of the matrix is not written.
template <int ROWS, int CELLS>
__device__ __forceinline__ void tile_write(const TensorMap* map, const u8* tile, int row, int head) {
#pragma unroll
  for (int n = 0; n < CELLS / 64; n++)
    asm volatile(
        "{\n.reg .b64 first;\ncreatepolicy.fractional.L2::evict_first.b64 first, 1.0;\n"
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], first;\n}\n" ::"l"(map),
        "r"(shared_address(tile + n * BLOCK_BYTES(ROWS))), "r"(n * 64), "r"(row), "r"(head)
        : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Begins to write floats from shared to global memory, or to add them to what is there. Under initcheck, which does not see
// what the copy engine writes, the thread does it itself; nobody else adds meanwhile.
#ifndef PLAIN_SUMS
#define PLAIN_SUMS 0
#endif
__device__ __forceinline__ void floats_write(float* to, const void* from, int bytes) {
#if PLAIN_SUMS
  for (int n = 0; n < bytes / 4; n++) __stcg(to + n, ((const float*)from)[n]);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
__device__ __forceinline__ void floats_add(float* to, const void* from, int bytes) {
#if PLAIN_SUMS
  for (int n = 0; n < bytes / 4; n++) __stcg(to + n, __ldcg(to + n) + ((const float*)from)[n]);
#else
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
// waits until all that this thread has begun to write has been read from shared memory, or is done
__device__ __forceinline__ void floats_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void floats_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// what this thread has written to shared memory is seen by products and copies that begin after a barrier
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// the order of copies to global memory and of what other blocks do there
__device__ __forceinline__ void publish_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// where this lane writes its part of a left operand [16, 16] to a tile with 64 columns, as an offset; ^ 32 * n moves it by
// 16 * n columns
__device__ __forceinline__ int matrices_offset(int row) {
  const int lane = threadIdx.x % 32, own = row + lane % 16;
  return own * 128 + (lane / 16 ^ own % 8) * 16;
}
__device__ __forceinline__ void store_matrices(u8* to, const u32 (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3]) : "memory");
}

// the warpgroup of this thread, in a way that the compiler knows to be the same for the warp
__device__ __forceinline__ int warpgroup() { return __shfl_sync(FULL_WARP, threadIdx.x / 128, 0); }

// ----------------------------------------------------------------------------------------------------------- wgmma

// An operand in shared memory. `rows_are_outer`: the rows of the tile are the rows of the left or the columns of the right
// operand (its 64-column blocks are then walked through along the sum); otherwise the rows are what is summed over, and
// `block` is the number of bytes from one block of 64 columns to the next.
__device__ __forceinline__ u64 operand(const u8* tile) {  // rows are outer
  return (u64)(shared_address(tile) >> 4 & 0x3FFF) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
__device__ __forceinline__ u64 operand_transposed(const u8* tile, int block) {
  return (u64)(shared_address(tile) >> 4 & 0x3FFF) | (u64)(block >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// the operand so many bytes further
__device__ __forceinline__ u64 moved(u64 operand, int bytes) {
  u64 d;  // its halves are registers
  asm("{\n.reg .b32 low, high;\nmov.b64 {low, high}, %1;\nadd.u32 low, low, %2;\nmov.b64 %0, {low, high};\n}\n" : "=l"(d) : "l"(operand), "r"(bytes / 16));
  return d;
}

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// waits until no more than N groups of products run
template <int N> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// the compiler may not move uses of these registers across this point
template <int N> __device__ __forceinline__ void pin(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}
template <int N> __device__ __forceinline__ void pin(u32 (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; n++) asm volatile("" : "+r"(d[n][0]), "+r"(d[n][1]), "+r"(d[n][2]), "+r"(d[n][3])::"memory");
}

#if FLOAT16
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define REGS_16 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define REGS_32                                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31}"
#define REGS_64                                                                                                     \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,"    \
  "%57,%58,%59,%60,%61,%62,%63}"
#define ROW_OF(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ROWS_OF_8(d, n)                                                                                       \
  ROW_OF(d, n), ROW_OF(d, n + 1), ROW_OF(d, n + 2), ROW_OF(d, n + 3), ROW_OF(d, n + 4), ROW_OF(d, n + 5), ROW_OF(d, n + 6), \
      ROW_OF(d, n + 7)

// d [64, N] (+)= a [64, 16] · b [16, N]: begins. Warp w of the warpgroup has rows 16w … 16w + 15 of d, and its lane 4g + t
// has d[g][8n + 2t, + 1] in d[n][0, 1] and d[g + 8][…] in d[n][2, 3]. `add`: to what is in d. TA, TB: see operand.
template <int TA, int TB, int N>
__device__ __forceinline__ void product(float (&d)[N][4], u64 a, u64 b, int add) {
  static_assert(N == 4 || N == 8 || N == 16, "32, 64 or 128 columns");
  if constexpr (N == 4) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16." WGMMA_TYPES " " REGS_16 ", %16, %17, p, 1, 1, %19, %20;\n}\n"
                 : ROW_OF(d, 0), ROW_OF(d, 1), ROW_OF(d, 2), ROW_OF(d, 3) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  } else if constexpr (N == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " " REGS_32 ", %32, %33, p, 1, 1, %35, %36;\n}\n"
                 : ROWS_OF_8(d, 0) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " " REGS_64 ", %64, %65, p, 1, 1, %67, %68;\n}\n"
                 : ROWS_OF_8(d, 0), ROWS_OF_8(d, 8) : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
  }
}

// the same with the left operand in registers, as a result of a product has it after rounding: see as_operand
template <int TB, int N>
__device__ __forceinline__ void product(float (&d)[N][4], const u32 (&a)[4], u64 b, int add) {
  static_assert(N == 8 || N == 16, "64 or 128 columns");
  if constexpr (N == 8) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " " REGS_32
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
                 : ROWS_OF_8(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));
  } else {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " " REGS_64
                 ", {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"
                 : ROWS_OF_8(d, 0), ROWS_OF_8(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));
  }
}

// a result [64, 8N], rounded, as the left operand of N/2 products over 16 columns each
template <int N> __device__ __forceinline__ void as_operand(u32 (&a)[N / 2][4], const float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N / 2; n++) {
    a[n][0] = pack(d[2 * n][0], d[2 * n][1]);
    a[n][1] = pack(d[2 * n][2], d[2 * n][3]);
    a[n][2] = pack(d[2 * n + 1][0], d[2 * n + 1][1]);
    a[n][3] = pack(d[2 * n + 1][2], d[2 * n + 1][3]);
  }
}

// d [64, 8N] = a · bᵀ begins, for tiles a [64 rows of A_ROWS, CELLS] and b [8N rows of B_ROWS, CELLS]
template <int A_ROWS, int B_ROWS, int CELLS, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N][4], const u8* a, const u8* b) {
  const u64 left = operand(a), right = operand(b);
#pragma unroll
  for (int n = 0; n < CELLS / 16; n++)
    product<0, 0>(d, moved(left, n / 4 * BLOCK_BYTES(A_ROWS) + n % 4 * 32), moved(right, n / 4 * BLOCK_BYTES(B_ROWS) + n % 4 * 32),
                  n > 0);
}

// d [64, 8N] += a · b begins, for a [64, 16 * STEPS] in registers and a tile b [16 * STEPS rows, 8N]
template <int STEPS, int N>
__device__ __forceinline__ void multiply_columns(float (&d)[N][4], const u32 (&a)[STEPS][4], const u8* b) {
  const u64 right = operand_transposed(b, BLOCK_BYTES(16 * STEPS));
#pragma unroll
  for (int n = 0; n < STEPS; n++) product<1>(d, a[n], moved(right, n * 2048), 1);
}

// ----------------------------------------------------------------------------------------------------------- registers

template <int N> __device__ __forceinline__ void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
