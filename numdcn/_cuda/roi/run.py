"""Pooling over boxes of GPU arrays: types, sums of gradients and launches around the kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numdcn._call.device_array import DTYPES, DeviceArray
from numdcn._call.options import Options
from numdcn._call.results import Output
from numdcn._call.roi import FAR, Pooling, RoIArrays, RoIs, SamplingRule, WholePixels
from numdcn._cuda import jit, replay
from numdcn._cuda.coordinates import address_of
from numdcn._cuda.roi import pool, pool_whole
from numdcn._cuda.roi.bins import Boxes
from numdcn._cuda.roi.pool import Pool
from numdcn._cuda.roi.pool_whole import Whole
from numdcn._cuda.workspace import Workspace, scalar, stored, summed
from numdcn._formulas.bilinear import ALIGN, PSROI

NO_SAMPLING = SamplingRule(ALIGN, 1, 0.0, -np.inf, 0.0)  # for boxes of whole pixels


@replay.forward
def forward(p: Pooling, arrays: RoIArrays, y: DeviceArray, options: Options) -> None:
    """Fill y, and `arrays.argmax` if there is one."""
    with Workspace(y) as work, work.output(y) as target:
        if isinstance(p.rule, SamplingRule):
            call, types = _parameters(work, p, arrays, target, with_x=True)
            work.spread(pool.pool_bins(*types), call, target.size)
        elif p.cells is None:
            _pool_max(work, p, arrays, target, arrays.argmax)
        else:
            whole, whole_types = _whole_parameters(work, p, arrays, target, None, with_x=True)
            work.spread(pool_whole.mean_bins(*whole_types), whole, target.size)


@replay.backward
def backward(p: Pooling, grad_y: DeviceArray, arrays: RoIArrays, grads: RoIArrays, options: Options) -> None:
    """Fill the gradients in `grads`. A position in `arrays.argmax` outside the image adds nothing."""
    with Workspace(grad_y) as work, work.outputs(grads) as targets:
        if isinstance(p.rule, SamplingRule):
            _backward_samples(work, p, grad_y, arrays, targets, options)
        else:
            _backward_whole(work, p, grad_y, arrays, targets.x, options)


def _boxes(sizes: RoIs, rule: SamplingRule, rois: DeviceArray, shifts: DeviceArray | None, dtype: Any) -> Boxes:
    """The boxes for the kernels; rois and shifts are contiguous, `dtype` is that of x."""
    largest = float(np.finfo(summed(dtype)).max)
    classes, parts = (1, sizes.bins) if shifts is None else (shifts.shape[1] // 2, (shifts.shape[2], shifts.shape[3]))
    numbers = (sizes.scale, FAR, rule.half, rule.least, rule.reach, largest)
    return Boxes(
        address_of(rois), address_of(shifts), sizes.box_count, sizes.batch, sizes.size, sizes.bins, parts, classes,
        rule.samples, *map(scalar(dtype), numbers),  # type: ignore[arg-type]
    )  # fmt: skip


def _types(x: DeviceArray) -> tuple[Any, Any]:
    """The first constants of every kernel."""
    return stored(x.dtype), jit.compute_type(stored(x.dtype))


def _address(work: Workspace, array: DeviceArray | None) -> int:
    """The address of the array or of a contiguous copy; 0 if absent or empty."""
    return 0 if array is None or not array.size else work.contiguous(array).address


def _summed(work: Workspace, grad_x: DeviceArray) -> Output[DeviceArray]:
    """Zeros in which a gradient is accumulated: the array itself if it has the type of sums."""
    if grad_x.dtype != summed(grad_x.dtype):
        return Output(grad_x, work.zeros(grad_x.shape, summed(grad_x.dtype)), work.copy)
    work.clear(grad_x)
    return Output(grad_x, None, work.copy)


def _bands(work: Workspace, sizes: RoIs) -> int:
    """The number of bands of rows, chosen so that planes times bands are enough tasks for the device."""
    enough = 8 * work.multiprocessors * jit.THREADS
    return max(1, min(sizes.size[0], enough // max(sizes.batch * sizes.in_channels, 1)))


# Samples.


def _parameters(
    work: Workspace, p: Pooling, arrays: RoIArrays, y: DeviceArray, with_x: bool
) -> tuple[Pool, tuple[Any, Any, bool]]:
    """The parameters, except for gradients, and the variant of the kernels."""
    assert isinstance(p.rule, SamplingRule)
    sizes = p.rois
    rois = work.contiguous(arrays.rois)
    shifts = None if arrays.shifts is None else work.contiguous(arrays.shifts)
    boxes = _boxes(sizes, p.rule, rois, shifts, arrays.x.dtype)
    call = Pool(
        boxes, _address(work, arrays.x if with_x else None), _address(work, arrays.mask), _address(work, y), 0, 0, 0, 0,
        sizes.channels, p.cells or (1, 1), -(-sizes.channels // boxes.classes // pool.BLOCK), _bands(work, sizes),
    )  # fmt: skip
    return call, (*_types(arrays.x), p.rule.border == PSROI)


def _backward_samples(
    work: Workspace, p: Pooling, grad_y: DeviceArray, arrays: RoIArrays, grads: RoIArrays, options: Options
) -> None:
    """Fill the gradients of x, of mask and of the shifts; all are contiguous."""
    sizes, with_sums = p.rois, grads.shifts is not None or grads.mask is not None
    call, types = _parameters(work, p, arrays, grad_y, with_x=with_sums)
    if grads.x is not None:
        with _summed(work, grads.x) as total:
            call = call._replace(grad_x=total.address)
            if options.deterministic:
                work.spread(pool.add_bins_in_order(*types), call, sizes.batch * sizes.in_channels * call.bands)
            else:
                work.spread(pool.add_bins(*types), call, grad_y.size)
    if with_sums:
        classes, parts = call.boxes.classes, call.boxes.parts
        sums = work.empty((sizes.box_count, classes, call.channel_blocks, *sizes.bins, 3), summed(grad_y.dtype))
        call = call._replace(
            sums=sums.address,
            grad_shifts=address_of(grads.shifts),
            grad_mask=0 if grads.mask is None else grads.mask.address,
        )
        work.spread(pool.sum_bins(*types), call, sums.size // 3)
        work.spread(pool.sum_blocks(*types[:2]), call, sizes.box_count * classes * parts[0] * parts[1])


# Whole pixels.


def _whole_parameters(
    work: Workspace, p: Pooling, arrays: RoIArrays, y: DeviceArray | None, argmax: DeviceArray | None, with_x: bool
) -> tuple[Whole, tuple[Any, Any]]:
    """The parameters, except for the gradient of x, and the variant of the kernels."""
    assert isinstance(p.rule, WholePixels)
    sizes, x, rois = p.rois, arrays.x, work.contiguous(arrays.rois)
    boxes = _boxes(sizes, NO_SAMPLING, rois, None, x.dtype)
    call = Whole(
        boxes, _address(work, x if with_x else None), _address(work, y), _address(work, argmax), 0,
        sizes.channels, _bands(work, sizes), 0, int(p.rule.last_counts),
    )  # fmt: skip
    return call, _types(x)


def _pool_max(
    work: Workspace, p: Pooling, arrays: RoIArrays, y: DeviceArray | None, argmax: DeviceArray | None
) -> None:
    """Fill y with the maximum of each bin, and argmax with its position; None: not wanted."""
    call, types = _whole_parameters(work, p, arrays, y, argmax, with_x=True)
    work.spread(pool_whole.max_bins(*types), call, math.prod(p.out_shape))


def _backward_whole(
    work: Workspace, p: Pooling, grad_y: DeviceArray, arrays: RoIArrays, grad_x: DeviceArray, options: Options
) -> None:
    """Fill the gradient of x."""
    argmax, kernel = None, pool_whole.add_means
    if p.cells is None:
        argmax, kernel = arrays.argmax, pool_whole.add_at_maxima
        if argmax is None:
            argmax = work.empty(p.out_shape, DTYPES["int32"])
            _pool_max(work, p, arrays, None, argmax)
    with _summed(work, grad_x) as total:
        call, types = _whole_parameters(work, p, arrays, grad_y, argmax, with_x=False)
        call = call._replace(grad_x=total.address, in_order=int(options.deterministic))
        tasks = p.rois.batch * p.rois.in_channels * call.bands if options.deterministic else grad_y.size
        work.spread(kernel(*types), call, tasks)
