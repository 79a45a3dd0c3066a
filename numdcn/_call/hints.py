"""The way out of an error, where there is one: the clause that ends its message.

All of this runs after an error was found. Each function returns "" where it knows of nothing better.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._call.device_array import DeviceArray, Framework

# Arrays: kinds, dtypes, axes, places.


def cast(name: str, value: Any, dtype: Any) -> str:
    """How an array, or prepared weights, get another dtype."""
    if getattr(value.dtype, "kind", "f") not in "biufO":  # complex numbers, dates, text, records
        return ""
    kind, array = np.dtype(dtype).name if isinstance(dtype, type) else dtype.name, getattr(value, "array", value)
    how = f"{name}.astype(np.{kind})"
    if isinstance(array, DeviceArray):
        named = {"torch": f"{name}.to(torch.{kind})", "cupy": f"{name}.astype(cupy.{kind})"}
        how = named.get(array.framework.name, "")
    if how and array is not value:
        how = f"prepare_weights({how})"
    return how and f"; use {how}"


def to_array(name: str, value: Any, dtype: str = "float32") -> str:
    """How what is no plain array becomes one."""
    if isinstance(value, np.ma.MaskedArray):
        return f"; use {name}.filled(0)"
    listed = isinstance(value, (list, tuple))
    if listed and name == "rois":
        return _boxes_of_a_list(value)
    if isinstance(value, np.generic) or type(value).__module__.partition(".")[0] == "torch":
        return ""
    converts = any(hasattr(type(value), protocol) for protocol in ("__array__", "__array_interface__"))
    return f"; use np.asarray({name}, np.{dtype})" if listed or converts else ""


def _boxes_of_a_list(value: Any) -> str:
    """How a list of boxes becomes one array: a list of rows, or of (L, 4) for each image, as torchvision takes it."""
    if not len(value):
        return "; for no boxes use np.zeros((0, 5), np.float32)"
    if any(len(shape) == 2 and shape[1] == 4 for shape in map(_shape, value)):
        on_torch = bool(getattr(value[0], "is_cuda", False))
        join = "torch.cat" if on_torch else "np.concatenate"
        return f"; use {join}([{_with_index('b', on_torch)} for n, b in enumerate(rois)])"
    return "; use np.asarray(rois, np.float32)"


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of an array, or of what a list of lists would be as one, going by the first of each."""
    if isinstance(value, (list, tuple)):
        return (len(value), *(_shape(value[0]) if value else ()))
    shape = getattr(value, "shape", ())
    return tuple(shape) if isinstance(shape, (list, tuple)) else ()


def _with_index(boxes: str, on_torch: bool) -> str:
    """How boxes (L, 4) get n, the index of their image, in front."""
    if on_torch:
        return f"torch.nn.functional.pad({boxes}, (1, 0), value=n)"
    return f"np.insert({boxes}, 0, n, axis=1)"


def batch_index(rois: Any) -> str:
    """How boxes without a batch index get one."""
    framework = rois.framework.name if isinstance(rois, DeviceArray) else "numpy"
    if rois.shape[1] != 4 or framework not in ("numpy", "torch"):
        return ""
    return f"; use {_with_index('rois', framework == 'torch')} for boxes of image n"


def axes(name: str, value: Any, ndim: int, layout: str) -> str:
    """How an array gets the axes that it lacks in front."""
    missing, framework = ndim - value.ndim, value.framework.name if isinstance(value, DeviceArray) else "numpy"
    if framework == "numba":  # whose arrays take no None
        return ""
    if name == "rois" and missing == 1 and value.shape == (5,):
        return "; use rois[None]"
    if not layout.startswith("(N, C, H, W") or missing not in (1, 2):
        return f"; use {name}[None]" if layout.startswith("(N,") and missing == 1 else ""
    if missing == 1 and value.shape[-1] in (3, 4) and value.shape[0] > 4:
        turned = "permute" if framework == "torch" else "transpose"
        return f"; use {name}.{turned}(2, 0, 1)[None] for an image (H, W, C)"
    return f"; use {name}[{', '.join(['None'] * missing)}]"


def to_gpu(name: str, value: Any, framework: Framework) -> str:
    """How a NumPy array, or weights prepared of one, get to where the others are."""
    if name.startswith("out"):  # a copy would be filled
        return ""
    how = {"torch": f"torch.from_numpy({name}).cuda()", "cupy": f"cupy.asarray({name})"}
    return _moved(value, how.get(framework.name, f"numba.cuda.to_device({name})"))


def to_memory(name: str, value: Any, framework: Framework) -> str:
    """How an array on a GPU, or weights prepared of one, get to where NumPy's are."""
    if name.startswith("out"):
        return ""
    how = {"torch": f"{name}.cpu().numpy()", "cupy": f"cupy.asnumpy({name})"}
    return _moved(value, how.get(framework.name, f"{name}.copy_to_host()"))


def _moved(value: Any, how: str) -> str:
    return f"; use prepare_weights({how})" if hasattr(value, "layouts") else f"; use {how}"


# Convolutions: padding, and the order of the arguments.


def other_padding(value: Any) -> str:
    """What is written elsewhere as four numbers, or as a word."""
    if isinstance(value, tuple) and len(value) == 4 and all(isinstance(item, (int, np.integer)) for item in value):
        a, b, c, d = map(int, value)
        return (
            f"; if these are top, left, bottom, right (ONNX), use (({a}, {c}), ({b}, {d})); if left, right, top, bottom (torch's "
            f"pad), (({c}, {d}), ({a}, {b}))"
        )
    if isinstance(value, str):
        words = {"same": "; dilation*(kernel size - 1)//2 keeps the size at stride 1", "valid": "; use 0"}
        return words.get(value, "")
    return numbers("padding", value)


def numbers(name: str, value: Any) -> str:
    """How an array of ints becomes a list of them."""
    fits = isinstance(value, np.ndarray) and value.shape in ((2,), (2, 2)[: 2 if name == "padding" else 1])
    return f"; use {name}.tolist()" if fits else ""


def fitting_padding(p: Any, array: Any, channels: int) -> str:
    """The padding with which an array (N, channels, Ho, Wo) would fit a `Convolution`, if its height and width alone do not."""
    shape = getattr(array, "shape", ())
    if len(shape) != 4 or shape[:2] != (p.batch, channels) or shape[2:] == p.out_size:
        return ""
    pairs = []
    for i, wanted in enumerate(shape[2:]):
        least = (wanted - 1) * p.stride[i] + p.dilation[i] * (p.kernel[i] - 1) + 1 - p.in_size[i]
        most = least + p.stride[i] - 1  # all of them give this size
        if wanted < 1 or most < 0:
            return ""
        total = max(least, 0)
        total += total % 2 and total < most  # even, if one is
        pairs.append((total // 2, total - total // 2))
    return f"; padding={_shortest(pairs)} would fit with this stride and dilation"


def _shortest(pairs: list[tuple[int, int]]) -> Any:
    """A padding as one would write it: an int, one for each axis, or a pair for each axis."""
    if any(before != after for before, after in pairs):
        return tuple(pairs)
    each = tuple(before for before, _ in pairs)
    return each[0] if len(set(each)) == 1 else each


def order(x: Any, offsets: Any, w: Any, bias: Any) -> str:
    """The order of a deformable convolution's arrays, where they come in that of another library."""
    if _fit(x, offsets, w):
        return ""
    if _fit(x, w, offsets):
        return "; `offsets` and `w` look swapped: the order is x, offsets, w, bias"
    if _fit(x, offsets, bias):
        return (
            "; `w` looks like a mask and `bias` like weights: the order is x, offsets, w, bias, with mask= by keyword"
        )
    return ""


def _fit(x: Any, offsets: Any, w: Any) -> bool:
    """Whether these can be the arrays of one deformable convolution, heights and widths aside."""
    shapes = _shape(x), _shape(offsets), _shape(w)
    if any(len(shape) != 4 for shape in shapes):
        return False
    (n, c, *_), (images, moved, *_), (c_out, per_group, *kernel) = shapes
    pairs = 2 * kernel[0] * kernel[1]
    if 0 in (c, c_out, per_group, pairs) or c % per_group or c_out % (c // per_group) or images != n:
        return False
    groups, rest = divmod(moved, pairs)
    return groups > 0 and not rest and not c % groups
