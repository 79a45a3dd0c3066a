"""Convolutions with few channels per group on the GPU, such as depthwise ones: their products are small, the samples are what
takes time.

A block plans the taps of a tile of pixels once for all channels of an offset group, and samples the channels of a few
groups into shared memory, 16 bytes at a time. What is computed from these columns, outputs or gradients of weights, has a
thread for each result. Gradients of columns have a thread for each pixel and vector of channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.conv.backward import add_slopes, put_sums
from numdcn._cuda.conv.call import Call, offset_groups_of, variants, viewer
from numdcn._cuda.conv.columns import Segment, fractions_of, planner, tile_planner
from numdcn._cuda.conv.products import put_result
from numdcn._cuda.jit import F64, SIMULATED, THREADS, cuda, device, kernels, scalar_type, types
from numdcn._cuda.memory import at, load_four, load_vector, put, vector_length, widen
from numdcn._cuda.sample import corner_adder, gather, outside
from numdcn._formulas import bilinear

I32 = np.int32


class Size(NamedTuple):
    """What a block holds in shared memory at a time."""

    pixels: int
    channels: int  # a multiple of a vector
    outputs: int
    taps: int
    results: int  # weights per tap whose gradients are summed


def size_of(dtype: object) -> Size:
    """The sizes for a stored type."""
    if SIMULATED:
        return Size(4, 8 if dtype == F64 else 16, 4, 4, 8)
    return Size(16, 16, 16, 9, 32) if dtype == F64 else Size(32, 32, 32, 9, 64)


class Few(NamedTuple):
    """Parameters of the kernels. Chunks are numbered across all groups: some groups with all their outputs, or a group with
    some of them."""

    call: Call  # y of the backward: its gradient, channels-last; see `depth`
    groups: int  # of a chunk
    outs: int  # outputs of each of its groups
    wide: int  # chunks per group, if it has more outputs
    runs: int  # forward: blocks that share the chunks of a tile


class Stage(NamedTuple):
    """The plans of a tile's pixels for some taps, and what these read, in shared memory; pixels vary fastest."""

    starts: Any  # (taps, pixels) int64: the first channel of the cell
    weights: Any  # (taps, pixels, 4), of the corners
    scales: Any  # (taps, pixels): the mask
    columns: Any  # (taps, channels, pixels + 1)


class Part(NamedTuple):
    """The columns to sample: those of a chunk that share their offsets, for the pixels first <= q < end."""

    first: Any
    end: Any
    first_tap: Any
    taps: Any
    origin: Any  # the channel at which the columns in shared memory begin
    low: Any
    high: Any


class Room(NamedTuple):
    """A thread's local memory for a vector of V channels."""

    corners: Any  # (4*V,): values of the four corners of a cell
    values: Any  # (V,)
    four: Any  # (4,): the weights of the corners


def column_sampler(T: Any, SAMPLED: bool) -> tuple[Any, Any, Any, Any]:
    """Make `new_stage()`, `new_room()`, `plan_taps(c, a, stage, part, og, rank)` and `sample_columns(c, a, stage, part,
    rank, room)`."""
    S, V, plan, size = scalar_type(T), vector_length(T), planner(T, SAMPLED), size_of(T)
    PIXELS, SLOTS, CHANNELS, SPOTS = size.pixels, size.channels // V, size.channels, size.pixels * size.taps
    CORNERS = 4 * V
    WEIGHTS, COLUMNS, PITCH = 4 * SPOTS, size.taps * size.channels * (size.pixels + 1), size.pixels + 1

    @device
    def new_stage():  # the simulator identifies shared arrays by source line
        starts = cuda.shared.array(SPOTS, types.int64)
        weights = cuda.shared.array(WEIGHTS, S, alignment=16)
        scales = cuda.shared.array(SPOTS, S)
        columns = cuda.shared.array(COLUMNS, S)
        return Stage(starts, weights, scales, columns)

    @device
    def new_room():
        return Room(cuda.local.array(CORNERS, S), cuda.local.array(V, S), cuda.local.array(4, S))

    @device
    def plan_taps(c, a, stage, part, og, rank):
        """Plan the taps of a tile's pixels, for an offset group."""
        for unit in range(rank, I32(PIXELS) * part.taps, I32(THREADS)):
            q, tap = part.first + unit % I32(PIXELS), part.first_tap + unit // I32(PIXELS)
            if q < part.end:
                place, y, x, scale, n = plan(c, a, q, tap, og)
                put(stage.starts, unit, (n * c.pixels + place) * c.pitch)
                if SAMPLED:
                    w00, w01, w10, w11 = bilinear.corner_weights(y, x)
                    put(stage.weights, 4 * unit, S(w00))
                    put(stage.weights, 4 * unit + 1, S(w01))
                    put(stage.weights, 4 * unit + 2, S(w10))
                    put(stage.weights, 4 * unit + 3, S(w11))
                    put(stage.scales, unit, scale)

    @device
    def sample_columns(c, a, stage, part, rank, room):
        """Fill the columns of the channels low <= channel < high."""
        corners, values, four = room.corners, room.values, room.four
        row_step = c.pitch * (c.p.in_size[1] + 1)
        slot = rank % I32(SLOTS) * I32(V)
        channel = part.origin + slot
        if channel < part.high and channel + I32(V) > part.low:
            whole = part.low <= channel and channel + I32(V) <= part.high
            for planned in range(rank // I32(SLOTS), I32(PIXELS) * part.taps, I32(THREADS // SLOTS)):
                spot, tap = I32(planned % I32(PIXELS)), I32(planned // I32(PIXELS))
                if part.first + spot >= part.end:
                    continue
                start = at(stage.starts, planned) + channel
                if SAMPLED:
                    gather(a.images, start, c.pitch, row_step, corners, V, V)
                    load_four(stage.weights, 4 * planned, four, 0)
                    weights, scale = (four[0], four[1], four[2], four[3]), at(stage.scales, planned)
                    for i in range(V):
                        read = (corners[i], corners[V + i], corners[2 * V + i], corners[3 * V + i])
                        values[i] = scale * S(bilinear.value(weights, read))
                else:
                    load_vector(a.images, start, values, 0)
                first = I32((tap * I32(CHANNELS) + slot) * I32(PITCH) + spot)
                for i in range(V):
                    if whole or (part.low <= channel + i and channel + i < part.high):
                        put(stage.columns, first + i * PITCH, values[i])

    return new_stage, new_room, plan_taps, sample_columns


def _bounds(T: Any, C: Any, SAMPLED: bool, *more: Any) -> tuple[int, int]:
    return THREADS, 2 if SAMPLED else 1  # blocks that must fit a multiprocessor; without samples 2 would spill


@kernels(Few, variants, _bounds)
def forward_few(T, C, SAMPLED):
    """y: a block takes a tile of pixels and a run of chunks. Weights are as the caller has them."""
    S, V, size, arrays_of = scalar_type(T), vector_length(T), size_of(T), viewer(T, C)
    PIXELS, TAPS, CHANNELS, PITCH = size.pixels, size.taps, size.channels, size.pixels + 1
    MINE = size.pixels * size.outputs // THREADS
    new_stage, new_room, plan_taps, sample_columns = column_sampler(T, SAMPLED)

    def run(f):
        stage, room, sums = new_stage(), new_room(), cuda.local.array(MINE, S)
        results, rows = cuda.local.array(MINE, I32), cuda.local.array(MINE, I32)
        starts = cuda.local.array(MINE, types.int64)
        c = f.call
        a, p, rank = arrays_of(c), c.p, I32(cuda.threadIdx.x)
        count, taps = p.out_size[0] * p.out_size[1], I32(p.taps)
        total, outs, ins = p.batch * count, I32(p.out_channels // p.groups), I32(p.in_channels // p.groups)
        shared, groups = I32(p.in_channels // offset_groups_of(p)), I32(p.groups)
        chunks = I32((p.groups + f.groups - 1) // f.groups * f.wide)
        for task in range(cuda.blockIdx.x, (total + PIXELS - 1) // PIXELS * f.runs, cuda.gridDim.x):
            first, part = task // f.runs * PIXELS, task % f.runs
            spot = rank % I32(PIXELS)
            planned = sampled = I32(-1)  # offset group and first group of what is in shared memory, if all taps fit
            for chunk in range(I32(part * chunks // f.runs), I32((part + 1) * chunks // f.runs)):
                group, first_out = chunk // I32(f.wide) * I32(f.groups), chunk % I32(f.wide) * I32(f.outs)
                last = min(group + I32(f.groups), groups)
                begin, end = group * ins, last * ins
                origin = begin // I32(V) * I32(V)
                for i in range(MINE):  # a result: its output, its column and its weights
                    number = rank // I32(PIXELS) + i * I32(THREADS // PIXELS)
                    mine = I32(number // I32(f.outs))
                    out = I32(first_out + number - mine * I32(f.outs))
                    live = mine < last - group and out < outs
                    mine = mine if live else I32(0)
                    results[i] = (group + mine) * outs + out if live else I32(-1)
                    starts[i] = results[i] * ins * taps if live else 0
                    rows[i] = ((group + mine) * ins - origin) * I32(PITCH) + spot
                    sums[i] = S(0)
                for first_tap in range(I32(0), taps, I32(TAPS)):
                    some = min(I32(TAPS), taps - first_tap)
                    if sampled != group:
                        for og in range(begin // shared, (end - I32(1)) // shared + I32(1)):
                            low, high = max(begin, og * shared), min(end, (og + I32(1)) * shared)
                            piece = Part(first, total, first_tap, some, origin, low, high)
                            cuda.syncthreads()
                            if planned != og:
                                plan_taps(c, a, stage, piece, og, rank)
                                cuda.syncthreads()
                            sample_columns(c, a, stage, piece, rank, room)
                            planned = og if taps <= TAPS else I32(-1)
                        cuda.syncthreads()
                        sampled = group if taps <= TAPS else I32(-1)
                    tap, k, column, weight = I32(0), I32(0), I32(0), first_tap
                    for _ in range(some * ins):
                        for i in range(MINE):
                            sums[i] += at(stage.columns, rows[i] + column) * widen(at(a.weights, starts[i] + weight))
                        k = I32(k + 1)
                        column, weight = I32(column + PITCH), weight + taps
                        if k == ins:
                            tap, k = I32(tap + 1), I32(0)
                            column, weight = I32(tap * I32(CHANNELS * PITCH)), first_tap + tap
                for i in range(MINE):
                    if results[i] >= 0 and first + spot < total:
                        n = (first + spot) // count
                        put_result(c, a, 0, n, first + spot - n * count, results[i], sums[i], T)

    return run


@kernels(Few, variants, _bounds)
def weights_few(T, C, SAMPLED):
    """Splits of the weights' gradient: a block takes a chunk, some taps, and a split of the pixels."""
    S, V, size, arrays_of = scalar_type(T), vector_length(T), size_of(T), viewer(T, C)
    PIXELS, TAPS, CHANNELS, PITCH = size.pixels, size.taps, size.channels, size.pixels + 1
    MINE = -(-size.results * size.taps // THREADS)
    new_stage, new_room, plan_taps, sample_columns = column_sampler(T, SAMPLED)

    def run(f):
        stage, room, sums = new_stage(), new_room(), cuda.local.array(MINE, S)
        rows, places = cuda.local.array(MINE, I32), cuda.local.array(MINE, I32)
        c = f.call
        a, p, rank = arrays_of(c), c.p, I32(cuda.threadIdx.x)
        total, taps = p.batch * p.out_size[0] * p.out_size[1], I32(p.taps)
        outs, ins = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups)
        shared, portions = I32(p.in_channels // offset_groups_of(p)), (taps + I32(TAPS - 1)) // I32(TAPS)
        chunks = I32((p.groups + f.groups - 1) // f.groups * f.wide)
        for task in range(cuda.blockIdx.x, c.split_k * portions * chunks, cuda.gridDim.x):
            split, rest = task // (portions * chunks), I32(task % (portions * chunks))
            chunk, first_tap = rest % chunks, rest // chunks * I32(TAPS)
            some = min(I32(TAPS), taps - first_tap)
            group, first_out = chunk // I32(f.wide) * I32(f.groups), chunk % I32(f.wide) * I32(f.outs)
            last, here = min(group + I32(f.groups), I32(p.groups)), min(I32(f.outs), outs - first_out)
            begin, end = group * ins, last * ins
            origin, results = begin // I32(V) * I32(V), some * here * (end - begin)
            for i in range(MINE):  # a result: its column, and the output
                number = rank + i * I32(THREADS)
                k, line = number % ins, number // ins
                tap = line // (here * (last - group))
                line -= tap * (here * (last - group))
                mine = group + line // here
                rows[i] = (tap * I32(CHANNELS) + mine * ins + k - origin) * I32(PITCH)
                places[i] = mine * outs + first_out + line % here
                sums[i] = S(0)
            begin_q, end_q = split * total // c.split_k, (split + 1) * total // c.split_k
            for first in range(begin_q, end_q, PIXELS):
                for og in range(begin // shared, (end - I32(1)) // shared + I32(1)):
                    low, high = max(begin, og * shared), min(end, (og + I32(1)) * shared)
                    piece = Part(first, end_q, first_tap, some, origin, low, high)
                    cuda.syncthreads()
                    plan_taps(c, a, stage, piece, og, rank)
                    cuda.syncthreads()
                    sample_columns(c, a, stage, piece, rank, room)
                cuda.syncthreads()
                for i in range(MINE):
                    if rank + i * I32(THREADS) < results:
                        start = first * c.depth + places[i]
                        for spot in range(I32(min(PIXELS, end_q - first))):
                            sums[i] += at(stage.columns, rows[i] + spot) * widen(at(a.y, start + spot * c.depth))
            for i in range(MINE):
                number = rank + i * I32(THREADS)
                if number < results:
                    k, tap = number % ins, number // (ins * here * (last - group))
                    line = (split * p.out_channels + places[i]) * ins + k
                    put(a.partials, line * p.taps + first_tap + tap, sums[i])

    return run


def _gradient_variants() -> list[tuple[object, ...]]:
    return [(*v, vectors) for v in variants() for vectors in (False, True) if not (vectors and v[0] == F64)]


def gradient_maker(T: Any) -> Any:
    """Make `column_gradients(c, a, q, tap, channel, low, high, values, grads)`, the last two being room for V numbers."""
    S, V = scalar_type(T), vector_length(T)

    @device
    def column_gradients(c, a, q, tap, channel, low, high, values, grads):
        """values = the gradients of a vector of columns, 0 for channels below `low` or from `high` on."""
        p = c.p
        outs, ins, channels = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups), p.in_channels
        if outs == 1 and ins == 1:
            load_vector(a.y, q * c.depth + channel, grads, 0)
            for i in range(V):
                values[i] = S(0)
                if low <= channel + i and channel + i < high:
                    values[i] = grads[i] * widen(at(a.weights, tap * channels + channel + i))
        else:
            group = I32(I32(channel) // ins)
            for i in range(V):
                values[i] = S(0)
            for o in range(outs):
                rest, start = I32(channel - group * ins), q * c.depth + group * outs + o
                for i in range(V):
                    if low <= channel + i and channel + i < high:
                        weight = widen(at(a.weights, (tap * outs + o) * channels + channel + i))
                        values[i] += weight * widen(at(a.y, start))
                    rest = I32(rest + 1)
                    if rest == ins:
                        rest, start = I32(0), start + outs

    return column_gradients


def pixels_of_gradients(dtype: object) -> int:
    """The pixels of a block that computes gradients of columns."""
    return 2 if SIMULATED else THREADS * vector_length(dtype) // size_of(dtype).channels


@kernels(Few, _gradient_variants, _bounds)
def gradients_few(T, C, SAMPLED, VECTORS):
    """Gradients of images (or, if there is room for values, those of the columns, for `scatter`), offsets and mask: a block
    takes a tap and an offset group of a tile of pixels. Weights are (taps, outputs of a group, channels) here. VECTORS: use
    16-byte atomic adds."""
    S, V, arrays_of = scalar_type(T), vector_length(T), viewer(T, C)
    SPOTS, CORNERS = pixels_of_gradients(T), 4 * V
    SLOTS = THREADS // SPOTS
    new_stage, locate_tile, plan_tile = tile_planner(T, SAMPLED, SPOTS, SPOTS)
    add_corners, column_gradients = corner_adder(T, V, VECTORS, SAMPLED), gradient_maker(T)

    def run(f):
        stage, sums, three = new_stage(), cuda.shared.array((3, SPOTS, SLOTS), S), cuda.local.array(3, S)
        corners, values, products = cuda.local.array(CORNERS, S), cuda.local.array(V, S), cuda.local.array(V, S)
        c = f.call
        a, p, rank = arrays_of(c), c.p, I32(cuda.threadIdx.x)
        slot, spot = rank % I32(SLOTS), rank // I32(SLOTS)
        count, ogs, nowhere = p.out_size[0] * p.out_size[1], offset_groups_of(p), outside(p.in_size[0], p.in_size[1])
        total = p.batch * count
        shared, row_pixels = I32(p.in_channels // ogs), p.in_size[1] + 1
        moved = c.grad_offsets != 0 or c.grad_mask != 0
        for task in range(cuda.blockIdx.x, (total + SPOTS - 1) // SPOTS * c.taps * ogs, cuda.gridDim.x):
            first, rest = task // (c.taps * ogs) * SPOTS, I32(task % (c.taps * ogs))
            tap, og = c.first_tap + rest % I32(c.taps), rest // I32(c.taps)
            size, low, high = I32(min(SPOTS, total - first)), og * shared, (og + I32(1)) * shared
            cuda.syncthreads()
            locate_tile(c, stage, first, size, rank)
            cuda.syncthreads()
            plan_tile(c, a, stage, size, tap, Segment(I32(0), low, high, low, I32(0), I32(SPOTS), False, False), rank)
            cuda.syncthreads()
            three[0], three[1], three[2] = S(0), S(0), S(0)
            if spot < size:
                n, place, (y, x, scale) = at(stage.image_index, spot), at(stage.places, spot), fractions_of(stage, spot)
                q, pixel = n * count + at(stage.pixels, spot), n * c.pixels + place
                for channel in range(low // I32(V) * I32(V) + slot * I32(V), high, I32(SLOTS * V)):
                    column_gradients(c, a, q, tap, channel, low, high, values, products)
                    if moved:
                        gather(a.images, pixel * c.pitch + channel, c.pitch, row_pixels * c.pitch, corners, V, V)
                        for i in range(V):
                            if low <= channel + i and channel + i < high:
                                read = (corners[i], corners[V + i], corners[2 * V + i], corners[3 * V + i])
                                add_slopes(read, y, x, values[i], three, S, SAMPLED)
                    for i in range(V):
                        values[i] = scale * values[i] if low <= channel + i and channel + i < high else S(0)
                    if c.values:
                        for i in range(V):
                            if low <= channel + i and channel + i < high:
                                put(a.values, (og * total + q) * shared + channel + i - low, values[i])
                    elif c.grad_images and place < nowhere:
                        start, row_step = pixel * c.grad_pitch + channel, row_pixels * c.grad_pitch
                        add_corners(a.grad_images, start, c.grad_pitch, row_step, y, x, values, products)
            if moved:
                for which in range(3):
                    sums[which, spot, slot] = three[which]
                cuda.syncthreads()
                if slot == 0 and spot < size:
                    for which in range(3):
                        three[which] = S(0)
                        for number in range(SLOTS):
                            three[which] += sums[which, spot, number]
                    n, pixel, scale = at(stage.image_index, spot), at(stage.pixels, spot), at(stage.scales, spot)
                    put_sums(c, a, n, pixel, og * p.taps + tap, scale, three, T)

    return run
