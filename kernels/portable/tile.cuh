// One tile of a product: D[m][n] = sum over k of A[m][k] B[k][n], f32 accumulators in registers.
//
// The loop serves every product of the layer. It walks a main segment and then a tail segment (the K-extension h Bᵀ or
// dh A) through one ring of shared-memory stages into the same accumulators. An operand is stored either K-major
// ([mn][k], rows of x in x Wᵀ) or MN-major ([k][mn], rows of w in dy W); ldmatrix.trans reads the second kind in place,
// so nothing is ever transposed in memory.
#pragma once

#include "../dropout.cuh"
#include "../element.cuh"
#include "../params.h"
#include "../ptx/copy.cuh"
#include "../ptx/matrix.cuh"
#include "../ptx/scalar.cuh"
#include "../ptx/sync.cuh"
#include "../routes.cuh"

namespace lora {

constexpr int kBlockK = LORA_BLOCK_K;
constexpr int kNarrowN = LORA_NARROW_N;
constexpr int kChunkElems = 8;  // 16 bytes: the unit of cp.async and of an ldmatrix row

struct LargeTile {
  static constexpr int kBlock = LORA_LARGE_BLOCK;      // rows and columns of a main tile
  static constexpr int kThreads = LORA_LARGE_THREADS;  // 8 warps
  static constexpr int kStages = LORA_LARGE_STAGES;    // ring depth
  static constexpr int kWarpM = 64;                    // rows of a warp's part of a main tile
  static constexpr int kWarpN = 32;                    // columns of it
#if __CUDA_ARCH__ >= 800
  static constexpr int kCtasPerSm = 2;  // bounds registers per thread to 128
#else
  static constexpr int kCtasPerSm = 1;  // 64 KiB of shared memory hold one CTA
#endif
};

struct SmallTile {
  static constexpr int kBlock = LORA_SMALL_BLOCK;
  static constexpr int kThreads = LORA_SMALL_THREADS;  // 4 warps
  static constexpr int kStages = LORA_SMALL_STAGES;
  static constexpr int kWarpM = 32;
  static constexpr int kWarpN = 32;
#if __CUDA_ARCH__ >= 800
  static constexpr int kCtasPerSm = 4;
#else
  static constexpr int kCtasPerSm = 2;
#endif
};

enum class Major { kK, kMn };

// A matrix as one operand of a product: its extent in the output dimension (mn) and in the reduction dimension (k).
struct Operand {
  const uint16_t* gmem;
  int64_t row_stride;  // elements
  uint32_t mn_end;     // first row or column of the output past the matrix
  uint32_t k_end;      // first index of the reduction past the segment
};

__device__ __forceinline__ Operand operand(const LoraMatrix& matrix, uint32_t mn_end, uint32_t k_end) {
  return {reinterpret_cast<const uint16_t*>(matrix.ptr), matrix.row_stride, mn_end, k_end};
}

// A run of the reduction: operands, the first index, and the number of steps of kBlockK.
struct Segment {
  Operand a;
  Operand b;
  uint32_t k_begin;
  uint32_t steps;
};

__device__ __forceinline__ Segment segment(const Operand& a, const Operand& b, uint32_t k_begin) {
  return {a, b, k_begin, (a.k_end - k_begin + kBlockK - 1) / kBlockK};
}

// The same, of which some blocks alone take part.
__device__ __forceinline__ Segment segment(const Operand& a, const Operand& b, uint32_t k_begin, const Picks& picks) {
  return {a, b, k_begin, picks.steps(kBlockK, a.k_end - k_begin)};
}

// Where the steps of a segment start, from k_begin on: all of it in order.
struct InOrder {
  __device__ __forceinline__ uint32_t operator()(uint32_t step) const { return step * kBlockK; }
};

// What a step reads: operands, and where in the reduction it starts.
struct Source {
  Operand a;
  Operand b;
  uint32_t k;
};

// Of step `step` of a segment; what else can be a main run of a reduction has a function of its own.
template <class Start>
__device__ __forceinline__ Source source_of(const Segment& segment, uint32_t step, const Start& start) {
  return {segment.a, segment.b, segment.k_begin + start(step)};
}

// What multiplies the columns of A: a gain for each of them up to `end`, nothing where that is null.
struct Gained {
  const float* gain;
  uint32_t k;  // first column of the step
  uint32_t end;
};

// Whether a main run has a gain, and that of step `step`; as for a source.
__device__ __forceinline__ bool has_gain(const Segment&, const float* gain) { return gain != nullptr; }
__device__ __forceinline__ Gained gained(const Segment& segment, const float* gain, uint32_t step) {
  return {gain, step * kBlockK, segment.a.k_end};
}

// Flags that must have reached their targets before what they guard may be read.
struct Dependency {
  const uint32_t* flags;
  uint32_t count;
  uint32_t target;       // value of a flag when all its blocks are published
  uint32_t last_target;  // the last flag of the problem may guard fewer blocks
  uint32_t last;         // its index relative to `flags`
};

__device__ __forceinline__ void wait_for(const Dependency& dependency) {
  for (uint32_t i = threadIdx.x; i < dependency.count; i += blockDim.x) {
    const uint32_t target = i == dependency.last ? dependency.last_target : dependency.target;
    while (ptx::load_acquire(dependency.flags + i) < target) __nanosleep(64);
  }
  __syncthreads();  // what one thread acquired, all may read
}

// A tile whose operands are there from the start.
struct Ready {
  __device__ __forceinline__ bool must_wait(uint32_t) const { return false; }
  __device__ __forceinline__ void wait() const {}
};

// Position of 16-byte chunk `chunk` of row `row` in a stage. Eight rows that ldmatrix reads together fall into eight
// different groups of four banks.
template <int kRowChunks>
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t chunk) {
  static_assert(kRowChunks == 4 || kRowChunks % 8 == 0, "a row is 64 bytes or a multiple of 128");
  const uint32_t phase = kRowChunks == 4 ? (row >> 1) & 3 : row & 7;
  return (row * kRowChunks + (chunk ^ phase)) * 16;
}

// Copies `valid` (0..8) elements to a chunk and zeros to the rest of it.
__device__ __forceinline__ void copy_chunk(uint32_t smem, const uint16_t* gmem, uint32_t valid, bool aligned) {
#if __CUDA_ARCH__ >= 800
  if (aligned) {
    ptx::cp_async_16(smem, gmem, valid * 2);
    return;
  }
#else
  if (aligned && valid == kChunkElems) {
    ptx::store_shared_16(smem, *reinterpret_cast<const uint4*>(gmem));
    return;
  }
#endif
  uint32_t pairs[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < valid ? gmem[2 * i] : 0;
    const uint32_t high = 2 * i + 1 < valid ? gmem[2 * i + 1] : 0;
    pairs[i] = low | high << 16;
  }
  ptx::store_shared_16(smem, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}

// Loads kMn x kBlockK elements of an operand, from (mn, k) on, into one stage; outside the matrix they are zero.
template <Major kMajor, int kMn, int kThreads>
__device__ __forceinline__ void load_operand(uint32_t thread, uint32_t smem, const Operand& op, uint32_t mn,
                                             uint32_t k) {
  constexpr int kRows = kMajor == Major::kK ? kMn : kBlockK;
  constexpr int kRowChunks = (kMajor == Major::kK ? kBlockK : kMn) / kChunkElems;
  static_assert(kRows * kRowChunks % kThreads == 0, "every thread copies the same number of chunks");
  const uint32_t row_begin = kMajor == Major::kK ? mn : k;
  const uint32_t row_end = kMajor == Major::kK ? op.mn_end : op.k_end;
  const uint32_t col_begin = kMajor == Major::kK ? k : mn;
  const uint32_t col_end = kMajor == Major::kK ? op.k_end : op.mn_end;
  const bool aligned = ((reinterpret_cast<uint64_t>(op.gmem) | static_cast<uint64_t>(op.row_stride) * 2) & 15) == 0;
  // A thread's chunks lie below each other, whole periods of the swizzle apart: two addresses, and steps from there.
  constexpr int kRowStep = kThreads / kRowChunks;
  static_assert(kThreads % kRowChunks == 0 && kRowStep % 8 == 0, "a thread's chunks have one column and one phase");
  const uint32_t chunk = thread % kRowChunks;
  const uint32_t row = row_begin + thread / kRowChunks;
  const uint32_t col = col_begin + chunk * kChunkElems;
  const uint32_t cols = col < col_end ? min(col_end - col, static_cast<uint32_t>(kChunkElems)) : 0;
  const uint32_t first = smem + swizzled<kRowChunks>(thread / kRowChunks, chunk);
  const uint16_t* gmem = op.gmem + row * op.row_stride + col;
#pragma unroll
  for (int i = 0; i < kRows / kRowStep; ++i) {
    const uint32_t valid = row + i * kRowStep < row_end ? cols : 0;
    // Outside the matrix nothing is read, but the address of a zero-byte copy must still be a valid one.
    copy_chunk(first + i * kThreads * 16, valid != 0 ? gmem : op.gmem, valid, aligned);
    gmem += op.row_stride * kRowStep;
  }
}

// The swizzle repeats every 8 rows and a fragment starts at a multiple of them: its first row is a plain offset, so
// that one address in a register serves all fragments of a warp that lie below each other.

// The 16 x 16 fragment of A at (row, k) of a stage.
template <Major kMajor, int kMn>
__device__ __forceinline__ void load_fragment_a(uint32_t thread, uint32_t (&a)[4], uint32_t smem, uint32_t row,
                                                uint32_t k) {
  const uint32_t lane = thread % 32;
  if (kMajor == Major::kK) {
    const uint32_t chunk = k / kChunkElems + lane / 16;
    ptx::ldmatrix_x4(a, smem + swizzled<kBlockK / kChunkElems>(lane % 16, chunk) + row * kBlockK * 2);
  } else {
    const uint32_t chunk = row / kChunkElems + lane / 8 % 2;
    ptx::ldmatrix_x4_trans(a, smem + swizzled<kMn / kChunkElems>(lane % 8 + lane / 16 * 8, chunk) + k * kMn * 2);
  }
}

// The two 16 x 8 fragments of B at (k, col) of a stage: registers 0, 1 and 2, 3.
template <Major kMajor, int kMn>
__device__ __forceinline__ void load_fragment_b(uint32_t thread, uint32_t (&b)[4], uint32_t smem, uint32_t col,
                                                uint32_t k) {
  const uint32_t lane = thread % 32;
  if (kMajor == Major::kK) {
    const uint32_t chunk = k / kChunkElems + lane / 8 % 2;
    ptx::ldmatrix_x4(b, smem + swizzled<kBlockK / kChunkElems>(lane % 8 + lane / 16 * 8, chunk) + col * kBlockK * 2);
  } else {
    const uint32_t chunk = col / kChunkElems + lane / 16;
    ptx::ldmatrix_x4_trans(b, smem + swizzled<kMn / kChunkElems>(lane % 16, chunk) + k * kMn * 2);
  }
}

// Two times 1.0, to sum over the reduction with the tensor cores.
template <typename T>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__half> = 0x3c003c00u;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80u;

// What dropout acts on: nothing, the operand A, which is x, or the product of the tail, which is then done first.
enum class Drops { kNone, kA, kTail };

// What a launch does to operands and products on their way; a call has dropout, or a gain, or neither.
struct OnTheWay {
  LoraDropout dropout;
  const float* gain = nullptr;   // multiplies the columns of the main segment's A, which is dy
  LoraMagnitude magnitude = {};  // of which y and bias are read
};

// kGains: the main segment's A may have a gain. kSums: rows of A, which is dy, may be summed up.
template <typename T_, class Shape, int kBlockN_, int kWarpM_, int kWarpN_, Major kMajorA, Major kMajorB, Drops kDrops,
          bool kGains, bool kSums>
struct Tile {
  using T = T_;
  static constexpr int kBlockM = Shape::kBlock;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kStages = Shape::kStages;
  static constexpr int kWarpsN = kBlockN / kWarpN_;                           // warps side by side
  static constexpr int kFragsM = kWarpM_ / 16;                                // 16-row fragments per warp
  static constexpr int kFragsN = kWarpN_ / 8;                                 // 8-column fragments per warp
  static constexpr uint32_t kBytesA = kBlockM * kBlockK * 2;                  // of a stage
  static constexpr uint32_t kStageBytes = (Shape::kBlock * 2) * kBlockK * 2;  // the same ring for every kind of tile
  static_assert(kThreads / 32 == kBlockM / kWarpM_ * kWarpsN, "the warps cover the tile exactly");
  static_assert(kFragsN % 2 == 0, "fragments of B are loaded in pairs");
  static_assert(kBytesA + kBlockN * kBlockK * 2 <= kStageBytes, "a stage holds both operands");

  float acc[kFragsM][kFragsN][4] = {};      // (16 rows, 8 columns) per fragment
  float sums[kSums ? kFragsM : 1][4] = {};  // row sums of A, the same in every column
  bool wants_sums = kSums;
  float products[2] = {};  // sums of A ∘ (y − bias) of rows g and g + 8 over this thread's part of the reduction
  bool wants_products = false;
  const uint32_t thread = ptx::thread_index();

  // Row and first of two columns, relative to the tile, of elements {0, 1} (half 0) or {2, 3} (half 1) of a fragment.
  static __device__ __forceinline__ uint32_t row_of(uint32_t thread, int frag_m, int half) {
    return thread / 32 / kWarpsN * kWarpM_ + frag_m * 16 + half * 8 + thread % 32 / 4;
  }
  static __device__ __forceinline__ uint32_t col_of(uint32_t thread, int frag_n) {
    return thread / 32 % kWarpsN * kWarpN_ + frag_n * 8 + thread % 4 * 2;
  }

  // Accumulates main and then tail for the tile at (m, n), or tail first when it is to be dropped from. Columns from
  // `active_n` on, rounded up to 16, are left out. Leaves no copy in flight: the last step has waited for every group
  // but the empty ones. `Main` is a segment, or has as many steps and what is said of segments above.
  template <class Main, class Await = Ready, class MainStart = InOrder, class TailStart = InOrder>
  __device__ __forceinline__ void accumulate(const Main& main, const Segment& tail, uint32_t m, uint32_t n,
                                             uint32_t active_n, const Await& dependency, const OnTheWay& way,
                                             uint32_t smem, const MainStart& main_start = {},
                                             const TailStart& tail_start = {}) {
    const uint32_t steps = main.steps + tail.steps;
    const LoraDropout& dropout = way.dropout;
    const bool tail_first = kDrops == Drops::kTail && tail.steps != 0 && dropout.threshold != 0;
    const uint32_t first_steps = tail_first ? tail.steps : main.steps;
    const auto issue = [&](uint32_t step) {
      if (step < steps) {
        if (dependency.must_wait(step)) dependency.wait();
        const bool in_first = step < first_steps;
        const bool in_main = in_first != tail_first;
        const uint32_t within = in_first ? step : step - first_steps;
        Source from;
        if (in_main) {
          from = source_of(main, within, main_start);
        } else {
          from = source_of(tail, within, tail_start);
        }
        const uint32_t stage = smem + step % kStages * kStageBytes;
        load_operand<kMajorA, kBlockM, kThreads>(thread, stage, from.a, m, from.k);
        load_operand<kMajorB, kBlockN, kThreads>(thread, stage + kBytesA, from.b, n, from.k);
      }
      ptx::cp_async_commit();  // an empty group past the end keeps the count of groups in step with `step`
    };

#pragma unroll 1
    for (uint32_t step = 0; step < kStages - 1; ++step) issue(step);
    const Dropout drops_a(kDrops == Drops::kA ? dropout : LoraDropout{});
    uint32_t step = 0;
#pragma unroll 1
    for (bool drops = tail_first;; drops = false) {
      const uint32_t end = drops ? first_steps : steps;
#pragma unroll 1
      for (; step < end; ++step) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // the stage is complete for all, and the one about to be overwritten was read by all
        issue(step + kStages - 1);
        const uint32_t stage = smem + step % kStages * kStageBytes;
        if constexpr (kDrops == Drops::kA) {
          if (drops_a.is_on() || (kSums && wants_products)) {
            const uint32_t first_k = main.k_begin + main_start(step);
            multiply_altered(stage, active_n, [&](uint32_t k) {
              return [&, k](uint32_t(&a)[4], uint32_t row) {
                if (kSums && wants_products) add_products(a, main.a, way.magnitude, m + row, first_k + k);
                if (drops_a.is_on()) drop_a(a, drops_a, m + row, first_k + k);
              };
            });
            continue;
          }
        }
        if constexpr (kGains) {
          if (has_gain(main, way.gain) && step < main.steps) {
            const Gained of = gained(main, way.gain, step);
            multiply_altered(stage, active_n, [&](uint32_t k) { return GainedColumns(of, k, thread % 32); });
            continue;
          }
        }
        multiply(stage, active_n);
      }
      if (!drops) break;
      drop_accumulators(Dropout(dropout), m, n);
    }
  }

 private:
  // Zeroes what the adapter branch contributed to dropped elements. The columns of the output are those of x.
  __device__ __forceinline__ void drop_accumulators(const Dropout& dropout, uint32_t m, uint32_t n) {
    const uint32_t row = (m + row_of(thread, 0, 0)) / 16;
    const uint32_t col = (n + col_of(thread, 0)) / 16;
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragsN; j += 2) {
        const uint32_t lane = thread % 32;
        const PhiloxWords random = dropout.words(row + i, col + j / 2, lane / 4, lane % 4);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          float* const pair = acc[i][j + word / 2] + word % 2 * 2;
          pair[0] = dropout.keeps_low(random.of[word]) ? pair[0] : 0.0f;
          pair[1] = dropout.keeps_high(random.of[word]) ? pair[1] : 0.0f;
        }
      }
    }
  }

  // Multiplies a fragment of 16 columns, the two pairs of each of a thread's rows, by their gains.
  class GainedColumns {
   public:
    __device__ __forceinline__ GainedColumns(const Gained& of, uint32_t k, uint32_t lane) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t at = of.k + k + lane % 4 * 2 + i / 2 * 8 + i % 2;
        gain_[i] = of.gain == nullptr ? 1.0f : at < of.end ? of.gain[at] : 0.0f;  // of a column of zeros
      }
    }
    __device__ __forceinline__ void operator()(uint32_t (&a)[4], uint32_t) const {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(a[i]);
        a[i] = pack<T>(pair.x * gain_[i / 2 * 2], pair.y * gain_[i / 2 * 2 + 1]);
      }
    }

   private:
    float gain_[4];
  };

  // Zeroes what is dropped of the fragment of A at (row, k).
  __device__ __forceinline__ void drop_a(uint32_t (&a)[4], const Dropout& drops, uint32_t row, uint32_t k) const {
    if (kMajorA == Major::kK) {
      drops.drop_fragment(a, row, k, thread % 32);
    } else {
      drops.drop_transposed(a, k, row, thread % 32);
    }
  }

  // Adds A ∘ (y − bias) of the fragment at (row, k), row being a column of y and k a token.
  __device__ __forceinline__ void add_products(const uint32_t (&a)[4], const Operand& op, const LoraMagnitude& of,
                                               uint32_t row, uint32_t k) {
    const uint32_t lane = thread % 32;
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t col = row + half * 8 + lane / 4;
      if (col >= op.mn_end) continue;
      const float bias = of.bias != 0 ? widen(reinterpret_cast<const T*>(of.bias)[col]) : 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const float2 pair = unpack<T>(a[half + 2 * i]);
        const uint32_t token = k + i * 8 + lane % 4 * 2;
        const T* const y = reinterpret_cast<const T*>(of.y.ptr) + token * of.y.row_stride + col;
        if (token < op.k_end) products[half] = fmaf(pair.x, widen(y[0]) - bias, products[half]);
        if (token + 1 < op.k_end) products[half] = fmaf(pair.y, widen(y[of.y.row_stride]) - bias, products[half]);
      }
    }
  }

  __device__ __forceinline__ void multiply(uint32_t stage, uint32_t active_n) {
#pragma unroll
    for (uint32_t k = 0; k < kBlockK; k += 16) {
      multiply_16(stage, k, active_n, [](uint32_t(&)[4], uint32_t) {});
    }
  }

  // The same, of a stage whose fragments of A something happens to: `alter_from(k)` is what does it to those at k.
  // Rolled up: two copies of the generator would cost the other loops of the kernel registers.
  template <class AlterFrom>
  __device__ __forceinline__ void multiply_altered(uint32_t stage, uint32_t active_n, const AlterFrom& alter_from) {
#pragma unroll 1
    for (uint32_t k = 0; k < kBlockK; k += 16) multiply_16(stage, k, active_n, alter_from(k));
  }

  // `alter` sees each fragment of A with its first row.
  template <class Alter>
  __device__ __forceinline__ void multiply_16(uint32_t stage, uint32_t k, uint32_t active_n, const Alter& alter) {
    const uint32_t warp = thread / 32;
    const uint32_t warp_row = warp / kWarpsN * kWarpM_;
    const uint32_t warp_col = warp % kWarpsN * kWarpN_;
    uint32_t a[kFragsM][4];
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) {
      load_fragment_a<kMajorA, kBlockM>(thread, a[i], stage, warp_row + i * 16, k);
      alter(a[i], warp_row + i * 16);
    }
    if (kSums && wants_sums) {
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) ptx::mma_m16n8k16<T>(sums[i], a[i], kOnes<T>, kOnes<T>);
    }
#pragma unroll
    for (int j = 0; j < kFragsN; j += 2) {
      // R decides how many columns of a narrow tile exist; main tiles of its width pass all.
      if (kBlockN == kNarrowN && warp_col + j * 8 >= active_n) break;
      uint32_t b[4];
      load_fragment_b<kMajorB, kBlockN>(thread, b, stage + kBytesA, warp_col + j * 8, k);
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
        ptx::mma_m16n8k16<T>(acc[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16<T>(acc[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
};

// y or dx: the wide product with its K-extension.
template <typename T, class Shape, Major kMajorB, Drops kDrops, bool kGains>
using MainTile = Tile<T, Shape, Shape::kBlock, Shape::kWarpM, Shape::kWarpN, Major::kK, kMajorB, kDrops, kGains, false>;
// h or dh: at most kNarrowN columns, every warp 16 rows.
template <typename T, class Shape, Major kMajorB, Drops kDrops, bool kGains>
using NarrowTile = Tile<T, Shape, kNarrowN, 16, kNarrowN, Major::kK, kMajorB, kDrops, kGains, false>;
// db or daᵀ: reduces over tokens, both operands stored [token][..].
template <typename T, class Shape>
using GradientTile = Tile<T, Shape, kNarrowN, 16, kNarrowN, Major::kMn, Major::kMn, Drops::kA, false, true>;

}  // namespace lora
