"""Boxes on the CPU: the positions of their bins, in the form the kernels take. One compiled pass: as NumPy's functions, each
of which the previous call's images have driven out of the cache, it would take a fifth of a millisecond."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from numdcn._call.roi import FAR, Pooling, WholePixels
from numdcn._cpu.arrays import Outline, address_of
from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import unpack
from numdcn._cpu.program import Recording
from numdcn._cpu.roi.bins import AXIS, BIN, REACH, SAMPLES, START, STEP, WHOLE_PIXELS
from numdcn._cpu.simd import at, load_scalar, next_task, pointer, store
from numdcn._cpu.threads import launch
from numdcn._formulas.bilinear import PSROI
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import floor, like

SCALE, HALF, LEAST, SHARE, MOST, NUMBERS = range(6)  # numbers of a call, in the dtype of the boxes; the last: how many
BOXES = 64  # per task


class Boxes(NamedTuple):
    """Boxes in the form the kernels take; see `bins.Grid`."""

    rule: int
    image_index: int  # address of (R,) int64
    geometry: int  # address of (R, 2, 5), or (R, bins of y and of x, 2) int64
    arrays: tuple[np.ndarray, ...] = ()  # these two, if they are not in scratch memory


class BoxesCall(NamedTuple):
    """Parameters of `place_boxes`."""

    rois: int
    rule: int  # as in `Grid`
    samples: int  # of a bin along an axis; 0 or less: by the box's size
    last_counts: int  # of whole pixels: whether the second corner is part of the box
    size: tuple[int, int]  # of an image
    bins: tuple[int, int]  # of a box
    boxes: int  # addresses: of (R, 5),
    numbers: int  # of `NUMBERS` numbers: scale; `half`, `least` and `reach` of the rule; the largest finite number
    image_index: int  # of the results, see `Boxes`
    geometry: int


def image_indices(p: Pooling) -> np.ndarray:
    """The image of each box."""
    return p.boxes[:, 0].astype(np.int64)


def boxes_of(p: Pooling) -> Boxes:
    """The boxes of a pooling, according to its rule."""
    count, dtype = p.rois.box_count, p.boxes.dtype
    index, numbers = np.empty(count, np.int64), _numbers(p, dtype)
    if isinstance(p.rule, WholePixels):
        geometry = np.empty((count, sum(p.rois.bins), 2), np.int64)
    else:
        geometry = np.empty((count, 2, AXIS), dtype)
    call = _call(p, *map(address_of, (p.boxes, numbers, index, geometry)))
    launch(place_boxes, dtype.type(1), call, 1)
    return Boxes(call.rule, call.image_index, call.geometry, (index, geometry))


def record_boxes(recording: Recording, p: Pooling, boxes: Outline) -> Boxes:
    """Record `boxes_of` for a rule of samples, into scratch memory."""
    index, geometry = recording.scratch(p.rois.box_count * 8, p.rois.box_count * 2 * AXIS * boxes.itemsize)
    numbers = recording.numbers(array("q", _numbers(p, boxes.dtype).tobytes())).address
    call = _call(p, boxes.address, numbers, index, geometry)
    recording.launch(place_boxes, boxes.dtype.type(1), call, 1)
    return Boxes(call.rule, index, geometry)


def _numbers(p: Pooling, dtype: np.dtype) -> np.ndarray:
    """The numbers of a call, in whole int64s."""
    rule, numbers = p.rule, np.zeros(8, dtype)
    half, least, reach = (0.0, 0.0, 0.0) if isinstance(rule, WholePixels) else (rule.half, rule.least, rule.reach)
    numbers[:NUMBERS] = p.rois.scale, half, least, reach, np.finfo(dtype).max
    return numbers


def _call(p: Pooling, boxes: int, numbers: int, index: int, geometry: int) -> BoxesCall:
    """The call for arrays at these addresses."""
    rois, rule = p.rois, p.rule
    if isinstance(rule, WholePixels):
        kind, samples, last_counts = WHOLE_PIXELS, 0, int(rule.last_counts)
    else:
        kind, samples, last_counts = rule.border, rule.samples, 0
    return BoxesCall(
        rois.box_count, kind, samples, last_counts, rois.size, rois.bins, boxes, numbers, index, geometry
    )  # fmt: skip


@helper
def _near(value):
    """A position clipped to `FAR`."""
    far = like(FAR, value)
    return min(max(value, like(0.0, value) - far), far)


@helper
def _round(value):
    """The nearest whole number, halves away from zero."""
    zero, one = like(0.0, value), like(1.0, value)
    size = abs(value)
    whole = floor(size)
    whole = whole + (one if size - whole >= like(0.5, value) else zero)
    return whole if value >= zero else zero - whole


@helper
def _place_samples(one, a, box, numbers, axis, geometry):
    """The geometry of a box of samples along an axis (0: y)."""
    zero, bins = one - one, like(a.bins[axis], one)
    scale, half = load_scalar(numbers, SCALE), load_scalar(numbers, HALF)
    first, last = load_scalar(box, 2 - axis), load_scalar(box, 4 - axis)
    if a.rule == PSROI:  # whole pixels in the boxes' own coordinates, both ends counted
        start = _near(_round(first) * scale) - half
        size = _near((_round(last) + one) * scale) - half - start
    else:
        start = _near(first * scale) - half
        size = (_near(last * scale) - half) - start
    size = max(size, load_scalar(numbers, LEAST))
    bin_ = size / bins
    samples = like(a.samples, one)
    if a.samples <= 0:
        samples = max(zero - floor(zero - bin_), zero)
    most, reach = load_scalar(numbers, MOST), load_scalar(numbers, SHARE) * size
    store(geometry, START, start)
    store(geometry, BIN, bin_)
    store(geometry, STEP, bin_ / max(samples, one))
    store(geometry, SAMPLES, samples)
    store(geometry, REACH, min(max(reach, zero - most), most))  # finite, so that an offset of 0 shifts nothing


@helper
def _place_pixels(one, a, box, numbers, axis, geometry):
    """The bins of a box of whole pixels along an axis (0: y), clipped to the image; they may overlap."""
    scale = load_scalar(numbers, SCALE)
    start = int(_round(_near(load_scalar(box, 2 - axis) * scale)))
    size = max(int(_round(_near(load_scalar(box, 4 - axis) * scale))) - start + a.last_counts, 1)
    bins = a.bins[axis]
    for i in range(bins):
        first, end = i * size // bins + start, ((i + 1) * size + bins - 1) // bins + start
        store(geometry, 2 * i, min(max(first, 0), a.size[axis]))
        store(geometry, 2 * i + 1, min(max(end, 0), a.size[axis]))


@kernel
def place_boxes(one, params, counter, slot):
    """The geometry of all boxes. A task is some of them."""
    a = unpack(params, BoxesCall)
    numbers, image_index = pointer(a.numbers, one), pointer(a.image_index, np.int64(0))
    while True:
        first = next_task(counter) * BOXES
        if first >= a.rois:
            return
        for r in range(first, min(first + BOXES, a.rois)):
            box = at(pointer(a.boxes, one), 5 * r)
            store(image_index, r, int(load_scalar(box, 0)))
            for axis in range(2):
                if a.rule == WHOLE_PIXELS:
                    ends = at(pointer(a.geometry, np.int64(0)), 2 * (r * (a.bins[0] + a.bins[1]) + axis * a.bins[0]))
                    _place_pixels(one, a, box, numbers, axis, ends)
                else:
                    _place_samples(one, a, box, numbers, axis, at(pointer(a.geometry, one), (2 * r + axis) * AXIS))
