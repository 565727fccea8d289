"""Add up the tensors that a training step keeps for its backward pass, by the line of a library that computes them."""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

LIBRARIES = ("/x_transformers/", "/palme_xt/", "/transformers/")
SHOWN = 10


def kept(model: nn.Module, step: Callable[[], object]) -> Counter[str]:
    """Return the bytes that each line of a library keeps, weights aside. Memory that several lines keep counts once."""
    counted = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: list[Tensor] = []  # otherwise, the memory of one tensor could become that of another
    lines: Counter[str] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            alive.append(tensor)
            lines[_line()] += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return lines


def describe(lines: Counter[str]) -> str:
    """Return the lines that keep the most, and the sum of all."""
    rows = [f"{size / 1e6:8.1f} MB  {line}" for line, size in lines.most_common(SHOWN)]
    return "\n".join([*rows, f"{lines.total() / 1e6:8.1f} MB  in all"])


def _line() -> str:
    """Return the innermost line of a library that is being run."""
    frame = sys._getframe(2)
    while frame.f_back and not any(library in frame.f_code.co_filename for library in LIBRARIES):
        frame = frame.f_back
    name = frame.f_code.co_filename
    return f"{name.rpartition('/')[2]}: {linecache.getline(name, frame.f_lineno).strip()[:80]}"
