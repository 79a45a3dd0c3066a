"""Samples of an image at the pixels of a tile, with vectors along the channels.

`plan_tap` finds the cell and the weights of each pixel for one tap. Then a sweep over the pixels makes the tap's
columns; in a backward it also adds to the gradients of the image, the offsets and the mask.
"""

from __future__ import annotations

from numdcn._cpu.jit import block
from numdcn._cpu.lanes import sum3
from numdcn._cpu.layout import Image, columns_from, image_from, sink_from
from numdcn._cpu.pairs import firsts, pairs_of, seconds
from numdcn._cpu.several import add_at_corners, load_at, load_rows, register_for, spread, store_rows, sums_by_pixel
from numdcn._cpu.simd import at, first_lanes, full, load, load_like, load_scalar, narrow, some_lane, store, width
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
    ROW,
    W00,
    W01,
    W10,
    W11,
)
from numdcn._formulas.bilinear import cell, corner_weights, slopes, value
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like, select


@block
def plan_tap(tile, shift, size, pixel_stride):
    """Fill in index, weights and fractions for a tap, `shift` pixels from tap (0, 0), in images of `size` with
    `pixel_stride` elements from pixel to pixel.

    Overruns the tile's end by up to a full register; what is there is never used.
    """
    for pixel in range(0, tile.pixels, width(load_scalar(tile.rows, BASE_Y))):
        _plan_vector(tile, pixel, shift, size, pixel_stride)


@helper
def _plan_vector(tile, pixel, shift, size, pixel_stride):
    """The plan of a vector of pixels; returns their positions, and the rows and columns of their cells."""
    lane = full(load_scalar(tile.rows, BASE_Y))
    y = (load(tile.rows, BASE_Y + pixel) + like(shift[0], lane)) + load(tile.rows, OFFSET_Y + pixel)
    x = (load(tile.rows, BASE_X + pixel) + like(shift[1], lane)) + load(tile.rows, OFFSET_X + pixel)
    row, column, fraction_y, fraction_x = cell(y, x, like(size[0], lane), like(size[1], lane))
    index = row * like((size[1] + 1) * pixel_stride, row) + column * like(pixel_stride, row)
    store(tile.index, pixel, index)
    w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
    store(tile.rows, FRACTION_Y + pixel, fraction_y)
    store(tile.rows, FRACTION_X + pixel, fraction_x)
    store(tile.rows, W00 + pixel, w00)
    store(tile.rows, W01 + pixel, w01)
    store(tile.rows, W10 + pixel, w10)
    store(tile.rows, W11 + pixel, w11)
    return y, x, row, column, index


@block
def plan_tap_in(window, tile, shift, size, pixel_stride):
    """`plan_tap`, with the spots of cells in a window. Those of cells beyond it are its end; returns whether there are
    any. Cells outside the image have their spot at the end, too."""
    lane, strip = full(load_scalar(tile.rows, BASE_Y)), window.width == size[1] + 1
    top, left = window.row - 1, window.column - 1  # the first y and x of the window
    start = (window.row * window.width + window.column) * pixel_stride
    end = window.height * window.width * pixel_stride
    beyond = none = first_lanes(0, lane)
    for pixel in range(0, tile.pixels, width(load_scalar(tile.rows, BASE_Y))):
        y, x, row, column, spot = _plan_vector(tile, pixel, shift, size, pixel_stride)
        active = (y >= like(-1, lane)) & (y < like(size[0], lane)) & (x >= like(-1, lane)) & (x < like(size[1], lane))
        inside = active & (y >= like(top, lane)) & (y < like(top + window.height - 1, lane))
        if not strip:  # the rows of a strip are those of the image
            inside = inside & (x >= like(left, lane)) & (x < like(left + window.width - 1, lane))
            spot = row * like(window.width * pixel_stride, row) + column * like(pixel_stride, row)
        store(tile.spots, pixel, select(inside, spot - like(start, spot), like(end, spot)))
        beyond = beyond | (select(inside, none, active) & first_lanes(tile.pixels - pixel, lane))
    return some_lane(beyond)


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
def weights_at(rows, spot, vector):
    """Corner weights in every lane: the first is rows[spot], the others follow in the rows after it."""
    return (
        like(load_scalar(rows, spot), vector),
        like(load_scalar(rows, spot + W01 - W00), vector),
        like(load_scalar(rows, spot + W10 - W00), vector),
        like(load_scalar(rows, spot + W11 - W00), vector),
    )


@helper
def weights_of(tile, pixel, vector):
    """The corner weights of a pixel of a tile, in every lane."""
    return weights_at(tile.rows, W00 + pixel, vector)


@helper
def _sample(weights, mask, around):
    """mask * the sample of a cell."""
    return mask * value(weights, around)


@helper
def _sample_pair(weights, mask, around):
    """`_sample` of the two numbers of each pair."""
    c00, c01, c10, c11 = around
    first = _sample(weights, mask, (firsts(c00), firsts(c01), firsts(c10), firsts(c11)))
    return pairs_of(first, _sample(weights, mask, (seconds(c00), seconds(c01), seconds(c10), seconds(c11))))


@helper
def _sample_vectors(sample, vector, lanes, vectors, image, tile, columns):
    """`sample_tap` for `vectors` vectors of channels, each like `vector`, with `lanes` elements."""
    for pixel in range(tile.pixels):
        index = load_scalar(tile.index, pixel)
        weights, mask = weights_of(tile, pixel, vector), like(load_scalar(tile.rows, MASK + pixel), vector)
        for v in range(vectors):
            made = sample(weights, mask, corners(image, index + v * lanes, vector))
            store(columns.pointer, pixel * columns.pitch + v * lanes, made)


@helper
def _sample_channels(sample, image, tile, count, columns):
    """`sample_tap`, by `_sample` or `_sample_pair`."""
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        source, target, rest = image_from(image, c), columns_from(columns, c), count - c
        if rest >= step:
            vectors = min(rest // step, 4)
            _sample_vectors(sample, full(one), step, vectors, source, tile, target)
            c += vectors * step
        elif step > 8 and rest >= 8:
            _sample_vectors(sample, narrow(one, 8), 8, 1, source, tile, target)
            c += 8
        elif step > 4 and rest >= 4:
            _sample_vectors(sample, narrow(one, 4), 4, 1, source, tile, target)
            c += 4
        else:
            _sample_vectors(sample, one, 1, 1, source, tile, target)
            c += 1


@block
def sample_tap(image, tile, count, columns):
    """columns[pixel, c] = mask * sample of channel c of `image` at a pixel of the tile, for c < count, as planned."""
    _sample_channels(_sample, image, tile, count, columns)


@block
def sample_pairs(image, tile, count, columns):
    """`sample_tap` where elements are pairs of bfloat16; samples are computed in float32 and rounded."""
    _sample_channels(_sample_pair, image, tile, count, columns)


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
def _exchange_vectors(vector, lanes, count, sink, tile, spots, columns):
    """`copy_tap_backward` for `count` channels, `lanes` at a time."""
    for pixel in range(tile.pixels):
        index, spot = load_scalar(tile.index, pixel), load_scalar(spots, pixel)
        for c in range(0, count, lanes):
            if sink.wanted:
                gradient = load_like(columns.pointer, pixel * columns.pitch + c, vector)
                store(sink.grad, spot + c, load_like(sink.grad, spot + c, vector) + gradient)
            store(columns.pointer, pixel * columns.pitch + c, load_like(sink.image.pointer, index + c, vector))


@block
def copy_tap_backward(sink, tile, spots, count, columns):
    """The backward of `copy_tap`: adds to the image's gradient at `spots`, if that is wanted.

    `columns` contains the gradient of the columns, which is replaced by the columns themselves.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    rest = whole + quarters
    _exchange_vectors(full(one), step, whole, sink, tile, spots, columns)
    _exchange_vectors(narrow(one, 4), 4, quarters, sink_from(sink, whole), tile, spots, columns_from(columns, whole))
    _exchange_vectors(one, 1, count - rest, sink_from(sink, rest), tile, spots, columns_from(columns, rest))


@helper
def add_at(image, index, weights, gradient):
    """Add the gradient of a sample to its four corners."""
    w00, w01, w10, w11 = weights
    c00, c01, c10, c11 = corners(image, index, gradient)
    store(image.pointer, index, fma(w00, gradient, c00))
    store(image.pointer, index + image.pixel_stride, fma(w01, gradient, c01))
    store(image.pointer, index + image.row_stride, fma(w10, gradient, c10))
    store(image.pointer, index + image.row_stride + image.pixel_stride, fma(w11, gradient, c11))


@helper
def _backward_several(vector, lanes, sink, tile, spots, columns, add):
    """`sample_tap_backward` for `lanes` channels, fewer than a register has, of as many pixels as fill one at a time.
    Returns the number of pixels done: those left would not fill one."""
    one, zero, together, pixel = like(1.0, vector), like(0.0, vector), width(load_scalar(tile.rows, BASE_Y)) // lanes, 0
    image, strides = sink.image, (sink.image.pixel_stride, sink.grad_row)
    while pixel + together <= tile.pixels:
        around = (
            load_at(image.pointer, tile.index, pixel, vector, lanes),
            load_at(at(image.pointer, image.pixel_stride), tile.index, pixel, vector, lanes),
            load_at(at(image.pointer, image.row_stride), tile.index, pixel, vector, lanes),
            load_at(at(image.pointer, image.row_stride + image.pixel_stride), tile.index, pixel, vector, lanes),
        )
        weights = (
            spread(tile.rows, W00 + pixel, vector, lanes),
            spread(tile.rows, W01 + pixel, vector, lanes),
            spread(tile.rows, W10 + pixel, vector, lanes),
            spread(tile.rows, W11 + pixel, vector, lanes),
        )
        fraction_y = spread(tile.rows, FRACTION_Y + pixel, vector, lanes)
        fraction_x = spread(tile.rows, FRACTION_X + pixel, vector, lanes)
        mask, rows = spread(tile.rows, MASK + pixel, vector, lanes), at(columns.pointer, pixel * columns.pitch)
        gradient, sample = load_rows(rows, columns.pitch, vector, lanes), value(weights, around)
        along_y, along_x = slopes((fraction_y, fraction_x, one - fraction_y, one - fraction_x), around)
        if sink.wanted:
            add_at_corners(sink.grad, strides, spots, at(tile.rows, W00), ROW, pixel, gradient * mask, lanes)
        store_rows(rows, columns.pitch, mask * sample, lanes)
        by_y, by_x, by_mask = fma(gradient, along_y, zero), fma(gradient, along_x, zero), fma(gradient, sample, zero)
        sum_y, sum_x, sum_mask = sums_by_pixel(by_y, by_x, by_mask, lanes)
        masks = load_like(tile.rows, MASK + pixel, sum_y)
        if add:
            store(tile.rows, GRAD_Y + pixel, fma(masks, sum_y, load_like(tile.rows, GRAD_Y + pixel, masks)))
            store(tile.rows, GRAD_X + pixel, fma(masks, sum_x, load_like(tile.rows, GRAD_X + pixel, masks)))
            store(tile.rows, GRAD_MASK + pixel, load_like(tile.rows, GRAD_MASK + pixel, masks) + sum_mask)
        else:
            store(tile.rows, GRAD_Y + pixel, masks * sum_y)
            store(tile.rows, GRAD_X + pixel, masks * sum_x)
            store(tile.rows, GRAD_MASK + pixel, sum_mask)
        pixel += together
    return pixel


@helper
def _backward_vectors(vector, lanes, vectors, first, sink, tile, spots, columns, add):
    """`sample_tap_backward` for `vectors` vectors of channels at the pixels from `first` on; `add`: whether the tile's
    gradients already hold a sum."""
    one = like(1.0, vector)
    grad = Image(sink.grad, sink.image.pixel_stride, sink.grad_row)
    for pixel in range(first, tile.pixels):
        index, spot = load_scalar(tile.index, pixel), load_scalar(spots, pixel)
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
                add_at(grad, spot + v * lanes, weights, gradient * mask)
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
def sample_tap_backward(sink, tile, spots, count, columns):
    """The backward of `sample_tap`: fills the tile's gradients, and adds to the image's gradient at `spots` if that is
    wanted.

    `columns` contains the gradient of the columns, which is replaced by the columns themselves.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        source, target, rest, add = sink_from(sink, c), columns_from(columns, c), count - c, c > 0
        if rest >= 4 * step:
            _backward_vectors(full(one), step, 4, 0, source, tile, spots, target, add)
            c += 4 * step
        elif rest >= 2 * step:
            _backward_vectors(full(one), step, 2, 0, source, tile, spots, target, add)
            c += 2 * step
        elif rest >= step:
            _backward_vectors(full(one), step, 1, 0, source, tile, spots, target, add)
            c += step
        elif step > 8 and rest >= 8:
            done = _backward_several(register_for(one, 8), 8, source, tile, spots, target, add)
            _backward_vectors(narrow(one, 8), 8, 1, done, source, tile, spots, target, add)
            c += 8
        elif step > 4 and rest >= 4:
            done = _backward_several(register_for(one, 4), 4, source, tile, spots, target, add)
            _backward_vectors(narrow(one, 4), 4, 1, done, source, tile, spots, target, add)
            c += 4
        else:
            _backward_vectors(one, 1, 1, 0, source, tile, spots, target, add)
            c += 1
