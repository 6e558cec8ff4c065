// wgmma: a warpgroup multiplies A (64 x 16) by B (16 x N) from shared memory into registers.
//
// Fragment of D, PTX ISA "Matrix fragments for wgmma.mma_async.m64nNk16": warp w of the four holds rows 16 w on, lane
// 4 g + t holds, for each 8 columns j, elements 4 j + {0, 1} at (g, 8 j + 2 t + {0, 1}) and 4 j + {2, 3} at row g + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lora::ptx {

// How 16-byte chunks are permuted within a row of an atom of 8 rows; values as in bits 62-63 of a matrix descriptor.
enum class Swizzle : uint64_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

// A matrix in shared memory, PTX ISA "Matrix descriptor". For swizzled layouts, `stride` is the distance between atoms
// of 8 rows (K-major) or 8 steps of k (MN-major), `leading` the one between atoms next to each other along MN
// (MN-major).
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t smem, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
  return static_cast<uint64_t>((smem & 0x3ffffu) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The descriptor of what lies `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Orders register accesses before the wgmmas that follow, those of accumulators and of A.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until at most `kPending` groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of accumulators before the wait above.
template <int kRegs>
__device__ __forceinline__ void pin(float (&d)[kRegs]) {
#pragma unroll
  for (int i = 0; i < kRegs; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D += A B, or D = A B when `kFirst`: known to ptxas, this spares it what the registers held. An operand is K-major, or
// MN-major when its flag is 1.
template <typename T, int kN, int kMnMajorA, int kMnMajorB>
struct Wgmma;

#define LORA_REGS_4 "%0, %1, %2, %3"
#define LORA_REGS_8 \
  LORA_REGS_4       \
  ", %4, %5, %6, %7"
#define LORA_REGS_16 \
  LORA_REGS_8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LORA_REGS_32 \
  LORA_REGS_16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LORA_REGS_64                                                                 \
  LORA_REGS_32                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LORA_REGS_96                                                                 \
  LORA_REGS_64                                                                       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LORA_REGS_128                                                                            \
  LORA_REGS_96                                                                                   \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define LORA_ACC_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LORA_ACC_8(d, i) LORA_ACC_4(d, i), LORA_ACC_4(d, i + 4)
#define LORA_ACC_16(d, i) LORA_ACC_8(d, i), LORA_ACC_8(d, i + 8)
#define LORA_ACC_32(d, i) LORA_ACC_16(d, i), LORA_ACC_16(d, i + 16)
#define LORA_ACC_64(d, i) LORA_ACC_32(d, i), LORA_ACC_32(d, i + 32)
#define LORA_ACC_96(d, i) LORA_ACC_64(d, i), LORA_ACC_32(d, i + 64)
#define LORA_ACC_128(d, i) LORA_ACC_64(d, i), LORA_ACC_64(d, i + 64)

// `a`, `b`, `scale`, `ta` and `tb` are the numbers of the operands after the `regs` accumulators.
#define LORA_WGMMA(type, name, n, regs, a, b, scale, ta, tb)                                                      \
  template <int kMnMajorA, int kMnMajorB>                                                                         \
  struct Wgmma<type, n, kMnMajorA, kMnMajorB> {                                                                   \
    template <bool kFirst>                                                                                        \
    static __device__ __forceinline__ void mma(float (&d)[regs], uint64_t desc_a, uint64_t desc_b) {              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #scale ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n       \
                   "k16.f32." name "." name " {" LORA_REGS_##regs "}, %" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb \
                                                                  ";\n}\n"                                        \
                   : LORA_ACC_##regs(d, 0)                                                                        \
                   : "l"(desc_a), "l"(desc_b), "n"(!kFirst), "n"(kMnMajorA), "n"(kMnMajorB)                       \
                   : "memory");                                                                                   \
    }                                                                                                             \
  };

#define LORA_WGMMAS(type, name)                        \
  LORA_WGMMA(type, name, 8, 4, 4, 5, 6, 7, 8)          \
  LORA_WGMMA(type, name, 16, 8, 8, 9, 10, 11, 12)      \
  LORA_WGMMA(type, name, 32, 16, 16, 17, 18, 19, 20)   \
  LORA_WGMMA(type, name, 64, 32, 32, 33, 34, 35, 36)   \
  LORA_WGMMA(type, name, 128, 64, 64, 65, 66, 67, 68)  \
  LORA_WGMMA(type, name, 192, 96, 96, 97, 98, 99, 100) \
  LORA_WGMMA(type, name, 256, 128, 128, 129, 130, 131, 132)

LORA_WGMMAS(__half, "f16")
LORA_WGMMAS(__nv_bfloat16, "bf16")

}  // namespace lora::ptx
