"""Convolutions on the GPU, deformable or not: copies, packing and launches around their kernels."""

from __future__ import annotations

from typing import Any

from numdcn._call.convolution import ConvArrays, Convolution
from numdcn._call.device_array import DeviceArray
from numdcn._call.options import Options
from numdcn._cuda.conv.backward import backward_tile, gradients_each, gradients_of_columns, plan_tap
from numdcn._cuda.conv.backward_mma import (
    column_warps,
    gradients_of_columns_mma,
    gradients_of_weights_mma,
    weight_warps,
)
from numdcn._cuda.conv.columns import Call, tiles
from numdcn._cuda.conv.forward import forward_each, forward_tiles
from numdcn._cuda.conv.forward_mma import forward_mma, warp_tiles
from numdcn._cuda.conv.pack import by_channel, by_depth, by_output, depth_of, in_parts
from numdcn._cuda.conv.weights import Sums, gradients_of_weights, sum_bias, sum_parts, weights_each, weights_tiles
from numdcn._cuda.jit import BF16, F16, F32, SIMULATED, THREADS
from numdcn._cuda.workspace import Images, Plans, Workspace, stored, summed

LEAST = 2 if SIMULATED else 64  # pixels of a share of the weights' gradient
FEW = 8  # channels of a group, below which outputs are computed one by one


def forward(p: Convolution, arrays: ConvArrays, y: DeviceArray, options: Options) -> None:
    """Fill y."""
    with Workspace(y) as work, work.output(y) as target:
        _forward(work, p, arrays, target, options)


def _forward(work: Workspace, p: Convolution, arrays: ConvArrays, y: DeviceArray, options: Options) -> None:
    """The same, where y is contiguous."""
    images, w, kinds = work.pack(arrays.x), arrays.w, _kinds(p, arrays)
    call, outs = _call(work, p, images, arrays, y), p.out_channels // p.groups
    if _few(p):
        call = call._replace(weights=by_channel(work, p, w))
        work.spread(forward_each(*kinds), call, y.size)
        return
    if _uses_mma(work, p, kinds, options):
        tile: Any = _narrowest(warp_tiles(), outs, "columns")
        kernel, threads = forward_mma(*kinds, *tile), tile.threads
        address, depth, width = in_parts(work, p, w, tile.columns)
        call = call._replace(weights=address, depth=depth, part_channels=width)
    else:
        tile = _narrowest(tiles(kinds[0]), outs, "columns")
        kernel, threads = forward_tiles(*kinds, *tile), THREADS
        call = call._replace(weights=by_channel(work, p, w))
    blocks = -(-_pixels(p) // tile.rows) * -(-outs // tile.columns) * p.groups
    split_k = max(1, min(work.shares(blocks), p.taps, 2**26 // y.size))
    if split_k == 1:
        work.launch(kernel, call, blocks, threads)
        return
    sums = work.empty((split_k, y.size), summed(y.dtype))
    work.launch(kernel, call._replace(sums=sums.address, split_k=split_k), blocks * split_k, threads)
    work.spread(sum_parts(kinds[0]), Sums(sums.address, y.address, y.size, split_k, 0), y.size)


def _uses_mma(work: Workspace, p: Convolution, kinds: tuple[Any, ...], options: Options) -> bool:
    """Whether products are made by tensor cores."""
    wanted = kinds[0] in (F16, BF16) or (kinds[0] == F32 and options.allow_tf32)
    return wanted and work.mma_cores and not _few(p)


def _narrowest(tiles: tuple[Any, ...], outs: int, side: str) -> Any:
    """The first tile that holds so many outputs along its rows or columns, or the widest."""
    return next((tile for tile in tiles if outs <= getattr(tile, side)), tiles[-1])


def _pixels(p: Convolution) -> int:
    """Output pixels of all images."""
    return p.batch * p.out_size[0] * p.out_size[1]


def _kinds(p: Convolution, arrays: ConvArrays) -> tuple[Any, Any, bool]:
    """The constants of a kernel: stored type, type of the offsets, whether there are any."""
    kind = stored(arrays.x.dtype)
    sampled = p.offset_groups > 0
    return kind, stored(arrays.offsets.dtype) if sampled else kind, sampled


def _call(work: Workspace, p: Convolution, images: Images, arrays: ConvArrays, y: DeviceArray) -> Call:
    """The parameters that all kernels need."""
    offsets, mask, bias = (
        work.contiguous(a).address if a is not None else 0 for a in (arrays.offsets, arrays.mask, arrays.bias)
    )
    return Call(
        p, images.array.address, images.pitch, images.pixels, offsets, mask, 0, bias, y.address,
        0, 0, 0, 0, 0, 0, 0, 0, p.taps, 0, 1, 0, 0,
    )  # fmt: skip


def backward(p: Convolution, grad_y: DeviceArray, arrays: ConvArrays, grads: ConvArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    with Workspace(grad_y) as work, work.outputs(grads) as targets:
        _backward(work, p, grad_y, arrays, targets, options)


def _backward(
    work: Workspace, p: Convolution, grad_y: DeviceArray, arrays: ConvArrays, grads: ConvArrays, options: Options
) -> None:
    """The same, where gradients are contiguous."""
    grad_y = work.contiguous(grad_y)
    if grads.bias is not None:
        _bias(work, p, grad_y, grads.bias)
    through = any(g is not None for g in (grads.x, grads.offsets, grads.mask))
    if not through and grads.w is None:
        return
    reads = any(g is not None for g in (grads.w, grads.offsets, grads.mask))
    images = work.pack(arrays.x) if reads else work.image_sizes(arrays.x)
    call, mma = _call(work, p, images, arrays, grad_y), _uses_mma(work, p, _kinds(p, arrays), options)
    if mma:
        outs = p.out_channels // p.groups
        depth = depth_of(outs, stored(grad_y.dtype), aligned=True)
        rows = work.rows(grad_y.reshaped(p.batch * p.groups, outs, p.out_size[0] * p.out_size[1]), depth)
        call = call._replace(y=rows.address, depth=depth)
    if through:
        _columns(work, p, call, arrays, grads, options, mma)
    if grads.w is not None:
        _weights(work, p, call, arrays, grad_y, grads.w, mma)


def _few(p: Convolution) -> bool:
    return p.in_channels // p.groups < FEW


def _columns(
    work: Workspace,
    p: Convolution,
    call: Call,
    arrays: ConvArrays,
    grads: ConvArrays,
    options: Options,
    mma: bool,
) -> None:
    """The gradients of x, offsets and mask."""
    x, kinds, w, grad_images = arrays.x, _kinds(p, arrays), arrays.w, None
    owned = grads.x is not None and options.deterministic
    call = call._replace(weights=by_depth(work, p, w, call.depth) if mma else by_output(work, p, w))
    if grads.offsets is not None:
        call = call._replace(grad_offsets=grads.offsets.address)
    if grads.mask is not None:
        call = call._replace(grad_mask=grads.mask.address)
    if grads.x is not None:
        grad_images = work.no_images(x.shape, x.dtype)
        if not owned:
            call = call._replace(grad_images=grad_images.array.address, grad_pitch=grad_images.pitch)
    vectors = grads.x is not None and not owned and work.vectors(x.dtype)
    constants = (*kinds, vectors, owned)
    if grad_images is None or not owned:
        _launch_columns(work, p, call, constants, mma)
    else:
        _owned_columns(work, p, call, constants, x, grad_images, mma)
    if grad_images is not None:
        work.unpack(grad_images, grads.x)


def _launch_columns(work: Workspace, p: Convolution, call: Call, constants: tuple[Any, ...], mma: bool) -> None:
    ogs = max(p.offset_groups, 1)
    if _few(p):
        work.spread(gradients_each(*constants[:3], constants[4]), call, _pixels(p) * call.taps * ogs)
        return
    if mma:
        tile: Any = column_warps()
        kernel, threads = gradients_of_columns_mma(*constants, *tile), tile.threads
    else:
        tile = backward_tile(constants[0])
        kernel, threads = gradients_of_columns(*constants, *tile), THREADS
    work.launch(kernel, call, -(-_pixels(p) // tile.rows) * call.taps * ogs, threads)


def _owned_columns(
    work: Workspace,
    p: Convolution,
    call: Call,
    constants: tuple[Any, ...],
    x: DeviceArray,
    grad_images: Images,
    mma: bool,
) -> None:
    """The same, tap by tap: the gradients of the columns are kept and then added to the images in a fixed order."""
    ogs, count = max(p.offset_groups, 1), p.out_size[0] * p.out_size[1]
    channels = p.in_channels // ogs
    plans = work.plans(ogs * p.batch, count, x.dtype)
    values = work.empty((ogs * p.batch, count, channels), summed(x.dtype))
    for tap in range(p.taps):
        one = call._replace(
            first_tap=tap, taps=1, values=values.address, places=plans.places.address, corners=plans.weights.address
        )
        _launch_columns(work, p, one, constants, mma)
        work.spread(plan_tap(*constants[:3]), one._replace(mask=0), ogs * _pixels(p))
        for og in range(ogs):
            part = Plans(*(plan.part(og, ogs) for plan in plans))
            work.scatter(
                part, values.part(og, ogs), grad_images, x.shape, og * channels, corners=4 if constants[2] else 1
            )


def _weights(
    work: Workspace,
    p: Convolution,
    call: Call,
    arrays: ConvArrays,
    grad_y: DeviceArray,
    grad_w: DeviceArray,
    mma: bool,
) -> None:
    """The gradient of w: parts, then their sums."""
    kinds, size = _kinds(p, arrays), grad_w.size
    outs, ins = p.out_channels // p.groups, p.in_channels // p.groups
    few = _few(p)
    tile: Any = _narrowest(weight_warps() if mma else weights_tiles(kinds[0]), outs, "rows")
    tasks = p.taps * p.groups * -(-outs // tile.rows) * -(-ins // tile.columns)
    if few:
        tasks = -(-size // THREADS)
    split_k = max(1, min(work.shares(tasks), _pixels(p) // LEAST, 2**26 // size, 256))
    sums = work.empty((split_k, size), summed(grad_w.dtype))
    call = call._replace(sums=sums.address, split_k=split_k)
    if few:
        turned = grad_y.reshaped(p.batch, p.out_channels, p.out_size[0] * p.out_size[1])
        call = call._replace(y=work.channels_last(turned, grad_y.dtype).address)
        work.spread(weights_each(*kinds), call, split_k * size)
    elif mma:
        work.launch(gradients_of_weights_mma(*kinds, *tile), call, split_k * tasks, tile.threads)
    else:
        work.launch(gradients_of_weights(*kinds, *tile), call, split_k * tasks)
    work.spread(sum_parts(kinds[0]), Sums(sums.address, grad_w.address, size, split_k, 0), size)


def _bias(work: Workspace, p: Convolution, grad_y: DeviceArray, grad_bias: DeviceArray) -> None:
    sums = Sums(grad_y.address, grad_bias.address, p.out_channels, p.batch, p.out_size[0] * p.out_size[1])
    work.launch(sum_bias(stored(grad_y.dtype)), sums, p.out_channels)
