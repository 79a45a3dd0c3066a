"""deform_conv expressed through independent operations: plain convolution, shifted images, SciPy's
interpolation, the identities of docs/semantics.md (b.4). All in float64, where agreement is to about 1e-12.

They also run on the naive reference (the `subject` fixture). Euler's identity, the adjoint identity and finite
differences are in family.py.
"""

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
from conv_cases import Case
from naive import conv
from test_deform_conv import OPERATOR, make  # noqa: F401 - OPERATOR tells the fixtures what `subject` is


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
    near(p.forward(subject), conv.forward(p["x"], p["w"], p["bias"], **p.params), 10)
    g, plain = p.backward(subject), conv.backward(p.grad_y, p["x"], p["w"], p["bias"], **p.params)
    near(g.x, plain.x, 10)
    near(g.w, plain.w, 10)
    near(g.bias, plain.bias, 10)


def test_the_naive_convolution_is_a_correlation():
    """The plain convolution used by the test above, against SciPy."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 3, 6, 7)), rng.normal(size=(2, 3, 3, 2))
    want = [sum(scipy.signal.correlate(x[0, c], w[o, c], "valid") for c in range(3)) for o in range(2)]
    near(conv.forward(x, w)[0], want)


@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (3, 2), (-9, 1)])
def test_integer_offsets_shift_the_image(subject, shift):
    p = make(Case(batch=2, channels=3, c_out=4, size=(7, 8), padding=1, offset_groups=3))
    p["offsets"].reshape(2, -1, 2, 7, 8)[...] = np.reshape(shift, (2, 1, 1))
    room = 10
    wide = np.pad(p["x"], [(0, 0), (0, 0), (room, room), (room, room)])
    top, left = (room + s - 1 for s in shift)
    shifted = wide[:, :, top : top + 9, left : left + 10]
    near(p.forward(subject), conv.forward(shifted, p["w"]), 10)


def test_one_tap_of_weight_one_is_interpolation(subject):
    """b.4.3, with SciPy's grid-constant mode, which is the same zero extension."""
    p = make(Case(size=(6, 7), kernel=(1, 1), spread=4.0))
    p["w"][...] = 1
    grid = np.indices((6, 7)) + p["offsets"][0]
    want = scipy.ndimage.map_coordinates(p["x"][0, 0], grid, order=1, mode="grid-constant")
    near(p.forward(subject)[0, 0], want)


def test_linear_in_image_weights_and_mask(subject):
    """b.4.4: doubling one of them doubles y; the sum of two gives the sum of the results."""
    case = Case(batch=2, channels=4, c_out=4, size=(6, 7), padding=1, groups=2, offset_groups=2, mask=True)
    p = make(case)
    other = make(case, seed=1)
    for name in ("x", "w", "mask"):
        a, b = p[name], other[name]
        both = p.having(**{name: 2 * a + b}).forward(subject)
        near(both, 2 * p.forward(subject) + p.having(**{name: b}).forward(subject), 10)


def test_explicit_zero_padding_changes_nothing(subject):
    """b.4.5"""
    p = make(Case(batch=2, channels=3, c_out=4, size=(6, 7), padding=((2, 1), (0, 3)), spread=3.0))
    padded = p.having(x=np.pad(p["x"], [(0, 0), (0, 0), (2, 1), (0, 3)]))._replace(params={"padding": 0})
    near(p.forward(subject), padded.forward(subject), 10)
    near(p.backward(subject).offsets, padded.backward(subject).offsets, 10)
    near(p.backward(subject).x, padded.backward(subject).x[:, :, 2:-1, :-3], 10)


def test_equal_offset_groups_are_one_group(subject):
    """b.4.6"""
    one = make(Case(batch=2, channels=6, c_out=4, size=(6, 7), padding=1, groups=2, mask=True))
    many = one.having(offsets=np.tile(one["offsets"], (1, 6, 1, 1)), mask=np.tile(one["mask"], (1, 6, 1, 1)))
    near(one.forward(subject), many.forward(subject), 10)
    a, b = one.backward(subject), many.backward(subject)
    near(a.x, b.x, 10)
    near(a.w, b.w, 10)
    near(a.offsets, b.offsets.reshape(2, 6, *one["offsets"].shape[1:]).sum(axis=1), 10)
    near(a.mask, b.mask.reshape(2, 6, *one["mask"].shape[1:]).sum(axis=1), 10)


@pytest.mark.parametrize("axis", [0, 1])
def test_an_axis_of_size_one_drops_out(subject, axis):
    """b.4.7: along the other axis it is the one-dimensional operator, here by np.interp."""
    size, kernel = ((1, 12), (1, 3)) if axis == 0 else ((12, 1), (3, 1))
    p = make(Case(channels=2, c_out=3, size=size, kernel=kernel))
    moved = p["offsets"].reshape(3, 2, 10)
    moved[:, axis] = 0
    want = np.zeros((3, 10))
    for k in range(3):
        at = np.arange(10) + k + moved[k, 1 - axis]
        for c in range(2):
            line = np.concatenate([[0], p["x"][0, c].ravel(), [0]])
            want += np.outer(p["w"][:, c].reshape(3, 3)[:, k], np.interp(at, np.arange(-1, 13), line))
    near(p.forward(subject).reshape(3, 10), want, 10)


def test_affine_images_are_sampled_exactly(subject):
    """b.4.8: inside the image, interpolation of a plane is the plane; its slopes are the offset gradients."""
    p = make(Case(size=(9, 10)), offsets=lambda rng, shape: rng.uniform(0, 0.9, size=shape))
    p["offsets"].reshape(3, 3, 2, 7, 8)[2, :, 0] *= -1  # the last row moves up, the last column left, to stay inside
    p["offsets"].reshape(3, 3, 2, 7, 8)[:, 2, 1] *= -1
    p["x"][0, 0] = np.add.outer(3 * np.arange(9), 5 * np.arange(10)) + 2.0
    p["w"][...] = 1
    p.grad_y[...] = 1
    steps = p["offsets"].reshape(3, 3, 2, 7, 8)
    rows = np.arange(7)[:, None] + np.arange(3)[:, None, None, None] + steps[:, :, 0]
    cols = np.arange(8) + np.arange(3)[:, None, None] + steps[:, :, 1]
    near(p.forward(subject)[0, 0], (3 * rows + 5 * cols + 2).sum(axis=(0, 1)), 100)
    slopes = p.backward(subject).offsets.reshape(9, 2, 7, 8)
    near(slopes[:, 0], np.full((9, 7, 8), 3.0), 100)
    near(slopes[:, 1], np.full((9, 7, 8), 5.0), 100)
