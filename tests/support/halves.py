"""Problems in float16 and bfloat16, and what their results may differ by from the float64 law of the same numbers."""

import ml_dtypes
import numpy as np
from family import expected, magnitudes

from numdcn._cpu.pairs import has_dot_products

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


def multiplies_pairs(problem, offset_groups=None):
    """Whether the CPU computes y by dot products of pairs of neighbouring channels: that of a convolution in bfloat16
    on AVX512-BF16, where no two groups share a pair and a group is more than two channels for one output."""
    if problem["w"] is None or problem.dtype != HALVES["bfloat16"] or not has_dot_products():
        return False
    channels, (outputs, per_group, *kernel), offsets = problem["x"].shape[1], problem["w"].shape, problem["offsets"]
    alone = per_group == 2 and outputs == channels // 2 > 1
    if offset_groups is None:
        offset_groups = 1 if offsets is None else offsets.shape[1] // (2 * kernel[0] * kernel[1])
    return per_group % 2 == 0 and channels // offset_groups % 2 == 0 and not alone
