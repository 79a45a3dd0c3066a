"""Infinite numbers in deform_conv, in Numba's simulator or on a GPU: chunks of channels are longer than what they hold.

A chunk may reach past the channels that are multiplied: into another group, other offset groups, or the padding. What it
finds there must not count, and with finite numbers it may be enough that it meets a zero. So here everything is positive,
samples lie inside the images, x rises along both axes, and one whole array is infinite. Then all results that depend on
it are infinite, and a NaN tells of a zero that met an infinity.
"""

import itertools

import numpy as np
import pytest
from conv_cases import Case
from family import outputs
from test_deform_conv import OPERATOR, make  # noqa: F401 - OPERATOR tells the fixtures what `gpu` is

DEPENDENT = {  # results by array; slopes of an infinite x have no sign
    "x": {"y", "mask", "w"},
    "w": {"y", "x", "offsets", "mask"},
    "mask": {"y", "x", "offsets", "w"},
    "grad_y": {"x", "offsets", "mask", "w"},
}
CASES = {  # channels of a group and of an offset group; with those of the simulator's chunks: 8, in half types 16
    "28, 4": Case(channels=28, c_out=3, offset_groups=7),
    "20, 4": Case(channels=40, c_out=4, groups=2, offset_groups=10),
    "20, 8": Case(channels=40, c_out=4, groups=2, offset_groups=5),
    "18, 6": Case(channels=18, c_out=3, offset_groups=3),
    "4, 6": Case(channels=12, c_out=6, groups=3, offset_groups=2),
}


def positive(case, dtype):
    """All numbers positive; samples a quarter past the first of each two pixels."""
    p = make(case._replace(size=(4, 4), kernel=(1, 1), stride=2, mask=True), np.float32)
    rising = np.arange(4)[:, None] / 4 + np.arange(4) / 8 + 1
    change = {"x": lambda a: rising + 0 * a, "offsets": lambda a: 0.25 + 0 * a}
    return p.map(lambda name, a: change.get(name, lambda a: 1 + np.abs(a) / 4)(a).astype(dtype))


QUICK = [
    ("28, 4", "float32", "forward"),
    ("28, 4", "float32", "backward"),
    ("20, 4", "float16", "forward"),
    ("20, 8", "tf32", "forward"),
    ("18, 6", "float32", "forward"),
]
REST = itertools.product(CASES, ["float32", "tf32", "float16", "float64"], ["forward", "backward"])


@pytest.mark.parametrize(
    "name, kind, direction",
    [*QUICK, *(pytest.param(*one, marks=pytest.mark.full) for one in REST if one not in QUICK)],
)
def test_one_infinite_array(gpu, name, kind, direction):
    p = positive(CASES[name], "float32" if kind == "tf32" else kind)
    for array, results in DEPENDENT.items():
        spoilt, wrt = p.having(**{array: np.full_like(p[array], np.inf)}), sorted(results - {"y"})
        if direction == "backward":
            got = spoilt.backward(gpu, wrt=wrt, allow_tf32=kind == "tf32")
        elif "y" in results:
            got = spoilt.forward(gpu, allow_tf32=kind == "tf32")
        else:
            continue
        for result, values in outputs(got).items():
            assert (values == np.inf).all(), (array, result)
