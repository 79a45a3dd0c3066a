"""Calls repeated: what a call launched for arrays of the same kind is launched again, with other addresses.

Most of a call's time on the host goes to sizes, choices and parameters, which depend on no address. So the first call of a
kind records what its `Workspace`s do: the scratch memory they take and the kernels they launch. The next one allocates,
puts its own addresses into the recorded parameters and launches. Of the same kind are calls of one function whose problem,
options and device are equal, and whose arrays have the same types, strides and alignment; the stream may be another. No
array is kept.

While a call is recorded, addresses are `Tagged`: they remember the array in which they lie. A parameter that lies in one of
the arrays and has lost its tag would be wrong in the next call; such a call is not repeated.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.device_array import DTYPES, DeviceArray
from numdcn._call.device_scratch import stream_key
from numdcn._call.driver import on_device
from numdcn._call.prepared import PreparedWeights
from numdcn._call.remembered import keep
from numdcn._cuda.coordinates import NARROW
from numdcn._cuda.jit import SIMULATED
from numdcn._cuda.launch import Launch

LINE = 256  # alignment of scratch memory, in bytes
ALIGNMENT = 16  # as far as kernels depend on it

_known: dict[Any, Recording | None] = {}  # None: not to be repeated
forced: bool | None = None  # whether two steps are forced or forbidden (`conv.two_step`), by benchmarks and tests


class Tagged(int):
    """An address that knows in which array it lies, and how many bytes after its start."""

    slot: int
    delta: int

    def __add__(self, other: int) -> int:
        if isinstance(other, Tagged):
            return int(self) + int(other)
        return tagged(int(self) + other, self.slot, self.delta + other)

    __radd__ = __add__


def tagged(address: int, slot: int, delta: int = 0) -> Tagged:
    """An address in an array."""
    made = Tagged(address)
    made.slot, made.delta = slot, delta
    return made


class Made(NamedTuple):
    """Scratch memory that a call takes, or, if there is a layout, prepared weights."""

    shape: tuple[int, ...]
    dtype: Any
    layout: tuple[Any, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of scratch memory, as whole lines."""
        return 0 if self.layout else -(-math.prod(self.shape) * self.dtype.itemsize // LINE) * LINE


class Recording:
    """What one call does. Its slots are first the caller's arrays, then scratch memory and packed weights in the order in
    which they are asked for."""

    def __init__(self, arrays: int, stream: int) -> None:
        self.arrays, self.stream, self.repeatable, self.first = arrays, stream, True, False
        self.made: list[Made] = []
        self.launches: list[Launch] = []
        self.spans: list[tuple[int, int]] = []  # of the memory that is known

    def array(self, array: DeviceArray, slot: int) -> DeviceArray:
        """An array whose address is tagged."""
        seen = array.view(array.shape, array.strides)
        steps = [(n - 1) * s * array.dtype.itemsize for n, s in zip(array.shape, array.strides, strict=True) if n > 1]
        low, high = sum(min(0, step) for step in steps), sum(max(0, step) for step in steps)
        self.spans.append((array.address + low, array.address + high + array.dtype.itemsize))
        seen.address = tagged(array.address, slot)
        return seen

    def scratch(self, made: DeviceArray) -> None:
        """Scratch memory was taken."""
        self.spans.append((made.address, made.end))
        made.address = tagged(made.address, self.arrays + len(self.made))
        self.made.append(Made(made.shape, made.dtype))

    def layout(self, layout: tuple[Any, ...], made: DeviceArray) -> int:
        """Packed weights are used."""
        self.spans.append((made.address, made.end))
        self.made.append(Made(made.shape, made.dtype, layout))
        return tagged(made.address, self.arrays + len(self.made) - 1)

    def launch(self, kernel: Any, call: tuple[Any, ...], blocks: int, threads: Any, stream: int) -> None:
        """A kernel is launched."""
        launch = Launch(kernel, blocks, threads, call)
        places = [value % NARROW for value in launch.plain]
        lost = any(low <= place < high for place in places for low, high in self.spans)
        self.repeatable = self.repeatable and not lost and stream == self.stream
        self.launches.append(launch)

    def finish(self) -> Recording | None:
        """What to keep."""
        self.spans = []
        sizes = [made.nbytes for made in self.made]
        self.offsets, self.nbytes = [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
        return self if self.repeatable else None

    def repeat(self, like: DeviceArray, leaves: list[Any]) -> bool:
        """Do it again with other arrays on the stream of one of them; False, and nothing done, if it cannot be."""
        starts = [0 if leaf is None else leaf.address for leaf in map(_array_of, leaves)]
        taken: list[DeviceArray] = []
        try:
            if not self._take(like, leaves, starts, taken):
                return False
            if SIMULATED:
                with np.errstate(all="ignore"):  # as in a `Workspace`
                    self._launch(like, starts)
            else:
                on_device(like.device, lambda: self._launch(like, starts))
        finally:
            for array in taken:
                like.framework.give_back(array)
        return True

    def _launch(self, like: DeviceArray, starts: list[int]) -> None:
        for launch in self.launches:
            launch.run(like.device, like.stream, starts)

    def _take(self, like: DeviceArray, leaves: list[Any], starts: list[int], taken: list[DeviceArray]) -> bool:
        """Append where what the call asks for starts: scratch memory, all in one block (in the simulator, which checks
        bounds, an array each), and prepared weights. False if these are not packed yet."""
        block = 0
        if self.nbytes and not SIMULATED:
            taken.append(like.framework.scratch((self.nbytes // 8,), DTYPES["int64"], like.device, like.stream))
            block = taken[0].address
        for made, offset in zip(self.made, self.offsets, strict=True):
            if made.layout:
                packed = _packed(made.layout, like, leaves)
                if packed is None:
                    return False
                starts.append(packed.address)
            elif SIMULATED:
                taken.append(like.framework.scratch(made.shape, made.dtype, like.device, like.stream))
                starts.append(taken[-1].address)
            else:
                starts.append(block + offset)
        return True


def _packed(layout: tuple[Any, ...], like: DeviceArray, leaves: list[Any]) -> DeviceArray | None:
    """The prepared weights of a call in a layout, for a stream."""
    weights = next(leaf for leaf in leaves if type(leaf) is PreparedWeights)
    return weights.layouts.get((*layout, *stream_key(like.stream)))


def _array_of(leaf: Any) -> DeviceArray | None:
    return leaf.array if type(leaf) is PreparedWeights else leaf


class _Current(threading.local):
    recording: Recording | None = None  # of the call that is being recorded in this thread


current = _Current()


def unrepeatable() -> None:
    """What is done now is not recorded, so a call like this one must do it anew."""
    if current.recording is not None:
        current.recording.repeatable = False


def only_now() -> None:
    """What is done now is done once, by the first call: it is a later one that is recorded."""
    if current.recording is not None:
        current.recording.first = True


def _kind(leaf: Any) -> Any:
    """What calls may depend on, of an array."""
    if leaf is None:
        return None
    if type(leaf) is PreparedWeights:
        return leaf.dtype, leaf.shape, leaf.groups
    return leaf.dtype, leaf.shape, leaf.strides, leaf.address % ALIGNMENT


def _issue(function: Any, p: Any, options: Any, like: DeviceArray, leaves: list[Any], run: Callable[..., None]) -> None:
    """Repeat what an earlier call of this kind did; or run(leaves) and record it."""
    key = (function, p, options, forced, like.device, like.framework, *map(_kind, leaves))
    known = _known.get(key, current)
    if isinstance(known, Recording) and current.recording is None and known.repeat(like, leaves):
        return
    if known is not current or current.recording is not None:
        run(leaves)
        return
    recording = current.recording = Recording(len(leaves), like.stream)
    try:
        run([_tagged_leaf(recording, leaf, slot) for slot, leaf in enumerate(leaves)])
    finally:
        current.recording = None
    if recording.first:
        return
    keep(_known, key, recording.finish())


def _tagged_leaf(recording: Recording, leaf: Any, slot: int) -> Any:
    if leaf is None:
        return None
    if type(leaf) is not PreparedWeights:
        return recording.array(leaf, slot)
    seen = PreparedWeights(recording.array(leaf.array, slot), leaf.groups)
    seen.layouts = leaf.layouts
    return seen


def forward(function: Callable[..., None]) -> Callable[..., None]:
    """The `forward` of a room, repeated where it can be. Everything that it issues must go through its `Workspace`, or
    be told by `unrepeatable`."""

    @functools.wraps(function)
    def call(p: Any, arrays: Any, y: DeviceArray, options: Any) -> None:
        def run(leaves: list[Any]) -> None:
            function(p, type(arrays)(*leaves[:-1]), leaves[-1], options)

        _issue(function, p, options, y, [*arrays, y], run)

    return call


def backward(function: Callable[..., None]) -> Callable[..., None]:
    """The same for the `backward` of a room."""

    @functools.wraps(function)
    def call(p: Any, grad_y: DeviceArray, arrays: Any, grads: Any, options: Any) -> None:
        kind, count = type(arrays), len(arrays)

        def run(leaves: list[Any]) -> None:
            function(p, leaves[0], kind(*leaves[1 : 1 + count]), kind(*leaves[1 + count :]), options)

        _issue(function, p, options, grad_y, [grad_y, *arrays, *grads], run)

    return call
