"""Weighted samples of channels-last images on a GPU, compared with loops in float64 (attention_reference.py).

Points are multiples of 1/64 where that matters, so that every position is exact in every type and no cell depends on
rounding. Programs of attention_programs.py run in the device server.
"""

import attention_reference
import device
import ml_dtypes
import numpy as np
import pytest
from checks import ROUNDINGS, assert_close, assert_same_bits

from numdcn._call.attention import Attention, Grid, Level

F32, F64, F16, BF16 = (np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
NARROW = (F16, BF16)
# (value, points, weights)
TYPES = [(kind,) * 3 for kind in (F32, F64, *NARROW)]
TYPES += [(kind, F32, kind) for kind in NARROW] + [(kind, F32, F32) for kind in NARROW]
NAMES = ("value", "points", "weights")


@pytest.fixture(scope="module", params=device.KINDS)
def run(request):
    reason = device.missing(request.param)
    if reason:
        pytest.skip(reason)
    return lambda name, *arguments: device.program(request.param, "attention_programs", name, *arguments)


def attention(batch=1, queries=2, heads=2, channels=4, sizes=((3, 4), (2, 2)), points=(2, 1)):
    """Points as fractions of the sizes of levels."""
    starts = np.cumsum([0, *(height * width for height, width in sizes)]).tolist()
    levels = tuple(Level(*size, start, count) for size, start, count in zip(sizes, starts, points, strict=False))
    scales = tuple((float(level.height), float(level.width)) for level in levels for _ in range(level.points))
    grid = Grid(queries, (0, 0), (-0.5, -0.5), ((0.0, 0.0),) * len(scales), scales)
    return Attention(batch, queries, heads, channels, levels, grid, (batch, queries, heads * channels))


def window(batch=1, groups=2, channels=4, size=(3, 4), kernel=(2, 3), stride=(1, 1), origin=(-1.0, 0.0), scale=1.0):
    """Points around pixels of one image, as DCNv3 and DCNv4 have them, without a centre."""
    taps = [(float(j - 1), float(i - 1)) for i in range(kernel[1]) for j in range(kernel[0]) if (i, j) != (1, 1)]
    rows, columns = ((n + s - 1) // s for n, s in zip(size, stride, strict=True))
    grid = Grid(columns, stride, origin, tuple(taps), ((scale, scale),) * len(taps))
    shape = (batch, rows, columns, groups * channels)
    return Attention(batch, rows * columns, groups, channels, (Level(*size, 0, len(taps)),), grid, shape)


def made(p, kinds=TYPES[0], seed=0):
    """({name: array}, grad_y); half of the points lie on pixels and just outside."""
    rng = np.random.default_rng(seed)
    shape = (p.batch, p.queries, p.heads, p.points)
    if (
        p.grid.columns == p.queries
    ):  # fractions; sizes are powers of two or 3, so that multiples of 1/16 and of 1/6 are not mixed
        reach = np.array([(level.width, level.height) for level in p.levels for _ in range(level.points)])
        pixels = rng.integers(-6, 4 * reach + 6, (*shape, 2)) / 4
        pixels = np.where(rng.random(pixels.shape) < 0.5, np.round(pixels), pixels)
        points = (pixels + 0.5) / np.exp2(np.ceil(np.log2(reach)))
    else:
        points = rng.integers(-12, 13, (*shape, 2)) / 8
        points = np.where(rng.random(points.shape) < 0.5, np.round(points), points)
    arrays = {
        "value": rng.normal(size=(p.batch, p.pixels, p.heads, p.channels)),
        "points": points,
        "weights": rng.normal(size=shape),
    }
    arrays = {name: arrays[name].astype(kind) for name, kind in zip(NAMES, kinds, strict=True)}
    return arrays, rng.normal(size=(p.batch, p.queries, p.heads, p.channels)).astype(kinds[0])


def unit(kind):
    return float(ml_dtypes.finfo(kind).eps)


def compare(got, want, sizes, terms, name):
    """A result is the expected one, up to the rounding of sums of `terms` products."""
    assert got.shape == want.shape
    kind = got.dtype
    bound = (unit(F64) if kind == F64 else unit(F32)) * (ROUNDINGS + np.sqrt(terms)) * sizes
    if kind in NARROW:
        with np.errstate(invalid="ignore"):
            bound = bound + unit(kind) / 2 * (np.abs(want) + bound) + float(ml_dtypes.finfo(kind).smallest_subnormal)
    assert_close(got.astype(np.float64), want, bound, name)


def check(run, p, arrays, grad_y, layout="plain", deterministic=(False, True)):
    """y and all gradients are right, and only what should be written is."""
    with np.errstate(all="ignore"):
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        want, sizes = attention_reference.results(p, **wide, grad_y=grad_y.astype(np.float64))
    y, after = run("forward", p, arrays, layout)
    assert y.dtype == arrays["value"].dtype
    compare(y, want.y, sizes.y, 4 * p.points, "y")
    for name, array in arrays.items():
        assert_same_bits(after[name], array, name)
    terms = {"value": 4 * p.queries * p.points, "points": 4 * p.channels, "weights": 4 * p.channels}
    for choice in deterministic:
        grads = run("backward", p, grad_y, arrays, choice, layout)
        assert np.isnan(np.float64(grads.pop("padding", np.nan))).all()
        for name, grad in grads.items():
            assert grad.dtype == arrays[name].dtype
            compare(grad, getattr(want, name), getattr(sizes, name), terms[name], name)


CASES = {
    "attention": attention,
    "window": window,
    "strided window": lambda: window(2, 1, 3, (5, 4), (3, 3), (2, 3), (0.0, -1.0), -1.5),
    "one channel": lambda: attention(channels=1, heads=3),
    "three channels": lambda: attention(channels=3),
    "seventy-one channels": lambda: attention(queries=1, heads=1, channels=71, points=(1, 1)),
    "one head": lambda: attention(heads=1, channels=8),
    "one point": lambda: attention(queries=3, sizes=((4, 4),), points=(1,)),
    "levels of one pixel": lambda: attention(2, sizes=((1, 1), (1, 4), (2, 1)), points=(2, 2, 1)),
    "more points than fit": lambda: attention(queries=1, heads=3, channels=1, points=(9, 14)),
}


@pytest.mark.parametrize("case", CASES)
def test_results(run, case):
    p = CASES[case]()
    check(run, p, *made(p))


@pytest.mark.parametrize("kinds", TYPES[1:], ids=lambda kinds: " ".join(map(str, kinds)))
@pytest.mark.parametrize("channels", [8, pytest.param(3, marks=pytest.mark.full)])
def test_types(run, kinds, channels):
    p = attention(channels=channels)
    check(run, p, *made(p, kinds))


@pytest.mark.full
@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "shifted", "channels_last", "gaps"])
def test_layouts(run, layout):
    """Arrays of any strides, and results."""
    p = window(2, 3)
    check(run, p, *made(p), layout)


@pytest.mark.full
@pytest.mark.parametrize("kinds", [TYPES[0], (F16, F32, F32)], ids=lambda kinds: " ".join(map(str, kinds)))
def test_packed_arrays(run, kinds):
    """Points and weights are views of one array, whose padding is neither read nor written."""
    p = window(2, 2, 8)
    check(run, p, *made(p, kinds), "packed")


def edges(size):
    """Positions at the borders of an axis, beside them, far away and nowhere."""
    exact = np.array([-1, 0, size - 1, size], np.float32)
    beside = [np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf)]
    far = np.array([1e9, 2.0**31, -(2.0**63), 1e30, np.inf, -np.inf, np.nan], np.float32)
    return np.concatenate([exact, *beside, far, [0.5]])


def test_borders(run):
    """A query with one point for every pair of edges; the points are the positions."""
    size = (2, 3)
    points = np.array([(x, y) for y in edges(size[0]) for x in edges(size[1])], np.float32)
    count = len(points)
    grid = Grid(count, (0, 0), (0.0, 0.0), ((0.0, 0.0),), ((1.0, 1.0),))
    p = Attention(1, count, 1, 2, (Level(*size, 0, 1),), grid, (1, count, 2))
    arrays, grad_y = made(p)
    arrays["points"] = points.reshape(1, count, 1, 1, 2)
    check(run, p, arrays, grad_y)


@pytest.mark.full
@pytest.mark.parametrize("name", [*NAMES, "grad_y"])
@pytest.mark.parametrize("number", [np.nan, np.inf], ids=str)
def test_numbers_that_are_not_finite(run, name, number):
    """One of them, at the border, outside and inside."""
    p = window(1, 2, 2, (2, 3))
    arrays, grad_y = made(p)
    for place in (0, 7, -1):
        spoilt = {key: array.copy() for key, array in {**arrays, "grad_y": grad_y}.items()}
        spoilt[name].reshape(-1)[place] = number
        gradient = spoilt.pop("grad_y")
        check(run, p, spoilt, gradient)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_one_gradient(run, name):
    """Each is what it is beside the others, and no other array is needed."""
    p = window(1, 2, 4)
    arrays, grad_y = made(p)
    for deterministic in (False, True):
        every = run("backward", p, grad_y, arrays, deterministic)
        grads = run("backward", p, grad_y, arrays, deterministic, "plain", (name,))
        for other in NAMES:
            if other != name:
                assert np.isnan(grads[other]).all()
            elif deterministic:
                assert_same_bits(grads[name], every[name], name)
            else:  # the order of sums depends on what is wanted
                np.testing.assert_allclose(grads[name], every[name], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_deterministic_results_are_the_same_bits(run):
    p = window(2, 2, 3)
    arrays, grad_y = made(p)
    first = run("backward", p, grad_y, arrays, True)
    again = run("backward", p, grad_y, arrays, True)
    for name in NAMES:
        assert_same_bits(first[name], again[name], name)


def test_more_than_kernels_count(run):
    p = attention()
    arrays, grad_y = made(p)
    huge = p._replace(levels=(Level(2**16, 2**15, 0, 3),))
    for call in (("forward", huge, arrays), ("backward", huge, grad_y, arrays)):
        with pytest.raises(ValueError, match=r"2147483648 pixels of all levels, expected fewer than"):
            run(*call)


NETWORKS = {  # (problem, types, layout); odd numbers of queries, so that the last blocks are not full
    "decoder": (lambda: attention(2, 19, 8, 32, ((7, 9), (4, 5), (1, 2)), (4, 4, 3)), TYPES[0], "plain"),
    "decoder in half precision": (lambda: attention(1, 19, 4, 32, ((7, 9), (4, 5)), (4, 4)), TYPES[2], "plain"),
    "DCNv3": (lambda: window(2, 4, 16, (7, 9), (3, 4), (1, 1), (-1.0, -1.0)), TYPES[0], "plain"),
    "DCNv4": (lambda: window(1, 3, 16, (6, 7), (3, 3), (1, 1), (-1.0, -1.0), 0.5), (BF16, F32, F32), "packed"),
    "wide heads": (lambda: attention(1, 5, 3, 200, ((5, 6),), (5,)), TYPES[1], "plain"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes_of_networks(request, run, network):
    """Many blocks, whole warps for a head, and parts of warps: on a GPU, real or emulated."""
    if "simulator" in request.node.name:
        pytest.skip("takes minutes in the simulator")
    make, kinds, layout = NETWORKS[network]
    p = make()
    check(run, p, *made(p, kinds), layout)
