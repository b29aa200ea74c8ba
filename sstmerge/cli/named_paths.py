"""Arguments of the form [NAME=]PATH."""

from __future__ import annotations

from pathlib import Path


def name_and_path(value: str) -> tuple[str | None, str]:
    """Split [NAME=]PATH; what exists as it stands is a path, whatever signs it holds.

    Args:
        value: The argument.

    Returns:
        The name, None where there is none, and the path.
    """
    name, separator, path = value.partition("=")
    return (name, path) if separator and not Path(value).exists() else (None, value)
