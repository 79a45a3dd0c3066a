"""The team of threads that run CPU kernels: handing out a call and waiting for its end, in compiled code.

Everything the threads share is on one board of int64s, changed only by atomic instructions:

- Call records. The first word says how many helpers the call still wants and how many are inside. A helper enters a
  call that wants one, and only then reads what to run. When no task is left, the caller closes the call, so that it
  wants no more helpers. Once nobody is inside, the record is free again. So a call makes progress without any helper,
  and ends only when nobody is using its buffers.
- Helper records. An idle helper sleeps on a Python lock, its bell, which does not need the GIL.

Python delivers signals between two of its own instructions. `run` is a single one, so no handler, and hence no
exception or fork of this thread, can come between its start and its end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numdcn._cpu.jit import block, entry
from numdcn._cpu.simd import load_scalar, pointer, store
from numdcn._formulas.jit import helper, target
from numdcn._formulas.vectors import I32, I64

MOST_THREADS = 1024
_HELPERS, _CALLS = MOST_THREADS - 1, 32  # calls that can be helped at a time; further ones run alone
_LINE = 16  # words from record to record: no two share a pair of cache lines
_CALLS_AT, _HELPERS_AT = _LINE, _LINE * (1 + _CALLS)  # word 0 of the board: how many helpers have started
BOARD_WORDS = _LINE * (1 + _CALLS + _HELPERS)

# The first word of a call's record; 0 if free.
_INSIDE, _WANT_ONE = 0xFFFF, 0x10000  # counts: helpers inside, helpers still wanted
_WANTED = 0xFFFF * _WANT_ONE
_TAKEN, _WAITING = 1 << 32, 1 << 33  # _WAITING: the caller sleeps until the last helper rings

# Its other words. A helper's record has its state first, then its bell.
_CODE, _WIDE, _PARAMETERS, _COUNTER, _FAILED, _CALL_BELL = range(1, 7)
_IDLE, _BUSY = 1, 2  # 0: no such helper yet
_BELL = 1

_SPINS = 500  # polls of a word, some 20 microseconds, before a thread goes to sleep


# Sequentially consistent atomic instructions on int64s.


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


def _read_modify_write(operation: str) -> Any:
    def make(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.atomic_rmw(operation, _word(builder, args[0]), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    make.__doc__ = f"Atomically {operation} `value` to the word at `address`; returns what was there before."
    return intrinsic(make)


_add, _subtract, _and, _or, _exchange = map(_read_modify_write, ("add", "sub", "and", "or", "xchg"))


@intrinsic
def _read(typingctx, address):
    """The word at `address`."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(_word(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _replace(typingctx, address, old, new):
    """Store `new` at `address` if it holds `old`; returns whether it did."""

    def codegen(context, builder, sig, args):
        pair = builder.cmpxchg(_word(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that this thread is spinning on a word."""
    hint = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [ir.Constant(I32, 1)])}

    def codegen(context, builder, sig, args):
        name, values = hint.get({"arm64": "aarch64"}.get(target()[0], target()[0]), ("", []))
        if name:
            function_type = ir.FunctionType(ir.VoidType(), [v.type for v in values])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)
        return context.get_dummy_value()

    return types.void(), codegen


# Python's locks, which do not need the GIL and may be released by a thread other than the one that took them.


def _python_call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


@intrinsic
def _new_lock(typingctx):
    """The address of a new lock; 0 if out of memory."""

    def codegen(context, builder, sig, args):
        return _python_call(builder, "PyThread_allocate_lock", I64)

    return types.int64(), codegen


@intrinsic
def _acquire(typingctx, lock):
    """Take a lock, sleeping while another thread holds it. Signals do not end the sleep."""

    def codegen(context, builder, sig, args):
        _python_call(builder, "PyThread_acquire_lock", I32, args[0], ir.Constant(I32, 1))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _release(typingctx, lock):
    """Release a lock, waking a thread that sleeps on it."""

    def codegen(context, builder, sig, args):
        _python_call(builder, "PyThread_release_lock", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@helper
def _new_bell(address):
    """Ensure there is a bell at `address`: a lock already taken, so that the next thread to take it sleeps until it
    rings."""
    bell = _read(address)
    if bell == 0:
        bell = _new_lock()
        if bell != 0:
            _acquire(bell)
            _exchange(address, bell)
    return bell


# Calls.


@intrinsic
def _call(typingctx, one, code, parameters, counter, slot):
    """Run the kernel whose machine code is at `code`; returns 0 on success."""
    arguments = (one, types.int64, types.int64, types.int64)

    def codegen(context, builder, sig, args):
        convention = context.call_conv
        function = builder.inttoptr(args[1], convention.get_function_type(types.none, arguments).as_pointer())
        status, _ = convention.call_function(builder, function, types.none, arguments, (args[0], *args[2:]))
        return builder.zext(status.is_error, I64)

    return types.int64(one, *[types.int64] * 4), codegen


@block
def _run_kernel(code, wide, parameters, counter, slot):
    """Run a kernel on float64 elements if `wide`, else on float32; returns 0 on success."""
    if wide:
        return _call(np.float64(1), code, parameters, counter, slot)
    return _call(np.float32(1), code, parameters, counter, slot)


@helper
def _field(record, number):
    return load_scalar(pointer(record, np.int64(0)), number)


@block
def _wake(board, count):
    """Wake up to two idle helpers of the `count` wanted; these wake others."""
    count = min(count, 2)
    number, came = 0, min(_read(board), _HELPERS)
    while count > 0 and number < came:
        here = board + 8 * (_HELPERS_AT + _LINE * number)
        if _read(here) == _IDLE and _replace(here, _IDLE, _BUSY):
            _release(_field(here, _BELL))
            count -= 1
        number += 1


@block
def _who_wants(board):
    """The record of a call that wants a helper; 0 if none does."""
    for number in range(_CALLS):
        record = board + 8 * (_CALLS_AT + _LINE * number)
        if _read(record) & _WANTED:
            return record
    return 0


@helper
def _help(board, record):
    """Work on a call, unless it has stopped wanting help."""
    word = _read(record)
    while word & _WANTED:
        if _replace(record, word, word - _WANT_ONE + 1):
            slot = (word & _WANTED) // _WANT_ONE
            _wake(board, slot - 1)
            failed = _run_kernel(
                _field(record, _CODE),
                _field(record, _WIDE),
                _field(record, _PARAMETERS),
                _field(record, _COUNTER),
                slot,
            )
            if failed != 0:
                _or(record + 8 * _FAILED, failed)
            bell = _field(record, _CALL_BELL)
            left = _subtract(record, 1) - 1  # from here on the record may belong to another call
            if left & _INSIDE == 0 and left & _WAITING:
                _release(bell)
            return
        word = _read(record)


@helper
def _serve(board):
    """The main loop of a helper. It ends with the process."""
    number = _add(board, 1)
    if number >= _HELPERS:
        _subtract(board, 1)
        return
    here = board + 8 * (_HELPERS_AT + _LINE * number)
    bell = _new_bell(here + 8 * _BELL)
    while bell != 0:  # forever, unless out of memory
        record = _who_wants(board)
        if record != 0:
            _help(board, record)
            continue
        _exchange(here, _IDLE)
        # A caller publishes its wish, then looks for idle helpers; a helper publishes that it is idle, then looks for
        # calls: at least one of the two sees the other.
        if _who_wants(board) != 0 and _replace(here, _IDLE, _BUSY):
            continue
        spins = 0
        while spins < _SPINS and _read(here) == _IDLE:
            _pause()
            spins += 1
        _acquire(bell)  # whoever makes this helper busy rings


@helper
def _open(board, code, wide, parameters, counter, helpers):
    """The record of a call opened to helpers; 0 if all records are taken."""
    for number in range(_CALLS):
        record = board + 8 * (_CALLS_AT + _LINE * number)
        if _read(record) == 0 and _replace(record, 0, _TAKEN):
            if _new_bell(record + 8 * _CALL_BELL) == 0:
                _exchange(record, 0)
                return 0
            fields = pointer(record, np.int64(0))
            store(fields, _CODE, code)
            store(fields, _WIDE, wide)
            store(fields, _PARAMETERS, parameters)
            store(fields, _COUNTER, counter)
            store(fields, _FAILED, 0)
            _exchange(record, _TAKEN | helpers * _WANT_ONE)
            _wake(board, helpers)
            return record
    return 0


@helper
def _close(record):
    """Let no one in any more, wait for those inside, free the record; nonzero if the kernel failed for one of them."""
    left = _and(record, ~_WANTED)
    spins = 0
    while left & _INSIDE and spins < _SPINS:
        _pause()
        left = _read(record)
        spins += 1
    if left & _INSIDE and _or(record, _WAITING) & _INSIDE:
        _acquire(_field(record, _CALL_BELL))
    failed = _field(record, _FAILED)
    _exchange(record, 0)
    return failed


@entry
def run(board, code, wide, parameters, counter, helpers):
    """Run a kernel, slot 0 in this thread and slots 1 to `helpers` in available helpers. Returns 0 on success, when the
    last is done. If `code` is 0 this thread becomes a helper (loading one function is faster than two)."""
    if code == 0:
        _serve(board)
        return 0
    record = _open(board, code, wide, parameters, counter, helpers) if helpers > 0 else 0
    failed = _run_kernel(code, wide, parameters, counter, 0)
    if record != 0:
        failed |= _close(record)
    return failed
