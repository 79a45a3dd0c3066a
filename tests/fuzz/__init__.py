"""Random problems for every operator against the naive references, for a given time: `python -m tests.fuzz --help`."""

import pathlib
import sys

TESTS = pathlib.Path(__file__).resolve().parents[1]
for folder in (TESTS.parent, TESTS, TESTS / "ops", TESTS / "support"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

OPERATORS = sorted(path.parent.name for path in TESTS.parent.glob("numdcn/*/problem.py"))
