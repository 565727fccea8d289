"""Every override that x-transformers accepts, each with a value that is not its default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from palme_xt.mapping import MAPPING, argument_behind, upstream_keywords

# Values that do not follow from the default. Behind a prefix, keywords have the same value.
VALUES: dict[str, Any] = {
    "attn_aggregated_residual_kwargs": {"lora_rank": 4},
    "attend_sdp_kwargs": {"enable_flash": False, "enable_math": True, "enable_mem_efficient": False},
    "channels": 1,
    "custom_activation": nn.Tanh(),
    "custom_attn_fn": torch.sigmoid,
    "custom_layers": ("a", "c", "f", "c", "f"),
    "data_dependent_alibi_kwargs": {"bias_init": 3.0},
    "dim_condition": 16,
    "dim_head": 4,
    "dim_latent_kv": 8,
    "dim_latent_q": 8,
    "disable_abs_pos_emb": True,
    "emb_dim": 16,
    "gate_values_rank": 4,
    "ignore_index": -1,
    "inverted_attention": True,
    "kv_heads": 2,
    "layers_execute_order": (0, 1, 2, 0, 1, 2, 3, 4, 5),
    "logits_dim": 40,
    "mask_prob": 0.2,
    "max_attend_past": 3,
    "memory_tokens_interspersed_every": 2,
    "mult": 2,
    "num_classes": 5,
    "num_memory_tokens": 2,
    "num_register_tokens": 2,
    "num_residual_streams": 2,
    "output_gate_rank": 4,
    "pad_value": 3,
    "par_ratio": 3,
    "project_out": True,
    "qk_norm_groups": 2,
    "rel_pos_kwargs": {"slopes": (0.5, 0.25)},
    "residual_fn_kwargs": {"read_gate_rank": 4},
    "rotary_emb_dim": 8,
    "rotate_num_heads": 2,
    "sandwich_coef": 1,
    "shift_tokens": 1,
    "softclamp_value": 5.0,
    "sparse_topk": 2,
    "tie_embedding_scale": 0.5,
    "value_dim_head": 4,
}

# What an override needs to have an effect, or to be accepted. Behind a prefix, it needs the same behind that prefix.
NEEDS: dict[str, dict[str, Any]] = {
    "attn_aggregated_residuals": {"attn_aggregated_residual_kwargs": {"lora_rank": 4}},
    "attn_aggregated_residual_kwargs": {"attn_aggregated_residuals": True},
    "cope_max_pos": {"use_cope": True},
    "cope_soft_onehot_pos": {"use_cope": True},
    "cope_talking_heads": {"use_cope": True},
    "dim_latent_kv": {"use_latent_kv": True},
    "dim_latent_q": {"use_latent_q": True},
    "dynamic_tanh_init_alpha": {"use_dynamic_tanh": True},
    "gate_values_rank": {"gate_values": True},
    "gate_values_headwise": {"gate_values": True},
    "glu_gate_softclamp_value": {"glu": True, "glu_softclamp": True},
    "glu_mult_bias": {"glu": True},
    "glu_softclamp": {"glu": True},
    "glu_up_softclamp_value": {"glu": True, "glu_softclamp": True},
    "gumbel_softmax_hard": {"gumbel_softmax": True},
    "gumbel_softmax_temp": {"gumbel_softmax": True},
    "hyper_conn_sinkhorn_iters": {"num_residual_streams": 2},
    "laser_softclamp_value": {"laser": True},
    "layer_integrate_use_softmax": {"integrate_layers": True},
    "layerscale_init_value": {"use_layerscale": True},
    "learned_value_residual_mix": {"add_value_residual": True},
    "logit_softclamp_value": {"softclamp_logits": True},
    "low_rank_silu_gates": {"gate_values": True, "gate_values_rank": 4},
    "memory_tokens_interspersed_every": {"num_memory_tokens": 2},
    "mixture_of_softmax_k": {"mixture_of_softmax": True},
    "orthog_projected_values": {"value_dim_head": 8},
    "output_gate_headwise": {"output_gate": True},
    "output_gate_rank": {"output_gate": True},
    "qk_norm_dim_scale": {"qk_norm": True},
    "qk_norm_groups": {"qk_norm": True},
    "qk_norm_scale": {"qk_norm": True},
    "qkv_receive_diff_residuals": {"num_residual_streams": 2},
    "rel_pos_max_distance": {"rel_pos_bias": True},
    "rel_pos_num_buckets": {"rel_pos_bias": True},
    "rel_proj_max_dist": {"use_rel_proj_pos_bias": True},
    "rel_proj_num_distance_basis": {"use_rel_proj_pos_bias": True},
    "rotary_base_rescale_factor": {"rotary_pos_emb": True},
    "rotary_interpolation_factor": {"rotary_pos_emb": True},
    "softclamp_output_value": {"softclamp_output": True},
    "sparse_topk_straight_through": {"sparse_topk": 2},
    "swiglu_values": {"gate_values": True},
    "tie_embedding_scale": {"tie_embedding": True},
    "use_latent_kv": {"dim_latent_kv": 8},
    "use_latent_q": {"dim_latent_q": 8},
}


def overrides() -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Yield each part, keyword and value, and the keywords of the part that it needs."""
    for part in MAPPING:
        for keyword, default in upstream_keywords(part).items():
            prefix = next(prefix for prefix in ("cross_attn_", "attn_", "ff_", "") if keyword.startswith(prefix))
            name = keyword.removeprefix(prefix) if keyword not in NEEDS.keys() | VALUES.keys() else keyword
            prefix = keyword.removesuffix(name)
            value = VALUES[name] if name in VALUES else _changed(name, default)
            if value is not None and argument_behind(part, keyword) is None and keyword != "verbose":
                needs = {prefix + needed: given for needed, given in NEEDS.get(name, {}).items()}
                yield (
                    part,
                    keyword,
                    value,
                    {key: given for key, given in needs.items() if not argument_behind(part, key)},
                )


def _changed(name: str, default: Any) -> Any:
    """Return another value than the default, or None if it has no type."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, float) and ("dropout" in name or default == 0):
        return 0.5
    return default * 2 or 1 if isinstance(default, int | float) else None
