"""The parameters of the convolution kernels, and the arrays they see."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call.convolution import Convolution
from numdcn._cuda.coordinates import coordinate_viewer
from numdcn._cuda.jit import compute_type, device, type_pairs
from numdcn._cuda.memory import view

Types = tuple[Any, Any, bool]  # constants of every kernel: stored type, type of the offsets, whether there are any


class Call(NamedTuple):
    """Parameters of the kernels. Fields without a default are needed in every call; an address of 0 means absent."""

    p: Convolution
    images: int  # (N, pixels, pitch), see `layout`
    pitch: int  # channels of the images, including padding
    pixels: int  # per image, including padding
    offsets: int  # (N, 2*offset_groups*taps, Ho, Wo)
    mask: int  # (N, offset_groups*taps, Ho, Wo)
    bias: int  # (C_out,)
    y: int  # (N, C_out, Ho, Wo); in the backward its gradient, packed or channels-last if a kernel says so
    taps: int  # number of taps, starting at `first_tap`
    first_tap: int = 0
    weights: int = 0  # by `pack.by_channel`, for gradients of columns `by_output`; for mma `in_segments`, `by_depth`
    grad_images: int = 0  # (N, pixels, grad_pitch)
    grad_pitch: int = 0
    grad_offsets: int = 0  # as offsets
    grad_mask: int = 0  # as mask
    values: int = 0  # (offset groups, N, Ho*Wo, C/offset groups): gradients of the columns of one tap, for `scatter`
    places: int = 0  # the plans of `scatter`
    corners: int = 0
    partials: int = 0  # (split_k, shape of the sum: y or the gradient of w); unused if split_k is 1
    split_k: int = 1  # number of splits of a product's depth
    depth: int = 0  # for mma: elements per row of packed weights (see `pack`) and of the packed gradient of y
    segment: int = 0  # for mma: channels per packed segment of a group
    ogs: int = 1  # offset groups planned together, at most; see `planned_together`


class Arrays(NamedTuple):
    """The arrays of a `Call`, as `view` gives them, offsets as `coordinates` does. One whose address is 0 must not be
    used."""

    images: Any
    offsets: Any
    mask: Any
    weights: Any
    bias: Any
    y: Any
    partials: Any
    grad_images: Any
    grad_offsets: Any
    grad_mask: Any
    values: Any


def viewer(T: Any, C: Any) -> Any:
    """Make `arrays_of(c)`, the arrays of a call; T: stored type, C: type of the offsets."""
    A, coordinates = compute_type(T), coordinate_viewer(T)

    @device
    def arrays_of(c):
        return Arrays(
            view(c.images, T),
            coordinates(c.offsets),
            view(c.mask, T),
            view(c.weights, T),
            view(c.bias, T),
            view(c.y, T),
            view(c.partials, A),
            view(c.grad_images, A),
            coordinates(c.grad_offsets),
            view(c.grad_mask, T),
            view(c.values, A),
        )

    return arrays_of


@device
def offset_groups_of(p):
    """The number of offset groups; 1 for a convolution without offsets."""
    return max(p.offset_groups, 1)


def variants() -> list[tuple[Any, ...]]:
    """(stored, coordinates, sampled): the variants of all convolution kernels."""
    plain = [(dtype, dtype, False) for dtype, _ in type_pairs()]
    return [(*pair, True) for pair in type_pairs()] + plain
