// What comes after the Hopper backward kernel: dq from its sums, which are in the order in which that adds to them.

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
