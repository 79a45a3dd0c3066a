"""What is told of the package: how it is installed, its version, its page on PyPI."""

import re
import tomllib

import pytest
from checks import ROOT

import numdcn
from numdcn._call.install import install


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def test_one_file_says_how_numdcn_is_installed():
    """_cuda/launch.py tells of NVIDIA's packages alone."""
    told = {}
    for path in (ROOT / "numdcn").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name != "numdcn/_call/install.py":
            assert "numdcn[" not in read(name), name
            told[name] = re.findall(r"pip install (?:--upgrade )?(\S+)", read(name))
    assert {name for name, packages in told.items() if packages} == {"numdcn/_cuda/launch.py"}
    assert all(package.startswith(("nvidia-", '"{package}')) for package in told["numdcn/_cuda/launch.py"])


def test_the_extra_of_messages_exists():
    assert "cuda" in tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert "[cuda]" in install("cuda") and "{" not in install("cuda")


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {numdcn.__version__}\n" in read("CITATION.cff")
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] in (numdcn.__version__, "Unreleased")


RELATIVE = r"""\]\((?!\w+:)[^)]*\)|\b(?:src|href|srcset)=["'](?!\w+:)[^"']*"""  # links and pictures, also in HTML


@pytest.fixture
def hatch_build():
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e .[test]")
    import hatch_build

    return hatch_build


@pytest.mark.parametrize("base", ["", "https://example.org/"])
def test_no_link_of_the_readme_on_pypi_is_relative(hatch_build, base):
    text, code = read("README.md"), re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
    fitted = hatch_build.fitted(text, base, base)
    assert re.search(RELATIVE, code.sub("", text))
    assert not re.findall(RELATIVE, code.sub("", fitted))
    assert re.findall("```.*?```", fitted, re.DOTALL) == re.findall("```.*?```", text, re.DOTALL)


def test_links_of_the_readme_on_pypi(hatch_build):
    text = "![A `b`](docs/c.png) [`d`](e.md#f), [g](#h), [i](https://j.org/k), `l[m](n)` and\n```\no[p](q)\n```\n"
    code = "`l[m](n)` and\n```\no[p](q)\n```\n"
    assert hatch_build.fitted(text, "", "") == " `d`, g, [i](https://j.org/k), " + code
    assert hatch_build.fitted(text, "https://r.org/", "https://s.org/") == (
        "![A `b`](https://s.org/docs/c.png) [`d`](https://r.org/e.md#f), [g](https://r.org/README.md#h), "
        "[i](https://j.org/k), " + code
    )


def test_the_metadata_hold_that_readme(hatch_build):
    """As hatchling makes them, which also checks the classifiers."""
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    core = ProjectMetadata(str(ROOT), PluginManager()).core
    assert core.readme_content_type == "text/markdown"
    assert core.readme == hatch_build.fitted(read("README.md"))
    assert core.classifiers and core.description
