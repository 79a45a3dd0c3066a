"""Kernels that reveal what the threads of a call do, for tests of the team."""

from typing import NamedTuple

from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import unpack
from numdcn._cpu.team import _add, _exchange, _pause, _read
from numdcn._formulas.jit import helper

PATIENCE = 2_000_000_000  # polls of a word: minutes


class Meeting(NamedTuple):
    """Parameters of `meet` and `leave_late`."""

    place: int  # address of int64s
    expected: int


@helper
def _wait_for(word, number):
    """1 once a word has reached this value, 0 if it does not."""
    looks = 0
    while _read(word) < number and looks < PATIENCE:
        _pause()
        looks += 1
    return int(_read(word) >= number)


@kernel
def meet(one, params, counter, slot):
    """Wait until the expected number of threads has arrived; word 0 counts them, word 1 those that met all others."""
    a = unpack(params, Meeting)
    _add(a.place, 1)
    _add(a.place + 8, _wait_for(a.place, a.expected))


@kernel
def leave_late(one, params, counter, slot):
    """The caller is done once a helper is in (word 0). The helper stays until word 1 is set; word 2 says that it has
    left."""
    a = unpack(params, Meeting)
    if slot == 0:
        _wait_for(a.place, 1)
        return
    _exchange(a.place, 1)
    _wait_for(a.place + 8, 1)
    _exchange(a.place + 16, 1)


@kernel
def fail(one, params, counter, slot):
    """A kernel that fails in a helper, or when it runs alone."""
    a = unpack(params, Meeting)
    _add(a.place, 1)
    _wait_for(a.place, a.expected)
    if slot == a.expected - 1:
        raise ZeroDivisionError
