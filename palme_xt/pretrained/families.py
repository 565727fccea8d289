"""What a `config.json` of Hugging Face means in arguments of `PalmEConfig`, for each family of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from palme_xt.config import check_positive_int, is_int
from palme_xt.mapping import upstream_keywords

_VIT: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3}
_VIT |= {"image_size": 224, "patch_size": 16, "intermediate_size": 3072, "qkv_bias": True, "hidden_act": "gelu"}
_VIT["layer_norm_eps"] = 1e-6
_DINO = _VIT | {"mlp_ratio": 4}
# The defaults of transformers, which a config.json may leave out.
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": _VIT | {"layer_norm_eps": 1e-12},
    "clip_vision_model": _VIT | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _VIT | {"hidden_act": "gelu_pytorch_tanh"},
    "dinov2": _DINO | {"patch_size": 14},
    "dinov2_with_registers": _DINO | {"num_register_tokens": 4},
}
_LLAMA: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 128, "attention_bias": False},
    "gpt2": {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
}
_GPT2 = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_GPT2 |= {"n_inner": "intermediate_size", "n_positions": "max_position_embeddings", "activation_function": "hidden_act"}
_VISION_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Keywords of upstream's feedforward, and of `torch_layers`.
_ACTIVATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gelu": ({}, {}),
    "silu": ({"ff_swish": True}, {}),
    "gelu_new": ({}, {"activation": "gelu_tanh"}),
    "gelu_pytorch_tanh": ({}, {"activation": "gelu_tanh"}),
    "quick_gelu": ({}, {"activation": "quick_gelu"}),
    "relu": ({}, {"activation": "relu"}),
}
_ONLY = {"quantization_config": None, "use_swiglu_ffn": False, "add_cross_attention": False, "partial_rotary_factor": 1}
_ONLY |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
_QKV = ("to_q", "to_k", "to_v")


class _Config(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise ValueError(f"its config has no {name!r}, which a {self['model_type']!r} needs")


def encoder_arguments(config: Mapping[str, Any], image_size: int | None = None) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` that describe a vision tower.

    Args:
        config: The content of `config.json`, also that of a model which has a vision tower and a text tower.
        image_size: Height and width of the images, instead of those in `config`.

    Raises:
        ValueError: If the config has something that is not supported. The message names it.
    """
    if (tower := _VISION_TOWERS.get(config.get("model_type", ""))) and "vision_config" in config:
        config = {"model_type": tower} | config["vision_config"]
    given = _read(config, ENCODERS)
    clip, dino = given["model_type"] == "clip_vision_model", given["model_type"].startswith("dinov2")
    patch, dim = given["patch_size"], given["hidden_size"]
    inner = int(dim * given["mlp_ratio"]) if dino else given["intermediate_size"]
    registers = (given["model_type"] != "siglip_vision_model") + given.get("num_register_tokens", 0)
    arguments = _arguments("encoder", given, dim // given["num_attention_heads"], inner)
    layers = {"pre_norm_has_final_norm": False} if clip else {"use_layerscale": True} if dino else {}
    arguments["encoder_kwargs"] |= {"attn_flash": True, **layers}
    bias = [*(_QKV if given["qkv_bias"] else ()), "to_out"]
    norms = {"norm": "LayerNorm", "eps": given["layer_norm_eps"], "patch_norm": False}
    arguments["torch_layers"]["encoder"] |= {**norms, "bias": bias}
    vit = {"channels": given["num_channels"], "num_register_tokens": registers, "post_emb_norm": clip}
    arguments["vit_kwargs"] = {name: value for name, value in vit.items() if value != upstream_keywords("vit")[name]}
    # Of an image whose size is no multiple of the patch's, the models see the whole patches alone.
    return arguments | {"image_size": image_size or given["image_size"] // patch * patch, "patch_size": patch}


def decoder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` that describe a language model, without an image.

    Args:
        config: The content of `config.json`.

    Raises:
        ValueError: If the config has something that is not supported. The message names it.
    """
    given = _read(config, DECODERS)
    kind, dim, heads = given["model_type"], given["hidden_size"], given["num_attention_heads"]
    gpt2, dim_head = kind == "gpt2", given.get("head_dim") or dim // heads
    inner = 4 * dim if gpt2 and not given.get("intermediate_size") else given["intermediate_size"]
    arguments = _arguments("decoder", given, dim_head, inner)
    all_biased = gpt2 or given.get("attention_bias", False)
    bias = [*(_QKV if all_biased or kind == "qwen2" else ()), *(["to_out"] if all_biased else [])]
    norm, eps = ("LayerNorm", "layer_norm_epsilon") if gpt2 else ("RMSNorm", "rms_norm_eps")
    arguments["torch_layers"]["decoder"] |= {"norm": norm, "eps": given[eps], "bias": bias}
    if not gpt2:
        layers = {"use_rmsnorm": True, "ff_glu": True, "ff_no_bias": not given.get("mlp_bias", False)}
        layers |= {"attn_kv_heads": given.get("num_key_value_heads") or heads, **_rotary(given, dim_head)}
        arguments["decoder_kwargs"] |= layers | ({"attn_qk_rmsnorm": True} if kind == "qwen3" else {})
    if given["tie_word_embeddings"]:
        # x-transformers 2.30.5 and later scale these logits, unless told otherwise.
        scale = {"tie_embedding_scale": 1.0} if "tie_embedding_scale" in upstream_keywords("transformer") else {}
        arguments["transformer_kwargs"] = {"tie_embedding": True, **scale}
    arguments |= {"num_tokens": given["vocab_size"], "max_seq_len": given["max_position_embeddings"]}
    arguments |= {"use_abs_pos_emb": gpt2, "alibi_pos_bias": False, "rotary_xpos": False, "qk_norm": False}
    return arguments | _special_tokens(given)


def _read(config: Mapping[str, Any], families: Mapping[str, dict[str, Any]]) -> _Config:
    """Return a config with its defaults, under the names of most families."""
    kind = config.get("model_type", "")
    if kind not in families:
        towers = [name for name, tower in _VISION_TOWERS.items() if tower in families]
        raise ValueError(f"model_type={kind!r} is not supported: use one of {', '.join([*families, *towers])}")
    given = _Config(families[kind] | {name: value for name, value in config.items() if name != "mlp_ratio" or value})
    for name, wanted in _ONLY.items():
        if given.get(name, wanted) != wanted:
            raise ValueError(f"{name}={given[name]!r} is not supported, only {wanted!r}")
    given.update({name: given[old] for old, name in _GPT2.items() if kind == "gpt2" and old in given})
    for name in _SIZES:
        check_positive_int(name, given[name])
    return given


def _arguments(part: str, given: Mapping[str, Any], dim_head: int, inner: int) -> dict[str, Any]:
    """Return the arguments that an encoder and a decoder have in common."""
    if (name := given["hidden_act"]) not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not supported: use one of {', '.join(_ACTIVATIONS)}")
    activation, torch_layers = _ACTIVATIONS[name]
    dim, depth, heads = (given[name] for name in _SIZES)
    mult = inner / dim if int(dim * (inner / dim)) == inner else math.nextafter(inner / dim, math.inf)
    layers = {"attn_dim_head": dim_head, "ff_mult": mult, "norm_add_unit_offset": False, **activation}
    layers |= {"attn_project_out": True} if heads == 1 else {}
    sizes = {f"{part}_dim": dim, f"{part}_depth": depth, f"{part}_heads": heads}
    return {**sizes, f"{part}_kwargs": layers, "torch_layers": {part: dict(torch_layers)}}


def _rotary(given: Mapping[str, Any], dim_head: int) -> dict[str, Any]:
    rope = {"rope_theta": given.get("rope_theta") or 1e4} | dict(given.get("rope_scaling") or {})
    rope |= dict(given.get("rope_parameters") or {})
    kind, part = rope.get("rope_type") or rope.get("type") or "default", rope.get("partial_rotary_factor", 1)
    if kind != "default" or part != 1:
        raise ValueError(f"rope_type={kind!r}, partial_rotary_factor={part} is not supported, only 'default' and 1")
    window, longest = given.get("sliding_window"), given["max_position_embeddings"]
    if window and window < longest and given.get("use_sliding_window", True):
        rule = f"sliding_window={window} below max_position_embeddings={longest} is not supported"
        raise ValueError(f"{rule}: for texts of at most {window} tokens, set max_position_embeddings to {window}")
    # Upstream's base is 1e4 times this factor to the power of d / (d - 2).
    factor = (rope["rope_theta"] / 1e4) ** ((dim_head - 2) / dim_head)
    return {"rotary_pos_emb": True, "rotary_emb_dim": dim_head, "rotary_base_rescale_factor": factor}


def _special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids that begin, end and fill texts, as far as the vocabulary has them."""

    def known(name: str) -> list[Any]:
        value: Any = given.get(f"{name}_token_id")
        tokens = value if isinstance(value, list | tuple) else [value]
        return [token for token in tokens if is_int(token) and 0 <= token < given["vocab_size"]]

    bos, eos, pad = map(known, ("bos", "eos", "pad"))
    found: dict[str, Any] = {"bos_token": bos[0]} if bos else {}
    found |= {"eos_token": eos[0] if len(eos) == 1 else eos} if eos else {}
    return found | ({"autoregressive_kwargs": {"pad_value": pad[0]}} if pad else {})
