// Words in global memory through which CTAs synchronise. Scope is the GPU throughout.
#pragma once

#include <stdint.h>

namespace lora::ptx {

// Nothing is ordered by a ticket: it only hands out numbers.
__device__ __forceinline__ uint32_t atomic_add_relaxed(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;\n"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
  return before;
}

// Everything the CTA wrote before its last barrier is visible to whoever reads the new value, and the other way round.
__device__ __forceinline__ uint32_t atomic_add_acq_rel(uint32_t* word, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;\n"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
  return before;
}

// Publishes what the CTA wrote before its last barrier.
__device__ __forceinline__ void add_release(uint32_t* word, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
}

// Orders nothing by itself, so that many can be on their way at once; `fence_acquire` follows the last.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(__cvta_generic_to_global(word)) : "memory");
  return value;
}

// What was released before the values that relaxed loads have read is visible from here on.
__device__ __forceinline__ void fence_acquire() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(__cvta_generic_to_global(word)) : "memory");
  return value;
}

}  // namespace lora::ptx
