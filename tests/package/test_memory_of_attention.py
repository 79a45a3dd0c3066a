"""Peak memory of attention, DCNv3 and DCNv4, in new processes: they read images where they lie, and their backward keeps
one copy of points and weights."""

import sys

import pytest
from checks import run_python

MB = 2**20
SLACK = 12 * MB  # for the interpreter, its allocator, compiled code and two threads
PROGRAM = """
import gc, sys
import numpy as np
import numdcn

operator, direction = sys.argv[1:]

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def given(scale):
    levels = [(25 * scale, 42 * scale), (13 * scale, 21 * scale)]
    queries, h, w = sum(a * b for a, b in levels), 40 * scale, 60 * scale
    if operator == "ms_deform_attn":
        rows = 1, queries, 8, len(levels), 4
        return (np.ones((*rows[:3], 32), "f"), levels, np.full((*rows, 2), 0.4, "f"), np.ones(rows, "f")), {}
    x = np.ones((1, h, w, 64), "f")
    if operator == "dcnv4":
        return (x, np.ones((1, h, w, 112), "f")), {"padding": 1, "groups": 4}
    return (x, np.ones((1, h, w, 72), "f"), np.ones((1, h, w, 36), "f")), {"padding": 1}

def call(arrays, options):
    y = getattr(numdcn, operator + "_forward")(*arrays, **options)
    if direction == "forward":
        return y, lambda: getattr(numdcn, operator + "_forward")(*arrays, **options, out=y)
    grads = getattr(numdcn, operator + "_backward")(y, *arrays, **options)
    return y, lambda: getattr(numdcn, operator + "_backward")(y, *arrays, **options, out=grads)

call(*given(1))[1]()
numdcn.set_scratch_limit(0)
arrays, options = given(8)
y, again = call(arrays, options)
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
again()
print(status("VmHWM") - before, arrays[0].nbytes)
"""


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operator", ["ms_deform_attn", "dcnv3", "dcnv4"])
def test_memory_beyond_arguments_and_results(operator, direction):
    """Points and weights are 8 * 3 numbers for a head's 32 channels of attention, 9 * 3 for 16 of DCNv3 and DCNv4."""
    times = 0 if direction == "forward" else 8 * 3 / 32 if operator == "ms_deform_attn" else 9 * 3 / 16
    done = run_python(PROGRAM, operator, direction, NUMDCN_NUM_THREADS=2)
    extra, image = map(int, done.stdout.split())
    assert image > 2 * SLACK
    assert extra <= times * image + SLACK, f"{extra / MB:.0f} MB for an image of {image / MB:.0f} MB"
    assert extra >= 0.9 * times * image, f"{extra / MB:.0f} MB: nothing was measured"
