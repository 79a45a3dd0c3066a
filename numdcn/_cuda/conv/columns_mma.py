"""Columns for tensor cores: read while the previous ones are multiplied, then weighted, rounded and stored in shared
memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.conv.columns import fractions_of, plan_of, start_of, weigh
from numdcn._cuda.jit import BF16, F16, F32, SIMULATED, cuda, device, scalar_type
from numdcn._cuda.memory import unpack, vector_length
from numdcn._cuda.mma import WarpTile, per_word, piece_at, store_words, word
from numdcn._cuda.sample import gather_pairs, gather_words

I32 = np.int32
ATOM = 4  # channels that are never of two offset groups, if these are planned together


def warp_tiles() -> tuple[WarpTile, ...]:
    """The tiles of pixels and outputs, fewest outputs first."""
    if SIMULATED:
        return WarpTile(16, 16, 1, 1, 8), WarpTile(32, 32, 1, 2, 16)
    return WarpTile(128, 64, 4, 2, 16), WarpTile(128, 128, 4, 2, 8), WarpTile(64, 256, 2, 4, 16)


def mma_variants() -> list[tuple[object, ...]]:
    """(stored, coordinates, sampled): the variants computed on tensor cores."""
    pairs = [(F32, F32), (F16, F32), (BF16, F32)]
    return [(*pair, True) for pair in pairs] + [(dtype, dtype, False) for dtype in (F32, F16, BF16)]


class Span(NamedTuple):
    """`size` pixels of a tile, whose plans start at `base`; the remaining spots are zeros."""

    base: Any
    size: Any


class WordRoom(NamedTuple):
    """A thread's local memory for its vectors of channels of a chunk."""

    raw: Any  # (16*UNITS,) uint32: values of the four corners, unconverted
    corners: Any  # (4*EACH,): the numbers in one word of each corner
    values: Any  # (EACH,)
    packed: Any  # (4,) uint32: columns


def column_maker(T: Any, SAMPLED: bool, SPOTS: int, SLOTS: int, THREADS: int, PITCH: int = 0) -> tuple[Any, ...]:
    """Make, for chunks of SPOTS pixels times SLOTS vectors of channels, `new_room()`,
    `gather_columns(c, a, stage, span, chunk, segment, rank, room)` and
    `store_columns(stage, span, chunk, segment, rank, room, buffer, start)`.
    PITCH: words from pixel to pixel in shared memory; 0: rows as `load_matrices` expects them."""
    S, V, EACH = scalar_type(T), vector_length(T), per_word(T)
    UNITS = SPOTS * SLOTS // THREADS
    RAW, CORNERS = 16 * UNITS, 4 * EACH

    @device
    def new_room():
        raw, packed = cuda.local.array(RAW, np.uint32), cuda.local.array(4, np.uint32)
        return WordRoom(raw, cuda.local.array(CORNERS, S), cuda.local.array(EACH, S), packed)

    @device
    def gather_columns(c, a, stage, span, chunk, segment, rank, room):
        """Read the inputs of a chunk of columns: 16 words for each of a thread's UNITS vectors."""
        row_step, high = c.pitch * (c.p.in_size[1] + 1), segment.high
        for k in range(UNITS):
            unit = I32(rank + I32(k * THREADS))
            spot, channel = I32(unit // I32(SLOTS)), I32(chunk + unit % I32(SLOTS) * V)
            if spot < span.size and channel < high:
                planned = I32(span.base + spot)
                if EACH == 1 or not segment.mixed:
                    start = start_of(c, stage, planned, I32(plan_of(segment, channel) + planned)) + channel
                    gather_words(a.images, start, c.pitch, row_step, room.raw, 16 * k)
                else:
                    for i in range(0, V, ATOM):
                        own = I32(channel + i)
                        if segment.low <= own and own < high:
                            start = start_of(c, stage, planned, I32(plan_of(segment, own) + planned)) + own
                            gather_pairs(a.images, start, c.pitch, row_step, room.raw, 16 * k + i // EACH)

    @device
    def store_columns(stage, span, chunk, segment, rank, room, buffer, start):
        """Compute the columns from what was read, and store them, rounded, from word `start` on; zeros for pixels past
        the span and for channels outside the segment."""
        values, packed, low, high = room.values, room.packed, segment.low, segment.high
        for k in range(UNITS):
            unit = I32(rank + I32(k * THREADS))
            spot, slot = I32(unit // I32(SLOTS)), I32(unit % I32(SLOTS))
            channel, planned = I32(chunk + slot * I32(V)), I32(span.base + spot)
            live, y, x, scale = spot < span.size and channel < high, S(0), S(0), S(0)
            if live:
                plan = I32(plan_of(segment, I32(max(channel, segment.origin))) + planned)
                y, x, scale = fractions_of(stage, plan)
            for first in range(0, V, ATOM):
                own = I32(channel + first)
                inside = live and own < high and I32(own + ATOM) > low
                if first > 0 and inside and segment.mixed:
                    y, x, scale = fractions_of(stage, I32(plan_of(segment, own) + planned))
                for i in range(first // EACH, (first + ATOM) // EACH):
                    for corner in range(4):
                        unpack(room.raw, 16 * k + 4 * corner + i, room.corners, corner * EACH, T)
                    weigh(room.corners, y, x, scale, values, S, EACH, SAMPLED)
                    if segment.ragged:
                        for j in range(EACH):
                            one = I32(channel + i * EACH + j)
                            values[j] = values[j] if low <= one and one < high else S(0)
                    packed[i] = word(values[0], values[EACH - 1], T) if inside else np.uint32(0)
            if PITCH == 0:
                place = start + piece_at(spot, slot, SLOTS)
            else:
                place = start + spot * PITCH + slot * 4
            store_words(buffer, place, packed[0], packed[1], packed[2], packed[3])

    return new_room, gather_columns, store_columns
