"""What a type checker makes of calls: right ones pass, with the types of their results, and wrong ones do not."""

import subprocess
import sys
import typing

import pytest
from checks import ROOT, limit

import numdcn
from numdcn.warm import OPERATORS


def test_mypy_knows_right_calls_from_wrong_ones():
    """`typed_calls.py` has both. A wrong one that passed would leave its `type: ignore` unused, which is an error."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    options = ["--strict", "--warn-unused-ignores", "--follow-imports=silent", "--no-error-summary"]
    program = [sys.executable, "-m", "mypy", *options, "tests/support/typed_calls.py"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=limit(300))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("operator", OPERATORS)
def test_wrt_names_what_has_a_gradient(operator):
    backward = getattr(numdcn, f"{operator}_backward")
    wrt, gradients = (typing.get_type_hints(backward)[name] for name in ("wrt", "return"))
    name, names, none = typing.get_args(wrt)
    assert typing.get_args(name) == typing.get_origin(gradients)._fields
    assert typing.get_args(names) == (name,) and none is type(None)
