"""Sizes of DCNv3 and DCNv4: where the points of an output pixel lie before their offsets, a window moved over x."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call import hints
from numdcn._call.attention import Attention, Grid, Level
from numdcn._call.checks import check_countable, describe, flag, number, padding_per_axis, per_axis
from numdcn._call.convolution import steps


class Window(NamedTuple):
    """A window and its way over x. Tuples have one entry per axis, y first."""

    in_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]  # padding above and to the left
    after: tuple[int, int]
    dilation: tuple[int, int]
    remove_center: bool

    @property
    def points(self) -> int:
        """The number of its points."""
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def out_size(self) -> tuple[int, int]:
        """The size of y, checked."""
        out = []
        for i, axis in enumerate(("H", "W")):
            padded, reach = (
                self.in_size[i] + self.before[i] + self.after[i],
                self.dilation[i] * (self.kernel[i] - 1) + 1,
            )
            if padded < reach:
                raise ValueError(
                    f"with `padding` of ({self.before[i]}, {self.after[i]}) `x` is {padded} pixels long along {axis}, expected "
                    f"at least {reach}, which `kernel_size` {self.kernel[i]} with dilation {self.dilation[i]} spans"
                )
            out.append(steps(padded, reach, self.stride[i]))
        return out[0], out[1]

    def describe(self) -> str:
        """The points, for error messages."""
        kernel = f"kernel_size={self.kernel}" + ", remove_center=True" * self.remove_center
        return f"{self.points} points of {kernel}"

    def other_center(self, weights: int, channels: int) -> str:
        """Whether keeping or removing the centre makes weights of all groups fit x of some channels."""
        odd = self.kernel[0] % 2 == 1 and self.kernel[1] % 2 == 1
        points = self.kernel[0] * self.kernel[1] - (not self.remove_center)
        if not odd or points < 1 or weights < 1 or weights % points or channels % (weights // points):
            return ""
        return f"; remove_center={not self.remove_center} would fit"


def window(x: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, remove_center: Any) -> Window:
    """Read off x, (N, H, W, C), and check."""
    if min(x.shape[1:]) < 1:
        raise ValueError(f"`x` has shape {x.shape}, expected no empty axis except the batch")
    kernel = per_axis("kernel_size", kernel_size, 1)
    before, after = padding_per_axis(padding)
    made = Window(
        x.shape[1:3], kernel, per_axis("stride", stride, 1), before, after, per_axis("dilation", dilation, 1),
        flag("remove_center", remove_center),
    )  # fmt: skip
    if made.remove_center and (kernel[0] % 2 == 0 or kernel[1] % 2 == 0 or kernel == (1, 1)):
        raise ValueError(
            f"`remove_center` is True with `kernel_size` {describe(kernel_size)}, expected odd sizes, one of them above 1"
        )
    for size, first, last in zip(made.in_size, before, after, strict=True):
        check_countable("x", size + first + last, x.dtype)
    return made


def problem_of(x: Any, made: Window, groups: int, offset_scale: Any) -> Attention:
    """The problem for x, once all shapes were found to be right."""
    scale = number("offset_scale", offset_scale, x.dtype)
    batch, height, width, channels = x.shape
    (high, wide), (reach_y, reach_x), out = made.kernel, made.dilation, made.out_size
    middle = reach_y * (high - 1) // 2, reach_x * (wide - 1) // 2
    taps = tuple(
        (float(j * reach_y - middle[0]), float(i * reach_x - middle[1]))
        for i in range(wide)
        for j in range(high)
        if not (made.remove_center and (i, j) == (wide // 2, high // 2))
    )
    origin = float(middle[0] - made.before[0]), float(middle[1] - made.before[1])
    grid = Grid(out[1], made.stride, origin, taps, ((scale, scale),) * len(taps))
    levels = (Level(height, width, 0, len(taps)),)
    return Attention(batch, out[0] * out[1], groups, channels // groups, levels, grid, (batch, *out, channels))


def check_pixels(made: Window, x: Any, name: str, array: Any) -> None:
    """Raise unless an array (N, Ho, Wo, ...) has the batch of x and the size of y."""
    expected = (x.shape[0], *made.out_size)
    if array.shape[:3] != expected:
        raise ValueError(
            f"`{name}` has shape {array.shape}, expected {(*expected, array.shape[3])} with N={x.shape[0]}, "
            f"Ho={expected[1]}, Wo={expected[2]}"
        )


def way_out(made: Window, x: Any, array: Any) -> str:
    """What would make the size of y that of an array (N, Ho, Wo, ...): another padding, or x with its channels last."""
    wanted = array.shape[1:3]
    try:
        if made.out_size == wanted:
            return ""
    except ValueError:  # x is smaller than the window
        pass
    if array.shape[0] != x.shape[0]:
        return ""
    turned = made._replace(in_size=x.shape[2:4])
    equal, other = (hints.padding_for(each, wanted) for each in (made, turned))
    if not isinstance(equal, int) and isinstance(other, int):
        return hints.turned(x, (0, 2, 3, 1), "channels-first")
    return hints.would_fit(equal)


def result_shape(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    """The shape of y, of which nothing is checked: sizes may be symbols. Options per axis, padding in pairs."""
    size = (steps(x.shape[1 + i] + sum(padding[i]), dilation[i] * (kernel[i] - 1) + 1, stride[i]) for i in range(2))
    return x.shape[0], *size, x.shape[3]
