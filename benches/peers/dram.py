#!/usr/bin/env python3
"""Bytes that kernels read from memory and write to it, as ncu counts them, beside what the operation needs.

    ncu --profile-from-start off --csv --page raw --print-units base --metrics dram__bytes_read.sum,dram__bytes_write.sum \\
        --log-file dram.csv tax --once --json launches.json
    python3 benches/peers/dram.py launches.json dram.csv benches/results/<gpu>-<date>-<commit>-dram.json

The first command launches each operation of this crate once; the second puts the counts into its rows, kernel by kernel, and fails
where they are not the same kernels in the same order. ncu empties the caches before each kernel; what a kernel leaves in L2 when it
ends is in no count, of whichever way. peers.py counts the others' kernels with the same reader.
"""
import csv
import io
import json
import sys
from pathlib import Path

METRICS = {"read": "dram__bytes_read.sum", "written": "dram__bytes_write.sum"}
# ncu's names, where it was not told --print-units base. Decimal, as it prints them.
UNITS = {"byte": 1, "Kbyte": 10**3, "Mbyte": 10**6, "Gbyte": 10**9, "Tbyte": 10**12}
KEPT = ("op", "way", "dtype", "m", "n", "k", "r", "dropout", "adapters", "dora", "projections", "floor_bytes", "what")


class Unreadable(Exception):
    """Why a file is not what ncu or `tax --once` writes."""


def kernels(text):
    """[{name, read, written}] of each kernel in what `ncu --csv --page raw` prints: names of columns, their units, the kernels."""
    table = list(csv.reader(io.StringIO("\n".join(line for line in text.splitlines() if line.startswith('"')))))
    if len(table) < 2:
        said = [line for line in text.splitlines() if line.startswith("==")]
        raise Unreadable("no kernel was counted" + (f"; ncu says: {said[-1]}" if said else ""))
    header, units, *rows = table
    wanted = {"name": "Kernel Name"} | METRICS
    missing = [column for column in wanted.values() if column not in header]
    if missing:
        raise Unreadable(f"there is no column {', '.join(missing)}")
    at = {name: header.index(column) for name, column in wanted.items()}
    counted = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(header) or len(units) != len(header):
            raise Unreadable(f"kernel {number} has {len(row)} columns of {len(header)}, and there are {len(units)} units")
        counted.append({"name": row[at["name"]].split("(")[0]})
        for name in METRICS:
            unit, value = units[at[name]], row[at[name]].replace(",", "")
            if unit not in UNITS:
                raise Unreadable(f"{METRICS[name]} is in `{unit}`, expected {', '.join(UNITS)}")
            try:
                counted[-1][name] = round(float(value) * UNITS[unit])
            except (ValueError, OverflowError):
                raise Unreadable(f"{METRICS[name]} of kernel {number}, {counted[-1]['name']}, is `{value}`") from None
    return counted


def counts(counted):
    """The fields of a row whose call made these kernels."""
    read, written = (sum(kernel[name] for kernel in counted) for name in METRICS)
    return {"dram_bytes": read + written, "dram_bytes_read": read, "dram_bytes_written": written, "launches": len(counted)}


def joined(run, counted):
    """The file of `tax --once` with the counts in the place of times."""
    launched, got = [row["what"] for row in run["rows"]], [kernel["name"] for kernel in counted]
    if launched != got:
        at = next((at for at, pair in enumerate(zip(launched, got)) if pair[0] != pair[1]), min(len(launched), len(got)))
        name = lambda names: names[at] if at < len(names) else "none"
        raise Unreadable(f"{len(launched)} kernels were launched and {len(got)} counted; the first that differs is number {at + 1}: "
                         f"{name(launched)} launched, {name(got)} counted")
    rows = [{field: row[field] for field in KEPT if field in row} | counts([kernel]) for row, kernel in zip(run["rows"], counted)]
    return run | {"rows": rows}


def table(rows):
    lines = []
    for row in rows:
        shape = f"{row['m']} x {row['n']} x {row['k']}"
        lines.append(f"{row['op']:<9} {shape:>20} R={row['r']:<4} read {row['dram_bytes_read'] / 2**20:9.1f} MiB  "
                     f"written {row['dram_bytes_written'] / 2**20:8.1f} MiB  needed {row['floor_bytes'] / 2**20:8.1f} MiB  "
                     f"{row['dram_bytes'] / row['floor_bytes']:5.2f} x")
    return "\n".join(lines)


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    launches, log, out = map(Path, sys.argv[1:])
    try:
        run = joined(json.loads(launches.read_text()), kernels(log.read_text()))
    except (OSError, Unreadable, ValueError) as error:
        sys.exit(f"dram: {launches} and {log}: {error}")
    out.write_text(json.dumps(run, indent=1) + "\n")
    print(table(run["rows"]))


if __name__ == "__main__":
    main()
