"""Layout of images and matrices in scratch memory, and copies of images between there and the caller's (n, c, h, w).

A zero-padded image of height H and width W is channels-last, in rows of W + 1 pixels: a row of zeros, then H rows that
start with a zero pixel (which also ends the previous row), then a row of zeros and two more zeros. Pixel (y, x) has
number (y + 1) * (W + 1) + x + 1. So every cell that touches the image has its four corners at p, p + 1, p + W + 1 and
p + W + 2, and the cell at (H, -1) is all zeros.

A blocked image is one zero-padded image per block of channels, one after another. With one block it is the padded
image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._cpu.lanes import transpose
from numdcn._cpu.pairs import load_pair, transpose_pairs
from numdcn._cpu.simd import at, load, load_scalar, store, width
from numdcn._formulas.jit import helper

COPY_ELEMENTS = 32 * 1024  # copied per task, of all channels together


class Image(NamedTuple):
    """A zero-padded image, starting at one of its pixels and channels."""

    pointer: Any
    pixel_stride: int  # elements from a pixel to its right neighbour: the number of channels
    row_stride: int  # elements from a pixel to the one below


class GradientSink(NamedTuple):
    """An image, and the gradient accumulated for it."""

    image: Image
    grad: Any  # pointer to the gradient, whose pixels are as wide as the image's
    grad_row: int  # elements from a pixel of the gradient to the one below
    wanted: bool  # whether to accumulate it


class Matrix(NamedTuple):
    """Row r starts at element r * pitch; the elements of a row are adjacent."""

    pointer: Any
    pitch: int


@helper
def image_from(image, c):
    """An image starting at channel c."""
    return Image(at(image.pointer, c), image.pixel_stride, image.row_stride)


@helper
def sink_from(sink, c):
    """An image and its gradient, starting at channel c."""
    return GradientSink(image_from(sink.image, c), at(sink.grad, c), sink.grad_row, sink.wanted)


@helper
def columns_from(matrix, c):
    """A matrix starting at column c."""
    return Matrix(at(matrix.pointer, c), matrix.pitch)


@helper
def padded_pixels(size):
    """The number of pixels in a zero-padded image of (height, width), including padding."""
    return (size[0] + 2) * (size[1] + 1) + 2


@helper
def fill(target, start, count, scalar):
    """target[start : start + count] = scalar."""
    for i in range(start, start + count):
        store(target, i, scalar)


@helper
def clear_padding(image, first, last, size, channels, zero):
    """Zero the padding next to an image's pixels first to last, in reading order."""
    height, pitch = size[0], size[1] + 1
    if first == 0:
        fill(image, 0, pitch * channels, zero)
    if last == height * size[1]:
        fill(image, (height + 1) * pitch * channels, (pitch + 2) * channels, zero)
    for row in range((first + size[1] - 1) // size[1], (last - 1) // size[1] + 1):
        fill(image, (row + 1) * pitch * channels, channels, zero)


@helper
def _padded_index(q, size):
    """The number, in a zero-padded image, of pixel q in reading order."""
    return q + q // size[1] + size[1] + 2


@helper
def _element(source, stride, c, q):
    """Element q of plane c, of planes `stride` elements apart."""
    return load_scalar(source, c * stride + q)


@helper
def _transpose(source, stride, c, q, target, pitch):
    """Transpose a square of planes from c and elements from q on."""
    transpose(at(source, c * stride + q), stride, target, pitch)


@helper
def _pair(source, stride, c, q):
    """The pair of elements q of planes 2c and 2c + 1."""
    return load_pair(source, 2 * c * stride + q, stride)


@helper
def _transpose_pairs(source, stride, c, q, target, pitch):
    """Transpose a square of pairs of planes from c and elements from q on."""
    transpose_pairs(at(source, 2 * c * stride + q), 2 * stride, stride, target, pitch, width(load_scalar(target, 0)))


@helper
def to_channels_last(source, strides, first, last, size, channels, image, block):
    """Copy pixels first to last (reading order) of one (c, h, w) image into a zero-padded one; block: L*L elements."""
    _to_channels_last(_element, _transpose, source, strides, first, last, size, channels, image, block)


@helper
def pairs_to_channels_last(source, strides, first, last, size, channels, image, block):
    """`to_channels_last` where each channel of the image is a pair of neighbouring channels in bfloat16."""
    _to_channels_last(_pair, _transpose_pairs, source, strides, first, last, size, channels, image, block)


@helper
def _to_channels_last(element, square, source, strides, first, last, size, channels, image, block):
    """`to_channels_last`, by `element` or squares of elements."""
    step = width(load_scalar(block, 0))
    flat = strides[2] == 1 and strides[1] == size[1]
    if not flat or channels < step or last - first < step:
        for q in range(first, last):
            y = q // size[1]
            source_q, target = y * strides[1] + (q - y * size[1]) * strides[2], _padded_index(q, size) * channels
            for c in range(channels):
                store(image, target + c, element(source, strides[0], c, source_q))
        return
    for q_tile in range(first, last, 4 * step):
        for c in range(0, channels, step):
            c_ = min(c, channels - step)  # the last block overlaps the previous one
            for q in range(q_tile, min(q_tile + 4 * step, last), step):
                q_ = min(q, last - step)
                first_q = _padded_index(q_, size)
                if _padded_index(q_ + step - 1, size) == first_q + step - 1:  # all in one row
                    spot = at(image, first_q * channels + c_)
                    square(source, strides[0], c_, q_, spot, channels)
                    continue
                square(source, strides[0], c_, q_, block, step)
                for i in range(step):
                    store(image, _padded_index(q_ + i, size) * channels + c_, load(block, i * step))


@helper
def from_channels_last(image, first, last, size, channels, target, strides, block):
    """Copy pixels first to last of a zero-padded image into one (c, h, w) image of any strides; block: L*L elements."""
    step = width(load_scalar(block, 0))
    flat = strides[2] == 1 and strides[1] == size[1]
    if not flat or channels < step or last - first < step:
        for q in range(first, last):
            y = q // size[1]
            target_q, source = y * strides[1] + (q - y * size[1]) * strides[2], _padded_index(q, size) * channels
            for c in range(channels):
                store(target, target_q + c * strides[0], load_scalar(image, source + c))
        return
    for q_tile in range(first, last, 4 * step):
        for c in range(0, channels, step):
            c_ = min(c, channels - step)
            for q in range(q_tile, min(q_tile + 4 * step, last), step):
                q_ = min(q, last - step)
                first_q, spot = _padded_index(q_, size), at(target, c_ * strides[0] + q_)
                if _padded_index(q_ + step - 1, size) == first_q + step - 1:  # all in one row
                    transpose(at(image, first_q * channels + c_), channels, spot, strides[0])
                    continue
                for i in range(step):
                    store(block, i * step, load(image, _padded_index(q_ + i, size) * channels + c_))
                transpose(block, step, spot, strides[0])
