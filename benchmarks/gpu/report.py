"""Writes the findings of `python -m benchmarks.gpu`: Markdown, JSON, and a figure if matplotlib is installed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.floors import (
    BATCHES,
    DENSE,
    RIVAL,
    ROWS,
    TARGETS,
    Rates,
    floor,
    ms,
    row,
    weighted_bound,
    weighted_cases,
)
from benchmarks.gpu.forms import FORMS
from benchmarks.gpu.timing import OTHERS_TIMED, TIMED, median
from benchmarks.harness.machine import slug
from benchmarks.harness.report import number, quartiles, table
from benchmarks.harness.targets import Judged, Values, geometric_mean, judge, ratio

ISSUE_LIMIT = 60.0  # host microseconds per call
NO_SPEEDS = "simulator: no speeds"
COLUMNS = [f"{who} {dtype}" for who, dtypes in (
    ("numdcn", [*TIMED, "float32 deterministic"]), ("torchvision", ["float32", "float16"]), ("cuDNN conv", TIMED),
) for dtype in dtypes]  # fmt: skip


class Times:
    """Timing records by row, batch, direction and contender."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.records = {(r["row"], r["batch"], r["direction"], r["contender"]): r for r in results["rows"]}
        self.missing = {(r["row"], r["batch"]): r for r in results["rows"] if r["contender"] == "all"}

    def seconds(self, name: str, batch: int, direction: str, contender: str) -> float | None:
        return median(self.records.get((name, batch, direction, contender), {}))

    def lead(self, name: str, batch: int, direction: str, dtype: str) -> float | None:
        """How many times as fast as torchvision."""
        theirs = self.seconds(name, batch, direction, f"torchvision {RIVAL[dtype]}")
        return ratio(theirs, self.seconds(name, batch, direction, f"numdcn {dtype}"))

    def leads(self, batch: int, direction: str, dtype: str, rows: tuple[str, ...]) -> Values:
        return {name: self.lead(name, batch, direction, dtype) for name in rows}


def targets(results: dict[str, Any]) -> list[Judged]:
    """Every target, with the measured value."""
    times, judged = Times(results), []
    for direction, wanted in TARGETS.items():
        for dtype, least in wanted.items():
            values = times.leads(16, direction, dtype, DENSE)
            known = [value for value in values.values() if value is not None]
            whole = len(known) == len(DENSE)
            text = f"{direction} {dtype}, torchvision {RIVAL[dtype]} / numdcn, batch 16 of S1 to S6, geometric mean"
            text += "" if whole else f" of {len(known)} of {len(DENSE)} rows"
            judged.append(judge(text, {"": geometric_mean(known) if known else None}, least, at_most=False))
    for direction, wanted in TARGETS.items():
        for batch in reversed(BATCHES):
            for dtype in wanted:
                text = f"{direction} {dtype}, torchvision {RIVAL[dtype]} / numdcn, batch {batch}: no row slower"
                judged.append(judge(text, times.leads(batch, direction, dtype, ROWS), 1.0, at_most=False))
    issued: dict[str, float | None] = {}
    for record in results["issue"]:
        if record["contender"] == "numdcn":
            seconds = record.get("seconds")
            issued[f"{record['row']} {record['direction']}"] = None if seconds is None else 1e6 * seconds
    judged.append(judge("host, to issue a call", issued or {"": None}, ISSUE_LIMIT, unit="us"))
    return judged


def cell(record: dict[str, Any] | None, simulated: bool) -> str:
    """Milliseconds and quartiles, or what happened instead; never the speed of a wrong result."""
    if record is None:
        return ""
    if record["status"] != "ok":
        return str(record["status"])
    if simulated or not record.get("rounds"):
        return "right" if simulated else ""
    low, middle, high = (1e3 * seconds for seconds in quartiles(record["rounds"]))
    return f"{number(middle)} ({number(low)}-{number(high)})"


def rows_table(results: dict[str, Any], direction: str) -> list[str]:
    times, simulated = Times(results), results["simulated"]
    columns = [c for c in COLUMNS if any(key[2:] == (direction, c) for key in times.records)]
    lines = []
    for name, batch in dict.fromkeys((r["row"], r["batch"]) for r in results["rows"]):
        told = times.missing.get((name, batch))
        cells = [cell(times.records.get((name, batch, direction, c)), simulated) for c in columns]
        lines.append([name, str(batch), *([told["status"]] * len(columns) if told else cells)])
    return table(["row", "batch", *columns], lines) if columns else ["Nothing was measured.", ""]


def forms_table(results: dict[str, Any], direction: str) -> list[str]:
    """The form that `two_step.choose` prefers beside the other one, where both exist."""
    times, lines = Times(results), []
    for (name, batch, its_direction, contender), record in times.records.items():
        form = next((form for form in FORMS if contender.endswith(f" {form}")), None)
        if form is None or its_direction != direction:
            continue
        own = contender.removesuffix(f" {form}")
        chosen, seconds = times.seconds(name, batch, direction, own), median(record)
        over = number(seconds / chosen) if chosen and seconds else ""
        lines.append([name, str(batch), own, cell(record, results["simulated"]), form, over])
    head = ["row", "batch", "", "ms of the other form", "which is", "times as long as the one chosen"]
    return table(head, lines) if lines else ["No other form was measured.", ""]


def roofline_cell(bound: tuple[str, float], record: dict[str, Any]) -> str:
    """A floor, and its share of a call's time."""
    (what, least), seconds, busy = bound, median(record), record.get("busy")
    share = "" if seconds is None else f": {100 * least / seconds:.0f} %"
    share += "" if busy is None or seconds is None else f" ({100 * least / busy:.0f} %)"
    return f"{ms(least)} {what}{share}"


def roofline_table(results: dict[str, Any], direction: str) -> list[str]:
    """The highest of each row's floors, and its share of a call's time."""
    times, rates = Times(results), Rates(**results["rates"])
    lines = []
    for name, batch in dict.fromkeys((r["row"], r["batch"]) for r in results["rows"]):
        cells = [name, str(batch)]
        for dtype in TIMED:
            bound = floor(row(name, batch), direction, dtype).bound(rates, dtype)
            cells.append(roofline_cell(bound, times.records.get((name, batch, direction, f"numdcn {dtype}"), {})))
        lines.append(cells)
    return table(["row", "batch", *TIMED], lines)


def other_table(results: dict[str, Any]) -> list[str]:
    contenders = list(dict.fromkeys(r["contender"] for r in results["operators"] if r["contender"] != "all"))
    found = {(r["row"], r["direction"], r["contender"]): r for r in results["operators"]}
    lines = []
    for name, direction in dict.fromkeys((r["row"], r["direction"]) for r in results["operators"]):
        told = found.get((name, direction, "all"))
        cells = [cell(found.get((name, direction, c)), results["simulated"]) for c in contenders]
        lines.append([f"`{name}`", direction, *([told["status"]] * len(contenders) if told else cells)])
    return table(["operator", "", *contenders], lines) if contenders else ["Nothing was measured.", ""]


def weighted_roofline_table(results: dict[str, Any]) -> list[str]:
    """The same of attention, DCNv3 and DCNv4."""
    rates, cases = Rates(**results["rates"]), weighted_cases()
    found = {(r["row"], r["direction"], r["contender"]): r for r in results["operators"]}
    lines = []
    for name, direction in dict.fromkeys((r["row"], r["direction"]) for r in results["operators"] if r["row"] in cases):
        cells = [f"`{name}`", direction]
        for dtype in OTHERS_TIMED:
            bound = weighted_bound(cases[name], direction, dtype, rates)
            cells.append(roofline_cell(bound, found.get((name, direction, f"numdcn {dtype}"), {})))
        lines.append(cells)
    return table(["operator", "", *OTHERS_TIMED], lines) if lines else ["Nothing was measured.", ""]


def issue_table(results: dict[str, Any]) -> list[str]:
    def shown(record: dict[str, Any]) -> str:
        if record["status"] != "ok":
            return str(record["status"])
        return f"{1e6 * record['seconds']:.1f}" if "seconds" in record else NO_SPEEDS

    lines = [[f"`{r['row']}` {r['direction']}", r["contender"], shown(r)] for r in results["issue"]]
    return table(["call", "", "us a call"], lines)


def verdict_lines(results: dict[str, Any]) -> list[str]:
    """What was compared for each operator, and every comparison that was not right."""
    lines = []
    for operator in dict.fromkeys(v["operator"] for v in results["verdicts"]):
        found = [v for v in results["verdicts"] if v["operator"] == operator]
        counts = Counter(v["status"] for v in found)
        worst = max((v["worst"] for v in found if v["status"] == "right"), default=0.0)
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append([f"`{operator}`", told, f"{worst:.2f}"])
    rows = table(["operator", "comparisons", "largest difference of the right ones, in bounds"], lines)
    bad = [v for v in results["verdicts"] if v["status"] != "right"]
    return (
        rows
        + [f"- {v['operator']}, {v['what']}: **{v['status']}** {v['detail']}".rstrip() for v in bad]
        + [""] * bool(bad)
    )


def problems(results: dict[str, Any]) -> list[str]:
    """Every timed call that was not right."""
    everything = [*results["rows"], *results["operators"], *results["issue"]]
    return [
        f"- {r['row']}{' x' + str(r['batch']) if 'batch' in r else ''} {r['direction']}, {r['contender']}: "
        f"**{r['status']}** {r['detail']}".rstrip()
        for r in everything
        if r["status"] != "ok"
    ]


def stages(results: dict[str, Any]) -> str:
    """How long the run and its stages took; a run whose times are missing has not ended."""
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["stages"].items())
    whole = f"the run took {results['seconds']:.0f} s: {each}"
    return whole if "time" in results["stages"] else f"{whole}; NOT ENDED"


def text(results: dict[str, Any], figure: str | None) -> str:
    """The report."""
    simulated = results["simulated"]
    lines = [f"# {results['about']['GPU']}", ""]
    if simulated:
        lines += [
            f"{NO_SPEEDS}. Numba's simulator, or an emulator, ran the kernels on tiny problems; no GPU was used.",
            "",
        ]
    lines += [f"- {name}: {value}" for name, value in results["about"].items()]
    lines += [f"- {line}" for line in results["rate_lines"]] + [f"- {stages(results)}", ""]
    lines += [f"Note: {note}\n" for note in results["notes"]]
    head = ["what", "measured", "wanted", "verdict"]
    lines += ["## Targets", "", *table(head, [list(one) for one in targets(results)], left=4)]
    lines += ["## Compiled", "", results["compiled"].get("text", "Not asked for."), ""]
    lines += ["## Tests", "", results["tests"], ""]
    lines += ["## Right or wrong", "", *verdict_lines(results)]
    lines += [
        "Every result is held against float64 results of the CPU; the bounds are told in benchmarks/gpu/problems.py.",
        "",
        "## deform_conv",
        "",
        "Milliseconds of a call in a stream of calls, median (quartiles) of the rounds; offsets N(0, 2), fresh inputs for each "
        "row, the same for all; what fits the L2 cache stays there. cuDNN conv is the plain convolution of the layer, "
        "channels-last: the floor. torchvision's float16 results are not checked.",
        "",
    ]
    lines += [f"![How many times as fast as torchvision]({figure})", ""] if figure else []
    for direction in TARGETS:
        lines += [f"### {direction.capitalize()}", "", *rows_table(results, direction)]
        lines += [
            "The other form, which numdcn did not choose; below 1 the choice was wrong:",
            "",
            *forms_table(results, direction),
            "The highest floor of the row, in ms, and what part of numdcn's time it is (with the calls issued ahead):",
            "",
            *([NO_SPEEDS, ""] if simulated else roofline_table(results, direction)),
        ]
    lines += ["## The other operators, at sizes of detectors and backbones", "", *other_table(results)]
    lines += [
        "The highest floor of attention, DCNv3 and DCNv4, in the same form:",
        "",
        *([NO_SPEEDS, ""] if simulated else weighted_roofline_table(results)),
    ]
    lines += ["## Issuing a call", "", *issue_table(results)]
    bad = problems(results)
    lines += ["## What was not right", "", *(bad or ["Nothing."]), ""]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> bool:
    """Bars of speed relative to torchvision, batch 16 and 1; False without matplotlib or anything to draw."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return False
    times = Times(results)
    figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), sharey="row", squeeze=False)
    drawn = False
    for line, direction in enumerate(TARGETS):
        for column, batch in enumerate(reversed(BATCHES)):
            ax = axes[line][column]
            for k, (dtype, colour) in enumerate(zip(RIVAL, ("#1b6ca8", "#66a182", "#d1495b"), strict=True)):
                values = times.leads(batch, direction, dtype, ROWS)
                places = [i + 0.27 * (k - 1) for i in range(len(ROWS))]
                heights = [value or 0.0 for value in values.values()]
                drawn |= any(heights)
                ax.bar(places, heights, 0.25, color=colour, label=dtype)
                if batch == 16 and dtype in TARGETS[direction]:
                    ax.axhline(TARGETS[direction][dtype], color=colour, linewidth=0.8, linestyle="--")
            ax.axhline(1, color="black", linewidth=0.8)
            ax.set_xticks(range(len(ROWS)), ROWS)
            ax.set_title(f"{direction}, batch {batch}", fontsize=10)
            if column == 0:
                ax.set_ylabel("times as fast as torchvision")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"{results['about']['GPU']}; dashed: wanted, as a mean (tf32 against torchvision's float32)", fontsize=10
    )
    figure.tight_layout()
    if drawn:
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return drawn


def write(results: dict[str, Any], folder: Path) -> Path:
    """Writes gpu-<name>.md, .json and .png; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "gpu-" + slug(results["about"]["GPU"])
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    drawn = not results["simulated"] and draw(results, folder / f"{stem}.png")
    if not drawn:
        why = NO_SPEEDS if results["simulated"] else "no matplotlib, or no times beside torchvision's"
        print(f"no figure: {why}")
    path = folder / f"{stem}.md"
    path.write_text(text(results, f"{stem}.png" if drawn else None), encoding="utf-8")
    return path
