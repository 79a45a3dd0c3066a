"""Runs an operator on arrays that lie against inaccessible pages: `python -m guard_pages before|after [operator]`.

A program for test_deform_conv_special.py and family.py, run in a process of its own because a stray access kills it.
Without a name it runs deformable convolutions; with one, the `cases` and the `wild` of the TestFamily of the operator's
test file. Linux only.
"""

import ctypes
import importlib
import mmap
import sys

import numpy as np
from checks import Case, cpu, make

CASES = [
    Case(1, 1, 1, (5, 4), (1, 1)),
    Case(2, 17, 19, (7, 5), padding=1, mask=True, bias=True),
    Case(1, 33, 5, (20, 21), padding=1, bias=True),
    Case(2, 12, 6, (7, 5), padding=1, groups=3, offset_groups=4, mask=True, bias=True),
    Case(1, 7, 7, (9, 8), padding=1, groups=7, mask=True),
    Case(1, 40, 80, (9, 8), padding=1, groups=40, offset_groups=5, bias=True),
    Case(1, 3, 70, (1, 9), (1, 3), stride=2, mask=True),
]
KEPT = []  # maps must outlive the arrays


def guarded(array, end):
    """A copy of array whose first byte follows, or whose last byte precedes, a page that may not be touched."""
    page = mmap.PAGESIZE
    room = max(1, -(-array.nbytes // page)) * page
    region = mmap.mmap(-1, room + page)
    KEPT.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    wall, first = (start, page) if end == "before" else (start + room, room - array.nbytes)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    view = np.frombuffer(region, array.dtype, array.size, first).reshape(array.shape)
    view[...] = array
    return view


def wild(rng, shape):
    """Offsets of every kind: near, at the edges, far, infinite and NaN."""
    moved = rng.normal(size=shape) * 3
    odd = rng.random(shape) < 0.2
    moved[odd] = rng.choice([-1.0, 0.0, 1.0, -9.0, 9.0, 1e9, -1e9, 1e30, np.inf, -np.inf, np.nan], size=odd.sum())
    return moved


def deform_convs(end):
    backend = cpu()
    for case in CASES:
        for dtype in (np.float32, np.float64):
            problem = make(case, dtype, offsets=wild).map(lambda _, array: guarded(array, end))
            problem.forward(backend, out=guarded(problem.grad_y, end))
            g = problem.backward(backend)
            problem.backward(backend, out=type(g)(*(a if a is None else guarded(a, end) for a in g)))
            print(case, np.dtype(dtype).name, "ran", flush=True)


def family(operator, end):
    described, backend = importlib.import_module(f"test_{operator}").TestFamily, cpu(operator)
    for name, case in {**described.cases, **described.wild}.items():
        for dtype in (np.float32, np.float64):
            plain = case(dtype)
            if not all(plain[array].size for array in ("grad_y", *plain.given())):
                continue  # there is no map of no byte
            problem = plain.map(lambda _, array: guarded(array, end))
            problem.forward(backend, out=guarded(problem.grad_y, end))
            g = problem.backward(backend)
            problem.backward(backend, out=type(g)(*(a if a is None else guarded(a, end) for a in g)))
            print(name, np.dtype(dtype).name, "ran", flush=True)
            KEPT.clear()


def main(end, operator=None):
    if operator is None:
        deform_convs(end)
    else:
        family(operator, end)
    print("all cases ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
