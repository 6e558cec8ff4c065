// From accumulators to memory: one rounding, edges masked, optionally adding to what is there.
#pragma once

#include "../params.h"
#include "tile.cuh"

namespace lora {

template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}

__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float value) { return value; }

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const T pair[2] = {round_to<T>(low), round_to<T>(high)};
  return static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(pair[0])) |
         static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(pair[1])) << 16;
}

template <typename T>
__device__ __forceinline__ void store(T* gmem, float value, bool accumulate) {
  *gmem = round_to<T>(accumulate ? widen(*gmem) + value : value);
}

// Stores a tile of y, h, dh or dx at (m, n): out = scale · acc + bias (+ out).
template <class Tile, typename T = typename Tile::T>
__device__ __forceinline__ void store_tile(const Tile& tile, const LoraMatrix& out, uint32_t m, uint32_t n,
                                           uint32_t rows, uint32_t cols, float scale, const T* bias, bool accumulate) {
  T* const base = reinterpret_cast<T*>(out.ptr);
  const bool paired = ((out.ptr | static_cast<uint64_t>(out.row_stride) * 2) & 3) == 0 && !accumulate;
#pragma unroll
  for (int j = 0; j < Tile::kFragsN; ++j) {
    const uint32_t col = n + Tile::col_of(j);
    if (col >= cols) continue;
    const bool second = col + 1 < cols;
    const float bias0 = bias != nullptr ? widen(bias[col]) : 0.0f;
    const float bias1 = bias != nullptr && second ? widen(bias[col + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kFragsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = m + Tile::row_of(i, half);
        if (row >= rows) continue;
        const float value0 = tile.acc[i][j][2 * half] * scale + bias0;
        const float value1 = tile.acc[i][j][2 * half + 1] * scale + bias1;
        T* const gmem = base + row * out.row_stride + col;
        if (paired && second) {
          *reinterpret_cast<uint32_t*>(gmem) = pack<T>(value0, value1);
        } else {
          store(gmem, value0, accumulate);
          if (second) store(gmem + 1, value1, accumulate);
        }
      }
    }
  }
}

// A gradient of the adapter: element (i, j) of the tile's product at i · stride_m + j · stride_n, f32 or T.
struct GradientOut {
  uint64_t ptr;  // 0: not wanted
  int64_t stride_m;
  int64_t stride_n;
  uint32_t rows;
  uint32_t cols;
  bool f32;
  bool accumulate;
};

template <typename T>
__device__ __forceinline__ void store_gradient(const GradientOut& out, uint32_t row, uint32_t col, float value) {
  if (row >= out.rows || col >= out.cols) return;
  const int64_t offset = row * out.stride_m + col * out.stride_n;
  if (out.f32) {
    store(reinterpret_cast<float*>(out.ptr) + offset, value, out.accumulate);
  } else {
    store(reinterpret_cast<T*>(out.ptr) + offset, value, out.accumulate);
  }
}

}  // namespace lora
