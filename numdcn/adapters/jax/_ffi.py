"""A handler of XLA's typed FFI, in Python: `ctypes` reads XLA's structures, NumPy looks at its buffers.

The structures are those of version 0.1 of the interface, which later versions extend at the ends. XLA puts three of them
into a fourth by value, so their sizes are compared at every call: another layout is an error, never a wrong read.

Signals. Python may run a signal handler, which may raise KeyboardInterrupt, when `_serve` begins and before its `try`.
ctypes then prints the exception and leaves the result undefined: XLA would take it for the address of an error. So XLA
does not call Python but a few compiled instructions, which call Python until it has given an answer, and deliver the
interrupt again when XLA has the error.
"""

from __future__ import annotations

import atexit
import ctypes as c
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np

NAME = "numdcn"  # of the target, in XLA's programs
Run = Callable[[str, Sequence[np.ndarray], Sequence[np.ndarray]], None]

_UNANSWERED, _FINE = 1, 0  # answers; any other is the address of an error
_STRUCT: list[Any] = [("size", c.c_size_t), ("extension", c.c_void_p)]  # how most structures begin
_METADATA, _EXECUTE, _STRING = 1, 3, 4  # an extension, a stage, a kind of attribute
_INVALID_ARGUMENT, _INTERNAL = 3, 13  # codes of errors


class _Version(c.Structure):
    _fields_ = [*_STRUCT, ("major", c.c_int), ("minor", c.c_int)]


class _Metadata(c.Structure):
    _fields_ = [("size", c.c_size_t), ("version", _Version), ("traits", c.c_uint32)]


class _Extension(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("kind", c.c_int),
        ("next", c.c_void_p),
        ("metadata", c.POINTER(_Metadata)),  # if that is its kind
    ]


class _Buffer(c.Structure):
    _fields_ = [*_STRUCT, ("dtype", c.c_int), ("address", c.c_void_p), ("rank", c.c_int64), ("dims", c.c_void_p)]


class _Buffers(c.Structure):
    _fields_ = [*_STRUCT, ("count", c.c_int64), ("kinds", c.c_void_p), ("items", c.POINTER(c.POINTER(_Buffer)))]


class _Text(c.Structure):
    _fields_ = [("address", c.c_void_p), ("length", c.c_size_t)]


class _Attributes(c.Structure):
    _fields_ = [
        *_STRUCT,
        ("count", c.c_int64),
        ("kinds", c.POINTER(c.c_int)),
        ("names", c.c_void_p),
        ("values", c.POINTER(c.POINTER(_Text))),  # if their kinds are strings
    ]


class _NewError(c.Structure):
    _fields_ = [*_STRUCT, ("message", c.c_char_p), ("code", c.c_int)]


class _Api(c.Structure):
    _fields_ = [
        *_STRUCT,
        ("version", _Version),
        ("internal", c.c_void_p),
        ("new_error", c.CFUNCTYPE(c.c_size_t, c.POINTER(_NewError))),
    ]


class _Frame(c.Structure):
    _fields_ = [
        ("size", c.c_size_t),
        ("extension", c.POINTER(_Extension)),
        ("api", c.POINTER(_Api)),
        ("context", c.c_void_p),
        ("stage", c.c_int),
        ("inputs", _Buffers),
        ("outputs", _Buffers),
        ("attributes", _Attributes),
    ]


_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 11: np.dtype(np.float32), 12: np.dtype(np.float64)}
_EXACT = (c.sizeof(_Buffers), c.sizeof(_Buffers), c.sizeof(_Attributes))
_memory = functools.lru_cache(1024)(lambda size: c.c_char * size)  # ctypes' type of so many bytes


def _array(buffer: _Buffer) -> np.ndarray:
    """A buffer of XLA as an array, without a copy."""
    dtype, rank = _DTYPES[buffer.dtype], buffer.rank
    shape = tuple((c.c_int64 * rank).from_address(buffer.dims)) if rank else ()
    size = dtype.itemsize
    for length in shape:
        size *= length
    if not size:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _memory(size).from_address(buffer.address))


def _arrays(buffers: _Buffers) -> list[np.ndarray]:
    items = buffers.items
    return [_array(items[i].contents) for i in range(buffers.count)]


def _call(frame: _Frame, run: Run) -> None:
    """Serve one call."""
    attributes = frame.attributes
    if (frame.inputs.size, frame.outputs.size, attributes.size) != _EXACT or frame.size < c.sizeof(_Frame):
        raise RuntimeError("this jaxlib has another FFI; expected one with version 0.1; set NUMDCN_JAX_CALLBACK=1")
    if attributes.count != 1 or attributes.kinds[0] != _STRING:
        raise RuntimeError("expected one attribute, a string")
    text = attributes.values[0].contents
    run(c.string_at(text.address, text.length).decode(), _arrays(frame.inputs), _arrays(frame.outputs))


def _describe(extension: _Extension) -> None:
    """Tell XLA which version of the interface this is. One that XLA does not know makes registering fail."""
    metadata = extension.metadata.contents
    if metadata.version.size >= _Version.minor.offset + _Version.minor.size:
        metadata.version.major, metadata.version.minor = 0, 1


def _error(frame: _Frame, error: BaseException) -> int:
    """The address of a new error of XLA's."""
    text = f"{type(error).__name__}: {error}".encode(errors="replace").replace(b"\0", b"")
    code = _INVALID_ARGUMENT if isinstance(error, (TypeError, ValueError)) else _INTERNAL
    return int(frame.api.contents.new_error(c.byref(_NewError(c.sizeof(_NewError), None, text, code))))


def _server(run: Run) -> Callable[..., None]:
    """The function that serves all calls."""

    def serve(address: int, answer: c.Array[c.c_int64], attempt: int) -> None:
        try:
            frame = _Frame.from_address(address)
            extension = frame.extension
            if attempt:
                raise KeyboardInterrupt  # which came when the first attempt began
            if extension and extension.contents.kind == _METADATA:
                _describe(extension.contents)
            elif frame.stage == _EXECUTE:
                _call(frame, run)
            made = _FINE
        except BaseException as error:
            answer[1] = isinstance(error, KeyboardInterrupt)
            made = _error(frame, error)
        answer[0] = made

    return serve


_HANDLER = """
define i64 @handler(i64 %frame) {{
entry:
  %answer = alloca [2 x i64]
  %interrupted = getelementptr [2 x i64], ptr %answer, i64 0, i64 1
  store i64 {unanswered}, ptr %answer
  store i64 0, ptr %interrupted
  %gate = inttoptr i64 {gate} to ptr
  %inside = getelementptr i64, ptr %gate, i64 1
  %others = atomicrmw add ptr %inside, i64 1 seq_cst
  %closed = load atomic i64, ptr %gate seq_cst, align 8
  %late = icmp ne i64 %closed, 0
  br i1 %late, label %leave, label %ask
ask:
  %attempt = phi i64 [0, %entry], [%next, %ask]
  %next = add i64 %attempt, 1
  call void inttoptr (i64 {serve} to ptr)(i64 %frame, ptr %answer, i64 %attempt)
  %given = load i64, ptr %answer
  %none = icmp eq i64 %given, {unanswered}
  br i1 %none, label %ask, label %answered
answered:
  %flag = load i64, ptr %interrupted
  %again = icmp ne i64 %flag, 0
  br i1 %again, label %interrupt, label %done
interrupt:
  call void inttoptr (i64 {interrupt} to ptr)()
  br label %done
done:
  br label %leave
leave:
  %result = phi i64 [0, %entry], [%given, %done]
  %before = atomicrmw sub ptr %inside, i64 1 seq_cst
  ret i64 %result
}}
"""
_gate = (c.c_int64 * 2)()  # whether Python is about to end, so that calls return at once; how many calls are inside


def _close() -> None:
    """Let no call in, and wait for those inside: a thread that wants the GIL of a Python that ends waits forever, and XLA
    for it."""
    _gate[0] = 1
    while _gate[1]:
        time.sleep(0.001)


def _after_fork() -> None:
    """The child has none of the threads that were inside."""
    _gate[1] = 0


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
_kept: list[object] = []  # what XLA may call at any time


def handler(run: Run) -> int:
    """The address of a handler for XLA that calls `run(text, inputs, outputs)` with the text of a call's only attribute
    and its arrays. What `run` raises becomes an error of XLA."""
    serve = c.CFUNCTYPE(None, c.c_size_t, c.POINTER(c.c_int64), c.c_int64)(_server(run))
    interrupt = c.pythonapi.PyErr_SetInterrupt  # needs no GIL
    code = _HANDLER.format(
        unanswered=_UNANSWERED,
        gate=c.addressof(_gate),
        serve=c.cast(serve, c.c_void_p).value,
        interrupt=c.cast(interrupt, c.c_void_p).value,
    )
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    _kept.extend((serve, engine))
    return int(engine.get_function_address("handler"))
