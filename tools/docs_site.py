"""What mkdocs needs to know of this repository: files of the site that lie outside docs/, and how docstrings become Markdown.

mkdocs.yml names this file twice: as a hook of mkdocs, and as an extension of Griffe, which reads the docstrings.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROOT_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"\[([^]]+)]\((?!https?:|#)([^)]+)\)")
SOURCE = re.compile(r"^<!-- source: (\S+) (\w+) -->$", re.MULTILINE)
HEADER = re.compile(r"(Args|Returns|Raises):")
ITEM = re.compile(r" {4}(\w[\w, ]*): (.*)")


def on_config(config: Any) -> Any:
    """Below "Speed", every page of results."""
    speed = next(section["Speed"] for section in config.nav if "Speed" in section)
    speed += [{path.stem: f"results/{path.name}"} for path in sorted(RESULTS.glob("*.md"), key=lambda path: path.stem)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The changelog, the contributor's page and the results, tables and charts, are pages and pictures too."""
    found = {place: ROOT / name for place, name in ROOT_PAGES.items()}
    found |= {f"results/{path.name}": path for path in sorted(RESULTS.glob("*.*")) if path.suffix in (".md", ".png")}
    for place, path in found.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """`<!-- source: FILE NAME -->` becomes the function of that name. Results are elsewhere in the site than in the repository."""
    if page.file.src_uri in ROOT_PAGES:
        markdown = LINK.sub(from_root, markdown)
    shown = SOURCE.sub(lambda m: f"```python\n{function(ROOT / m[1], m[2])}\n```", markdown)
    return shown.replace("../benchmarks/results/", "results/")


def from_root(link: re.Match[str]) -> str:
    """A link of a page that lies in the repository's root: to another page of the site, or the name of what is none."""
    inside = link[2].startswith("docs/")
    return f"[{link[1].removeprefix('docs/')}]({link[2].removeprefix('docs/')})" if inside else f"`{link[2]}`"


def function(path: Path, name: str) -> str:
    """The text of a function, decorators included."""
    text = path.read_text(encoding="utf-8")
    node = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, as soon as they are read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Of a function, a class, a module or an attribute."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class_members(self, *, cls: Any, **_: Any) -> None:
        """Named tuples list their fields."""
        if cls.docstring and any("NamedTuple" in str(base) for base in cls.bases):
            cls.docstring.value += "\n\nFields: " + ", ".join(f"`{name}`" for name in cls.members) + "."


def as_markdown(docstring: str) -> str:
    """Markdown of a docstring: sections get a title, arguments and exceptions make a list, `::` before a formula is a colon.

    Outside of formulas and of names in backticks, an asterisk multiplies.
    """
    lines: list[str] = []
    section, formula = "", False
    for line in docstring.splitlines():
        if header := HEADER.fullmatch(line):
            section, formula = header[1], False
            lines += ["", f"**{'Arguments' if section == 'Args' else section}**", ""]
            continue
        if line and not line.startswith(" "):
            section, formula = "", False
        if not formula:
            formula = line.endswith("::")
            line = re.sub(r"(`[^`]*`)|\*", lambda m: m[1] or r"\*", line.removesuffix(":") if formula else line)
            if section and section != "Returns" and (item := ITEM.fullmatch(line)):
                names = ", ".join(f"`{name}`" for name in item[1].split(", "))
                line = f"    - {names}: {item[2]}"
        lines.append(line.removeprefix("    ") if section else line)
    return "\n".join(lines)
