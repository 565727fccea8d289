"""What a `config.json` of Hugging Face means in arguments of `PalmEConfig`, for each family of models.

`families.json` has, for each family:

defaults      options of transformers that a `config.json` may leave out
renamed       options that are called otherwise in most families
layers        keywords of `x_transformers.Encoder` or `Decoder`
cls           the number of CLS tokens
vit           keywords of `x_transformers.ViTransformerWrapper`
torch_layers  as in `PalmEConfig`
eps           the option that holds the epsilon of the norms
bias          the projections that have a bias, always or if an option says so

Under "modules" is the part of a model that each module of x-transformers is, where "a." stands for the attention of a
layer, and "f." for its feedforward. Under "tensors" are the names of each part in checkpoints, which depend on the
family and on the release of transformers. Under "unused" are regular expressions for names of tensors that are read
only if the module has them.
"""

import json
import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from palme_xt.config import check_positive_int, is_int
from palme_xt.mapping import upstream_keywords

FAMILIES: dict[str, Any] = json.loads((files("palme_xt.pretrained") / "families.json").read_text())


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
    given, family = _read(config, "encoder")
    arguments, patch = _arguments("encoder", given, family), given["patch_size"]
    registers = family["cls"] + given.get("num_register_tokens", 0)
    vit = {"channels": given["num_channels"], "num_register_tokens": registers}
    # Of an image whose size is no multiple of the patch's, the models see the whole patches alone.
    size = given["image_size"] // patch * patch if image_size is None else image_size
    return arguments | {"vit_kwargs": vit | family["vit"], "image_size": size, "patch_size": patch}


def decoder_arguments(config: Mapping[str, Any], max_seq_len: int | None = None) -> dict[str, Any]:
    """Return the arguments of `PalmEConfig` that describe a language model.

    Args:
        config: The content of `config.json`.
        max_seq_len: Length in tokens of the longest text, instead of that in `config`.

    Raises:
        TypeError: If `max_seq_len` is not an int.
        ValueError: If it is too large, or the config has something that is not supported. The message names it.
    """
    given, family = _read(config, "decoder")
    if gpt2 := given["model_type"] == "gpt2":
        given.setdefault("intermediate_size", 4 * given["hidden_size"])
    arguments = _arguments("decoder", given, family)
    heads, longest = given["num_attention_heads"], given["max_position_embeddings"]
    if max_seq_len is not None and check_positive_int("max_seq_len", max_seq_len) > longest:
        raise ValueError(f"max_seq_len={max_seq_len} must be at most its max_position_embeddings={longest}")
    if not gpt2:
        layers = {"attn_kv_heads": given.get("num_key_value_heads", heads), "ff_no_bias": not given.get("mlp_bias")}
        arguments["decoder_kwargs"] |= layers | _rotary(given, max_seq_len)
    if given["tie_word_embeddings"]:
        # x-transformers 2.30.5 and later scale these logits, unless told otherwise.
        tied = {"tie_embedding": True, "tie_embedding_scale": 1.0}
        arguments["transformer_kwargs"] = {
            name: tied[name] for name in tied if name in upstream_keywords("transformer")
        }
    arguments |= {"num_tokens": given["vocab_size"], "max_seq_len": max_seq_len or longest, "use_abs_pos_emb": gpt2}
    arguments |= {"alibi_pos_bias": False, "alibi_num_heads": min(4, heads), "rotary_xpos": False, "qk_norm": False}
    return arguments | _special_tokens(given)


def _read(config: Mapping[str, Any], part: str) -> tuple[_Config, dict[str, Any]]:
    """Return a config with its defaults, under the names of most families, and what `families.json` says of it."""
    kind, families, towers = config.get("model_type", ""), FAMILIES[part], FAMILIES["vision_towers"]
    if "vision_config" in config and towers.get(kind) in families:
        return _read({"model_type": towers[kind], **config["vision_config"]}, part)
    if kind not in families:
        names = [*families, *(name for name, tower in towers.items() if tower in families)]
        raise ValueError(f"model_type={kind!r} is not supported: use one of {', '.join(names)}")
    defaults, renamed = families[kind]["defaults"], families[kind].get("renamed", {})
    given = _Config(defaults | {name: value for name, value in config.items() if value is not None})
    if config.get("sliding_window", 0) is None:  # no window, rather than the default one
        given.pop("sliding_window", None)
    given |= {new: given[old] for old, new in renamed.items() if old in given}
    for name, wanted in FAMILIES["only"].items():
        if given.get(name, wanted) != wanted:
            raise ValueError(f"{name}={given[name]!r} is not supported, only {wanted!r}")
    return given, families[kind]


def _arguments(part: str, given: _Config, family: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that an encoder and a decoder have in common."""
    if (name := given["hidden_act"]) not in FAMILIES["activations"]:
        raise ValueError(f"hidden_act={name!r} is not supported: use one of {', '.join(FAMILIES['activations'])}")
    activation = FAMILIES["activations"][name]
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    dim, depth, heads = (check_positive_int(size, given[size]) for size in sizes)
    inner = int(dim * given["mlp_ratio"]) if "mlp_ratio" in family["defaults"] else given["intermediate_size"]
    mult = inner / dim if int(dim * (inner / dim)) == inner else math.nextafter(inner / dim, math.inf)
    layers = {"attn_dim_head": given.get("head_dim", dim // heads), "ff_mult": mult, "norm_add_unit_offset": False}
    layers |= family["layers"] | activation.get("layers", {}) | ({"attn_project_out": True} if heads == 1 else {})
    bias = [name for name, option in family["bias"].items() if option is True or given[option]]
    norms = family["torch_layers"] | activation.get("torch_layers", {}) | {"eps": given[family["eps"]], "bias": bias}
    arguments = {f"{part}_dim": dim, f"{part}_depth": depth, f"{part}_heads": heads}
    return {**arguments, f"{part}_kwargs": layers, "torch_layers": {part: norms}}


def _rotary(given: _Config, max_seq_len: int | None) -> dict[str, Any]:
    """Return the keywords of rotary positions, for texts of at most `max_seq_len` tokens."""
    rope = {"rope_theta": given.get("rope_theta", 1e4), **given.get("rope_parameters", {})}
    rope |= {"rope_type": None} | scaling if (scaling := given.get("rope_scaling")) else {}  # wins in transformers
    kind, part = rope.get("rope_type") or rope.get("type") or "default", rope.get("partial_rotary_factor", 1)
    if kind != "default" or part != 1:
        raise ValueError(f"rope_type={kind!r}, partial_rotary_factor={part} is not supported, only 'default' and 1")
    window, longest = given.get("sliding_window"), max_seq_len or given["max_position_embeddings"]
    if window and window < longest and given.get("use_sliding_window", True):
        rule = f"sliding_window={window} is not supported for longer texts, and they may have {longest} tokens"
        raise ValueError(f"{rule}: if yours have at most {window}, pass max_seq_len={window}")
    size = given.get("head_dim", given["hidden_size"] // given["num_attention_heads"])
    # Upstream's base is 1e4 times this factor to the power of d / (d - 2).
    factor = (rope["rope_theta"] / 1e4) ** ((size - 2) / size)
    return {"rotary_pos_emb": True, "rotary_emb_dim": size, "rotary_base_rescale_factor": factor}


def _special_tokens(given: _Config) -> dict[str, Any]:
    """Return the ids that begin, end and fill texts, as far as the vocabulary has them."""

    def known(name: str) -> list[Any]:
        value: Any = given.get(f"{name}_token_id")
        tokens = value if isinstance(value, list | tuple) else [value]
        return [token for token in tokens if is_int(token) and 0 <= token < given["vocab_size"]]

    bos, eos, pad = map(known, ("bos", "eos", "pad"))
    found: dict[str, Any] = {"bos_token": bos[0]} if bos else {}
    found |= {"eos_token": eos[0] if len(eos) == 1 else eos} if eos else {}
    return found | ({"autoregressive_kwargs": {"pad_value": pad[0]}} if pad else {})
