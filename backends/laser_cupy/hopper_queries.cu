// dq from its sums, which are in the order in which the Hopper backward kernel adds to them.

// Four lanes have a pair of columns each of four groups of 8: then each has one group.
__device__ __forceinline__ uint4 one_group(const u32 (&w)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const u32 a = __shfl_xor_sync(FULL_WARP, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(FULL_WARP, odd ? w[2] : w[3], 1);
  const u32 x[4] = {odd ? a : w[0], odd ? w[1] : a, odd ? b : w[2], odd ? w[3] : b};
  const u32 c = __shfl_xor_sync(FULL_WARP, high ? x[0] : x[2], 2), d = __shfl_xor_sync(FULL_WARP, high ? x[1] : x[3], 2);
  return high ? make_uint4(c, d, x[2], x[3]) : make_uint4(x[0], x[1], c, d);
}

#if WAITING
#define APART __forceinline__
#else
#define APART __noinline__  // there are no registers for it in the kernel: ptxas would wait for each product (C7512)
#endif
// dq of a piece from its sums, by a warpgroup for every second 64 queries; the other one has the others
__device__ APART void round_queries(int which, const Problem& pr, const float* sums, const int* turns, const int* scales, u16* dq,
                                    const Work& work, const Place& place) {
  const int pieces = work.pieces / pr.group, head = place.kv * pr.group + ~place.j0 / pieces;
  const int parts = work.tiles * (QUERIES / 64), thread = threadIdx.x % 128, t = threadIdx.x % 4;
  const Head at = head_of(pr, head);
  const int n = FLOAT16 ? scales[2 * at.key + 1] : 0;
#pragma unroll 1
  for (int part = ~place.j0 % pieces * PIECE + which, end = least(part + PIECE - which, parts); part < end; part += 2) {
    const int start = part * 64, tile = start / QUERIES;
    if (start >= pr.query_length) break;
    const int ranks = tile * QUERIES < at.q_end ? last_of(pr, at, tile) - first_of(pr, tile) + 1 : 0;
    if (ranks > 0) {
      int seen;
      do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turns + (i64)head * work.tiles + tile) : "memory");
      while (seen != ranks);
    }
    const float4* from = (const float4*)sums + ((i64)head * parts + part) * (DT * 16) + thread;
    float4 parts_of[DT / 8];
#pragma unroll
    for (int m = 0; m < DT / 8; m++) parts_of[m] = ranks > 0 ? __ldcg(from + m * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
    const int own = start + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int m = 0; m < DT / 8; m += 4)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 w[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const float4 x = parts_of[m + k];
          w[k] = pack(scaled((h ? x.z : x.x) * pr.scale, n), scaled((h ? x.w : x.y) * pr.scale, n));
        }
        const uint4 x = one_group(w);
        const int i = own + h * 8, d = (m + t) * 8;
        if (i < pr.query_length && d < WIDTH) *(uint4*)(dq + ((i64)head * pr.query_length + i) * WIDTH + d) = x;
      }
  }
}
