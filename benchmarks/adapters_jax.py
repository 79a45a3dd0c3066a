"""What numdcn.adapters.jax adds to the plain call: python -m benchmarks.adapters_jax.

Least of many runs in microseconds, one thread, on an idle machine: a small image (16 channels of 32 x 32 to 32, kernel 3), with and
without gradients, and the layer S1 of the benchmarks, where the adapter is to add at most 1 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import numdcn

Call = Callable[[], Any]
SMALL = (1, 16, 32, 32), (1, 18, 32, 32), (32, 16, 3, 3), (32,)
S1 = (1, 128, 100, 152), (1, 18, 100, 152), (128, 128, 3, 3), (128,)
GOALS = {"jax.jit": (55.0, 215.0), "plain functions, jax.Array": (45.0, float("inf"))}


def arrays(shapes: tuple[tuple[int, ...], ...] = SMALL) -> list[np.ndarray]:
    """x, offsets, w and bias."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def plain(given: Any) -> tuple[Call, Call]:
    """The plain functions: forward alone, forward and backward."""
    ones = 0 * numdcn.deform_conv_forward(*given, padding=1) + 1

    def forward() -> Any:
        return numdcn.deform_conv_forward(*given, padding=1)

    def both() -> Any:
        return forward(), numdcn.deform_conv_backward(ones, *given, padding=1)

    return forward, both


def jitted(given: Any) -> tuple[Call, Call]:
    """The adapter: forward alone, forward and backward."""
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


def least(calls: list[Call], rounds: int, runs: int) -> list[float]:
    """The least time of each in microseconds; they take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            for _ in range(runs):
                start = time.perf_counter_ns()
                call()
                best[i] = min(best[i], (time.perf_counter_ns() - start) / 1000)
    return best


def rows() -> Iterator[tuple[str, Call, float, Call, float]]:
    """Name, forward, its goal, forward and backward, their goal."""
    import jax.numpy as jnp

    given = [jnp.asarray(array) for array in arrays()]
    for name, make in (("jax.jit", jitted), ("plain functions, jax.Array", plain)):
        one, two = GOALS[name]
        forward, both = make(given)
        yield name, forward, one, both, two


def main() -> None:
    """Print both tables."""
    import jax.numpy as jnp

    numdcn.set_num_threads(1)
    base, base_both = plain(arrays())
    ways = list(rows())
    found = least([base, base_both, *(call for row in ways for call in (row[1], row[3]))], 30, 60)
    print(f"{'us over the plain call':<30}{'no gradients':>14}{'goal':>6}{'forward + backward':>21}{'goal':>6}")
    print(f"{'(plain call, all of it)':<30}{found[0]:>14.1f}{'':>6}{found[1]:>21.1f}")
    for (name, _, one, _, two), forward, both in zip(ways, found[2::2], found[3::2]):
        print(f"{name:<30}{forward - found[0]:>14.1f}{one:>6.0f}{both - found[1]:>21.1f}{two:>6.0f}")
    large = arrays(S1)
    calls = [*plain(large), *jitted([jnp.asarray(array) for array in large])]
    one, two, jit_one, jit_two = least(calls, 15, 3)
    for name, before, after in (("forward", one, jit_one), ("forward and backward", two, jit_two)):
        print(f"S1, {name}: {before / 1000:.1f} ms, {100 * (after / before - 1):+.2f} %")


if __name__ == "__main__":
    main()
