"""Samples of a tile of output pixels along the channels: the plan of a tap (cell, weights), its columns, and what their
gradient adds to the image, to offsets and to masks.
"""

from __future__ import annotations

from numdcn._cpu.jit import block
from numdcn._cpu.lanes import sum3
from numdcn._cpu.simd import at, full, load, load_like, load_scalar, part, store, width
from numdcn._cpu.tile import (
    BASE_X,
    BASE_Y,
    FRACTION_X,
    FRACTION_Y,
    GRAD_SCALE,
    GRAD_X,
    GRAD_Y,
    OFFSET_X,
    OFFSET_Y,
    SCALE,
    W00,
    W01,
    W10,
    W11,
)
from numdcn._formulas.bilinear import cell, corner_weights, slopes, value
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


@block
def plan_tap(tile, pixels, tap, size, channels):
    """Fill in index, weights and fractions for the tap displaced by `tap` from the base positions.

    Runs over the tile's end up to a full register: what lies there is never used.
    """
    one = load_scalar(tile.rows, BASE_Y)
    lane = full(one)
    tap_y, tap_x = like(tap[0], lane), like(tap[1], lane)
    height, width_ = like(size[0], lane), like(size[1], lane)
    for p in range(0, pixels, width(one)):
        y = (load(tile.rows, BASE_Y + p) + tap_y) + load(tile.rows, OFFSET_Y + p)
        x = (load(tile.rows, BASE_X + p) + tap_x) + load(tile.rows, OFFSET_X + p)
        row, column, fraction_y, fraction_x = cell(y, x, height, width_)
        store(tile.index, p, (row * like(size[1] + 1, row) + column) * like(channels, row))
        w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
        store(tile.rows, FRACTION_Y + p, fraction_y)
        store(tile.rows, FRACTION_X + p, fraction_x)
        store(tile.rows, W00 + p, w00)
        store(tile.rows, W01 + p, w01)
        store(tile.rows, W10 + p, w10)
        store(tile.rows, W11 + p, w11)


@helper
def corners(image, index, channels, below, kind):
    """The four corners of a cell, along the channels; `below`: elements from a pixel to the one under it."""
    return (
        load_like(image, index, kind),
        load_like(image, index + channels, kind),
        load_like(image, index + below, kind),
        load_like(image, index + below + channels, kind),
    )


@helper
def weights_of(tile, p, kind):
    """The corner weights of pixel p of a tile, in every lane."""
    return (
        like(load_scalar(tile.rows, W00 + p), kind),
        like(load_scalar(tile.rows, W01 + p), kind),
        like(load_scalar(tile.rows, W10 + p), kind),
        like(load_scalar(tile.rows, W11 + p), kind),
    )


@helper
def _sample_vectors(vectors, kind, lanes, image, tile, pixels, channels, below, columns, pitch):
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        weights, scale = weights_of(tile, p, kind), like(load_scalar(tile.rows, SCALE + p), kind)
        for v in range(vectors):
            sample = value(weights, corners(image, index + v * lanes, channels, below, kind))
            store(columns, p * pitch + v * lanes, scale * sample)


@block
def sample_tap(image, tile, pixels, count, channels, below, columns, pitch):
    """columns[p * pitch + c] = scale * sample of channel c of `image` at pixel p, for c < count, as planned."""
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        source, target, rest = at(image, c), at(columns, c), count - c
        if rest >= step:
            vectors = min(rest // step, 4)
            _sample_vectors(vectors, full(one), step, source, tile, pixels, channels, below, target, pitch)
            c += vectors * step
        elif step > 8 and rest >= 8:
            _sample_vectors(1, part(one, 8), 8, source, tile, pixels, channels, below, target, pitch)
            c += 8
        elif step > 4 and rest >= 4:
            _sample_vectors(1, part(one, 4), 4, source, tile, pixels, channels, below, target, pitch)
            c += 4
        else:
            _sample_vectors(1, one, 1, source, tile, pixels, channels, below, target, pitch)
            c += 1


@helper
def _copy_vectors(kind, lanes, count, image, tile, pixels, columns, pitch):
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        for c in range(0, count, lanes):
            store(columns, p * pitch + c, load_like(image, index + c, kind))


@block
def copy_tap(image, tile, pixels, count, columns, pitch):
    """columns[p * pitch + c] = channel c of `image` at pixel p, for c < count: `sample_tap` with nothing to interpolate."""
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    _copy_vectors(full(one), step, whole, image, tile, pixels, columns, pitch)
    _copy_vectors(part(one, 4), 4, quarters, at(image, whole), tile, pixels, at(columns, whole), pitch)
    rest = whole + quarters
    _copy_vectors(one, 1, count - rest, at(image, rest), tile, pixels, at(columns, rest), pitch)


@helper
def _exchange_vectors(kind, lanes, count, image, grad_image, wanted, tile, pixels, columns, pitch):
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        for c in range(0, count, lanes):
            if wanted:
                gradient = load_like(columns, p * pitch + c, kind)
                store(grad_image, index + c, load_like(grad_image, index + c, kind) + gradient)
            store(columns, p * pitch + c, load_like(image, index + c, kind))


@block
def copy_tap_backward(image, grad_image, wanted, tile, pixels, count, columns, pitch):
    """The backward of `copy_tap`. `columns` holds the gradient of the columns and receives the columns themselves.

    Adds to `grad_image` if `wanted`.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    rest = whole + quarters
    _exchange_vectors(full(one), step, whole, image, grad_image, wanted, tile, pixels, columns, pitch)
    x, g, target = at(image, whole), at(grad_image, whole), at(columns, whole)
    _exchange_vectors(part(one, 4), 4, quarters, x, g, wanted, tile, pixels, target, pitch)
    x, g, target = at(image, rest), at(grad_image, rest), at(columns, rest)
    _exchange_vectors(one, 1, count - rest, x, g, wanted, tile, pixels, target, pitch)


@helper
def _add_at(image, index, channels, below, weights, gradient):
    w00, w01, w10, w11 = weights
    c00, c01, c10, c11 = corners(image, index, channels, below, gradient)
    store(image, index, fma(w00, gradient, c00))
    store(image, index + channels, fma(w01, gradient, c01))
    store(image, index + below, fma(w10, gradient, c10))
    store(image, index + below + channels, fma(w11, gradient, c11))


@helper
def _backward_vectors(
    vectors, kind, lanes, image, grad_image, wanted, tile, pixels, channels, below, columns, pitch, add
):  # type: ignore[no-untyped-def]
    one = like(1.0, kind)
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        weights, scale = weights_of(tile, p, kind), like(load_scalar(tile.rows, SCALE + p), kind)
        fraction_y, fraction_x = (
            like(load_scalar(tile.rows, FRACTION_Y + p), kind),
            like(load_scalar(tile.rows, FRACTION_X + p), kind),
        )
        fractions = (fraction_y, fraction_x, one - fraction_y, one - fraction_x)
        by_y, by_x, by_scale = one - one, one - one, one - one
        for v in range(vectors):
            gradient = load_like(columns, p * pitch + v * lanes, kind)
            around = corners(image, index + v * lanes, channels, below, kind)
            sample, (along_y, along_x) = value(weights, around), slopes(fractions, around)
            by_y, by_x = fma(gradient, along_y, by_y), fma(gradient, along_x, by_x)
            by_scale = fma(gradient, sample, by_scale)
            if wanted:
                _add_at(grad_image, index + v * lanes, channels, below, weights, gradient * scale)
            store(columns, p * pitch + v * lanes, scale * sample)
        sum_y, sum_x, sum_scale = sum3(by_y, by_x, by_scale)
        scale_p = load_scalar(tile.rows, SCALE + p)
        if add:
            store(tile.rows, GRAD_Y + p, fma(scale_p, sum_y, load_scalar(tile.rows, GRAD_Y + p)))
            store(tile.rows, GRAD_X + p, fma(scale_p, sum_x, load_scalar(tile.rows, GRAD_X + p)))
            store(tile.rows, GRAD_SCALE + p, load_scalar(tile.rows, GRAD_SCALE + p) + sum_scale)
        else:
            store(tile.rows, GRAD_Y + p, scale_p * sum_y)
            store(tile.rows, GRAD_X + p, scale_p * sum_x)
            store(tile.rows, GRAD_SCALE + p, sum_scale)


@block
def sample_tap_backward(image, grad_image, wanted, tile, pixels, count, channels, below, columns, pitch):
    """The backward of `sample_tap`. `columns` holds the gradient of the columns and receives the columns themselves.

    Adds to `grad_image` if `wanted`; fills the tile's gradients.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        x, g, target, rest, add = at(image, c), at(grad_image, c), at(columns, c), count - c, c > 0
        if rest >= step:
            vectors = min(rest // step, 4)
            _backward_vectors(vectors, full(one), step, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += vectors * step
        elif step > 8 and rest >= 8:
            _backward_vectors(1, part(one, 8), 8, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += 8
        elif step > 4 and rest >= 4:
            _backward_vectors(1, part(one, 4), 4, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += 4
        else:
            _backward_vectors(1, one, 1, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += 1
