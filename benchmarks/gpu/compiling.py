"""All kernels that a GPU can run, compiled on all CPUs into the cache on disk, those with the most registers first.

A child process (`python -m benchmarks.gpu --compiler`) has a pool of as many processes as there are CPUs and prints a line of
JSON for each kernel, so that it can be stopped at any moment. The processes need no lock: each kernel is a file of its own,
which appears whole or not at all (numdcn/_cache.py).
"""

from __future__ import annotations

import concurrent.futures
import csv
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import ROOT, Job
from benchmarks.gpu.registers import FILE
from benchmarks.harness.machine import available_cpus

ROOMS = {  # the folder of numdcn/_cuda that has an operator's kernels
    **dict.fromkeys(("deform_conv", "conv", "deform_conv_layer"), "conv"),
    **dict.fromkeys(("ms_deform_attn", "dcnv3", "dcnv4"), "attention"),
    **dict.fromkeys(("bilinear_sample", "arrays"), "points"),
    **dict.fromkeys(
        ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_roi_pool", "deform_ps_roi_pool"), "roi"
    ),
}

STORED = {  # the kinds of arrays, and the types in which kernels see them
    "float32": "float32",
    "tf32": "float32",
    "float64": "float64",
    "float16": "float16",
    "bfloat16": "uint16",
}


def makers() -> dict[str, Any]:
    """Every kernel of the library, by name."""
    for path in sorted((ROOT / "numdcn" / "_cuda").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    from numdcn._cuda import jit

    return {maker.name: maker for maker in jit.MAKERS}


def runs(maker: Any, constants: tuple[Any, ...]) -> bool:
    """Whether the GPU can run a variant: 16-byte atomic adds, the flag VECTORS, came with compute capability 9.0."""
    from numdcn._cuda.jit import has_vector_reductions

    code = maker.make.__code__
    flags = dict(zip(code.co_varnames[: code.co_argcount], constants, strict=True))
    return not flags.get("VECTORS") or has_vector_reductions(0)


def heaviness() -> dict[tuple[str, str], int]:
    """The registers of each kernel and variant, as the register table has them. The more, the longer it compiles."""
    found: dict[tuple[str, str], int] = {}
    path = next((ROOT / "tests").rglob(FILE), None)
    if path is not None:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                key = row["kernel"], row["variant"]
                found[key] = max(found.get(key, 0), int(row["registers"]))
    return found


def takes(constants: tuple[Any, ...], kinds: set[str]) -> bool:
    """Whether a variant may be needed for arrays of these kinds: sums, and perhaps coordinates, are float32 beside them."""
    named = {str(constant) for constant in constants} & set(STORED.values())
    return named <= {STORED.get(kind, kind) for kind in kinds} | {"float32"}


def chosen(operators: Iterable[str], kinds: Iterable[str] = STORED) -> list[tuple[str, int]]:
    """(kernel, number of the variant) of what these operators need for these kinds of arrays, the heaviest first. An operator
    that ROOMS lacks may need any."""
    rooms, known = {ROOMS.get(name, "") for name in operators}, heaviness()
    found = []
    for name, maker in makers().items():
        room = name.removeprefix("_cuda.").split(".")[0]
        if room in ROOMS.values() and room not in rooms and "" not in rooms:
            continue
        for number, constants in enumerate(maker.variants()):
            if runs(maker, constants) and takes(constants, {*kinds}):
                weight = known.get((name, " ".join(map(str, constants))), 0)
                found.append((-weight, name, number))
    return [(name, number) for _, name, number in sorted(found)]


def load(job: tuple[str, int]) -> dict[str, Any]:
    """Compile a variant, or read it from the cache, and load it onto the GPU, in a process of the pool."""
    name, number = job
    start, error, compiled = time.monotonic(), "", False
    try:
        maker = makers()[name]
        kernel = maker(*list(maker.variants())[number])
        kernel.load(0)
        compiled = bool(sum(kernel.dispatcher.stats.cache_misses.values()))
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}".splitlines()[0][:300]
    seconds = round(time.monotonic() - start, 2)
    return {"kernel": name, "variant": number, "seconds": seconds, "compiled": compiled, "error": error}


def compiler(operators: Iterable[str], kinds: Iterable[str]) -> int:
    """The child process."""
    jobs = chosen(operators, kinds)
    print(json.dumps({"kernels": len(jobs)}), flush=True)
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(len(available_cpus()), len(jobs)))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(load, job) for job in jobs]):
            print(json.dumps(done.result()), flush=True)
    return 0


def compile_all(operators: Iterable[str], kinds: Iterable[str], deadline: float) -> dict[str, Any]:
    """Runs the child process until the deadline; what it did."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--compiler", "--operators", ",".join(operators)]
    command += ["--kinds", ",".join(kinds)]
    with tempfile.TemporaryDirectory() as folder:
        job = Job("compile", command, Path(folder))
        try:
            while not job.done() and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            job.finish()
        return told(job)


def told(job: Job) -> dict[str, Any]:
    """What the child process printed, as a record for the report."""
    lines = [json.loads(line) for line in job.output.splitlines() if line.startswith("{") and line.endswith("}")]
    kernels = next((line["kernels"] for line in lines if "kernels" in line), None)
    done = [line for line in lines if "kernel" in line]
    record = {
        "kernels": kernels,
        "done": len(done),
        "compiled": sum(line["compiled"] for line in done),
        "seconds": round(job.seconds, 1),
        "slowest": sorted(done, key=lambda line: -line["seconds"])[:3],
        "failed": [line for line in done if line["error"]],
        "stopped": job.late,
        "trouble": "",
    }
    if not job.late and (job.process.returncode or kernels != len(done)):
        record["trouble"] = f"exit code {job.process.returncode}: {job.last_line}"
    return {**record, "text": sentence(record)}


def sentence(record: dict[str, Any]) -> str:
    """A record in words."""
    text = f"{record['done']} of {record['kernels']} kernels are on disk after {record['seconds']:.0f} s"
    text += f", {record['compiled']} of them compiled now" if record["compiled"] else ""
    if record["slowest"]:
        slowest = record["slowest"][0]
        text += f"; the slowest, {slowest['kernel']}, took {slowest['seconds']:.1f} s"
    if record["stopped"]:
        text += "; STOPPED, the others compile when they are needed"
    if record["failed"]:
        first = record["failed"][0]
        text += f"; {len(record['failed'])} FAILED, the first is {first['kernel']}: {first['error']}"
    return text + (f"; FAILED: {record['trouble']}" if record["trouble"] else "") + "."


def is_well(record: dict[str, Any]) -> bool:
    return not record["failed"] and not record["trouble"]
