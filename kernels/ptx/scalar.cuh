// Registers and arithmetic of one thread, where the compiler would do otherwise.
#pragma once

#include <stdint.h>

namespace lora::ptx {

// threadIdx.x, read here and now. What follows from it is then not moved to the start of a kernel, to be kept in
// registers through all of it or computed anew in every loop.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// All 64 bits of a product, in one instruction; of a 64-bit product of widened factors the compiler makes more.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;\n" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace lora::ptx
