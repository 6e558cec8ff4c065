// Products of one x, each with a weight, an adapter and an output of its own: which of them a unit of work is of.
#pragma once

#include <stdint.h>

#include "params.h"

namespace lora {

// The projection that has item `index` of those that are numbered over all: the last whose first item is not after it.
// `first(projection)` is 0 for the first projection; one without items begins where the next one does.
template <class Params, class First>
__device__ __forceinline__ uint32_t projection_of(const Params& p, uint32_t index, const First& first) {
  uint32_t at = p.projection_count - 1;
#pragma unroll 1
  while (at != 0 && index < first(p.projections[at])) --at;
  return at;
}

// What the columns of h, which are the ranks of all projections, are multiplied by.
template <class Params>
struct RankScale {
  const Params& p;

  __device__ __forceinline__ float operator()(uint32_t rank) const {
    float scale = p.projections[0].scale;
#pragma unroll 1
    for (uint32_t at = 1; at < p.projection_count && rank >= p.projections[at].first_rank; ++at) {
      scale = p.projections[at].scale;
    }
    return scale;
  }
};

// `first` columns on in a row-major matrix of 16-bit elements.
__device__ __forceinline__ LoraMatrix columns_from(const LoraMatrix& matrix, uint32_t first) {
  return {matrix.ptr + first * 2ull, matrix.row_stride};
}

}  // namespace lora
