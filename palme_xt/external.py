"""Name an encoder that was given to a model, and read what it returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def name_encoder(encoder: Any, said: str | None) -> str | None:
    """Return the `external_encoder` of a config for what `PalmE(encoder=...)` is given.

    Args:
        encoder: A module, None for no encoder, or "config" for that of the config.
        said: The `external_encoder` that a config already has.

    Raises:
        TypeError: If `encoder` is none of these.
        ValueError: If the config says that the encoder is another one.
    """
    if encoder == "config" and said in (None, "none"):
        return said
    if not (encoder in (None, "config") or isinstance(encoder, nn.Module)):
        remedy = 'pass the model itself; for timm, timm.create_model(..., num_classes=0, global_pool="")'
        raise TypeError(f"encoder is a {type(encoder).__name__}, must be a torch.nn.Module or None: {remedy}")
    kind = type(encoder)
    name = {None: "none", "config": "not given"}.get(encoder, f"{kind.__module__}.{kind.__qualname__}")
    if said not in (None, name):
        remedy = "pass encoder=module, as it was when the config was made, because it is not built from the config"
        raise ValueError(f"encoder is {name}, must be what external_encoder={said!r} says: {remedy}")
    return name


def read_embeddings(output: Any, images: int, encoder_dim: int) -> Tensor:
    """Return the embeddings `(b, p, d)` in what an encoder that is not the config's ViT returns.

    Args:
        output: `(b, p, d)`, or a map `(b, h, w, d)` or `(b, d, h, w)`; a tuple or a list that begins with it; or an
            object or a mapping that has it as `last_hidden_state`.
        images: Number of images b.
        encoder_dim: The width d that the decoder takes.

    Raises:
        ValueError: If there is no tensor, or it has another shape.
    """
    if isinstance(found := getattr(output, "last_hidden_state", output), Mapping):
        found = found.get("last_hidden_state")
    elif isinstance(found, list | tuple):
        found = next(iter(found), None)
    shape = tuple(found.shape) if isinstance(found, Tensor) else ()
    if len(shape) == 4 and (shape[1] == encoder_dim) != (shape[3] == encoder_dim):
        found = (found.movedim(1, 3) if shape[1] == encoder_dim else found).flatten(1, 2)
    if not shape or found.ndim != 3 or (found.shape[0], found.shape[2]) != (images, encoder_dim):
        returned = f"a tensor {shape}" if shape else f"a {type(output).__name__}"
        rule = f"(b, p, d), (b, h, w, d) or (b, d, h, w) with b={images} and d=encoder_dim={encoder_dim}, and no other"
        remedy = "set encoder_dim, or wrap the encoder in a module that returns it, or override PalmE.encode"
        raise ValueError(f"encoder returned {returned}, must return {rule} axis of width d: {remedy}")
    return found  # type: ignore[no-any-return]
