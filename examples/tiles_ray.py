"""A deformable convolution over more tiles than fit in memory, with Ray Data and numdcn's plain functions.

    python examples/tiles_ray.py [--tiles N] [--out FILE] [--quick]

Ray Data hands batches of NumPy arrays to functions, and that is all numdcn needs: there is no adapter. One task cuts
some tiles from photographs and computes the strength of their edges; two run at a time. Prints progress and the peak
memory of each worker, and checks the result; the exit code is 1 if anything is off, or a worker needs more memory than
its limit, which is this program's: Ray has none for a worker.
--out writes the strengths, (N, 4), as a .npy file. --quick: fewer tiles, but still more than fit.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import _tiles
import numpy as np
import ray
from tqdm import tqdm

import numdcn

BATCH = 32  # tiles
STORE = 128 * 2**20  # bytes of memory that Ray shares between processes; it needs some, though tiles stay in their task
Batch = dict[str, np.ndarray]


def with_tiles(batch: Batch) -> Batch:
    """Cut the tiles of some numbers."""
    return {"number": batch["id"], "tile": _tiles.cut(batch["id"])}


def with_strengths(batch: Batch) -> Batch:
    """What is kept of some tiles; beside it, which worker computed it and the most memory that it has used."""
    numdcn.set_num_threads(1)  # Ray runs a task for each CPU
    strengths = _tiles.strengths(batch["tile"], _tiles.layer())
    count = len(strengths)
    peaks, workers = np.full(count, _tiles.peak_memory()), np.full(count, os.getpid())
    return {"number": batch["number"], "strengths": strengths, "peak": peaks, "worker": workers}


def compute(count: int) -> tuple[np.ndarray, dict[str, int]]:
    """The strengths, in order, and the peak memory of each worker."""
    ray.data.DataContext.get_current().enable_progress_bars = False  # the bar below is enough
    tiles = ray.data.range(count, override_num_blocks=-(-count // BATCH)).map_batches(with_tiles, batch_size=BATCH)
    results = tiles.map_batches(with_strengths, batch_size=BATCH, num_cpus=1)
    strengths, peaks = np.empty((count, _tiles.ANGLES), np.float32), dict[str, int]()
    with tqdm(total=count, desc="tiles") as bar:
        for batch in results.iter_batches(batch_size=None):
            strengths[batch["number"]] = batch["strengths"]
            for worker, peak in zip(batch["worker"].tolist(), batch["peak"].tolist(), strict=True):
                name = f"process {worker}"
                peaks[name] = max(peak, peaks.get(name, 0))
            bar.update(len(batch["number"]))
    return strengths, peaks


def main() -> None:
    """Run the batches on two CPUs of this machine."""
    parser = argparse.ArgumentParser(description="Deformable convolution over tiles of photographs with Ray Data.")
    parser.add_argument("--tiles", type=int, default=_tiles.TILES, help=f"how many (default: {_tiles.TILES})")
    parser.add_argument("--out", type=Path, help="file for the strengths")
    parser.add_argument("--quick", action="store_true", help=f"{_tiles.QUICK_TILES} tiles")
    args = parser.parse_args()
    count = _tiles.QUICK_TILES if args.quick else args.tiles
    print(
        f"{count} tiles, {count * _tiles.TILE_BYTES / 1e6:.0f} MB; two workers of {_tiles.LIMIT / 1e6:.0f} MB",
        flush=True,
    )
    ray.init(num_cpus=2, object_store_memory=STORE, include_dashboard=False)
    try:
        strengths, peaks = compute(count)
    finally:
        ray.shutdown()
    _tiles.report(strengths, peaks, _tiles.layer())
    if args.out:
        np.save(args.out, strengths)


if __name__ == "__main__":
    main()
