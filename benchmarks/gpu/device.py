"""Arrays, times and names of one GPU, through torch if it sees one, else through numba.cuda, which may be its
simulator, or see an emulated GPU (tools/ptx_emulator)."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.problems import to_bfloat16
from benchmarks.harness.machine import version

EMULATOR = "PTX emulator"  # as the emulated GPU's name begins
NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16}


class NoGPU(Exception):
    """There is no usable GPU; says why."""


class Bits:
    """A bfloat16 array of numba.cuda, which lacks that type: its bits, labelled with that name."""

    dtype = "bfloat16"

    def __init__(self, bits: Any) -> None:
        self.bits = bits

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.bits.__cuda_array_interface__, "typestr": "|V2"}

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bits.shape)


def _torch() -> Any:
    """torch, if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch


class Device:
    """One GPU, or Numba's simulator of one. A simulated or emulated one reports no times and takes tiny problems."""

    def __init__(self, simulated: bool) -> None:
        if importlib.util.find_spec("numba_cuda") is None:
            from numdcn._call.install import install

            raise NoGPU(f"numba-cuda is not installed: {install('cuda')}")
        from numba import cuda

        self.cuda, self.simulator = cuda, simulated
        try:
            available = simulated or cuda.is_available()
        except Exception as error:  # a broken driver
            raise NoGPU(f"the CUDA driver does not answer: {error}") from None
        if not available:
            raise NoGPU("the CUDA driver sees none, or there is no driver")
        self.simulated = simulated or self._numba_name().startswith(EMULATOR)
        self.torch = _torch()
        self.on_torch = bool(not self.simulated and self.torch is not None and self.torch.cuda.is_available())
        self.place = "cuda" if self.on_torch else "cpu"  # of torch's operators; the CPU in a simulation
        if self.torch is not None:
            self.torch.set_grad_enabled(False)

    @property
    def name(self) -> str:
        if self.simulator:
            return "simulator"
        if self.on_torch:
            return str(self.torch.cuda.get_device_name())
        return self._numba_name()

    def _numba_name(self) -> str:
        name = self.cuda.get_current_device().name
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def torch_runs(self) -> bool:
        """Whether torch's operators are available, here or, during a simulation, on the CPU."""
        return self.on_torch or (self.simulated and self.torch is not None)

    def dtypes(self) -> dict[str, str]:
        """The types that arrays can have here, each with a reason if it is not available."""
        bfloat16 = ""
        if self.simulator and importlib.util.find_spec("ml_dtypes") is None:
            bfloat16 = "in the simulator it needs ml_dtypes"
        return {"float32": "", "float64": "", "float16": "", "bfloat16": bfloat16}

    def put(self, values: np.ndarray | None, dtype: str) -> Any:
        """An array on the GPU with these numbers."""
        if values is None:
            return None
        if self.on_torch:
            return self.tensor(values, dtype)
        if dtype != "bfloat16":
            return self.cuda.to_device(np.ascontiguousarray(values, NUMPY[dtype]))
        if self.simulator:
            import ml_dtypes

            return self.cuda.to_device(np.ascontiguousarray(values).astype(ml_dtypes.bfloat16))
        bits = to_bfloat16(np.asarray(values, np.float32)).view(np.uint32) >> 16
        return Bits(self.cuda.to_device(bits.astype(np.uint16)))

    def tensor(self, values: np.ndarray, dtype: str) -> Any:
        """A torch tensor where torch's operators run."""
        wide = np.ascontiguousarray(values, np.float64 if dtype == "float64" else np.float32)
        return self.torch.from_numpy(wide).to(device=self.place, dtype=getattr(self.torch, dtype))

    def get(self, array: Any, dtype: str = "") -> np.ndarray:
        """The numbers of an array, float64 or float32. `dtype` identifies bfloat16 if the array cannot."""
        if self.torch is not None and isinstance(array, self.torch.Tensor):
            wide = array if array.dtype == self.torch.float64 else array.float()
            return np.asarray(wide.cpu().numpy())
        host = np.asarray(array.copy_to_host())
        if host.dtype == np.uint16 and dtype == "bfloat16":
            return (host.astype(np.uint32) << 16).view(np.float32)
        return host.astype(np.float64 if host.dtype == np.float64 else np.float32)

    def wait(self) -> None:
        """Wait until all work is done."""
        if self.on_torch:
            self.torch.cuda.synchronize()
        elif not self.simulator:
            self.cuda.synchronize()

    def free(self) -> None:
        """Release unused memory."""
        if self.on_torch:
            self.torch.cuda.empty_cache()

    def events(self) -> tuple[Any, Any]:
        if self.on_torch:
            return self.torch.cuda.Event(enable_timing=True), self.torch.cuda.Event(enable_timing=True)
        return self.cuda.event(timing=True), self.cuda.event(timing=True)

    def seconds(self, call: Callable[[], Any], runs: int, ahead: bool = False) -> float:
        """Seconds per run, from CUDA events around `runs` runs in a row; with `ahead`, the GPU is kept busy first, so
        that the host has issued them all before it starts."""
        if self.simulated:
            for _ in range(runs):
                call()
            return float("nan")
        first, last = self.events()
        if ahead and self.on_torch:
            self.torch.cuda._sleep(int(3e5 * runs + 1e6))
        first.record()
        for _ in range(runs):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / runs

    def issued(self, call: Callable[[], Any], runs: int) -> float:
        """Host seconds per run, without waiting for the GPU."""
        self.wait()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(runs):
                call()
            times.append((time.perf_counter() - start) / runs)
            self.wait()
        return statistics.median(times)

    def about(self) -> dict[str, str]:
        """Facts for the report."""
        rows = {"GPU": self.name}
        if not self.simulator:
            device = self.cuda.get_current_device()
            rows["compute capability"] = ".".join(map(str, device.compute_capability))
            rows["multiprocessors"] = str(device.MULTIPROCESSOR_COUNT)
        else:
            rows |= {name: version(name) for name in ("numba", "numba-cuda", "numpy", "torch", "torchvision")}
        if self.on_torch:
            rows["cuDNN"] = str(self.torch.backends.cudnn.version())
        return rows
