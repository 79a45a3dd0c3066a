"""Writes the measurements of a group of operators: targets, tables, a bar chart, and the raw results as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases.interface import Operator, Target
from benchmarks.cases.operators import GROUPS, operator
from benchmarks.harness.report import PART, Report, json_lines, number, table
from benchmarks.harness.targets import ratio

OWN = "numdcn"  # the contender being judged
DIRECTIONS = ("forward", "backward")
SHADES = ("#7fb2d9", "#1b6ca8", "#0d3a5c")  # by number of threads
FLOORS = ("#cccccc", "#999999", "#666666")


class Row(NamedTuple):
    """One case in one direction: speed relative to the fastest rival, or to the floor, by number of threads."""

    case: str
    direction: str
    ratios: dict[int, float]
    rivals: dict[int, str]
    floor: bool


class OperatorReport(Report):
    """The results of one operator and its tables."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.operator: Operator = operator(results["plan"]["operator"])
        super().__init__(results, self.operator.contender_names())

    def row(self, case: str, direction: str, against: str = "fastest") -> Row:
        """numdcn against the fastest rival, else the floor, or against one contender."""
        names = self.operator.rivals() if against == "fastest" else [against]
        floors = [name for name in self.names if self.operator.contender(name).plain]
        row = Row(case, direction, {}, {}, not names)
        for threads in self.plan["threads"]:
            other = self.times.fastest(case, direction, threads, names or floors)
            value = ratio(other[1] if other else None, self.times.get(case, direction, threads, OWN))
            if value and other:
                row.ratios[threads], row.rivals[threads] = value, other[0]
        return row

    def rows(self) -> list[Row]:
        return [self.row(case, d) for case in self.cases for d in DIRECTIONS if d in self.plan["directions"]]

    def target(self, case: str, direction: str) -> Target | None:
        fitting = (t for t in self.operator.targets if t.direction == direction and case in (t.cases or self.cases))
        return next(fitting, None)

    def judged(self) -> list[list[str]]:
        """Rows of the table of targets."""
        rows = []
        for case in self.cases:
            for direction in (d for d in DIRECTIONS if d in self.plan["directions"]):
                target = self.target(case, direction)
                row = self.row(case, direction, target.against if target else "fastest")
                rows.append([self.operator.name, case, direction, *self.judge(row, target)])
        return rows

    def judge(self, row: Row, target: Target | None) -> list[str]:
        """The values for each number of threads, the target, and whether it is met."""
        cells, missed = [], []
        for threads in self.plan["threads"]:
            if threads not in row.ratios:
                cells.append("not measured")
                continue
            value = row.ratios[threads]
            if target and not target.times_faster:
                value = 1 / value
            good = target is None or (value >= target.limit if target.times_faster else value <= target.limit)
            missed += [threads] * (not good)
            text = f"{number(value)} ({row.rivals[threads]})"
            cells.append(text if good else f"**{text}**")
        if target is None:
            return [*cells, "none: that is the plain operator" if row.floor else "-", "-"]
        wanted = (
            f"theirs / numdcn >= {target.limit:g}" if target.times_faster else f"numdcn / theirs <= {target.limit:g}"
        )
        lacking = len(row.ratios) < len(self.plan["threads"])
        verdict = "missed" if missed else "not measured" if lacking else "met"
        return [*cells, wanted, verdict]

    def times_rows(self) -> list[str]:
        """Medians and quartiles of every contender."""
        found = {key[3] for key in self.records}
        names = [name for name in self.names if name in found]
        rows = []
        for direction in (d for d in DIRECTIONS if d in self.plan["directions"]):
            for case, text in self.cases.items():
                row = self.row(case, direction)
                for threads in self.plan["threads"]:
                    cells = [self.cell((case, direction, threads, name)) for name in names]
                    if not any(cells):
                        continue
                    value = number(row.ratios[threads]) if threads in row.ratios else ""
                    rows.append([f"{case}: {text}", f"{direction}, {threads}T", *cells, value])
        if not rows:
            return []
        rival = "floor" if not self.operator.rivals() else "fastest other"
        return table(["case", "ms, median (quartiles)", *names, f"{rival} / {OWN}"], rows)

    def section(self) -> list[str]:
        """Everything about the operator, one level below its title."""
        name, about = self.operator.name, self.results["machine"]
        made = f"Measured on {about['date']}, load average before: {about['load average before']}"
        made += f", minutes taken: {about['minutes taken']}." if "minutes taken" in about else "."
        lines = [f"## {name}", "", f"Inputs: {self.operator.inputs_text}. {made}", "", *self.times_rows()]
        lines += [*self.notes(), *self.memory(), *self.start()]
        return lines[:2] + [
            line.replace("## ", f"### {name}: ", 1) if line[:3] == "## " else line for line in lines[2:]
        ]


def versions(reports: list[OperatorReport]) -> str:
    """The contenders with their versions, or the reason why they are missing."""
    found: dict[str, str] = {}
    for report in reports:
        for name, about in report.results["contenders"].items():
            good = about["status"] == "ok"
            found[name] = f"{name} {about.get('version', '')}".strip() if good else f"{name}: {about['status']}"
    return "; ".join(found.values())


def targets(reports: list[OperatorReport]) -> list[str]:
    """The table of what is wanted, for the operators measured with the same numbers of threads as the last."""
    threads = reports[-1].plan["threads"]
    head = ["operator", "case", "direction", *(f"{t}T" for t in threads), "wanted", "verdict"]
    rows = [row for report in reports if report.plan["threads"] == threads for row in report.judged()]
    lines = ["## Targets", "", "Their time over numdcn's, more is better, unless the other way is wanted.", ""]
    return lines + table(head, rows, left=3)


def markdown(reports: list[OperatorReport], group: str, picture: str | None, whole: bool = True) -> str:
    """The whole report."""
    last, names = reports[-1], [report.operator.name for report in reports]
    lines = [
        f"# {', '.join(names)} on a CPU",
        "",
        f"Made by `python benchmarks/run.py --operators {group}`; float32.",
        "",
    ]
    skipped = ("load average before", "date", "minutes taken")
    lines += [f"- {key}: {value}" for key, value in last.results["machine"].items() if value and key not in skipped]
    plan = last.plan
    turns = f"{plan['rounds']} rounds of {plan['fewest']} to {plan['most']} runs or {plan['seconds']} s"
    waiting = "idle threads may spin, with a pause between turns" if plan["spin"] else "idle threads sleep"
    lines += [f"- contenders: {versions(reports)}", f"- {turns}, contenders in turn, {waiting}"]
    checked = "every result is checked against a float64 reference, and against the others', before it is timed"
    lines += [f"- {checked}", ""]
    lines += [f"![how many times as fast as the fastest other]({picture})", ""] if picture else []
    lines += targets(reports) if whole else []
    for report in reports:
        lines += report.section()
    return "\n".join(lines).rstrip() + "\n"


def chart(reports: list[OperatorReport], path: Path) -> bool:
    """Bars of the fastest other's time over numdcn's; one panel per direction, one row per case."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = [(report, case) for report in reports for case in report.cases]
    if not any(row.ratios for report in reports for row in report.rows()):
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 1.3 + 0.42 * len(places)), sharey=True)
    for direction, axis in zip(DIRECTIONS, axes, strict=True):
        draw(axis, direction, places)
    labels = [f"{r.operator.name} {case}" if len(r.cases) > 1 else r.operator.name for r, case in places]
    axes[0].set_yticks(range(len(places)), labels, fontsize=9)
    axes[0].set_ylim(len(places) - 0.4, -0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.32 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def draw(axis: Any, direction: str, places: list[tuple[OperatorReport, str]]) -> None:
    """One panel: bars to the right of 1 where numdcn is faster, a black mark at the target."""
    from matplotlib import patches

    most = max(len(report.plan["threads"]) for report, _ in places)
    values = [1.0]
    for place, (report, case) in enumerate(places):
        row, target = report.row(case, direction), report.target(case, direction)
        for index, threads in enumerate(report.plan["threads"]):
            if threads not in row.ratios:
                continue
            value, height = row.ratios[threads], 0.8 / most
            y = place + (index - (most - 1) / 2) * height
            colour = (FLOORS if row.floor else SHADES)[min(index, len(SHADES) - 1)]
            axis.barh(y, value - 1, height, left=1, color=colour)
            text = f"{value:.1f}" if value < 10 else f"{value:.0f}"
            text = f"{value:.2f}" if value < 1.95 else text
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.2, "alpha": 0.75}
            axis.annotate(
                text,
                (value, y),
                (3 if value >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if value >= 1 else "right",
                va="center",
                fontsize=7,
                bbox=box,
            )
            values.append(value)
        if target and row.ratios:
            wanted = target.limit if target.times_faster else 1 / target.limit
            axis.plot([wanted, wanted], [place - 0.45, place + 0.45], color="black", linewidth=1.5)
            values.append(wanted)
    for index, threads in enumerate(
        next(report.plan["threads"] for report, _ in places if len(report.plan["threads"]) == most)
    ):
        word = f"{threads} thread{'s' * (threads > 1)}"
        axis.add_patch(patches.Rectangle((1, -9), 0, 0, color=SHADES[min(index, len(SHADES) - 1)], label=word))
    if any(report.row(case, direction).floor for report, case in places):
        axis.add_patch(patches.Rectangle((1, -9), 0, 0, color=FLOORS[1], label="against the plain operator"))
    axis.plot([], [], color="black", linewidth=1.5, label="wanted")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    low, high = min(values), max(values)
    axis.set_xlim(min(0.5, low / 1.8), max(2, high * 1.8))
    ticks = [
        t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 1.8 <= t <= max(2, high * 1.8)
    ]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.grid(axis="x", linewidth=0.3)
    axis.set_axisbelow(True)
    axis.set_title(f"{direction}: times as fast as the fastest other", fontsize=9)


def read(path: Path) -> dict[str, Any]:
    """The results of a group by operator; empty if there are none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def ordered(results: dict[str, Any]) -> dict[str, Any]:
    """The results in the order in which the groups list their operators."""
    return {name: results[name] for group in GROUPS.values() for name in group if name in results}


def write(results: dict[str, Any], folder: Path, stem: str, group: str | None = None) -> Path:
    """Writes stem.json, stem.png and stem.md into the folder; returns the last. `results` are by operator name.

    If the files of all groups for the same machine exist, one chart of all operators is drawn too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = ordered(results)
    text = ",\n".join(f"{json.dumps(name)}: {json_lines(value).rstrip()}" for name, value in results.items())
    (folder / f"{stem}.json").write_text("{\n" + text + "\n}\n", encoding="utf-8")
    reports = [OperatorReport(value) for value in results.values()]
    group = group or next(name for name, operators in GROUPS.items() if next(iter(results)) in operators)
    drawn = chart(reports, folder / f"{stem}.png")
    path = folder / f"{stem}.md"
    text = markdown(reports, group, f"{stem}.png" if drawn else None, not stem.endswith(PART))
    path.write_text(text, encoding="utf-8")
    if stem.endswith(f"-{group}"):
        machine = stem.removesuffix(f"-{group}")
        found = [read(folder / f"{machine}-{name}.json") for name in GROUPS]
        if all(found):
            whole = [OperatorReport(value) for one in found for value in one.values()]
            chart(whole, folder / f"{machine}-operators.png")
    return path
