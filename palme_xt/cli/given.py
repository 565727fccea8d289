"""Tell the options that the user gave from those that have their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser


def given(parser: ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Return only the options in `argv`, without defaults."""
    options = parser.parse_args(argv, defaults=False).as_dict()
    return {name: value for name, value in options.items() if value is not None}


def reject_others(run: str, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Reject options in addition to a run, which has its own.

    Raises:
        ValueError: If there are options other than those `allowed`.
    """
    if others := [name for name in options if name not in allowed]:
        apart_from = f" except --{' --'.join(allowed[1:])}" if len(allowed) > 1 else ""
        found = f"found --{' --'.join(others)}"
        raise ValueError(f"{run} allows no other options{apart_from}, {found}: leave out what the run determines")


def from_options(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return the dataclass `kind` with its fields from `values`, which may hold others.

    Raises:
        KeyError: If a field is missing.
    """
    return kind(**{option.name: values[option.name] for option in fields(kind)})
