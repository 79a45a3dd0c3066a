"""A kernel that reveals how rows are divided into bands, for tests."""

from typing import NamedTuple

import numpy as np

from numdcn._cpu.bands import band_of
from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import unpack
from numdcn._cpu.simd import next_task, pointer, store


class BandsCall(NamedTuple):
    """Parameters of `all_bands`; addresses, but for the numbers."""

    spans: int
    count: int  # of spans
    image: int
    size: tuple[int, int]
    bands: int
    costs: int
    result: int  # of (bands, 2) int64


@kernel
def all_bands(one, params, counter, slot):
    """The first row and the end of each band."""
    a = unpack(params, BandsCall)
    while True:
        band = next_task(counter)
        if band >= a.bands:
            return
        first, end = band_of(a.spans, a.count, a.image, a.size, band, a.bands, a.costs)
        result = pointer(a.result, np.int64(0))
        store(result, 2 * band, first)
        store(result, 2 * band + 1, end)
