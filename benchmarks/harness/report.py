"""Writes the measurements: Markdown tables, a bar chart, and the raw results as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases.deform_conv import FLOOR, OPERATOR
from benchmarks.harness.targets import MB, Times, geometric_mean, judge_all, ratio
from benchmarks.rivals.engines import ENGINES

CONTENDERS = OPERATOR.contender_names()
PART = "-part"  # ends the name of a report that is incomplete or made of short runs; nothing is judged there
BASE = {"forward": "numdcn-prepared", "backward": "numdcn"}  # reference of ratios
WORDS = {"unsupported": "-", "failed": "failed", "wrong": "wrong"}
COLOURS = ("#1b6ca8", "#7fb2d9", "#c9def0", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#b08968", "#888888")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def number(value: float) -> str:
    """Three significant digits, never in exponential notation."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def table(head: list[str], rows: list[list[str]], left: int = 2) -> list[str]:
    """A Markdown table, its first columns left-aligned, followed by an empty line."""
    lines = ["| " + " | ".join(head) + " |", "|---" * left + "|---:" * (len(head) - left) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def memory_cell(record: dict[str, Any]) -> str:
    """Megabytes of the call, and of the loaded layer if significant."""
    if "extra" not in record:
        return "-" if record else ""
    held = f" + {record['held'] / MB:.1f}" if record["held"] > 0.1 * MB else ""
    return f"{max(0, record['extra']) / MB:.1f}{held}"


class Report:
    """The results of one run and the tables made from them."""

    def __init__(self, results: dict[str, Any], names: Iterable[str] = CONTENDERS) -> None:
        self.names = list(names)  # contenders in column order
        self.results, self.plan, self.cases = results, results["plan"], results["cases"]
        self.records = {(r["case"], r["direction"], r["threads"], r["contender"]): r for r in results["times"]}
        self.spread = {
            key: quartiles([t for times in r["rounds"] for t in times])
            for key, r in self.records.items()
            if r["status"] == "ok" and r["rounds"]
        }
        self.times = Times({key: middle for key, (_, middle, _) in self.spread.items()})

    def columns(self, direction: str, threads: int) -> list[str]:
        """The contenders that have a record for this direction, in the order of the list; float64 has its own table."""
        found = {key[3] for key in self.records if key[1:3] == (direction, threads)}
        return [name for name in self.names if name in found and name != "numdcn-float64"]

    def cell(self, key: tuple[str, str, int, str]) -> str:
        if key in self.spread:
            low, middle, high = (1e3 * t for t in self.spread[key])
            return f"{number(middle)} ({number(low)}-{number(high)})"
        record = self.records.get(key)
        if record is None:
            return ""
        return f"wrong ({record['detail']})" if record["status"] == "wrong" else WORDS.get(record["status"], "")

    def machine(self) -> list[str]:
        """The machine, and the contenders' versions."""
        lines = [f"- {key}: {value}" for key, value in self.results["machine"].items() if value]
        contenders = [
            f"{name} {about.get('version', '')}".strip() + ("" if about["status"] == "ok" else f": {about['status']}")
            for name, about in self.results["contenders"].items()
        ]
        plan = self.plan
        turns = f"{plan['rounds']} rounds of {plan['fewest']} to {plan['most']} runs or {plan['seconds']} s"
        waiting = "idle threads may spin, with a pause between turns" if plan["spin"] else "idle threads sleep"
        return [*lines, f"- contenders: {'; '.join(contenders)}", f"- {turns}, contenders in turn, {waiting}", ""]

    def targets(self) -> list[str]:
        rows = [list(row) for row in judge_all(self.times, self.results)]
        return ["## Targets", "", *table(["figure", "measured", "target", "verdict"], rows, left=4)]

    def time_table(self, direction: str, threads: int) -> list[str]:
        """Medians and quartiles in ms, ratios, and the geometric mean of each contender's ratio."""
        columns, base = self.columns(direction, threads), BASE[direction]
        head = ["case", "layer", *columns]
        kind, rivals = ("engine", list(ENGINES)) if direction == "forward" else ("rival", OPERATOR.rivals())
        led = any(name in columns for name in rivals)
        head += [f"fastest {kind} / {base}"] * led + [f"{base} / {FLOOR}"]
        ratios: dict[str, list[float]] = {name: [] for name in columns}
        rows = []
        for case, layer in self.cases.items():
            own = self.times.get(case, direction, threads, base)
            row = [case, layer, *(self.cell((case, direction, threads, name)) for name in columns)]
            best = self.times.fastest(case, direction, threads, rivals)
            lead = ratio(best[1] if best else None, own)
            floor = ratio(own, self.times.get(case, direction, threads, FLOOR))
            row += [f"{number(lead)} ({best[0]})" if lead and best else ""] * led
            row += [number(floor) if floor else ""]
            rows.append(row)
            for name in columns:
                other = ratio(self.times.get(case, direction, threads, name), own)
                ratios[name] += [other] if other else []
        means = [f"{number(geometric_mean(r))} over {len(r)}" if r else "" for r in ratios.values()]
        rows.append([f"time / {base}", "geometric mean", *means, *[""] * (1 + led)])
        title = f"## {direction.capitalize()}, {threads} thread{'s' * (threads > 1)}: ms, median (quartiles)"
        return [title, "", *table(head, rows)]

    def notes(self) -> list[str]:
        """Why some cells contain a word."""
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for (case, direction, _, name), record in self.records.items():
            if record["status"] != "ok":
                found = reasons.setdefault((name, record["status"], record["detail"]), [])
                found += [f"{case} {direction}"] if f"{case} {direction}" not in found else []
        lines = [f"- {name}, {WORDS[s]}: {', '.join(found)}: {why}" for (name, s, why), found in reasons.items()]
        return [*lines, ""] if lines else []

    def scaling(self) -> list[str]:
        """One thread's time over that of more threads, and float64's over float32's."""
        most, rows = max(self.plan["threads"]), []
        scaled = (("forward", BASE["forward"]), ("forward", "numdcn"), ("backward", "numdcn")) if most > 1 else ()
        for case in self.cases:
            row = [case]
            for direction, name in scaled:
                one = self.times.get(case, direction, 1, name)
                value = ratio(one, self.times.get(case, direction, most, name))
                row.append(number(value) if value else "")
            for direction in BASE:
                double = self.times.get(case, direction, 1, "numdcn-float64")
                value = ratio(double, self.times.get(case, direction, 1, "numdcn"))
                row.append(number(value) if value else "")
            rows.append(row)
        if not any(text for row in rows for text in row[1:]):
            return []
        head = ["case", *(f"{direction}, {name}, 1T / {most}T" for direction, name in scaled)]
        head += [f"{direction}, 1T, float64 / float32" for direction in BASE]
        return ["## numdcn: threads and float64", "", *table(head, rows, left=1)]

    def memory(self) -> list[str]:
        """Extra peak memory of one call."""
        records = self.results["memory"]
        names = [name for name in self.names if any(r["contender"] == name for r in records)]
        rows = []
        for case, direction in dict.fromkeys((r["case"], r["direction"]) for r in records):
            found = {r["contender"]: r for r in records if (r["case"], r["direction"]) == (case, direction)}
            sizes = next((r for name, r in found.items() if "extra" in r and name != FLOOR), None)
            row = [case, direction, *(f"{sizes[key] / MB:.1f}" if sizes else "" for key in ("x", "inputs", "returned"))]
            for name in names:
                record = found.get(name, {})
                row.append(memory_cell(record))
            rows.append(row)
        if not rows:
            return []
        threads = max(self.plan["threads"])
        title = f"## Peak extra memory of one call, MB, {threads} thread{'s' * (threads > 1)}"
        text = "Inputs and results not counted; after a plus what loading the layer took, packed weights included."
        return [title, "", text, "", *table(["case", "direction", "x", "inputs", "results", *names], rows)]

    def start(self) -> list[str]:
        """Import and first calls."""
        start, rows = self.results["start"], []
        for record in start.get("first", []):
            seconds = record.get("seconds", {})
            cells = [number(seconds[d]) if d in seconds else "" for d in BASE]
            cache = record["cache"] if record["cache"] != "none" else ""
            why = WORDS["unsupported"] if "unsupported" in record else record.get("failed", "")
            imported = number(record["import_seconds"]) if "import_seconds" in record else why
            files = str(record["files"]) if cache else ""
            rows.append([record["case"], record["contender"], cache, imported, *cells, files])
        if not rows:
            return []
        head = ["case", "contender", "cache", "import", "forward", "backward", "files in cache"]
        lines = ["## Start: seconds of the import and of the first calls of a process, loading the layer included", ""]
        if "import_seconds" in start:
            lines += [f"`import numdcn` and with it NumPy, in a fresh process: {start['import_seconds']:.2f} s.", ""]
        return lines + table(head, rows)

    def markdown(self, picture: str | None, whole: bool = True) -> str:
        lines = [
            "# Deformable convolution on a CPU",
            "",
            "Made by `python benchmarks/run.py`; float32, offsets N(0, 2).",
        ]
        lines += ["", *self.machine()]
        lines += [f"![times relative to numdcn]({picture})", ""] if picture else []
        lines += self.targets() if whole else []
        for direction in self.plan["directions"]:
            for threads in self.plan["threads"]:
                if self.columns(direction, threads):
                    lines += self.time_table(direction, threads)
        lines += self.notes() + self.scaling() + self.memory() + self.start()
        return "\n".join(lines).rstrip() + "\n"

    def chart(self, path: Path) -> bool:
        """Bars of each contender's time over numdcn's, one panel per direction and number of threads."""
        try:
            import matplotlib
        except ImportError:
            return False
        matplotlib.use("Agg")
        from matplotlib import pyplot

        panels = [(d, t) for d in self.plan["directions"] for t in self.plan["threads"] if self.columns(d, t)]
        panels = [p for p in panels if any(self.times.get(c, *p, BASE[p[0]]) for c in self.cases)]
        if not panels:
            return False
        figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 3 * len(panels)), squeeze=False)
        for (direction, threads), axis in zip(panels, axes[:, 0], strict=True):
            self.draw(axis, direction, threads)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        return True

    def draw(self, axis: Any, direction: str, threads: int) -> None:
        """One panel: bars that start at 1, numdcn's own time; upwards is slower than numdcn."""
        base = BASE[direction]
        columns = [name for name in self.columns(direction, threads) if name != base]
        width, palette = 0.85 / max(1, len(columns)), dict(zip(CONTENDERS, COLOURS, strict=True))
        for index, name in enumerate(columns):
            places, heights = [], []
            for place, case in enumerate(self.cases):
                own = self.times.get(case, direction, threads, base)
                value = ratio(self.times.get(case, direction, threads, name), own)
                if value:
                    places.append(place + (index - len(columns) / 2 + 0.5) * width)
                    heights.append(value - 1)
            axis.bar(places, heights, width, bottom=1, label=name, color=palette[name])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], minor=False)
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        low, high = axis.dataLim.intervaly
        axis.set_ylim(min(0.5, low / 1.2), max(2, high * 1.2))
        axis.set_xlim(-0.6, len(self.cases) - 0.4)
        axis.set_xticks(range(len(self.cases)), list(self.cases))
        axis.grid(axis="y", linewidth=0.3)
        axis.set_ylabel(f"time / {base}")
        axis.set_title(f"{direction}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def json_lines(results: dict[str, Any]) -> str:
    """JSON with one record per line."""
    fields = []
    for key, value in results.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(record) for record in value) + "\n ]"
        fields.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def write(results: dict[str, Any], folder: Path, stem: str) -> Path:
    """Writes stem.json, stem.png and stem.md into the folder; returns the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json_lines(results), encoding="utf-8")
    report = Report(results)
    drawn = report.chart(folder / f"{stem}.png")
    path = folder / f"{stem}.md"
    path.write_text(report.markdown(f"{stem}.png" if drawn else None, not stem.endswith(PART)), encoding="utf-8")
    return path
