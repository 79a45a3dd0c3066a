"""The README's picture of speed, drawn from the results of benchmarks/run.py: python -m benchmarks.chart [JSON] [--out PNG]

Bars on a logarithmic axis: how many times as long as numdcn torchvision takes, and the fastest inference engine, on two threads.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases.operators import GROUPS
from benchmarks.harness import group_report
from benchmarks.harness.group_report import OWN, OperatorReport
from benchmarks.harness.targets import ratio
from benchmarks.rivals.engines import ENGINES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc.json"
PICTURE = ROOT / "docs" / "pictures" / "speed.png"
DIRECTIONS = ("forward", "backward")
THREADS = 2
TORCHVISION = "torchvision"
TORCH = (TORCHVISION, "torch", "grid_sample", "conv2d")  # torchvision's and torch's
STAGES = {"d2": "100x160", "c1": "56x56"}
CHOSEN = {"dcnv3": STAGES, "dcnv4": STAGES}  # of operators with many cases: what they are called here
VERMILION, BLUE, GREY = "#d55e00", "#0072b2", "#666666"  # the colour-blind tell these apart
WIDTH, LABELS, TOP, BOTTOM = 8.0, 2.05, 0.7, 0.65  # inches: of the picture, and around the bars
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Bar(NamedTuple):
    """What one contender takes, in units of numdcn's time."""

    ratio: float
    colour: str
    text: str


class Row(NamedTuple):
    """A case: its name, what else is said of it, and its bars in each direction; a heading has none."""

    name: str
    detail: str
    bars: dict[str, list[Bar]]

    @property
    def height(self) -> float:
        return 0.31 if self.detail else 0.21 if self.bars else 0.28


def bar(report: OperatorReport, case: str, direction: str, name: str) -> Bar:
    """The bar of one contender; one without length says that there is no result."""
    own = report.times.get(case, direction, THREADS, OWN)
    value = ratio(report.times.get(case, direction, THREADS, name), own)
    if value is None:
        return Bar(1.0, GREY, f"{name}: no result")
    text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    return Bar(value, BLUE if name in ENGINES else VERMILION, f"{text}×" + f" {name}" * (name != TORCHVISION))


def layer_rows(report: OperatorReport) -> list[Row]:
    """The deformable convolution's layers; an exit if nothing of torchvision was measured."""
    for direction in DIRECTIONS:
        if not any(report.times.get(case, direction, THREADS, TORCHVISION) for case in report.cases):
            sys.exit(
                f"There are no times of torchvision's deform_conv2d {direction} with {THREADS} threads in these results. Install "
                'the extra "bench", or name a Python that has torchvision with --torchvision-python, and measure again: '
                "python benchmarks/run.py"
            )
    rows = [Row("deform_conv", "", {})]
    for case, text in report.cases.items():
        shape, _, rest = text.partition(", k")
        bars = {direction: [bar(report, case, direction, TORCHVISION)] for direction in DIRECTIONS}
        if engine := report.times.fastest(case, "forward", THREADS, ENGINES):
            bars["forward"].append(bar(report, case, "forward", engine[0]))
        rows.append(Row(f"{case}: {shape.replace('->', '→')}", f"k{rest}", bars))
    return rows


def other_rows(results: dict[str, Any]) -> list[Row]:
    """The operators of one group that torchvision or torch has too."""
    rows = []
    for report in map(OperatorReport, results.values()):
        rivals = [name for name in report.operator.rivals() if name in TORCH]
        chosen = CHOSEN.get(report.operator.name, {case: case for case in report.cases})
        for case, text in chosen.items() if rivals else ():
            name = report.operator.name + f", {text}" * (len(report.cases) > 1)
            rows.append(
                Row(name, "", {direction: [bar(report, case, direction, rivals[0])] for direction in DIRECTIONS})
            )
    return rows


def read(path: Path) -> tuple[list[Row], str]:
    """The rows, and what was measured: from the results of the deformable convolution and of the groups beside them."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if results.get("plan", {}).get("operator") != "deform_conv":
        sys.exit(f"{path} is not the results of deform_conv")
    report = OperatorReport(results)
    rows = layer_rows(report)
    others = [row for group in GROUPS for row in other_rows(group_report.read(path.with_stem(f"{path.stem}-{group}")))]
    rows += [Row("other operators", "", {}), *others] if others else []
    about, named = results["machine"], (OWN, TORCHVISION, *ENGINES)
    versions = [f"{name} {found.get('version', '')}" for name, found in results["contenders"].items() if name in named]
    machine = f"{about['cpu']}, {about['SIMD']}, {THREADS} threads, float32, medians, logarithmic axis, {about['date']}"
    return rows, f"{machine}. deform_conv: offsets N(0, 2); {', '.join(versions)}."


def draw(rows: list[Row], caption: str, path: Path) -> None:
    """Two panels, forward and backward, a row for each case; y runs in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(row.height for row in rows)
    whole, panel = TOP + height + BOTTOM, (WIDTH - LABELS) / 2
    figure = pyplot.figure(figsize=(WIDTH, whole))
    ratios = [one.ratio for row in rows for bars in row.bars.values() for one in bars]
    low, high = min(0.9, min(ratios) / 1.2), max(ratios) * 3
    for place, direction in enumerate(DIRECTIONS):
        left = LABELS + place * panel
        axis = figure.add_axes((left / WIDTH, BOTTOM / whole, (panel - 0.12) / WIDTH, height / whole))
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.set_ylim(height, 0)
        axis.set_yticks([])
        ticks = [tick for tick in TICKS if low <= tick <= max(ratios) * 1.2]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8, color=GREY)
        axis.set_xticks([], minor=True)
        axis.tick_params(length=0)
        axis.grid(axis="x", linewidth=0.4, color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[:].set_visible(False)
        axis.axvline(1, color="black", linewidth=1)
        axis.text(1, -0.06, "numdcn", ha="center", va="bottom", fontsize=8)
        axis.text(high, -0.06, direction, ha="right", va="bottom", fontsize=10, weight="bold")
        draw_rows(axis, rows, direction, -(left - 0.1) / (panel - 0.12) if place == 0 else None)
    inch = 1 / whole
    figure.text(0.1 / WIDTH, 1 - 0.2 * inch, "Time relative to numdcn", fontsize=11, weight="bold", va="center")
    figure.text(
        LABELS / WIDTH + 0.12, 1 - 0.2 * inch, "torchvision (or torch)", color=VERMILION, fontsize=9.5, va="center"
    )
    text = "fastest inference engine (none has a backward)"
    figure.text(LABELS / WIDTH + 0.33, 1 - 0.2 * inch, text, color=BLUE, fontsize=9.5, va="center")
    small = "\n".join(textwrap.wrap(caption, 135))
    figure.text(0.1 / WIDTH, 0.08 * inch, small, fontsize=7, color=GREY, va="bottom", linespacing=1.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor="white")
    pyplot.close(figure)


def draw_rows(axis: Any, rows: list[Row], direction: str, label_at: float | None) -> None:
    """The bars of one panel; with label_at, in widths of the panel, the rows' names too."""
    top = 0.0
    for row in rows:
        middle = top + row.height / 2
        if label_at is not None:
            place = {"x": label_at, "transform": axis.get_yaxis_transform(), "va": "center"}
            axis.text(
                y=middle - 0.06 * bool(row.detail),
                s=row.name,
                fontsize=8.5,
                weight=None if row.bars else "bold",
                **place,
            )
            axis.text(y=middle + 0.08, s=row.detail, fontsize=7, color=GREY, **place)
        bars = row.bars.get(direction, [])
        for index, one in enumerate(bars):
            y = middle + 0.14 * (index - (len(bars) - 1) / 2)
            axis.barh(y, one.ratio - 1, 0.1, left=1, color=one.colour)
            axis.annotate(
                one.text,
                (max(1, one.ratio), y),
                (3, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=8,
                color=one.colour,
            )
        top += row.height


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chart", description="Draw the README's picture of speed."
    )
    parser.add_argument(
        "results", type=Path, nargs="?", default=RESULTS, help="JSON of deform_conv, those of the groups beside it"
    )
    parser.add_argument("--out", type=Path, default=PICTURE, help="default: docs/pictures/speed.png")
    args = parser.parse_args(arguments)
    draw(*read(args.results), args.out)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
