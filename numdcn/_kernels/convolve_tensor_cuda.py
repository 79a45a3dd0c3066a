"""The forward of convolutions on tensor cores: float16 and bfloat16, and float32 rounded to tf32."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._kernels.convolve_cuda import Call, offset_groups_of, plan, sample
from numdcn._kernels.jit_cuda import BF16, F16, F32, SIMULATED, cuda, device, kernels, scalar_type
from numdcn._kernels.memory_cuda import at, narrow, put, vector_length, view, widen
from numdcn._kernels.tensor_cuda import STEP, bits, from_bits, multiply_add, pair, per_word, word

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
        return (WarpTile(16, 8, 1, 1, 8),)
    return WarpTile(128, 64, 4, 2, 16), WarpTile(128, 128, 2, 4, 16), WarpTile(64, 256, 1, 8, 8)


def tensor_variants() -> list[tuple[object, ...]]:
    """(stored, coordinates, sampled): what tensor cores compute."""
    kinds = [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
    return [(*pair, True) for pair in kinds] + [(kind, kind, False) for kind in (F32, F16, BF16)]


@kernels(
    Call,
    lambda: [(*v, *tile) for v in tensor_variants() for tile in warp_tiles()],
    lambda *constants: (32 * constants[5] * constants[6], 1),
)
def forward_tensor(T, C, SAMPLED, ROWS, COLUMNS, DOWN, ACROSS, WORDS):  # type: ignore[no-untyped-def]
    """y, as `forward_tiles`. The weights are (groups, taps, outputs, channels) here."""
    S, V, EACH = scalar_type(T), vector_length(T), per_word(T)
    THREADS, CHUNK, PITCH = 32 * DOWN * ACROSS, WORDS * EACH, WORDS + 4
    MINE_R, MINE_C, SLOTS, CORNERS = ROWS // (16 * DOWN), COLUMNS // (8 * ACROSS), CHUNK // V, 4 * V
    RIGHT = 2 * ROWS * PITCH
    BUFFER = max(RIGHT + 2 * COLUMNS * PITCH, 16 * DOWN * COLUMNS)

    def run(c):  # type: ignore[no-untyped-def] # length: the loops of one product, around one set of tiles
        buffer = cuda.shared.array(BUFFER, np.uint32)
        places = cuda.shared.array(ROWS, I32)
        owners = cuda.shared.array(ROWS, I32)
        fractions = cuda.shared.array((3, ROWS), S)
        sums = cuda.local.array((MINE_R, MINE_C, 4), S)
        corners, values = cuda.local.array(CORNERS, S), cuda.local.array(V, S)
        images, offsets, mask = view(c.images, T), view(c.offsets, C), view(c.mask, T)
        weights, bias, y = view(c.weights, T), view(c.bias, T), view(c.y, T)
        p = c.p
        thread, below = I32(cuda.threadIdx.x), c.pitch * (p.in_size[1] + 1)
        lane, warp = thread % I32(32), thread // I32(32)
        row, column = warp // I32(ACROSS) * (16 * MINE_R) + lane // 4, warp % I32(ACROSS) * (8 * MINE_C) + lane // 4
        count = p.out_size[0] * p.out_size[1]
        total, outs, ins = p.batch * count, p.out_channels // p.groups, p.in_channels // p.groups
        shared = p.in_channels // offset_groups_of(p)
        wide = (outs + COLUMNS - 1) // COLUMNS
        for task in range(cuda.blockIdx.x, (total + ROWS - 1) // ROWS * wide * p.groups, cuda.gridDim.x):
            group, first_out = task % (wide * p.groups) // wide, task % wide * COLUMNS
            first = task // (wide * p.groups) * ROWS
            for i in range(MINE_R):
                for j in range(MINE_C):
                    for k in range(4):
                        sums[i, j, k] = S(0)
            half = I32(0)
            begin, end = group * ins, group * ins + ins
            for tap in range(p.taps):
                for og in range(begin // shared, (end - 1) // shared + 1):
                    for spot in range(thread, min(ROWS, total - first), THREADS):
                        place, fraction_y, fraction_x, scale, n = plan(
                            c, first + spot, tap, og, offsets, mask, S, SAMPLED
                        )
                        places[spot], owners[spot] = place, n
                        fractions[0, spot], fractions[1, spot], fractions[2, spot] = fraction_y, fraction_x, scale
                    cuda.syncthreads()
                    low, high = max(begin, og * shared), min(end, (og + 1) * shared)
                    for chunk in range(low // V * V, high, CHUNK):
                        for unit in range(thread, ROWS * SLOTS, THREADS):
                            spot, slot = unit // SLOTS, unit % SLOTS * V
                            for i in range(V):
                                values[i] = S(0)
                            if first + spot < total and chunk + slot < high:
                                start = (owners[spot] * c.pixels + places[spot]) * c.pitch + chunk + slot
                                sample(
                                    images, start, c.pitch, below, fractions[0, spot], fractions[1, spot], fractions[2, spot],
                                    corners, values, S, V, SAMPLED,
                                )  # fmt: skip
                                for i in range(V):
                                    channel = chunk + slot + i
                                    values[i] = values[i] if low <= channel and channel < high else S(0)
                            for i in range(0, V, EACH):
                                spot_word = (half * ROWS + spot) * PITCH + (slot + i) // EACH
                                buffer[spot_word] = word(values[i], values[i + EACH - 1], T)
                        for unit in range(thread, COLUMNS * WORDS, THREADS):
                            o, k = unit // WORDS, unit % WORDS
                            channel, both = chunk + k * EACH, np.uint32(0)
                            start = ((group * p.taps + tap) * outs + first_out + o) * ins + channel - begin
                            if first_out + o < outs and channel + EACH > low and channel < high:
                                first_weight, last_weight = T(0), T(0)
                                if low <= channel:
                                    first_weight = at(weights, start)
                                if channel + EACH <= high:
                                    last_weight = at(weights, start + EACH - 1)
                                if EACH == 2:
                                    both = pair(first_weight, last_weight)
                                else:
                                    both = word(widen(first_weight), S(0), T)
                            buffer[RIGHT + (half * COLUMNS + o) * PITCH + k] = both
                        cuda.syncthreads()
                        for step in range(0, WORDS, STEP):
                            for j in range(MINE_C):
                                b = RIGHT + (half * COLUMNS + column + 8 * j) * PITCH + step + lane % 4
                                b0, b1 = buffer[b], buffer[b + 4]
                                for i in range(MINE_R):
                                    a = (half * ROWS + row + 16 * i) * PITCH + step + lane % 4
                                    lower = a + 8 * PITCH
                                    multiply_add(
                                        buffer[a], buffer[lower], buffer[a + 4], buffer[lower + 4], b0, b1, sums, i, j, T
                                    )  # fmt: skip
                        half = I32(1) - half
            cuda.syncthreads()
            write_tensor(c, y, bias, buffer, sums, 0, thread, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T)
            if MINE_R > 1:
                write_tensor(
                    c, y, bias, buffer, sums, 1, thread, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T
                )
            if MINE_R > 2:
                write_tensor(
                    c, y, bias, buffer, sums, 2, thread, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T
                )
                write_tensor(
                    c, y, bias, buffer, sums, 3, thread, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T
                )

    return run


@device
def write_tensor(c, y, bias, buffer, sums, i, thread, first, group, first_out, MINE_R, MINE_C, DOWN, ACROSS, T):  # type: ignore[no-untyped-def]
    """Write the i-th 16 rows of each warp to y, by way of shared memory: pixels follow one another there. (Constant positions in
    `sums` keep it in registers.)"""
    lane, warp = thread % I32(32), thread // I32(32)
    for j in range(MINE_C):
        for k in range(4):
            pixel = warp // I32(ACROSS) * 16 + lane // 4 + k // 2 * 8
            out = (warp % I32(ACROSS) * MINE_C + j) * 8 + lane % 4 * 2 + k % 2
            buffer[out * 16 * DOWN + pixel] = bits(sums[i, j, k])
    cuda.syncthreads()
    p = c.p
    count, outs = p.out_size[0] * p.out_size[1], p.out_channels // p.groups
    for unit in range(thread, 16 * DOWN * 8 * MINE_C * ACROSS, 32 * DOWN * ACROSS):
        pixel, o = unit % (16 * DOWN), first_out + unit // (16 * DOWN)
        q = first + (pixel // 16 * MINE_R + i) * 16 + pixel % 16
        if q < p.batch * count and o < outs:
            out, n = group * outs + o, q // count
            result = from_bits(buffer[unit])
            if c.bias:
                result += widen(at(bias, out))
            put(y, (n * p.out_channels + out) * count + q - n * count, narrow(result, T))
    cuda.syncthreads()
