"""Deep-learning frameworks: forward and backward of their deformable convolution, and the plain one as the floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.rivals.contender import Contender, Unsupported
from benchmarks.rivals.layer import Case, Inputs

COLUMNS_LIMIT = 16e9  # bytes


def present(inputs: Inputs, convert: Callable[[np.ndarray], Any]) -> Any:
    """The inputs with each array that is present converted to a tensor."""
    return Inputs(*(None if a is None else convert(a) for a in inputs))  # type: ignore[arg-type]


class Paddle(Contender):
    """Paddle's deform_conv2d; its backward is that of a graph recorded beforehand, not timed."""

    module = "paddle"
    package = "paddlepaddle"
    directions = ("forward", "backward")

    def start(self) -> None:
        import paddle
        import paddle.vision.ops

        self.paddle = paddle
        paddle.set_device("cpu")

    def load(self, case: Any, w: Any) -> None:
        self.case = case
        self.w = self.paddle.to_tensor(w, stop_gradient=False)

    def convert(self, inputs: Any) -> Any:
        given = present(inputs, lambda a: self.paddle.to_tensor(a, stop_gradient=False))
        if inputs.grad_y is None:
            return given
        given.grad_y.stop_gradient = True
        with self.paddle.enable_grad():
            y = self.layer(given)
        wanted = {"x": given.x, "offsets": given.offsets, "mask": given.mask, "w": self.w}
        return y, given.grad_y, {name: a for name, a in wanted.items() if a is not None}

    def layer(self, given: Any) -> Any:
        case = self.case
        return self.paddle.vision.ops.deform_conv2d(
            given.x,
            given.offsets,
            self.w,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            deformable_groups=case.offset_groups,
            groups=case.groups,
            mask=given.mask,
        )

    def forward(self, given: Any) -> Any:
        with self.paddle.no_grad():
            return self.layer(given)

    def backward(self, given: Any) -> dict[str, Any]:
        y, grad_y, wanted = given
        grads = self.paddle.grad([y], list(wanted.values()), [grad_y], retain_graph=True)
        return dict(zip(wanted, grads, strict=True))

    def gradients(self, grads: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(a) for name, a in grads.items()}


class Torch(Contender):
    """Shared by the contenders built on torch."""

    directions = ("forward", "backward")

    def start(self) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(self.threads)
        torch.set_num_interop_threads(1)
        torch.set_grad_enabled(False)

    def result(self, y: Any) -> np.ndarray:
        return y.numpy()

    def gradients(self, grads: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: a.numpy() for name, a in grads.items()}


def check_columns(case: Case) -> None:
    """Unsupported if what torchvision keeps in memory at a time, the columns of up to 32 images, is too large."""
    images = next(n for n in range(min(32, case.n), 0, -1) if case.n % n == 0)
    height, width = case.out_size
    size = 4 * case.c * case.taps * images * height * width
    if size > COLUMNS_LIMIT:
        raise Unsupported(f"its column buffer of {size / 1e9:.1f} GB is larger than {COLUMNS_LIMIT / 1e9:.0f} GB")


class Torchvision(Torch):
    """torchvision's operators, called without autograd."""

    module = "torchvision"
    elsewhere = "NUMDCN_TORCHVISION_PYTHON"

    def start(self) -> None:
        super().start()
        import torchvision.ops

        if not torchvision.extension._has_ops():
            raise ImportError("torchvision has no compiled operators for this torch")
        self.ops = self.torch.ops.torchvision

    def load(self, case: Any, w: Any) -> None:
        check_columns(case)
        self.w = self.torch.from_numpy(w)
        self.bias = self.torch.zeros(case.c_out)
        geometry = [size for size in (case.stride, case.padding, case.dilation) for _ in range(2)]
        self.parameters = [*geometry, case.groups, case.offset_groups, case.mask]

    def convert(self, inputs: Any) -> Any:
        given = present(inputs, self.torch.from_numpy)
        return given if given.mask is not None else given._replace(mask=self.torch.zeros(len(inputs.x), 1))

    def forward(self, given: Any) -> Any:
        return self.ops.deform_conv2d(given.x, self.w, given.offsets, given.mask, self.bias, *self.parameters)

    def backward(self, given: Any) -> dict[str, Any]:
        grads = self.ops._deform_conv2d_backward(
            given.grad_y, given.x, self.w, given.offsets, given.mask, self.bias, *self.parameters
        )
        return dict(zip(("x", "w", "offsets", "mask", "bias"), grads, strict=True))


class TorchConv2d(Torch):
    """The floor: the plain convolution of the same layer, channels-last, by oneDNN."""

    module = "torch"
    plain = True

    def last(self, a: np.ndarray) -> Any:
        return self.torch.from_numpy(a).contiguous(memory_format=self.torch.channels_last)

    def load(self, case: Any, w: Any) -> None:
        self.w = self.last(w)
        self.geometry = [[case.stride] * 2, [case.padding] * 2, [case.dilation] * 2]
        self.groups = case.groups

    def convert(self, inputs: Any) -> Any:
        return self.last(inputs.x), None if inputs.grad_y is None else self.last(inputs.grad_y)

    def forward(self, given: Any) -> Any:
        return self.torch.conv2d(given[0], self.w, None, *self.geometry, self.groups)

    def backward(self, given: Any) -> dict[str, Any]:
        x, grad_y = given
        grads = self.torch.ops.aten.convolution_backward(
            grad_y, x, self.w, None, *self.geometry, False, [0, 0], self.groups, [True, True, False]
        )
        return {"x": grads[0], "w": grads[1]}
