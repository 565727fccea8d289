"""Folders, shards, the hub and models in memory; and what is not supported is an error that names it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palme_xt.pretrained import load_decoder, load_encoder
from palme_xt.pretrained.families import FAMILIES

transformers: Any = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    config = SIZES | {"intermediate_size": 24, "vocab_size": 20, "max_position_embeddings": 32} | config
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=20)
    return transformers.GPT2LMHeadModel(config).eval()


def dinov2() -> Any:
    torch.manual_seed(0)
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, image_size=16, patch_size=8)).eval()


class Changed:
    """A model of transformers with another config, or with other tensors."""

    def __init__(self, model: Any, tensors: dict[str, Tensor | None] | None = None, **config: Any) -> None:
        self.config = self
        self._config: dict[str, Any] = model.config.to_dict() | config
        found = model.state_dict() | (tensors or {})
        self._tensors = {name: tensor for name, tensor in found.items() if tensor is not None}

    def to_dict(self) -> dict[str, Any]:
        return self._config

    def state_dict(self) -> dict[str, Any]:
        return self._tensors


@pytest.mark.parametrize(("load", "make"), [(load_encoder, dinov2), (load_decoder, llama)])
def test_folders_and_shards(load: Callable[[Any], Any], make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    expected = load(model).state_dict()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in tmp_path / "one", str(tmp_path / "shards"):
        module = load(folder)
        assert list(module.palme_arguments["sources"].values()) == [str(folder)]
        assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_the_model_stays_as_it_is() -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = load_decoder(model)
    for parameter in decoder.parameters():
        parameter.data.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_special_tokens_come_along() -> None:
    found = load_decoder(llama(bos_token_id=1, eos_token_id=[2, 3, 99], pad_token_id=4)).palme_arguments
    assert (found["bos_token"], found["eos_token"]) == (1, [2, 3])
    assert found["autoregressive_kwargs"] == {"pad_value": 4}
    found = load_decoder(Changed(llama(), bos_token_id=20, eos_token_id=None, pad_token_id=-1)).palme_arguments
    assert not {"bos_token", "eos_token", "autoregressive_kwargs"} & {*found}


def test_the_defaults_are_those_of_transformers() -> None:
    for kind, defaults in (FAMILIES["encoder"] | FAMILIES["decoder"]).items():
        config = transformers.AutoConfig.for_model(kind).to_dict()
        for name, value in defaults["defaults"].items():
            assert config[name] == value, (kind, name)


def test_a_rope_of_the_releases_before_5() -> None:
    old = Changed(llama(), rope_parameters=None, rope_theta=500.0, rope_scaling=None)
    expected = load_decoder(llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert old.to_dict()["rope_theta"] == 500.0
    torch.testing.assert_close(load_decoder(old).state_dict(), expected.state_dict(), rtol=0, atol=0)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"model_type": "bert"}, "Changed cannot be loaded: model_type='bert' is not supported: use one of"),
        ({}, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type='llama3'"),
        ({}, {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({}, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1"),
        ({}, {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
        ({}, {"tie_word_embeddings": True}, "tie_word_embeddings=True, but the embeddings and"),
        ({}, {"model_type": "mistral", "max_position_embeddings": 5000}, "sliding_window=4096 is not supported for"),
        ({}, {"sliding_window": 8}, "sliding_window=8 is not supported for .* 32 tokens: .* pass max_seq_len=8"),
        ({}, {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported, only None"),
        ({}, {"hidden_act": "xielu"}, "hidden_act='xielu' is not supported: use one of gelu, silu"),
        ({Q: None}, {}, r"a tensor is missing: layer 1, .*self_attn.q_proj.weight"),
        ({"lm_head.weight": None}, {}, "a tensor is missing: lm_head.weight"),
        ({Q: torch.zeros(16, 8)}, {}, r"the shape of 'model.layers.1.self_attn.q_proj.weight' is \(16, 8\)"),
        ({Q: torch.zeros(15, 16)}, {}, r"the shape of 'model.layers.1.self_attn.q_proj.weight' is not what its config"),
        ({Q: torch.zeros(16, 16, dtype=torch.int8)}, {}, "q_proj.weight' has dtype torch.int8, which is not supported"),
        ({"model.layers.0.adapter": torch.zeros(1)}, {}, "1 tensors are not supported, such as .*0.adapter'"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}, {}, "such as 'model.layers.0.*q_proj.bias'"),
        ({}, {"num_hidden_layers": 1}, r"tensors are not supported, such as 'model.layers.1"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(
    tensors: dict[str, Tensor | None], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_decoder(Changed(llama(), tensors, **config))


def test_a_window_that_is_longer_than_all_texts_is_none() -> None:
    assert load_decoder(Changed(llama(), sliding_window=32)).net.max_seq_len == 32
    assert load_decoder(Changed(llama(), sliding_window=8, use_sliding_window=False)).net.max_seq_len == 32
    assert load_decoder(Changed(llama(), sliding_window=8), max_seq_len=8).net.max_seq_len == 8
    with pytest.raises(ValueError, match=r"sliding_window=8 is not supported for .* 9 tokens"):
        load_decoder(Changed(llama(), sliding_window=8), max_seq_len=9)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_texts_can_be_shorter(make: Callable[[], Any]) -> None:
    model, text = make(), torch.arange(6)[None]
    whole, short = load_decoder(model), load_decoder(model, max_seq_len=6)
    assert (whole.net.max_seq_len, short.net.max_seq_len) == (32, 6)
    assert torch.equal(short.net(text), whole.net(text))
    assert not torch.equal(short.net(text), short.net(text.flip(1)))
    for wrong, message in (33, "must be at most its max_position_embeddings=32"), (0, "must be a positive int"):
        with pytest.raises(ValueError, match=f"max_seq_len={wrong} {message}"):
            load_decoder(model, max_seq_len=wrong)
    if model.config.model_type == "gpt2":
        assert short.net.pos_emb.emb.weight.shape == (6, 16)
        longer = Changed(model, {"transformer.wpe.weight": torch.zeros(40, 16)})
        with pytest.raises(ValueError, match=r"the shape of 'transformer.wpe.weight' is \(40, 16\)"):
            load_decoder(longer)


def test_an_encoder_is_no_decoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_type='llama' is not supported: use one of vit, .*clip, siglip"):
        load_encoder(llama())
    with pytest.raises(ValueError, match="use_swiglu_ffn=True is not supported, only False"):
        load_encoder(Changed(dinov2(), use_swiglu_ffn=True))
    with pytest.raises(ValueError, match="image_size=17 must be divisible by patch_size=8"):
        load_encoder(dinov2(), image_size=17)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match="source must be a folder, a name on the hub, or a model of transformers, not int"
    ):
        load_decoder(3)
    with pytest.raises(
        ValueError, match="nobody/nothing is neither a folder nor a repository on the hub that can be read"
    ):
        load_decoder("nobody/nothing")
    with pytest.raises(ValueError, match=r"has no config.json: use a folder of save_pretrained"):
        load_decoder(tmp_path)
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="has weights that cannot be read"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has no model.safetensors: use a folder of save_pretrained, with safetensors"
    ):
        load_decoder(tmp_path)


@pytest.mark.slow
def test_transformers_is_not_imported(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    code = f"import sys; from palme_xt.pretrained import load_decoder; load_decoder({str(tmp_path)!r}); "
    check = "print([name for name in ('transformers', 'tokenizers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_packages_that_are_not_installed(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source: Any = "user/name"
    if package == "safetensors":
        llama().config.save_pretrained(tmp_path)
        source = tmp_path
    with pytest.raises(ModuleNotFoundError, match=rf"{package} is not installed: pip install -e '.\[train\]'"):
        load_decoder(source)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"has a damaged config\.json: .+; download or save it again"):
        load_decoder(tmp_path)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="4KB")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"read from model\.safetensors\.index\.json: 'weight_map' is missing"):
        load_decoder(tmp_path)
