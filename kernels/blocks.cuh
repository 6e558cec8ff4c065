// The order in which the blocks of an output are computed.
#pragma once

#include <stdint.h>

namespace lora {

// Block coordinates of main unit `index`: `group_m` blocks of rows go through all columns together, so that the CTAs at
// work at one time share both rows of x and rows of w in L2.
struct BlockIndex {
  uint32_t row;
  uint32_t col;
};

__device__ __forceinline__ BlockIndex grouped(uint32_t index, uint32_t rows, uint32_t cols, uint32_t group_m) {
  const uint32_t group = index / (group_m * cols);
  const uint32_t within = index % (group_m * cols);
  const uint32_t group_rows = min(rows - group * group_m, group_m);
  return {group * group_m + within % group_rows, within / group_rows};
}

}  // namespace lora
