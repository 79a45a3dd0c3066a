"""Modules: torchvision's, and the deformable layer that learns its offsets."""

# No `from __future__ import annotations`: TorchScript reads them.
import math

import torch
from torch import Tensor, nn
from torch.jit.annotations import BroadcastingList2
from torch.nn.modules.utils import _pair

from numdcn.adapters.torch._eager import call
from numdcn.adapters.torch._torchvision import deform_conv2d, ps_roi_align, ps_roi_pool, roi_align, roi_pool


class _Convolution(nn.Module):
    """What convolutions with a weight and a bias share: geometry, parameters, initial values."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be divisible by groups: got {channels} and {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, uniform in ±1/sqrt(fan_in)."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def __repr__(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1}
        parts += [f"{key}={getattr(self, key)}" for key, value in usual.items() if getattr(self, key) != value]
        return f"{type(self).__name__}({', '.join([*parts, *self._more()])})"

    def _more(self) -> list[str]:
        return ["bias=False"] if self.bias is None else []


class DeformConv2d(_Convolution):
    """`torchvision.ops.DeformConv2d` computed by numdcn: its arguments, parameters and initial values.

    Offsets, and a mask for v2, are given to each call; see `deform_conv2d`. `DeformConvLayer` learns them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.reset_parameters()

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """`deform_conv2d` with the weight and bias of this module."""
        return deform_conv2d(
            input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )  # fmt: skip


class DeformConvLayer(_Convolution):
    """Deformable convolution with offsets, and a mask if `modulated`, that a convolution of its own predicts.

    Args:
        in_channels: C, a multiple of groups and of offset_groups.
        out_channels: C_out, a multiple of groups.
        kernel_size: an int, or one per axis (y, x).
        stride: in pixels; an int, or one per axis (y, x).
        padding: zeros on both sides of each axis; an int, or one per axis (y, x).
        dilation: spacing of the taps in pixels; an int, or one per axis (y, x).
        groups: number of contiguous blocks the channels of the convolution are split into.
        bias: whether to have one.
        offset_groups: number of contiguous blocks of channels that share their offsets.
        modulated: whether to predict a mask too (DCNv2).
        mask_scale: 1 (mmcv: a logit of 0 gives a mask of 0.5) or 2 (the authors' code: it gives 1).

    The parameters are `weight` and `bias`, and `offset_weight` and `offset_bias` of the predicting convolution. The last
    two start at 0, so the layer starts as a plain convolution, scaled by mask_scale/2 if modulated.
    `numdcn.deform_conv_layer_forward` has the formula.
    """

    def __init__(  # parameters: of both convolutions
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        offset_groups: int = 1,
        modulated: bool = False,
        mask_scale: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        if in_channels % offset_groups:
            raise ValueError(f"in_channels must be divisible by offset_groups: got {in_channels} and {offset_groups}")
        if mask_scale not in (1, 2):
            raise ValueError(f"mask_scale must be 1 or 2: got {mask_scale}")
        self.offset_groups, self.modulated, self.mask_scale = offset_groups, modulated, mask_scale
        kh, kw = self.kernel_size
        predicted = (3 if modulated else 2) * offset_groups * kh * kw
        self.offset_weight = nn.Parameter(torch.empty(predicted, in_channels, kh, kw))
        self.offset_bias = nn.Parameter(torch.empty(predicted))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew; set the predicting convolution to 0."""
        super().reset_parameters()
        nn.init.zeros_(self.offset_weight)
        nn.init.zeros_(self.offset_bias)

    def forward(self, input: Tensor) -> Tensor:
        """The result `(N, C_out, Ho, Wo)` of images `(N, C, H, W)`."""
        p = self.padding
        sides = [p[0], p[0], p[1], p[1]]
        if torch.jit.is_scripting():
            return torch.ops.numdcn.deform_conv_layer(
                input, self.weight, self.offset_weight, self.offset_bias, self.bias,
                self.modulated, self.mask_scale, self.stride, sides, self.dilation,
            )[0]  # fmt: skip
        else:
            arrays = (input, self.weight, self.offset_weight, self.offset_bias, self.bias)
            flat = (self.modulated, self.mask_scale, self.stride, sides, self.dilation)
            return call("deform_conv_layer", arrays, flat)

    def _more(self) -> list[str]:
        usual = {"offset_groups": 1, "modulated": False, "mask_scale": 1}
        more = [f"{key}={getattr(self, key)}" for key, value in usual.items() if getattr(self, key) != value]
        return [*super()._more(), *more]


class RoIAlign(nn.Module):
    """`torchvision.ops.RoIAlign` computed by numdcn; see `roi_align`."""

    def __init__(
        self,
        output_size: BroadcastingList2[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
    ) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio, aligned

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """`roi_align` with the parameters of this module."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def __repr__(self) -> str:
        return _text(self, "output_size", "spatial_scale", "sampling_ratio", "aligned")


class RoIPool(nn.Module):
    """`torchvision.ops.RoIPool` computed by numdcn; see `roi_pool`."""

    def __init__(self, output_size: BroadcastingList2[int], spatial_scale: float) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """`roi_pool` with the parameters of this module."""
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return _text(self, "output_size", "spatial_scale")


class PSRoIAlign(nn.Module):
    """`torchvision.ops.PSRoIAlign` computed by numdcn; see `ps_roi_align`."""

    def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int) -> None:
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio = output_size, spatial_scale, sampling_ratio

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """`ps_roi_align` with the parameters of this module."""
        return ps_roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio)

    def __repr__(self) -> str:
        return _text(self, "output_size", "spatial_scale", "sampling_ratio")


class PSRoIPool(nn.Module):
    """`torchvision.ops.PSRoIPool` computed by numdcn; see `ps_roi_pool`."""

    def __init__(self, output_size: int, spatial_scale: float) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """`ps_roi_pool` with the parameters of this module."""
        return ps_roi_pool(input, rois, self.output_size, self.spatial_scale)

    def __repr__(self) -> str:
        return _text(self, "output_size", "spatial_scale")


def _text(module: nn.Module, *names: str) -> str:
    return f"{type(module).__name__}({', '.join(f'{name}={getattr(module, name)}' for name in names)})"


for _name in ("deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
    torch.fx.wrap(_name)
