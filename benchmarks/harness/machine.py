"""The machine on which results were measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

SIMD = (  # feature, as named by NumPy -> by the report; the first one present counts
    ("AVX512F", "AVX-512"),
    ("AVX2", "AVX2"),
    ("SSE42", "SSE4.2"),
    ("SVE", "SVE"),
    ("ASIMD", "NEON"),
    ("NEON", "NEON"),
)


def available_cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """The CPU's model name as reported by the system."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found_name = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if found_name:
            return found_name
    return platform.processor() or platform.machine() or "unknown CPU"


def cpu_family() -> str:
    """Family and model numbers, for when the name alone is vague, as on virtual machines."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(cpu family|model)\s*:\s*(\d+)$", text, re.MULTILINE))
    return f"family {found['cpu family']}, model {found['model']}" if len(found) == 2 else ""


def simd() -> str:
    """The widest vector instructions NumPy detects."""
    try:
        from numpy._core._multiarray_umath import __cpu_features__ as features
    except ImportError:
        return "unknown"
    return next((text for name, text in SIMD if features.get(name)), "none")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def describe() -> dict[str, str]:
    """CPU, cores, vector instructions, system, versions, and how busy the machine was."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    return {
        "cpu": cpu_name(),
        "cpu family": cpu_family(),
        "CPUs usable": f"{len(available_cpus())} of {os.cpu_count()}",
        "SIMD": simd(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
        "NumPy": version("numpy"),
        "Numba": version("numba"),
        "llvmlite": version("llvmlite"),
        "load average before": load,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def slug(name: str) -> str:
    """A CPU's name as a file name: 'Intel(R) Xeon(R) @ 2.30GHz' -> 'intel-xeon-2-30ghz'."""
    plain = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
