"""What numdcn adds to Numba's compiler: records read field by field, helpers prepared once, parts compiled with their
kernel."""

from typing import NamedTuple

import numpy as np
import pytest
from checks import run_python
from numba import types

from numdcn._cpu import compiler
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import load_scalar, next_task, pointer, store
from numdcn._cpu.threads import launch
from numdcn._formulas.jit import helper


class Inner(NamedTuple):
    pair: tuple[int, int]
    place: Place


class Outer(NamedTuple):
    first: int
    inner: Inner
    last: int


@helper
def _collatz(n, most):
    """Steps until n is 1."""
    steps = 0
    while n != 1 and steps < most:
        if n % 2:
            n = 3 * n + 1
        else:
            n //= 2
        steps += 1
    return steps


@helper
def _difference(a, b, most):
    """Inlines another helper twice, in names that it uses itself."""
    steps = _collatz(a, most)
    n = _collatz(b, most)
    return steps - n


@block
def _difference_of_record(record, most):
    return _difference(record.pair[0], record.pair[1], most)


@block
def _sum_of_strides(record):
    total = 0
    for stride in record.place.strides:
        total += stride
    return total + _difference_of_record(record, 5)


@kernel
def _write(one, params, counter, slot):
    call = unpack(params, Outer)
    out = pointer(call.inner.place.address, np.int64(0))
    while True:
        task = next_task(counter)
        if task >= call.last:
            return
        value = _collatz(task + 1, 1000)
        if task == 1:
            value = _difference(call.first, call.last, 1000)
        elif task == 2:
            value = _difference_of_record(call.inner, 1000)
        elif task == 3:
            value = _sum_of_strides(call.inner)
        store(out, task, value + load_scalar(out, task))


def _steps(n, most=1000):
    return _collatz.py_func(n, most)


def test_a_kernel_of_helpers_blocks_and_records():
    out = np.full(9, 100)
    launch(_write, np.float32(1), Outer(27, Inner((7, 15), Place(out.ctypes.data, (1, 20, 300, 4000))), 9), 1)
    want = [_steps(n) for n in range(1, 10)]
    want[1] = _steps(27) - _steps(9)
    want[2] = _steps(7) - _steps(15)
    want[3] = 4321 + _steps(7, 5) - _steps(15, 5)
    assert [_steps(27), _steps(7), _steps(15)] == [111, 16, 17]
    np.testing.assert_array_equal(out - 100, want)


def test_inlining_leaves_the_prepared_helper_alone():
    @helper
    def inlined(n):
        total = 0
        for i in range(n):
            total += i if i % 3 else 1
        return total

    @kernel
    def twice(one, params, counter, slot):
        inlined(inlined(5))

    twice.compile((types.float32, *[types.int64] * 3))
    prepared = compiler._prepared[inlined.py_func]

    def names(ir):
        return [
            (label, str(statement), sorted(b.scope.localvars._con))
            for label, b in ir.blocks.items()
            for statement in b.body
        ]

    before = names(prepared)

    @kernel
    def again(one, params, counter, slot):
        inlined(inlined(inlined(5)))

    again.compile((types.float32, *[types.int64] * 3))
    assert compiler._prepared[inlined.py_func] is prepared
    assert names(prepared) == before


def test_a_field_that_a_record_does_not_have():
    @kernel
    def wrong(one, params, counter, slot):
        store(pointer(unpack(params, Outer).second, np.int64(0)), 0, 1)

    with pytest.raises(Exception, match="second"):
        wrong.compile((types.float32, *[types.int64] * 3))


NUMBAS_OWN = """
import sys
sys.modules["numdcn._cpu.compiler"] = None
import numpy as np
import numdcn
from numdcn._cpu import jit
assert jit.KernelCompiler.__module__ == "numba.core.compiler"
y = numdcn.conv_forward(np.ones((1, 2, 3, 3), "f"), np.ones((1, 2, 3, 3), "f"), padding=1)
assert y.tolist() == [[[[8, 12, 8], [12, 18, 12], [8, 12, 8]]]]
"""


@pytest.mark.full
def test_without_what_numdcn_adds(tmp_path):
    """As when a Numba of the future has other parts."""
    run_python(NUMBAS_OWN, NUMBA_CACHE_DIR=tmp_path)
