"""Arrays of other frameworks in host memory: seen as NumPy's without a copy; results are returned in the caller's kind.

No framework is imported here; one is consulted only for its own arrays.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from numdcn._call.arrays import has_interface
from numdcn._call.checks import describe
from numdcn._call.device_array import name_of
from numdcn._call.results import aligned_results

_HOST = 1  # the device type of host memory in DLPack
NUMBERS = ("spatial_shapes", "points_per_level")  # which may be of NumPy beside arrays of another framework


class HostFramework:
    """Arrays of one framework in host memory."""

    name = "array"  # what its arrays are called
    words: tuple[tuple[str, str], ...] = ()  # patterns in advice for NumPy, and what they become here
    maker_name = ""  # the function that makes one of a NumPy array
    module: Any = None  # the framework itself, where it is known

    @property
    def one(self) -> str:
        """What one of its arrays is called, with an article."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def here(self, value: Any) -> bool:
        """Whether an array of this framework is in host memory, or nowhere."""
        raise NotImplementedError

    def seen(self, value: Any, function: Callable[..., Any]) -> np.ndarray:
        """The same memory as a NumPy array, for a call of a function. Raises a TypeError that ends a sentence which
        begins with the argument's name."""
        raise NotImplementedError

    def usual(self, args: Any, keywords: Any) -> tuple[list[Any], dict[str, Any]] | None:
        """The arguments of the most usual calls as NumPy sees them, at the least cost; None for all other calls."""
        return None

    def call(self, function: Callable[..., Any], args: Any, keywords: Any) -> Any:
        """Call a function with NumPy arrays."""
        return function(*args, **keywords)

    def back(self, array: np.ndarray) -> Any:
        """A result in this framework, without a copy."""
        raise NotImplementedError

    def advice(self, text: str) -> str:
        """An error's text with advice in the words of this framework."""
        text = re.sub(r"a NumPy array,? or one on a GPU,?", self.one, text)
        for pattern, replacement in self.words:
            text = re.sub(pattern, replacement, text)
        return text


class Torch(HostFramework):
    """torch.Tensor on the CPU, or on the device "meta"."""

    name, maker_name = "torch.Tensor", "torch.from_numpy"
    words = (
        (r"\.astype\((?:np|ml_dtypes)\.(\w+)\)", r".to(torch.\1)"),
        (r"\.transpose\(", ".permute("),
        (r"np\.insert\(rois, 0, n, axis=1\)", "torch.nn.functional.pad(rois, (1, 0), value=n)"),
        (r"np\.asarray\((\w+), np\.(\w+)\)", r"torch.as_tensor(\1, dtype=torch.\2)"),
        (r"np\.zeros\(\(0, 5\), np\.(\w+)\)", r"torch.zeros((0, 5), dtype=torch.\1)"),
    )

    def __init__(self, torch: Any) -> None:
        self.module, self.forward_mode = torch, torch.autograd.forward_ad
        self.tensor, self.from_numpy = torch.Tensor, torch.from_numpy

    def here(self, value: Any) -> bool:
        return value.is_cpu or value.is_meta

    def seen(self, value: Any, function: Callable[..., Any]) -> np.ndarray:
        level = getattr(self.forward_mode, "_current_level", 0)  # below 0 where no tensor has a tangent
        if level >= 0 and self.forward_mode.unpack_dual(value).tangent is not None:
            raise TypeError(f"has a tangent, which would be lost here{_instead(function, 'tensor.detach()')}")
        if value.requires_grad:
            if self.module.is_grad_enabled():
                raise TypeError(
                    f"requires gradients, which are not recorded here{_instead(function, 'tensor.detach()')}"
                )
            value = value.detach()
        if value.dtype is self.module.bfloat16 and not value.is_meta:
            known = sys.modules.get("ml_dtypes")
            if known is None:
                ways = _instead(function, "tensor.float()", "import ml_dtypes")
                raise TypeError(f"has dtype torch.bfloat16, expected one that NumPy knows, as float16 or float32{ways}")
            return self.seen(value.view(self.module.int16), function).view(known.bfloat16)
        try:
            return value.numpy()
        except (RuntimeError, TypeError, ValueError) as error:  # on no device, fake, wrapped by a transform, sparse
            if value.is_meta:
                reason = "has no numbers"
            elif value.layout is not self.module.strided:
                raise TypeError(
                    f"has the layout {value.layout}, expected a dense tensor; use tensor.to_dense()"
                ) from None
            else:
                reason = f"cannot be seen by NumPy ({str(error).splitlines()[0]})"
            raise TypeError(f"{reason}{_instead(function)}") from None

    def usual(self, args: Any, keywords: Any) -> tuple[list[Any], dict[str, Any]] | None:
        if getattr(self.forward_mode, "_current_level", 0) >= 0 or "out" in keywords:
            return None
        kind, count = self.tensor, len(args)
        try:
            plain = [
                t.numpy() if type(t) is kind and not t.requires_grad else _option(t)
                for t in (*args, *keywords.values())
            ]
        except (LookupError, RuntimeError, TypeError, ValueError):  # explained by `seen`
            return None
        return plain[:count], dict(zip(keywords, plain[count:]))

    def back(self, array: np.ndarray) -> Any:
        if array.itemsize == 2 and name_of(array.dtype) == "bfloat16":
            return self.from_numpy(array.view(np.int16)).view(self.module.bfloat16)
        return self.from_numpy(array)


def _option(value: Any) -> Any:
    """An argument that is no array, as it is. Raises a LookupError for anything else."""
    if type(value) not in _OPTIONS:
        raise LookupError
    return value


def _instead(function: Callable[..., Any], *others: str) -> str:
    """The end of an error: the function for tensors with gradients, of any dtype, traced or not, if there is one; and
    other ways out."""
    operator = operator_of(function)
    adapters = {"conv": "torch.nn.functional.conv2d", "deform_conv": "numdcn.adapters.torch.deform_conv2d"}
    ways = list(others)
    if operator != function.__name__:  # a forward or backward
        ways.insert(0, adapters.get(operator, f"numdcn.adapters.torch.{operator}"))
    return f"; use {', or '.join(ways)}" if ways else ""


class Jax(HostFramework):
    """jax.Array on a CPU."""

    name = "jax.Array"
    words = ((r"np\.insert\(", "jnp.insert("),)

    def __init__(self, jax: Any) -> None:
        self.module, self.tracer = jax, jax.core.Tracer
        self.from_dlpack, self.copy = jax.dlpack.from_dlpack, jax.numpy.array

    def is_traced(self, value: Any) -> bool:
        """Whether this stands for the numbers of a later call."""
        return isinstance(value, self.tracer)

    def reason(self, function: Callable[..., Any]) -> str:
        """Why a traced value cannot be seen, and what to do."""
        return f"is a traced JAX value, which has no numbers yet; use numdcn.adapters.jax.{operator_of(function)}"

    def here(self, value: Any) -> bool:
        if self.is_traced(value):
            return True
        for device in value.devices():  # all of one platform
            return bool(device.platform == "cpu")
        return False

    def seen(self, value: Any, function: Callable[..., Any]) -> np.ndarray:
        if self.is_traced(value):
            raise TypeError(self.reason(function))
        return np.asarray(value)

    def call(self, function: Callable[..., Any], args: Any, keywords: Any) -> Any:
        with aligned_results:  # JAX copies what is not
            return function(*args, **keywords)

    def back(self, array: np.ndarray) -> Any:
        exported = (
            array.flags.forc and name_of(array.dtype) != "bfloat16"
        )  # JAX has no other strides, NumPy no such DLPack
        return (self.from_dlpack if exported else self.copy)(array)


class Dask(HostFramework):
    """dask.array.Array, whose numbers are yet to be computed."""

    name = "dask.array.Array"

    def here(self, value: Any) -> bool:
        return True

    def seen(self, value: Any, function: Callable[..., Any]) -> np.ndarray:
        raise TypeError(self.reason(function))

    def reason(self, function: Callable[..., Any]) -> str:
        """Why it cannot be seen, and what to do."""
        operator = operator_of(function)
        adapter = "" if "roi" in operator else f"numdcn.adapters.dask.{operator}, or "
        return f"is a Dask array, which has no numbers yet; use {adapter}array.compute()"


class DLPack(HostFramework):
    """Arrays of anything else with DLPack. Where their framework has no `from_dlpack`, results are NumPy arrays."""

    def __init__(self, kind: type) -> None:
        self.name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        self.maker: Callable[[Any], Any] | None = None

    def here(self, value: Any) -> bool:
        if self.maker is None:
            self.maker = _from_dlpack(value)
        return int(value.__dlpack_device__()[0]) == _HOST

    def seen(self, value: Any, function: Callable[..., Any]) -> np.ndarray:
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"cannot be seen by NumPy ({error}), expected an array that exports DLPack") from None

    def back(self, array: np.ndarray) -> Any:
        return array if self.maker is None else self.maker(array)

    def advice(self, text: str) -> str:
        """Without advice that holds for NumPy alone."""
        return re.sub(r"; use (?=.*(np\.|\.astype|\.transpose)).*", "", super().advice(text))


def _from_dlpack(value: Any) -> Callable[[Any], Any]:
    """The function that makes arrays of a value's framework from others by DLPack."""
    root = sys.modules.get(type(value).__module__.partition(".")[0])
    places: tuple[Any, ...] = (
        value.__array_namespace__() if hasattr(value, "__array_namespace__") else None,
        root,
        getattr(getattr(root, "utils", None), "dlpack", None),
    )
    return next((place.from_dlpack for place in places if hasattr(place, "from_dlpack")), lambda array: array)


_OPTIONS = frozenset((type(None), int, float, bool, str, tuple, list))  # types of arguments that are no arrays
_by_type: dict[type, HostFramework | None] = dict.fromkeys((np.ndarray, *_OPTIONS))


def host_framework_of(value: Any) -> HostFramework | None:
    """The framework, other than NumPy, of an array in host memory; None for anything else."""
    kind = type(value)
    framework = _by_type[kind] if kind in _by_type else _find(kind)
    return framework if framework is not None and framework.here(value) else None


def _find(kind: type) -> HostFramework | None:
    """The framework of a type of arrays; remembered, but for types that are none."""
    torch, jax, dask = (sys.modules.get(name) for name in ("torch", "jax", "dask.array"))
    found: HostFramework
    if torch is not None and issubclass(kind, torch.Tensor):
        found = _the(Torch, torch)
    elif jax is not None and (issubclass(kind, jax.Array) or issubclass(kind, jax.core.Tracer)):
        found = _the(Jax, jax)
    elif dask is not None and issubclass(kind, dask.Array):
        found = Dask()
    elif hasattr(kind, "__dlpack_device__") and not issubclass(kind, (np.ndarray, np.generic)):
        found = DLPack(kind)
    else:
        return None
    _by_type[kind] = found
    return found


def _the(framework: type, module: Any) -> HostFramework:
    """The one instance for a module."""
    known = (made for made in list(_by_type.values()) if made is not None and made.module is module)
    return next(known, None) or framework(module)


class Loan:
    """The arrays of one call, seen as NumPy's, and the way back for its results."""

    __slots__ = ("framework", "function", "lent")

    def __init__(self, framework: HostFramework, function: Callable[..., Any]) -> None:
        self.framework, self.function = framework, function
        self.lent: dict[int, Any] = {}  # by the id of what NumPy sees, the caller's array, which `out` gives back

    def call(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
        """Call the function with what NumPy sees of the arguments; its results are the caller's kind of array."""
        plain = [self._seen(value, place) for place, value in enumerate(args)]
        named = {key: self._seen(value, key) for key, value in keywords.items()}
        return self.back(self.framework.call(self.function, plain, named))

    def _seen(self, value: Any, place: int | str) -> Any:
        """What NumPy sees of an argument; anything but an array, or a record of arrays, as it is."""
        kind = type(value)
        framework = _by_type[kind] if kind in _by_type else _find(kind)
        if framework is self.framework and framework.here(value):
            try:
                made = framework.seen(value, self.function)
            except TypeError as error:
                raise TypeError(f"`{self._name(place)}` {error}") from None
            self.lent[id(made)] = value
            return made
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # gradients to fill
            parts = [self._seen(part, f"{self._name(place)}.{key}") for key, part in zip(kind._fields, value)]
            return kind(*parts)
        if isinstance(value, np.ndarray) and self._name(place) in NUMBERS:
            return value
        if framework is not None or isinstance(value, np.ndarray) or (kind not in _by_type and has_interface(value)):
            raise TypeError(self._mixture(self._name(place), value, framework))
        return value

    def _mixture(self, name: str, value: Any, framework: HostFramework | None) -> str:
        """The text of an error about an array that is not of the call's framework."""
        where = " in host memory" if framework is self.framework else ""
        use = (
            f"; use {self.framework.maker_name}({name})"
            if type(value) is np.ndarray and self.framework.maker_name
            else ""
        )
        return (
            f"`{name}` is {describe(value)}, but `{self._first()}` is {self.framework.one}{where}; expected one kind for all "
            f"arrays{use}"
        )

    def back(self, result: Any) -> Any:
        """A result, or a record of results, as the caller's kind of array."""
        if type(result) is np.ndarray:
            given = self.lent.get(id(result))
            return self.framework.back(result) if given is None else given
        if isinstance(result, tuple) and hasattr(result, "_fields"):
            return type(result)(*map(self.back, result))
        return result

    def _name(self, place: int | str) -> str:
        """The name of an argument, which may be known by its position."""
        if isinstance(place, str):
            return place
        names = _parameters(self.function)
        return names[place] if place < len(names) else f"argument {place + 1}"

    def _first(self) -> str:
        """The name of the argument whose framework the call has."""
        return _parameters(self.function)[0]


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments."""
    return tuple(inspect.signature(function).parameters)


def operator_of(function: Callable[..., Any]) -> str:
    """The operator of a public function."""
    return str(getattr(function, "__name__", "")).removesuffix("_forward").removesuffix("_backward")


def mixture(function: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> str:
    """The text of an error if the arguments hold arrays of another framework beside the NumPy arrays; else ""."""
    names = _parameters(function)
    given = [pair for pair in (*zip(names, args), *keywords.items()) if pair[0] not in NUMBERS]
    first = next((name for name, value in given if isinstance(value, np.ndarray)), "")
    for name, value in given:
        framework = host_framework_of(value)
        if isinstance(framework, Dask):
            return f"`{name}` {framework.reason(function)}"
        if isinstance(framework, Jax) and framework.is_traced(value):
            return f"`{name}` {framework.reason(function)}"
        if framework is not None and first:
            how = f"; use {name}.numpy()" if isinstance(framework, Torch) else f"; use np.asarray({name})"
            return (
                f"`{name}` is {describe(value)} ({framework.name}), but `{first}` is a NumPy array; expected one kind for all "
                f"arrays{how}"
            )
    return ""
