"""Scratch memory: taken by one call at a time, kept between calls up to a limit, because the first touch of fresh
memory costs about half a millisecond a megabyte.
"""

from __future__ import annotations

import os
import threading
from itertools import accumulate

import numpy as np

from numdcn._host.checks import integer

DEFAULT_LIMIT = 64 * 2**20
_ALIGNMENT = 64


def _limit_from_environment() -> int:
    text = os.environ.get("NUMDCN_SCRATCH_LIMIT", "").strip()
    if not text:
        return DEFAULT_LIMIT
    if not text.isdecimal():
        raise ValueError(f"the environment variable NUMDCN_SCRATCH_LIMIT is {text!r}, expected a number of bytes")
    return int(text)


_limit = _limit_from_environment()
_kept: list[np.ndarray] = []  # free buffers, the most recently used last
_lock = threading.Lock()


def set_scratch_limit(nbytes: int) -> None:
    """Set how many bytes of scratch memory are kept between calls (default 64 MiB; `NUMDCN_SCRATCH_LIMIT`).

    0 keeps nothing. Memory above the limit is given back at once.

    Raises `TypeError` or `ValueError` unless `nbytes` is a whole number of at least 0.
    """
    global _limit
    limit = integer("nbytes", nbytes, 0, 2**63)
    with _lock:
        _limit = limit
        _trim()


def get_scratch_limit() -> int:
    """The number of bytes of scratch memory that may be kept between calls."""
    return _limit


def kept_bytes() -> int:
    """The number of bytes that are kept now."""
    with _lock:
        return sum(b.nbytes for b in _kept)


def _trim() -> None:
    while sum(b.nbytes for b in _kept) > _limit:
        _kept.pop(0)


def _take(nbytes: int) -> np.ndarray:
    """The smallest kept buffer that is large enough and not wastefully so, or a fresh one."""
    with _lock:
        best = -1
        for i, buffer in enumerate(_kept):
            if nbytes <= buffer.nbytes <= 2 * nbytes + 2**20 and (best < 0 or buffer.nbytes < _kept[best].nbytes):
                best = i
        if best >= 0:
            return _kept.pop(best)
    return np.empty(nbytes, np.uint8)


class Scratch:
    """Buffers of given numbers of bytes, aligned to cache lines, for the time of a `with` block; it gives addresses."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]

    def __enter__(self) -> list[int]:
        self.buffer = _take(sum(self.sizes) + _ALIGNMENT)
        ends = accumulate(self.sizes, initial=-(-self.buffer.ctypes.data // _ALIGNMENT) * _ALIGNMENT)
        return list(ends)[:-1]

    def __exit__(self, *error: object) -> None:
        buffer = self.__dict__.pop("buffer")
        with _lock:
            if buffer.nbytes <= _limit:
                _kept.append(buffer)
                _trim()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
