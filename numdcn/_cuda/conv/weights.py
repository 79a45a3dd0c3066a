"""The gradients of weights and biases on the GPU: sums over all pixels, in parts whose order is fixed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.conv.columns import (
    CHUNK,
    Call,
    Tile,
    multiply,
    offset_groups_of,
    plan,
    plan_tile,
    sample_spot,
    variants,
)
from numdcn._cuda.jit import BF16, F16, F32, F64, SIMULATED, THREADS, compute_type, cuda, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen
from numdcn._formulas import bilinear

I32 = np.int32
LINE = 2 if SIMULATED else 256  # numbers of a bias's gradient that a thread adds one by one


def weights_tiles(kind: object) -> tuple[Tile, ...]:
    """The tiles of outputs and channels, those for few outputs first."""
    if SIMULATED:
        return (Tile(8, 8, 2, 2),)
    narrow_one = Tile(64, 64, 16, 16)
    return (narrow_one,) if kind == F64 else (narrow_one, Tile(128, 64, 16, 16))


@kernels(
    Call,
    lambda: [(*v, *tile) for v in variants() for tile in weights_tiles(v[0])],
    lambda *constants: (THREADS, 1),
)
def gradients_of_weights(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS):
    """Parts of the weights' gradient: a block has one tap, a tile of the outputs of a group, every `lanes`-th tile of its
    channels, and a share of the pixels."""
    S, A, V = scalar_type(T), compute_type(T), vector_length(T)
    MINE_R, MINE_C, PITCH, SLOTS, CORNERS = ROWS // DOWN, COLUMNS // ACROSS, ROWS + 4, COLUMNS // V, 4 * V
    RIGHT = 2 * CHUNK * PITCH
    BUFFER = RIGHT + 2 * CHUNK * COLUMNS

    def run(c):  # type: ignore[no-untyped-def] # length: the loops of one product, around one set of tiles
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        places = cuda.shared.array(CHUNK, I32)
        image_index = cuda.shared.array(CHUNK, I32)
        fractions = cuda.shared.array((3, CHUNK), S)
        sums = cuda.local.array((MINE_R, MINE_C), S)
        a, b = cuda.local.array(MINE_R, S), cuda.local.array(MINE_C, S)
        corners, values = cuda.local.array(CORNERS, S), cuda.local.array(V, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        grad_y, partial = view(c.y, T), view(c.sums, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        row, column = thread // I32(ACROSS), thread % I32(ACROSS)
        count, outs, ins = p.out_size[0] * p.out_size[1], p.out_channels // p.groups, p.in_channels // p.groups
        total, shared = p.batch * count, p.in_channels // offset_groups_of(p)
        tall, lanes = (outs + ROWS - 1) // ROWS, (ins + COLUMNS - 1) // COLUMNS
        for task in range(cuda.blockIdx.x, c.split_k * p.taps * p.groups * tall * lanes, cuda.gridDim.x):
            lane, first_out, rest = task % lanes, task // lanes % tall * ROWS, task // (lanes * tall)
            group, tap, split = rest % p.groups, rest // p.groups % p.taps, rest // (p.groups * p.taps)
            first, end = split * total // c.split_k, (split + 1) * total // c.split_k
            begin, tile = group * ins, 0
            for og in range(begin // shared, (begin + ins - 1) // shared + 1):
                low, high = max(begin, og * shared), min(begin + ins, (og + 1) * shared)
                for chunk in range(low // V * V, high, COLUMNS):
                    tile += 1
                    if (tile - 1) % lanes != lane:
                        continue
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            sums[i, j] = S(0)
                    half = I32(0)
                    for start_q in range(first, end, CHUNK):
                        plan_tile(
                            c, start_q, end, tap, og, offsets, mask, places, image_index, fractions, thread, S, SAMPLED, CHUNK, THREADS
                        )  # fmt: skip
                        cuda.syncthreads()
                        for unit in range(thread, CHUNK * SLOTS, THREADS):
                            spot, slot = unit // SLOTS, unit % SLOTS * V
                            sample_spot(
                                c, images, spot, chunk + slot, low, high, start_q + spot < end, places, image_index, fractions, corners,
                                values, S, V, SAMPLED,
                            )  # fmt: skip
                            for i in range(V):
                                buffer[RIGHT + (half * CHUNK + spot) * COLUMNS + slot + i] = values[i]
                        for unit in range(thread, CHUNK * ROWS, THREADS):
                            spot, o = unit % CHUNK, unit // CHUNK
                            grad = S(0)
                            if start_q + spot < end and first_out + o < outs:
                                n = image_index[spot]
                                out = n * p.out_channels + group * outs + first_out + o
                                grad = widen(at(grad_y, (out - n) * count + start_q + spot))
                            buffer[(half * CHUNK + spot) * PITCH + o] = grad
                        cuda.syncthreads()
                        multiply(
                            buffer, half * CHUNK * PITCH, RIGHT + half * CHUNK * COLUMNS, PITCH, COLUMNS, row, column, a, b, sums,
                            MINE_R, MINE_C, DOWN, ACROSS, CHUNK,
                        )  # fmt: skip
                        half = I32(1) - half
                    for i in range(MINE_R):
                        o = first_out + i // 4 * 4 * DOWN + 4 * row + i % 4
                        for j in range(MINE_C):
                            channel = chunk + j // 4 * 4 * ACROSS + 4 * column + j % 4
                            if o < outs and low <= channel and channel < high:
                                spot = (
                                    (split * p.out_channels + group * outs + o) * ins + channel - begin
                                ) * p.taps + tap
                                put(partial, spot, sums[i, j])
                    cuda.syncthreads()

    return run


@kernels(Call, variants)
def weights_each(T, C, SAMPLED):
    """The same where a group has few channels: a thread for each weight and share of the pixels, the outputs fastest. y is
    (N, pixels, channels) here."""
    S, A = scalar_type(T), compute_type(T)

    def run(c):
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        grad_y, partial = view(c.y, T), view(c.sums, A)
        p = c.p
        below, count = c.pitch * (p.in_size[1] + 1), p.out_size[0] * p.out_size[1]
        outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
        total, shared, kernel = p.batch * count, p.in_channels // offset_groups_of(p), ins * p.taps
        for task in range(cuda.grid(1), c.split_k * kernel * p.out_channels, cuda.gridsize(1)):
            out, rest = task % p.out_channels, task // p.out_channels
            tap, k, split = rest % p.taps, rest // p.taps % ins, rest // kernel
            channel = out // outs * ins + k
            result = S(0)
            for q in range(split * total // c.split_k, (split + 1) * total // c.split_k):
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
                result += value * widen(at(grad_y, q * p.out_channels + out))
            put(partial, ((split * p.out_channels + out) * ins + k) * p.taps + tap, result)

    return run


class Sums(NamedTuple):
    """Parameters of `sum_parts` and `sum_bias`."""

    source: int
    target: int
    count: int  # of results
    split_k: int  # parts of each; for the bias: images
    pixels: int  # of an image


@kernels(Sums, lambda: [(kind,) for kind in (F32, F64, F16, BF16)])
def sum_parts(T):
    """target[i] = sum over s of source[s, i], s rising."""
    S, A = scalar_type(T), compute_type(T)

    def run(c):
        source, target = view(c.source, A), view(c.target, T)
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            total = S(0)
            for split in range(c.split_k):
                total += at(source, split * c.count + task)
            put(target, task, narrow(total, T))

    return run


@kernels(Sums, lambda: [(kind,) for kind in (F32, F64, F16, BF16)])
def sum_bias(T):
    """target[o] = sum of source[n, o, q] over images and pixels: a block for each. Each thread has sums of LINE numbers, and of
    these; those of the threads are added pair by pair."""
    S = scalar_type(T)

    def run(c):
        parts = cuda.shared.array(THREADS, S)
        source, target = view(c.source, T), view(c.target, T)
        thread = I32(cuda.threadIdx.x)
        for task in range(cuda.blockIdx.x, c.count, cuda.gridDim.x):
            total = S(0)
            for n in range(c.split_k):
                for first in range(thread, c.pixels, THREADS * LINE):
                    line = S(0)
                    for q in range(first, min(first + THREADS * LINE, c.pixels), THREADS):
                        line += widen(at(source, (n * c.count + task) * c.pixels + q))
                    total += line
            parts[thread] = total
            cuda.syncthreads()
            width = THREADS // 2
            while width > 0:
                if thread < width:
                    parts[thread] += parts[thread + width]
                cuda.syncthreads()
                width //= 2
            if thread == 0:
                put(target, task, narrow(parts[0], T))
            cuda.syncthreads()

    return run
