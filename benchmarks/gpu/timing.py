"""Times on a GPU: contenders run in turn, round by round, in one process; each result is checked before it is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases.layers import tiny
from benchmarks.gpu.compare import Given, fetch, give, judge
from benchmarks.gpu.device import Device
from benchmarks.gpu.floors import BATCHES, ROWS, Rates, nominal, row
from benchmarks.gpu.forms import other
from benchmarks.gpu.problems import CASES, DETECTOR, MAKERS, SMALL, TINY, Problem, make, published
from benchmarks.gpu.reference import expected
from benchmarks.gpu.rivals import plain_convolution, rivals, torchvision_ops
from benchmarks.gpu.rows import Reference, Sampled, fresh, taken
from benchmarks.rivals.layer import Case

TIMED = ("float32", "tf32", "float16", "bfloat16")
OTHERS_TIMED = ("float32", "float16")  # of operators other than deform_conv
WHOLE = 6  # factor by which a bound may exceed that at the sampled elements
SLICE = 0.008  # seconds per turn


class Clock:
    """The time left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Entry(NamedTuple):
    """A contender in one direction of one row."""

    name: str
    dtype: str
    run: Callable[[], dict[str, Any]]
    checked: bool = True  # whether it is compared with the reference


def failed(error: Exception) -> dict[str, Any]:
    text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("numdcn._cuda"):
        return {"status": "missing", "detail": "no GPU code"}
    return {"status": "failed", "detail": text}


def measure(
    device: Device, entries: list[Entry], check: Callable[[Entry, dict[str, Any]], str], rounds: int
) -> Iterator[dict[str, Any]]:
    """Verifies every entry, then times them in turn. Yields a record for each."""
    records, runs = [], {}
    for entry in entries:
        record: dict[str, Any] = {
            "contender": entry.name,
            "kind": entry.dtype,
            "status": "ok",
            "detail": "",
            "rounds": [],
        }
        try:
            detail = check(entry, entry.run()) if entry.checked else ""
            if detail:
                record |= {"status": "WRONG", "detail": detail}
            elif not device.simulated:
                entry.run()
                once = device.seconds(entry.run, 2)
                runs[entry.name] = max(2, min(200, math.ceil(SLICE / once)))
        except Exception as error:
            record |= failed(error)
            device.free()
        records.append(record)
    for turn in range(0 if device.simulated else rounds):
        for entry, record in zip(entries, records, strict=True):
            if record["status"] == "ok":
                try:
                    record["rounds"].append(device.seconds(entry.run, runs[entry.name]))
                    if turn == rounds - 1:
                        record["busy"] = device.seconds(entry.run, min(50, runs[entry.name]), ahead=True)
                except Exception as error:
                    record |= failed(error)
    yield from records


def keywords_of(case: Case) -> dict[str, Any]:
    return {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}


class RowRun:
    """One row: its inputs in every type, its reference, its contenders."""

    def __init__(self, device: Device, case: Case, seed: int) -> None:
        self.device, self.case = device, case
        self.host = fresh(device, case, seed)
        self.reference = Reference(case, self.host, seed)
        self.made: dict[tuple[str, str], dict[str, Any]] = {}
        self.whole: dict[str, Any] = {}  # the first right results in this direction
        self.sampled: dict[str, Sampled] = {}

    def arrays(self, dtype: str, torch: bool) -> dict[str, Any]:
        """The inputs of a type, as numdcn or torch's own operators take them; created once."""
        stored = "float32" if dtype == "tf32" else dtype
        key = (stored, "tensor" if torch and not self.device.on_torch else "own")
        if key not in self.made:
            put = self.device.tensor if torch else self.device.put
            self.made[key] = {name: put(a, stored) for name, a in self.host.items()}
        return self.made[key]

    def entries(self, direction: str, dtypes: tuple[str, ...]) -> list[Entry]:
        """All contenders of a direction."""
        found = [self.own(direction, dtype) for dtype in dtypes if not self.device.dtypes().get(dtype)]
        found += [entry for own in found for entry in self.other_form(own)] if self.device.on_torch else []
        if direction == "backward":
            found.append(self.own(direction, "float32", deterministic=True))
        if not self.device.torch_runs:
            return found
        has_rival = torchvision_ops(self.device.torch) is not None
        found += [self.theirs(direction, dtype) for dtype in ("float32", "float16") if has_rival]
        return found + [self.plain(direction, dtype) for dtype in dtypes]

    def own(self, direction: str, dtype: str, deterministic: bool = False) -> Entry:
        import numdcn

        function: Any = numdcn.deform_conv_forward if direction == "forward" else numdcn.deform_conv_backward
        more: dict[str, Any] = {"allow_tf32": True} if dtype == "tf32" else {}
        name = f"numdcn {dtype}"
        if deterministic:
            more, name = {**more, "deterministic": True}, f"{name} deterministic"
        keywords = {**keywords_of(self.case), **more}

        def run() -> dict[str, Any]:
            a = self.arrays(dtype, torch=False)
            if direction == "forward":
                return {"y": function(a["x"], a["offsets"], a["w"], mask=a.get("mask"), **keywords)}
            g = function(a["grad_y"], a["x"], a["offsets"], a["w"], mask=a.get("mask"), **keywords)
            return {n: grad for n, grad in g._asdict().items() if grad is not None}

        return Entry(name, dtype, run)

    def other_form(self, own: Entry) -> list[Entry]:
        """The same in the form that is not chosen (forms.py), if there is one."""
        try:
            found = other(self.device, own.run, own.dtype)
        except Exception:  # `measure` meets it again, and tells
            return []
        return [own._replace(name=f"{own.name} {found[0]}", run=found[1])] if found else []

    def theirs(self, direction: str, dtype: str) -> Entry:
        call: list[Any] = []

        def run() -> dict[str, Any]:
            if not call:
                a = self.arrays(dtype, torch=True)
                given = {n: a.get(n) for n in ("x", "offsets", "w", "mask")}
                (made,) = rivals(self.device.torch, "deform_conv", given, keywords_of(self.case), a["grad_y"])
                call.append(made.forward if direction == "forward" else made.backward)
            return call[0]()  # type: ignore[no-any-return]

        return Entry(f"torchvision {dtype}", dtype, run, checked=dtype == "float32")

    def plain(self, direction: str, dtype: str) -> Entry:
        call: list[Any] = []

        def run() -> dict[str, Any]:
            if not call:
                a = self.arrays(dtype, torch=True)
                made = plain_convolution(self.device.torch, a, keywords_of(self.case), a["grad_y"])
                call.append(made.forward if direction == "forward" else made.backward)
            self.device.torch.backends.cudnn.allow_tf32 = dtype == "tf32"
            return call[0]()  # type: ignore[no-any-return]

        return Entry(f"cuDNN conv {dtype}", dtype, run, checked=False)

    def check(self, entry: Entry, results: dict[str, Any]) -> str:
        """What is wrong with results: at the sampled elements, and with torch as a whole against the first right
        ones."""
        got = {n: taken(self.device, results[n], s, entry.dtype) for n, s in self.sampled.items() if n in results}
        missing = self.sampled.keys() - got.keys()
        if missing:
            return f"no {', '.join(sorted(missing))}"
        _, detail = judge(got, {n: s.expected for n, s in self.sampled.items()}, entry.dtype, True)
        if detail or not self.device.on_torch:
            return detail
        if not self.whole:
            self.whole = {n: results[n].clone() for n in self.sampled}
            return ""
        for name, sampled in self.sampled.items():
            bound = WHOLE * float(
                sampled.expected.bound(entry.dtype, True).max() + sampled.expected.bound("float32", True).max()
            )
            off = float((results[name].float() - self.whole[name]).abs().max())
            if not off <= bound:
                return f"{name} as a whole is off by {off:.3g}, bound {bound:.3g}"
        return ""

    def run(self, direction: str, rounds: int, dtypes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        self.sampled, self.whole = self.reference.results(direction), {}
        yield from measure(self.device, self.entries(direction, dtypes), self.check, rounds)


def order() -> list[tuple[str, int]]:
    """The rows, those with targets first."""
    return [(name, batch) for batch in sorted(BATCHES, reverse=True) for name in ROWS]


def time_rows(device: Device, clock: Clock, rounds: int, seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every row and direction; those for which no time is left are reported."""
    records: list[dict[str, Any]] = []
    rows = [(name, 1) for name in ("S1", "S5a", "S6", "S7")] if device.simulated else order()
    for name, batch in rows:
        about: dict[str, Any] = {"row": name, "batch": batch}
        case = tiny(row(name, batch))._replace(h=6, w=5) if device.simulated else row(name, batch)
        if clock.left() < 0:
            records.append(
                {**about, "direction": "forward", "contender": "all", "status": "no time left", "detail": ""}
            )
            say(f"{name} x{batch}: no time left")
            continue
        try:
            run = RowRun(device, case, seed + 97 * len(records))
        except Exception as error:
            records.append({**about, "direction": "forward", "contender": "all", **failed(error)})
            continue
        for direction in ("forward", "backward"):
            found = list(run.run(direction, rounds, TIMED))
            records += [{**about, "direction": direction, **record} for record in found]
            say(f"{name} x{batch} {direction}: {summary(found, device.simulated)}")
        del run
        device.free()
    return records


def median(record: dict[str, Any]) -> float | None:
    """The seconds of a record, if it was timed."""
    return float(np.median(record["rounds"])) if record.get("status") == "ok" and record.get("rounds") else None


def summary(records: list[dict[str, Any]], simulated: bool) -> str:
    told = []
    for record in records:
        seconds = median(record)
        right = "right" if simulated else ""
        text = f"{1e3 * seconds:.3f} ms" if seconds is not None else record["status"].replace("ok", right)
        told.append(f"{record['contender']} {text}{': ' * bool(record['detail'])}{record['detail']}")
    return "; ".join(told)


def timed_problems(simulated: bool, operators: Iterable[str]) -> Iterator[tuple[str, Callable[[], Problem]]]:
    """The rows of operators other than deform_conv, and what makes their problems: at a detector's sizes, or those of
    published networks."""
    for seed, (operator, labels) in enumerate(MAKERS.items(), 500):
        if operator not in operators or operator == "deform_conv":
            continue
        if operator not in CASES:
            yield operator, partial(make, operator, next(iter(labels)), TINY if simulated else DETECTOR, seed)
            continue
        for name, case in list(CASES[operator].items())[: 1 if simulated else None]:
            chosen = case.tiny()._replace(depth=8) if simulated else case
            yield f"{operator} {name}", partial(published, operator, chosen, seed)


def time_operators(
    device: Device, clock: Clock, rounds: int, operators: Iterable[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The other operators, float32 and float16."""
    records: list[dict[str, Any]] = []
    for name, problem_of in timed_problems(device.simulated, operators):
        if clock.left() < 0:
            records.append(
                {"row": name, "direction": "forward", "contender": "all", "status": "no time left", "detail": ""}
            )
            continue
        try:
            problem = problem_of()
            wanted = expected(problem)
        except Exception as error:
            records.append({"row": name, "direction": "forward", "contender": "reference", **failed(error)})
            say(f"{name}: no reference: {failed(error)['detail']}")
            continue
        for direction in ("forward", "backward"):
            found = list(_time_operator(device, problem, wanted, direction, rounds))
            records += [{"row": name, "direction": direction, **record} for record in found]
            say(f"{name} {direction}: {summary(found, device.simulated)}")
        device.free()
    return records


def _time_operator(
    device: Device, problem: Problem, wanted: Any, direction: str, rounds: int
) -> Iterator[dict[str, Any]]:
    entries, others = [], []
    for dtype in OTHERS_TIMED:
        given = give(device, problem, dtype)
        entries.append(Entry(f"numdcn {dtype}", dtype, lambda given=given: given.call(direction)))  # type: ignore[misc]
        if device.torch_runs:
            arrays = {n: None if a is None else device.tensor(a, dtype) for n, a in problem.arrays.items()}
            grad_y = device.tensor(problem.grad_y, dtype)
            try:
                found = rivals(device.torch, problem.operator, arrays, problem.keywords, grad_y)
            except (RuntimeError, NotImplementedError, KeyError):  # unsupported type
                continue
            for other in found:
                call = other.forward if direction == "forward" else other.backward
                if call is not None:
                    others.append(Entry(f"{other.name} {dtype}", dtype, call, checked=False))

    def check(entry: Entry, results: dict[str, Any]) -> str:
        got = fetch(device, Given(problem, {}, None, entry.dtype), results)
        return judge(got, wanted, entry.dtype, problem.rounded)[1]

    yield from measure(device, entries + others, check, rounds)


def issue_times(
    device: Device, operators: Iterable[str], say: Callable[[str], None], runs: int = 200
) -> list[dict[str, Any]]:
    """Host seconds to issue a call, without waiting, for small problems, next to torchvision's."""
    records = []
    chosen = (("deform_conv", "plain"), ("roi_align", "boxes"), ("bilinear_sample", "points"))
    for operator, label in chosen:
        if operator not in operators:
            continue
        problem = make(operator, label, TINY if device.simulated else SMALL._replace(batch=1), 900)
        for direction in ("forward", "backward"):
            calls: dict[str, Callable[[], Any]] = {}
            given = give(device, problem, "float32")
            calls["numdcn"] = lambda given=given, direction=direction: given.call(direction)  # type: ignore[misc]
            if device.torch_runs:
                arrays = {n: None if a is None else device.tensor(a, "float32") for n, a in problem.arrays.items()}
                grad_y = device.tensor(problem.grad_y, "float32")
                for other in rivals(device.torch, operator, arrays, problem.keywords, grad_y):
                    if other.backward is not None:
                        calls[other.name] = other.forward if direction == "forward" else other.backward
            for name, call in calls.items():
                record: dict[str, Any] = {
                    "row": operator,
                    "direction": direction,
                    "contender": name,
                    "status": "ok",
                    "detail": "",
                }
                try:
                    call()
                    if not device.simulated:
                        device.issued(call, 20)
                        record["seconds"] = device.issued(call, runs)
                except Exception as error:
                    record |= failed(error)
                records.append(record)
        say(f"issuing {operator}")
    return records


def measured_rates(device: Device) -> tuple[Rates, list[str]]:
    """The GPU's rates, from copies and large products if torch is installed, else nominal; and a description of what
    was measured."""
    rates = nominal(device.name)
    if not device.on_torch:
        return rates, []
    torch = device.torch

    def best(call: Callable[[], Any], runs: int) -> float:
        call()
        return min(device.seconds(call, runs) for _ in range(5))

    def copied(count: int, runs: int) -> float:
        a = torch.randn(count, device="cuda")
        b = torch.empty_like(a)
        return 8 * count / best(lambda: b.copy_(a), runs)

    def product(dtype: Any, tf32: bool) -> float:
        size = 8192 if dtype != torch.float32 or tf32 else 4096
        a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rate = 2 * size**3 / best(lambda: a @ b, 5)
        torch.backends.cuda.matmul.allow_tf32 = False
        return rate

    found = rates._replace(
        memory=copied(2**28, 5), float32=product(torch.float32, False), tf32=product(torch.float32, True),
        half=product(torch.float16, False), source="measured",
    )  # fmt: skip
    lines = [
        f"memory, a copy of 1 GiB: {found.memory / 1e12:.2f} TB/s",
        f"L2, a copy of 4 MiB: {copied(2**20, 200) / 1e12:.2f} TB/s (the floors take {rates.l2 / 1e12:.1f}, {rates.source})",
        f"products: float32 {found.float32 / 1e12:.0f}, tf32 {found.tf32 / 1e12:.0f}, float16 {found.half / 1e12:.0f}, "
        f"bfloat16 {product(torch.bfloat16, False) / 1e12:.0f} TFLOP/s",
    ]
    device.free()
    return found, lines
