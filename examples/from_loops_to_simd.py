"""From loops to SIMD: four ways to compute one deformable convolution, each a rung above the previous one.

    python examples/from_loops_to_simd.py [--size N] [--seed N] [--picture FILE]

Read it from top to bottom. Rung 1 is the definition in NumPy; rung 2 a column buffer in Numba; rung 3 works tile by
tile like the library, in plain Numba; rung 4 is the library. Each computes the same 3x3 convolution of
one float32 image, with stride 1, padding 1 and offsets drawn from N(0, 2), and is compared with the previous rung; the
exit code is 1 if anything is off. Prints a table of times. --picture draws them as bars; only that needs matplotlib.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

import numdcn

CHANNELS, OUTPUTS = 64, 64  # rung 3 takes channels four at a time
TAPS = 9  # of a 3x3 kernel; tap k is in row k // 3 and column k % 3
BAND, TILE_COLUMNS = 4, 16  # rows and columns of a tile of output pixels
SECONDS, LEAST_CALLS, MOST_CALLS = 0.5, 3, 50  # for timing a rung, after its first call
EPS = float(np.finfo(np.float32).eps)
ONE = np.float32(1)  # Numba promotes int with float32 to float64
say = functools.partial(print, flush=True)  # show progress immediately


# Rung 1: the definition.
#
# A tap at output pixel (i, j) looks at the point (i - 1 + ky + offset_y, j - 1 + kx + offset_x). The point lies in a
# cell of four pixels, its corners. The sample there is the weighted sum of the corners; a corner's weight is one minus
# its distance from the point along y, times the same along x. The image is zero outside: a corner counts only if it is
# inside. The output is the sum, over taps and channels, of the samples times w.
#
# Room for improvement: each statement is a sweep over all pixels that creates a temporary array, and einsum's loops
# are unaware of caches.


def definition(x: np.ndarray, offsets: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Loops over taps and corners; NumPy handles the pixels and the channels."""
    height, width = x.shape[2:]
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    y = np.zeros((1, len(w), height, width), x.dtype)
    for tap in range(TAPS):
        ky, kx = divmod(tap, 3)
        point_y = rows + np.float32(ky - 1) + offsets[0, 2 * tap]
        point_x = columns + np.float32(kx - 1) + offsets[0, 2 * tap + 1]
        floor_y, floor_x = np.floor(point_y), np.floor(point_x)
        down, right = point_y - floor_y, point_x - floor_x  # fractions
        samples = np.zeros_like(x[0])
        for corner_y, weight_y in ((floor_y, 1 - down), (floor_y + 1, down)):
            for corner_x, weight_x in ((floor_x, 1 - right), (floor_x + 1, right)):
                inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
                i, j = (np.where(inside, corner, 0).astype(np.intp) for corner in (corner_y, corner_x))
                samples += np.where(inside, weight_y * weight_x * x[0][:, i, j], 0)
        y[0] += np.einsum("oc,chw->ohw", w[:, :, ky, kx], samples)
    return y


# Rung 2: compiled loops, and columns.
#
# Numba compiles the loops, so a sample is computed in registers, without temporary arrays. The samples
# go into one buffer of columns, (channels, taps, pixels). Then the sum over channels and taps is one matrix product,
# for which NumPy has a BLAS that is optimised for caches (and may use every core). This is im2col with offsets.
#
# Room for improvement: cells and weights are recomputed for every channel; every corner is tested; the corners of one
# channel are far from those of the next, so no SIMD register can load several at once; and the buffer is nine
# times as large as the image: it is written to memory and read back for the product.


@njit
def gather(x: np.ndarray, offsets: np.ndarray, columns: np.ndarray) -> None:
    """columns[c, tap, i, j] = the sample of channel c where the tap looks."""
    channels, height, width = x.shape[1:]
    for c in range(channels):
        for tap in range(TAPS):
            for i in range(height):
                for j in range(width):
                    point_y = np.float32(i + tap // 3 - 1) + offsets[0, 2 * tap, i, j]
                    point_x = np.float32(j + tap % 3 - 1) + offsets[0, 2 * tap + 1, i, j]
                    floor_y, floor_x = np.floor(point_y), np.floor(point_x)
                    down, right = point_y - floor_y, point_x - floor_x
                    row, column = int(floor_y), int(floor_x)
                    sample = np.float32(0)
                    for corner_y, weight_y in ((row, ONE - down), (row + 1, down)):
                        for corner_x, weight_x in ((column, ONE - right), (column + 1, right)):
                            if 0 <= corner_y < height and 0 <= corner_x < width:
                                sample += weight_y * weight_x * x[0, c, corner_y, corner_x]
                    columns[c, tap, i, j] = sample


def column_buffer(x: np.ndarray, offsets: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Gather all samples, then one matrix product."""
    channels, height, width = x.shape[1:]
    columns = np.empty((channels, TAPS, height, width), x.dtype)
    gather(x, offsets, columns)
    y = w.reshape(len(w), -1) @ columns.reshape(channels * TAPS, -1)
    return y.reshape(1, len(w), height, width)


# Rung 3: tiles.
#
# - Channels last, with a border of zero pixels. The channels of a pixel are adjacent, so a corner is contiguous memory,
#   and LLVM vectorises the loop along it. With the border, every sample that touches the image has four
#   corners to read, and every other one reads a cell of four zeros: nothing is clamped, no corner is tested.
# - The plan of a tap, the cell and the corner weights of each pixel, is made once for all channels.
# - The columns of a tile, 64 pixels, for one tap take 16 KB. They are multiplied at once, while they are in the cache,
#   and replaced by the next tap's. Tiles are nearly square, so that taps share pixels that are in the cache.
# - Packed weights, (taps, channels, outputs): the product reads them in memory order.
#
# Room for improvement: the product loads and stores each sum once for every four channels, where a register could keep
# it; whether a loop is vectorised is up to the compiler; and everything runs on one core.


def zero_padded(x: np.ndarray) -> np.ndarray:
    """The image as (pixels, channels), in rows of width + 1: a zero pixel before each, rows of zeros above and below.

    The zero at the start of a row also ends the previous one, so pixel (i, j) is number (i + 1) * (width + 1) + j + 1.
    With two more zeros, the cell whose upper left corner is (height, -1) has four zeros.
    """
    channels, height, width = x.shape[1:]
    image = np.zeros(((height + 2) * (width + 1) + 2, channels), x.dtype)
    rows = image[:-2].reshape(height + 2, width + 1, channels)
    rows[1:-1, 1:] = x[0].transpose(1, 2, 0)
    return image


@njit
def plan_tap(offsets: np.ndarray, tap: int, tile: tuple, cells: np.ndarray, weights: np.ndarray) -> int:
    """For each pixel of a tile, where the tap's cell starts, and the weights of its corners; returns the number of
    pixels."""
    height, width = offsets.shape[2:]
    top, bottom, left, right = tile
    pixels = 0
    for i in range(top, bottom):
        for j in range(left, right):
            y = np.float32(i + tap // 3 - 1) + offsets[0, 2 * tap, i, j]
            x = np.float32(j + tap % 3 - 1) + offsets[0, 2 * tap + 1, i, j]
            if not (y >= -1 and y < height and x >= -1 and x < width):
                y, x = np.float32(height), np.float32(-1)  # the cell of zeros
            floor_y, floor_x = np.floor(y), np.floor(x)
            fraction_y, fraction_x = y - floor_y, x - floor_x
            cells[pixels] = (int(floor_y) + 1) * (width + 1) + int(floor_x) + 1
            weights[pixels, 0] = (ONE - fraction_y) * (ONE - fraction_x)
            weights[pixels, 1] = (ONE - fraction_y) * fraction_x
            weights[pixels, 2] = fraction_y * (ONE - fraction_x)
            weights[pixels, 3] = fraction_y * fraction_x
            pixels += 1
    return pixels


@njit
def sample_tap(image: np.ndarray, below: int, cells: np.ndarray, weights: np.ndarray, columns: np.ndarray) -> None:
    """columns[p, c] = the sample of channel c at pixel p, as planned; `below` is the distance to the pixel below."""
    for p in range(len(cells)):
        cell = cells[p]
        w00, w01, w10, w11 = weights[p, 0], weights[p, 1], weights[p, 2], weights[p, 3]
        x00, x01, x10, x11 = image[cell], image[cell + 1], image[cell + below], image[cell + below + 1]
        column = columns[p]
        for c in range(len(column)):
            column[c] = w00 * x00[c] + w01 * x01[c] + w10 * x10[c] + w11 * x11[c]


@njit
def multiply(columns: np.ndarray, w: np.ndarray, pixels: int, sums: np.ndarray) -> None:
    """sums (pixels, outputs) += columns (pixels, channels) times w (channels, outputs)."""
    for p in range(pixels):
        column, total = columns[p], sums[p]
        for c in range(0, len(w), 4):
            a0, a1, a2, a3 = column[c], column[c + 1], column[c + 2], column[c + 3]
            w0, w1, w2, w3 = w[c], w[c + 1], w[c + 2], w[c + 3]
            for o in range(len(total)):
                total[o] += a0 * w0[o] + a1 * w1[o] + a2 * w2[o] + a3 * w3[o]


@njit
def compute_tiles(image: np.ndarray, offsets: np.ndarray, packed: np.ndarray, y: np.ndarray) -> None:
    """y, tile by tile; the buffers of a tile are small and reused by the next."""
    outputs, height, width = y.shape[1:]
    most = BAND * TILE_COLUMNS
    cells, weights = np.empty(most, np.int64), np.empty((most, 4), np.float32)
    columns, sums = np.empty((most, packed.shape[1]), np.float32), np.empty((most, outputs), np.float32)
    for top in range(0, height, BAND):
        for left in range(0, width, TILE_COLUMNS):
            bottom, right = min(top + BAND, height), min(left + TILE_COLUMNS, width)
            sums[:] = 0
            for tap in range(TAPS):
                pixels = plan_tap(offsets, tap, (top, bottom, left, right), cells, weights)
                sample_tap(image, width + 1, cells[:pixels], weights, columns)
                multiply(columns, packed[tap], pixels, sums)
            for o in range(outputs):
                for i in range(top, bottom):
                    for j in range(left, right):
                        y[0, o, i, j] = sums[(i - top) * (right - left) + j - left, o]


def tiles(x: np.ndarray, offsets: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A zero-padded image, packed weights, and then tile by tile: plan, sample, multiply."""
    packed = np.ascontiguousarray(w.transpose(2, 3, 1, 0)).reshape(TAPS, w.shape[1], len(w))
    y = np.empty((1, len(w), *x.shape[2:]), x.dtype)
    compute_tiles(zero_padded(x), offsets, packed, y)
    return y


# Rung 4: the library. The approach is that of rung 3; what it adds, and where to find it:
#
# - SIMD by hand: `Vec` is a SIMD register as a Numba type, with operators, load, store and fma (numdcn/_cpu/simd.py;
#   its width: numdcn/_formulas/jit.py). The formulas take scalars and vectors alike (numdcn/_formulas/bilinear.py:
#   `cell` directs samples outside to the zeros), and plans are made for a register of pixels at a time
#   (numdcn/_cpu/sample.py). No fast-math: bits depend on the source, not on how a compiler transforms a loop.
# - A register-blocked product: a register tile of sums, several pixels by several vectors of outputs, stays in
#   registers from the first k to the last; a vector of weights, once loaded, serves all its pixels
#   (numdcn/_cpu/gemm.py). Weights are packed in panels as wide as a register tile (numdcn/_cpu/conv/pack.py).
# - Blocking by shapes alone: tiles, and chunks of columns (several groups, some taps of one, or some channels of one
#   tap) that share the cache with a panel of weights. They are the same for any number of threads, so threads
#   never change a bit (numdcn/_cpu/conv/blocking.py; making and multiplying a chunk: columns.py; the loop over tiles:
#   forward.py).
# - Threads: each takes the next task, a tile, until none is left (numdcn/_cpu/threads.py; scratch memory, the copy to
#   channels-last, packing and the call: numdcn/_cpu/conv/run.py).
# - Rules for NaN: a NaN offset makes y NaN at its pixel (in rungs 1 and 3 it looks outside, in rung 2 anywhere); an
#   infinite one looks outside; a NaN in x affects only the samples whose cell touches it.
#
# What this program leaves out: strides, dilation, groups, masks, bias, any layout, float64, gradients.


def library(x: np.ndarray, offsets: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One call."""
    return numdcn.deform_conv_forward(x, offsets, w, padding=1)


class Rung(NamedTuple):
    """A way to compute y."""

    adds: str
    function: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


RUNGS = (
    Rung("the definition, in NumPy", definition),
    Rung("compiled loops, columns, one product", column_buffer),
    Rung("channels last, a zero border, plans, tiles", tiles),
    Rung("numdcn: SIMD, register tiles, threads", library),
)


class Result(NamedTuple):
    """The time of a rung, and its difference from the previous one."""

    milliseconds: float
    error: float


def allowed(x: np.ndarray, offsets: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The difference allowed between two rungs, for each element of y.

    All rungs round a point's position in the same way, so they agree on cells and fractions. A term of y, w times a
    sample, is then rounded at most eight times: one minus a fraction along y and along x, their product, times the
    pixel, three sums of corners, times w. Each costs at most half an EPS of the term; over two rungs that is 8 EPS.
    Adding up the terms takes as many roundings as there are terms, each of at most half an EPS of the sum of
    magnitudes. They are independent, so they grow with the square root of their number; over two rungs at most twice
    that.
    """
    terms = w[0].size
    return EPS * (8 + terms**0.5) * definition(np.abs(x), offsets, np.abs(w))


def best(call: Callable[[], Any]) -> float:
    """The milliseconds of the fastest of several calls."""
    times: list[float] = []
    while len(times) < LEAST_CALLS or (len(times) < MOST_CALLS and sum(times) < SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def climb(x: np.ndarray, offsets: np.ndarray, w: np.ndarray) -> list[Result]:
    """Every rung: a first call that compiles, the difference from the previous rung, and its time."""
    results: list[Result] = []
    before, most = None, allowed(x, offsets, w)
    for number, rung in enumerate(RUNGS, 1):
        say(f"   rung {number}, {rung.function.__name__}: first call (may compile) ... ", end="")
        start = time.perf_counter()
        y = rung.function(x, offsets, w)
        say(f"{time.perf_counter() - start:.2f} s")
        error = np.zeros_like(y) if before is None else np.abs(y - before)
        if not (error <= most).all():
            sys.exit(f"FAILED: rung {number} is off by up to {error.max():.3e}; allowed at most {most.max():.3e}")
        results.append(Result(best(functools.partial(rung.function, x, offsets, w)), float(error.max())))
        before = y
    return results


def tell(results: list[Result]) -> None:
    """Print the table."""
    first = results[0].milliseconds
    say(f"\n{'rung':<6}{'what it adds':<40}{'ms':>9}{'speed-up':>16}{'largest error':>16}")
    for number, (rung, (ms, error)) in enumerate(zip(RUNGS, results, strict=True), 1):
        off = f"{error:.1e}" if number > 1 else "-"
        say(f"{number:<6}{rung.adds:<40}{ms:>9.2f}{first / ms:>16.1f}{off:>16}")
    say("speed-up: over rung 1; error: difference from the previous rung, all within rounding\n")


def draw(results: list[Result], title: str, path: Path) -> None:
    """The times as bars."""
    from matplotlib.figure import Figure  # here, so that everything else runs without it

    times = [result.milliseconds for result in results]
    fig = Figure(figsize=(10, 3.2), dpi=100, layout="constrained")
    ax = fig.subplots()
    bars = ax.barh([f"{number}. {rung.adds}" for number, rung in enumerate(RUNGS, 1)], times, color="#38b6ff")
    ax.bar_label(bars, [f"{ms:.3g} ms, {times[0] / ms:.1f} x" for ms in times], padding=4)
    ax.set_xlim(0, 1.3 * max(times))  # room for the labels
    ax.set_xlabel("milliseconds")
    ax.set_title(title, fontsize=12)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Climb, then print the table, then draw the picture if requested."""
    parser = argparse.ArgumentParser(description="Four ways to compute a deformable convolution, checked and timed.")
    parser.add_argument("--size", type=int, default=64, help="height and width of the image (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: 0)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the times as bars, for example to times.png")
    args = parser.parse_args()
    if args.size < 1 or args.seed < 0:
        parser.error("--size must be at least 1, --seed at least 0")
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    x = rng.standard_normal((1, CHANNELS, args.size, args.size), np.float32)
    offsets = 2 * rng.standard_normal((1, 2 * TAPS, args.size, args.size), np.float32)
    w = rng.standard_normal((OUTPUTS, CHANNELS, 3, 3), np.float32)

    title = f"deformable convolution, 3x3, {CHANNELS} to {OUTPUTS} channels, {args.size}x{args.size} pixels, float32"
    say(f"numdcn {numdcn.__version__}, threads: {numdcn.get_num_threads()}\n{title}")
    results = climb(x, offsets, w)
    tell(results)
    threads = numdcn.get_num_threads()
    numdcn.set_num_threads(1)
    say(f"rung 4 on one thread: {best(functools.partial(library, x, offsets, w)):.2f} ms")
    numdcn.set_num_threads(threads)
    if args.picture is not None:
        draw(results, title, args.picture)
    say(f"all checks passed, {time.perf_counter() - start:.1f} s in total")


if __name__ == "__main__":
    main()
