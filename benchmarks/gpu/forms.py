"""deform_conv's two forms on a GPU, fused and in two steps: a switch between them, so that both are checked and timed, and
`two_step.choose` can be revised by what is measured. Nothing but this switch knows of it: callers have no choice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

FORMS = FUSED, TWO_STEPS = "fused", "two steps"


@contextlib.contextmanager
def form(device: Any, two_steps: bool | None, dtype: str = "") -> Iterator[None]:
    """Within, deform_conv takes two steps wherever it can, or never; None: as it chooses. Two steps in tf32 need torch's
    switch, which this sets for their time."""
    from numdcn._cuda import replay

    before, replay.forced = replay.forced, two_steps
    matmul = device.torch.backends.cuda.matmul if device.on_torch and two_steps and dtype == "tf32" else None
    allowed = None if matmul is None else matmul.allow_tf32
    try:
        if matmul is not None:
            matmul.allow_tf32 = True
        yield
    finally:
        replay.forced = before
        if matmul is not None:
            matmul.allow_tf32 = allowed


def takes_two_steps(call: Callable[[], Any]) -> bool:
    """Whether a call takes two steps; it is made."""
    from numdcn._cuda.conv import two_step

    taken, functions = [], (two_step.forward, two_step.backward)

    def noted(function: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            taken.append(function)
            function(*arguments)

        return run

    two_step.forward, two_step.backward = noted(functions[0]), noted(functions[1])
    try:
        call()
    finally:
        two_step.forward, two_step.backward = functions
    return bool(taken)


def other(device: Any, call: Callable[[], Any], dtype: str) -> tuple[str, Callable[[], Any]] | None:
    """(name, call) of the form that a call does not take; None if it cannot take another."""
    two_steps = not takes_two_steps(call)

    def run() -> Any:
        with form(device, two_steps, dtype):
            return call()

    if two_steps and not takes_two_steps(run):
        return None
    return TWO_STEPS if two_steps else FUSED, run
