"""torchvision's own operators on numdcn's CPU kernels: `install()`, and every torchvision model runs on them.

Autograd, fake kernels, autocast, TorchScript and torch.compile stay torchvision's: only the CPU kernels underneath are
replaced. Where torchvision's binary is missing or does not load, its operators are declared first.
"""

from __future__ import annotations

import functools
import importlib.machinery
import math
import sys
import threading
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from numdcn._call.host_frameworks import Torch
from numdcn.adapters._operators import Operator, operator, shaped
from numdcn.adapters._tensors import has_tangent, widened

_BINS = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_CONVOLUTION = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
_CONVOLVED = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias"
SCHEMAS = {  # torchvision's declarations of the operators that numdcn computes
    "deform_conv2d": f"({_CONVOLVED}, {_CONVOLUTION}) -> Tensor",
    "_deform_conv2d_backward": f"(Tensor grad, {_CONVOLVED}, {_CONVOLUTION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "roi_align": f"(Tensor input, Tensor rois, {_BINS}, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward": f"(Tensor grad, Tensor rois, {_BINS}, {_SIZES}, int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool": f"(Tensor input, Tensor rois, {_BINS}) -> (Tensor, Tensor)",
    "_roi_pool_backward": f"(Tensor grad, Tensor rois, Tensor argmax, {_BINS}, {_SIZES}) -> Tensor",
    "ps_roi_align": f"(Tensor input, Tensor rois, {_BINS}, int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward": (
        f"(Tensor grad, Tensor rois, Tensor channel_mapping, {_BINS}, int sampling_ratio, {_SIZES}) -> Tensor"
    ),
    "ps_roi_pool": f"(Tensor input, Tensor rois, {_BINS}) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward": f"(Tensor grad, Tensor rois, Tensor channel_mapping, {_BINS}, {_SIZES}) -> Tensor",
}
_BESIDE = {  # the others of its binary
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qroi_align": (
        "(Tensor input, Tensor rois, float input_scale, int input_zero_point, float rois_scale, int rois_zero_point, "
        f"{_BINS}, int sampling_ratio, bool aligned) -> Tensor"
    ),
    "box_iou_rotated": "(Tensor boxes1, Tensor boxes2) -> Tensor",
}
_WORDS = Torch(torch)


def install() -> AbstractContextManager[None]:
    """Run torchvision's operators on numdcn's CPU kernels.

    It replaces the CPU kernels of `torch.ops.torchvision.deform_conv2d`, `roi_align`, `roi_pool`, `ps_roi_align`,
    `ps_roi_pool` and of their backwards, in all threads. Calling it again changes nothing. It imports torchvision; where
    torchvision's binary is missing or belongs to another torch, call it before anything else does: it declares the
    operators, and provides `nms` too.

    Returns:
        a context manager, which may be ignored: at the end of a `with` block the kernels are what they were before
            `install()`.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: torchvision was imported without its binary before, or is too old to be used without it.
    """
    with _switch.lock:
        handle = _Installed(_switch.kept)
        _switch.on()
        _switch.kept = True
    return handle


def uninstall() -> None:
    """Bring torchvision's own CPU kernels back, whatever was installed before.

    Where torchvision has no binary, its operators raise a RuntimeError from then on. Call it while no other thread is
    inside one of the operators. Gradients may be computed before or after, whichever kernels computed the forward.
    """
    with _switch.lock:
        _switch.kept = False
        _switch.off()


class _Switch:
    """Whether numdcn's kernels are installed, and for how long."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.library: Any = None  # holds the kernels while they are installed
        self.kept = False  # until uninstall()
        self.entered = 0  # `with` blocks that need them

    def on(self) -> None:
        """Register the kernels, unless they are."""
        if self.library is not None:
            return
        _import_torchvision()
        self.library = torch.library.Library("torchvision", "IMPL", "CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden
            for name, kernel in _kernels().items():
                self.library.impl(name, kernel)
            if _library is not None:
                self.library.impl("nms", _nms)

    def off(self) -> None:
        """Remove the kernels, unless they are."""
        if self.library is not None:
            self.library._destroy()
            self.library = None


_switch = _Switch()


class _Installed(AbstractContextManager):
    """What `install()` returns."""

    def __init__(self, kept: bool) -> None:
        self.kept = kept  # what it was before

    def __enter__(self) -> None:
        with _switch.lock:
            _switch.on()
            _switch.kept = self.kept
            _switch.entered += 1

    def __exit__(self, *_: object) -> None:
        with _switch.lock:
            _switch.entered -= 1
            if not (_switch.kept or _switch.entered):
                _switch.off()


# The kernels: torchvision's arguments in, numdcn's functions of NumPy arrays, torchvision's results out.


@functools.cache
def _kernels() -> dict[str, Callable[..., Any]]:
    """The kernels of torchvision's ten operators."""
    kernels: dict[str, Callable[..., Any]] = {
        "deform_conv2d": _deform_conv2d,
        "_deform_conv2d_backward": _deform_conv2d_backward,
    }
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        kernels[name], kernels[f"_{name}_backward"] = _pooling(operator(name))
    return {name: _in_words_of_torch(kernel) for name, kernel in kernels.items()}


def _in_words_of_torch(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose errors give advice for tensors."""

    def call(*given: Any) -> Any:
        try:
            return kernel(*given)
        except (TypeError, ValueError) as error:
            raise type(error)(_WORDS.advice(str(error))) from None

    return call


def _deform_conv2d(*given: Any) -> Any:
    (y,) = operator("deform_conv").run(*_convolution(*given))
    return _tensor(y, given[0].dtype)


def _deform_conv2d_backward(grad: Any, *given: Any) -> tuple[Any, ...]:
    arrays, options = _convolution(*given)
    (grad_y,) = _plain(grad)
    gradients = operator("deform_conv").run_backward(grad_y, arrays, (), options, (True,) * 5)
    x, offsets, w, bias, mask = (None if g is None else _tensor(g, grad.dtype) for g in gradients)
    return x, w, offsets, torch.zeros_like(given[3]) if mask is None else mask, bias


def _convolution(
    input: Any, weight: Any, offset: Any, mask: Any, bias: Any, *given: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The arrays and the options of a deformable convolution."""
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, _, offset_groups, use_mask = given
    channels = offset_groups * weight.shape[2:].numel()
    _check_channels("offset", offset, 2 * channels)
    if use_mask:
        _check_channels("mask", mask, channels)
    arrays = _plain(input, offset, weight, bias, *([mask] if use_mask else []))
    options = {"stride": (stride_h, stride_w), "padding": (pad_h, pad_w), "dilation": (dilation_h, dilation_w)}
    return (arrays if use_mask else [*arrays, None]), options


def _check_channels(name: str, tensor: Any, expected: int) -> None:
    """Raise, in torchvision's words, unless a tensor has as many channels as `offset_groups` says."""
    if tensor.shape[1] != expected:
        raise RuntimeError(f"{name}.shape[1] is not valid: got: {tensor.shape[1]} expected: {expected}")


def _pooling(op: Operator) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward of a pooling over boxes."""
    names, backward_names = (_names(SCHEMAS[name])[2:] for name in (op.name, f"_{op.name}_backward"))
    keys = [option.name for option in op.options if option.name in names]

    def options(given: dict[str, Any]) -> dict[str, Any]:
        return {"output_size": (given["pooled_height"], given["pooled_width"]), **{key: given[key] for key in keys}}

    def forward(input: Any, rois: Any, *rest: Any) -> Any:
        given = dict(zip(names, rest))
        y, *more = op.run(_plain(input, rois), options(given))
        if op.name == "roi_align":
            return _tensor(y, input.dtype)
        return _tensor(y, input.dtype), torch.from_numpy(more[0] if more else _channel_mapping(y))

    def backward(grad: Any, rois: Any, *rest: Any) -> Any:
        given = dict(zip(backward_names, rest))
        grad_y, boxes = _plain(grad, rois)
        sizes = [given[key] for key in ("batch_size", "channels", "height", "width")]
        x = shaped(sizes, grad_y.dtype)
        kept = [given[residual.name].numpy() for residual in op.residuals]
        (gradient,) = op.run_backward(grad_y, [x, boxes], kept, options(given), (True,))
        return _tensor(gradient, grad.dtype)

    return forward, backward


def _names(schema: str) -> list[str]:
    """The names of an operator's arguments."""
    return [argument.split()[-1] for argument in schema[1 : schema.index(")")].split(",")]


def _channel_mapping(y: Any) -> Any:
    """The channel of the image that each bin of a position-sensitive pooling reads."""
    return np.broadcast_to(np.arange(math.prod(y.shape[1:]), dtype=np.int32).reshape(y.shape[1:]), y.shape).copy()


def _plain(*tensors: Any) -> list[Any]:
    """Tensors as NumPy arrays, half types widened."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise RuntimeError(f"expected tensors of one dtype, got {dtype} and {tensor.dtype}")
    if has_tangent(tensors):
        raise NotImplementedError("torchvision's operators have no derivatives in forward mode")
    return [widened(tensor.detach()).numpy() for tensor in tensors]


def _tensor(array: np.ndarray, dtype: Any) -> Any:
    """A result as a tensor, rounded if its type is a half type."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _nms(dets: Any, scores: Any, iou_threshold: float) -> Any:
    """Non-maximum suppression: the indices of the boxes that are kept, best score first."""
    if dets.dim() != 2 or dets.shape[1] != 4:
        raise RuntimeError(f"boxes should be a 2d tensor with 4 elements in dimension 1, got shape {tuple(dets.shape)}")
    if scores.shape != dets.shape[:1]:
        raise RuntimeError(
            f"scores should be a 1d tensor, one for each of {len(dets)} boxes, got {tuple(scores.shape)}"
        )
    order = scores.detach().argsort(descending=True, stable=True)
    x1, y1, x2, y2 = _plain(dets[order])[0].T
    area = (x2 - x1) * (y2 - y1)
    kept, left = [], np.arange(len(order))
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
        common = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(divide="ignore", invalid="ignore"):  # boxes without area
            left = left[~(common / (area[best] + area[left] - common) > np.float64(iou_threshold))]
    return order[torch.from_numpy(np.array(kept, np.int64))]


# torchvision without its binary: its operators are declared while it is imported.

_library: Any = None  # holds the declarations


def _import_torchvision() -> None:
    """Import torchvision, with its operators."""
    if "torchvision" not in sys.modules:
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]  # left behind by an import that failed
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        import torchvision
    finally:
        sys.meta_path.remove(finder)
    if not torchvision.extension._has_ops():
        raise RuntimeError(
            "torchvision was imported without its operators, as its binary does not load; call "
            "numdcn.adapters.torchvision.install() before the first `import torchvision`"
        )
    if _library is not None and not hasattr(torchvision, "_autograd_registrations"):
        raise RuntimeError(
            f"torchvision {torchvision.__version__} has its gradients in its binary, which does not load; use torchvision "
            "0.28 or later, or the one for this torch"
        )


class _Finder:
    """Finds torchvision.extension, which loads the binary."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The file of torchvision.extension, to be loaded by `_Loader`."""
        if name != "torchvision.extension":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Declares torchvision's operators if the binary did not."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module."""
        super().exec_module(module)
        if not module._has_ops():
            if _library is None:
                _declare()
            module._has_ops = _has_ops  # type: ignore[attr-defined]


def _has_ops() -> bool:
    return True


def _declare() -> None:
    """Declare torchvision's operators, for as long as Python runs, with kernels that raise."""
    global _library
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("_cuda_version() -> int")
    _library.impl("_cuda_version", lambda: -1, "CompositeExplicitAutograd")  # without CUDA
    for name, schema in (SCHEMAS | _BESIDE).items():
        if not hasattr(torch.ops.torchvision, name):  # a program may have declared nms
            _library.define(name + schema)
        _library.impl(name, functools.partial(_no_kernel, name), "CPU")


def _no_kernel(name: str, *_: Any) -> Any:
    advice = "numdcn has none"
    if name in _kernels() or name == "nms":
        advice = "call numdcn.adapters.torchvision.install() for numdcn's"
    raise RuntimeError(f"torchvision::{name} has no kernel, as torchvision's binary does not load; {advice}")
