"""The forward of convolutions on the GPU: columns are sampled into shared memory and multiplied there, tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._cuda.conv.call import Call, offset_groups_of, variants, viewer
from numdcn._cuda.conv.columns import Segment, spot_sampler, tile_planner
from numdcn._cuda.conv.products import CHUNK, Task, Tile, multiplier, put_result, tiles
from numdcn._cuda.jit import THREADS, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import at, vector_length, widen

I32 = np.int32


def row_writer(T: Any, tile: Tile) -> Any:
    """Make `write_rows(c, a, buffer, sums, i, thread, task)`."""
    MINE_C, DOWN, ACROSS = tile.columns // tile.across, tile.down, tile.across

    @device
    def write_rows(c, a, buffer, sums, i, thread, task):
        """Write four rows of each thread's sums, starting at row i, through shared memory, where pixels are contiguous.
        (Constant indices into `sums` keep it in registers.)"""
        for r in range(4):
            for j in range(MINE_C):
                column = j // 4 * 4 * ACROSS + 4 * thread.column + j % 4
                buffer[column * 4 * DOWN + 4 * thread.row + r] = sums[i + r, j]
        cuda.syncthreads()
        p = c.p
        total, outs = p.batch * p.out_size[0] * p.out_size[1], p.out_channels // p.groups
        for unit in range(thread.rank, I32(4 * DOWN * MINE_C * ACROSS), I32(THREADS)):
            q, o = task.first + i * DOWN + unit % I32(4 * DOWN), task.first_out + unit // I32(4 * DOWN)
            if q < total and o < outs:
                put_result(c, a, task.split, q, task.group * outs + o, buffer[unit], T)
        cuda.syncthreads()

    return write_rows


@kernels(
    Call,
    lambda: [(*v, *tile) for v in variants() for tile in tiles(v[0])],
    lambda *constants: (THREADS, 1),
)
def forward_tiles(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS):
    """y: a block takes a tile of pixels and outputs of a group, and a split of the taps."""
    S, V, tile = scalar_type(T), vector_length(T), Tile(ROWS, COLUMNS, DOWN, ACROSS)
    SLOTS, PITCH, RIGHT, BUFFER, MINE_R = CHUNK // V, tile.pitch, tile.right, tile.room, ROWS // DOWN
    arrays_of, write_rows = viewer(T, C), row_writer(T, tile)
    (new_stage, plan_tile), (new_room, sample_spot) = tile_planner(T, SAMPLED, ROWS), spot_sampler(T, SAMPLED)
    thread_of, new_product, clear, multiply = multiplier(T, tile)

    def run(c):
        buffer = cuda.shared.array(BUFFER, S, alignment=16)
        a, stage, room, thread, product = arrays_of(c), new_stage(), new_room(), thread_of(), new_product()
        p = c.p
        total, outs, ins = (
            p.batch * p.out_size[0] * p.out_size[1],
            I32(p.out_channels // p.groups),
            I32(p.in_channels // p.groups),
        )
        shared = I32(p.in_channels // offset_groups_of(p))
        wide = (outs + COLUMNS - 1) // COLUMNS
        blocks = (total + ROWS - 1) // ROWS * wide * p.groups
        for number in range(cuda.blockIdx.x, blocks * c.split_k, cuda.gridDim.x):
            split, mine = I32(number // blocks), number % blocks
            group, first_out = I32(mine % (wide * p.groups) // wide), I32(mine % wide * COLUMNS)
            first = mine // (wide * p.groups) * ROWS
            task = Task(split, group, first, first_out)
            count = I32(min(ROWS, total - first))
            clear(product.sums)
            half = I32(0)
            begin = I32(group * ins)
            end = I32(begin + ins)
            for tap in range(I32(split * p.taps // c.split_k), I32((split + 1) * p.taps // c.split_k)):
                for og in range(I32(begin // shared), I32((end - 1) // shared + 1)):
                    plan_tile(c, a, stage, first, total, tap, og, thread.rank)
                    cuda.syncthreads()
                    low, high = I32(max(begin, og * shared)), I32(min(end, (og + 1) * shared))
                    segment = Segment(group, low, high)
                    for chunk in range(I32(low // V * V), high, I32(CHUNK)):
                        for unit in range(thread.rank, I32(ROWS * SLOTS), I32(THREADS)):
                            spot, slot = I32(unit // I32(SLOTS)), I32(unit % I32(SLOTS) * V)
                            sample_spot(c, a, stage, spot, spot < count, I32(chunk + slot), segment, room)
                            for i in range(V):
                                buffer[(half * CHUNK + slot + i) * PITCH + spot] = room.values[i]
                        for unit in range(thread.rank, I32(CHUNK * COLUMNS), I32(THREADS)):
                            k, o = unit // I32(COLUMNS), unit % I32(COLUMNS)
                            channel, weight = I32(chunk + k), S(0)
                            if low <= channel and channel < high and first_out + o < outs:
                                spot = ((group * p.taps + tap) * ins + channel - begin) * outs + first_out + o
                                weight = widen(at(a.weights, spot))
                            buffer[RIGHT + (half * CHUNK + k) * COLUMNS + o] = weight
                        cuda.syncthreads()
                        multiply(buffer, half, thread, product)
                        half = I32(1) - half
            cuda.syncthreads()
            write_rows(c, a, buffer, product.sums, 0, thread, task)
            if MINE_R > 4:
                write_rows(c, a, buffer, product.sums, 4, thread, task)

    return run
