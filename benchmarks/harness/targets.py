"""numdcn's target speeds, each judged from measured results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.cases.deform_conv import FLOOR
from benchmarks.rivals.engines import ENGINES

ALL = ("S1", "S2", "S3", "S4", "S5a", "S5b", "S6", "S7", "S8")
SAMPLED = ("S1", "S2", "S4", "S5a", "S5b", "S7")  # where sampling, not the product, dominates
DENSE = ("S1", "S2", "S3", "S4", "S6")
SCALED = ("S1", "S2", "S3", "S4", "S5a", "S5b", "S6")
MB = 1e6
Values = Mapping[str, float | None]


class Judged(NamedTuple):
    """One row of the table of targets."""

    what: str
    measured: str
    target: str
    verdict: str


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else math.nan


def judge(what: str, values: Values, limit: float, at_most: bool = True, unit: str = "") -> Judged:
    """Every value against one limit; misses are named, as are missing values."""

    def good(value: float) -> bool:
        return value <= limit if at_most else value >= limit

    measured = {name: value for name, value in values.items() if value is not None}
    missed = [name for name, value in measured.items() if not good(value)]
    absent = [name for name in values if name not in measured]
    text = ", ".join(
        f"{name} **{value:.4g}**".lstrip() if name in missed else f"{name} {value:.4g}".lstrip()
        for name, value in measured.items()
    )
    if not measured:
        verdict = "not measured"
    elif missed:
        verdict = ("miss: " + ", ".join(missed)).removesuffix(": ")
    else:
        verdict = "pass"
    if absent and measured:
        verdict += f" (not measured: {', '.join(absent)})"
    if text and unit:
        text += f" {unit}"
    return Judged(what, text, f"{'<=' if at_most else '>='} {limit:g} {unit}".strip(), verdict)


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


class Times:
    """Medians by case, direction, threads and contender."""

    def __init__(self, medians: dict[tuple[str, str, int, str], float]) -> None:
        self.medians = medians

    def get(self, case: str, direction: str, threads: int, contender: str) -> float | None:
        return self.medians.get((case, direction, threads, contender))

    def fastest(self, case: str, direction: str, threads: int, names: Iterable[str]) -> tuple[str, float] | None:
        """The fastest of these contenders, and its time."""
        found = [(t, name) for name in names if (t := self.get(case, direction, threads, name)) is not None]
        return (min(found)[1], min(found)[0]) if found else None

    def lead(self, case: str, threads: int) -> float | None:
        """How many times faster than the fastest inference engine."""
        best = self.fastest(case, "forward", threads, ENGINES)
        return ratio(best[1] if best else None, self.get(case, "forward", threads, "numdcn-prepared"))

    def over(self, direction: str, threads: int, name: str, under: str, cases: Iterable[str]) -> Values:
        return {
            case: ratio(self.get(case, direction, threads, name), self.get(case, direction, threads, under))
            for case in cases
        }

    def speedup(self, direction: str, name: str) -> Values:
        """One thread's time over two threads'."""
        return {c: ratio(self.get(c, direction, 1, name), self.get(c, direction, 2, name)) for c in SCALED}


def forward_targets(times: Times) -> list[Judged]:
    rows = []
    for threads in (1, 2):
        lead = {case: times.lead(case, threads) for case in ALL}
        head = f"1. forward, {threads}T, fastest engine / numdcn-prepared"
        rows.append(judge(head, lead, 1.0, at_most=False))
        rows.append(judge(head, {case: lead[case] for case in SAMPLED}, 1.2, at_most=False))
        known = [value for value in lead.values() if value is not None]
        mean = {"": geometric_mean(known) if known else None}
        rows.append(judge(f"{head}, geometric mean of {len(known)} of {len(ALL)} rows", mean, 1.6, at_most=False))
    for threads in (1, 2):
        for name in ("numdcn-prepared", "numdcn"):
            values = times.over("forward", threads, name, FLOOR, DENSE)
            rows.append(judge(f"2. forward, {threads}T, {name} / {FLOOR}", values, 1.4))
    return rows


def backward_targets(times: Times) -> list[Judged]:
    def row(threads: int, cases: Iterable[str], limit: float) -> Judged:
        values = times.over("backward", threads, "numdcn", FLOOR, cases)
        return judge(f"3. backward, {threads}T, numdcn / {FLOOR}", values, limit)

    return [row(2, DENSE, 1.6), row(2, ["S5a"], 4), row(2, ["S7"], 12), row(1, ["S8"], 2)]


def scaling_targets(times: Times) -> list[Judged]:
    return [
        judge(f"4. {direction}, {name}, 1T / 2T", times.speedup(direction, name), 1.8, at_most=False)
        for direction, name in (("forward", "numdcn-prepared"), ("forward", "numdcn"), ("backward", "numdcn"))
    ]


def start_targets(start: dict[str, Any]) -> list[Judged]:
    first: dict[str, dict[str, float | None]] = {"cold": {}, "warm": {}}
    files: dict[str, dict[str, int]] = {}
    for record in start.get("first", []):
        if record["contender"] == "numdcn" and "seconds" in record:
            first[record["cache"]][record["case"]] = record["seconds"].get("forward")
            files.setdefault(record["case"], {})[record["cache"]] = record["files"]
    added = {case: n["warm"] - n["cold"] for case, n in files.items() if len(n) == 2}
    return [
        judge("5. import numdcn", {"": start.get("import_seconds")}, 0.5, unit="s"),
        judge("5. first forward call, empty cache", first["cold"], 4, unit="s"),
        judge("5. first forward call, warm cache", first["warm"], 0.5, unit="s"),
        judge("5. files that a second process adds to the cache", added, 0),
    ]


def memory_targets(memory: list[dict[str, Any]]) -> list[Judged]:
    values: dict[str, float | None] = {"numdcn": None, "numdcn-prepared": None}
    limit = 1.3 * 64 * 512 * 960 * 4 / MB + 64
    for record in memory:
        if record["case"] == "large" and record["direction"] == "forward" and record["contender"] in values:
            values[record["contender"]] = record["extra"] / MB if "extra" in record else None
    return [judge("6. large, forward, extra memory (1.3 x + 64 MB)", values, round(limit, 1), unit="MB")]


def float64_targets(times: Times) -> list[Judged]:
    rows = []
    for direction in ("forward", "backward"):
        values = times.over(direction, 1, "numdcn-float64", "numdcn", ALL)
        rows.append(judge(f"7. {direction}, 1T, float64 / float32", values, 2.5))
    return rows


def judge_all(times: Times, results: dict[str, Any]) -> list[Judged]:
    """All targets, in order."""
    return [
        *forward_targets(times),
        *backward_targets(times),
        *scaling_targets(times),
        *start_targets(results["start"]),
        *memory_targets(results["memory"]),
        *float64_targets(times),
    ]
