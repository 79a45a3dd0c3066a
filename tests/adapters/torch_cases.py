"""Calls of every operator for the tests of the adapter for torch: its arrays by name, and its options."""

import functools
import inspect

import numpy as np
import torch

from numdcn.adapters import _operators
from numdcn.adapters.torch import _eager
from numdcn.adapters.torch._registered import REGISTERED
from numdcn.warm import _small_calls

NAMES = sorted(REGISTERED)
ROIS = [[0, 0.3, 0.6, 4.2, 3.1], [1, 1.1, 0.2, 4.7, 4.4], [0, 0.4, 0.9, 2.6, 4.1]]


def _conv(rng, batch):
    return {"x": (batch, 4, 5, 6), "w": (6, 2, 3, 2), "bias": (6,)}, {"padding": ((1, 2), (0, 1)), "stride": (2, 1)}


def _case(name, rng, batch):
    """Shapes or arrays by name, and options. Samples lie between pixels, where there is one slope."""
    conv, geometry = _conv(rng, batch)
    taps, size = 6, (3, 6)
    between = rng.uniform(0.1, 0.9, (batch, 4 * taps, *size))
    rois = np.array(ROIS)
    rois[:, 0] %= max(batch, 1)
    rois = rois[: len(ROIS) if batch else 0]
    boxes = {"x": (batch, 8, 6, 6), "rois": rois}
    bins = {"output_size": (2, 2)}
    layer = {"x": (batch, 4, 5, 6), "w": (6, 2, 3, 2), "offset_w": (3 * 2 * taps, 4, 3, 2)}
    return {
        "bilinear_sample": ({"x": (batch, 3, 5, 6), "points": rng.uniform(0.1, 0.9, (batch, 4, 3, 2)) + 2}, {}),
        "conv": (conv, geometry),
        "deform_conv": ({**conv, "offsets": between, "mask": (batch, 2 * taps, *size)}, geometry),
        "deform_conv_layer": (
            {**layer, "offset_b": (3 * 2 * taps,), "bias": (6,)}, {**geometry, "modulated": True, "mask_scale": 2},
        ),
        "deform_ps_roi_pool": ({**boxes, "trans": (len(rois), 4, 2, 2)}, {**bins, "group_size": 2, "sample_per_part": 2}),
        "deform_roi_pool": (
            {**boxes, "offsets": (len(rois), 2, 2, 2), "mask": (len(rois), 1, 2, 2)}, {**bins, "sampling_ratio": 2},
        ),
        "ps_roi_align": (boxes, {**bins, "spatial_scale": 0.9}),
        "ps_roi_pool": (boxes, bins),
        "roi_align": (boxes, {**bins, "aligned": True}),
        "roi_pool": (boxes, bins),
    }[name]  # fmt: skip


def case(name, dtype=np.float64, batch=2):
    """The arrays of a call in the operator's order, and its options in full."""
    operator, rng = _operators.operator(name), np.random.default_rng(3)
    try:
        arrays, options = _case(name, rng, batch)
    except KeyError:
        arrays, options = _newer(operator, rng, batch)
    made = []
    for key in operator.names:
        value = arrays.get(key)
        made.append(rng.standard_normal(value) if isinstance(value, tuple) else value)
    return [None if a is None else a.astype(dtype) for a in made], operator.full_options(options)


def _newer(operator, rng, batch):
    """Arrays and options for an operator that is newer than this file: its small call, made of other numbers."""
    given, keywords = _small_calls(np.dtype(np.float64))[operator.name]
    known = inspect.signature(operator.forward).parameters
    options = {**dict(zip(known, given)), **keywords}
    arrays = {key: options.pop(key) for key in operator.names if key in options}
    for key in operator.joinable & arrays.keys():  # between pixels, and as many images as asked for
        image = arrays[key][:1] + rng.uniform(0.1, 0.4, arrays[key].shape)[:1]
        arrays[key] = np.repeat(image, batch, axis=0)
    return arrays, options


def tensors(arrays, requires_grad=False):
    """Tensors of their own memory; those that have gradients require them if asked to."""
    return [None if array is None else torch.tensor(array, requires_grad=requires_grad) for array in arrays]


def leaves(name, dtype=np.float64, batch=2):
    """Tensors of a call, the differentiable ones requiring gradients; those ones; and the options in full."""
    operator = _operators.operator(name)
    arrays, options = case(name, dtype, batch)
    made = tensors(arrays)
    wanted = [t for key, t in zip(operator.names, made) if key in operator.differentiable and t is not None]
    for tensor in wanted:
        tensor.requires_grad_()
    return made, wanted, options


def function(name, options):
    """The operator as a function of its tensors, called as the public functions do."""
    flat = REGISTERED[name].flat(options)
    return functools.partial(_called, name, flat)


def _called(name, flat, *given):
    return _eager.call(name, given, flat)


def operator_function(name, options):
    """torch's registered operator as a function of its tensors, returning y."""
    registered = REGISTERED[name]
    flat = registered.flat(options)

    def call(*given):
        results = registered.forward(*given, *flat)
        return results[0] if registered.residuals else results

    return call


def plain(name, arrays, options, grad_y=None):
    """y by the plain functions, and the gradients of all that has them, for a gradient of y (by default a random one)."""
    operator = _operators.operator(name)
    y, *residuals = operator.run(arrays, options)
    if grad_y is None:
        grad_y = np.random.default_rng(5).standard_normal(y.shape).astype(y.dtype)
    wanted = [True] * len(operator.differentiable)
    return y, grad_y, operator.run_backward(grad_y, arrays, residuals, options, wanted)


def same(tensor, array):
    """Bit for bit."""
    np.testing.assert_array_equal(tensor.detach().numpy(), array, strict=True)
