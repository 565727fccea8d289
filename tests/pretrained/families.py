"""Strategies of tiny random models of transformers, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

ENCODERS = ("vit", "clip", "siglip", "dinov2", "dinov2_with_registers")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]


@st.composite
def encoders(draw: st.DrawFn, family: str) -> Any:
    """Draw a vision tower of a family."""
    heads, dim_head, patch = draw(st.integers(1, 3)), draw(st.sampled_from([8, 12])), draw(st.sampled_from([2, 4]))
    shape = {
        "hidden_size": heads * dim_head,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(2, 3)),
        "patch_size": patch,
        # CLIP and SigLIP take images that are no multiple of the patch size.
        "image_size": patch * draw(st.integers(1, 3))
        + draw(st.integers(0, patch - 1)) * (family in ("clip", "siglip")),
        "num_channels": draw(st.sampled_from([1, 3])),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3])),
    }
    if family.startswith("dinov2"):
        shape |= {"mlp_ratio": draw(st.integers(1, 4)), "qkv_bias": draw(st.booleans())}
        if family == "dinov2":
            return _random(transformers.Dinov2Model(transformers.Dinov2Config(**shape)), draw)
        shape["num_register_tokens"] = draw(st.integers(1, 3))
        return _random(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**shape)), draw)
    shape["intermediate_size"] = draw(st.integers(5, 50))
    if family == "vit":
        config = transformers.ViTConfig(**shape, qkv_bias=draw(st.booleans()))
        kinds = transformers.ViTModel, transformers.ViTForImageClassification
        return _random(draw(st.sampled_from(kinds))(config), draw)
    name = family.capitalize() if family == "siglip" else "CLIP"
    if draw(st.booleans()):
        return _random(
            getattr(transformers, f"{name}VisionModel")(getattr(transformers, f"{name}VisionConfig")(**shape)), draw
        )
    text = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=shape)
    return _random(getattr(transformers, f"{name}Model")(config), draw)


@st.composite
def decoders(draw: st.DrawFn, family: str) -> Any:
    """Draw a language model of a family."""
    dim_head, kv_heads, groups = draw(st.sampled_from([4, 8, 16])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * groups
    dim = heads * draw(st.sampled_from([6, 8, 10]))
    tokens = {f"{name}_token_id": draw(st.sampled_from([None, 1, 5])) for name in ("bos", "eos", "pad")}
    common = {"vocab_size": draw(st.integers(20, 40)), **tokens}
    layers, activation = draw(st.integers(2, 3)), draw(st.sampled_from(ACTIVATIONS))
    eps, tied = draw(st.sampled_from([1e-6, 1e-5, 1e-2])), draw(st.booleans())
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=heads * dim_head,
            n_head=heads,
            n_layer=layers,
            n_positions=32,
            n_inner=draw(st.sampled_from([None, 30])),
            activation_function=activation,
            layer_norm_epsilon=eps,
            tie_word_embeddings=tied,
            **common,
        )
        return _random(transformers.GPT2LMHeadModel(config), draw)
    own: dict[str, Any] = {"head_dim": dim_head}
    if family == "qwen2":  # its heads share the width
        own, dim = {}, heads * dim_head
    elif family == "llama":
        own |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    elif family == "qwen3":
        own |= {"attention_bias": draw(st.booleans())}
    elif family == "mistral":
        own |= {"sliding_window": None}
    name = family.capitalize()
    config = getattr(transformers, f"{name}Config")(
        hidden_size=dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        intermediate_size=draw(st.integers(5, 50)),
        hidden_act=activation,
        rms_norm_eps=eps,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e5, 500.0]))},
        **common,
        **own,
    )
    return _random(getattr(transformers, f"{name}ForCausalLM")(config), draw)


def _random(model: nn.Module, draw: st.DrawFn) -> nn.Module:
    """Draw all parameters anew: zeros and ones would hide something."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise + (0.8 if parameter.ndim < 2 else 0)
    return model.eval()


def vision(model: Any) -> Any:
    """Return the part of a model that returns the hidden states of an image."""
    return getattr(model, "vision_model", getattr(model, "vit", model))


def images(model: Any, encoder: Any, b: int = 2) -> tuple[Tensor, Tensor]:
    """Return random images for transformers, and their whole patches, for ours."""
    config = vision(model).config
    img = torch.randn(
        b, config.num_channels, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0)
    )
    size = round(encoder.pos_embedding.shape[1] ** 0.5) * encoder.patch_size
    return img, img[..., :size, :size].clone()


def patches(model: Any, img: Tensor, **how: Any) -> Tensor:
    """Return the last hidden states `(b, p, d)` of the patches."""
    states: Tensor = vision(model)(img, **how).last_hidden_state
    config = vision(model).config
    grid = img.shape[-1] // config.patch_size
    return states[:, -(grid**2) :]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
