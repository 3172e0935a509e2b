// What the kernels ask of the hardware: numbers, matrix products of a warp, asynchronous copies. sm_80 and later.
//
// The kernels use nothing of a GPU beside these functions, barriers and shuffles. emulator.h has the same functions
// for a CPU; a port to other hardware begins here. FLOAT16 or FLOAT32 chooses the elements of matrices, bfloat16
// otherwise.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define SHARED_MEMORY(name) extern __shared__ __align__(16) u8 name[]

__device__ __forceinline__ float bits_as_float(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ u32 float_as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ bool warp_any(bool x) { return __any_sync(0xFFFFFFFFu, x); }

// two floats rounded to 16 bits each; `low` in the lower half
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 d;
#if FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
#endif
  return d;
}

__device__ __forceinline__ float widen(u16 x) {
#if FLOAT16
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x));
  return f;
#else
  return __uint_as_float((u32)x << 16);
#endif
}

// 2^x; results below the least normal number are zero
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 of a normal number, with an absolute error of 2^-22 between 1/2 and 2
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// begins to copy 16 bytes from global to shared memory
__device__ __forceinline__ void copy_begin(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// the same, or zeros
__device__ __forceinline__ void copy_begin(void* to, const void* from, bool there) {
  const int size = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size) : "memory");
}
// the same for one float
__device__ __forceinline__ void copy_begin_float(float* to, const float* from, bool there) {
  const int size = there ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size) : "memory");
}

// waits for the copies that this thread has begun; others see them after the next barrier
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ends a group of copies; and waits for all groups but the last N
__device__ __forceinline__ void copy_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait_but() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Fragments: Left is a [16, 16], Right is b [16, 16]; a result d [16, 8] is four floats: lane 4g + t holds
// d[g][2t, 2t+1] and d[g+8][2t, 2t+1]. `ld` is the distance of rows in a tile. float32.cu has those of float32.
#if !FLOAT32
typedef u16 element;
struct Left { u32 x[4]; };
struct Right { u32 x[4]; };

__device__ __forceinline__ u16 narrow(float x) { return (u16)pack(x, 0.f); }
__device__ __forceinline__ void store_pair(u16* to, float first, float second) { *(u32*)to = pack(first, second); }

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if FLOAT16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d0, d1 += a · b, the columns of b in two halves
__device__ __forceinline__ void mma(float (&d0)[4], float (&d1)[4], const Left& a, const Right& b) {
  mma(d0, a.x, b.x[0], b.x[1]);
  mma(d1, a.x, b.x[2], b.x[3]);
}

__device__ __forceinline__ void load_matrices(u32 (&f)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
}

// a [16, 16] at `tile`
__device__ __forceinline__ void load_a(Left& f, const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  load_matrices(f.x, tile + (lane % 16) * ld + lane / 16 * 8);
}

// b stored as rows of its columns: tile [16 of n, 16 of k]
__device__ __forceinline__ void load_b(Right& f, const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  load_matrices(f.x, tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}

// b stored as it is: tile [16 of k, 16 of n]
__device__ __forceinline__ void load_b_transposed(Right& f, const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  const u16* row = tile + lane % 16 * ld + lane / 16 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3]) : "r"(shared_address(row)) : "memory");
}

// Where a lane reads of the fragments of a and of b at `tile`, and of b as it is; `offset` elements further. Loops take it before
// them: the shuffle keeps the compiler from working it out again for every load
struct Spot { u32 address; };
__device__ __forceinline__ Spot spot_of(const u16* row) {
  return {(u32)__shfl_sync(0xFFFFFFFFu, (int)shared_address(row), threadIdx.x % 32)};
}
__device__ __forceinline__ Spot spot_a(const u16* tile, int ld) { return spot_of(tile + threadIdx.x % 16 * ld + threadIdx.x % 32 / 16 * 8); }
__device__ __forceinline__ Spot spot_b(const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  return spot_of(tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}
__device__ __forceinline__ Spot spot_b_transposed(const u16* tile, int ld) { return spot_a(tile, ld); }
__device__ __forceinline__ void load_matrices(u32 (&f)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_a(Left& f, Spot at, int offset, int) { load_matrices(f.x, at.address + offset * 2); }
__device__ __forceinline__ void load_b(Right& f, Spot at, int offset, int) { load_matrices(f.x, at.address + offset * 2); }
__device__ __forceinline__ void load_b_transposed(Right& f, Spot at, int offset, int) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f.x[0]), "=r"(f.x[1]), "=r"(f.x[2]), "=r"(f.x[3]) : "r"(at.address + offset * 2) : "memory");
}

// a from two results of products side by side
__device__ __forceinline__ void left_of(Left& f, const float (&c0)[4], const float (&c1)[4]) {
  f.x[0] = pack(c0[0], c0[1]);
  f.x[1] = pack(c0[2], c0[3]);
  f.x[2] = pack(c1[0], c1[1]);
  f.x[3] = pack(c1[2], c1[3]);
}
#endif
