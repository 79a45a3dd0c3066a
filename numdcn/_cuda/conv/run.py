"""Convolutions on the GPU, deformable or not: copies, packing and launches around their kernels.

A product is computed in one of three ways: on tensor cores (mma), by tiles of threads, or as groups with few channels
need it (few).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call.convolution import ConvArrays, Convolution
from numdcn._call.device_array import DeviceArray
from numdcn._call.options import Options
from numdcn._cuda import replay
from numdcn._cuda.conv import pack, run_few, two_step
from numdcn._cuda.conv.backward import backward_tile, bundle_of, columns_ogs, gradients_of_columns, plan_tap
from numdcn._cuda.conv.backward_mma import (
    column_warps,
    columns_mma_ogs,
    gradients_of_columns_mma,
    gradients_of_weights_mma,
    weight_warps,
    weights_mma_plans,
)
from numdcn._cuda.conv.call import Call, Types
from numdcn._cuda.conv.columns import planned_together
from numdcn._cuda.conv.columns_mma import ATOM, warp_tiles
from numdcn._cuda.conv.forward import forward_tiles, planned_by
from numdcn._cuda.conv.forward_mma import forward_mma, planned_by_mma
from numdcn._cuda.conv.products import CHUNK, tiles
from numdcn._cuda.conv.weights import (
    Sums,
    gradients_of_weights,
    sum_bias,
    sum_partials,
    weights_plans,
    weights_tiles,
)
from numdcn._cuda.coordinates import address_of
from numdcn._cuda.jit import BF16, F16, F32, SIMULATED, THREADS, compute_type
from numdcn._cuda.memory import vector_length
from numdcn._cuda.mma import per_word
from numdcn._cuda.workspace import Images, Plans, Workspace, stored, summed

LEAST = 2 if SIMULATED else 64  # minimum number of pixels per split of the weights' gradient
FEW = 8  # with fewer channels per group, columns are not multiplied in tiles


class Job(NamedTuple):
    """One call: where it runs, its sizes, and which kernels it uses."""

    work: Workspace
    p: Convolution
    types: Types
    few: bool  # few channels per group
    mma: bool  # products on tensor cores

    @property
    def outs(self) -> int:
        """Output channels per group."""
        return self.p.out_channels // self.p.groups

    @property
    def ins(self) -> int:
        """Input channels per group."""
        return self.p.in_channels // self.p.groups

    @property
    def offset_groups(self) -> int:
        """1 for a convolution without offsets."""
        return max(self.p.offset_groups, 1)

    @property
    def out_pixels(self) -> int:
        """Output pixels per image."""
        return self.p.out_size[0] * self.p.out_size[1]

    @property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return self.p.batch * self.out_pixels


def _job(work: Workspace, p: Convolution, arrays: ConvArrays, options: Options) -> Job:
    dtype, sampled, few = stored(arrays.x.dtype), p.offset_groups > 0, p.in_channels // p.groups < FEW
    types = dtype, compute_type(dtype) if sampled else dtype, sampled
    wanted = dtype in (F16, BF16) or (dtype == F32 and options.allow_tf32)
    return Job(work, p, types, few, wanted and work.has_mma and not few)


def _call(job: Job, images: Images, arrays: ConvArrays, y: DeviceArray) -> Call:
    """The parameters that all kernels need."""
    mask, bias = (job.work.contiguous(a).address if a is not None else 0 for a in (arrays.mask, arrays.bias))
    offsets = address_of(None if arrays.offsets is None else job.work.contiguous(arrays.offsets))
    p = job.p
    return Call(p, images.array.address, images.pitch, images.pixels, offsets, mask, bias, y.address, p.taps)


def _narrowest(tiles: tuple[Any, ...], outs: int, side: str) -> Any:
    """The first tile with at least `outs` rows or columns, or the largest."""
    return next((tile for tile in tiles if outs <= getattr(tile, side)), tiles[-1])


@replay.forward
def forward(p: Convolution, arrays: ConvArrays, y: DeviceArray, options: Options) -> None:
    """Fill y."""
    with Workspace(y) as work, work.output(y) as target:
        if two_step.choose(work, p, arrays.x, options, two_step.FORWARD):
            two_step.forward(work, p, arrays, target, options)
            return
        job = _job(work, p, arrays, options)
        call = _call(job, work.pack_images(arrays.x), arrays, target)
        if job.few:
            run_few.forward(work, p, job.types, call, arrays.w)
        else:
            _forward_tiles(job, call, arrays.w, target)


def _forward_tiles(job: Job, call: Call, w: pack.Weights, y: DeviceArray) -> None:
    """Tiles of y. If there are too few to fill the device, the taps of a tile are split among blocks."""
    work, p = job.work, job.p
    if job.mma:
        tile: Any = _narrowest(warp_tiles(), job.outs, "columns")
        kernel, threads = forward_mma(*job.types, *tile), tile.threads
        chunk = tile.words * per_word(job.types[0])
        ogs = planned_together(p, ATOM, planned_by_mma(job.types[0], tile), chunk)
        address, depth, segment = pack.in_segments(work, p, w, tile.columns, ogs > 1)
        call = call._replace(weights=address, depth=depth, segment=segment, ogs=ogs)
    else:
        tile = _narrowest(tiles(job.types[0]), job.outs, "columns")
        kernel, threads = forward_tiles(*job.types, *tile), THREADS
        ogs = planned_together(p, vector_length(job.types[0]), planned_by(job.types[0], *tile[:2]), CHUNK)
        call = call._replace(weights=pack.by_channel(work, p, w), ogs=ogs)
    blocks = -(-job.pixels // tile.rows) * -(-job.outs // tile.columns) * p.groups
    split_k = max(1, min(work.split_k(blocks), p.taps, 2**26 // y.size))
    if split_k == 1:
        work.launch(kernel, call, blocks, threads)
        return
    partials = work.empty((split_k, y.size), summed(y.dtype))
    work.launch(kernel, call._replace(partials=partials.address, split_k=split_k), blocks * split_k, threads)
    _sum_partials(job, partials, y)


def _sum_partials(job: Job, partials: DeviceArray, result: DeviceArray) -> None:
    """Fill the result with the sum of its splits."""
    sums = Sums(partials.address, result.address, result.size, len(partials), 0)
    job.work.spread(sum_partials(job.types[0]), sums, result.size)


@replay.backward
def backward(p: Convolution, grad_y: DeviceArray, arrays: ConvArrays, grads: ConvArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    with Workspace(grad_y) as work, work.outputs(grads) as targets:
        job, grad_y = _job(work, p, arrays, options), work.contiguous(grad_y)
        if targets.bias is not None:
            _bias(job, grad_y, targets.bias)
        in_columns = any(g is not None for g in (targets.x, targets.offsets, targets.mask))
        if not in_columns and targets.w is None:
            return
        if two_step.choose(work, p, arrays.x, options, two_step.BACKWARD):
            two_step.backward(work, p, grad_y, arrays, targets, options)
            return
        reads = any(g is not None for g in (targets.w, targets.offsets, targets.mask))
        call = _call(job, work.pack_images(arrays.x) if reads else work.image_sizes(arrays.x), arrays, grad_y)
        if job.mma:
            depth = pack.depth_of(job.outs, job.types[0], aligned=True)
            rows = work.pack_rows(grad_y.reshaped(p.batch * p.groups, job.outs, job.out_pixels), depth)
            call = call._replace(y=rows.address, depth=depth)
        elif job.few:
            rows, depth = run_few.rows(work, p, grad_y)
            call = call._replace(y=rows.address, depth=depth)
        if in_columns:
            _columns(job, call, arrays, targets, options)
        if targets.w is not None:
            _weights(job, call, targets.w)


def _columns(job: Job, call: Call, arrays: ConvArrays, grads: ConvArrays, options: Options) -> None:
    """The gradients of x, offsets and mask."""
    work, p, x = job.work, job.p, arrays.x
    if job.mma:
        weights = pack.by_depth(work, p, arrays.w, call.depth)
    elif job.few:
        weights = pack.by_tap(work, p, arrays.w)
    else:
        weights = pack.by_output(work, p, arrays.w)
    grad_mask = 0 if grads.mask is None else grads.mask.address
    call = call._replace(weights=weights, grad_offsets=address_of(grads.offsets), grad_mask=grad_mask)
    if grads.x is None:
        _launch_columns(job, call, vectors=False, owned=False)
        return
    grad_images = work.zero_images(x.shape, x.dtype)
    if options.deterministic:
        _owned_columns(job, call, x, grad_images)
    else:
        call = call._replace(grad_images=grad_images.array.address, grad_pitch=grad_images.pitch)
        _launch_columns(job, call, vectors=work.vectors(x.dtype), owned=False)
    work.unpack_images(grad_images, grads.x)


def _launch_columns(job: Job, call: Call, vectors: bool, owned: bool) -> None:
    """The gradients of columns, for the taps of a call, and what follows from them. `vectors`: use 16-byte atomic adds;
    `owned`: keep them instead of adding them to images."""
    work, p, dtype = job.work, job.p, job.types[0]
    if job.few:
        run_few.columns(work, job.p, job.types, call, vectors)
        return
    if job.mma:
        tile: Any = column_warps()
        kernel, threads = gradients_of_columns_mma(*job.types, vectors, owned, *tile), tile.threads
        most = columns_mma_ogs(dtype, tile)
    else:
        tile = backward_tile(dtype)
        kernel, threads = gradients_of_columns(*job.types, vectors, owned, *tile), THREADS
        most = columns_ogs(dtype, tile)
    ogs = bundle_of(p, tile.columns, most)
    blocks = -(-job.pixels // tile.rows) * call.taps * job.offset_groups // ogs
    work.launch(kernel, call._replace(ogs=ogs), blocks, threads)


def _owned_columns(job: Job, call: Call, x: DeviceArray, grad_images: Images) -> None:
    """The same, tap by tap: the gradients of the columns are kept, then added to the images in a fixed order."""
    work, p, ogs = job.work, job.p, job.offset_groups
    channels = p.in_channels // ogs
    plans = work.plans(ogs * p.batch, job.out_pixels, x.dtype)
    values = work.empty((ogs * p.batch, job.out_pixels, channels), summed(x.dtype))
    call = call._replace(taps=1, values=values.address, places=plans.places.address, corners=plans.weights.address)
    for tap in range(p.taps):
        call = call._replace(first_tap=tap)
        _launch_columns(job, call, vectors=False, owned=True)
        work.spread(plan_tap(*job.types), call._replace(mask=0), ogs * job.pixels)
        for og in range(ogs):
            of_group = Plans(*(plan.slice(og, ogs) for plan in plans))
            corners = 4 if p.offset_groups else 1
            work.scatter(of_group, values.slice(og, ogs), grad_images, x.shape, og * channels, corners)


def _weights(job: Job, call: Call, grad_w: DeviceArray) -> None:
    """The gradient of w: its splits, then their sum."""
    work, p, size = job.work, job.p, grad_w.size
    tile: Any = _narrowest(weight_warps() if job.mma else weights_tiles(job.types[0]), job.outs, "rows")
    tasks = p.taps * p.groups * -(-job.outs // tile.rows) * -(-job.ins // tile.columns)
    if job.few:
        tasks = run_few.weight_tasks(p, job.types[0])
    split_k = max(1, min(work.split_k(tasks), job.pixels // LEAST, 2**26 // size, 256))
    partials = work.empty((split_k, size), summed(grad_w.dtype))
    call = call._replace(partials=partials.address, split_k=split_k, ogs=_ogs_of_weights(job, tile))
    if job.few:
        run_few.weights(work, p, job.types, call)
    elif job.mma:
        work.launch(gradients_of_weights_mma(*job.types, *tile), call, split_k * tasks, tile.threads)
    else:
        work.launch(gradients_of_weights(*job.types, *tile), call, split_k * tasks)
    _sum_partials(job, partials, grad_w)


def _ogs_of_weights(job: Job, tile: Any) -> int:
    """How many offset groups the kernels of the gradient of w plan together."""
    dtype, vector = job.types[0], vector_length(job.types[0])
    if job.mma:
        most = weights_mma_plans(dtype, tile) // (tile.words * per_word(dtype))
        return planned_together(job.p, ATOM, most, vector)
    return planned_together(job.p, vector, weights_plans(dtype, tile.columns) // CHUNK, vector)


def _bias(job: Job, grad_y: DeviceArray, grad_bias: DeviceArray) -> None:
    """The gradient of the bias."""
    sums = Sums(grad_y.address, grad_bias.address, job.p.out_channels, job.p.batch, job.out_pixels)
    job.work.launch(sum_bias(job.types[0]), sums, job.p.out_channels)
