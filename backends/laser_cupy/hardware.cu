// What the kernels ask of the hardware: 16-bit numbers, matrix products of a warp, asynchronous copies. sm_80 and later.
//
// The kernels use nothing of a GPU beside these functions, barriers and shuffles. emulator.h has the same functions
// for a CPU; a port to other hardware begins here. FLOAT16 chooses between float16 and bfloat16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define SHARED_MEMORY(name) extern __shared__ __align__(16) u8 name[]

__device__ __forceinline__ float bits_as_float(u32 x) { return __uint_as_float(x); }
__device__ __forceinline__ u32 float_as_bits(float x) { return __float_as_uint(x); }

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

// d [16, 8] += a [16, 16] · b [16, 8]; lane 4g + t holds d[g][2t, 2t+1] and d[g+8][2t, 2t+1]
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if FLOAT16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void load_matrices(u32 (&f)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
}

// the left operand: a [16, 16] at `tile` in shared memory, rows `ld` apart
__device__ __forceinline__ void load_a(u32 (&f)[4], const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  load_matrices(f, tile + (lane % 16) * ld + lane / 16 * 8);
}

// two right operands b [16, 8] side by side, stored as rows of b's columns: tile [16 of n, 16 of k]
__device__ __forceinline__ void load_b(u32 (&f)[4], const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  load_matrices(f, tile + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}

// the same, stored as b itself: tile [16 of k, 16 of n]
__device__ __forceinline__ void load_b_transposed(u32 (&f)[4], const u16* tile, int ld) {
  const int lane = threadIdx.x % 32;
  const u16* row = tile + lane % 16 * ld + lane / 16 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3]) : "r"(shared_address(row)) : "memory");
}

// begins to copy 16 bytes from global to shared memory, or zeros
__device__ __forceinline__ void copy_begin(u16* to, const u16* from, bool there) {
  const int size = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size) : "memory");
}

// the same for one float
__device__ __forceinline__ void copy_begin(float* to, const float* from, bool there) {
  const int size = there ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size) : "memory");
}

// waits for the copies that this thread has begun; others see them after the next barrier
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
