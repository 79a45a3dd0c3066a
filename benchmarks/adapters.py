"""What an adapter adds to the plain call: python -m benchmarks.adapters [framework ...].

For each way to call the operator that everyone has, deformable convolution of one small image, the table shows the
microseconds over the plain functions on NumPy arrays, beside what the project aims at. The figure is the least of many
runs: the rest is the machine's noise. One thread, on an idle machine. For JAX there is also
the layer S1 of the benchmarks, where its adapter is to add at most 1 %.
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
SMALL = (1, 16, 32, 32), (1, 18, 32, 32), (32, 16, 3, 3), (32,)  # x, offsets, w, bias; padding 1
S1 = (1, 128, 100, 152), (1, 18, 100, 152), (128, 128, 3, 3), (128,)


class Row(NamedTuple):
    """A way to call an operator: without gradients, and forward and backward, each with what it may cost."""

    name: str
    forward: Call
    forward_goal: float  # microseconds
    both: Call
    both_goal: float


def arrays(shapes: tuple[tuple[int, ...], ...] = SMALL) -> tuple[np.ndarray, ...]:
    """x, offsets, w and bias."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def plain(given: Any) -> tuple[Call, Call]:
    """The plain functions: forward alone, forward and backward."""
    ones = 0 * numdcn.deform_conv_forward(*given, padding=1) + 1

    def forward() -> Any:
        return numdcn.deform_conv_forward(*given, padding=1)

    def both() -> Any:
        return forward(), numdcn.deform_conv_backward(ones, *given, padding=1)

    return forward, both


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


def jitted(given: Any) -> tuple[Call, Call]:
    """JAX's adapter, compiled: forward alone, forward and backward."""
    import jax

    from numdcn.adapters.jax import deform_conv

    def y(*given: Any) -> Any:
        return deform_conv(*given, padding=1)

    def gradients(ones: Any, *given: Any) -> Any:
        made, back = jax.vjp(y, *given)
        return made, back(ones)

    alone, together = jax.jit(y), jax.jit(gradients)
    ones = 0 * alone(*given) + 1
    return lambda: alone(*given).block_until_ready(), lambda: jax.block_until_ready(together(ones, *given))


def jax_rows() -> Iterator[Row]:
    """JAX: the adapter under jit, and the plain functions."""
    import jax.numpy as jnp

    given = [jnp.asarray(array) for array in arrays()]
    for name, make, goals in (("jax.jit", jitted, (55, 215)), ("plain, jax.Array", plain, (45, float("inf")))):
        forward, both = make(given)
        yield Row(name, forward, goals[0], both, goals[1])


def jax_at_s1() -> None:
    """Print what JAX's adapter adds to a large call."""
    import jax.numpy as jnp

    large = arrays(S1)
    calls = [*plain(large), *jitted([jnp.asarray(array) for array in large])]
    forward, both, jit_forward, jit_both = least(calls, 15, 3)
    for name, before, after in (("forward", forward, jit_forward), ("forward and backward", both, jit_both)):
        print(f"S1, {name}: {before / 1000:.1f} ms, {100 * (after / before - 1):+.2f} %")


FRAMEWORKS: dict[str, Callable[[], Iterator[Row]]] = {"torch": torch_rows, "jax": jax_rows}


def least(calls: list[Call], rounds: int = ROUNDS, runs: int = RUNS) -> list[float]:
    """The least time of each call in microseconds; they take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            for _ in range(runs):
                start = time.perf_counter_ns()
                call()
                best[i] = min(best[i], (time.perf_counter_ns() - start) / 1000)
    return best


def measure(rows: list[Row]) -> None:
    """Print the table of some ways to call."""
    for row in rows:
        row.forward()
        row.both()
    base, base_both, *times = least([*plain(arrays()), *(call for row in rows for call in (row.forward, row.both))])
    print(f"{'us over the plain call':<28}{'no gradients':>14}{'goal':>6}{'forward + backward':>21}{'goal':>6}")
    print(f"{'(plain call, all of it)':<28}{base:>14.1f}{'':>6}{base_both:>21.1f}")
    for row, one, two in zip(rows, times[::2], times[1::2], strict=True):
        print(f"{row.name:<28}{one - base:>14.1f}{row.forward_goal:>6}{two - base_both:>21.1f}{row.both_goal:>6}")


def main(names: list[str]) -> None:
    """Measure some frameworks; all by default."""
    unknown = set(names) - set(FRAMEWORKS)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; expected names among {', '.join(FRAMEWORKS)}")
    numdcn.set_num_threads(1)
    for name in names or FRAMEWORKS:
        measure(list(FRAMEWORKS[name]()))
        if name == "jax":
            jax_at_s1()


if __name__ == "__main__":
    main(sys.argv[1:])
