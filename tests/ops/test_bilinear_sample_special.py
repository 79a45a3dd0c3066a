"""bilinear_sample at edges, with non-finite numbers, and as the core of other samplers.

One rule per test, which is named after it; then grid_sample as torch and ONNX define it (published
vectors included), SciPy's map_coordinates and deform_conv are expressed in terms of bilinear_sample. Tests that take
`subject` also run on the naive reference.
"""

import pathlib

import numpy as np
import pytest
import scipy.ndimage
from naive import deform_conv
from test_bilinear_sample import OPERATOR  # noqa: F401 - tells the fixtures what `subject` is

import numdcn

DTYPES = [np.float32, np.float64]
VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
OUTSIDE = [np.inf, -np.inf, 3e38, -3e38, 1e30, -1e30, 2.0**63, 2.0**31, -(2.0**31), 1e9, -1e9]
CHANNELS = [1, 3, 8, 40]


@pytest.fixture(params=CHANNELS)
def channels(request):
    return request.param


def run(subject, x, points, grad_y=None):
    """(y, gradient of x, gradient of points), for a gradient of y of ones unless given."""
    y = subject.forward(x, points)
    g = subject.backward(np.ones(y.shape, x.dtype) if grad_y is None else grad_y, x, points)
    return y, g.x, g.points


def image(channels, size=(4, 4), batch=1, dtype=np.float64):
    return np.random.default_rng(1).uniform(1, 2, (batch, channels, *size)).astype(dtype)


def point(y, x, dtype=np.float64):
    return np.array([[[y, x]]], dtype)


def near(got, want, dtype=np.float64, scale=1.0):
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=10 * tolerance * scale)


# Edges. Along one axis of size 4, the other coordinate being 1: p -> (value, slope), by rule zeros.

AXIS = {
    -2.0: lambda v: (0, 0),
    -1.25: lambda v: (0, 0),
    -1.0: lambda v: (0, v[0]),
    -0.75: lambda v: (v[0] / 4, v[0]),
    -0.0: lambda v: (v[0], v[1] - v[0]),
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
def test_values_and_right_slopes_along_an_axis(subject, channels, axis, at):
    """The table of rule zeros: the slope at an integer is the right one, at -1 it is the first pixel, at 4 nothing."""
    x = image(channels)
    y, _, g_points = run(subject, x, point(*((at, 1.0) if axis == 0 else (1.0, at))))
    lines = x[0, :, :, 1] if axis == 0 else x[0, :, 1, :]
    pairs = [AXIS[at](line) for line in lines]
    near(y[0, :, 0], [value for value, _ in pairs])
    near(g_points[0, 0, axis], sum(slope for _, slope in pairs))


def test_at_minus_one_only_its_own_axis_has_a_slope(subject, channels):
    x = image(channels)
    y, g_x, g_points = run(subject, x, point(-1.0, 1.5))
    assert not y.any() and not g_x.any() and g_points[0, 0, 1] == 0
    near(g_points[0, 0, 0], x[0, :, 0, 1:3].mean(axis=-1).sum())
    _, _, corner = run(subject, x, point(-1.0, -1.0))
    assert not corner.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_just_inside_and_just_outside(subject, channels, dtype):
    """The last number below -1 is outside, -1 and the last number below the size are inside."""
    x = image(channels, dtype=dtype)
    below, last = np.nextafter(dtype(-1), dtype(-2)), np.nextafter(dtype(4), dtype(0))
    for outside in (point(below, 1, dtype), point(1, below, dtype), point(4, 1, dtype), point(1, 4, dtype)):
        assert not any(part.any() for part in run(subject, x, outside))
    y, _, g_points = run(subject, x, point(1, last, dtype))
    near(g_points[0, 0, 1], -x[0, :, 1, 3].sum(), dtype, channels)
    assert (y > 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1)])
def test_axes_of_one_pixel(subject, channels, size):
    """The value falls from the pixel to zero within one pixel to either side."""
    x = image(channels, size)
    for y, share in ((-1, 0), (-0.75, 0.25), (0, 1), (0.5, 0.5), (1, 0)):
        if size[0] == 1:
            near(run(subject, x, point(y, 0))[0][0, :, 0], share * x[0, :, 0, 0])
        if size[1] == 1:
            near(run(subject, x, point(0, y))[0][0, :, 0], share * x[0, :, 0, 0])


def test_pixels_are_read_as_they_are(subject, channels):
    """At integer coordinates the value is the pixel, bit for bit."""
    x = image(channels, (3, 5)) / 3
    points = np.moveaxis(np.indices((3, 5)), 0, -1)[None].astype(np.float64)
    assert np.array_equal(run(subject, x, points)[0], x)


def test_equal_points_add_up(subject, channels):
    x = image(channels)
    once = run(subject, x, point(1.25, 2.5))
    many = run(subject, x, np.tile(point(1.25, 2.5), (1, 7, 1)))
    near(many[0], np.repeat(once[0], 7, axis=2))
    near(many[1], 7 * once[1])
    near(many[2], np.repeat(once[2], 7, axis=1))


# Non-finite or huge coordinates.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("axes", ["y", "x", "yx"])
def test_infinite_and_huge_coordinates_are_outside(subject, dtype, value, axes):
    """Everything is zero there, whatever the image contains."""
    for pixel in (1.0, np.nan):
        x = np.full((1, 9, 4, 4), pixel, dtype)
        for part in run(subject, x, point(*(value if axis in axes else 1.5 for axis in "yx"), dtype)):
            assert not part.any()  # also fails on NaN


@pytest.mark.parametrize("other", [1.5, np.nan, np.inf, -np.inf, 1e30, -7.0])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_nan_coordinate_reaches_its_own_point_only(subject, channels, axis, other):
    x = image(channels, batch=2)
    points = np.random.default_rng(0).uniform(-2, 5, (2, 21, 2))
    points[1, 13] = (np.nan, other) if axis == 0 else (other, np.nan)
    y, g_x, g_points = run(subject, x, points)
    without = points.copy()
    without[1, 13] = np.inf
    want = run(subject, x, without)
    assert np.isnan(y[1, :, 13]).all() and np.isnan(g_points[1, 13]).all()
    y[1, :, 13], g_points[1, 13] = 0, 0
    near(y, want[0])
    near(g_x, want[1])
    near(g_points, want[2])


# Non-finite pixels and gradients.


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("y", [-1.0, -0.5, 0.0, 1.0, 1.5, 2.0, 3.0, 3.5])
@pytest.mark.parametrize("x", [-1.0, -0.25, 2.0, 3.75])
def test_only_the_pixels_of_the_cell_count(subject, channels, y, x, poison):
    """Pixels outside the floor cell may contain anything; a NaN in it counts, even with weight zero."""
    clean, at = image(channels), point(y, x)
    want = run(subject, clean, at)
    cell = np.zeros((4, 4), bool)
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for col in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < 4 and 0 <= col < 4:
                cell[row, col] = True
    for part, expected in zip(run(subject, np.where(cell, clean, poison), at), want, strict=True):
        near(part, expected)
    for row, col in np.argwhere(cell):
        spoilt = clean.copy()
        spoilt[0, -1, row, col] = np.nan
        value, g_x, g_points = run(subject, spoilt, at)
        assert np.isnan(value[0, -1]).all() and np.isfinite(value[0, :-1]).all()
        assert np.isnan(g_points).all()
        near(g_x, want[1])


def test_a_nan_gradient_reaches_its_own_point_only(subject, channels):
    x, points = image(channels, (5, 6)), np.array([[[0.5, 0.5], [2.25, 3.5], [3.5, 1.25]]])
    grad_y = np.ones((1, channels, 3))
    grad_y[0, -1, 1] = np.nan
    _, g_x, g_points = run(subject, x, points, grad_y)
    cell = np.zeros(x.shape, bool)
    cell[0, -1, 2:4, 3:5] = True
    np.testing.assert_array_equal(np.isnan(g_x), cell)
    np.testing.assert_array_equal(np.isnan(g_points[0]), [[False] * 2, [True] * 2, [False] * 2])


# Shapes.


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (3, 0, 2), (1, 2, 3), (2, 3, 1, 2)])
def test_points_of_any_number_of_axes(subject, shape):
    """The axes of points between the first and the last become those of y after its channels."""
    x = image(7, batch=2)
    points = np.random.default_rng(0).uniform(-2, 5, (2, *shape, 2))
    grad_y = np.random.default_rng(1).normal(size=(2, 7, *shape))
    y, g_x, g_points = run(subject, x, points, grad_y)
    count = int(np.prod(shape))
    flat = run(subject, x, points.reshape(2, count, 2), grad_y.reshape(2, 7, count))
    assert y.shape == (2, 7, *shape) and g_x.shape == x.shape and g_points.shape == points.shape
    near(y.reshape(2, 7, count), flat[0])
    near(g_x, flat[1])
    near(g_points.reshape(2, count, 2), flat[2])
    if count == 0:
        assert not g_x.any()


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_an_empty_batch(subject, shape):
    x, points = np.zeros((0, 3, 4, 5)), np.zeros((0, *shape, 2))
    y, g_x, g_points = run(subject, x, points)
    assert (y.shape, g_x.shape, g_points.shape) == ((0, 3, *shape), x.shape, points.shape)


# Other samplers expressed through this one.


def sample_grid(subject, x, grid, align_corners, grad_y=None):
    """torch's grid_sample with zero padding: (y, gradient of x, gradient of grid)

    grid (N, ..., 2) holds (x, y) in -1..1; with align_corners these are the centres of the outer pixels, otherwise
    their outer edges.
    """
    size = np.array(x.shape[2:], x.dtype)
    unit = (size - 1) / 2 if align_corners else size / 2  # pixels per unit of grid
    points = (grid[..., ::-1] + 1) * unit - (0 if align_corners else x.dtype.type(0.5))
    y, g_x, g_points = run(subject, x, points, grad_y)
    return y, g_x, (g_points * unit)[..., ::-1]


def load(name):
    with np.load(VECTORS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


GRID_SAMPLE = sorted(path.stem for path in VECTORS.glob("onnx_gridsample*.npz"))


def test_the_vectors_are_here():
    assert len(GRID_SAMPLE) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRID_SAMPLE)
def test_published_numbers_of_onnx_grid_sample(subject, name, dtype):
    v = load(name)
    assert v["mode"] == "linear" and v["padding_mode"] == "zeros"
    y, _, _ = sample_grid(subject, v["X"].astype(dtype), v["Grid"].astype(dtype), bool(v["align_corners"]))
    np.testing.assert_allclose(y, v["Y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 9), (2, 3), (1, 6), (1, 1)])
def test_torch_grid_sample(subject, align_corners, size):
    """Values and both gradients, also at integer coordinates and at -1, where torch uses the right slope too."""
    torch = pytest.importorskip("torch", reason="a comparison with torch, where it is installed")
    rng = np.random.default_rng(0)
    x, grad_y = rng.normal(size=(2, 3, *size)), rng.normal(size=(2, 3, 8, 9))
    grid = rng.uniform(-1.7, 1.7, size=(2, 8, 9, 2))
    if align_corners and min(size) > 1:
        # exact, because these sizes minus one are powers of two
        places = rng.integers(-2, np.array(size) + 2, size=(2, 8, 4, 2))
        grid[:, :, :4] = (2 * places / (np.array(size) - 1) - 1)[..., ::-1]
    tensors = [torch.tensor(array, requires_grad=True) for array in (x, grid)]
    y = torch.nn.functional.grid_sample(*tensors, "bilinear", "zeros", align_corners)
    (y * torch.tensor(grad_y)).sum().backward()
    got = sample_grid(subject, x, grid, align_corners, grad_y)
    for part, want in zip(got, (y.detach(), tensors[0].grad, tensors[1].grad), strict=True):
        np.testing.assert_allclose(part, want.numpy(), rtol=1e-11, atol=1e-11)


def test_scipy_map_coordinates(subject):
    """order=1, mode="grid-constant" is the same zero extension; its coordinates have their axis first."""
    rng = np.random.default_rng(0)
    x, points = rng.normal(size=(1, 1, 6, 7)), rng.uniform(-3, 9, size=(1, 20, 15, 2))
    points[0, ::3] = points[0, ::3].round()
    want = scipy.ndimage.map_coordinates(x[0, 0], np.moveaxis(points[0], -1, 0), order=1, mode="grid-constant")
    near(run(subject, x, points)[0][0, 0], want)


@pytest.mark.parametrize("channels", [1, 5])
def test_deformable_convolution_of_one_tap(subject, channels):
    """A one-tap kernel of weight one, with one group per channel, samples at its pixel plus the offset."""
    rng = np.random.default_rng(0)
    x, offsets = rng.normal(size=(2, channels, 6, 7)), rng.normal(size=(2, 2, 6, 7)) * 3
    w, grad_y = np.ones((channels, 1, 1, 1)), rng.normal(size=x.shape)
    points = np.moveaxis(offsets + np.indices((6, 7)), 1, -1)
    got = run(subject, x, points, grad_y)
    g = deform_conv.backward(grad_y, x, offsets, w)
    near(got[0], deform_conv.forward(x, offsets, w))
    near(got[1], g.x)
    near(np.moveaxis(got[2], -1, 1), g.offsets)


def test_affine_images_are_sampled_exactly(subject):
    """Between the pixels of a plane the samples are on the plane; its slopes are the gradient of the points."""
    x = (np.add.outer(3.0 * np.arange(9), 5.0 * np.arange(10)) + 2)[None, None]
    points = np.random.default_rng(0).uniform(0, 7.9, size=(1, 4, 5, 2))
    y, _, g_points = run(subject, x, points)
    near(y[0, 0], 3 * points[0, ..., 0] + 5 * points[0, ..., 1] + 2, scale=100)
    near(g_points[0], np.broadcast_to([3.0, 5.0], (4, 5, 2)), scale=100)


def test_an_axis_that_float32_cannot_count_is_refused():
    """Above 2**24, float32 does not represent every integer. The images are a single pixel, repeated."""
    for operator, more in (
        ("bilinear_sample", (np.zeros((1, 1, 2), np.float32),)),
        ("conv", (np.zeros((1, 1, 1, 1), np.float32),)),
        ("roi_align", (np.zeros((0, 5), np.float32), 1)),
    ):
        x = np.broadcast_to(np.float32(1), (1, 1, 1, 2**24 + 1))
        with pytest.raises(ValueError, match=r"`x` is 16777217 pixels.*at most 16777216"):
            getattr(numdcn, f"{operator}_forward")(x, *more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_is_sampled_to_within_4_eps(backend, dtype, channels):
    """Each corner passes through at most 7 roundings of half an eps: 1 - f along both axes, their product, the product
    with the pixel, three sums. So a constant 4 eps below the largest number never overflows."""
    info = np.finfo(dtype)
    points = np.random.default_rng(0).uniform(0, 19, (1, 20_000, 2)).astype(dtype)
    for constant in (dtype(1), info.max * dtype(1 - 4 * info.eps), -info.max * dtype(1 - 4 * info.eps)):
        y = backend.forward(np.full((1, channels, 20, 20), constant), points)
        assert np.isfinite(y).all() and (np.abs(y / constant - 1) <= 4 * info.eps).all()
