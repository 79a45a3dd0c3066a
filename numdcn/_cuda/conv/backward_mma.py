"""The backward of convolutions on tensor cores: the gradients of columns and what follows from them, and the gradient of weights.

grad_y comes packed along the outputs of each group, (N, groups, pixels, depth), with zeros behind the outputs, so that both products
read it 16 bytes at a time: the first with the outputs as its depth, the second as its rows, with the pixels as its depth.
"""

from __future__ import annotations

import numpy as np

from numdcn._cuda.conv.backward import begin_columns, end_columns, use_columns
from numdcn._cuda.conv.columns import Call, offset_groups_of, plan_tile
from numdcn._cuda.conv.forward_mma import WarpTile, gather_columns, mma_variants, store_columns
from numdcn._cuda.jit import SIMULATED, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import copy_vector, put, vector_length, view, wait_for_copies
from numdcn._cuda.mma import bits, multiply_matrices, multiply_turned, per_word, piece_at

I32 = np.int32


def column_warps() -> WarpTile:
    """The tile of pixels and channels."""
    return WarpTile(32, 32, 2, 1, 16) if SIMULATED else WarpTile(64, 64, 4, 2, 16)


def weight_warps() -> tuple[WarpTile, ...]:
    """The tiles of outputs and channels, those for few outputs first; `words` of pixels at a time."""
    if SIMULATED:
        return WarpTile(16, 16, 1, 1, 8), WarpTile(32, 32, 1, 2, 16)
    return WarpTile(64, 64, 4, 2, 16), WarpTile(128, 64, 4, 2, 16), WarpTile(256, 64, 4, 2, 16)


def _column_variants() -> list[tuple[object, ...]]:
    ways = (False, False), (True, False), (False, True)  # VECTORS, OWNED
    return [(*v, *way, *column_warps()) for v in mma_variants() for way in ways]


@device
def copy_operands(
    c, grad_y, weights, buffer, half, first, total, group, tap, chunk, low, high, out, image_index, thread, ROWS, COLUMNS, WORDS,
    THREADS, EACH,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Begin to copy what a chunk of outputs, from `out` on, brings to the gradients of columns: grad_y of the tile's pixels, and the
    weights of its channels, those from low to high."""
    p = c.p
    count, ins, PIECES = p.out_size[0] * p.out_size[1], p.in_channels // p.groups, WORDS // 4
    for k in range(ROWS * PIECES // THREADS):
        unit = thread + I32(k * THREADS)
        spot, piece = unit // I32(PIECES), unit % I32(PIECES)
        if first + spot < total:
            line = (image_index[spot] * (p.groups - 1) + group) * count + first + spot
            place = half * (ROWS * WORDS) + piece_at(spot, piece, PIECES)
            copy_vector(grad_y, line * c.depth + out + piece * (4 * EACH), buffer, place, True)
    for k in range(COLUMNS * PIECES // THREADS):
        unit = thread + I32(k * THREADS)
        row, piece = unit // I32(PIECES), unit % I32(PIECES)
        channel = chunk + row
        if low <= channel and channel < high:
            line = (group * p.taps + tap) * ins + channel - group * ins
            place = 2 * ROWS * WORDS + half * (COLUMNS * WORDS) + piece_at(row, piece, PIECES)
            copy_vector(weights, line * c.depth + out + piece * (4 * EACH), buffer, place, True)


@kernels(Call, _column_variants, lambda *constants: (32 * constants[7] * constants[8], 1))
def gradients_of_columns_mma(T, C, SAMPLED, VECTORS, OWNED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):
    """As `gradients_of_columns`. The weights are (groups, taps, channels, depth) here."""
    S, A, V, EACH = scalar_type(T), compute_type(T), vector_length(T), per_word(T)
    U, THREADS, CHUNK = V, 32 * DOWN * ACROSS, WORDS * EACH
    MINE_R, MINE_C, SLOTS, CORNERS = ROWS // (16 * DOWN), COLUMNS // (8 * ACROSS), COLUMNS // U, 4 * U
    RIGHT, STAGED = 2 * ROWS * WORDS, COLUMNS + 4
    BUFFER = max(RIGHT + 2 * COLUMNS * WORDS, ROWS * STAGED)

    def run(c):  # type: ignore[no-untyped-def] # length: the loops of one product, around one set of tiles
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        parts = cuda.shared.array((3, SLOTS, ROWS), S)
        places = cuda.shared.array(ROWS, I32)
        image_index = cuda.shared.array(ROWS, I32)
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
        outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
        total, ogs = p.batch * p.out_size[0] * p.out_size[1], offset_groups_of(p)
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
                high = min(last, (group + 1) * ins)
                for chunk in range(low // U * U, high, COLUMNS):
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                sums[i, j, k] = S(0)
                    cuda.syncthreads()
                    half = I32(0)
                    copy_operands(
                        c, grad_y, weights, buffer, half, first, total, group, tap, chunk, low, high, 0, image_index, thread, ROWS, COLUMNS,
                        WORDS, THREADS, EACH,
                    )  # fmt: skip
                    for out in range(0, outs, CHUNK):
                        wait_for_copies()
                        cuda.syncthreads()
                        if out + CHUNK < outs:
                            copy_operands(
                                c, grad_y, weights, buffer, I32(1) - half, first, total, group, tap, chunk, low, high, out + CHUNK,
                                image_index, thread, ROWS, COLUMNS, WORDS, THREADS, EACH,
                            )  # fmt: skip
                        multiply_matrices(
                            buffer, half * (ROWS * WORDS), row, RIGHT + half * (COLUMNS * WORDS), column, lane, words, sums, MINE_R,
                            MINE_C, WORDS, T,
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
                        c, buffer, first, og, chunk, low, high, thread, places, image_index, fractions, parts, corners, values, products,
                        three, images, grad_images, kept, S, U, V, ROWS, SLOTS, THREADS, VECTORS, SAMPLED, OWNED,
                    )  # fmt: skip
                low = high
            cuda.syncthreads()
            end_columns(
                c, first, tap, og, grad_offsets, grad_mask, fractions, parts, three, thread, S, C, T, ROWS, SLOTS, THREADS
            )  # fmt: skip

    return run


@device
def copy_pixels(
    c, grad_y, buffer, start, first, count, base, group, first_out, image_index, thread, PITCH, ROWS, CHUNK, THREADS, V
):  # type: ignore[no-untyped-def] # fmt: skip
    """Begin to copy grad_y of the outputs of a tile, for `count` pixels from `first` on, whose plans begin at `base`, and zeros for
    the rest of CHUNK."""
    p = c.p
    pixels, VECTORS = p.out_size[0] * p.out_size[1], ROWS // V
    for k in range(CHUNK * VECTORS // THREADS):
        unit = thread + I32(k * THREADS)
        spot, piece = unit // I32(VECTORS), unit % I32(VECTORS)
        out, line = first_out + piece * V, first
        if spot < count:
            line = (image_index[base + spot] * (p.groups - 1) + group) * pixels + first + spot
        if out < c.depth:  # rows behind the last output are not used
            copy_vector(grad_y, line * c.depth + out, buffer, start + spot * PITCH + piece * 4, spot < count)


@kernels(
    Call,
    lambda: [(*v, *tile) for v in mma_variants() for tile in weight_warps()],
    lambda *constants: (32 * constants[5] * constants[6], 1),
)
def gradients_of_weights_mma(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):
    """As `gradients_of_weights`. Columns are rounded to T."""
    S, A, V, EACH = scalar_type(T), compute_type(T), vector_length(T), per_word(T)
    THREADS, CHUNK, SLOTS, CORNERS = 32 * DOWN * ACROSS, WORDS * EACH, COLUMNS // V, 4 * EACH
    MINE_R, MINE_C = ROWS // (16 * DOWN), COLUMNS // (8 * ACROSS)
    LEFT_PITCH, RIGHT_PITCH = ROWS // EACH + 8 // EACH, COLUMNS // EACH + 8 // EACH  # no two lanes at a bank
    UNITS, PLANNED, RIGHT = CHUNK * SLOTS // THREADS, 4 * CHUNK, 2 * CHUNK * LEFT_PITCH
    RAW, BUFFER = 16 * UNITS, RIGHT + 2 * CHUNK * RIGHT_PITCH

    def run(c):  # type: ignore[no-untyped-def] # length: the loops of one product, around one set of tiles
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        places = cuda.shared.array(PLANNED, I32)
        image_index = cuda.shared.array(PLANNED, I32)
        fractions = cuda.shared.array((3, PLANNED), S)
        sums = cuda.local.array((MINE_R, MINE_C, 4), S)
        words = cuda.local.array((MINE_R, 4), np.uint32)
        raw = cuda.local.array(RAW, np.uint32)
        corners, values, packed = (
            cuda.local.array(CORNERS, S),
            cuda.local.array(EACH, S),
            cuda.local.array(4, np.uint32),
        )
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        grad_y, partial = view(c.y, T), view(c.sums, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        lane, warp = thread % I32(32), thread // I32(32)
        row, column = warp // I32(ACROSS) * I32(16 * MINE_R), warp % I32(ACROSS) * I32(8 * MINE_C)
        outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
        total, shared = p.batch * p.out_size[0] * p.out_size[1], p.in_channels // offset_groups_of(p)
        tall, lanes = (outs + ROWS - 1) // ROWS, (ins + COLUMNS - 1) // COLUMNS
        for task in range(cuda.blockIdx.x, c.split_k * p.taps * p.groups * tall * lanes, cuda.gridDim.x):
            mine, first_out, rest = task % lanes, task // lanes % tall * ROWS, task // (lanes * tall)
            group, tap, split = rest % p.groups, rest // p.groups % p.taps, rest // (p.groups * p.taps)
            first, end = split * total // c.split_k, (split + 1) * total // c.split_k
            begin, tile = group * ins, 0
            for og in range(I32(begin // shared), I32((begin + ins - 1) // shared + 1)):
                low, high = I32(max(begin, og * shared)), I32(min(begin + ins, (og + 1) * shared))
                for chunk in range(I32(low // V * V), high, I32(COLUMNS)):
                    tile += 1
                    if (tile - 1) % lanes != mine:
                        continue
                    for i in range(MINE_R):
                        for j in range(MINE_C):
                            for k in range(4):
                                sums[i, j, k] = S(0)
                    half = I32(0)
                    for planned in range(first, end, PLANNED):
                        stop = min(end, planned + PLANNED)
                        plan_tile(
                            c, planned, stop, tap, og, offsets, mask, places, image_index, fractions, thread, S, SAMPLED, PLANNED, THREADS
                        )  # fmt: skip
                        place, ready, length = I32(0), False, I32(stop - planned)
                        while ready or place < length:
                            wait_for_copies()
                            cuda.syncthreads()
                            other, more, count = I32(1) - half, place < length, I32(min(CHUNK, length - place))
                            if more:
                                copy_pixels(
                                    c, grad_y, buffer, other * (CHUNK * LEFT_PITCH), planned + place, count, place, group, first_out,
                                    image_index, thread, LEFT_PITCH, ROWS, CHUNK, THREADS, V,
                                )  # fmt: skip
                                gather_columns(
                                    c, images, count, place, chunk, high, thread, places, image_index, raw, SLOTS, UNITS,
                                    THREADS, V,
                                )  # fmt: skip
                            if ready:
                                multiply_turned(
                                    buffer, half * (CHUNK * LEFT_PITCH) + row // EACH, LEFT_PITCH,
                                    RIGHT + half * (CHUNK * RIGHT_PITCH) + column // EACH, RIGHT_PITCH, lane, words, sums, MINE_R,
                                    MINE_C, WORDS, T, EACH,
                                )  # fmt: skip
                            if more:
                                store_columns(
                                    count, place, chunk, low, high, thread, fractions, raw, corners, values, packed, buffer,
                                    RIGHT + other * (CHUNK * RIGHT_PITCH), S, SLOTS, UNITS, THREADS, V, EACH, RIGHT_PITCH, T, SAMPLED,
                                )  # fmt: skip
                            half, ready, place = other, more, I32(place + CHUNK)
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
