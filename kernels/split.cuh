// f32 factors over a 16-bit layer: numbers as two halves of the storage type (params.h says how they lie).
#pragma once

#include "element.cuh"
#include "params.h"
#include "routes.cuh"

namespace lora {

// What low halves are multiplied by, to keep those of f16 out of the subnormals.
template <typename T>
constexpr float kLowScale = 1.0f;
template <>
constexpr float kLowScale<__half> = 2048.0f;

// What the high half leaves of a number; nothing of one that it is infinite for.
__device__ __forceinline__ float rest_of(float value, float high) { return isinf(high) ? 0.0f : value - high; }

// The number whose halves, or products with whose halves, these are. What is not finite is known from the high one.
template <typename T>
__device__ __forceinline__ float whole(float high, float low) {
  return isfinite(high) ? fmaf(low, 1.0f / kLowScale<T>, high) : high;
}

// Two neighbours of h or dh, each in one register: [high | low, scaled] of pairs, [high | damped | low] of triples. The
// product of an infinity is in the first place of a triple, and must be no NaN in the others.
template <typename T>
struct HalvesOfTwo {
  uint32_t high;
  uint32_t low_scaled;
  uint32_t high_damped;
  uint32_t low;

  __device__ __forceinline__ HalvesOfTwo(float first, float second) {
    high = pack<T>(first, second);
    const float2 highs = unpack<T>(high);
    const float2 rests = make_float2(rest_of(first, highs.x), rest_of(second, highs.y));
    low_scaled = pack<T>(rests.x * kLowScale<T>, rests.y * kLowScale<T>);
    low = pack<T>(rests.x, rests.y);
    constexpr float kDamp = 1.0f / kLowScale<T>;
    high_damped = pack<T>(isinf(highs.x) ? 0.0f : highs.x * kDamp, isinf(highs.y) ? 0.0f : highs.y * kDamp);
  }
};

// Of a group of ranks: one past the last that its projection has, and the scale of that. Groups are numbered over all
// projections, and so are ranks, as if every group were full.
struct GroupOf {
  uint32_t end;
  float scale;
};

// The groups of h in forward, where first_rank of a projection counts triples. Its pairs are the caller's.
template <class Params>
struct GroupsOfAll {
  static constexpr bool kAnywhere = true;
  const Params& p;

  __device__ __forceinline__ GroupOf operator()(uint32_t group) const {
    constexpr uint32_t kColumns = 3 * LORA_SPLIT_RANKS;
    uint32_t at = 0;
#pragma unroll 1
    while (at + 1 < p.projection_count && group * kColumns >= p.projections[at + 1].first_rank) ++at;
    return {p.projections[at].first_rank / 3 + p.split.ranks[at], p.projections[at].scale};
  }
};

// The groups of dh in backward, of one projection. Its pairs are in the workspace, rows at multiples of 16 bytes.
struct GroupsOfOne {
  static constexpr bool kAnywhere = false;
  GroupOf of;

  __device__ __forceinline__ GroupOf operator()(uint32_t) const { return of; }
};

// Stores two neighbours of h or dh in row `row`: halves of what `keep(value, rank, scale)` makes of the products with
// high halves, in column `col` of the pairs of all and the next, and with low ones of the same ranks; as pairs and as
// triples, each where there is a place for it.
template <typename T, class Groups, class Keep>
__device__ __forceinline__ void store_halves(const LoraMatrix& pairs, const LoraMatrix& triples, uint32_t row,
                                             uint32_t col, const Groups& groups, float2 high, float2 low,
                                             const Keep& keep) {
  constexpr uint32_t kRanks = LORA_SPLIT_RANKS;
  const uint32_t group = col / (2 * kRanks);
  const uint32_t within = col % kRanks;
  const uint32_t rank = group * kRanks + within;
  const GroupOf of = groups(group);
  if (group * kRanks >= of.end) return;
  // Ranks that fill up the last group are zeros, whatever is in x.
  const HalvesOfTwo<T> halves(rank < of.end ? keep(whole<T>(high.x, low.x), rank, of.scale) : 0.0f,
                              rank + 1 < of.end ? keep(whole<T>(high.y, low.y), rank + 1, of.scale) : 0.0f);
  if (pairs.ptr != 0) {
    const bool at_once = !Groups::kAnywhere || ((pairs.ptr | static_cast<uint64_t>(pairs.row_stride) * 2) & 3) == 0;
    const auto store_two = [&](uint16_t* gmem, uint32_t two) {
      if (at_once) {
        *reinterpret_cast<uint32_t*>(gmem) = two;
      } else {
        gmem[0] = static_cast<uint16_t>(two);
        gmem[1] = static_cast<uint16_t>(two >> 16);
      }
    };
    uint16_t* const gmem =
        reinterpret_cast<uint16_t*>(pairs.ptr) + row * pairs.row_stride + group * 2 * kRanks + within;
    store_two(gmem, halves.high);
    store_two(gmem + kRanks, halves.low_scaled);
  }
  if (triples.ptr != 0) {
    uint32_t* const gmem = reinterpret_cast<uint32_t*>(reinterpret_cast<uint16_t*>(triples.ptr) +
                                                       row * triples.row_stride + group * 3 * kRanks + within);
    gmem[0] = halves.high;
    gmem[kRanks / 2] = halves.high_damped;
    gmem[kRanks] = halves.low;
  }
}

// The rank of a column of pairs of one projection.
__device__ __forceinline__ uint32_t rank_of(uint32_t col) {
  return col / (2 * LORA_SPLIT_RANKS) * LORA_SPLIT_RANKS + col % LORA_SPLIT_RANKS;
}

// The row of a that has the rank of a column of the pairs of all in backward; one that no matrix has for what fills up
// a group.
template <class Params>
__device__ __forceinline__ uint32_t row_of_a(const Params& p, uint32_t col) {
  uint32_t at = 0;
  uint32_t before = 0;
#pragma unroll 1
  for (; at + 1 < p.projection_count && col >= p.projections[at + 1].first_rank; ++at) before += p.split.ranks[at];
  const uint32_t rank = rank_of(col - p.projections[at].first_rank);
  return rank < p.split.ranks[at] ? before + rank : 0xffffffffu;
}

// Blocks of a factor that is `length` long.
__device__ __forceinline__ uint32_t split_blocks(uint32_t length) {
  return (length + LORA_SPLIT_LENGTH - 1) / LORA_SPLIT_LENGTH;
}

// One unit: some ranks of a over some columns, or of one projection's b over some rows. In forward a becomes pairs and
// b triples. Ranks that no row goes through stay as they are: nobody reads them.
template <typename T, bool kForward, class Params>
__device__ __forceinline__ void split_factors(const Params& params, uint32_t unit, uint32_t thread, uint32_t threads) {
  constexpr uint32_t kRanks = LORA_SPLIT_RANKS;
  constexpr uint32_t kLength = LORA_SPLIT_LENGTH;
  const LoraSplit& p = params.split;
  const bool is_a = unit < p.a_units;
  const uint32_t k_blocks = split_blocks(params.k);
  // The projection, and which of its groups of a or of its units of b this is.
  uint32_t at = 0;
  uint32_t index = is_a ? unit / k_blocks : unit - p.a_units;
  uint32_t before = 0;  // rows: of a, or of the halves of b
#pragma unroll 1
  for (uint32_t own;; ++at) {
    own = (p.ranks[at] + kRanks - 1) / kRanks * (is_a ? 1 : split_blocks(params.projections[at].n));
    if (index < own) break;
    index -= own;
    before += is_a ? p.ranks[at] : params.projections[at].n;
  }
  const uint32_t length = is_a ? params.k : params.projections[at].n;
  const uint32_t blocks = split_blocks(length);
  const uint32_t first_rank = (is_a ? index : index / blocks) * kRanks;
  const uint32_t first = (is_a ? unit : index) % blocks * kLength;
  const Routes routes(params.routes, params.m);
  if (routes.is_on() && !routes.any_row_of(first_rank)) return;
  const bool is_tripled = is_a != kForward;
  // Elements from one rank to the next, and from one column of a or row of b to the next.
  const int64_t from_rank = is_a ? p.a.row_stride : 1, from_next = is_a ? 1 : p.b[at].row_stride;
  const int64_t to_rank = is_a ? p.split_a_stride : 1, to_next = is_a ? 1 : p.split_b_stride;
  const float* const from =
      reinterpret_cast<const float*>(is_a ? p.a.ptr : p.b[at].ptr) + (is_a ? before : 0) * from_rank;
  // Of a the groups of all projections follow each other.
  const uint32_t to_first = (is_a ? unit / k_blocks * kRanks : first_rank) * (is_tripled ? 3 : 2);
  T* const to = reinterpret_cast<T*>(is_a ? p.split_a : p.split_b) + to_first * to_rank + (is_a ? 0 : before) * to_next;
#pragma unroll 4
  for (uint32_t i = thread; i < kRanks * kLength; i += threads) {
    // Neighbouring threads take neighbouring elements in memory.
    const uint32_t rank = is_a ? i / kLength : i % kRanks;
    const uint32_t next = first + (is_a ? i % kLength : i / kRanks);
    if (next >= length) continue;
    const uint32_t row = first_rank + rank;
    const float value = row < p.ranks[at] ? from[row * from_rank + next * from_next] : 0.0f;
    const T high = round_to<T>(value);
    T* const out = to + rank * to_rank + next * to_next;
    out[0] = high;
    out[kRanks * to_rank] = round_to<T>(rest_of(value, widen(high)) * kLowScale<T>);
    if (is_tripled) out[2 * kRanks * to_rank] = isinf(widen(high)) ? round_to<T>(0.0f) : high;
  }
}

}  // namespace lora
