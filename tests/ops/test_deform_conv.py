"""deform_conv_forward and deform_conv_backward compute what the formulas say, for ugly sizes and in both dtypes.

First against the naive reference over a table of sizes, then against things that know nothing of it: plain
convolution, shifted images, scipy's interpolation, the identities of docs/semantics.md (b.4), Euler's and the adjoint
identity, and finite differences. Those also run on the naive reference itself (the `subject` fixture).
"""

import family
import family_gpu
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import test_deform_conv_errors
from checks import (
    LAYOUTS,
    NAMES,
    Case,
    Problem,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    between_pixels,
    check_against_naive,
    dot,
    expected,
    make,
    output_size,
)
from naive import conv

DTYPES = [np.float32, np.float64]

CASES = [
    # one pixel, one channel, images of one row or one column
    Case(size=(1, 1), kernel=(1, 1)),
    Case(size=(1, 1), padding=1, mask=True, bias=True),
    Case(size=(1, 7), kernel=(1, 3), channels=2, c_out=3, bias=True),
    Case(size=(7, 1), kernel=(3, 2), padding=(1, 1), channels=3, c_out=2, mask=True),
    Case(size=(7, 5), channels=2, c_out=1, batch=3),
    Case(size=(7, 5), kernel=(5, 5), padding=2, channels=3, c_out=4, mask=True, bias=True),
    Case(size=(2, 3), kernel=(5, 5), padding=((3, 1), (2, 4)), channels=4, c_out=5),
    # numbers of channels around the widths of vectors and tiles
    Case(channels=5, c_out=7, size=(7, 5), kernel=(3, 2), stride=(2, 1), padding=((2, 0), (0, 3)), bias=True),
    Case(channels=7, c_out=8, size=(6, 6), dilation=(2, 1), padding=(1, 0), mask=True),
    Case(channels=8, c_out=15, size=(7, 5), padding=1, bias=True),
    Case(channels=15, c_out=16, size=(7, 5), padding=1, offset_groups=3, mask=True),
    Case(channels=16, c_out=17, size=(9, 8), kernel=(1, 3), offset_groups=4),
    Case(channels=17, c_out=20, size=(7, 5), padding=1, mask=True, bias=True),
    Case(channels=20, c_out=31, size=(7, 9), kernel=(3, 2), stride=(1, 2), padding=1),
    Case(channels=31, c_out=33, size=(7, 5), padding=1, bias=True),
    Case(channels=33, c_out=64, size=(6, 7), kernel=(3, 3), padding=1, mask=True),
    Case(channels=64, c_out=70, size=(5, 7), padding=1, bias=True),
    Case(channels=70, c_out=33, size=(7, 5), kernel=(1, 1), bias=True),
    Case(channels=300, c_out=9, size=(6, 7), padding=1, mask=True),
    Case(channels=260, c_out=140, size=(3, 5), kernel=(1, 3)),
    Case(channels=9, c_out=290, size=(5, 4), kernel=(3, 2)),
    # groups, offset groups, and neither dividing the other
    Case(channels=12, c_out=6, size=(7, 5), padding=1, groups=3, offset_groups=4, mask=True, bias=True, batch=2),
    Case(33, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
    Case(channels=64, c_out=32, size=(6, 7), padding=1, groups=2, offset_groups=8, mask=True),
    Case(channels=64, c_out=64, size=(6, 7), padding=1, groups=32, offset_groups=1, bias=True),
    Case(channels=48, c_out=36, size=(5, 6), padding=1, groups=12, offset_groups=16, mask=True),
    Case(channels=10, c_out=10, size=(7, 5), padding=1, offset_groups=10, mask=True),
    Case(channels=12, c_out=8, size=(7, 5), padding=1, groups=4, offset_groups=6, bias=True),
    # depthwise, also with two outputs per channel and with offset groups
    Case(channels=5, c_out=5, size=(7, 5), padding=1, groups=5, mask=True, bias=True),
    Case(channels=17, c_out=34, size=(7, 5), padding=1, groups=17, bias=True),
    Case(channels=64, c_out=64, size=(9, 8), padding=1, groups=64, batch=2),
    Case(channels=33, c_out=33, size=(7, 5), kernel=(5, 5), padding=2, groups=33, offset_groups=11, mask=True),
    Case(channels=16, c_out=32, size=(7, 5), padding=1, groups=16, offset_groups=16, mask=True, bias=True),
    Case(channels=280, c_out=280, size=(4, 5), padding=1, groups=280),
    # more output pixels than one tile, batches, and no images at all
    Case(channels=3, c_out=4, size=(40, 41), padding=1, bias=True),
    Case(channels=20, c_out=17, size=(42, 43), stride=1, padding=0, mask=True, offset_groups=2),
    Case(channels=8, c_out=16, size=(80, 41), stride=(2, 1), padding=1, batch=3),
    Case(channels=18, c_out=18, size=(40, 41), padding=1, groups=18, offset_groups=2, mask=True),
    Case(channels=16, c_out=3, size=(3, 301), kernel=(3, 1), dilation=(1, 3), offset_groups=2, bias=True),
    Case(channels=3, c_out=2, size=(2, 2), padding=1, batch=33, bias=True, mask=True),
    Case(channels=3, c_out=4, size=(7, 5), padding=1, batch=0, bias=True, mask=True),
    Case(channels=4, c_out=4, size=(7, 5), padding=1, batch=0, groups=4),
    # strides and dilations larger than the kernel, images that the taps jump over
    Case(channels=2, c_out=3, size=(13, 11), stride=(5, 4), padding=1, dilation=(3, 2), bias=True),
    Case(channels=2, c_out=2, size=(4, 4), kernel=(2, 2), padding=((9, 9), (0, 7)), stride=3, spread=5.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_naive(backend, case, dtype):
    y, g = check_against_naive(backend, make(case, dtype, seed=len(str(case))))
    assert y.shape == (case.batch, case.c_out, *output_size(case))
    if case.batch == 0:
        assert not g.w.any() and g.w.size


# On a GPU. The operator as family.py describes one.


def plain(problem):
    """A family.Problem as one of checks.py."""
    arrays = {name: problem[name] for name in NAMES}
    return Problem(**arrays, grad_y=problem.grad_y, params=problem.params)


OPERATOR = family.Operator(
    "deform_conv", arrays=("x", "offsets", "w", "bias", "mask"), differentiable=NAMES, linear=("x", "w", "mask"),
    length=lambda problem: None, added=("bias",), optional=("bias", "mask"), keywords=("mask",),
    expected=lambda problem: expected(plain(problem)), coordinates=("offsets",),
)  # fmt: skip


def described(case, dtype, **more):
    p = make(case, dtype, **more)
    return family.Problem(OPERATOR, {name: getattr(p, name) for name in p.given()}, p.grad_y, p.params)


def odd_offsets(case):
    """Offsets that lead to borders and pixels, or are huge, infinite or NaN."""

    def draw(rng, shape):
        moved = rng.normal(size=shape) * 2
        odd = rng.choice([-2, -1, -0.5, -0.0, 1, 1.5, 3, 1e9, -1e30, np.inf, -np.inf, np.nan], size=shape)
        return np.where(rng.random(shape) < 0.4, odd, moved)

    return draw


TINY = [
    Case(size=(1, 1), kernel=(1, 1)),
    Case(2, 6, 4, (5, 4), (3, 2), (2, 1), ((1, 0), (0, 2)), (2, 1), groups=2, offset_groups=3, mask=True, bias=True),
    Case(channels=9, c_out=5, size=(4, 3), padding=1, bias=True),
    Case(1, 18, 20, (3, 3), (2, 1), (1, 2), (0, 1), groups=2, offset_groups=3, mask=True, bias=True),
    Case(channels=4, c_out=8, size=(4, 3), padding=1, groups=4, offset_groups=2, mask=True),
    Case(channels=2, c_out=3, size=(4, 3), padding=1, batch=0, bias=True, mask=True),
]
ODD = [
    Case(2, 4, 3, (4, 3), (3, 2), padding=1, offset_groups=2, mask=True, bias=True),
    Case(2, 10, 3, (4, 3), (2, 2), padding=1, offset_groups=2, mask=True, bias=True),
]


class Errors:
    """The wrong values of test_deform_conv_errors."""

    wrong = [row for row in test_deform_conv_errors.BOTH if row[2] is ValueError]  # noqa: RUF012

    @staticmethod
    def usual(dtype):
        call = test_deform_conv_errors.right()
        arrays, grad_y = {name: call.pop(name) for name in OPERATOR.arrays}, call.pop("grad_y")
        return family.Problem(OPERATOR, arrays, grad_y, call)


class TestGPU(family_gpu.GPU):
    errors = Errors
    operator, tf32, rounds_terms = OPERATOR, True, True
    usual = staticmethod(
        lambda dtype: described(
            Case(2, 18, 6, (3, 3), (2, 1), padding=(0, 1), groups=2, offset_groups=3, mask=True, bias=True), dtype
        )
    )
    others = family.table(
        described, [Case(2, 4, 6, (3, 3), (2, 2), padding=(0, 1), groups=2, offset_groups=2, mask=True, bias=True)]
    )
    full = family.table(described, CASES)
    cases = family.table(described, TINY)
    cases |= family.table(lambda case, dtype: described(case, dtype, offsets=odd_offsets(case)), ODD)


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_against_naive_without_and_with_wild_offsets(backend, spread):
    """At offset 0 all coordinates are integers, many exactly -1; at 30 pixels nearly all samples are outside."""
    case = Case(batch=2, channels=6, c_out=5, size=(8, 9), padding=1, offset_groups=2, mask=True, spread=spread)
    check_against_naive(backend, make(case, np.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, channels=20, c_out=18, size=(7, 6), padding=1, groups=2, offset_groups=4, mask=True, bias=True),
        Case(batch=2, channels=6, c_out=6, size=(7, 6), padding=1, groups=6, mask=True, bias=True),
    ],
    ids=["grouped", "depthwise"],
)
def test_any_memory_layout(backend, case, layout):
    """The right numbers, and the bits of contiguous arrays."""
    plain = make(case, np.float32)
    y, g = check_against_naive(backend, plain.map(lambda _, array: LAYOUTS[layout](array)))
    assert_same_bits(y, plain.forward(backend))
    assert_same_gradients(g, plain.backward(backend))


def test_broadcast_arrays(backend):
    """Zero strides: one image, one offset field, one output gradient shown several times."""
    case = Case(batch=3, channels=5, c_out=4, size=(7, 6), padding=1, mask=True, bias=True)

    def repeat(name, array):
        return np.broadcast_to(array[:1] if name != "w" else array[:, :1], array.shape)

    check_against_naive(backend, make(case, np.float32).map(repeat))


@pytest.mark.parametrize("layout", ["strided", "reversed", "channels_last", "fortran", "shifted"])
def test_out_of_any_layout(backend, layout):
    p = make(Case(batch=2, channels=5, c_out=17, size=(7, 6), padding=1, mask=True, bias=True), np.float32)
    want = expected(p)
    out = LAYOUTS[layout](np.full(p.grad_y.shape, np.nan, np.float32))
    assert p.forward(backend, out=out) is out
    assert_close(out, *want["y"], "y")
    g = p.backward(backend)
    g = type(g)(*(LAYOUTS[layout](np.full_like(array, np.nan)) for array in g))
    p.backward(backend, out=g)
    for name in p.given():
        assert_close(getattr(g, name), *want[name], name)


# Things that know nothing of the naive reference. All in float64, where agreement is to about 1e-12.


def near(a, b, scale=1.0):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * scale)


PLAIN = [
    Case(2, 6, 4, (8, 9), (3, 2), (2, 1), (1, 2), (2, 1), groups=2, offset_groups=3, bias=True),
    Case(batch=1, channels=17, c_out=20, size=(7, 5), padding=(1, 1), bias=True),
    Case(batch=2, channels=5, c_out=10, size=(7, 5), padding=(1, 1), groups=5, bias=True),
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_zero_offsets_give_plain_convolution(subject, case):
    p = make(case._replace(spread=0.0))
    near(p.forward(subject), conv.forward(p.x, p.w, p.bias, **p.params), 10)
    g, plain = p.backward(subject), conv.backward(p.grad_y, p.x, p.w, p.bias, **p.params)
    near(g.x, plain.x, 10)
    near(g.w, plain.w, 10)
    near(g.bias, plain.bias, 10)


def test_the_naive_convolution_is_a_correlation():
    """The plain convolution that the test above relies on, against scipy."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 3, 6, 7)), rng.normal(size=(2, 3, 3, 2))
    want = [sum(scipy.signal.correlate(x[0, c], w[o, c], "valid") for c in range(3)) for o in range(2)]
    near(conv.forward(x, w)[0], want)


@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (3, 2), (-9, 1)])
def test_integer_offsets_shift_the_image(subject, shift):
    p = make(Case(batch=2, channels=3, c_out=4, size=(7, 8), padding=1, offset_groups=3))
    p.offsets.reshape(2, -1, 2, 7, 8)[...] = np.reshape(shift, (2, 1, 1))
    room = 10
    wide = np.pad(p.x, [(0, 0), (0, 0), (room, room), (room, room)])
    top, left = (room + s - 1 for s in shift)
    shifted = wide[:, :, top : top + 9, left : left + 10]
    near(p.forward(subject), conv.forward(shifted, p.w), 10)


def test_one_tap_of_weight_one_is_interpolation(subject):
    """b.4.3, with scipy's grid-constant mode, which is the same zero extension."""
    p = make(Case(size=(6, 7), kernel=(1, 1), spread=4.0))
    p.w[...] = 1
    grid = np.indices((6, 7)) + p.offsets[0]
    want = scipy.ndimage.map_coordinates(p.x[0, 0], grid, order=1, mode="grid-constant")
    near(p.forward(subject)[0, 0], want)


def test_linear_in_image_weights_and_mask(subject):
    """b.4.4: doubling one of them doubles y; the sum of two gives the sum of the results."""
    case = Case(batch=2, channels=4, c_out=4, size=(6, 7), padding=1, groups=2, offset_groups=2, mask=True)
    p = make(case)
    other = make(case, seed=1)
    for name in ("x", "w", "mask"):
        a, b = getattr(p, name), getattr(other, name)
        both = p._replace(**{name: 2 * a + b}).forward(subject)
        near(both, 2 * p.forward(subject) + p._replace(**{name: b}).forward(subject), 10)


def test_explicit_zero_padding_changes_nothing(subject):
    """b.4.5"""
    p = make(Case(batch=2, channels=3, c_out=4, size=(6, 7), padding=((2, 1), (0, 3)), spread=3.0))
    padded = p._replace(x=np.pad(p.x, [(0, 0), (0, 0), (2, 1), (0, 3)]), params={"padding": 0})
    near(p.forward(subject), padded.forward(subject), 10)
    near(p.backward(subject).offsets, padded.backward(subject).offsets, 10)
    near(p.backward(subject).x, padded.backward(subject).x[:, :, 2:-1, :-3], 10)


def test_equal_offset_groups_are_one_group(subject):
    """b.4.6"""
    one = make(Case(batch=2, channels=6, c_out=4, size=(6, 7), padding=1, groups=2, mask=True))
    many = one._replace(offsets=np.tile(one.offsets, (1, 6, 1, 1)), mask=np.tile(one.mask, (1, 6, 1, 1)))
    near(one.forward(subject), many.forward(subject), 10)
    a, b = one.backward(subject), many.backward(subject)
    near(a.x, b.x, 10)
    near(a.w, b.w, 10)
    near(a.offsets, b.offsets.reshape(2, 6, *one.offsets.shape[1:]).sum(axis=1), 10)
    near(a.mask, b.mask.reshape(2, 6, *one.mask.shape[1:]).sum(axis=1), 10)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_axis_of_size_one_drops_out(subject, axis):
    """b.4.7: along the other axis it is the one-dimensional operator, here by np.interp."""
    size, kernel = ((1, 12), (1, 3)) if axis == 0 else ((12, 1), (3, 1))
    p = make(Case(channels=2, c_out=3, size=size, kernel=kernel))
    moved = p.offsets.reshape(3, 2, 10)
    moved[:, axis] = 0
    want = np.zeros((3, 10))
    for k in range(3):
        at = np.arange(10) + k + moved[k, 1 - axis]
        for c in range(2):
            line = np.concatenate([[0], p.x[0, c].ravel(), [0]])
            want += np.outer(p.w[:, c].reshape(3, 3)[:, k], np.interp(at, np.arange(-1, 13), line))
    near(p.forward(subject).reshape(3, 10), want, 10)


def test_affine_images_are_sampled_exactly(subject):
    """b.4.8: inside the image, interpolation of a plane is the plane; its slopes are the offset gradients."""
    p = make(Case(size=(9, 10)), offsets=lambda rng, shape: rng.uniform(0, 0.9, size=shape))
    p.offsets.reshape(3, 3, 2, 7, 8)[2, :, 0] *= -1  # the last row moves up, the last column left: inside
    p.offsets.reshape(3, 3, 2, 7, 8)[:, 2, 1] *= -1
    p.x[0, 0] = np.add.outer(3 * np.arange(9), 5 * np.arange(10)) + 2.0
    p.w[...] = 1
    p.grad_y[...] = 1
    steps = p.offsets.reshape(3, 3, 2, 7, 8)
    rows = np.arange(7)[:, None] + np.arange(3)[:, None, None, None] + steps[:, :, 0]
    cols = np.arange(8) + np.arange(3)[:, None, None] + steps[:, :, 1]
    near(p.forward(subject)[0, 0], (3 * rows + 5 * cols + 2).sum(axis=(0, 1)), 100)
    slopes = p.backward(subject).offsets.reshape(9, 2, 7, 8)
    near(slopes[:, 0], np.full((9, 7, 8), 3.0), 100)
    near(slopes[:, 1], np.full((9, 7, 8), 5.0), 100)


SMOOTH = [
    Case(2, 6, 4, (5, 4), (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3, mask=True, bias=True),
    Case(batch=1, channels=18, c_out=17, size=(7, 6), padding=((0, 2), (1, 1)), mask=True, bias=True),
    Case(batch=2, channels=9, c_out=18, size=(6, 7), padding=1, groups=9, offset_groups=3, mask=True, bias=True),
    Case(batch=2, channels=5, c_out=4, size=(6, 7), kernel=(1, 1)),
]


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_euler_identity(subject, case):
    """y is linear in x, in w and in mask: <g_x, x> = <g_w, w> = <g_mask, mask> = <grad_y, y - bias>."""
    p = make(case)
    bias = 0 if p.bias is None else p.bias[:, None, None]
    want = dot(p.grad_y, p.forward(subject) - bias)
    g = p.backward(subject)
    for name in {"x", "w", "mask"} & set(p.given()):
        near(dot(getattr(g, name), getattr(p, name)), want, 100)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_adjoint_identity(subject, case):
    """For any image u, <grad_y, forward(u) - bias> = <g_x(grad_y), u>; likewise for any weights and any mask."""
    p, other = make(case), make(case, seed=1)
    g = p.backward(subject)
    bias = 0 if p.bias is None else p.bias[:, None, None]
    for name in {"x", "w", "mask"} & set(p.given()):
        u = getattr(other, name)
        near(dot(p.grad_y, p._replace(**{name: u}).forward(subject) - bias), dot(getattr(g, name), u), 100)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_finite_differences(subject, case):
    """Between the kinks y is a polynomial of degree two at most in each array, so central differences are exact."""
    p = make(case, offsets=between_pixels)
    g = p.backward(subject)
    rng = np.random.default_rng(2)
    step = 0.02  # less than the distance to the next pixel

    def loss(name, moved):
        return dot(p.grad_y, p._replace(**{name: getattr(p, name) + moved}).forward(subject))

    for name in p.given():
        array, gradient = getattr(p, name), getattr(g, name)
        for direction in (rng.uniform(-1, 1, array.shape), *_unit_directions(rng, array.shape, 6)):
            slope = (loss(name, step * direction) - loss(name, -step * direction)) / (2 * step)
            near(slope, dot(gradient, direction), 1000)


def _unit_directions(rng, shape, count):
    for at in rng.integers(0, np.prod(shape), count):
        direction = np.zeros(np.prod(shape))
        direction[at] = 1
        yield direction.reshape(shape)
