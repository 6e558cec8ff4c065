// Tiles of 64 x 64 bf16 through a ring of stages: in -> shared memory of both CTAs of a cluster (multicast, swizzled) -> registers
// -> shared memory -> out, each element one more. Every CTA of the cluster writes all tiles, to its own half of out.
// Warp 4 issues the loads, warps 0-3 consume; a stage is handed back to the producers of both CTAs.

#include <cuda.h>
#include <cstdint>

constexpr int STAGES = 4, ROWS = 64, COLS = 64;
constexpr int TILE = ROWS * COLS;  // elements

__device__ uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(bar)), "r"(count));
}

__device__ void wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra OVER;\nbra AGAIN;\nOVER:\n}" ::"r"(shared(bar)),
      "r"(parity)
      : "memory");
}

__device__ void expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(bar)), "r"(bytes) : "memory");
}

__device__ void arrive_at(uint64_t* bar, uint32_t rank, bool arrives) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b32 remote;\nsetp.ne.u32 p, %2, 0;\n@p mapa.shared::cluster.u32 remote, %0, %1;\n"
      "@p mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared(bar)),
      "r"(rank), "r"(uint32_t(arrives))
      : "memory");
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(160)
    ring(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, int tiles) {
  extern __shared__ __align__(1024) uint16_t stages[];  // (STAGES, ROWS, COLS), then (ROWS, COLS) for the way out
  __shared__ uint64_t full[STAGES], empty[STAGES];
  uint16_t* outgoing = stages + STAGES * TILE;
  uint32_t rank;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init(&full[i], 1);
      init(&empty[i], 2 * 4);  // the consumer warps of both CTAs
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");

  if (warp == 4) {
    if (lane == 0) {
      for (int t = 0; t < tiles; t++) {
        const int s = t % STAGES;
        wait(&empty[s], t / STAGES & 1 ^ 1);
        expect(&full[s], TILE * 2);
        // Half of the rows, to both CTAs.
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared(stages + s * TILE + rank * TILE / 2)),
            "l"(&in), "r"(shared(&full[s])), "h"(uint16_t(3)), "r"(0), "r"(t * ROWS + int(rank) * ROWS / 2)
            : "memory");
      }
      // Stay until nobody arrives here any more.
      for (int t = tiles; t < tiles + STAGES; t++) wait(&empty[t % STAGES], t / STAGES & 1 ^ 1);
    }
    return;
  }
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  for (int t = 0; t < tiles; t++) {
    const int s = t % STAGES;
    wait(&full[s], t / STAGES & 1);
    uint16_t values[32];
    for (int i = 0; i < 4; i++) {
      const int unit = (half * 4 + i) ^ (row & 7);  // 128-byte swizzle
      *reinterpret_cast<uint4*>(values + i * 8) = *reinterpret_cast<uint4*>(stages + s * TILE + row * COLS + unit * 8);
    }
    __syncwarp();
    arrive_at(&empty[s], lane, lane < 2);
    // The tile before must have been read.
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    asm volatile("bar.sync 1, 128;" ::: "memory");
    for (int i = 0; i < 32; i++) outgoing[row * COLS + half * 32 + i] = values[i] + 1;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync 1, 128;" ::: "memory");
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&out),
                   "r"(shared(outgoing)), "r"(0), "r"((int(rank) * tiles + t) * ROWS)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
