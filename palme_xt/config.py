"""The 17 arguments of PalmE and its five override dicts: validated, frozen, and converted to JSON and back."""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, FrozenInstanceError, dataclass, field, fields
from numbers import Integral
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from palme_xt.mapping import MAPPING, SET_BY_COMPOSITION, argument_behind, upstream_keywords

_NO_LOGITS_FOR_EACH_TOKEN = ("use_cls_token", "average_pool_embed", "return_only_embed", "num_output_heads")
# x-transformers 2.26.0 to 2.31.10: with these `decoder_kwargs`, the logits of a token depend on the tokens after it, or
# on their number. `test_exactly_the_keywords_that_see_later_tokens_are_warned_of` tries all keywords.
_SEE_LATER_TOKENS = ["orthog_residual", "mv_split_residual", "cross_attn_inverted_attention", "cross_attn_causal"]
_INHERITED = ("cross_attn_use_rel_proj_pos_bias", "cross_attn_max_attend_past")  # from the same name without `cross_`
_SEE_LATER_TOKENS += ["attn_orthog_projected_values", "attn_orthog_projected_values_per_head", *_INHERITED]
# x-transformers 2.26.0 to 2.31.10: memories are no part of `attn_mask`. The other two send flash attention down a path
# that is always causal.
_NO_MASK = [("transformer", "num_memory_tokens"), ("decoder", "attn_num_mem_kv")]
_NO_MASK += [("decoder", "attn_add_zero_kv"), ("decoder", "attn_l2_distance")]
_RESIDUALS = ("integrate_layers", "attn_aggregated_residuals", "gated_multi_residual")  # each a further stream


@dataclass(frozen=True)
class PalmEConfig:
    """The arguments of PalmE: validated, frozen, hashable, and equal after a round trip through JSON.

    Sizes are in pixels and lengths in tokens. All numbers are positive ints.

    Args:
        image_size: Height and width of the square images. Must be divisible by `patch_size`.
        patch_size: Height and width of a patch. An image has `(image_size / patch_size) ** 2` patches.
        encoder_dim: Width of the ViT encoder, and of the context that the decoder cross-attends to.
        encoder_depth: Number of layers in the encoder.
        encoder_heads: Number of attention heads in the encoder, each with 64 dimensions unless
            `encoder_kwargs["attn_dim_head"]` is given.
        num_tokens: Size of the vocabulary. Token ids are `0 .. num_tokens - 1`.
        max_seq_len: Longest text that decoding produces, and the size of the embedding table of `use_abs_pos_emb`.
        decoder_dim: Width of the decoder. It may differ from `encoder_dim`.
        decoder_depth: Number of blocks in the decoder (self-attention, cross-attention, feedforward).
        decoder_heads: Number of attention heads in the decoder, each with 64 dimensions unless
            `decoder_kwargs["attn_dim_head"]` is given.
        alibi_num_heads: Number of heads with an ALiBi bias, `1 .. decoder_heads`. Unused without `alibi_pos_bias`.
        use_abs_pos_emb: Add learned absolute positions to the token embeddings. Text then has at most `max_seq_len`
            tokens.
        cross_attend: Attend to the image. False builds a text-only decoder and never runs the encoder.
        alibi_pos_bias: Use ALiBi in the decoder's self-attention (Press et al. 2022, arXiv:2108.12409).
        rotary_xpos: Use rotary positions with xPos scaling in the decoder (Sun et al. 2022, arXiv:2212.10554).
        attn_flash: Use `scaled_dot_product_attention` in the decoder instead of upstream's einsums.
        qk_norm: l2-normalise queries and keys in the decoder (Henry et al. 2020, arXiv:2010.04245). Upstream's `attn_`
            prefix reaches cross-attention too. `decoder_kwargs={"cross_attn_qk_norm": False}` limits it to
            self-attention.
        vit_kwargs: Anything else that `x_transformers.ViTransformerWrapper` accepts.
        encoder_kwargs: Anything else that `x_transformers.Encoder` accepts.
        transformer_kwargs: Anything else that `x_transformers.TransformerWrapper` accepts.
        decoder_kwargs: Anything else that `x_transformers.Decoder` accepts.
        autoregressive_kwargs: Anything else that `x_transformers.AutoregressiveWrapper` accepts.
        bos_token: The id that texts begin with, which is the prompt if decoding is given none.
        eos_token: The id that ends a text, or a list of such ids, if decoding is given none.
        torch_layers: Layers of torch in place of upstream's, for weights of other libraries: under "encoder" and
            "decoder", keywords of `palme_xt.upstream.torch_layers.use_torch_layers`, or an "activation" ("gelu_tanh",
            "quick_gelu" or "relu").
        sources: Where the weights of the "encoder" and the "decoder" came from, for the reader.
        external_encoder: What `PalmE(encoder=...)` was given, which sets it: the class of a module, such as
            "timm.models.resnet.ResNet", or "none" for no encoder. None is the ViT that the arguments describe; the
            other two have no use for `patch_size`, `encoder_depth`, `encoder_heads`, `vit_kwargs` and `encoder_kwargs`.
        image_token: The id that stands for an image in a text, whose embeddings are read in its place, between those of
            the words (Driess et al. 2023, arXiv:2303.03378), after a linear `projection` to the width of the token
            embeddings. `cross_attend` becomes False. The id is no target, and is never decoded.
        image_attention: What an embedding of an image attends to: "causal" is what comes before it, as for words, and
            "full" all embeddings of its own image as well, as in PaliGemma (Beyer et al. 2024, arXiv:2407.07726). Then,
            ALiBi counts the distance in both directions. Only with an `image_token`.

    Raises:
        ValueError: If a number is out of range, or an override repeats an argument or is unknown to upstream.
        TypeError: If a value has the wrong type.
    """

    image_size: int = 256
    patch_size: int = 32
    encoder_dim: int = 512
    encoder_depth: int = 6
    encoder_heads: int = 8
    num_tokens: int = 20000
    max_seq_len: int = 1024
    decoder_dim: int = 512
    decoder_depth: int = 6
    decoder_heads: int = 8
    alibi_num_heads: int = 4
    use_abs_pos_emb: bool = False
    cross_attend: bool = True
    alibi_pos_bias: bool = True
    rotary_xpos: bool = True
    attn_flash: bool = True
    qk_norm: bool = True
    _: KW_ONLY
    vit_kwargs: dict[str, Any] = field(default_factory=dict)
    encoder_kwargs: dict[str, Any] = field(default_factory=dict)
    transformer_kwargs: dict[str, Any] = field(default_factory=dict)
    decoder_kwargs: dict[str, Any] = field(default_factory=dict)
    autoregressive_kwargs: dict[str, Any] = field(default_factory=dict)
    bos_token: int | None = None
    eos_token: int | Sequence[int] | None = None
    torch_layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    external_encoder: str | None = None
    image_token: int | None = None
    image_attention: str = "causal"

    def __post_init__(self) -> None:
        for argument in fields(self):
            value = _freeze(getattr(self, argument.name))
            object.__setattr__(self, argument.name, value)
            if argument.type == "int":
                check_positive_int(argument.name, value)
            elif argument.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{argument.name}={value!r} must be True or False, not {type(value).__name__}")
        if self.image_token is not None:
            object.__setattr__(self, "cross_attend", False)
        if self.torch_layers != {}:
            from palme_xt.upstream.torch_layers import check_torch_layers  # imported here, because few models need it

            check_torch_layers(self.torch_layers)
        for part in MAPPING:
            self._check_overrides(part, getattr(self, f"{part}_kwargs"))
        self._check_sizes()
        self._check_values_of_overrides()
        self._check_combinations()
        self._warn_of_dropped_positions()
        self._warn_of_later_tokens()

    def _check_overrides(self, part: str, overrides: Any) -> None:
        where = f"{part}_kwargs"
        if not isinstance(overrides, Mapping):
            raise TypeError(f"{where}={overrides!r} must be a dict of keywords for x-transformers")
        for key, value in overrides.items():
            given = f"{where}[{key!r}]={value!r}"
            if name := argument_behind(part, key):
                repeated = f"repeats the argument {name}={getattr(self, name)!r}: set {name}"
                raise ValueError(f"{given} {repeated}, and leave {key!r} out of {where}")
            if key in SET_BY_COMPOSITION:
                raise ValueError(f"{given} is set by PalmE itself: leave {key!r} out of {where}")
            if key not in (keys := upstream_keywords(part)):
                raise ValueError(f"{given} is not a keyword of the installed x-transformers: {did_you_mean(key, keys)}")

    def _check_sizes(self) -> None:
        if not isinstance(self.external_encoder, str | None):
            raise TypeError(f"external_encoder={self.external_encoder!r} must be the name of a class, 'none' or None")
        if self.external_encoder is None and self.image_size % self.patch_size:
            nearest = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            rule = f"image_size={self.image_size} must be divisible by patch_size={self.patch_size}"
            raise ValueError(f"{rule}: an image is cut into whole patches; use image_size={nearest}, for example")
        if self.alibi_pos_bias and self.alibi_num_heads > self.decoder_heads:
            rule = f"alibi_num_heads={self.alibi_num_heads} must be within 1..decoder_heads={self.decoder_heads}"
            raise ValueError(f"{rule} when alibi_pos_bias is on: lower alibi_num_heads, or raise decoder_heads")
        for part, heads in ("encoder", self.encoder_heads), ("decoder", self.decoder_heads):
            kv_heads, name = getattr(self, f"{part}_kwargs").get("attn_kv_heads"), f"{part}_kwargs['attn_kv_heads']"
            if kv_heads is not None and heads % check_positive_int(name, kv_heads):
                raise ValueError(f"{name}={kv_heads} must divide {part}_heads={heads}, for equal groups of query heads")

    def _check_values_of_overrides(self) -> None:
        for name in _NO_LOGITS_FOR_EACH_TOKEN:
            value = self.transformer_kwargs.get(name)
            if (value and value != 1) or value is True:
                given = f"transformer_kwargs[{name!r}]={value!r}"
                raise ValueError(f"{given} removes the logits of each token, which PalmE needs: leave {name!r} out")
        check_positive_int("vit_kwargs['channels']", self.channels)
        if not is_int(self.ignore_index):
            raise TypeError(f"autoregressive_kwargs['ignore_index']={self.ignore_index!r} must be an int")
        name = "autoregressive_kwargs['pad_value']"
        check_token_id(name, self.pad_value, self.num_tokens, "it is fed to the decoder")
        for name in "bos_token", "image_token":
            if getattr(self, name) is not None:
                check_token_id(name, getattr(self, name), self.num_tokens, "or pass None")
        others = [self.pad_value, self.bos_token, *self.check_eos_token(self.eos_token).tolist()]
        if self.image_token is not None and self.image_token in others:
            raise ValueError(f"image_token={self.image_token} is pad_value, bos_token or eos_token: use another id")
        if self.image_attention not in (["causal"] if self.image_token is None else ["causal", "full"]):
            raise ValueError(f"image_attention={self.image_attention!r} must be 'causal', or 'full' with image_token")

    def _check_combinations(self) -> None:
        """Reject overrides that x-transformers (2.26.0 to 2.31.10) builds, but crashes with or ignores."""
        given = self.transformer_kwargs
        same_dim = given.get("emb_dim") in (None, self.decoder_dim)
        flash = self.attn_flash or self.decoder_kwargs.get("cross_attn_flash")
        rules = [
            ("transformer", "logits_dim", "must be num_tokens", given.get("logits_dim") == self.num_tokens),
            ("transformer", "tie_embedding", "needs emb_dim=decoder_dim", same_dim),
            ("autoregressive", "add_attn_z_loss", "needs attn_flash=False", not flash),
        ]
        rules += [(*place, "needs image_attention='causal'", self.image_attention != "full") for place in _NO_MASK]
        for part in "encoder", "decoder":
            given = getattr(self, f"{part}_kwargs")
            several = given.get("num_residual_streams", 1) != 1 or any(given.get(name) for name in _RESIDUALS)
            rules.append((part, "qkv_receive_diff_residuals", "needs num_residual_streams=2 or more", several))
        for part, name, rule, kept in rules:
            value = getattr(self, f"{part}_kwargs").get(name)
            if value and not kept:
                raise ValueError(f"{part}_kwargs[{name!r}]={value!r} {rule}: otherwise, x-transformers crashes")

    def _warn_of_dropped_positions(self) -> None:
        others = any(map(self.decoder_kwargs.get, ("rotary_pos_emb", "rel_pos_bias", "polar_pos_emb")))
        dropped = self.decoder_kwargs.get("disable_abs_pos_emb") is None and (self.rotary_xpos or others)
        if self.use_abs_pos_emb and dropped:
            found = f"use_abs_pos_emb=True has no effect with rotary_xpos={self.rotary_xpos}"
            why = "x-transformers drops absolute positions when the decoder has rotary or relative ones"
            remedy = 'to keep both, pass decoder_kwargs={"disable_abs_pos_emb": False}'
            warnings.warn(f"{found}: {why}; {remedy}", stacklevel=4)

    def _warn_of_later_tokens(self) -> None:
        inherited = {name: self.decoder_kwargs.get(name.removeprefix("cross_")) for name in _INHERITED}
        for name, value in (inherited | self.decoder_kwargs).items():
            if value and name in _SEE_LATER_TOKENS and (self.cross_attend or not name.startswith("cross_")):
                found = f"decoder_kwargs[{name!r}]={value!r} lets the logits of a token depend on the tokens after it"
                warnings.warn(f"{found}, or on their number: training may leak the targets; turn it off", stacklevel=4)

    @property
    def channels(self) -> int:
        """Number of colour channels of an image: 3 unless `vit_kwargs` says otherwise, as in upstream."""
        return self.vit_kwargs.get("channels", 3)  # type: ignore[no-any-return]

    @property
    def ignore_index(self) -> int:
        """The id in `text` that is not a target: -100 unless `autoregressive_kwargs` says otherwise, as in upstream."""
        return self.autoregressive_kwargs.get("ignore_index", -100)  # type: ignore[no-any-return]

    @property
    def pad_value(self) -> int:
        """The id that fills `text` after its end: 0 unless `autoregressive_kwargs` says otherwise, as in upstream."""
        return self.autoregressive_kwargs.get("pad_value", 0)  # type: ignore[no-any-return]

    def keywords(self, part: str) -> dict[str, Any]:
        """Return the keywords for one of x-transformers' constructors, without the modules that it holds.

        Args:
            part: "vit", "encoder", "transformer", "decoder" or "autoregressive".
        """
        keywords = {keyword: getattr(self, name) for keyword, name in MAPPING[part].items()}
        keywords |= getattr(self, f"{part}_kwargs")
        # x-transformers up to 2.31.10 leaves `to_out` out of attention with one head, which then only runs if the head
        # is as wide as the model. In that case it is left out here too, so that hand-wired checkpoints keep loading.
        # The default width of a head, 64, is independent of the model's dim and heads.
        dim_head = keywords.get("attn_value_dim_head") or keywords.get("attn_dim_head", 64)
        if keywords.get("heads") == 1 and dim_head != keywords["dim"]:
            keywords.setdefault("attn_project_out", True)
        if name := self.torch_layers.get(part, {}).get("activation"):
            from palme_xt.upstream.torch_layers import ACTIVATIONS

            keywords["ff_custom_activation"] = ACTIVATIONS[name]()
        return keywords

    def check_eos_token(self, eos_token: Any) -> Tensor:
        """Return the ids that end a text, `(n,)`, for an `eos_token` of any form. None is that of the config.

        Raises:
            TypeError, ValueError: If there is anything but token ids.
        """
        found = self.eos_token if eos_token is None else eos_token
        tokens = list(found) if isinstance(found, list | tuple) else [] if found is None else [found]
        for token in tokens:
            check_token_id("eos_token", token, self.num_tokens, "or pass None")
        return torch.tensor(tokens, dtype=torch.long, device="cpu")

    def to_dict(self) -> dict[str, Any]:
        """Return all arguments, in order, as plain JSON types.

        Raises:
            TypeError: If an override has no JSON form.
        """
        return {argument.name: to_json_types(getattr(self, argument.name), argument.name) for argument in fields(self)}

    def to_json_string(self) -> str:
        """Return `to_dict` as JSON. Loggers of Hugging Face's `Trainer` call this."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config that `to_dict` converted. Missing arguments take their defaults.

        Raises:
            ValueError: If a key is not an argument, or a value is out of range.
            TypeError: If a value has the wrong type.
        """
        names = [argument.name for argument in fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(f"{key!r} is not an argument of PalmEConfig: {did_you_mean(key, names)}")
        return cls(**values)


@dataclass(frozen=True)
class UnprovenConfig(PalmEConfig):
    """A config of modules that compute something else than a model built from it: `PalmE.from_modules` made it.

    Its arguments can be read. Whatever builds, saves or prints a model from it raises an error.

    Args:
        difference: A description of the first difference.
    """

    difference: str = field(default="", kw_only=True)

    @property
    def refusal(self) -> str:
        """What is wrong, and what to do instead."""
        wrong = f"model.config does not describe the modules that the model was made of: {self.difference}"
        remedy = "PalmE.from_modules(encoder, decoder, decoder_kwargs={...})"
        return f"{wrong}. State what cannot be read from them: {remedy}"

    def refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise the error."""
        raise ValueError(self.refusal)

    keywords = to_dict = refuse  # a model would be built or saved


def _set_attribute(config: PalmEConfig, name: str, value: Any) -> None:
    # `Trainer` of transformers 5 sets `use_cache` on the config of every model that has one. It has no meaning here.
    if name != "use_cache":
        raise FrozenInstanceError(f"cannot assign to {name!r}: build another with dataclasses.replace(config, ...)")


for _config in PalmEConfig, UnprovenConfig:
    _config.__setattr__ = _set_attribute  # type: ignore[assignment, method-assign]  # a dataclass accepts no own one


class FrozenDict(dict[str, Any]):
    """An immutable, hashable `dict`, whose nested mappings and sequences are immutable too.

    Lists become tuples: JSON has only lists, while x-transformers recognises per-layer values by
    `isinstance(value, tuple)` (`AttentionLayers.__init__`). A config that is read from JSON must mean the same.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        super().__init__({key: _freeze(value) for key, value in dict(values).items()})

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config is frozen: build another with dataclasses.replace(config, ...)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return FrozenDict(value)
    if is_int(value):
        return int(value)
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def to_json_types(value: Any, name: str) -> Any:
    """Return `value` with mappings as dicts and tuples as lists.

    Raises:
        TypeError: If it holds a value that JSON has no type for, such as a module. The message starts with `name`.
    """
    if isinstance(value, Mapping):
        return {key: to_json_types(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_types(item, name) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    rule = "only None, bool, int, finite float, str, lists and dicts can be saved with a config"
    raise TypeError(f"{name}={value!r} has no JSON form: {rule}; leave it out of the config that you save")


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Return the end of an error message, which names the closest of `names`."""
    return f"did you mean {difflib.get_close_matches(str(name), sorted(names), n=1, cutoff=0.0)[0]!r}?"


def is_int(value: Any) -> bool:
    """Return whether `value` is an int, such as an `int` or a `numpy.int64`, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_positive_int(name: str, value: Any, remedy: str = "use 1 or more") -> int:
    """Return `value` as an `int`, and reject anything but an int of at least 1."""
    if not is_int(value):
        raise TypeError(f"{name}={value!r} must be a positive int, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value} must be a positive int: {remedy}")
    return int(value)


def check_token_id(name: str, value: Any, num_tokens: int, remedy: str) -> None:
    """Reject anything but an int within `0 .. num_tokens - 1`."""
    if not is_int(value):
        raise TypeError(f"{name}={value!r} must be a token id, not {type(value).__name__}: {remedy}")
    if not 0 <= value < num_tokens:
        raise ValueError(f"{name}={value} must be a token id within 0..num_tokens-1={num_tokens - 1}: {remedy}")
