"""Problems for the convolutions: sizes, tables and strategies shared by their tests."""

from typing import NamedTuple

import numpy as np
from checks import said
from hypothesis import strategies as st


class Case(NamedTuple):
    """The sizes of a problem, without its data. Fields about offsets and masks apply only where there are some."""

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
        flags = "m" * self.mask + "b" * self.bias + f"-spread{self.spread}" * (self.spread != 2)
        name = f"n{self.batch}-c{self.channels}to{self.c_out}-{_times(self.size)}-k{_times(self.kernel)}"
        return f"{name}-s{self.stride}-p{self.padding}-d{self.dilation}-g{self.groups}-og{self.offset_groups}{flags}"

    @property
    def geometry(self):
        """The parameters common to all convolutions."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _times(pair):
    return "x".join(map(str, pair))


def output_size(case):
    """(out_h, out_w) by the formula of docs/semantics.md, b.1."""
    stride, dilation = _pair(case.stride), _pair(case.dilation)
    padding = [_pair(p) for p in _pair(case.padding)]
    return tuple(
        (case.size[a] + sum(padding[a]) - (dilation[a] * (case.kernel[a] - 1) + 1)) // stride[a] + 1 for a in (0, 1)
    )


def assert_forms_of_parameters(backend, problem):
    """An int, one per axis, lists, NumPy integers: the same result. All of the problem's are 1."""
    y = problem.forward(backend)
    for name, value in {"stride": np.int64(1), "dilation": [1, 1]}.items():
        again = problem._replace(params={**problem.params, name: value})
        assert np.array_equal(again.forward(backend), y), name
    for padding in ([[1, 1], [np.int64(1), 1]], (1, 1), [1, 1], ((1, 1), (1, 1)), (np.int32(1), 1)):
        again = problem._replace(params={**problem.params, "padding": padding})
        assert np.array_equal(again.forward(backend), y), padding


def zeros(*shape):
    return np.zeros(shape, np.float32)


GEOMETRY = ("stride", "padding", "dilation")
WRONG_GEOMETRY = (  # for every convolution with a 3x3 kernel and a 6x5 image, padded by 1
    *((name, 1.0, TypeError, r"1\.0", "int") for name in GEOMETRY),
    *((name, True, TypeError, "True|bool", "int") for name in GEOMETRY),
    *((name, "1", TypeError, "'1'|str", "int") for name in GEOMETRY),
    *((name, None, TypeError, "None", "int") for name in GEOMETRY),
    *((name, (1, 1.5), TypeError, r"1\.5", "int") for name in GEOMETRY),
    *((name, (1, 1, 1), ValueError, said(1, 1, 1), "2|two|axis") for name in GEOMETRY),
    *((name, (), ValueError, r"\(\)", "2|two|axis") for name in GEOMETRY),
    *((name, 0, ValueError, "0", "1|positive") for name in ("stride", "dilation")),
    *((name, (1, 0), ValueError, "0", "1|positive") for name in ("stride", "dilation")),
    *((name, -2, ValueError, "-2", "0|1|positive") for name in GEOMETRY),
    ("padding", (1, -1), ValueError, "-1", "0|negative"),
    ("padding", ((1, 1), (0, -1)), ValueError, "-1", "0|negative"),
    ("padding", ((1, 1), (1, 1, 1)), ValueError, said(1, 1, 1), "2|two|before"),
    ("padding", ((1, 1), (1, 2.5)), TypeError, r"2\.5", "int"),
    ("padding", ((1, 1), (1, True)), TypeError, "True", "int"),
    ("dilation", 9, ValueError, "9", "19|output|fit"),
)
WRONG_WEIGHTS = (  # for every convolution from 4 channels to 6 in two groups
    ("w", zeros(6, 2, 3), ValueError, said(6, 2, 3), r"4|\(C_out"),
    ("w", zeros(6, 3, 3, 3), ValueError, "3", "4"),
    ("w", zeros(5, 2, 3, 3), ValueError, "5", "2"),
    ("w", zeros(6, 2, 0, 3), ValueError, said(6, 2, 0, 3), "1|positive|empty"),
    ("w", zeros(6, 0, 3, 3), ValueError, said(6, 0, 3, 3), "1|positive|empty"),
    ("w", zeros(0, 2, 3, 3), ValueError, said(0, 2, 3, 3), "1|positive|empty"),
    ("bias", zeros(4), ValueError, r"\(4,?\)", "6"),
    ("bias", zeros(0), ValueError, r"\(0,?\)", "6"),
)
WRONG_IMAGES = (  # likewise, for 6x5 images
    ("x", zeros(2, 0, 6, 5), ValueError, said(2, 0, 6, 5), "1|positive|empty"),
    ("x", zeros(2, 4, 0, 5), ValueError, said(2, 4, 0, 5), "1|positive|empty"),
    ("x", zeros(2, 4, 6, 0), ValueError, said(2, 4, 6, 0), "1|positive|empty"),
    ("x", zeros(2, 3, 6, 5), ValueError, "3", "2"),
    ("x", zeros(2, 4, 0, 0), ValueError, said(2, 4, 0, 0), "1|positive|empty"),
)


@st.composite
def cases(draw):
    """Cases of any geometry."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    channels = groups * draw(st.sampled_from([1, 1, 2, 3, 4, 6, 17]))
    c_out = groups * draw(st.sampled_from([1, 1, 2, 3, 5, 16]))
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    kernel, stride, dilation = pair(1, 4), pair(1, 3), pair(1, 3)
    padding = (pair(0, 3), pair(0, 3))
    # an image large enough, with its padding, for at least one output
    least = [max(1, dilation[a] * (kernel[a] - 1) + 1 - sum(padding[a])) for a in (0, 1)]
    size = tuple(least[a] + draw(st.integers(0, 7)) for a in (0, 1))
    return Case(
        batch=draw(st.integers(0, 3)),
        channels=channels,
        c_out=c_out,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=draw(st.sampled_from(divisors)),
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
