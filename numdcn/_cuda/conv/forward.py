"""The forward of convolutions on the GPU: columns are sampled into shared memory and multiplied there, tile by tile."""

from __future__ import annotations

import numpy as np

from numdcn._cuda.conv.columns import (
    CHUNK,
    Call,
    multiply,
    offset_groups_of,
    plan,
    plan_tile,
    put_result,
    sample_spot,
    tiles,
    variants,
)
from numdcn._cuda.jit import THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen
from numdcn._formulas import bilinear

I32 = np.int32


@kernels(
    Call,
    lambda: [(*v, *tile) for v in variants() for tile in tiles(v[0])],
    lambda *constants: (THREADS, 1),
)
def forward_tiles(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS):
    """y: a block has a tile of pixels and outputs of a group, and a share of the taps. Chunks of columns are made in one half of
    the buffers while slower threads still multiply those in the other."""
    S, A, V = scalar_type(T), compute_type(T), vector_length(T)
    MINE_R, MINE_C, PITCH, SLOTS, CORNERS = ROWS // DOWN, COLUMNS // ACROSS, ROWS + 4, CHUNK // V, 4 * V
    RIGHT = 2 * CHUNK * PITCH  # where the weights begin, behind the columns
    BUFFER = RIGHT + 2 * CHUNK * COLUMNS

    def run(c):
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        places = cuda.shared.array(ROWS, I32)
        image_index = cuda.shared.array(ROWS, I32)
        fractions = cuda.shared.array((3, ROWS), S)
        sums = cuda.local.array((MINE_R, MINE_C), S)
        a, b = cuda.local.array(MINE_R, S), cuda.local.array(MINE_C, S)
        corners, values = cuda.local.array(CORNERS, S), cuda.local.array(V, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, bias, y, partial = view(c.weights, T), view(c.bias, T), view(c.y, T), view(c.sums, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        row, column = thread // I32(ACROSS), thread % I32(ACROSS)
        total, outs, ins = (
            p.batch * p.out_size[0] * p.out_size[1],
            I32(p.out_channels // p.groups),
            I32(p.in_channels // p.groups),
        )
        shared = I32(p.in_channels // offset_groups_of(p))
        wide = (outs + COLUMNS - 1) // COLUMNS
        tasks = (total + ROWS - 1) // ROWS * wide * p.groups
        for task in range(cuda.blockIdx.x, tasks * c.split_k, cuda.gridDim.x):
            split, part = I32(task // tasks), task % tasks
            group, first_out = I32(part % (wide * p.groups) // wide), I32(part % wide * COLUMNS)
            first = part // (wide * p.groups) * ROWS
            count = I32(min(ROWS, total - first))
            for i in range(MINE_R):
                for j in range(MINE_C):
                    sums[i, j] = S(0)
            half = I32(0)
            begin = I32(group * ins)
            end = I32(begin + ins)
            for tap in range(I32(split * p.taps // c.split_k), I32((split + 1) * p.taps // c.split_k)):
                for og in range(I32(begin // shared), I32((end - 1) // shared + 1)):
                    plan_tile(
                        c, first, total, tap, og, offsets, mask, places, image_index, fractions, thread, S, SAMPLED, ROWS, THREADS
                    )  # fmt: skip
                    cuda.syncthreads()
                    low, high = I32(max(begin, og * shared)), I32(min(end, (og + 1) * shared))
                    for chunk in range(I32(low // V * V), high, I32(CHUNK)):
                        for unit in range(thread, I32(ROWS * SLOTS), I32(THREADS)):
                            spot, slot = I32(unit // I32(SLOTS)), I32(unit % I32(SLOTS) * V)
                            sample_spot(
                                c, images, spot, I32(chunk + slot), low, high, spot < count, places, image_index, fractions,
                                corners, values, S, V, SAMPLED,
                            )  # fmt: skip
                            for i in range(V):
                                buffer[(half * CHUNK + slot + i) * PITCH + spot] = values[i]
                        for unit in range(thread, I32(CHUNK * COLUMNS), I32(THREADS)):
                            k, o = unit // I32(COLUMNS), unit % I32(COLUMNS)
                            channel, weight = I32(chunk + k), S(0)
                            if low <= channel and channel < high and first_out + o < outs:
                                spot = ((group * p.taps + tap) * ins + channel - begin) * outs + first_out + o
                                weight = widen(at(weights, spot))
                            buffer[RIGHT + (half * CHUNK + k) * COLUMNS + o] = weight
                        cuda.syncthreads()
                        multiply(
                            buffer, half * CHUNK * PITCH, RIGHT + half * CHUNK * COLUMNS, PITCH, COLUMNS, row, column, a, b, sums,
                            MINE_R, MINE_C, DOWN, ACROSS, CHUNK,
                        )  # fmt: skip
                        half = I32(1) - half
            cuda.syncthreads()
            write_rows(
                c, y, partial, bias, buffer, sums, 0, thread, row, column, split, first, group, first_out, MINE_C, DOWN, ACROSS, T
            )  # fmt: skip
            if MINE_R > 4:
                write_rows(
                    c, y, partial, bias, buffer, sums, 4, thread, row, column, split, first, group, first_out, MINE_C, DOWN, ACROSS,
                    T,
                )  # fmt: skip

    return run


@device
def write_rows(
    c, y, partial, bias, buffer, sums, i, thread, row, column, split, first, group, first_out, MINE_C, DOWN, ACROSS, T
):  # type: ignore[no-untyped-def]
    """Write four rows of each thread's sums, from the i-th on, by way of shared memory: pixels follow one another there.
    (Constant positions in `sums` keep it in registers.)"""
    for r in range(4):
        for j in range(MINE_C):
            buffer[(j // 4 * 4 * ACROSS + 4 * column + j % 4) * 4 * DOWN + 4 * row + r] = sums[i + r, j]
    cuda.syncthreads()
    p = c.p
    total, outs = p.batch * p.out_size[0] * p.out_size[1], p.out_channels // p.groups
    for unit in range(thread, I32(4 * DOWN * MINE_C * ACROSS), I32(THREADS)):
        q, o = first + i * DOWN + unit % I32(4 * DOWN), first_out + unit // I32(4 * DOWN)
        if q < total and o < outs:
            put_result(c, y, partial, bias, split, q, group * outs + o, buffer[unit], T)
    cuda.syncthreads()


@kernels(Call, variants)
def forward_each(T, C, SAMPLED):
    """y where a group has few channels, as in depthwise convolutions: a thread for each output, the channels fastest."""
    S = scalar_type(T)

    def run(c):
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, bias, y = view(c.weights, T), view(c.bias, T), view(c.y, T)
        p = c.p
        below, count = c.pitch * (p.in_size[1] + 1), p.out_size[0] * p.out_size[1]
        outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
        shared = p.in_channels // offset_groups_of(p)
        for task in range(cuda.grid(1), p.batch * count * p.out_channels, cuda.gridsize(1)):
            q = task // p.out_channels
            out = I32(task - q * p.out_channels)
            group = out // I32(outs)
            result = S(0)
            for tap in range(p.taps):
                for k in range(ins):
                    channel = group * ins + k
                    place, fy, fx, scale, n = plan(c, q, tap, channel // shared, offsets, mask, S, SAMPLED)
                    start = (n * c.pixels + place) * c.pitch + channel
                    value = widen(at(images, start))
                    if SAMPLED:
                        read = (
                            value, widen(at(images, start + c.pitch)), widen(at(images, start + below)),
                            widen(at(images, start + below + c.pitch)),
                        )  # fmt: skip
                        w00, w01, w10, w11 = bilinear.corner_weights(fy, fx)
                        value = scale * S(bilinear.value((S(w00), S(w01), S(w10), S(w11)), read))
                    weight = widen(at(weights, ((group * p.taps + tap) * ins + k) * outs + out - group * outs))
                    result += value * weight
            if c.bias:
                result += widen(at(bias, out))
            n = q // count
            put(y, (n * p.out_channels + out) * count + q - n * count, narrow(result, T))

    return run
