//! What can be wrong with the portable kernels: edits of their sources.

use super::altered::Edit;

pub const FORWARD: &str = "portable_forward";
pub const BACKWARD: &str = "portable_backward";

/// One edit of a source file of an image.
pub struct Defect {
    pub what: &'static str,
    pub image: &'static str,
    pub edit: Edit<'static>,
}

const fn defect(
    what: &'static str,
    image: &'static str,
    file: &'static str,
    old: &'static str,
    new: &'static str,
) -> Defect {
    Defect { what, image, edit: Edit { file, old, new } }
}

const TILE: &str = "portable/tile.cuh";
const SCHEDULE: &str = "portable/schedule.cuh";
const EPILOGUE: &str = "portable/epilogue.cuh";
const ELEMENT: &str = "element.cuh";
const SYNC: &str = "ptx/sync.cuh";
const DROPOUT: &str = "dropout.cuh";
const PROJECTIONS: &str = "projections.cuh";
const SPLIT: &str = "split.cuh";
const MIDDLE: &str = "portable/middle.cuh";

pub const DEFECTS: [Defect; 69] = [
    defect(
        "no barrier per step",
        FORWARD,
        TILE,
        "__syncthreads();  // the stage is complete for all, and the one about to be overwritten was read by all",
        "",
    ),
    defect(
        "copies waited for one step late",
        FORWARD,
        TILE,
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
    ),
    defect(
        "no barrier after the wait",
        FORWARD,
        TILE,
        "__syncthreads();  // what one thread acquired, all may read",
        "",
    ),
    defect("flag read without acquire", FORWARD, SYNC, "ld.acquire.gpu", "ld.relaxed.gpu"),
    defect("flag raised without release", FORWARD, SYNC, "red.release.gpu", "red.relaxed.gpu"),
    defect("flag not waited for", FORWARD, TILE, "< target) __nanosleep", "< target - 1) __nanosleep"),
    defect(
        "flag waited for a step late",
        FORWARD,
        TILE,
        "dependency.must_wait(step)",
        "dependency.must_wait(step - 1)",
    ),
    defect("flag waited for without end", FORWARD, TILE, "< target) __nanosleep", "<= target) __nanosleep"),
    defect(
        "h published before it is written",
        FORWARD,
        SCHEDULE,
        "publish_word(uint32_t word) {\n    __syncthreads();",
        "publish_word(uint32_t word) {",
    ),
    defect("words not cleared", FORWARD, SCHEDULE, "sync_[i] = 0;", "(void)i;"),
    defect(
        "one word for tickets and arrivals",
        BACKWARD,
        SCHEDULE,
        "broadcast<kArrival>(before)",
        "broadcast<kTicket>(before)",
    ),
    defect(
        "partial sums counted before they are written",
        BACKWARD,
        "portable/backward.cu",
        "{ mine[index * Tile::kThreads] = value; });\n  __syncthreads();",
        "{ mine[index * Tile::kThreads] = value; });",
    ),
    defect("rows loaded past the end", FORWARD, TILE, "row + i * kRowStep < row_end ? cols : 0", "cols"),
    defect("columns loaded past the end", FORWARD, TILE, "min(col_end - col, static_cast<uint32_t>(kChunkElems))", "8"),
    defect("rows stored past the end", FORWARD, EPILOGUE, "if (row >= rows) continue;\n        float", "float"),
    defect("columns stored past the end", FORWARD, EPILOGUE, "if (col >= cols) continue;", ""),
    defect(
        "tail one step short",
        FORWARD,
        TILE,
        "main.steps + tail.steps;",
        "main.steps + tail.steps - (tail.steps != 0);",
    ),
    defect(
        "main one step short",
        FORWARD,
        TILE,
        "(a.k_end - k_begin + kBlockK - 1) / kBlockK",
        "(a.k_end - k_begin) / kBlockK",
    ),
    defect(
        "narrow tiles cut too short",
        FORWARD,
        TILE,
        "warp_col + j * 8 >= active_n",
        "warp_col + j * 8 + 8 >= active_n",
    ),
    defect("bias of the wrong column", FORWARD, EPILOGUE, "widen(bias[col + 1])", "widen(bias[col])"),
    defect("B read transposed", BACKWARD, TILE, "ptx::ldmatrix_x4_trans(b,", "ptx::ldmatrix_x4(b,"),
    defect(
        "partial sums added in order of arrival",
        BACKWARD,
        "portable/backward.cu",
        "for_each_register([&](int index, float& value) { value = first[index * Tile::kThreads]; });\n#pragma unroll 1\n  \
         for (uint32_t other = 1; other < p.chunks; ++other) {\n    const float* const partial = first + \
         static_cast<uint64_t>(other) * p.partial_stride;",
        "#pragma unroll 1\n  for (uint32_t other = 1; other < p.chunks; ++other) {\n    const float* const partial = first \
         + static_cast<uint64_t>((chunk + other) % p.chunks) * p.partial_stride;",
    ),
    defect("last arriver does not acquire", BACKWARD, SYNC, "atom.acq_rel.gpu", "atom.release.gpu"),
    defect("arrivals do not release", BACKWARD, SYNC, "atom.acq_rel.gpu", "atom.acquire.gpu"),
    defect(
        "a chunk's last rows left out",
        BACKWARD,
        "portable/backward.cu",
        "min(token + p.chunk_rows, p.m)",
        "min(token + p.chunk_rows - 1, p.m)",
    ),
    defect(
        "gradient overwritten, not accumulated",
        BACKWARD,
        ELEMENT,
        "accumulate ? widen(*gmem) + value : value",
        "value",
    ),
    defect(
        "dropout: words in another order",
        FORWARD,
        DROPOUT,
        "kept(x[i], random.of[i])",
        "kept(x[i], random.of[i ^ 3])",
    ),
    defect("dropout: key not advanced", FORWARD, DROPOUT, "key0 += 0x9e3779b9u;", ""),
    defect("dropout: offset not read", FORWARD, DROPOUT, "state[1]", "state[0]"),
    defect(
        "dropout: of the base product's x",
        FORWARD,
        "portable/forward.cu",
        "Drops::kNone, false> tile;\n  tile.accumulate(main, tail, m, n, Shape::kBlock, h, {}, smem, InOrder{}, ranks);",
        "Drops::kA, false> tile;\n  tile.accumulate(main, tail, m, n, Shape::kBlock, h, {p.dropout}, smem, InOrder{}, ranks);",
    ),
    defect("dropout: halves not swapped", BACKWARD, DROPOUT, "__shfl_xor_sync(0xffffffffu, given, 4)", "given"),
    defect("dropout: of dy for db", BACKWARD, "portable/backward.cu", "if (!is_da) way.dropout.threshold = 0;", ""),
    defect(
        "dropout: tail begun before dh is there",
        BACKWARD,
        "portable/backward.cu",
        "p.dropout.threshold != 0 ? 0 : p.n_steps",
        "p.n_steps",
    ),
    defect("dropout: tail not dropped from", BACKWARD, TILE, "drop_accumulators(Dropout(dropout), m, n);", ""),
    defect(
        "routes: units without a step pass no barrier",
        BACKWARD,
        "portable/backward.cu",
        "if (tokens.steps == 0) __syncthreads();",
        "",
    ),
    defect(
        "routes: ranks of other adapters kept",
        FORWARD,
        "routes.cuh",
        "return kept ? value",
        "return kept || true ? value",
    ),
    defect(
        "routes: blocks of the row before",
        FORWARD,
        "routes.cuh",
        "mask |= block(at);",
        "mask |= block(at >= LORA_ROUTE_ROWS ? at - LORA_ROUTE_ROWS : at);",
    ),
    defect("dropout: of the base product too", BACKWARD, TILE, "drops ? first_steps : steps", "steps"),
    defect("shared: the projection before", FORWARD, PROJECTIONS, "index < first(", "index <= first("),
    defect("shared: the first scale for all", FORWARD, PROJECTIONS, "      scale = p.projections[at].scale;\n", ""),
    defect(
        "shared: ranks of h from the first on",
        FORWARD,
        "portable/forward.cu",
        "columns_from(p.h, projection.first_rank)",
        "columns_from(p.h, 0)",
    ),
    defect(
        "shared: ranks of dh from the first on",
        BACKWARD,
        "portable/backward.cu",
        "p, p.dh, projection.first_rank, m,",
        "p, p.dh, 0, m,",
    ),
    defect(
        "shared: db of the first ranks",
        BACKWARD,
        "portable/backward.cu",
        "columns_from(p.h, of.first_rank)",
        "columns_from(p.h, 0)",
    ),
    defect(
        "shared: steps of dx counted on",
        BACKWARD,
        "portable/backward.cu",
        "start(step - of.first_step)",
        "start(step)",
    ),
    defect(
        "shared: dx waits for dh of all projections but one",
        BACKWARD,
        "portable/middle.cuh",
        "units / p.m_blocks, row, 1)",
        "units / p.m_blocks - 1, row, 1)",
    ),
    defect("split: h begun before factors are split", FORWARD, MIDDLE, SPLIT_AWAITED, ""),
    defect("split: dh begun before factors are split", BACKWARD, MIDDLE, SPLIT_AWAITED, ""),
    defect("split: one unit not waited for", FORWARD, SCHEDULE, "1, units, units, 0}", "1, units - 1, units - 1, 0}"),
    defect(
        "split: published before it is written",
        FORWARD,
        SCHEDULE,
        "publish_word(LORA_SYNC_SPLIT);",
        "if (ptx::thread_index() == 0) ptx::add_release(sync_ + LORA_SYNC_SPLIT, 1);",
    ),
    defect(
        "split: published without release",
        BACKWARD,
        SCHEDULE,
        "publish_word(LORA_SYNC_SPLIT);",
        "__syncthreads();\n    if (ptx::thread_index() == 0) ptx::atomic_add_relaxed(sync_ + LORA_SYNC_SPLIT, 1);",
    ),
    defect("split: low halves of sums left out", FORWARD, SPLIT, "fmaf(low, 1.0f / kLowScale<T>, high)", "high"),
    defect("split: low halves of h left out", FORWARD, SPLIT, "low = pack<T>(rests.x, rests.y);", "low = 0;"),
    defect("split: high by low left out", BACKWARD, SPLIT, "high_damped = pack<T>(", "high_damped = 0 * pack<T>("),
    defect("split: ranks past the last", FORWARD, SPLIT, "row < p.ranks[at] ?", "row <= p.ranks[at] ?"),
    defect(
        "split: gradients of high halves alone",
        BACKWARD,
        "portable/backward.cu",
        "value = whole<T>(value, tile.acc[0][j + 1 - j % 2][2 * half + e]);",
        "",
    ),
    defect(
        "split: halves of ranks of other adapters kept",
        FORWARD,
        EPILOGUE,
        "return routes.is_on() ? route.keep(value * scale, rank) : value * scale;",
        "return value * scale;",
    ),
    defect(
        "split: the first projection's ranks and scale for all",
        FORWARD,
        SPLIT,
        "group * kColumns >= p.projections[at + 1].first_rank",
        "false",
    ),
    defect(
        "split: ranks of dh from the first on",
        BACKWARD,
        MIDDLE,
        "m, first + n, p.m, groups)",
        "m, n, p.m, groups)",
    ),
    defect("split: da of the first rows", BACKWARD, SPLIT, "++at) before += p.split.ranks[at];", "++at) {}"),
    defect(
        "split: ranks of a projection from the first on",
        BACKWARD,
        SPLIT,
        "rank_of(col - p.projections[at].first_rank)",
        "rank_of(col)",
    ),
    defect(
        "split: rows of a of the first projection",
        FORWARD,
        SPLIT,
        "before += is_a ? p.ranks[at] :",
        "before += is_a ? 0 :",
    ),
    defect("split: halves of b in one place", BACKWARD, SPLIT, "(is_a ? 0 : before) * to_next", "0 * to_next"),
    defect(
        "split: b of the first projection",
        FORWARD,
        SPLIT,
        "is_a ? p.a.ptr : p.b[at].ptr",
        "is_a ? p.a.ptr : p.b[0].ptr",
    ),
    defect("split: blocks of pairs as of ranks", FORWARD, MIDDLE, "? n / kNarrowN / 2 :", "? n / kNarrowN :"),
    defect("split: blocks of triples as of ranks", BACKWARD, MIDDLE, "is_split ? 3 : 1", "1"),
    defect(
        "split: rows of a tile's pairs as of ranks",
        BACKWARD,
        "portable/backward.cu",
        "? 2 : 1;  // columns",
        "? 1 : 1;",
    ),
    defect(
        "split: no rows of a tile within a block of ranks",
        BACKWARD,
        "routes.cuh",
        "~((1ull << rank / LORA_ROUTE_RANKS) - 1)",
        "~up_to(rank)",
    ),
    defect(
        "split: ranks of the wrong block of routes",
        FORWARD,
        "routes.cuh",
        "mask >> rank / LORA_ROUTE_RANKS & 1",
        "mask >> rank / LORA_ROUTE_RANKS & 2",
    ),
    defect("split: ranks that all rows go through alone", BACKWARD, "routes.cuh", "__any_sync(", "__all_sync("),
];

const SPLIT_AWAITED: &str = "if (p.split.units != 0) wait_for(depends_on_split(p.sync, p.split.units));";
