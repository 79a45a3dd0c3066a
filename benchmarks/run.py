"""The benchmark in one command: `python benchmarks/run.py` (or `python -m benchmarks.run`); see --help.

Each contender has its own process; they run in turn, round by round; see harness/measure.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from benchmarks.cases.operators import GROUPS, OPERATORS, operator  # noqa: E402
from benchmarks.harness import group_report, machine, report, terminal  # noqa: E402
from benchmarks.harness.measure import Plan, measure  # noqa: E402

DIRECTIONS = ("forward", "backward")
PARTS = ("times", "memory", "start")
TORCHVISION = "NUMDCN_TORCHVISION_PYTHON"


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Measures numdcn against what is installed.")
    parser.add_argument(
        "--operators",
        nargs="+",
        metavar="NAME",
        help=f"operators or groups of them, or all; default: deform_conv; known: {', '.join([*OPERATORS, *GROUPS])}",
    )
    parser.add_argument("--cases", help="default: all; see --list")
    parser.add_argument("--contenders", help="default: all that are installed; see --list")
    parser.add_argument("--direction", default=",".join(DIRECTIONS), help="default: forward,backward")
    parser.add_argument("--threads", default="1,2,all", help="default: 1,2,all (as far as there are CPUs)")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: times,memory,start")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="few and short runs: to see that it works")
    parser.add_argument("--spin", action="store_true", help="let idle threads spin; pause between turns")
    parser.add_argument(
        "--torchvision-python",
        metavar="PATH",
        help=f"another Python, for torchvision alone; default: {TORCHVISION}, if set, else this one",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing: report these results")
    parser.add_argument("--list", action="store_true", help="list operators, cases and contenders")
    return parser


def chosen_operators(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The named operators, with groups expanded, in the order of the list."""
    chosen: set[str] = set()
    for word in (word for text in words for word in text.split(",") if word):
        if word not in ("all", *OPERATORS, *GROUPS):
            parser.error(f"--operators: {word}; known are all, {', '.join([*OPERATORS, *GROUPS])}")
        chosen.update(OPERATORS if word == "all" else [word] if word in OPERATORS else GROUPS[word])
    return [name for name in OPERATORS if name in chosen]


def chosen_names(parser: argparse.ArgumentParser, text: str, known: list[str], what: str) -> list[str]:
    """The names in a list with commas, in the order of those that are known."""
    chosen = [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        parser.error(f"{what}: {', '.join(unknown) or 'none given'}; known are {', '.join(known)}")
    return [name for name in known if name in chosen]


def thread_counts(parser: argparse.ArgumentParser, text: str) -> list[int]:
    """The numbers of threads in a list with commas; of the default those for which there are CPUs."""
    cpus = len(machine.available_cpus())
    try:
        threads = {cpus if word == "all" else int(word) for word in text.split(",")}
    except ValueError:
        parser.error(f"--threads: {text!r}; expected numbers or all")
    if text == parser.get_default("threads"):
        threads = {count for count in threads if count <= cpus}
    if min(threads) < 1 or max(threads) > cpus:
        parser.error(f"--threads: {text!r}; expected 1 to {cpus}, the CPUs that this process may use")
    return sorted(threads)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Plan]]:
    """The command line, checked: a plan for each operator."""

    def names(text: str, known: list[str], what: str) -> list[str]:
        return chosen_names(parser, text, known, what)

    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if args.torchvision_python:
        os.environ[TORCHVISION] = args.torchvision_python
    threads = thread_counts(parser, args.threads)
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}; expected 1 or more")
    words = args.operators or (["all"] if args.list else ["deform_conv"])
    chosen = [operator(name) for name in chosen_operators(parser, words)]
    cases = list(dict.fromkeys(case for one in chosen for case in one.cases))
    contenders = list(dict.fromkeys(name for one in chosen for name in one.contender_names()))
    cases = names(args.cases, cases, "--cases") if args.cases is not None else cases
    contenders = names(args.contenders, contenders, "--contenders") if args.contenders is not None else contenders
    plans = [
        Plan(
            one.name,
            [case for case in one.cases if case in cases],
            [name for name in one.contender_names() if name in contenders],
            names(args.direction, list(DIRECTIONS), "--direction"),
            threads,
            names(args.parts, list(PARTS), "--parts"),
            args.rounds or (2 if args.quick else 5),
            *((0.1, 3, 10) if args.quick else (0.3, 5, 50)),
            args.spin,
        )
        for one in chosen
    ]
    return args, [plan for plan in plans if plan.cases and plan.contenders]


def print_list(plans: list[Plan]) -> None:
    for plan in plans:
        one = operator(plan.operator)
        print(plan.operator)
        for name in plan.cases:
            print(f"  {name:17}{one.cases[name].text}")
        for name in plan.contenders:
            contender = one.contender(name)
            here = contender.python() == sys.executable
            version = contender.version() if here else contender.python()
            version = version if contender.installed() else "not installed"
            print(f"  {name:17}{', '.join(contender.directions):19}{version}")


def is_whole(plan: Plan) -> bool:
    """Whether nothing is left out and the times are not those of --quick or --spin."""
    return parse(["--operators", plan.operator])[1][0]._replace(rounds=plan.rounds) == plan


def save(plan: Plan, results: dict[str, Any], folder: Path, partial: dict[str, dict[str, Any]]) -> Path:
    """Writes the report of an operator, or that of its group with it; `partial` collects incomplete results for the
    others."""
    stem, whole = machine.slug(results["machine"]["cpu"]), is_whole(plan)
    group = next((name for name, operators in GROUPS.items() if plan.operator in operators), None)
    if group is None:
        return report.write(results, folder, stem + ("" if whole else report.PART))
    kept = group_report.read(folder / f"{stem}-{group}.json") if whole else partial.setdefault(group, {})
    kept[plan.operator] = results
    return group_report.write(kept, folder, f"{stem}-{group}" + ("" if whole else report.PART), group)


def main(arguments: list[str] | None = None) -> int:
    args, plans = parse(arguments)
    if args.list:
        print_list(plans)
        return 0
    if args.report:
        found = json.loads(args.report.read_text(encoding="utf-8"))
        write = report.write if "plan" in found else group_report.write
        for results in [found] if "plan" in found else found.values():
            print(terminal.text(results))
        print(f"Report: {write(found, args.report.parent, args.report.stem)}")
        return 0
    paths: list[Path] = []
    partial: dict[str, dict[str, Any]] = {}
    for plan in plans:
        print(plan.operator, file=sys.stderr)
        results = measure(plan)
        paths.append(save(plan, results, args.out, partial))
        print(terminal.text(results), flush=True)
    for path in dict.fromkeys(paths):
        print(f"Report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
