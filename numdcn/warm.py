"""Compiling ahead of the first call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from numdcn._call.arrays import check_dtype
from numdcn._call.checks import describe, flag
from numdcn._call.door import door
from numdcn.bilinear_sample import bilinear_sample_backward, bilinear_sample_forward
from numdcn.conv import conv_backward, conv_forward
from numdcn.dcnv3 import dcnv3_backward, dcnv3_forward
from numdcn.dcnv4 import dcnv4_backward, dcnv4_forward
from numdcn.deform_conv import deform_conv_backward, deform_conv_forward
from numdcn.deform_conv_layer import deform_conv_layer_backward, deform_conv_layer_forward
from numdcn.deform_ps_roi_pool import deform_ps_roi_pool_backward, deform_ps_roi_pool_forward
from numdcn.deform_roi_pool import deform_roi_pool_backward, deform_roi_pool_forward
from numdcn.ms_deform_attn import ms_deform_attn_backward, ms_deform_attn_forward
from numdcn.ps_roi_align import ps_roi_align_backward, ps_roi_align_forward
from numdcn.ps_roi_pool import ps_roi_pool_backward, ps_roi_pool_forward
from numdcn.roi_align import roi_align_backward, roi_align_forward
from numdcn.roi_pool import roi_pool_backward, roi_pool_forward

OPERATORS: dict[str, tuple[Any, Any]] = {
    "bilinear_sample": (bilinear_sample_forward, bilinear_sample_backward),
    "conv": (conv_forward, conv_backward),
    "dcnv3": (dcnv3_forward, dcnv3_backward),
    "dcnv4": (dcnv4_forward, dcnv4_backward),
    "deform_conv": (deform_conv_forward, deform_conv_backward),
    "deform_conv_layer": (deform_conv_layer_forward, deform_conv_layer_backward),
    "deform_ps_roi_pool": (deform_ps_roi_pool_forward, deform_ps_roi_pool_backward),
    "deform_roi_pool": (deform_roi_pool_forward, deform_roi_pool_backward),
    "ms_deform_attn": (ms_deform_attn_forward, ms_deform_attn_backward),
    "ps_roi_align": (ps_roi_align_forward, ps_roi_align_backward),
    "ps_roi_pool": (ps_roi_pool_forward, ps_roi_pool_backward),
    "roi_align": (roi_align_forward, roi_align_backward),
    "roi_pool": (roi_pool_forward, roi_pool_backward),
}


def _small_calls(
    kind: np.dtype, channels: int = 40, outputs: int = 2, taps: int = 2, groups: int = 1
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of a small call of each operator that reaches all its kernels; of a convolution those for such numbers of
    channels, outputs, taps and groups. By default there are more channels than a block of its backward holds, so that partial sums
    are needed too."""
    x, w = np.ones((1, channels, 3, 3), kind), np.ones((outputs, channels // groups, taps, 1), kind)
    images = np.ones((1, 4, 3, 3), kind)
    offsets, mask = np.zeros((1, 2 * taps, 4 - taps, 3), kind), np.ones((1, taps, 4 - taps, 3), kind)
    rois, bin_mask, size = np.array([[0, 0, 0, 2, 2]], kind), np.ones((1, 1, 2, 2), kind), {"output_size": 2}
    trans = np.zeros((1, 2, 2, 2), kind)
    last, points = np.ones((1, 3, 3, 2), kind), np.ones((1, 3, 3, 3), kind)  # channels last; a kernel of one point
    levels = {
        "spatial_shapes": ((3, 3),),
        "sampling_locations": np.zeros((1, 1, 1, 1, 1, 2), kind),
        "attention_weights": np.ones((1, 1, 1, 1, 1), kind),
    }
    layer = (x, w, np.zeros((3 * taps, channels, taps, 1), kind), np.zeros(3 * taps, kind))
    return {
        "bilinear_sample": ((images, np.ones((1, 1, 2), kind)), {}),
        "conv": ((x, w, np.zeros(outputs, kind)), {}),
        "dcnv3": ((last, points[..., :2], points[..., :1]), {"kernel_size": 1}),
        "dcnv4": ((last, points), {"kernel_size": 1, "groups": 1}),
        "deform_conv": ((x, offsets, w, np.zeros(outputs, kind)), {"mask": mask}),
        "deform_conv_layer": (layer, {"modulated": True}),
        "deform_ps_roi_pool": ((images, rois, trans), {**size, "group_size": 2}),
        "deform_roi_pool": ((images, rois, trans, bin_mask), size),
        "ms_deform_attn": ((np.ones((1, 9, 1, 2), kind),), levels),
        "ps_roi_align": ((images, rois), size),
        "ps_roi_pool": ((images, rois), size),
        "roi_align": ((images, rois), size),
        "roi_pool": ((images, rois), size),
    }


def _divided_backwards(kind: np.dtype, name: str) -> None:
    """Backwards of convolutions whose images are divided: the kernels that small calls do not reach. One sample is far from
    the others."""
    x, w = np.zeros((1, 72, 64, 64), kind), np.zeros((512, 72, 1, 1), kind)
    grad_y, offsets = np.zeros((1, 512, 64, 64), kind), np.zeros((1, 2, 64, 64), kind)
    offsets[0, 0, 3, 5] = 60
    if name == "conv":
        conv_backward(grad_y, x, w)
    if name == "deform_conv":
        deform_conv_backward(grad_y, x, offsets, w)


@door
def warmup(dtype: Any = np.float32, backward: bool = True, operators: str | Iterable[str] = "deform_conv") -> None:
    """Compile (or load from the cache) everything that a first call would, so that later calls run at full speed.

    A first call that has to compile for longer than a second says so on stderr, through the logger "numdcn", unless the
    environment variable NUMDCN_QUIET is 1.

    Args:
        dtype: float32, float64, float16 or bfloat16, as anything `numpy.dtype` accepts. The last two add their conversions to
            what float32 needs, and bfloat16 the dot products of processors that have them.
        backward: whether to compile the backward too.
        operators: name or names of operators, such as "conv" or ("roi_align", "deform_conv_layer"), or "all".

    Raises:
        TypeError: another dtype, `backward` is not a bool, or `operators` is not a name or names.
        ValueError: an unknown operator.
    """
    kind = check_dtype("dtype", dtype)
    backward = flag("backward", backward)
    # depthwise; many outputs of one tap; an odd and an even number of channels, as bfloat16 is multiplied in pairs
    calls = [
        _small_calls(kind, outputs=40, groups=40),
        _small_calls(kind, 41, 40, 1),
        _small_calls(kind, 41),
        _small_calls(kind),
    ]
    for name in _names(operators):
        for part in ("conv", "deform_conv", name) if name == "deform_conv_layer" else (name,):
            run_forward, run_backward = OPERATORS[part]
            for call in calls:
                arguments, keywords = call[part]
                result = run_forward(*arguments, **keywords)
            if backward:
                run_backward(getattr(result, "y", result), *arguments, **keywords)
                _divided_backwards(kind, part)


def _names(operators: Any) -> list[str]:
    """The names of operators that an argument stands for."""
    known = f'expected "all", or one or more of {", ".join(OPERATORS)}'
    if isinstance(operators, str):
        operators = OPERATORS if operators == "all" else (operators,)
    if not isinstance(operators, Iterable) or getattr(operators, "ndim", None) == 0:
        raise TypeError(f"`operators` is {describe(operators)}, {known}")
    names = list(operators)
    for name in names:
        if not isinstance(name, str) or name not in OPERATORS:
            raise ValueError(f"`operators` holds {describe(name)}, {known}")
    return names
