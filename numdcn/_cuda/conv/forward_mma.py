"""The forward of convolutions on tensor cores: float16 and bfloat16, and float32 rounded to tf32."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._cuda.conv.call import Call, viewer
from numdcn._cuda.conv.columns import plans_that_fit, segment_from, tile_planner
from numdcn._cuda.conv.columns_mma import ATOM, Span, column_maker, mma_variants, warp_tiles
from numdcn._cuda.conv.products import Task, put_result
from numdcn._cuda.jit import SIMULATED, cuda, device, kernels
from numdcn._cuda.memory import copy_vector, vector_length, wait_for_copies
from numdcn._cuda.mma import WarpTile, bits, from_bits, per_word, piece_at, warp_multiplier

I32 = np.int32


def mma_writer(T: Any, tile: WarpTile) -> Any:
    """Make `write_mma(c, a, stage, buffer, sums, i, thread, task)`."""
    MINE_R, MINE_C, DOWN, ACROSS, THREADS = tile.sixteens, tile.eights, tile.down, tile.across, tile.threads

    @device
    def write_mma(c, a, stage, buffer, sums, i, thread, task):
        """Write the i-th 16 rows of each warp through shared memory, where pixels are contiguous. (Constant indices
        into `sums` keep it in registers.)"""
        for j in range(MINE_C):
            for k in range(4):
                pixel = thread.warp // I32(ACROSS) * 16 + thread.lane // 4 + k // 2 * 8
                out = (thread.warp % I32(ACROSS) * MINE_C + j) * 8 + thread.lane % 4 * 2 + k % 2
                buffer[out * 16 * DOWN + pixel] = bits(sums[i, j, k])
        cuda.syncthreads()
        outs = c.p.out_channels // c.p.groups
        for unit in range(thread.rank, I32(16 * DOWN * 8 * MINE_C * ACROSS), I32(THREADS)):
            row, o = I32(unit % I32(16 * DOWN)), I32(task.first_out + unit // I32(16 * DOWN))
            spot = I32((row // 16 * MINE_R + i) * 16 + row % 16)
            if spot < task.size and o < outs:
                n, pixel = stage.image_index[spot], stage.pixels[spot]
                put_result(c, a, task.split, n, pixel, task.group * outs + o, from_bits(buffer[unit]), T)
        cuda.syncthreads()

    return write_mma


def weight_copier(T: Any, tile: WarpTile) -> Any:
    """Make `copy_weights(c, a, buffer, first, start, rank)`."""
    ROWS, PIECES, THREADS, V = tile.columns, tile.words // 4, tile.threads, vector_length(T)

    @device
    def copy_weights(c, a, buffer, first, start, rank):
        """Start copying a chunk of the packed weights of ROWS outputs, from element `first` on, to word `start`."""
        for k in range(ROWS * PIECES // THREADS):
            unit = rank + I32(k * THREADS)
            row, piece = unit // I32(PIECES), unit % I32(PIECES)
            place = start + piece_at(row, piece, PIECES)
            copy_vector(a.weights, first + row * c.depth + piece * V, buffer, place, True)

    return copy_weights


def buffer_words(tile: WarpTile) -> int:
    """Words of shared memory for the operands, or for a part of the result."""
    return max(2 * (tile.rows + tile.columns) * tile.words, 16 * tile.down * tile.columns)


def planned_by_mma(T: Any, tile: WarpTile) -> int:
    """How many offset groups `forward_mma` plans together, at most."""
    most = tile.words * per_word(T) // ATOM if SIMULATED else 8
    return plans_that_fit(T, tile.rows, 4 * buffer_words(tile), most)


@kernels(
    Call,
    lambda: [(*v, *tile) for v in mma_variants() for tile in warp_tiles()],
    lambda *constants: (32 * constants[5] * constants[6], 1),
)
def forward_mma(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):
    """y, as in `forward_tiles`. The weights are packed in segments of groups; COLUMNS more rows follow the last, because
    they are read. The inputs of the next chunk are loaded while one is multiplied."""
    V, CHUNK, tile = vector_length(T), WORDS * per_word(T), WarpTile(ROWS, COLUMNS, DOWN, ACROSS, WORDS)
    MINE_R, RIGHT, BUFFER, OGS = tile.sixteens, 2 * ROWS * WORDS, buffer_words(tile), planned_by_mma(T, tile)
    new_stage, locate_tile, plan_tile = tile_planner(T, SAMPLED, ROWS, OGS * ROWS if SAMPLED else ROWS, tile.threads)
    new_room, gather_columns, store_columns = column_maker(T, SAMPLED, ROWS, WORDS // 4, tile.threads)
    thread_of, new_product, clear, multiply = warp_multiplier(T, tile)
    arrays_of, copy_weights, write_mma = viewer(T, C), weight_copier(T, tile), mma_writer(T, tile)

    def run(c):
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        a, stage, room, thread, product = arrays_of(c), new_stage(), new_room(), thread_of(), new_product()
        p = c.p
        total = p.batch * p.out_size[0] * p.out_size[1]
        outs, ins, width = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups), I32(c.segment)
        wide = (outs + COLUMNS - 1) // COLUMNS
        blocks = (total + ROWS - 1) // ROWS * wide * p.groups
        for number in range(cuda.blockIdx.x, blocks * c.split_k, cuda.gridDim.x):
            split, mine = I32(number // blocks), number % blocks
            group, first_out = I32(mine % (wide * p.groups) // wide), I32(mine % wide * COLUMNS)
            first = mine // (wide * p.groups) * ROWS
            task = Task(split, group, I32(min(ROWS, total - first)), first_out)
            span = Span(0, task.size)
            locate_tile(c, stage, first, task.size, thread.rank)
            cuda.syncthreads()
            clear(product.sums)
            half, end = I32(0), I32((group + 1) * ins)
            for tap in range(split * p.taps // c.split_k, (split + 1) * p.taps // c.split_k):
                low = I32(group * ins)
                while low < end:
                    index = I32(low // width)  # of the packed segment
                    segment = segment_from(c, group, low, I32((index + 1) * width), ROWS, V, CHUNK, ATOM)
                    chunk, ready = I32(low // I32(V) * I32(V)), False
                    before = I32(index * width) // I32(V) * I32(V)  # the vectors before the segment's
                    start = ((index * p.taps + tap) * outs + first_out) * c.depth - before
                    plan_tile(c, a, stage, task.size, tap, segment, thread.rank)
                    while ready or chunk < segment.high:
                        wait_for_copies()
                        cuda.syncthreads()
                        other, more = I32(1) - half, chunk < segment.high
                        if more:
                            copy_weights(c, a, buffer, start + chunk, RIGHT + other * (COLUMNS * WORDS), thread.rank)
                            gather_columns(c, a, stage, span, chunk, segment, thread.rank, room)
                        if ready:
                            multiply(buffer, half * (ROWS * WORDS), RIGHT + half * (COLUMNS * WORDS), thread, product)
                        if more:
                            place = other * (ROWS * WORDS)
                            store_columns(stage, span, chunk, segment, thread.rank, room, buffer, place)
                        half, ready, chunk = other, more, I32(chunk + CHUNK)
                    low = segment.high
            cuda.syncthreads()
            write_mma(c, a, stage, buffer, product.sums, 0, thread, task)
            if MINE_R > 1:
                write_mma(c, a, stage, buffer, product.sums, 1, thread, task)

    return run
