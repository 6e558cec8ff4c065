// ldmatrix and mma. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16", lane = 4 g + t:
//   A  a0 (g, 2t..)  a1 (g+8, 2t..)  a2 (g, 2t+8..)  a3 (g+8, 2t+8..)      two k per register
//   B  b0 (2t.., g)  b1 (2t+8.., g)
//   D  d0 d1 (g, 2t..)  d2 d3 (g+8, 2t..)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lora::ptx {

// Four 8x8 matrices; lane 8 j + i supplies the address of row i of matrix j.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(smem)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(smem)
               : "memory");
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
// sm_75: the fp16 tensor instruction is half as deep.
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half == 0 ? b0 : b1));
  }
}

// sm_75 has no bf16 tensor instruction. fp16 would lose range, so the product is done in f32: each lane fetches the
// rows and columns it needs from its neighbours' fragments.
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  const uint32_t lane = threadIdx.x % 32;
  const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
  const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
#pragma unroll 1  // unrolled, a tile would be tens of thousands of instructions
  for (uint32_t t = 0; t < 4; ++t) {                // k = 2t, 2t + 1 and 2t + 8, 2t + 9
    const uint32_t row_lane = (lane & ~3u) | t;     // holds rows g and g + 8
    const uint32_t col_lane = (lane & 3u) * 8 + t;  // holds column 2 (lane % 4); the next one is 4 lanes on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t b = half == 0 ? b0 : b1;
      const uint32_t top = __shfl_sync(0xffffffffu, a[2 * half], row_lane);
      const uint32_t bottom = __shfl_sync(0xffffffffu, a[2 * half + 1], row_lane);
      const uint32_t left = __shfl_sync(0xffffffffu, b, col_lane);
      const uint32_t right = __shfl_sync(0xffffffffu, b, col_lane + 4);
      d[0] = fmaf(high(top), high(left), fmaf(low(top), low(left), d[0]));
      d[1] = fmaf(high(top), high(right), fmaf(low(top), low(right), d[1]));
      d[2] = fmaf(high(bottom), high(left), fmaf(low(bottom), low(left), d[2]));
      d[3] = fmaf(high(bottom), high(right), fmaf(low(bottom), low(right), d[3]));
    }
  }
}
#endif

}  // namespace lora::ptx
