"""Calls numdcn on arrays of a GPU, or of Numba's simulator, for another process: `python -m device_server [seconds]`.

It reads pickled calls from standard input and writes pickled answers to standard output (device.py is the other end).
With NUMBA_ENABLE_CUDASIM=1 in its environment it uses the simulator. It is a separate process because that variable
affects a whole process, and because a GPU error can kill one.
"""

import importlib
import os
import pickle
import struct
import sys
import traceback

import ml_dtypes  # noqa: F401 - makes NumPy know bfloat16
import numpy as np
from device import Host, Returned, Sent, replaced


class OnDevice:
    """An array on a GPU with any strides: numdcn sees only its `__cuda_array_interface__`."""

    def __init__(self, buffer, start, sent):
        kind = np.dtype(sent.dtype)
        self.dtype, self.buffer = kind, buffer
        address = buffer.__cuda_array_interface__["data"][0] + start + sent.offset if buffer.size else 0
        self.interface = {
            "shape": sent.shape,
            "strides": sent.strides,
            "typestr": kind.str,
            "data": (address, not sent.writable),
            "version": 3,
        }

    @property
    def __cuda_array_interface__(self):
        return self.interface


class Parts:
    """The memory of a call: each part is a buffer on the device with the caller's address modulo 64."""

    def __init__(self, memory, simulated):
        from numba import cuda

        self.memory, self.simulated, self.buffers, self.starts = memory, simulated, [], []
        for address, content in memory:
            raw = np.zeros(len(content) + 128, np.uint8)
            base = raw.ctypes.data if simulated else 0  # GPU memory starts at multiples of 256
            start = (address - base) % 64
            raw[start : start + len(content)] = np.frombuffer(content, np.uint8)
            self.buffers.append(raw if simulated else cuda.to_device(raw))
            self.starts.append(start)

    def array(self, sent):
        if sent.part is None:
            buffer, start = np.zeros(128, np.uint8), 0
            buffer = buffer if self.simulated else self.buffers_of_nothing(buffer)
        else:
            buffer, start = self.buffers[sent.part], self.starts[sent.part]
        if not self.simulated:
            return OnDevice(buffer, start, sent)
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        view = np.ndarray(sent.shape, np.dtype(sent.dtype), buffer, start + sent.offset, sent.strides)
        view.flags.writeable = sent.writable
        return FakeCUDAArray(view)

    def buffers_of_nothing(self, buffer):
        from numba import cuda

        return cuda.to_device(buffer)

    def changed(self):
        """{number: content} of the parts whose content has changed."""
        new = {}
        for number, (buffer, start, (_, content)) in enumerate(
            zip(self.buffers, self.starts, self.memory, strict=True)
        ):
            host = buffer if self.simulated else buffer.copy_to_host()
            now = host[start : start + len(content)].tobytes()
            if now != content:
                new[number] = now
        return new


def on_host(value, kinds):
    """A NumPy array of a result."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray) or not isinstance(value, kinds):
        raise AssertionError(f"numdcn returned a {type(value).__name__}, expected an array like those that were given")
    return value.copy_to_host()


def answer(call):
    """("result", result, changed memory) or ("error", exception, changed memory, its traceback)."""
    import numba.cuda

    simulated = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
    module, name, arguments, keywords, memory = call
    function = getattr(importlib.import_module(module), name)
    parts = Parts(memory, simulated)
    given = []

    def unpacked(value):
        if isinstance(value, Sent):
            given.append((parts.array(value), value))
            return given[-1][0]
        return value.array if isinstance(value, Host) else value

    def packed(value):
        same = [number for number, (array, _) in enumerate(given) if array is value]
        return Returned(same[0]) if same else on_host(value, kinds)

    if simulated:
        kinds = sys.modules["numba.cuda.simulator.cudadrv.devicearray"].FakeCUDAArray
    else:
        kinds = numba.cuda.cudadrv.devicearray.DeviceNDArray
    try:
        if module != "numdcn":  # a test program: arrays stay NumPy's
            return "result", function(*arguments, **keywords), {}
        result = function(*replaced(arguments, unpacked), **replaced(keywords, unpacked))
        return "result", replaced(result, packed), parts.changed()
    except Exception as error:
        plain = type(error) if type(error).__module__ == "builtins" else RuntimeError
        return "error", plain(str(error)), parts.changed(), traceback.format_exc()


def main():
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        import simulated_blocks

        simulated_blocks.install()
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # anything printed goes to stderr
    while head := source.read(8):
        message = pickle.dumps(answer(pickle.loads(source.read(struct.unpack("<q", head)[0]))))
        target.write(struct.pack("<q", len(message)) + message)
        target.flush()


if __name__ == "__main__":
    main()
