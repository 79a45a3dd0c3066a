"""What the harness needs from an operator's file, and what these files share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.rivals.contender import Contender


class Target(NamedTuple):
    """A target speed for numdcn, with every number of threads."""

    direction: str
    against: str  # a contender, or "fastest": the fastest rival
    limit: float
    times_faster: bool = True  # their time / numdcn's >= limit; else numdcn's / theirs <= limit
    cases: tuple[str, ...] = ()  # all if empty


class Operator:
    """What the harness needs from an operator's file, which has one instance called OPERATOR.

    A case has a name, a text, the shapes of its arrays, including y, and the names of the differentiable ones. Inputs
    are a NamedTuple with grad_y, None for a forward, and with nbytes.
    """

    def __init__(
        self,
        name: str,
        inputs_text: str,  # description of the inputs, for the report
        cases: Iterable[Any],
        contenders: Mapping[str, type[Contender]],
        targets: tuple[Target, ...] = (),
        memory_cases: tuple[str, ...] = (),
        start_cases: tuple[str, ...] = (),
        compared: bool = True,  # whether contenders' full results are compared with each other
    ) -> None:
        self.name, self.inputs_text = name, inputs_text
        self.cases: dict[str, Any] = {case.name: case for case in cases}
        self.contenders, self.targets, self.compared = contenders, targets, compared
        self.memory_cases, self.start_cases = memory_cases, start_cases

    def contender_names(self) -> list[str]:
        return list(self.contenders)

    def contender(self, name: str) -> type[Contender]:
        return self.contenders[name]

    def rivals(self) -> list[str]:
        """The contenders other than numdcn and the floors."""
        names = self.contender_names()
        return [n for n in names if not n.startswith("numdcn") and not self.contender(n).plain]

    def make_weights(self, case: Any, dtype: str) -> Any:
        """The parameters of a layer, the same in every process; None if there are none."""
        return None

    def make_inputs(self, case: Any, seed: int, dtype: str, backward: bool) -> Any:
        raise NotImplementedError

    def forward_error(self, case: Any, inputs: Any, w: Any, y: np.ndarray) -> float:
        raise NotImplementedError

    def backward_errors(
        self, case: Any, inputs: Any, w: Any, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        raise NotImplementedError

    def plain(self, case: Any, inputs: Any) -> tuple[Any, Any, tuple[str, ...]]:
        """What a plain contender computes: the case, its inputs, and the arrays it differentiates."""
        return case, inputs, case.differentiable

    def tiny(self, case: Any) -> Any:
        """A small case like this one, for loading code."""
        raise NotImplementedError


def generator(case: Any, seed: int) -> np.random.Generator:
    """A random generator that depends only on the case's name and the seed."""
    return np.random.default_rng([*case.name.encode(), seed])


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """N(0, 1), drawn in float32 so that float64 gets the same numbers."""
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the root mean square of the expected values; infinite if got is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / (np.sqrt(np.mean(want**2)) + 1e-30))
