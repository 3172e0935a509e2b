// Runs the kernels on a CPU: the functions of hardware.cu, barriers and shuffles for g++ on x86-64.
//
// A fiber for each CUDA thread, blocks in turn. A fiber runs until it has to wait for others, then one that can run is
// taken at random (seeded), for a while from one warp only: warps run far ahead of each other, so that a missing barrier
// shows for some seed. Shared memory begins as NaN, asynchronous copies
// arrive when they are waited for and not before, and warp-wide operations compare what each lane is about to do.
// Not emulated: races between blocks, the rounding of a tensor core's own accumulator, bank conflicts.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

namespace emulator {
struct Index { unsigned x = 0; };
struct Copy { void* to; const void* from; int size; bool there; };
struct Fiber { void* stack_pointer = nullptr; std::vector<char> stack; Index thread; std::vector<Copy> copies; bool done = false; };
struct Meeting { int arrived = 0, result = 0, collected = 0; const void* tag = nullptr; std::vector<Fiber*> waiting; };
struct Warp { Meeting meeting; alignas(16) u8 in[32][64], out[32][64]; };

inline Fiber* current;
inline void* home;
inline std::vector<Fiber> fibers;
inline std::vector<std::vector<Fiber*>> ready;  // by warp
inline unsigned favourite;
inline std::vector<Warp> warps;
inline Meeting barrier;
inline int alive;
inline Index block;
inline std::minstd_rand order;
inline void (*body)(void*);
inline void* argument;
alignas(128) inline u8 shared[232448];

extern "C" void emulator_switch(void** from, void* to);
asm(R"(.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp, (%rdi); movq %rsi, %rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, block.x, current->thread.x);
  abort();
}

inline Fiber* take() {  // a fiber that can run, or null
  if (order() % 256 == 0 || ready[favourite].empty()) favourite = order() % ready.size();
  for (size_t n = 0; n < ready.size(); n++) {
    auto& some = ready[(favourite + n) % ready.size()];
    if (some.empty()) continue;
    std::swap(some[order() % some.size()], some.back());
    Fiber* taken = some.back();
    some.pop_back();
    return taken;
  }
  return nullptr;
}

inline void give(Fiber* f) { ready[f->thread.x / 32].push_back(f); }

inline void next() {  // the current fiber waits or is done
  Fiber* self = current;
  Fiber* other = take();
  if (!other) {
    if (alive) fail("deadlock: every thread waits");
    emulator_switch(&self->stack_pointer, home);
  }
  current = other;
  if (current != self) emulator_switch(&self->stack_pointer, current->stack_pointer);
}

inline bool arrive(Meeting& m, int expected, const void* tag) {  // true for the last one, who then opens
  if (m.arrived && m.tag != tag) fail("threads of a warp or block do different things together");
  m.tag = tag;
  if (++m.arrived == expected) return true;
  m.waiting.push_back(current);
  next();
  return false;
}

inline void open(Meeting& m) {
  m.arrived = 0;
  for (Fiber* f : m.waiting) give(f);
  m.waiting.clear();
}

inline int synchronize(int predicate, const void* tag) {
  barrier.collected |= predicate;
  if (arrive(barrier, alive, tag)) {
    barrier.result = barrier.collected;
    barrier.collected = 0;
    open(barrier);
  }
  return barrier.result;
}

// each lane gives `in`; the last to come computes all `out`
template <class In, class Out, class F> Out together(const In& in, const void* tag, F compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  const int lane = current->thread.x % 32;
  Warp& w = warps[current->thread.x / 32];
  memcpy(w.in[lane], &in, sizeof in);
  if (arrive(w.meeting, 32, tag)) {
    compute(w);
    open(w.meeting);
  }
  Out out;
  memcpy(&out, w.out[lane], sizeof out);
  return out;
}

inline void start() {
  body(argument);
  if (!current->copies.empty()) fail("a thread ends with copies that it has not waited for");
  current->done = true;
  alive--;
  if (alive && barrier.arrived) fail("a thread ends while others wait at a barrier");
  next();
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** a, std::index_sequence<I...>) {
  kernel(*(std::decay_t<A>*)a[I]...);
}

template <class... A> void launch(void (*kernel)(A...), unsigned grid, unsigned threads, size_t bytes, unsigned seed, void** arguments) {
  struct Call { void (*kernel)(A...); void** arguments; } c{kernel, arguments};
  body = [](void* p) { auto* c = (Call*)p; call(c->kernel, c->arguments, std::index_sequence_for<A...>()); };
  argument = &c;
  order.seed(seed + 1);
  const size_t size = 1 << 16;
  if (fibers.size() < threads) fibers.resize(threads);
  for (block.x = 0; block.x < grid; block.x++) {
    memset(shared, 0xFF, bytes);
    barrier = Meeting();
    warps.assign(threads / 32, Warp());
    alive = threads;
    ready.assign(threads / 32, {});
    favourite = 0;
    for (unsigned i = 0; i < threads; i++) {
      Fiber& f = fibers[i];
      f.stack.resize(size);
      f.thread.x = i;
      f.done = false;
      void** top = (void**)((uintptr_t)(f.stack.data() + size) & ~(uintptr_t)15);
      *--top = nullptr;  // where a caller's address would be
      *--top = (void*)&start;
      for (int r = 0; r < 6; r++) *--top = nullptr;
      f.stack_pointer = top;
      give(&f);
    }
    current = take();
    emulator_switch(&home, current->stack_pointer);
  }
}
}  // namespace emulator

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block)
#define SHARED_MEMORY(name) u8* name = emulator::shared
#define __syncthreads() ([] { static char tag; emulator::synchronize(0, &tag); }())
#define __syncthreads_or(predicate) ([](int p) { static char tag; return emulator::synchronize(p, &tag); }(predicate))

inline float bits_as_float(u32 x) { float f; memcpy(&f, &x, 4); return f; }
inline u32 float_as_bits(float f) { u32 x; memcpy(&x, &f, 4); return x; }

#if FLOAT16
inline u16 narrow(float f) { _Float16 h = (_Float16)f; u16 x; memcpy(&x, &h, 2); return x; }
inline float widen(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (float)h; }
#else
inline u16 narrow(float f) { u32 x = float_as_bits(f); return f != f ? 0x7FFF : (u16)((x + 0x7FFF + (x >> 16 & 1)) >> 16); }
inline float widen(u16 x) { return bits_as_float((u32)x << 16); }
#endif
inline u32 pack(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
inline float exp2_fast(float x) { float y = exp2f(x); return y < 1.17549435e-38f ? 0.f : y; }

inline float __shfl_sync(u32, float x, int lane) {
  struct In { float x; int lane; };
  static char tag;
  return emulator::together<In, float>(In{x, lane}, &tag, [](emulator::Warp& w) {
    for (int i = 0; i < 32; i++) memcpy(w.out[i], w.in[((In*)w.in[i])->lane], 4);
  });
}
inline float __shfl_xor_sync(u32, float x, int mask) {
  static char tag;
  return emulator::together<float, float>(x, &tag, [mask](emulator::Warp& w) { for (int i = 0; i < 32; i++) memcpy(w.out[i], w.in[i ^ mask], 4); });
}

inline float log2_fast(float x) { return log2f(x); }
inline void __syncwarp() {
  static char tag;
  emulator::together<int, int>(0, &tag, [](emulator::Warp&) {});
}
inline bool warp_any(bool x) {
  static char tag;
  return emulator::together<int, int>(x, &tag, [](emulator::Warp& w) {
    int any = 0;
    for (int i = 0; i < 32; i++) any |= *(int*)w.in[i];
    for (int i = 0; i < 32; i++) *(int*)w.out[i] = any;
  });
}
inline int atomicOr(int* to, int bits) { int old = *to; *to |= bits; return old; }
inline u32 atomicMax(u32* to, u32 x) { u32 old = *to; *to = x > old ? x : old; return old; }

#if !FLOAT32
typedef u16 element;
struct Left { u32 x[4]; };
struct Right { u32 x[4]; };
inline void store_pair(u16* to, float first, float second) { const u32 x = pack(first, second); memcpy(to, &x, 4); }

inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct In { float d[4]; u32 a[4], b[2]; } in;
  struct Out { float d[4]; };
  memcpy(in.d, d, 16); memcpy(in.a, a, 16); in.b[0] = b0; in.b[1] = b1;
  static char tag;
  Out out = emulator::together<In, Out>(in, &tag, [](emulator::Warp& w) {
    static float A[16][16], B[16][8], D[16][8];
    for (int l = 0; l < 32; l++) {
      const In& x = *(const In*)w.in[l];
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++) for (int h = 0; h < 2; h++) A[g + r % 2 * 8][t * 2 + h + r / 2 * 8] = widen((u16)(x.a[r] >> 16 * h));
      for (int r = 0; r < 2; r++) for (int h = 0; h < 2; h++) B[t * 2 + h + r * 8][g] = widen((u16)(x.b[r] >> 16 * h));
      for (int r = 0; r < 4; r++) D[g + r / 2 * 8][t * 2 + r % 2] = x.d[r];
    }
    for (int i = 0; i < 16; i++) for (int k = 0; k < 16; k++) for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++) for (int r = 0; r < 4; r++) ((Out*)w.out[l])->d[r] = D[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
  });
  memcpy(d, out.d, 16);
}
inline void mma(float (&d0)[4], float (&d1)[4], const Left& a, const Right& b) {
  mma(d0, a.x, b.x[0], b.x[1]);
  mma(d1, a.x, b.x[2], b.x[3]);
}
inline u32 pair(const u16* p) { u32 x; memcpy(&x, p, 4); return x; }
inline void load_a(Left& f, const u16* tile, int ld) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int r = 0; r < 4; r++) f.x[r] = pair(tile + (g + r % 2 * 8) * ld + t * 2 + r / 2 * 8);
}
inline void load_b(Right& f, const u16* tile, int ld) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int r = 0; r < 4; r++) f.x[r] = pair(tile + (g + r / 2 * 8) * ld + t * 2 + r % 2 * 8);
}
inline void load_b_transposed(Right& f, const u16* tile, int ld) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int r = 0; r < 4; r++) {
    const u16* p = tile + (t * 2 + r % 2 * 8) * ld + g + r / 2 * 8;
    f.x[r] = p[0] | (u32)p[ld] << 16;
  }
}
// fragments by the spot of their tile, as hardware.cu has it
struct Spot { const element* tile; };
inline Spot spot_a(const element* tile, int) { return {tile}; }
inline Spot spot_b(const element* tile, int) { return {tile}; }
inline Spot spot_b_transposed(const element* tile, int) { return {tile}; }
inline void load_a(Left& f, Spot at, int offset, int ld) { load_a(f, at.tile + offset, ld); }
inline void load_b(Right& f, Spot at, int offset, int ld) { load_b(f, at.tile + offset, ld); }
inline void load_b_transposed(Right& f, Spot at, int offset, int ld) { load_b_transposed(f, at.tile + offset, ld); }
inline void left_of(Left& f, const float (&c0)[4], const float (&c1)[4]) {
  f.x[0] = pack(c0[0], c0[1]); f.x[1] = pack(c0[2], c0[3]);
  f.x[2] = pack(c1[0], c1[1]); f.x[3] = pack(c1[2], c1[3]);
}
#endif

inline void copy_begin(void* to, const void* from, bool there = true) { emulator::current->copies.push_back({to, from, 16, there}); }
inline void copy_begin_float(float* to, const float* from, bool there) { emulator::current->copies.push_back({to, from, 4, there}); }
inline void copy_end() { emulator::current->copies.push_back({nullptr, nullptr, 0, false}); }
template <int N> inline void copy_wait_but() {  // all groups but the last N
  auto& copies = emulator::current->copies;
  size_t done = copies.size();
  for (int ends = 0; done; done--)
    if (!copies[done - 1].to && ++ends > N) break;
  for (size_t n = 0; n < done; n++) {
    auto& c = copies[n];
    if (c.there) memcpy(c.to, c.from, c.size); else if (c.to) memset(c.to, 0, c.size);
  }
  copies.erase(copies.begin(), copies.begin() + done);
}
inline void copy_wait() { copy_end(); copy_wait_but<0>(); }
