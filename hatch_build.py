"""Fits README.md to PyPI, where its links to files of the repository lead nowhere: they get an address, or become text."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Where the files of this version are seen, with "/" at the end. Empty until the project has a home; see docs/releasing.md.
PAGES = ""  # for links
PICTURES = ""  # for pictures: the files themselves

# Code is passed over. Then links and pictures whose address is a path, or an anchor of the page.
LINK = re.compile(r"```.*?```|`[^`\n]*`|(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?!\w+:)(?P<path>[^()\s]+)\)", re.DOTALL)


def fitted(text, pages=PAGES, pictures=PICTURES):
    """The text with whole addresses; where there is none, without its pictures, and with the words of its links alone."""

    def change(match):
        if match["path"] is None:
            return match[0]
        path = f"README.md{match['path']}" if match["path"][0] == "#" else match["path"]
        base = pictures if match["mark"] else pages
        if base:
            return f"{match['mark']}[{match['text']}]({base}{path})"
        return "" if match["mark"] else match["text"]

    return LINK.sub(change, text)


class Readme(MetadataHookInterface):
    """The long description."""

    def update(self, metadata):
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": fitted(text)}
