"""The modulated layer, in which a convolution predicts offsets and mask: against torch's and torchvision's.

Every backward gets the offsets and the mask of its forward. x and the predicting weights are multiples of powers of
two, few enough that the offsets are exact in float32 and half a unit away from every integer, so that no contender's
rounding moves a sample to another cell.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import layers
from benchmarks.cases.interface import Operator, Target, generator, normal, relative_error
from benchmarks.rivals.contender import Call, NumdcnOperator
from benchmarks.rivals.frameworks import Torchvision, check_columns
from benchmarks.rivals.layer import Case, Inputs

LARGEST = 11  # largest predicting weight, in their unit


class Weights(NamedTuple):
    """The parameters of the layer."""

    w: np.ndarray  # (c_out, c, kernel, kernel)
    offset_w: np.ndarray  # (3*taps, c, kernel, kernel)
    offset_b: np.ndarray  # (3*taps,)
    bias: np.ndarray  # (c_out,)


class Numdcn(NumdcnOperator):
    """numdcn with newly allocated results."""

    operator = "deform_conv_layer"

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        case = self.case
        geometry = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
        return (inputs.x, *self.w), {"modulated": True, **geometry}

    def convert(self, inputs: Inputs) -> Call:
        call = super().convert(inputs)
        if inputs.grad_y is not None:
            _, offsets, mask = self.forward(call)
            call.keywords.update(offsets=offsets, mask=mask)
        return call

    def result(self, y: Any) -> np.ndarray:
        return y.y


class TorchLayer(Torchvision):
    """torch's conv2d and torchvision's deform_conv2d, combined as users of torchvision write the layer, without
    autograd."""

    def load(self, case: Case, w: Weights) -> None:
        check_columns(case)
        self.case = case
        self.tensors = [self.torch.from_numpy(a) for a in w]
        self.plain_geometry = [[case.stride] * 2, [case.padding] * 2, [case.dilation] * 2]
        geometry = [size for size in (case.stride, case.padding, case.dilation) for _ in range(2)]
        self.parameters = [*geometry, case.groups, case.offset_groups, True]

    def predict(self, x: Any) -> tuple[Any, Any]:
        _, offset_w, offset_b, _ = self.tensors
        z = self.torch.conv2d(x, offset_w, offset_b, *self.plain_geometry)
        offsets, logits = z[:, : 2 * self.case.taps], z[:, 2 * self.case.taps :]
        return offsets, self.torch.sigmoid(logits)

    def convert(self, inputs: Inputs) -> Any:
        x = self.torch.from_numpy(inputs.x)
        return x if inputs.grad_y is None else (self.torch.from_numpy(inputs.grad_y), x, *self.predict(x))

    def forward(self, x: Any) -> Any:
        w, _, _, bias = self.tensors
        return self.ops.deform_conv2d(x, w, *self.predict(x), bias, *self.parameters)

    def backward(self, given: Any) -> dict[str, Any]:
        grad_y, x, offsets, mask = given
        w, offset_w, _, bias = self.tensors
        arrays = (grad_y, x, w, offsets, mask, bias)
        grad_x, grad_w, grad_offsets, grad_mask, grad_b = self.ops._deform_conv2d_backward(*arrays, *self.parameters)
        grad_z = self.torch.cat([grad_offsets, grad_mask * mask * (1 - mask)], 1)
        more, grad_offset_w, grad_offset_b = self.torch.ops.aten.convolution_backward(
            grad_z, x, offset_w, [len(offset_w)], *self.plain_geometry, False, [0, 0], 1, [True] * 3
        )
        grads = (grad_x + more, grad_w, grad_offset_w, grad_offset_b, grad_b)
        return dict(zip(("x", "w", "offset_w", "offset_b", "bias"), grads, strict=True))


def windows(case: Case, size: tuple[int, int]) -> Any:
    """(row of the kernel, column, slices of a padded image) for each tap of a plain convolution."""
    out_h, out_w = size
    for a, b in np.ndindex(case.kernel, case.kernel):
        rows = slice(a * case.dilation, a * case.dilation + case.stride * out_h, case.stride)
        yield a, b, rows, slice(b * case.dilation, b * case.dilation + case.stride * out_w, case.stride)


class DeformConvLayer(Operator):
    """The layers of the deformable convolution, predicting their own offsets and masks."""

    def make_weights(self, case: Case, dtype: str) -> Weights:
        rng = generator(case, 0)
        shape = 3 * case.taps, case.c, case.kernel, case.kernel
        whole = rng.integers(-LARGEST, LARGEST + 1, shape)
        spread = np.sqrt(np.mean(whole**2) * case.c * case.taps)
        unit = 2.0 ** np.round(np.log2(2 / spread))  # of the weights, for offsets of about 2 pixels
        offset_b = np.where(np.arange(3 * case.taps) < 2 * case.taps, unit / 16, 0.0)
        bias = normal(rng, (case.c_out,), dtype)
        return Weights(layers.make_weights(case, dtype), (whole * unit).astype(dtype), offset_b.astype(dtype), bias)

    def make_inputs(self, case: Case, seed: int, dtype: str, backward: bool) -> Inputs:
        rng = generator(case, seed)
        x = np.round(8 * normal(rng, case.shapes["x"], "float32")) / 8
        grad_y = normal(rng, case.shapes["y"], dtype) if backward else None
        return Inputs(x.astype(dtype, copy=False), np.empty(0, dtype), None, grad_y)

    def predicted(self, case: Case, inputs: Inputs, w: Weights) -> Inputs:
        """The inputs with offsets and mask, computed in float64."""
        x = np.pad(inputs.x.astype(np.float64), [(0, 0), (0, 0), *[(case.padding,) * 2] * 2])
        z = np.zeros((case.n, 3 * case.taps, *case.out_size)) + w.offset_b.astype(np.float64)[:, None, None]
        for a, b, rows, columns in windows(case, case.out_size):
            z += np.einsum(
                "oc,nchw->nohw", w.offset_w[:, :, a, b].astype(np.float64), x[:, :, rows, columns], optimize=True
            )
        offsets, mask = z[:, : 2 * case.taps], 1 / (1 + np.exp(-z[:, 2 * case.taps :]))
        return inputs._replace(offsets=offsets.astype(inputs.x.dtype), mask=mask)

    def forward_error(self, case: Case, inputs: Inputs, w: Weights, y: np.ndarray) -> float:
        if tuple(y.shape) != case.shapes["y"]:
            return float("inf")
        y = y - w.bias.astype(np.float64)[:, None, None]
        return layers.forward_error(case, self.predicted(case, inputs, w), w.w, y)

    def grad_prediction(self, case: Case, given: Inputs, w: np.ndarray) -> np.ndarray:
        """Gradient of the plain convolution's prediction, (n, 3*taps, out_h, out_w)."""
        samples = layers.Samples(case, given, w)
        i, j = (a.ravel() for a in np.indices(case.out_size))
        grad = np.empty((case.n, 3 * case.taps, i.size))
        for n, k in np.ndindex(case.n, case.taps):
            column = samples.w[:, :, k].T @ samples.grad_y[n].reshape(case.c_out, -1).astype(np.float64)
            mask = samples.mask_at(n, 0, k, i, j)
            value, *slopes = samples.values(n, np.arange(case.c), *samples.coordinates(n, 0, k, i, j))
            for axis in (0, 1):
                grad[n, 2 * k + axis] = mask * np.sum(column * slopes[axis], axis=0)
            grad[n, 2 * case.taps + k] = mask * (1 - mask) * np.sum(column * value, axis=0)
        return grad.reshape(case.n, 3 * case.taps, *case.out_size)

    def backward_errors(
        self, case: Case, inputs: Inputs, w: Weights, grads: dict[str, np.ndarray], names: tuple[str, ...]
    ) -> dict[str, float]:
        shapes = {"x": case.shapes["x"]} | {name: a.shape for name, a in w._asdict().items()}
        bad = [name for name in shapes if name not in grads or tuple(grads[name].shape) != shapes[name]]
        if bad or inputs.grad_y is None:
            return dict.fromkeys(bad, float("inf"))
        given, pad = self.predicted(case, inputs, w), case.padding
        grad_z = self.grad_prediction(case, given, w.w)
        x = np.pad(inputs.x.astype(np.float64), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
        grad_x, grad_w = np.zeros_like(x), np.zeros(w.offset_w.shape)
        for a, b, rows, columns in windows(case, case.out_size):
            grad_w[:, :, a, b] = np.einsum("nohw,nchw->oc", grad_z, x[:, :, rows, columns], optimize=True)
            share = np.einsum("oc,nohw->nchw", w.offset_w[:, :, a, b].astype(np.float64), grad_z, optimize=True)
            grad_x[:, :, rows, columns] += share
        errors = {
            "offset_w": relative_error(grads["offset_w"], grad_w),
            "offset_b": relative_error(grads["offset_b"], grad_z.sum((0, 2, 3))),
            "bias": relative_error(grads["bias"], inputs.grad_y.sum((0, 2, 3), dtype=np.float64)),
        }
        inner = {"x": grads["x"] - grad_x[:, :, pad : pad + case.h, pad : pad + case.w], "w": grads["w"]}
        return errors | layers.backward_errors(case, given, w.w, inner, ("x", "w"))

    def tiny(self, case: Case) -> Case:
        return layers.tiny(case)


OPERATOR = DeformConvLayer(
    "deform_conv_layer",
    "modulated; predicted offsets about N(0, 2)",
    [layers.CASES[name]._replace(mask=True) for name in ("S1", "S4", "S8")],
    {"numdcn": Numdcn, "torchvision": TorchLayer},
    (Target("forward", "fastest", 1),),
    memory_cases=("S1",),
    start_cases=("S4",),
)
