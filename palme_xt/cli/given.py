"""Which options the user gave, apart from those that have their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser


def given(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Return the options in `argv` alone."""
    options = parser.parse_args(argv, defaults=False).as_dict()
    return {name: value for name, value in options.items() if value is not None}


def reject_others(run: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Reject options beside a run, which has its own.

    Raises:
        ValueError: If there are options other than those `allowed`.
    """
    if others := [name for name in options if name not in allowed]:
        beside = f" but --{allowed[-1]}" if len(allowed) > 1 else ""
        found = f"found --{' --'.join(others)}"
        raise ValueError(f"{run} goes with no other option{beside}, {found}: leave out what the run has")
