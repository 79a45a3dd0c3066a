"""Deformable attention looked at: four queries learn to find four parts of a pagoda, wherever the camera puts it.

    python examples/attend.py [--quick] [--steps N] [--out FOLDER]

A small decoder like that of Deformable DETR, in NumPy: three layers of multi-scale deformable attention. Each query
starts at a place of its own, the same in every picture, samples three levels of features at a few points, and moves
according to what it saw; the next layer samples around its new place. Each training step draws new views of one
photograph: turned, zoomed, shifted. The gradients come from `ms_deform_attn_backward` and matrix products, and are
checked against finite differences. The true places of the parts are known: the final distances, in views not trained
on, are printed and checked, and the exit code is 1 if anything is off. Draws attend.png: where each query looks on each
level, before and after training.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from sklearn.datasets import load_sample_image

import numdcn

PARTS = {"tip": (207, 40), "upper eave": (318, 120), "left eave": (66, 268), "lowest corner": (372, 332)}  # x, y
COLOURS = ("#ffd400", "#ff4fd8", "#35ff5e", "#38b6ff")  # of the queries
VIEW = (128, 192)  # height and width
PATCH = 4
# features of a level: patches of 4x4 pixels of the view, of its half, of its quarter
LEVELS = tuple((VIEW[0] // s, VIEW[1] // s) for s in (4, 8, 16))
SIZES = np.array([(width, height) for height, width in LEVELS], np.float64)
HEADS, POINTS, CHANNELS = 4, 4, 8  # points per head and level, channels per head
LAYERS, WIDTH, HIDDEN = 3, 32, 96  # layers of the decoder, sizes of a query and of the perceptrons' hidden layers
SAMPLES = (HEADS, len(LEVELS), POINTS)  # of one query
STEPS, QUICK, BATCH, RATE = 400, 80, 8, 4e-3
GREY = np.float32(0.5)  # the colour outside the photograph
BLUR = 0.02  # in heights of a view; the loss is rounded off for distances below it
DOCS = Path(__file__).resolve().parent.parent / "docs"
say = functools.partial(print, flush=True)  # show progress immediately
Parameters = dict[str, np.ndarray]


class Views(NamedTuple):
    """Views (N, H, W, 3) of the photograph, and where its parts are in them (N, Q, 2): x, y from 0 to 1."""

    pictures: np.ndarray
    parts: np.ndarray


class Layer(NamedTuple):
    """What one layer of the decoder computed: for the backward and the figure."""

    query: np.ndarray  # (N, Q, WIDTH), as it came in
    locations: np.ndarray  # (N, Q, M, L, P, 2)
    weights: np.ndarray  # (N, Q, M, L, P), their sum over L and P is 1
    both: np.ndarray  # the query and what it saw
    hidden: np.ndarray
    moved: np.ndarray  # the query as it goes out
    place: np.ndarray  # (N, Q, 2): where the layer puts it


class Decoded(NamedTuple):
    """Features, and the decoder's layers."""

    patches: np.ndarray
    value: np.ndarray  # (N, S, M, D)
    layers: list[Layer]

    @property
    def place(self) -> np.ndarray:
        """Where the queries end."""
        return self.layers[-1].place


def check(what: str, error: float, allowed: float) -> None:
    """Print an error; exit with code 1 if it is larger than allowed."""
    say(f"   {what:<52}{error:.1e}   (allowed {allowed:.1e})")
    if not error <= allowed:
        sys.exit(f"FAILED: {what}: {error:.3e} is more than {allowed:.3e}")


def photograph() -> np.ndarray:
    """scikit-learn's pagoda at a third of its size, (1, 3, H, W), float32 in 0 to 1."""
    image = load_sample_image("china.jpg").astype(np.float32) / 255
    h, w = (size // 3 for size in image.shape[:2])
    return np.ascontiguousarray(image[: 3 * h, : 3 * w].reshape(h, 3, w, 3, 3).mean((1, 3)).transpose(2, 0, 1)[None])


def views(photo: np.ndarray, number: int, rng: np.random.Generator) -> Views:
    """Views in which all parts are visible; what lies beyond the photograph is grey."""
    frame = np.array(VIEW[::-1])
    parts = (np.array(list(PARTS.values())) + 0.5) / 3 - 0.5  # in pixels of `photo`
    zoom, angle = rng.uniform(0.65, 1.05, number), np.deg2rad(rng.uniform(-25, 25, number))
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    turn = np.stack([c, -s, s, c], axis=-1).reshape(number, 2, 2)
    seen = parts @ turn.transpose(0, 2, 1)
    margin = 6 - seen.min(axis=1), frame - 7 - seen.max(axis=1)
    shift = rng.uniform(np.minimum(*margin), np.maximum(*margin))[:, None]
    pixels = np.stack(np.meshgrid(np.arange(frame[0]), np.arange(frame[1])), axis=-1).reshape(1, -1, 2)
    back = np.linalg.inv(turn).transpose(0, 2, 1)
    there = pixels.astype(np.float32) @ back.astype(np.float32) - (shift @ back).astype(np.float32)
    there = there[..., ::-1].reshape(1, -1, VIEW[1], 2)
    pictures = numdcn.bilinear_sample_forward(photo - GREY, there) + GREY  # samples outside are 0
    return Views(pictures[0].transpose(1, 2, 0).reshape(number, *VIEW, 3), (seen + shift + 0.5) / frame)


def pyramid(pictures: np.ndarray) -> list[np.ndarray]:
    """The pictures, and the same at a half and a quarter of their height and width."""
    levels = [pictures]
    for _ in LEVELS[1:]:
        n, h, w, c = levels[-1].shape
        levels.append(levels[-1].reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4)))
    return levels


def patches_of(pictures: np.ndarray) -> np.ndarray:
    """The patches of all levels, one level after the other: (N, S, 48)."""
    rows = []
    for level, (h, w) in zip(pyramid(pictures), LEVELS, strict=True):
        cut = level.reshape(-1, h, PATCH, w, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
        rows.append(cut.reshape(len(level), h * w, -1))
    return np.concatenate(rows, axis=1) - GREY


def fresh(rng: np.random.Generator) -> Parameters:
    """Parameters before training. Each head looks in its own direction, in steps of a pixel of each level, as in
    Deformable DETR."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)

    channels, samples = HEADS * CHANNELS, int(np.prod(SAMPLES))
    direction = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])[:, None, None]
    star = np.broadcast_to(direction * (1 + np.arange(POINTS))[:, None], (*SAMPLES, 2))
    p = {
        "value.w": matrix(3 * PATCH**2, channels),
        "value.b": np.zeros(channels),
        "query": rng.standard_normal((len(PARTS), WIDTH)),
        "place": np.array([(0.3, 0.3), (0.7, 0.3), (0.3, 0.7), (0.7, 0.7)]),
    }
    for n in range(LAYERS):
        p[f"{n}.points.w"] = np.zeros((WIDTH, 2 * samples))
        p[f"{n}.points.b"] = star.reshape(-1).astype(np.float64)
        p[f"{n}.weights.w"] = np.zeros((WIDTH, samples))
        p[f"{n}.weights.b"] = np.zeros(samples)
        p[f"{n}.in.w"] = matrix(WIDTH + channels, HIDDEN)
        p[f"{n}.in.b"] = np.zeros(HIDDEN)
        p[f"{n}.out.w"] = matrix(HIDDEN, WIDTH) / 4
        p[f"{n}.move.w"] = np.zeros((WIDTH, 2))
    return {name: a.astype(np.float32) for name, a in p.items()}


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def decode(p: Parameters, pictures: np.ndarray) -> Decoded:
    """Features of the pictures, and where the queries go, layer by layer."""
    n, dtype = len(pictures), p["query"].dtype
    patches = patches_of(pictures).astype(dtype).reshape(-1, len(p["value.w"]))
    value = np.maximum(patches @ p["value.w"] + p["value.b"], 0).reshape(n, -1, HEADS, CHANNELS)
    query = np.broadcast_to(p["query"], (n, *p["query"].shape))
    place = np.broadcast_to(p["place"], (n, *p["place"].shape))
    layers = []
    for k in range(LAYERS):
        points = (query @ p[f"{k}.points.w"] + p[f"{k}.points.b"]).reshape(n, -1, *SAMPLES, 2)
        locations = place[:, :, None, None, None] + points / SIZES[:, None].astype(dtype)
        logits = (query @ p[f"{k}.weights.w"] + p[f"{k}.weights.b"]).reshape(n, -1, HEADS, len(LEVELS) * POINTS)
        weights = softmax(logits).reshape(n, -1, *SAMPLES)
        seen = numdcn.ms_deform_attn_forward(value, LEVELS, locations, weights)
        both = np.concatenate([query, seen], axis=-1)
        hidden = np.maximum(both @ p[f"{k}.in.w"] + p[f"{k}.in.b"], 0)
        moved = query + hidden @ p[f"{k}.out.w"]
        place = place + moved @ p[f"{k}.move.w"]
        layers.append(Layer(query, locations, weights, both, hidden, moved, place))
        query = moved
    return Decoded(patches, value, layers)


def errors(place: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """From the parts to where the queries are, in heights of a view: (..., 2)."""
    return np.asarray((place - parts) * (np.array(VIEW[::-1]) / VIEW[0])).astype(place.dtype)


def loss(d: Decoded, parts: np.ndarray) -> float:
    """The mean distance of queries from their parts, over all layers; in heights of a view, rounded off near 0."""
    far = [np.sqrt((errors(layer.place, parts) ** 2).sum(axis=-1) + BLUR**2) - BLUR for layer in d.layers]
    return float(np.mean(far))


def product(g: Parameters, name: str, x: np.ndarray, grad: np.ndarray) -> None:
    """Store the gradient of the matrix `name` in x @ matrix + bias, and of the bias."""
    x, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    g[f"{name}.w"], g[f"{name}.b"] = x.T @ grad, grad.sum(axis=0)


def gradients(p: Parameters, d: Decoded, parts: np.ndarray) -> Parameters:
    """Of the loss, with respect to every parameter."""
    g: Parameters = {}
    n = len(parts)
    grad_value, grad_query = np.zeros_like(d.value), np.zeros_like(d.layers[0].query)
    grad_place = np.zeros_like(d.place)
    for k in reversed(range(LAYERS)):
        layer = d.layers[k]
        off = errors(layer.place, parts)
        far = np.sqrt((off**2).sum(axis=-1, keepdims=True) + BLUR**2)
        grad_place = grad_place + errors(off / (far * far.size * LAYERS), np.zeros_like(off))
        product(g, f"{k}.move", layer.moved, grad_place)
        grad_moved = grad_query + grad_place @ p[f"{k}.move.w"].T
        product(g, f"{k}.out", layer.hidden, grad_moved)
        grad_hidden = (grad_moved @ p[f"{k}.out.w"].T) * (layer.hidden > 0)
        product(g, f"{k}.in", layer.both, grad_hidden)
        grad_both = grad_hidden @ p[f"{k}.in.w"].T
        grad_query, grad_seen = grad_moved + grad_both[..., :WIDTH], grad_both[..., WIDTH:]

        a = numdcn.ms_deform_attn_backward(grad_seen, d.value, LEVELS, layer.locations, layer.weights)
        assert a.value is not None and a.sampling_locations is not None and a.attention_weights is not None
        grad_value += a.value
        grad_place = grad_place + a.sampling_locations.sum(axis=(2, 3, 4))
        grad_points = (a.sampling_locations / SIZES[:, None].astype(off.dtype)).reshape(n, len(PARTS), -1)
        slope = a.attention_weights - (a.attention_weights * layer.weights).sum(axis=(3, 4), keepdims=True)
        grad_logits = (layer.weights * slope).reshape(n, len(PARTS), -1)
        for name, grad in (("points", grad_points), ("weights", grad_logits)):
            product(g, f"{k}.{name}", layer.query, grad)
            grad_query = grad_query + grad @ p[f"{k}.{name}.w"].T
    g["query"], g["place"] = grad_query.sum(axis=0), grad_place.sum(axis=0)
    product(g, "value", d.patches, (grad_value * (d.value > 0)).reshape(len(d.patches), -1))
    return {name: g[name] for name in p}


def check_gradients(p: Parameters, photo: np.ndarray, rng: np.random.Generator) -> None:
    """Compare gradients, as slopes of the loss along them, with central differences in float64.

    Noise is added to the parameters: at first many are 0, and with them many gradients.
    """
    here = {name: a + 0.05 * rng.standard_normal(a.shape) for name, a in p.items()}
    seen, step = views(photo, 2, rng), 1e-7  # hardly any sample leaves its cell
    g = gradients(here, decode(here, seen.pictures), seen.parts)
    for kind in ("value.w", "query", "0.points.w", "1.weights.w", f"{LAYERS - 1}.in.w"):
        way = g[kind] / np.linalg.norm(g[kind])
        sides = [loss(decode({**here, kind: here[kind] + s * way}, seen.pictures), seen.parts) for s in (step, -step)]
        slope, steepest = (sides[0] - sides[1]) / (2 * step), float((g[kind] * way).sum())
        check(f"d loss / d {kind} {steepest:.5f}, by differences", abs(slope - steepest), 1e-4 * steepest)


def train(p: Parameters, photo: np.ndarray, steps: int, rng: np.random.Generator) -> Parameters:
    """Adam; every step has views of its own."""
    mean, square = ({name: np.zeros_like(a) for name, a in p.items()} for _ in range(2))
    shown, start = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        seen = views(photo, BATCH, rng)
        d = decode(p, seen.pictures)
        g = gradients(p, d, seen.parts)
        rate = RATE * min(1, step / 20) * (1 + np.cos(np.pi * step / steps)) / 2
        for name, a in p.items():
            mean[name] = 0.9 * mean[name] + 0.1 * g[name]
            square[name] = 0.99 * square[name] + 0.01 * g[name] ** 2
            size = np.sqrt(square[name] / (1 - 0.99**step)) + 1e-8
            p = {**p, name: a - (rate / (1 - 0.9**step) * mean[name] / size).astype(a.dtype)}
        shown += loss(d, seen.parts)
        if step % (steps // 8) == 0:
            pace = (time.perf_counter() - start) / step
            say(f"   step {step:4d} of {steps}   loss {shown / (steps // 8):.4f}   {1e3 * pace:.0f} ms a step")
            shown = 0.0
    return p


class Result(NamedTuple):
    """How well queries do in views not trained on; distances in pixels of a view."""

    loss: float
    queries: list[float]  # from the parts, after each layer
    points: np.ndarray  # of the last layer, by weight, on each level


def pixels(off: np.ndarray) -> np.ndarray:
    """Lengths of what `errors` returns."""
    return np.linalg.norm(off, axis=-1) * VIEW[0]


def judge(p: Parameters, seen: Views, what: str) -> Result:
    """Measure, and print."""
    d = decode(p, seen.pictures)
    last = d.layers[-1]
    far = pixels(errors(last.locations, seen.parts[:, :, None, None, None]))
    points = (far * last.weights).sum(axis=(0, 1, 2, 4)) / last.weights.sum(axis=(0, 1, 2, 4))
    queries = [float(pixels(errors(layer.place, seen.parts)).mean()) for layer in d.layers]
    say(f"   {what}: loss {loss(d, seen.parts):.4f}")
    say(f"      queries, pixels from their parts after each layer   {'  '.join(f'{q:5.1f}' for q in queries)}")
    say(f"      their last points, by weight, on each level         {'  '.join(f'{q:5.1f}' for q in points)}")
    for name, layer in (("first", d.layers[0]), ("last", last)):
        share = layer.weights.sum(axis=4).mean(axis=(0, 1, 2))
        say(f"      {f'weight of each level, {name} layer':<52}{'  '.join(f'{w:5.2f}' for w in share)}")
    return Result(loss(d, seen.parts), queries, points)


def draw_way(ax: Axes, d: Decoded, start: np.ndarray, parts: np.ndarray, layers: int) -> None:
    """The parts as rings, and the ways of the queries from where they start, through some layers."""
    frame = np.array(VIEW[::-1])
    ways = np.stack([start, *(layer.place[0] for layer in d.layers[:layers])]) * frame - 0.5
    edge = [withStroke(linewidth=3.2, foreground="black")]
    for q, colour in enumerate(COLOURS):
        ax.plot(*(parts[q] * frame - 0.5), "o", ms=15, mfc="none", mec=colour, mew=1.8, path_effects=edge)
        ax.plot(*ways[:, q].T, "-", color=colour, lw=1.8, path_effects=edge)
        ax.plot(*ways[:1, q].T, "s", color=colour, ms=5, mec="black", mew=0.8)
        ax.plot(*ways[-1:, q].T, "o", color=colour, ms=7, mec="black", mew=0.8)


def draw_points(ax: Axes, layer: Layer, level: int) -> None:
    """Where the queries' points are on a level; their areas are the attention weights."""
    for q, colour in enumerate(COLOURS):
        at = layer.locations[0, q, :, level].reshape(-1, 2) * SIZES[level] - 0.5
        area = 260 * layer.weights[0, q, :, level].ravel()
        ax.scatter(at[:, 0], at[:, 1], s=area, color=colour, edgecolors="black", linewidths=0.6)


def draw(before: Parameters, after: Parameters, seen: Views, path: Path) -> None:
    """A view on the left, its levels beside it: before training, and after it, the first and the last layer."""
    whole = pyramid(seen.pictures)
    levels = [x.reshape(h, PATCH, w, PATCH, 3).mean((1, 3)) for x, (h, w) in zip(whole, LEVELS, strict=True)]
    rows = [
        ("before training", before, LAYERS),
        ("after: first layer", after, 1),
        ("after: last layer", after, LAYERS),
    ]
    fig = Figure(figsize=(13, 7.1), dpi=100, layout="constrained")
    for row, (axes, (name, p, layers)) in enumerate(zip(fig.subplots(3, 4), rows, strict=True)):
        d = decode(p, seen.pictures)
        for ax, picture in zip(axes, [whole[0][0], *levels], strict=True):
            ax.imshow(picture.clip(0, 1))
            ax.autoscale(False)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        draw_way(axes[0], d, p["place"], seen.parts[0], layers)
        axes[0].set_ylabel(name, fontsize=14)
        for level, ax in enumerate(axes[1:]):
            draw_points(ax, d.layers[layers - 1], level)
        if row == 0:
            axes[0].set_title("parts (rings) and queries", fontsize=13)
            for ax, (h, w) in zip(axes[1:], LEVELS, strict=True):
                ax.set_title(f"points on the level of {h} x {w}", fontsize=13)
    fig.savefig(full := io.BytesIO())
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(full).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)
    say(f"wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    """Check the gradients, train, compare, draw."""
    parser = argparse.ArgumentParser(description="Deformable attention: queries that learn to find parts.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training, at least 8 (default: {STEPS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} steps, and wider limits for what is learned")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for attend.png (default: docs)")
    args = parser.parse_args()
    steps = QUICK if args.quick else max(args.steps, 8)
    start = time.perf_counter()
    say(f"numdcn {numdcn.__version__}, threads: {numdcn.get_num_threads()}")
    photo, rng = photograph(), np.random.default_rng(0)
    unseen = views(photo, 64, np.random.default_rng(1))
    untrained = fresh(rng)
    say("1. gradients through the decoder")
    check_gradients(untrained, photo, np.random.default_rng(2))
    say(f"2. training: {steps} steps of {BATCH} new views; parts: {', '.join(PARTS)}")
    before = judge(untrained, unseen, "before training")
    trained = train(untrained, photo, steps, rng)
    say(f"3. {len(unseen.parts)} views not trained on, of {VIEW[1]} x {VIEW[0]} pixels")
    after = judge(trained, unseen, "after training")
    stay = pixels(errors(views(photo, 512, rng).parts.mean(axis=0), unseen.parts))
    say(f"      {'always guessing the mean places of the parts':<52}{stay.mean():5.1f}")
    allowed = (0.6, 0.6, 0.8) if args.quick else (0.2, 0.1, 0.5)
    check("loss, after / before", after.loss / before.loss, allowed[0])
    check("queries / mean places", after.queries[-1] / float(stay.mean()), allowed[1])
    check("points on the finest level, after / before", float(after.points[0] / before.points[0]), allowed[2])
    shown = np.argsort(stay.mean(axis=1))[-len(stay) // 4]  # less usual than three quarters of them
    draw(untrained, trained, Views(*(a[shown : shown + 1] for a in unseen)), args.out / "attend.png")
    say(f"all checks passed, {time.perf_counter() - start:.1f} s in total")


if __name__ == "__main__":
    main()
