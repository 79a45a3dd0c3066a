"""What the harness needs from a library, and what numdcn's contenders share.

A library is imported only by its class's `start`, in the worker process of that contender.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np


class Unsupported(Exception):
    """The contender lacks the operator, or does not support these parameters."""


@functools.cache
def has_module(python: str, module: str) -> bool:
    """Whether another Python can find a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-I", "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Contender:
    """What the worker needs from a library."""

    module = ""  # must be importable
    package = ""  # reported version, if not under the module's name
    elsewhere = ""  # environment variable that may name another Python for this library
    directions: tuple[str, ...] = ("forward",)
    dtype = "float32"
    plain = False  # the undeformed operator: the floor, not a rival
    measurements: tuple[str, ...] = ("times", "memory", "start")  # measurements that include it

    def __init__(self, threads: int, spin: bool) -> None:
        self.threads, self.spin = threads, spin
        self.start()

    @classmethod
    def python(cls) -> str:
        """The interpreter that runs this contender."""
        return (os.environ.get(cls.elsewhere) if cls.elsewhere else None) or sys.executable

    @classmethod
    def installed(cls) -> bool:
        if cls.python() != sys.executable:
            return has_module(cls.python(), cls.module)
        try:
            found = importlib.util.find_spec(cls.module)
        except (ImportError, ValueError):
            return False
        return found is not None and found.origin is not None

    @classmethod
    def version(cls) -> str:
        try:
            return importlib.metadata.version(cls.package or cls.module)
        except importlib.metadata.PackageNotFoundError:
            return getattr(sys.modules.get(cls.module), "__version__", "of unknown version")

    def start(self) -> None:
        """Import the library and set its threads."""

    def load(self, case: Any, w: Any) -> None:
        """Create what an application creates once per layer. Raises Unsupported."""
        raise NotImplementedError

    def convert(self, inputs: Any) -> Any:
        """The inputs in the library's own layout; not timed."""
        return inputs

    def forward(self, given: Any) -> Any:
        raise NotImplementedError

    def backward(self, given: Any) -> Any:
        raise Unsupported

    def result(self, y: Any) -> np.ndarray:
        """The forward's y as a NumPy array, shaped like numdcn's; not timed."""
        return np.asarray(y)

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        """The backward's gradients as NumPy arrays, by the names of their arrays; not timed."""
        raise Unsupported

    def y_bytes(self) -> int:
        """Size of the array that load allocated for y; 0 if each call allocates its own."""
        return 0


class Call(NamedTuple):
    """The arguments of one call of numdcn."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    grad_y: np.ndarray | None

    def forward(self, function: Any) -> Any:
        return function(*self.positional, **self.keywords)

    def backward(self, function: Any) -> Any:
        return function(self.grad_y, *self.positional, **self.keywords)


class NumdcnOperator(Contender):
    """An operator of numdcn with newly allocated results; a subclass names it and provides its arguments."""

    module = "numdcn"
    directions: tuple[str, ...] = ("forward", "backward")
    operator = ""
    reuse = False

    def start(self) -> None:
        import numdcn

        self.numdcn = numdcn
        numdcn.set_num_threads(self.threads)

    def load(self, case: Any, w: Any) -> None:
        self.case, self.w = case, w
        try:
            self.functions = {d: getattr(self.numdcn, f"{self.operator}_{d}") for d in self.directions}
        except AttributeError as error:
            raise Unsupported(f"this numdcn has no {self.operator}") from error

    def arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments, the same for forward and backward."""
        raise NotImplementedError

    def convert(self, inputs: Any) -> Call:
        call = Call(*self.arguments(inputs), inputs.grad_y)
        if self.reuse:
            result = self.forward(call) if inputs.grad_y is None else self.backward(call)
            call.keywords["out"] = result
        return call

    def forward(self, given: Call) -> Any:
        return given.forward(self.functions["forward"])

    def backward(self, given: Call) -> Any:
        return given.backward(self.functions["backward"])

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        return {name: value for name, value in grads._asdict().items() if value is not None}


class Reuse(NumdcnOperator):
    """Placed before a subclass of NumdcnOperator: results are filled in place, as a training loop or an engine may
    do."""

    reuse = True
    measurements = ("times",)
