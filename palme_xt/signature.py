"""One signature for two callables: what is written once is seen by type checkers, editors and `help()` alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

P = ParamSpec("P")


def with_arguments_of(
    constructor: Callable[P, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an `__init__(self, *args, **kwargs)` the signature of `constructor`."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        @functools.wraps(init)
        def __init__(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, *args, **kwargs)

        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        arguments = inspect.signature(constructor).parameters.values()
        __init__.__signature__ = inspect.Signature([itself, *arguments])  # type: ignore[attr-defined]
        return __init__

    return decorate
