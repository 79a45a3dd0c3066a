"""The gradient of a bias is a sum over images and pixels: accurate to a few roundings, and with the same bits in any
layout."""

import math

import numpy as np
import pytest
from checks import LAYOUTS, assert_same_bits

import numdcn

OPERATORS = ("conv", "deform_conv", "deform_conv_layer")
SPAN = 2**14  # pixels summed at a time


def bias_gradient(operator, grad_y):
    """That of a 1x1 kernel over one channel, with everything else as small as possible."""
    n, c_out, *size = grad_y.shape
    kind = grad_y.dtype
    x, w = np.broadcast_to(kind.type(0), (n, 1, *size)), np.zeros((c_out, 1, 1, 1), kind)
    still, bias = np.broadcast_to(kind.type(0), (n, 2, *size)), np.zeros(c_out, kind)
    if operator == "conv":
        return numdcn.conv_backward(grad_y, x, w, bias, wrt="bias").bias
    if operator == "deform_conv":
        return numdcn.deform_conv_backward(grad_y, x, still, w, bias, wrt="bias").bias
    offset_w = np.zeros((2, 1, 1, 1), kind)
    return numdcn.deform_conv_layer_backward(grad_y, x, w, offset_w, None, bias, wrt="bias").bias


def bound(grad_y):
    """A number passes through 28 roundings in a span (16 + 4 in its line, 4 + 4 in the lines) and as many in each level
    of spans: at most that many halves of eps times the sum of the magnitudes, even in the worst case."""
    parts, levels = len(grad_y) * math.ceil(math.prod(grad_y.shape[2:]) / SPAN), 1
    while parts > 1:
        parts, levels = math.ceil(parts / SPAN), levels + 1
    return 28 * levels * np.finfo(grad_y.dtype).eps / 2 * np.abs(grad_y).sum(axis=(0, 2, 3), dtype=np.float64)


def broadcast(array):
    return np.broadcast_to(array[:1, :, :1], array.shape)


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 17, 16, 16),
    (1, 70, 9, 33),
    (2, 66, 131, 129),
    (1, 2, 1, 40001),
    (33, 5, 3, 3),
]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bits_in_every_layout(operator, shape, dtype):
    values = np.random.default_rng(0).uniform(-1, 3, shape).astype(dtype)
    plain = bias_gradient(operator, values)
    exact = values.sum(axis=(0, 2, 3), dtype=np.longdouble)
    assert (np.abs(plain - exact) <= bound(values)).all()
    for name, layout in LAYOUTS.items():
        assert_same_bits(bias_gradient(operator, layout(values)), plain, name)
    for kind in ("strided", "reversed"):  # a channels-last array in another view
        turned = np.moveaxis(LAYOUTS[kind](np.moveaxis(values, 1, -1)), -1, 1)
        assert_same_bits(bias_gradient(operator, turned), plain, f"channels last, {kind}")
    shown = broadcast(values)
    assert_same_bits(bias_gradient(operator, shown), bias_gradient(operator, shown.copy()), "broadcast")


@pytest.mark.full
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 16, 1500, 1500), (2, 70, 300, 301)], ids=str)
def test_large_images_are_summed_in_blocks(operator, shape):
    """Numbers around 0.5, channels last: a running float32 sum is 3 % off. The same for any number of threads."""
    before, results = numdcn.get_num_threads(), []
    pixels = np.random.default_rng(1).random((shape[0], *shape[2:], shape[1]), dtype=np.float32)
    values = np.moveaxis(pixels, -1, 1)
    try:
        for threads in (1, 2, 7):
            numdcn.set_num_threads(threads)
            results.append(bias_gradient(operator, values))
    finally:
        numdcn.set_num_threads(before)
    assert (np.abs(results[0] - values.sum(axis=(0, 2, 3), dtype=np.float64)) <= bound(values)).all()
    for other in (*results[1:], bias_gradient(operator, np.ascontiguousarray(values))):
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_more_ones_than_float32_counts_one_by_one(operator):
    """4200 * 4200 = 17,640,000 is above 2**24, where adding 1 changes nothing."""
    ones = np.broadcast_to(np.ones((1, 1, 4200, 4), np.float32), (1, 4200, 4200, 4))
    assert (bias_gradient(operator, np.moveaxis(ones, -1, 1)) == 4200 * 4200).all()


@pytest.mark.full
def test_the_bias_of_the_predicting_convolution():
    """offset_b too: the gradient of the offsets, produced by the layer's own backward, may have any layout."""
    rng = np.random.default_rng(2)
    x, grad_y = rng.random((2, 3, 40, 41), dtype=np.float32), rng.random((2, 5, 40, 41), dtype=np.float32)
    layer = numdcn.deform_conv_layer_init(3, 5, 3, modulated=True, seed=0)
    r = numdcn.deform_conv_layer_forward(x, *layer, modulated=True, padding=1)
    saved = {"offsets": r.offsets, "mask": r.mask, "modulated": True, "padding": 1}
    g = numdcn.deform_conv_layer_backward(grad_y, x, *layer, **saved)
    inner = numdcn.deform_conv_backward(grad_y, x, r.offsets, layer.w, mask=r.mask, padding=1, wrt=("offsets", "mask"))
    grad_z = np.concatenate([inner.offsets, inner.mask * r.mask * (1 - r.mask)], axis=1)
    assert (np.abs(g.offset_b - grad_z.sum(axis=(0, 2, 3), dtype=np.float64)) <= bound(grad_z)).all()
