"""Every CUDA kernel, in every variant, becomes the machine code that runs: optimised at link time, as numba-cuda does, for
compute capabilities 8.0, 8.9, 9.0 (an H100 or H200 gets sm_90a) and, if the compiler has it, 10.0 (sm_100a).

Tests compile every variant for 8.0 and 9.0, every SHARE-th for the others too.
No driver and no GPU is needed, only the wheels of the extra `cuda`. What the assembler reports for each is compared with
registers.csv: registers per thread, bytes of shared memory per block, of stack and of spilled registers per thread.

- Registers may differ by REGISTERS: Numba's instruction order varies (with one compiler version, two runs differ by up to
  16), and other versions allocate them differently. A kernel with launch bounds obeys them anyway.
- Shared memory is determined by the source. Stack and spills are 0 unless the table says otherwise: a local array that is
  not kept in registers, or too many live values, would cost memory accesses in the innermost loop.
- No kernel that stores other types contains a float64 instruction: on most GPUs these are 2 to 64 times as slow.
- Inline PTX that a warp executes together is convergent: the compiler must not move it to where fewer lanes come by.

`python -m tests.cuda.test_compile --write` rewrites the table; the diff then shows the cost of a change.
"""

import concurrent.futures
import csv
import functools
import importlib
import importlib.util
import multiprocessing
import os
import pathlib
import re
import sys
import time
from typing import NamedTuple

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = HERE / "registers.csv"
COLUMNS = ("kernel", "variant", "arch", "registers", "shared", "stack", "spills")
ARCHITECTURES = ((8, 0), (8, 9), (9, 0, "a"), (10, 0, "a"))  # as numba-cuda names what it compiles for
ALWAYS = ((8, 0), (9, 0, "a"))
MOST_RUN = (9, 0, "a")
SHARE = 5
REGISTERS = 24
WORKERS = int(os.environ.get("NUMDCN_TEST_WORKERS", 2))


def missing():
    """Which part of the compiler is not installed; None if complete."""
    for package in ("numba_cuda", "cuda.bindings", "cuda.core"):
        try:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed: pip install -e .[cuda]"
        except ModuleNotFoundError:
            return f"{package} is not installed: pip install -e .[cuda]"
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        for library in ("nvvm", "nvJitLink", "nvrtc"):
            load_nvidia_dynamic_lib(library)
    except Exception as error:
        return f"{library} cannot be loaded: {str(error).splitlines()[0]}: pip install -e .[cuda]"
    return None


def makers():
    """Every kernel of the library, by name."""
    for path in sorted((ROOT / "numdcn" / "_cuda").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    from numdcn._cuda import jit

    return {maker.name: maker for maker in jit.MAKERS}


def told(constants):
    """A variant, as named in the table."""
    return " ".join(str(constant) for constant in constants)


def jobs():
    """(kernel, variant) of everything to compile, in the order of the table."""
    return [(name, told(constants)) for name, maker in sorted(makers().items()) for constants in maker.variants()]


def sm(arch):
    """An architecture, as named in the table."""
    return "sm_" + "".join(map(str, arch))


@functools.cache
def supported():
    """The architectures that the installed compiler has."""
    from numba.cuda.cudadrv import nvrtc

    return [arch for arch in ARCHITECTURES if arch[:2] in nvrtc.get_supported_ccs()]


def rows_to_come():
    """(kernel, variant, architecture) of the expected rows."""
    return {
        (name, told(constants), sm(arch))
        for name, maker in makers().items()
        for constants in maker.variants()
        for arch in architectures(maker, constants)
    }


def architectures(maker, constants):
    """The architectures a variant is compiled for: those from `_needs` on."""
    least = maker.needs(*constants) if hasattr(maker, "needs") else _needs(maker, constants)
    return [arch for arch in supported() if arch >= least]


def _needs(maker, constants):
    """16-byte atomic adds came with 9.0; kernels that use them have a flag VECTORS."""
    code = maker.make.__code__
    flags = dict(zip(code.co_varnames[: code.co_argcount], constants, strict=True))
    return (9, 0) if flags.get("VECTORS") else (8, 0)


class Compiled(NamedTuple):
    """What became of a variant."""

    rows: list  # of the table
    doubles: list  # lines of the PTX with float64
    together: list  # inline PTX that a warp executes together, a line of LLVM IR for each


def found(job):
    """The maker and the constants of a variant."""
    name, variant = job
    maker = makers()[name]
    return maker, next(c for c in maker.variants() if told(c) == variant)


def built(job):
    """A variant as a library of numba-cuda; types are found as for a GPU of 9.0."""
    from numba.cuda import compiler

    maker, constants = found(job)
    library, _ = compiler._compile_pyfunc_with_fixup(  # what `cuda.compile` and the dispatcher do; of its library they ask one output
        maker.make(*constants), maker.signature(*constants), device=False, abi="numba", cc=MOST_RUN[:2],
        **maker.options(*constants),
    )  # fmt: skip
    return library


def compiled(job, wanted=ARCHITECTURES):
    """A variant for these architectures: types are found once, the rest for each."""
    (name, variant), (maker, constants), library = job, found(job), built(job)
    rows = [
        (name, variant, sm(arch), *assembled(library, arch))
        for arch in architectures(maker, constants)
        if arch in wanted
    ]
    ptx, _ = linked(library, MOST_RUN, "ptx", ptx=True)
    doubles = [line.strip() for line in ptx.decode().splitlines() if re.search(r"\.f64\b", line)]
    llvm = library.get_llvm_str().splitlines()
    return Compiled(rows, doubles, [line.strip() for line in llvm if " asm " in line and ".sync" in line])


def linked(library, arch, target, **options):
    """(code, log) of a library of numba-cuda, optimised at link time."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    code = ObjectCode.from_ltoir(bytes(library.get_ltoir(cc=arch)))
    linker = Linker(code, options=LinkerOptions(arch=sm(arch), link_time_optimization=True, **options))
    return bytes(linker.link(target).code), linker.get_info_log()


def assembled(library, arch):
    """(registers, shared memory, stack, spills) of the machine code."""
    code, log = linked(library, arch, "cubin", ptxas_options=["-v"])
    assert code[:4] == b"\x7fELF" and "Used" in log, log
    patterns = (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes stack", r"(\d+) bytes spill stores")
    return tuple(max(map(int, re.findall(pattern, log)), default=0) for pattern in patterns)


def compile_all(wanted, share=1):
    """What becomes of all jobs, as a pool of processes finishes them; every share-th is compiled for all architectures."""
    chosen = [ARCHITECTURES if number % share == 0 else ALWAYS for number in range(len(wanted))]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        yield from pool.map(compiled, wanted, chosen)


def read_table():
    with TABLE.open(newline="", encoding="utf-8") as file:
        return {tuple(row[:3]): tuple(map(int, row[3:])) for row in list(csv.reader(file))[1:]}


def write_table(rows):
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


@pytest.fixture(scope="module")
def results():
    reason = missing()
    if reason:
        pytest.skip(reason)
    start, wanted = time.perf_counter(), jobs()
    found = list(compile_all(wanted, SHARE))
    print(f"\n{len(found)} variants compiled in {time.perf_counter() - start:.0f} s")
    print("{:<48} {:<28} {:<6} {:>9} {:>7} {:>6} {:>6}".format(*COLUMNS))
    for one in found:
        for row in one.rows:
            print("{:<48} {:<28} {:<6} {:>9} {:>7} {:>6} {:>6}".format(*row))
    return found


def test_every_operator_has_kernels():
    """No GPU: the list of kernels needs only numba-cuda."""
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed: pip install -e .[test]")
    assert len(jobs()) > 20
    modules = {maker.make.__module__ for maker in makers().values()}
    for room in ("attention", "conv", "roi", "points"):
        assert any(m.startswith(f"numdcn._cuda.{room}.") for m in modules), room


@pytest.mark.full
def test_registers_and_memory(results):
    """As in the table: no more stack or spills, about as many registers."""
    known = {*map(sm, supported())}
    table = {key: row for key, row in read_table().items() if key[2] in known}
    rows = {row[:3]: row[3:] for one in results for row in one.rows}
    wanted = rows_to_come()
    assert table.keys() == wanted, (
        f"registers.csv is not of these kernels: {sorted(wanted ^ table.keys())[:4]}; write it anew by "
        "python -m tests.cuda.test_compile --write"
    )
    assert {key for key in wanted if key[2] in map(sm, ALWAYS)} <= rows.keys() <= wanted
    assert {key[2] for key in rows} == known
    wrong = []
    for key, (registers, shared, stack, spills) in rows.items():
        r, s, k, p = table[key]
        if abs(registers - r) > REGISTERS or shared != s or stack > k or spills > p:
            wrong.append((*key, (registers, shared, stack, spills), "expected", table[key]))
    assert not wrong


@pytest.mark.full
def test_no_stack_and_no_spills(results):
    assert not [row for one in results for row in one.rows if row[5] or row[6]]


@pytest.mark.full
def test_no_float64_in_narrower_kernels(results):
    wrong = {
        one.rows[0][:2]: one.doubles[:3] for one in results if one.doubles and not one.rows[0][1].startswith("float64")
    }
    assert not wrong


@pytest.mark.full
def test_what_a_warp_does_together_is_convergent(results):
    """Products, and reads of their operands. (Shuffles and barriers are the compiler's own, which knows.)"""
    lines = [line for one in results for line in one.together]
    assert any("mma.sync" in line for line in lines) and any("ldmatrix.sync" in line for line in lines)
    assert not [line for line in lines if not line.endswith(" convergent")]


def main():
    """Compiles everything and prints a line for each: `--write` writes the table, a name selects kernels."""
    start, names = time.perf_counter(), [a for a in sys.argv[1:] if a != "--write"]
    table = []
    for one in compile_all([job for job in jobs() if not names or names[0] in job[0]]):
        for row in one.rows:
            print(*row, f"{len(one.doubles)} lines of float64, after {time.perf_counter() - start:.0f} s", flush=True)
        table += one.rows
    if "--write" in sys.argv and not names:
        write_table(table)
        print(f"{TABLE} written")


if __name__ == "__main__":
    main()
