"""Each entry of `families.json` is used, and what is read from config.json alone is the config of the loaded model."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from palme_xt import PalmE, PalmEConfig
from palme_xt.mapping import upstream_keywords
from palme_xt.pretrained import describe_decoder, describe_encoder, families, load_decoder, load_encoder
from palme_xt.pretrained.families import FAMILIES

pytest.importorskip("transformers")

import transformers

from tests.pretrained.families import ACTIVATIONS, DECODERS, ENCODERS
from tests.pretrained.test_latex_ocr import CASES, golden

TOWERS = {tower: name for name, tower in FAMILIES["vision_towers"].items()}
# Of older releases of transformers, and of other heads
OLD = ["embeddings.position_ids", "model.layers.0.self_attn.rotary_emb.inv_freq", "transformer.h.0.attn.bias"]
OLD += ["transformer.h.0.attn.masked_bias", "classifier.weight"]


def tiny(kind: str) -> Any:
    """Return a model of a family, with two layers."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config: dict[str, Any]
    if kind == "gpt2":
        config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 20, "eos_token_id": 3}
    elif kind in FAMILIES["decoder"]:
        config = sizes | {"max_position_embeddings": 32, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20}
        config |= {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 4, "sliding_window": None}
    else:
        config = sizes | {"image_size": 16, "patch_size": 8}
    if kind in FAMILIES["vision_towers"]:
        text = {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        config = {"vision_config": config, "text_config": sizes | text}
    auto = transformers.AutoModelForCausalLM if kind in FAMILIES["decoder"] else transformers.AutoModel
    return auto.from_config(transformers.AutoConfig.for_model(kind, **config)).eval()


PAIRS = list(zip_longest(FAMILIES["encoder"], FAMILIES["decoder"]))


@pytest.mark.parametrize(
    ("a", "b"), [pytest.param(*pair, marks=[pytest.mark.slow] * (pair != PAIRS[-1])) for pair in PAIRS]
)
def test_the_description_is_the_config_of_the_model(a: str, b: str, tmp_path: Path) -> None:
    for kind in a, b:
        tiny(kind).save_pretrained(tmp_path / kind)
    loaded = load_encoder(tmp_path / a, image_size=24), load_decoder(tmp_path / b, max_seq_len=10)
    # With a decoder of another origin, an encoder does not ask for cross-attention.
    assert ["cross_attend" in module.palme_arguments for module in loaded] == [False, True]
    for kind in a, b:
        (tmp_path / kind / "model.safetensors").unlink()
    encoder, decoder = describe_encoder(tmp_path / a, 24), describe_decoder(tmp_path / b, 10)
    merged: dict[str, Any] = {name: encoder[name] | decoder[name] for name in ("torch_layers", "sources")}
    config = PalmEConfig(**encoder | decoder | merged | {"cross_attend": True})
    assert PalmE.from_modules(*loaded).config == config
    assert (config.image_size, config.max_seq_len) == (24, 10)
    assert config.sources == {"encoder": str(tmp_path / a), "decoder": str(tmp_path / b)}
    assert config != PalmEConfig(**encoder | describe_decoder(tmp_path / b) | merged | {"cross_attend": True})
    with pytest.raises(ValueError, match=f"{b} cannot be loaded: model_type="):
        describe_encoder(tmp_path / b)


def test_the_tests_draw_each_family_and_each_activation() -> None:
    assert [TOWERS.get(kind, kind) for kind in FAMILIES["encoder"]] == list(ENCODERS)
    assert list(FAMILIES["decoder"]) == list(DECODERS)
    assert sorted(FAMILIES["activations"]) == ACTIVATIONS


def never_matched(patterns: Collection[str], names: Collection[str]) -> list[str]:
    return [pattern for pattern in patterns if not any(re.search(rf"^(?:{pattern})$", name) for name in names)]


def test_each_name_is_that_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import safe_open

    class Used(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            used.add(name)
            return super().get(name, default)

    used: set[str] = set()
    monkeypatch.setitem(FAMILIES, "modules", Used(FAMILIES["modules"]))
    found = {*OLD}
    for kind in [*FAMILIES["vision_towers"], *FAMILIES["encoder"], *FAMILIES["decoder"]]:
        model = tiny(kind)
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            found |= {*model.state_dict(), *file.keys()}
        (load_decoder if kind in FAMILIES["decoder"] else load_encoder)(tmp_path)
    assert used == FAMILIES["modules"].keys()
    assert {*FAMILIES["modules"].values()} <= {*FAMILIES["tensors"], "rotary"}
    for names in FAMILIES["tensors"].values():
        assert never_matched([rf"(?:.*\.)?{re.escape(name)}(?:\.weight|\.bias)?" for name in names], found) == []
    assert never_matched(FAMILIES["unused"], found) == []
    assert never_matched(["another"], found) == ["another"]


@pytest.mark.parametrize(("name", "wanted"), FAMILIES["only"].items())
def test_what_is_supported_only_with_one_value(name: str, wanted: Any) -> None:
    config = tiny("gpt2").config.to_dict()
    assert families.decoder_arguments(config | {name: wanted})
    with pytest.raises(ValueError, match=f"{name}='another' is not supported, only {wanted!r}"):
        families.decoder_arguments(config | {name: "another"})


def test_each_entry_of_latex_ocr_is_used() -> None:
    tables = FAMILIES["latex_ocr"]
    assert {*tables["options"]} <= upstream_keywords("decoder").keys()
    PalmEConfig(**tables["always"])
    from palme_xt.pretrained.latex_ocr import load_decoder as load

    names = {name for case in CASES for name in load(*reversed(golden(case)[:2])).state_dict()}
    for pattern in tables["renamed"]:
        assert any(re.search(pattern, name) for name in names), pattern
