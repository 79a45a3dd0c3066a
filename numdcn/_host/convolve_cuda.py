"""Convolutions on the GPU, deformable or not: copies, packing and launches around their kernels."""

from __future__ import annotations

from typing import Any

from numdcn._host.arrays_cuda import DeviceArray
from numdcn._host.options import Options
from numdcn._host.weights import PreparedWeights
from numdcn._host.work_cuda import Images, Work, stored
from numdcn._kernels.convolution import Convolution
from numdcn._kernels.convolve_cuda import Call, Tile, tiles
from numdcn._kernels.convolve_forward_cuda import forward_each, forward_tiles

FEW = 8  # channels of a group, below which outputs are computed one by one


def forward(p: Convolution, arrays: dict[str, Any], y: DeviceArray, options: Options) -> None:
    """Fill y. All arrays are checked, y is contiguous."""
    work = Work(y)
    images, weights = work.pack(arrays["x"]), _by_channel(work, p, plain(arrays["w"]))
    call = _call(work, p, images, arrays, y)._replace(weights=weights.address)
    kinds = _kinds(p, arrays)
    if p.in_channels // p.groups < FEW:
        work.spread(forward_each(*kinds), call, y.size)
        return
    outs = p.out_channels // p.groups
    tile = _tile(kinds[0], outs)
    blocks = -(-_pixels(p) // tile.rows) * -(-outs // tile.columns) * p.groups
    work.launch(forward_tiles(*kinds, *tile), call, blocks)


def plain(w: DeviceArray | PreparedWeights) -> DeviceArray:
    """The weights themselves."""
    return w.array if isinstance(w, PreparedWeights) else w


def _pixels(p: Convolution) -> int:
    """Output pixels of all images."""
    return p.batch * p.out_size[0] * p.out_size[1]


def _kinds(p: Convolution, arrays: dict[str, Any]) -> tuple[Any, Any, bool]:
    """The constants of a kernel: stored type, type of the offsets, whether there are any."""
    kind = stored(arrays["x"].dtype)
    sampled = p.offset_groups > 0
    return kind, stored(arrays["offsets"].dtype) if sampled else kind, sampled


def _tile(kind: Any, outs: int) -> Tile:
    """The tile for a number of outputs: the narrowest that holds them all, or the widest."""
    return next((t for t in tiles(kind) if outs <= t.columns), tiles(kind)[-1])


def _by_channel(work: Work, p: Convolution, w: DeviceArray) -> DeviceArray:
    """The weights as (groups, taps, C/groups, C_out/groups)."""
    outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
    made = work.empty((p.groups, p.taps, ins, outs), w.dtype)
    return work.permuted(w, (p.groups, outs, ins, p.taps), (0, 3, 2, 1), made)


def _by_output(work: Work, p: Convolution, w: DeviceArray) -> DeviceArray:
    """The weights as (groups, taps, C_out/groups, C/groups)."""
    outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
    made = work.empty((p.groups, p.taps, outs, ins), w.dtype)
    return work.permuted(w, (p.groups, outs, ins, p.taps), (0, 3, 1, 2), made)


def _call(work: Work, p: Convolution, images: Images, arrays: dict[str, Any], y: DeviceArray) -> Call:
    """The parameters that all kernels need."""
    offsets, mask, bias = (
        work.contiguous(a).address if a is not None else 0 for a in map(arrays.get, ("offsets", "mask", "bias"))
    )
    return Call(
        p, images.array.address, images.pitch, images.pixels, offsets, mask, 0, bias, y.address,
        0, 0, 0, 0, 0, 0, 0, 0, p.taps, 0, 0,
    )  # fmt: skip
