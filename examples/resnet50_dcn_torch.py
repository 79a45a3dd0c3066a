"""ResNet-50 with deformable convolutions (DCNv2 in stages c3 to c5) in PyTorch: torchvision's operator against numdcn's.

    python examples/resnet50_dcn_torch.py [--quick] [--size 512] [--batch 1] [--threads 1] [--repeats 5] [--out FOLDER]

One network, the same weights, three ways on the CPU: torchvision's own `deform_conv2d`, the same after
`numdcn.adapters.torchvision.install()`, and exported to ONNX and run by onnxruntime. Prints the time of a forward pass
and of a training step (forward, loss, backward); the least of some repetitions counts. Outputs and gradients are
compared with those of a fourth way, in float64: deformable convolution in terms of torch's `grid_sample`. The exit code
is 1 if anything is off. A way that this machine lacks is left out, and it says so. Draws resnet50_dcn_torch.png.
`--quick` takes small images, once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import numdcn
import numdcn.adapters.torchvision

try:
    import torchvision  # noqa: F401

    MISSING = ""
except RuntimeError as error:  # its binary is missing, or was built for another torch
    MISSING = f"torchvision's binary does not load ({error})"
with numdcn.adapters.torchvision.install():
    from torchvision.ops import deform_conv2d

DOCS = Path(__file__).resolve().parent.parent / "docs"
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # c2 to c5: width, blocks, stride
LAYERS = 1 + sum(3 * blocks + 1 for _, blocks, _ in STAGES) + 13 + 1  # convolutions, of offsets too, and the last layer
LONGEST = 9 * 512  # products in a sum
OWN, OURS, ONNX = "torchvision", "numdcn", "onnxruntime"
COLOURS = {OWN: "#8a8a8a", OURS: "#e0402f", ONNX: "#2a78c2"}
say = functools.partial(print, flush=True)  # show progress immediately


def by_grid_sample(
    x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor, stride: int, padding: int, mask: torch.Tensor
) -> torch.Tensor:
    """A 3 x 3 `deform_conv2d`, tap by tap, of what torch itself has: slow, and independent of what is compared."""
    (height, width), (rows, columns) = x.shape[2:], offset.shape[2:]
    top = torch.arange(rows, dtype=x.dtype)[:, None] * stride - padding
    left = torch.arange(columns, dtype=x.dtype) * stride - padding
    y = torch.zeros((), dtype=x.dtype)
    for tap in range(9):
        i, j = divmod(tap, 3)
        down, right = top + i + offset[:, 2 * tap], left + j + offset[:, 2 * tap + 1]  # in pixels
        grid = torch.stack([(2 * right + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)
        seen = nn.functional.grid_sample(x, grid, align_corners=False) * mask[:, tap : tap + 1]
        y = y + nn.functional.conv2d(seen, weight[:, :, i : i + 1, j : j + 1])
    return y


class DeformConv(nn.Module):
    """A 3 x 3 convolution, modulated and deformable (DCNv2): it predicts its own offsets and masks."""

    operator = staticmethod(deform_conv2d)

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.offset = nn.Conv2d(channels, 27, 3, stride, padding=1)
        nn.init.normal_(self.offset.weight, std=(9 * channels) ** -0.5)  # offsets of about a pixel, as after training
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution of x, (N, C, H, W)."""
        offset, mask = self.offset(x).split([18, 9], dim=1)
        return self.operator(x, offset, self.weight, stride=self.stride, padding=1, mask=mask.sigmoid())


class Bottleneck(nn.Module):
    """A residual block: 1 x 1, 3 x 3 and 1 x 1 convolutions, each with batch normalisation."""

    def __init__(self, channels: int, width: int, stride: int, deformable: bool) -> None:
        super().__init__()
        middle = DeformConv(width, stride) if deformable else nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            middle, nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        nn.init.constant_(self.branch[-1].weight, 0.25)  # residuals begin small: rounding errors do not grow
        self.shortcut: nn.Module = nn.Identity()
        if channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's features."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Sequential:
    """The network, with random weights."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    channels = 64
    for width, blocks, stride in STAGES:
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, 1 if block else stride, deformable=width > 64))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def calibrate(model: nn.Module, images: torch.Tensor) -> None:
    """Let batch normalisation take its statistics from some images, so that features keep a sensible size."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    model.eval()


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward, loss and backward of a training step; the gradients of all weights as one vector.

    Batch normalisation keeps its statistics, as it does where detectors are trained.
    """
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


class Times(NamedTuple):
    """Of one way to run the network, in seconds."""

    forward: float
    step: float | None  # None: it cannot train


def least(run: Callable[[], Any], repeats: int) -> float:
    """The least time of some calls, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


class Exact(NamedTuple):
    """What the network computes, in float64 and by `grid_sample`."""

    model: nn.Module  # in float64, with torchvision's operator
    output: torch.Tensor
    gradients: torch.Tensor


def exact(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Exact:
    """The reference."""
    model = copy.deepcopy(model).double()
    layers = [module for module in model.modules() if isinstance(module, DeformConv)]
    for layer in layers:
        layer.operator = by_grid_sample
    with torch.no_grad():
        output = model(images.double())
    gradients = step(model, images.double(), labels)
    for layer in layers:
        del layer.operator
    return Exact(model, output, gradients)


def check(what: str, value: torch.Tensor, expected: torch.Tensor, layers: int) -> None:
    """Print a relative error; exit with code 1 if it is too large.

    A sum of n products is typically off by sqrt(n)*eps; over the layers these errors add up.
    """
    error = float((value - expected).norm() / expected.norm())
    allowed = layers * LONGEST**0.5 * torch.finfo(value.dtype).eps
    say(f"   {what:<34}relative error {error:.1e}   (allowed {allowed:.1e})")
    if not error <= allowed:
        sys.exit(f"FAILED: {what}: {error:.3e} is more than {allowed:.3e}")


def by_torch(
    name: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, reference: Exact, repeats: int
) -> Times:
    """Check and time the network in PyTorch, with the kernels that are installed.

    Gradients are compared in float64: in float32 some features are so close to a kink, of a ReLU or between two pixels,
    that rounding moves them across, and their gradients jump.
    """
    with torch.no_grad():
        check(f"{name}: output, float32", model(images), reference.output, LAYERS)
        check(f"{name}: output, float64", reference.model(images.double()), reference.output, LAYERS)
        forward = least(lambda: model(images), repeats)
    check(
        f"{name}: gradients, float64", step(reference.model, images.double(), labels), reference.gradients, 3 * LAYERS
    )
    return Times(forward, least(lambda: step(model, images, labels), repeats))


def by_onnx(model: nn.Module, images: torch.Tensor, reference: Exact, repeats: int, threads: int) -> Times | str:
    """Check and time the network in onnxruntime; or why it cannot run there."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import onnxruntime

    from numdcn.adapters.onnx import translations

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        path = Path(folder) / "model.onnx"
        table = translations()
        with contextlib.redirect_stdout(None):
            torch.onnx.export(model, (images,), path, dynamo=True, opset_version=19, custom_translation_table=table)
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            return f"it has no kernel for DeformConv on the CPU ({str(error).splitlines()[0]})"
    given = {session.get_inputs()[0].name: images.numpy()}
    check(f"{ONNX}: output, float32", torch.from_numpy(session.run(None, given)[0]), reference.output, LAYERS)
    return Times(least(lambda: session.run(None, given), repeats), None)


def table(times: dict[str, Times]) -> None:
    """Print all times."""
    say(f"   {'':<14}{'forward':>12}{'training step':>18}")
    for name, (forward, train) in times.items():
        say(f"   {name:<14}{1000 * forward:>9.0f} ms" + ("" if train is None else f"{1000 * train:>15.0f} ms"))
    if OWN in times:
        own, ours = times[OWN], times[OURS]
        assert own.step and ours.step
        say(
            f"   numdcn is {own.forward / ours.forward:.1f} times as fast forward, {own.step / ours.step:.1f} in a step"
        )


def draw(times: dict[str, Times], title: str, path: Path) -> None:
    """A bar for each time."""
    fig = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    for ax, what, values in (
        (fig.add_subplot(1, 2, 1), "forward", {name: t.forward for name, t in times.items()}),
        (fig.add_subplot(1, 2, 2), "training step", {name: t.step for name, t in times.items() if t.step}),
    ):
        bars = ax.barh([*values], [*values.values()], color=[COLOURS[name] for name in values], height=0.6)
        ax.bar_label(bars, [f"{1000 * value:.0f} ms" for value in values.values()], padding=4)
        ax.set_title(what)
        ax.set_xlabel("seconds")
        ax.margins(x=0.25)
        ax.set_ylim(len(times) - 0.5, -0.5)  # from the top, and bars of the same height
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Check, time, draw."""
    parser = argparse.ArgumentParser(description="ResNet-50 with DCNv2: torchvision's operator against numdcn's.")
    parser.add_argument("--quick", action="store_true", help="images of 64 x 64, one repetition")
    parser.add_argument("--size", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="the least time of these counts")
    parser.add_argument("--out", type=Path, default=DOCS / "pictures", help="folder of the picture")
    args = parser.parse_args()
    size, repeats = (64, 1) if args.quick else (args.size, args.repeats)
    torch.set_num_threads(args.threads)
    numdcn.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, size, size), torch.arange(args.batch)
    title = f"ResNet-50 with DCNv2 in c3 to c5, {args.batch} x 3 x {size} x {size}, threads: {args.threads}"
    say(f"{title}; least of {repeats}")
    times: dict[str, Times] = {}
    missing = {OWN: MISSING} if MISSING else {}

    with numdcn.adapters.torchvision.install():
        model = resnet50()
        calibrate(model, torch.randn(4, 3, size, size))
    say("1. the same outputs and gradients")
    reference = exact(model, images, labels)
    if not MISSING:
        times[OWN] = by_torch(OWN, model, images, labels, reference, repeats)
    with numdcn.adapters.torchvision.install():
        times[OURS] = by_torch(OURS, model, images, labels, reference, repeats)
        onnx = by_onnx(model, images, reference, repeats, args.threads)
    if isinstance(onnx, Times):
        times[ONNX] = onnx
    else:
        missing[ONNX] = onnx
    say("2. times")
    table(times)
    for name, reason in missing.items():
        say(f"   without {name}: {reason}")
    draw(times, title, args.out / "resnet50_dcn_torch.png")


if __name__ == "__main__":
    main()
