"""deform_conv at edges, with non-finite numbers, and in memory: one rule per test, which is named after it.

Every test runs on paths that a library may treat differently: few and many channels, groups, depthwise. The tests of
arithmetic also run on the naive reference.
"""

import numpy as np
import pytest
from checks import LAYOUTS, assert_same_bits
from conv_cases import Case
from family import DTYPES, embedded
from test_deform_conv import NAMES, OPERATOR, make  # noqa: F401 - OPERATOR tells the fixtures what `subject` is

PATHS = {  # channels, c_out, groups
    "one": (1, 1, 1),
    "few": (3, 4, 1),
    "many": (40, 33, 1),
    "grouped": (36, 34, 2),
    "depthwise": (5, 5, 5),
    "wide_depthwise": (33, 66, 33),
}
OUTSIDE = [np.inf, -np.inf, 3e38, -3e38, 1e30, -1e30, 2.0**63, 2.0**31, -(2.0**31), 1e9, -1e9]


@pytest.fixture(params=PATHS)
def path(request):
    channels, c_out, groups = PATHS[request.param]
    return Case(channels=channels, c_out=c_out, groups=groups)


def one_sample(path, y, x, size=(4, 4), dtype=np.float64, mask=True):
    """A problem with one output pixel and one tap, at the coordinate (y, x) of a positive random image."""
    case = path._replace(size=size, kernel=(1, 1), stride=size, bias=True, mask=mask, spread=0)
    problem = make(case, dtype)
    problem["offsets"][0, :, 0, 0] = y, x
    problem["x"][...] = np.random.default_rng(1).uniform(1, 2, problem["x"].shape)
    return problem


def column_gradient(problem):
    """(channels): the column gradient of the single sample of one_sample, in float64."""
    c_out, per_group = problem["w"].shape[:2]
    groups = problem["x"].shape[1] // per_group
    w = problem["w"].reshape(groups, c_out // groups, per_group).astype(np.float64)
    return np.einsum("goc,go->gc", w, problem.grad_y.reshape(groups, -1).astype(np.float64)).ravel()


def near(got, want, dtype=np.float64):
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=10 * tolerance)


# Edges. Along one axis of size 4, the other coordinate being 1: p -> (value, slope), by rule zeros.

AXIS = {
    -2.0: lambda v: (0, 0),
    -1.25: lambda v: (0, 0),
    -1.0: lambda v: (0, v[0]),
    -0.75: lambda v: (v[0] / 4, v[0]),
    0.0: lambda v: (v[0], v[1] - v[0]),
    1.0: lambda v: (v[1], v[2] - v[1]),
    1.25: lambda v: (0.75 * v[1] + 0.25 * v[2], v[2] - v[1]),
    2.0: lambda v: (v[2], v[3] - v[2]),
    3.0: lambda v: (v[3], -v[3]),
    3.75: lambda v: (v[3] / 4, -v[3]),
    4.0: lambda v: (0, 0),
    4.25: lambda v: (0, 0),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("at", AXIS)
def test_values_and_right_slopes_along_an_axis(subject, path, axis, at):
    """The table of rule zeros: the slope at an integer is the right one, at -1 it is the first pixel, at 4 nothing."""
    problem = one_sample(path, *((at, 1.0) if axis == 0 else (1.0, at)))
    line = problem["x"][0, :, :, 1] if axis == 0 else problem["x"][0, :, 1, :]
    pairs = [AXIS[at](v) for v in line]
    values, slopes = (np.array(part, np.float64) for part in zip(*pairs, strict=True))
    a, m = column_gradient(problem), problem["mask"].item()
    g = problem.backward(subject)
    near(g.offsets[0, axis], m * (a @ slopes))
    near(g.mask.item(), a @ values)
    per_channel = problem["w"].reshape(path.groups, path.c_out // path.groups, -1)
    y = np.einsum("goc,gc->go", per_channel, values.reshape(path.groups, -1)).ravel()
    near(problem.forward(subject).ravel(), m * y + problem["bias"])


def test_the_slope_at_minus_one_is_the_first_pixel(subject, path):
    """Value 0, nothing added to the gradient of x, slope x[0] along that axis and 0 along the other."""
    problem = one_sample(path, -1.0, 2.0)
    y, g = problem.forward(subject), problem.backward(subject)
    near(y.ravel(), problem["bias"])
    assert not g.x.any()
    near(g.offsets[0, 0], problem["mask"].item() * (column_gradient(problem) @ problem["x"][0, :, 0, 2]))
    assert not g.offsets[0, 1].any()
    corner = one_sample(path, -1.0, -1.0).backward(subject)
    assert not corner.offsets.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_just_inside_and_just_outside(subject, path, dtype):
    """The last number below -1 is outside, -1 and the last number below the size are inside."""
    below, last = np.nextafter(dtype(-1), dtype(-2)), np.nextafter(dtype(4), dtype(0))
    assert not one_sample(path, below, 1, dtype=dtype).backward(subject).offsets.any()
    assert not one_sample(path, 1, 4, dtype=dtype).backward(subject).offsets.any()
    problem = one_sample(path, 1, last, dtype=dtype)
    slope = -problem["x"][0, :, 1, 3].astype(np.float64)
    near(problem.backward(subject).offsets[0, 1], problem["mask"].item() * (column_gradient(problem) @ slope), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("axes", ["y", "x", "yx"])
def test_infinite_and_huge_coordinates_are_outside(subject, path, dtype, value, axes):
    y, x = (value if axis in axes else 1.5 for axis in "yx")
    problem = one_sample(path, y, x, dtype=dtype)
    assert np.array_equal(problem.forward(subject).ravel(), problem["bias"])
    g = problem.backward(subject)
    for name in ("x", "offsets", "w", "mask"):
        assert not getattr(g, name).any(), name  # also fails on NaN


# NaN coordinates.


@pytest.mark.parametrize("other", [1.5, np.nan, np.inf, -np.inf, 1e30, -7.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_wins_over_outside(subject, path, axis, other):
    problem = one_sample(path, *((np.nan, other) if axis == 0 else (other, np.nan)))
    assert np.isnan(problem.forward(subject)).all()
    g = problem.backward(subject)
    assert np.isnan(g.offsets).all() and np.isnan(g.mask).all() and np.isnan(g.w).all()
    assert not g.x.any()
    assert np.isfinite(g.bias).all()


@pytest.mark.parametrize(
    "channels, c_out, groups, offset_groups", [(6, 4, 1, 2), (12, 6, 3, 4), (36, 68, 2, 3), (8, 16, 8, 4)]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_offset_reaches_exactly_the_right_elements(subject, channels, c_out, groups, offset_groups, axis):
    case = Case(3, channels, c_out, (6, 5), padding=1, groups=groups, offset_groups=offset_groups, mask=True, bias=True)
    clean, n, og, k, row, col = make(case), 1, offset_groups - 1, 5, 2, 3
    broken = clean.map(lambda _, array: array.copy())
    broken["offsets"][n, 2 * (9 * og + k) + axis, row, col] = np.nan
    away = clean.map(lambda _, array: array.copy())  # the same sample moved outside: the result without it
    away["offsets"][n, 2 * (9 * og + k) + axis, row, col] = np.inf

    moved = np.arange(channels) // (channels // offset_groups) == og  # the channels that the offset group moves
    touched = [c for c in range(channels) if moved[c]]
    outputs = {c // (channels // groups) for c in touched}
    marks = {name: np.zeros(clean[name].shape, bool) for name in ("x", "offsets", "w", "mask")}
    marks["y"] = np.zeros(clean.grad_y.shape, bool)
    for group in outputs:
        outs = slice(group * c_out // groups, (group + 1) * c_out // groups)
        marks["y"][n, outs, row, col] = True
        inputs = moved.reshape(groups, -1)[group]
        marks["w"].reshape(c_out, -1, 9)[outs, inputs, k] = True
    marks["offsets"][n, 2 * (9 * og + k) : 2 * (9 * og + k) + 2, row, col] = True
    marks["mask"][n, 9 * og + k, row, col] = True

    got = {"y": broken.forward(subject), **broken.backward(subject)._asdict()}
    want = {"y": away.forward(subject), **away.backward(subject)._asdict()}
    for name, mark in marks.items():
        np.testing.assert_array_equal(np.isnan(got[name]), mark, err_msg=name)
        near(got[name][~mark], want[name][~mark])
    near(got["bias"], want["bias"])


# Pixels.


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("y", [-1.0, -0.5, 0.0, 1.0, 1.5, 2.0, 3.0, 3.5])
@pytest.mark.parametrize("x", [-0.25, 2.0, 3.75])
def test_only_the_pixels_of_the_cell_count(subject, path, y, x, poison):
    """Pixels outside the floor cell may contain anything; a NaN in it counts, even with weight zero."""
    clean = one_sample(path, y, x)
    cell = np.zeros((4, 4), bool)
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for col in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < 4 and 0 <= col < 4:
                cell[row, col] = True
    others = clean.having(x=np.where(cell, clean["x"], poison))
    near(others.forward(subject), clean.forward(subject))
    for name in NAMES:
        near(getattr(others.backward(subject), name), getattr(clean.backward(subject), name))
    for row, col in np.argwhere(cell):
        spoilt = clean.having(x=clean["x"].copy())
        spoilt["x"][0, :, row, col] = np.nan
        g = spoilt.backward(subject)
        assert np.isnan(spoilt.forward(subject)).all()
        assert np.isnan(g.offsets).all() and np.isnan(g.mask).all() and np.isnan(g.w).all()
        near(g.x, clean.backward(subject).x)


@pytest.mark.parametrize("y, x", [(-1.5, 1.0), (1.0, 4.0), (np.inf, 0.0), (-1.01, -1.01), (1e9, 1e9)])
def test_outside_is_zero_whatever_the_image_holds(subject, path, y, x):
    problem = one_sample(path, y, x)
    problem["x"][...] = np.nan
    assert np.array_equal(problem.forward(subject).ravel(), problem["bias"])
    g = problem.backward(subject)
    for name in ("x", "offsets", "w", "mask"):
        assert not getattr(g, name).any(), name


def test_nan_in_a_channel_stays_in_its_groups(subject):
    case = Case(channels=12, c_out=6, size=(6, 5), padding=1, groups=3, offset_groups=4, mask=True, spread=0.5)
    clean, spoilt = make(case), make(case)
    spoilt["x"][:, 4] = np.nan  # second conv group (4 to 7), second offset group (3 to 5)
    y, g, reference = spoilt.forward(subject), spoilt.backward(subject), clean.backward(subject)
    assert np.isnan(y[:, 2:4]).all() and np.isfinite(np.delete(y, [2, 3], axis=1)).all()
    near(g.x, reference.x)
    offsets, mask = (part.reshape(1, 4, -1) for part in (g.offsets, g.mask))
    assert np.isnan(offsets[:, 1]).any() and np.isfinite(np.delete(offsets, 1, axis=1)).all()
    assert np.isnan(mask[:, 1]).any() and np.isfinite(np.delete(mask, 1, axis=1)).all()
    spoilt_w = np.zeros(g.w.shape, bool)
    spoilt_w[2:4, 0] = True
    np.testing.assert_array_equal(np.isnan(g.w), spoilt_w)


def test_nan_in_an_image_stays_in_it(subject, path):
    clean, spoilt = (make(path._replace(batch=3, size=(5, 6), padding=1)) for _ in range(2))
    spoilt["x"][1] = np.nan
    keep = [0, 2]
    near(spoilt.forward(subject)[keep], clean.forward(subject)[keep])
    near(spoilt.backward(subject).x, clean.backward(subject).x)
    near(spoilt.backward(subject).offsets[keep], clean.backward(subject).offsets[keep])


# Ordinary arithmetic with weights, masks and output gradients.


def test_nan_weight(subject, path):
    """It affects its output channel at every pixel, even where the sample is outside (0 * NaN)."""
    problem = make(path._replace(size=(6, 6), kernel=(1, 1)))
    problem["offsets"][:, :, 0, 0] = 100
    problem["w"][-1, -1] = np.nan
    y, g = problem.forward(subject), problem.backward(subject)
    assert np.isnan(y[:, -1]).all() and np.isfinite(y[:, :-1]).all()
    assert np.isfinite(g.w).all()
    assert np.isnan(g.x[:, -1]).any() and np.isfinite(g.x[:, :-1]).all()


def test_nan_output_gradient(subject, path):
    problem = make(path._replace(size=(6, 6), kernel=(1, 1), bias=True, mask=True, spread=0.0))
    problem.grad_y[0, -1, 2, 3] = np.nan
    g = problem.backward(subject)
    assert np.isnan(g.bias[-1]) and np.isfinite(g.bias[:-1]).all()
    assert np.isnan(g.w[-1]).all() and np.isfinite(g.w[:-1]).all()
    at = np.zeros((6, 6), bool)
    at[2, 3] = True
    for part in (g.offsets, g.mask):
        np.testing.assert_array_equal(np.isnan(part), np.broadcast_to(at, part.shape))
    assert np.isnan(g.x[0, -1, 2, 3])
    at[2:4, 3:5] = True  # the floor cell
    assert np.isfinite(g.x[:, :, ~at]).all()


@pytest.mark.parametrize("y, x", [(1.0, 2.0), (0.0, 0.0), (1.5, 2.25), (3.0, 3.0), (-0.5, 3.5)])
def test_infinite_mask_gives_infinity(subject, path, y, x):
    """mask * sample with a finite non-zero sample is infinite, not NaN, even if a corner has weight zero."""
    problem = one_sample(path, y, x)
    problem["mask"][...] = np.inf
    problem["w"][...] = 1.5
    assert np.isposinf(problem.forward(subject)).all()
    assert np.isposinf(problem.backward(subject).w[problem.grad_y.ravel() > 0]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_mask_times_zero_outside_is_ordinary(subject, path, value):
    problem = one_sample(path, 50.0, 1.0)
    problem["mask"][...] = value
    assert np.isnan(problem.forward(subject)).all()
    assert np.isnan(problem.backward(subject).w).all()


def test_zero_mask_hides_nothing(subject, path):
    """0 * NaN is NaN: a NaN pixel or coordinate under a zero mask still shows."""
    for problem in (one_sample(path, 1.5, 1.5), one_sample(path, np.nan, 1.5)):
        problem["mask"][...] = 0
        assert np.array_equal(one_sample(path, 1.5, 1.5).forward(subject).shape, problem.grad_y.shape)
        problem["x"][:, :, 1, 1] = np.nan
        assert np.isnan(problem.forward(subject)).all()
    clean = one_sample(path, 1.5, 1.5)
    clean["mask"][...] = 0
    g = clean.backward(subject)
    assert not g.x.any() and not g.offsets.any() and not g.w.any() and g.mask.all()


# Memory.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_not_written(backend, path, layout):
    problem = make(path._replace(batch=2, size=(7, 6), padding=1, mask=True, bias=True), np.float32)
    problem["offsets"][0, 0, 0, :2] = np.nan, np.inf
    kept = problem.map(lambda _, array: array.copy())
    problem = problem.map(lambda _, array: LAYOUTS[layout](array))
    problem.forward(backend)
    problem.backward(backend)
    for name in (*NAMES, "grad_y"):
        assert_same_bits(problem[name], kept[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_arrays_is_written(backend, path, dtype):
    problem = make(path._replace(batch=2, size=(9, 7), padding=1, mask=True, bias=True, spread=3), dtype)
    problem["offsets"].ravel()[::11] = 1e30
    pairs = {name: embedded(problem[name]) for name in (*NAMES, "grad_y")}
    outs = {name: embedded(problem[name], np.nan) for name in (*NAMES, "grad_y")}
    problem = problem.map(lambda name, _: pairs[name][0])
    fresh = problem.backward(backend)
    problem.forward(backend, out=outs["grad_y"][0])
    problem.backward(backend, out=type(fresh)(**{name: outs[name][0] for name in NAMES}))
    for name in (*NAMES, "grad_y"):
        assert pairs[name][1](), f"written beside the input {name}"
        assert outs[name][1](), f"written beside the output {name}"
        assert not np.isnan(outs[name][0]).any(), name


def test_gaps_of_a_strided_output_are_not_written(backend, path):
    problem = make(path._replace(size=(7, 6), padding=1), np.float32)
    wide = np.full((1, path.c_out, 14, 12), 7.0, np.float32)
    problem.forward(backend, out=wide[:, :, ::2, 1::2])
    gaps = np.ones(wide.shape, bool)
    gaps[:, :, ::2, 1::2] = False
    assert (wide[gaps] == 7.0).all()
