"""Parse options, and tell those that the user gave from those that have their defaults."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser

from palme_xt.cli import did_you_mean
from palme_xt.storage.files import explained


class Parser(ArgumentParser):
    """A parser whose errors are one line, with the closest option if one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error.

        Raises:
            ValueError: Always.
        """
        known = [name for action in self._actions for name in (*action.option_strings, action.dest)]
        unknown = [name for name in re.findall(r"--[\w.]+|(?<=Option ')\w+", message) if name not in known]
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise ValueError(f"{' '.join(message.split())}{hint}; `{self.prog} --help` lists the options") from ex


def device_of(name: str | None) -> torch.device:
    """Return a device by its name, or by default the accelerator of this machine, or the CPU if it has none.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with explained(f"--device={name} must be a device of this machine, such as cpu or cuda:0"):
        torch.empty(0, device=name)
        return torch.device(name)


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
