"""Gradients of weights and biases on the GPU: sums over all pixels, in splits added in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.conv.call import Call, variants, viewer
from numdcn._cuda.conv.columns import spot_sampler, tile_planner, tile_segment
from numdcn._cuda.conv.products import CHUNK, Tile, multiplier, unit_of
from numdcn._cuda.jit import BF16, F16, F32, F64, SIMULATED, THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen

I32 = np.int32
LINE = 2 if SIMULATED else 256  # numbers of a bias's gradient that a thread adds in one run


def weights_tiles(dtype: object) -> tuple[Tile, ...]:
    """The tiles of outputs and channels, fewest outputs first."""
    if SIMULATED:
        return (Tile(8, 8, 2, 2),)
    narrow_one = Tile(64, 64, 16, 16)
    return (narrow_one,) if dtype == F64 else (narrow_one, Tile(128, 64, 16, 16))


def weights_plans(dtype: Any, columns: int) -> int:
    """How many plans `gradients_of_weights` makes at a time: of a chunk of pixels for as many offset groups as a tile has
    vectors, or of more pixels for fewer."""
    return CHUNK * columns // vector_length(dtype) if SIMULATED else 256


@kernels(
    Call,
    lambda: [(*v, *tile) for v in variants() for tile in weights_tiles(v[0])],
    lambda *constants: (THREADS, 1),
)
def gradients_of_weights(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS):
    """Splits of the weights' gradient: a block takes one tap, a tile of the outputs of a group, every `lanes`-th tile
    of its channels, and a split of the pixels."""
    S, V, tile, PLANS = scalar_type(T), vector_length(T), Tile(ROWS, COLUMNS, DOWN, ACROSS), weights_plans(T, COLUMNS)
    MINE_R, MINE_C, SLOTS = ROWS // DOWN, COLUMNS // ACROSS, COLUMNS // V
    PITCH, RIGHT, BUFFER, WHOLE = tile.pitch, tile.right, tile.room, CHUNK * SLOTS % THREADS == 0
    new_stage, locate_tile, plan_tile = tile_planner(T, SAMPLED, PLANS, PLANS)
    new_room, sample_spot = spot_sampler(T, SAMPLED)
    thread_of, new_product, clear, multiply = multiplier(T, tile)
    arrays_of = viewer(T, C)

    @device
    def copy_gradients(c, a, stage, buffer, half, place, size, first_out, outs, rank):
        """Copy grad_y of `outs` outputs, at most ROWS, from the `first_out`-th of all on, for a chunk of planned pixels
        from `place` on."""
        p = c.p
        count = p.out_size[0] * p.out_size[1]
        for turn in range(CHUNK * ROWS // THREADS):
            o, spot = unit_of(rank, turn, CHUNK, THREADS)
            grad, planned = S(0), I32(place + spot)
            if planned < size and o < outs:
                out = at(stage.image_index, planned) * p.out_channels + first_out + o
                grad = widen(at(a.y, out * count + at(stage.pixels, planned)))
            put(buffer, (half * CHUNK + spot) * PITCH + o, grad)

    def run(c):
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        a, stage, room, thread, product = arrays_of(c), new_stage(), new_room(), thread_of(), new_product()
        p = c.p
        outs, ins = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups)
        total = p.batch * p.out_size[0] * p.out_size[1]
        tall, lanes = (outs + ROWS - 1) // ROWS, (ins + COLUMNS - 1) // COLUMNS
        for task in range(cuda.blockIdx.x, c.split_k * p.taps * p.groups * tall * lanes, cuda.gridDim.x):
            lane, first_out, rest = task % lanes, I32(task // lanes % tall * ROWS), task // (lanes * tall)
            group, tap, split = I32(rest % p.groups), rest // p.groups % p.taps, rest // (p.groups * p.taps)
            first, end = split * total // c.split_k, (split + 1) * total // c.split_k
            begin, number = I32(group * ins), 0
            low = begin
            while low < begin + ins:
                segment = tile_segment(c, group, low, I32(begin + ins), COLUMNS, PLANS, CHUNK, V, V)
                low, number = segment.high, number + 1
                if (number - 1) % lanes != lane:
                    continue
                chunk = I32(segment.low // V * V)
                clear(product.sums)
                half = I32(0)
                for planned in range(first, end, segment.pitch):
                    size = I32(min(segment.pitch, end - planned))
                    locate_tile(c, stage, planned, size, thread.rank)
                    cuda.syncthreads()
                    plan_tile(c, a, stage, size, tap, segment, thread.rank)
                    cuda.syncthreads()
                    for place in range(I32(0), size, I32(CHUNK)):
                        for turn in range(-(-CHUNK * SLOTS // THREADS)):
                            spot, slot = unit_of(thread.rank, turn, SLOTS, THREADS)
                            if WHOLE or spot < I32(CHUNK):
                                source, channel = I32(place + spot), I32(chunk + slot * V)
                                sample_spot(c, a, stage, source, source < size, channel, segment, room)
                                for i in range(V):
                                    right = RIGHT + (half * CHUNK + spot) * COLUMNS + slot * V + i
                                    put(buffer, right, room.values[i])
                        out, rest = I32(group * outs + first_out), I32(outs - first_out)
                        copy_gradients(c, a, stage, buffer, half, I32(place), size, out, rest, thread.rank)
                        cuda.syncthreads()
                        multiply(buffer, half, thread, product)
                        half = I32(1) - half
                for i in range(MINE_R):
                    o = first_out + i // 4 * 4 * DOWN + 4 * thread.row + i % 4
                    for j in range(MINE_C):
                        channel = chunk + j // 4 * 4 * ACROSS + 4 * thread.column + j % 4
                        if o < outs and segment.low <= channel and channel < segment.high:
                            line = split * p.out_channels + group * outs + o
                            put(a.partials, (line * ins + channel - begin) * p.taps + tap, product.sums[i, j])
                cuda.syncthreads()

    return run


class Sums(NamedTuple):
    """Parameters of `sum_partials` and `sum_bias`."""

    source: int
    target: int
    count: int  # number of results
    split_k: int  # splits of each; for the bias: images
    pixels: int  # per image


@kernels(Sums, lambda: [(dtype,) for dtype in (F32, F64, F16, BF16)])
def sum_partials(T):
    """target[i] = sum over s of source[s, i], in ascending order of s."""
    S, A = scalar_type(T), compute_type(T)

    def run(c):
        source, target = view(c.source, A), view(c.target, T)
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            total = S(0)
            for split in range(c.split_k):
                total += at(source, split * c.count + task)
            put(target, task, narrow(total, T))

    return run


@kernels(Sums, lambda: [(dtype,) for dtype in (F32, F64, F16, BF16)])
def sum_bias(T):
    """target[o] = sum of source[n, o, q] over images and pixels, one block each. Each thread sums in runs of LINE
    numbers, and then the runs; the threads' sums are added pairwise."""
    S = scalar_type(T)

    def run(c):
        totals = cuda.shared.array(THREADS, S)
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
            totals[thread] = total
            cuda.syncthreads()
            width = THREADS // 2
            while width > 0:
                if thread < width:
                    totals[thread] += totals[thread + width]
                cuda.syncthreads()
                width //= 2
            if thread == 0:
                put(target, task, narrow(totals[0], T))
            cuda.syncthreads()

    return run
