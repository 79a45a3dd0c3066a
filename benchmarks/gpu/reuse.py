"""How many bytes of the corners come from L2: the L1 of one multiprocessor, simulated.

`python -m benchmarks.gpu.reuse` prints, for tiles of 128 output pixels in a row and of 8 x 16, the share of the corners' bytes
that a least-recently-used L1 of 192 KB (lines of 128 bytes, sectors of 32) does not have. Offsets are N(0, 2), channels
float32; a few tiles, far apart, are read tap by tap, sixteen channels at a time, as `forward_tiles` does.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np

from benchmarks.cases.layers import CASES
from benchmarks.rivals.layer import Case

SIZE, LINE, SECTOR, TILE, CHUNK, TILES = 192 * 1024, 128, 32, 128, 16, 3
ROWS = ("S1", "S2", "S3", "S5a", "S5b")


class L1:
    """Sectors by lines, least recently used first."""

    def __init__(self) -> None:
        self.lines: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.asked = self.missed = 0

    def read(self, sector: int) -> None:
        """Count a read of a sector, and of what is then missing."""
        line, bit = divmod(sector, LINE // SECTOR)
        found = self.lines.pop(line, 0)
        self.asked += 1
        self.missed += not found >> bit & 1
        self.lines[line] = found | 1 << bit
        if len(self.lines) > SIZE // LINE:
            self.lines.popitem(last=False)


def pixels(height: int, width: int, tall: int, wide: int) -> np.ndarray:
    """(row, column) of all output pixels, numbered by patches of tall x wide."""
    row, column = np.divmod(np.arange(height * width), width)
    order = np.lexsort((column, row, column // wide, row // tall))
    return np.stack([row[order], column[order]])


def sectors(case: Case, tile: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """The sectors that a tile reads, in order."""
    shared, step = case.c // case.offset_groups, SECTOR // 4
    for tap in range(9):
        offsets = rng.normal(0, 2, (case.offset_groups, 2, tile.shape[1]))
        y, x = (np.floor(tile[a] + (tap // 3, tap % 3)[a] - 1 + offsets[:, a]).astype(int) for a in (0, 1))
        for channel in range(0, case.c, CHUNK):
            for first in range(channel, channel + CHUNK, step):
                for corner in range(4):
                    for og in {first // shared, (first + step - 1) // shared}:
                        i, j = y[og] + corner // 2, x[og] + corner % 2
                        inside = (i >= 0) & (i < case.h) & (j >= 0) & (j < case.w)
                        yield from (((i * case.w + j) * case.c + first)[inside] // step).tolist()


def share(case: Case, tall: int, wide: int) -> float:
    """The share of the corners' bytes that L1 lacks."""
    cache, rng, order = L1(), np.random.default_rng(0), pixels(case.h, case.w, tall, wide)
    tiles = order.shape[1] // TILE
    for start in range(tiles // 3 * TILE, tiles * TILE, tiles // (2 * TILES) * TILE):
        for sector in sectors(case, order[:, start : start + TILE], rng):
            cache.read(sector)
    return cache.missed / cache.asked


if __name__ == "__main__":
    print("| row | 128 in a row | 8 x 16 |\n|---|---:|---:|")
    for name in ROWS:
        case = CASES[name]
        print(f"| {name} | {share(case, 1, case.w):.2f} | {share(case, 8, 16):.2f} |", flush=True)
