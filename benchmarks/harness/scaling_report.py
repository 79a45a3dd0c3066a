"""Writes what benchmarks/scaling.py has measured: a table, a picture for each direction, and the numbers as JSON."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.harness.group_report import DIRECTIONS
from benchmarks.harness.report import json_lines, number, table
from benchmarks.harness.schedule import MOST

FOLDER = Path(__file__).resolve().parents[1] / "results"
SHOWN = (2, 8, 16, 64)  # cores in the tables
TARGETS = {8: 7.0, 16: 13.0, 64: 35.0}  # predicted speed-up by cores
LAYERS = ("S1", "S2", "S3", "S4", "S5a", "S5b", "S6")  # of deform_conv, for which there are targets
CLOSE = 0.1  # how far a measured speed-up may be from the predicted one
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--")
WORDS = """
Every task of every launch of a call is timed alone on one core, in CPU time. From these times follows how long the call
takes on more cores: tasks are taken in order by whoever is free, launches follow one another, what is between them runs on
one core, and threads come late by what waking them costs. Caches, memory and the clock rate are those of one busy core:
where cores share them, a call takes longer. Medians, float32. `python -m benchmarks.scaling` measures this.
"""


def difference(check: dict[str, Any]) -> float:
    """How much larger the measured speed-up is than the predicted one."""
    return float(check["measured"] / check["predicted"] - 1)


def cells_of(row: dict[str, Any], cores: tuple[int, ...]) -> list[str]:
    return [number(row["speedups"][count - 1]) for count in cores]


def tasks_text(row: dict[str, Any]) -> str:
    """The launches of a call, with their tasks; and with their threads where work or tasks are too few for all."""
    words = []
    for launch in row["launches"]:
        few = launch["threads"] < min(launch["tasks"], MOST)
        words.append(f"{launch['kernel']} {launch['tasks']}" + f" (on {launch['threads']})" * few)
    return ", ".join(words)


def measured_rows(results: dict[str, Any], direction: str) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["status"] == "ok" and row["direction"] == direction]


def has_targets(row: dict[str, Any]) -> bool:
    return row["operator"] == "deform_conv" and row["case"] in LAYERS


def verdicts(results: dict[str, Any]) -> list[str]:
    """How many predictions agree with what was measured, and how many targets are met."""
    rows = [row for direction in DIRECTIONS for row in measured_rows(results, direction)]
    checks = [check for row in rows for check in row["checks"]]
    close = sum(abs(difference(check)) <= CLOSE for check in checks)
    judged = [(row, cores) for row in rows if has_targets(row) for cores in TARGETS]
    met = sum(row["speedups"][cores - 1] >= TARGETS[cores] for row, cores in judged)
    lines = [f"{close} of {len(checks)} measured speed-ups are within {CLOSE:.0%} of the predicted ones."]
    return lines + [f"{met} of {len(judged)} targets are met."] * bool(judged)


def markdown(results: dict[str, Any], pictures: list[str]) -> str:
    """The report."""
    about = results["machine"]
    lines = ["# Predicted speed-up on many cores", WORDS]
    lines += [f"- {name}: {value}" for name, value in about.items()] + [""]
    lines += [f"![Predicted speed-up by the number of cores, {name}]({name})\n" for name in pictures]
    lines += [*verdicts(results), "", *targets(results)]
    for direction in DIRECTIONS:
        rows = measured_rows(results, direction)
        if rows:
            head = ["operator", "case", "ms on 1 core", "serial, us", *(f"on {count}" for count in SHOWN)]
            cells = [
                [row["operator"], row["case"], number(1e3 * row["seconds"]), number(1e6 * row["serial_seconds"])]
                + [*cells_of(row, SHOWN), tasks_text(row)]
                for row in rows
            ]
            lines += [f"## {direction.capitalize()}: predicted speed-up, and tasks of each launch", ""]
            lines += table([*head, "tasks"], cells)
    lines += checked(results)
    lines += ["## What sharing a launch costs", "", "Two threads, microseconds, by the time since the last launch:", ""]
    columns = [[number(1e6 * value) for value in column] for column in results["waking"].values()]
    head = ["since the last launch", "until the first works", "until the second does", "from the last task to the end"]
    lines += table(head, [list(row) for row in zip(*columns, strict=True)], left=0)
    missing = [row for row in results["rows"] if row["status"] != "ok"]
    lines += [f"- {row['operator']}, {row['case']}, {row['direction']}: {row['detail']}" for row in missing]
    return "\n".join(lines).rstrip() + "\n"


def targets(results: dict[str, Any]) -> list[str]:
    """The table of targets, of deform_conv's layers."""
    cells = []
    for direction in DIRECTIONS:
        for row in filter(has_targets, measured_rows(results, direction)):
            values = [
                text + " **missed**" * (row["speedups"][cores - 1] < TARGETS[cores])
                for cores, text in zip(TARGETS, cells_of(row, tuple(TARGETS)), strict=True)
            ]
            cells.append([row["case"], direction, *values])
    head = ["deform_conv", "", *(f"{cores} cores, target {limit:g}" for cores, limit in TARGETS.items())]
    return ["## Targets: predicted speed-up", "", *table(head, cells)] if cells else []


def checked(results: dict[str, Any]) -> list[str]:
    """The table of predictions beside what was measured."""
    cells = []
    for row in (row for direction in DIRECTIONS for row in measured_rows(results, direction)):
        for check in row["checks"]:
            off = difference(check)
            cells.append(
                [row["operator"], row["case"], row["direction"], str(check["threads"])]
                + [f"{check['predicted']:.2f}", f"{check['measured']:.2f}"]
                + [f"{off:+.1%}" + " **off**" * (abs(off) > CLOSE), f"{row['seconds'] / check['one_seconds']:.3f}"]
            )
    if not cells:
        return []
    head = ["operator", "case", "", "cores", "predicted", "measured", "difference", "timed tasks / plain call, 1 core"]
    return ["## Prediction and measurement", "", *table(head, cells, left=3)]


def draw(results: dict[str, Any], direction: str, path: Path) -> None:
    """A panel for each operator, a line for each case; cases are listed by their speed-up on the most cores."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = measured_rows(results, direction)
    groups = [(name, list(group)) for name, group in itertools.groupby(rows, lambda row: row["operator"])]
    wide = min(3, len(groups))
    high = -(-len(groups) // wide)
    figure, axes = pyplot.subplots(
        high, wide, figsize=(max(5.2 * wide, 6.5), 3.7 * high + 0.6), squeeze=False
    )  # room for the title
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for (name, group), axis in zip(groups, axes.flat, strict=False):
        draw_panel(axis, name, group)
    title = f"{direction}: predicted speed-up by cores, from tasks timed on one core"
    figure.suptitle(f"{title}\n{results['machine']['cpu']}, float32", fontsize=12)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.15 / figure.get_figheight()))
    figure.savefig(path, dpi=100, facecolor="white")
    pyplot.close(figure)


def draw_panel(axis: Any, name: str, rows: list[dict[str, Any]]) -> None:
    """One operator, on logarithmic axes."""
    cores = range(1, MOST + 1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.plot([1, MOST], [1, MOST], color="#bbbbbb", linewidth=1)
    looks = itertools.product(STYLES, COLOURS)
    lines = []
    for row in rows:
        style, colour = next(looks)
        label = f"{row['case']}  {number(row['speedups'][-1])}"
        (line,) = axis.plot(cores, row["speedups"], style, color=colour, linewidth=1.4, label=label)
        lines.append((row["speedups"][-1], line))
    if any(map(has_targets, rows)):
        label = "targets, S1 to S6"
        axis.plot(list(TARGETS), list(TARGETS.values()), "o", color="#666666", markersize=5, label=label, zorder=3)
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axis.set_xticks(ticks, ticks)
    axis.set_yticks(ticks, ticks)
    axis.minorticks_off()
    axis.set_xlim(1, MOST)
    axis.set_ylim(0.9, MOST)
    axis.grid(linewidth=0.3)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("cores", fontsize=8, labelpad=1)
    handles = [line for _, line in sorted(lines, key=lambda pair: -pair[0])]
    extra = [line for line in axis.lines if line.get_label().startswith("targets")]
    axis.legend(
        handles=[*extra, *handles], fontsize=7.5, loc="upper left", title=f"on {MOST} cores", title_fontsize=7.5
    )


def write(results: dict[str, Any], folder: Path, stem: str) -> Path:
    """Writes stem.json, stem.md and a picture for each direction into the folder; returns the second."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json_lines(results), encoding="utf-8")
    pictures = [direction for direction in DIRECTIONS if measured_rows(results, direction)]
    try:
        for direction in pictures:
            draw(results, direction, folder / f"{stem}-{direction}.png")
    except ImportError:
        pictures = []  # matplotlib is not installed
    path = folder / f"{stem}.md"
    names = [f"{stem}-{direction}.png" for direction in pictures]
    path.write_text(markdown(results, names), encoding="utf-8")
    return path
