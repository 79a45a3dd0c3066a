"""Problems in float16 and bfloat16, and what their results may differ by from the float64 law of the same numbers."""

import ml_dtypes
import numpy as np
from family import expected, magnitudes

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def half_types(operator):
    """(type, type of coordinates) of the calls that are allowed."""
    narrow = [(kind, kind) for kind in HALVES.values()]
    return narrow + [(kind, np.dtype(np.float32)) for kind in HALVES.values() if operator.coordinates]


def halved(problem, kind, coordinates):
    """(the problem in a narrow type, coordinates in that type or another; the same numbers as float32)"""
    kinds = dict.fromkeys(problem.operator.coordinates, coordinates)
    with np.errstate(over="ignore"):
        narrow = problem.map(lambda name, a: a.astype(kinds.get(name, kind)))
    return narrow, narrow.map(lambda _, a: a.astype(np.float32))


def expected_of_narrow(narrow, wide, rounds_terms=False, want=None):
    """{name: (value, bound)} for a problem in a narrow type, whose numbers `wide` has as float32.

    Sums are kept in float32, within the float32 bound of the exact value, and rounded once to the nearest number of the
    narrow type: that adds half a unit of the last place, u*|sum|, where sums are normal, and at most half a subnormal
    number where they are not; |sum| is at most the value and the bound. With `rounds_terms` one factor of each product
    may be rounded before.
    """
    want, sizes = expected(wide) if want is None else want, None
    if rounds_terms:
        sizes = (narrow.operator.magnitudes or magnitudes)(wide)
    made = {}
    for name, (value, bound) in want.items():
        kind = narrow.grad_y.dtype if name == "y" else narrow[name].dtype
        unit = float(ml_dtypes.finfo(kind).eps) / 2
        with np.errstate(invalid="ignore"):
            bound = bound + unit * (np.abs(value) + bound) + float(ml_dtypes.finfo(kind).smallest_subnormal)
            if rounds_terms:
                bound = bound + float(ml_dtypes.finfo(narrow.grad_y.dtype).eps) / 2 * np.abs(sizes[name])
        made[name] = value, bound
    return made
