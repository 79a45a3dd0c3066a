"""Sums of NumPy arrays over images and pixels, in a fixed order."""

from __future__ import annotations

import numpy as np

from numdcn._host.arrays import place
from numdcn._host.threads import launch, plan_threads
from numdcn._kernels.sums_cpu import FEW, LINE, LINES, MANY, SLOT_ELEMENTS, SumsCall, sum_spans

READ = 16.0  # multiply-adds of a product that reading an element takes as long as


def sum_pixels(values: np.ndarray, target: np.ndarray) -> None:
    """target (C,) = the sums of values (N, C, H, W), which is not empty: span by span, then of the spans likewise. The same
    bits wherever the elements lie."""
    images, channels, height, width = values.shape
    source, dtype, spans = place(values), values.dtype, -(-height * width // (LINES * LINE))
    parts, step = images * spans, MANY if source.strides[1] == 1 and channels > 1 else FEW
    sums = target if parts == 1 else np.empty((channels, parts), dtype)
    threads = plan_threads(parts * -(-channels // step), READ * values.size)
    room = np.empty((threads, SLOT_ELEMENTS), dtype)
    call = SumsCall(values.shape, spans, step, source, place(sums), room.ctypes.data, room.strides[0])
    launch(sum_spans, dtype.type(1), call, threads)
    if parts > 1:
        sum_pixels(sums.reshape(1, channels, 1, parts), target)
