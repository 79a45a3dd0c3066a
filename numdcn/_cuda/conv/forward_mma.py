"""The forward of convolutions on tensor cores: float16 and bfloat16, and float32 rounded to tf32."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.conv.columns import Call, offset_groups_of, plan_tile, put_result, weigh
from numdcn._cuda.jit import BF16, F16, F32, SIMULATED, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.memory import copy_vector, unpack, vector_length, view, wait_for_copies
from numdcn._cuda.mma import bits, from_bits, multiply_matrices, per_word, piece_at, store_words, word
from numdcn._cuda.sample import gather_words

I32 = np.int32


class WarpTile(NamedTuple):
    """A block's part of a product: rows x columns, by `down` x `across` warps, from `words` words of depth at a time."""

    rows: int
    columns: int
    down: int
    across: int
    words: int

    @property
    def threads(self) -> int:
        """Of the block."""
        return 32 * self.down * self.across


def warp_tiles() -> tuple[WarpTile, ...]:
    """The tiles there are, those for few outputs first."""
    if SIMULATED:
        return WarpTile(16, 16, 1, 1, 8), WarpTile(32, 32, 1, 2, 16)
    return WarpTile(128, 64, 4, 2, 16), WarpTile(128, 128, 4, 2, 8), WarpTile(64, 256, 2, 4, 16)


def mma_variants() -> list[tuple[object, ...]]:
    """(stored, coordinates, sampled): what tensor cores compute."""
    kinds = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
    return [(*pair, True) for pair in kinds] + [(kind, kind, False) for kind in (F32, F16, BF16)]


@device
def copy_rows(source, first, pitch, buffer, start, thread, ROWS, PIECES, THREADS, V):
    """Begin to copy PIECES pieces of 16 bytes of each of ROWS rows of an array in memory to rows for `load_matrices`."""
    for k in range(ROWS * PIECES // THREADS):
        unit = thread + I32(k * THREADS)
        row, piece = unit // I32(PIECES), unit % I32(PIECES)
        copy_vector(source, first + row * pitch + piece * V, buffer, start + piece_at(row, piece, PIECES), True)


@device
def gather_columns(c, images, count, base, chunk, high, thread, places, image_index, raw, SLOTS, UNITS, THREADS, V):
    """Read what a chunk of columns is made of, for `count` pixels whose plans begin at `base`: 16 words for each of the UNITS pieces
    of a thread."""
    for k in range(UNITS):
        unit = thread + I32(k * THREADS)
        spot, channel = unit // I32(SLOTS), chunk + unit % I32(SLOTS) * V
        if spot < count and channel < high:
            start = (image_index[base + spot] * c.pixels + places[base + spot]) * c.pitch + channel
            gather_words(images, start, c.pitch, c.pitch * (c.p.in_size[1] + 1), raw, 16 * k)


@device
def store_columns(
    count, base, chunk, low, high, thread, fractions, raw, corners, values, packed, buffer, start, S, SLOTS, UNITS, THREADS, V,
    EACH, PITCH, T, SAMPLED,
):  # type: ignore[no-untyped-def] # fmt: skip
    """Make the columns of what was read, and store them, rounded: in rows of pixels, PITCH words apart, or, if that is 0, for
    `load_matrices`. They are 0 for pixels from `count` on and channels outside low to high."""
    for k in range(UNITS):
        unit = thread + I32(k * THREADS)
        spot, slot = unit // I32(SLOTS), unit % I32(SLOTS)
        channel = chunk + slot * V
        live = spot < count and channel < high
        if live:
            y, x, scale = fractions[0, base + spot], fractions[1, base + spot], fractions[2, base + spot]
        else:
            y, x, scale = S(0), S(0), S(0)
        for i in range(4):
            for corner in range(4):
                unpack(raw, 16 * k + 4 * corner + i, corners, corner * EACH, T)
            weigh(corners, y, x, scale, values, S, EACH, SAMPLED)
            for j in range(EACH):
                inside = live and low <= channel + i * EACH + j and channel + i * EACH + j < high
                values[j] = values[j] if inside else S(0)
            packed[i] = word(values[0], values[EACH - 1], T)
        if PITCH == 0:
            place = start + piece_at(spot, slot, SLOTS)
        else:
            place = start + spot * PITCH + slot * 4
        store_words(buffer, place, packed[0], packed[1], packed[2], packed[3])


@kernels(
    Call,
    lambda: [(*v, *tile) for v in mma_variants() for tile in warp_tiles()],
    lambda *constants: (32 * constants[5] * constants[6], 1),
)
def forward_mma(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):
    """y, as `forward_tiles`. The weights are packed in parts, as many channels of a group as share their offsets; the last rows are
    followed by COLUMNS more, which are read. What the next chunk needs is on its way while one is multiplied."""
    S, A, V, EACH = scalar_type(T), compute_type(T), vector_length(T), per_word(T)
    THREADS, CHUNK, SLOTS, CORNERS = 32 * DOWN * ACROSS, WORDS * EACH, WORDS // 4, 4 * EACH
    MINE_R, MINE_C, UNITS = ROWS // (16 * DOWN), COLUMNS // (8 * ACROSS), ROWS * SLOTS // THREADS
    RAW, RIGHT = 16 * UNITS, 2 * ROWS * WORDS
    BUFFER = max(RIGHT + 2 * COLUMNS * WORDS, 16 * DOWN * COLUMNS)

    def run(c):  # type: ignore[no-untyped-def] # length: the loops of one product, around one set of tiles
        buffer = cuda.shared.array(BUFFER, np.uint32, alignment=16)
        places = cuda.shared.array(ROWS, I32)
        image_index = cuda.shared.array(ROWS, I32)
        fractions = cuda.shared.array((3, ROWS), S)
        sums = cuda.local.array((MINE_R, MINE_C, 4), S)
        words = cuda.local.array((MINE_R, 4), np.uint32)
        raw = cuda.local.array(RAW, np.uint32)
        corners, values, packed = (
            cuda.local.array(CORNERS, S),
            cuda.local.array(EACH, S),
            cuda.local.array(4, np.uint32),
        )
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, bias, y, partial = view(c.weights, T), view(c.bias, T), view(c.y, T), view(c.sums, A)
        p = c.p
        thread = I32(cuda.threadIdx.x)
        lane, warp = thread % I32(32), thread // I32(32)
        row, column = warp // I32(ACROSS) * I32(16 * MINE_R), warp % I32(ACROSS) * I32(8 * MINE_C)
        total = p.batch * p.out_size[0] * p.out_size[1]
        outs, ins = I32(p.out_channels // p.groups), I32(p.in_channels // p.groups)
        shared, width = I32(p.in_channels // offset_groups_of(p)), I32(c.part_channels)
        wide = (outs + COLUMNS - 1) // COLUMNS
        tasks = (total + ROWS - 1) // ROWS * wide * p.groups
        for task in range(cuda.blockIdx.x, tasks * c.split_k, cuda.gridDim.x):
            split, mine = I32(task // tasks), task % tasks
            group, first_out = I32(mine % (wide * p.groups) // wide), I32(mine % wide * COLUMNS)
            first = mine // (wide * p.groups) * ROWS
            count = I32(min(ROWS, total - first))
            for i in range(MINE_R):
                for j in range(MINE_C):
                    for k in range(4):
                        sums[i, j, k] = S(0)
            half = I32(0)
            for tap in range(split * p.taps // c.split_k, (split + 1) * p.taps // c.split_k):
                for part in range(group * ins // width, (group + 1) * ins // width):
                    low = I32(part) * width
                    high, chunk, ready = low + width, low // I32(V) * I32(V), False
                    start = ((part * p.taps + tap) * outs + first_out) * c.depth - chunk
                    plan_tile(
                        c, first, total, tap, low // shared, offsets, mask, places, image_index, fractions, thread, S, SAMPLED, ROWS,
                        THREADS,
                    )  # fmt: skip
                    while ready or chunk < high:
                        wait_for_copies()
                        cuda.syncthreads()
                        other, more = I32(1) - half, chunk < high
                        if more:
                            copy_rows(
                                weights, start + chunk, c.depth, buffer, RIGHT + other * (COLUMNS * WORDS), thread, COLUMNS, SLOTS,
                                THREADS, V,
                            )  # fmt: skip
                            gather_columns(
                                c, images, count, 0, chunk, high, thread, places, image_index, raw, SLOTS, UNITS, THREADS, V
                            )  # fmt: skip
                        if ready:
                            multiply_matrices(
                                buffer, half * (ROWS * WORDS), row, RIGHT + half * (COLUMNS * WORDS), column, lane, words, sums,
                                MINE_R, MINE_C, WORDS, T,
                            )  # fmt: skip
                        if more:
                            store_columns(
                                count, 0, chunk, low, high, thread, fractions, raw, corners, values, packed, buffer,
                                other * (ROWS * WORDS), S, SLOTS, UNITS, THREADS, V, EACH, 0, T, SAMPLED,
                            )  # fmt: skip
                        half, ready, chunk = other, more, chunk + I32(CHUNK)
            cuda.syncthreads()
            write_mma(
                c, y, partial, bias, buffer, sums, 0, thread, split, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T
            )  # fmt: skip
            if MINE_R > 1:
                write_mma(
                    c, y, partial, bias, buffer, sums, 1, thread, split, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T
                )  # fmt: skip

    return run


@device
def write_mma(
    c, y, partial, bias, buffer, sums, i, thread, split, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T
):  # type: ignore[no-untyped-def]
    """Write the i-th 16 rows of each warp, by way of shared memory: pixels follow one another there. (Constant positions in
    `sums` keep it in registers.)"""
    lane, warp = thread % I32(32), thread // I32(32)
    for j in range(MINE_C):
        for k in range(4):
            pixel = warp // I32(ACROSS) * 16 + lane // 4 + k // 2 * 8
            out = (warp % I32(ACROSS) * MINE_C + j) * 8 + lane % 4 * 2 + k % 2
            buffer[out * 16 * DOWN + pixel] = bits(sums[i, j, k])
    cuda.syncthreads()
    p = c.p
    total, outs = p.batch * p.out_size[0] * p.out_size[1], p.out_channels // p.groups
    for unit in range(thread, I32(16 * DOWN * 8 * MINE_C * ACROSS), I32(32 * DOWN * ACROSS)):
        pixel, o = unit % I32(16 * DOWN), first_out + unit // I32(16 * DOWN)
        q = first + (pixel // 16 * MINE_R + i) * 16 + pixel % 16
        if q < total and o < outs:
            put_result(c, y, partial, bias, split, q, group * outs + o, from_bits(buffer[unit]), T)
    cuda.syncthreads()
