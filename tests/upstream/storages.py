"""Measure what a computation allocates."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """Keep everything that operations return, so that no two results share memory by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.kept += [out] if isinstance(out, Tensor) else []
        return out

    def sizes(self) -> list[int]:
        """Return the size of each distinct storage, in elements. Views of one, including expanded ones, count once."""
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in self.kept}
        return list(found.values())
