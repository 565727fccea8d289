"""Hypothesis strategies for valid configs and inputs.

A test that a wiring of your own is the same model:

    from hypothesis import given
    from torch import nn
    from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper

    from palme_xt import PalmE
    from palme_xt.parity import compare
    from palme_xt.strategies import configs

    class Mine(nn.Module):
        def __init__(self, image_size, patch_size, width, num_tokens, max_seq_len, depth, rotary_xpos):
            super().__init__()
            encoder = Encoder(dim=width, depth=depth, heads=2, attn_dim_head=8)
            self.encoder = ViTransformerWrapper(image_size=image_size, patch_size=patch_size, attn_layers=encoder)
            decoder = Decoder(
                dim=16, depth=depth, heads=2, attn_dim_head=8, cross_attend=True, cross_attn_dim_context=width,
                rotary_xpos=rotary_xpos, attn_qk_norm=True,
            )
            net = TransformerWrapper(
                num_tokens=num_tokens, max_seq_len=max_seq_len, use_abs_pos_emb=False, attn_layers=decoder
            )
            self.decoder = AutoregressiveWrapper(net)

        def forward(self, img, text, **kwargs):
            return self.decoder(text, context=self.encoder(img, return_embeddings=True), **kwargs)

    fixed = {"encoder_heads": 2, "decoder_dim": 16, "decoder_heads": 2, "cross_attend": True, "use_abs_pos_emb": False}
    fixed |= {"alibi_pos_bias": False, "attn_flash": False, "qk_norm": True, "encoder_depth": 2, "decoder_depth": 2}
    fixed |= {"vit_kwargs": {}, "transformer_kwargs": {}, "autoregressive_kwargs": {}}
    fixed |= {"encoder_kwargs": {"attn_dim_head": 8}, "decoder_kwargs": {"attn_dim_head": 8}}

    @given(configs(**fixed))
    def test_my_wiring_is_the_same_model(config):
        sizes = config.image_size, config.patch_size, config.encoder_dim, config.num_tokens, config.max_seq_len
        assert compare(PalmE.from_config(config), Mine(*sizes, depth=2, rotary_xpos=config.rotary_xpos))
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from palme_xt import PalmE, PalmEConfig
from palme_xt.config import check_positive_int

DIM_HEAD = 8
QUIET = {"verbose": False}  # otherwise, upstream logs that there may be too few rotary dimensions


def configs(**fixed: Any) -> st.SearchStrategy[PalmEConfig]:
    """Return a strategy of small valid configs over all 17 arguments and common overrides.

    Args:
        **fixed: Arguments that are kept as given. The others are drawn so that they fit.

    Raises:
        TypeError, ValueError: If no config has the fixed arguments. The message is that of `PalmEConfig` or of `PalmE`.
    """
    for argument in fields(PalmEConfig):
        if argument.type == "int" and argument.name in fixed:
            check_positive_int(argument.name, fixed[argument.name])
    names = [argument.name for argument in fields(PalmEConfig) if argument.type == "bool"]
    choices = [[fixed[name]] if name in fixed else [False, True] for name in names]
    # Upstream rejects some overrides together with some flags.
    check: Any = PalmE if any(name.endswith("_kwargs") for name in fixed) else PalmEConfig
    fitting, errors = [], []
    for values in itertools.product(*choices):
        flags = dict(zip(names, values, strict=True))
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(**_with_sizes(fixed | flags, min))
            fitting.append(flags)
        except (TypeError, ValueError) as error:
            errors.append(error)
    if not fitting:
        raise errors[0]
    return _configs(fixed, fitting)


def _with_sizes(fixed: dict[str, Any], choose: Callable[[Sequence[int]], int]) -> dict[str, Any]:
    """Return `fixed` and the other sizes, each of them chosen from those that fit."""
    sizes: dict[str, int] = {}
    if "image_size" in fixed:
        sizes["patch_size"] = fixed["image_size"] // choose([n for n in (1, 2, 3) if fixed["image_size"] % n == 0])
    else:
        sizes["patch_size"] = fixed.get("patch_size") or choose([2, 4])
        sizes["image_size"] = sizes["patch_size"] * choose([1, 2, 3])
    for part, options, least in ("encoder", [1, 2, 3], 1), ("decoder", [1, 2, 4], fixed.get("alibi_num_heads", 1)):
        shared = fixed.get(f"{part}_kwargs", {}).get("attn_kv_heads") or 1
        fitting = [heads for heads in options if heads >= least and heads % shared == 0]
        sizes[f"{part}_heads"] = choose(fitting or [-(-least // shared) * shared])
        sizes[f"{part}_dim"] = choose([DIM_HEAD, 12, 16])
    pad_value = fixed.get("autoregressive_kwargs", {}).get("pad_value", 0)
    return {
        **sizes,
        "encoder_depth": choose([1, 2]),
        "decoder_depth": choose([2, 3]),
        "num_tokens": choose(range(max(8, pad_value + 1), max(25, pad_value + 2))),
        "max_seq_len": choose(range(10, 17)),
        "alibi_num_heads": choose(range(1, 1 + fixed.get("decoder_heads", sizes["decoder_heads"]))),
        **fixed,
    }


@st.composite
def _configs(draw: st.DrawFn, fixed: dict[str, Any], flags: list[dict[str, bool]]) -> PalmEConfig:
    sizes = _with_sizes(fixed | draw(st.sampled_from(flags)), lambda options: draw(st.sampled_from(options)))
    vit = _some_of(channels=st.sampled_from([1, 4]), num_register_tokens=st.integers(1, 3), post_emb_norm=st.just(True))
    switches = dict.fromkeys(("tie_embedding", "post_emb_norm", "l2norm_embed"), st.just(True))
    transformer = _some_of(**switches, emb_frac_gradient=st.just(0.5))
    last = sizes["num_tokens"] - 1
    autoregressive = _some_of(pad_value=st.integers(0, last), ignore_index=st.sampled_from([-100, -1]))
    own: dict[str, st.SearchStrategy[Any]] = {"cross_attn_qk_norm": st.just(False)} if sizes["cross_attend"] else {}
    if sizes["use_abs_pos_emb"] and sizes["rotary_xpos"]:
        own["disable_abs_pos_emb"] = st.just(False)
    overrides = {
        "vit_kwargs": draw(vit),
        "encoder_kwargs": QUIET | draw(attn_layers(sizes["encoder_heads"])),
        "transformer_kwargs": draw(transformer),
        "decoder_kwargs": QUIET | draw(attn_layers(sizes["decoder_heads"])) | draw(_some_of(**own)),
        "autoregressive_kwargs": draw(autoregressive),
    }
    return PalmEConfig(**overrides | sizes)


def attn_layers(heads: int) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of overrides for an encoder or a decoder: grouped queries, norms, gated feedforwards, ..."""
    norms = st.sampled_from([{}, {"use_rmsnorm": True}, {"use_scalenorm": True}, {"use_simple_rmsnorm": True}])
    switches = dict.fromkeys(("attn_gate_values", "ff_glu", "ff_swish", "ff_no_bias", "sandwich_norm"), st.just(True))
    numbers = {"attn_num_mem_kv": st.integers(1, 2), "ff_mult": st.integers(1, 3), "shift_tokens": st.just(1)}
    layers = _some_of(**switches, **numbers)
    # x-transformers up to 2.31.10 mixes values with residual values of all heads, which fails with key-value heads.
    shared = [{"attn_kv_heads": kv_heads} for kv_heads in range(1, heads + 1) if heads % kv_heads == 0]
    values = st.sampled_from([{}, {"add_value_residual": True}, *shared])
    dim_head = {"attn_dim_head": DIM_HEAD}
    return st.builds(lambda norm, value, layer: dim_head | norm | value | layer, norms, values, layers)


def _some_of(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


@st.composite
def batches(draw: st.DrawFn, config: PalmEConfig) -> tuple[Tensor, Tensor]:
    """Draw images `(b, c, h, w)` or `(b, m, c, h, w)` and texts `(b, n)` with some ignored ids, for `config`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    b = draw(st.integers(1, 3))
    several = draw(st.sampled_from([(), (2,)]))
    img = torch.randn(b, *several, config.channels, config.image_size, config.image_size, generator=generator)
    n = draw(st.integers(2, max(2, min(10, config.max_seq_len))))
    text = torch.randint(config.num_tokens, (b, n), generator=generator)
    ignored = torch.rand(b, n, generator=generator) < 0.2
    ignored[0, 1] = False
    return img, text.masked_fill(ignored, config.ignore_index)


@st.composite
def sentences(draw: st.DrawFn, config: PalmEConfig) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Draw images inside texts, for a `config` with an `image_token`.

    Returns:
        The images of each sample `(m_i, c, h, w)`, 0 to 3 of them, texts `(b, n)` that have as many placeholders
        anywhere, and the lengths of the texts and of the prompts that they begin with, `(b,)`. At least the last token
        of each text is a target.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    lens = [draw(st.integers(count + 2, count + 6)) for count in counts]
    token: Any = config.image_token
    text = torch.randint(config.num_tokens - 1, (len(counts), max(lens)), generator=generator)
    text += text >= token  # no placeholder
    for row, (count, length) in enumerate(zip(counts, lens, strict=True)):
        text[row, draw(st.permutations(range(length - 1)))[:count]] = token
    images = [
        torch.randn(count, config.channels, config.image_size, config.image_size, generator=generator)
        for count in counts
    ]
    prompts = [draw(st.integers(1, length - 1)) for length in lens]
    return images, text, torch.tensor(lens), torch.tensor(prompts)
