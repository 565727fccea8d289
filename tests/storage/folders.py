"""Models and their companions, for the tests of model folders and of the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from palme_xt.hub import PalmE
from tests.models import small

TRAINING = {"data": "digits", "steps": 3, "lr": 0.002}


OTHER_FILES = {
    "preprocessor_config.json": b'{"crop_size": 1}',
    "tokenizer.json": b"\x00\xff",
    "README.md": b"# mine\r\n",
}


def hub(seed: int = 0, **arguments: Any) -> PalmE:
    """Return `small` as an instance of the hub's class."""
    source = small(seed, **arguments)
    model = PalmE.from_config(source.config)
    model.load_state_dict(source.state_dict())
    assert isinstance(model, PalmE)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether all parameters and buffers, saved or not, are equal in names, dtypes and values."""
    tensors, others = (
        dict(model.state_dict()) | dict(model.named_buffers()) | dict(model.named_parameters())
        for model in (one, other)
    )
    return list(tensors) == list(others) and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )
