"""Calls whose launches are remembered: the same results as at first, wherever the arrays are and whatever came between."""

import numpy as np
import pytest
from checks import LAYOUTS, assert_same_bits, with_threads
from halves import HALVES

import numdcn
from numdcn._call import remembered
from numdcn._cpu import program
from numdcn._cpu.arrays import _address_in_object, address_of

RNG = np.random.default_rng(0)


def arrays(dtype=np.float32, channels=5, outputs=6):
    """grad_y, x, offsets, w and bias of a deformable convolution of two images."""
    shapes = [(2, outputs, 7, 6), (2, channels, 7, 6), (2, 18, 7, 6), (outputs, channels, 3, 3), (outputs,)]
    return [RNG.standard_normal(shape).astype(dtype) for shape in shapes]


def both(grad_y, *others):
    y = numdcn.deform_conv_forward(*others, padding=1)
    return (y, *numdcn.deform_conv_backward(grad_y, *others, padding=1)[:4])


@pytest.fixture
def known(monkeypatch):
    """What is remembered; nothing at first."""
    known = {}
    monkeypatch.setattr(program, "_known", known)
    return known


def test_a_call_like_an_earlier_one_records_nothing(known, monkeypatch):
    first, second = arrays(), arrays()
    want = both(*second)
    both(*first)
    monkeypatch.setattr(program, "Recording", None)
    assert len(known) == 2
    for got, right in zip(both(*second), want, strict=True):
        assert_same_bits(got, right, "result")


def test_layouts_types_and_threads_in_turn(known):
    """Each has a program of its own, which is right when its turn comes again."""
    given = {dtype: arrays(dtype) for dtype in (np.float32, np.float64)}
    want = {dtype: both(*values) for dtype, values in given.items()}
    for _ in range(2):
        for dtype, values in given.items():
            for layout in LAYOUTS.values():
                for got in with_threads(lambda v=values, place=layout: both(*map(place, v)), (1, 3)):
                    for one, right in zip(got, want[dtype], strict=True):
                        assert_same_bits(one, right, "result")


def test_prepared_weights_and_plain_ones_in_turn(known):
    _, x, offsets, w, bias = arrays()
    other = w[::-1].copy()
    want = [numdcn.deform_conv_forward(x, offsets, weights, bias, padding=1) for weights in (w, other)]
    prepared = [numdcn.prepare_weights(weights) for weights in (w, other)]
    for _ in range(2):
        for plain, packed, right in zip((w, other), prepared, want, strict=True):
            for weights in (plain, packed):
                assert_same_bits(numdcn.deform_conv_forward(x, offsets, weights, bias, padding=1), right, "y")
    assert len(known) == 2


@pytest.mark.parametrize("size", [1, 3])
def test_weights_in_bfloat16_wherever_they_begin(known, size):
    """Pairs of channels, where the processor multiplies them, are read as numbers of four bytes."""
    kind = HALVES["bfloat16"]
    x, w = RNG.standard_normal((1, 6, 9, 8)).astype(kind), RNG.standard_normal((5, 6, size, size)).astype(kind)
    memory = np.empty(w.size + 2, kind)
    want = numdcn.conv_forward(x, w)
    for first in (0, 1, 2):
        place = memory[first : first + w.size].reshape(w.shape)
        place[...] = w
        assert_same_bits(numdcn.conv_forward(x, place), want, "y")


@pytest.mark.parametrize("stride", [0, 2**50, -(2**50), 2**62])
def test_any_stride_along_an_axis_of_one_element(known, stride):
    """NumPy does not care, so it may look like anything."""
    grad_y, x, offsets, w, bias = (a[:1] if a.ndim == 4 and len(a) == 2 else a for a in arrays())
    odd = [
        np.lib.stride_tricks.as_strided(a, strides=(stride, *a.strides[1:])) if len(a) == 1 else a
        for a in (grad_y, x, offsets, w, bias)
    ]
    for got, right in zip(both(*odd), both(grad_y, x, offsets, w, bias), strict=True):
        assert_same_bits(got, right, "result")


def test_few_are_remembered(known, monkeypatch):
    monkeypatch.setattr(remembered, "MOST", 4)
    for size in range(3, 15):
        numdcn.conv_forward(np.ones((1, 1, size, 3), "f"), np.ones((1, 1, 3, 3), "f"))
        assert 1 <= len(known) <= 4


def test_none_of_many_launches_is_remembered(known, monkeypatch):
    monkeypatch.setattr(program, "MOST_BYTES", 100)
    both(*arrays())
    assert not known


@pytest.mark.parametrize("layout", LAYOUTS)
def test_addresses(layout):
    array = LAYOUTS[layout](RNG.standard_normal((3, 4, 5, 6)))
    assert address_of(array) == _address_in_object(array) == array.ctypes.data
