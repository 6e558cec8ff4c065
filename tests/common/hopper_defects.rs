//! What can be wrong with the Hopper kernels: edits of their sources.

use fused_lora::plan::TileSize;

use super::altered::Edit;

pub const FORWARD: &str = "sm90_forward";
pub const BACKWARD: &str = "sm90_backward";

pub struct Defect {
    pub what: &'static str,
    pub image: &'static str,
    pub tile: TileSize,
    pub edits: &'static [Edit<'static>],
}

/// `image "what": (file "old" => "new") ..;` for each defect.
macro_rules! defects {
    ($($image:ident $tile:ident $what:literal: $(($file:ident $old:literal => $new:literal))+;)*) => {
        &[$(Defect {
            what: $what,
            image: $image,
            tile: TileSize::$tile,
            edits: &[$(Edit { file: $file, old: $old, new: $new }),+],
        }),*]
    };
}

const SYNC: &str = "ptx/sync.cuh";
const MBARRIER: &str = "ptx/mbarrier.cuh";
const ELEMENT: &str = "element.cuh";
const RING: &str = "sm90/ring.cuh";
const SCHEDULE: &str = "sm90/schedule.cuh";
const PRODUCER: &str = "sm90/producer.cuh";
const CONSUMER: &str = "sm90/consumer.cuh";
const DROP: &str = "sm90/drop.cuh";
const GAIN: &str = "sm90/gain.cuh";
const EPILOGUE: &str = "sm90/epilogue.cuh";
const ROLES: &str = "sm90/roles.cuh";
const PROJECTIONS: &str = "projections.cuh";
const ROUTES: &str = "routes.cuh";
const SPLIT: &str = "split.cuh";
const FORWARD_CU: &str = "sm90/forward.cu";
const BACKWARD_CU: &str = "sm90/backward.cu";

/// Defects that some orders of events do not bring out: a producer that is not far enough ahead for it, stores that were
/// waited for anyway, a cluster that is last in the chunk that it should begin with, slabs that are done at the same time.
pub const BY_CHANCE: &[&str] = &[
    "a stage expected before it is free",
    "a ticket expected before its slot is free",
    "no empty groups",
    "partial sums added from another chunk on",
    "split: one slab of threads not waited for",
];

#[rustfmt::skip]
pub const DEFECTS: &[Defect] = defects! {
    // Stages of the ring.
    FORWARD Sm90N128 "a stage let go before its products are done":
        (CONSUMER "ptx::wgmma_wait<1>();\n    release();" => "release();\n    ptx::wgmma_wait<1>();");
    FORWARD Sm90N128 "products waited for a step late":
        (CONSUMER "ptx::wgmma_wait<1>();" => "ptx::wgmma_wait<2>();");
    FORWARD Sm90N128 "accumulators read before the products are done":
        (CONSUMER "ptx::wgmma_wait<0>();\n    let_go();" => "ptx::wgmma_wait<1>();\n    let_go();");
    FORWARD Sm90N128 "the stage at hand let go, not the one before":
        (CONSUMER "release();\n    held_ = ring_.empty();" => "held_ = ring_.empty();\n    release();");
    FORWARD Sm90N128 "the last stage of a tile not let go":
        (CONSUMER "release();\n    held_ = 0;" => "held_ = 0;");
    FORWARD Sm90N128 "no fence of the accumulators":
        (CONSUMER "ptx::wgmma_fence();\n    Mma::template mma<kFirst>" => "Mma::template mma<kFirst>");
    FORWARD Sm90N128 "the producer waits for the other parity":
        (PRODUCER "ring_.parity ^ 1" => "ring_.parity");
    FORWARD Sm90N128 "the producer does not wait":
        (PRODUCER "ptx::mbarrier_wait(ring_.empty(), ring_.parity ^ 1);" => "");
    FORWARD Sm90N128 "the consumers wait for the other parity":
        (CONSUMER "ptx::mbarrier_wait(ring_.full(), ring_.parity);" => "ptx::mbarrier_wait(ring_.full(), ring_.parity ^ 1);");
    FORWARD Sm90N128 "the consumers do not wait":
        (CONSUMER "ptx::mbarrier_wait(ring_.full(), ring_.parity);" => "");
    FORWARD Sm90N128 "less expected than is copied":
        (PRODUCER "ptx::mbarrier_expect(ring_.full(), bytes);" => "ptx::mbarrier_expect(ring_.full(), bytes - 128);");
    FORWARD Sm90N128 "more expected than is copied":
        (PRODUCER "ptx::mbarrier_expect(ring_.full(), bytes);" => "ptx::mbarrier_expect(ring_.full(), bytes + 128);");
    FORWARD Sm90N128 "a stage expected before it is free":
        (PRODUCER "ptx::mbarrier_wait(ring_.empty(), ring_.parity ^ 1);\n    ptx::mbarrier_expect(ring_.full(), bytes);"
            => "ptx::mbarrier_expect(ring_.full(), bytes);\n    ptx::mbarrier_wait(ring_.empty(), ring_.parity ^ 1);");
    FORWARD Sm90N128 "empty barriers that count too few warps":
        (RING "kEmpty + i * 8, kConsumerWarps * cluster);" => "kEmpty + i * 8, kConsumerWarps);");
    FORWARD Sm90N128 "a multicast that does not wait for the other CTA":
        (RING "kEmpty + i * 8, kConsumerWarps * cluster);" => "kEmpty + i * 8, kConsumerWarps);")
        (CONSUMER "lane < place_.size) ptx::mbarrier_arrive(ptx::map_shared(held_, lane));"
            => "lane == 0) ptx::mbarrier_arrive(ptx::map_shared(held_, place_.rank));");
    // Tickets.
    FORWARD Sm90N128 "a ticket expected before its slot is free":
        (SCHEDULE "ptx::mbarrier_wait(barrier(Shape::kTicketEmpty), parity() ^ 1);\n    expect();"
            => "expect();\n    ptx::mbarrier_wait(barrier(Shape::kTicketEmpty), parity() ^ 1);");
    FORWARD Sm90N128 "a slot filled before it is free":
        (SCHEDULE "ptx::mbarrier_wait(barrier(Shape::kTicketEmpty), parity() ^ 1);" => "");
    FORWARD Sm90N128 "a slot let go before its ticket is read":
        (SCHEDULE "const uint32_t ticket = __shfl_sync(0xffffffffu, tickets.receive(), 0);\n    __syncwarp();\n    if (threadIdx.x % 32 == 0) tickets.release();"
            => "if (threadIdx.x % 32 == 0) tickets.release();\n    const uint32_t ticket = __shfl_sync(0xffffffffu, tickets.receive(), 0);\n    __syncwarp();");
    FORWARD Sm90N128 "the producer lets a slot go before its ticket is read":
        (SCHEDULE "ticket = tickets.receive();\n      tickets.release();" => "tickets.release();\n      ticket = tickets.receive();");
    FORWARD Sm90N128 "a ticket read before it is there":
        (SCHEDULE "ptx::mbarrier_wait(barrier(Shape::kTicketFull), parity());" => "");
    FORWARD Sm90N128 "slots that do not wait for the other producer":
        (RING "kConsumerWarps * cluster + cluster - 1);" => "kConsumerWarps * cluster);");
    FORWARD Sm90N128 "one slot's barriers for both":
        (SCHEDULE "return place_.smem + first + slot() * 8;" => "return place_.smem + first;");
    // Start and end.
    FORWARD Sm90N128 "barriers not fenced":
        (RING "    ptx::fence_mbarrier_init();\n" => "");
    FORWARD Sm90N128 "no barrier of the cluster at the start":
        (RING "\n  ptx::cluster_barrier_relaxed();" => "");
    BACKWARD Sm90N128 "no barrier of the CTA at the start":
        (RING "  __syncthreads();\n  ptx::cluster_barrier_relaxed();" => "  ptx::cluster_barrier_relaxed();");
    FORWARD Sm90N128 "no barrier of the cluster at the end":
        (SCHEDULE "ptx::cluster_barrier();  // nobody" => "__syncthreads();  // nobody");
    FORWARD Sm90N128 "shared memory left to stores at the end":
        (ROLES "if (consumer.is_first_thread()) ptx::store_wait_read<0>();" => "");
    FORWARD Sm90N128 "words not cleared":
        (SCHEDULE "*sync_word(sync, i) = 0;" => "(void)i;");
    FORWARD Sm90N128 "words cleared by whoever is first":
        (SCHEDULE "if (before != gridDim.x - 1) return;" => "if (before != 0) return;");
    FORWARD Sm90N128 "the last CTA does not acquire":
        (SYNC "atom.acq_rel.gpu" => "atom.release.gpu");
    // h on its way to those who read it.
    FORWARD Sm90N128 "a flag read without acquire":
        (SYNC "ld.acquire.gpu" => "ld.relaxed.gpu");
    FORWARD Sm90N128 "a flag raised without release":
        (SYNC "red.release.gpu" => "red.relaxed.gpu");
    FORWARD Sm90N128 "a flag waited for one slab short":
        (SCHEDULE "wait_for(flags.word(flag), flags.target(flag));" => "wait_for(flags.word(flag), flags.target(flag) - 1);");
    FORWARD Sm90N128 "a flag waited for without end":
        (SCHEDULE "< arrivals) __nanosleep" => "<= arrivals) __nanosleep");
    FORWARD Sm90N128 "another block's flag":
        (FORWARD_CU "wait_for_block(flags(p_.r_blocks), m / kBlockM);" => "wait_for_block(flags(p_.r_blocks), (m / kBlockM) ^ 1);");
    FORWARD Sm90N128 "copies of h not fenced":
        (SCHEDULE "__nanosleep(64);\n  ptx::fence_async_global();" => "__nanosleep(64);");
    FORWARD Sm90N128 "h published before it is written":
        (EPILOGUE "uint32_t word) {\n  consumer.barrier();" => "uint32_t word) {");
    // Boxes on their way out.
    FORWARD Sm90N128 "boxes stored without a fence":
        (EPILOGUE "    ptx::fence_async_shared();\n" => "");
    FORWARD Sm90N128 "boxes written again a store too early":
        (EPILOGUE "ptx::store_wait_read<kStoreBoxes - 1>();" => "ptx::store_wait_read<kStoreBoxes>();");
    FORWARD Sm90N128 "boxes written again at once":
        (EPILOGUE "if (consumer.is_first_thread()) ptx::store_wait_read<kStoreBoxes - 1>();" => "");
    FORWARD Sm90N128 "boxes written before the wait for their store":
        (EPILOGUE "ptx::store_wait_read<kStoreBoxes - 1>();\n    consumer.barrier();" => "ptx::store_wait_read<kStoreBoxes - 1>();");
    FORWARD Sm90N128 "boxes stored before they are complete":
        (EPILOGUE "ptx::fence_async_shared();\n    consumer.barrier();" => "ptx::fence_async_shared();");
    FORWARD Sm90N128 "one barrier for both slabs":
        (CONSUMER "ptx::named_barrier(1 + slab_, kWarpgroup)" => "ptx::named_barrier(1, kWarpgroup)");
    FORWARD Sm90N128 "boxes never committed":
        (EPILOGUE "      ptx::store_commit();  // an empty group keeps the count of boxes\n" => "");
    FORWARD Sm90N128 "no empty groups":
        (EPILOGUE "if (m < rows && col < cols) ptx::store_box(map, box, col, m);\n      ptx::store_commit();"
            => "if (m < rows && col < cols) { ptx::store_box(map, box, col, m); ptx::store_commit(); }");
    FORWARD Sm90N192 "the turn of boxes not continued across tiles":
        (CONSUMER "3, false>(acc);\n    drain();" => "3, false>(acc);\n    drain();\n    box_ = 0;");
    FORWARD Sm90N128 "another swizzle in stmatrix":
        (EPILOGUE "(chunk ^ box_row % 8)" => "(chunk ^ box_row % 4)");
    FORWARD Sm90N128 "bias of the wrong column":
        (FORWARD_CU "widen(bias[col + 1])" => "widen(bias[col])");
    FORWARD Sm90N128 "bias past the end":
        (FORWARD_CU "bias == nullptr || col >= columns" => "bias == nullptr");
    // Operands of the products.
    FORWARD Sm90N128 "stride and leading dimension swapped, K-major":
        (CONSUMER "kSlabBytes, 8 * kRowBytes" => "8 * kRowBytes, kSlabBytes");
    BACKWARD Sm90N128 "stride and leading dimension swapped, MN-major":
        (CONSUMER "kSlabBytes, 8 * kRow, kSwizzle" => "8 * kRow, kSlabBytes, kSwizzle");
    BACKWARD Sm90N128 "the widest swizzle for all":
        (CONSUMER "kRow == 64 ? ptx::Swizzle::k64" => "kRow == 64 ? ptx::Swizzle::k128");
    FORWARD Sm90N128 "steps of k too long, K-major":
        (CONSUMER "kStepK = 32;" => "kStepK = 64;");
    BACKWARD Sm90N128 "steps of k too short, MN-major":
        (CONSUMER "kStepMn = 16 *" => "kStepMn = 8 *");
    FORWARD Sm90N128 "the other slab's rows":
        (CONSUMER "slab_ * kSlabBytes);\n    const uint64_t b = kMnMajorB" => "(slab_ ^ 1) * kSlabBytes);\n    const uint64_t b = kMnMajorB");
    FORWARD Sm90N192 "the second block of a stage misplaced":
        (CONSUMER "stage + kBytesA + Kind::kN * kRowBytes);" => "stage + kBytesA + kRowBytes);");
    FORWARD Sm90N128 "both halves of w the same":
        (PRODUCER "b, k, n + half * kHalf);" => "b, k, n);");
    FORWARD Sm90N128 "the last step that reads h left out by the consumers":
        (FORWARD_CU "k_steps() + tail / 4, tail % 4" => "k_steps() + tail / 4, 0");
    FORWARD Sm90N128 "the last step that reads h left out":
        (FORWARD_CU "k_steps() + tail / 4, tail % 4" => "k_steps() + tail / 4, 0")
        (FORWARD_CU "ranks_read(m, r), r);" => "ranks_read(m, r), r / kBlockK * kBlockK);");
    FORWARD Sm90N128 "the last ranks left out":
        (FORWARD_CU ".steps(16, projection.r);" => ".steps(16, projection.r / 16 * 16);");
    FORWARD Sm90N128 "a step of k left out":
        (FORWARD_CU "(p_.k + kBlockK - 1) / kBlockK" => "p_.k / kBlockK");
    // h as it is stored.
    FORWARD Sm90N128 "h not scaled":
        (EPILOGUE "acc[4 * j + 2 * half] * factor" => "acc[4 * j + 2 * half]");
    FORWARD Sm90N128 "ranks past the end stored":
        (EPILOGUE "if (col >= cols) continue;" => "");
    FORWARD Sm90N128 "rows past the end stored":
        (EPILOGUE "if (row >= rows) continue;\n    T* const" => "T* const");
    // Gradients.
    BACKWARD Sm90N128 "the constants of the sums not fenced":
        (RING "\n    ptx::fence_async_shared();" => "");
    BACKWARD Sm90N128 "sums of not quite the tokens":
        (ROLES "0x3f803f80u" => "0x3f803f81u");
    BACKWARD Sm90N128 "dbias written by all lanes":
        (BACKWARD_CU "if (threadIdx.x % 4 == 0) store_gradient" => "store_gradient");
    BACKWARD Sm90N128 "dbias in every block of ranks":
        (BACKWARD_CU "magnitude || (is_db && projection.dbias != 0 && unit.n == 0)" => "magnitude || (is_db && projection.dbias != 0)");
    BACKWARD Sm90N128 "partial sums counted before they are written":
        (EPILOGUE "  consumer.barrier();  // and all have read the slot of the time before\n" => "");
    BACKWARD Sm90N128 "the count read before it is there":
        (EPILOGUE "1));\n  consumer.barrier();\n  return" => "1));\n  return");
    BACKWARD Sm90N128 "arrivals do not release":
        (SYNC "atom.acq_rel.gpu" => "atom.acquire.gpu");
    BACKWARD Sm90N128 "the last to arrive does not acquire":
        (SYNC "atom.acq_rel.gpu" => "atom.release.gpu");
    BACKWARD Sm90N128 "partial sums added from another chunk on":
        (EPILOGUE "sum[i] = load(mine, i);"
            => "sum[i] = load(mine + static_cast<uint64_t>(blockIdx.x % chunks) * stride, i);")
        (EPILOGUE "static_cast<uint64_t>(chunk) * stride" => "static_cast<uint64_t>((chunk + blockIdx.x) % chunks) * stride");
    BACKWARD Sm90N128 "both slabs leave their sums in one place":
        (BACKWARD_CU "unit.slab + consumer.slab();" => "unit.slab;");
    BACKWARD Sm90N128 "clusters leave their sums in one place":
        (BACKWARD_CU "blockIdx.x * kSlabs + consumer.slab()" => "place_.rank * kSlabs + consumer.slab()");
    BACKWARD Sm90N128 "a chunk's last tokens left out":
        (BACKWARD_CU "p_.m - unit.token);" => "p_.m - unit.token) / kBlockK * kBlockK;");
    BACKWARD Sm90N128 "da waits for the first block of dh alone":
        (BACKWARD_CU "(unit.tokens + kBlockM - 1) / kBlockM);" => "1);");
    BACKWARD Sm90N128 "the flags of a chunk looked at without acquire":
        (SCHEDULE "  ptx::fence_acquire();\n" => "");
    BACKWARD Sm90N128 "the last flag of a chunk left out":
        (SCHEDULE "flag <= last; flag += kPolled" => "flag < last; flag += kPolled")
        (SCHEDULE "flags.word(min(flag + i, last))" => "flags.word(min(flag + i, last - 1))");
    BACKWARD Sm90N128 "flags looked at and taken as they are":
        (SCHEDULE "while (!are_published()) __nanosleep(64);" => "are_published();");
    BACKWARD Sm90N128 "copies of dh not fenced":
        (SCHEDULE "__nanosleep(64);\n  ptx::fence_async_global();" => "__nanosleep(64);");
    BACKWARD Sm90N128 "copies of a chunk of dh not fenced":
        (SCHEDULE "ptx::fence_acquire();\n  ptx::fence_async_global();" => "ptx::fence_acquire();");
    BACKWARD Sm90N192 "stages of sums laid out otherwise by the producer":
        (BACKWARD_CU "product ? columns : kSumsN, product," => "columns, product,");
    BACKWARD Sm90N128 "dx overwritten, not accumulated":
        (BACKWARD_CU "widen(old[0]) + low" => "low");
    BACKWARD Sm90N128 "gradients overwritten, not accumulated":
        (ELEMENT "accumulate ? widen(*gmem) + value : value" => "value");
    BACKWARD Sm90N128 "a stage let go before its products are done, backward":
        (CONSUMER "ptx::wgmma_wait<1>();\n    release();" => "release();\n    ptx::wgmma_wait<1>();");
    // Dropout, of a stage in shared memory.
    FORWARD Sm90N128 "products of x without a fence after what is dropped":
        (CONSUMER "      ptx::fence_async_shared();\n      barrier();" => "      barrier();");
    FORWARD Sm90N128 "products of x before all has been dropped":
        (CONSUMER "      ptx::fence_async_shared();\n      barrier();" => "      ptx::fence_async_shared();");
    BACKWARD Sm90N128 "products of x without a fence after what is dropped, backward":
        (CONSUMER "      ptx::fence_async_shared();\n      barrier();" => "      barrier();");
    BACKWARD Sm90N128 "products of x before all has been dropped, backward":
        (CONSUMER "      ptx::fence_async_shared();\n      barrier();" => "      ptx::fence_async_shared();");
    FORWARD Sm90N192 "nothing dropped from the second block of a stage":
        (CONSUMER "i < count; ++i) {\n        alter" => "i < 1; ++i) {\n        alter");
    FORWARD Sm90N192 "the second block of a stage altered where the first is":
        (CONSUMER "alter(stage + i * (" => "alter(stage + 0 * (");
    FORWARD Sm90N128 "dropped from the other slab":
        (CONSUMER "* kRowBytes) + slab_ * kSlabBytes" => "* kRowBytes) + (slab_ ^ 1) * kSlabBytes");
    FORWARD Sm90N128 "the mask of the first slab for both":
        (FORWARD_CU "drop_slab(dropout, slab, row, block" => "drop_slab(dropout, slab, m, block");
    BACKWARD Sm90N128 "the mask of the first slab for both, backward":
        (BACKWARD_CU "const uint32_t col = unit.m + consumer.slab() * kSlabM;" => "const uint32_t col = unit.m;");
    BACKWARD Sm90N128 "the mask of the first chunk for all":
        (BACKWARD_CU "unit.token + picks.start(block, kBlockK), col" => "picks.start(block, kBlockK), col");
    FORWARD Sm90N128 "dropped without the swizzle":
        (DROP "block_col * 2 + i / 2) ^ g)" => "block_col * 2 + i / 2))");
    FORWARD Sm90N128 "x waited for by nobody before it is dropped":
        (CONSUMER "const uint32_t stage = begin();\n#pragma unroll 1\n" => "const uint32_t stage = ring_.data();\n#pragma unroll 1\n");
    BACKWARD Sm90N128 "dropped from dy too":
        (BACKWARD_CU "!is_db && drops()" => "drops()");
    FORWARD Sm90N128 "seed and offset read before they are there":
        (RING "  __syncthreads();\n  ptx::cluster_barrier_relaxed();" => "  ptx::cluster_barrier_relaxed();");
    FORWARD Sm90N128 "the offset of a graph from the call":
        (RING "dropout.offset : state[1]" => "dropout.offset : dropout.offset");
    // Dropout, of the tail of dx.
    BACKWARD Sm90N128 "dx before dh":
        (BACKWARD_CU "wait_for_block(flags(p_.dh_blocks), m / kBlockM);" => "");
    BACKWARD Sm90N128 "what is dropped of dx added too":
        (CONSUMER "if (kept.keeps(part, i)) acc" => "acc");
    BACKWARD Sm90N128 "columns without a draw in short tiles":
        (CONSUMER "for (; drawn < kept.kDraws; ++drawn)" => "for (; drawn < min(kept.kDraws, steps); ++drawn)");
    BACKWARD Sm90N192 "draws in another order":
        (DROP "col / 16 + i, thread" => "col / 16 + (kDraws - 1 - i), thread");
    BACKWARD Sm90N128 "the tail added before its products are done":
        (CONSUMER "ptx::wgmma_wait<0>();\n    ptx::pin(sum);" => "ptx::pin(sum);");
    BACKWARD Sm90N128 "the tail not fenced":
        (CONSUMER "ptx::wgmma_fence();  // of the part before\n" => "");
    BACKWARD Sm90N128 "dx added to before its products are done":
        (CONSUMER "    drain();\n    ptx::pin(acc);\n#pragma unroll 1" => "    ptx::pin(acc);\n#pragma unroll 1");
    BACKWARD Sm90N128 "the last steps of the tail left out":
        (CONSUMER "done < tail; done += 4" => "done + 4 <= tail; done += 4");
    BACKWARD Sm90N128 "a stage of the tail let go before its last part":
        (CONSUMER "    held_ = ring_.empty();\n    let_go();" => "")
        (CONSUMER "    const uint32_t stage = begin();\n#pragma unroll\n" => "    const uint32_t stage = begin();\n    held_ = ring_.empty();\n    let_go();\n#pragma unroll\n");
    // Projections that share x.
    FORWARD Sm90N128 "the projection before":
        (PROJECTIONS "index < first(" => "index <= first(");
    FORWARD Sm90N128 "the first scale for all":
        (PROJECTIONS "      scale = p.projections[at].scale;\n" => "");
    FORWARD Sm90N128 "ranks of h of the first projection":
        (FORWARD_CU "own_map(at, LORA_SM90_FORWARD_H)" => "own_map(0, LORA_SM90_FORWARD_H)");
    FORWARD Sm90N128 "y where the first projection's is":
        (FORWARD_CU "own_map(at, LORA_SM90_FORWARD_Y)" => "own_map(0, LORA_SM90_FORWARD_Y)");
    BACKWARD Sm90N128 "ranks of dh from the first on":
        (BACKWARD_CU "columns_from(p_.dh, projection.first_rank)" => "columns_from(p_.dh, 0)");
    BACKWARD Sm90N128 "db of the first ranks":
        (BACKWARD_CU "first_rank + unit.n," => "unit.n,");
    BACKWARD Sm90N128 "dx of another w":
        (BACKWARD_CU "own_map(at, LORA_SM90_BACKWARD_W)" => "own_map(0, LORA_SM90_BACKWARD_W)");
    BACKWARD Sm90N128 "dx waits for dh of all blocks of ranks but one":
        (BACKWARD_CU "wait_for_block(flags(p_.dh_blocks)" => "wait_for_block(flags(p_.dh_blocks - 1)");
    BACKWARD Sm90N128 "da waits for dh of all blocks of ranks but one":
        (BACKWARD_CU "wait_for_blocks(flags(p_.dh_blocks)" => "wait_for_blocks(flags(p_.dh_blocks - 1)");
    // DoRA.
    FORWARD Sm90N128 "the gain of the wrong column":
        (EPILOGUE "half + 1] *= factors.y" => "half + 1] *= factors.x");
    FORWARD Sm90N128 "the gain past the end":
        (EPILOGUE "    if (col >= cols) return;\n" => "");
    BACKWARD Sm90N128 "products of dy without a fence after the gain":
        (CONSUMER "    ptx::fence_async_shared();\n    barrier();" => "    barrier();");
    BACKWARD Sm90N128 "products of dy before all has its gain":
        (CONSUMER "    ptx::fence_async_shared();\n    barrier();" => "    ptx::fence_async_shared();");
    BACKWARD Sm90N128 "dy waited for by nobody before its gain":
        (CONSUMER "const uint32_t stage = begin();\n    alter" => "const uint32_t stage = ring_.data();\n    alter");
    BACKWARD Sm90N128 "the gain for the other slab":
        (CONSUMER "alter(stage + slab_ * kSlabBytes, i);" => "alter(stage + (slab_ ^ 1) * kSlabBytes, i);");
    BACKWARD Sm90N192 "the gain for dh in the tail too":
        (BACKWARD_CU "!= 0 ? p_.n_steps : 0," => "!= 0 ? p_.n_steps + tail / 4 : 0,");
    BACKWARD Sm90N128 "the gain without the swizzle":
        (GAIN "((col / 8) ^ row % 8) * 16" => "(col / 8) * 16");
    BACKWARD Sm90N128 "the gain past the end, backward":
        (GAIN "  if (col >= cols) return;\n" => "");
    BACKWARD Sm90N128 "db without its gain":
        (BACKWARD_CU "row < projection.n ? gain[row] : 1.0f" => "1.0f");
    BACKWARD Sm90N128 "y waited for by nobody":
        (CONSUMER "const uint32_t beside = begin();" => "const uint32_t beside = ring_.data();");
    BACKWARD Sm90N128 "dy and y let go before every lane has read them":
        (CONSUMER "      __syncwarp();  // every lane has read before one says so\n" => "");
    BACKWARD Sm90N128 "the stage of dy let go before its products are done":
        (CONSUMER "      drain();\n      held_ = ring_.empty();" => "      let_go();\n      held_ = ring_.empty();");
    BACKWARD Sm90N192 "y of the first block for both":
        (CONSUMER "beside + i * kBytesA + slab" => "beside + slab");
    BACKWARD Sm90N128 "the stage of y not expected by the consumers":
        (BACKWARD_CU "if (with_dm(unit, true)) {" => "if (with_dm(unit, true) && unit.tokens > kBlockK) {");
    BACKWARD Sm90N128 "dm in every block of ranks":
        (BACKWARD_CU ".magnitude.dm != 0 && unit.n == 0" => ".magnitude.dm != 0");
    BACKWARD Sm90N128 "the sums of dm read before they are there":
        (BACKWARD_CU "    if (p_.chunks == 1 && magnitude) consumer.barrier();  // one thread reads what others have left\n" => "");
    BACKWARD Sm90N128 "the sums of dm left where they are still read":
        (BACKWARD_CU "        consumer.barrier();  // what the tile before left in the same place was read\n" => "");
    BACKWARD Sm90N128 "dm without the last warp":
        (GAIN "warp < kWarpgroup / 32; ++warp" => "warp < kWarpgroup / 32 - 1; ++warp");
    // f32 factors.
    FORWARD Sm90N128 "split: h begun before factors are split":
        (FORWARD_CU "      wait_for_factors();\n" => "");
    BACKWARD Sm90N128 "split: dh begun before factors are split":
        (BACKWARD_CU "      wait_for_factors();\n" => "");
    FORWARD Sm90N128 "split: one slab of threads not waited for":
        (ROLES "kSlabs * p_.split.units);" => "kSlabs * p_.split.units - 1);");
    FORWARD Sm90N128 "split: half of the units not waited for":
        (ROLES "kSlabs * p_.split.units);" => "p_.split.units);");
    FORWARD Sm90N128 "split: waited for without acquire":
        (ROLES "wait_for(sync_word(p_.sync, LORA_SYNC_SPLIT), kSlabs * p_.split.units);"
            => "{ while (ptx::load_relaxed(sync_word(p_.sync, LORA_SYNC_SPLIT)) < kSlabs * p_.split.units) __nanosleep(64); ptx::fence_async_global(); }");
    BACKWARD Sm90N128 "split: copies of halves not fenced":
        (ROLES "wait_for(sync_word(p_.sync, LORA_SYNC_SPLIT), kSlabs * p_.split.units);"
            => "while (ptx::load_acquire(sync_word(p_.sync, LORA_SYNC_SPLIT)) < kSlabs * p_.split.units) __nanosleep(64);");
    FORWARD Sm90N128 "split: published before it is written":
        (ROLES "publish(consumer, p_.sync, LORA_SYNC_SPLIT);"
            => "if (consumer.is_first_thread()) ptx::add_release(sync_word(p_.sync, LORA_SYNC_SPLIT), 1);");
    BACKWARD Sm90N128 "split: published without release":
        (ROLES "publish(consumer, p_.sync, LORA_SYNC_SPLIT);"
            => "consumer.barrier(); if (consumer.is_first_thread()) ptx::atomic_add_relaxed(sync_word(p_.sync, LORA_SYNC_SPLIT), 1);");
    FORWARD Sm90N128 "split: one unit for both CTAs":
        (ROLES "ticket * place_.size + place_.rank;" => "ticket * place_.size;");
    BACKWARD Sm90N128 "split: units past the last":
        (ROLES "    if (unit >= p_.split.units) return;\n" => "");
    FORWARD Sm90N128 "split: one slab of threads for both":
        (ROLES "threadIdx.x - kWarpgroup, kSlabs * kWarpgroup);" => "threadIdx.x % kWarpgroup, kSlabs * kWarpgroup);");
    FORWARD Sm90N128 "split: high halves of h taken for low ones":
        (EPILOGUE "low = high + 4;" => "low = high;");
    FORWARD Sm90N128 "split: h of rows past the end":
        (EPILOGUE "if (row >= rows) continue;\n    const Routes::Row route = routes.is_on() ? routes.row(row) : Routes::Row(0);\n#pragma unroll\n    for (int j = 0; j < kN / 8; j += 2)"
            => "const Routes::Row route = routes.is_on() ? routes.row(row) : Routes::Row(0);\n#pragma unroll\n    for (int j = 0; j < kN / 8; j += 2)");
    FORWARD Sm90N128 "split: halves of ranks of other adapters kept":
        (EPILOGUE "return routes.is_on() ? route.keep(value * scale, rank) : value * scale;" => "return value * scale;");
    FORWARD Sm90N128 "split: blocks of triples as of ranks":
        (ROLES "is_split() ? 3 : 1" => "1");
    BACKWARD Sm90N128 "split: blocks of pairs as of ranks":
        (ROLES "return is_split() ? 2 : 1;" => "return 1;");
    BACKWARD Sm90N128 "split: of a cluster's rows those of one CTA":
        (ROLES "const uint32_t rows = place_.size * kBlockM;" => "const uint32_t rows = kBlockM;");
    FORWARD Sm90N128 "split: ranks that all rows go through alone":
        (ROUTES "__any_sync(" => "__all_sync(");
    BACKWARD Sm90N128 "split: gradients of high halves alone":
        (BACKWARD_CU "value = whole<T>(value, sum[j + 4 - j / 4 % 2 * 4]);" => "");
    BACKWARD Sm90N128 "split: gradients where pairs are":
        (BACKWARD_CU "col = is_db ? rank_of(col) : row_of_a(p_, col);" => "");
    BACKWARD Sm90N128 "split: tiles of da as wide as triples":
        (BACKWARD_CU "is_split() ? p_.r / 3 * 2 : p_.r" => "p_.r");
    BACKWARD Sm90N128 "split: gradients of ranks past the last":
        (BACKWARD_CU "is_split() ? p_.split.ranks[at] : p_.projections[at].r" => "p_.projections[at].r");
    FORWARD Sm90N128 "split: the first projection's ranks and scale for all":
        (SPLIT "group * kColumns >= p.projections[at + 1].first_rank" => "false");
    BACKWARD Sm90N128 "split: ranks of dh from the first on":
        (BACKWARD_CU "p_.dh, row, projection.first_rank + n," => "p_.dh, row, n,");
    BACKWARD Sm90N128 "split: da of the first rows":
        (SPLIT "++at) before += p.split.ranks[at];" => "++at) {}");
    FORWARD Sm90N128 "split: halves of b in one place":
        (SPLIT "(is_a ? 0 : before) * to_next" => "0 * to_next");
    // Instructions that have a stronger relative.
    FORWARD Sm90N128 "the cluster does not release at the end":
        (MBARRIER "barrier.cluster.arrive.release.aligned" => "barrier.cluster.arrive.relaxed.aligned");
};
