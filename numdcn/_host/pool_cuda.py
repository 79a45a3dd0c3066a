"""Pooling over boxes of GPU arrays: types, sums of gradients and launches around the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.device_array import DTYPES, DeviceArray
from numdcn._host.options import Options
from numdcn._host.rois import FAR, RoIs
from numdcn._host.work_cuda import Work, stored, summed
from numdcn._kernels import jit_cuda, pool_cuda, pool_whole_cuda
from numdcn._kernels.bins_cuda import Boxes
from numdcn._kernels.pool_cuda import Pool
from numdcn._kernels.pool_whole_cuda import Whole


class Grid(NamedTuple):
    """How the samples of a box lie: see `rois.align_boxes` and `rois.sampled_boxes`, whose twins make it."""

    rule_p: bool
    samples: int
    half: float
    least: float
    reach: float


def align_grid(sampling_ratio: int, half_pixel: bool, least: float | None, reach: float = 0.0) -> Grid:
    """Boxes of the RoI align family (rule R)."""
    return Grid(False, sampling_ratio, 0.5 if half_pixel else 0.0, -np.inf if least is None else least, reach)


def sampled_grid(samples: int, reach: float) -> Grid:
    """Boxes of deformable position-sensitive pooling (rule P)."""
    return Grid(True, samples, 0.5, 0.1, reach)


def _boxes(p: RoIs, grid: Grid, rois: DeviceArray, shifts: DeviceArray | None, dtype: Any) -> Boxes:
    """The boxes for the kernels; rois and shifts are contiguous and of one type, `dtype` is that of x."""
    largest = float(np.finfo(summed(dtype)).max)
    classes, parts = (1, p.bins) if shifts is None else (shifts.shape[1] // 2, (shifts.shape[2], shifts.shape[3]))
    numbers = (p.scale, FAR, grid.half, grid.least, grid.reach, largest)
    return Boxes(
        rois.address, 0 if shifts is None else shifts.address, p.rois, p.batch, p.size, p.bins, parts, classes, grid.samples,
        *map(jit_cuda.scalar_type(stored(dtype)), numbers),  # type: ignore[arg-type]
    )  # fmt: skip


def _address(work: Work, array: DeviceArray | None) -> int:
    """Of the array or a contiguous copy; 0 for none or an empty one."""
    return 0 if array is None or not array.size else work.contiguous(array).address


def _coordinates(work: Work, *arrays: DeviceArray | None) -> tuple[DeviceArray | None, ...]:
    """Contiguous arrays of one type: float32 if they have several."""
    kinds = {array.dtype for array in arrays if array is not None}
    dtype = DTYPES["float32"] if len(kinds) > 1 else None
    return tuple(None if array is None else work.contiguous(array, dtype) for array in arrays)


class _Sum(NamedTuple):
    """Where the gradient of x is added up, and what is wanted."""

    array: DeviceArray
    wanted: DeviceArray

    def finish(self, work: Work) -> None:
        if self.array is not self.wanted:
            work.copy(self.array, self.wanted)


def _sum(work: Work, grad_x: DeviceArray) -> _Sum:
    """Zeros: the gradient itself, where it has the type in which sums are kept."""
    if grad_x.dtype != summed(grad_x.dtype):
        return _Sum(work.zeros(grad_x.shape, summed(grad_x.dtype)), grad_x)
    work.clear(grad_x)
    return _Sum(grad_x, grad_x)


def _bands(work: Work, p: RoIs) -> int:
    """Bands of rows, so that planes times bands are enough tasks for the device."""
    enough = 8 * jit_cuda.multiprocessors(work.number) * jit_cuda.THREADS
    return max(1, min(p.size[0], enough // max(p.batch * p.in_channels, 1)))


# Samples.


def _call(
    work: Work,
    p: RoIs,
    arrays: dict[str, Any],
    shifts: DeviceArray | None,
    grid: Grid,
    groups: tuple[int, int],
    y: DeviceArray,
    with_x: bool,
) -> tuple[Pool, tuple[Any, Any, bool]]:
    """The parameters, but for gradients, and the variant of the kernels."""
    x, mask = arrays["x"], arrays.get("mask")
    rois, moved = _coordinates(work, arrays["rois"], shifts)
    assert rois is not None
    boxes = _boxes(p, grid, rois, moved, x.dtype)
    call = Pool(
        boxes, _address(work, x if with_x else None), _address(work, mask), _address(work, y), 0, 0, 0, 0, p.channels, groups,
        -(-p.channels // boxes.classes // pool_cuda.BLOCK), _bands(work, p),
    )  # fmt: skip
    return call, (stored(x.dtype), stored(rois.dtype), grid.rule_p)


def pool(
    p: RoIs,
    arrays: dict[str, Any],
    y: DeviceArray,
    grid: Grid,
    groups: tuple[int, int] = (1, 1),
    shifts: DeviceArray | None = None,
) -> None:
    """Fill y: the mean of each bin over its samples, times its mask, from the channels of its cell."""
    with Work(y) as work:
        call, kinds = _call(work, p, arrays, shifts, grid, groups, y, with_x=True)
        work.spread(pool_cuda.pool_bins(*kinds), call, y.size)


def pool_gradients(
    p: RoIs,
    grad_y: DeviceArray,
    arrays: dict[str, Any],
    grads: dict[str, DeviceArray],
    options: Options,
    grid: Grid,
    groups: tuple[int, int] = (1, 1),
    shifts: str | None = None,
) -> None:
    """Fill the gradients of x, of mask and of the shifts, whose name `shifts` is."""
    with Work(grad_y) as work:
        moved = arrays[shifts] if shifts else None
        grad_shifts, grad_mask = grads.get(shifts or ""), grads.get("mask")
        with_sums = grad_shifts is not None or grad_mask is not None
        call, kinds = _call(work, p, arrays, moved, grid, groups, grad_y, with_x=with_sums)
        if "x" in grads:
            total = _sum(work, grads["x"])
            call = call._replace(grad_x=total.array.address)
            if options.deterministic:
                work.spread(pool_cuda.add_bins_in_order(*kinds), call, p.batch * p.in_channels * call.bands)
            else:
                work.spread(pool_cuda.add_bins(*kinds), call, grad_y.size)
            total.finish(work)
        if with_sums:
            classes, parts = call.boxes.classes, call.boxes.parts
            sums = work.empty((p.rois, classes, call.blocks, *p.bins, 3), summed(grad_y.dtype))
            call = call._replace(
                sums=sums.address,
                grad_shifts=0 if grad_shifts is None else grad_shifts.address,
                grad_mask=0 if grad_mask is None else grad_mask.address,
            )
            work.spread(pool_cuda.sum_bins(*kinds), call, sums.size // 3)
            kind = kinds[0] if grad_shifts is None else stored(grad_shifts.dtype)
            work.spread(pool_cuda.sum_blocks(kinds[0], kind), call, p.rois * classes * parts[0] * parts[1])


# Whole pixels.


def _whole_call(
    work: Work, p: RoIs, arrays: dict[str, Any], y: DeviceArray | None, argmax: DeviceArray | None, with_x: bool
) -> tuple[Whole, tuple[Any, Any]]:
    """The parameters, but for the gradient of x, and the variant of the kernels."""
    x, rois = arrays["x"], work.contiguous(arrays["rois"])
    boxes = _boxes(p, align_grid(1, half_pixel=False, least=None), rois, None, x.dtype)
    call = Whole(
        boxes, _address(work, x if with_x else None), _address(work, y), _address(work, argmax), 0, p.channels, _bands(work, p),
    )  # fmt: skip
    return call, (stored(x.dtype), stored(rois.dtype))


def pool_max(p: RoIs, arrays: dict[str, Any], y: DeviceArray | None, argmax: DeviceArray | None) -> None:
    """Fill y with the largest pixel of each bin, and argmax with its position; None: not wanted."""
    with Work(arrays["x"]) as work:
        call, kinds = _whole_call(work, p, arrays, y, argmax, with_x=True)
        work.spread(pool_whole_cuda.max_bins(*kinds), call, p.rois * p.channels * p.bins[0] * p.bins[1])


def pool_mean(p: RoIs, arrays: dict[str, Any], y: DeviceArray) -> None:
    """Fill y with the mean of each bin, from the channels of its own."""
    with Work(y) as work:
        call, kinds = _whole_call(work, p, arrays, y, None, with_x=True)
        work.spread(pool_whole_cuda.mean_bins(*kinds), call, y.size)


def pool_max_gradient(
    p: RoIs, grad_y: DeviceArray, arrays: dict[str, Any], argmax: DeviceArray, grad_x: DeviceArray, options: Options
) -> None:
    """Fill grad_x, from the positions of the maxima."""
    kernels = pool_whole_cuda.add_at_maxima, pool_whole_cuda.add_at_maxima_in_order
    _whole_gradient(p, grad_y, arrays, argmax, grad_x, options, kernels)


def pool_mean_gradient(
    p: RoIs, grad_y: DeviceArray, arrays: dict[str, Any], grad_x: DeviceArray, options: Options
) -> None:
    """Fill grad_x, where y was filled with means."""
    kernels = pool_whole_cuda.add_means, pool_whole_cuda.add_means_in_order
    _whole_gradient(p, grad_y, arrays, None, grad_x, options, kernels)


def _whole_gradient(
    p: RoIs,
    grad_y: DeviceArray,
    arrays: dict[str, Any],
    argmax: DeviceArray | None,
    grad_x: DeviceArray,
    options: Options,
    kernels: tuple[Any, Any],
) -> None:
    """`kernels`: that adds in any order, that adds in a fixed one."""
    with Work(grad_y) as work:
        total = _sum(work, grad_x)
        call, kinds = _whole_call(work, p, arrays, grad_y, argmax, with_x=False)
        call = call._replace(grad_x=total.array.address)
        tasks = p.batch * p.in_channels * call.bands if options.deterministic else grad_y.size
        work.spread(kernels[options.deterministic](*kinds), call, tasks)
        total.finish(work)
