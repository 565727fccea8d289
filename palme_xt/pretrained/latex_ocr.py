"""The decoder of a LaTeX-OCR checkpoint (`pix2tex`), which x-transformers 0.15 runs, as modules of today's release."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from palme_xt.adoption import ARGUMENTS
from palme_xt.config import PalmEConfig
from palme_xt.upstream.loss import AutoregressiveWrapper
from palme_xt.wiring import DECODER, build

NEEDED = ("dim", "num_layers", "heads", "num_tokens", "max_seq_len", "bos_token", "eos_token", "pad_token")
# The options of x-transformers 0.15 that mean the same today. What they leave out has the same default in both.
OPTIONS = ["attn_dim_head", "attn_dropout", "attn_on_attn", "ff_dropout", "ff_glu", "ff_mult"]
OPTIONS += ["rel_pos_bias", "rel_pos_max_distance", "rel_pos_num_buckets"]
# Of names in today's state dicts, what was called otherwise in 0.15.
_RENAMED = {
    r"\.token_emb\.emb\.": ".token_emb.",
    r"\.attn_layers\.final_norm\.": ".norm.",
    r"(\.layers\.\d+\.0)\.0\.": r"\1.",
    r"(\.layers\.\d+\.1)\.ff\.": r"\1.net.",
}
_POSITIONS = "net.pos_emb.emb.weight"


def load_decoder(weights: Mapping[str, Tensor], args: Any) -> AutoregressiveWrapper:
    """Return the decoder of a LaTeX-OCR model, for `PalmE.from_modules` or `PalmE(encoder=...)`, in float32.

    Its logits are those of the old release, bitwise on the CPU if `dim` is a power of 4 (256 in `pix2tex`), and up to
    rounding otherwise. It comes with its arguments, tokens included, so that `generate(img)` needs no others.

    Args:
        weights: The state dict of the whole model, of which `decoder.*` is read, or that of its decoder.
        args: The configuration that the model was trained with, `config.yaml` in `pix2tex`, as a mapping or an object
            with attributes. `dim`, `num_layers`, `heads`, `num_tokens`, `max_seq_len`, `decoder_args`, `bos_token`,
            `eos_token` and `pad_token` are read.

    Raises:
        TypeError: If `weights` is not a mapping.
        ValueError: If `args` lacks one of these, or has an option in `decoder_args` that today's x-transformers has
            not, or that is not converted, or if a tensor is missing, unknown, or of another shape.
    """
    if not isinstance(weights, Mapping):
        given = f"weights is a {type(weights).__name__}, must be a state dict"
        raise TypeError(f"{given}: read the file with torch.load(path, map_location='cpu', weights_only=True)")
    arguments = _arguments(args if isinstance(args, Mapping) else getattr(args, "__dict__", {}))
    decoder: AutoregressiveWrapper = build(DECODER, PalmEConfig(**arguments))
    found = {name.removeprefix("decoder."): t for name, t in weights.items() if name.startswith(("decoder.", "net."))}
    loaded = {}
    for name, tensor in decoder.state_dict().items():
        old = name
        for pattern, replacement in _RENAMED.items():
            old = re.sub(pattern, replacement, old)
        if old not in found:
            raise ValueError(f"weights has no {old!r}, nor 'decoder.{old}', which a decoder of these args has")
        loaded[name] = found.pop(old)
        if loaded[name].shape != tensor.shape:
            shapes = f"{tuple(loaded[name].shape)}, must be {tuple(tensor.shape)}"
            raise ValueError(f"weights[{old!r}] has shape {shapes} for these args")
    if found:
        raise ValueError(f"weights has {sorted(found)[0]!r}, which a decoder of these args has not")
    if _POSITIONS in loaded:  # today's release multiplies them by dim ** -0.5
        loaded[_POSITIONS] = loaded[_POSITIONS].to(torch.float32) * arguments["decoder_dim"] ** 0.5
    decoder.load_state_dict(loaded)
    setattr(decoder, ARGUMENTS, arguments)
    return decoder


def _arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` for the decoder that `pix2tex.models.transformer.get_decoder` builds."""
    if missing := [name for name in NEEDED if name not in args]:
        raise ValueError(f"args has no {missing[0]!r}: pass the configuration that the model was trained with")
    options = {"pre_norm": True, **(args.get("decoder_args") or {})}
    converted = {*OPTIONS, "cross_attend", "pre_norm"}  # what is off, as it is by default, needs no conversion
    unknown = [name for name, value in options.items() if value and name not in converted]
    for name in unknown + ["pre_norm"] * (not options["pre_norm"]):
        given = f"args.decoder_args[{name!r}]={options[name]!r}"
        raise ValueError(f"{given} is not converted to today's x-transformers: only {', '.join(OPTIONS)} are")
    return {
        "encoder_dim": args["dim"],
        "num_tokens": args["num_tokens"],
        "max_seq_len": args["max_seq_len"],
        "decoder_dim": args["dim"],
        "decoder_depth": args["num_layers"],
        "decoder_heads": args["heads"],
        "use_abs_pos_emb": not options.get("rel_pos_bias"),
        "cross_attend": bool(options.get("cross_attend")),
        "alibi_pos_bias": False,
        "rotary_xpos": False,
        "attn_flash": False,  # it computes the same with other rounding
        "qk_norm": False,
        # With one head, today's release leaves out `to_out`.
        "decoder_kwargs": {name: options[name] for name in OPTIONS if name in options} | {"attn_project_out": True},
        "autoregressive_kwargs": {"pad_value": args["pad_token"]},
        "bos_token": args["bos_token"],
        "eos_token": args["eos_token"],
        "torch_layers": {"decoder": {"norm": "LayerNorm", "bias": ("to_out", "to_logits")}},
        "sources": {"decoder": "LaTeX-OCR"},
    }
