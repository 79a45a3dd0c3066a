"""What the adapters for torch, torchvision and mmcv all need to know of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import forward_ad

HALVES = (
    torch.float16,
    torch.bfloat16,
)  # computed in float32 here: a bfloat16 tensor has no NumPy array unless ml_dtypes is imported


def widened(tensor: Any) -> Any:
    """The tensor itself, or one in float32 if it has a half type; anything else as it is."""
    return tensor.float() if isinstance(tensor, torch.Tensor) and tensor.dtype in HALVES else tensor


def has_tangent(values: Iterable[Any]) -> bool:
    """Whether a tensor among these has a tangent, of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(
        isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in values
    )
