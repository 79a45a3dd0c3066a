"""ONNX: operators for its reference evaluator, and translations that let PyTorch export models to it.

`onnx.reference.ReferenceEvaluator(model, new_ops=OPS)` runs DeformConv, RoiAlign, MaxRoiPool and GridSample by numdcn.
`torch.onnx.export(..., dynamo=True, custom_translation_table=translations())` exports torchvision's and numdcn's operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto
from onnx.defs import get_schema
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_grid_sample import GridSample as OnnxGridSample
from onnx.reference.ops.op_roi_align import RoiAlign as OnnxRoiAlign

import numdcn

HALVES = ("float16", "bfloat16")  # computed in float32
ALIGNED = {"half_pixel": True, "output_half_pixel": False}
MODES = {"bilinear": "linear", "bicubic": "cubic"}  # what GridSample's modes are called since opset 20


class _Operator(OpRun):
    """An operator with the attributes, and the defaults, that it has in the opset of the model."""

    op_domain = ""

    def __init__(self, onnx_node: Any, run_params: dict[str, Any], schema: Any = None) -> None:
        opset = run_params["opsets"][onnx_node.domain]
        super().__init__(onnx_node, run_params, schema or get_schema(onnx_node.op_type, opset, onnx_node.domain))


class DeformConv(_Operator):
    """ONNX's DeformConv of images."""

    def _run(self, X: Any, W: Any, offset: Any, B: Any = None, mask: Any = None, **attributes: Any) -> tuple[Any]:
        if X.ndim == W.ndim == offset.ndim == 4:  # otherwise numdcn's error says what is wrong
            _check_attributes(attributes, X.shape, W.shape, offset.shape)
        top, left, bottom, right = attributes["pads"] or (0, 0, 0, 0)
        y = numdcn.deform_conv_forward(
            _wide(X),
            _wide(offset),
            _wide(W),
            _wide(B),
            mask=_wide(mask),
            stride=tuple(attributes["strides"] or (1, 1)),
            padding=((top, bottom), (left, right)),
            dilation=tuple(attributes["dilations"] or (1, 1)),
        )
        return (y.astype(X.dtype, copy=False),)


class RoiAlign(_Operator):
    """ONNX's RoiAlign; mode "max" by ONNX itself."""

    def _run(
        self,
        X: Any,
        rois: Any,
        batch_indices: Any,
        coordinate_transformation_mode: str = "output_half_pixel",  # all that there was before opset 16
        **attributes: Any,
    ) -> tuple[Any]:
        if coordinate_transformation_mode not in ALIGNED:
            raise ValueError(
                f"`coordinate_transformation_mode` is {coordinate_transformation_mode!r}, expected one of {', '.join(ALIGNED)}"
            )
        if attributes["mode"] != "avg":
            mode = {"coordinate_transformation_mode": coordinate_transformation_mode}
            return (OnnxRoiAlign.eval(X, rois, batch_indices, **mode, **attributes),)
        if rois.shape != (*batch_indices.shape, 4):
            raise ValueError(
                f"`rois` has shape {rois.shape} and `batch_indices` {batch_indices.shape}, expected (R, 4) and (R,)"
            )
        x = _wide(X)
        y = numdcn.roi_align_forward(
            x,
            np.concatenate([batch_indices[:, None], _wide(rois)], axis=1, dtype=x.dtype, casting="unsafe"),
            (attributes["output_height"], attributes["output_width"]),
            attributes["spatial_scale"],
            attributes["sampling_ratio"],
            ALIGNED[coordinate_transformation_mode],
        )
        return (y.astype(X.dtype, copy=False),)


class MaxRoiPool(_Operator):
    """ONNX's MaxRoiPool, which its own evaluator lacks."""

    def _run(self, X: Any, rois: Any, pooled_shape: list[int], spatial_scale: float) -> tuple[Any]:
        height, width = pooled_shape
        y = numdcn.roi_pool_forward(_wide(X), _wide(rois), (height, width), spatial_scale)
        return (y.astype(X.dtype, copy=False),)


class GridSample(_Operator):
    """ONNX's GridSample: bilinear, of images, with zeros around them; everything else by ONNX itself."""

    def _run(self, X: Any, grid: Any, mode: str, padding_mode: str, align_corners: int) -> tuple[Any]:
        mode = MODES.get(mode, mode)
        real = X.dtype.kind == "f" or X.dtype.name in HALVES
        if not real or X.ndim != 4 or mode != "linear" or padding_mode != "zeros":
            more = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
            return (OnnxGridSample.eval(X, grid, **more),)
        x, points = _wide(X), _wide(grid)
        dtype = np.result_type(x, points)
        y = numdcn.bilinear_sample_forward(
            x.astype(dtype, copy=False), _pixels(points.astype(dtype, copy=False), X.shape[2:], align_corners)
        )
        return (y.astype(X.dtype, copy=False),)


OPS = [DeformConv, RoiAlign, MaxRoiPool, GridSample]


def _wide(array: Any) -> Any:
    """An array of a half type in float32; any other, and None, as it is."""
    return array.astype(np.float32) if array is not None and array.dtype.name in HALVES else array


def _pixels(grid: np.ndarray, size: tuple[int, int], align_corners: int) -> np.ndarray:
    """A grid (x, y), in which an image reaches from -1 to 1, as points (y, x) in pixels."""
    extent = np.array(size, grid.dtype)
    points = grid[..., ::-1] + 1
    return points * (extent - 1) / 2 if align_corners else (points * extent - 1) / 2


def _check_attributes(attributes: dict[str, Any], x: Any, w: Any, offset: Any) -> None:
    """Raise unless the attributes of a DeformConv agree with the shapes, from which numdcn reads them off."""
    kernel_shape, group, offset_group = (attributes[name] for name in ("kernel_shape", "group", "offset_group"))
    if kernel_shape is not None and tuple(kernel_shape) != w[2:]:
        raise ValueError(f"`kernel_shape` is {kernel_shape}, but W has shape {w}")
    if group * w[1] != x[1]:
        raise ValueError(f"`group` is {group}, expected group*{w[1]} = {x[1]}: X has shape {x}, W {w}")
    channels = 2 * w[2] * w[3]
    if offset_group * channels != offset[1]:
        raise ValueError(
            f"`offset_group` is {offset_group}, expected offset_group*2*kh*kw = offset_group*{channels} = {offset[1]}: "
            f"offset has shape {offset}, W {w}"
        )
    pads = attributes["pads"]
    if pads is not None and len(pads) != 4:
        raise ValueError(f"`pads` is {pads}, expected [top, left, bottom, right]")


def translations() -> dict[Any, Callable[..., Any]]:
    """A table for `torch.onnx.export(..., dynamo=True, custom_translation_table=translations())`.

    It holds those of these operators that are registered when it is called: `deform_conv`, `deform_conv_layer`, `conv` and
    `roi_align` of numdcn, `deform_conv2d` and `roi_align` of torchvision. They become DeformConv, Conv and RoiAlign.
    DeformConv needs `opset_version=19` or above. All but channels and kernels may have dynamic sizes.

    Returns:
        Functions that write ONNX's operators, by the operators of torch that they translate.

    Raises:
        ImportError: torch is not installed.
    """
    import torch

    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("numdcn", "conv"): _conv,
        ("numdcn", "deform_conv"): _deform_conv,
        ("numdcn", "deform_conv_layer"): _deform_conv_layer,
        ("numdcn", "roi_align"): _roi_align,
        ("torchvision", "deform_conv2d"): _torchvision_deform_conv2d,
        ("torchvision", "roi_align"): _torchvision_roi_align,
    }
    packets = {key: getattr(getattr(torch.ops, key[0]), key[1], None) for key in known}
    return {packet.default: known[key] for key, packet in packets.items() if packet is not None}


def _window(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> dict[str, Any]:
    """The attributes that all convolutions have; padding is top, bottom, left, right."""
    top, bottom, left, right = padding
    return {"dilations": dilation, "pads": [top, left, bottom, right], "strides": stride}


def _fixed(*sizes: Any) -> tuple[int, ...]:
    """Sizes of which attributes are made. Raises if one is dynamic."""
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"channels and kernels have the sizes {', '.join(map(str, sizes))}, expected fixed ones: groups are attributes in ONNX"
        )
    return sizes


def _conv(x: Any, w: Any, bias: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Any:
    """`numdcn::conv` as Conv."""
    from onnxscript import opset18

    channels, per_group = _fixed(x.shape[1], w.shape[1])
    return opset18.Conv(x, w, bias, group=channels // per_group, **_window(stride, padding, dilation))


def _deform_conv(
    x: Any,
    offsets: Any,
    w: Any,
    bias: Any,
    mask: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """`numdcn::deform_conv` as DeformConv."""
    from onnxscript import opset19

    moved, channels, per_group, kh, kw = _fixed(offsets.shape[1], x.shape[1], *w.shape[1:])
    groups = {"group": channels // per_group, "offset_group": moved // (2 * kh * kw)}
    return opset19.DeformConv(x, w, offsets, bias, mask, **groups, **_window(stride, padding, dilation))


def _deform_conv_layer(
    x: Any,
    w: Any,
    offset_w: Any,
    offset_b: Any,
    bias: Any,
    modulated: bool,
    mask_scale: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """`numdcn::deform_conv_layer` as Conv and DeformConv: section b.6 of docs/semantics.md."""
    from onnxscript import opset19

    predicted, channels, per_group, kh, kw = _fixed(offset_w.shape[0], x.shape[1], *w.shape[1:])
    window, moved = _window(stride, padding, dilation), predicted // 3 * 2 if modulated else predicted
    offsets = z = opset19.Conv(x, offset_w, offset_b, **window)
    mask = None
    if modulated:
        offsets = opset19.Slice(z, [0], [moved], [1])
        mask = opset19.Sigmoid(opset19.Slice(z, [moved], [predicted], [1]))
        mask = opset19.Add(mask, mask) if mask_scale == 2 else mask
    groups = {"group": channels // per_group, "offset_group": moved // (2 * kh * kw)}
    y = opset19.DeformConv(x, w, offsets, bias, mask, **groups, **window)
    if mask is None:  # an empty tensor in its place
        mask = opset19.Slice(opset19.Reshape(z, [-1]), [0], [0], [0])
    return y, offsets, mask


def _roi_align(
    x: Any, rois: Any, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Any:
    """`numdcn::roi_align` as RoiAlign."""
    from onnxscript import opset18

    height, width = output_size
    index = opset18.Gather(rois, 0, axis=1)
    return opset18.RoiAlign(
        x,
        opset18.Slice(rois, [1], [5], [1]),
        opset18.Cast(index, to=TensorProto.INT64),
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=height,
        output_width=width,
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=spatial_scale,
    )


def _torchvision_deform_conv2d(  # parameters: those of torchvision's operator
    input: Any,
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    """`torchvision::deform_conv2d` as DeformConv; without use_mask the mask is a placeholder."""
    from onnxscript import opset19

    return opset19.DeformConv(
        input,
        weight,
        offset,
        bias,
        mask if use_mask else None,
        dilations=[dilation_h, dilation_w],
        group=groups,
        offset_group=offset_groups,
        pads=[pad_h, pad_w, pad_h, pad_w],
        strides=[stride_h, stride_w],
    )


def _torchvision_roi_align(
    input: Any,
    rois: Any,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Any:
    """`torchvision::roi_align` as RoiAlign."""
    return _roi_align(input, rois, (pooled_height, pooled_width), spatial_scale, sampling_ratio, aligned)
