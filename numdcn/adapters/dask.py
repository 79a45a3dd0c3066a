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
from numdcn._cpu.threads import available_cpus
from numdcn.adapters import _operators
from numdcn.adapters._operators import PER_CALL, REQUIRED, Operator, shaped

OPERATORS = tuple(op for op in _operators.operators() if all(argument.name != "rois" for argument in op.arrays))
GRAD_Y = Argument("grad_y", "(N, C_out, ...), of the shape of y", None)
_CLUSTER_ONLY = PER_CALL | {"deterministic"}  # arguments without a meaning here


def _batched(argument: Argument) -> bool:
    """Whether an array is split along with the batch."""
    return argument.axes.startswith("(N,")


# Arguments: what was given, as Dask arrays with one chunk along all axes but the batch.


def _received(table: Table, given: Mapping[str, Any]) -> list[Any]:
    """The arrays of a call, in order: None where absent, those with a batch axis in the chunks of x."""
    arrays = [_lazy_array(argument, given[argument.name]) for argument in table]
    x = next(array for argument, array in zip(table, arrays) if argument.name == "x")
    return [_in_chunks(argument, array, x) for argument, array in zip(table, arrays)]


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
        return da.from_array(value, chunks=-1)
    wanted = "a Dask array" if _batched(argument) else "a NumPy or Dask array"
    how = f"; use dask.array.from_array({argument.name})" if isinstance(value, np.ndarray) else ""
    raise TypeError(f"`{argument.name}` is {describe(value)}, expected {wanted} of shape {argument.axes}{how}")


def _in_chunks(argument: Argument, array: Any, x: Any) -> Any:
    """An array in one chunk; along the batch in the chunks of x, if it is as long."""
    if array is None or array.ndim == 0:
        return array
    chunks: dict[int, Any] = dict.fromkeys(range(array.ndim), -1)
    if _batched(argument) and array.shape[0] == x.shape[0]:
        chunks[0] = x.chunks[0]
    return array.rechunk(chunks)


def _shapes_only(arrays: Sequence[Any]) -> list[Any]:
    """What the operator's own checks need of arrays."""
    return [None if array is None else shaped(array.shape, array.dtype) for array in arrays]


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
    return total if keepdims else total[0]


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
        parts,
        _same,
        _sum,
        axis=0,
        split_every=2,
        concatenate=False,
        dtype=like.dtype,
        meta=like._meta,
        name=f"{name}-sum",
    )


# The functions.


def _forward(op: Operator, given: Mapping[str, Any]) -> Any:
    options = op.full_options(given)
    arrays = _received(op.arrays, given)
    op.check(_shapes_only(arrays), options)
    x, (shape, *more) = arrays[0], op.shapes(arrays, options)
    how = {"operator": op.name, "options": options}
    if op.results is None:
        batched = [_batched(argument) for argument in op.arrays]
        return _lazy(_run, arrays, batched, shape[1:], x, token=op.name, **how)
    records = _records(_run, arrays, op.arrays, token=op.name, **how)
    names = op.results._fields  # type: ignore[attr-defined]
    return op.results(
        *(
            None if shape is None else _part(records, place, shape, x, f"{op.name}-{name}")
            for place, (name, shape) in enumerate(zip(names, (shape, *more), strict=True))
        )
    )


def _backward(op: Operator, given: Mapping[str, Any]) -> Any:
    options = op.full_options(given)
    table = (GRAD_Y, *op.arrays, *op.residuals)
    arrays = _received(table, given)
    grad_y, *others = _shapes_only(arrays)
    count, names = len(op.arrays), op.differentiable
    op.run_backward(grad_y, others[:count], others[count:], options, [False] * len(names))  # nothing but its checks
    present = {argument.name: array for argument, array in zip(table, arrays) if array is not None}
    wanted = wanted_names(given["wrt"], tuple(name for name in names if name in present), names)
    if not wanted:
        return op.gradients()
    how = {"operator": op.name, "options": options, "wanted": tuple(name in wanted for name in names)}
    records = _records(_run_backward, arrays, table, token=f"{op.name}-backward", **how)
    grads = {}
    for argument in op.arrays:
        if argument.name in wanted:
            join = _part if _batched(argument) else _total
            like, place = present[argument.name], names.index(argument.name)
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
        parameter.replace(annotation=_annotation(op, parameter))
        for parameter in own
        if parameter.name not in _CLUSTER_ONLY
    ]
    signature = inspect.Signature(kept)
    call.__name__ = call.__qualname__ = op.name if make is _forward else f"{op.name}_backward"
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = _documentation(op, plain, kept)
    return call


def _annotation(op: Operator, parameter: inspect.Parameter) -> str:
    """The type of an argument."""
    for argument in (GRAD_Y, *op.arrays, *op.residuals):
        if argument.name == parameter.name:
            kind = "dask.array.Array" if _batched(argument) else "numpy.ndarray | dask.array.Array"
            return kind if parameter.default is REQUIRED else f"{kind} | None"
    return str(parameter.annotation)


def _documentation(op: Operator, plain: Callable[..., Any], kept: Sequence[inspect.Parameter]) -> str:
    """The docstring of a public function."""
    split = [a.name for a in (GRAD_Y, *op.arrays, *op.residuals) if _batched(a)]
    names = [parameter.name for parameter in kept]
    batched, others = ([n for n in names if (n in split) == inside] for inside in (True, False))
    gradients = plain is op.backward
    result = f"A `{op.gradients.__name__}` of Dask arrays." if gradients else "y, a Dask array."
    if not gradients and op.results is not None:
        result = f"A `{op.results.__name__}` of Dask arrays."
    added = " Those of weights are added up in a binary tree of the chunks." if gradients and others else ""
    rest = f"\n        {', '.join(others)}: as there; arrays are NumPy's or Dask's." if others else ""
    return f"""`numdcn.{plain.__name__}` of Dask arrays, for each chunk of the batch; nothing is computed yet.

    Args:
        {", ".join(batched)}: Dask arrays as there, split along the batch as x is; other axes become one chunk.{rest}

    Returns:
        {result}{added}

    Raises:
        TypeError: as there, or an array is not of these kinds.
        ValueError: as there, or a size is unknown.
    """


def set_worker_threads(client: Any, n: int | None = None) -> None:
    """Set the number of threads that each call of numdcn uses on the workers of a cluster, now and when workers join.

    Args:
        client: a `distributed.Client`.
        n: threads of a call; None for an equal share: the CPUs of a worker's machine divided by the threads that all
            workers on it have now, at least 1.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is below 1.
    """
    if n is not None:
        n = integer("n", n, 1)
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
