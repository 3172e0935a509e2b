// What comes before and after the Hopper backward kernel: the terms of queries in the order in which it reads them, and dq
// from sums in the order in which it writes them.

// Rows as the kernel below takes them: minus l and r of each tile of queries. rows [heads, tiles][2][QUERIES]
extern "C" __global__ void __launch_bounds__(THREADS) hopper_rows(
    PROBLEM, const float* l, const float* r, const int* scales, float* rows, int tiles) {
  const Problem pr = THE_PROBLEM;
  const Head at = head_of(pr, blockIdx.x / tiles);
  const int i = blockIdx.x % tiles * QUERIES + threadIdx.x % QUERIES;
  const i64 row = (i64)at.query * pr.query_length + i;
  float* to = rows + (i64)blockIdx.x * 2 * QUERIES;
  const int n = threadIdx.x % QUERIES;
  if (threadIdx.x < QUERIES) to[n] = i < at.q_end ? P_SHIFT - l[row] : -INF;
  if (THREADS == QUERIES || threadIdx.x >= QUERIES)
    to[QUERIES + n] = i < at.q_end ? scaled(r[row], FLOAT16 ? -P_SHIFT - scales[2 * at.key + 1] : 0) : 0.f;
}

// dq from its sums: a block for 64 queries. The last ones first, which the backward kernel has left in the L2 cache.
extern "C" __global__ void __launch_bounds__(THREADS) hopper_queries(
    PROBLEM, const float4* sums, const int* scales, const int* flags, u16* dq, int parts) {
  const Problem pr = THE_PROBLEM;
  const int part = gridDim.x - 1 - blockIdx.x, start = part % parts * 64;
  const Head at = head_of(pr, part / parts);
  if (flags[at.key] & OUTSIDE || start >= pr.query_length) return;
  const int tile = start / QUERIES, lane = threadIdx.x % 32, t = lane % 4;
  const bool some = tile * QUERIES < at.q_end && last_of(pr, at, tile) >= first_of(pr, tile);
  const int n = FLOAT16 ? scales[2 * at.key + 1] : 0, own = start + threadIdx.x / 32 * 16 + lane / 4;
  sums += (i64)part * (DT * 16) + threadIdx.x;
  float4 parts_of[DT / 8];
#pragma unroll
  for (int m = 0; m < DT / 8; m++) parts_of[m] = some ? __ldcs(sums + m * 128) : make_float4(0.f, 0.f, 0.f, 0.f);
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
      if (i < pr.query_length && d < WIDTH) *(uint4*)(dq + ((i64)at.query * pr.query_length + i) * WIDTH + d) = x;
    }
}
