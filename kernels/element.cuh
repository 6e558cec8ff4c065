// Elements between memory and f32: one rounding, optionally adding to what is there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

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

// Two neighbours in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <typename T>
__device__ __forceinline__ void store(T* gmem, float value, bool accumulate) {
  *gmem = round_to<T>(accumulate ? widen(*gmem) + value : value);
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
