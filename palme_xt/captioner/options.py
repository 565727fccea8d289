"""Options that come from a command line, a program, or a file that a user may have edited."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

KINDS: dict[Any, tuple[Any, str]] = {  # by annotation
    "str": (str, "text"),
    "str | None": (str | None, "text or None"),
    "bool": (bool, "true or false"),
    "int": (int, "an int"),
    "float": (int | float, "a number"),
}


def check_types(options: Any) -> None:
    """Refuse a dataclass one of whose values is not of its declared type.

    Raises:
        ValueError: there is such a value.
    """
    for option in fields(options):
        value, (kind, rule) = getattr(options, option.name), KINDS[option.type]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{option.name}={value!r} must be {rule}")
