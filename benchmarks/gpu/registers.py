"""The multiprocessor resources of each CUDA kernel, summarised from tests/cuda/registers.csv.

`python -m benchmarks.gpu.registers` prints the table; docs/design/gpu.md contains it.
"""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.gpu.page import tell
from benchmarks.harness.report import table

COMMAND = "python -m benchmarks.gpu.registers"
ROOT = Path(__file__).resolve().parents[2]
FILE = "registers.csv"  # in tests/ or a subfolder; written by a test
REGISTERS = 65536  # per multiprocessor
THREADS, WARP = 256, 32
STEP = 8  # granularity of registers per thread
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
MOST_RUN = "sm_90a"  # of an H100 or H200


def blocks(registers: int) -> int:
    """Blocks of THREADS threads that fit a multiprocessor, as limited by registers."""
    warps = REGISTERS // (-(-registers // STEP) * STEP * WARP)
    return warps // (THREADS // WARP)


def span(low: float, high: float) -> str:
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def row(name: str, records: list[dict[str, str]]) -> list[str]:
    """The line of one kernel."""
    variants = {(r["kernel"], r["variant"]) for r in records}
    by_arch = {arch: sorted(int(r["registers"]) for r in records if r["arch"] == arch) for arch in ARCHITECTURES}
    shared = sorted(int(r["shared"]) / 1024 for r in records)
    most = by_arch[MOST_RUN]
    spilled = sum(int(r["stack"]) + int(r["spills"]) > 0 for r in records)
    cells = [span(found[0], found[-1]) if found else "-" for found in by_arch.values()]
    cells += [span(shared[0], shared[-1]), span(blocks(most[-1]), blocks(most[0])), str(spilled)]
    return [name, str(len(variants)), *cells]


def most_registers(kernel: tuple[str, list[dict[str, str]]]) -> tuple[int, str]:
    """The sort key of the lines."""
    name, records = kernel
    return -max(int(r["registers"]) for r in records), name


def text() -> str:
    """A row for each kernel, most registers first; numbers over all variants and architectures."""
    path = next((ROOT / "tests").rglob(FILE))
    kernels: dict[str, list[dict[str, str]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            module, _, kernel = record["kernel"].rpartition(".")
            name = f"{module.split('.')[0]}.{kernel}" if not module.startswith("_") else kernel
            kernels.setdefault(name, []).append(record)
    rows = [row(f"`{name}`", records) for name, records in sorted(kernels.items(), key=most_registers)]
    rows.append(row("all", [record for records in kernels.values() for record in records]))
    head = ["kernel", "variants", *(f"{arch}: registers" for arch in ARCHITECTURES), "shared KB"]
    head += [f"{MOST_RUN}: blocks by registers ({THREADS} threads)", "with stack or spills"]
    return "\n".join(table(head, rows, left=1)).rstrip() + "\n"


if __name__ == "__main__":
    tell(COMMAND, text())
