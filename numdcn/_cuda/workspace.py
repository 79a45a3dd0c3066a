"""The work of one call on a GPU: its stream, memory from the caller's framework, launches. Nothing here waits for
the GPU."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.arguments import Arrays
from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray, c_strides, collapsed
from numdcn._call.results import Output, Outputs
from numdcn._cuda import jit, layout, replay, scatter
from numdcn._cuda.memory import vector_length


class Images(NamedTuple):
    """Channels-last images with a border of zeros (see `layout`)."""

    array: DeviceArray
    pitch: int  # channels including padding
    pixels: int  # per image, including padding


class Plans(NamedTuple):
    """Where samples start and the weights of their corners (see `scatter`)."""

    places: DeviceArray
    weights: DeviceArray


class Workspace:
    """Where a call's arrays are, and the work done there, for the duration of a `with` block."""

    def __init__(self, like: DeviceArray) -> None:
        self.framework, self.device, self.stream = like.framework, like.device, like.stream
        self._kept: list[DeviceArray] = []
        self._recording = replay.current.recording

    def __enter__(self) -> Workspace:
        self._quiet = np.errstate(all="ignore")  # in the simulator too, NaN and infinity are ordinary values
        self._quiet.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._quiet.__exit__(None, None, None)
        while self._kept:
            self.framework.give_back(self._kept.pop())

    @property
    def multiprocessors(self) -> int:
        """The number of multiprocessors of the device."""
        return jit.multiprocessors(self.device)

    def split_k(self, tasks: int) -> int:
        """How many ways to split each of `tasks` tasks so that every multiprocessor has about two blocks (below 2: no
        split); three in the simulator, so that there is something to add."""
        return 3 if jit.SIMULATED else 2 * self.multiprocessors // tasks

    @property
    def has_mma(self) -> bool:
        """Whether the device multiplies bfloat16 and tf32."""
        return jit.has_mma(self.device)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialised memory of the caller's framework, until the block ends: then it may be reused, in stream
        order."""
        made = self.framework.scratch(shape, dtype, self.device, self.stream)
        self._kept.append(made)
        if self._recording is not None:
            self._recording.scratch(made)
        return made

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Memory of zeros."""
        made = self.empty(shape, dtype)
        self.clear(made)
        return made

    def layout(self, layout: tuple[Any, ...], made: DeviceArray) -> int:
        """The address of prepared weights in a layout."""
        return made.address if self._recording is None else self._recording.layout(layout, made)

    def launch(self, kernel: Any, call: tuple[Any, ...], blocks: int, threads: Any = jit.THREADS) -> None:
        """Run a kernel on at most `blocks` blocks of threads; kernels use grid-stride loops over their tasks."""
        if blocks > 0:
            most = 2 if jit.SIMULATED else 2**31 - 1
            kernel.run(min(blocks, most), threads, self.stream, self.device, call)
            if self._recording is not None:
                self._recording.launch(kernel, call, min(blocks, most), threads, self.stream)

    def spread(self, kernel: Any, call: tuple[Any, ...], tasks: int) -> None:
        """Run a kernel whose threads loop over `tasks` tasks, on at most 8 blocks per multiprocessor."""
        most = 8 * self.multiprocessors
        self.launch(kernel, call, min(-(-tasks // jit.THREADS), most))

    def clear(self, array: DeviceArray) -> None:
        """Fill with zeros."""
        if not array.contiguous:
            self.copy(self.zeros(array.shape, array.dtype), array)
        elif array.size:
            self._move(0, array.dtype, (array.size,), (0,), array.reshaped(array.size))

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy an array into one of the same shape, of the same or a convertible type."""
        self._move(source.address, source.dtype, target.shape, source.strides, target)

    def add(self, source: DeviceArray, target: DeviceArray) -> None:
        """Add an array to another one of the same shape and type."""
        self._move(source.address, source.dtype, target.shape, source.strides, target, add=1)

    def _move(
        self,
        address: int,
        dtype: Any,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        target: DeviceArray,
        add: int = 0,
    ) -> None:
        """Copy an array, or zeros if its address is 0, into another one, or add it."""
        if not target.size:
            return
        axes = list(collapsed(shape, strides, target.strides))
        if len(axes) > layout.AXES:
            raise ValueError(
                f"an array of shape {target.shape} has {len(axes)} axes that do not follow one another in memory, expected at "
                f"most {layout.AXES}"
            )
        used = len(axes)
        axes = [(1, 0, 0)] * (layout.AXES - used) + axes
        sizes, source_strides, target_strides = (tuple(axis[i] for axis in axes) for i in range(3))
        call = layout.Copy(address, target.address, target.size, add, used, sizes, source_strides, target_strides)  # type: ignore[arg-type]
        self.spread(layout.copy(stored(dtype), stored(target.dtype)), call, target.size)

    def output(self, array: DeviceArray) -> Output[DeviceArray]:
        """A target for a kernel to fill: the array, or, if it is not contiguous, memory that is copied to it at the
        end."""
        return Output(array, None if array.contiguous else self.empty(array.shape, array.dtype), self.copy)

    def outputs(self, arrays: Arrays) -> Outputs[Arrays]:
        """Targets for a record of arrays, as `output` makes them; None stays None."""
        return Outputs(arrays, self.output)

    def contiguous(self, array: DeviceArray, dtype: Any = None) -> DeviceArray:
        """The array, or a copy if it is not contiguous or not of `dtype`."""
        dtype = array.dtype if dtype is None else dtype
        if array.contiguous and array.dtype == dtype:
            return array
        made = self.empty(array.shape, dtype)
        self.copy(array, made)
        return made

    def permuted(
        self, array: DeviceArray, shape: tuple[int, ...], axes: tuple[int, ...], made: DeviceArray
    ) -> DeviceArray:
        """Fill `made` with an array seen as `shape`, its axes permuted as by `numpy.transpose`."""
        source, steps = self.contiguous(array), c_strides(shape)
        self.copy(self._seen(source.address, array.dtype, made.shape, tuple(steps[a] for a in axes)), made)
        return made

    def pack_images(self, x: DeviceArray) -> Images:
        """x, (N, C, H, W) with any strides, as channels-last images."""
        images = self._images(x.shape, x.dtype)
        self._turn(layout.pack_images(stored(x.dtype), False), x, images, images.pitch)
        return images

    def pack_rows(self, array: DeviceArray, depth: int, tf32: bool = True) -> DeviceArray:
        """A contiguous array (N, C, P) as (N, P, depth), with zeros after the channels; float32 is rounded to `tf32`."""
        n, channels, count = array.shape
        made = Images(self.empty((n, count, depth), array.dtype), depth, count)
        seen = array.reshaped(n, channels, 1, count)
        kernel = layout.pack_images(stored(array.dtype), tf32 and array.dtype == DTYPES["float32"])
        self._turn(kernel, seen, made, depth, pad=0)
        return made.array

    def zero_images(self, shape: tuple[int, ...], dtype: Any) -> Images:
        """Zero images in which gradients are accumulated, in float32 for narrower types too."""
        images = self._images(shape, summed(dtype))
        self.clear(images.array)
        return images

    def unpack_images(self, images: Images, x: DeviceArray) -> None:
        """The images as x, (N, C, H, W) with any strides, without their padding."""
        kernel = layout.unpack_images(stored(x.dtype), stored(images.array.dtype))
        self._turn(kernel, x, images, x.shape[1])

    def image_sizes(self, x: DeviceArray) -> Images:
        """The sizes of the images that `pack_images` would make, at address 0."""
        pitch, pixels = _image_sizes(x.shape, x.dtype)
        return Images(self._seen(0, x.dtype, (0,), (1,)), pitch, pixels)

    def channels_last(self, array: DeviceArray, dtype: Any) -> DeviceArray:
        """A contiguous array (N, C, P) as (N, P, C)."""
        n, channels, count = array.shape
        made = self.empty((n, count, channels), dtype)
        self.copy(array, self._seen(made.address, dtype, array.shape, (count * channels, 1, channels)))
        return made

    def plans(self, batch: int, samples: int, dtype: Any) -> Plans:
        """Room for the plans of samples."""
        return Plans(self.empty((batch, samples), DTYPES["int32"]), self.empty((batch, 4, samples), summed(dtype)))

    def scatter(
        self,
        plans: Plans,
        values: DeviceArray,
        images: Images,
        shape: tuple[int, ...],
        first_channel: int = 0,
        corners: int = 4,
    ) -> None:
        """Add values (N, samples, channels), times the weights of their corners, to images of (N, C, H, W), in a
        fixed order."""
        n, samples, channels = values.shape
        rows, blocks = shape[2] + 2, -(-channels // scatter.CHANNELS)
        bands = max(1, min(rows // 2, 8 * self.multiprocessors // max(n * blocks, 1)))
        call = scatter.Scatter(
            plans.places.address, plans.weights.address, values.address, images.array.address, n, samples, channels,
            first_channel, images.pitch, images.pixels, shape[3] + 1, rows, bands, corners,
        )  # fmt: skip
        kernel = scatter.scatter(stored(values.dtype))
        self.launch(kernel, call, n * bands * blocks, scatter.CHANNELS)

    def vectors(self, dtype: Any) -> bool:
        """Whether sums of this type can be added to memory 16 bytes at a time."""
        return jit.has_vector_reductions(self.device) and summed(dtype) == DTYPES["float32"]

    def _seen(self, address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceArray:
        """Memory kept alive by something else, as an array."""
        return DeviceArray(None, self.framework, self.device, address, dtype, shape, strides, self.stream)

    def _images(self, shape: tuple[int, ...], dtype: Any) -> Images:
        pitch, pixels = _image_sizes(shape, dtype)
        return Images(self.empty((shape[0], pixels, pitch), dtype), pitch, pixels)

    def _turn(self, kernel: Any, x: DeviceArray, images: Images, channels: int, pad: int = 1) -> None:
        n, c, *size = x.shape
        call = layout.Turn(
            x.address, images.array.address, n, c, images.pitch, (size[0], size[1]), images.pixels, x.strides, pad,  # type: ignore[arg-type]
        )  # fmt: skip
        tile = layout.TILE
        blocks = n * -(-images.pixels // tile) * -(-channels // tile)
        self.launch(kernel, call, blocks, (tile, layout.ROWS))


def _image_sizes(shape: tuple[int, ...], dtype: Any) -> tuple[int, int]:
    """The channels of images, padded to whole vectors (and fours), and their pixels including padding."""
    _, channels, height, width = shape
    vector, pixels = max(4, vector_length(stored(dtype))), (height + 2) * (width + 1) + 2
    if pixels + layout.TILE >= 2**31:
        raise ValueError(f"`x` has shape {shape}, expected images of fewer than 2**31 pixels on a GPU")
    return -(-channels // vector) * vector, pixels


@functools.cache
def stored(dtype: Any) -> Any:
    """The element type for a kernel. int32 is moved as float32."""
    return jit.STORED["float32" if dtype.name == "int32" else dtype.name]


def scalar(dtype: Any) -> type[np.floating[Any]]:
    """NumPy's scalar of the compute type."""
    return jit.scalar_type(stored(dtype))


def summed(dtype: Any) -> Any:
    """The dtype of sums: float32 for float16 and bfloat16."""
    return DTYPES["float32"] if dtype in (DTYPES["float16"], BFLOAT16) else dtype


def copied(array: DeviceArray) -> DeviceArray:
    """A contiguous copy in the same framework."""
    made = array.framework.empty(array.shape, array.dtype, array.device, array.stream)
    with Workspace(array) as work:
        work.copy(array, made)
    return made
