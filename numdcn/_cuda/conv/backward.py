"""Gradients of columns on the GPU, and from them the gradients of images, offsets and masks.

The gradient of a column is a product of grad_y and the weights. A block computes those of a tile of pixels, for one tap
and the channels of an offset group, chunk by chunk; each is added to the image's gradient and, multiplied by values and
slopes, summed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.conv.call import Call, offset_groups_of, variants, viewer
from numdcn._cuda.conv.columns import Segment, planner, tile_planner
from numdcn._cuda.conv.products import CHUNK, Tile, multiplier
from numdcn._cuda.coordinates import put_coordinate
from numdcn._cuda.jit import F64, SIMULATED, THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen
from numdcn._cuda.mma import from_bits
from numdcn._cuda.sample import corner_adder, gather, outside, write_plan
from numdcn._cuda.scatter import PLACE
from numdcn._formulas import bilinear

I32 = np.int32


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
    """The work at hand of a block: one tap of the pixels starting at `first`, and an offset group."""

    first: Any
    tap: Any
    og: Any


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
def put_sums(c, a, q, tap, og, scale, sums, T):
    """The gradients of offsets and mask of one tap of pixel q."""
    p = c.p
    count = p.out_size[0] * p.out_size[1]
    n = q // count
    channel = (n * p.offset_groups + og) * p.taps + tap
    spot = q - n * count
    if c.grad_offsets:
        put_coordinate(a.grad_offsets, 2 * channel * count + spot, sums[1] * scale, T)
        put_coordinate(a.grad_offsets, (2 * channel + 1) * count + spot, sums[2] * scale, T)
    if c.grad_mask:
        put(a.grad_mask, channel * count + spot, narrow(sums[0], T))


def column_user(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, U, THREADS=THREADS):
    """Make the functions with which a block uses the gradients of the columns of ROWS pixels, COLUMNS channels at a
    time, U of these per thread: `new_stage()`, `new_sums()`, `new_room()`, `begin_columns(c, a, stage, sums, reading,
    rank)`, `use_columns(c, a, stage, sums, buffer, reading, chunk, segment, rank, room)` and `end_columns(c, a, stage,
    sums, reading, rank, room)`."""
    S, V, SLOTS, CORNERS, STAGED = scalar_type(T), vector_length(T), COLUMNS // U, 4 * U, COLUMNS + 4
    new_stage, plan_tile = tile_planner(T, SAMPLED, ROWS, THREADS)
    add_corners = corner_adder(T, U, VECTORS, SAMPLED)

    @device
    def new_sums():
        return cuda.shared.array((3, SLOTS, ROWS), S)

    @device
    def new_room():
        corners, values, products = cuda.local.array(CORNERS, S), cuda.local.array(U, S), cuda.local.array(U, S)
        return GradRoom(corners, values, products, cuda.local.array(3, S))

    @device
    def begin_columns(c, a, stage, sums, reading, rank):
        """Plan the pixels of a tile, and clear their sums."""
        total = c.p.batch * c.p.out_size[0] * c.p.out_size[1]
        plan_tile(c, a, stage, reading.first, total, reading.tap, reading.og, rank)
        for unit in range(rank, I32(SLOTS * ROWS), I32(THREADS)):
            for which in range(3):
                sums[which, unit // I32(ROWS), unit % I32(ROWS)] = S(0)

    @device
    def use_columns(c, a, stage, sums, buffer, reading, chunk, segment, rank, room):
        """Use the gradients of a tile's columns, stored in `buffer` pixel by pixel: U channels of a pixel at a time,
        always by the same thread in every chunk."""
        p, low, high = c.p, segment.low, segment.high
        corners, values, three = room.corners, room.values, room.three
        total, nowhere = p.batch * p.out_size[0] * p.out_size[1], outside(p.in_size[0], p.in_size[1])
        row_pixels, shared = p.in_size[1] + 1, p.in_channels // offset_groups_of(p)
        for unit in range(rank, I32(ROWS * SLOTS), I32(THREADS)):
            spot, slot = unit // I32(SLOTS), unit % I32(SLOTS)
            channel, q, staged = chunk + slot * U, reading.first + spot, spot * I32(STAGED) + slot * I32(U)
            if q >= total or channel >= high:
                continue
            y, x, scale = stage.fractions[0, spot], stage.fractions[1, spot], stage.fractions[2, spot]
            place, pixel = stage.places[spot], stage.image_index[spot] * c.pixels + stage.places[spot]
            if c.grad_offsets or c.grad_mask:
                gather(a.images, pixel * c.pitch + channel, c.pitch, row_pixels * c.pitch, corners, U, V)
                three[0], three[1], three[2] = S(0), S(0), S(0)
                for i in range(U):
                    if low <= channel + i and channel + i < high:
                        read = (corners[i], corners[U + i], corners[2 * U + i], corners[3 * U + i])
                        add_slopes(read, y, x, from_bits(buffer[staged + i]), three, S, SAMPLED)
                for which in range(3):
                    sums[which, slot, spot] += three[which]
            for i in range(U):
                inside = low <= channel + i and channel + i < high
                values[i] = scale * from_bits(buffer[staged + i]) if inside else S(0)
            if OWNED:
                for i in range(U):
                    if low <= channel + i and channel + i < high:
                        put(a.values, (reading.og * total + q) * shared + channel + i - reading.og * shared, values[i])
            elif c.grad_images and place < nowhere:
                start, row_step = pixel * c.grad_pitch + channel, row_pixels * c.grad_pitch
                add_corners(a.grad_images, start, c.grad_pitch, row_step, y, x, values, room.products)

    @device
    def end_columns(c, a, stage, sums, reading, rank, room):
        """Write the gradients of offsets and mask of a tile's pixels."""
        total, three = c.p.batch * c.p.out_size[0] * c.p.out_size[1], room.three
        if c.grad_offsets or c.grad_mask:
            for spot in range(rank, I32(min(ROWS, total - reading.first)), I32(THREADS)):
                for which in range(3):
                    three[which] = S(0)
                    for slot in range(SLOTS):
                        three[which] += sums[which, slot, spot]
                q, scale = reading.first + spot, stage.fractions[2, spot]
                put_sums(c, a, q, reading.tap, reading.og, scale, three, T)

    return new_stage, new_sums, new_room, begin_columns, use_columns, end_columns


@kernels(Call, lambda: [(*v, *backward_tile(v[0])) for v in _variants()], lambda *constants: (THREADS, 1))
def gradients_of_columns(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, DOWN, ACROSS):
    """Gradients of images (OWNED: those of the columns, for `scatter`), offsets and mask."""
    S, U, tile = scalar_type(T), max(4, vector_length(T)), Tile(ROWS, COLUMNS, DOWN, ACROSS)
    MINE_R, MINE_C, PITCH, RIGHT, STAGED = ROWS // DOWN, COLUMNS // ACROSS, tile.pitch, tile.right, COLUMNS + 4
    BUFFER = max(tile.room, ROWS * STAGED)
    new_stage, new_sums, new_room, begin_columns, use_columns, end_columns = column_user(
        T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, U
    )
    thread_of, new_product, clear, multiply = multiplier(T, tile)
    arrays_of = viewer(T, C)

    def run(c):
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        sums, stage, room, product = new_sums(), new_stage(), new_room(), new_product()
        a, p, thread = arrays_of(c), c.p, thread_of()
        count, outs, ins = p.out_size[0] * p.out_size[1], p.out_channels // p.groups, p.in_channels // p.groups
        total, ogs = p.batch * count, offset_groups_of(p)
        shared = p.in_channels // ogs
        for task in range(cuda.blockIdx.x, (total + ROWS - 1) // ROWS * c.taps * ogs, cuda.gridDim.x):
            first, tap, og = task // (c.taps * ogs) * ROWS, c.first_tap + task % c.taps, task % (c.taps * ogs) // c.taps
            reading = Reading(first, tap, og)
            cuda.syncthreads()
            begin_columns(c, a, stage, sums, reading, thread.rank)
            low, last = og * shared, (og + 1) * shared
            while low < last:
                group = low // ins
                high, begin = min(last, (group + 1) * ins), group * ins
                segment = Segment(group, low, high)
                for chunk in range(low // U * U, high, COLUMNS):
                    clear(product.sums)
                    cuda.syncthreads()
                    half = I32(0)
                    for out in range(0, outs, CHUNK):
                        for unit in range(thread.rank, CHUNK * ROWS, THREADS):
                            k, q = unit // ROWS, first + unit % ROWS
                            grad = S(0)
                            if q < total and out + k < outs:
                                n = stage.image_index[unit % ROWS]
                                grad = widen(at(a.y, (n * p.out_channels + group * outs + out + k - n) * count + q))
                            buffer[(half * CHUNK + k) * PITCH + unit % ROWS] = grad
                        for unit in range(thread.rank, CHUNK * COLUMNS, THREADS):
                            k, channel, weight = unit // COLUMNS, chunk + unit % COLUMNS, S(0)
                            if low <= channel and channel < high and out + k < outs:
                                spot = ((group * p.taps + tap) * outs + out + k) * ins + channel - begin
                                weight = widen(at(a.weights, spot))
                            buffer[RIGHT + (half * CHUNK + k) * COLUMNS + unit % COLUMNS] = weight
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
                                buffer[spot * STAGED + column] = product.sums[i, j]
                    cuda.syncthreads()
                    use_columns(c, a, stage, sums, buffer, reading, chunk, segment, thread.rank, room)
                low = high
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
