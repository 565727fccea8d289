"""An immutable, hashable dict, so that a frozen config is frozen all the way down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A `dict` that cannot be changed after construction. Nested mappings and sequences are frozen too.

    Lists become tuples: JSON knows only lists, while x-transformers tells per-layer values by `isinstance(v, tuple)`
    (`AttentionLayers.__init__`), so that a config read back from JSON has to mean the same.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({key: freeze(value) for key, value in values.items()})

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config is frozen: build another with dataclasses.replace(config, ...)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def freeze(value: Any) -> Any:
    """Mappings as `FrozenDict` and lists as tuples, recursively; anything else as it is."""
    if isinstance(value, Mapping):
        return FrozenDict(value)
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return value


def to_json_types(value: Any, name: str) -> Any:
    """The inverse of `freeze`, in plain JSON types.

    Raises:
        TypeError: a value that JSON has no type for (a module, a callable), named by where it stands.
    """
    if isinstance(value, Mapping):
        return {key: to_json_types(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_types(item, name) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(
        f"{name}={value!r} has no JSON form: only None, bool, int, finite float, str, lists and dicts can be saved "
        "with a config; build the model with it in Python and save the rest"
    )
