// Global to shared memory in 16-byte chunks.
#pragma once

#include <stdint.h>

namespace lora::ptx {

// Shared-space address of a pointer into shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared_16(uint32_t smem, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(smem), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t smem) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(smem)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_4(uint32_t smem, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(smem), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_shared_4(uint32_t smem) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(value) : "r"(smem) : "memory");
  return value;
}

#if __CUDA_ARCH__ >= 800
// Copies `bytes` (0..16) from 16-byte aligned global memory and fills the rest of the chunk with zeros. `.cg` skips L1:
// each byte is read once per CTA, reuse is in L2.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* gmem, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem), "l"(__cvta_generic_to_global(gmem)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}
#else
// sm_75 has no cp.async: the loader copies through registers and a group is complete when it is issued.
__device__ __forceinline__ void cp_async_commit() {}
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {}
#endif

}  // namespace lora::ptx
