"""Functions under numdcn's own names and arguments, for the operators that neither torch nor torchvision has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from numdcn._call.door import misfit
from numdcn.adapters._operators import Operator
from numdcn.adapters.torch._eager import call
from numdcn.adapters.torch._registered import REGISTERED, Registered

ELSEWHERE = {"conv", "deform_conv", "ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool"}  # under other names


def function_of(registered: Registered) -> Callable[..., Tensor]:
    """The function of an operator: the arguments of numdcn's forward, but for how it is computed; returns y."""
    operator = registered.operator
    known = {*operator.names, *(option.name for option in operator.options)}
    whole = inspect.signature(operator.forward)
    parameters = [_annotated(operator, parameter) for key, parameter in whole.parameters.items() if key in known]
    places = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]

    @functools.wraps(operator.forward)
    def function(*args: Any, **keywords: Any) -> Tensor:
        given = {**dict(zip(places, args)), **keywords}
        if len(args) > len(places) or len(given) < len(args) + len(keywords) or not known.issuperset(given):
            raise TypeError(_misfit(function, args, keywords))
        if any(key not in given for key in required):
            raise TypeError(_misfit(function, args, keywords))
        tensors = [given.get(key) for key in operator.names]
        if has_torch_function(tensors):
            return handle_torch_function(function, tensors, *args, **keywords)
        full = {option.name: option.full(given.get(option.name, option.default)) for option in operator.options}
        return call(operator.name, tensors, registered.flat(full))

    function.__name__ = function.__qualname__ = operator.name
    function.__module__ = "numdcn.adapters.torch"
    function.__signature__ = whole.replace(parameters=parameters, return_annotation="Tensor")  # type: ignore[attr-defined]
    function.__doc__ = _doc(operator, parameters)
    return function


def _annotated(operator: Operator, parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter of numdcn's forward; arrays are tensors here."""
    optional = {argument.name: argument.optional for argument in operator.arrays}.get(parameter.name)
    if optional is None:
        return parameter
    return parameter.replace(annotation="Tensor | None" if optional else "Tensor")


def _misfit(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What is wrong with arguments that do not fit."""
    text = misfit(function, args, keywords)
    if not text:
        try:
            inspect.signature(function).bind(*args, **keywords)
        except TypeError as error:
            text = f"{function.__name__}() {error}"
    return text


def _doc(operator: Operator, parameters: list[inspect.Parameter]) -> str:
    """What a function says of itself, from the tables."""
    forward = f"`numdcn.{operator.name}_forward`"
    summary = (inspect.getdoc(operator.forward) or "").splitlines()[0].rstrip(":.")
    axes = {}
    for argument in operator.arrays:
        shape, _, meaning = argument.axes.partition(": ")
        axes[argument.name] = f"`{shape}`{meaning and ': '}{meaning}{', or None' * argument.optional}."
    lines = [f"    {p.name}: {axes.get(p.name, f'as in {forward}.')}" for p in parameters]
    return "\n".join([
        f"{summary}.", "", "Args:", *lines, "",
        f"Gradients of {', '.join(operator.differentiable)} are recorded. {forward[1:-1]} has the formula.", "",
        "Returns:", "    y, in the dtype of x.", "",
        "Raises:", f"    TypeError: as in {forward}.", f"    ValueError: as in {forward}.",
    ])  # fmt: skip


FUNCTIONS = {name: function_of(registered) for name, registered in REGISTERED.items() if name not in ELSEWHERE}
