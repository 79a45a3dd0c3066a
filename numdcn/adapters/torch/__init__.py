"""numdcn inside PyTorch: torchvision's operators, and numdcn's own, on tensors with gradients.

`deform_conv2d`, `roi_align`, `roi_pool`, `ps_roi_align`, `ps_roi_pool` and their modules have torchvision's arguments.
`bilinear_sample`, `deform_conv_layer`, `deform_roi_pool`, `deform_ps_roi_pool` and `DeformConvLayer` have numdcn's; there
is a function for each operator that neither torch nor torchvision has. torch knows all of them as `torch.ops.numdcn.*`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numdcn.adapters.torch._functions import FUNCTIONS
from numdcn.adapters.torch._torchvision import deform_conv2d, ps_roi_align, ps_roi_pool, roi_align, roi_pool
from numdcn.adapters.torch.modules import DeformConv2d, DeformConvLayer, PSRoIAlign, PSRoIPool, RoIAlign, RoIPool

__all__ = [
    "DeformConv2d", "DeformConvLayer", "PSRoIAlign", "PSRoIPool", "RoIAlign", "RoIPool",
    "deform_conv2d", "ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool", *FUNCTIONS,
]  # fmt: skip

globals().update(FUNCTIONS)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
