"""Every operator on a GPU, forward and backward, in every type, against float64 results of the CPU and against
torchvision."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.device import Device
from benchmarks.gpu.forms import TWO_STEPS, form, takes_two_steps
from benchmarks.gpu.problems import MAKERS, SMALL, TINY, Expected, Problem, make
from benchmarks.gpu.reference import SIGNED, expected
from benchmarks.gpu.rivals import Rival, as_numdcn, rivals

DTYPES = ("float32", "tf32", "float64", "float16", "bfloat16")


class Verdict(NamedTuple):
    """The verdict of one comparison."""

    operator: str
    what: str
    status: str  # right, wrong, missing (not implemented), failed, skipped
    worst: float = 0.0  # the largest difference, in bounds
    detail: str = ""


def failure(error: Exception, operator: str) -> tuple[str, str]:
    """(status, detail) for an exception raised by a call."""
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("numdcn._cuda"):
        return "missing", f"{operator} has no GPU code"
    return "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]


def worst(got: np.ndarray, want: Expected, dtype: str, rounded: bool, times: float = 1.0) -> float:
    """The largest difference in units of its bound; infinite for a different shape or a NaN."""
    if tuple(got.shape) != want.value.shape or not np.isfinite(got).all():
        return float("inf")
    excess = np.abs(got.astype(np.float64) - want.value) / (times * want.bound(dtype, rounded))
    return float(excess.max()) if excess.size else 0.0


def judge(results: dict[str, np.ndarray], wanted: dict[str, Expected], dtype: str, rounded: bool) -> tuple[float, str]:
    """The worst of some results, and a description of it."""
    found = {name: worst(got, wanted[name], dtype, rounded) for name, got in results.items()}
    name = max(found, key=lambda key: found[key])
    return found[name], "" if found[name] <= 1 else f"{name} is off by {found[name]:.3g} bounds"


class Given(NamedTuple):
    """A problem on the GPU."""

    problem: Problem
    arrays: dict[str, Any]
    grad_y: Any
    dtype: str  # float32, tf32, float64, float16 or bfloat16
    narrow: bool = False  # whether coordinates have the arrays' type if that is half

    @property
    def stored(self) -> str:
        return "float32" if self.dtype == "tf32" else self.dtype

    def call(self, direction: str, **more: Any) -> dict[str, Any]:
        if self.dtype == "tf32":
            more["allow_tf32"] = True
        return self.problem.call(direction, self.arrays, self.grad_y, **more)


def give(device: Device, problem: Problem, dtype: str, narrow: bool = False) -> Given:
    """The problem on the GPU."""
    stored = "float32" if dtype == "tf32" else dtype
    wide = stored in ("float16", "bfloat16") and not narrow
    arrays = {
        name: device.put(a, "float32" if wide and name in SIGNED else stored) for name, a in problem.arrays.items()
    }
    return Given(problem, arrays, device.put(problem.grad_y, stored), dtype, narrow)


def fetch(device: Device, given: Given, results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Results as NumPy arrays."""
    wide = given.stored == "bfloat16" and not given.narrow
    return {
        name: device.get(value, "float32" if wide and name in SIGNED else given.stored)
        for name, value in results.items()
    }


def same_bits(device: Device, given: Given, deterministic: bool) -> str:
    """Runs the backward twice and describes any difference: none is allowed if `deterministic`, otherwise only in
    g.x."""
    first, second = (
        fetch(device, given, given.call("backward", **({"deterministic": True} if deterministic else {})))
        for _ in range(2)
    )
    names = [name for name in first if deterministic or name != "x"]
    differ = [name for name in names if not np.array_equal(first[name], second[name], equal_nan=True)]
    return f"two runs differ in {', '.join(differ)}" if differ else ""


def compare(
    device: Device, problem: Problem, wanted: dict[str, Expected], dtype: str, narrow: bool
) -> Iterator[Verdict]:
    """Forward, backward, deterministic backward, repetition."""
    label = f"{dtype}{', coordinates too' if narrow else ''}"
    try:
        given = give(device, problem, dtype, narrow)
        calls: list[tuple[str, str, dict[str, Any]]] = [("forward", "forward", {}), ("backward", "backward", {})]
        if problem.operator != "deform_conv_layer" or _takes(problem.operator, "deterministic"):
            calls.append(("deterministic backward", "backward", {"deterministic": True}))
        for text, direction, more in calls:
            results = fetch(device, given, given.call(direction, **more))
            excess, detail = judge(results, wanted, dtype, problem.rounded)
            yield Verdict(problem.operator, f"{label}, {text}", "right" if excess <= 1 else "wrong", excess, detail)
        detail = same_bits(device, given, deterministic=len(calls) == 3)
        yield Verdict(problem.operator, f"{label}, the same bits again", "wrong" if detail else "right", 0.0, detail)
    except Exception as error:
        yield Verdict(problem.operator, label, *_with_worst(failure(error, problem.operator)))


def _takes(operator: str, keyword: str) -> bool:
    import inspect

    import numdcn

    return keyword in inspect.signature(getattr(numdcn, f"{operator}_backward")).parameters


def _with_worst(status: tuple[str, str]) -> tuple[str, float, str]:
    return status[0], 0.0, status[1]


def against_rival(device: Device, problem: Problem, wanted: dict[str, Expected], dtype: str) -> Iterator[Verdict]:
    """numdcn's results minus those of every rival, within twice the bound."""
    if not device.torch_runs or problem.operator == "deform_conv_layer":
        return
    arrays = {n: None if a is None else device.tensor(a, dtype) for n, a in problem.arrays.items()}
    grad_y = device.tensor(problem.grad_y, dtype)
    for other in rivals(device.torch, problem.operator, arrays, problem.keywords, grad_y):
        yield from _against(device, problem, wanted, dtype, other, arrays)


def _against(
    device: Device, problem: Problem, wanted: dict[str, Expected], dtype: str, other: Rival, arrays: dict[str, Any]
) -> Iterator[Verdict]:
    """The same for one rival, on these tensors."""
    label = f"{dtype}, against {other.name}"
    try:
        given = give(device, problem, dtype)
        for direction in ("forward", "backward"):
            function = other.forward if direction == "forward" else other.backward
            assert function is not None
            theirs = as_numdcn(problem.operator, function(), arrays)
            ours = fetch(device, given, given.call(direction))
            wants = {n: wanted[n]._replace(value=device.get(theirs[n]).astype(np.float64)) for n in ours}
            excess, detail = judge(ours, wants, dtype, problem.rounded)
            status = "right" if excess <= 2 else "wrong"
            yield Verdict(problem.operator, f"{label}, {direction}", status, excess / 2, detail if excess > 2 else "")
    except Exception as error:
        yield Verdict(problem.operator, label, *_with_worst(failure(error, problem.operator)))


def frameworks(device: Device) -> Iterator[Verdict]:
    """Arrays of every installed framework give results of the same kind, with the same numbers."""
    import numdcn

    problem = make("bilinear_sample", "points", TINY if device.simulated else SMALL, 7)
    host = {name: a.astype(np.float32) for name, a in problem.arrays.items()}
    want = expected(problem)["y"]
    makers: dict[str, Any] = {"numba.cuda": device.cuda.to_device}
    if device.on_torch:
        makers["torch"] = lambda a: device.torch.from_numpy(a).cuda()
    if not device.simulated and importlib.util.find_spec("cupy") is not None:
        import cupy  # type: ignore[import-not-found]

        makers["CuPy"] = cupy.asarray
    for name, put in makers.items():
        try:
            arrays = {n: put(a) for n, a in host.items()}
            y: Any = numdcn.bilinear_sample_forward(**arrays)
            detail = "" if type(y) is type(arrays["x"]) else f"y is a {type(y).__name__}"
            excess = worst(y.get() if name == "CuPy" else device.get(y), want, "float32", False)
            status = "wrong" if detail or excess > 1 else "right"
            yield Verdict("arrays", f"of {name}", status, excess, detail)
        except Exception as error:
            yield Verdict("arrays", f"of {name}", *_with_worst(failure(error, "bilinear_sample")))


def in_two_steps(device: Device, problem: Problem, wanted: dict[str, Expected], dtype: str) -> Iterator[Verdict]:
    """The same in two steps, which problems this small would not take, where they can."""
    with form(device, True, dtype):
        if takes_two_steps(lambda: give(device, problem, dtype).call("forward")):
            for verdict in compare(device, problem, wanted, dtype, False):
                yield verdict._replace(what=f"{verdict.what}, {TWO_STEPS}")


def verdicts(device: Device, operator: str, dtypes: Iterable[str] = DTYPES) -> Iterator[Verdict]:
    """All comparisons of one operator; for `arrays`, of the kinds of arrays."""
    if operator == "arrays":
        yield from frameworks(device)
        return
    missing = device.dtypes()
    for seed, label in enumerate(MAKERS[operator]):
        problem = make(operator, label, TINY if device.simulated else SMALL, 100 + seed)
        try:
            wanted = expected(problem)
        except Exception as error:
            yield Verdict(operator, f"{label}: the CPU's results", *_with_worst(failure(error, operator)))
            continue
        for dtype in dtypes:
            if dtype == "tf32" and not _takes(operator, "allow_tf32"):
                continue
            if missing.get(dtype):
                yield Verdict(operator, f"{label}: {dtype}", "skipped", 0.0, missing[dtype])
                continue
            found = list(compare(device, problem, wanted, dtype, False))
            if dtype in ("float16", "bfloat16") and any(name in SIGNED for name in problem.arrays):
                found += compare(device, problem, wanted, dtype, True)
            if device.on_torch and operator == "deform_conv":
                found += in_two_steps(device, problem, wanted, dtype)
            if dtype in ("float32", "float64"):
                found += against_rival(device, problem, wanted, dtype)
            for verdict in found:
                yield verdict._replace(what=f"{label}: {verdict.what}")


def worker(operator: str, simulated: bool, dtypes: Iterable[str] = DTYPES) -> int:
    """Prints a JSON line for each comparison of an operator."""
    if simulated:
        sys.setswitchinterval(1e-4)  # switch sooner between threads that wait for each other
    start, device = time.perf_counter(), Device(simulated)
    for verdict in verdicts(device, operator, dtypes):
        print(json.dumps({**verdict._asdict(), "seconds": round(time.perf_counter() - start, 2)}), flush=True)
    return 0
