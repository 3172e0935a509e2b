// Backward on Hopper: what backward.cu computes, in one kernel for dq, dk and dv.
//
//     p = exp(s - l)    ds = p * (G·Xᵀ + r)    dv = beta * X * (pᵀ·G)    dk = dsᵀ·Q    dq = ds·K
//
// A block owns 128 keys, a warpgroup 64 of them, and walks over tiles of queries. It makes X of its values itself, in shared
// memory, once. Scores are computed transposed, [keys, queries], so that pᵀ and dsᵀ are left operands in registers as they
// come; dk and dv stay in registers. ds goes through shared memory, because dq sums over the keys of both warpgroups, each of
// which makes half of it. dq of a tile is made in the step after it, so that no warpgroup waits for the other's ds, and the
// scores of the next tile are begun before it is handed over.
//
// dq of a tile of queries is a sum over blocks. Its parts are added in global memory by the copy engine, in one order, so
// that every run gives the same bits: `turns` has a counter for each tile of queries, and the key tiles take their turns
// from the first one to the last. Blocks draw their work in that order too, so a block waits only for blocks that have
// begun, and all go through the queries downwards: whoever comes first in the order is ahead in time as well, and with a
// causal mask the longest walks come first. Some heads are worked on by turns: the fewer key tiles of a head run at a time,
// the fewer follow one another at a distance; yet what they read and add to should stay in the L2 cache.
// In `sums` a tile of dq lies as the threads have it: [half][columns of a half / 8][128 threads][4].

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

// Puts zeros for what is not finite among the keys. Whether there was some; which: sm.odd. All consumers together; two threads
// look at a row.
__device__ __forceinline__ bool clean_keys(Shared& sm) {
  const int row = (threadIdx.x - 128) / 2, half = threadIdx.x % 2;
  u8* from = sm.k + (DT == 128 ? half * BLOCK_BYTES(KEYS) : half * 64) + row * 128;
  constexpr int PIECES = DT / 16;
  constexpr u32 ONES = ALL_ONES * 0x10001u, CARRY = (0x8000u - ALL_ONES) * 0x10001u;
  u32 all = 0;
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    const uint4 x = *(const uint4*)(from + (n + row) % PIECES * 16);  // neighbours look at different banks
    all |= ((x.x & ONES) + CARRY) | ((x.y & ONES) + CARRY) | ((x.z & ONES) + CARRY) | ((x.w & ONES) + CARRY);
  }
  bool odd = (all & 0x80008000u) != 0;
  odd |= __shfl_xor_sync(FULL_WARP, (int)odd, 1) != 0;
  if (half == 0) sm.odd[row] = odd;
  if (odd) {  // the whole row: products with queries are then of no account, nor is p, but must be numbers
    for (int n = 0; n < PIECES; n++) *(uint4*)(from + n * 16) = make_uint4(0, 0, 0, 0);
    publish();
  }
  return named_any(2, 256, odd);
}

// X = exp(beta*v) * 2^-c, where `power` has -c as an exponent of float32; 0 where beta*v is not finite. In place, 8 numbers.
// `high` and `low` are beta in units of base 2, as the sum of two numbers. FAR: an integer part may need more than 22 bits.
template <bool FAR> __device__ __forceinline__ void exponentials(uint4* at, float beta, float high, float low, const u32 (&power)[8]) {
  const uint4 from = *at;
  const u32 words[4] = {from.x, from.y, from.z, from.w};
  const float shifter = 12582912.f;  // 1.5 * 2^23: a sum with it has an integer in its last bits
  u32 to[4];
#pragma unroll
  for (int m = 0; m < 4; m++) {
    float x[2];
#pragma unroll
    for (int w = 0; w < 2; w++) {
      const float v = widen((u16)(words[m] >> 16 * w)), sum = fmaf(v, high, shifter);
      const float whole = FAR ? rintf(v * high) : sum - shifter;
      const u32 steps = FAR ? (u32)(int)whole : float_as_bits(sum);
      const float mantissa = exp2_fast(fmaf(v, low, fmaf(v, high, -whole)));
      const bool there = FAR ? finite(beta * v) : fabsf(whole) < 4e6f;
      x[w] = there ? bits_as_float(float_as_bits(mantissa) + (steps << 23) + power[2 * m + w]) : 0.f;
    }
    to[m] = pack(x[0], x[1]);
  }
  *at = make_uint4(to[0], to[1], to[2], to[3]);
}

// Turns values into X in place: as hopper_values makes it. 0 beyond the values that are seen. All consumers together.
__device__ __forceinline__ void make_x(Shared& sm, const Problem& pr, const int* c, int end, int parity) {
  constexpr int PIECES = ET / 8;
  const int thread = threadIdx.x - 128, piece = thread % PIECES, first = thread / PIECES;
  const bool used = piece * 8 < pr.value_dim;
  u32 power[8] = {};
  bool far = false;
  if (used) {
    const int4 one = *(const int4*)(c + piece * 8), two = *(const int4*)(c + piece * 8 + 4);
    const int own[8] = {one.x, one.y, one.z, one.w, two.x, two.y, two.z, two.w};
#pragma unroll
    for (int h = 0; h < 8; h++) {
      power[h] = (u32)-own[h] << 23;
      far |= own[h] > 1 << 20 || own[h] < -(1 << 20);  // all values of a channel are at less than 2^7 from its integer
    }
  }
  u8* tile = sm.x + piece / 8 * BLOCK_BYTES(KEYS);
  const int last = used ? least(end, KEYS) : 0;
  const float high = pr.beta * LOG2E, low = fmaf(pr.beta, LOG2E, -high) + pr.beta * 1.92596299e-8f;  // what LOG2E lacks of log2(e)
  barrier_wait(&sm.x_full, parity);
#define PIECE_OF(row) ((uint4*)(tile + (row) * 128 + (piece % 8 ^ (row) % 8) * 16))
  int row = first;
  if (far)
    for (; row < last; row += 256 / PIECES) exponentials<true>(PIECE_OF(row), pr.beta, high, low, power);
#pragma unroll 2
  for (; row < last; row += 256 / PIECES) exponentials<false>(PIECE_OF(row), pr.beta, high, low, power);
  for (; row < KEYS; row += 256 / PIECES) *PIECE_OF(row) = make_uint4(0, 0, 0, 0);
#undef PIECE_OF
  publish();
  named_wait(2, 256);
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

// a number that the compiler does not know: it would keep the operands of all products in registers
template <int WHICH> __device__ __forceinline__ int group_of() {
  int zero;
  asm volatile("mov.u32 %0, 0;" : "=r"(zero));
  return WHICH + zero;
}

template <int WHICH> __device__ __forceinline__ void consume(const Problem& pr, const int* c, const int* scales, const int* odd, u16* dk_out,
                                        u16* dv_out, const TensorMap* dk_map, const TensorMap* dv_map, const Work& work,
                                        Shared& sm) {
  constexpr int which = WHICH;
  const int t = threadIdx.x % 4;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;  // of the warpgroup's keys
  const float factor = pr.scale * LOG2E;
  const int ds_offset = matrices_offset(which * 64 + threadIdx.x % 128 / 32 * 16);
  u32 n_tiles = 0;
  int uses = 0, stage = 0, phase = 0;
  FOR_EACH_DRAWN(warp_arrive)
    const int own = place.j0 + which * 64 + row;
#if FLOAT16
    const int g_scale = scales[2 * place.kv], ds_scale = scales[2 * place.kv + 1];
    const int steps = g_scale - ds_scale - P_SHIFT;
    const float in = scaled(1.f, steps / 2), in2 = scaled(1.f, steps - steps / 2);  // in range, both
#else
    constexpr int g_scale = 0, ds_scale = 0;
#endif
    float dk[DT / 8][4] = {}, dv[ET / 8][4] = {};
    if (span.first < span.end) {
      const Head at = head_of(pr, place.kv * pr.group);  // the sequences of the group end where this one's do
      const bool odd_queries = odd[place.kv] & ODD;
      float s[QUERIES / 8][4], gx[QUERIES / 8][4];  // [64 keys, QUERIES]
      float dq[DQ_PARTS][4];                        // [64 queries, DT/2], or all columns of half of the queries
      auto begin_s = [&](int stage) {  // the first products of a tile of queries
        const int group = group_of<WHICH>();
        pin(s);
        products_fence();
        multiply_rows<KEYS, QUERIES, DT>(s, sm.k + group * BLOCK_BYTES(64), sm.q[stage]);
        products_commit();
      };
      auto begin_dq = [&](u32 n) {  // of the n-th tile
        const int group = group_of<WHICH>();
        constexpr bool WHOLE = QUERIES == 128;
        const u64 left = operand_transposed(sm.ds[n & 1] + (WHOLE ? group * BLOCK_BYTES(KEYS) : 0), 0);
        const u64 right = operand_transposed(sm.k + (WHOLE ? 0 : group * (DT == 128 ? BLOCK_BYTES(KEYS) : 64)), 0);
        pin(dq);
        products_fence();
#pragma unroll
        for (int m = 0; m < KEYS / 16; m++) product<1, 1>(dq, moved(left, m * 2048), moved(right, m * 2048), m > 0);
        products_commit();
      };
      auto hand_over = [&](u32 n) {
        barrier_wait(&sm.dq_free[n & 1], n / 2 % 2 ^ 1);
#pragma unroll
        for (int m = 0; m < DQ_PARTS; m++)
          sm.dq[n & 1][which][m][threadIdx.x % 128] = make_float4(dq[m][0], dq[m][1], dq[m][2], dq[m][3]);
        publish();
        warp_arrive(&sm.dq_full[n & 1]);
      };
      barrier_wait(&sm.k_full, uses % 2);
      if (WAITING && threadIdx.x % 128 == 0) floats_read();  // of gradients: there is room again after the next barrier
      const bool odd_keys = clean_keys(sm), unclean = odd_keys || odd_queries;
      bool bad[2] = {false, false};
      if (odd_keys)
        for (int h = 0; h < 2; h++) bad[h] = sm.odd[which * 64 + row + h * 8];
      barrier_wait(&sm.q_full[stage], phase);
      if (unclean) tile_clean(sm.q[stage], Q_BYTES);
      begin_s(stage);
      make_x(sm, pr, c + (i64)place.kv * CP, at.k_end - place.j0, uses % 2);
      uses++;
      products_wait<0>();
      pin(s);
      const u32 begin = n_tiles, end = n_tiles + pr.group * (span.end - span.first) - 1;
#pragma unroll 1
      for (int tile = span.end - 1;; tile = tile > span.first ? tile - 1 : span.end - 1) {
        const int i0 = tile * QUERIES, j0 = place.j0;
        const bool wraps = stage == STAGES - 1;
        const int next = wraps ? 0 : stage + 1, next_phase = phase ^ (int)wraps;
        const u8 *q_tile = sm.q[stage], *g_tile = sm.g[stage];
        const float *minus_l = sm.rows[stage][0] + t * 2, *r = sm.rows[stage][1] + t * 2;
        if (unclean && n_tiles < end) {
          barrier_wait(&sm.q_full[next], next_phase);
          tile_clean(sm.q[next], Q_BYTES);
        }
        u32 p[QUERIES / 16][4], ds[QUERIES / 16][4];
        // half a step behind the other, so that one's products run while the other takes exponentials
        if (WAITING && WHICH == 1 && n_tiles == begin) named_wait(3, 256);
        barrier_wait(&sm.g_full[stage], phase);
        pin(gx);
        products_fence();
        multiply_rows<KEYS, QUERIES, ET>(gx, sm.x + group_of<WHICH>() * BLOCK_BYTES(64), g_tile);
        products_commit();
#pragma unroll
        for (int m = 0; m < QUERIES / 8; m++) {
          const float2 shift = *(const float2*)(minus_l + m * 8);
#pragma unroll
          for (int h = 0; h < 4; h++) s[m][h] = exp2_fast(fmaf(s[m][h], factor, h % 2 ? shift.y : shift.x));
        }
        if (j0 + KEYS > at.k_end || j0 - (i0 + QUERIES - 1) < pr.low || j0 + KEYS - 1 - i0 > pr.high || unclean)
          mask_tile(s, pr, at, i0, own, unclean, bad);
#if WAITING
        as_operand(p, s);
        pin(p);
        pin(dv);
        products_fence();
        multiply_columns(dv, p, g_tile);
        products_commit();
        products_wait<1>();
#else
        products_wait<0>();
#endif
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
#if !WAITING
        as_operand(p, s);
        pin(p);
        pin(dv);
        products_fence();
        multiply_columns(dv, p, g_tile);
        products_commit();
#endif
        as_operand(ds, gx);
        pin(ds);
        pin(dk);
        products_fence();
        multiply_columns(dk, ds, q_tile);
        products_commit();
        if (WAITING && WHICH == 0 && n_tiles == begin) named_arrive(3, 256);
        // The other warpgroup has gone through the tile before: its part of ds is there, and nobody reads the one before that.
        barrier_wait(&sm.done[stage ? stage - 1 : STAGES - 1], phase ^ (int)!stage);
        int offset = ds_offset;
        if (QUERIES == 64) asm volatile("" : "+r"(offset));  // the compiler would keep all of the addresses
#pragma unroll
        for (int m = 0; m < QUERIES / 16; m++)
          store_matrices(sm.ds[n_tiles & 1] + m / 4 * BLOCK_BYTES(KEYS) + (offset ^ m % 4 * 32), ds[m]);
        products_wait<1>();  // p needs no registers any more
        pin(p);
        pin(dv);
        begin_dq(n_tiles - 1);  // for the first tile of all that is there: handed over to nobody
        products_wait<1>();
        pin(ds);
        pin(dk);
        if (n_tiles < end) barrier_wait(&sm.q_full[next], next_phase);
        begin_s(next);  // after the last tile, of whatever is there: a branch would have the compiler wait for all products
        products_wait<1>();
        pin(dq);
        if (n_tiles > begin) hand_over(n_tiles - 1);  // and publish ds
        else publish();
        warp_arrive(&sm.done[stage]);
        products_wait<0>();
        pin(s);
        const int last = stage, last_phase = phase;
        stage = next;
        phase = next_phase;
        if (n_tiles++ == end) {
          barrier_wait(&sm.done[last], last_phase);
          break;
        }
      }
      begin_dq(end);
      // meanwhile dv; all lanes have their X before it is given back
      const u8* x_row = sm.x + (which * 64 + row) * 128 + t * 4;
#pragma unroll
      for (int m = 0; m < ET / 8; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 x = *(const u32*)(x_row + m / 8 * BLOCK_BYTES(KEYS) + h * 1024 + (m % 8 ^ row % 8) * 16);
#pragma unroll
          for (int w = 0; w < 2; w++) dv[m][2 * h + w] *= pr.beta * widen((u16)(x >> 16 * w));
        }
      pin(dv);
      publish();  // the reads are over: a barrier alone does not wait for them
      warp_arrive(&sm.x_free);
      products_wait<0>();
      pin(dq);
      warp_arrive(&sm.k_free);
      hand_over(end);
    }
#pragma unroll
    for (int m = 0; m < DT / 8; m++)
#pragma unroll
      for (int h = 0; h < 4; h++) dk[m][h] *= pr.scale;
#if WAITING
    // by way of ds and of the room for dq that nobody uses until dq of the next tile is handed over
    if (threadIdx.x % 128 == 0) floats_read();
    named_wait(2, 256);
    stage_rows(sm.ds[which], dv, g_scale - P_SHIFT);
    barrier_wait(&sm.dq_free[n_tiles & 1], n_tiles / 2 % 2 ^ 1);
    u8* room = (u8*)sm.dq[n_tiles & 1][which];
    stage_rows(room, dk, ds_scale);
    publish();
    named_wait(4 + which, 128);
    if (threadIdx.x % 128 == 0) {
      tile_write<64, ET>(dv_map, sm.ds[which], place.j0 + which * 64, place.kv);
      tile_write<64, DT>(dk_map, room, place.j0 + which * 64, place.kv);
    }
#else
    const i64 keys = (i64)place.kv * pr.key_length;
    write_rows(dv_out + keys * pr.value_dim, dv, pr.value_dim, own, pr.key_length, g_scale - P_SHIFT);
    write_rows(dk_out + keys * WIDTH, dk, WIDTH, own, pr.key_length, ds_scale);
#endif
  }
}

// odd [B*Hkv]: flags; ODD where a query that reads a head may be not finite. turns [heads, tiles]: zeros
extern "C" __global__ void __launch_bounds__(384, 1) hopper_backward(
    PROBLEM, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap g_map,
    const __grid_constant__ TensorMap dk_map, const __grid_constant__ TensorMap dv_map, const int* c, const float* rows,
    const int* scales, const int* flags, const int* odd, float* sums, int* turns, int* counter, u16* dk, u16* dv,
    int count, int blocks, int section, int tiles) {
  const Problem pr = THE_PROBLEM;
  const Work work = {count, blocks, section, tiles};
  extern __shared__ __align__(1024) u8 memory[];
  Shared& sm = *(Shared*)memory;
  if (threadIdx.x == 0) {
    if (shared_address(memory) % 1024) __trap();  // there is no room to spare
    barrier_init(&sm.k_full, 1);
    barrier_init(&sm.k_free, 8 * ARRIVALS);
    barrier_init(&sm.x_full, 1);
    barrier_init(&sm.x_free, 8 * ARRIVALS);
    for (int n = 0; n < STAGES; n++) {
      barrier_init(&sm.q_full[n], 1);
      barrier_init(&sm.g_full[n], 1);
      barrier_init(&sm.done[n], 8 * ARRIVALS);
    }
    for (int n = 0; n < 2; n++) {
      barrier_init(&sm.dq_full[n], 8 * ARRIVALS);
      barrier_init(&sm.dq_free[n], 1);
      barrier_init(&sm.drawn_full[n], 1);
      barrier_init(&sm.drawn_free[n], 8 * ARRIVALS + 2);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) produce(pr, &q_map, &k_map, &v_map, &g_map, rows, flags, counter, work, sm);
    else if (threadIdx.x % 32 == 0 && warp < 3) add(pr, sums, turns, work, warp - 1, sm);
  } else {
    registers_take<240>();
    if (warpgroup() == 1) consume<0>(pr, c, scales, odd, dk, dv, &dk_map, &dv_map, work, sm);
    else consume<1>(pr, c, scales, odd, dk, dv, &dk_map, &dv_map, work, sm);
  }
}
