"""What the terminal shows of an operator: median milliseconds with the most threads, a table for each direction."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.group_report import OWN, OperatorReport
from benchmarks.harness.report import WORDS, number


def cell(report: OperatorReport, key: tuple[str, str, int, str]) -> str:
    """The median of one contender, or a word where there is none."""
    seconds = report.times.get(*key)
    if seconds is not None:
        return number(1e3 * seconds)
    return WORDS.get(report.records[key]["status"], "") if key in report.records else ""


def aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table: first column to the left, the others to the right; titles of one or two lines."""
    titles = [title.split("\n") for title in head]
    above, below = [title[0] if len(title) > 1 else "" for title in titles], [title[-1] for title in titles]
    lines = [*[above] * any(above), below, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]


def table(report: OperatorReport, direction: str, threads: int) -> list[str]:
    """The cases in one direction, an empty line before them; nothing if none was measured."""
    names = report.columns(direction, threads)
    if not names:
        return []
    rows = []
    for case in report.cases:
        row = report.row(case, direction)
        lead = f"{number(row.ratios[threads])} {row.rivals[threads]}" if threads in row.ratios else ""
        rows.append([case, *(cell(report, (case, direction, threads, name)) for name in names), lead])
    head = [direction, *(name.replace("-", "-\n", 1) for name in names)]
    if any(row[-1] for row in rows):
        head.append(f"{'fastest rival' if report.operator.rivals() else 'floor'}\n/ {OWN}")
    return ["", *aligned(head, [row[: len(head)] for row in rows])]


def text(results: dict[str, Any]) -> str:
    """All that is shown of an operator."""
    report = OperatorReport(results)
    threads = max(report.plan["threads"])
    lines = [f"{report.operator.name}: median milliseconds, {threads} thread{'s' * (threads > 1)}"]
    for direction in report.plan["directions"]:
        lines += table(report, direction, threads)
    told = [
        f"{name}: {'the operator that is not deformed, a floor' if about['status'] == 'ok' else about['status']}"
        for name, about in results["contenders"].items()
        if about["status"] != "ok" or report.operator.contender(name).plain
    ]
    return "\n".join([*lines, *["", *told] * bool(told), ""])
