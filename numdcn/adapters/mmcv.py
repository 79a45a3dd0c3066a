"""mmcv's deformable and RoI operators on the CPU, for an mmcv without its compiled ones: `install()`, then `import mmcv.ops`."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

import numdcn
from numdcn.adapters._operators import operator, shaped
from numdcn.adapters._tensors import widened

__all__ = ["install", "uninstall"]

NAME = "mmcv._ext"
MAXIMUM = 0  # mmcv's number for pool_mode="max"

# mmcv's functions: the operator behind each, and what its tensors are, in order. ">": a tensor to fill; "-": not needed here.
SIGNATURES = {
    "deform_conv_forward": ("deform_conv", "x w offsets >y - -"),
    "deform_conv_backward_input": ("deform_conv", "x offsets grad_y >x >offsets w -"),
    "deform_conv_backward_parameters": ("deform_conv", "x offsets grad_y >w - -"),
    "modulated_deform_conv_forward": ("deform_conv", "x w bias - offsets mask >y -"),
    "modulated_deform_conv_backward": (
        "deform_conv", "x w bias - offsets mask - >x >w >bias >offsets >mask grad_y",
    ),
    "deform_roi_pool_forward": ("deform_roi_pool", "x rois offsets >y"),
    "deform_roi_pool_backward": ("deform_roi_pool", "grad_y x rois offsets >x >offsets"),
    "roi_align_forward": ("roi_align", "x rois >y - -"),
    "roi_align_backward": ("roi_align", "grad_y rois - - >x"),
    "roi_pool_forward": ("roi_pool", "x rois >y >argmax"),
    "roi_pool_backward": ("roi_pool", "grad_y rois argmax >x"),
}  # fmt: skip
PROVIDED = ", ".join(name.removesuffix("_forward") for name in SIGNATURES if name.endswith("_forward"))
PAIRS = {  # options that mmcv gives as two, y first
    "stride": (("dH", "dW"), ("stride_h", "stride_w")),
    "padding": (("padH", "padW"), ("pad_h", "pad_w")),
    "dilation": (("dilationH", "dilationW"), ("dilation_h", "dilation_w")),
    "output_size": (("aligned_height", "aligned_width"), ("pooled_height", "pooled_width")),
}


class _Function:
    """One function of mmcv's extension. As mmcv's, it returns nothing: it fills tensors, which hold zeros before."""

    def __init__(self, name: str, kind: str, tensors: str) -> None:
        self.__name__, self.operator = name, operator(kind)
        self.places = {what: place for place, what in enumerate(tensors.split())}
        self.results = [what[1:] for what in self.places if what[0] == ">"]
        self.wanted = [name in self.results for name in self.operator.differentiable]

    def __call__(self, *tensors: Any, **given: Any) -> None:
        for tensor in tensors:
            if not tensor.is_cpu:
                raise NotImplementedError(
                    f"{self.__name__} of numdcn.adapters.mmcv computes on the CPU, expected all tensors there; one is on "
                    f"{tensor.device}"
                )
        if given.get("pool_mode") == MAXIMUM:
            raise NotImplementedError(f"{self.__name__} of numdcn.adapters.mmcv has pool_mode 'avg' only, not 'max'")
        filled = {name: tensors[self.places[f">{name}"]].detach() for name in self.results}
        full = {name: widened(tensor) for name, tensor in filled.items()}
        self._compute(tensors, {name: tensor.numpy() for name, tensor in full.items()}, given)
        for name, tensor in filled.items():
            if full[name] is not tensor:
                tensor.copy_(full[name])
        if given.get("scale", 1) != 1:
            filled["w"].mul_(given["scale"])

    def _compute(self, tensors: Sequence[Any], results: dict[str, np.ndarray], given: Mapping[str, Any]) -> None:
        """Compute the results into the arrays for them."""
        options = {option.name: _option(option.name, given) for option in self.operator.options}
        backward = "grad_y" in self.places
        grad_y: Any = self._seen(tensors, "grad_y") if backward else None
        arrays: dict[str, Any] = {}
        for argument in self.operator.arrays:
            name = argument.name
            if name in self.places:
                absent = argument.optional and tensors[self.places[name]].numel() == 0
                arrays[name] = None if absent else self._seen(tensors, name)
            else:  # it has the shape of its gradient, and its numbers are not used; or it is optional
                arrays[name] = shaped(results[name].shape, grad_y.dtype) if name in results else None
        if self.operator.name == "deform_conv":
            _check_groups(arrays, given)
        if not backward:
            made = self.operator.run(list(arrays.values()), options, out=results.pop("y"))
            for array, residual in zip(results.values(), made[1:], strict=True):
                np.copyto(array, residual)
            return
        residuals = [self._seen(tensors, argument.name) for argument in self.operator.residuals]
        out = self.operator.gradients(**{n: array for n, array in results.items() if arrays[n] is not None})
        self.operator.run_backward(grad_y, list(arrays.values()), residuals, options, self.wanted, out=out)
        if self.operator.name == "deform_conv" and "offsets" in results:
            _flat_at_minus_one(results["offsets"], arrays["offsets"], arrays["w"].shape[2:], **options)

    def _seen(self, tensors: Sequence[Any], name: str) -> np.ndarray:
        """A tensor as an array in which numdcn computes."""
        return widened(tensors[self.places[name]].detach()).numpy()


def _option(name: str, given: Mapping[str, Any]) -> Any:
    """An option of the operator, from those of mmcv."""
    for y, x in PAIRS.get(name, ()):
        if y in given:
            return given[y], given[x]
    return given[name]


def _check_groups(arrays: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise unless the groups that numdcn reads off the shapes are those that mmcv was told."""
    _, depth, kh, kw = arrays["w"].shape
    for name, tensor, count, size in (
        ("group", "input", arrays["x"].shape[1], depth),
        ("deformable_group", "offset", arrays["offsets"].shape[1], 2 * kh * kw),
    ):
        if count != given[name] * size:
            raise ValueError(
                f"{name} is {given[name]}, but {tensor} has {count} channels, expected {given[name]} * {size}"
            )


def _flat_at_minus_one(
    gradient: np.ndarray, offsets: np.ndarray, kernel: tuple[int, int], *, stride: Any, padding: Any, dilation: Any
) -> None:
    """Set the gradient of offsets whose sample is at exactly -1 along an axis to 0, which is mmcv's slope there."""
    n, channels, height, width = offsets.shape
    by_tap = offsets.reshape(n, channels // (2 * kernel[0] * kernel[1]), *kernel, 2, height, width)
    rows, columns = (
        (np.arange(taps) * d)[:, None] + np.arange(size) * s - p
        for taps, d, size, s, p in zip(kernel, dilation, (height, width), stride, padding, strict=True)
    )
    y = by_tap[:, :, :, :, 0] + rows[:, None, :, None].astype(offsets.dtype)
    x = by_tap[:, :, :, :, 1] + columns[:, None, :].astype(offsets.dtype)
    at = (y == -1) | (x == -1)
    np.copyto(gradient.reshape(by_tap.shape), 0, where=at[:, :, :, :, None])


class _Extension(types.ModuleType):
    """`mmcv._ext`: what is not set on it raises when it is called, as mmcv.ops asks for all its functions when imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return functools.partial(_missing, name)

    @staticmethod
    def get_compiler_version() -> str:
        """What mmcv's report on the environment shows."""
        return f"none (numdcn {numdcn.__version__})"

    @staticmethod
    def get_compiling_cuda_version() -> str:
        """In mmcv's words."""
        return "not available"


def _missing(name: str, *_: Any, **__: Any) -> NoReturn:
    if name in SIGNATURES:
        raise NotImplementedError(f"{name} of mmcv is not provided any more: call numdcn.adapters.mmcv.install()")
    raise NotImplementedError(
        f"{name} of mmcv is not available: this mmcv has no compiled operators, and numdcn.adapters.mmcv provides "
        f"{PROVIDED} only"
    )


class _Loader(importlib.abc.Loader):
    """So that `importlib.util.find_spec` finds the extension, by which mmcv tells whether it has operators."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return EXTENSION

    def exec_module(self, module: types.ModuleType) -> None:
        """It is complete."""


EXTENSION = _Extension(NAME, "The operators of mmcv that numdcn provides.")
EXTENSION.__spec__ = importlib.machinery.ModuleSpec(NAME, _Loader())
FUNCTIONS = {name: _Function(name, *signature) for name, signature in SIGNATURES.items()}
_installed: tuple[types.ModuleType, dict[str, Any]] | None = None  # where, and what was there


def install(*, replace: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Provide `mmcv._ext`, the operators that mmcv-lite lacks, on the CPU. Call it before `mmcv.ops` is imported.

    Deformable convolution (both versions), deformable RoI pooling, RoI align and RoI pooling are computed by numdcn. Any
    other operator of mmcv raises a NotImplementedError when it is called. mmcv itself is not imported, unless `replace`
    finds compiled operators. A second call changes nothing.

    Args:
        replace: whether to replace the compiled operators of an mmcv that has them. Tensors on a GPU, `pool_mode="max"`
            and all other operators still use mmcv's.

    Returns:
        A context manager, which may be ignored: `with install():` calls `uninstall` at the end if this call installed.

    Raises:
        RuntimeError: mmcv has its compiled operators, and `replace` is False.
    """
    global _installed
    stack = contextlib.ExitStack()
    if _installed is not None:
        return stack
    compiled = _is_compiled()
    if compiled and not replace:
        raise RuntimeError(
            f"this mmcv has its compiled operators; install(replace=True) has numdcn compute {PROVIDED} on the CPU in their place"
        )
    module = _imported() if compiled else EXTENSION
    before = {name: getattr(module, name) for name in SIGNATURES} if compiled else {}
    for name, function in FUNCTIONS.items():
        setattr(module, name, _or_else(function, before[name]) if compiled else function)
    sys.modules[NAME] = module
    _installed = module, before
    stack.callback(uninstall)
    return stack


def uninstall() -> None:
    """Undo `install`; nothing happens if it was not called. Functions of an `mmcv.ops` that was imported in between then
    raise a NotImplementedError, or are mmcv's compiled ones again, until the next `install`."""
    global _installed
    if _installed is None:
        return
    module, before = _installed
    for name in SIGNATURES:
        if before:
            setattr(module, name, before[name])
        else:
            delattr(module, name)
    if module is EXTENSION:
        sys.modules.pop(NAME, None)
    _installed = None


def _is_compiled() -> bool:
    """Whether there is an mmcv with compiled operators. It is not imported to find out."""
    if NAME in sys.modules:
        return True
    mmcv = importlib.util.find_spec("mmcv")
    return (
        mmcv is not None and importlib.machinery.PathFinder.find_spec(NAME, mmcv.submodule_search_locations) is not None
    )


def _imported() -> types.ModuleType:
    from mmcv import _ext  # type: ignore

    return _ext


def _or_else(function: _Function, other: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or another one for what it does not compute."""

    def call(*tensors: Any, **given: Any) -> Any:
        here = tensors[0].is_cpu and given.get("pool_mode") != MAXIMUM
        return (function if here else other)(*tensors, **given)

    return call
