"""conv expressed through other operations, and with non-finite numbers, one rule per test.

Tests that take `subject` also run on the naive reference.
"""

import numpy as np
import pytest
import scipy.signal
from checks import assert_same_bits
from naive import deform_conv
from test_conv import OPERATOR  # noqa: F401 - tells the fixtures what `subject` is

import numdcn

GEOMETRIES = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": ((1, 2), (0, 3))},
    {"stride": (1, 3), "dilation": (2, 1), "padding": (2, 0)},
    {"stride": (2, 1), "dilation": (1, 2), "padding": 4},
]
SHAPES = [  # channels, c_out, groups, kernel
    (1, 1, 1, (1, 1)),
    (3, 4, 1, (3, 2)),
    (6, 4, 2, (1, 3)),
    (17, 20, 1, (3, 3)),
    (5, 5, 5, (3, 3)),
    (8, 16, 8, (3, 1)),
    (36, 68, 2, (2, 2)),
]


@pytest.fixture(params=SHAPES, ids=str)
def arrays(request):
    return draw(*request.param)


def draw(channels, c_out, groups, kernel, size=(9, 8), batch=2, seed=0):
    """x, w, bias"""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(c_out, channels // groups, *kernel))
    return rng.normal(size=(batch, channels, *size)), w, rng.normal(size=c_out)


def near(got, want, scale=10.0):
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11 * scale)


def gradient_of_y(y):
    return np.random.default_rng(9).normal(size=y.shape)


# Expressed through other operations.


def test_each_output_is_a_sum_of_correlations(subject):
    x, w, bias = draw(3, 2, 1, (3, 2))
    y = subject.forward(x, w, bias)
    for n in range(2):
        for o in range(2):
            near(y[n, o], sum(scipy.signal.correlate(x[n, c], w[o, c], "valid") for c in range(3)) + bias[o])


def test_full_and_same_sizes(subject):
    """Padding by one pixel less than the kernel is SciPy's "full", by half a kernel its "same"."""
    x, w, _ = draw(1, 1, 1, (3, 5), batch=1)
    for padding, mode in (((2, 4), "full"), ((1, 2), "same"), (0, "valid")):
        near(subject.forward(x, w, padding=padding)[0, 0], scipy.signal.correlate(x[0, 0], w[0, 0], mode))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_what_torch_computes(subject, arrays, geometry):
    """Values and all gradients; padding that differs before and after is done by hand, because torch lacks it."""
    torch = pytest.importorskip("torch", reason="a comparison with torch, where it is installed")
    x, w, bias = arrays
    y = subject.forward(x, w, bias, **geometry)
    g = subject.backward(gradient_of_y(y), x, w, bias, **geometry)
    tensors = [torch.tensor(array, requires_grad=True) for array in (x, w, bias)]
    (top, bottom), (left, right) = pairs(geometry.get("padding", 0))
    padded = torch.nn.functional.pad(tensors[0], (left, right, top, bottom))
    stride, dilation, groups = geometry.get("stride", 1), geometry.get("dilation", 1), x.shape[1] // w.shape[1]
    want = torch.nn.functional.conv2d(padded, *tensors[1:], stride, 0, dilation, groups)
    (want * torch.tensor(gradient_of_y(y))).sum().backward()
    near(y, want.detach().numpy())
    for gradient, tensor in zip(g, tensors, strict=True):
        near(gradient, tensor.grad.numpy(), 100)


def pairs(padding):
    """((top, bottom), (left, right))"""
    per_axis = padding if isinstance(padding, tuple) else (padding, padding)
    return [p if isinstance(p, tuple) else (p, p) for p in per_axis]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_explicit_zero_padding_is_the_same(subject, arrays, geometry):
    x, w, bias = arrays
    (top, bottom), (left, right) = pairs(geometry.get("padding", 0))
    padded = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)])
    without = {**geometry, "padding": 0}
    y = subject.forward(x, w, bias, **geometry)
    near(y, subject.forward(padded, w, bias, **without))
    g, h = (subject.backward(gradient_of_y(y), a, w, bias, **geo) for a, geo in ((x, geometry), (padded, without)))
    near(g.x, h.x[:, :, top : top + x.shape[2], left : left + x.shape[3]])
    near(g.w, h.w, 100)
    near(g.bias, h.bias, 100)


def test_a_stride_skips_pixels(subject, arrays):
    x, w, bias = arrays
    dense = subject.forward(x, w, bias, padding=1)
    near(subject.forward(x, w, bias, padding=1, stride=(2, 3)), dense[:, :, ::2, ::3])


def test_dilation_is_a_kernel_with_holes(subject, arrays):
    x, w, bias = arrays
    kh, kw = w.shape[2:]
    wide = np.zeros((*w.shape[:2], 2 * kh - 1, 3 * kw - 2))
    wide[:, :, ::2, ::3] = w
    y = subject.forward(x, w, bias, padding=3, dilation=(2, 3))
    near(y, subject.forward(x, wide, bias, padding=3))
    g = subject.backward(gradient_of_y(y), x, w, bias, padding=3, dilation=(2, 3))
    h = subject.backward(gradient_of_y(y), x, wide, bias, padding=3)
    near(g.x, h.x)
    near(g.w, h.w[:, :, ::2, ::3], 100)


def test_groups_are_convolutions_side_by_side(subject, arrays):
    x, w, bias = arrays
    groups = x.shape[1] // w.shape[1]
    y = subject.forward(x, w, bias, padding=1)
    parts = zip(np.split(x, groups, axis=1), np.split(w, groups), np.split(bias, groups), strict=True)
    near(y, np.concatenate([subject.forward(*part, padding=1) for part in parts], axis=1))


@pytest.mark.parametrize("channels, c_out", [(1, 1), (7, 33), (64, 17)])
def test_one_by_one_is_a_matrix_product(subject, channels, c_out):
    x, w, bias = draw(channels, c_out, 1, (1, 1))
    near(subject.forward(x, w, bias), np.einsum("oc,nchw->nohw", w[:, :, 0, 0], x) + bias[:, None, None])


@pytest.mark.parametrize("shift", [(1, 0), (0, 2), (2, 1)])
def test_a_kernel_of_a_single_one_shifts(subject, shift):
    x, w, _ = draw(5, 5, 5, (3, 3))
    w[...] = 0
    w[:, 0, shift[0], shift[1]] = 1
    wide = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
    assert np.array_equal(subject.forward(x, w, padding=1), wide[:, :, shift[0] :, shift[1] :][:, :, :9, :8])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_deformable_convolution_without_offsets(subject, arrays, geometry):
    """The same values, and the same gradients of x, w and bias."""
    x, w, bias = arrays
    y = subject.forward(x, w, bias, **geometry)
    offsets = np.zeros((len(x), 2 * w.shape[2] * w.shape[3], *y.shape[2:]))
    g = subject.backward(gradient_of_y(y), x, w, bias, **geometry)
    for forward, backward in (
        (numdcn.deform_conv_forward, numdcn.deform_conv_backward),
        (deform_conv.forward, deform_conv.backward),
    ):
        near(y, forward(x, offsets, w, bias, **geometry))
        h = backward(gradient_of_y(y), x, offsets, w, bias, **geometry)
        for name in ("x", "w", "bias"):
            near(getattr(g, name), getattr(h, name), 100)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}], ids=str)
def test_the_image_gradient_is_the_transposed_convolution(subject, geometry):
    """SciPy: the full convolution of the output gradient, spread by the stride, with the kernel."""
    x, w, bias = draw(2, 3, 1, (3, 2), size=(9, 8), batch=1)
    y = subject.forward(x, w, bias, **geometry)
    grad_y, stride, pad = gradient_of_y(y), geometry.get("stride", 1), geometry.get("padding", 0)
    spread = np.zeros((3, (y.shape[2] - 1) * stride + 1, (y.shape[3] - 1) * stride + 1))
    spread[:, ::stride, ::stride] = grad_y[0]
    g_x = subject.backward(grad_y, x, w, bias, **geometry).x
    for c in range(2):
        full = sum(scipy.signal.convolve(spread[o], w[o, c], "full") for o in range(3))
        room = np.zeros((9 + 2 * pad, 8 + 2 * pad))
        room[: full.shape[0], : full.shape[1]] = full
        near(g_x[0, c], room[pad : pad + 9, pad : pad + 8])


# Non-finite numbers: ordinary arithmetic.


def seen_by(at, kernel, out, padding=1):
    """(out): the output pixels that see the pixel `at` of the image."""
    seen = np.zeros(out, bool)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            row, col = at[0] + padding - i, at[1] + padding - j
            if 0 <= row < out[0] and 0 <= col < out[1]:
                seen[row, col] = True
    return seen


@pytest.mark.parametrize("weight", [None, 0.0])
@pytest.mark.parametrize("at", [(0, 0), (4, 5), (8, 7)])
def test_a_nan_pixel_reaches_exactly_what_sees_it(subject, arrays, at, weight):
    """Even through zero weights."""
    x, w, bias = arrays
    if weight is not None:
        w[...] = weight
    x[1, -1, at[0], at[1]] = np.nan
    y = subject.forward(x, w, bias, padding=1)
    groups = x.shape[1] // w.shape[1]
    marks = np.zeros(y.shape, bool)
    marks[1, -(len(w) // groups) :] = seen_by(at, w.shape[2:], y.shape[2:])
    np.testing.assert_array_equal(np.isnan(y), marks)
    g = subject.backward(np.ones(y.shape), x, w, bias, padding=1)
    assert np.isfinite(g.x).all() and np.isfinite(g.bias).all()
    assert np.isfinite(g.w[: -(len(w) // groups)]).all() and np.isfinite(g.w[:, :-1]).all()
    assert np.isnan(g.w[-1, -1]).any()


def test_a_nan_weight_reaches_its_output_channel(subject, arrays):
    """At every pixel, because the zeros around the image are multiplied too, as deform_conv does with samples
    outside."""
    x, w, bias = arrays
    w[-1, -1, 0, 0] = np.nan
    y = subject.forward(x, w, bias, padding=1)
    assert np.isnan(y[:, -1]).all() and np.isfinite(y[:, :-1]).all()
    g = subject.backward(np.ones(y.shape), x, w, bias, padding=1)
    assert np.isfinite(g.w).all() and np.isfinite(g.bias).all()
    assert np.isnan(g.x[:, -1]).any() and np.isfinite(g.x[:, :-1]).all()


def test_a_nan_gradient(subject, arrays):
    x, w, bias = arrays
    y = subject.forward(x, w, bias, padding=1)
    grad_y = np.ones(y.shape)
    grad_y[1, -1, 2, 3] = np.nan
    g = subject.backward(grad_y, x, w, bias, padding=1)
    per_output = w.shape[1]
    assert np.isnan(g.bias[-1]) and np.isfinite(g.bias[:-1]).all()
    assert np.isnan(g.w[-1]).all() and np.isfinite(g.w[:-1]).all()
    marks = np.zeros(x.shape, bool)
    marks[1, -per_output:, 1 : 1 + w.shape[2], 2 : 2 + w.shape[3]] = True
    np.testing.assert_array_equal(np.isnan(g.x), marks)


def test_an_infinite_pixel(subject):
    x, w, _ = draw(3, 4, 1, (3, 3))
    w[...] = np.abs(w)
    x[0, 1, 4, 4] = np.inf
    y = subject.forward(x, w, padding=1)
    assert np.array_equal(np.isposinf(y[0, 0]), seen_by((4, 4), (3, 3), (9, 8))) and np.isfinite(y[1]).all()


# Prepared weights.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prepared_weights_give_the_same_bits(arrays, dtype):
    x, w, bias = (array.astype(dtype) for array in arrays)
    prepared = numdcn.prepare_weights(w, groups=x.shape[1] // w.shape[1])
    for _ in range(2):
        y = numdcn.conv_forward(x, w, bias, padding=1)
        assert_same_bits(numdcn.conv_forward(x, prepared, bias, padding=1), y, "y")
        grad_y = gradient_of_y(y).astype(dtype)
        g = numdcn.conv_backward(grad_y, x, w, bias, padding=1)
        for name, got in numdcn.conv_backward(grad_y, x, prepared, bias, padding=1)._asdict().items():
            assert_same_bits(got, getattr(g, name), name)
    wrong = numdcn.prepare_weights(np.zeros((6, 2, 3, 3), dtype), groups=3)
    for groups in (1, 2):
        with pytest.raises(ValueError, match=r"\bw\b"):
            numdcn.conv_forward(np.zeros((1, 2 * groups, 5, 5), dtype), wrong)


def test_one_object_of_prepared_weights_serves_both_convolutions(arrays):
    x, w, bias = arrays
    prepared = numdcn.prepare_weights(w, groups=x.shape[1] // w.shape[1])
    y = numdcn.conv_forward(x, prepared, bias, padding=1)
    offsets = np.zeros((len(x), 2 * w.shape[2] * w.shape[3], *y.shape[2:]))
    near(numdcn.deform_conv_forward(x, offsets, prepared, bias, padding=1), y)
