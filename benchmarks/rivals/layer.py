"""A convolution's layer and its arrays, as given to its contenders."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One layer: x (n, c, h, w) -> y (n, c_out, out_h, out_w) with a square kernel."""

    name: str
    n: int
    c: int
    h: int
    w: int
    c_out: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    mask: bool = False

    @property
    def taps(self) -> int:
        return self.kernel * self.kernel

    @property
    def out_size(self) -> tuple[int, int]:
        reach = self.dilation * (self.kernel - 1) + 1
        height, width = ((size + 2 * self.padding - reach) // self.stride + 1 for size in (self.h, self.w))
        return height, width

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array of the case; mask only if it has one."""
        out = self.out_size
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.n, self.c, self.h, self.w),
            "offsets": (self.n, 2 * self.offset_groups * self.taps, *out),
            "mask": (self.n, self.offset_groups * self.taps, *out),
            "w": (self.c_out, self.c // self.groups, self.kernel, self.kernel),
            "y": (self.n, self.c_out, *out),
        }
        if not self.mask:
            del shapes["mask"]
        return shapes

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the arrays that have a gradient."""
        return ("x", "offsets", "mask", "w") if self.mask else ("x", "offsets", "w")

    @property
    def text(self) -> str:
        """The shape as the tables print it."""
        words = [f"{self.n},{self.c},{self.h},{self.w} -> {self.c_out}, k{self.kernel}"]
        words += [f"s{self.stride}"] * (self.stride > 1)
        words += [f"p{self.padding}"]
        words += [f"d{self.dilation}"] * (self.dilation > 1)
        tail = [f", groups {self.groups}"] * (self.groups > 1)
        tail += [f", {self.offset_groups} offset groups"] * (self.offset_groups > 1)
        tail += [", mask"] * self.mask
        return " ".join(words) + "".join(tail)


class Inputs(NamedTuple):
    """The arrays of a call; grad_y only for a backward."""

    x: np.ndarray  # (n, c, h, w)
    offsets: np.ndarray  # (n, 2*offset_groups*taps, out_h, out_w)
    mask: np.ndarray | None  # (n, offset_groups*taps, out_h, out_w)
    grad_y: np.ndarray | None  # (n, c_out, out_h, out_w)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self if a is not None)
