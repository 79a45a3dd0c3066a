"""One line in the log where a call compiles for longer than a second, so that nobody takes that for a hang.

It goes to the logger "numdcn" as a warning: Python writes that to stderr unless the application has configured logging.
`NUMDCN_QUIET=1` silences it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

PATIENCE = 1.0  # seconds

_waited: dict[str, float] = {}  # seconds of compiling in calls of each public function


def public_caller() -> str:
    """The public function whose call this is part of; "" if there is none."""
    name, frame = "", sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("numdcn.") and not module.startswith(("numdcn._", "numdcn.adapters.")):
            name = frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return name


def waited(caller: str, seconds: float, machine: str, cache: Any) -> None:
    """Add up the seconds that a public function's calls spent compiling, and say so once there are enough. `cache` is that of
    the kernel's dispatcher."""
    if not caller or not getattr(cache, "missed", True):
        return
    before = _waited.get(caller, 0.0)
    _waited[caller] = after = before + seconds
    if before < PATIENCE <= after and os.environ.get("NUMDCN_QUIET", "") in ("", "0"):
        kept = getattr(cache, "cache_path", None)
        how = (
            f"once: the code is kept in {kept}"
            if kept
            else "in every process: no folder to keep the code in is writable"
        )
        logging.getLogger("numdcn").warning("numdcn: compiling %s for this %s. This happens %s", caller, machine, how)


@contextlib.contextmanager
def waiting(machine: str, cache: Any) -> Iterator[None]:
    """Add the time spent in the block to the caller's compile time."""
    caller = public_caller()
    left = max(0.0, PATIENCE - _waited.get(caller, 0.0))
    timer = threading.Timer(left, waited, (caller, left, machine, cache))
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # a limit of the system
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
