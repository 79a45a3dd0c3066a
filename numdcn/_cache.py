"""Compiled kernels on disk: a file for each, in a folder named after all that its code was made from.

Numba's own cache looks at the file of the kernel alone, so it runs old machine code when a helper in another file has
changed; and all variants that one function makes share an index, which processes that compile at once overwrite. Here the
folder is named after the content of every source of the package and the versions of what compiles it, and the file after
the function, its constants, its signature, its options and the machine. Files begin with a checksum, and appear whole or
not at all, so that nothing is locked.

A disk that is full, slow, read-only or damaged is never an error: kernels are then compiled in memory, and a process says so
once.
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
KEPT = 4  # folders of a kind: of other versions of the sources, which a branch or another environment may want again
ABANDONED = 3600  # seconds after which a file that was not finished is removed
DIGEST = hashlib.sha256().digest_size
SETTINGS = (  # of Numba, which change its code and belong to no options
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
            elif entry.name != "__pycache__" and entry.is_dir():
                found |= _below(entry.path)
    return found


def _stamps() -> dict[str, Stamp]:
    """When each source was changed, and its size; or of the archive or program that holds them all; none if unknown."""
    try:
        found = _below(PACKAGE) if os.path.isdir(PACKAGE) else {}
        archive = sys.executable if getattr(sys, "frozen", False) else getattr(__spec__.loader, "archive", None)
        return {archive: _stamp(os.stat(archive))} if archive and not found else found
    except OSError:
        return {}


# Of what this process imports. Code of a source that has changed since must not be kept as that of the new text.
_AT_IMPORT = _stamps()


@functools.cache
def fingerprint(versions: tuple[str, ...]) -> str:
    """Of all sources, as compiled code takes formulas, layouts and constants from any, and of the versions."""
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
    """The files of a kind of kernels ("cpu", "cuda"), wherever they may lie."""

    def __init__(self, kind: str, *versions: str) -> None:
        self._prefix, self._versions = f"numdcn-{kind}-", versions
        self._marked: set[str] = set()
        self._tidied: set[str] = set()

    def folders(self) -> list[str]:
        """Where to look and where to write, the best first; none if the sources are not those that were imported."""
        try:
            name = self._prefix + fingerprint(self._versions)
        except OSError:
            return []
        if not _AT_IMPORT or _stamps() != _AT_IMPORT:
            return []
        return [os.path.join(place, name) for place in _places()]

    def writable(self) -> str | None:
        """The first folder in which a file can be made."""
        for folder in self.folders():
            with contextlib.suppress(OSError):
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                return folder
        return None

    def read(self, name: str) -> bytes | None:
        """What was written under a name; None if nothing is there, or something that is damaged."""
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
        """Keep this under a name, where that is possible."""
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
        """Remove all whose name begins so."""
        for folder in self.folders():
            _remove(folder, lambda entry: entry.name.startswith(prefix))

    def _mark(self, folder: str) -> None:
        """Let the time of a folder tell that it is in use."""
        if folder not in self._marked:
            self._marked.add(folder)
            with contextlib.suppress(OSError):
                os.utime(folder)

    def _tidy(self, folder: str) -> None:
        """Remove folders that were not used for long, and what processes that were killed left in this one: once."""
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
    """The folders that Numba has for the package, whether they can be written or not; the one that the user names alone."""
    locators = [caching.InTreeCacheLocator, caching.UserWideCacheLocator]
    if config.CACHE_DIR:
        locators = [caching.UserProvidedCacheLocator]
    return [locator(_places, os.path.join(PACKAGE, "__init__.py")).get_cache_path() for locator in locators]


def _write(path: str, content: bytes) -> None:
    """Whole or not at all, whatever other processes write there at the same time."""
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
    """Remove the files of a folder that are such."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if which(entry):
                    os.unlink(entry.path)


class KernelCache(caching._Cache):  # type: ignore[misc]
    """The cache of a Numba dispatcher. `pack` makes bytes of what it has compiled, or None if that cannot be kept;
    `unpack(target_context, bytes)` undoes it."""

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
        """What was compiled for a signature; None if it was not kept."""
        found = self._load(sig, target_context) if self._enabled else None
        self.missed = found is None
        return found

    def _load(self, sig: Any, target_context: Any) -> Any:
        content = self._store.read(self._name(sig, target_context.codegen()))
        if content is None:
            return None
        try:
            return self._unpack(target_context, content)
        except Exception as error:  # of whatever it is that another program wrote there
            _warn(f"a compiled kernel cannot be loaded ({type(error).__name__}: {error}) and is compiled again")
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled for a signature."""
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
    """The dispatcher, with a cache if its sources are those that the fingerprint is of."""
    function = getattr(dispatcher, "py_func", None)  # NUMBA_DISABLE_JIT leaves a plain function
    if function is not None and function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        dispatcher._cache = KernelCache(store, dispatcher, pack, unpack)
    return dispatcher


def _named(function: Callable[..., Any]) -> str:
    """A function with its constants."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return f"{function.__module__}.{function.__qualname__}({', '.join(map(_constant, cells))})"


def _constant(value: Any) -> str:
    """A constant of a kernel, as its file's name tells it: the same in every process, and no two alike."""
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.Type) or type(value) in (bool, int):
        return repr(value)
    function = getattr(value, "py_func", None)  # of a helper that was made for the kernel's constants
    if function is not None and function.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return _named(function)
    raise TypeError(
        f"a kernel is made from the constant {value!r}, expected ints, bools, types of Numba, classes and compiled functions of "
        "this package: others have no name that is the same in every process"
    )
