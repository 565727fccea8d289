"""What a computation allocates."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """Keeps all that operations return, so that no two of them share memory by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.kept += [out] if isinstance(out, Tensor) else []
        return out

    def sizes(self) -> list[int]:
        """How many numbers each of the distinct storages holds; views of one, expanded ones too, count once."""
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in self.kept}
        return list(found.values())
