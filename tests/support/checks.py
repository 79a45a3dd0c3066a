"""What the tests share: making problems, comparing with the naive reference, memory layouts, and running programs.

Error bounds. A sum of `length` products in a dtype of precision eps differs from the exact one by about
eps*sqrt(length)*sum|terms| when roundings are independent, and each term carries a few roundings of its own
(coordinate, two corner weights, mask). So a result may differ from the float64 reference by
eps * (ROUNDINGS + sqrt(length)) * sum|terms|, with sum|terms| computed element by element from the naive formulas on
absolute values. Where no term contributes the bound is zero and the result must be exactly zero.
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
from naive import deform_conv as naive

ROUNDINGS = 6
NAMES = ("x", "offsets", "w", "bias", "mask")
ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = [
    str(ROOT / "tests" / folder) for folder in ("support", "ops", "cuda", "")
]  # whose modules import one another


class Backend(NamedTuple):
    """Two functions from NumPy arrays to NumPy arrays, with the signatures of an operator's forward and backward."""

    name: str
    forward: Callable
    backward: Callable
    gpu: bool = False  # sums by atomics differ from run to run there, in their order


def cpu(operator="deform_conv"):
    import numdcn

    return Backend("cpu", getattr(numdcn, f"{operator}_forward"), getattr(numdcn, f"{operator}_backward"))


def reference(operator="deform_conv"):
    module = importlib.import_module(f"naive.{operator}")
    return Backend("naive", module.forward, module.backward)


class Case(NamedTuple):
    """The sizes of a problem, without its numbers."""

    batch: int = 1
    channels: int = 1
    c_out: int = 1
    size: tuple = (5, 5)
    kernel: tuple = (3, 3)
    stride: object = 1
    padding: object = 0
    dilation: object = 1
    groups: int = 1
    offset_groups: int = 1
    mask: bool = False
    bias: bool = False
    spread: float = 2.0  # standard deviation of the offsets, in pixels

    def __str__(self):
        flags = "m" * self.mask + "b" * self.bias
        name = f"n{self.batch}-c{self.channels}to{self.c_out}-{_times(self.size)}-k{_times(self.kernel)}"
        return f"{name}-s{self.stride}-p{self.padding}-d{self.dilation}-g{self.groups}-og{self.offset_groups}{flags}"


class Problem(NamedTuple):
    x: np.ndarray
    offsets: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None
    mask: np.ndarray | None
    grad_y: np.ndarray
    params: dict

    @property
    def dtype(self):
        return self.x.dtype

    def forward(self, backend, **more):
        return backend.forward(self.x, self.offsets, self.w, self.bias, mask=self.mask, **self.params, **more)

    def backward(self, backend, **more):
        arrays = (self.grad_y, self.x, self.offsets, self.w, self.bias)
        return backend.backward(*arrays, mask=self.mask, **self.params, **more)

    def given(self):
        """The names of the arrays that are there."""
        return [name for name in NAMES if getattr(self, name) is not None]

    def map(self, function):
        """The same problem with function(name, array) in the place of every array."""
        names = [name for name in (*NAMES, "grad_y") if getattr(self, name) is not None]
        return self._replace(**{name: function(name, getattr(self, name)) for name in names})

    def astype(self, dtype):
        return self.map(lambda _, array: array.astype(dtype))


def output_size(case):
    """(out_h, out_w) by the formula of docs/semantics.md, b.1."""
    stride, dilation = _pair(case.stride), _pair(case.dilation)
    padding = [_pair(p) for p in _pair(case.padding)]
    return tuple(
        (case.size[a] + sum(padding[a]) - (dilation[a] * (case.kernel[a] - 1) + 1)) // stride[a] + 1 for a in (0, 1)
    )


def make(case, dtype=np.float64, seed=0, offsets=None):
    """Random arrays for a case. `offsets(rng, shape)` may draw the offsets."""
    rng = np.random.default_rng(seed)
    taps, out = math.prod(case.kernel), output_size(case)

    def draw(*shape):
        return rng.normal(size=shape).astype(dtype)

    shape = (case.batch, 2 * case.offset_groups * taps, *out)
    moved = rng.normal(size=shape) * case.spread if offsets is None else offsets(rng, shape)
    return Problem(
        x=draw(case.batch, case.channels, *case.size),
        offsets=moved.astype(dtype),
        w=draw(case.c_out, case.channels // case.groups, *case.kernel),
        bias=draw(case.c_out) if case.bias else None,
        mask=draw(case.batch, case.offset_groups * taps, *out) if case.mask else None,
        grad_y=draw(case.batch, case.c_out, *out),
        params={"stride": case.stride, "padding": case.padding, "dilation": case.dilation},
    )


def between_pixels(rng, shape):
    """Offsets whose fraction is far from 0 and 1: coordinates away from the kinks, for finite differences."""
    return rng.integers(-3, 3, size=shape) + rng.uniform(0.1, 0.9, size=shape)


def expected(problem):
    """{name: (value, bound)} of y and of every gradient, from the naive reference; bounds as told above."""
    values = {"y": problem.forward(naive), **problem.backward(naive)._asdict()}
    positive = problem.map(lambda name, array: array if name == "offsets" else np.abs(array))
    sizes = {"y": positive.forward(naive), **positive.backward(naive, lower=1.0)._asdict()}
    info, out = np.finfo(problem.dtype), problem.grad_y.shape[2:]
    c_out, per_group, *kernel = problem.w.shape
    channels, taps, pixels = problem.x.shape[1], math.prod(kernel), math.prod(out)
    per_output = c_out // (channels // per_group)
    visits = taps * (1 + pixels / math.prod(problem.x.shape[2:]))  # samples that touch one pixel of the image
    moved = channels // (problem.offsets.shape[1] // (2 * taps))
    length = {
        "y": per_group * taps,
        "x": per_output * visits,
        "offsets": 4 * per_output * moved,
        "mask": 4 * per_output * moved,
        "w": problem.x.shape[0] * pixels,
        "bias": problem.x.shape[0] * pixels,
    }
    return {
        name: (value, info.eps * (ROUNDINGS + math.sqrt(length[name])) * sizes[name] + info.tiny)
        for name, value in values.items()
        if value is not None
    }


def assert_close(got, value, bound, name):
    """got is value within bound, element by element; NaN and infinities stand in the same places."""
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


def check_against_naive(backend, problem):
    """Forward and every gradient, into fresh memory and into arrays full of NaN; returns (y, gradients)."""
    want = expected(problem)
    y, g = problem.forward(backend), problem.backward(backend)
    for name, array in (("y", y), *((f, getattr(g, f)) for f in problem.given())):
        assert array.dtype == problem.dtype, name
        assert_close(array, *want[name], name)
    for name in set(NAMES) - set(problem.given()):
        assert getattr(g, name) is None, name
    filled = np.full_like(y, np.nan)
    assert problem.forward(backend, out=filled) is filled
    assert_same_bits(filled, y, "y through out")
    out = type(g)(**{f: np.full_like(getattr(g, f), np.nan) if f in problem.given() else None for f in NAMES})
    again = problem.backward(backend, out=out)
    for name in problem.given():
        assert getattr(again, name) is getattr(out, name), name
        assert_same_bits(getattr(out, name), getattr(g, name), f"{name} through out")
    return y, g


def assert_same_bits(a, b, name=""):
    """Equal to the last bit, NaN and the sign of zero included."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
    integer = f"u{a.dtype.itemsize}"
    differ = np.ascontiguousarray(a).view(integer) != np.ascontiguousarray(b).view(integer)
    assert not differ.any(), f"{name}: {differ.sum()} of {differ.size} elements differ, first {np.argwhere(differ)[0]}"


def assert_same_gradients(a, b, names=NAMES):
    for name in names:
        if getattr(a, name) is None or getattr(b, name) is None:
            assert getattr(a, name) is getattr(b, name), name
        else:
            assert_same_bits(getattr(a, name), getattr(b, name), name)


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


# Tables of wrong calls: (argument, what it becomes, the exception, what came, what was expected), the last two as
# regular expressions that its message must hold.


def rows(table):
    return [pytest.param(*row, id=f"{row[0]}-{n}") for n, row in enumerate(table)]


def said(*shape):
    """A shape as messages print it, spaces aside."""
    return re.escape(", ".join(map(str, shape))).replace(r",\ ", r",\s*")


def assert_message(error, name, came, expected):
    message = str(error.value)
    for what, pattern in (("the argument", rf"\b{name}\b"), ("what came", came), ("what was expected", expected)):
        assert re.search(pattern, message), f"{what} ({pattern}) is not in: {message}"


# Memory layouts: each gives an array equal to its argument.


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
    """Contiguous, at an address that is one element (or nbytes) past a multiple of 64."""
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
    """A list that grows by the number of threads of each kernel that is run from now on."""
    import numdcn._cpu.threads as pool

    run, asked = pool.run, []
    monkeypatch.setattr(pool, "run", lambda *call: (asked.append(call[-1] + 1), run(*call))[1])
    return asked


def limit(seconds):
    """A time limit: these seconds on a usual machine, NUMDCN_TEST_TIME times as many on a slow one, in whole seconds."""
    return math.ceil(seconds * float(os.environ.get("NUMDCN_TEST_TIME", 1)))


def run_python(code, *arguments, timeout=180, check=True, **environment):
    """Runs a program in a fresh interpreter that sees numdcn and the tests; a value of None removes a variable.

    `timeout` is that of a usual machine; see `limit`.
    """
    import numdcn

    paths = [str(pathlib.Path(numdcn.__file__).resolve().parents[1]), *FOLDERS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
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


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _times(pair):
    return "x".join(map(str, pair))
