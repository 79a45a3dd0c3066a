"""One training step of the digits network (examples/train_digits.py): numdcn and NumPy against torch and torchvision.

    python benchmarks/training_step.py [--torchvision-python PATH] [--rounds N] [--out FOLDER]

A step is forward, loss, backward, clipping and Adam, on an existing batch of 32 images. Every side gets the same
parameters and images, each in its own process, run in turn. torch's gradients must equal numdcn's before a time counts:
in float64, because in float32 a rounding may move a sample, or a ReLU's input, across the kink where its slope changes.
The deformable network needs torchvision; torch's own plain network, which does not, is reported next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
BATCH, RATE, CLIP, MASK_SCALE = 32, 1e-3, 5.0, 2.0
LAYERS = (("conv1", 2, 1), ("conv2", 1, 1), ("conv3", 2, 1), ("conv4", 2, 1), ("linear", 1, 0))  # name, stride, padding
TOLERANCE = 1e-9  # relative to a gradient's norm, in float64
STEPS, WARM_UP = 60, 15
TARGET = 0.7


def write_inputs(folder: Path) -> None:
    """Parameters, with non-zero offsets, a batch, and numdcn's gradients, in float64."""
    import _digits_net as net

    rng = np.random.default_rng(0)
    images, labels = rng.random((BATCH, 1, 28, 28)), rng.integers(0, 10, BATCH)
    for name in ("plain", "deformable"):
        params = net.create(net.NETWORKS[name], seed=0, dtype=np.float64)
        for key, value in params.items():
            if ".offset_" in key:
                value += 0.05 * rng.standard_normal(value.shape)
        logits, saved = net.forward(params, images, net.NETWORKS[name])
        _, grad = net.cross_entropy(logits, labels)
        grads = net.backward(params, grad, saved, net.NETWORKS[name])
        arrays: dict[str, Any] = {f"p {k}": v for k, v in params.items()} | {f"g {k}": v for k, v in grads.items()}
        np.savez(folder / f"{name}.npz", images=images, labels=labels, **arrays)


def read_inputs(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Images, labels, parameters, and numdcn's gradients."""
    with np.load(folder / f"{name}.npz") as file:
        named = {prefix: {k[2:]: file[k] for k in file.files if k.startswith(f"{prefix} ")} for prefix in "pg"}
        return file["images"], file["labels"], named["p"], named["g"]


def numdcn_step(folder: Path, name: str, threads: int) -> tuple[Callable[[], Any], float]:
    """A step, and the error of its gradients: 0, since others are compared with them."""
    import _digits_net as net

    import numdcn

    numdcn.set_num_threads(threads)
    images, labels, params, _ = read_inputs(folder, name)
    images, params = images.astype(np.float32), {key: value.astype(np.float32) for key, value in params.items()}
    adam, layers = net.Adam(params, clip=CLIP), net.NETWORKS[name]

    def step() -> None:
        logits, saved = net.forward(params, images, layers)
        _, grad = net.cross_entropy(logits, labels)
        adam.update(params, net.backward(params, grad, saved, layers), RATE)

    return step, 0.0


def torch_step(folder: Path, name: str, threads: int) -> tuple[Callable[[], Any], float]:
    """A step, and the largest relative error of its gradients."""
    import torch
    import torch.nn.functional as f

    torch.set_num_threads(threads)
    if name == "deformable":
        from torchvision.ops import deform_conv2d
    images, labels, params, expected = read_inputs(folder, name)
    target = torch.tensor(labels)

    def layer(p: Any, y: Any, name: str, stride: int, padding: int) -> Any:
        w, b = p[f"{name}.w"], p[f"{name}.b"]
        if f"{name}.offset_w" not in p:
            return f.conv2d(y, w, b, stride, padding)
        z = f.conv2d(y, p[f"{name}.offset_w"], p[f"{name}.offset_b"], stride, padding)
        taps = 2 * w.shape[2] * w.shape[3]
        mask = MASK_SCALE * torch.sigmoid(z[:, taps:])
        return deform_conv2d(y, z[:, :taps], w, b, (stride, stride), (padding, padding), mask=mask)

    def gradients(p: Any, y: Any) -> None:
        for name, stride, padding in LAYERS:
            y = layer(p, y, name, stride, padding)
            y = f.relu(y) if name != "linear" else y
        f.cross_entropy(y[:, :, 0, 0], target).backward()

    exact = {key: torch.tensor(value, requires_grad=True) for key, value in params.items()}
    gradients(exact, torch.tensor(images))
    errors = [np.linalg.norm(exact[k].grad.numpy() - g) / np.linalg.norm(g) for k, g in expected.items()]
    p = {key: torch.tensor(value, dtype=torch.float32, requires_grad=True) for key, value in params.items()}
    x, adam = torch.tensor(images, dtype=torch.float32), torch.optim.Adam(p.values(), lr=RATE)

    def step() -> None:
        adam.zero_grad()
        gradients(p, x)
        torch.nn.utils.clip_grad_norm_(p.values(), CLIP)
        adam.step()

    return step, float(max(errors))


def versions(*packages: str) -> str:
    """The versions of those packages that this process has loaded."""
    return ", ".join(f"{name} {sys.modules[name].__version__}" for name in packages if name in sys.modules)


def measure_here(side: str, folder: Path, name: str, threads: int) -> dict[str, Any]:
    """The median time of a step in this process, in milliseconds."""
    step, error = (numdcn_step if side == "numdcn" else torch_step)(folder, name, threads)
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    loaded = versions("numdcn", "torch", "torchvision")
    return {"ms": 1e3 * statistics.median(times[WARM_UP:]), "error": error, "versions": loaded}


def ask(python: str, side: str, folder: Path, name: str, threads: int) -> dict[str, Any]:
    """The measurement of a new process."""
    command = [python, __file__, "--side", side, "--folder", str(folder), "--network", name, "--threads", str(threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env |= {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no answer"}
    return json.loads(done.stdout.splitlines()[-1])


SIDES = (  # title, side, network
    ("numdcn, deformable", "numdcn", "deformable"),
    ("torch + torchvision, deformable", "torch", "deformable"),
    ("numdcn, plain", "numdcn", "plain"),
    ("torch, plain", "torch", "plain"),
)


def measure_all(torch_python: str, rounds: int) -> dict[str, Any]:
    """{title: {threads: [ms of each round], or why not}}."""
    counts = sorted({1, min(2, os.cpu_count() or 1)})
    results: dict[str, Any] = {title: {} for title, _, _ in SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for turn in range(rounds):
            for threads in counts:
                for title, side, network in SIDES:
                    python = sys.executable if side == "numdcn" else torch_python
                    answer = ask(python, side, folder, network, threads)
                    if answer.get("error", 0.0) > TOLERANCE:
                        answer = {"failed": f"its gradients are {answer['error']:.1e} off"}
                    results[title].setdefault(str(threads), []).append(answer.get("ms", answer.get("failed")))
                    results[title]["versions"] = answer.get("versions", "")
                    print(
                        f"round {turn + 1} of {rounds}, {threads} threads, {title}: {answer}",
                        file=sys.stderr,
                        flush=True,
                    )
    return results


def median(values: list[Any]) -> float | None:
    """The median of the rounds; None where one failed."""
    return statistics.median(values) if all(isinstance(v, float) for v in values) else None


def report(results: dict[str, Any], described: str) -> str:
    """The table, in Markdown."""
    counts = [n for n in next(iter(results.values())) if n != "versions"]
    lines = ["# One training step of the digits network", "", described, ""]
    lines += [f"Batch {BATCH}, float32; medians of {STEPS} steps, then of the rounds, in milliseconds.", ""]
    lines += [
        "| | " + " | ".join(f"{n} thread{'s' * (n != '1')}" for n in counts) + " |",
        "|---|" + "---:|" * len(counts),
    ]
    for title, by_threads in results.items():
        cells = [
            f"{m:.2f}"
            if (m := median(by_threads[n])) is not None
            else str(next(v for v in by_threads[n] if not isinstance(v, float)))
            for n in counts
        ]
        lines.append(f"| {title} ({by_threads['versions']}) | " + " | ".join(cells) + " |")
    own, theirs = (results[title] for title, _, _ in SIDES[:2])
    for n in counts:
        a, b = median(own[n]), median(theirs[n])
        if a is not None and b is not None:
            verdict = "met" if a / b <= TARGET else "missed"
            lines += [
                "",
                f"Deformable, {n} thread(s): {a / b:.3f} of torch + torchvision's time (wanted: at most {TARGET}): {verdict}.",
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The whole measurement, or one side if another process asks for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torchvision-python", default=os.environ.get("NUMDCN_TORCHVISION_PYTHON", sys.executable))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    for name in ("--side", "--folder", "--network", "--threads"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure_here(args.side, Path(args.folder), args.network, int(args.threads))))
        return
    from benchmarks.harness import machine

    results = measure_all(args.torchvision_python, args.rounds)
    described = machine.describe()
    text = report(results, "\n".join(f"- {key}: {value}" for key, value in described.items()))
    print(text)
    stem = f"{machine.slug(described['cpu'])}-training"
    (args.out / f"{stem}.md").write_text(text, encoding="utf-8")
    kept = json.dumps({"machine": described, "results": results}, indent=1) + "\n"
    (args.out / f"{stem}.json").write_text(kept, encoding="utf-8")


if __name__ == "__main__":
    main()
