"""How an operator is computed where there is a choice. On the CPU there is none: results are always reproducible, and
products never rounded to tf32."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call.checks import flag


class Options(NamedTuple):
    """Checked options."""

    deterministic: bool = False
    allow_tf32: bool = False


DEFAULT = Options()


def options(deterministic: Any = False, allow_tf32: Any = False) -> Options:
    """The options given to a door, checked."""
    if deterministic is False and allow_tf32 is False:  # the usual case
        return DEFAULT
    return Options(flag("deterministic", deterministic), flag("allow_tf32", allow_tf32))
