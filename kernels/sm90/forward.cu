// y = gain ∘ (x Wᵀ + h Bᵀ) (+ bias), h = scale · x Aᵀ, in one launch on Hopper.
//
// x [M][K], w [N][K], a [R][K], b [N][R], h [M][R], y [M][N], row-major, fp16 or bf16, f32 accumulation. Tickets:
// bundles of h units (128 rows x up to 128 ranks per CTA, full K), then y units, whose last steps read h.
#include "roles.cuh"

namespace lora::sm90 {

template <class Shape>
class Forward : Operation<LoraSm90Forward> {
 public:
  using T = typename Shape::T;

  __device__ __forceinline__ Forward(const LoraSm90Forward& launch, const Place& place) : Operation(launch, place) {}

  __device__ __forceinline__ void produce(Producer<Shape>& producer, uint32_t ticket) const {
    if (ticket < p_.h_tickets) {
      for_each_narrow(ticket, p_.h_tickets, p_.h_units, [&](uint32_t m, uint32_t n) LORA_INLINE {
        producer.template narrow<Major::kK>(map(LORA_SM90_FORWARD_X), map(LORA_SM90_FORWARD_A), m, n, width(),
                                            wanted(m, n, k_steps()));
      });
      return;
    }
    const BlockIndex block = wide_block(ticket - p_.h_tickets, p_.n_blocks);
    const uint32_t m = row_of(block.row);
    const uint32_t n = block.col * Shape::kBlockN;
    producer.template wide<Major::kK>(map(LORA_SM90_FORWARD_X), map(LORA_SM90_FORWARD_W), m, n, everything(p_.k), p_.k);
    if (p_.r == 0) return;
    wait_for_block(flags(), m / kBlockM);
    producer.template wide<Major::kK>(map(LORA_SM90_FORWARD_H), map(LORA_SM90_FORWARD_B), m, n, ranks_read(m), p_.r);
  }

  __device__ __forceinline__ void consume(Consumer<Shape>& consumer, uint32_t ticket) const {
    if (ticket < p_.h_tickets) {
      for_each_narrow(ticket, p_.h_tickets, p_.h_units, [&](uint32_t m, uint32_t n) LORA_INLINE {
        for_narrow_width(width(), [&](auto width) LORA_INLINE { h<decltype(width)::kN>(consumer, m, n); });
      });
      return;
    }
    const BlockIndex block = wide_block(ticket - p_.h_tickets, p_.n_blocks);
    const uint32_t m = row_of(block.row) + consumer.slab() * kSlabM;
    const uint32_t n = block.col * Shape::kBlockN;
    float acc[Shape::kBlockN / 2];
    const uint32_t tail = ranks_read(row_of(block.row)).steps(16, p_.r);
    consumer.template wide<0>(acc, k_steps() + tail / 4, tail % 4);
    if (p_.gain != 0) gain_columns<Shape>(acc, reinterpret_cast<const float*>(p_.gain), n, p_.n);
    const T* const bias = reinterpret_cast<const T*>(p_.bias);
    store_wide<Shape>(consumer, acc, map(LORA_SM90_FORWARD_Y), m, n, p_.m, p_.n,
                      [&](float low, float high, uint32_t, uint32_t col) {
                        if (bias == nullptr || col >= p_.n) return make_float2(low, high);
                        return make_float2(low + widen(bias[col]), high + widen(bias[col + 1]));
                      });
  }

 private:
  __device__ __forceinline__ uint32_t k_steps() const { return (p_.k + kBlockK - 1) / kBlockK; }

  template <int kN>
  __device__ __forceinline__ void h(Consumer<Shape>& consumer, uint32_t m, uint32_t n) const {
    float acc[kN / 2];
    float no_sums[4];
    using Kind = Narrow<kN, 0, 0, true, false>;
    if (this->drops()) {
      const Dropout dropout = this->template dropout<Shape>();
      const uint32_t row = m + consumer.slab() * kSlabM;
      consumer.template narrow_altered<Kind>(acc, wanted(m, n, k_steps()),
                                             [&](uint32_t slab, uint32_t block)
                                                 LORA_INLINE { drop_slab(dropout, slab, row, block * kBlockK); });
    } else {
      consumer.template narrow<Kind>(acc, no_sums, wanted(m, n, k_steps()));
    }
    store_narrow<Shape, kN>(acc, p_.h, m + consumer.slab() * kSlabM, n, p_.m, p_.r, p_.scale, routes());
    publish_narrow(consumer, m);
  }
};

template <class Shape>
__device__ __forceinline__ void forward(const LoraSm90Forward& launch) {
  run<Shape, Forward<Shape>>(launch);
}

}  // namespace lora::sm90

LORA_SM90_KERNELS(forward, LoraSm90Forward)
