// merged = w + scale · B A, the factors of an adapter rounded to the storage type, and the row norms of w + scale · B
// A.
//
// a [R][K], b [N][R] (f32 or the storage type), w and merged [N][K], row-major with any row stride; nothing needs to be
// aligned beyond its element. Products, sums and the multiplication by the scale are separate operations in f32, in
// ascending order of rank, which a CPU repeats bit for bit; each result is rounded once to the storage type.
#include "../element.cuh"
#include "../params.h"

namespace lora {

// CTAs per SM that registers must leave room for.
constexpr int kAdapterCtas = 4;

// Element (row, col) of a factor.
template <typename T>
__device__ __forceinline__ float factor(const LoraMatrix& matrix, bool f32, uint32_t row, uint32_t col) {
  const int64_t at = row * matrix.row_stride + col;
  return f32 ? reinterpret_cast<const float*>(matrix.ptr)[at] : widen(reinterpret_cast<const T*>(matrix.ptr)[at]);
}

constexpr uint32_t kMergeBlock = LORA_MERGE_BLOCK;
constexpr uint32_t kMergeRanks = LORA_MERGE_RANKS;
constexpr uint32_t kMergeWarps = LORA_MERGE_THREADS / 32;
// A warp has whole rows of a tile, a lane two neighbouring columns.
constexpr uint32_t kMergeRows = kMergeBlock / kMergeWarps;
static_assert(kMergeBlock == 2 * 32, "a lane has two columns");

// A step's ranks of a tile's columns of a and rows of b, widened; zeros past the edges of the matrices.
struct MergeStep {
  float a[kMergeRanks][kMergeBlock];
  float b[kMergeBlock][kMergeRanks];
};

template <typename T>
__device__ __forceinline__ void load_step(const LoraMergeParams& p, MergeStep& step, uint32_t n, uint32_t k, uint32_t r,
                                          uint32_t ranks) {
  const bool f32 = (p.flags & LORA_FACTORS_F32) != 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < kMergeRanks * kMergeBlock; i += LORA_MERGE_THREADS) {
    // Neighbouring threads take neighbouring elements in memory: columns of a, ranks of b.
    const uint32_t a_rank = i / kMergeBlock, col = i % kMergeBlock;
    const uint32_t row = i / kMergeRanks, b_rank = i % kMergeRanks;
    if (a_rank < ranks) step.a[a_rank][col] = k + col < p.k ? factor<T>(p.a, f32, r + a_rank, k + col) : 0.0f;
    if (b_rank < ranks) step.b[row][b_rank] = n + row < p.n ? factor<T>(p.b, f32, n + row, r + b_rank) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store_merged(const LoraMergeParams& p, uint32_t row, uint32_t col,
                                             const float (&sums)[2]) {
  const T* const w = reinterpret_cast<const T*>(p.w.ptr) + row * p.w.row_stride + col;
  T* const merged = reinterpret_cast<T*>(p.merged.ptr) + row * p.merged.row_stride + col;
  const float gain = p.gain != 0 ? reinterpret_cast<const float*>(p.gain)[row] : 1.0f;  // a factor of 1 changes no bits
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    if (col + e >= p.k) continue;
    const float sum = __fadd_rn(widen(w[e]), __fmul_rn(p.scale, sums[e]));
    merged[e] = round_to<T>(__fmul_rn(gain, sum));
  }
}

template <typename T>
__device__ __forceinline__ void merge(const LoraMergeParams& p) {
  __shared__ MergeStep step;
  const uint32_t k = blockIdx.x % p.k_blocks * kMergeBlock;
  const uint32_t n = blockIdx.x / p.k_blocks * kMergeBlock;
  const uint32_t first_row = threadIdx.x / 32 * kMergeRows;
  const uint32_t col = threadIdx.x % 32 * 2;
  float sums[kMergeRows][2] = {};
#pragma unroll 1
  for (uint32_t r = 0; r < p.r; r += kMergeRanks) {
    const uint32_t ranks = min(p.r - r, kMergeRanks);
    __syncthreads();  // the step before was read by all
    load_step<T>(p, step, n, k, r, ranks);
    __syncthreads();  // this one is there for all
#pragma unroll 1
    for (uint32_t rank = 0; rank < ranks; ++rank) {
#pragma unroll
      for (uint32_t i = 0; i < kMergeRows; ++i) {
#pragma unroll
        for (uint32_t e = 0; e < 2; ++e) {
          const float product = __fmul_rn(step.b[first_row + i][rank], step.a[rank][col + e]);
          sums[i][e] = __fadd_rn(sums[i][e], product);
        }
      }
    }
  }
#pragma unroll
  for (uint32_t i = 0; i < kMergeRows; ++i) {
    if (n + first_row + i < p.n) store_merged<T>(p, n + first_row + i, k + col, sums[i]);
  }
}

constexpr uint32_t kRoundRows = LORA_ROUND_ROWS;
constexpr uint32_t kRoundCols = LORA_ROUND_COLS;
static_assert(LORA_ROUND_THREADS == 32 * kRoundRows, "a warp has a row of a tile");

// One tile of `out` = scale · `matrix` / divisor, of a row each; address 0 for a divisor of 1. Flags say which of both
// is f32.
template <typename T>
__device__ __forceinline__ void round_tile(const LoraMatrix& matrix, const LoraMatrix& out, uint32_t flags,
                                           uint32_t rows, uint32_t cols, float scale, uint64_t divisors, uint32_t unit,
                                           uint32_t col_blocks) {
  const uint32_t row = unit / col_blocks * kRoundRows + threadIdx.x / 32;
  const uint32_t first = unit % col_blocks * kRoundCols;
  if (row >= rows) return;
  const int64_t to = row * out.row_stride + first;
  const float divisor = divisors != 0 ? reinterpret_cast<const float*>(divisors)[row] : 1.0f;
  const uint32_t end = min(cols - first, kRoundCols);
#pragma unroll 4
  for (uint32_t i = threadIdx.x % 32; i < end; i += 32) {
    const float product = __fmul_rn(scale, factor<T>(matrix, (flags & LORA_FACTORS_F32) != 0, row, first + i));
    const float result = divisors != 0 ? __fdiv_rn(product, divisor) : product;
    if ((flags & LORA_ROUNDED_F32) != 0) {
      reinterpret_cast<float*>(out.ptr)[to + i] = result;
    } else {
      reinterpret_cast<T*>(out.ptr)[to + i] = round_to<T>(result);
    }
  }
}

template <typename T>
__device__ __forceinline__ void round_factors(const LoraRoundParams& p) {
  if (blockIdx.x < p.a_units) {
    round_tile<T>(p.a, p.rounded_a, p.flags, p.r, p.k, 1.0f, 0, blockIdx.x, p.k_blocks);
  } else {
    round_tile<T>(p.b, p.rounded_b, p.flags, p.n, p.r, p.scale, p.divisor, blockIdx.x - p.a_units, p.r_blocks);
  }
}

constexpr uint32_t kGainRows = LORA_GAIN_ROWS;
constexpr uint32_t kGainCols = 256;  // of w at a time
constexpr uint32_t kGainRanks = 32;  // of a and b at a time
constexpr uint32_t kGainWarps = LORA_GAIN_THREADS / 32;
// A warp has whole rows; a lane has pairs of neighbouring columns, kGainStride apart.
constexpr uint32_t kGainWarpRows = kGainRows / kGainWarps;
constexpr uint32_t kGainStride = 64;
constexpr uint32_t kGainPairs = kGainCols / kGainStride;

// Some ranks of a for these columns and of b for the CTA's rows, widened; zeros past the edges of the matrices.
struct GainStep {
  float a[kGainRanks][kGainCols];
  float b[kGainRows][kGainRanks];
};

template <typename T>
__device__ __forceinline__ void load_step(const LoraGainParams& p, GainStep& step, uint32_t n, uint32_t k, uint32_t r) {
  const bool f32 = (p.flags & LORA_FACTORS_F32) != 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < kGainRanks * kGainCols; i += LORA_GAIN_THREADS) {
    const uint32_t rank = i / kGainCols, col = i % kGainCols;
    step.a[rank][col] = r + rank < p.r && k + col < p.k ? factor<T>(p.a, f32, r + rank, k + col) : 0.0f;
  }
  for (uint32_t i = threadIdx.x; i < kGainRows * kGainRanks; i += LORA_GAIN_THREADS) {
    const uint32_t row = i / kGainRanks, rank = i % kGainRanks;
    step.b[row][rank] = r + rank < p.r && n + row < p.n ? factor<T>(p.b, f32, n + row, r + rank) : 0.0f;
  }
}

// Adds the squares of w + scale · sums, of the columns from k on, of one row.
template <typename T>
__device__ __forceinline__ void add_squares(const LoraGainParams& p, float& squares, uint32_t row, uint32_t k,
                                            const float (&sums)[kGainPairs][2]) {
  if (row >= p.n) return;
  const T* const w = reinterpret_cast<const T*>(p.w.ptr) + row * p.w.row_stride;
#pragma unroll
  for (uint32_t j = 0; j < kGainPairs; ++j) {
#pragma unroll
    for (uint32_t e = 0; e < 2; ++e) {
      const uint32_t col = k + j * kGainStride + threadIdx.x % 32 * 2 + e;
      const float value = col < p.k ? fmaf(p.scale, sums[j][e], widen(w[col])) : 0.0f;
      squares = fmaf(value, value, squares);
    }
  }
}

template <typename T>
__device__ __forceinline__ void gain(const LoraGainParams& p) {
  __shared__ GainStep step;
  const uint32_t n = blockIdx.x * kGainRows;
  const uint32_t first_row = threadIdx.x / 32 * kGainWarpRows;
  float squares[kGainWarpRows] = {};
#pragma unroll 1
  for (uint32_t k = 0; k < p.k; k += kGainCols) {
    float sums[kGainWarpRows][kGainPairs][2] = {};
#pragma unroll 1
    for (uint32_t r = 0; r < p.r; r += kGainRanks) {
      __syncthreads();  // the step before was read by all
      load_step<T>(p, step, n, k, r);
      __syncthreads();  // this one is there for all
#pragma unroll 2
      for (uint32_t rank = 0; rank < min(p.r - r, kGainRanks); ++rank) {
#pragma unroll
        for (uint32_t j = 0; j < kGainPairs; ++j) {
          const float2 a = *reinterpret_cast<const float2*>(&step.a[rank][j * kGainStride + threadIdx.x % 32 * 2]);
#pragma unroll
          for (uint32_t i = 0; i < kGainWarpRows; ++i) {
            const float b = step.b[first_row + i][rank];
            sums[i][j][0] = fmaf(b, a.x, sums[i][j][0]);
            sums[i][j][1] = fmaf(b, a.y, sums[i][j][1]);
          }
        }
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kGainWarpRows; ++i) add_squares<T>(p, squares[i], n + first_row + i, k, sums[i]);
  }
#pragma unroll
  for (uint32_t i = 0; i < kGainWarpRows; ++i) {
    for (uint32_t lanes = 16; lanes != 0; lanes /= 2) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], lanes);
    const uint32_t row = n + first_row + i;
    if (threadIdx.x % 32 != 0 || row >= p.n) continue;
    const float norm = sqrtf(squares[i]);
    if (p.norm != 0) reinterpret_cast<float*>(p.norm)[row] = norm;
    if (p.gain == 0) continue;
    const float ratio = reinterpret_cast<const float*>(p.magnitude)[row] / norm;
    const float earlier = p.earlier != 0 ? reinterpret_cast<const float*>(p.earlier)[row] : 1.0f;
    reinterpret_cast<float*>(p.gain)[row] = ratio * earlier;
  }
}

}  // namespace lora

#define LORA_ADAPTER(dtype, T)                                                         \
  extern "C" __global__ void __launch_bounds__(LORA_MERGE_THREADS, lora::kAdapterCtas) \
      lora_merge_##dtype(const __grid_constant__ LoraMergeParams params) {             \
    lora::merge<T>(params);                                                            \
  }                                                                                    \
  extern "C" __global__ void __launch_bounds__(LORA_ROUND_THREADS, lora::kAdapterCtas) \
      lora_round_##dtype(const __grid_constant__ LoraRoundParams params) {             \
    lora::round_factors<T>(params);                                                    \
  }                                                                                    \
  extern "C" __global__ void __launch_bounds__(LORA_GAIN_THREADS, lora::kAdapterCtas)  \
      lora_gain_##dtype(const __grid_constant__ LoraGainParams params) {               \
    lora::gain<T>(params);                                                             \
  }

LORA_ADAPTER(f16, __half)
LORA_ADAPTER(bf16, __nv_bfloat16)
