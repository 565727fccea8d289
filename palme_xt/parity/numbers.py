"""Take nested outputs apart, and find the first number that differs."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, Any]  # tensors, and other values that outputs consist of, by name


def leaves(value: Any, name: str = "the output") -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of everything in a nested output.

    The keys of tuples, lists, mappings and dataclasses are yielded before their items. Floats become tensors. Of an
    object of any other class, only the class is yielded.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple | list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        yield name, f"a container of {list(value)}"
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, float):
        yield name, torch.tensor(value, dtype=torch.float64)
    else:
        yield name, value if value is None or isinstance(value, Tensor | int | str) else type(value)


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor in a nested output."""
    return next((value for _, value in leaves(output) if isinstance(value, Tensor)), None)


def first_difference(ours: Numbers, theirs: Numbers, absolute: float = 0.0, share: float = 0.0) -> str | None:
    """Describe the first difference that is too large, or return None if there is none.

    Args:
        ours: The expected values. A name that only one side has is skipped.
        theirs: The values to compare.
        absolute: Largest accepted difference of two numbers. If it and `share` are 0, dtypes must be equal too.
        share: Largest accepted difference, as a share of the largest value in the same tensor.
    """
    for name, expected in ours.items():
        if name in theirs and (found := _difference(expected, theirs[name], absolute, share)):
            return f"{name} {found}"
    return None


def describe_crash(error: Exception) -> str:
    """Return the type of an error and the first line of its message, if it has one."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def describe_value(value: Any, *, dtype: bool = False) -> str:
    """Return the shape of a tensor, with its dtype if it matters, or the representation of any other value."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{f' {value.dtype}' if dtype else ''}"
    return value if isinstance(value, str) else repr(value)


def _difference(expected: Any, value: Any, absolute: float, share: float) -> str | None:
    shown = [describe_value(side, dtype=absolute == share == 0) for side in (expected, value)]
    if shown[0] != shown[1]:
        return f"is {shown[0]} in the first, {shown[1]} in the second"
    if not isinstance(expected, Tensor):
        return None
    ours, theirs = expected.detach().cpu(), value.detach().cpu()
    same = (ours == theirs) | ((ours != ours) & (theirs != theirs))  # nan equals nan
    if same.all():
        return None
    distance = (theirs.double() - ours.double()).abs().masked_fill(same, 0).max().item()
    largest = ours.double().abs().max().item()
    if distance <= max(absolute, share * largest):
        return None
    return f"differs by up to {distance:.3g} (values up to {largest:.3g})"
