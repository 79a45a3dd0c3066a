"""Two checkouts of numdcn, timed in turn: python -m benchmarks.compare OLD NEW [--operators NAME ...] [--cases ...] [--threads 1,2]

Each has a process of its own, with the numdcn package of its folder; cases and inputs are those of this checkout. In every round both
are timed, one right after the other, each first in every second round, and the new one's median is divided by the old one's: what slows
the machine for a while slows both. A row is the median of these ratios, with quartiles. Exits with 1 if a row is slower than --limit,
if a result is wrong, or if nothing was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from pathlib import Path

from benchmarks.cases.operators import operator
from benchmarks.harness.group_report import DIRECTIONS, OWN
from benchmarks.harness.measure import status_of
from benchmarks.harness.report import number, quartiles
from benchmarks.harness.worker import CHECKOUT, Worker, WorkerFailed
from benchmarks.run import chosen_names, chosen_operators, thread_counts

TURN = {"seconds": 0.2, "fewest": 3, "most": 50}  # of each checkout in each round
ROW = "{:18}  {:9} {:8}  {:>7}  {:>8}  {:>8}  {:>8}  {:13}  {}"


def arguments_parser() -> argparse.ArgumentParser:
    text = "Times two checkouts of numdcn in turn; exits with 1 if the new one is slower."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=text)
    parser.add_argument("old", type=Path, help="a folder that holds numdcn/")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--operators", nargs="+", metavar="NAME", default=["deform_conv"], help="default: deform_conv")
    parser.add_argument("--cases", help="default: all of each operator")
    parser.add_argument("--threads", default="1,2", help="default: 1,2 (as far as there are CPUs)")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--limit", type=float, default=1.03, help="of the new time over the old one; default: 1.03")
    return parser


def start(name: str, threads: int, checkout: Path) -> Worker:
    """A process that has imported the checkout's numdcn."""
    worker = Worker(name, OWN, threads, env={CHECKOUT: str(checkout)})
    file = worker.ask("hello")["file"]
    if not Path(file).is_relative_to(checkout):
        raise WorkerFailed(f"{file} was imported, which is not in {checkout}")
    return worker


def make_ready(worker: Worker, case: str, direction: str) -> tuple[str, str]:
    """Loads a case, and checks the result; what came of it: "ok", or another word and why."""
    answer = worker.ask("load", case=case)  # empty if all is well
    return status_of(answer or worker.ask("verify", direction=direction))


def time_pairs(pair: list[Worker], direction: str, rounds: int) -> list[tuple[float, float]]:
    """The medians of both, in seconds, round by round."""
    found = []
    for turn in range(rounds):
        medians = [0.0, 0.0]
        for index in (0, 1) if turn % 2 == 0 else (1, 0):
            answer = pair[index].ask("time", direction=direction, seed=100 + 10 * turn, **TURN)
            if "times" not in answer:
                raise WorkerFailed(status_of(answer)[1])
            medians[index] = statistics.median(answer["times"])
        found.append((medians[0], medians[1]))
    return found


def compare(pair: list[Worker], case: str, direction: str, rounds: int, limit: float) -> tuple[list[str], bool | None]:
    """The last cells of a row, and whether it is good; None if a checkout does not have this."""
    for worker, which in zip(pair, ("old", "new"), strict=True):
        status, why = make_ready(worker, case, direction)
        if status != "ok":
            return ["", "", "", "", f"{which}: {status}: {why}"], None if status == "unsupported" else False
    times = time_pairs(pair, direction, rounds)
    old, new = (number(1e3 * statistics.median(column)) for column in zip(*times, strict=True))
    low, ratio, high = quartiles([after / before for before, after in times])
    good = ratio <= limit
    return [old, new, f"{ratio:.3f}", f"({low:.3f}-{high:.3f})", "" if good else "slower"], good


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    checkouts = [path.resolve() for path in (args.old, args.new)]
    for path in checkouts:
        if not (path / "numdcn" / "__init__.py").exists():
            parser.error(f"{path} has no numdcn/__init__.py")
    operators = [operator(name) for name in chosen_operators(parser, args.operators)]
    known = list(dict.fromkeys(case for one in operators for case in one.cases))
    cases = known if args.cases is None else chosen_names(parser, args.cases, known, "--cases")
    counts = thread_counts(parser, args.threads)
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}; expected 1 or more")
    verdicts: list[bool] = []
    print(ROW.format("operator", "case", "", "threads", "old, ms", "new, ms", "new/old", "(quartiles)", "").rstrip())
    for one in operators:
        for threads in counts:
            with contextlib.ExitStack() as stack:
                pair = [stack.enter_context(contextlib.closing(start(one.name, threads, path))) for path in checkouts]
                for case in (case for case in one.cases if case in cases):
                    for direction in DIRECTIONS:
                        cells, good = compare(pair, case, direction, args.rounds, args.limit)
                        print(ROW.format(one.name, case, direction, threads, *cells).rstrip(), flush=True)
                        verdicts += [good] if good is not None else []
    slower = verdicts.count(False)
    print(f"{slower} of {len(verdicts)} rows slower than {args.limit:g}, or wrong")
    return int(slower > 0 or not verdicts)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"failed: {error}")
