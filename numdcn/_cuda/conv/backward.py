"""Gradients of columns on the GPU, and from them the gradients of images, offsets and masks.

The gradient of a column is a product of grad_y and the weights. A block computes those of a tile of pixels, for one tap
and the channels of an offset group, chunk by chunk; each is added to the image's gradient and, multiplied by values and
slopes, summed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cuda.conv.call import Call, offset_groups_of, variants, viewer
from numdcn._cuda.conv.columns import (
    Segment,
    fractions_of,
    part_of,
    plan_of,
    planner,
    plans_that_fit,
    tile_planner,
)
from numdcn._cuda.conv.products import CHUNK, Tile, multiplier, unit_of
from numdcn._cuda.coordinates import put_coordinate
from numdcn._cuda.jit import F64, SIMULATED, THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen
from numdcn._cuda.mma import from_bits
from numdcn._cuda.sample import corner_adder, gather, outside, write_plan
from numdcn._cuda.scatter import PLACE
from numdcn._formulas import bilinear

I32 = np.int32
U = 4  # channels that a thread uses at a time


def backward_tile(dtype: object) -> Tile:
    """The tile of pixels and channels."""
    if SIMULATED:
        return Tile(8, 8, 2, 2)
    return Tile(32, 64, 8, 16) if dtype == F64 else Tile(64, 64, 16, 16)


def _variants() -> list[tuple[object, ...]]:
    return [
        (*v, vectors, owned)
        for v in variants()
        for vectors, owned in ((False, False), (True, False), (False, True))
        if not (vectors and v[0] == F64)
    ]


class Reading(NamedTuple):
    """The work at hand of a block: one tap of `size` pixels, and c.ogs offset groups from `og` on."""

    size: Any
    tap: Any
    og: Any
    outs: Any  # outputs and channels per group
    ins: Any


class GradRoom(NamedTuple):
    """A thread's local memory for U channels."""

    corners: Any  # (4*U,): values of the four corners of a cell
    values: Any  # (U,): gradients of the columns, times the mask
    products: Any  # (U,): these, times the weight of a corner
    three: Any  # (3,): see `add_slopes`


@device
def add_slopes(read, y, x, grad, sums, S, SAMPLED):
    """Add the contributions of a column's gradient to sums: times the value, and times the slopes along y and x, of the
    sample with corners `read`."""
    if SAMPLED:
        w00, w01, w10, w11 = bilinear.corner_weights(y, x)
        along_y, along_x = bilinear.slopes((y, x, S(1) - y, S(1) - x), read)
        sums[0] += grad * S(bilinear.value((S(w00), S(w01), S(w10), S(w11)), read))
        sums[1] += grad * S(along_y)
        sums[2] += grad * S(along_x)


@device
def put_sums(c, a, n, pixel, channel, scale, sums, T):
    """The gradients of offsets and mask of a tap of an offset group, channel `channel` of the mask, at a pixel of image
    n."""
    p = c.p
    count, channel = p.out_size[0] * p.out_size[1], n * p.offset_groups * p.taps + channel
    if c.grad_offsets:
        put_coordinate(a.grad_offsets, 2 * channel * count + pixel, sums[1] * scale, T)
        put_coordinate(a.grad_offsets, (2 * channel + 1) * count + pixel, sums[2] * scale, T)
    if c.grad_mask:
        put(a.grad_mask, channel * count + pixel, narrow(sums[0], T))


def bundle_of(p: Convolution, columns: int, most: int) -> int:
    """How many offset groups a block takes at once, in one chunk of at most `columns` channels: `most` or fewer, if U
    channels never belong to two of them and none of them to two groups; otherwise 1."""
    ins, shared = p.in_channels // p.groups, p.in_channels // max(p.offset_groups, 1)
    if p.offset_groups < 2 or shared % U or ins % shared or shared > columns:
        return 1
    ogs = ins // shared
    return next(n for n in range(min(ogs, most, columns // shared), 0, -1) if ogs % n == 0)


def bundles_that_fit(T: Any, rows: int, columns: int, taken: int) -> int:
    """How many offset groups a block can take at once, next to `taken` bytes of shared memory."""
    sums = 3 * columns // U * rows * np.dtype(scalar_type(T)).itemsize
    return plans_that_fit(T, rows, taken + sums, columns // U)


@device
def reading_of(c, task, total, ROWS):
    """The first pixel of a task, and the rest of it."""
    p, bundles = c.p, offset_groups_of(c.p) // c.ogs
    rest, first = task % (c.taps * bundles), task // (c.taps * bundles) * ROWS
    size, tap, og = I32(min(ROWS, total - first)), c.first_tap + rest % c.taps, I32(rest // c.taps * c.ogs)
    return first, Reading(size, tap, og, I32(p.out_channels // p.groups), I32(p.in_channels // p.groups))


@device
def bundle_segment(c, low, last, og, ROWS):
    """The segment from channel `low` on, before channel `last`, of the offset groups from `og` on."""
    p = c.p
    shared, ins = I32(p.in_channels // offset_groups_of(p)), I32(p.in_channels // p.groups)
    group = I32(low // ins)
    high, ragged = I32(min(last, (group + 1) * ins)), shared % I32(U) != 0 or ins % I32(U) != 0
    return Segment(group, low, high, I32(og * shared), part_of(shared, c.ogs), I32(ROWS), ragged, False)


@device
def put_values(c, a, og, n, pixel, channel, segment, values):
    """Keep the gradients of U columns of an offset group."""
    p = c.p
    count, shared = p.out_size[0] * p.out_size[1], p.in_channels // offset_groups_of(p)
    start = ((og * p.batch + n) * count + pixel) * shared - og * shared
    for i in range(U):
        if segment.low <= channel + i and channel + i < segment.high:
            put(a.values, start + channel + i, values[i])


def sums_writer(T: Any, C: Any, ROWS: int, SLOTS: int, THREADS: int) -> Any:
    """Make `end_columns(c, a, stage, sums, reading, rank, room)`."""
    S = scalar_type(T)

    @device
    def end_columns(c, a, stage, sums, reading, rank, room):
        """Write the gradients of offsets and mask of a tile's pixels."""
        p, three = c.p, room.three
        slots = I32(SLOTS)
        if c.ogs > 1:
            slots = I32(p.in_channels // p.offset_groups // U)
        if c.grad_offsets or c.grad_mask:
            for unit in range(rank, I32(c.ogs * ROWS), I32(THREADS)):
                which, spot = I32(unit // I32(ROWS)), I32(unit % I32(ROWS))
                if spot < reading.size:
                    three[0], three[1], three[2] = S(0), S(0), S(0)
                    for slot in range(I32(which * slots), I32((which + 1) * slots)):
                        for i in range(3):
                            three[i] += sums[i, slot, spot]
                    n, pixel, scale = at(stage.image_index, spot), at(stage.pixels, spot), at(stage.scales, unit)
                    put_sums(c, a, n, pixel, (reading.og + which) * p.taps + reading.tap, scale, three, T)

    return end_columns


def column_user(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, OGS, THREADS=THREADS):
    """Make the functions with which a block uses the gradients of the columns of ROWS pixels, COLUMNS channels at a
    time, U of these per thread: `new_stage()`, `new_sums()`, `new_room()`, `begin_columns(c, a, stage, sums, first, reading,
    rank)`, `use_columns(c, a, stage, sums, buffer, reading, chunk, segment, rank, room)` and `end_columns(c, a, stage,
    sums, reading, rank, room)`. OGS: the most offset groups of a block."""
    S, V, SLOTS, CORNERS, STAGED = scalar_type(T), vector_length(T), COLUMNS // U, 4 * U, COLUMNS + 4
    new_stage, locate_tile, plan_tile = tile_planner(T, SAMPLED, ROWS, OGS * ROWS if SAMPLED else ROWS, THREADS)
    add_corners, end_columns = corner_adder(T, U, VECTORS, SAMPLED), sums_writer(T, C, ROWS, SLOTS, THREADS)

    @device
    def new_sums():
        return cuda.shared.array((3, SLOTS, ROWS), S)

    @device
    def new_room():
        corners, values, products = cuda.local.array(CORNERS, S), cuda.local.array(U, S), cuda.local.array(U, S)
        return GradRoom(corners, values, products, cuda.local.array(3, S))

    @device
    def begin_columns(c, a, stage, sums, first, reading, rank):
        """Plan the pixels of a tile, from pixel `first` on, and clear their sums."""
        locate_tile(c, stage, first, reading.size, rank)
        for unit in range(rank, I32(SLOTS * ROWS), I32(THREADS)):
            for which in range(3):
                sums[which, unit // I32(ROWS), unit % I32(ROWS)] = S(0)
        cuda.syncthreads()
        shared = I32(c.p.in_channels // offset_groups_of(c.p))
        low, last = I32(reading.og * shared), I32((reading.og + c.ogs) * shared)
        whole = Segment(I32(0), low, last, low, part_of(shared, c.ogs), I32(ROWS), False, False)
        plan_tile(c, a, stage, reading.size, reading.tap, whole, rank)

    @device
    def use_columns(c, a, stage, sums, buffer, reading, chunk, segment, rank, room):
        """Use the gradients of a tile's columns, stored in `buffer` pixel by pixel: U channels of a pixel at a time,
        always by the same thread in every chunk."""
        p, low, high = c.p, segment.low, segment.high
        corners, values, three = room.corners, room.values, room.three
        nowhere, row_pixels = outside(p.in_size[0], p.in_size[1]), p.in_size[1] + 1
        for unit in range(rank, I32(ROWS * SLOTS), I32(THREADS)):
            spot, slot = I32(unit // I32(SLOTS)), I32(unit % I32(SLOTS))
            channel, staged = I32(chunk + slot * I32(U)), I32(spot * I32(STAGED) + slot * I32(U))
            if spot >= reading.size or channel >= high:
                continue
            plan = I32(plan_of(segment, channel) + spot)
            y, x, scale = fractions_of(stage, plan)
            n, place = at(stage.image_index, spot), at(stage.places, plan)
            pixel = n * I32(c.pixels) + place
            for i in range(U):
                values[i] = from_bits(at(buffer, staged + i))
            if c.grad_offsets or c.grad_mask:
                gather(a.images, pixel * c.pitch + channel, c.pitch, row_pixels * c.pitch, corners, U, V)
                three[0], three[1], three[2] = S(0), S(0), S(0)
                for i in range(U):
                    if not segment.ragged or (low <= I32(channel + i) and I32(channel + i) < high):
                        read = (corners[i], corners[U + i], corners[2 * U + i], corners[3 * U + i])
                        add_slopes(read, y, x, values[i], three, S, SAMPLED)
                for which in range(3):
                    sums[which, slot, spot] += three[which]
            for i in range(U):
                inside = not segment.ragged or (low <= I32(channel + i) and I32(channel + i) < high)
                values[i] = scale * values[i] if inside else S(0)
            if OWNED:
                own = segment.origin // (p.in_channels // offset_groups_of(p)) + plan_of(segment, channel) // I32(ROWS)
                put_values(c, a, own, n, at(stage.pixels, spot), channel, segment, values)
            elif c.grad_images and place < nowhere:
                start, row_step = pixel * c.grad_pitch + channel, row_pixels * c.grad_pitch
                add_corners(a.grad_images, start, c.grad_pitch, row_step, y, x, values, room.products)

    return new_stage, new_sums, new_room, begin_columns, use_columns, end_columns


def columns_buffer(tile: Tile) -> int:
    """Numbers of shared memory for the operands, or for the product."""
    return max(tile.room, tile.rows * (tile.columns + 4))


def columns_ogs(T: Any, tile: Tile) -> int:
    """How many offset groups a block of `gradients_of_columns` takes at once, at most."""
    return bundles_that_fit(T, tile.rows, tile.columns, columns_buffer(tile) * np.dtype(scalar_type(T)).itemsize)


@kernels(Call, lambda: [(*v, *backward_tile(v[0])) for v in _variants()], lambda *constants: (THREADS, 1))
def gradients_of_columns(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, DOWN, ACROSS):
    """Gradients of images (OWNED: those of the columns, for `scatter`), offsets and mask."""
    S, tile = scalar_type(T), Tile(ROWS, COLUMNS, DOWN, ACROSS)
    MINE_R, MINE_C, PITCH, RIGHT, STAGED = ROWS // DOWN, COLUMNS // ACROSS, tile.pitch, tile.right, COLUMNS + 4
    BUFFER, OGS = columns_buffer(tile), columns_ogs(T, tile)
    new_stage, new_sums, new_room, begin_columns, use_columns, end_columns = column_user(
        T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, OGS
    )
    thread_of, new_product, clear, multiply = multiplier(T, tile, 4)
    arrays_of = viewer(T, C)

    @device
    def copy_operands(c, a, stage, buffer, half, reading, chunk, segment, out, rank):
        """Copy the operands of a chunk of outputs, from `out` on: grad_y of the tile's pixels, and the weights of a chunk of
        channels; zeros outside the segment."""
        p, group = c.p, segment.group
        outs, ins, count = reading.outs, reading.ins, p.out_size[0] * p.out_size[1]
        for turn in range(CHUNK * ROWS // THREADS):
            (k, spot), grad = unit_of(rank, turn, ROWS, THREADS), S(0)
            if spot < reading.size and I32(out + k) < outs:
                line = at(stage.image_index, spot) * p.out_channels + group * outs + out + k
                grad = widen(at(a.y, line * count + at(stage.pixels, spot)))
            put(buffer, (half * CHUNK + k) * PITCH + spot, grad)
        start = ((group * p.taps + reading.tap) * outs + out) * ins + chunk - group * ins
        for turn in range(CHUNK * COLUMNS // THREADS):
            (k, i), weight = unit_of(rank, turn, COLUMNS, THREADS), S(0)
            channel = I32(chunk + i)
            if segment.low <= channel and channel < segment.high and I32(out + k) < outs:
                weight = widen(at(a.weights, start + k * ins + i))
            put(buffer, RIGHT + (half * CHUNK + k) * COLUMNS + i, weight)

    def run(c):
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        sums, stage, room, product = new_sums(), new_stage(), new_room(), new_product()
        a, p, thread = arrays_of(c), c.p, thread_of()
        total = p.batch * p.out_size[0] * p.out_size[1]
        shared, bundles = I32(p.in_channels // offset_groups_of(p)), offset_groups_of(p) // c.ogs
        for task in range(cuda.blockIdx.x, (total + ROWS - 1) // ROWS * c.taps * bundles, cuda.gridDim.x):
            first, reading = reading_of(c, task, total, ROWS)
            cuda.syncthreads()
            begin_columns(c, a, stage, sums, first, reading, thread.rank)
            low, last = I32(reading.og * shared), I32((reading.og + c.ogs) * shared)
            while low < last:
                segment = bundle_segment(c, low, last, reading.og, ROWS)
                for chunk in range(I32(low // U * U), segment.high, I32(COLUMNS)):
                    clear(product.sums)
                    cuda.syncthreads()
                    half = I32(0)
                    for out in range(I32(0), reading.outs, I32(CHUNK)):
                        copy_operands(c, a, stage, buffer, half, reading, chunk, segment, out, thread.rank)
                        cuda.syncthreads()
                        if thread.rank < DOWN * ACROSS:
                            multiply(buffer, half, thread, product)
                        half = I32(1) - half
                    cuda.syncthreads()
                    if thread.rank < DOWN * ACROSS:
                        for i in range(MINE_R):
                            for j in range(MINE_C):
                                spot = i // 4 * 4 * DOWN + 4 * thread.row + i % 4
                                column = j // 4 * 4 * ACROSS + 4 * thread.column + j % 4
                                put(buffer, spot * STAGED + column, product.sums[i, j])
                    cuda.syncthreads()
                    use_columns(c, a, stage, sums, buffer, reading, chunk, segment, thread.rank, room)
                low = segment.high
            cuda.syncthreads()
            end_columns(c, a, stage, sums, reading, thread.rank, room)

    return run


@kernels(Call, variants)
def plan_tap(T, C, SAMPLED):
    """For `scatter`: where tap `first_tap` of each pixel reads (offset groups, N, pixels), and the corner weights."""
    S, A, arrays_of, plan = scalar_type(T), compute_type(T), viewer(T, C), planner(T, SAMPLED)

    def run(c):
        a, places, weights, p = arrays_of(c), view(c.places, PLACE), view(c.corners, A), c.p
        count, nowhere = p.out_size[0] * p.out_size[1], outside(p.in_size[0], p.in_size[1])
        total = p.batch * count
        for task in range(cuda.grid(1), total * offset_groups_of(p), cuda.gridsize(1)):
            og, q = task // total, task % total
            place, y, x, _, n = plan(c, a, q, c.first_tap, og)
            write_plan(places, weights, task, 4 * og * total + 3 * n * count + q, count, place, nowhere, y, x, S)

    return run
