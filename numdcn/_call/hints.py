"""The way out of an error, where there is one: the clause that ends its message.

All of this runs after an error was found. Each function returns "" where it knows of nothing better.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from numdcn._call.device_array import DeviceArray, Framework

# Arrays: kinds, dtypes, axes, places.


def cast(name: str, value: Any, dtype: Any) -> str:
    """How an array, or prepared weights, get another dtype."""
    if getattr(value.dtype, "kind", "f") not in "biufO":  # complex numbers, dates, text, records
        return ""
    kind, array = np.dtype(dtype).name if isinstance(dtype, type) else dtype.name, getattr(value, "array", value)
    how = f"{name}.astype({'ml_dtypes' if kind == 'bfloat16' else 'np'}.{kind})"
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
    if name in ("bias", "offset_b") and (number := _no_bias(value)):
        return number
    if isinstance(value, np.generic) or type(value).__module__.partition(".")[0] == "torch":
        return ""
    converts = any(hasattr(type(value), protocol) for protocol in ("__array__", "__array_interface__"))
    return f"; use np.asarray({name}, np.{dtype})" if listed or converts else ""


def _no_bias(value: Any) -> str:
    """What a bool or whole numbers in the place of a bias are about."""
    if isinstance(value, (bool, np.bool_)):
        return "" if value else "; use None"
    items = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    ints = all(isinstance(item, (int, np.integer)) for item in items)
    return "; stride, padding and dilation are given by keyword" if ints else ""


def _boxes_of_a_list(value: Any) -> str:
    """How a list of boxes becomes one array: a list of rows, or of (L, 4) for each image, as torchvision takes it."""
    shapes = [_shape(item) for item in value]
    if all(shape == (0,) for shape in shapes):
        return "; for no boxes use np.zeros((0, 5), np.float32)"
    if any(len(shape) == 2 and shape[1] == 4 for shape in shapes):
        on_torch = hasattr(value[0], "is_cuda")
        join, end = ("torch.cat", "") if on_torch else ("np.concatenate", ".astype(x.dtype)")
        each = _with_index("b" if on_torch else "np.reshape(b, (-1, 4))", on_torch)
        return f"; use {join}([{each} for n, b in enumerate(rois)]){end}"
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
    if missing == 1 and layout.startswith(("(N, H, W,", "(N, S, M,")):
        row = "pixels in one row (N, H*W, C)" if layout.startswith("(N, H") else "heads in one row (N, S, M*D)"
        return f"; use {name}[None] for one image, {name}.reshape{layout.replace('groups*D', 'C')} for {row}"
    if not layout.startswith("(N, C, H, W") or missing not in (1, 2):
        return f"; use {name}[None]" if layout.startswith("(N,") and missing == 1 else ""
    if missing == 2:
        return f"; use {name}[None, None]"
    if value.shape[-1] in (1, 3, 4) and value.shape[0] > 4:
        return f"; use {name}.{_turn(value)}(2, 0, 1)[None] for an image (H, W, C)"
    return f"; use {name}[None] for an image (C, H, W), {name}[:, None] for a batch (N, H, W)"


def _turn(value: Any) -> str:
    """The method that reorders an array's axes."""
    return "permute" if isinstance(value, DeviceArray) and value.framework.name == "torch" else "transpose"


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
    return would_fit(padding_for(p, shape[2:]))


def would_fit(padding: Any) -> str:
    """Which padding would fit; None if none does."""
    return "" if padding is None else f"; padding={padding} would fit with this stride and dilation"


def padding_for(p: Any, size: Any) -> Any:
    """The padding that makes the result of a `Convolution` or `Window` this high and wide; None if none does."""
    totals = []
    for i, wanted in enumerate(size):
        least = (wanted - 1) * p.stride[i] + p.dilation[i] * (p.kernel[i] - 1) + 1 - p.in_size[i]
        most = least + p.stride[i] - 1  # all of them give this size
        if wanted < 1 or most < 0:
            return None
        totals.append((max(least, 0), most))
    equal = max((least + 1) // 2 for least, _ in totals)
    if all(2 * equal <= most for _, most in totals):
        return equal
    even = [least + (least % 2 and least < most) for least, most in totals]  # if one is
    return _shortest([(total // 2, total - total // 2) for total in even])


def channels_last(p: Any, x: Any, offsets: Any, w: Any) -> str:
    """How x gets its channels in front, where its height and width then fit the offsets, with one padding for both axes
    or with the padding given."""
    n, *size, c = x.shape
    wanted = tuple(offsets.shape[2:])
    if wanted == p.out_size or isinstance(padding_for(p, wanted), int):
        return ""
    if not _fit_shapes((n, c, *size), offsets.shape, w.shape):
        return ""
    padded = ((size[i] + 2 * p.before[i] - p.dilation[i] * (p.kernel[i] - 1) - 1) // p.stride[i] + 1 for i in range(2))
    if tuple(padded) != wanted and not isinstance(padding_for(p._replace(in_size=tuple(size)), wanted), int):
        return ""
    return turned(x)


def turned(x: Any, axes: tuple[int, ...] = (0, 3, 1, 2), given: str = "channels-last", name: str = "x") -> str:
    """How an array gets its axes in another order; as it is given, x gets its channels in front."""
    if isinstance(x, DeviceArray) and x.framework.name == "numba":
        return ""
    return f"; use {name}.{_turn(x)}{axes} if {name} is {given}"


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
    return _fit_shapes(_shape(x), _shape(offsets), _shape(w))


def _fit_shapes(x: Any, offsets: Any, w: Any) -> bool:
    """Whether shapes can be those of one deformable convolution, heights and widths aside."""
    if len(offsets) != 4 or not _fit_weights(x, w):
        return False
    groups, rest = divmod(offsets[1], 2 * w[2] * w[3])
    return x[0] == offsets[0] and groups > 0 and not rest and not x[1] % groups


def _fit_weights(x: Any, w: Any) -> bool:
    """Whether shapes can be those of x and w of one convolution, heights and widths aside."""
    if len(x) != 4 or len(w) != 4 or 0 in (x[1], *w):
        return False
    return not x[1] % w[1] and not w[0] % (x[1] // w[1])


def gradient_first(names: tuple[str, ...], args: tuple[Any, ...]) -> str:
    """The order of a backward's arrays, where they come without grad_y, or with grad_y behind them."""
    if "spatial_shapes" in names:
        late = names[:1] == ("grad_y",) and len(args) > 1 and len(_shape(args[0])) == 4 and len(_shape(args[1])) == 2
        return f"; grad_y comes first: {', '.join(names)}" if late else ""
    count = 3 if names[1:4] == ("x", "offsets", "w") else 2 if names[1:3] == ("x", "w") else 0
    if names[:1] != ("grad_y",) or not count or len(args) < count:
        return ""
    given = [_shape(value) for value in args]
    if _in_order(given[1 : count + 1], count) or not _in_order(given[:count], count):
        return ""
    return f"; grad_y comes first: {', '.join(names)}"


def _in_order(shapes: list[Any], count: int) -> bool:
    """Whether these are the shapes of x, offsets if there are three, and w, with a kernel smaller than x."""
    if len(shapes) < count or not (_fit_shapes(*shapes) if count == 3 else _fit_weights(*shapes)):
        return False
    return all(kernel < size for kernel, size in zip(shapes[-1][2:], shapes[0][2:], strict=True))


# Names: what others call things.

OFFSET_GROUPS = ("offset_groups", "offset_group", "deformable_groups", "deform_groups", "deformable_group")
ELSEWHERE = {  # the names of arguments in this package, and what they are called in others
    "x": ("input", "inputs", "image", "images", "features"),
    "w": ("weight", "weights", "kernel", "filters"),
    "offsets": ("offset",),
    "trans": ("offset", "offsets"),
    "rois": ("boxes", "bboxes"),
    "points": ("grid", "coordinates"),
    "grad_y": ("grad_output", "grad_out", "grad"),
    "padding": ("pads", "pad"),
    "output_size": ("out_size", "pooled_size", "pool_size", "crop_size"),
    "spatial_scale": ("scale", "roi_scale"),
    "sampling_ratio": ("sample_num",),
    "sample_per_part": ("sampling_ratio", "samples_per_part"),
    "offset_groups": OFFSET_GROUPS,
    "value": ("values", "input_flatten"),
    "spatial_shapes": ("value_spatial_shapes_list", "value_spatial_shapes", "input_spatial_shapes", "value_shapes"),
    "sampling_locations": ("sampling_loc",),
    "attention_weights": ("attn_weight", "attn_weights"),
    "points_per_level": ("num_points_list", "num_points"),
    "offset_mask": ("offset", "offsets_mask"),
    "groups": ("group",),
    "return_argmax": ("return_indices",),
}
FUNCTIONS = {  # what is called otherwise in torchvision, MMCV, torch
    "deform_conv2d": "numdcn.deform_conv_forward",
    "modulated_deform_conv2d": "numdcn.deform_conv_forward with mask=",
    "DeformConv2d": "numdcn.deform_conv_layer_forward, or numdcn.deform_conv_forward for given offsets",
    "grid_sample": "numdcn.bilinear_sample_forward",
    "multi_scale_deformable_attn_pytorch": "numdcn.ms_deform_attn_forward",
    "MSDeformAttnFunction": "numdcn.ms_deform_attn_forward",
    "MultiScaleDeformableAttnFunction": "numdcn.ms_deform_attn_forward",
    "DCNv3Function": "numdcn.dcnv3_forward",
    "DCNv4Function": "numdcn.dcnv4_forward",
    "ops": "the functions of numdcn itself, such as numdcn.deform_conv_forward",
}


def named_here(given: str, names: tuple[str, ...]) -> str:
    """Which of these names goes by another elsewhere; "" if none does."""
    return next((name for name, others in ELSEWHERE.items() if name in names and given in others), "")


def no_attribute(name: str) -> NoReturn:
    """Raise what `numdcn` says of a name that it lacks."""
    known = f"; expected {FUNCTIONS[name]}" if name in FUNCTIONS else ""
    raise AttributeError(f"module 'numdcn' has no attribute {name!r}{known}", name=name)
