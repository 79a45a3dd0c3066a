"""Every CUDA kernel, in every variant, is compiled to machine code for compute capability 8.0 and 9.0 by the real
compiler.

No driver and no GPU is needed, only the wheels of the extra `cuda`. What the compiler reports for each is compared with
registers.csv: registers per thread, bytes of shared memory per block, of stack and of spilled registers per thread.

- Registers may differ by REGISTERS: Numba's instruction order varies (with one compiler version, two runs differ by up to
  16), and other versions allocate them differently. A kernel with launch bounds obeys them anyway.
- Shared memory is determined by the source. Stack and spills are 0 unless the table says otherwise: a local array that is
  not kept in registers, or too many live values, would cost memory accesses in the innermost loop.
- No kernel that stores other types contains a float64 instruction: on most GPUs these are 2 to 64 times as slow.

`python -m tests.cuda.test_compile --write` rewrites the table; the diff then shows the cost of a change.
"""

import concurrent.futures
import csv
import importlib
import importlib.util
import multiprocessing
import os
import pathlib
import re
import sys
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TABLE = HERE / "registers.csv"
COLUMNS = ("kernel", "variant", "arch", "registers", "shared", "stack", "spills")
ARCHITECTURES = ((8, 0), (9, 0))
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


def rows_to_come():
    """(kernel, variant, architecture) of the expected rows."""
    return {
        (name, told(constants), "sm_{}{}".format(*arch))
        for name, maker in makers().items()
        for constants in maker.variants()
        for arch in architectures(maker, constants)
    }


def architectures(maker, constants):
    """The architectures a variant is compiled for: those from `_needs` on."""
    least = maker.needs(*constants) if hasattr(maker, "needs") else _needs(maker, constants)
    return [arch for arch in ARCHITECTURES if arch >= least]


def _needs(maker, constants):
    """16-byte atomic adds came with 9.0; kernels that use them have a flag VECTORS."""
    code = maker.make.__code__
    flags = dict(zip(code.co_varnames[: code.co_argcount], constants, strict=True))
    return (9, 0) if flags.get("VECTORS") else (8, 0)


def compiled(job):
    """The rows of the table for a job, and the lines of its PTX with float64. The PTX is that of the lowest
    architecture, as for others only the name differs."""
    from numba import cuda

    name, variant = job
    maker = makers()[name]
    constants = next(c for c in maker.variants() if told(c) == variant)
    wanted = architectures(maker, constants)
    ptx, _ = cuda.compile(
        maker.make(*constants), maker.signature(*constants), device=False, abi="numba", cc=wanted[0], output="ptx",
        **maker.options(*constants),
    )  # fmt: skip
    doubles = [line.strip() for line in ptx.splitlines() if re.search(r"\.f64\b", line)]
    return [(name, variant, "sm_{}{}".format(*arch), *assembled(ptx, arch)) for arch in wanted], doubles


def assembled(ptx, arch):
    """(registers, shared memory, stack, spills) of PTX assembled into a cubin."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch="sm_{}{}".format(*arch), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    code, log = linker.link("cubin").code, linker.get_info_log()
    assert code[:4] == b"\x7fELF" and "Used" in log, log
    patterns = (r"Used (\d+) registers", r"(\d+) bytes stack", r"(\d+) bytes spill stores")
    registers, stack, spills = (max(map(int, re.findall(pattern, log)), default=0) for pattern in patterns)
    shared = sum(map(int, re.findall(r"^\s*(?:\.\w+ )*\.shared [^;]*\[(\d+)\];", ptx, re.MULTILINE)))  # not in the log
    return registers, shared, stack, spills


def compile_all(wanted):
    """Rows of all jobs, as a pool of processes finishes them."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        yield from pool.map(compiled, wanted)


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
    found = list(compile_all(wanted))
    print(f"\n{len(found)} variants compiled in {time.perf_counter() - start:.0f} s")
    print("{:<48} {:<28} {:<6} {:>9} {:>7} {:>6} {:>6}".format(*COLUMNS))
    for rows, _ in found:
        for row in rows:
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
    table = read_table()
    rows = {row[:3]: row[3:] for rows, _ in results for row in rows}
    assert rows.keys() == rows_to_come()
    assert rows.keys() == table.keys(), (
        f"registers.csv is not of these kernels: {sorted(rows.keys() ^ table.keys())[:4]}; write it anew by "
        "python -m tests.cuda.test_compile --write"
    )
    wrong = []
    for key, (registers, shared, stack, spills) in rows.items():
        r, s, k, p = table[key]
        if abs(registers - r) > REGISTERS or shared != s or stack > k or spills > p:
            wrong.append((*key, (registers, shared, stack, spills), "expected", table[key]))
    assert not wrong


@pytest.mark.full
def test_no_stack_and_no_spills(results):
    assert not [row for rows, _ in results for row in rows if row[5] or row[6]]


@pytest.mark.full
def test_no_float64_in_narrower_kernels(results):
    wrong = {rows[0][:2]: lines[:3] for rows, lines in results if not rows[0][1].startswith("float64") and lines}
    assert not wrong


def main():
    """Compiles everything and prints a line for each: `--write` writes the table, a name selects kernels."""
    start, names = time.perf_counter(), [a for a in sys.argv[1:] if a != "--write"]
    table = []
    for rows, lines in compile_all([job for job in jobs() if not names or names[0] in job[0]]):
        for row in rows:
            print(*row, f"{len(lines)} lines of float64, after {time.perf_counter() - start:.0f} s", flush=True)
        table += rows
    if "--write" in sys.argv and not names:
        write_table(table)
        print(f"{TABLE} written")


if __name__ == "__main__":
    main()
