"""Samples of an image at the pixels of a tile, with vectors along the channels.

`plan_tap` finds the cell and the weights of each pixel for one tap. Then a sweep over the pixels makes the tap's
columns; in a backward it also adds to the gradients of the image, the offsets and the mask.
"""

from __future__ import annotations

from numdcn._cpu.jit import block
from numdcn._cpu.lanes import sum3
from numdcn._cpu.layout import Image, columns_from, image_from, sink_from
from numdcn._cpu.simd import at, full, load, load_like, load_scalar, narrow, store, width
from numdcn._cpu.tile import (
    BASE_X,
    BASE_Y,
    FRACTION_X,
    FRACTION_Y,
    GRAD_MASK,
    GRAD_X,
    GRAD_Y,
    MASK,
    OFFSET_X,
    OFFSET_Y,
    W00,
    W01,
    W10,
    W11,
)
from numdcn._formulas.bilinear import cell, corner_weights, slopes, value
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


@block
def plan_tap(tile, shift, size, pixel_stride):
    """Fill in index, weights and fractions for a tap, `shift` pixels from tap (0, 0), in images of `size` with
    `pixel_stride` elements from pixel to pixel.

    Overruns the tile's end by up to a full register; what is there is never used.
    """
    one = load_scalar(tile.rows, BASE_Y)
    lane = full(one)
    tap_y, tap_x = like(shift[0], lane), like(shift[1], lane)
    height, width_ = like(size[0], lane), like(size[1], lane)
    for pixel in range(0, tile.pixels, width(one)):
        y = (load(tile.rows, BASE_Y + pixel) + tap_y) + load(tile.rows, OFFSET_Y + pixel)
        x = (load(tile.rows, BASE_X + pixel) + tap_x) + load(tile.rows, OFFSET_X + pixel)
        row, column, fraction_y, fraction_x = cell(y, x, height, width_)
        store(tile.index, pixel, (row * like(size[1] + 1, row) + column) * like(pixel_stride, row))
        w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
        store(tile.rows, FRACTION_Y + pixel, fraction_y)
        store(tile.rows, FRACTION_X + pixel, fraction_x)
        store(tile.rows, W00 + pixel, w00)
        store(tile.rows, W01 + pixel, w01)
        store(tile.rows, W10 + pixel, w10)
        store(tile.rows, W11 + pixel, w11)


@helper
def corners(image, index, vector):
    """The four corners of the cell at element `index`, for a vector of channels."""
    return (
        load_like(image.pointer, index, vector),
        load_like(image.pointer, index + image.pixel_stride, vector),
        load_like(image.pointer, index + image.row_stride, vector),
        load_like(image.pointer, index + image.row_stride + image.pixel_stride, vector),
    )


@helper
def weights_of(tile, pixel, vector):
    """The corner weights of a pixel of a tile, in every lane."""
    return (
        like(load_scalar(tile.rows, W00 + pixel), vector),
        like(load_scalar(tile.rows, W01 + pixel), vector),
        like(load_scalar(tile.rows, W10 + pixel), vector),
        like(load_scalar(tile.rows, W11 + pixel), vector),
    )


@helper
def _sample_vectors(lanes, vectors, image, index, weights, mask, target):
    """`sample_tap` for one pixel and a constant number of vectors of channels, each like `mask`, with `lanes`
    elements."""
    for v in range(vectors):
        store(target, v * lanes, mask * value(weights, corners(image, index + v * lanes, mask)))


@helper
def _sample_part(vector, lanes, image, tile, columns):
    """`sample_tap` for a single vector of channels."""
    for pixel in range(tile.pixels):
        weights, mask = weights_of(tile, pixel, vector), like(load_scalar(tile.rows, MASK + pixel), vector)
        target = at(columns.pointer, pixel * columns.pitch)
        _sample_vectors(lanes, 1, image, load_scalar(tile.index, pixel), weights, mask, target)


@block
def sample_tap(image, tile, count, columns):
    """columns[pixel, c] = mask * sample of channel c of `image` at a pixel of the tile, for c < count, as planned."""
    one = load_scalar(tile.rows, BASE_Y)
    step, vector = width(one), full(one)
    whole = count // step * step
    fours = count // (4 * step) * 4 * step
    if whole == step:
        _sample_part(vector, step, image, tile, columns)
    for pixel in range(tile.pixels if whole > step else 0):
        index, weights = load_scalar(tile.index, pixel), weights_of(tile, pixel, vector)
        mask, target = like(load_scalar(tile.rows, MASK + pixel), vector), at(columns.pointer, pixel * columns.pitch)
        for c in range(0, fours, 4 * step):
            _sample_vectors(step, 4, image, index + c, weights, mask, at(target, c))
        c = fours
        if whole & (2 * step):
            _sample_vectors(step, 2, image, index + c, weights, mask, at(target, c))
            c += 2 * step
        if whole & step:
            _sample_vectors(step, 1, image, index + c, weights, mask, at(target, c))
    c = whole
    while c < count:
        source, target, rest = image_from(image, c), columns_from(columns, c), count - c
        if step > 8 and rest >= 8:
            _sample_part(narrow(one, 8), 8, source, tile, target)
            c += 8
        elif step > 4 and rest >= 4:
            _sample_part(narrow(one, 4), 4, source, tile, target)
            c += 4
        else:
            _sample_part(one, 1, source, tile, target)
            c += 1


@helper
def _copy_vectors(vector, lanes, count, image, tile, columns):
    """`copy_tap` for `count` channels, `lanes` at a time in vectors like `vector`."""
    for pixel in range(tile.pixels):
        index = load_scalar(tile.index, pixel)
        for c in range(0, count, lanes):
            store(columns.pointer, pixel * columns.pitch + c, load_like(image.pointer, index + c, vector))


@block
def copy_tap(image, tile, count, columns):
    """columns[pixel, c] = channel c of `image` at a pixel of the tile, for c < count: `sample_tap` without
    interpolation."""
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    _copy_vectors(full(one), step, whole, image, tile, columns)
    _copy_vectors(narrow(one, 4), 4, quarters, image_from(image, whole), tile, columns_from(columns, whole))
    rest = whole + quarters
    _copy_vectors(one, 1, count - rest, image_from(image, rest), tile, columns_from(columns, rest))


@helper
def _exchange_vectors(vector, lanes, count, sink, tile, columns):
    """`copy_tap_backward` for `count` channels, `lanes` at a time."""
    for pixel in range(tile.pixels):
        index = load_scalar(tile.index, pixel)
        for c in range(0, count, lanes):
            if sink.wanted:
                gradient = load_like(columns.pointer, pixel * columns.pitch + c, vector)
                store(sink.grad, index + c, load_like(sink.grad, index + c, vector) + gradient)
            store(columns.pointer, pixel * columns.pitch + c, load_like(sink.image.pointer, index + c, vector))


@block
def copy_tap_backward(sink, tile, count, columns):
    """The backward of `copy_tap`: adds to the image's gradient, if that is wanted.

    `columns` contains the gradient of the columns, which is replaced by the columns themselves.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    rest = whole + quarters
    _exchange_vectors(full(one), step, whole, sink, tile, columns)
    _exchange_vectors(narrow(one, 4), 4, quarters, sink_from(sink, whole), tile, columns_from(columns, whole))
    _exchange_vectors(one, 1, count - rest, sink_from(sink, rest), tile, columns_from(columns, rest))


@helper
def _add_at(image, index, weights, gradient):
    """Add the gradient of a sample to its four corners."""
    w00, w01, w10, w11 = weights
    c00, c01, c10, c11 = corners(image, index, gradient)
    store(image.pointer, index, fma(w00, gradient, c00))
    store(image.pointer, index + image.pixel_stride, fma(w01, gradient, c01))
    store(image.pointer, index + image.row_stride, fma(w10, gradient, c10))
    store(image.pointer, index + image.row_stride + image.pixel_stride, fma(w11, gradient, c11))


@helper
def _backward_vectors(vector, lanes, vectors, sink, tile, columns, add):
    """`sample_tap_backward` for `vectors` vectors of channels; `add`: whether the tile's gradients already hold a
    sum."""
    one = like(1.0, vector)
    grad = Image(sink.grad, sink.image.pixel_stride, sink.image.row_stride)
    for pixel in range(tile.pixels):
        index = load_scalar(tile.index, pixel)
        weights, mask = weights_of(tile, pixel, vector), like(load_scalar(tile.rows, MASK + pixel), vector)
        fraction_y, fraction_x = (
            like(load_scalar(tile.rows, FRACTION_Y + pixel), vector),
            like(load_scalar(tile.rows, FRACTION_X + pixel), vector),
        )
        fractions = (fraction_y, fraction_x, one - fraction_y, one - fraction_x)
        by_y, by_x, by_mask = one - one, one - one, one - one
        for v in range(vectors):
            gradient = load_like(columns.pointer, pixel * columns.pitch + v * lanes, vector)
            around = corners(sink.image, index + v * lanes, vector)
            sample, (along_y, along_x) = value(weights, around), slopes(fractions, around)
            by_y, by_x = fma(gradient, along_y, by_y), fma(gradient, along_x, by_x)
            by_mask = fma(gradient, sample, by_mask)
            if sink.wanted:
                _add_at(grad, index + v * lanes, weights, gradient * mask)
            store(columns.pointer, pixel * columns.pitch + v * lanes, mask * sample)
        sum_y, sum_x, sum_mask = sum3(by_y, by_x, by_mask)
        pixel_mask = load_scalar(tile.rows, MASK + pixel)
        if add:
            store(tile.rows, GRAD_Y + pixel, fma(pixel_mask, sum_y, load_scalar(tile.rows, GRAD_Y + pixel)))
            store(tile.rows, GRAD_X + pixel, fma(pixel_mask, sum_x, load_scalar(tile.rows, GRAD_X + pixel)))
            store(tile.rows, GRAD_MASK + pixel, load_scalar(tile.rows, GRAD_MASK + pixel) + sum_mask)
        else:
            store(tile.rows, GRAD_Y + pixel, pixel_mask * sum_y)
            store(tile.rows, GRAD_X + pixel, pixel_mask * sum_x)
            store(tile.rows, GRAD_MASK + pixel, sum_mask)


@block
def sample_tap_backward(sink, tile, count, columns):
    """The backward of `sample_tap`: fills the tile's gradients, and adds to the image's gradient if that is wanted.

    `columns` contains the gradient of the columns, which is replaced by the columns themselves.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        source, target, rest, add = sink_from(sink, c), columns_from(columns, c), count - c, c > 0
        if rest >= step:
            vectors = min(rest // step, 4)
            _backward_vectors(full(one), step, vectors, source, tile, target, add)
            c += vectors * step
        elif step > 8 and rest >= 8:
            _backward_vectors(narrow(one, 8), 8, 1, source, tile, target, add)
            c += 8
        elif step > 4 and rest >= 4:
            _backward_vectors(narrow(one, 4), 4, 1, source, tile, target, add)
            c += 4
        else:
            _backward_vectors(one, 1, 1, source, tile, target, add)
            c += 1
