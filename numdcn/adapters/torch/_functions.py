"""Functions under numdcn's own names and arguments, for the operators that neither torch nor torchvision has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from numdcn._call.door import misfit
from numdcn.adapters.torch._eager import call
from numdcn.adapters.torch._registered import REGISTERED, Registered

ELSEWHERE = {"conv", "deform_conv", "ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool"}  # under other names


def function_of(registered: Registered) -> Callable[..., Tensor]:
    """The function of an operator: the arguments of numdcn's forward, but for how it is computed; returns y."""
    operator = registered.operator
    arrays = [argument.name for argument in operator.arrays]
    known = {*arrays, *(option.name for option in operator.options)}
    whole = inspect.signature(operator.forward)
    parameters = [parameter for key, parameter in whole.parameters.items() if key in known]
    places = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    defaults = {key: parameter.default for key, parameter in whole.parameters.items() if key in known}

    @functools.wraps(operator.forward)
    def function(*args: Any, **keywords: Any) -> Tensor:
        given = {**dict(zip(places, args)), **keywords}
        if len(args) > len(places) or len(given) < len(args) + len(keywords) or not known.issuperset(given):
            raise TypeError(_misfit(function, args, keywords))
        if any(key not in given for key in required):
            raise TypeError(_misfit(function, args, keywords))
        tensors = [given.get(key) for key in arrays]
        if has_torch_function(tensors):
            return handle_torch_function(function, tensors, *args, **keywords)
        full = {option.name: option.full(given.get(option.name, defaults[option.name])) for option in operator.options}
        return call(operator.name, tensors, registered.flat(full))

    function.__name__ = function.__qualname__ = operator.name
    function.__module__ = "numdcn.adapters.torch"
    function.__signature__ = whole.replace(parameters=parameters, return_annotation="Tensor")  # type: ignore[attr-defined]
    function.__doc__ = _doc(operator.forward, known)
    return function


def _misfit(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What is wrong with arguments that do not fit."""
    text = misfit(function, args, keywords)
    if not text:
        try:
            inspect.signature(function).bind(*args, **keywords)
        except TypeError as error:
            text = f"{function.__name__}() {error}"
    return text


def _doc(forward: Callable[..., Any], known: set[str]) -> str:
    """A forward's docstring without the arguments that this function does not have."""
    lines, kept, skipping = (inspect.getdoc(forward) or "").splitlines(), [], False
    for line in lines:
        if line.startswith("    ") and not line.startswith("     ") and ":" in line:
            key = line.split(":")[0].strip()
            skipping = key in inspect.signature(forward).parameters and key not in known
        elif not line.startswith("     "):
            skipping = False
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


FUNCTIONS = {name: function_of(registered) for name, registered in REGISTERED.items() if name not in ELSEWHERE}
