// dx = dy W + dh A, da = dhᵀ x, db = dyᵀ h, dbias = Σ dy, with dh = scale · dy B, in one launch; dx is the sum over up
// to LORA_MAX_PROJECTIONS dy, w and b.
//
// dy [M][N], w [N][K], a [R][K], b [N][R], x and dx [M][K], h and dh [M][R], da [R][K], db [N][R], row-major with any
// row stride. With a gain, dy is dz = gain ∘ dy for dh, dx and db. Units of work: dh tiles, dx tiles (over the N of all
// projections, then the ranks of all in dh), db and da tiles, after those that split f32 factors, where there are any.
// The last two reduce over tokens in chunks: each chunk leaves its f32 partial sums, and the CTA that finishes a tile's
// last chunk adds them in order of chunk, so the bits do not depend on which CTA was last.
#include "epilogue.cuh"
#include "middle.cuh"
#include "schedule.cuh"
#include "tile.cuh"

namespace lora {

template <typename T, class Shape>
__device__ __forceinline__ void backward_dh(const LoraBackwardParams& p, TicketSchedule& schedule, uint32_t unit,
                                            uint32_t smem) {
  const uint32_t m_block = unit % p.m_blocks;
  const uint32_t m = m_block * Shape::kBlock;
  const uint32_t narrow = unit / p.m_blocks;
  const uint32_t at = projection_of(p, narrow, [](const LoraBackwardProjection& of) { return of.first_narrow; });
  const LoraBackwardProjection& projection = p.projections[at];
  const uint32_t n = (narrow - projection.first_narrow) * kNarrowN;
  const uint32_t r = projection.r;
  NarrowTile<T, Shape, Major::kMn, Drops::kNone, true> tile;
  const OnTheWay way = {{}, reinterpret_cast<const float*>(projection.gain)};
  const Segment product = segment(operand(projection.dy, p.m, projection.n), operand(projection.b, r, projection.n), 0);
  narrow_tile(
      tile, product, p, p.dh, projection.first_rank, m, n, r, [&](uint32_t) { return projection.scale; },
      GroupsOfOne{{projection.first_rank / 2 + p.split.ranks[at], projection.scale}}, way, smem);
  schedule.publish(m_block >> p.flag_shift);
}

// What dx reduces over before the ranks: dy W of one projection after the other.
struct SumOverProjections {
  const LoraBackwardParams& p;
  uint32_t steps;

  // The projection of a step.
  __device__ __forceinline__ const LoraBackwardProjection& at(uint32_t step) const {
    return p.projections[projection_of(p, step, [](const LoraBackwardProjection& of) { return of.first_step; })];
  }
};

__device__ __forceinline__ Source source_of(const SumOverProjections& main, uint32_t step, const InOrder& start) {
  const LoraBackwardProjection& of = main.at(step);
  return {operand(of.dy, main.p.m, of.n), operand(of.w, main.p.k, of.n), start(step - of.first_step)};
}
__device__ __forceinline__ bool has_gain(const SumOverProjections& main, const float*) {
  return (main.p.flags & LORA_GAINED) != 0;
}
__device__ __forceinline__ Gained gained(const SumOverProjections& main, const float*, uint32_t step) {
  const LoraBackwardProjection& of = main.at(step);
  return {reinterpret_cast<const float*>(of.gain), (step - of.first_step) * kBlockK, of.n};
}

template <typename T, class Shape>
__device__ __forceinline__ void backward_dx(const LoraBackwardParams& p, uint32_t unit, uint32_t smem) {
  const BlockIndex block = grouped(unit, p.m_blocks, p.k_blocks, p.group_m);
  const uint32_t m = block.row * Shape::kBlock;
  const uint32_t n = block.col * Shape::kBlock;
  const RanksRead<Shape, LoraBackwardParams> ranks = {p, m, p.r};
  const Segment tail = segment(operand(p.dh, p.m, p.r), operand(p.a, p.k, p.r), 0, ranks.picks());
  const uint32_t step = p.r == 0 ? kNever : p.dropout.threshold != 0 ? 0 : p.n_steps;
  const MiddleAwaited<LoraBackwardParams> dh = {p, p.dh_units, block.row, step};
  MainTile<T, Shape, Major::kMn, Drops::kTail, true> tile;
  tile.accumulate(SumOverProjections{p, p.n_steps}, tail, m, n, Shape::kBlock, dh, {p.dropout}, smem, InOrder{}, ranks);
  store_tile(tile, p.dx, m, n, p.m, p.k, NoScale{}, static_cast<const T*>(nullptr),
             (p.flags & LORA_ACCUMULATE_DX) != 0);
}

// Leaves this chunk's sums in `partials` and returns true, with the sum over all chunks in `tile`, in the CTA that
// completes the tile. Registers go out in their own order: every access is coalesced and the reader has the same
// layout.
template <class Tile>
__device__ __forceinline__ bool reduce_chunks(const LoraBackwardParams& p, TicketSchedule& schedule, Tile& tile,
                                              uint32_t tile_index, uint32_t chunk, uint32_t active_n) {
  if (p.chunks == 1) return true;
  float* const first = reinterpret_cast<float*>(p.partials) +
                       static_cast<uint64_t>(tile_index) * p.chunks * p.partial_stride + threadIdx.x;
  const auto for_each_register = [&](auto visit) {
    visit(0, tile.sums[0][0]);
    visit(1, tile.sums[0][2]);
    if (tile.wants_products) {
      visit(2, tile.products[0]);
      visit(3, tile.products[1]);
    }
#pragma unroll
    for (int j = 0; j < Tile::kFragsN; ++j) {
      if (j * 8 >= active_n) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(4 + j * 4 + e, tile.acc[0][j][e]);
    }
  };
  float* const mine = first + static_cast<uint64_t>(chunk) * p.partial_stride;
  for_each_register([&](int index, float& value) { mine[index * Tile::kThreads] = value; });
  __syncthreads();
  if (!schedule.arrive_last(p.counters + tile_index, p.chunks)) return false;
  for_each_register([&](int index, float& value) { value = first[index * Tile::kThreads]; });
#pragma unroll 1
  for (uint32_t other = 1; other < p.chunks; ++other) {
    const float* const partial = first + static_cast<uint64_t>(other) * p.partial_stride;
    for_each_register([&](int index, float& value) { value += partial[index * Tile::kThreads]; });
  }
  return true;
}

// Stores what a tile of db has of dm: Σ dy ∘ (y − bias), over the magnitude.
template <class Tile>
__device__ __forceinline__ void store_magnitude(const Tile& tile, const LoraBackwardProjection& of, uint32_t n,
                                                bool accumulate) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Four lanes have the same row.
    float sum = tile.products[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const uint32_t row = n + Tile::row_of(tile.thread, 0, half);
    if (tile.thread % 4 != 0 || row >= of.n) continue;
    const float magnitude = reinterpret_cast<const float*>(of.magnitude.magnitude)[row];
    store(reinterpret_cast<float*>(of.magnitude.dm) + row, sum / magnitude, accumulate);
  }
}

// One chunk of one tile of wideᵀ · narrow: db = dyᵀ h (with dbias and dm) of projection `of`, or daᵀ = xᵀ dh. Of the
// tiles of both, `first_tile` is the first of this product.
template <typename T, class Shape>
__device__ __forceinline__ void backward_adapter(const LoraBackwardParams& p, const LoraBackwardProjection& of,
                                                 TicketSchedule& schedule, LoraMatrix wide, LoraMatrix narrow,
                                                 uint32_t tile_index, uint32_t chunk, uint32_t first_tile,
                                                 uint32_t wide_blocks, uint32_t narrow_cols, const GradientOut& out,
                                                 const GradientOut& sums_out, bool is_da, uint32_t smem) {
  using Gradient = GradientTile<T, Shape>;
  const uint32_t m = (tile_index - first_tile) % wide_blocks * Shape::kBlock;
  const uint32_t n = (tile_index - first_tile) / wide_blocks * kNarrowN;
  const uint32_t token = chunk * p.chunk_rows;
  const uint32_t token_end = min(token + p.chunk_rows, p.m);
  const uint32_t active_n = out.ptr != 0 ? narrow_cols - n : 0;
  if (is_da) {
    wait_for(depends_on(p.sync, p.flag_shift, p.m_blocks, p.dh_units / p.m_blocks, token / Shape::kBlock,
                        (token_end - token + Shape::kBlock - 1) / Shape::kBlock));
  }
  Gradient tile;
  tile.wants_sums = sums_out.ptr != 0 && n == 0;
  tile.wants_products = of.magnitude.dm != 0 && !is_da && n == 0;
  // With no gradient wanted (dbias alone) there is no narrow operand: an extent of zero reads nothing.
  // Rows that go through other adapters add nothing, but to dbias.
  const Routes routes(p.routes, p.m);
  const uint32_t count = token_end - token;
  const uint32_t per_rank = p.split.r != 0 ? 2 : 1;  // columns
  const Picks picks = routes.is_on() && !tile.wants_sums
                          ? routes.rows_of(token, count, n / per_rank, kNarrowN / per_rank)
                          : everything(count);
  const Segment tokens =
      segment(operand(wide, out.rows, token_end), operand(narrow, narrow_cols, token_end), token, picks);
  OnTheWay way = {p.dropout, nullptr, of.magnitude};
  if (!is_da) way.dropout.threshold = 0;
  tile.accumulate(tokens, Segment{}, m, n, active_n, {}, way, smem,
                  [&](uint32_t step) { return picks.start(step, kBlockK); });
  // The barrier of a step stands between the ticket of this unit and the next.
  if (tokens.steps == 0) __syncthreads();
  if (!reduce_chunks(p, schedule, tile, tile_index, chunk, active_n)) return;
  if (tile.wants_products) store_magnitude(tile, of, m, (p.flags & LORA_ACCUMULATE_DM) != 0);
  const uint32_t thread = ptx::thread_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = m + Gradient::row_of(thread, 0, half);
    // A row of db is that of a column of dy.
    const float gain = of.gain != 0 && !is_da && row < of.n ? reinterpret_cast<const float*>(of.gain)[row] : 1.0f;
    // Every column of the sums is the same; one lane of four writes, in the first block of ranks.
    if (sums_out.ptr != 0 && n == 0 && thread % 4 == 0) store_gradient<T>(sums_out, row, 0, tile.sums[0][2 * half]);
    if (out.ptr == 0) continue;
#pragma unroll
    for (int j = 0; j < Gradient::kFragsN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        uint32_t col = n + Gradient::col_of(thread, j) + e;
        float value = tile.acc[0][j][2 * half + e];
        if (p.split.r != 0) {  // fragments of high and low halves take turns
          if (j % 2 != 0) continue;
          col = is_da ? row_of_a(p, col) : rank_of(col);
          value = whole<T>(value, tile.acc[0][j + 1 - j % 2][2 * half + e]);
        }
        store_gradient<T>(out, row, col, value * gain);
      }
    }
  }
}

// A unit of db or da: one copy of the loop for both, as only the matrices differ.
template <typename T, class Shape>
__device__ __forceinline__ void backward_gradient(const LoraBackwardParams& p, TicketSchedule& schedule, uint32_t unit,
                                                  uint32_t smem) {
  const bool is_db = unit < p.db_end;
  const uint32_t tile = (unit - p.dx_end) / p.chunks;
  const uint32_t chunk = (unit - p.dx_end) % p.chunks;
  const uint32_t at =
      is_db ? projection_of(p, tile, [](const LoraBackwardProjection& of) { return of.first_db_tile; }) : 0;
  const LoraBackwardProjection& of = p.projections[at];
  // Of factors that are split, the narrow operand has a pair of columns for each rank.
  const bool is_split = p.split.r != 0;
  const uint32_t narrow_cols = is_db ? (of.db.ptr != 0 ? of.r : 0) : is_split ? p.r / 3 * 2 : p.r;
  const uint32_t ranks = !is_split ? narrow_cols : is_db ? p.split.ranks[at] : p.split.r;
  const GradientOut db = {
      of.db.ptr, of.db.row_stride, 1, of.n, ranks, (of.flags & LORA_DB_F32) != 0, (p.flags & LORA_ACCUMULATE_DB) != 0};
  const GradientOut da = {
      p.da.ptr, 1, p.da.row_stride, p.k, ranks, (p.flags & LORA_DA_F32) != 0, (p.flags & LORA_ACCUMULATE_DA) != 0};
  const GradientOut dbias = {
      is_db ? of.dbias : 0, 1, 0, of.n, 1, (of.flags & LORA_DBIAS_F32) != 0, (p.flags & LORA_ACCUMULATE_DBIAS) != 0};
  const LoraMatrix own_h = columns_from(p.h, of.first_rank);
  const LoraMatrix wide = {is_db ? of.dy.ptr : p.x.ptr, is_db ? of.dy.row_stride : p.x.row_stride};
  const LoraMatrix own_dh = {is_split ? p.split.pairs.ptr : p.dh.ptr,
                             is_split ? p.split.pairs.row_stride : p.dh.row_stride};
  const LoraMatrix narrow = {is_db ? own_h.ptr : own_dh.ptr, is_db ? own_h.row_stride : own_dh.row_stride};
  const GradientOut out = {is_db ? db.ptr : da.ptr,
                           is_db ? db.stride_m : da.stride_m,
                           is_db ? db.stride_n : da.stride_n,
                           is_db ? db.rows : da.rows,
                           is_db ? db.cols : da.cols,
                           is_db ? db.f32 : da.f32,
                           is_db ? db.accumulate : da.accumulate};
  backward_adapter<T, Shape>(p, of, schedule, wide, narrow, tile, chunk,
                             is_db ? of.first_db_tile : (p.db_end - p.dx_end) / p.chunks,
                             is_db ? of.n_blocks : p.k_blocks, narrow_cols, out, dbias, !is_db, smem);
}

template <typename T, class Shape>
__device__ __forceinline__ void backward(const LoraBackwardParams& p) {
  extern __shared__ __align__(128) uint8_t stages[];
  const uint32_t smem = ptx::shared_address(stages);
  TicketSchedule schedule(p.sync);
#pragma unroll 1
  for (uint32_t ticket = schedule.first(); ticket < p.split.units + p.units; ticket = schedule.next()) {
    schedule.draw();
    const uint32_t unit = ticket - p.split.units;
    if (ticket < p.split.units) {
      split_factors<T, false>(p, ticket, ptx::thread_index(), Shape::kThreads);
      schedule.publish_split();
    } else if (unit < p.dh_units) {
      backward_dh<T, Shape>(p, schedule, unit, smem);
    } else if (unit < p.dx_end) {
      backward_dx<T, Shape>(p, unit - p.dh_units, smem);
    } else {
      backward_gradient<T, Shape>(p, schedule, unit, smem);
    }
  }
  schedule.finish(p.sync_words);
}

}  // namespace lora

#define LORA_BACKWARD(name, T, Shape)                                                          \
  extern "C" __global__ void __launch_bounds__(lora::Shape::kThreads, lora::Shape::kCtasPerSm) \
      name(const __grid_constant__ LoraBackwardParams params) {                                \
    lora::backward<T, lora::Shape>(params);                                                    \
  }

LORA_BACKWARD(lora_backward_f16_large, __half, LargeTile)
LORA_BACKWARD(lora_backward_f16_small, __half, SmallTile)
LORA_BACKWARD(lora_backward_bf16_large, __nv_bfloat16, LargeTile)
LORA_BACKWARD(lora_backward_bf16_small, __nv_bfloat16, SmallTile)
