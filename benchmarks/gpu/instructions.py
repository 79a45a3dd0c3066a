"""The instructions of a kernel's loops, counted in the machine code.

    python -m benchmarks.gpu.instructions forward_tiles "float32 float32 True 128 64"

compiles the variants whose constants start like this, for an H100, and prints a row for each loop with a product or a read of
global memory in it: the instructions between its label and its last jump back, without those of the loops within it.
Branches that are not always taken are counted too. It needs the extra `cuda` and `nvdisasm` (of nvidia-cuda-nvdisasm), and no GPU.
"""

from __future__ import annotations

import collections
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.report import table

ROOT = Path(__file__).resolve().parents[2]
ARCH = (9, 0, "a")
KINDS = {  # the first that matches an instruction's name
    "product": r"FFMA|DFMA|HMMA",
    "global memory": r"LDG|STG|RED|ATOM|LDGSTS",
    "shared memory": r"LDS|STS|LDSM",
    "float": r"F|D|HADD|HFMA|MUFU|I2F|F2I",
    "integer": r"I|LEA|LOP|SHF|SGXT|PRMT|VI|R2UR|UI|ULEA|ULOP|USHF|UPRMT|USEL|SEL|PLOP|P2R|R2P",
    "move": r"MOV|UMOV|CS2R|S2R|ULDC|LDC",
}
LINE = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/)\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)(.*);")


class Loop(NamedTuple):
    """Lines first to last of the code, and the instructions in them that no inner loop has."""

    first: int
    last: int
    own: list[str]


def nvdisasm() -> str:
    """The disassembler: on the path, or in the package of the same name."""
    found = shutil.which("nvdisasm")
    for folder in map(Path, sys.path):
        for name in (folder / "nvidia").glob("*/bin/nvdisasm") if not found else ():
            found = str(name)
    if not found:
        raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    return found


def compile_test() -> Any:
    """The test that compiles kernels, whose functions this uses."""
    sys.path[:0] = [str(ROOT)]
    return importlib.import_module("tests.cuda.test_compile")


def listing(job: tuple[str, str]) -> list[str]:
    """The machine code of a variant, line by line."""
    compiling = compile_test()
    code, _ = compiling.linked(compiling.built(job), ARCH, "cubin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )


def loops(lines: list[str]) -> list[Loop]:
    """The loops of a listing, inner ones first."""
    labels = {line[:-1]: number for number, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    spans: dict[int, int] = {}
    code = {number: match for number, line in enumerate(lines) if (match := LINE.match(line))}
    for number, match in code.items():
        target = re.search(r"`\((\.L\w+)\)", match[2])
        if match[1].startswith("BRA") and target and labels.get(target[1], number) < number:
            spans[labels[target[1]]] = max(number, spans.get(labels[target[1]], 0))
    found, taken = [], set()
    for first, last in sorted(spans.items(), key=lambda span: span[1] - span[0]):
        mine = [number for number in code if first <= number <= last and number not in taken]
        taken.update(mine)
        found.append(Loop(first, last, [code[number][1] for number in mine]))
    return found


def kind(name: str) -> str:
    """The kind of an instruction; `other` for jumps, barriers and the like."""
    return next((k for k, pattern in KINDS.items() if re.match(pattern, name)), "other")


def rows(title: str, lines: list[str]) -> list[list[str]]:
    """A row of the table for each loop that multiplies or reads."""
    made = []
    for loop in loops(lines):
        counts = collections.Counter(map(kind, loop.own))
        if counts["product"] or counts["global memory"]:
            made.append(
                [title, f"{loop.first}-{loop.last}", str(len(loop.own)), *(str(counts[k]) for k in (*KINDS, "other"))]
            )
    return made


def main() -> None:
    """Prints the table for the kernel and constants named by the arguments."""
    kernel, constants = [*sys.argv[1:], ""][:2]
    chosen = [job for job in compile_test().jobs() if job[0].endswith(f".{kernel}") and job[1].startswith(constants)]
    made = [row for job in chosen for row in rows(f"{kernel} {job[1]}", listing(job))]
    print("\n".join(table(["variant", "lines", "instructions", *KINDS, "other"], made, left=2)))


if __name__ == "__main__":
    main()
