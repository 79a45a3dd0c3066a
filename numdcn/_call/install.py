"""How numdcn is installed, for messages. A release changes COMMAND and nothing else in the package (docs/releasing.md)."""

COMMAND = 'pip install -e ".[{extra}]" in a checkout of numdcn'


def install(extra: str) -> str:
    """How to install numdcn with an extra."""
    return COMMAND.format(extra=extra)
