"""What an adapter adds to the plain call: python -m benchmarks.adapters [framework ...].

For each way to call the operator that everyone has, deformable convolution of one small image, the table shows the
microseconds over the plain functions on NumPy arrays, beside what the project aims at. The figure is the least of many
runs: the rest is the machine's noise. One thread, on an idle machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import numdcn

Call = Callable[[], Any]
ROUNDS, RUNS = 30, 60


class Row(NamedTuple):
    """A way to call an operator: without gradients, and forward and backward, each with what it may cost."""

    name: str
    forward: Call
    forward_goal: float  # microseconds
    both: Call
    both_goal: float


def arrays() -> tuple[np.ndarray, ...]:
    """x, offsets, w and bias: 16 channels of 32 x 32 pixels to 32, kernel 3, padding 1."""
    rng = np.random.default_rng(0)
    shapes = (1, 16, 32, 32), (1, 18, 32, 32), (32, 16, 3, 3), (32,)
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def torch_rows() -> Iterator[Row]:
    """PyTorch: eager and compiled."""
    import torch

    from numdcn.adapters.torch import deform_conv2d

    torch.set_num_threads(1)
    fixed = [torch.from_numpy(array) for array in arrays()]
    leaves = [tensor.clone().requires_grad_() for tensor in fixed]

    def function(x: Any, offsets: Any, w: Any, bias: Any) -> Any:
        return deform_conv2d(x, offsets, w, bias, padding=(1, 1))

    ones = torch.ones_like(function(*fixed))
    compiled = torch.compile(function, fullgraph=True)
    for name, call, goals in (("torch, eager", function, (25, 95)), ("torch.compile(fullgraph)", compiled, (70, 230))):

        def both(call: Any = call) -> Any:
            return torch.autograd.grad(call(*leaves), leaves, ones)

        def forward(call: Any = call) -> Any:
            return call(*fixed)

        yield Row(name, forward, goals[0], both, goals[1])


FRAMEWORKS: dict[str, Callable[[], Iterator[Row]]] = {"torch": torch_rows}


def least(calls: list[Call]) -> list[float]:
    """The least time of each call in microseconds; they take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for i, call in enumerate(calls):
            for _ in range(RUNS):
                start = time.perf_counter_ns()
                call()
                best[i] = min(best[i], (time.perf_counter_ns() - start) / 1000)
    return best


def measure(rows: list[Row]) -> None:
    """Print the table of some ways to call."""
    given = arrays()
    y = numdcn.deform_conv_forward(*given, padding=1)
    grad_y = np.ones_like(y)

    def forward() -> Any:
        return numdcn.deform_conv_forward(*given, padding=1)

    def both() -> Any:
        return forward(), numdcn.deform_conv_backward(grad_y, *given, padding=1)

    for row in rows:
        row.forward()
        row.both()
    plain, plain_both, *times = least([forward, both, *(call for row in rows for call in (row.forward, row.both))])
    print(f"{'us over the plain call':<28}{'no gradients':>14}{'goal':>6}{'forward + backward':>21}{'goal':>6}")
    print(f"{'(plain call, all of it)':<28}{plain:>14.1f}{'':>6}{plain_both:>21.1f}")
    for row, one, two in zip(rows, times[::2], times[1::2], strict=True):
        print(f"{row.name:<28}{one - plain:>14.1f}{row.forward_goal:>6}{two - plain_both:>21.1f}{row.both_goal:>6}")


def main(names: list[str]) -> None:
    """Measure some frameworks; all by default."""
    unknown = set(names) - set(FRAMEWORKS)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; expected names among {', '.join(FRAMEWORKS)}")
    numdcn.set_num_threads(1)
    for name in names or FRAMEWORKS:
        measure(list(FRAMEWORKS[name]()))


if __name__ == "__main__":
    main(sys.argv[1:])
