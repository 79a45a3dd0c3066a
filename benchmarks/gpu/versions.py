"""The versions of everything between the driver and NumPy, and in words what of it does not go together."""

from __future__ import annotations

import importlib.util
import mmap
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.machine import version

Version = tuple[int, ...]
PACKAGES = ("numba", "numba-cuda", "llvmlite", "cuda-bindings", "cuda-core", "numpy", "torch", "torchvision", "cupy")
TESTS_NEED = {"pytest": "pytest", "hypothesis": "hypothesis", "ml_dtypes": "ml_dtypes"}


class Library(NamedTuple):
    """A library of CUDA: its version, empty if unknown, and its file."""

    version: Version = ()
    path: str = ""

    def __str__(self) -> str:
        return f"{dotted(self.version)} ({self.path})"


class Installed(NamedTuple):
    """What is installed."""

    driver: str  # its own version, such as 580.65
    cuda: Version  # the newest CUDA that the driver knows
    capability: Version
    nvvm: Library = Library()
    nvjitlink: Library = Library()
    nvrtc: Library = Library()
    capabilities: tuple[Version, ...] = ()  # that the compiler has code for
    torch: str = ""  # its version, "" if there is none
    torch_cuda: str = ""  # the CUDA it was built for, "" if for none
    torch_sees: bool = False  # whether torch finds the GPU

    def rows(self) -> dict[str, str]:
        """Facts for the report."""
        found = {
            "driver": self.driver or "unknown",
            "driver's CUDA": dotted(self.cuda),
            "libnvvm": str(self.nvvm),
            "nvJitLink": str(self.nvjitlink),
            "nvrtc": str(self.nvrtc),
        }
        found |= {name: version(name) for name in PACKAGES}
        return found | {"torch's CUDA": self.torch_cuda or "none"}


def dotted(numbers: Version) -> str:
    return ".".join(map(str, numbers)) or "unknown"


def misfits(found: Installed) -> list[str]:
    """What cannot work, in words, each with a way out."""
    told = []
    compiler, linker = found.nvvm, found.nvjitlink
    major = (linker.version or compiler.version or (13,))[0]
    suffix = "" if major >= 13 else f"-cu{major}"
    if compiler.version and linker.version and compiler.version[:2] > linker.version[:2]:
        package = "nvidia-nvvm" if major >= 13 else f"nvidia-cuda-nvcc{suffix}"
        told.append(
            f"The compiler, libnvvm {compiler}, is newer than the linker, nvJitLink {linker}, which refuses what such a compiler "
            "makes: ERROR_OUTDATED_LIBRARY. They go together if the linker is at least as new: pip install --upgrade "
            f'nvidia-nvjitlink{suffix}, or pip install "{package}=={dotted(linker.version[:2])}.*"'
        )
    if linker.version and found.cuda and linker.version[0] > found.cuda[0]:
        told.append(
            f"The linker, nvJitLink {linker}, makes machine code of CUDA {linker.version[0]}, and the driver is of CUDA "
            f"{dotted(found.cuda)}. They go together if the driver is of the same major version or newer: a newer driver, or "
            f'pip install "numba-cuda[cu{found.cuda[0]}]"'
        )
    if found.capabilities and found.capability and found.capability > max(found.capabilities):
        told.append(
            f"The compiler's newest GPU is of compute capability {dotted(max(found.capabilities))}, and this one is of "
            f"{dotted(found.capability)}: it needs a newer CUDA: pip install --upgrade nvidia-nvvm{suffix} "
            f"nvidia-nvjitlink{suffix} nvidia-cuda-nvrtc{suffix}"
        )
    return told


def notes(found: Installed) -> list[str]:
    """What will be left out, in words."""
    told = []
    if not found.torch:
        told.append("torch is not installed: nothing is compared with torchvision or cuDNN, and rates are nominal.")
    elif not found.torch_sees:
        why = f"for CUDA {found.torch_cuda}" if found.torch_cuda else "without CUDA"
        told.append(
            f"torch {found.torch} was built {why} and does not see this GPU, whose driver is of CUDA {dotted(found.cuda)}: nothing is "
            "compared with torchvision or cuDNN on it."
        )
    missing = [package for package, module in TESTS_NEED.items() if importlib.util.find_spec(module) is None]
    if missing:
        told.append(f"The tests need {', '.join(missing)}: pip install {' '.join(missing)}")
    return told


def installed(device: Any) -> Installed:
    """What is installed for a `Device` that is not Numba's simulator."""
    from cuda.bindings import nvjitlink, nvrtc

    gpu = device.cuda.get_current_device()
    torch = device.torch
    return Installed(
        driver_version(),
        driver_cuda(),
        tuple(gpu.compute_capability[:2]),
        _library("nvvm", compiler_version),
        _library("nvJitLink", lambda path: tuple(nvjitlink.version())),
        _library("nvrtc", lambda path: tuple(nvrtc.nvrtcVersion()[1:])),
        _capabilities(),
        "" if torch is None else torch.__version__,
        "" if torch is None else torch.version.cuda or "",
        device.on_torch,
    )


def _library(name: str, version_of: Any) -> Library:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        path = str(load_nvidia_dynamic_lib(name).abs_path)
        return Library(version_of(path), path)
    except Exception as error:  # the type depends on how a library is missing
        return Library((), f"not found: {str(error).splitlines()[0][:200]}")


def _capabilities() -> tuple[Version, ...]:
    from numba.cuda.cudadrv import nvrtc

    try:
        return tuple(tuple(found[:2]) for found in nvrtc.get_supported_ccs())
    except Exception:  # nvrtc is missing, which its own row tells
        return ()


def compiler_version(path: str) -> Version:
    """The CUDA version of a libnvvm, which only its text tells."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"Cuda compilation tools, release (\d+)\.(\d+)", content)
        return (int(found[1]), int(found[2])) if found else ()


def driver_cuda() -> Version:
    """The newest CUDA that the driver knows."""
    from cuda.bindings import driver

    error, number = driver.cuDriverGetVersion()
    return () if error else (number // 1000, number % 1000 // 10)


def driver_version() -> str:
    """The driver's own version, "" if it tells none."""
    told, file = "", Path("/proc/driver/nvidia/version")
    if file.exists():
        told = file.read_text(encoding="utf-8", errors="replace")
    else:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired):
            return ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", told)
    return found[0] if found else ""
