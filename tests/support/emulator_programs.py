"""Programs for the GPU emulator: `python -m tools.ptx_emulator python tests/support/emulator_programs.py NAME`.

Compares numdcn with the naive reference, and prints JSON.
"""

import json
import os
import sys
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    kind: str
    tf32: bool
    tolerance: float  # relative to the largest value
    batch: int
    channels: int
    outputs: int
    groups: int
    offset_groups: int
    geometry: dict


CASES = {  # by kind of kernel: scalar, tensor cores; many: more than are planned at once
    "float32": Case("float32", False, 3e-6, 2, 48, 48, 2, 2, {"padding": 1}),
    "float16": Case("float16", False, 2e-3, 1, 32, 32, 2, 2, {"padding": 2, "dilation": 2}),
    "tf32": Case("float32", True, 2e-3, 1, 24, 72, 1, 3, {"padding": 1, "stride": 2}),
    "float32, many offset groups": Case("float32", False, 3e-6, 2, 48, 24, 1, 12, {"padding": 1}),
    "float16, many offset groups": Case("float16", False, 2e-3, 2, 48, 24, 1, 12, {"padding": 1}),
    "tf32, many offset groups": Case("float32", True, 2e-3, 1, 96, 24, 2, 12, {"padding": 1}),
    "depthwise": Case("float32", False, 3e-6, 2, 70, 140, 70, 2, {"padding": 1}),
    "few float16": Case("float16", False, 2e-3, 1, 35, 21, 7, 5, {"padding": 1}),
}


def problem(case):
    """Arguments of deform_conv_forward, and grad_y."""
    rng = np.random.default_rng(0)
    stride, padding, dilation = (case.geometry.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1)))
    height, width = ((size + 2 * padding - 2 * dilation - 1) // stride + 1 for size in (6, 9))
    shapes = {
        "x": (case.batch, case.channels, 6, 9),
        "offsets": (case.batch, 18 * case.offset_groups, height, width),
        "w": (case.outputs, case.channels // case.groups, 3, 3),
        "bias": (case.outputs,),
        "mask": (case.batch, 9 * case.offset_groups, height, width),
    }
    made = {name: rng.normal(size=shape).astype(case.kind) for name, shape in shapes.items()}
    return made, rng.normal(size=(case.batch, case.outputs, height, width)).astype(case.kind)


def comparison(name):
    """{result: largest difference from the naive reference, relative to the largest value}"""
    from naive import deform_conv as naive

    import numdcn
    from numdcn._call.numba_cuda import cuda  # patched for NumPy 2.5

    told, kept = {}, []  # kept: so that the second arrays are elsewhere

    def compare(what, got, want):
        for field, values in want.items():
            error = np.abs(got[field].copy_to_host().astype(float) - values).max() / np.abs(values).max()
            told[f"{what} {field}"] = float(error)

    case = CASES[name]
    arrays, grad_y = problem(case)
    exact = {key: array.astype(float) for key, array in arrays.items()}
    more = {**case.geometry, "allow_tf32": case.tf32}
    right = {"y": naive.forward(**exact, **case.geometry)}
    wanted = naive.backward(grad_y.astype(float), **exact, **case.geometry)._asdict()
    for time in ("first", "again"):  # the second time, with other arrays, launches are repeated
        device = {key: cuda.to_device(array) for key, array in arrays.items()}
        compare(f"{time} forward", {"y": numdcn.deform_conv_forward(**device, **more)}, right)
        for deterministic in (False, True):
            got = numdcn.deform_conv_backward(cuda.to_device(grad_y), **device, **more, deterministic=deterministic)
            compare(f"{time} backward {deterministic=}", got._asdict(), wanted)
        kept.append(device)
    return told


ALIVE = []  # Numba frees memory in whichever context is current, so none is freed


def on_devices(count=2, calls=4):
    """{device: largest difference from the CPU's results} of threads that call at the same time, each on a device and a
    stream of its own, with arrays of one kind; after the first calls launches are repeated."""
    import threading

    import numdcn
    from numdcn._call.numba_cuda import cuda

    case, told = CASES["depthwise"], {}
    arrays, _ = problem(case)

    def call(number):
        rng, errors = np.random.default_rng(number), []
        with cuda.gpus[number]:
            stream = cuda.stream()
            for i in range(calls):
                mine = {key: rng.permuted(array, axis=0 if i else -1) for key, array in arrays.items()}
                want = numdcn.deform_conv_forward(**mine, **case.geometry)
                there = {key: cuda.to_device(array, stream=stream) for key, array in mine.items()}
                with cuda.gpus[(number + i) % count]:  # another one may be current
                    y = numdcn.deform_conv_forward(**there, **case.geometry)
                ALIVE.append((there, y))
                errors.append(float(np.abs(y.copy_to_host(stream=stream) - want).max() / np.abs(want).max()))
                stream.synchronize()
        told[str(number)] = max(errors)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


if __name__ == "__main__":
    if sys.argv[1] == "devices":
        print(json.dumps(on_devices()), flush=True)
        os._exit(0)
    print(json.dumps(comparison(sys.argv[1])))
