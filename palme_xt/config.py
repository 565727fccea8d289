"""The 17 arguments of PalmE, and the five x-transformers keyword dicts they become."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from palme_xt.frozen import FrozenDict, to_json_types
from palme_xt.mapping import check_overrides

# The mapping, written once: upstream's keyword -> the argument that sets it. The model is built from it, overrides are
# checked against it, and the README's table is checked against it.
LANDS_AT: dict[str, dict[str, str]] = {
    "vit": {
        "image_size": "image_size",
        "patch_size": "patch_size",
    },
    "encoder": {
        "dim": "encoder_dim",
        "depth": "encoder_depth",
        "heads": "encoder_heads",
    },
    "transformer": {
        "num_tokens": "num_tokens",
        "max_seq_len": "max_seq_len",
        "use_abs_pos_emb": "use_abs_pos_emb",
    },
    "decoder": {
        "dim": "decoder_dim",
        "depth": "decoder_depth",
        "heads": "decoder_heads",
        "cross_attend": "cross_attend",
        "cross_attn_dim_context": "encoder_dim",
        "alibi_pos_bias": "alibi_pos_bias",
        "alibi_num_heads": "alibi_num_heads",
        "rotary_xpos": "rotary_xpos",
        "attn_flash": "attn_flash",
        "attn_qk_norm": "qk_norm",
    },
    "autoregressive": {},
}

NO_LOGITS_FOR_EACH_TOKEN = ("use_cls_token", "average_pool_embed", "return_only_embed", "num_output_heads")
UPSTREAM_DIM_HEAD = 64  # x_transformers.x_transformers.DEFAULT_DIM_HEAD, whatever the model's dim and heads


@dataclass(frozen=True)
class PalmEConfig:
    """The arguments of PalmE.

    Validated, frozen, hashable, and equal to itself after a round trip through JSON. Sizes are in pixels, lengths in
    tokens; all numbers are positive ints.

    Args:
        image_size: height and width of the square images; divisible by `patch_size`.
        patch_size: height and width of a patch; an image has `(image_size / patch_size) ** 2` of them.
        encoder_dim: width of the ViT encoder, and of the context that the decoder cross-attends to.
        encoder_depth: layers of the encoder.
        encoder_heads: attention heads of the encoder, each of 64 dimensions (`encoder_kwargs["attn_dim_head"]`).
        num_tokens: vocabulary of the decoder; ids are `0 .. num_tokens - 1`.
        max_seq_len: text length decoding keeps to, and the size of the table under `use_abs_pos_emb`.
        decoder_dim: width of the decoder; need not be `encoder_dim`.
        decoder_depth: blocks of the decoder (self-attention, cross-attention, feedforward).
        decoder_heads: attention heads of the decoder, each of 64 dimensions (`decoder_kwargs["attn_dim_head"]`).
        alibi_num_heads: heads that ALiBi biases, `1 .. decoder_heads`; unused without `alibi_pos_bias`.
        use_abs_pos_emb: add learned absolute positions to the token embeddings; text is then at most `max_seq_len`.
        cross_attend: attend to the image; False leaves a text-only decoder that never runs the encoder.
        alibi_pos_bias: ALiBi in the decoder's self-attention (Press et al. 2022, arXiv:2108.12409).
        rotary_xpos: rotary positions with xPos scaling in the decoder (Sun et al. 2022, arXiv:2212.10554).
        attn_flash: `scaled_dot_product_attention` in the decoder instead of upstream's einsums.
        qk_norm: l2-normalise queries and keys in the decoder (Henry et al. 2020, arXiv:2010.04245). Upstream's `attn_`
            prefix reaches cross-attention too; `decoder_kwargs={"cross_attn_qk_norm": False}` limits it to
            self-attention.
        vit_kwargs: anything else `x_transformers.ViTransformerWrapper` accepts.
        encoder_kwargs: anything else `x_transformers.Encoder` accepts.
        transformer_kwargs: anything else `x_transformers.TransformerWrapper` accepts.
        decoder_kwargs: anything else `x_transformers.Decoder` accepts.
        autoregressive_kwargs: anything else `x_transformers.AutoregressiveWrapper` accepts.

    Raises:
        ValueError: a number out of its range, or an override that repeats an argument or that upstream does not know.
        TypeError: a value of the wrong type.
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

    def __post_init__(self) -> None:
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.type == "int":
                _check_positive_int(argument.name, value)
            elif argument.type == "bool":
                _check_bool(argument.name, value)
        for part, arguments in LANDS_AT.items():
            overrides = getattr(self, f"{part}_kwargs")
            check_overrides(part, overrides, {key: (name, getattr(self, name)) for key, name in arguments.items()})
            object.__setattr__(self, f"{part}_kwargs", FrozenDict(overrides))
        self._or_upstreams("vit", "channels", 3)
        self._or_upstreams("autoregressive", "ignore_index", -100)
        self._or_upstreams("autoregressive", "pad_value", 0)
        self._check_together()

    def _check_together(self) -> None:
        if self.image_size % self.patch_size:
            nearest = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            raise ValueError(
                f"image_size={self.image_size} must be divisible by patch_size={self.patch_size}: "
                f"an image is cut into whole patches; use image_size={nearest}, say"
            )
        if self.alibi_pos_bias and self.alibi_num_heads > self.decoder_heads:
            raise ValueError(
                f"alibi_num_heads={self.alibi_num_heads} must be within 1..decoder_heads={self.decoder_heads} when "
                "alibi_pos_bias is on: lower alibi_num_heads, or raise decoder_heads"
            )
        for part, heads in ("encoder", self.encoder_heads), ("decoder", self.decoder_heads):
            kv_heads = getattr(self, f"{part}_kwargs").get("attn_kv_heads")
            if kv_heads is not None:
                _check_positive_int(f"{part}_kwargs['attn_kv_heads']", kv_heads)
                if heads % kv_heads:
                    raise ValueError(
                        f"{part}_kwargs['attn_kv_heads']={kv_heads} must divide {part}_heads={heads}: "
                        "each key-value head serves equally many query heads"
                    )
        for name in NO_LOGITS_FOR_EACH_TOKEN:
            value = self.transformer_kwargs.get(name)
            if (value and value != 1) or value is True:
                raise ValueError(
                    f"transformer_kwargs[{name!r}]={value!r} leaves no logits for each token, which PalmE learns and "
                    f"decodes from: leave {name!r} out"
                )
        _check_positive_int("vit_kwargs['channels']", self.channels)
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"autoregressive_kwargs['ignore_index']={self.ignore_index!r} must be an int")
        pad_value = self.pad_value
        if isinstance(pad_value, bool) or not isinstance(pad_value, int) or not 0 <= pad_value < self.num_tokens:
            raise ValueError(
                f"autoregressive_kwargs['pad_value']={pad_value!r} must be a token id within "
                f"0..num_tokens-1={self.num_tokens - 1}: upstream feeds it to the decoder where a target is ignored"
            )
        drops_abs_pos_emb = self.rotary_xpos or any(
            self.decoder_kwargs.get(name) for name in ("rotary_pos_emb", "rel_pos_bias", "polar_pos_emb")
        )
        if self.use_abs_pos_emb and drops_abs_pos_emb and self.decoder_kwargs.get("disable_abs_pos_emb") is None:
            warnings.warn(
                f"use_abs_pos_emb=True has no effect with rotary_xpos={self.rotary_xpos}: x-transformers drops "
                "absolute positions when the decoder has rotary or relative ones; to keep both, pass "
                'decoder_kwargs={"disable_abs_pos_emb": False}',
                stacklevel=4,
            )

    def _or_upstreams(self, part: str, name: str, default: int) -> None:
        # A plain attribute, not a look-up at each use: torch 2.6 cannot compile one in a dict of another class.
        object.__setattr__(self, f"_{name}", getattr(self, f"{part}_kwargs").get(name, default))

    @property
    def channels(self) -> int:
        """Colour channels of an image: 3 unless `vit_kwargs` says otherwise, as upstream."""
        return self._channels  # type: ignore[attr-defined,no-any-return]

    @property
    def ignore_index(self) -> int:
        """The id in `text` that is no target: -100 unless `autoregressive_kwargs` says otherwise, as upstream."""
        return self._ignore_index  # type: ignore[attr-defined,no-any-return]

    @property
    def pad_value(self) -> int:
        """The id that fills `text` after its end: 0 unless `autoregressive_kwargs` says otherwise, as upstream."""
        return self._pad_value  # type: ignore[attr-defined,no-any-return]

    def for_vit(self) -> dict[str, Any]:
        """Keywords for `x_transformers.ViTransformerWrapper`, all but `attn_layers`."""
        return self._for("vit")

    def for_encoder(self) -> dict[str, Any]:
        """Keywords for `x_transformers.Encoder`."""
        return self._for_attn_layers("encoder")

    def for_transformer(self) -> dict[str, Any]:
        """Keywords for `x_transformers.TransformerWrapper`, all but `attn_layers`."""
        return self._for("transformer")

    def for_decoder(self) -> dict[str, Any]:
        """Keywords for `x_transformers.Decoder`."""
        return self._for_attn_layers("decoder")

    def for_autoregressive(self) -> dict[str, Any]:
        """Keywords for `x_transformers.AutoregressiveWrapper`, all but `net`."""
        return self._for("autoregressive")

    def _for(self, part: str) -> dict[str, Any]:
        overrides: dict[str, Any] = getattr(self, f"{part}_kwargs")
        return {keyword: getattr(self, name) for keyword, name in LANDS_AT[part].items()} | overrides

    def _for_attn_layers(self, part: str) -> dict[str, Any]:
        keywords = self._for(part)
        # x-transformers up to 2.31.10 leaves `to_out` out of one-headed attention, which then only runs when the head
        # is as wide as the model. Only there is it left out here too, so that hand-wired checkpoints keep loading.
        dim_head = keywords.get("attn_value_dim_head") or keywords.get("attn_dim_head", UPSTREAM_DIM_HEAD)
        if keywords["heads"] == 1 and dim_head != keywords["dim"]:
            keywords.setdefault("attn_project_out", True)
        return keywords

    def to_dict(self) -> dict[str, Any]:
        """All arguments, in order, in plain JSON types.

        Raises:
            TypeError: an override that JSON has no type for.
        """
        return {argument.name: to_json_types(getattr(self, argument.name), argument.name) for argument in fields(self)}

    def to_source(self, weights: str | None = None) -> str:
        """A self-contained program, upstream imports only, that builds the same encoder and decoder.

        Args:
            weights: a safetensors file that the program loads, as a run folder has.

        Raises:
            TypeError: an override that has no literal form.
        """
        from palme_xt.source import to_source

        return to_source(self, weights)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PalmEConfig:
        """The inverse of `to_dict`; arguments that are missing take their defaults.

        Raises:
            ValueError: an unknown key, named with the closest argument; and whatever the constructor refuses.
        """
        names = [argument.name for argument in fields(cls)]
        for key in values:
            if key not in names:
                closest = difflib.get_close_matches(str(key), names, n=1)
                hint = f": did you mean {closest[0]!r}?" if closest else f": the arguments are {', '.join(names)}"
                raise ValueError(f"{key!r} is not an argument of PalmEConfig{hint}")
        return cls(**values)


def _check_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be a positive int, not {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value} must be a positive int: use 1 or more")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False, not {type(value).__name__}")
