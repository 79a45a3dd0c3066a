"""Launching CUDA kernels at a cost of a few microseconds on the host.

Numba's own launcher types and converts every scalar of the argument in Python, a microsecond each, and enters a
context. Here all scalars are packed at once into memory kept together with the address of each, as the driver expects
them, and the context is only changed if it has to be. Numba compiles the kernel, or `_cache` reads it from disk; Numba
loads it.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator
from typing import Any

from numdcn._call import notice
from numdcn._call.driver import check, on_device
from numdcn._call.numba_cuda import SIMULATED, types

if not SIMULATED:
    from numdcn._call.numba_cuda import driver

PUT = struct.Struct("@q").pack_into
CODES = {types.int64: "q", types.float32: "f", types.float64: "d"}


def _scalars(argument: Any) -> Iterator[Any]:
    """The types of the scalars in a Numba type."""
    if isinstance(argument, types.BaseTuple):
        for item in argument:
            yield from _scalars(item)
    else:
        yield argument


def _flat(argument: Any, name: str) -> str:
    """The scalars of a tuple of this type, called `name`, as Python source for items of a tuple, with adjacent ones
    as a slice."""
    items, plain = [], [not isinstance(item, types.BaseTuple) for item in argument]
    i = 0
    while i < len(plain):
        end = next((j for j in range(i, len(plain)) if not plain[j]), len(plain))
        if end > i:
            items.append(f"*{name}[{i}:{end}]")
        if end < len(plain):
            items.append(_flat(argument[end], f"{name}[{end}]"))
        i = end + 1
    return ", ".join(items)


class _Room:
    """Memory for the parameters of one launch, and their addresses."""

    def __init__(self, size: int, offsets: list[int]) -> None:
        self.memory = ctypes.create_string_buffer(size)
        start = ctypes.addressof(self.memory)
        self.places = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
        self.address = ctypes.addressof(self.places)


class Kernel:
    """A kernel that takes one argument, a tuple of scalars and such tuples."""

    def __init__(self, dispatcher: Any, signature: tuple[Any, ...]) -> None:
        self.dispatcher, self._signature = dispatcher, signature
        codes = [CODES[scalar] for scalar in _scalars(signature[0])]
        self._packing = struct.Struct("@" + "".join(codes))
        ends = (struct.calcsize("@" + "".join(codes[: i + 1])) for i in range(len(codes)))
        self.offsets = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]
        self._flatten = eval(f"lambda c: ({_flat(signature[0], 'c')},)")  # only numbers and brackets
        self._handles: dict[int, Any] = {}  # by device
        self._rooms: list[_Room] = []  # free ones
        self._lock = threading.Lock()

    def run(self, blocks: int, threads: int | tuple[int, int], stream: int, device: int, call: tuple[Any, ...]) -> None:
        """Launch on a stream of a device, without waiting. Launch errors are raised."""
        if SIMULATED:
            self.dispatcher[blocks, threads](call)
            return
        on_device(device, lambda: self._launch(blocks, threads, stream, device, call))

    def _launch(
        self, blocks: int, threads: int | tuple[int, int], stream: int, device: int, call: tuple[Any, ...]
    ) -> None:
        handle = self.handle(device)
        across, down = threads if isinstance(threads, tuple) else (threads, 1)
        try:
            room = self._rooms.pop()
        except IndexError:
            room = _Room(self._packing.size, self.offsets)
        self._packing.pack_into(room.memory, 0, *self._flatten(call))
        (error,) = driver.cuLaunchKernel(handle, blocks, 1, 1, across, down, 1, 0, stream, room.address, 0)
        self._rooms.append(room)
        check(error, "a kernel could not be launched")

    def flat(self, call: tuple[Any, ...]) -> tuple[Any, ...]:
        """The scalars of an argument."""
        return self._flatten(call)

    def room(self, call: tuple[Any, ...]) -> _Room:
        """Memory that holds an argument."""
        made = _Room(self._packing.size, self.offsets)
        self._packing.pack_into(made.memory, 0, *self._flatten(call))
        return made

    def handle(self, device: int) -> Any:
        """The kernel as the driver knows it on a device, which is current."""
        return self._handles.get(device) or self._load(device)

    def load(self, device: int) -> None:
        """Have the kernel on a device before its first launch: compiled, or read from the disk cache, and loaded."""
        on_device(device, lambda: self.handle(device))

    def _load(self, device: int) -> Any:
        """The kernel on a device: compiled, or read from the disk cache (`_cache`)."""
        with self._lock, notice.waiting("GPU", getattr(self.dispatcher, "_cache", None)):
            try:
                compiled = self.dispatcher.compile(self._signature)
                handle = self._handles[device] = compiled._codelibrary.get_cufunc().handle
            except Exception as error:
                if "OUTDATED_LIBRARY" in str(error):
                    raise RuntimeError(_outdated_linker()) from error
                raise
        return handle


class Launch:
    """A launch to be repeated, in which only addresses vary: those parameters that have a `slot` and a `delta` (see
    `replay`)."""

    def __init__(self, kernel: Kernel, blocks: int, threads: int | tuple[int, int], call: tuple[Any, ...]) -> None:
        self.kernel, self.blocks, self.threads, self.call = kernel, blocks, threads, call
        flat = kernel.flat(call)
        self.plain = [value for value in flat if not hasattr(value, "slot")]
        self._moving = [
            (place, value.slot, value.delta)
            for place, value in zip(kernel.offsets, flat, strict=True)
            if hasattr(value, "slot")
        ]
        self._rooms: list[_Room] = []  # free ones

    def run(self, device: int, stream: int, starts: list[int]) -> None:
        """Launch it, given where the arrays of all slots start; the device is current."""
        if SIMULATED:
            self.kernel.dispatcher[self.blocks, self.threads](_moved(self.call, starts))
            return
        across, down = self.threads if isinstance(self.threads, tuple) else (self.threads, 1)
        try:
            room = self._rooms.pop()
        except IndexError:
            room = self.kernel.room(self.call)
        memory = room.memory
        for place, slot, delta in self._moving:
            PUT(memory, place, starts[slot] + delta)
        handle = self.kernel.handle(device)
        (error,) = driver.cuLaunchKernel(handle, self.blocks, 1, 1, across, down, 1, 0, stream, room.address, 0)
        self._rooms.append(room)
        check(error, "a kernel could not be launched")


def _moved(value: Any, starts: list[int]) -> Any:
    """An argument with other addresses."""
    if isinstance(value, tuple):
        items = [_moved(item, starts) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return starts[value.slot] + value.delta if hasattr(value, "slot") else value


def _outdated_linker() -> str:
    """What to do when nvJitLink rejects the output of a newer libnvvm."""
    from cuda.bindings import nvjitlink
    from cuda.pathfinder import load_nvidia_dynamic_lib

    linker, compiler = (load_nvidia_dynamic_lib(name).abs_path for name in ("nvJitLink", "nvvm"))
    major, minor = nvjitlink.version()
    suffix, package = ("", "nvidia-nvvm") if major >= 13 else (f"-cu{major}", f"nvidia-cuda-nvcc-cu{major}")
    return (
        f"CUDA's linker, nvJitLink {major}.{minor} ({linker}), is older than its compiler, libnvvm ({compiler}), and refuses "
        f"what that has made; expected a linker at least as new. A newer one: pip install --upgrade nvidia-nvjitlink{suffix}. "
        f'Or an older compiler: pip install "{package}=={major}.{minor}.*"'
    )
