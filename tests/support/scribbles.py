"""Calls whose arguments are written to by another thread at the same time: `python -m scribbles <operator> <array>`.

A program for test_changed_meanwhile.py, run in a separate process because an address computed from an unchecked number
kills it. The result of a call does not matter: it must return, or raise a ValueError.
"""

import sys
import threading
import time

import numpy as np

import numdcn

SECONDS = 1.5
N, C, H, W, R = 2, 4, 9, 8, 3000
WILD = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e6, 12345678.0, -16777216.0, -1.0, 4e9, 2.0**31, 1e4]


def arguments(operator):
    """The arrays by name in the order of the call, and the other arguments."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.random(shape, dtype=np.float32)

    x = draw(N, C, H, W)
    if operator == "bilinear_sample":
        return {"x": x, "points": 8 * draw(N, 2 * R, 2)}, {}
    if operator == "deform_conv":
        return {"x": x, "offsets": 4 * draw(N, 18, 41, 40), "w": draw(4, 4, 3, 3)}, {"padding": (17, 17)}
    if operator == "dcnv3":
        return {"x": draw(N, 30, 31, C), "offsets": 8 * draw(N, 30, 31, 18), "mask": draw(N, 30, 31, 9)}, {
            "padding": (1, 1)
        }
    boxes = {"x": x, "rois": np.concatenate([rng.integers(0, N, (R, 1)), 8 * draw(R, 4)], axis=1, dtype=np.float32)}
    size = {"output_size": (2, 2)}
    if operator == "deform_roi_pool":
        return {**boxes, "offsets": draw(R, 2, 2, 2)}, size
    if operator == "deform_ps_roi_pool":
        return {**boxes, "trans": draw(R, 2, 2, 2)}, {**size, "group_size": 2}
    return boxes, size


class Scribbler(threading.Thread):
    """Writes to an array, alternating between all kinds of numbers and the right ones, until told to stop."""

    def __init__(self, array, wild):
        super().__init__(daemon=True)
        self.array, self.right, self.wild, self.done = array, array.copy(), wild, False

    def run(self):
        rng = np.random.default_rng(1)
        while not self.done:
            self.array[...] = rng.choice(self.wild, self.array.shape[1:])
            time.sleep(0)
            self.array[...] = self.right
            time.sleep(rng.random() * 1e-4)


def main(operator, name):
    sys.setswitchinterval(1e-6)
    arrays, more = arguments(operator)
    forward, backward = (getattr(numdcn, f"{operator}_{way}") for way in ("forward", "backward"))
    wild = np.array(WILD, np.float32)
    if name == "argmax":
        y, argmax = forward(*arrays.values(), **more, return_argmax=True)
        saved = {"argmax": argmax}
        wild = np.array([-2, -(2**31), 2**31 - 1, H * W, 10**8], np.int32)
    else:
        y, saved = forward(*arrays.values(), **more), {}
    grad_y = np.ones_like(y)
    backward(grad_y, *arrays.values(), **more, **saved)
    scribbler, counts = Scribbler({**arrays, **saved}[name], wild), {"returned": 0, "refused": 0}
    scribbler.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for call in (
            lambda: forward(*arrays.values(), **more),
            lambda: backward(grad_y, *arrays.values(), **more, **saved),
        ):
            try:
                call()
                counts["returned"] += 1
            except ValueError as error:
                assert f"`{name}`" in str(error), error
                counts["refused"] += 1
    scribbler.done = True
    scribbler.join()
    print(counts, "and no crash")


if __name__ == "__main__":
    main(*sys.argv[1:])
