// Products of a warp of the backward pass: it owns 16 * W rows of one matrix, and 8 * N rows of another pass by in shared memory.

// zeros for what is not finite in a tile that tile_begin has loaded
template <int ROWS, int CELLS> __device__ __forceinline__ void tile_clean(element* tile) {
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n < ROWS * CELLS; n += THREADS) {
    element* at = tile + n / CELLS * (CELLS + PAD) + n % CELLS;
    if (!finite(widen(*at))) *at = narrow(0.f);
  }
}

// product [16 * W, 8 * N] = a [16 * W, CELLS] · bᵀ, for b [8 * N, CELLS]; after each step between(d, steps)
template <int CELLS, int W, int N, class Between>
__device__ __forceinline__ void multiply(float (&product)[W][N][4], const element* a_tile, const element* b_tile, Between between) {
#pragma unroll
  for (int d = 0; d < CELLS / 16; d++) {
    Left a[W];
#pragma unroll
    for (int w = 0; w < W; w++) load_a(a[w], a_tile + w * 16 * (CELLS + PAD) + d * 16, CELLS + PAD);
#pragma unroll
    for (int j = 0; j < N / 2; j++) {
      Right b;
      load_b(b, b_tile + j * 16 * (CELLS + PAD) + d * 16, CELLS + PAD);
#pragma unroll
      for (int w = 0; w < W; w++) mma(product[w][2 * j], product[w][2 * j + 1], a[w], b);
    }
    between(d, CELLS / 16);
  }
}

// two of the same side by side, with a in registers: each alone would wait for itself
template <bool EARLY, int W, int N, class Between>
__device__ __forceinline__ void multiply_both(float (&s)[W][N][4], float (&gx)[W][N][4], const Left (&qk)[W][DP / 16],
                                              const Left (&of_x)[W][XP / 16], const element* qk_tile, const element* x_tile,
                                              Between between) {
  constexpr int TURNS = DP == XP ? 2 : 1, J = N / 2;  // by turns where there are as many steps
  auto is_x = [](int d) { return TURNS == 2 ? d % 2 == 1 : d >= DP / 16; };
  auto step_of = [&](int d) { return TURNS == 2 ? d / 2 : is_x(d) ? d - DP / 16 : d; };
  each_fragment<(DP + XP) / 16 * J, EARLY>(
      [&](Right& b, int n) {
        const int d = step_of(n / J), j = n % J;
        if (is_x(n / J)) load_b(b, x_tile + j * 16 * (XP + PAD) + d * 16, XP + PAD);
        else load_b(b, qk_tile + j * 16 * (DP + PAD) + d * 16, DP + PAD);
      },
      [&](const Right& b, int n) {
        const int d = step_of(n / J), j = n % J;
#pragma unroll
        for (int w = 0; w < W; w++) {
          if (is_x(n / J)) mma(gx[w][2 * j], gx[w][2 * j + 1], of_x[w][d], b);
          else mma(s[w][2 * j], s[w][2 * j + 1], qk[w][d], b);
        }
        if (!is_x(n / J) && j == J - 1) between(d, DP / 16);
      });
}

// rows of a warp as fragments
template <int CELLS, int W> __device__ __forceinline__ void hold(Left (&a)[W][CELLS / 16], const element* tile) {
#pragma unroll
  for (int w = 0; w < W; w++)
#pragma unroll
    for (int d = 0; d < CELLS / 16; d++) load_a(a[w][d], tile + w * 16 * (CELLS + PAD) + d * 16, CELLS + PAD);
}

// acc [16 * W, CELLS] += a [16 * W, 8 * N] · b, for b [8 * N, CELLS]; a comes as the result of a product
template <int CELLS, bool EARLY, int W, int N>
__device__ __forceinline__ void accumulate(float (&acc)[W][CELLS / 8][4], const float (&a)[W][N][4], const element* b_tile) {
#pragma unroll
  for (int j = 0; j < N / 2; j++) {
    Left left[W];
#pragma unroll
    for (int w = 0; w < W; w++) left_of(left[w], a[w][2 * j], a[w][2 * j + 1]);
    each_fragment<CELLS / 16, EARLY>(
        [&](Right& b, int e) { load_b_transposed(b, b_tile + j * 16 * (CELLS + PAD) + e * 16, CELLS + PAD); },
        [&](const Right& b, int e) {
#pragma unroll
          for (int w = 0; w < W; w++) mma(acc[w][2 * e], acc[w][2 * e + 1], left[w], b);
        });
  }
}
