"""The decoder of a LaTeX-OCR checkpoint (`pix2tex`), which x-transformers 0.15 runs, as modules of today's release."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from palme_xt.config import PalmEConfig
from palme_xt.pretrained.families import FAMILIES
from palme_xt.pretrained.tensors import Tensors
from palme_xt.storage.files import explained
from palme_xt.upstream.loss import AutoregressiveWrapper

# arguments: where `args` has each argument of `PalmEConfig`; always: arguments that are the same for all models;
# options: those of x-transformers 0.15 that mean the same today, and have the same default where they are left out;
# renamed: of names in today's state dicts, what was called otherwise in 0.15.
_TABLES = FAMILIES["latex_ocr"]


def load_decoder(weights: Mapping[str, Tensor], args: Any) -> AutoregressiveWrapper:
    """Return the decoder of a LaTeX-OCR model, for `PalmE.from_modules` or `PalmE(encoder=...)`, in float32.

    Its logits are those of the old release, bitwise on the CPU if `dim` is a power of 4 (256 in `pix2tex`), and up to
    rounding otherwise. It comes with its arguments, tokens included, so that `generate(img)` needs no others.

    Args:
        weights: The state dict of the whole model, of which `decoder.*` is read, or that of its decoder.
        args: The configuration that the model was trained with, `config.yaml` in `pix2tex`, as a mapping or an object
            with attributes. `dim`, `num_layers`, `heads`, `num_tokens`, `max_seq_len`, `decoder_args`, `bos_token`,
            `eos_token` and `pad_token` are read.

    Returns:
        The decoder on the CPU, in eval mode.

    Raises:
        TypeError: If `weights` is not a mapping.
        ValueError: If `args` lacks one of these, or has an option in `decoder_args` that today's x-transformers has
            not, or that is not converted, or if a tensor is missing, unknown, or of another shape.
    """
    if not isinstance(weights, Mapping):
        given = f"weights is a {type(weights).__name__}, must be a state dict"
        raise TypeError(f"{given}: read the file with torch.load(path, map_location='cpu', weights_only=True)")
    arguments = _arguments(args if isinstance(args, Mapping) else getattr(args, "__dict__", {}))
    own = [name for name in weights if name.startswith(("decoder.", "net."))]
    readers = {name.removeprefix("decoder."): weights[name].detach for name in own}
    with explained("weights, with these args, cannot be loaded"):
        return _OldTensors(readers).load("decoder", arguments)  # type: ignore[no-any-return]


class _OldTensors(Tensors):
    def translate(self, name: str, config: PalmEConfig) -> Tensor:
        for pattern, replacement in _TABLES["renamed"].items():
            name = re.sub(pattern, replacement, name)
        # Today's release multiplies positions by dim ** -0.5.
        return self.read(name) * (config.decoder_dim**0.5 if name == "net.pos_emb.emb.weight" else 1)


def _arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` for the decoder that `pix2tex.models.transformer.get_decoder` builds."""
    if missing := [name for name in [*_TABLES["arguments"].values(), "pad_token"] if name not in args]:
        raise ValueError(f"args has no {missing[0]!r}: pass the configuration that the model was trained with")
    options, converted = {"pre_norm": True, **(args.get("decoder_args") or {})}, _TABLES["options"]
    # What is off, as it is by default, needs no conversion.
    unknown = [name for name, on in options.items() if on and name not in [*converted, "cross_attend", "pre_norm"]]
    for name in unknown + ["pre_norm"] * (not options["pre_norm"]):
        given = f"args.decoder_args[{name!r}]={options[name]!r}"
        raise ValueError(f"{given} is not converted to today's x-transformers: only {', '.join(converted)} are")
    return {
        **{argument: args[name] for argument, name in _TABLES["arguments"].items()},
        **_TABLES["always"],  # without flash attention, which computes the same with other rounding
        "use_abs_pos_emb": not options.get("rel_pos_bias"),
        "cross_attend": bool(options.get("cross_attend")),
        # With one head, today's release leaves out `to_out`.
        "decoder_kwargs": {name: options[name] for name in converted if name in options} | {"attn_project_out": True},
        "autoregressive_kwargs": {"pad_value": args["pad_token"]},
    }
