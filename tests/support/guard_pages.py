"""Runs an operator on arrays and scratch memory next to inaccessible pages: `python -m guard_pages before|after OPERATOR`.

A program for family.py, run in a separate process because a stray access kills it. It runs the `cases` and the `wild`
problems of the TestFamily in the operator's test file. Linux only.
"""

import ctypes
import importlib
import math
import mmap
import sys

import numpy as np
from checks import cpu
from halves import HALVES, halved

from numdcn._call.scratch import Scratch

KEPT = []  # maps must outlive the arrays


def region(nbytes, end):
    """(a map, the offset in it of `nbytes` bytes whose first follows, or whose last precedes, an inaccessible page)"""
    page = mmap.PAGESIZE
    room = max(1, -(-nbytes // page)) * page
    made = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(made))
    wall, first = (start, page) if end == "before" else (start + room, room - nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return made, first


def guarded(array, end):
    """A copy of array in such memory."""
    made, first = region(array.nbytes, end)
    KEPT.append(made)
    view = np.frombuffer(made, array.dtype, array.size, first).reshape(array.shape)
    view[...] = array
    return view


def guard_scratch(end):
    """Let each buffer of scratch memory be such memory, full of NaN."""

    def enter(self):
        self.buffer = [region(size, end) for size in self.sizes]
        views = [np.frombuffer(made, np.uint8, size, first) for (made, first), size in zip(self.buffer, self.sizes)]
        for view in views:
            view[...] = 0xFF
        return [view.ctypes.data for view in views]

    def array(self, address, shape, dtype):
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def leave(self, *error):
        del self.buffer

    Scratch.__enter__, Scratch.array, Scratch.__exit__ = enter, array, leave


def in_half(problem, kind):
    """The problem in a half type, boxes excepted: far corners would be infinite in float16."""
    return halved(problem, kind, np.dtype(np.float32) if "rois" in problem.given() else kind)[0]


def main(end, operator):
    described, backend = importlib.import_module(f"test_{operator}").TestFamily, cpu(operator)
    guard_scratch(end)
    for name, case in {**described.cases, **described.wild}.items():
        for dtype in (np.float32, np.float64, *HALVES.values()):
            plain = in_half(case(np.float32), dtype) if dtype in HALVES.values() else case(dtype)
            if not all(plain[array].size for array in ("grad_y", *plain.given())):
                continue  # a map cannot be empty
            problem = plain.map(lambda _, array: guarded(array, end))
            problem.forward(backend, out=guarded(problem.grad_y, end))
            g = problem.backward(backend)
            problem.backward(backend, out=type(g)(*(a if a is None else guarded(a, end) for a in g)))
            print(name, np.dtype(dtype).name, "ran", flush=True)
            KEPT.clear()
    print("all cases ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
