// Forward on Hopper: flash attention over (q, k, X), and o = log(acc/l * 2^c)/beta at the end.
//
// A block is a producer warp, which has tiles copied, and CONSUMERS warpgroups of 64 queries each. Blocks are persistent:
// the producer draws tiles of queries from a counter and tells the consumers. A consumer begins the product of q with key
// tile j + 1, then that of the weights of tile j with x, and makes the weights of the former while the latter runs: the
// tensor cores are busy while exponentials are taken. Key tiles go from the last to the first.
//
// X of the first heads is made by all warps before these roles begin, that of the others by the three idle warps of the
// producer's warpgroup (hopper_values.cu). A producer waits until X of its head is there. It cannot wait for ever: a block
// has a multiprocessor for itself and there are no more blocks than those, so all of them run, and who makes X waits for
// tiles of earlier sections only. X has room for a few sections of heads, so that it never leaves the L2 cache.
//
// Rows in which few keys carry the weight are left to forward_few.cu, which adds what the rounding of X lost: here it would
// cost every row registers. `few` [B*Hq, Lq] lists them for each head, and `counts` [B*Hq], zero before, says how many.

#define TILE (64 * CONSUMERS)  // queries
#define FEW (2.f * (1 << P_SHIFT))  // one key has more than half of the weight
#define FEW_KEYS 16                 // or fewer are seen
#define Q_BYTES (64 * DT * 2)  // of a consumer
#define K_BYTES (KEYS * DT * 2)
#define X_BYTES (KEYS * ET * 2)
#define O_BYTES (64 * ET * 2)  // of a consumer
#define QO_BYTES (Q_BYTES > O_BYTES ? Q_BYTES : O_BYTES)

// A tile of queries of a head, whose rows and keys end somewhere, and the key tiles that some of them see; head < 0: no more
struct alignas(16) Work { int head, key, i0, first, end, q_end, k_end; };

struct Shared {  // offsets of tiles are multiples of 1024 bytes
  u8 q[2][CONSUMERS][QO_BYTES];  // [DT/64][64][64], and at the end o: [ET/64][64][64]
  u8 k[STAGES][K_BYTES];     // [DT/64][KEYS][64]
  u8 x[STAGES][X_BYTES];     // [ET/64][KEYS][64]
  ValueRoom values;
  u64 q_full[2], q_free[2], k_full[STAGES], k_free[STAGES], x_full[STAGES], x_free[STAGES], drawn_full[2], drawn_free[2];
  Work drawn[2];
};

// Heads come in sections whose keys share the L2 cache; in a section the longest rows come first
struct Place { int head, i0; };
__device__ __forceinline__ Place place_of(int index, int tiles, int heads, int section) {
  const int begin = index / (section * tiles) * section, within = index - begin * tiles;
  const int span = least(section, heads - begin);
  return {begin + within % span, (tiles - 1 - within / span) * TILE};
}

__device__ __forceinline__ Work work_of(const Problem& p, const Place& place) {
  const Head at = head_of(p, place.head);
  const int i0 = place.i0, i1 = least(i0 + TILE, at.q_end);
  const int end = i1 <= i0 ? 0 : greatest(0, (least(at.k_end, i1 + p.high) + KEYS - 1) / KEYS);
  return {place.head, at.key, i0, least(greatest(0, i0 + p.low) / KEYS, end), end, at.q_end, at.k_end};
}

// The state of a row: what weights are relative to, which may be LAZY bits behind the greatest score; that score; the sum of
// the weights. m and top in units of products of q and k.
struct Row { float m = -INF, top = -INF, l = 0.f; };

// Weights of a tile in place of its scores. Whether, and by what, old sums shrink.
__device__ __forceinline__ bool weigh(float (&s)[KEYS / 8][4], Row (&row)[2], float (&shrink)[2], float factor) {
  bool moves = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top[2] = {row[h].top, -INF};  // two chains
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) top[n % 2] = fmaxf(top[n % 2], fmaxf(s[n][2 * h], s[n][2 * h + 1]));
    row[h].top = row_max(fmaxf(top[0], top[1]));
    const float next = LAZY == 0 || row[h].top * factor > fmaf(row[h].m, factor, LAZY) ? row[h].top : row[h].m;
    const float reference = next == -INF ? 0.f : next * factor, shift = P_SHIFT - reference;
    moves |= next != row[h].m;
    shrink[h] = next == row[h].m ? 1.f : exp2_fast(fmaf(row[h].m, factor, -reference));
    row[h].m = next;
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++) {
      s[n][2 * h] = exp2_fast(fmaf(s[n][2 * h], factor, shift));
      s[n][2 * h + 1] = exp2_fast(fmaf(s[n][2 * h + 1], factor, shift));
      sum[0] += s[n][2 * h];
      sum[1] += s[n][2 * h + 1];
    }
    row[h].l = fmaf(row[h].l, shrink[h], sum[0] + sum[1]);
  }
  return LAZY == 0 || __any_sync(FULL_WARP, moves);
}

// whether every query of i0 … i1 sees every key of the tile at j0 (ends not included)
__device__ __forceinline__ bool all_visible(const Problem& p, const Work& at, int i0, int i1, int j0) {
  return i1 <= at.q_end && j0 + KEYS <= at.k_end && j0 - (i1 - 1) >= p.low && j0 + KEYS - 1 - i0 <= p.high;
}

// Scores of keys that rows own, own + 8 of a thread do not see; a diagonal is most of the tiles that are not all visible
__device__ __forceinline__ void mask_tile(float (&s)[KEYS / 8][4], const Problem& p, const Work& at, int own, int i1, int j0) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int i = own + h * 8, last = i < at.q_end ? least(at.k_end - 1, i + p.high) - j0 - t * 2 : -1;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) s[n][2 * h + r] = n * 8 + r <= last ? s[n][2 * h + r] : -INF;
  }
  if (j0 - (i1 - 1) >= p.low) return;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int first = own + h * 8 + p.low - j0 - t * 2;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) s[n][2 * h + r] = n * 8 + r >= first ? s[n][2 * h + r] : -INF;
  }
}

// log2 of a positive normal number: the exponent apart, so that a power of two changes nothing else
__device__ __forceinline__ float log2_split(float a, int& n) {
  const u32 bits = float_as_bits(a);
  n = (int)(bits >> 23) - 127;
  return log2_fast(bits_as_float((bits & 0x7FFFFFu) | 0x3F800000u));
}

__device__ __forceinline__ void produce(const Problem& pr, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* x_map,
                                        const ValuePass& pass, int* counter, int heads, int tiles, int section, Shared& sm) {
  Ring<STAGES> ring;
  int index = atomicAdd(counter, 1), known = -1;  // known: the last head of which X was seen to be there
#pragma unroll 1
  for (int turn = 0;; turn++) {
    // consumers are told before X is there: they end a tile, which X of others may wait for, after the next one has begun
    Work work = {-1};
    if (index < heads * tiles) work = work_of(pr, place_of(index, tiles, heads, section));
    barrier_wait(&sm.drawn_free[turn % 2], turn / 2 % 2 ^ 1);
    sm.drawn[turn % 2] = work;
    barrier_arrive(&sm.drawn_full[turn % 2]);
    if (work.head < 0) return;
    index = atomicAdd(counter, 1);
    u64* q_full = &sm.q_full[turn % 2];
    barrier_wait(&sm.q_free[turn % 2], turn / 2 % 2 ^ 1);
    if (work.first == work.end) {
      barrier_arrive(q_full);
      continue;
    }
    barrier_expect(q_full, CONSUMERS * Q_BYTES);
#pragma unroll 1
    for (int w = 0; w < CONSUMERS; w++) tile_copy_once<64, DT>(sm.q[turn % 2][w], q_map, work.i0 + w * 64, work.head, q_full);
    const int room = work.key % pass.rooms;
#pragma unroll 1
    for (int tile = work.end - 1; tile >= work.first; tile--) {
      barrier_wait(&sm.k_free[ring.stage], ring.parity ^ 1);
      barrier_expect(&sm.k_full[ring.stage], K_BYTES);
      tile_copy<KEYS, DT>(sm.k[ring.stage], k_map, tile * KEYS, work.key, &sm.k_full[ring.stage]);
      if (known != work.key) wait_for_values(pass, work.key);
      known = work.key;
      barrier_wait(&sm.x_free[ring.stage], ring.parity ^ 1);
      barrier_expect(&sm.x_full[ring.stage], X_BYTES);
      tile_copy<KEYS, ET>(sm.x[ring.stage], x_map, tile * KEYS, room, &sm.x_full[ring.stage]);
      ring.next();
      if (tile == work.end - 1 && index < heads * tiles) {
        const Place next = place_of(index, tiles, heads, section);
#pragma unroll 1
        for (int w = 0; w < CONSUMERS; w++) tile_fetch<64, DT>(q_map, next.i0 + w * 64, next.head);
      }
    }
  }
}

// o, its float32 form, l and the list of rows in which few keys carry the weight, from acc, m and l of 64 rows
__device__ __forceinline__ void finish(const Problem& pr, const Work& at, float (&acc)[ET / 8][4], const Row (&state)[2],
                                       float factor, int own, const int2 (&c)[ET / 8], const TensorMap* o_map, u8* tile,
                                       const TensorMap* rest_map, float* residual, bool rest, float* lse, int* few, int* counts) {
  const int t = threadIdx.x % 4, lane = threadIdx.x % 32;
  const float per_beta = LN2 / pr.beta, minus_infinity = -INF * per_beta;
  const i64 first_row = (i64)at.head * pr.query_length;
  float minus_l[2];
  bool seen[2], listed = false;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = row_sum(state[h].l);
    seen[h] = sum != 0.f;
    const int i = own + h * 8, keys = least(at.k_end, i + pr.high + 1) - greatest(0, i + pr.low);
    const bool carried = sum > 0.f && (keys < FEW_KEYS || sum < FEW * exp2_fast((state[h].top - state[h].m) * factor));
    int n_l;
    float log_l = log2_split(seen[h] ? sum : 1.f, n_l);
    if (sum != sum) log_l = NOT_A_NUMBER;
    minus_l[h] = -((float)n_l + log_l) * per_beta;
    if (i >= pr.query_length) continue;
    if (t == 0) lse[first_row + i] = seen[h] ? fmaf(state[h].m, factor, (float)(n_l - P_SHIFT) + log_l) * LN2 : -INF;
    if (t == h) listed = carried;
  }
  const u32 some = __ballot_sync(FULL_WARP, listed);
  if (some) {
    const int start = __shfl_sync(FULL_WARP, lane == 0 ? atomicAdd(counts + at.head, __popc(some)) : 0, 0);
    if (listed) few[first_row + start + __popc(some & (1u << lane) - 1)] = own + t * 8;
  }
  u32 one = 0x3F800000u;
  asm volatile("" : "+r"(one));  // in a register: the exponent is exchanged in one instruction
#pragma unroll
  for (int n = 0; n < ET / 8; n++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const u32 bits = float_as_bits(acc[n][r]);
      const int whole = (int)(bits >> 23) + (r % 2 ? c[n].y : c[n].x);  // the same for every c
      u32 mantissa;
      asm("lop3.b32 %0, %1, 0x7FFFFF, %2, 0xEA;" : "=r"(mantissa) : "r"(bits), "r"(one));  // bits & 0x7FFFFF | one
      const float o = fmaf((float)whole + log2_fast(bits_as_float(mantissa)), per_beta, minus_l[r / 2]);
      acc[n][r] = acc[n][r] == 0.f ? minus_infinity : o;
    }
#pragma unroll
  for (int h = 0; h < 2; h++)
    if (!seen[h])
#pragma unroll
      for (int n = 0; n < ET / 8; n++) acc[n][2 * h] = acc[n][2 * h + 1] = 0.f;
  if (rest)  // so that what rounding leaves has 16 bits, no number is in the middle between two others
#pragma unroll
    for (int n = 0; n < ET / 8; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) acc[n][r] = bits_as_float(float_as_bits(acc[n][r]) | (u32)finite(acc[n][r]));
  // a warp writes its 16 rows by the copy engine
  u32 packed[ET / 16][4];
  as_operand(packed, acc);
  const int warp = threadIdx.x % 128 / 32 * 16, offset = matrices_offset(warp);
#pragma unroll
  for (int n = 0; n < ET / 16; n++) store_matrices(tile + n / 4 * BLOCK_BYTES(64) + (offset ^ n % 4 * 32), packed[n]);
  publish();
  __syncwarp();
  if (lane == 0) tile_write<64, ET>(o_map, tile + warp * 128, own, at.head);
  if (rest) {
#pragma unroll
    for (int n = 0; n < ET / 16; n++)
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float* two = &acc[2 * n + r / 2][r % 2 * 2];
        packed[n][r] = float_as_bits(two[1]) << 16 | (float_as_bits(two[0]) & 0xFFFFu);
      }
    if (lane == 0) floats_read();
    __syncwarp();
#pragma unroll
    for (int n = 0; n < ET / 16; n++) store_matrices(tile + n / 4 * BLOCK_BYTES(64) + (offset ^ n % 4 * 32), packed[n]);
    publish();
    __syncwarp();
    if (lane == 0) tile_write<64, ET>(rest_map, tile + warp * 128, own, at.head);
  }
  if (!residual) return;
#pragma unroll
  for (int n = 0; n < ET / 8; n++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int two = n * 8 + t * 2;
      if (own + h * 8 < pr.query_length && two < pr.value_dim)
        *(float2*)(residual + (first_row + own + h * 8) * pr.value_dim + two) = make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
    }
}

__device__ __forceinline__ void consume(const Problem& pr, const TensorMap* o_map, const TensorMap* rest_map, const ValuePass& pass,
                                        float* residual, bool rest, float* lse, int* few, int* counts, Shared& sm) {
  const int which = warpgroup() - 1;  // warpgroup 0 is the producer's
  const int row = which * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  const bool first_lane = threadIdx.x % 32 == 0;
  const float factor = pr.scale * LOG2E;
  Ring<STAGES> k_ring, x_ring;
  if (TURNS && which == CONSUMERS - 1) named_arrive(1, 256);
  auto turn_begins = [&] { if (TURNS) named_wait(1 + which, 256); };
  auto turn_ends = [&] { if (TURNS) named_arrive(1 + (which + 1) % CONSUMERS, 256); };
  float s[KEYS / 8][4];
  u32 p[KEYS / 16][4];
  auto drawn = [&](int turn) {
    barrier_wait(&sm.drawn_full[turn % 2], turn / 2 % 2);
    const Work work = sm.drawn[turn % 2];
    warp_arrive(&sm.drawn_free[turn % 2]);
    return work;
  };
  // begins the first scores of a tile of queries, if there are some; otherwise the product is of no use
  auto begin_scores = [&](const Work& work, int turn) {
    if (work.head >= 0 && work.first < work.end) {
      barrier_wait(&sm.q_full[turn % 2], turn / 2 % 2);
      barrier_wait(&sm.k_full[k_ring.stage], k_ring.parity);
    }
    turn_begins();
    pin(s);
    products_fence();
    multiply_rows<64, KEYS, DT>(s, sm.q[turn % 2][which], sm.k[k_ring.stage]);
    products_commit();
    turn_ends();
  };
  Work at = drawn(0);
  begin_scores(at, 0);
  products_wait<0>();
  pin(s);
#pragma unroll 1
  for (int turn = 1; at.head >= 0; turn++) {
    const int own = at.i0 + row, i0 = at.i0 + which * 64, i1 = least(i0 + 64, pr.query_length);
    float acc[ET / 8][4] = {}, shrink[2];
    Row state[2];
    int2 own_c[ET / 8];
    const bool some = at.first < at.end;
    u8* q = sm.q[(turn + 1) % 2][which];
    // when o of the tile of queries before has been read, there is room for the next q
    auto q_free = [&] {
      if (turn == 1) return;
      if (first_lane) floats_read();
      if (first_lane) barrier_arrive(&sm.q_free[turn % 2]);
    };
    if (some) {
      auto weights = [&](int tile) {  // p from s
        const int j0 = tile * KEYS;
        if (!all_visible(pr, at, i0, i1, j0)) mask_tile(s, pr, at, own, i1, j0);
        return weigh(s, state, shrink, factor);
      };
      auto scores_made = [&] {
        if (first_lane) barrier_arrive(&sm.k_free[k_ring.stage]);
        k_ring.next();
      };
      scores_made();
      weights(at.end - 1);
      q_free();
      as_operand(p, s);
#pragma unroll 1
      for (int tile = at.end - 2; tile >= at.first; tile--) {
        barrier_wait(&sm.k_full[k_ring.stage], k_ring.parity);
        turn_begins();
        pin(s);
        pin(acc);
        pin(p);
        products_fence();
        multiply_rows<64, KEYS, DT>(s, q, sm.k[k_ring.stage]);
        products_commit();
        barrier_wait(&sm.x_full[x_ring.stage], x_ring.parity);
        multiply_columns(acc, p, sm.x[x_ring.stage]);
        products_commit();
        turn_ends();
        products_wait<1>();
        pin(s);
        scores_made();
        const bool shrinks = weights(tile);
        products_wait<0>();
        pin(acc);
        pin(p);
        if (first_lane) barrier_arrive(&sm.x_free[x_ring.stage]);
        x_ring.next();
        if (shrinks)
#pragma unroll
          for (int n = 0; n < ET / 8; n++)
#pragma unroll
            for (int r = 0; r < 4; r++) acc[n][r] *= shrink[r / 2];
        as_operand(p, s);
      }
      barrier_wait(&sm.x_full[x_ring.stage], x_ring.parity);
      pin(acc);
      pin(p);
      products_fence();
      multiply_columns(acc, p, sm.x[x_ring.stage]);
      products_commit();
    } else {
      q_free();
    }
#pragma unroll
    for (int n = 0; n < ET / 8; n++) {  // while these products run
      const int e = n * 8 + threadIdx.x % 4 * 2;
      own_c[n] = e < EP ? __ldcg((const int2*)(pass.c + (i64)at.key * CP + e)) : make_int2(0, 0);
      own_c[n] = {own_c[n].x - 127, own_c[n].y - 127};  // 127: what an exponent in a float is above itself
    }
    const Work next = drawn(turn);
    begin_scores(next, turn);
    products_wait<1>();
    pin(acc);
    if (some) {
      if (first_lane) barrier_arrive(&sm.x_free[x_ring.stage]);
      x_ring.next();
    }
    if (first_lane) used(pass, at.key);
    finish(pr, at, acc, state, factor, own, own_c, o_map, q, rest_map, residual, rest, lse, few, counts);
    at = next;
    products_wait<0>();
    pin(s);
  }
  if (first_lane) floats_done();
}

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1) hopper_forward(
    PROBLEM, const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap o_map,
    const __grid_constant__ TensorMap rest_map, const u16* k, const u16* v, u16* x, u16* ranges, int* c, int* flags, int* done,
    int* states, int* again, int* next, int* used, int first, int rooms, float* residual, const short* rest, float* lse, int* few,
    int* counts, int* counter, int heads, int tiles, int section) {
  const Problem pr = THE_PROBLEM;
  const ValuePass pass = {k, v, x, ranges, c, flags, done, states, again, next, used, first, rooms, tiles * group * 4 * CONSUMERS};
  extern __shared__ u8 memory[];
  Shared& sm = *(Shared*)(memory + (-shared_address(memory) & 1023));
  if (threadIdx.x == 0) {
    for (int n = 0; n < STAGES; n++) {
      barrier_init(&sm.k_full[n], 1);
      barrier_init(&sm.k_free[n], 4 * CONSUMERS);
      barrier_init(&sm.x_full[n], 1);
      barrier_init(&sm.x_free[n], 4 * CONSUMERS);
    }
    for (int n = 0; n < 2; n++) {
      barrier_init(&sm.q_full[n], 1);
      barrier_init(&sm.q_free[n], 4 * CONSUMERS);
      barrier_init(&sm.drawn_full[n], 1);
      barrier_init(&sm.drawn_free[n], 4 * CONSUMERS * ARRIVALS);
    }
    barrier_init_done();
  }
  first_values(pr, pass);
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_give<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(pr, &q_map, &k_map, &x_map, pass, counter, heads, tiles, section, sm);
    if (threadIdx.x >= 32 && first >= 0) more_values(pr, pass, heads / pr.group, sm.values.v[threadIdx.x / 32 - 1]);
  } else {
    registers_take<CONSUMER_REGISTERS>();
    consume(pr, &o_map, &rest_map, pass, residual, rest != nullptr, lse, few, counts, sm);
  }
}
