// Elements of float32, and products of them in plain float32: a lane of a fragment holds whole rows of a, columns of b.
#if FLOAT32
typedef float element;
struct Left { float x[2][16]; };   // rows g and g + 8
struct Right { float x[4][16]; };  // columns 2t, 2t + 1, 2t + 8 and 2t + 9
struct alignas(16) Four { float x[4]; };

__device__ __forceinline__ float widen(float x) { return x; }
#define narrow(x) (x)
#define store_pair store_two

// d0, d1 += a · b, the columns of b in two halves. Sixteen products are summed first: a sum over 10^5 keys, one after the
// other, would lose three digits
__device__ __forceinline__ void mma(float (&d0)[4], float (&d1)[4], const Left& a, const Right& b) {
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float s0 = 0, s1 = 0;
#pragma unroll
    for (int k = 0; k < 16; k++) {
      s0 = fmaf(a.x[r / 2][k], b.x[r % 2][k], s0);
      s1 = fmaf(a.x[r / 2][k], b.x[r % 2 + 2][k], s1);
    }
    d0[r] += s0;
    d1[r] += s1;
  }
}

__device__ __forceinline__ void load_sixteen(float (&to)[16], const float* from) {
#pragma unroll
  for (int n = 0; n < 16; n += 4) {
    const Four four = *(const Four*)(from + n);
#pragma unroll
    for (int h = 0; h < 4; h++) to[n + h] = four.x[h];
  }
}
__device__ __forceinline__ void load_a(Left& f, const float* tile, int ld) {
  const int g = threadIdx.x % 32 / 4;
  load_sixteen(f.x[0], tile + g * ld);
  load_sixteen(f.x[1], tile + (g + 8) * ld);
}
__device__ __forceinline__ void load_b(Right& f, const float* tile, int ld) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 4; n++) load_sixteen(f.x[n], tile + (t * 2 + n % 2 + n / 2 * 8) * ld);
}
__device__ __forceinline__ void load_b_transposed(Right& f, const float* tile, int ld) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int k = 0; k < 16; k++)
#pragma unroll
    for (int n = 0; n < 2; n++) {
      for (int h = 0; h < 2; h++) f.x[2 * n + h][k] = tile[k * ld + t * 2 + n * 8 + h];
    }
}
__device__ __forceinline__ void left_of(Left& f, const float (&c0)[4], const float (&c1)[4]) {
  const int first = threadIdx.x % 32 / 4 * 4;
#pragma unroll
  for (int n = 0; n < 4; n++)
#pragma unroll
    for (int r = 0; r < 4; r++) {
      f.x[r / 2][2 * n + r % 2] = __shfl_sync(0xFFFFFFFFu, c0[r], first + n);
      f.x[r / 2][8 + 2 * n + r % 2] = __shfl_sync(0xFFFFFFFFu, c1[r], first + n);
    }
}
// fragments by the spot of their tile, as hardware.cu has it
struct Spot { const element* tile; };
__device__ __forceinline__ Spot spot_a(const element* tile, int) { return {tile}; }
__device__ __forceinline__ Spot spot_b(const element* tile, int) { return {tile}; }
__device__ __forceinline__ Spot spot_b_transposed(const element* tile, int) { return {tile}; }
__device__ __forceinline__ void load_a(Left& f, Spot at, int offset, int ld) { load_a(f, at.tile + offset, ld); }
__device__ __forceinline__ void load_b(Right& f, Spot at, int offset, int ld) { load_b(f, at.tile + offset, ld); }
__device__ __forceinline__ void load_b_transposed(Right& f, Spot at, int offset, int ld) { load_b_transposed(f, at.tile + offset, ld); }
#endif
