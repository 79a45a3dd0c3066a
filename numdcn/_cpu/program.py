"""The launches of a call, recorded once, then repeated for arrays of the same types, shapes and strides.

From call to call only addresses differ. While launches are recorded, *symbols* stand for them: each piece of memory has a
range of numbers of its own, in which offsets can be added. A repetition takes scratch memory, puts addresses in place of the
symbols, and runs the kernels. So a call does little Python, hardly any of it between two kernels.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.remembered import keep
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import Outline, address_of
from numdcn._cpu.parameters import COUNTER, Numbers, words_of
from numdcn._cpu.threads import get_num_threads, start

SYMBOL = 1 << 48  # above all sizes and strides
MOST_BYTES = 1 << 15  # of a program's words, if it is remembered


def symbol_of(piece: int) -> int:
    """The symbol of the address of a piece of memory, by its number."""
    return (piece + 1) * SYMBOL


def piece_of(symbol: int) -> tuple[int, int]:
    """The number of the piece that a symbol points into, and how far from its start."""
    return symbol // SYMBOL - 1, symbol % SYMBOL


class Step(NamedTuple):
    """A launch. Positions are in bytes, from the start of the program's words."""

    kernel: Any
    kind: type  # of its elements
    parameters: int  # position
    counter: int  # position
    threads: int
    condition: tuple[int, bool] | None  # a word, and whether the step runs if it is not 0


class Program(NamedTuple):
    """The launches of a call. Its pieces of memory are the arrays, its own words, and scratch memory, in this order."""

    words: bytes  # what kernels read, with symbols
    patches: list[tuple[int, int, int]]  # words to replace: which, by the address of which piece, and how far from it
    sizes: list[int]  # of scratch memory, in bytes
    steps: list[Step]

    def run(self, addresses: Sequence[int]) -> None:
        """Run the kernels on arrays at these addresses."""
        words = array("q", self.words)
        begin = words.buffer_info()[0]
        with Scratch(*self.sizes) as memory:
            pieces = (*addresses, begin, *memory)
            for number, piece, offset in self.patches:
                words[number] = pieces[piece] + offset
            for kernel, kind, parameters, counter, threads, condition in self.steps:
                if condition is None or (words[condition[0] // 8] != 0) is condition[1]:
                    start(kernel, kind, begin + parameters, begin + counter, threads)


class Recording:
    """A program in the making."""

    def __init__(self, arrays: int) -> None:
        self._words = bytearray()
        self._patches: list[tuple[int, int, int]] = []
        self._sizes: list[int] = []
        self._steps: list[Step] = []
        self._own = arrays  # the number of the piece that the words are

    def scratch(self, *sizes: int) -> list[int]:
        """The symbols of scratch memory of these sizes in bytes."""
        first = self._own + 1 + len(self._sizes)
        self._sizes += sizes
        return [symbol_of(first + i) for i in range(len(sizes))]

    def numbers(self, values: array[int]) -> Numbers:
        """These numbers among the words: whatever a call writes there, the next begins with these."""
        position = len(self._words)
        self._words += values.tobytes()
        return Numbers(values, symbol_of(self._own) + position)

    def launch(
        self, kernel: Any, one: Any, values: Any, threads: int, condition: tuple[int, bool] | None = None
    ) -> None:
        """Record a `threads.launch`; `condition`: the symbol of a number, and whether the kernel runs if it is not 0."""
        position, words = len(self._words), words_of(values)
        self._patches += (
            (position // 8 + i, *piece_of(word)) for i, word in enumerate(array("q", words)) if word >= SYMBOL
        )
        self._words += words + COUNTER
        counter = len(self._words) - 8
        self._words += COUNTER
        when = None if condition is None else (piece_of(condition[0])[1], condition[1])
        self._steps.append(Step(kernel, type(one), position, counter, threads, when))

    def program(self) -> Program:
        """What was recorded."""
        return Program(bytes(self._words), self._patches, self._sizes, self._steps)


_known: dict[tuple[Any, ...], Program] = {}


def run_recorded(record: Callable[..., None], p: Any, *arrays: np.ndarray | int | None) -> None:
    """Run what `record(recording, p, *outlines)` records of a problem and addressable arrays: launches that depend on
    nothing else but `plan_threads`.

    In place of an array there may be an address, of which a symbol is recorded, or None.
    """
    threads = get_num_threads()
    key: list[Any] = [record, p, threads]
    addresses = []
    for item in arrays:
        if isinstance(item, np.ndarray):
            key += item.dtype, item.shape, item.strides
            addresses.append(address_of(item))
        else:
            key.append(type(item))
            addresses.append(item or 0)
    known = tuple(key)
    program = _known.get(known)
    if program is None:
        recording = Recording(len(arrays))
        record(recording, p, *(_outline(item, symbol_of(i)) for i, item in enumerate(arrays)))
        program = recording.program()
        if len(program.words) <= MOST_BYTES and get_num_threads() == threads:
            keep(_known, known, program)
    program.run(addresses)


def _outline(item: np.ndarray | int | None, symbol: int) -> Outline | int | None:
    """What is recorded for an item."""
    if isinstance(item, np.ndarray):
        # the stride of an axis of one element has no meaning, and may be huge
        strides = (s if n > 1 or abs(s) < SYMBOL else 0 for s, n in zip(item.strides, item.shape, strict=True))
        return Outline(item.dtype, item.shape, tuple(strides), symbol)
    return None if item is None else symbol
