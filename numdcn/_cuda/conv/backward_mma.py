"""The backward of convolutions on tensor cores: gradients of columns and what follows from them, and gradients of
weights.

grad_y is packed along the outputs of each group, (N, groups, pixels, depth), with zeros after the outputs, so that both
products read it 16 bytes at a time: the first with the outputs as its depth, the second with the outputs as its rows
and the pixels as its depth.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._cuda.conv.backward import U, bundle_segment, bundles_that_fit, column_user, reading_of
from numdcn._cuda.conv.call import Call, offset_groups_of, viewer
from numdcn._cuda.conv.columns import tile_planner, tile_segment
from numdcn._cuda.conv.columns_mma import ATOM, Span, column_maker, mma_variants
from numdcn._cuda.jit import SIMULATED, cuda, device, kernels
from numdcn._cuda.memory import at, copy_vector, put, vector_length, wait_for_copies
from numdcn._cuda.mma import WarpTile, bits, per_word, piece_at, warp_multiplier

I32 = np.int32


def column_warps() -> WarpTile:
    """The tile of pixels and channels."""
    return WarpTile(32, 32, 2, 1, 16) if SIMULATED else WarpTile(64, 64, 4, 2, 16)


def weight_warps() -> tuple[WarpTile, ...]:
    """The tiles of outputs and channels, smallest first; `words` of pixels at a time."""
    if SIMULATED:
        return WarpTile(16, 16, 1, 1, 8), WarpTile(32, 32, 1, 2, 16)
    return WarpTile(64, 64, 4, 2, 16), WarpTile(128, 64, 4, 2, 16), WarpTile(256, 64, 4, 2, 16)


def _column_variants() -> list[tuple[object, ...]]:
    ways = (False, False), (True, False), (False, True)  # VECTORS, OWNED
    return [(*v, *way, *column_warps()) for v in mma_variants() for way in ways]


def operand_copier(T: Any, tile: WarpTile) -> Any:
    """Make `copy_operands(c, a, stage, buffer, half, reading, chunk, segment, out, rank)`."""
    ROWS, COLUMNS, WORDS, THREADS, V = tile.rows, tile.columns, tile.words, tile.threads, vector_length(T)
    PIECES, RIGHT = WORDS // 4, 2 * ROWS * WORDS

    @device
    def copy_operands(c, a, stage, buffer, half, reading, chunk, segment, out, rank):
        """Start copying the operands of a chunk of outputs, from `out` on, for the gradients of columns: grad_y of the
        tile's pixels, and the weights of a chunk of channels, those of a segment."""
        p, group = c.p, segment.group
        count, ins = p.out_size[0] * p.out_size[1], reading.ins
        for k in range(ROWS * PIECES // THREADS):
            unit = rank + I32(k * THREADS)
            spot, piece = unit // I32(PIECES), unit % I32(PIECES)
            if spot < reading.size:
                line = (at(stage.image_index, spot) * p.groups + group) * count + at(stage.pixels, spot)
                place = half * (ROWS * WORDS) + piece_at(spot, piece, PIECES)
                copy_vector(a.y, line * c.depth + out + piece * V, buffer, place, True)
        for k in range(COLUMNS * PIECES // THREADS):
            unit = rank + I32(k * THREADS)
            row, piece = unit // I32(PIECES), unit % I32(PIECES)
            channel = chunk + row
            if segment.low <= channel and channel < segment.high:
                line = (group * p.taps + reading.tap) * ins + channel - group * ins
                place = RIGHT + half * (COLUMNS * WORDS) + piece_at(row, piece, PIECES)
                copy_vector(a.weights, line * c.depth + out + piece * V, buffer, place, True)

    return copy_operands


def columns_words(tile: WarpTile) -> int:
    """Words of shared memory for the operands, or for the product."""
    return max(2 * (tile.rows + tile.columns) * tile.words, tile.rows * (tile.columns + 4))


def columns_mma_ogs(T: Any, tile: WarpTile) -> int:
    """How many offset groups a block of `gradients_of_columns_mma` takes at once, at most."""
    return bundles_that_fit(T, tile.rows, tile.columns, 4 * columns_words(tile))


@kernels(Call, _column_variants, lambda *constants: (32 * constants[7] * constants[8], 1))
def gradients_of_columns_mma(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):
    """Like `gradients_of_columns`. The weights are (groups, taps, channels, depth) here."""
    CHUNK, tile = WORDS * per_word(T), WarpTile(ROWS, COLUMNS, DOWN, ACROSS, WORDS)
    MINE_R, MINE_C, RIGHT, STAGED = tile.sixteens, tile.eights, 2 * ROWS * WORDS, COLUMNS + 4
    BUFFER, OGS = columns_words(tile), columns_mma_ogs(T, tile)
    new_stage, new_sums, new_room, begin_columns, use_columns, end_columns = column_user(
        T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, OGS, tile.threads
    )
    thread_of, new_product, clear, multiply = warp_multiplier(T, tile)
    arrays_of, copy_operands = viewer(T, C), operand_copier(T, tile)

    def run(c):
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
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
                    copy_operands(c, a, stage, buffer, half, reading, chunk, segment, I32(0), thread.rank)
                    for out in range(I32(0), reading.outs, I32(CHUNK)):
                        wait_for_copies()
                        cuda.syncthreads()
                        other, behind = I32(1) - half, I32(out + CHUNK)
                        if behind < reading.outs:
                            copy_operands(c, a, stage, buffer, other, reading, chunk, segment, behind, thread.rank)
                        multiply(buffer, half * (ROWS * WORDS), RIGHT + half * (COLUMNS * WORDS), thread, product)
                        half = other
                    cuda.syncthreads()
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                spot = thread.row + 16 * i + thread.lane // 4 + k // 2 * 8
                                column = thread.column + 8 * j + thread.lane % 4 * 2 + k % 2
                                put(buffer, spot * STAGED + column, bits(product.sums[i, j, k]))
                    cuda.syncthreads()
                    use_columns(c, a, stage, sums, buffer, reading, chunk, segment, thread.rank, room)
                low = segment.high
            cuda.syncthreads()
            end_columns(c, a, stage, sums, reading, thread.rank, room)

    return run


def pixel_copier(T: Any, tile: WarpTile, PITCH: int, CHUNK: int) -> Any:
    """Make `copy_pixels(c, a, stage, buffer, start, span, group, first_out, rank)`."""
    THREADS, V = tile.threads, vector_length(T)
    VECTORS = tile.rows // V

    @device
    def copy_pixels(c, a, stage, buffer, start, span, group, first_out, rank):
        """Start copying grad_y of a tile's outputs to word `start`, for the pixels of a span, followed by zeros up to
        CHUNK."""
        p = c.p
        pixels = p.out_size[0] * p.out_size[1]
        for k in range(CHUNK * VECTORS // THREADS):
            unit = rank + I32(k * THREADS)
            spot, piece = I32(unit // I32(VECTORS)), unit % I32(VECTORS)
            out, line = first_out + piece * V, 0
            if spot < span.size:
                planned = I32(span.base + spot)
                line = (at(stage.image_index, planned) * p.groups + group) * pixels + at(stage.pixels, planned)
            if out < c.depth:  # rows past the last output are not used
                copy_vector(a.y, line * c.depth + out, buffer, start + spot * PITCH + piece * 4, spot < span.size)

    return copy_pixels


def weights_mma_plans(dtype: Any, tile: WarpTile) -> int:
    """How many plans `gradients_of_weights_mma` makes at a time, as `weights_plans`."""
    if SIMULATED:
        return tile.words * per_word(dtype) * tile.columns // ATOM
    return 256 if tile.rows > 128 else 512


@kernels(
    Call,
    lambda: [(*v, *tile) for v in mma_variants() for tile in weight_warps()],
    lambda *constants: (32 * constants[5] * constants[6], 1),
)
def gradients_of_weights_mma(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):
    """Like `gradients_of_weights`. Columns are rounded to T."""
    V, EACH, tile = vector_length(T), per_word(T), WarpTile(ROWS, COLUMNS, DOWN, ACROSS, WORDS)
    CHUNK, MINE_R, MINE_C = WORDS * EACH, tile.sixteens, tile.eights
    LEFT_PITCH, RIGHT_PITCH = ROWS // EACH + 8 // EACH, COLUMNS // EACH + 8 // EACH  # no two lanes in the same bank
    PLANS, RIGHT = weights_mma_plans(T, tile), 2 * CHUNK * LEFT_PITCH
    BUFFER, PLANNED = RIGHT + 2 * CHUNK * RIGHT_PITCH, min(PLANS, 256)
    new_stage, locate_tile, plan_tile = tile_planner(T, SAMPLED, PLANNED, PLANS, tile.threads)
    new_room, gather_columns, store_columns = column_maker(T, SAMPLED, CHUNK, COLUMNS // V, tile.threads, RIGHT_PITCH)
    thread_of, new_product, clear, multiply = warp_multiplier(T, tile, LEFT_PITCH, RIGHT_PITCH)
    arrays_of, copy_pixels = viewer(T, C), pixel_copier(T, tile, LEFT_PITCH, CHUNK)

    def run(c):
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        a, stage, room, thread, product = arrays_of(c), new_stage(), new_room(), thread_of(), new_product()
        p = c.p
        outs, ins = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups)
        total = p.batch * p.out_size[0] * p.out_size[1]
        tall, lanes = (outs + ROWS - 1) // ROWS, (ins + COLUMNS - 1) // COLUMNS
        for task in range(cuda.blockIdx.x, c.split_k * p.taps * p.groups * tall * lanes, cuda.gridDim.x):
            mine, first_out, rest = task % lanes, I32(task // lanes % tall * ROWS), task // (lanes * tall)
            group, tap, split = I32(rest % p.groups), rest // p.groups % p.taps, rest // (p.groups * p.taps)
            first, end = split * total // c.split_k, (split + 1) * total // c.split_k
            begin, number = I32(group * ins), 0
            low = begin
            while low < begin + ins:
                segment = tile_segment(c, group, low, I32(begin + ins), COLUMNS, PLANS, CHUNK, V, ATOM)
                low, number = segment.high, number + 1
                if (number - 1) % lanes != mine:
                    continue
                chunk = I32(segment.low // I32(V) * I32(V))
                clear(product.sums)
                half = I32(0)
                for planned in range(first, end, min(PLANNED, segment.pitch)):
                    length = I32(min(min(PLANNED, segment.pitch), end - planned))
                    locate_tile(c, stage, planned, length, thread.rank)
                    cuda.syncthreads()
                    plan_tile(c, a, stage, length, tap, segment, thread.rank)
                    place, ready = I32(0), False
                    while ready or place < length:
                        wait_for_copies()
                        cuda.syncthreads()
                        other, more = I32(1) - half, place < length
                        span = Span(place, I32(min(CHUNK, length - place)))
                        if more:
                            start = other * (CHUNK * LEFT_PITCH)
                            copy_pixels(c, a, stage, buffer, start, span, group, first_out, thread.rank)
                            gather_columns(c, a, stage, span, chunk, segment, thread.rank, room)
                        if ready:
                            left, right = half * (CHUNK * LEFT_PITCH), RIGHT + half * (CHUNK * RIGHT_PITCH)
                            multiply(buffer, left, right, thread, product)
                        if more:
                            start = RIGHT + other * (CHUNK * RIGHT_PITCH)
                            store_columns(stage, span, chunk, segment, thread.rank, room, buffer, start)
                        half, ready, place = other, more, I32(place + CHUNK)
                for i in range(MINE_R):
                    for j in range(MINE_C):
                        for k in range(4):
                            o = first_out + thread.row + 16 * i + thread.lane // 4 + k // 2 * 8
                            channel = chunk + thread.column + 8 * j + thread.lane % 4 * 2 + k % 2
                            if o < outs and segment.low <= channel and channel < segment.high:
                                line = split * p.out_channels + group * outs + o
                                put(a.partials, (line * ins + channel - begin) * p.taps + tap, product.sums[i, j, k])
                cuda.syncthreads()

    return run
