"""Runs random problems: `python -m tests.fuzz --seconds 60`; to replay a failure: `python -m tests.fuzz --seed S --only
OP`.

Problems run in a separate process, so that the seed of one that crashes or hangs is known too. The exit code is 1 if
anything failed.
"""

import argparse
import collections
import os
import sys
import time

from fuzz import OPERATORS
from fuzz.worker import Worker


def problems(operators, seed, until):
    """(operator, seed), for each operator in turn, until the time is up; at least one of each."""
    first = seed
    while seed == first or time.monotonic() < until:
        for operator in operators:
            yield operator, seed
        seed += 1


def progress(counts, failures, started):
    if sys.stderr.isatty():
        numbers = "  ".join(f"{name} {count}" for name, count in counts.items())
        print(f"\r{time.monotonic() - started:.0f} s  {numbers}  failures {failures}", end="", file=sys.stderr)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Random problems against the naive references."
    )
    parser.add_argument("--seconds", type=float, help="how long; without it, one problem of each operator", default=0)
    parser.add_argument("--seed", type=int, help="of the first problem; by default another one at every run")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="OP")
    parser.add_argument("--most", type=int, default=20, help="failures, after which it ends")
    given = parser.parse_args(arguments)
    seed = int.from_bytes(os.urandom(4), "little") if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    started, failures, worker = time.monotonic(), 0, None
    counts = collections.Counter(dict.fromkeys(given.only, 0))
    for operator, number in problems(given.only, seed, started + given.seconds):
        worker = worker or Worker()
        wrong, alive = worker.run(operator, number)
        counts[operator] += 1
        if wrong:
            failures += 1
            print(f"\n--seed {number} --only {operator}\n{wrong}", flush=True)
        if not alive:
            worker = None
        progress(counts, failures, started)
        if failures == given.most:
            break
    print(f"\n{failures} failures of {counts.total()} problems:", ", ".join(f"{n} {c}" for n, c in counts.items()))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
