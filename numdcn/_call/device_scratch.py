"""Scratch memory on a GPU for arrays whose framework does not cache any: used by one call at a time, kept between the
calls of a stream.

Allocating memory costs the driver tens of microseconds, and freeing it waits for the GPU. The next call on the same
stream may use what a call gives back at once, since a stream runs them one after the other.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from numdcn._call.scratch import get_scratch_limit


class Block(NamedTuple):
    """A block of device memory."""

    owner: Any  # keeps it alive
    address: int
    nbytes: int


PER_THREAD = 2  # handle of the per-thread default stream

_kept: dict[tuple[int, int, int], list[Block]] = {}  # by device and stream key, most recently used last
# No lock: each operation on a list is atomic, and a block is in one place at a time.


def take(device: int, stream: int, nbytes: int) -> Block | None:
    """The smallest kept block of a stream that is large enough but not wastefully large; None if there is none."""
    kept = _kept.get((device, *stream_key(stream)), [])
    fitting = [block for block in list(kept) if nbytes <= block.nbytes <= 2 * nbytes + 2**20]
    for block in sorted(fitting, key=lambda block: block.nbytes):
        try:
            kept.remove(block)
        except ValueError:  # another thread took it
            continue
        return block
    return None


def give_back(device: int, stream: int, block: Block) -> None:
    """Keep a block whose last use is already queued on the stream, if the limit allows."""
    _kept.setdefault((device, *stream_key(stream)), []).append(block)
    for kept in list(_kept.values()):  # including those of streams that no longer exist
        while kept and kept_bytes() > get_scratch_limit():
            try:
                kept.pop(0)
            except IndexError:
                break


def clear() -> bool:
    """Drop everything that is kept; returns whether there was anything."""
    blocks = [kept.pop() for kept in list(_kept.values()) for _ in list(kept) if kept]
    return bool(blocks)


def stream_key(stream: int) -> tuple[int, int]:
    """A key that identifies a stream."""
    return stream, threading.get_ident() if stream == PER_THREAD else 0


def kept_bytes() -> int:
    """The number of bytes kept now, on all devices and streams."""
    return sum(block.nbytes for kept in list(_kept.values()) for block in list(kept))
