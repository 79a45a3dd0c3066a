"""Which convolutions in bfloat16 are computed by dot products of pairs of channels in the forward.

A convolution of pairs of neighbouring channels has half as many channels, whose elements are as large as float32
numbers, so its tiles, chunks and packed weights are those of a float32 convolution with half the channels.
"""

from __future__ import annotations

import numpy as np

from numdcn._call.arrays import is_half
from numdcn._call.convolution import Convolution
from numdcn._cpu.conv.pack import is_depthwise
from numdcn._cpu.pairs import has_dot_products


def multiplies_weights(shape: tuple[int, ...], groups: int, dtype: np.dtype) -> bool:
    """Whether there are dot products for weights of this shape and type."""
    if not is_half(dtype) or dtype == np.float16 or not has_dot_products():
        return False
    return shape[1] % 2 == 0 and not is_depthwise(
        groups, (shape[0], shape[1] // 2)
    )  # the kernels multiply no pairs there


def multiplies_pairs(p: Convolution, dtype: np.dtype) -> bool:
    """Whether the forward of a convolution computes dot products. No pair may belong to two groups."""
    if p.offset_groups and p.in_channels // p.offset_groups % 2:
        return False
    return multiplies_weights(p.weights_shape, p.groups, dtype)


def paired(p: Convolution) -> Convolution:
    """The convolution of pairs."""
    return p._replace(in_channels=p.in_channels // 2)
