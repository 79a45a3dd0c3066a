"""Memory of Numba's GPU simulator: arrays by address, with every access checked."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

SIMULATED_MEMORY: weakref.WeakValueDictionary[int, CheckedArray] = weakref.WeakValueDictionary()


class CheckedArray:
    """Simulator memory around an address: only the `origin` elements before it and those from it on may be accessed."""

    def __init__(self, elements: np.ndarray, origin: int = 0) -> None:
        self.elements, self.origin = elements, origin

    def __getitem__(self, index: int) -> Any:
        return self.elements[self._checked(index)]

    def __setitem__(self, index: int, value: Any) -> None:
        self.elements[self._checked(index)] = value

    def _checked(self, index: int) -> int:
        place = int(index) + self.origin
        if not 0 <= place < len(self.elements):
            raise IndexError(
                f"element {index} of memory that has elements {-self.origin} to {len(self.elements) - self.origin - 1}"
            )
        return place
