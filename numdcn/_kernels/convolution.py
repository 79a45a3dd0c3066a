"""The sizes of a convolution, deformable or not: what its kernels are told."""

from __future__ import annotations

from typing import NamedTuple


class Convolution(NamedTuple):
    """The sizes of one convolution. Tuples have an entry for each axis, y first."""

    batch: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # padding
    after: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int  # 0: the taps stay where they are (no offsets)
    taps: int
    masked: int  # 1 or 0
    biased: int

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.batch, self.out_channels, *self.out_size

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """The shape of w."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    def describe_shapes(self) -> str:
        """What the shapes are made of, for error messages."""
        return f"N={self.batch}, C={self.in_channels}, Ho={self.out_size[0]}, Wo={self.out_size[1]}"
