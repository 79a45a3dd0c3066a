"""torchvision's functions: its arguments, and its words where they are wrong."""

# No `from __future__ import annotations`: TorchScript reads them.
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.jit.annotations import BroadcastingList2
from torch.nn.modules.utils import _pair
from torch.overrides import handle_torch_function, has_torch_function_variadic

from numdcn._call.host_frameworks import Torch
from numdcn.adapters.torch._eager import call

TENSORS = Torch(torch)  # knows the words for tensors
NAMES = {"x": "input", "rois": "boxes", "offsets": "offset", "w": "weight"}  # numdcn's names, and torchvision's


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution, v1, or with a mask v2: `torchvision.ops.deform_conv2d` computed by numdcn.

    Args:
        input: images `(N, C, H, W)`.
        offset: displacements in pixels, `(N, 2*offset_groups*kh*kw, Ho, Wo)`; for each tap y, then x.
        weight: `(C_out, C/groups, kh, kw)`.
        bias: `(C_out,)`, or None.
        stride: in pixels; an int, or one per axis (y, x).
        padding: zeros on both sides of each axis; an int, or one per axis (y, x).
        dilation: spacing of the taps in pixels; an int, or one per axis (y, x).
        mask: modulation `(N, offset_groups*kh*kw, Ho, Wo)`, or None for ones.

    Returns:
        The result, `(N, C_out, Ho, Wo)`.

    Raises:
        RuntimeError: shapes or dtypes do not match, or a parameter is out of range.

    `numdcn.deform_conv_forward` has the formula, and says what happens at borders and at NaN.
    """
    if not torch.jit.is_scripting() and has_torch_function_variadic(input, offset, weight, bias, mask):
        arrays = (input, offset, weight, bias, mask)
        return handle_torch_function(deform_conv2d, arrays, *arrays[:4], stride, padding, dilation, mask)
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    if torch.jit.is_scripting():
        sides = [p[0], p[0], p[1], p[1]]
        return torch.ops.numdcn.deform_conv(input, offset, weight, bias, mask, [s[0], s[1]], sides, [d[0], d[1]])
    else:
        return _call("deform_conv", (input, offset, weight, bias, mask), (s, (p[0], p[0], p[1], p[1]), d))


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Mean of samples in the bins of boxes: `torchvision.ops.roi_align` computed by numdcn.

    Args:
        input: images `(N, C, H, W)`.
        boxes: `(R, 5)`: image number, x1, y1, x2, y2; or a list with the boxes `(L, 4)` of each image.
        output_size: bins of a box along each axis; an int, or (Ph, Pw).
        spatial_scale: factor from box coordinates to pixels of the input.
        sampling_ratio: samples of a bin along each axis; if 0 or less, about one per pixel.
        aligned: whether to shift by half a pixel, since the centre of pixel i is at i here.

    Returns:
        The bins, `(R, C, Ph, Pw)`.

    Raises:
        AssertionError: boxes have the wrong shape.
        RuntimeError: dtypes do not match, a parameter is out of range, or a box is invalid.

    `numdcn.roi_align_forward` has the formula.
    """
    if not torch.jit.is_scripting() and has_torch_function_variadic(input, boxes):
        more = (output_size, spatial_scale, sampling_ratio, aligned)
        return handle_torch_function(roi_align, (input, boxes), input, boxes, *more)
    rois, bins = boxes_as_rois(boxes), _pair(output_size)
    if torch.jit.is_scripting():
        return torch.ops.numdcn.roi_align(input, rois, [bins[0], bins[1]], spatial_scale, sampling_ratio, aligned)
    else:
        return _call("roi_align", (input, rois), (bins, spatial_scale, sampling_ratio, aligned))


def roi_pool(
    input: Tensor, boxes: Tensor | list[Tensor], output_size: BroadcastingList2[int], spatial_scale: float = 1.0
) -> Tensor:
    """Maxima of the bins of boxes: `torchvision.ops.roi_pool` computed by numdcn.

    Args:
        input: images `(N, C, H, W)`.
        boxes: as in `roi_align`.
        output_size: as in `roi_align`.
        spatial_scale: as in `roi_align`.

    Returns:
        The bins, `(R, C, Ph, Pw)`.

    Raises:
        AssertionError: as in `roi_align`.
        RuntimeError: as in `roi_align`.

    `numdcn.roi_pool_forward` has the formula.
    """
    if not torch.jit.is_scripting() and has_torch_function_variadic(input, boxes):
        return handle_torch_function(roi_pool, (input, boxes), input, boxes, output_size, spatial_scale)
    rois, bins = boxes_as_rois(boxes), _pair(output_size)
    if torch.jit.is_scripting():
        return torch.ops.numdcn.roi_pool(input, rois, [bins[0], bins[1]], spatial_scale)[0]
    else:
        return _call("roi_pool", (input, rois), (bins, spatial_scale))


def ps_roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
) -> Tensor:
    """`roi_align` in which each bin reads channels of its own: `torchvision.ops.ps_roi_align` computed by numdcn.

    Args:
        input: images `(N, C*Ph*Pw, H, W)`.
        boxes: as in `roi_align`.
        output_size: as in `roi_align`.
        spatial_scale: as in `roi_align`.
        sampling_ratio: as in `roi_align`.

    Returns:
        The bins, `(R, C, Ph, Pw)`.

    Raises:
        AssertionError: as in `roi_align`.
        RuntimeError: as in `roi_align`.

    `numdcn.ps_roi_align_forward` has the formula.
    """
    if not torch.jit.is_scripting() and has_torch_function_variadic(input, boxes):
        more = (output_size, spatial_scale, sampling_ratio)
        return handle_torch_function(ps_roi_align, (input, boxes), input, boxes, *more)
    rois, bins = boxes_as_rois(boxes), _pair(output_size)
    if torch.jit.is_scripting():
        return torch.ops.numdcn.ps_roi_align(input, rois, [bins[0], bins[1]], spatial_scale, sampling_ratio)
    else:
        return _call("ps_roi_align", (input, rois), (bins, spatial_scale, sampling_ratio))


def ps_roi_pool(
    input: Tensor, boxes: Tensor | list[Tensor], output_size: BroadcastingList2[int], spatial_scale: float = 1.0
) -> Tensor:
    """Means of bins that read channels of their own: `torchvision.ops.ps_roi_pool` computed by numdcn.

    Args:
        input: images `(N, C*Ph*Pw, H, W)`.
        boxes: as in `roi_align`.
        output_size: as in `roi_align`.
        spatial_scale: as in `roi_align`.

    Returns:
        The bins, `(R, C, Ph, Pw)`. Unlike torchvision's, they include the last row and column of the image.

    Raises:
        AssertionError: as in `roi_align`.
        RuntimeError: as in `roi_align`.

    `numdcn.ps_roi_pool_forward` has the formula.
    """
    if not torch.jit.is_scripting() and has_torch_function_variadic(input, boxes):
        return handle_torch_function(ps_roi_pool, (input, boxes), input, boxes, output_size, spatial_scale)
    rois, bins = boxes_as_rois(boxes), _pair(output_size)
    if torch.jit.is_scripting():
        return torch.ops.numdcn.ps_roi_pool(input, rois, [bins[0], bins[1]], spatial_scale)
    else:
        return _call("ps_roi_pool", (input, rois), (bins, spatial_scale))


def boxes_as_rois(boxes: Tensor | list[Tensor]) -> Tensor:
    """Boxes with the number of their image in front: these, or made from a list with the boxes of each image."""
    if isinstance(boxes, (list, tuple)):
        for one in boxes:
            torch._assert(
                one.size(1) == 4, "The shape of the tensor in the boxes list is not correct as List[Tensor[L, 4]]"
            )
        return torch.cat([torch.nn.functional.pad(one, (1, 0), value=float(i)) for i, one in enumerate(boxes)])
    torch._assert(isinstance(boxes, Tensor), "boxes is expected to be a Tensor[L, 5] or a List[Tensor[K, 4]]")
    torch._assert(boxes.size(1) == 5, "The boxes tensor shape is not correct as Tensor[K, 5]")
    return boxes


def _call(name: str, arrays: Sequence[Tensor | None], flat: Sequence[Any]) -> Tensor:
    """y of an operator; errors are torchvision's kind and have its names."""
    if torch.compiler.is_compiling():
        return call(name, arrays, flat)
    try:
        return call(name, arrays, flat)
    except (TypeError, ValueError) as error:
        text = re.sub(r"(?<=`)(\w+)(?=`)|\b(\w+)(?=\.astype|\.transpose|\[)", _renamed, str(error))
        text = TENSORS.advice(text)
    raise RuntimeError(_known_words(name, arrays) + text)


def _renamed(match: re.Match[str]) -> str:
    """torchvision's name of an argument, where it has another."""
    return NAMES.get(match[0], match[0])


def _known_words(name: str, arrays: Sequence[Any]) -> str:
    """How torchvision begins its errors about the channels of offsets and mask, by which programs know them."""
    if name != "deform_conv" or any(array.dim() != 4 for array in arrays[1:3]):
        return ""
    _, offset, weight, _, mask = arrays
    channels = 2 * weight.shape[2] * weight.shape[3]
    if channels and (offset.shape[1] == 0 or offset.shape[1] % channels):
        return "the shape of the offset tensor at dimension 1 is not valid: "
    if mask is not None and mask.dim() == 4 and 2 * mask.shape[1] != offset.shape[1]:
        return f"mask.shape[1] is not valid: got: {mask.shape[1]} expected: {offset.shape[1] // 2}: "
    return ""


for _name in ("deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
    torch.fx.wrap(_name)
