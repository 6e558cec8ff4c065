// From accumulators to memory: one rounding, edges masked, optionally adding to what is there.
#pragma once

#include "../element.cuh"
#include "../params.h"
#include "../split.cuh"
#include "tile.cuh"

namespace lora {

// Of a tile of h or dh at (m, n): what its rows keep, multiplied by `scale`.
template <class Tile>
__device__ __forceinline__ void keep_routed(Tile& tile, const Routes& routes, uint32_t m, uint32_t n, uint32_t rows,
                                            float scale) {
  const uint32_t thread = ptx::thread_index();
#pragma unroll
  for (int i = 0; i < Tile::kFragsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = m + Tile::row_of(thread, i, half);
      if (row >= rows) continue;
      const Routes::Row route = routes.row(row);
#pragma unroll
      for (int j = 0; j < Tile::kFragsN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = tile.acc[i][j][2 * half + e];
          value = route.keep(value * scale, n + Tile::col_of(thread, j) + e);
        }
      }
    }
  }
}

// Factors of the columns of a tile: 1, and a gain for each where there is one.
struct NoScale {
  __device__ __forceinline__ float operator()(uint32_t) const { return 1.0f; }
};
struct ColumnGain {
  const float* gain;
  uint32_t cols;

  __device__ __forceinline__ float operator()(uint32_t col) const {
    return gain != nullptr && col < cols ? gain[col] : 1.0f;
  }
};

// Stores a tile of y, h, dh or dx at (m, n): out = scale(column) · acc + bias (+ out).
template <class Tile, class Scale, typename T = typename Tile::T>
__device__ __forceinline__ void store_tile(const Tile& tile, const LoraMatrix& out, uint32_t m, uint32_t n,
                                           uint32_t rows, uint32_t cols, const Scale& scale, const T* bias,
                                           bool accumulate) {
  const uint32_t thread = ptx::thread_index();
  T* const base = reinterpret_cast<T*>(out.ptr);
  const bool paired = ((out.ptr | static_cast<uint64_t>(out.row_stride) * 2) & 3) == 0 && !accumulate;
#pragma unroll
  for (int j = 0; j < Tile::kFragsN; ++j) {
    const uint32_t col = n + Tile::col_of(thread, j);
    if (col >= cols) continue;
    const bool second = col + 1 < cols;
    const float scale0 = scale(col);
    const float scale1 = scale(col + 1);
    const float bias0 = bias != nullptr ? widen(bias[col]) : 0.0f;
    const float bias1 = bias != nullptr && second ? widen(bias[col + 1]) : 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kFragsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = m + Tile::row_of(thread, i, half);
        if (row >= rows) continue;
        float value0 = tile.acc[i][j][2 * half] * scale0;
        float value1 = tile.acc[i][j][2 * half + 1] * scale1;
        if (bias != nullptr) {  // adding a zero would make 0 of -0
          value0 += bias0;
          value1 += bias1;
        }
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

// Stores a tile of products with pairs at (m, n) of the pairs of all: halves of scale · acc, and of that what its rows
// keep, as pairs and as triples, each where there is a place for it. Fragments of high and low halves take turns.
template <class Tile, class Groups, typename T = typename Tile::T>
__device__ __forceinline__ void store_halves(const Tile& tile, const LoraMatrix& pairs, const LoraMatrix& triples,
                                             const Routes& routes, uint32_t m, uint32_t n, uint32_t rows,
                                             const Groups& groups) {
  const uint32_t thread = ptx::thread_index();
#pragma unroll
  for (int i = 0; i < Tile::kFragsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = m + Tile::row_of(thread, i, half);
      if (row >= rows) continue;
      const Routes::Row route = routes.is_on() ? routes.row(row) : Routes::Row(0);
#pragma unroll
      for (int j = 0; j < Tile::kFragsN; j += 2) {
        const float* const high = tile.acc[i][j] + 2 * half;
        const float* const low = tile.acc[i][j + 1] + 2 * half;
        store_halves<T>(pairs, triples, row, n + Tile::col_of(thread, j), groups, make_float2(high[0], high[1]),
                        make_float2(low[0], low[1]), [&](float value, uint32_t rank, float scale) {
                          return routes.is_on() ? route.keep(value * scale, rank) : value * scale;
                        });
      }
    }
  }
}

}  // namespace lora
