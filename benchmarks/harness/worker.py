"""One contender in a separate process, driven by JSON lines: `Worker` is the parent's end, `serve` the child's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from benchmarks.cases.operators import operator
from benchmarks.harness.machine import available_cpus
from benchmarks.rivals.contender import Contender, Unsupported

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMDCN_NUM_THREADS")
PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
TOLERANCE = {"float32": 1e-3, "float64": 1e-9}  # relative to the root mean square of the result
SET_BYTES = 256 << 20  # two sets of inputs alternate if both fit
SLOW = 3.0  # seconds after which a turn ends, complete or not; a run of half of that needs no warm-up
CHECKOUT = "NUMDCN_CHECKOUT"  # environment variable: a folder whose numdcn is measured instead; see compare.py
FINGERPRINT = 64  # numbers used to compare whole results


class WorkerFailed(Exception):
    """The process of a contender died or did not answer."""


def own_environment() -> dict[str, str]:
    """The environment without variables that would lead another Python to this one's packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


class Worker:
    """The parent's end: starts the process, asks, reads the answer."""

    def __init__(
        self,
        operator: str,
        contender: str,
        threads: int,
        spin: bool = False,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        module: str = "benchmarks.harness.worker",
    ) -> None:
        self.contender, self.threads = contender, threads
        variables = dict.fromkeys(THREAD_VARIABLES, str(threads)) | ({} if spin else PASSIVE) | (env or {})
        kept = dict(os.environ) if python == sys.executable else own_environment()
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by close
        self.process = subprocess.Popen(
            [python, "-m", module, operator, contender, str(threads), str(int(spin))],
            cwd=ROOT,
            env=kept | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
        )
        self.stdin = cast("IO[str]", self.process.stdin)
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for line in cast("IO[str]", self.process.stdout):
            self.answers.put(line)
        self.answers.put("")

    def ask(self, do: str, limit: float = 900, **what: Any) -> dict[str, Any]:
        """One request and its answer; WorkerFailed with the process's last output if none comes."""
        try:
            self.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.stdin.flush()
            line = self.answers.get(timeout=limit)
        except (OSError, ValueError):
            line = ""
        except queue.Empty:
            self.process.kill()
            raise WorkerFailed(f"no answer within {limit:.0f} s") from None
        if not line:
            raise WorkerFailed(self.last_words())
        return json.loads(line)

    def last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return f"process ended with {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        try:
            self.stdin.close()
            self.process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.log.close()


class Served:
    """The child's end: holds the contender and answers requests, one method each."""

    def __init__(self, operator_name: str, name: str, threads: int, spin: bool) -> None:
        self.operator = operator(operator_name)
        self.contender_class: type[Contender] = self.operator.contender(name)
        start = time.perf_counter()
        self.contender = self.contender_class(threads, spin)
        self.import_seconds = time.perf_counter() - start
        self.case: Any = None
        self.weights: Any = None

    def hello(self) -> dict[str, Any]:
        file = getattr(sys.modules.get(self.contender_class.module), "__file__", None)
        return {"version": self.contender_class.version(), "import_seconds": self.import_seconds, "file": file}

    def load(self, case: str) -> dict[str, Any]:
        """Creates the layer; answers what is not supported."""
        self.load_case(self.operator.cases[case])
        return {}

    def load_case(self, case: Any) -> None:
        self.case = case
        self.weights = self.operator.make_weights(case, self.contender_class.dtype)
        self.contender.load(case, self.weights)

    def inputs(self, seed: int, direction: str) -> Any:
        return self.operator.make_inputs(self.case, seed, self.contender_class.dtype, direction == "backward")

    def verify(self, direction: str) -> dict[str, Any]:
        """Relative errors of a result against the float64 reference; and a few numbers that fingerprint the whole
        result."""
        if direction not in self.contender_class.directions:
            raise Unsupported(f"no {direction}")
        inputs, case = self.inputs(0, direction), self.case
        got, names = self.call(direction)(self.contender.convert(inputs)), case.differentiable
        if self.contender_class.plain:
            case, inputs, names = self.operator.plain(case, inputs)
        if direction == "forward":
            arrays = {"y": self.contender.result(got)}
            errors = {"y": self.operator.forward_error(case, inputs, self.weights, arrays["y"])}
        else:
            arrays = self.contender.gradients(got)
            errors = self.operator.backward_errors(case, inputs, self.weights, arrays, names)
        name, worst = max(errors.items(), key=lambda item: item[1])
        answer = {"errors": errors, "worst": f"error {worst:.2g} in {name}", "right": worst <= self.tolerance}
        if self.operator.compared and not self.contender_class.plain and answer["right"]:
            answer["whole"] = {name: fingerprint(a) for name, a in arrays.items()}
        return answer

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.contender_class.dtype]

    def call(self, direction: str) -> Callable[[Any], Any]:
        return self.contender.forward if direction == "forward" else self.contender.backward

    def time(self, direction: str, seed: int, seconds: float, fewest: int, most: int) -> dict[str, Any]:
        """Times of runs in seconds: at least `fewest` and `seconds` in all, at most `most`; inputs rotate.

        A turn ends once its runs have taken SLOW seconds, and a first warm-up run of half of that counts as one of them.
        """
        first = self.inputs(seed, direction)
        sets = [first] if first.nbytes > SET_BYTES else [first, self.inputs(seed + 1, direction)]
        given = [self.contender.convert(inputs) for inputs in sets]
        call, clock = self.call(direction), time.perf_counter
        gc.collect()
        gc.disable()
        start, runs, spent = clock(), 0, 0.0
        while (runs < len(given) or spent < min(0.05, seconds)) and spent < SLOW / 4:  # warm-up
            call(given[runs % len(given)])
            runs, spent = runs + 1, clock() - start
        times = [spent] if runs == 1 and spent > SLOW / 2 else []
        while len(times) < most and sum(times) < SLOW and (len(times) < fewest or sum(times) < seconds):
            arguments = given[len(times) % len(given)]
            start = clock()
            result = call(arguments)
            times.append(clock() - start)
            del result
        gc.enable()
        return {"times": [float(f"{t:.4g}") for t in times]}

    def first(self, case: str, directions: list[str]) -> dict[str, Any]:
        """Seconds of the first call of each direction, including loading the layer."""
        self.case, seconds = self.operator.cases[case], {}
        inputs = self.inputs(0, "backward")
        weights = self.operator.make_weights(self.case, self.contender_class.dtype)
        for direction in directions:
            given = inputs if direction == "backward" else inputs._replace(grad_y=None)
            start = time.perf_counter()
            self.contender.load(self.case, weights)
            self.call(direction)(self.contender.convert(given))
            seconds[direction] = time.perf_counter() - start
        return {"seconds": seconds, "import_seconds": self.import_seconds}

    def memory(self, case: str, direction: str) -> dict[str, Any]:
        """Memory of one call in bytes: `extra` is the growth of the peak resident size minus what the call returns,
        `held` what loading the layer had taken before, minus room for y.

        A warm-up at a tiny shape of the same case loads code.
        """
        full, tiny = self.operator.cases[case], self.operator.tiny(self.operator.cases[case])
        self.load_case(tiny)
        self.call(direction)(self.contender.convert(self.inputs(1, direction)))
        unloaded = reset_peak()
        self.load_case(full)
        loaded = reset_peak()
        inputs = self.inputs(1, direction)
        given = self.contender.convert(inputs)
        before = reset_peak()
        result = self.call(direction)(given)
        grown = status_bytes("VmHWM") - before
        if direction == "backward":
            returned = sum(a.nbytes for a in self.contender.gradients(result).values())
        else:
            returned = self.contender.result(result).nbytes
        own = self.contender.y_bytes()
        return {
            "extra": grown - (0 if direction == "forward" and own else returned),
            "held": loaded - unloaded - own,
            "returned": returned,
            "x": inputs.x.nbytes,
            "inputs": inputs.nbytes,
        }


def fingerprint(a: np.ndarray) -> list[float]:
    """Sums of an array's blocks under random signs, each about N(0, 1); differing elements show up in them."""
    flat = np.asarray(a, np.float64).ravel()
    signs = 2.0 * np.random.default_rng(7).integers(0, 2, flat.size, dtype=np.int8) - 1
    blocks = min(FINGERPRINT, flat.size)
    sums = np.add.reduceat(flat * signs, np.arange(blocks) * flat.size // blocks)
    scale = np.sqrt(np.mean(flat**2) * flat.size / blocks) + 1e-30
    return [float(f"{value:.7g}") for value in sums / scale]


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def reset_peak() -> int:
    """Resets the peak resident size; returns the current size. OSError if the system does not support it."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # otherwise reused memory would hide growth
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return status_bytes("VmRSS")


def serve(operator_name: str, name: str, threads: int, spin: bool, kind: type[Served] = Served) -> None:
    """Answers requests until stdin ends, as methods of a `kind`. Libraries that print cannot interfere: stdout is redirected first."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, available_cpus()[-threads:])
    if checkout := os.environ.get(CHECKOUT):
        sys.path.insert(0, checkout)
        importlib.import_module("numdcn")
        sys.path.remove(checkout)  # the benchmarks are those of this folder
    served = kind(operator_name, name, threads, spin)
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            answer = getattr(served, do)(**request)
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
