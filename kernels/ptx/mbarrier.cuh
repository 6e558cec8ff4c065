// mbarriers in shared memory, and what a cluster shares. Barriers are named by their shared-space address.
#pragma once

#include <stdint.h>

namespace lora::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
  return size;
}

// All threads of the cluster, whose warps must be whole. What each did before, all see after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// The same without the release, which waits for all memory: what must be known beyond the CTA is fenced by itself.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// The address in the shared memory of CTA `rank` of the cluster that `smem` is in one's own.
__device__ __forceinline__ uint32_t map_shared(uint32_t smem, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(smem), "r"(rank));
  return remote;
}

// Stores to the shared memory of a CTA of the cluster; its 4 bytes count at a barrier there. Both are named by
// `map_shared`.
__device__ __forceinline__ void store_async(uint32_t remote, uint32_t value, uint32_t remote_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];\n" ::"r"(remote),
               "r"(value), "r"(remote_barrier)
               : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the cluster and to copies, with the barrier that follows.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// One arrival, and `bytes` to be copied in this phase.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// An arrival at the barrier of another CTA of the cluster (or one's own), named by `map_shared`. It says that something
// was read to the end; to publish stores beyond the CTA it would need cluster scope, which costs a fence of all memory.
__device__ __forceinline__ void mbarrier_arrive(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(remote) : "memory");
}

// Waits for the phase of this parity to complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred complete;\nLORA_WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra LORA_DONE;\nbra LORA_WAIT;\nLORA_DONE:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace lora::ptx
