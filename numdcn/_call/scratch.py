"""Scratch memory, used by one call at a time and kept between calls up to a limit, because touching fresh memory for
the first time costs about half a millisecond per megabyte."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from numdcn._call.checks import integer

DEFAULT_LIMIT = (64 + 2 * (os.cpu_count() or 1)) * 2**20  # each thread has a workspace
_ALIGNMENT = 64


def _limit_from_environment() -> int:
    text = os.environ.get("NUMDCN_SCRATCH_LIMIT", "").strip()
    if not text:
        return DEFAULT_LIMIT
    if not text.isdecimal():
        raise ValueError(f"the environment variable NUMDCN_SCRATCH_LIMIT is {text!r}, expected a number of bytes")
    return int(text)


_limit = _limit_from_environment()


class _Buffer:
    """Memory, and the address at which its first cache line begins."""

    __slots__ = ("address", "memory", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self.nbytes = nbytes
        self.address = -(-self.memory.ctypes.data // _ALIGNMENT) * _ALIGNMENT


_kept: dict[int, _Buffer] = {}  # free buffers by id, the most recently used last
# No lock: a signal handler may call the library while this thread is in here. Each operation on the dict is atomic.


def set_scratch_limit(nbytes: int) -> None:
    """Set how many bytes of scratch memory are kept between calls (default 64 MiB and 2 MiB for each CPU;
    `NUMDCN_SCRATCH_LIMIT`).

    0 keeps nothing. Memory above the limit is freed at once. On GPUs as much again may be kept for arrays of
    `numba.cuda` (torch and CuPy have allocators of their own); there the next call frees what exceeds a new limit.

    Args:
        nbytes: limit in bytes.

    Raises:
        TypeError: `nbytes` is not an integer.
        ValueError: `nbytes` is negative.
    """
    global _limit
    limit = integer("nbytes", nbytes, 0, 2**63)
    _limit = limit
    _trim()


def get_scratch_limit() -> int:
    """The number of bytes of scratch memory that may be kept between calls."""
    return _limit


def kept_bytes() -> int:
    """The number of bytes kept now."""
    return sum(b.nbytes for b in list(_kept.values()))


def _trim() -> None:
    for key in list(_kept):
        if kept_bytes() <= _limit:
            return
        _kept.pop(key, None)


def _take(nbytes: int) -> _Buffer:
    """The smallest kept buffer that is large enough but not wastefully large, or a new one."""
    fitting = [(b.nbytes, key) for key, b in list(_kept.items()) if nbytes <= b.nbytes <= 2 * nbytes + 2**20]
    kept = _kept.pop(min(fitting)[1], None) if fitting else None
    return _Buffer(nbytes) if kept is None else kept


class Scratch:
    """Uninitialised buffers of the given sizes in bytes, aligned to cache lines, for the duration of a `with` block,
    which receives their addresses."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]

    def __enter__(self) -> list[int]:
        self.buffer = _take(sum(self.sizes) + _ALIGNMENT)
        addresses = accumulate(self.sizes, initial=self.buffer.address)
        return list(addresses)[:-1]  # drop the end address

    def array(self, address: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array at an address of one of the buffers, for the duration of the block."""
        memory = self.buffer.memory
        return np.ndarray(shape, dtype, memory, address - memory.ctypes.data)

    def __exit__(self, *error: object) -> None:
        buffer = self.__dict__.pop("buffer")  # keep no reference, so that it is freed at once unless kept below
        if buffer.nbytes <= _limit:
            _kept[id(buffer)] = buffer
            _trim()
