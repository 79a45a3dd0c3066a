"""numdcn on a GPU, or in Numba's GPU simulator, called with NumPy arrays, through a server process (device_server.py).

What is sent is the memory in which the arrays lie, so strides, gaps and overlaps are preserved. After the call, changes
to that memory are copied back: `out` is filled, and writes to inputs become visible. An array that the call returns and
that was passed to it is the caller's own. Exceptions of the call are raised here.
"""

import atexit
import ctypes
import importlib.util
import os
import pickle
import struct
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
import pytest
from checks import ROOT, Backend, limit, python_path

SECONDS = limit(300)  # limit for a call


class Sent(NamedTuple):
    """An array within a part of a call's memory; strides and offset are in bytes."""

    part: int | None
    offset: int
    shape: tuple
    strides: tuple
    dtype: str
    writable: bool


class Memory(NamedTuple):
    """A part: its original address, and its bytes."""

    address: int
    content: bytes


class Returned(NamedTuple):
    """An array that was passed in, by its number."""

    number: int


class Host(NamedTuple):
    """A NumPy array that must remain one."""

    array: np.ndarray


OWN = (Sent, Returned, Host)


def replaced(value, change):
    """The same tuples, lists and dicts with change(leaf) for everything else; the tuples of this file count as
    leaves."""
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, change) for item in value]
    if isinstance(value, tuple) and not isinstance(value, OWN):
        items = [replaced(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return change(value)


def _reach(array):
    """The addresses of an array's first byte and just past its last."""
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    first = array.ctypes.data + sum(min(0, step) for step in steps)
    return first, first + sum(map(abs, steps)) + array.itemsize


class _Packing:
    """The arrays of a call, and where they lie within the parts of its memory."""

    def __init__(self):
        self.arrays = []

    def collect(self, value):
        if type(value) is np.ndarray and not value.dtype.hasobject:
            self.arrays.append(value)
        return value

    def pack(self):
        spans = []
        for low, high in sorted(_reach(a) for a in self.arrays if a.size):
            if spans and low < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], high)
            else:
                spans.append([low, high])
        self.spans = spans
        return [Memory(low, ctypes.string_at(low, high - low)) for low, high in spans]

    def sent(self, value):
        if type(value) is not np.ndarray or value.dtype.hasobject:
            return value
        kind = value.dtype.name if value.dtype.kind == "V" else value.dtype.str
        part, offset = None, 0
        if value.size:
            address = value.ctypes.data
            part = next(n for n, (low, high) in enumerate(self.spans) if low <= address < high)
            offset = address - self.spans[part][0]
        return Sent(part, offset, value.shape, value.strides, kind, value.flags.writeable)


class Server:
    """The process, started at the first call."""

    def __init__(self, simulated):
        self.simulated, self.process, self.lock = simulated, None, threading.Lock()

    def start(self):
        env = {**os.environ, "PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}
        env.pop("NUMBA_ENABLE_CUDASIM", None)
        if self.simulated:
            env["NUMBA_ENABLE_CUDASIM"] = "1"
        command = [sys.executable, "-m", "device_server"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT)
        atexit.register(self.stop)

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def call(self, module, name, arguments, keywords):
        """The result of a function of numdcn or of a test program; its exception is raised."""
        if self.process is None:
            self.start()
        packing = _Packing()
        memory = []
        if module == "numdcn":
            replaced((arguments, keywords), packing.collect)
            memory = packing.pack()
            arguments, keywords = replaced(arguments, packing.sent), replaced(keywords, packing.sent)
        kind, value, changed, *told = self._exchange((module, name, arguments, keywords, memory))
        for number, content in changed.items():
            ctypes.memmove(memory[number].address, content, len(content))
        if kind == "error":
            value.add_note(f"in the server:\n{told[0]}")
            raise value
        return replaced(value, lambda v: packing.arrays[v.number] if isinstance(v, Returned) else v)

    def _exchange(self, call):
        message, process = pickle.dumps(call), self.process
        late = threading.Timer(SECONDS, process.kill)
        late.start()
        try:
            process.stdin.write(struct.pack("<q", len(message)) + message)
            process.stdin.flush()
            head = process.stdout.read(8)
            if len(head) < 8:
                code, self.process = process.wait(), None
                raise RuntimeError(f"the server of the device ended with code {code}, after {SECONDS} s or by itself")
            return pickle.loads(process.stdout.read(struct.unpack("<q", head)[0]))
        finally:
            late.cancel()


SERVERS = {"cuda": Server(simulated=False), "simulator": Server(simulated=True)}


def on(kind, operator="deform_conv"):
    """The backend of an operator: "cuda" or "simulator"."""

    def function(direction):
        return lambda *arrays, **more: SERVERS[kind].call("numdcn", f"{operator}_{direction}", arrays, more)

    return Backend(kind, function("forward"), function("backward"), gpu=True)


def program(kind, module, name, *arguments):
    """The result of a function of a test module, run in the server."""
    return SERVERS[kind].call(module, name, arguments, {})


def missing(kind):
    """Why this kind is not available here; None if it is."""
    for package in ("numba_cuda", "ml_dtypes"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install -e .[test]"
    return "no GPU" if kind == "cuda" and not count_gpus() else None


def count_gpus():
    """How many GPUs the CUDA driver sees."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
    except OSError:
        return 0


def kinds():
    """The parameters of tests that run on a device. Those of a real GPU have the mark `cuda`, so that `-m cuda` selects what
    runs there and nothing else. A missing GPU is reported in the header of the test run, not as a skip."""
    return ["simulator", *[pytest.param("cuda", marks=pytest.mark.cuda)] * (count_gpus() > 0)]


KINDS = kinds()
