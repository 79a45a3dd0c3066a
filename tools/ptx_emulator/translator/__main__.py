"""`python -m tools.ptx_emulator.translator IN.ptx OUT.so` leaves OUT.c and OUT.so, which the driver loads."""

import os
import pathlib
import subprocess
import sys

from .module import Module
from .syntax import Unsupported

HEADERS = pathlib.Path(__file__).resolve().parents[1] / "kernel"
# GCC must respect what PTX defines but C does not: unfused products and sums, wrap-around, memory of any type
FLAGS = ["-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-w", "-shared", "-fPIC"]


def main():
    source, target = map(pathlib.Path, sys.argv[1:3])
    try:
        made = Module(source.read_text()).c()
    except Unsupported as error:
        sys.exit(f"cannot translate {source}: {error}")
    path, temporary = target.with_suffix(f".{os.getpid()}.c"), target.with_suffix(f".{os.getpid()}.so")
    path.write_text(made)
    subprocess.run(["gcc", *FLAGS, f"-I{HEADERS}", str(path), "-o", str(temporary), "-lm"], check=True)
    path.rename(target.with_suffix(".c"))
    temporary.rename(target)  # atomic, as other processes may be looking for it


if __name__ == "__main__":
    main()
