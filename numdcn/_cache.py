"""Compiled kernels on disk: one file each, in a folder named after everything their code depends on.

Numba's own cache checks only the file that defines the kernel, so it runs stale machine code when a helper in another
file has changed; and all variants made by one function share an index, which processes that compile at the same time
overwrite. Here the folder is named after the content of every source of the package and the versions of the compiler
stack, and the file after the function, its constants, signature and options, and the machine. Files start with a
checksum and appear whole or not at all, so nothing is locked.

A full, slow, read-only or damaged disk is never an error: kernels are then compiled in memory, with one warning per
process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any

from numba.core import caching, config, types

PACKAGE = os.path.dirname(os.path.abspath(__file__))
NO_KERNELS = ("__pycache__", "adapters")  # folders that compiled code takes nothing from
KEPT = 4  # folders of each kind, for other versions of the sources that a branch or another environment may need again
ABANDONED = 3600  # seconds after which an unfinished file is removed
DIGEST = hashlib.sha256().digest_size
SETTINGS = (  # of Numba that change its code but are not among the options
    *("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "USING_SVML", "BOUNDSCHECK", "LLVM_REFPRUNE_PASS"),
    *("DEBUGINFO_DEFAULT", "CUDA_DEBUGINFO_DEFAULT", "EXTEND_VARIABLE_LIFETIMES", "ENABLE_PROFILING"),
)


Stamp = tuple[int, int, int]


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def _below(folder: str) -> dict[str, Stamp]:
    found: dict[str, Stamp] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                found[entry.path] = _stamp(entry.stat())
            elif entry.name not in NO_KERNELS and entry.is_dir():
                found |= _below(entry.path)
    return found


def _stamps() -> dict[str, Stamp]:
    """Modification time and size of each source, or of the archive or program that contains them all; empty if
    unknown."""
    try:
        found = _below(PACKAGE) if os.path.isdir(PACKAGE) else {}
        archive = sys.executable if getattr(sys, "frozen", False) else getattr(__spec__.loader, "archive", None)
        return {archive: _stamp(os.stat(archive))} if archive and not found else found
    except OSError:
        return {}


# Of the sources as imported. Code compiled from a source that has changed since must not be stored under its new text.
_AT_IMPORT = _stamps()


@functools.cache
def fingerprint(versions: tuple[str, ...]) -> str:
    """Hash of the versions and of all sources, as compiled code may take formulas, layouts and constants from any of
    them."""
    told = hashlib.sha256(repr((versions, sys.implementation.cache_tag, sys.version_info[:3])).encode())
    for path in sorted(_AT_IMPORT):
        with open(path, "rb") as file:
            content = file.read()
        told.update(f"{path.removeprefix(PACKAGE)}\0{len(content)}\0".encode() + content)
    return told.hexdigest()[:16]


_warned = False


def _warn(text: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"numdcn: {text} (further warnings of this kind are suppressed)", RuntimeWarning, stacklevel=2)


class Store:
    """The files of one kind of kernels ("cpu", "cuda"), wherever they are."""

    def __init__(self, kind: str, *versions: str) -> None:
        self._prefix, self._versions = f"numdcn-{kind}-", versions
        self._marked: set[str] = set()
        self._tidied: set[str] = set()

    def folders(self) -> list[str]:
        """Folders to read from and write to, best first; none if the sources are not the ones that were imported."""
        try:
            name = self._prefix + fingerprint(self._versions)
        except OSError:
            return []
        if not _AT_IMPORT or _stamps() != _AT_IMPORT:
            return []
        return [os.path.join(place, name) for place in _places()]

    def writable(self) -> str | None:
        """The first folder in which a file can be created."""
        for folder in self.folders():
            with contextlib.suppress(OSError):
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                return folder
        return None

    def read(self, name: str) -> bytes | None:
        """The content written under a name; None if missing or damaged."""
        for folder in self.folders():
            path = os.path.join(folder, name)
            try:
                with open(path, "rb") as file:
                    digest, content = file.read(DIGEST), file.read()
            except OSError:
                continue
            if hashlib.sha256(content).digest() == digest:
                self._mark(folder)
                return content
            _warn(f"{path} is damaged; its kernel is compiled again")
        return None

    def write(self, name: str, content: bytes) -> None:
        """Keep content under a name, if possible."""
        trouble: OSError | None = None
        for folder in self.folders():
            try:
                os.makedirs(folder, exist_ok=True)
                self._tidy(folder)
                _write(os.path.join(folder, name), hashlib.sha256(content).digest() + content)
                return
            except OSError as error:
                trouble = trouble or error
        if trouble is not None:
            _warn(
                f"a compiled kernel could not be kept on disk ({trouble}), so every process compiles it again; make room, or set "
                "the environment variable NUMBA_CACHE_DIR to a writable folder"
            )

    def remove(self, prefix: str) -> None:
        """Remove all files whose name starts with `prefix`."""
        for folder in self.folders():
            _remove(folder, lambda entry: entry.name.startswith(prefix))

    def _mark(self, folder: str) -> None:
        """Update a folder's modification time, which tells when it was last used."""
        if folder not in self._marked:
            self._marked.add(folder)
            with contextlib.suppress(OSError):
                os.utime(folder)

    def _tidy(self, folder: str) -> None:
        """Once per folder: remove folders long unused, and what killed processes left behind in this one."""
        self._mark(folder)
        if folder in self._tidied:
            return
        self._tidied.add(folder)
        limit = time.time() - ABANDONED
        _remove(folder, lambda entry: entry.name.endswith(".tmp") and entry.stat().st_mtime < limit)
        pattern = re.compile(re.escape(self._prefix) + "[0-9a-f]{16}")
        with contextlib.suppress(OSError), os.scandir(os.path.dirname(folder)) as entries:
            ours = [entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]
            ours.sort(key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
            for entry in ours[KEPT:]:
                _remove(entry.path, lambda entry: entry.name.endswith((".nbc", ".tmp")))
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)


def _places() -> list[str]:
    """The folders Numba would use for the package, writable or not; only the user's, if one is set."""
    locators = [caching.InTreeCacheLocator, caching.UserWideCacheLocator]
    if config.CACHE_DIR:
        locators = [caching.UserProvidedCacheLocator]
    return [locator(_places, os.path.join(PACKAGE, "__init__.py")).get_cache_path() for locator in locators]


def _write(path: str, content: bytes) -> None:
    """Write a file whole or not at all, whatever other processes write at the same time."""
    temporary = f"{path}.{uuid.uuid4().hex[:16]}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _remove(folder: str, which: Callable[[os.DirEntry[str]], bool]) -> None:
    """Remove the files of a folder that `which` selects."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if which(entry):
                    os.unlink(entry.path)


class KernelCache(caching._Cache):  # type: ignore[misc]
    """The cache of a Numba dispatcher. `pack` turns a compilation result into bytes, or None if it cannot be kept;
    `unpack(target_context, bytes)` is its inverse."""

    def __init__(
        self,
        store: Store,
        dispatcher: Any,
        pack: Callable[[Any], bytes | None],
        unpack: Callable[[Any, bytes], Any],
    ) -> None:
        self._store, self._pack, self._unpack, self._enabled = store, pack, unpack, True
        self.missed = False  # whether what was asked for last was not kept, so that it is compiled
        self._options = dispatcher.targetoptions
        self._function = _named(dispatcher.py_func)
        self._prefix = self._function.partition("(")[0].partition(".")[2].replace("<locals>.", "")

    @property
    def cache_path(self) -> str | None:
        return self._store.writable()

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        self._store.remove(f"{self._prefix}-")

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The result compiled for a signature; None if it was not kept."""
        found = self._load(sig, target_context) if self._enabled else None
        self.missed = found is None
        return found

    def _load(self, sig: Any, target_context: Any) -> Any:
        content = self._store.read(self._name(sig, target_context.codegen()))
        if content is None:
            return None
        try:
            return self._unpack(target_context, content)
        except Exception as error:  # whatever another program may have written there
            _warn(f"a compiled kernel cannot be loaded ({type(error).__name__}: {error}) and is compiled again")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the result compiled for a signature."""
        content = self._pack(data) if self._enabled else None
        if content is not None:
            self._store.write(self._name(sig, data.codegen), content)

    def _name(self, signature: Any, codegen: Any) -> str:
        arguments, result = getattr(signature, "args", signature), getattr(signature, "return_type", None)
        settings = [getattr(config, name, None) for name in SETTINGS]
        told = (self._function, arguments, result, sorted(self._options.items()), settings, codegen.magic_tuple())
        return f"{self._prefix}-{hashlib.sha256(repr(told).encode()).hexdigest()[:24]}.nbc"


def attach(
    store: Store, dispatcher: Any, pack: Callable[[Any], bytes | None], unpack: Callable[[Any, bytes], Any]
) -> Any:
    """The dispatcher, with a cache if its source is covered by the fingerprint."""
    function = getattr(dispatcher, "py_func", None)  # NUMBA_DISABLE_JIT leaves a plain function
    if function is not None and function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        dispatcher._cache = KernelCache(store, dispatcher, pack, unpack)
    return dispatcher


def _named(function: Callable[..., Any]) -> str:
    """A function with its constants, as text."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return f"{function.__module__}.{function.__qualname__}({', '.join(map(_constant, cells))})"


def _constant(value: Any) -> str:
    """A constant of a kernel as text for its file name: the same in every process, and distinct from any other."""
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.Type) or type(value) in (bool, int):
        return repr(value)
    function = getattr(value, "py_func", None)  # of a helper made for the kernel's constants
    if function is not None and function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return _named(function)
    raise TypeError(
        f"a kernel is made from the constant {value!r}, expected ints, bools, types of Numba, classes and compiled functions of "
        "this package: others have no name that is the same in every process"
    )
