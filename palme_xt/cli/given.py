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


def add_decoding_options(parser: ArgumentParser) -> None:
    """Add the options that `caption` and `ask` share, beginning with RUN."""
    parser.add_argument("run", metavar="RUN", help="folder that `palme-xt train` wrote")
    parser.add_argument("--temperature", type=float, help="sample at this temperature (default: 0, do not sample)")
    parser.add_argument("--top_p", type=float, help="sample from the most likely tokens that sum to this probability")
    parser.add_argument("--seed", type=int, help="seed of the sampling (default: a new one each time)")
    parser.add_argument("--device", help="device to compute on, such as cpu or cuda:1 (default: a GPU if there is one)")


def how_to_decode(options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of `PalmE.generate`, and seed the sampling."""
    temperature, top_p, seed = (options[name] for name in ("temperature", "top_p", "seed"))
    beams = options.get("beams", 1)  # `ask` has no such option
    if beams != 1 and (options["stream"] or temperature or top_p is not None or seed is not None):
        raise ValueError(f"--beams={beams} neither samples nor streams: leave the other decoding options out")
    how: dict[str, Any] = {} if beams == 1 else {"beams": beams}
    how |= {} if temperature is None else {"temperature": temperature}
    if top_p is not None:
        if temperature == 0:
            raise ValueError(f"--top_p={top_p} has no effect with --temperature=0, which does not sample: leave it out")
        if not 0 < top_p <= 1:
            raise ValueError(f"--top_p={top_p} must be greater than 0 and at most 1")
        how |= {"temperature": 1.0} | how | {"filter_logits_fn": "top_p", "filter_kwargs": {"thres": top_p}}
    if seed is not None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"--seed={seed} must be within 0..2**63-1")
        if not how.get("temperature"):
            raise ValueError(f"--seed={seed} has no effect without --temperature or --top_p: leave it out")
        torch.manual_seed(seed)
    return how
