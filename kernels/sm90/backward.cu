// dx = dz W + dh A, da = dhᵀ x, db = dzᵀ h, dbias = Σ dy, with dh = scale · dz B and dz = gain ∘ dy, in one launch on
// Hopper, and dm = Σ dy (y - bias) / magnitude; dx is the sum over up to LORA_MAX_PROJECTIONS dy, w and b.
//
// dy [M][N], w [N][K], a [R][K], b [N][R], x and dx [M][K], h and dh [M][R], da [R][K], db [N][R], row-major. Tickets:
// bundles of dh units, dx units (over the N of all projections, then the ranks of all in dh), then db and da units.
// These reduce over tokens in chunks: db = dyᵀ h and daᵀ = xᵀ dh, with both operands read as they lie, [token][..].
#include "roles.cuh"

namespace lora::sm90 {

template <class Shape>
class Backward : Operation<LoraSm90Backward> {
 public:
  using T = typename Shape::T;

  __device__ __forceinline__ Backward(const LoraSm90Backward& launch, const Place& place) : Operation(launch, place) {}

  __device__ __forceinline__ void produce(Producer<Shape>& producer, uint32_t ticket) const {
    if (ticket < p_.dh_tickets) {
      wait_for_factors();
      for_each_narrow(ticket, p_.dh_tickets, p_.dh_units, [&](uint32_t m, uint32_t block) LORA_INLINE {
        const uint32_t at = projection_at(block);
        const uint32_t n = (block - p_.projections[at].first_narrow) * kNarrowN;
        producer.template narrow<Major::kMn>(own_map(at, LORA_SM90_BACKWARD_DY), own_map(at, LORA_SM90_BACKWARD_B), m,
                                             n, width(), wanted(m, n, at));
      });
    } else if (ticket < p_.dx_end) {
      const BlockIndex block = wide_block(ticket - p_.dh_tickets, p_.k_blocks);
      const uint32_t m = row_of(block.row);
      const uint32_t n = block.col * Shape::kBlockN;
#pragma unroll 1
      for (uint32_t at = 0; at < p_.projection_count; ++at) {
        const uint32_t extent = p_.projections[at].n;
        producer.template wide<Major::kMn>(own_map(at, LORA_SM90_BACKWARD_DY), own_map(at, LORA_SM90_BACKWARD_W), m, n,
                                           everything(extent), extent);
      }
      if (p_.r == 0) return;
      wait_for_block(flags(p_.dh_blocks), m / kBlockM);
      producer.template wide<Major::kMn>(map(LORA_SM90_BACKWARD_DH), map(LORA_SM90_BACKWARD_A), m, n,
                                         ranks_read(m, p_.r), p_.r);
    } else {
      const bool is_db = ticket < p_.db_end;
      const GradientUnit unit = gradient_unit(ticket, is_db);
      if (!is_db) wait_for_blocks(flags(p_.dh_blocks), unit.token / kBlockM, (unit.tokens + kBlockM - 1) / kBlockM);
      const LoraTensorMap& wide =
          is_db ? own_map(unit.at, LORA_SM90_BACKWARD_DY_TOKENS) : map(LORA_SM90_BACKWARD_X_TOKENS);
      const LoraTensorMap& narrow = map(is_db ? LORA_SM90_BACKWARD_H_TOKENS : LORA_SM90_BACKWARD_DH_TOKENS);
      const bool product = has_product(unit, is_db);
      const uint32_t columns = gradient_width(is_db);
      const Picks picks = reads_all(unit, is_db) ? everything(unit.tokens)
                                                 : routes().rows_of_alone(unit.token, unit.tokens, unit.n / per_rank(),
                                                                          columns / per_rank());
      const uint32_t first_rank = is_db ? p_.projections[unit.at].first_rank : 0;
      producer.gradient(wide, narrow, unit.m, first_rank + unit.n, product ? columns : kSumsN, product, unit.token,
                        picks, picks.steps(kBlockK, unit.tokens),
                        with_dm(unit, is_db) ? &own_map(unit.at, LORA_SM90_BACKWARD_Y_TOKENS) : nullptr);
    }
  }

  __device__ __forceinline__ void split(const Consumer<Shape>& consumer, uint32_t ticket) const {
    this->template split_unit<false>(consumer, ticket);
  }

  __device__ __forceinline__ void consume(Consumer<Shape>& consumer, uint32_t ticket) const {
    if (ticket < p_.dh_tickets) {
      for_each_narrow(ticket, p_.dh_tickets, p_.dh_units, [&](uint32_t m, uint32_t block) LORA_INLINE {
        for_narrow_width(width(), [&](auto width) LORA_INLINE { dh<decltype(width)::kN>(consumer, m, block); });
      });
    } else if (ticket < p_.dx_end) {
      dx(consumer, ticket);
    } else {
      const bool is_db = ticket < p_.db_end;
      const GradientUnit unit = gradient_unit(ticket, is_db);
      gradient(consumer, unit, is_db);
    }
  }

 private:
  // Registers of a gradient that are added up and stored together: enough loads in flight, few instructions.
  static constexpr uint32_t kAtOnce = 16;
  // Columns of a narrow tile that has no product, only sums: nothing is there, but both roles lay out stages by it.
  static constexpr int kSumsN = 16;

  // One chunk of a tile of db or daᵀ: kBlockM rows from m on, ranks from n on; db is of projection `at`.
  struct GradientUnit {
    uint32_t at;
    uint32_t m;
    uint32_t n;
    uint32_t slab;  // first of the CTA's slabs among those of db and da
    uint32_t chunk;
    uint32_t token;
    uint32_t tokens;
  };

  // Whether every token counts: without routes, and for dbias.
  __device__ __forceinline__ bool reads_all(const GradientUnit& unit, bool is_db) const {
    return !routes().is_on() || (is_db && p_.projections[unit.at].dbias != 0 && unit.n == 0);
  }

  // The projection that has block `narrow` of the ranks of dh.
  __device__ __forceinline__ uint32_t projection_at(uint32_t narrow) const {
    return projection_of(p_, narrow, [](const LoraSm90BackwardProjection& of) { return of.first_narrow; });
  }
  __device__ __forceinline__ const LoraTensorMap& own_map(uint32_t projection, uint32_t index) const {
    return map(LORA_SM90_BACKWARD_FIRST + projection * LORA_SM90_BACKWARD_EACH + index);
  }

  // Columns of the narrow tiles of dh and db, and of a gradient's.
  __device__ __forceinline__ uint32_t width() const { return narrow_width(p_.most_r); }
  __device__ __forceinline__ uint32_t gradient_width(bool is_db) const {
    return narrow_width(is_db ? p_.most_r : is_split() ? p_.r / 3 * 2 : p_.r);
  }

  // Blocks that a dh unit at (m, n) of a projection reduces over.
  __device__ __forceinline__ uint32_t wanted(uint32_t m, uint32_t n, uint32_t at) const {
    return goes_through(m, n, width()) ? (p_.projections[at].n + kBlockK - 1) / kBlockK : 0;
  }

  // Whether the tile sums up dy (y - bias) too.
  __device__ __forceinline__ bool with_dm(const GradientUnit& unit, bool is_db) const {
    return is_db && p_.projections[unit.at].magnitude.dm != 0 && unit.n == 0;
  }

  // Without db its tiles only sum up dbias and dm.
  __device__ __forceinline__ bool has_product(const GradientUnit& unit, bool is_db) const {
    return !is_db || p_.projections[unit.at].db.ptr != 0;
  }

  __device__ __forceinline__ GradientUnit gradient_unit(uint32_t ticket, bool is_db) const {
    const uint32_t index = ticket - p_.dx_end;
    const uint32_t tile = index / p_.chunks;
    GradientUnit unit;
    unit.at =
        is_db ? projection_of(p_, tile, [](const LoraSm90BackwardProjection& of) { return of.first_db_tile; }) : 0;
    const uint32_t groups = is_db ? p_.projections[unit.at].n_groups : p_.k_groups;
    const uint32_t before = is_db ? p_.projections[unit.at].first_db_tile : (p_.db_end - p_.dx_end) / p_.chunks;
    unit.m = row_of((tile - before) % groups);
    unit.n = (tile - before) / groups * kNarrowN;
    unit.slab = (tile * place_.size + place_.rank) * kSlabs;
    unit.chunk = index % p_.chunks;
    unit.token = unit.chunk * p_.chunk_rows;
    unit.tokens = min(p_.chunk_rows, p_.m - unit.token);
    return unit;
  }

  // Makes a slab of dy one of dz, of columns from 64 i on.
  __device__ __forceinline__ void gain_dy(const LoraSm90BackwardProjection& of, uint32_t slab, uint32_t i) const {
    gain_slab<T>(reinterpret_cast<const float*>(of.gain), slab, i * kBlockK, of.n);
  }

  // The same at step `i` of dx, which goes through one projection after the other. One may have no gain.
  __device__ __forceinline__ void gain_dy_of_all(uint32_t slab, uint32_t i) const {
    uint32_t at = 0;
#pragma unroll 1
    for (uint32_t steps; i >= (steps = (p_.projections[at].n + kBlockK - 1) / kBlockK); ++at) i -= steps;
    if (p_.projections[at].gain != 0) gain_dy(p_.projections[at], slab, i);
  }

  template <int kN>
  __device__ __forceinline__ void dh(Consumer<Shape>& consumer, uint32_t m, uint32_t block) const {
    const uint32_t at = projection_at(block);
    const LoraSm90BackwardProjection& projection = p_.projections[at];
    const uint32_t n = (block - projection.first_narrow) * kNarrowN;
    float acc[kN / 2];
    float no_sums[4];
    using Kind = Narrow<kN, 0, 1, true, false>;
    if (projection.gain != 0) {
      consumer.template narrow_altered<Kind>(
          acc, wanted(m, n, at), [&](uint32_t slab, uint32_t i) LORA_INLINE { gain_dy(projection, slab, i); });
    } else {
      consumer.template narrow<Kind>(acc, no_sums, wanted(m, n, at));
    }
    const uint32_t row = m + consumer.slab() * kSlabM;
    if (is_split()) {
      const GroupsOfOne groups = {{projection.first_rank / 2 + p_.split.ranks[at], projection.scale}};
      store_narrow_halves<Shape, kN>(acc, p_.split, p_.dh, row, projection.first_rank + n, p_.m, groups, routes());
    } else {
      store_narrow<Shape, kN>(
          acc, columns_from(p_.dh, projection.first_rank), row, n, p_.m, projection.r,
          [&](uint32_t) { return projection.scale; }, routes());
    }
    publish_narrow(consumer, m);
  }

  __device__ __forceinline__ void dx(Consumer<Shape>& consumer, uint32_t ticket) const {
    const BlockIndex block = wide_block(ticket - p_.dh_tickets, p_.k_blocks);
    const uint32_t tail = ranks_read(row_of(block.row), p_.r).steps(16, p_.r);
    float acc[Shape::kBlockN / 2];
    const uint32_t m = row_of(block.row) + consumer.slab() * kSlabM;
    const uint32_t k = block.col * Shape::kBlockN;
    if (drops() && tail != 0) {
      const Dropout dropout = this->template dropout<Shape>();
      consumer.wide_kept(acc, p_.n_steps, tail,
                         [&](KeptBits<Shape::kBlockN>& kept, uint32_t i) LORA_INLINE { kept.draw(dropout, m, k, i); });
    } else {
      consumer.wide_altered(acc, (p_.flags & LORA_GAINED) != 0 ? p_.n_steps : 0, p_.n_steps + tail / 4, tail % 4,
                            [&](uint32_t slab, uint32_t i) LORA_INLINE { gain_dy_of_all(slab, i); });
    }
    const bool accumulate = (p_.flags & LORA_ACCUMULATE_DX) != 0;
    store_wide<Shape>(consumer, acc, map(LORA_SM90_BACKWARD_DX), m, k, p_.m, p_.k,
                      [&](float low, float high, uint32_t row, uint32_t col) {
                        if (!accumulate || row >= p_.m || col >= p_.k) return make_float2(low, high);
                        const T* const old = reinterpret_cast<const T*>(p_.dx.ptr) + row * p_.dx.row_stride + col;
                        return make_float2(widen(old[0]) + low, widen(old[1]) + high);
                      });
  }

  // Where this warpgroup leaves its part of a gradient: in order of chunk, or, when it needs nobody else's, in a place
  // of its own.
  __device__ __forceinline__ float* partial(uint32_t slab, uint32_t chunk) const {
    return reinterpret_cast<float*>(p_.partials) +
           (static_cast<uint64_t>(slab) * p_.chunks + chunk) * p_.partial_stride;
  }

  // Of that the last 256 words, which no other gradient reaches: here threads read what others of the warpgroup left.
  __device__ __forceinline__ uint32_t magnitude_offset() const { return p_.partial_stride - kWarpgroup / 32 * kSlabM; }

  __device__ __forceinline__ void gradient(Consumer<Shape>& consumer, const GradientUnit& unit, bool is_db) const {
    const LoraSm90BackwardProjection& projection = p_.projections[unit.at];
    const bool product = has_product(unit, is_db);
    const bool magnitude = with_dm(unit, is_db);
    const bool with_sums = magnitude || (is_db && projection.dbias != 0 && unit.n == 0);
    const uint32_t columns = gradient_width(is_db);
    const uint32_t slab = p_.chunks == 1 ? blockIdx.x * kSlabs + consumer.slab() : unit.slab + consumer.slab();
    float* const mine = partial(slab, unit.chunk);
    const Picks picks = reads_all(unit, is_db)
                            ? everything(unit.tokens)
                            : routes().rows_of(unit.token, unit.tokens, unit.n / per_rank(), columns / per_rank());
    if (!product) {
      multiply<Narrow<kSumsN, 1, 1, false, true>>(consumer, unit, picks, mine, false);
    } else if (with_sums) {
      for_narrow_width(columns, [&](auto width) LORA_INLINE {
        multiply<Narrow<decltype(width)::kN, 1, 1, true, true>>(consumer, unit, picks, mine, false);
      });
    } else {
      for_narrow_width(columns, [&](auto width) LORA_INLINE {
        multiply<Narrow<decltype(width)::kN, 1, 1, true, false>>(consumer, unit, picks, mine, !is_db && drops());
      });
    }
    if (p_.chunks > 1 && !arrive_last(consumer, place_, p_.sync, p_.counters + slab, p_.chunks)) return;
    if (p_.chunks == 1 && magnitude) consumer.barrier();  // one thread reads what others have left
    const float* const first = partial(slab, 0);
    const uint32_t registers = (product ? columns : kSumsN) / 2;
    const uint32_t m = unit.m + consumer.slab() * kSlabM;
    if (product) {
      const GradientOut out = gradient_out(unit.at, is_db);
      const float* const gain = is_db ? reinterpret_cast<const float*>(projection.gain) : nullptr;
      const auto factor = [&](int half) {
        const uint32_t row = m + Consumer<Shape>::row_of(half);
        return gain != nullptr && row < projection.n ? gain[row] : 1.0f;
      };
      const float factors[2] = {factor(0), factor(1)};
#pragma unroll 1
      for (uint32_t i = 0; i < registers; i += kAtOnce) {
        float sum[kAtOnce];
        sum_partials(sum, first, p_.partial_stride, p_.chunks, i, registers);
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j) {  // register 4 f + 2 half + e of fragment f
          if (i + j >= registers) continue;
          uint32_t col = unit.n + Consumer<Shape>::col_of((i + j) / 4) + j % 2;
          float value = sum[j];
          if (is_split()) {  // fragments of high and low halves take turns
            if (j / 4 % 2 != 0) continue;
            col = is_db ? rank_of(col) : row_of_a(p_, col);
            value = whole<T>(value, sum[j + 4 - j / 4 % 2 * 4]);
          }
          const int half = j / 2 % 2;
          store_gradient<T>(out, m + Consumer<Shape>::row_of(half), col, value * factors[half]);
        }
      }
    }
    if (magnitude) dm(projection, first + magnitude_offset(), m);
    if (with_sums && projection.dbias != 0) {
      float sum[2];
      sum_partials(sum, first, p_.partial_stride, p_.chunks, registers, registers + 2);
      const GradientOut dbias = {projection.dbias,
                                 1,
                                 0,
                                 projection.n,
                                 1,
                                 (projection.flags & LORA_DBIAS_F32) != 0,
                                 (p_.flags & LORA_ACCUMULATE_DBIAS) != 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Every column of the sums is the same; one lane of four writes.
        const uint32_t row = m + Consumer<Shape>::row_of(half);
        if (threadIdx.x % 4 == 0) store_gradient<T>(dbias, row, 0, sum[half]);
      }
    }
  }

  // The gradient of the magnitude, of a slab of columns of y from n on, from what the chunks have left.
  __device__ __forceinline__ void dm(const LoraSm90BackwardProjection& of, const float* partial, uint32_t n) const {
    const uint32_t column = threadIdx.x % kWarpgroup;
    if (column >= kSlabM || n + column >= of.n) return;
    const float sum = MagnitudeSums<T>::sum(partial, p_.partial_stride, p_.chunks, column);
    const float magnitude = reinterpret_cast<const float*>(of.magnitude.magnitude)[n + column];
    store(reinterpret_cast<float*>(of.magnitude.dm) + n + column, sum / magnitude,
          (p_.flags & LORA_ACCUMULATE_DM) != 0);
  }

  template <class Kind>
  __device__ __forceinline__ void multiply(Consumer<Shape>& consumer, const GradientUnit& unit, const Picks& picks,
                                           float* partial, bool drops) const {
    const uint32_t blocks = picks.steps(kBlockK, unit.tokens);
    float acc[Kind::kN / 2];
    float sums[4];
    // Of what goes through here only x is subject to it, and x has no sums.
    if constexpr (Kind::kProduct && !Kind::kSums) {
      if (drops) {
        const Dropout dropout = this->template dropout<Shape>();
        const uint32_t col = unit.m + consumer.slab() * kSlabM;
        const auto drop = [&](uint32_t slab, uint32_t block)
                              LORA_INLINE { drop_slab(dropout, slab, unit.token + picks.start(block, kBlockK), col); };
        consumer.template narrow_altered<Kind>(acc, blocks, drop);
      }
    }
    if constexpr (Kind::kSums) {
      if (with_dm(unit, true)) {
        const LoraSm90BackwardProjection& of = p_.projections[unit.at];
        MagnitudeSums<T> magnitude(of.magnitude, unit.m + consumer.slab() * kSlabM, of.n);
        // With a gain there are no routes, so every block takes part.
        const auto visit = [&](uint32_t dy, uint32_t y, uint32_t block)
                               LORA_INLINE { magnitude.add(dy, y, unit.tokens - block * kBlockK); };
        consumer.template narrow_beside<Kind>(acc, sums, blocks, visit);
        consumer.barrier();  // what the tile before left in the same place was read
        magnitude.store(partial + magnitude_offset());
        store_partial<Kind>(partial, acc, sums);
        return;
      }
    }
    if (!drops) consumer.template narrow<Kind>(acc, sums, blocks);
    store_partial<Kind>(partial, acc, sums);
  }

  __device__ __forceinline__ GradientOut gradient_out(uint32_t at, bool is_db) const {
    const LoraSm90BackwardProjection& projection = p_.projections[at];
    const uint32_t of_db = is_split() ? p_.split.ranks[at] : p_.projections[at].r;
    const uint32_t ranks = is_db ? of_db : is_split() ? p_.split.r : p_.r;
    // Field by field: a choice between two structs would put them on the stack.
    return {is_db ? projection.db.ptr : p_.da.ptr,
            is_db ? projection.db.row_stride : 1,
            is_db ? 1 : p_.da.row_stride,
            is_db ? projection.n : p_.k,
            ranks,
            is_db ? (projection.flags & LORA_DB_F32) != 0 : (p_.flags & LORA_DA_F32) != 0,
            (p_.flags & (is_db ? LORA_ACCUMULATE_DB : LORA_ACCUMULATE_DA)) != 0};
  }
};

template <class Shape>
__device__ __forceinline__ void backward(const LoraSm90Backward& launch) {
  run<Shape, Backward<Shape>>(launch);
}

}  // namespace lora::sm90

LORA_SM90_KERNELS(backward, LoraSm90Backward)
