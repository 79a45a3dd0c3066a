"""Launches of the kernels for few channels per group (`few`)."""

from __future__ import annotations

from typing import Any

from numdcn._call.convolution import Convolution
from numdcn._call.device_array import DeviceArray
from numdcn._cuda.conv import pack
from numdcn._cuda.conv.call import Call, Types, offset_groups_of
from numdcn._cuda.conv.few import Few, forward_few, gradients_few, pixels_of_gradients, size_of, weights_few
from numdcn._cuda.memory import vector_length
from numdcn._cuda.workspace import Workspace, stored


def _chunked(p: Convolution, dtype: Any, with_weights: bool) -> Few:
    """How groups and outputs are divided into chunks; the call is left out."""
    size, vector = size_of(dtype), vector_length(dtype)
    outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
    most = size.results // ins if with_weights else size.outputs
    mine = min(outs, size.outputs, most)
    groups = 1
    if mine == outs:
        groups = max(1, min(size.channels // ins, size.outputs // outs, p.groups))
        if with_weights:
            groups = max(1, min(groups, size.results // (outs * ins)))
        if groups * ins % vector and groups * ins + vector - 1 > size.channels:  # a chunk may begin within a vector
            groups = (size.channels - vector + 1) // ins
    return Few((), groups, mine, -(-outs // mine), 1)  # type: ignore[arg-type]


def _chunks(p: Convolution, few: Few) -> int:
    """The number of chunks."""
    return -(-p.groups // few.groups) * few.wide


def _pixels(p: Convolution) -> int:
    return p.batch * p.out_size[0] * p.out_size[1]


def forward(work: Workspace, p: Convolution, types: Types, call: Call, w: pack.Weights) -> None:
    """Fill y."""
    few, tiles = _chunked(p, types[0], False), -(-_pixels(p) // size_of(types[0]).pixels)
    runs = max(1, min(_chunks(p, few), -(-8 * work.multiprocessors // max(tiles, 1))))
    call = call._replace(weights=pack.in_place(work, w))
    work.launch(forward_few(*types), few._replace(call=call, runs=runs), tiles * runs)


def rows(work: Workspace, p: Convolution, grad_y: DeviceArray) -> tuple[DeviceArray, int]:
    """The gradient of y channels-last, as the kernels want it, and its channels including padding."""
    vector = vector_length(stored(grad_y.dtype))
    depth = -(-p.out_channels // vector) * vector
    turned = grad_y.reshaped(p.batch, p.out_channels, p.out_size[0] * p.out_size[1])
    return work.pack_rows(turned, depth, tf32=False), depth


def columns(work: Workspace, p: Convolution, types: Types, call: Call, vectors: bool) -> None:
    """The gradients of columns, for the taps of a call, and what follows from them. `vectors`: use 16-byte atomic adds."""
    few = Few(call, 1, 1, 1, 1)
    tiles = -(-_pixels(p) // pixels_of_gradients(types[0]))
    work.launch(gradients_few(*types, vectors), few, tiles * call.taps * offset_groups_of(p))


def weight_tasks(p: Convolution, dtype: Any) -> int:
    """The number of tasks that the gradient of the weights has, for one split."""
    return _chunks(p, _chunked(p, dtype, True)) * -(-p.taps // size_of(dtype).taps)


def weights(work: Workspace, p: Convolution, types: Types, call: Call) -> None:
    """Splits of the gradient of the weights."""
    few = _chunked(p, types[0], True)._replace(call=call)
    work.launch(weights_few(*types), few, call.split_k * weight_tasks(p, types[0]))
