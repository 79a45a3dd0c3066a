"""The networks of train_digits.py: forward and backward of a layer and of a network, the loss, and Adam.

A network is a tuple of `Layer`; its parameters are a flat dict of arrays, and so are their gradients: "conv2.w",
"conv2.b", "conv2.offset_w", ... Only `create` draws random numbers. Works in float32 and float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import numdcn

Arrays = dict[str, np.ndarray]


class Layer(NamedTuple):
    """A convolution, deformable or not. A ReLU follows all but the last."""

    name: str
    channels: int  # output channels
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    deforms: bool = False


Network = tuple[Layer, ...]


def network(width: float = 1, deeper: bool = False, deforms: bool = False) -> Network:
    """28x28 pixels, 14x14, 7x7, 4x4, ten logits: the last layer's kernel covers its whole input."""
    return (
        Layer("conv1", round(16 * width), stride=2),
        Layer("conv2", round(32 * width), deforms=deforms),
        *[Layer("more", round(32 * width))] * deeper,
        Layer("conv3", round(32 * width), stride=2, deforms=deforms),
        Layer("conv4", round(32 * width), stride=2),
        Layer("linear", 10, kernel=4, padding=0),
    )


NETWORKS = {
    "plain": network(),
    "plain, wider": network(width=1.5),
    "plain, deeper": network(deeper=True),
    "deformable": network(deforms=True),
}
MASK_SCALE = 2  # masks start at 1, so a deformable network initially computes what the plain one does


def create(layers: Network, seed: int, dtype: Any = np.float32) -> Arrays:
    """New parameters: normal weights with variance 2/fan_in, everything else 0, including offsets."""
    rng = np.random.default_rng(seed)
    params: Arrays = {}
    channels = 1
    for layer in layers:
        fan_in = channels * layer.kernel**2
        shape = (layer.channels, channels, layer.kernel, layer.kernel)
        params[f"{layer.name}.w"] = (rng.standard_normal(shape) * (2 / fan_in) ** 0.5).astype(dtype)
        params[f"{layer.name}.b"] = np.zeros(layer.channels, dtype)
        if layer.deforms:
            predicted = 3 * layer.kernel**2  # per tap: the y and x of an offset, and a mask
            params[f"{layer.name}.offset_w"] = np.zeros((predicted, *shape[1:]), dtype)
            params[f"{layer.name}.offset_b"] = np.zeros(predicted, dtype)
        channels = layer.channels
    return params


def _arguments(params: Arrays, layer: Layer) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The arguments after x in a call of numdcn: the layer's arrays, and keywords."""
    kinds = ("w", "offset_w", "offset_b", "b") if layer.deforms else ("w", "b")
    keywords: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding}
    if layer.deforms:
        keywords |= {"modulated": True, "mask_scale": MASK_SCALE}
    return [params[f"{layer.name}.{kind}"] for kind in kinds], keywords


def layer_forward(params: Arrays, layer: Layer, x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """A layer without its ReLU: y, and the offsets and mask that its backward can reuse."""
    arrays, keywords = _arguments(params, layer)
    if not layer.deforms:
        return numdcn.conv_forward(x, *arrays, **keywords), {}
    y, offsets, mask = numdcn.deform_conv_layer_forward(x, *arrays, **keywords)
    return y, {"offsets": offsets, "mask": mask}


def layer_backward(
    params: Arrays, layer: Layer, grad_y: np.ndarray, x: np.ndarray, moved: dict[str, Any], first: bool
) -> tuple[np.ndarray | None, Arrays]:
    """The gradient of x (None for the first layer), and those of the layer's parameters."""
    arrays, keywords = _arguments(params, layer)
    backward: Any = numdcn.deform_conv_layer_backward if layer.deforms else numdcn.conv_backward
    wrt = ["w", "bias"] + ["offset_w", "offset_b"] * layer.deforms + ["x"] * (not first)
    g = backward(grad_y, x, *arrays, wrt=wrt, **moved, **keywords)._asdict()
    own = {"b" if name == "bias" else name: value for name, value in g.items() if value is not None and name != "x"}
    return g["x"], {f"{layer.name}.{name}": value for name, value in own.items()}


def forward(params: Arrays, images: np.ndarray, layers: Network) -> tuple[np.ndarray, list[Any]]:
    """Logits (N, 10) of images (N, 1, 28, 28), and for each layer its input, offsets and mask, for `backward`."""
    x, saved = images, []
    for layer in layers:
        y, moved = layer_forward(params, layer, x)
        saved.append((x, moved))
        x = np.maximum(y, 0, out=y) if layer is not layers[-1] else y
    return x[:, :, 0, 0], saved


def backward(params: Arrays, grad_logits: np.ndarray, saved: list[Any], layers: Network) -> Arrays:
    """Gradients of all parameters, given that of the logits and what `forward` saved."""
    grads: Arrays = {}
    g: Any = grad_logits[:, :, None, None]
    for layer, (x, moved) in zip(reversed(layers), reversed(saved), strict=True):
        g, own = layer_backward(params, layer, g, x, moved, first=layer is layers[0])
        grads |= own
        if g is not None:
            g *= x > 0  # back through the ReLU that produced x
    return grads


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean over a batch of -log(softmax(logits)[label]), and its gradient with respect to the logits."""
    z = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(z)
    total = p.sum(axis=1, keepdims=True)
    of_label = np.arange(len(labels)), labels
    loss = (np.log(total[:, 0]) - z[of_label]).mean()
    p /= total
    p[of_label] -= 1
    return float(loss), p / len(labels)


class Adam:
    """Adam (Kingma and Ba, 2015), with gradient norms clipped to `clip`."""

    def __init__(self, params: Arrays, offset_rate: float = 1.0, clip: float = 5.0) -> None:
        self.offset_rate = offset_rate  # factor on the learning rate of the parameters that predict offsets and masks
        self.clip = clip
        self.steps = 0
        self.mean = {name: np.zeros_like(p) for name, p in params.items()}
        self.square = {name: np.zeros_like(p) for name, p in params.items()}

    def update(self, params: Arrays, grads: Arrays, rate: float) -> None:
        """One step: changes the parameters in place."""
        self.steps += 1
        norm = sum(float(np.square(g).sum()) for g in grads.values()) ** 0.5
        shrink = min(1.0, self.clip / max(norm, 1e-12))
        for name, p in params.items():
            g, mean, square = shrink * grads[name], self.mean[name], self.square[name]
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            own_rate = rate * (self.offset_rate if ".offset_" in name else 1.0) / (1 - 0.9**self.steps)
            p -= own_rate * mean / (np.sqrt(square / (1 - 0.999**self.steps)) + 1e-8)
