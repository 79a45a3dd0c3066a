"""Problems for dcnv3 and dcnv4: sizes, tables and strategies shared by their tests.

Offsets are multiples of 2^-10 and scales powers of two, so that positions are exact in float32: whether a product and a
sum are rounded once or twice (docs/semantics.md, e.2) makes no difference to the cell.
"""

from typing import NamedTuple

import numpy as np
from checks import said, special_coordinates
from hypothesis import strategies as st


class Case(NamedTuple):
    """The sizes of a problem, without its data."""

    batch: int = 1
    groups: int = 1
    depth: int = 1  # channels of a group
    size: tuple = (5, 6)
    kernel: object = 3
    stride: object = 1
    padding: object = 1
    dilation: object = 1
    scale: float = 1.0
    remove_center: bool = False
    spread: float = 1.0  # standard deviation of the offsets, in pixels

    def __str__(self):
        name = (
            f"n{self.batch}-g{self.groups}x{self.depth}-{'x'.join(map(str, self.size))}-k{self.kernel}-s{self.stride}"
        )
        more = f"-scale{self.scale}" * (self.scale != 1) + "-rc" * self.remove_center + f"-spread{self.spread}"
        return f"{name}-p{self.padding}-d{self.dilation}{more}"

    @property
    def options(self):
        return {
            "kernel_size": self.kernel, "stride": self.stride, "padding": self.padding, "dilation": self.dilation,
            "offset_scale": self.scale, "remove_center": self.remove_center,
        }  # fmt: skip

    @property
    def points(self):
        return _pair(self.kernel)[0] * _pair(self.kernel)[1] - self.remove_center


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def output_size(case):
    """(out_h, out_w) by the formula of docs/semantics.md, e.1."""
    kernel, stride, dilation = _pair(case.kernel), _pair(case.stride), _pair(case.dilation)
    padding = [_pair(p) for p in _pair(case.padding)]
    return tuple(
        (case.size[a] + sum(padding[a]) - (dilation[a] * (kernel[a] - 1) + 1)) // stride[a] + 1 for a in (0, 1)
    )


def regular(case):
    """(base, taps): where the middle of the kernel is for each output pixel, (q, 2), and its points around it, (p, 2);
    y, then x."""
    (kh, kw), stride, dilation = _pair(case.kernel), _pair(case.stride), _pair(case.dilation)
    before = [_pair(p)[0] for p in _pair(case.padding)]
    middle = [dilation[a] * (k - 1) // 2 for a, k in enumerate((kh, kw))]
    out = np.stack(np.unravel_index(np.arange(np.prod(output_size(case))), output_size(case)), axis=1)
    taps = [(j * dilation[0] - middle[0], i * dilation[1] - middle[1]) for i in range(kw) for j in range(kh)]
    if case.remove_center:
        taps.remove((kh // 2 * dilation[0] - middle[0], kw // 2 * dilation[1] - middle[1]))
    return out * stride - np.array(before) + middle, np.array(taps)


def offsets_to(case, positions):
    """Offsets (n, out_h, out_w, groups*p*2) that put the points at positions (n, q, groups, p, 2), y first."""
    base, taps = regular(case)
    moved = (positions - base[:, None, None]) / case.scale - taps
    return moved[..., ::-1].reshape(case.batch, *output_size(case), 2 * case.groups * case.points)


def arrays(case, dtype, seed=None, draw=None):
    """(x, offsets, mask, grad_y): random; offsets normal, or those that put points at the positions that
    `draw(rng, shape)` gives."""
    rng, out = np.random.default_rng(len(str(case)) if seed is None else seed), output_size(case)
    count = case.groups * case.points
    x = rng.normal(size=(case.batch, *case.size, case.groups * case.depth))
    if draw is None:
        offsets = np.round(case.spread * rng.normal(size=(case.batch, *out, 2 * count)) * 1024) / 1024
    else:
        offsets = offsets_to(case, draw(rng, (case.batch, out[0] * out[1], case.groups, case.points, 2)))
    mask, grad_y = rng.normal(size=(case.batch, *out, count)), rng.normal(size=(*x.shape[:1], *out, x.shape[3]))
    with np.errstate(over="ignore"):
        return [array.astype(dtype) for array in (x, offsets, mask, grad_y)]


def between_pixels(case):
    """Positions away from the kinks, some of them outside."""

    def draw(rng, shape):
        return rng.integers(-3, np.array(case.size) + 2, size=shape) + rng.uniform(0.1, 0.9, size=shape)

    return draw


def odd_positions(case, dtype, odd, nan):
    """Positions with a share `odd` of special coordinates and a share `nan` of NaN."""

    def draw(rng, shape):
        positions = np.round(rng.normal(size=shape) * 3 * 1024) / 1024
        for axis in (0, 1):
            finite, infinite = special_coordinates(case.size[axis], dtype)
            values = rng.choice(finite, size=shape[:-1]).astype(np.float64)
            values = np.where(rng.random(shape[:-1]) < 0.05, rng.choice(infinite, size=shape[:-1]), values)
            positions[..., axis] = np.where(rng.random(shape[:-1]) < odd, values, positions[..., axis])
        return np.where(rng.random(shape) < nan, np.nan, positions)

    return draw


USUAL = Case(batch=3, groups=2, depth=4, size=(4, 5), kernel=(2, 3), padding=(1, 0))
TINY = Case(batch=2, groups=2, depth=3, size=(3, 2), kernel=(2, 1), padding=0)
CASES = [
    Case(size=(1, 1)),
    Case(size=(1, 1), kernel=1, padding=0, batch=3, depth=3),
    Case(size=(1, 9), kernel=2, depth=3, groups=3),
    Case(size=(9, 1), kernel=(3, 1), padding=(1, 0), depth=16),
    *(Case(depth=d, groups=1 + d % 3, batch=1 + d % 2) for d in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 71)),
    *(Case(groups=g, depth=16, size=(3, 4)) for g in (4, 5, 8)),
    Case(kernel=5, padding=2, groups=2, depth=8, size=(7, 8)),
    Case(kernel=(2, 3), stride=(2, 1), padding=((0, 1), (2, 1)), dilation=(1, 2), groups=2, depth=3, size=(8, 7)),
    Case(kernel=4, padding=1, scale=2.0, depth=5),
    Case(kernel=(1, 5), padding=(0, 2), stride=(1, 3), scale=0.5, depth=4, groups=2),
    Case(remove_center=True, groups=2, depth=16),
    Case(kernel=(5, 3), padding=(2, 1), remove_center=True, scale=-1.0, depth=3),
    Case(scale=0.0, depth=3),
    Case(scale=2.0, remove_center=True, groups=4, depth=16, dilation=2, padding=2),
    Case(spread=20.0, depth=5),
    Case(batch=2, size=(20, 21), groups=3, depth=5),
    Case(batch=17, size=(2, 3), depth=4),
    Case(batch=0, groups=2, depth=3),
]
SMOOTH = [
    Case(batch=2, groups=2, depth=3, kernel=(2, 3), padding=(1, 0), dilation=(1, 2), size=(4, 7)),
    Case(size=(1, 1), depth=5, scale=0.7),
    Case(size=(6, 2), stride=2, scale=-1.7, groups=3, depth=1),
    Case(kernel=3, remove_center=True, scale=2.0, groups=2, depth=8, size=(3, 3)),
]
LARGE = [
    Case(batch=2, groups=4, depth=16, size=(40, 41)),
    Case(groups=1, depth=32, size=(60, 61)),
    Case(groups=16, depth=3, size=(30, 31), kernel=2),
    Case(batch=5, groups=2, depth=71, size=(14, 15)),
]
WILD = [
    Case(2, g, d, size, kernel=k, padding=1, scale=s)
    for g, d in ((1, 1), (2, 3), (2, 16))
    for size, k, s in (((1, 1), 2, 1.0), ((1, 7), 3, 0.5), ((6, 5), 3, 2.0))
]


@st.composite
def cases(draw):
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    odd = kernel[0] % 2 == kernel[1] % 2 == 1 and kernel != (1, 1)
    dilation, padding = draw(st.tuples(*[st.integers(1, 2)] * 2)), draw(st.tuples(*[st.integers(0, 2)] * 2))
    least = [max(1, dilation[a] * (kernel[a] - 1) + 1 - 2 * padding[a]) for a in (0, 1)]
    return Case(
        batch=draw(st.integers(0, 3)),
        groups=draw(st.sampled_from([1, 1, 2, 3, 4])),
        depth=draw(st.sampled_from([1, 2, 3, 4, 8, 16, 17, 32])),
        size=tuple(n + draw(st.integers(0, 4)) for n in least),
        kernel=kernel,
        stride=draw(st.tuples(*[st.integers(1, 3)] * 2)),
        padding=padding,
        dilation=dilation,
        scale=draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, -1.0])),
        remove_center=odd and draw(st.booleans()),
    )


def assert_forms_of_parameters(backend, problem):
    """An int, one per axis, lists, NumPy numbers: the same result, forward and backward."""
    y, g = problem.forward(backend), problem.backward(backend)
    one, scale = np.int64(1), np.float32(problem.params["offset_scale"])
    for name, value in {"stride": one, "dilation": [1, 1], "padding": ((1, 1), [0, 0]), "offset_scale": scale}.items():
        again = problem._replace(params={**problem.params, name: value})
        assert np.array_equal(again.forward(backend), y), name
        assert all(np.array_equal(a, b) for a, b in zip(again.backward(backend), g, strict=True)), name


WRONG_PARAMETERS = (
    *(("kernel_size", value, ValueError, said(value), "at least 1") for value in (0, -1)),
    *(("kernel_size", value, TypeError, "float|str|None|bool", "int") for value in (1.5, "3", None, True)),
    ("kernel_size", (2, 3, 1), ValueError, said(2, 3, 1), "two"),
    ("stride", 0, ValueError, "0", "at least 1"),
    ("dilation", (1, 0), ValueError, "0", "at least 1"),
    ("padding", -1, ValueError, "-1", "at least 0"),
    ("padding", ((1, 0, 0), (0, 0)), ValueError, said(1, 0, 0), "pairs"),
    *(("offset_scale", value, ValueError, r"nan|inf|1e\+?300", "finite") for value in (np.nan, np.inf, -np.inf, 1e300)),
    *(("offset_scale", value, TypeError, "str|None|bool|complex", "finite") for value in ("1", None, True, 1j)),
    *(("remove_center", value, TypeError, "int|None|str", "True or False") for value in (1, None, "yes")),
    ("remove_center", True, ValueError, "True", "odd"),
)
