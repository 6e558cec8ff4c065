// y = gain ∘ (x Wᵀ + h Bᵀ) (+ bias), h = scale · x Aᵀ, in one launch on Hopper, for up to LORA_MAX_PROJECTIONS w, b and
// y of one x.
//
// x [M][K], w [N][K], a [R][K], b [N][R], h [M][R], y [M][N], row-major, fp16 or bf16, f32 accumulation. Tickets:
// bundles of h units (128 rows x up to 128 ranks of all projections per CTA, full K), then y units, whose last steps
// read h. A y unit is of one projection; those of all go through grouped rows of x together.
#include "roles.cuh"

namespace lora::sm90 {

template <class Shape>
class Forward : Operation<LoraSm90Forward> {
 public:
  using T = typename Shape::T;

  __device__ __forceinline__ Forward(const LoraSm90Forward& launch, const Place& place) : Operation(launch, place) {}

  __device__ __forceinline__ void produce(Producer<Shape>& producer, uint32_t ticket) const {
    if (ticket < p_.h_tickets) {
      wait_for_factors();
      for_each_narrow(ticket, p_.h_tickets, p_.h_units, [&](uint32_t m, uint32_t block) LORA_INLINE {
        const uint32_t n = block * kNarrowN;
        producer.template narrow<Major::kK>(map(LORA_SM90_FORWARD_X), map(LORA_SM90_FORWARD_A), m, n, width(),
                                            wanted(m, n, k_steps()));
      });
      return;
    }
    const BlockIndex block = wide_block(ticket - p_.h_tickets, p_.n_blocks);
    const uint32_t at = projection_at(block.col);
    const uint32_t m = row_of(block.row);
    const uint32_t n = (block.col - p_.projections[at].first_block) * Shape::kBlockN;
    const uint32_t r = p_.projections[at].r;
    producer.template wide<Major::kK>(map(LORA_SM90_FORWARD_X), own_map(at, LORA_SM90_FORWARD_W), m, n,
                                      everything(p_.k), p_.k);
    if (r == 0) return;
    wait_for_block(flags(p_.r_blocks), m / kBlockM);
    producer.template wide<Major::kK>(own_map(at, LORA_SM90_FORWARD_H), own_map(at, LORA_SM90_FORWARD_B), m, n,
                                      ranks_read(m, r), r);
  }

  __device__ __forceinline__ void split(const Consumer<Shape>& consumer, uint32_t ticket) const {
    this->template split_unit<true>(consumer, ticket);
  }

  __device__ __forceinline__ void consume(Consumer<Shape>& consumer, uint32_t ticket) const {
    if (ticket < p_.h_tickets) {
      for_each_narrow(ticket, p_.h_tickets, p_.h_units, [&](uint32_t m, uint32_t block) LORA_INLINE {
        for_narrow_width(width(),
                         [&](auto width) LORA_INLINE { h<decltype(width)::kN>(consumer, m, block * kNarrowN); });
      });
      return;
    }
    const BlockIndex block = wide_block(ticket - p_.h_tickets, p_.n_blocks);
    const uint32_t at = projection_at(block.col);
    const LoraSm90ForwardProjection& projection = p_.projections[at];
    const uint32_t m = row_of(block.row) + consumer.slab() * kSlabM;
    const uint32_t n = (block.col - projection.first_block) * Shape::kBlockN;
    float acc[Shape::kBlockN / 2];
    const uint32_t tail = ranks_read(row_of(block.row), projection.r).steps(16, projection.r);
    consumer.template wide<0>(acc, k_steps() + tail / 4, tail % 4);
    const uint32_t columns = projection.n;
    if (projection.gain != 0) gain_columns<Shape>(acc, reinterpret_cast<const float*>(projection.gain), n, columns);
    const T* const bias = reinterpret_cast<const T*>(projection.bias);
    store_wide<Shape>(consumer, acc, own_map(at, LORA_SM90_FORWARD_Y), m, n, p_.m, columns,
                      [&](float low, float high, uint32_t, uint32_t col) {
                        if (bias == nullptr || col >= columns) return make_float2(low, high);
                        return make_float2(low + widen(bias[col]), high + widen(bias[col + 1]));
                      });
  }

 private:
  // The projection that has block `column` of columns.
  __device__ __forceinline__ uint32_t projection_at(uint32_t column) const {
    return projection_of(p_, column, [](const LoraSm90ForwardProjection& of) { return of.first_block; });
  }
  __device__ __forceinline__ const LoraTensorMap& own_map(uint32_t projection, uint32_t index) const {
    return map(LORA_SM90_FORWARD_FIRST + projection * LORA_SM90_FORWARD_EACH + index);
  }

  __device__ __forceinline__ uint32_t width() const { return narrow_width(p_.r); }
  // Of the `blocks` that an h unit at (m, n) reduces over.
  __device__ __forceinline__ uint32_t wanted(uint32_t m, uint32_t n, uint32_t blocks) const {
    return goes_through(m, n, width()) ? blocks : 0;
  }

  __device__ __forceinline__ uint32_t k_steps() const { return (p_.k + kBlockK - 1) / kBlockK; }

  template <int kN>
  __device__ __forceinline__ void h(Consumer<Shape>& consumer, uint32_t m, uint32_t n) const {
    const uint32_t row = m + consumer.slab() * kSlabM;
    float acc[kN / 2];
    float no_sums[4];
    using Kind = Narrow<kN, 0, 0, true, false>;
    if (this->drops()) {
      const Dropout dropout = this->template dropout<Shape>();
      consumer.template narrow_altered<Kind>(acc, wanted(m, n, k_steps()),
                                             [&](uint32_t slab, uint32_t block)
                                                 LORA_INLINE { drop_slab(dropout, slab, row, block * kBlockK); });
    } else {
      consumer.template narrow<Kind>(acc, no_sums, wanted(m, n, k_steps()));
    }
    if (is_split()) {
      store_narrow_halves<Shape, kN>(acc, p_.split, p_.h, row, n, p_.m, GroupsOfAll<LoraSm90ForwardParams>{p_},
                                     routes());
    } else {
      store_narrow<Shape, kN>(acc, p_.h, row, n, p_.m, p_.r, RankScale<LoraSm90ForwardParams>{p_}, routes());
    }
    publish_narrow(consumer, m);
  }
};

template <class Shape>
__device__ __forceinline__ void forward(const LoraSm90Forward& launch) {
  run<Shape, Forward<Shape>>(launch);
}

}  // namespace lora::sm90

LORA_SM90_KERNELS(forward, LoraSm90Forward)
