"""Shared by all tests: the implementations, comparing arrays, messages, memory layouts, and running programs.

Error bounds. A sum of `length` products in a dtype of precision eps differs from the exact one by about
4 eps*sqrt(length)*sum|terms| when roundings are independent, and each term has a few roundings of its own
(coordinate, two corner weights, mask). So a result may differ from the float64 reference by
eps * (ROUNDINGS + sqrt(length)) * sum|terms|, with sum|terms| computed element by element from the naive formulas on
absolute values. Where no term contributes, the bound is zero and the result must be exactly zero.
"""

import importlib
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

ROUNDINGS = 6
ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = [str(ROOT / "tests" / folder) for folder in ("support", "ops", "cuda", "")]  # whose modules import each other


class Backend(NamedTuple):
    """Two functions from NumPy arrays to NumPy arrays, with the signatures of an operator's forward and backward."""

    name: str
    forward: Callable
    backward: Callable
    gpu: bool = False  # where sums by atomics are added in a different order each run


def cpu(operator):
    import numdcn

    return Backend("cpu", getattr(numdcn, f"{operator}_forward"), getattr(numdcn, f"{operator}_backward"))


def reference(operator):
    module = importlib.import_module(f"naive.{operator}")
    return Backend("naive", module.forward, module.backward)


def assert_close(got, value, bound, name):
    """got equals value within bound, element by element, with NaN and infinities in the same places."""
    assert got.shape == value.shape, f"{name}: shape {got.shape}, expected {value.shape}"
    finite = np.isfinite(value)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        wrong = np.argwhere(kind(got) != kind(value))
        assert not len(wrong), f"{name}: {kind.__name__} differs at {len(wrong)} elements, first {wrong[0]}"
    excess = np.abs(got[finite] - value[finite]) - np.broadcast_to(bound, value.shape)[finite]
    if excess.size and excess.max() > 0:
        at = tuple(np.argwhere(finite)[excess.argmax()].tolist())
        limit = np.broadcast_to(bound, value.shape)[at]
        raise AssertionError(
            f"{name}{at}: {got[at]!r}, expected {value[at]!r} within {limit:.3g}; {(excess > 0).sum()} elements are off"
        )


def assert_same_bits(a, b, name=""):
    """Equal bit for bit, including NaN and the sign of zero."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
    integer = f"u{a.dtype.itemsize}"
    differ = np.ascontiguousarray(a).view(integer) != np.ascontiguousarray(b).view(integer)
    assert not differ.any(), f"{name}: {differ.sum()} of {differ.size} elements differ, first {np.argwhere(differ)[0]}"


def dot(a, b):
    return math.fsum((np.asarray(a, np.float64) * np.asarray(b, np.float64)).ravel())


def special_coordinates(size, dtype):
    """(finite, infinite) coordinates for an axis of this size."""
    edges = np.array([-1, 0, 1, size - 1, size], dtype)
    beside = [np.nextafter(edges, dtype(side)) for side in (-np.inf, np.inf)]
    halves = np.array([-1.5, -0.5, 0.5, size - 1.5, size - 0.5, size + 0.5], dtype)
    inside = np.arange(size, dtype=dtype)
    huge = np.array([-0.0, 1e9, -1e9, 2.0**31, -(2.0**31), 2.0**63, 1e30, -1e30], dtype)
    return np.concatenate([edges, *beside, halves, inside, huge]), np.array([np.inf, -np.inf], dtype)


# Tables of invalid calls: (argument, replacement, exception, what was given, what was expected), the last two as
# regular expressions that must match in its message.


def rows(table):
    return [pytest.param(*row, id=f"{row[0]}-{n}") for n, row in enumerate(table)]


def said(*shape):
    """A shape as messages print it, ignoring spaces."""
    return re.escape(", ".join(map(str, shape))).replace(r",\ ", r",\s*")


def assert_message(error, name, came, expected):
    message = str(error.value)
    for what, pattern in (("the argument", rf"\b{name}\b"), ("what came", came), ("what was expected", expected)):
        assert re.search(pattern, message), f"{what} ({pattern}) is not in: {message}"


# Memory layouts: each returns an array equal to its argument.


def strided(array):
    """Every second element of a larger array whose other elements are NaN."""
    wide = np.full(tuple(2 * size for size in array.shape), np.nan, array.dtype)
    view = wide[(slice(None, None, 2),) * array.ndim]
    view[...] = array
    return view


def reversed_axes(array):
    """Negative strides along every axis."""
    back = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[back])[back]


def channels_last(array):
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1) if array.ndim > 1 else array.copy()


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def shifted(array, nbytes=None):
    """Contiguous, at an address one element (or nbytes) past a multiple of 64."""
    nbytes = array.itemsize if nbytes is None else nbytes
    raw = np.zeros(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + nbytes
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def unaligned(array):
    return shifted(array, 1)


LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels_last": channels_last,
    "strided": strided,
    "reversed": reversed_axes,
    "read_only": read_only,
    "shifted": shifted,
    "unaligned": unaligned,
}


def threads_asked_for(monkeypatch):
    """A list to which the number of threads of each kernel run from now on is appended."""
    import numdcn._cpu.threads as pool

    run, asked = pool.run, []
    monkeypatch.setattr(pool, "run", lambda *call: (asked.append(call[-1] + 1), run(*call))[1])
    return asked


def limit(seconds):
    """A time limit in whole seconds: `seconds` on a normal machine, NUMDCN_TEST_TIME times as many on a slow one."""
    return math.ceil(seconds * float(os.environ.get("NUMDCN_TEST_TIME", 1)))


def with_threads(run, counts):
    """The results of `run()` with each number of threads."""
    import numdcn

    before, results = numdcn.get_num_threads(), []
    try:
        for count in counts:
            numdcn.set_num_threads(count)
            results.append(run())
    finally:
        numdcn.set_num_threads(before)
    return results


def python_path():
    """A PYTHONPATH for child processes: numdcn and the tests, before what it holds already."""
    import numdcn

    paths = [str(pathlib.Path(numdcn.__file__).resolve().parents[1]), *FOLDERS, os.environ.get("PYTHONPATH")]
    return os.pathsep.join(filter(None, paths))


def run_python(code, *arguments, timeout=180, check=True, **environment):
    """Runs a program in a new interpreter that can import numdcn and the tests; a value of None removes a variable.

    `timeout` is for a normal machine; see `limit`.
    """
    env = {**os.environ, "PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = str(value)
    command = [sys.executable, "-c", code] if isinstance(code, str) else [sys.executable, *code]
    done = subprocess.run(
        [*command, *map(str, arguments)], env=env, cwd=ROOT, timeout=limit(timeout), capture_output=True, text=True
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
