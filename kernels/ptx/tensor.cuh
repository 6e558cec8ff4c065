// Boxes of matrices between global and shared memory, through tensor maps. Coordinates are (column, row) in elements;
// what a box reaches beyond its matrix reads as zero and is not written.
#pragma once

#include <stdint.h>

#include "../params.h"

namespace lora::ptx {

// Copies a box to `smem`; its bytes count at `barrier`.
__device__ __forceinline__ void load_box(uint32_t smem, const LoraTensorMap& map, uint32_t barrier, uint32_t col,
                                         uint32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(
          smem),
      "l"(&map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}

// Copies a box to the same place in every CTA of `mask`, and counts its bytes at the barrier of each.
__device__ __forceinline__ void load_box_multicast(uint32_t smem, const LoraTensorMap& map, uint32_t barrier,
                                                   uint32_t col, uint32_t row, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;\n" ::"r"(smem),
      "l"(&map), "r"(barrier), "h"(mask), "r"(col), "r"(row)
      : "memory");
}

__device__ __forceinline__ void store_box(const LoraTensorMap& map, uint32_t smem, uint32_t col, uint32_t row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(&map), "r"(smem),
               "r"(col), "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups of stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kPending) : "memory");
}

// Orders this thread's accesses to shared memory, and those it knows of, before copies and wgmmas that follow.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// The same for global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

}  // namespace lora::ptx
