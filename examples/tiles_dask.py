"""A deformable convolution over more tiles than fit in memory, on two local Dask workers.

    python examples/tiles_dask.py [--tiles N] [--out FILE] [--quick]

Tiles are cut from photographs in the workers, a chunk at a time. Of each tile the strength of its edges is kept, of all
of them the gradient of a loss with respect to the weights, which is added up in a binary tree of the chunks. Prints
progress and the peak memory of each worker, and checks both results; the exit code is 1 if anything is off, or a
worker needs more memory than its limit. --out writes the strengths, (N, 4), as a .npy file. --quick: fewer tiles, but
still more than fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _tiles
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, as_completed, futures_of
from tqdm import tqdm

from numdcn.adapters.dask import deform_conv, deform_conv_backward, set_worker_threads

CHUNK = 16  # tiles
EPS = float(np.finfo(np.float32).eps)


def lazy_tiles(count: int) -> da.Array:
    """The first tiles, cut when a worker needs them."""
    numbers = da.arange(count, chunks=CHUNK)
    chunks = (numbers.chunks[0], 3, _tiles.SIZE, _tiles.SIZE)
    return numbers.map_blocks(
        _tiles.cut, new_axis=[1, 2, 3], chunks=chunks, dtype=np.float32, meta=np.empty((0,) * 4, "f4")
    )


def graph(count: int, how: _tiles.Layer) -> tuple[da.Array, da.Array, da.Array]:
    """The strengths, the gradient with respect to the weights of the loss sum(y**2) / 2, and twice that loss, lazily."""
    x = lazy_tiles(count)
    offsets = da.broadcast_to(how.offsets, (count, *how.offsets.shape[1:]), chunks=(x.chunks[0], -1, -1, -1))
    y = deform_conv(x, offsets, how.w, padding=1)
    g = deform_conv_backward(y, x, offsets, how.w, padding=1, wrt="w")  # dloss/dy is y
    return abs(y).mean(axis=(2, 3)), g.w, (y * y).sum(dtype=np.float64)


def check_gradient(grad_w: np.ndarray, w: np.ndarray, energy: float) -> None:
    """y is linear in w, so <grad_w, w> = <dloss/dy, y>. Random rounding errors grow with the square root of the number of
    products that are added up, those of a chunk; the tree of chunks adds few."""
    error = abs(float(np.vdot(grad_w.astype(np.float64), w)) / energy - 1)
    allowed = EPS * (CHUNK * _tiles.SIZE**2) ** 0.5
    print(f"   <grad_w, w> and sum(y**2) differ by {error:.1e} (allowed {allowed:.1e})")
    if not error <= allowed:
        sys.exit("FAILED: the gradient of the weights is wrong")


def main() -> None:
    """Run the graph on two workers."""
    parser = argparse.ArgumentParser(description="Deformable convolution over tiles of photographs with Dask.")
    parser.add_argument("--tiles", type=int, default=_tiles.TILES, help=f"how many (default: {_tiles.TILES})")
    parser.add_argument("--out", type=Path, help="file for the strengths")
    parser.add_argument("--quick", action="store_true", help=f"{_tiles.QUICK_TILES} tiles")
    args = parser.parse_args()
    count, how = _tiles.QUICK_TILES if args.quick else args.tiles, _tiles.layer()
    print(
        f"{count} tiles, {count * _tiles.TILE_BYTES / 1e6:.0f} MB; two workers of {_tiles.LIMIT / 1e6:.0f} MB",
        flush=True,
    )
    with (
        LocalCluster(2, threads_per_worker=1, memory_limit=_tiles.LIMIT, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        set_worker_threads(client)
        running = client.persist(graph(count, how))
        parts = futures_of(running[0])
        for _ in tqdm(as_completed(parts), "chunks", len(parts)):
            pass
        strengths, grad_w, energy = client.gather(client.compute(running))
        peaks = {f"worker {n}": peak for n, peak in enumerate(client.run(_tiles.peak_memory).values())}
    check_gradient(grad_w, how.w, float(energy))
    _tiles.report(strengths, peaks, how)
    if args.out:
        np.save(args.out, strengths)


if __name__ == "__main__":
    main()
