"""What issuing a call costs the host: `python -m benchmarks.gpu.host`.

Runs on the emulated driver of `tools/ptx_emulator`, with kernels that do nothing, so without the time of a real driver
(typically 3 to 5 us per launch). Tensors are a stand-in for torch's that allocates at no cost. `--profile` prints where the
time of one case goes.
"""

from __future__ import annotations

import argparse
import cProfile
import math
import os
import pstats
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SIZE = (1, 16, 8, 8)  # of x; as many outputs
ROUNDS, CALLS = 40, 50
ROOM = 2**22  # bytes of memory from which tensors are allocated


class Device:
    """A torch.device."""

    index = 0


class Tensor:
    """A torch.Tensor on a GPU, as far as numdcn uses it."""

    is_cuda, is_cpu, is_meta, requires_grad, device = True, False, False, False, Device()

    def __init__(self, shape: tuple[int, ...], dtype: str, address: int) -> None:
        from numdcn._call.device_array import c_strides

        self.shape, self.dtype, self._address, self._strides = shape, dtype, address, c_strides(shape)

    def data_ptr(self) -> int:
        return self._address

    def stride(self) -> tuple[int, ...]:
        return self._strides


def stand_in(memory: Any) -> types.ModuleType:
    """The module torch, whose tensors lie in one block of device memory, one after another, again and again."""
    base, used = memory.__cuda_array_interface__["data"][0], 0

    def empty(shape: tuple[int, ...], dtype: str, device: str) -> Tensor:
        nonlocal used
        nbytes = 8 * math.prod(shape) + 512
        used = 0 if used + nbytes > ROOM else used
        made = Tensor(tuple(shape), dtype, base + used // 512 * 512)
        used += nbytes
        return made

    torch = types.ModuleType("torch")
    names = ("float16", "float32", "float64", "bfloat16", "int32", "int64")
    stream = types.SimpleNamespace(cuda_stream=0)
    more = {"cuda": types.SimpleNamespace(current_stream=lambda device: stream), "from_numpy": None}
    for name, value in {**{name: f"torch.{name}" for name in names}, **more, "Tensor": Tensor, "empty": empty}.items():
        setattr(torch, name, value)
    torch.autograd = types.SimpleNamespace(forward_ad=None)  # type: ignore[attr-defined]
    return torch


def shapes() -> dict[str, tuple[int, ...]]:
    """The arrays of a call of deform_conv with a 3 x 3 kernel and a mask."""
    n, c, h, w = SIZE
    return {"x": SIZE, "offsets": (n, 18, h, w), "w": (c, c, 3, 3), "bias": (c,), "mask": (n, 9, h, w)}


def cases(new: Callable[[tuple[int, ...]], Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, a call) of arrays that `new` makes."""
    import numdcn

    arrays = {name: new(shape) for name, shape in shapes().items()}
    y, grad_y = new(SIZE), new(SIZE)
    grads = numdcn.DeformConvGradients(**{name: new(shape) for name, shape in shapes().items()})
    prepared = {**arrays, "w": numdcn.prepare_weights(arrays["w"])}
    yield "forward", lambda: numdcn.deform_conv_forward(**arrays, padding=1)
    yield "forward, out=", lambda: numdcn.deform_conv_forward(**arrays, padding=1, out=y)
    yield "forward, prepared weights", lambda: numdcn.deform_conv_forward(**prepared, padding=1)
    yield "backward", lambda: numdcn.deform_conv_backward(grad_y, **arrays, padding=1)
    yield "backward, out=", lambda: numdcn.deform_conv_backward(grad_y, **arrays, padding=1, out=grads)


def all_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same with tensors, then with arrays of `numba.cuda`."""
    from numdcn._call.frameworks import numba_cuda

    cuda = numba_cuda()
    memory = cuda.device_array(ROOM, np.uint8)
    sys.modules["torch"] = torch = stand_in(memory)
    for name, call in cases(lambda shape: torch.empty(shape, "torch.float32", "cuda:0")):
        yield f"tensors, {name}", call
    for name, call in cases(lambda shape: cuda.to_device(np.ones(shape, np.float32))):
        yield f"numba.cuda, {name}", call


def seconds(call: Callable[[], Any]) -> float:
    """The least time of a call, of many rounds."""
    best = np.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best


def profile(call: Callable[[], Any]) -> None:
    """Print where the time of a thousand calls goes."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(1000):
        call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="", metavar="CASE", help="profile the case whose name begins so")
    parser.add_argument("--emulated", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.emulated:
        command = [
            sys.executable,
            "-m",
            "tools.ptx_emulator",
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.gpu.host",
        ]
        env = {**os.environ, "PTX_EMULATOR_NOOP": "1", "PYTHONPATH": str(ROOT), "NUMDCN_QUIET": "1"}
        return subprocess.run([*command, "--emulated", *sys.argv[1:]], cwd=ROOT, env=env).returncode
    for name, call in all_cases():
        if name.startswith(given.profile):
            call()
            if given.profile:
                profile(call)
                return 0
            print(f"{name:40} {1e6 * seconds(call):6.0f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
