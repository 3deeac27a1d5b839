"""How a long verb says what it is doing: a function that takes one line."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""
