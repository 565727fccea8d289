"""Load pretrained encoders and decoders of Hugging Face as modules of x-transformers, exactly.

    encoder = load_encoder("facebook/dinov2-small", image_size=224)
    decoder = load_decoder("HuggingFaceTB/SmolLM2-135M")
    model = PalmE.from_modules(encoder, decoder)

transformers is not imported. README.md lists the families.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from x_transformers import AutoregressiveWrapper, ViTransformerWrapper

from palme_xt.adoption import ARGUMENTS
from palme_xt.config import PalmEConfig
from palme_xt.pretrained.families import decoder_arguments, encoder_arguments
from palme_xt.pretrained.source import Source, open_source
from palme_xt.pretrained.tensors import Checkpoint, translate
from palme_xt.wiring import DECODER, ENCODER, build

__all__ = ["describe_decoder", "describe_encoder", "load_decoder", "load_encoder"]

_STATED = ("torch_layers", "bos_token", "eos_token")  # and overrides; `PalmE.from_modules` reads the sizes


def load_encoder(
    source: Any, *, image_size: int | None = None, dtype: torch.dtype = torch.float32
) -> ViTransformerWrapper:
    """Return a pretrained vision tower, whose embeddings are the last hidden states of the patches.

    The families are ViT, CLIP, SigLIP and DINOv2, with or without registers. For CLIP, the last hidden states are those
    before the last norm, as in transformers.

    Args:
        source: A folder with Hugging Face's `config.json` and safetensors, "user/name" on the hub, or a model of
            transformers, which stays as it is.
        image_size: Height and width of the images. If it is not that of `source`, positions are interpolated.
        dtype: Of the parameters.

    Returns:
        The encoder on the CPU, in eval mode.

    Raises:
        ModuleNotFoundError: If safetensors or huggingface_hub is needed, but not installed.
        TypeError: If `source` is something else.
        ValueError: If `source` cannot be read, or has anything that is not supported. The message names it.
    """
    opened = open_source(source)
    return _load(opened, "encoder", lambda: encoder_arguments(opened.config, image_size), dtype)


def load_decoder(
    source: Any, *, max_seq_len: int | None = None, dtype: torch.dtype = torch.float32
) -> AutoregressiveWrapper:
    """Return a pretrained language model. `PalmE.from_modules` inserts cross-attention into a copy of it.

    The families are Llama, Mistral, Qwen2, Qwen3 and GPT-2.

    Args:
        source: A folder with Hugging Face's `config.json` and safetensors, "user/name" on the hub, or a model of
            transformers, which stays as it is.
        dtype: Of the parameters.

    Returns:
        The decoder on the CPU, in eval mode.

    Raises:
        ModuleNotFoundError: If safetensors or huggingface_hub is needed, but not installed.
        TypeError: If `source` is something else.
        ValueError: If `source` cannot be read, or has anything that is not supported. The message names it.
    """
    opened = open_source(source)
    module = _load(
        opened,
        "decoder",
        lambda: decoder_arguments(opened.config) | ({"max_seq_len": max_seq_len} if max_seq_len else {}),
        dtype,
    )
    getattr(module, ARGUMENTS)["cross_attend"] = True
    return module


def _load(opened: Source, part: str, describe: Callable[[], dict[str, Any]], dtype: torch.dtype) -> Any:
    """Return a module with weights, or raise an error that begins with the name of the source."""
    try:
        arguments = describe()
        config = PalmEConfig(**arguments | {"cross_attend": False})
        with torch.device("meta"):
            module = build({"encoder": ENCODER, "decoder": DECODER}[part], config)
        found = translate(module.state_dict(), Checkpoint(opened.names, opened.read), part, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{opened.name} cannot be loaded: {error}") from error
    buffers = dict(module.named_buffers())  # of the rotary positions, which stay in float32
    for name, tensor in found.items():
        found[name] = tensor.to(torch.float32 if name in buffers else dtype, copy=True).contiguous()
    module.load_state_dict(found, assign=True)
    stated = {name: value for name, value in arguments.items() if name.endswith("_kwargs") or name in _STATED}
    setattr(module, ARGUMENTS, stated | {"sources": {part: opened.name}})
    return module.eval()


def describe_encoder(source: Any, image_size: int | None = None) -> dict[str, Any]:
    opened = open_source(source)
    return encoder_arguments(opened.config, image_size) | {"sources": {"encoder": opened.name}}


def describe_decoder(source: Any, max_seq_len: int | None = None) -> dict[str, Any]:
    opened = open_source(source)
    found = decoder_arguments(opened.config) | {"sources": {"decoder": opened.name}}
    return found | ({"max_seq_len": max_seq_len} if max_seq_len else {})
