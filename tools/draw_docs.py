"""Runs the Python of the pages under docs/, which draws their pictures again: `python -m tools.draw_docs [PAGE ...]`.

Run it from the repository root, where pages save what they draw. The blocks of a page run in their order, in one namespace. A
comment `<!-- needs MODULE -->` before a block leaves it out where that module is not installed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(?:^<!-- needs (\w+) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Some Python of a page."""

    line: int  # of its first line in the page
    needs: str | None  # a module
    code: str


def pages() -> list[Path]:
    """All of them, in the order of their names."""
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path) -> list[Block]:
    """The Python of a page."""
    text = page.read_text(encoding="utf-8")
    return [Block(text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in BLOCK.finditer(text)]


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of a page; the names that they leave behind. Errors point to lines of the page."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.needs is None or importlib.util.find_spec(block.needs):
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    return names


def main() -> None:
    """Run some pages, or all."""
    import matplotlib.pyplot as plt  # here, so that the pages' blocks can be read without it

    plt.switch_backend("agg")
    for page in [Path(name).resolve() for name in sys.argv[1:]] or pages():
        start = time.perf_counter()
        run(page)
        plt.close("all")
        if blocks(page):
            print(f"{page.relative_to(DOCS)}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
