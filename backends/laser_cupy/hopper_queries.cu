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
#define SIDE_BY_SIDE 2  // parts of 64 queries whose loads are under way together
// dq of a piece from its sums, by a warpgroup for every second part; the other one has the others
__device__ APART void round_queries(int which, const Problem& pr, const float* sums, const int* turns, const int* scales, u16* dq,
                                    const Work& work, const Place& place) {
  const int pieces = work.pieces / pr.group, head = place.kv * pr.group + ~place.j0 / pieces, thread = threadIdx.x % 128;
  const int parts = (pr.query_length + 63) / 64, first = ~place.j0 % pieces * PIECE + which;
  const Head at = head_of(pr, head);
  const int n = FLOAT16 ? scales[2 * at.key + 1] : 0;
  auto ranks_of = [&](int part) {  // key tiles that have added to it
    const int tile = part * 64 / QUERIES;
    return tile * QUERIES < at.q_end ? greatest(0, last_of(pr, at, tile) - first_of(pr, tile) + 1) : 0;
  };
  {
    const int part = first + threadIdx.x % 32 * 2, ranks = part < least(first + PIECE - which, parts) ? ranks_of(part) : 0;
    const int* turn = turns + (i64)head * work.tiles + part * 64 / QUERIES;
    int seen = 0;
    while (seen != ranks) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(turn) : "memory");
    __syncwarp();
  }
  const float4* from = (const float4*)sums + (i64)head * (work.tiles * (QUERIES / 64)) * (DT * 16) + thread;
#pragma unroll 1
  for (int start = first; start < least(first + PIECE - which, parts); start += 2 * SIDE_BY_SIDE) {
    float4 x[SIDE_BY_SIDE][DT / 8];
#pragma unroll
    for (int s = 0; s < SIDE_BY_SIDE; s++) {
      const int part = start + 2 * s;
      const bool some = part < parts && ranks_of(part);
#pragma unroll
      for (int m = 0; m < DT / 8; m++) x[s][m] = some ? __ldcg(from + part * (DT * 16) + m * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int s = 0; s < SIDE_BY_SIDE; s++) {
      const int own = (start + 2 * s) * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
      for (int m = 0; m < DT / 8; m += 4)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          u32 w[4];
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const float4 a = x[s][m + k];
            w[k] = pack(scaled((h ? a.z : a.x) * pr.scale, n), scaled((h ? a.w : a.y) * pr.scale, n));
          }
          const uint4 to = one_group(w);
          const int i = own + h * 8, d = (m + threadIdx.x % 4) * 8;
          if (i < pr.query_length && d < WIDTH) *(uint4*)(dq + ((i64)head * pr.query_length + i) * WIDTH + d) = to;
        }
    }
  }
}
