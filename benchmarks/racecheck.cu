// What racecheck says of a producer that hands tiles to 128 consumers through mbarriers, as the Hopper kernels do:
//
//   nvcc -arch=sm_90a -o racecheck benchmarks/racecheck.cu
//   compute-sanitizer --tool racecheck ./racecheck EACH RACE BULK
//
// EACH 0: the consumers meet at a barrier and one of them says that the tile is free, as Triton's mbarrier.arrive does;
// EACH 1: every one says so. RACE 1: they say so before they have read it. BULK 1: the copy engine writes the tile,
// 0: a thread. Right are EACH 0 and 1 without RACE, and racecheck should report the other two alone.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

constexpr int CONSUMERS = 128, TILES = 16, STAGES = 2;

__device__ uint32_t place(const void* x) { return static_cast<uint32_t>(__cvta_generic_to_shared(x)); }

__device__ void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(place(barrier)) : "memory");
}

__device__ void wait(uint64_t* barrier, int phase) {
    asm volatile(
        "{\n.reg .pred p;\nagain: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(
            place(barrier)),
        "r"(phase)
        : "memory");
}

__device__ void copy(int* tile, const int* from, uint64_t* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(place(barrier)), "r"(4 * CONSUMERS)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     place(tile)),
                 "l"(from), "r"(4 * CONSUMERS), "r"(place(barrier))
                 : "memory");
}

__device__ void release(uint64_t* barrier, bool each, int consumer) {
    if (!each) asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
    if (each || consumer == 0) arrive(barrier);
}

__global__ void kernel(const int* in, int* out, bool each, bool race, bool bulk) {
    __shared__ alignas(128) int tile[STAGES][CONSUMERS];
    __shared__ alignas(8) uint64_t full[STAGES], empty[STAGES];
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; ++stage) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(place(&full[stage])));
            asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(place(&empty[stage])), "r"(each ? CONSUMERS : 1));
        }
    asm volatile("fence.mbarrier_init.release.cluster;");
    __syncthreads();
    const int consumer = static_cast<int>(threadIdx.x) - 32;
    if (consumer == -32) {  // the producer
        for (int i = 0; i < TILES; ++i) {
            const int stage = i % STAGES;
            wait(&empty[stage], i / STAGES % 2 ^ 1);
            if (bulk) {
                copy(tile[stage], in + i * CONSUMERS, &full[stage]);
            } else {
                tile[stage][0] = in[i * CONSUMERS];
                arrive(&full[stage]);
            }
        }
    } else if (consumer >= 0) {
        int sum = 0;
        for (int i = 0; i < TILES; ++i) {
            const int stage = i % STAGES;
            wait(&full[stage], i / STAGES % 2);
            if (race) release(&empty[stage], each, consumer);
            sum += tile[stage][bulk ? (consumer + i) % CONSUMERS : 0];
            if (!race) release(&empty[stage], each, consumer);
        }
        out[consumer] = sum;
    }
}

int main(int count, char** given) {
    if (count != 4) return 2;
    const bool each = std::atoi(given[1]), race = std::atoi(given[2]), bulk = std::atoi(given[3]);
    int *in, *out;
    cudaMalloc(&in, 4 * CONSUMERS * TILES);
    cudaMalloc(&out, 4 * CONSUMERS);
    cudaMemset(in, 0, 4 * CONSUMERS * TILES);
    kernel<<<1, 32 + CONSUMERS>>>(in, out, each, race, bulk);
    std::printf("each %d, race %d, bulk %d: %s\n", each, race, bulk, cudaGetErrorString(cudaDeviceSynchronize()));
}
