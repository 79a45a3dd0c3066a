"""The forward of convolutions on the GPU: columns are sampled into shared memory and multiplied there, tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._cuda.conv.call import Call, variants, viewer
from numdcn._cuda.conv.columns import plans_that_fit, segment_from, spot_sampler, tile_planner
from numdcn._cuda.conv.products import CHUNK, Task, Tile, multiplier, put_result, tiles, unit_of
from numdcn._cuda.jit import SIMULATED, THREADS, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, put, vector_length, widen
from numdcn._cuda.sample import moved

I32 = np.int32


def row_writer(T: Any, tile: Tile) -> Any:
    """Make `write_rows(c, a, stage, buffer, sums, i, thread, task)`."""
    MINE_C, DOWN, ACROSS = tile.columns // tile.across, tile.down, tile.across

    @device
    def write_rows(c, a, stage, buffer, sums, i, thread, task):
        """Write four rows of each thread's sums, starting at row i, through shared memory, where pixels are contiguous.
        (Constant indices into `sums` keep it in registers.)"""
        for r in range(4):
            for j in range(MINE_C):
                column = j // 4 * 4 * ACROSS + 4 * thread.column + j % 4
                buffer[column * 4 * DOWN + 4 * thread.row + r] = sums[i + r, j]
        cuda.syncthreads()
        outs = c.p.out_channels // c.p.groups
        for unit in range(thread.rank, I32(4 * DOWN * MINE_C * ACROSS), I32(THREADS)):
            spot, o = I32(i * DOWN + unit % I32(4 * DOWN)), I32(task.first_out + unit // I32(4 * DOWN))
            if spot < task.size and o < outs:
                n, pixel = stage.image_index[spot], stage.pixels[spot]
                put_result(c, a, task.split, n, pixel, task.group * outs + o, buffer[unit], T)
        cuda.syncthreads()

    return write_rows


def planned_by(T: Any, rows: int, columns: int) -> int:
    """How many offset groups `forward_tiles` plans together, at most."""
    taken = Tile(rows, columns, 1, 1).room * np.dtype(scalar_type(T)).itemsize
    return plans_that_fit(T, rows, taken, CHUNK // vector_length(T) if SIMULATED else 8)


@kernels(
    Call,
    lambda: [(*v, *tile) for v in variants() for tile in tiles(v[0])],
    lambda *constants: (THREADS, 1),
)
def forward_tiles(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS):
    """y: a block takes a tile of pixels and outputs of a group, and a split of the taps."""
    S, V, tile, OGS = scalar_type(T), vector_length(T), Tile(ROWS, COLUMNS, DOWN, ACROSS), planned_by(T, ROWS, COLUMNS)
    SLOTS, PITCH, RIGHT, BUFFER, MINE_R = CHUNK // V, tile.pitch, tile.right, tile.room, ROWS // DOWN
    WHOLE = ROWS * SLOTS % THREADS == 0
    arrays_of, write_rows = viewer(T, C), row_writer(T, tile)
    new_stage, locate_tile, plan_tile = tile_planner(T, SAMPLED, ROWS, OGS * ROWS if SAMPLED else ROWS)
    new_room, sample_spot = spot_sampler(T, SAMPLED)
    thread_of, new_product, clear, multiply = multiplier(T, tile)

    @device
    def copy_weights(weights, outs, buffer, half, chunk, segment, first_out, rank):
        """Copy the first weights of `outs` outputs, those of a chunk from output `first_out` on; zeros outside the
        segment."""
        for turn in range(CHUNK * COLUMNS // THREADS):
            k, o = unit_of(rank, turn, COLUMNS, THREADS)
            channel, weight = I32(chunk + k), S(0)
            if segment.low <= channel and channel < segment.high and I32(first_out + o) < outs:
                weight = widen(at(weights, I32(k * outs) + o))
            put(buffer, RIGHT + (half * CHUNK + k) * COLUMNS + o, weight)

    def run(c):
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        a, stage, room, thread, product = arrays_of(c), new_stage(), new_room(), thread_of(), new_product()
        p = c.p
        total = p.batch * p.out_size[0] * p.out_size[1]
        outs, ins = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups)
        wide = (outs + COLUMNS - 1) // COLUMNS
        blocks = (total + ROWS - 1) // ROWS * wide * p.groups
        for number in range(cuda.blockIdx.x, blocks * c.split_k, cuda.gridDim.x):
            split, mine = I32(number // blocks), number % blocks
            group, first_out = I32(mine % (wide * p.groups) // wide), I32(mine % wide * COLUMNS)
            first = mine // (wide * p.groups) * ROWS
            task = Task(split, group, I32(min(ROWS, total - first)), first_out)
            locate_tile(c, stage, first, task.size, thread.rank)
            cuda.syncthreads()
            clear(product.sums)
            half, begin, end = I32(0), I32(group * ins), I32((group + 1) * ins)
            for tap in range(I32(split * p.taps // c.split_k), I32((split + 1) * p.taps // c.split_k)):
                low = begin
                while low < end:
                    segment = segment_from(c, group, low, end, ROWS, V, CHUNK, V)
                    plan_tile(c, a, stage, task.size, tap, segment, thread.rank)
                    cuda.syncthreads()
                    for chunk in range(I32(low // V * V), segment.high, I32(CHUNK)):
                        for turn in range(-(-ROWS * SLOTS // THREADS)):
                            spot, slot = unit_of(thread.rank, turn, SLOTS, THREADS)
                            if WHOLE or spot < I32(ROWS):
                                channel = I32(chunk + slot * V)
                                sample_spot(c, a, stage, spot, spot < task.size, channel, segment, room)
                                for i in range(V):
                                    put(buffer, (half * CHUNK + slot * V + i) * PITCH + spot, room.values[i])
                        start = ((group * p.taps + tap) * ins + chunk - begin) * outs + first_out
                        weights = moved(a.weights, start)
                        copy_weights(weights, outs, buffer, half, I32(chunk), segment, first_out, thread.rank)
                        cuda.syncthreads()
                        multiply(buffer, half, thread, product)
                        half = I32(1) - half
                    low = segment.high
            cuda.syncthreads()
            write_rows(c, a, stage, buffer, product.sums, 0, thread, task)
            if MINE_R > 4:
                write_rows(c, a, stage, buffer, product.sums, 4, thread, task)

    return run
