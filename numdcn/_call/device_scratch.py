"""Scratch memory on a GPU for arrays whose makers keep none: taken by one call at a time, kept between the calls of a stream.

To allocate memory costs the driver tens of microseconds, and to free it waits for the GPU. What a call gives back may be used by
the next call of the same stream at once, as the stream runs them one after the other.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from numdcn._call.scratch import get_scratch_limit


class Block(NamedTuple):
    """Memory of a device."""

    owner: Any  # keeps it alive
    address: int
    nbytes: int


PER_THREAD = 2  # the handle of a default stream that each thread has for itself

_kept: dict[tuple[int, int, int], list[Block]] = {}  # by device and stream, the most recently used last
# No lock: each step on a list is atomic, and a block is in one place at a time.


def take(device: int, stream: int, nbytes: int) -> Block | None:
    """The smallest kept block of a stream that is large enough and not wastefully so, if there is one."""
    kept = _kept.get((device, *stream_key(stream)), [])
    fitting = [block for block in list(kept) if nbytes <= block.nbytes <= 2 * nbytes + 2**20]
    for block in sorted(fitting, key=lambda block: block.nbytes):
        try:
            kept.remove(block)
        except ValueError:  # another thread has it
            continue
        return block
    return None


def give_back(device: int, stream: int, block: Block) -> None:
    """Keep a block whose use on the stream has been issued, if the limit allows."""
    _kept.setdefault((device, *stream_key(stream)), []).append(block)
    for kept in list(_kept.values()):  # those of streams that are gone, too
        while kept and kept_bytes() > get_scratch_limit():
            try:
                kept.pop(0)
            except IndexError:
                break


def clear() -> bool:
    """Keep nothing any more; whether something was kept."""
    blocks = [kept.pop() for kept in list(_kept.values()) for _ in list(kept) if kept]
    return bool(blocks)


def stream_key(stream: int) -> tuple[int, int]:
    """What tells a stream from all others."""
    return stream, threading.get_ident() if stream == PER_THREAD else 0


def kept_bytes() -> int:
    """The number of bytes that are kept now, on all devices and streams."""
    return sum(block.nbytes for kept in list(_kept.values()) for block in list(kept))
