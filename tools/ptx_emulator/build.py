"""Builds the driver, in a folder named after the version of its sources."""

import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GCC = 12  # minimum version, for _Float16
NUMBA_CUDA = "numba-cuda[cu13]==0.30.*"  # linker.py patches a part of it


def missing():
    """What the emulator needs but cannot find; None if nothing is missing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator is for Linux on x86_64"
    for name in ("gcc", "g++"):
        if not shutil.which(name):
            return f"{name} is not installed"
        told = subprocess.run([name, "-dumpversion"], capture_output=True, text=True).stdout
        if int(told.split(".")[0] or 0) < GCC:
            return f"{name} is of version {told.strip()}, {GCC} is needed"
    if importlib.util.find_spec("numba_cuda") is None or headers() is None or not compiler():
        return f"numba-cuda, its compiler and cuda.h are not all installed: pip install '{NUMBA_CUDA}'"
    return None


def compiler():
    """Whether the libraries that numba-cuda needs to compile and link are present."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        return all(load_nvidia_dynamic_lib(library) for library in ("nvvm", "nvJitLink", "nvrtc"))
    except Exception:  # the type depends on how a library is missing
        return False


def headers():
    """The folder of cuda.h, or None."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:
        return None
    folder = find_nvidia_header_directory("cudart")
    return folder if folder and (pathlib.Path(folder) / "cuda.h").exists() else None


def version(folder, *more):
    """A hash of all sources in a folder, except those of tests."""
    told = hashlib.sha256(repr(more).encode())
    for path in sorted(set(folder.rglob("*")) - set((folder / "tests").rglob("*"))):
        if path.suffix in (".py", ".cpp", ".h"):
            told.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return told.hexdigest()[:16]


def cache():
    """The folder for everything that belongs to this version of the emulator."""
    usual = pathlib.Path(tempfile.gettempdir()) / f"ptx-emulator-{os.getuid()}"
    top = pathlib.Path(os.environ.get("PTX_EMULATOR_CACHE") or usual).absolute()
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    if top.stat().st_uid != os.getuid():  # code from there is executed
        raise PermissionError(f"{top} belongs to somebody else")
    folder = top / version(HERE, str(HERE), sys.executable)
    folder.mkdir(exist_ok=True)
    return folder


def kernels(folder):
    """A separate kernel cache for Numba, because code for a real GPU is not PTX."""
    return folder / "kernels"


def driver(folder):
    """The folder of libcuda.so.1, which is built if it does not exist."""
    target, translations = folder / "driver" / "libcuda.so.1", folder / "translations"
    for needed in (target.parent, translations):
        needed.mkdir(exist_ok=True)
    if target.exists():
        return target.parent
    places = {"ROOT": ROOT, "PYTHON": sys.executable, "LINKER": HERE / "linker.py", "TRANSLATIONS": translations}
    if any({"'", '"', "\\"} & {*str(place)} for place in places.values()):
        raise ValueError(f"a quote or backslash in one of {[*map(str, places.values())]}")
    made = target.with_suffix(f".{os.getpid()}")
    command = ["g++", "-O2", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{headers()}"]
    command += [f'-D{name}="{place}"' for name, place in places.items()]
    command += [*map(str, sorted((HERE / "driver").glob("*.cpp"))), "-o", str(made), "-Wl,-soname,libcuda.so.1"]
    subprocess.run(command, check=True)
    made.rename(target)  # atomic
    return target.parent
