"""`python -m tools.ptx_emulator COMMAND ...` runs a command with the emulated GPU and returns its exit status; see
README.md."""

import os
import subprocess
import sys
import tempfile

from . import build


def environment(reports):
    folder = build.cache()
    paths = [str(build.driver(folder)), os.environ.get("LD_LIBRARY_PATH")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
        "NUMBA_CACHE_DIR": str(build.kernels(folder)),
        "PTX_EMULATOR_REPORTS": reports,
    }


def run(command, environment, reports):
    """Reports of all processes are printed here as they are made, even where pytest captures the output of its
    tests."""
    process = subprocess.Popen(command, env=environment)
    ended = False
    while not ended:
        try:
            process.wait(0.1)
            ended = True
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt:  # the command receives it too
            continue
        sys.stderr.write(reports.read())
        sys.stderr.flush()
    return process.returncode


def main():
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tools.ptx_emulator COMMAND ...")
    if reason := build.missing():
        sys.exit(reason)
    with tempfile.NamedTemporaryFile("r", prefix="ptx-emulator-") as reports:
        code = run(sys.argv[1:], environment(reports.name), reports)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
