"""Load pretrained encoders and decoders of Hugging Face as modules of x-transformers, exactly.

    encoder = load_encoder("facebook/dinov2-small", image_size=224)
    decoder = load_decoder("HuggingFaceTB/SmolLM2-135M")
    model = PalmE.from_modules(encoder, decoder)

transformers is not imported. README.md lists the families.
"""

from typing import Any

import torch
from x_transformers import AutoregressiveWrapper, ViTransformerWrapper

from palme_xt.adoption import ARGUMENTS
from palme_xt.pretrained.families import decoder_arguments, encoder_arguments
from palme_xt.pretrained.source import Source, open_source
from palme_xt.pretrained.translation import Checkpoint
from palme_xt.storage.files import explained

__all__ = ["describe_decoder", "describe_encoder", "load_decoder", "load_encoder"]


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
    return _load(open_source(source), "encoder", image_size, dtype)


def load_decoder(
    source: Any, *, max_seq_len: int | None = None, dtype: torch.dtype = torch.float32
) -> AutoregressiveWrapper:
    """Return a pretrained language model. `PalmE.from_modules` inserts cross-attention into a copy of it.

    The families are Llama, Mistral, Qwen2, Qwen3 and GPT-2.

    Args:
        source: A folder with Hugging Face's `config.json` and safetensors, "user/name" on the hub, or a model of
            transformers, which stays as it is.
        max_seq_len: Length in tokens of the longest text. Defaults to that of `source`, and must not be above it. Of a
            table of positions, the first ones are kept.
        dtype: Of the parameters.

    Returns:
        The decoder on the CPU, in eval mode.

    Raises:
        ModuleNotFoundError: If safetensors or huggingface_hub is needed, but not installed.
        TypeError: If `source` is something else.
        ValueError: If `source` cannot be read, or has anything that is not supported. The message names it.
    """
    return _load(open_source(source), "decoder", max_seq_len, dtype)


def describe_encoder(source: Any, image_size: int | None = None) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` that describe `load_encoder(source, image_size=image_size)`.

    Of a folder or a repository, `config.json` alone is read. With the arguments of a decoder, in which "torch_layers"
    and "sources" are merged, they are those of `PalmE.from_modules(load_encoder(...), load_decoder(...))`.

    Raises:
        ModuleNotFoundError, TypeError, ValueError: As in `load_encoder`, except for errors in weights.
    """
    return _describe(open_source(source), "encoder", image_size)


def describe_decoder(source: Any, max_seq_len: int | None = None) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` that describe `load_decoder(source, max_seq_len=max_seq_len)`.

    Of a folder or a repository, `config.json` alone is read. See `describe_encoder`.

    Raises:
        ModuleNotFoundError, TypeError, ValueError: As in `load_decoder`, except for errors in weights.
    """
    return _describe(open_source(source), "decoder", max_seq_len)


def _describe(source: Source, part: str, size: int | None) -> dict[str, Any]:
    with explained(f"{source.name} cannot be loaded"):
        arguments = {"encoder": encoder_arguments, "decoder": decoder_arguments}[part](source.config, size)
    return arguments | {"sources": {part: source.name}}


def _load(source: Source, part: str, size: int | None, dtype: torch.dtype) -> Any:
    arguments = _describe(source, part, size)
    checkpoint = Checkpoint(source.open(), max_seq_len=size if part == "decoder" else None)
    with explained(f"{source.name} cannot be loaded"):
        module = checkpoint.load(part, arguments | {"cross_attend": False}, dtype)
    if part == "decoder":
        getattr(module, ARGUMENTS)["cross_attend"] = True
    return module
