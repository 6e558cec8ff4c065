// y = x Wᵀ + h Bᵀ (+ bias), h = scale · x Aᵀ, in one launch, for up to LORA_MAX_PROJECTIONS w, b and y of one x; with a
// gain y = gain ∘ (x Wᵀ + h Bᵀ) (+ bias).
//
// x [M][K], w [N][K], a [R][K], b [N][R], h [M][R], y [M][N], row-major with any row stride, fp16 or bf16, f32
// accumulation. Units of work: h tiles (block of rows x up to 64 ranks of all projections, full K), then y tiles, whose
// last steps read h; before both those that split f32 factors, where there are any. A y tile is of one projection;
// those of all go through grouped rows of x together.
#include "epilogue.cuh"
#include "middle.cuh"
#include "schedule.cuh"
#include "tile.cuh"

namespace lora {

template <typename T, class Shape>
__device__ __forceinline__ void forward_h(const LoraForwardParams& p, TicketSchedule& schedule, uint32_t unit,
                                          uint32_t smem) {
  const uint32_t m_block = unit % p.m_blocks;
  const uint32_t m = m_block * Shape::kBlock;
  const uint32_t n = unit / p.m_blocks * kNarrowN;
  NarrowTile<T, Shape, Major::kK, Drops::kA, false> tile;
  narrow_tile(tile, segment(operand(p.x, p.m, p.k), operand(p.a, p.r, p.k), 0), p, p.h, 0, m, n, p.r,
              RankScale<LoraForwardParams>{p}, GroupsOfAll<LoraForwardParams>{p}, {p.dropout}, smem);
  schedule.publish(m_block >> p.flag_shift);
}

template <typename T, class Shape>
__device__ __forceinline__ void forward_y(const LoraForwardParams& p, uint32_t unit, uint32_t smem) {
  const BlockIndex block = grouped(unit, p.m_blocks, p.n_blocks, p.group_m);
  const uint32_t m = block.row * Shape::kBlock;
  const uint32_t at = projection_of(p, block.col, [](const LoraForwardProjection& of) { return of.first_block; });
  const LoraForwardProjection& projection = p.projections[at];
  const uint32_t n = (block.col - projection.first_block) * Shape::kBlock;
  const uint32_t r = projection.r;
  const Segment main = segment(operand(p.x, p.m, p.k), operand(projection.w, projection.n, p.k), 0);
  const RanksRead<Shape, LoraForwardParams> ranks = {p, m, r};
  const LoraMatrix own_h = columns_from(p.h, projection.first_rank);
  const Segment tail = segment(operand(own_h, p.m, r), operand(projection.b, projection.n, r), 0, ranks.picks());
  const MiddleAwaited<LoraForwardParams> h = {p, p.h_units, block.row, r != 0 ? main.steps : kNever};
  MainTile<T, Shape, Major::kK, Drops::kNone, false> tile;
  tile.accumulate(main, tail, m, n, Shape::kBlock, h, {}, smem, InOrder{}, ranks);
  const ColumnGain gain = {reinterpret_cast<const float*>(projection.gain), projection.n};
  store_tile(tile, projection.y, m, n, p.m, projection.n, gain, reinterpret_cast<const T*>(projection.bias), false);
}

template <typename T, class Shape>
__device__ __forceinline__ void forward(const LoraForwardParams& p) {
  extern __shared__ __align__(128) uint8_t stages[];
  const uint32_t smem = ptx::shared_address(stages);
  TicketSchedule schedule(p.sync);
#pragma unroll 1
  for (uint32_t ticket = schedule.first(); ticket < p.split.units + p.units; ticket = schedule.next()) {
    schedule.draw();
    const uint32_t unit = ticket - p.split.units;
    if (ticket < p.split.units) {
      split_factors<T, true>(p, ticket, ptx::thread_index(), Shape::kThreads);
      schedule.publish_split();
    } else if (unit < p.h_units) {
      forward_h<T, Shape>(p, schedule, unit, smem);
    } else {
      forward_y<T, Shape>(p, unit - p.h_units, smem);
    }
  }
  schedule.finish(p.sync_words);
}

}  // namespace lora

#define LORA_FORWARD(name, T, Shape)                                                           \
  extern "C" __global__ void __launch_bounds__(lora::Shape::kThreads, lora::Shape::kCtasPerSm) \
      name(const __grid_constant__ LoraForwardParams params) {                                 \
    lora::forward<T, lora::Shape>(params);                                                     \
  }

LORA_FORWARD(lora_forward_f16_large, __half, LargeTile)
LORA_FORWARD(lora_forward_f16_small, __half, SmallTile)
LORA_FORWARD(lora_forward_bf16_large, __nv_bfloat16, LargeTile)
LORA_FORWARD(lora_forward_bf16_small, __nv_bfloat16, SmallTile)
