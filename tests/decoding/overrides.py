"""Every keyword of upstream's decoder, with a simple valid value, alone and in pairs, as models with large weights."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers.x_transformers import TokenEmbedding

from palme_xt import PalmE, PalmEConfig
from palme_xt.mapping import MAPPING, upstream_keywords
from tests import overrides

DIM, TOKENS, CONTEXT = 32, 32, 5
SMALL: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "encoder_dim": 24,
    "encoder_depth": 1,
    "encoder_heads": 1,
    "num_tokens": TOKENS,
    "max_seq_len": 24,
    "decoder_dim": DIM,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "alibi_num_heads": 2,
    "encoder_kwargs": {"verbose": False},
    "decoder_kwargs": {"attn_dim_head": 8, "verbose": False},
}

# Other flags under which a keyword is tried, because many keywords exclude some of the flags.
NO_XPOS: list[dict[str, Any]] = [
    {"rotary_xpos": False},
    {"rotary_xpos": False, "attn_flash": False},
    {"rotary_xpos": False, "attn_flash": False, "alibi_pos_bias": False, "use_abs_pos_emb": True},
    {
        "rotary_xpos": False,
        "attn_flash": False,
        "alibi_pos_bias": False,
        "use_abs_pos_emb": True,
        "qk_norm": False,
    },
]
FLAGS: list[dict[str, Any]] = [{}, {"attn_flash": False}, {"attn_flash": False, "alibi_pos_bias": False}, *NO_XPOS]

# Values of keywords that need another one here, or are not overrides. Those behind a prefix are found without it, too.
VALUES: dict[str, Any] = overrides.VALUES | {
    "rotary_emb_dim": 4,
    "custom_layers": ("a", "c", "f", "a", "f", "c"),
    "layers_execute_order": (0, 1, 2, 0, 1, 2),
    "disable_abs_pos_emb": False,
    "rel_pos_kwargs": {"slopes": (1.0, 0.25)},
    "residual_fn_kwargs": {"learned": True},
    "hybrid_module": nn.GRU(DIM, DIM, batch_first=True),
    "hybrid_mask_kwarg": "mask",
    "hybrid_fold_axial_dim": 1,
    "dim_out": DIM,
    "latent_rope_subheads": 1,
    "data_dependent_alibi_kwargs": {"post_log_scale": 0.5},
    "attend_sdp_kwargs": {"enable_math": True},
    "softclamp_value": 2.0,
    "glu_gate_softclamp_value": 2.0,
    "glu_up_softclamp_value": 2.0,
    "embed_num_tokens": {"kind": 3},
    "memory_tokens_interspersed_every": 4,
    "logits_dim": TOKENS,
    "dim_pooled_tokens": 16,
    "token_emb": TokenEmbedding(DIM, TOKENS),
    "to_logits": nn.Linear(DIM, TOKENS),
    "dim_head": 16,
    "emb_frac_gradient": 0.5,
    "rel_pos_max_distance": 64,
}

# What a keyword needs beside it in order to run, or to have an effect.
COMPANIONS: dict[str, dict[str, Any]] = {
    "attn_selective": {"decoder_kwargs": {"cross_attn_selective": False}},
    "attn_use_cope": {"decoder_kwargs": {"cross_attn_use_cope": False}},
    "attn_data_dependent_alibi": {"decoder_kwargs": {"cross_attn_data_dependent_alibi": False}},
    "attn_data_dependent_alibi_per_row": {
        "decoder_kwargs": {"attn_data_dependent_alibi": True, "cross_attn_data_dependent_alibi": False}
    },
    "attn_orthog_projected_values": {"decoder_kwargs": {"cross_attn_orthog_projected_values": False}},
    "attn_orthog_projected_values_per_head": {"decoder_kwargs": {"cross_attn_orthog_projected_values_per_head": False}},
    "attn_use_latent_q": {"decoder_kwargs": {"attn_dim_latent_q": 8}},
    "attn_use_latent_kv": {"decoder_kwargs": {"attn_dim_latent_kv": 8}},
    "cross_attn_use_latent_q": {"decoder_kwargs": {"cross_attn_dim_latent_q": 8}},
    "cross_attn_use_latent_kv": {"decoder_kwargs": {"cross_attn_dim_latent_kv": 8}},
    "attn_latent_rope_subheads": {
        "decoder_kwargs": {
            "attn_use_latent_kv": True,
            "attn_dim_latent_kv": 8,
            "cross_attn_latent_rope_subheads": None,
        }
    },
    "attn_hybrid_module": {"decoder_kwargs": {"attn_hybrid_fold_axial_dim": 1, "cross_attn_hybrid_module": None}},
    "attn_gate_values_rank": {"decoder_kwargs": {"attn_gate_values": True}},
    "attn_output_gate_rank": {"decoder_kwargs": {"attn_output_gate": True}},
    "attn_aggregated_residuals": {"decoder_kwargs": {"attn_aggregated_residual_kwargs": {"lora_rank": 4}}},
    "gated_multi_residual": {
        "decoder_kwargs": {"num_residual_streams": 2, "residual_fn_kwargs": {"read_gate_rank": 4}}
    },
    "qkv_receive_diff_residuals": {"decoder_kwargs": {"num_residual_streams": 2}},
    "unet_skips": {"decoder_depth": 3},
    "scaled_sinu_pos_emb": {"rotary_xpos": False, "use_abs_pos_emb": True},
    "looped": {"decoder_kwargs": {"pre_and_post_norm": True}},
    "memory_tokens_interspersed_every": {"transformer_kwargs": {"num_memory_tokens": 2}},
    "tie_embedding_scale": {"transformer_kwargs": {"tie_embedding": True}},
    "dim_pooled_tokens": {"transformer_kwargs": {"attn_pool": True}},
}

KEYWORDS = [(part, name) for part in ("decoder", "transformer") for name in upstream_keywords(part)]
KEYWORDS = [(part, name) for part, name in KEYWORDS if name not in MAPPING[part]]

Arguments = dict[str, Any]


def simple_value(part: str, name: str) -> Any:
    """Return a simple valid value of a keyword that is not its default."""
    bare = next((name.removeprefix(p) for p in ("cross_attn_", "attn_", "ff_") if name.startswith(p)), name)
    default = upstream_keywords(part)[name]
    for known in name, bare:
        if known in VALUES:
            return VALUES[known]
    if isinstance(default, bool):
        return not default
    return {int: lambda: default + 1, float: lambda: default + 0.25}[type(default)]()


def merged(*arguments: Arguments) -> Arguments:
    """Return arguments of a config together, and their override dicts too. Later ones win."""
    together: Arguments = {}
    for name in dict.fromkeys(itertools.chain(*arguments)):
        values = [given[name] for given in arguments if name in given]
        together[name] = functools.reduce(lambda a, b: a | b, values) if name.endswith("_kwargs") else values[-1]
    return together


def variants(part: str, name: str, flags: list[dict[str, Any]]) -> Iterator[Arguments]:
    """Yield arguments of configs with a keyword, and with what it needs beside it, under different flags."""
    given = {f"{part}_kwargs": {name: simple_value(part, name)}}
    for others in flags:
        yield merged(SMALL, others, COMPANIONS.get(name, {}), given)


def pairs(count: int, seed: int = 0) -> Iterator[Arguments]:
    """Yield arguments of configs with two keywords."""
    chooser = random.Random(seed)
    for _ in range(count):
        one, two = (next(variants(*keyword, [{}])) for keyword in chooser.sample(KEYWORDS, 2))
        needed = [COMPANIONS.get(name, {}) for name in (*one["decoder_kwargs"], *two["decoder_kwargs"])]
        yield merged(SMALL, chooser.choice(FLAGS), *needed, one, two)


def built(arguments: Arguments) -> PalmE | None:
    """Return a model in float64 whose weights are large enough for every part to matter.

    Returns:
        The model, or None if upstream refuses to build it, or cannot compute the logits of a text.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = PalmE.from_config(PalmEConfig(**arguments)).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
            ids, context = texts()
            logits = model.decoder.net(ids[:1], context=context[:1])
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError, IndexError):
        return None
    return model if logits.isfinite().all() else None


def texts() -> tuple[Tensor, Tensor]:
    """Return two texts of token ids `(2, 6)`, and a context `(2, p, d)` for each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(TOKENS, (2, 6), generator=generator)
    return ids, torch.randn(2, CONTEXT, SMALL["encoder_dim"], dtype=torch.float64, generator=generator)
