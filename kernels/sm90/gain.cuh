// DoRA, where the Hopper family meets it: columns of y times the gain, dy times the gain as it lies in a stage of the
// ring, and the sums of the gradient of the magnitude.
#pragma once

#include "../element.cuh"
#include "ring.cuh"

namespace lora::sm90 {

// A thread's part of a slab of 64 rows of 128 bytes, swizzled: 8 columns, of every 16th row. Eight neighbours have a
// row, and so reach all banks.
struct SlabPart {
  static constexpr uint32_t kRows = 16;  // from one of its rows to the next
  static constexpr uint32_t kParts = kSlabM / kRows;
  uint32_t row = threadIdx.x % kWarpgroup / 8;  // the first
  uint32_t col = threadIdx.x % 8 * 8;

  // Where its columns of row `row + kRows * i` are.
  __device__ __forceinline__ uint32_t at(uint32_t smem, uint32_t i) const {
    return smem + row * kRowBytes + ((col / 8) ^ row % 8) * 16 + i * kRows * kRowBytes;
  }
};

// Multiplies 64 columns of a slab of dy, from `col` on, by the gain; a product is rounded to T. The gain has `cols`
// elements, a multiple of 8 as everything that has tensor maps, and begins at a multiple of 16 bytes; past it the slab
// holds zeros.
template <typename T>
__device__ __forceinline__ void gain_slab(const float* gain, uint32_t smem, uint32_t col, uint32_t cols) {
  const SlabPart part;
  col += part.col;
  if (col >= cols) return;
  const float4 first = *reinterpret_cast<const float4*>(gain + col);
  const float4 second = *reinterpret_cast<const float4*>(gain + col + 4);
  uint4 dy[SlabPart::kParts];
#pragma unroll
  for (uint32_t i = 0; i < SlabPart::kParts; ++i) dy[i] = ptx::load_shared_16(part.at(smem, i));
#pragma unroll
  for (uint32_t i = 0; i < SlabPart::kParts; ++i) {
    const auto gained = [](uint32_t pair, float low, float high) {
      const float2 values = unpack<T>(pair);
      return pack<T>(values.x * low, values.y * high);
    };
    ptx::store_shared_16(part.at(smem, i),
                         make_uint4(gained(dy[i].x, first.x, first.y), gained(dy[i].y, first.z, first.w),
                                    gained(dy[i].z, second.x, second.y), gained(dy[i].w, second.z, second.w)));
  }
}

// Sums of dy (y - bias) over tokens, of the 64 columns of a slab. A thread has 8 columns and every 16th token.
template <typename T>
class MagnitudeSums {
 public:
  // Of columns from `col` on, of `cols`.
  __device__ __forceinline__ MagnitudeSums(const LoraMagnitude& from, uint32_t col, uint32_t cols) {
    const T* const bias = reinterpret_cast<const T*>(from.bias);
    col += SlabPart().col;
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      sums_[i] = 0.0f;
      bias_[i] = bias != nullptr && col < cols ? widen(bias[col + i]) : 0.0f;
    }
  }

  // Adds a block of 64 tokens that lie in two slabs, of which `tokens` are there.
  __device__ __forceinline__ void add(uint32_t smem_dy, uint32_t smem_y, uint32_t tokens) {
    const SlabPart part;
#pragma unroll
    for (uint32_t i = 0; i < SlabPart::kParts; ++i) {
      if (part.row + i * SlabPart::kRows >= tokens) continue;  // 0 times a bias that is not finite is no 0
      const uint4 dy = ptx::load_shared_16(part.at(smem_dy, i));
      const uint4 y = ptx::load_shared_16(part.at(smem_y, i));
      add_pair(0, dy.x, y.x);
      add_pair(2, dy.y, y.y);
      add_pair(4, dy.z, y.z);
      add_pair(6, dy.w, y.w);
    }
  }

  // Leaves the sums of each warp in its row of 64.
  __device__ __forceinline__ void store(float* partial) {
#pragma unroll
    for (float& sum : sums_) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    }
    if (threadIdx.x % 32 >= 8) return;
    float4* const mine = reinterpret_cast<float4*>(partial + threadIdx.x % kWarpgroup / 32 * kSlabM + SlabPart().col);
    mine[0] = make_float4(sums_[0], sums_[1], sums_[2], sums_[3]);
    mine[1] = make_float4(sums_[4], sums_[5], sums_[6], sums_[7]);
  }

  // What the four warps of each of `chunks` chunks left of one column, added in order.
  static __device__ __forceinline__ float sum(const float* partial, uint32_t stride, uint32_t chunks, uint32_t column) {
    float sum = 0.0f;
#pragma unroll 2
    for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
      const float* const warps = partial + static_cast<uint64_t>(chunk) * stride + column;
#pragma unroll
      for (uint32_t warp = 0; warp < kWarpgroup / 32; ++warp) sum += warps[warp * kSlabM];
    }
    return sum;
  }

 private:
  __device__ __forceinline__ void add_pair(uint32_t first, uint32_t pair_dy, uint32_t pair_y) {
    const float2 dy = unpack<T>(pair_dy);
    const float2 y = unpack<T>(pair_y);
    sums_[first] = fmaf(dy.x, y.x - bias_[first], sums_[first]);
    sums_[first + 1] = fmaf(dy.y, y.y - bias_[first + 1], sums_[first + 1]);
  }

  float bias_[8];
  float sums_[8];
};

}  // namespace lora::sm90
