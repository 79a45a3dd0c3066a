"""The tests that run on a GPU, those with the mark `cuda`: a process for each file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.jobs import ROOT, Job
from benchmarks.harness.report import table

MARK = "cuda and not large"
HINT = re.compile(
    r"family_gpu\.\w+\)|\bgpu\b[,)]|[=*,] ?device\.KINDS|mark\.cuda"
)  # in the source of a file that has such tests
LINE = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
COLLECTED = re.compile(r"collected (\d+) items?(?:.* / (\d+) selected)?")
NOTHING_COLLECTED = 5  # an exit code of pytest


def files() -> list[str]:
    """The files that may have tests of a GPU: those of memory and streams first, then the longest."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    found = [path for path, text in sources.items() if HINT.search(text)]
    found.sort(key=lambda path: (path.parent.name != "cuda", -len(sources[path])))
    return [path.relative_to(ROOT).as_posix() for path in found]


def command(file: str) -> list[str]:
    """Prints a line for each test, so that it can be stopped at any moment."""
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", MARK, file]


class Outcome(NamedTuple):
    """What became of the tests of a file."""

    file: str
    status: str  # passed, failed, stopped, not started, none: it has no test of a GPU
    passed: int = 0
    skipped: int = 0
    collected: int = 0
    seconds: float = 0.0
    failures: tuple[str, ...] = ()


def outcome(file: str, job: Job | None) -> Outcome:
    """Of a file, from the output of its process."""
    if job is None:
        return Outcome(file, "not started")
    output = job.output
    found = LINE.findall(output)
    told = COLLECTED.search(output)
    collected = int(told[2] or told[1]) if told else len(found)
    failures = [f"{what} {test}" for test, what in found if what in ("FAILED", "ERROR", "XPASS")]
    code = job.process.returncode
    if job.late:
        status = "failed" if failures else "stopped"
    elif code == NOTHING_COLLECTED:
        status = "none"
    else:
        status = "failed" if code or failures else "passed"
    passed, skipped = (sum(what == kind for _, what in found) for kind in ("PASSED", "SKIPPED"))
    if status == "passed" and not passed:
        status, failures = "failed", [f"all {skipped} tests were skipped: {job.last_line}"]
    if status == "failed" and not failures:
        failures = [f"exit code {code}: {job.last_line}"]
    return Outcome(file, status, passed, skipped, collected, job.seconds, tuple(failures))


def verdict(outcomes: list[Outcome]) -> str:
    """right, wrong, or stopped: of all tests that ran none failed, but some did not run."""
    ran = [one for one in outcomes if one.status != "none"]
    if any(one.status == "failed" for one in ran) or not ran:
        return "wrong"
    return "stopped" if any(one.status in ("stopped", "not started") for one in ran) else "right"


def text(outcomes: list[Outcome]) -> str:
    """A table, and every test that failed."""
    ran = [one for one in outcomes if one.status != "none"]
    if not ran:
        return "No test has the mark `cuda`."
    rows = [
        [
            f"`{Path(one.file).name}`",
            one.status,
            str(one.passed),
            str(one.skipped),
            str(one.collected),
            f"{one.seconds:.0f}",
        ]
        for one in ran
    ]
    head = ["file", "", "passed", "skipped", "of", "seconds"]
    lines = [f'`pytest -m "{MARK}"`, a process for each file:', "", *table(head, rows, left=2)]
    failures = [failure for one in ran for failure in one.failures]
    lines += [f"- `{failure[:300]}`" for failure in failures[:40]]
    if len(failures) > 40:
        lines.append(f"- and {len(failures) - 40} others")
    return "\n".join(lines)
