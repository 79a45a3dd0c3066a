"""The published numbers that the operators' tests compare with: the files of tests/vectors are those of its README."""

import re

from checks import ROOT

VECTORS = ROOT / "tests" / "vectors"


def test_the_files_are_those_of_the_tables():
    listed = re.findall(r"^\| (\w+) \|", (VECTORS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(path.stem for path in VECTORS.glob("*.npz")) == sorted(set(listed) - {"file"})
