"""The libraries compared: what the worker asks of each, numdcn's own, and the list of all.

A library is imported only by its class's `start`, in the worker process of that contender alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from typing import Any

import numpy as np

from benchmarks.deform_conv import Case, Inputs


class Unsupported(Exception):
    """The contender has no such operator, or not with these parameters."""


class Contender:
    """What the worker asks of a library."""

    module = ""  # what must be importable
    package = ""  # whose version is reported, where not the module's name
    directions: tuple[str, ...] = ("forward",)
    dtype = "float32"
    plain = False  # a plain convolution, without offsets: the floor, not a rival

    def __init__(self, threads: int, spin: bool) -> None:
        self.threads, self.spin = threads, spin
        self.start()

    @classmethod
    def installed(cls) -> bool:
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

    def load(self, case: Case, w: np.ndarray) -> None:
        """Make what an application makes once per layer. Raises Unsupported."""
        raise NotImplementedError

    def convert(self, inputs: Inputs) -> Any:
        """The inputs in the library's own layout; not timed."""
        return inputs

    def forward(self, given: Any) -> Any:
        raise NotImplementedError

    def backward(self, given: Any) -> Any:
        raise Unsupported

    def result(self, y: Any) -> np.ndarray:
        """The forward's y as NumPy (n, c_out, out_h, out_w); not timed."""
        return np.asarray(y)

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        """The backward's gradients as NumPy, by the name of their arrays; not timed."""
        raise Unsupported

    def y_bytes(self) -> int:
        """Size of the array that load made for y; 0 if each call allocates its own."""
        return 0


class Numdcn(Contender):
    """numdcn with plain weights and fresh results."""

    module = "numdcn"
    directions: tuple[str, ...] = ("forward", "backward")

    def start(self) -> None:
        import numdcn

        self.numdcn = numdcn
        numdcn.set_num_threads(self.threads)

    def load(self, case: Case, w: np.ndarray) -> None:
        self.w = w
        self.geometry: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}

    def forward(self, given: Inputs) -> np.ndarray:
        return self.numdcn.deform_conv_forward(given.x, given.offsets, self.w, mask=given.mask, **self.geometry)

    def backward(self, given: Inputs) -> Any:
        assert given.grad_y is not None
        return self.numdcn.deform_conv_backward(
            given.grad_y, given.x, given.offsets, self.w, mask=given.mask, **self.geometry
        )

    def gradients(self, grads: Any) -> dict[str, np.ndarray]:
        return {name: value for name, value in grads._asdict().items() if value is not None}


class NumdcnPrepared(Numdcn):
    """numdcn with weights prepared once and y filled in place, as an inference engine works."""

    directions = ("forward",)

    def load(self, case: Case, w: np.ndarray) -> None:
        super().load(case, w)
        self.w = self.numdcn.prepare_weights(w, groups=case.groups)
        self.y = np.zeros(case.shapes["y"], w.dtype)
        self.y.fill(0)  # touches the pages

    def forward(self, given: Inputs) -> np.ndarray:
        x, offsets, mask, _ = given
        return self.numdcn.deform_conv_forward(x, offsets, self.w, mask=mask, out=self.y, **self.geometry)

    def y_bytes(self) -> int:
        return self.y.nbytes


class NumdcnFloat64(Numdcn):
    """numdcn in float64."""

    dtype = "float64"


# name in tables and on the command line -> module of this folder, class
CONTENDERS = {
    "numdcn": ("contenders", "Numdcn"),
    "numdcn-prepared": ("contenders", "NumdcnPrepared"),
    "numdcn-float64": ("contenders", "NumdcnFloat64"),
    "onnxruntime": ("engines", "OnnxRuntime"),
    "openvino": ("engines", "OpenVino"),
    "ncnn": ("engines", "Ncnn"),
    "paddle": ("frameworks", "Paddle"),
    "torchvision": ("frameworks", "Torchvision"),
    "conv2d": ("frameworks", "TorchConv2d"),
}
ENGINES = ("onnxruntime", "openvino", "ncnn")
FLOOR = "conv2d"


def contender_class(name: str) -> type[Contender]:
    """The class of a contender; imports this folder's module only, not the library."""
    module, attribute = CONTENDERS[name]
    return getattr(importlib.import_module(f"benchmarks.{module}"), attribute)
