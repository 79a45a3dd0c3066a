"""The backward of convolutions on tensor cores: the gradients of columns and what follows from them, and the gradient of weights.

grad_y comes packed along the outputs of each group, (N, groups, pixels, depth), with zeros behind the outputs, so that both products
read it 16 bytes at a time: the first with the outputs as its depth, the second as its rows, with the pixels as its depth.
"""

from __future__ import annotations

import numpy as np

from numdcn._kernels.convolve_backward_cuda import begin_columns, end_columns, use_columns
from numdcn._kernels.convolve_cuda import Call, offset_groups_of, plan_tile, sample_spot
from numdcn._kernels.convolve_tensor_cuda import WarpTile, store_columns, tensor_variants
from numdcn._kernels.jit_cuda import SIMULATED, compute_type, cuda, kernels, scalar_type
from numdcn._kernels.memory_cuda import copy_vector, put, vector_length, view, wait_for_copies
from numdcn._kernels.tensor_cuda import bits, multiply_words, per_word

I32 = np.int32


def column_warps() -> WarpTile:
    """The tile of pixels and channels."""
    return WarpTile(16, 16, 1, 1, 8) if SIMULATED else WarpTile(64, 64, 4, 2, 16)


def weight_warps() -> tuple[WarpTile, ...]:
    """The tiles of outputs and channels, those for few outputs first; `words` of pixels at a time."""
    if SIMULATED:
        return (WarpTile(16, 16, 1, 1, 8),)
    return WarpTile(64, 64, 4, 2, 16), WarpTile(128, 64, 4, 2, 16)


def _column_variants() -> list[tuple[object, ...]]:
    ways = (False, False), (True, False), (False, True)  # VECTORS, OWNED
    return [(*v, *way, *column_warps()) for v in tensor_variants() for way in ways]


@kernels(Call, _column_variants, lambda *constants: (32 * constants[7] * constants[8], 1))
def gradients_of_columns_tensor(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):  # type: ignore[no-untyped-def]
    """As `gradients_of_columns`. The weights are (groups, taps, channels, depth) here."""
    S, A, V, EACH = scalar_type(T), compute_type(T), vector_length(T), per_word(T)
    U, THREADS, CHUNK, PITCH = V, 32 * DOWN * ACROSS, WORDS * EACH, WORDS + 4
    MINE_R, MINE_C, SLOTS, CORNERS = ROWS // (16 * DOWN), COLUMNS // (8 * ACROSS), COLUMNS // U, 4 * U
    RIGHT, STAGED = 2 * ROWS * PITCH, COLUMNS + 4
    BUFFER = max(RIGHT + 2 * COLUMNS * PITCH, ROWS * STAGED)

    def run(c):  # type: ignore[no-untyped-def]
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        parts = cuda.shared.array((3, SLOTS, ROWS), S)
        places = cuda.shared.array(ROWS, I32)
        owners = cuda.shared.array(ROWS, I32)
        fractions = cuda.shared.array((3, ROWS), S)
        sums = cuda.local.array((MINE_R, MINE_C, 4), S)
        words = cuda.local.array((MINE_R, 4), np.uint32)
        corners, values, products = cuda.local.array(CORNERS, S), cuda.local.array(U, S), cuda.local.array(U, S)
        three = cuda.local.array(3, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, grad_y, grad_images = view(c.weights, T), view(c.y, T), view(c.grad_images, A)
        grad_offsets, grad_mask, kept = view(c.grad_offsets, C), view(c.grad_mask, T), view(c.values, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        lane, warp = thread % I32(32), thread // I32(32)
        row, column = warp // I32(ACROSS) * I32(16 * MINE_R), warp % I32(ACROSS) * I32(8 * MINE_C)
        count, outs, ins = p.out_size[0] * p.out_size[1], p.out_channels // p.groups, p.in_channels // p.groups
        total, ogs = p.batch * count, offset_groups_of(p)
        shared = p.in_channels // ogs
        for task in range(cuda.blockIdx.x, (total + ROWS - 1) // ROWS * c.taps * ogs, cuda.gridDim.x):
            first, tap, og = task // (c.taps * ogs) * ROWS, c.first_tap + task % c.taps, task % (c.taps * ogs) // c.taps
            cuda.syncthreads()
            begin_columns(
                c, first, tap, og, offsets, mask, places, owners, fractions, parts, thread, S, SAMPLED, ROWS, SLOTS, THREADS
            )  # fmt: skip
            low, last = og * shared, (og + 1) * shared
            while low < last:
                group = low // ins
                high, begin = min(last, (group + 1) * ins), group * ins
                for chunk in range(low // U * U, high, COLUMNS):
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                sums[i, j, k] = S(0)
                    cuda.syncthreads()
                    half = I32(0)
                    for out in range(0, outs, CHUNK):
                        for unit in range(thread, I32(ROWS * WORDS // 4), I32(THREADS)):
                            spot, k = unit // I32(WORDS // 4), unit % I32(WORDS // 4) * I32(4)
                            if first + spot < total:
                                n = owners[spot]
                                start = ((n * (p.groups - 1) + group) * count + first + spot) * c.depth + out + k * EACH
                                copy_vector(grad_y, start, buffer, (half * ROWS + spot) * PITCH + k, True)
                        for unit in range(thread, I32(COLUMNS * WORDS // 4), I32(THREADS)):
                            line, k = unit // I32(WORDS // 4), unit % I32(WORDS // 4) * I32(4)
                            channel = chunk + line
                            if low <= channel and channel < high:
                                start = ((group * p.taps + tap) * ins + channel - begin) * c.depth + out + k * EACH
                                copy_vector(weights, start, buffer, RIGHT + (half * COLUMNS + line) * PITCH + k, True)
                        wait_for_copies()
                        cuda.syncthreads()
                        multiply_words(
                            buffer, (half * ROWS + row) * PITCH, RIGHT + (half * COLUMNS + column) * PITCH, PITCH, PITCH, lane, words,
                            sums, MINE_R, MINE_C, False, WORDS, T, EACH,
                        )  # fmt: skip
                        half = I32(1) - half
                    cuda.syncthreads()
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                spot = row + 16 * i + lane // 4 + k // 2 * 8
                                buffer[spot * STAGED + column + 8 * j + lane % 4 * 2 + k % 2] = bits(sums[i, j, k])
                    cuda.syncthreads()
                    use_columns(
                        c, buffer, first, og, chunk, low, high, thread, places, owners, fractions, parts, corners, values, products,
                        three, images, grad_images, kept, S, U, V, ROWS, SLOTS, THREADS, VECTORS, SAMPLED, OWNED,
                    )  # fmt: skip
                low = high
            cuda.syncthreads()
            end_columns(
                c, first, tap, og, grad_offsets, grad_mask, fractions, parts, three, thread, S, C, T, ROWS, SLOTS, THREADS
            )  # fmt: skip

    return run


@kernels(
    Call,
    lambda: [(*v, *tile) for v in tensor_variants() for tile in weight_warps()],
    lambda *constants: (32 * constants[5] * constants[6], 1),
)
def gradients_of_weights_tensor(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):  # type: ignore[no-untyped-def]
    """As `gradients_of_weights`. Columns are rounded to T."""
    S, A, V, EACH = scalar_type(T), compute_type(T), vector_length(T), per_word(T)
    THREADS, CHUNK, SLOTS, CORNERS = 32 * DOWN * ACROSS, WORDS * EACH, COLUMNS // V, 4 * V
    MINE_R, MINE_C = ROWS // (16 * DOWN), COLUMNS // (8 * ACROSS)
    LEFT_PITCH, RIGHT_PITCH = ROWS // EACH + 8 // EACH, COLUMNS // EACH + 8 // EACH  # no two lanes at a bank
    RIGHT = 2 * CHUNK * LEFT_PITCH
    BUFFER = RIGHT + 2 * CHUNK * RIGHT_PITCH

    def run(c):  # type: ignore[no-untyped-def]
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        places = cuda.shared.array(CHUNK, I32)
        owners = cuda.shared.array(CHUNK, I32)
        fractions = cuda.shared.array((3, CHUNK), S)
        sums = cuda.local.array((MINE_R, MINE_C, 4), S)
        words = cuda.local.array((MINE_R, 4), np.uint32)
        corners, values = cuda.local.array(CORNERS, S), cuda.local.array(V, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        grad_y, partial = view(c.y, T), view(c.sums, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        lane, warp = thread % I32(32), thread // I32(32)
        row, column = warp // I32(ACROSS) * I32(16 * MINE_R), warp % I32(ACROSS) * I32(8 * MINE_C)
        count, outs, ins = p.out_size[0] * p.out_size[1], p.out_channels // p.groups, p.in_channels // p.groups
        total, shared = p.batch * count, p.in_channels // offset_groups_of(p)
        tall, lanes = (outs + ROWS - 1) // ROWS, (ins + COLUMNS - 1) // COLUMNS
        for task in range(cuda.blockIdx.x, c.splits * p.taps * p.groups * tall * lanes, cuda.gridDim.x):
            mine, first_out, rest = task % lanes, task // lanes % tall * ROWS, task // (lanes * tall)
            group, tap, split = rest % p.groups, rest // p.groups % p.taps, rest // (p.groups * p.taps)
            first, end = split * total // c.splits, (split + 1) * total // c.splits
            begin, tile = group * ins, 0
            for og in range(begin // shared, (begin + ins - 1) // shared + 1):
                low, high = max(begin, og * shared), min(begin + ins, (og + 1) * shared)
                for chunk in range(low // V * V, high, COLUMNS):
                    tile += 1
                    if (tile - 1) % lanes != mine:
                        continue
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                sums[i, j, k] = S(0)
                    half = I32(0)
                    for start_q in range(first, end, CHUNK):
                        plan_tile(
                            c, start_q, end, tap, og, offsets, mask, places, owners, fractions, thread, S, SAMPLED, CHUNK, THREADS
                        )  # fmt: skip
                        cuda.syncthreads()
                        for unit in range(thread, I32(CHUNK * (ROWS // V)), I32(THREADS)):
                            spot, slot = unit // I32(ROWS // V), unit % I32(ROWS // V)
                            live, n = start_q + spot < end, I32(0)
                            if live:
                                n = owners[spot]
                            o = first_out + slot * V
                            if o < c.depth:  # rows behind the last output are not used
                                start = ((n * (p.groups - 1) + group) * count + start_q + spot) * c.depth + o
                                copy_vector(grad_y, start, buffer, (half * CHUNK + spot) * LEFT_PITCH + slot * 4, live)
                        for unit in range(thread, I32(CHUNK * SLOTS), I32(THREADS)):
                            spot, slot = unit // I32(SLOTS), unit % I32(SLOTS)
                            sample_spot(
                                c, images, spot, chunk + slot * V, low, high, start_q + spot < end, places, owners, fractions, corners,
                                values, S, V, SAMPLED,
                            )  # fmt: skip
                            store_columns(
                                buffer, RIGHT + (half * CHUNK + spot) * RIGHT_PITCH + slot * 4, values, T, EACH
                            )
                        wait_for_copies()
                        cuda.syncthreads()
                        multiply_words(
                            buffer, half * CHUNK * LEFT_PITCH + row // EACH, RIGHT + half * CHUNK * RIGHT_PITCH + column // EACH,
                            LEFT_PITCH, RIGHT_PITCH, lane, words, sums, MINE_R, MINE_C, True, WORDS, T, EACH,
                        )  # fmt: skip
                        half = I32(1) - half
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                o = first_out + row + 16 * i + lane // 4 + k // 2 * 8
                                channel = chunk + column + 8 * j + lane % 4 * 2 + k % 2
                                if o < outs and low <= channel and channel < high:
                                    spot = (
                                        (split * p.out_channels + group * outs + o) * ins + channel - begin
                                    ) * p.taps + tap
                                    put(partial, spot, sums[i, j, k])
                    cuda.syncthreads()

    return run
