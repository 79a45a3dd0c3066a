"""Checks, each in an environment of its own: `nox --list` names them, `nox -s lint` runs one."""

from pathlib import Path

import nox

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
DEV = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]


@nox.session
def lint(session):
    """Ruff: rules and format."""
    session.install(*DEV)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session):
    """Mypy."""
    session.install("-e", ".[demo,dev]")
    session.run("mypy")


@nox.session(python=PYTHONS)
def tests(session):
    """The quick tests."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session(python="3.12")
def oldest(session):
    """The quick tests with the oldest Numba and NumPy that are allowed."""
    session.install("-e", ".[test]", "numba==0.62.*", "numpy==1.26.*")
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session
def full(session):
    """All tests but the large ones, kernels for GPUs compiled too."""
    session.install("-e", ".[test,cuda]")
    session.run("python", "-m", "pytest", "-q", "-m", "not large", *session.posargs)


@nox.session
def docs(session):
    """The site."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


@nox.session
def bench(session):
    """The benchmark: `nox -s bench -- --operators roi_align`."""
    session.install("-e", ".[bench]")
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session(python=PYTHONS)
def dist(session):
    """The wheel and the sdist, built, checked, and the wheel tried away from the sources."""
    session.install("build", "twine")
    folder = Path(session.create_tmp())
    for old in folder.glob("numdcn-*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(folder), ".")
    session.run("twine", "check", "--strict", *map(str, folder.glob("numdcn-*")))
    session.install(*map(str, folder.glob("*.whl")))
    session.chdir(folder)
    session.run("python", "-m", "numdcn")
