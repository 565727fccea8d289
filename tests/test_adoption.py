"""`PalmE.from_modules` adopts modules that were wired by hand as they are, and proves the config that it reads."""

from __future__ import annotations

import copy
import pickle
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from x_transformers import Decoder

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig, hub
from palme_xt.adoption import describe, find_difference
from palme_xt.config import UnprovenConfig
from palme_xt.source import to_source
from palme_xt.storage.folder import load, save
from palme_xt.strategies import QUIET, configs
from tests.models import SMALL, batch, logits, small
from tests.overrides import overrides


def wired(seed: int = 0, **arguments: Any) -> HandWired:
    torch.manual_seed(seed)
    return HandWired(small(**arguments).config)


def adopt(modules: Any, **arguments: Any) -> PalmE:
    """Adopt modules, without a warning if the config is unproven."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="model.config does not describe")
        return PalmE.from_modules(modules.encoder, modules.decoder, **arguments)


def numbers(model: nn.Module, img: Tensor, text: Tensor) -> list[Tensor]:
    """Return loss, logits and all gradients, in eval and training mode."""
    found = []
    model.requires_grad_()
    for training in False, True:
        random.seed(0)
        torch.manual_seed(0)
        loss, (values, _) = model.train(training)(img, text, return_outputs=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found += [loss, values, *(gradient for gradient in gradients if gradient is not None)]
    return found


def equal(model: nn.Module, other: nn.Module, img: Tensor, text: Tensor) -> bool:
    """Return whether both compute the same with the same random weights, which the first one keeps."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape) * (0.3 if weight.ndim < 2 else weight.shape[-1] ** -0.5)
    other.load_state_dict(model.state_dict())
    pairs = zip(numbers(model, img, text), numbers(other, img, text), strict=True)
    return all(torch.equal(here, there) for here, there in pairs)


def refuses(model: PalmE, message: str, folder: Path) -> None:
    """Assert that whatever relies on the config raises an error with this message, and nothing is written."""
    saving: list[Callable[[], object]] = [
        lambda: save(model, folder),
        lambda: PalmE.from_config(model.config),
        lambda: type(model).from_config(model.config),
        lambda: to_source(model.config),
        lambda: to_source(replace(model.config, qk_norm=False)),
        lambda: model.config.to_dict(),
        lambda: model.config.keywords("vit"),
    ]
    if isinstance(model, hub.PalmE):
        saving += [lambda: model.save_pretrained(folder), lambda: model.push_to_hub("user/name")]
    way_out = (
        r"\. State what cannot be read from them: PalmE\.from_modules\(encoder, decoder, decoder_kwargs={\.\.\.}\)"
    )
    for relying in saving:
        with pytest.raises(ValueError, match=f"^model.config does not describe the modules .*: {message}{way_out}"):
            relying()
    assert not folder.exists()


@given(configs())
def test_the_17_arguments_are_read_off_the_modules(config: PalmEConfig) -> None:
    hand_wired = HandWired(config)
    model = adopt(hand_wired)
    assert model.encoder is hand_wired.encoder
    assert model.decoder is hand_wired.decoder
    dropped = config.rotary_xpos and "disable_abs_pos_emb" not in config.decoder_kwargs
    expected = replace(
        config,
        alibi_num_heads=config.alibi_num_heads if config.alibi_pos_bias else min(4, config.decoder_heads),
        use_abs_pos_emb=config.use_abs_pos_emb and not dropped,
    )
    for name in PalmEConfig.__dataclass_fields__:
        if not name.endswith("_kwargs") and name != "_":
            assert getattr(model.config, name) == getattr(expected, name), name
    img, text = batch(model)
    assert torch.equal(model(img, text), hand_wired(img, text))


@settings(max_examples=20)
@given(configs())
def test_a_config_is_proven_if_what_cannot_be_read_is_stated(config: PalmEConfig) -> None:
    stated = {name: getattr(config, name) for name in ("vit_kwargs", "encoder_kwargs", "transformer_kwargs")}
    stated |= {name: getattr(config, name) for name in ("decoder_kwargs", "autoregressive_kwargs")}
    hand_wired = HandWired(config)
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, **stated)
    assert type(model.config) is PalmEConfig
    assert equal(hand_wired, PalmE.from_config(model.config), *batch(model))


SHOWN: list[dict[str, Any]] = [
    {},
    {"vit_kwargs": {"channels": 1, "num_register_tokens": 3}},
    {"encoder_kwargs": {"attn_flash": True, "attn_qk_norm": True, "attn_kv_heads": 1}},
    {"decoder_kwargs": {"attn_kv_heads": 2, "attn_qk_norm_scale": 5, "attn_dropout": 0.1, "cross_attn_dropout": 0.2}},
    {"transformer_kwargs": {"tie_embedding": True, "emb_frac_gradient": 0.5, "num_memory_tokens": 2}},
    {"rotary_xpos": False, "decoder_kwargs": {"rotary_pos_emb": True}},
    {"decoder_kwargs": {"cross_attn_qk_norm": False}},
    {"autoregressive_kwargs": {"pad_value": 5, "ignore_index": -1, "mask_prob": 0.1}},
    {"use_abs_pos_emb": True, "decoder_kwargs": {"disable_abs_pos_emb": False}},
]


@pytest.mark.parametrize("arguments", SHOWN, ids=str)
def test_overrides_that_show_are_read(arguments: dict[str, Any]) -> None:
    source = small(**arguments).config
    hand_wired = HandWired(source)
    model = PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    quiet = {name: getattr(model.config, name) | QUIET for name in ("encoder_kwargs", "decoder_kwargs")}
    assert replace(model.config, **quiet) == source


class Detached(nn.GELU):
    """An activation whose outputs are upstream's, and whose gradients are not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


# An override, and the first difference that shows it: in a parameter, a buffer, an attribute, or only in the numbers.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "parameter": (
        {"decoder_kwargs": {"ff_glu": True}},
        r"decoder\.net\.attn_layers\.layers\.2\.1\.ff\.0\.proj\.weight is \(256, 32\) in the modules, but missing in a "
        "model built from it",
    ),
    "buffer": (
        {"decoder_kwargs": {"rotary_base_rescale_factor": 2.0}},
        r"decoder\.net\.attn_layers\.rotary_pos_emb\.inv_freq has other values in the modules than in a model built "
        "from it",
    ),
    "attribute": (
        {"decoder_kwargs": {"ff_dropout": 0.1}},
        r"decoder\.net\.attn_layers\.layers\.2\.1\.ff\.1\.p is 0\.1 in the modules, but 0\.0 in a model built from it",
    ),
    "embeddings": (
        {"encoder_kwargs": {"ff_relu_squared": True}},
        "embeddings in eval mode differ between the modules and a model built from it",
    ),
    "logits": (
        {"decoder_kwargs": {"ff_swish": True}},
        "logits in eval mode differ between the modules and a model built from it",
    ),
    "training": (
        {"decoder_kwargs": {"ff_sublayer_dropout": 0.1}},
        "logits in training mode differ between the modules and a model built from it",
    ),
    "gradients": (
        {"decoder_kwargs": {"ff_custom_activation": Detached()}},
        "gradients in eval mode differ between the modules and a model built from it",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_relies_on_a_config_that_does_not_describe_the_modules_refuses(case: str, tmp_path: Path) -> None:
    arguments, message = DIFFERENT[case]
    hand_wired = wired(**arguments)
    with pytest.warns(UserWarning, match=f"model.config does not describe the modules .*: {message}. State what"):
        model = hub.PalmE.from_modules(hand_wired.encoder, hand_wired.decoder)
    refuses(model, message, tmp_path / "model")
    img, text = batch(model)
    assert torch.equal(logits(model.eval(), img, text), logits(hand_wired.eval(), img, text))
    assert model.generate(img, text, 3).shape == (2, 3)
    for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model.config)):
        assert getattr(copied, "config", copied) == model.config

    stated = {name: value for name, value in arguments.items() if name.endswith("_kwargs")}
    model = hub.PalmE.from_modules(hand_wired.encoder, hand_wired.decoder, **stated)
    assert equal(hand_wired, hub.PalmE.from_config(model.config), img, text)
    if case != "gradients":  # a module has no JSON form
        model.save_pretrained(tmp_path / "model")
        assert torch.equal(logits(load(tmp_path / "model"), img, text), logits(hand_wired.eval(), img, text))


BASES: list[dict[str, Any]] = [
    {"attn_flash": False},
    {"attn_flash": False, "alibi_pos_bias": False, "rotary_xpos": False, "use_abs_pos_emb": True},
    {"attn_flash": True},
]


def wired_with(part: str, added: dict[str, Any]) -> HandWired | None:
    """Return a model with these overrides of a part that can run, if there is one."""
    for base in BASES:
        arguments = {**SMALL, **base, f"{part}_kwargs": SMALL.get(f"{part}_kwargs", {}) | added}
        try:
            torch.manual_seed(0)
            hand_wired = HandWired(PalmEConfig(**arguments))
            numbers(hand_wired, torch.randn(2, added.get("channels", 3), 8, 8), torch.randint(32, (2, 12)))
        except Exception:  # upstream's errors are of any type
            continue
        return hand_wired
    return None


def outcome(part: str, keyword: str, value: Any, needs: dict[str, Any], folder: Path) -> str | None:
    """Adopt a model with one override, and return whether it was read, refused, or made no difference."""
    hand_wired = wired_with(part, needs | {keyword: value})
    if hand_wired is None:
        return None
    kwargs = f"{part}_kwargs"
    stated = adopt(hand_wired, **{kwargs: needs | {keyword: value}})
    assert not isinstance(stated.config, UnprovenConfig), stated.config.difference
    inputs = batch(stated)
    assert equal(hand_wired, PalmE.from_config(stated.config), *inputs)
    if not callable(value):
        save(stated, folder / keyword)
        pairs = zip(numbers(load(folder / keyword), *inputs), numbers(hand_wired, *inputs), strict=True)
        assert all(torch.equal(here, there) for here, there in pairs)
    try:
        model = adopt(hand_wired, **{kwargs: needs})
    except ValueError as error:  # what it needs has no meaning alone
        assert re.match(r"x-transformers \S+ rejects", str(error))
        return "refused"
    if isinstance(model.config, UnprovenConfig):
        refuses(model, re.escape(model.config.difference), folder / "refused")
        return "refused"
    assert equal(hand_wired, PalmE.from_config(model.config), *inputs)
    return "read" if keyword in getattr(model.config, kwargs) else "equal"


OVERRIDES = {f"{part}-{keyword}": (part, keyword, value, needs) for part, keyword, value, needs in overrides()}


@pytest.mark.parametrize("case", list(OVERRIDES)[::30])
def test_an_override_is_read_or_refused_or_makes_no_difference(case: str, tmp_path: Path) -> None:
    outcome(*OVERRIDES[case], tmp_path)


@pytest.mark.slow
def test_every_override_is_read_or_refused_or_makes_no_difference(tmp_path: Path) -> None:
    outcomes = {case: outcome(*override, tmp_path / case) for case, override in OVERRIDES.items()}
    counts = Counter(outcomes.values())
    assert sum(counts[found] for found in ("read", "refused", "equal")) > 400, counts
    assert counts["read"] > 80, counts
    assert counts["refused"] > 150, counts
