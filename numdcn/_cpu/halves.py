"""Kernels that widen arrays of float16 and bfloat16 to float32, and round float32 to them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import unpack
from numdcn._cpu.simd import at, full, load_like, narrow, next_task, pointer, store, width
from numdcn._formulas.jit import helper

STRETCH = 1 << 14  # elements of a task


class ConvertCall(NamedTuple):
    """Parameters of the kernels here."""

    source: int  # address
    target: int  # address
    count: int  # elements


@helper
def _copy(of_source, of_target, params, counter, one):
    """target = source, as elements of the types of `of_source` and `of_target`. A task is a stretch of elements."""
    a = unpack(params, ConvertCall)
    step, vector, single = width(one), full(one), narrow(one, 1)
    while True:
        first = next_task(counter) * STRETCH
        if first >= a.count:
            return
        source, target = at(pointer(a.source, of_source), first), at(pointer(a.target, of_target), first)
        count, i = min(STRETCH, a.count - first), 0
        while i <= count - step:
            store(target, i, load_like(source, i, vector))
            i += step
        while i < count:
            store(target, i, load_like(source, i, single))
            i += 1


@kernel
def widen_float16(one, params, counter, slot):
    """target (float32) = source (float16)."""
    _copy(np.uint16(0), one, params, counter, one)


@kernel
def widen_bfloat16(one, params, counter, slot):
    """target (float32) = source (bfloat16)."""
    _copy(np.int16(0), one, params, counter, one)


@kernel
def round_to_float16(one, params, counter, slot):
    """target (float16) = source (float32)."""
    _copy(one, np.uint16(0), params, counter, one)


@kernel
def round_to_bfloat16(one, params, counter, slot):
    """target (bfloat16) = source (float32)."""
    _copy(one, np.int16(0), params, counter, one)
