"""Digits rotated, scaled and shifted at random: a network with two modulated deformable layers against plain ones.

    python examples/train_digits.py [--epochs N] [--seeds N] [--out FOLDER] [--quick]
                                    [--checkpoint PATH [--resume] [--stop-after STEPS]]

Every network is trained with every seed: same digits, same transformations, same order, same number of steps, same
learning rates. Forward and backward use only numdcn and NumPy. Results depend only on the seeds, bit for bit, not on
the number of threads.

With --checkpoint, the complete training state is written there after every epoch and on Ctrl-C; --resume continues from
it and ends with the same bits. Prints a table and draws two figures, train_digits_curves.png and
train_digits_points.png.

--quick is a smoke test: a few digits and epochs, to see that it works. Its accuracies mean nothing, and it writes
nothing to docs; figures only to the folder given by --out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import _digits_data as data
import _digits_figures as figures
import _digits_net as net
import numpy as np
from tqdm import tqdm

import numdcn

DOCS = Path(__file__).resolve().parent.parent / "docs"
HIGHEST_RATE = 0.006  # chosen on held-out training digits, for every network
WARM = 0.05  # fraction of the steps during which the learning rate rises; then it decays to 0 along a cosine
BATCH = 32


class Settings(NamedTuple):
    """The settings that determine the result."""

    epochs: int = 30
    seeds: int = 5
    train: int = data.TRAIN  # digits
    test: int = data.TEST
    copies: int = 4  # transformations of each test digit


QUICK = Settings(epochs=2, seeds=1, train=96, test=40, copies=1)
State = dict[str, Any]  # of dicts, lists, numbers, strings and arrays


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of a step from 0 to steps - 1."""
    return HIGHEST_RATE * min(1.0, (step + 1) / (WARM * steps)) * (0.5 + 0.5 * float(np.cos(np.pi * step / steps)))


class Run:
    """One network in training: everything its next step depends on, and the history so far."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.layers = name, seed, net.NETWORKS[name]
        self.params = net.create(self.layers, seed)
        self.adam = net.Adam(self.params)
        self.rng = np.random.default_rng([seed, 1])  # not the weights' one: networks differ in how many they draw
        self.batch = 0  # next in this epoch
        self.order = np.empty(0, np.intp)  # of the digits in this epoch
        self.transformations = np.empty((0, 4), np.float32)  # of each digit in this epoch
        self.sums = [0.0, 0.0]  # of this epoch's losses and accuracies
        self.curves: dict[str, list[float]] = {"loss": [], "accuracy": []}  # one value per epoch
        self.tests: list[list[float]] = []  # the number of epochs done, and the accuracy after them
        self.seconds = 0.0

    def state(self) -> State:
        """The complete state, for a checkpoint."""
        return {**vars(self), "layers": None, "adam": vars(self.adam), "rng": self.rng.bit_generator.state}

    @classmethod
    def restore(cls, state: State) -> Run:
        """The run that produced this state."""
        run = cls(state["name"], state["seed"])
        vars(run.adam).update(state["adam"])
        run.rng.bit_generator.state = state["rng"]
        vars(run).update({k: v for k, v in state.items() if k not in ("layers", "adam", "rng")})
        return run

    def step(self, digits: data.Digits, epochs: int) -> bool:
        """Train with one batch; returns whether an epoch has ended."""
        start = time.perf_counter()
        batches = len(digits.labels) // BATCH
        if self.batch == 0:
            self.order = self.rng.permutation(len(digits.labels))
            self.transformations = data.draw(self.rng, len(digits.labels))
        chosen = self.order[self.batch * BATCH :][:BATCH]
        images = data.transform(digits.images[chosen], self.transformations[chosen])
        logits, saved = net.forward(self.params, images, self.layers)
        loss, grad = net.cross_entropy(logits, digits.labels[chosen])
        grads = net.backward(self.params, grad, saved, self.layers)
        self.adam.update(self.params, grads, learning_rate(self.adam.steps, epochs * batches))
        accuracy = float((logits.argmax(axis=1) == digits.labels[chosen]).mean())
        self.sums = [self.sums[0] + loss, self.sums[1] + accuracy]
        self.batch += 1
        self.seconds += time.perf_counter() - start
        if self.batch < batches:
            return False
        for key, value in zip(("loss", "accuracy"), self.sums, strict=True):
            self.curves[key].append(value / batches)
        self.batch, self.sums = 0, [0.0, 0.0]
        return True

    def right(self, digits: data.Digits) -> np.ndarray:
        """Whether the network is right, for each image."""
        chunks = np.split(np.arange(len(digits.labels)), range(200, len(digits.labels), 200))
        logits = [net.forward(self.params, digits.images[chunk], self.layers)[0] for chunk in chunks]
        return np.concatenate(logits).argmax(axis=1) == digits.labels

    def test(self, digits: data.Digits, epochs: int) -> None:
        """After every second epoch and the last, record the accuracy for the learning curve. Nothing depends on it."""
        epoch = len(self.curves["loss"])
        if epoch % 2 == 0 or epoch == epochs:
            self.tests.append([epoch, float(self.right(digits).mean())])


def save(path: Path, state: State) -> None:
    """Write a checkpoint atomically: whatever happens, the file is completely old or completely new."""
    arrays: dict[str, Any] = {}

    def put(array: np.ndarray) -> dict[str, str]:
        arrays[f"array{len(arrays)}"] = array
        return {"array": f"array{len(arrays) - 1}"}

    text = json.dumps(state, default=put)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, state=np.array(text), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> State:
    """The state written by `save`."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["state"]), object_hook=lambda d: file[d["array"]] if "array" in d else d)


class Stop:
    """Whether to stop: after a number of steps, or after Ctrl-C, which never interrupts a step."""

    def __init__(self, after: int | None) -> None:
        self.left, self.pressed = after, False

    def listen(self) -> None:
        """Handle Ctrl-C and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(self, "pressed", True))

    def after_step(self) -> bool:
        """Call after each step; returns whether to stop."""
        self.left = None if self.left is None else self.left - 1
        return self.pressed or self.left == 0


class Stopped(Exception):
    """Training was stopped early on request."""


def train_all(state: State, settings: Settings, path: Path | None, stop: Stop) -> list[State]:
    """The results of every network and seed. `state` comes from a checkpoint or is new, and is modified."""
    digits, test = data.load(settings.train, settings.test)
    test = data.posed(test, settings.copies)
    first = data.Digits(*(a[: settings.test] for a in test))
    jobs = [(name, seed) for seed in range(settings.seeds) for name in net.NETWORKS]
    steps = settings.epochs * (settings.train // BATCH)
    bar = tqdm(total=len(jobs) * steps, disable=None, unit="step", dynamic_ncols=True, smoothing=0.02)
    while len(state["done"]) < len(jobs):
        run = Run.restore(state["run"]) if state["run"] else Run(*jobs[len(state["done"])])
        while len(run.curves["loss"]) < settings.epochs:
            ended = run.step(digits, settings.epochs)
            if ended:
                run.test(first, settings.epochs)
            show(bar, run, steps * len(state["done"]) + run.adam.steps)
            stopped = stop.after_step()
            if path and (ended or stopped):
                save(path, {**state, "run": run.state()})
            if stopped:
                bar.close()
                raise Stopped
        done: State = {key: vars(run)[key] for key in ("name", "seed", "params", "curves", "tests", "seconds")}
        done["right"] = run.right(test)
        state["done"].append(done)
        state["run"] = None
        accuracy, epoch = 100 * done["right"].mean(), run.seconds / settings.epochs
        tqdm.write(f"   {run.name:<14} seed {run.seed}: test accuracy {accuracy:.2f} %, {epoch:.2f} s per epoch")
        sys.stdout.flush()
    if path:
        save(path, state)
    bar.close()
    return state["done"]


def show(bar: tqdm, run: Run, step: int) -> None:
    """Update the progress bar: loss and accuracy are those of the epoch so far, or of the one that has just ended."""
    sums, count = (run.sums, run.batch) if run.batch else ([curve[-1] for curve in run.curves.values()], 1)
    bar.set_description(f"{run.name}, seed {run.seed}", refresh=False)
    bar.set_postfix_str(f"loss {sums[0] / count:.3f}, accuracy {100 * sums[1] / count:.1f} %", refresh=False)
    bar.update(step - bar.n)


def table(done: list[State], settings: Settings) -> str:
    """Accuracy, parameters and time of every network; then the deformable one's lead over each of the others."""
    lines = ["| network | parameters | seconds per epoch | test accuracy | spread | lowest | highest |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    right = {name: np.array([d["right"] for d in done if d["name"] == name], float) for name in net.NETWORKS}
    for name, hits in right.items():
        runs = [d for d in done if d["name"] == name]
        count = sum(p.size for p in runs[0]["params"].values())
        seconds = np.median([d["seconds"] for d in runs]) / settings.epochs
        scores = 100 * hits.mean(axis=1)
        spread = f"{scores.std(ddof=1):.2f}" if len(scores) > 1 else "-"
        lines.append(
            f"| {name} | {count} | {seconds:.2f} | {scores.mean():.2f} % | {spread} | {scores.min():.2f} | {scores.max():.2f} |"
        )
    lines += [
        "",
        "| deformable, ahead of | points | standard error, over digits | over seeds | seeds it wins |",
    ]
    lines.append("|---|---:|---:|---:|---:|")
    for name in list(net.NETWORKS)[:-1]:
        ahead = 100 * (right["deformable"] - right[name])  # (seeds, copies * digits)
        by_digit = ahead.reshape(-1, settings.test).mean(axis=0)
        by_seed = ahead.mean(axis=1)
        errors = [f"{a.std(ddof=1) / len(a) ** 0.5:.2f}" if len(a) > 1 else "-" for a in (by_digit, by_seed)]
        wins = f"{(by_seed > 0).sum()} of {len(by_seed)}"
        lines.append(f"| {name} | {ahead.mean():+.2f} | {errors[0]} | {errors[1]} | {wins} |")
    return "\n".join(lines)


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train a deformable network and plain ones on transformed digits.")
    parser.add_argument("--epochs", type=int, help=f"of each network (default: {Settings().epochs})")
    parser.add_argument(
        "--seeds", type=int, help=f"how many times each network is trained (default: {Settings().seeds})"
    )
    parser.add_argument("--out", type=Path, help="folder for the two figures (default: docs; with --quick: no figures)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test: a few digits and epochs, one seed, seconds; its accuracies mean nothing; writes nothing to docs",
    )
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="an .npz file to write after every epoch")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="write the checkpoint after this many steps, and stop"
    )
    args = parser.parse_args(given)
    if not args.checkpoint and (args.resume or args.stop_after is not None):
        parser.error("--resume and --stop-after need --checkpoint")
    if args.resume and not args.checkpoint.exists():
        parser.error(f"--resume: there is no {args.checkpoint}")
    for name in ("epochs", "seeds", "stop_after"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if args.quick and args.out and args.out.resolve().is_relative_to(DOCS.resolve()):
        parser.error("--quick is a smoke test: its figures do not belong in docs")
    args.out = args.out or (None if args.quick else DOCS)
    asked = {name: getattr(args, name) for name in ("epochs", "seeds") if getattr(args, name)}
    return args, (QUICK if args.quick else Settings())._replace(**asked)


def main(given: list[str] | None = None) -> int:
    """Train, print the table, draw the figures; returns 0, or 130 if stopped early."""
    args, settings = arguments(given)
    start = time.perf_counter()
    print(f"numdcn {numdcn.__version__}, threads: {numdcn.get_num_threads()}")
    state: State = {"settings": settings._asdict(), "done": [], "run": None}
    stop = Stop(args.stop_after)
    if args.checkpoint:
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        stop.listen()
    if args.resume:
        state = load(args.checkpoint)
        if state["settings"] != settings._asdict():
            sys.exit(f"{args.checkpoint} was written with {state['settings']}, now it is {settings._asdict()}")
    print(
        f"{len(net.NETWORKS)} networks, each with {settings.seeds} seed{'s' * (settings.seeds > 1)}: {settings.epochs} epochs "
        f"of {settings.train} digits; test: {settings.test} others, poses per digit: {settings.copies}",
        flush=True,
    )
    if args.quick:
        print("--quick is a smoke test: its accuracies mean nothing", flush=True)
    try:
        done = train_all(state, settings, args.checkpoint, stop)
    except Stopped:
        print(f"stopped; --resume continues from {args.checkpoint}")
        return 130
    print("\n" + table(done, settings) + "\n")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        figures.curves(done, args.out / "train_digits_curves.png")
        trained = next(d["params"] for d in done if d["name"] == "deformable")
        figures.points(trained, args.out / "train_digits_points.png")
    print(f"{time.perf_counter() - start:.0f} s in total")
    return 0


if __name__ == "__main__":
    sys.exit(main())
