"""Load the tensors of a checkpoint into a new module, all of them, or raise an error that says which do not fit."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from palme_xt.adoption import ARGUMENTS
from palme_xt.config import PalmEConfig
from palme_xt.wiring import DECODER, ENCODER, build

# `PalmE.from_modules` reads the others from the module, whose vocabulary may have grown by then.
_STATED = ("torch_layers", "bos_token", "eos_token", "sources")

Readers = Mapping[str, Callable[[], Tensor]]


class Tensors:
    """The tensors of a checkpoint, which are read one by one.

    Args:
        readers: For the name of each tensor, a function that returns it.

    Attributes:
        unused: A regular expression for the names of tensors that need not be read.
    """

    unused = ""

    def __init__(self, readers: Readers) -> None:
        self._readers, self._unread, self._last = readers, set(readers), ""

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in float32 at least.

        Raises:
            ValueError: If it is missing or quantised.
        """
        if name not in self._readers:
            raise ValueError(f"a tensor is missing: {name}")
        self._last = name
        self._unread.discard(name)
        tensor = self._readers[name]()
        if not (dtype := tensor.dtype).is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"tensor {name!r} has dtype {dtype}, which is not supported: use 16 to 64 bit floats")
        return tensor.detach().cpu().to(torch.promote_types(dtype, torch.float32))

    def translate(self, name: str, config: PalmEConfig) -> Tensor:
        """Return the tensor for a name in the state dict of a module that was built from `config`."""
        raise NotImplementedError

    def load(self, part: str, arguments: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Any:
        """Return a new module with these tensors, on the CPU, in eval mode.

        Args:
            part: "encoder" or "decoder".
            arguments: Arguments of `PalmEConfig` that it is built from, which `PalmE.from_modules` finds on it.
            dtype: Of the parameters. Buffers are float32.

        Raises:
            ValueError: If a tensor is missing or has another shape, or one is left.
        """
        config = PalmEConfig(**arguments)
        with torch.device("meta"):
            module = build({"encoder": ENCODER, "decoder": DECODER}[part], config)
        buffers, found = dict(module.named_buffers()), {}
        for name, like in module.state_dict().items():
            try:
                tensor = self.translate(name, config)
                shape: Any = tuple(tensor.shape)
            except (RuntimeError, IndexError) as error:  # of operations that expect other shapes
                shape = f"not what its config says ({error})"
            if shape != tuple(like.shape):
                raise ValueError(f"the shape of {self._last!r} is {shape}: {name!r} must be {tuple(like.shape)}")
            found[name] = tensor.to(torch.float32 if name in buffers else dtype, copy=True).contiguous()
        if left := sorted(name for name in self._unread if not re.fullmatch(self.unused, name)):
            raise ValueError(f"{len(left)} tensors are not supported, such as {left[0]!r}")
        module.load_state_dict(found, assign=True)
        stated = {name: value for name, value in arguments.items() if name.endswith("_kwargs") or name in _STATED}
        setattr(module, ARGUMENTS, stated)
        return module.eval()
