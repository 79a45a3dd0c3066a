"""The gradients of columns on the GPU, and what follows from them: the gradients of images, offsets and masks.

The gradient of a column is a product of grad_y and the weights. A block makes those of a tile of pixels, for one tap and the
channels of an offset group, chunk by chunk; each is added to the image's gradient and, times values and slopes, summed up.
"""

from __future__ import annotations

import numpy as np

from numdcn._cuda.conv.columns import CHUNK, Call, Tile, multiply, offset_groups_of, plan, plan_tile, variants
from numdcn._cuda.jit import F64, SIMULATED, THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen
from numdcn._cuda.mma import from_bits
from numdcn._cuda.sample import add_corners, gather, outside, write_plan
from numdcn._cuda.scatter import PLACE
from numdcn._formulas import bilinear

I32 = np.int32


def backward_tile(kind: object) -> Tile:
    """The tile of pixels and channels."""
    if SIMULATED:
        return Tile(8, 8, 2, 2)
    return Tile(32, 64, 8, 16) if kind == F64 else Tile(64, 64, 16, 16)


def _variants() -> list[tuple[object, ...]]:
    return [
        (*v, vectors, owned)
        for v in variants()
        for vectors, owned in ((False, False), (True, False), (False, True))
        if not (vectors and v[0] == F64)
    ]


@device
def column_sums(read, y, x, grad, sums, S, SAMPLED):
    """Add to sums what a column's gradient, whose corners are `read`, brings: times the value, and the slopes along y and x."""
    if SAMPLED:
        w00, w01, w10, w11 = bilinear.corner_weights(y, x)
        along_y, along_x = bilinear.slopes((y, x, S(1) - y, S(1) - x), read)
        sums[0] += grad * S(bilinear.value((S(w00), S(w01), S(w10), S(w11)), read))
        sums[1] += grad * S(along_y)
        sums[2] += grad * S(along_x)


@device
def write_sums(c, grad_offsets, grad_mask, q, tap, og, scale, by_value, by_y, by_x, C, T):
    """The gradients of offsets and mask of one tap of pixel q."""
    p = c.p
    count = p.out_size[0] * p.out_size[1]
    n = q // count
    channel = (n * p.offset_groups + og) * p.taps + tap
    spot = q - n * count
    if c.grad_offsets:
        put(grad_offsets, 2 * channel * count + spot, narrow(by_y * scale, C))
        put(grad_offsets, (2 * channel + 1) * count + spot, narrow(by_x * scale, C))
    if c.grad_mask:
        put(grad_mask, channel * count + spot, narrow(by_value, T))


@device
def begin_columns(
    c, first, tap, og, offsets, mask, places, image_index, fractions, parts, thread, S, SAMPLED, ROWS, SLOTS, THREADS
):  # type: ignore[no-untyped-def]
    """Plan the pixels of a tile, and clear their sums."""
    total = c.p.batch * c.p.out_size[0] * c.p.out_size[1]
    plan_tile(
        c, first, total, tap, og, offsets, mask, places, image_index, fractions, thread, S, SAMPLED, ROWS, THREADS
    )
    for unit in range(thread, I32(SLOTS * ROWS), I32(THREADS)):
        for which in range(3):
            parts[which, unit // I32(ROWS), unit % I32(ROWS)] = S(0)


@device
def use_columns(
    c, buffer, first, og, chunk, low, high, thread, places, image_index, fractions, parts, corners, values, products, three, images,
    grad_images, kept, S, U, V, ROWS, SLOTS, THREADS, VECTORS, SAMPLED, OWNED,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Use the gradients of a tile's columns, which are in `buffer` pixel by pixel: U channels of a pixel at a time, each by the same
    thread in every chunk."""
    p = c.p
    total, nowhere = p.batch * p.out_size[0] * p.out_size[1], outside(p.in_size[0], p.in_size[1])
    row_pixels, shared = p.in_size[1] + 1, p.in_channels // offset_groups_of(p)
    for unit in range(thread, I32(ROWS * SLOTS), I32(THREADS)):
        spot, slot = unit // I32(SLOTS), unit % I32(SLOTS)
        channel, q, staged = chunk + slot * U, first + spot, spot * I32((SLOTS * U) + 4) + slot * I32(U)
        if q >= total or channel >= high:
            continue
        y, x, scale = fractions[0, spot], fractions[1, spot], fractions[2, spot]
        place, pixel = places[spot], image_index[spot] * c.pixels + places[spot]
        if c.grad_offsets or c.grad_mask:
            gather(images, pixel * c.pitch + channel, c.pitch, row_pixels * c.pitch, corners, U, V)
            three[0], three[1], three[2] = S(0), S(0), S(0)
            for i in range(U):
                if low <= channel + i and channel + i < high:
                    read = (corners[i], corners[U + i], corners[2 * U + i], corners[3 * U + i])
                    column_sums(read, y, x, from_bits(buffer[staged + i]), three, S, SAMPLED)
            for which in range(3):
                parts[which, slot, spot] += three[which]
        for i in range(U):
            inside = low <= channel + i and channel + i < high
            values[i] = scale * from_bits(buffer[staged + i]) if inside else S(0)
        if OWNED:
            for i in range(U):
                if low <= channel + i and channel + i < high:
                    put(kept, (og * total + q) * shared + channel + i - og * shared, values[i])
        elif c.grad_images and place < nowhere:
            add_corners(
                grad_images, pixel * c.grad_pitch + channel, c.grad_pitch, row_pixels * c.grad_pitch, y, x, values, products, S, U,
                VECTORS, SAMPLED,
            )  # fmt: skip


@device
def end_columns(
    c, first, tap, og, grad_offsets, grad_mask, fractions, parts, three, thread, S, C, T, ROWS, SLOTS, THREADS
):  # type: ignore[no-untyped-def]
    """Write the gradients of offsets and mask of a tile's pixels."""
    total = c.p.batch * c.p.out_size[0] * c.p.out_size[1]
    if c.grad_offsets or c.grad_mask:
        for spot in range(thread, I32(min(ROWS, total - first)), I32(THREADS)):
            for which in range(3):
                three[which] = S(0)
                for slot in range(SLOTS):
                    three[which] += parts[which, slot, spot]
            write_sums(
                c, grad_offsets, grad_mask, first + spot, tap, og, fractions[2, spot], three[0], three[1], three[2], C, T
            )  # fmt: skip


@kernels(Call, lambda: [(*v, *backward_tile(v[0])) for v in _variants()], lambda *constants: (THREADS, 1))
def gradients_of_columns(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, DOWN, ACROSS):
    """The gradients of images (OWNED: those of the columns, for `scatter`), offsets and mask."""
    S, A, V = scalar_type(T), compute_type(T), vector_length(T)
    U = max(4, V)
    MINE_R, MINE_C, PITCH, SLOTS, CORNERS = ROWS // DOWN, COLUMNS // ACROSS, ROWS + 4, COLUMNS // U, 4 * U
    RIGHT, STAGED = 2 * CHUNK * PITCH, COLUMNS + 4
    BUFFER = max(RIGHT + 2 * CHUNK * COLUMNS, ROWS * STAGED)

    def run(c):  # type: ignore[no-untyped-def] # length: the loops of one product, around one set of tiles
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        parts = cuda.shared.array((3, SLOTS, ROWS), S)
        places = cuda.shared.array(ROWS, I32)
        image_index = cuda.shared.array(ROWS, I32)
        fractions = cuda.shared.array((3, ROWS), S)
        sums = cuda.local.array((MINE_R, MINE_C), S)
        a, b = cuda.local.array(MINE_R, S), cuda.local.array(MINE_C, S)
        corners, values, products = cuda.local.array(CORNERS, S), cuda.local.array(U, S), cuda.local.array(U, S)
        three = cuda.local.array(3, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, grad_y, grad_images = view(c.weights, T), view(c.y, T), view(c.grad_images, A)
        grad_offsets, grad_mask, kept = view(c.grad_offsets, C), view(c.grad_mask, T), view(c.values, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        row, column = thread // I32(ACROSS), thread % I32(ACROSS)
        count, outs, ins = p.out_size[0] * p.out_size[1], p.out_channels // p.groups, p.in_channels // p.groups
        total, ogs = p.batch * count, offset_groups_of(p)
        shared = p.in_channels // ogs
        for task in range(cuda.blockIdx.x, (total + ROWS - 1) // ROWS * c.taps * ogs, cuda.gridDim.x):
            first, tap, og = task // (c.taps * ogs) * ROWS, c.first_tap + task % c.taps, task % (c.taps * ogs) // c.taps
            cuda.syncthreads()
            begin_columns(
                c, first, tap, og, offsets, mask, places, image_index, fractions, parts, thread, S, SAMPLED, ROWS, SLOTS, THREADS
            )  # fmt: skip
            low, last = og * shared, (og + 1) * shared
            while low < last:
                group = low // ins
                high, begin = min(last, (group + 1) * ins), group * ins
                for chunk in range(low // U * U, high, COLUMNS):
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            sums[i, j] = S(0)
                    cuda.syncthreads()
                    half = I32(0)
                    for out in range(0, outs, CHUNK):
                        for unit in range(thread, CHUNK * ROWS, THREADS):
                            k, q = unit // ROWS, first + unit % ROWS
                            grad = S(0)
                            if q < total and out + k < outs:
                                n = image_index[unit % ROWS]
                                grad = widen(at(grad_y, (n * p.out_channels + group * outs + out + k - n) * count + q))
                            buffer[(half * CHUNK + k) * PITCH + unit % ROWS] = grad
                        for unit in range(thread, CHUNK * COLUMNS, THREADS):
                            k, channel, weight = unit // COLUMNS, chunk + unit % COLUMNS, S(0)
                            if low <= channel and channel < high and out + k < outs:
                                spot = ((group * p.taps + tap) * outs + out + k) * ins + channel - begin
                                weight = widen(at(weights, spot))
                            buffer[RIGHT + (half * CHUNK + k) * COLUMNS + unit % COLUMNS] = weight
                        cuda.syncthreads()
                        if thread < DOWN * ACROSS:
                            multiply(
                                buffer, half * CHUNK * PITCH, RIGHT + half * CHUNK * COLUMNS, PITCH, COLUMNS, row, column, a, b,
                                sums, MINE_R, MINE_C, DOWN, ACROSS, CHUNK,
                            )  # fmt: skip
                        half = I32(1) - half
                    cuda.syncthreads()
                    if thread < DOWN * ACROSS:
                        for i in range(MINE_R):
                            for j in range(MINE_C):
                                spot = i // 4 * 4 * DOWN + 4 * row + i % 4
                                buffer[spot * STAGED + j // 4 * 4 * ACROSS + 4 * column + j % 4] = sums[i, j]
                    cuda.syncthreads()
                    use_columns(
                        c, buffer, first, og, chunk, low, high, thread, places, image_index, fractions, parts, corners, values, products,
                        three, images, grad_images, kept, S, U, V, ROWS, SLOTS, THREADS, VECTORS, SAMPLED, OWNED,
                    )  # fmt: skip
                low = high
            cuda.syncthreads()
            end_columns(
                c, first, tap, og, grad_offsets, grad_mask, fractions, parts, three, thread, S, C, T, ROWS, SLOTS, THREADS
            )  # fmt: skip

    return run


@kernels(Call, lambda: [(*v, owned) for v in variants() for owned in (False, True)])
def gradients_each(T, C, SAMPLED, OWNED):
    """The same where a group has few channels: a thread for each tap and offset group of a pixel, channel after channel."""
    S, A = scalar_type(T), compute_type(T)

    def run(c):
        values, products, three = cuda.local.array(1, S), cuda.local.array(1, S), cuda.local.array(3, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, grad_y, grad_images = view(c.weights, T), view(c.y, T), view(c.grad_images, A)
        grad_offsets, grad_mask, kept = view(c.grad_offsets, C), view(c.grad_mask, T), view(c.values, A)
        p = c.p
        row_pixels, nowhere = p.in_size[1] + 1, outside(p.in_size[0], p.in_size[1])
        count, outs, ins = p.out_size[0] * p.out_size[1], p.out_channels // p.groups, p.in_channels // p.groups
        total, ogs = p.batch * count, offset_groups_of(p)
        shared = p.in_channels // ogs
        below = c.pitch * row_pixels
        for task in range(cuda.grid(1), total * c.taps * ogs, cuda.gridsize(1)):
            q, tap, og = task % total, c.first_tap + task // total % c.taps, task // (total * c.taps)
            place, y, x, scale, n = plan(c, q, tap, og, offsets, mask, S, SAMPLED)
            three[0], three[1], three[2] = S(0), S(0), S(0)
            for channel in range(og * shared, (og + 1) * shared):
                group = channel // ins
                grad = S(0)
                for o in range(outs):
                    weight = widen(at(weights, ((group * p.taps + tap) * outs + o) * ins + channel - group * ins))
                    grad += weight * widen(at(grad_y, (n * p.out_channels + group * outs + o - n) * count + q))
                if c.grad_offsets or c.grad_mask:
                    start = (n * c.pixels + place) * c.pitch + channel
                    read = (
                        widen(at(images, start)), widen(at(images, start + c.pitch)), widen(at(images, start + below)),
                        widen(at(images, start + below + c.pitch)),
                    )  # fmt: skip
                    column_sums(read, y, x, grad, three, S, SAMPLED)
                values[0] = scale * grad
                if OWNED:
                    put(kept, (og * total + q) * shared + channel - og * shared, values[0])
                elif c.grad_images and place < nowhere:
                    start = (n * c.pixels + place) * c.grad_pitch + channel
                    add_corners(
                        grad_images, start, c.grad_pitch, row_pixels * c.grad_pitch, y, x, values, products, S, 1, False, SAMPLED
                    )  # fmt: skip
            if c.grad_offsets or c.grad_mask:
                write_sums(c, grad_offsets, grad_mask, q, tap, og, scale, three[0], three[1], three[2], C, T)

    return run


@kernels(Call, variants)
def plan_tap(T, C, SAMPLED):
    """For `scatter`: where tap `first_tap` of each pixel reads (offset groups, N, pixels), and the weights of the corners."""
    S, A = scalar_type(T), compute_type(T)

    def run(c):
        offsets, places, weights = view(c.offsets, C), view(c.places, PLACE), view(c.corners, A)
        p = c.p
        count, nowhere = p.out_size[0] * p.out_size[1], outside(p.in_size[0], p.in_size[1])
        total = p.batch * count
        for task in range(cuda.grid(1), total * offset_groups_of(p), cuda.gridsize(1)):
            og, q = task // total, task % total
            place, y, x, _, n = plan(c, q, c.first_tap, og, offsets, offsets, S, SAMPLED)
            write_plan(places, weights, task, 4 * og * total + 3 * n * count + q, count, place, nowhere, y, x, S)

    return run
