// Backward in one kernel, where shared memory has room for it: what backward.cu computes, with five products in place of seven.
//
// A block of 8 warps owns JOINT_KEYS keys and walks upwards over tiles of JOINT_QUERIES queries. A warp makes pᵀ and dsᵀ of 32
// keys and 32 queries; by way of shared memory it then has those of 32 keys and all queries for its half of the columns of dk and
// dv, and those of all keys for its share of the tile of dq.
//
// dq of a tile of queries is a sum over blocks, in memory, in one order, so that every run gives the same bits: `turns` counts,
// for each tile, the blocks that have added their part, from the last keys to the first. Blocks draw their work in that order,
// so one waits only for blocks that have begun; and all walk upwards, so whoever comes first in the order is ahead in time as
// well. In `sums` a tile of dq lies as the threads have it: [DQ_SHARE][256].

#define JOINT_THREADS 256
#define JOINT_KEYS 128
#define KEYS_OF_WARP 32
#define QUERIES_OF_WARP (JOINT_QUERIES / 2)
#define DQ_ACROSS (JOINT_QUERIES == 64 && DP % 64 == 0 ? 4 : 2)  // warps side by side over the columns of dq
#define DQ_STRIPS (JOINT_QUERIES * DQ_ACROSS / 128)              // of 16 queries for each
#define DQ_SHARE (JOINT_QUERIES * DP / JOINT_THREADS)
#define JOINT_STAGE (JOINT_QUERIES * (sizeof(element) * (DP + PAD + XP + PAD) + 8))
#define WEIGHTS (JOINT_QUERIES + PAD)  // elements from one key to the next in tiles of pᵀ and dsᵀ

#if !FLOAT32 && DP % 32 == 0 && XP % 32 == 0 && DP + XP <= 256
#define JOINT 1
#endif

#if JOINT
// d [32, QUERIES_OF_WARP] = a [32, CELLS] · bᵀ
template <int CELLS>
__device__ __forceinline__ void multiply_spread(float (&d)[2][QUERIES_OF_WARP / 8][4], const element* a_tile, const element* b_tile) {
#pragma unroll
  for (int n = 0; n < CELLS / 16; n++) {
    Left a[2];
#pragma unroll
    for (int w = 0; w < 2; w++) load_a(a[w], a_tile + w * 16 * (CELLS + PAD) + n * 16, CELLS + PAD);
#pragma unroll
    for (int j = 0; j < QUERIES_OF_WARP / 16; j++) {
      Right b;
      load_b(b, b_tile + j * 16 * (CELLS + PAD) + n * 16, CELLS + PAD);
#pragma unroll
      for (int w = 0; w < 2; w++) mma(d[w][2 * j], d[w][2 * j + 1], a[w], b);
    }
  }
}

// acc [32, COLUMNS] += w [32, JOINT_QUERIES] · b [JOINT_QUERIES, COLUMNS], for b in rows `ld` apart
template <int COLUMNS>
__device__ __forceinline__ void accumulate_spread(float (&acc)[2][COLUMNS / 8][4], const element* weights, const element* b_tile, int ld) {
#pragma unroll
  for (int i = 0; i < JOINT_QUERIES / 16; i++) {
    Left a[2];
#pragma unroll
    for (int w = 0; w < 2; w++) load_a(a[w], weights + w * 16 * WEIGHTS + i * 16, WEIGHTS);
#pragma unroll
    for (int e = 0; e < COLUMNS / 16; e++) {
      Right b;
      load_b_transposed(b, b_tile + i * 16 * ld + e * 16, ld);
#pragma unroll
      for (int w = 0; w < 2; w++) mma(acc[w][2 * e], acc[w][2 * e + 1], a[w], b);
    }
  }
}

// what a warp holds of rows and columns, to rows of floats
template <int COLUMNS>
__device__ __forceinline__ void spill(float* to, int ld, const float (&acc)[2][COLUMNS / 8][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int w = 0; w < 2; w++)
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) store_two(to + (w * 16 + h * 8 + g) * ld + n * 8 + t * 2, acc[w][n][2 * h], acc[w][n][2 * h + 1]);
}
#endif

// dk, dv and `sums` of dq. dbetas [B*Hkv, blocks, EP], or null
extern "C" __global__ void __launch_bounds__(JOINT_THREADS) backward_joint(
    PROBLEM, const element* q, const element* k, const element* v, const element* x, const element* g, const float* l,
    const float* r, const int* c, const int* scales, const int* flags, float* sums, int* turns, int* drawn, element* dk,
    element* dv, float* dbetas, int blocks) {
#if JOINT
  const Problem pr = THE_PROBLEM;
  SHARED_MEMORY(raw);
  element* k_tile = (element*)raw;                          // [JOINT_KEYS, DP]
  element* x_tile = k_tile + JOINT_KEYS * (DP + PAD);         // [JOINT_KEYS, XP]
  element* p_tile = x_tile + JOINT_KEYS * (XP + PAD);         // [JOINT_KEYS, JOINT_QUERIES]
  element* ds_tile = p_tile + JOINT_KEYS * WEIGHTS;           // the same
  u8* stages = (u8*)(ds_tile + JOINT_KEYS * WEIGHTS);         // two of: q, G [JOINT_QUERIES, DP or XP], l, r [JOINT_QUERIES]
  float* marks = (float*)(stages + 2 * JOINT_STAGE);        // [2, JOINT_KEYS]
  int* index = (int*)(marks + 2 * JOINT_KEYS);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, t = lane % 4;
  if (tid == 0) *index = atomicAdd(drawn, 1);
  __syncthreads();
  const int kv = *index / blocks, block = blocks - 1 - *index % blocks, j0 = block * JOINT_KEYS, flag = flags[kv];
  if (flag & OUTSIDE) return;
  const i64 keys = (i64)kv * pr.key_length;
  const int tiles = (pr.query_length + JOINT_QUERIES - 1) / JOINT_QUERIES;
  const Factors f = factors(scales + 2 * kv);
  tile_begin<JOINT_KEYS, DP, WIDTH, JOINT_THREADS>(k_tile, k + keys * WIDTH, j0, pr.key_length);
  tile_begin<JOINT_KEYS, XP, XP, JOINT_THREADS>(x_tile, x + keys * XP, j0, pr.key_length);
  copy_wait();
  __syncthreads();

  // keys that are not finite: a mark in place of their numbers
  bool odd = false;
  for (int d = 0; d < DP / 2; d++) {
    element& one = k_tile[tid / 2 * (DP + PAD) + tid % 2 * (DP / 2) + d];
    if (!finite(widen(one))) { odd = true; one = 0; }
  }
  marks[tid % 2 * JOINT_KEYS + tid / 2] = odd ? NOT_A_NUMBER : 0.f;
  const bool look = __syncthreads_or(odd) || flag & ODD;

  const int own = warp / 2 * KEYS_OF_WARP, half = warp % 2;  // the first key; which queries, and which half of the columns
  const int dq_row = warp / DQ_ACROSS * 16 * DQ_STRIPS, dq_column = warp % DQ_ACROSS * (DP / DQ_ACROSS);
  float dk_acc[2][DP / 16][4] = {}, dv_acc[2][XP / 16][4] = {};  // [32, DP/2] and [32, XP/2]
  int* to_pass = nullptr;  // the turn that is to be passed on
  int passed = 0;
  for (int member = 0; member < pr.group; member++) {
    const Head at = head_of(pr, kv * pr.group + member);
    const i64 queries = (i64)at.query * pr.query_length;
    const int first = greatest(0, j0 - pr.high) / JOINT_QUERIES;
    const int end = j0 < at.k_end ? (least(at.q_end, j0 + JOINT_KEYS - pr.low) + JOINT_QUERIES - 1) / JOINT_QUERIES : 0;
    auto stage = [&](int tile) { return stages + tile % 2 * JOINT_STAGE; };
    auto begin = [&](int tile) {
      element* q_tile = (element*)stage(tile);
      element* g_tile = q_tile + JOINT_QUERIES * (DP + PAD);
      float* l_tile = (float*)(g_tile + JOINT_QUERIES * (XP + PAD));
      const int i0 = tile * JOINT_QUERIES;
      tile_begin<JOINT_QUERIES, DP, WIDTH, JOINT_THREADS>(q_tile, q + queries * WIDTH, i0, at.q_end);
      tile_begin<JOINT_QUERIES, XP, XP, JOINT_THREADS>(g_tile, g + queries * XP, i0, at.q_end);
      if (tid < 2 * JOINT_QUERIES) {
        const int i = i0 + tid % JOINT_QUERIES;
        copy_begin_float(l_tile + tid, (tid < JOINT_QUERIES ? l : r) + queries + least(i, pr.query_length - 1), i < at.q_end);
      }
    };
    __syncthreads();  // nobody reads tiles of another head any more
    if (first < end) begin(first);
    for (int tile = first; tile < end; tile++) {
      const int i0 = tile * JOINT_QUERIES;
      element* q_tile = (element*)stage(tile);
      const element* g_tile = q_tile + JOINT_QUERIES * (DP + PAD);
      const float* l_tile = (const float*)(g_tile + JOINT_QUERIES * (XP + PAD)) + half * QUERIES_OF_WARP;
      copy_wait();
      if (flag & ODD) tile_clean<JOINT_QUERIES, DP, JOINT_THREADS>(q_tile);
      __syncthreads();  // this tile is there, and nobody reads the one before, or weights
      if (tile + 1 < end) begin(tile + 1);

      // which part of the tile is seen: by keys and queries of this warp, by its keys, and how many keys
      const int low = i0 + half * QUERIES_OF_WARP, q_end = least(at.q_end, i0 + JOINT_QUERIES);
      const bool key_seen = j0 + own < q_end + pr.high && j0 + own + KEYS_OF_WARP > i0 + pr.low;
      const bool pair_seen = j0 + own < low + QUERIES_OF_WARP + pr.high && j0 + own + KEYS_OF_WARP > low + pr.low;
      const int seen = least(JOINT_KEYS, q_end + pr.high - j0);
#pragma unroll
      for (int w = 0; w < 2 * !pair_seen; w++)
#pragma unroll
        for (int n = 0; n < QUERIES_OF_WARP / 8; n++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int to = (own + w * 16 + lane / 4 + h * 8) * WEIGHTS + half * QUERIES_OF_WARP + n * 8 + t * 2;
            store_pair(p_tile + to, 0.f, 0.f);
            store_pair(ds_tile + to, 0.f, 0.f);
          }
      if (pair_seen) {
        float s[2][QUERIES_OF_WARP / 8][4] = {}, gx[2][QUERIES_OF_WARP / 8][4] = {};  // [32 keys, 32 queries]
        multiply_spread<DP>(s, k_tile + own * (DP + PAD), q_tile + half * QUERIES_OF_WARP * (DP + PAD));
        multiply_spread<XP>(gx, x_tile + own * (XP + PAD), g_tile + half * QUERIES_OF_WARP * (XP + PAD));
        const bool direct = !CAP && !look && all_visible(pr, at, i0, i0 + JOINT_QUERIES, j0, j0 + JOINT_KEYS);
#pragma unroll
        for (int w = 0; w < 2; w++) {
          const int row = own + w * 16 + lane / 4;
          weigh<true>(pr, f, direct, s[w], gx[w],
                      [&](int n, int h, bool closely, float& one_l, float& one_r, float& mark, float& bias) {
            const int column = n * 8 + t * 2 + h % 2;
            one_l = l_tile[column];
            one_r = l_tile[JOINT_QUERIES + column];
            if (!closely) return true;
            mark = marks[row + h / 2 * 8] + marks[JOINT_KEYS + row + h / 2 * 8];
            return visible(pr, at, low + column, j0 + row + h / 2 * 8, bias);
          });
#pragma unroll
          for (int n = 0; n < QUERIES_OF_WARP / 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
              const int to = (row + h * 8) * WEIGHTS + half * QUERIES_OF_WARP + n * 8 + t * 2;
              store_pair(p_tile + to, s[w][n][2 * h] * (1 << P_SHIFT), s[w][n][2 * h + 1] * (1 << P_SHIFT));
              store_pair(ds_tile + to, gx[w][n][2 * h], gx[w][n][2 * h + 1]);
            }
        }
      }
      __syncthreads();  // weights are there
      if (tid == 0 && to_pass) turn_pass(to_pass, passed);

      if (key_seen) {
        accumulate_spread<XP / 2>(dv_acc, p_tile + own * WEIGHTS, g_tile + half * (XP / 2), XP + PAD);
        accumulate_spread<DP / 2>(dk_acc, ds_tile + own * WEIGHTS, q_tile + half * (DP / 2), DP + PAD);
      }
      // in turn: from the last block of keys that this tile sees to the first
      const int last = (least(at.k_end, i0 + JOINT_QUERIES + pr.high) - 1) / JOINT_KEYS;
      int* turn = turns + (i64)at.query * tiles + tile;
      const int looked = turn_look(turn);
      float dq[DQ_STRIPS][DP / DQ_ACROSS / 8][4] = {};
      auto add_keys = [&](int from) {  // 64 of them
#pragma unroll
        for (int j = from / 16; j < from / 16 + 4; j++) {
          Left a[DQ_STRIPS];
#pragma unroll
          for (int w = 0; w < DQ_STRIPS; w++) load_a_transposed(a[w], ds_tile + j * 16 * WEIGHTS + dq_row + w * 16, WEIGHTS);
#pragma unroll
          for (int d = 0; d < DP / DQ_ACROSS / 16; d++) {
            Right b;
            load_b_transposed(b, k_tile + j * 16 * (DP + PAD) + dq_column + d * 16, DP + PAD);
#pragma unroll
            for (int w = 0; w < DQ_STRIPS; w++) mma(dq[w][2 * d], dq[w][2 * d + 1], a[w], b);
          }
        }
      };
      add_keys(0);
      if (seen > JOINT_KEYS / 2) add_keys(JOINT_KEYS / 2);
      float* sum = sums + ((i64)at.query * tiles + tile) * (JOINT_QUERIES * DP) + tid;
      turn_wait(turn, looked, last - block);
      auto give = [&](auto first_one) {
#pragma unroll
        for (int w = 0; w < DQ_STRIPS; w++)
#pragma unroll
          for (int d = 0; d < DP / DQ_ACROSS / 8; d++)
#pragma unroll
            for (int h = 0; h < 4; h++) {
              float* to = sum + ((w * (DP / DQ_ACROSS / 8) + d) * 4 + h) * JOINT_THREADS;
              if (first_one.value) *to = dq[w][d][h];
              else add_to(to, dq[w][d][h]);
            }
      };
      if (last == block) give(Flag<true>());
      else give(Flag<false>());
      to_pass = turn;
      passed = last - block + 1;
    }
  }
  copy_wait();
  __syncthreads();
  if (tid == 0 && to_pass) turn_pass(to_pass, passed);

  float* dk_rows = (float*)raw;                      // [JOINT_KEYS, DP]
  float* dv_rows = dk_rows + JOINT_KEYS * (DP + 4);    // [JOINT_KEYS, XP]
  spill<DP / 2>(dk_rows + own * (DP + 4) + half * (DP / 2), DP + 4, dk_acc);
  spill<XP / 2>(dv_rows + own * (XP + 4) + half * (XP / 2), XP + 4, dv_acc);
  __syncthreads();
  const int rows = least(JOINT_KEYS, pr.key_length - j0), g_scale = scales[2 * kv], ds_scale = scales[2 * kv + 1];
  for (int n = tid; n < rows * (WIDTH / 2); n += JOINT_THREADS) {
    const float* from = dk_rows + n / (WIDTH / 2) * (DP + 4) + n % (WIDTH / 2) * 2;
    store_pair(dk + (keys + j0) * WIDTH + n * 2, scaled(from[0] * pr.scale, ds_scale), scaled(from[1] * pr.scale, ds_scale));
  }
  for (int n = tid; n < rows * EP; n += JOINT_THREADS) {
    const int row = n / EP, e = n % EP;
    float* from = dv_rows + row * (XP + 4) + e;
    if (e >= pr.value_dim) continue;
    const i64 to = (keys + j0 + row) * pr.value_dim + e;
    const float beta = beta_of(pr, kv * pr.group % pr.query_heads, e);
    float dbeta;
    dv[to] = narrow(value_gradient(from[0], from[XP - EP], beta, widen(v[to]), c + (i64)kv * CP, e, g_scale, dbeta));
    from[0] = dbeta;
  }
  if (!dbetas) return;
  __syncthreads();
  for (int e = tid; e < EP; e += JOINT_THREADS) {
    float sum = 0.f;
    for (int row = 0; row < rows; row++) sum += e < pr.value_dim ? dv_rows[row * (XP + 4) + e] : 0.f;
    dbetas[((i64)kv * blocks + block) * EP + e] = sum;
  }
#endif
}

// dq from its sums; a block for each tile
extern "C" __global__ void __launch_bounds__(JOINT_THREADS) backward_joint_queries(
    PROBLEM, const float* sums, const int* turns, const int* scales, const int* flags, element* dq) {
#if JOINT
  const Problem pr = THE_PROBLEM;
  const int tiles = (pr.query_length + JOINT_QUERIES - 1) / JOINT_QUERIES;
  const Head at = head_of(pr, blockIdx.x / tiles);
  if (flags[at.key] & OUTSIDE) return;
  SHARED_MEMORY(raw);
  float* tile = (float*)raw;  // [JOINT_QUERIES, DP]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, ds_scale = scales[2 * at.key + 1];
  const bool some = turns[blockIdx.x] > 0;
  sums += (i64)blockIdx.x * (JOINT_QUERIES * DP) + threadIdx.x;
#pragma unroll
  for (int w = 0; w < DQ_STRIPS; w++)
#pragma unroll
    for (int n = 0; n < DP / DQ_ACROSS / 8; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = warp / DQ_ACROSS * 16 * DQ_STRIPS + w * 16 + h * 8 + lane / 4;
        const int column = warp % DQ_ACROSS * (DP / DQ_ACROSS) + n * 8 + lane % 4 * 2;
        const float* from = sums + ((w * (DP / DQ_ACROSS / 8) + n) * 4 + 2 * h) * JOINT_THREADS;
        store_two(tile + row * (DP + 4) + column, some ? from[0] : 0.f, some ? from[JOINT_THREADS] : 0.f);
      }
  __syncthreads();
  const int i0 = blockIdx.x % tiles * JOINT_QUERIES, rows = least(JOINT_QUERIES, pr.query_length - i0);
  dq += ((i64)at.query * pr.query_length + i0) * WIDTH;
  for (int n = threadIdx.x; n < rows * (WIDTH / 4); n += JOINT_THREADS) {
    const Floats four = *(const Floats*)(tile + n / (WIDTH / 4) * (DP + 4) + n % (WIDTH / 4) * 4);
    for (int h = 0; h < 4; h += 2)
      store_pair(dq + n * 4 + h, scaled(four.x[h] * pr.scale, ds_scale), scaled(four.x[h + 1] * pr.scale, ds_scale));
  }
#endif
}
