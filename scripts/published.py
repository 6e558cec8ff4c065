"""Figures that others published for the same operations, beside what was measured here: `scripts/report --peers`.

What is compared was measured on one machine. A published figure stands beside it with its own GPU; the two are not divided.
"""
import math

GRID = [(m, d) for d in (4096, 5120, 8192) for m in range(2048, 8193, 1024)]
# CentML/lorafusion: README and paper (EuroSys 2026); bytes from its plot script; the tuning times of an H100 NVL from its issue 8.
KERNELS = "LoRAFusion, H100 80GB: 1.27 × on average, 1.39 × at most (with dropout 0.1)"
BYTES = {4096: ("1.258", "2.008"), 5120: ("1.836", "2.771"), 8192: ("4.044", "5.289")}
TAXES = {"forward": "LoRAFusion, H100 NVL: +5 % (0.293 over 0.278 ms, x Aᵀ not in it)",
         "backward": "LoRAFusion, H100 NVL: +2.5 % (0.284 over 0.277 ms, the kernel of dx alone)"}


def find(rows, field, op, way, shape, r=16, dropout=0.0):
    """A field of the row, None where it was not measured. A step that this crate was not timed in is its two launches."""
    m, n, k = shape
    for row in rows:
        if (row["op"], row["way"], row["m"], row["n"], row["k"], row["r"]) == (op, way, m, n, k, r) and \
                row.get("dtype", "bf16") == "bf16" and (row.get("dropout") or 0.0) == dropout and row.get(field) is not None and \
                not row.get("dora") and not row.get("full") and (row.get("adapters") or 1) == (row.get("projections") or 1) == 1:
            return row[field]
    if op == "step" and way in ("fused", "unfused", "cublaslt"):
        parts = [find(rows, field, part, way, shape, r, dropout) for part in ("forward", "backward")]
        return None if None in parts else sum(parts)
    return None


def speedup(rows, op, way, over, shapes, dropout):
    """How many times faster a way is than another: the geometric mean and the most, over the shapes that have both."""
    pairs = [(find(rows, "us", op, way, (m, d, d), dropout=dropout), find(rows, "us", op, over, (m, d, d), dropout=dropout))
             for m, d in shapes]
    ratios = [theirs / ours for ours, theirs in pairs if ours and theirs]
    if not ratios:
        return "not measured"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.2f} × on average, {max(ratios):.2f} × at most ({len(ratios)} of {len(shapes)} shapes)"


def gibibytes(rows, way, d, dropout):
    counted = find(rows, "dram_bytes", "step", way, (8192, d, d), dropout=dropout)
    return "not measured" if counted is None else f"{counted / 2**30:.3f} GiB"


def table(rows):
    """(what, published, [(who, measured)])"""
    for op in ("forward", "step"):
        for dropout in (0.1, 0.0):
            ways = [(way, speedup(rows, op, way, "torch", GRID, dropout)) for way in ("fused", "lorafusion", "compiled", "merged")]
            yield f"{op} over torch's, M = 2048 … 8192, N = K = 4096, 5120, 8192, R = 16, dropout {dropout:g}", KERNELS, ways
    for d, (theirs, torch) in BYTES.items():
        for dropout in (0.1, 0.0):
            ways = [(way, gibibytes(rows, way, d, dropout)) for way in ("fused", "lorafusion", "torch")]
            published = f"LoRAFusion {theirs} GiB, torch {torch} GiB (with dropout 0.1)"
            yield f"bytes of memory of a step, M = 8192, N = K = {d}, R = 16, dropout {dropout:g}", published, ways
    for op, published in TAXES.items():
        times = [find(rows, "us", op, way, (4096, 4096, 4096), r) for way, r in (("fused", 16), ("cublaslt", 0))]
        tax = "not measured" if None in times else f"{100 * (times[0] / times[1] - 1):+.1f} %"
        yield f"{op} over the plain product, M = N = K = 4096, R = 16, all of LoRA in it", published, [("fused", tax)]
    few = [(m, 4096) for m in (1, 4, 16, 64, 256)]
    yield ("forward of few tokens over separate products, M = 1 … 256, N = K = 4096, R = 16", "none",
           [("fused", speedup(rows, "forward", "fused", "unfused", few, 0.0))])


def lines(machines):
    """machines: name -> rows."""
    out = []
    for name, rows in machines.items():
        out += [f"{name}", ""]
        for what, published, ways in table(rows):
            out += [f"  {what}", f"    published   {published}"] + [f"    {way:<11} {measured}" for way, measured in ways] + [""]
    return out or ["nothing was measured"]
