// The narrow middle, h or dh: how its tiles are computed, and which of its ranks a main tile reads.
#pragma once

#include "../projections.cuh"
#include "epilogue.cuh"
#include "schedule.cuh"
#include "tile.cuh"

namespace lora {

// A tile of h or dh at (m, n) of `r` columns, which in `out` are those from `first` on: zeros where the rows do not go
// through a rank, which nobody computes where none of the tile's rows does. With factors that are split the columns are
// products with pairs, two for each rank, and `out` has triples.
template <class Tile, class Params, class Scale, class Groups>
__device__ __forceinline__ void narrow_tile(Tile& tile, const Segment& product, const Params& p, const LoraMatrix& out,
                                            uint32_t first, uint32_t m, uint32_t n, uint32_t r, const Scale& scale,
                                            const Groups& groups, const OnTheWay& way, uint32_t smem) {
  static_assert(kNarrowN == LORA_ROUTE_RANKS && Tile::kBlockM % LORA_ROUTE_ROWS == 0,
                "a tile is a block of routes, or with pairs half of one");
  const Routes routes(p.routes, p.m);
  const uint32_t block = p.split.r != 0 ? n / kNarrowN / 2 : n / kNarrowN;
  const bool is_wanted = !routes.is_on() || (routes.ranks_of(m, Tile::kBlockM, r, 1).mask >> block & 1) != 0;
  if (p.split.units != 0) wait_for(depends_on_split(p.sync, p.split.units));
  if (is_wanted) tile.accumulate(product, Segment{}, m, n, r - n, {}, way, smem);
  const typename Tile::T* const no_bias = nullptr;
  if (p.split.r != 0) {
    store_halves(tile, p.split.pairs, out, routes, m, first + n, p.m, groups);
  } else if (routes.is_on()) {
    keep_routed(tile, routes, m, n, p.m, p.projections[0].scale);
    store_tile(tile, out, m, n, p.m, r, NoScale{}, no_bias, false);
  } else {
    store_tile(tile, columns_from(out, first), m, n, p.m, r, scale, no_bias, false);
  }
}

// A step that no tile has.
constexpr uint32_t kNever = 0xffffffffu;

// What a main tile of block of rows `row` waits for before step `step`: its rows of the middle, which `units` tiles of
// it publish. Worked out when it is needed: kept through the loop, it would cost it registers.
template <class Params>
struct MiddleAwaited {
  const Params& p;
  uint32_t units;
  uint32_t row;
  uint32_t step;

  __device__ __forceinline__ bool must_wait(uint32_t at) const { return at == step; }
  __device__ __forceinline__ void wait() const {
    wait_for(depends_on(p.sync, p.flag_shift, p.m_blocks, units / p.m_blocks, row, 1));
  }
};

// The ranks that a main tile of rows from m on reads, in `r` columns. Found anew for each step of the tail: a mask kept
// through the loop would cost it registers.
template <class Shape, class Params>
struct RanksRead {
  const Params& p;
  uint32_t m;
  uint32_t r;

  __device__ __forceinline__ Picks picks() const {
    const Routes routes(p.routes, p.m);
    if (!routes.is_on()) return everything(r);
    const bool is_split = p.split.r != 0;
    return routes.ranks_of(m, Shape::kBlock, is_split ? p.split.r : r, is_split ? 3 : 1);
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t step) const {
    return p.routes != 0 ? picks().start(step, kBlockK) : step * kBlockK;
  }
};

}  // namespace lora
