"""How an operator is to be computed, where there is a choice. On the CPU there is none: results never depend on chance there,
and products are never rounded to tf32."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._call.checks import flag


class Options(NamedTuple):
    """Checked options."""

    deterministic: bool = False
    allow_tf32: bool = False


def options(deterministic: Any = False, allow_tf32: Any = False) -> Options:
    """Options as given to a door."""
    return Options(flag("deterministic", deterministic), flag("allow_tf32", allow_tf32))
