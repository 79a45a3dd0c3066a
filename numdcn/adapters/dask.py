"""numdcn on Dask arrays: lazy, one call for each chunk of the batch.

    from numdcn.adapters.dask import deform_conv, deform_conv_backward, set_worker_threads

For every operator whose arrays share the batch axis there are `<op>` and `<op>_backward`, with the arguments and
results of `numdcn.<op>_forward` and `numdcn.<op>_backward`. The operators over boxes are left out: a box names its
image by a number, so the chunk it belongs to is unknown while the graph is built.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

import numdcn
from numdcn._call.arguments import Argument, Table
from numdcn._call.checks import describe, integer, wanted_names
from numdcn._call.door import misfit
from numdcn._cpu.team import MOST_THREADS
from numdcn._cpu.threads import available_cpus
from numdcn.adapters import _operators
from numdcn.adapters._operators import PER_CALL, REQUIRED, Operator, shaped

OPERATORS = tuple(op for op in _operators.operators() if all(argument.name != "rois" for argument in op.arrays))
GRAD_Y = Argument("grad_y", "(N, C_out, ...), of the shape of y", None)
_LEFT_OUT = PER_CALL | {"deterministic"}  # arguments of the plain functions


def _batched(argument: Argument) -> bool:
    """Whether an array is split along with the batch."""
    return argument.axes.startswith("(N,")


# Arguments: what was given, checked, then in one chunk along all axes but the batch.


def _received(table: Table, given: Mapping[str, Any]) -> list[Any]:
    """The arrays of a call as Dask arrays, in order; None where absent."""
    return [_lazy_array(argument, given[argument.name]) for argument in table]


def _lazy_array(argument: Argument, value: Any) -> Any:
    """An argument as a Dask array; None if it is absent."""
    if value is None and argument.optional:
        return None
    if isinstance(value, da.Array):
        if math.isnan(sum(value.shape)):
            raise ValueError(
                f"`{argument.name}` has shape {value.shape}, expected known sizes; use {argument.name}.compute_chunk_sizes()"
            )
        return value
    if isinstance(value, np.ndarray) and not _batched(argument):
        return da.from_array(np.array(value), chunks=-1)  # as it is now: old versions of Dask keep a reference
    wanted, how = "a Dask array" if _batched(argument) else "a NumPy or Dask array", ""
    if isinstance(value, np.ndarray):
        how = (
            f"; use dask.array.from_array({argument.name}, chunks=(1, -1, ...)), or numdcn's function for NumPy arrays"
        )
    elif isinstance(value, numdcn.PreparedWeights):
        how = f"; use {argument.name}.array"
    raise TypeError(f"`{argument.name}` is {describe(value)}, expected {wanted} of shape {argument.axes}{how}")


def _shapes_only(arrays: Sequence[Any]) -> list[Any]:
    """What the operator's own checks need of arrays."""
    return [None if array is None else shaped(array.shape, array.dtype) for array in arrays]


def _in_chunks(table: Table, arrays: Sequence[Any]) -> list[Any]:
    """Arrays in one chunk; those with a batch axis, along that, in the chunks of the images."""
    x = next(array for argument, array in zip(table, arrays) if argument.name in ("x", "value"))
    return [
        array if array is None else array.rechunk((x.chunks[0] if _batched(argument) else -1, *[-1] * (array.ndim - 1)))
        for argument, array in zip(table, arrays)
    ]


# The graph. A task gets one block of each array, within lists that stand for axes of one chunk.


def _block(value: Any) -> Any:
    while isinstance(value, list):
        (value,) = value
    return value


def _run(*blocks: Any, operator: str, options: Mapping[str, Any]) -> Any:
    """The results of a forward; without residuals, y alone."""
    results = _operators.operator(operator).run([_block(block) for block in blocks], options)
    return results if len(results) > 1 else results[0]


def _run_backward(*blocks: Any, operator: str, options: Mapping[str, Any], wanted: tuple[bool, ...]) -> Any:
    """The gradients of a backward."""
    op = _operators.operator(operator)
    grad_y, *arrays = (_block(block) for block in blocks)
    count = len(op.arrays)
    return op.run_backward(grad_y, arrays[:count], arrays[count:], options, wanted)


def _member(record: Any, place: int) -> Any:
    return record[place]


def _share(record: Any, place: int) -> Any:
    """The part of a block in a sum over the batch, with an axis in front for the blocks."""
    return record[place][None]


def _same(part: Any, axis: Any, keepdims: bool) -> Any:
    return part


def _sum(parts: Any, axis: Any, keepdims: bool) -> Any:
    """The sum of one part or two."""
    total = functools.reduce(np.add, parts) if isinstance(parts, list) else parts
    return total if keepdims else total.reshape(total.shape[1:])


def _lazy(
    task: Callable[..., Any], arrays: Sequence[Any], batched: Sequence[bool], tail: Sequence[int], like: Any, **how: Any
) -> Any:
    """A Dask array (batch, *tail) of what a task makes of each chunk of the batch, with the dtype of `like`."""
    axes, pairs = itertools.count(1), []
    for array, split in zip(arrays, batched, strict=True):
        index = None if array is None else [next(axes) for _ in range(array.ndim)]
        if index and split:
            index[0] = 0
        pairs += [array, index]
    new = {next(axes): size for size in tail}
    meta = meta_from_array(getattr(like, "_meta", None), ndim=1 + len(new), dtype=like.dtype)
    return da.blockwise(task, (0, *new), *pairs, new_axes=new, align_arrays=False, meta=meta, **how)


def _records(task: Callable[..., Any], arrays: Sequence[Any], table: Table, **how: Any) -> Any:
    """A Dask array with a tuple of results for each chunk of the batch."""
    tuples = np.empty(0, object)
    return _lazy(task, arrays, [_batched(argument) for argument in table], (), tuples, **how)


def _part(records: Any, place: int, shape: Sequence[int], like: Any, name: str) -> Any:
    """A result of all chunks, joined along the batch."""
    return _lazy(_member, [records], [True], shape[1:], like, place=place, token=name)


def _total(records: Any, place: int, shape: Sequence[int], like: Any, name: str) -> Any:
    """A result of all chunks, added up in a binary tree: neighbours first, then their sums, and so on."""
    ones = {0: (1,) * records.numblocks[0]}
    parts = _lazy(_share, [records], [True], shape, like, place=place, token=name, adjust_chunks=ones)
    return da.reduction(
        parts, _same, _sum, axis=0, split_every=2, concatenate=False, dtype=like.dtype, name=f"{name}-sum"
    )  # fmt: skip


# The functions.


def _forward(op: Operator, given: Mapping[str, Any]) -> Any:
    """The lazy results of a forward."""
    options, arrays = op.full_options(given), _received(op.arrays, given)
    op.check(_shapes_only(arrays), options)
    arrays = _in_chunks(op.arrays, arrays)
    x, (shape, *more), how = arrays[0], op.shapes(arrays, options), {"operator": op.name, "options": options}
    if op.results is None:
        return _lazy(_run, arrays, [_batched(argument) for argument in op.arrays], shape[1:], x, token=op.name, **how)
    records = _records(_run, arrays, op.arrays, token=op.name, **how)
    names = op.results._fields  # type: ignore[attr-defined]
    shapes = enumerate(zip(names, (shape, *more), strict=True))
    return op.results(
        *[shape and _part(records, place, shape, x, f"{op.name}-{name}") for place, (name, shape) in shapes]
    )


def _backward(op: Operator, given: Mapping[str, Any]) -> Any:
    """The lazy gradients of a backward."""
    table, names, count = (GRAD_Y, *op.arrays, *op.residuals), op.differentiable, len(op.arrays)
    options, arrays = op.full_options(given), _received(table, given)
    grad_y, *others = _shapes_only(arrays)
    op.run_backward(grad_y, others[:count], others[count:], options, [False] * len(names))  # nothing but its checks
    present = {argument.name: array for argument, array in zip(table, arrays) if array is not None}
    wanted = wanted_names(given["wrt"], tuple(name for name in names if name in present), names)
    how = {"operator": op.name, "options": options, "wanted": tuple(name in wanted for name in names)}
    records = _records(_run_backward, _in_chunks(table, arrays), table, token=f"{op.name}-backward", **how)
    grads = {}
    for argument in op.arrays:
        if argument.name in wanted:
            join, like = _part if _batched(argument) else _total, present[argument.name]
            place = names.index(argument.name)
            grads[argument.name] = join(records, place, like.shape, like, f"{op.name}-grad-{argument.name}")
    return op.gradients(**grads)


def _function(op: Operator, plain: Callable[..., Any], make: Callable[[Operator, Mapping[str, Any]], Any]) -> Any:
    """A public function, with the signature of the plain one."""

    def call(*args: Any, **keywords: Any) -> Any:
        try:
            bound = signature.bind(*args, **keywords)
        except TypeError as error:
            raise TypeError(misfit(call, args, keywords) or f"{call.__name__}: {error}") from None
        bound.apply_defaults()
        return make(op, bound.arguments)

    own = inspect.signature(plain).parameters.values()
    kept = [
        parameter.replace(annotation=_annotation(op, parameter)) for parameter in own if parameter.name not in _LEFT_OUT
    ]
    signature = inspect.Signature(kept)
    call.__name__ = call.__qualname__ = op.name if make is _forward else f"{op.name}_backward"
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = _documentation(op, plain, tuple(signature.parameters))
    return call


def _annotation(op: Operator, parameter: inspect.Parameter) -> str:
    """The type of an argument."""
    for argument in (GRAD_Y, *op.arrays, *op.residuals):
        if argument.name == parameter.name:
            kind = "dask.array.Array" if _batched(argument) else "numpy.ndarray | dask.array.Array"
            return kind if parameter.default is REQUIRED else f"{kind} | None"
    return str(parameter.annotation)


def _documentation(op: Operator, plain: Callable[..., Any], names: Sequence[str]) -> str:
    """The docstring of a public function with these arguments."""
    split = [argument.name for argument in (GRAD_Y, *op.arrays, *op.residuals) if _batched(argument)]
    weights = [argument.name for argument in op.arrays if not _batched(argument)]
    lines = [f"{', '.join(name for name in names if name in split)}: Dask arrays, split along the batch as x is."]
    if weights:
        lines.append(f"{', '.join(weights)}: NumPy arrays, which each worker receives once, or Dask arrays.")
    options = [name for name in names if name not in (*split, *weights, "wrt")]
    if options:
        lines.append(f"{', '.join(options)}: as in that call.")
    record = op.gradients if plain is op.backward else op.results
    result = "y, a Dask array." if record is None else f"A `{record.__name__}` of Dask arrays."
    if plain is op.backward:
        lines.append("wrt: name or names of the arguments whose gradients to compute; None for all that are given.")
        result += f" Those of {', '.join(weights)} are added up in a binary tree of the chunks." if weights else ""
    arguments = "\n        ".join(lines)
    return f"""`numdcn.{plain.__name__}`, lazily: one call of it for each chunk of the batch.

    Args:
        {arguments}

    Axes other than the batch become one chunk.

    Returns:
        {result}

    Raises:
        TypeError: as that call, at once; or an array is of another kind.
        ValueError: as that call, at once; or a size is unknown.
    """


def set_worker_threads(client: Any, n: int | None = None) -> None:
    """Set the number of threads that each call of numdcn uses on the workers of a cluster, now and when workers join.

    Args:
        client: a `distributed.Client`.
        n: number of threads, from 1 to 1024; None for an equal share: the CPUs of a worker's machine divided by the
            number of threads that all workers on it have now, at least 1.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is out of range.
    """
    if n is not None:
        n = integer("n", n, 1, MOST_THREADS + 1)
    busy: collections.Counter[str] = collections.Counter()
    for worker in client.scheduler_info(n_workers=-1)["workers"].values():
        busy[worker["host"]] += worker["nthreads"]
    client.register_worker_callbacks(functools.partial(_share_cpus, n, dict(busy)))


def _share_cpus(n: int | None, busy: Mapping[str, int], dask_worker: Any) -> None:
    """Set the threads of a call in this worker's process."""
    threads = max(busy.get(dask_worker.ip, 0), dask_worker.state.nthreads)
    numdcn.set_num_threads(n or max(1, available_cpus() // threads))


for _op in OPERATORS:
    globals()[_op.name] = _function(_op, _op.forward, _forward)
    globals()[f"{_op.name}_backward"] = _function(_op, _op.backward, _backward)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
