"""Problems for the RoI operators: boxes of every kind, sizes, tables and strategies shared by their tests."""

import math
from typing import NamedTuple

import numpy as np
from checks import LAYOUTS, said
from family import Problem
from hypothesis import strategies as st

KINDS = ["inside", "straddling", "outside", "degenerate", "inverted", "tiny", "integer", "half", "whole", "far", "huge"]


class Case(NamedTuple):
    """The sizes of a problem, without its data."""

    batch: int = 1
    channels: int = 1  # of y
    size: tuple = (6, 7)
    output: object = 2
    boxes: str = "mixed"  # one of KINDS, or mixed
    count: int = 5
    scale: float = 1.0
    params: dict = {}  # noqa: RUF012 - never changed

    def __str__(self):
        more = "".join(f"-{name}{value}" for name, value in self.params.items())
        output, size = ("x".join(map(str, pair(value))) for value in (self.output, self.size))
        return f"n{self.batch}-c{self.channels}-{size}-to{output}-{self.count}{self.boxes}-s{self.scale}{more}"


def pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def corners(rng, kind, size):
    """(x1, y1, x2, y2) of a box of this kind, in pixels of an image of this size."""
    low, high = [], []
    for n in (size[1], size[0]):
        a, b = sorted(rng.uniform(0, n, 2))
        if kind == "straddling":
            a, b = (a - n, b) if rng.integers(2) else (a, b + n)
        elif kind == "outside":
            a, b = (a - 3 * n - 5, b - 3 * n - 5) if rng.integers(2) else (a + 2 * n + 5, b + 2 * n + 5)
        elif kind == "degenerate":
            b = a if rng.integers(3) else b
        elif kind == "inverted":
            a, b = (b, a) if rng.integers(3) else (a, b)
        elif kind == "tiny":
            b = a + 0.01
        elif kind in ("integer", "half"):
            a, b = sorted(rng.integers(-2, n + 2, 2) + 0.5 * (kind == "half"))
        elif kind == "quarter":  # in any order
            a, b = rng.integers(-6, 4 * n + 7, 2) / 4
        elif kind == "whole":
            a, b = 0, n
        elif kind == "far":
            a, b = a - 40 * n, b + 50 * n
        elif kind == "huge":
            a, b = rng.choice([-1e30, -1e9, a]), rng.choice([b, 1e9, 1e30])
        low.append(a)
        high.append(b)
    return *low, *high


def draw_rois(rng, case, dtype):
    rois = np.empty((case.count, 5))
    for row in rois:
        kind = rng.choice(KINDS[:-1]) if case.boxes == "mixed" else case.boxes
        row[0] = rng.integers(case.batch)
        row[1:] = np.divide(corners(rng, kind, case.size), case.scale)
    return rois.astype(dtype)


def make(operator, case, dtype=np.float64, seed=None, planes=1, more=lambda rng: {}):
    """Random arrays for a case. x has `planes` channels for each of y; `more(rng)` draws the arrays after rois."""
    rng = np.random.default_rng(len(str(case)) if seed is None else seed)
    rois = draw_rois(rng, case, dtype)
    arrays = {"x": rng.normal(size=(case.batch, case.channels * planes, *case.size)), **more(rng)}
    return Problem(
        operator=operator,
        arrays={"rois": rois, **{name: a if a is None else a.astype(dtype) for name, a in arrays.items()}},
        grad_y=rng.normal(size=(case.count, case.channels, *pair(case.output))).astype(dtype),
        params={"output_size": case.output, "spatial_scale": case.scale, **case.params},
    )


def table(make, cases, prefix="", **more):
    """{name: dtype -> Problem}"""
    return {prefix + str(case): lambda dtype, case=case: make(case, dtype, **more) for case in cases}


def length(samples):
    """Operator.length: `samples` (problem) is the largest number of samples in a bin, each with four taps."""

    def terms(problem):
        bins = math.prod(problem.grad_y.shape[2:])
        moved = 8 * samples(problem) * problem.grad_y.shape[1]
        return {
            "y": 4 * samples(problem),
            "x": 4 * len(problem["rois"]) * bins * samples(problem),
            **dict.fromkeys(("offsets", "mask"), moved),
            "trans": bins * moved,
        }

    return terms


def grid_samples(problem):
    """Samples of a bin that can be inside, for operators with sampling_ratio."""
    ratio = problem.params.get("sampling_ratio", 0)
    height, width = problem["x"].shape[2:]
    return ratio**2 if ratio > 0 else (2 * height + 4) * (2 * width + 4)


SIZES = [  # for all operators: one pixel, one row, one column, numbers of channels around vector widths
    Case(size=(1, 1), output=1, count=12),
    Case(size=(1, 1), output=(2, 5), channels=3, count=6),
    Case(size=(1, 9), output=3, channels=7, batch=2),
    Case(size=(9, 1), output=(2, 5), channels=8, batch=3),
    Case(size=(2, 2), output=2, channels=2, count=11),
    Case(size=(7, 6), output=7, channels=2, scale=0.5, batch=2, count=9),
    Case(size=(7, 6), output=(2, 5), channels=3, scale=0.7, count=12),
    Case(size=(8, 9), output=1, channels=15, scale=0.25),
    Case(size=(8, 9), output=3, channels=16, boxes="half", count=8),
    Case(size=(8, 9), output=(1, 2), channels=17, boxes="integer", batch=2),
    Case(size=(11, 9), output=2, channels=33, scale=2.0),
    Case(size=(9, 11), output=(2, 1), channels=70, scale=1 / 3),
    Case(size=(5, 6), output=1, channels=300, count=4),
    Case(size=(30, 41), output=7, channels=2, count=6, scale=1 / 16),
    Case(size=(6, 5), output=2, channels=3, boxes="whole", count=20),  # many overlapping boxes
    Case(size=(6, 5), output=2, channels=3, batch=2, count=0),
    Case(size=(6, 5), output=(2, 3), channels=3, batch=0, count=0),
    *(Case(size=(7, 6), output=(3, 2), channels=4, boxes=kind, batch=2, count=6) for kind in KINDS[:-1]),
]
USUAL = Case(batch=3, channels=5, size=(7, 6), output=(3, 2), count=4, boxes="inside", scale=0.5)
SMOOTH = [
    Case(batch=2, channels=3, size=(8, 9), output=(3, 2), count=5, scale=0.5, boxes="straddling"),
    Case(batch=1, channels=17, size=(5, 4), output=1, count=4, boxes="inside"),
]
WILD = [
    Case(batch=2, channels=c, size=(7, 6), output=(3, 2), boxes=kind, count=12)
    for c in (2, 18)
    for kind in ("mixed", "huge")
]
LARGE = Case(batch=2, channels=64, size=(30, 31), output=7, count=300)
LARGE_PLANES = LARGE._replace(output=3, count=1500)  # for position-sensitive operators, with one plane per bin

TINY = [  # for the GPU simulator
    Case(size=(1, 1), output=1, count=3),
    Case(size=(5, 4), output=(1, 2), channels=9, batch=2, count=3, scale=0.5),
    Case(size=(4, 6), output=2, channels=1, boxes="half", count=4),
    Case(size=(4, 5), output=(2, 1), channels=2, boxes="straddling", count=3),
    Case(size=(5, 4), output=(3, 2), channels=3, boxes="inverted", count=3, scale=0.7),
    Case(size=(4, 5), output=2, channels=2, boxes="outside", count=2),
    Case(size=(4, 5), output=2, channels=2, boxes="far", count=2),
    Case(size=(4, 5), output=2, channels=2, boxes="huge", count=3),
    Case(size=(4, 5), output=2, channels=3, batch=2, count=0),
    Case(size=(4, 5), output=2, channels=3, batch=0, count=0),
]
TINY_USUAL = Case(batch=2, channels=3, size=(5, 4), output=(3, 2), count=3, boxes="inside", scale=0.5)
TINY_ODD = Case(batch=2, channels=2, size=(5, 4), output=2, count=4)


def wrong(usual):
    """Rows for family_errors.Errors.wrong: boxes that are rejected, and the parameters common to all RoI operators."""
    rois, batch = usual(np.float32)["rois"], len(usual(np.float32)["x"])

    def changed(row, column, value):
        array = rois.copy()
        array[row, column] = value
        return array

    images = [(changed(2, 0, value), str(value), r"\b2\b") for value in (batch, -1, 0.5)]
    images += [
        (changed(2, 0, value), came, r"\b2\b") for value, came in ((1e30, r"e\+?30"), (np.nan, "nan"), (np.inf, "inf"))
    ]
    boxes = [(changed(3, k, value), str(value), r"\b3\b") for k in range(1, 5) for value in (np.nan, np.inf, -np.inf)]
    shapes = [(rois[:, :4].copy(), said(len(rois), 4), "5"), (np.zeros((4, 6), np.float32), said(4, 6), "5")]
    return [
        *(("rois", array, ValueError, came, wanted) for array, came, wanted in (*images, *boxes, *shapes)),
        ("x", np.zeros((3, 0, 7, 6), np.float32), ValueError, said(3, 0, 7, 6), "1|positive|empty"),
        (
            "x",
            np.zeros((batch, *usual(np.float32)["x"].shape[1:3], 0), np.float32),
            ValueError,
            "0",
            "1|positive|empty",
        ),
        *(("output_size", value, TypeError, came, "int") for value, came in BAD_INTS),
        *(
            ("output_size", value, ValueError, came, "1|positive")
            for value, came in ((0, "0"), (-3, "-3"), ((2, 0), "0"))
        ),
        ("output_size", (1, 2, 3), ValueError, said(1, 2, 3), "2|two|axis"),
        ("output_size", (), ValueError, r"\(\)", "2|two|axis"),
        *(("spatial_scale", value, TypeError, came, "number|float") for value, came in BAD_NUMBERS),
        *(("spatial_scale", value, ValueError, str(value), "0|finite") for value in (0, -1.0, np.nan, np.inf)),
    ]


BAD_INTS = [(2.0, r"2\.0"), ("2", "'2'|str"), (None, "None"), (True, "True|bool"), ([1, 2.5], r"2\.5")]
BAD_NUMBERS = [("1", "'1'|str"), (None, "None"), (1j, "1j|complex"), ((1.0, 1.0), r"1\.0|tuple")]


def wrong_parameters(ints=(), numbers=(), least=None):
    """Rows for the parameters of some operators: integers (of at least `least`) and finite numbers."""
    rows = [(name, value, TypeError, came, "int") for name in ints for value, came in BAD_INTS]
    if least is not None:
        rows += [(name, least - 1, ValueError, str(least - 1), str(least)) for name in ints]
    rows += [(name, value, TypeError, came, "number|float") for name in numbers for value, came in BAD_NUMBERS]
    rows += [(name, value, ValueError, str(value), "finite") for name in numbers for value in (np.nan, np.inf, -np.inf)]
    return rows


# For Hypothesis: boxes of all kinds, including those with samples exactly on pixels, halves and borders.


@st.composite
def cases(draw, channels=(1, 2, 3, 8, 17), **params):
    return Case(
        batch=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from(channels)),
        size=draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        output=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        boxes=draw(st.sampled_from([*KINDS[:-1], "quarter", "quarter", "mixed"])),
        count=draw(st.integers(0, 5)),
        scale=draw(st.sampled_from([1.0, 1.0, 0.5, 0.25, 2.0, 0.7, 1 / 3])),
        params={name: draw(st.sampled_from(values)) for name, values in params.items()},
    )


SEEDS = st.integers(0, 2**32 - 1)
LAYOUT_NAMES = st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=5, max_size=5)


def laid_out(problem, layouts):
    names = ("x", "rois", *problem.operator.arrays[2:], "grad_y")
    kinds = dict(zip(names, layouts, strict=False))
    return problem.map(lambda name, array: LAYOUTS[kinds[name]](array))
