"""A run begins with pretrained parts, freezes some, and computes what a frozen encoder makes of an image once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from palme_xt import PalmE
from palme_xt.captioner import Captioner, parts
from palme_xt.captioner.options import Training
from palme_xt.captioner.parts import Features, freeze, groups
from palme_xt.captioner.training.checkpoint import CHECKPOINT
from palme_xt.cli import main
from palme_xt.pretrained import load_decoder, load_encoder
from palme_xt.storage.folder import load, read_config
from tests.captioner.captioned import write_folder
from tests.captioner.test_tokenizer import byte_level
from tests.captioner.training.test_resume import Crash, crash, crash_at
from tests.models import small
from tests.test_cli import fails

IMG = torch.randn(3, 3, 32, 32)
SHORT = ["--steps=4", "--batch_size=4", "--eval_every=2", "--save_every=2", "--eval_images=4", "--num_workers=0"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    transformers = pytest.importorskip("transformers", reason="the sources are models of transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sources")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, intermediate_size=32)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "encoder")
    values = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "encoder" / "preprocessor_config.json").write_text(json.dumps(values))
    llama = transformers.LlamaConfig(**sizes | {"hidden_size": 24}, vocab_size=310, intermediate_size=32)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "decoder")
    byte_level().save(str(folder / "decoder" / "tokenizer.json"))
    return {part: str(folder / part) for part in ("encoder", "decoder")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "pictures", 16)


def train(run: Path, folder: Path, sources: dict[str, str], *options: str) -> None:
    parts = [f"--{part}={source}" for part, source in sources.items()]
    assert main(["train", f"--run={run}", f"--data={folder}", *SHORT, *parts, *options]) == 0


def tensors(run: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / file)


def test_frozen_parts_keep_their_pretrained_weights(sources: dict[str, str], folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "a", folder, sources, "--freeze=encoder,decoder")
    model = load(tmp_path / "a")
    assert model.config.sources == sources
    torch.testing.assert_close(model.encode(IMG), load_encoder(sources["encoder"])(IMG, return_embeddings=True))
    text = torch.randint(300, (3, 7))
    plain = load_decoder(sources["decoder"]).net(text)
    assert not torch.allclose(model.decoder.net(text, context=model.encode(IMG)), plain, atol=1e-4)  # it has learned
    layers = model.decoder.net.attn_layers
    for layer, kind in zip(layers.layers, layers.layer_types, strict=True):
        if kind == "c":
            for parameter in layer[1].to_out.parameters():
                nn.init.zeros_(parameter)
    torch.testing.assert_close(model.decoder.net(text, context=model.encode(IMG)), plain)
    preprocessing = Captioner.from_pretrained(tmp_path / "a").preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (tmp_path / "a" / "tokenizer.json").is_file()


def test_between_frozen_parts_the_projection_of_images_inside_the_sentence_is_trained(
    sources: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    options = ["--image_token=309", "--freeze=encoder,decoder"]
    train(tmp_path / "a", folder, sources, *options)
    train(tmp_path / "b", folder, sources, *options, "--lr=1e-2")
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert {name for name, tensor in first.items() if not torch.equal(tensor, second[name])} == {
        "projection.weight",
        "projection.bias",
    }
    model = load(tmp_path / "a")
    assert not model.config.cross_attend
    text = torch.randint(300, (3, 7))
    assert torch.equal(model.decoder.net(text), load_decoder(sources["decoder"], max_seq_len=128).net(text))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_other_part_is_new(part: str, sources: dict[str, str], folder: Path, tmp_path: Path) -> None:
    others = ["--decoder_dim=16", "--decoder_depth=2"] if part == "encoder" else ["--image_size=32", "--encoder_dim=16"]
    train(tmp_path / "a", folder, {part: sources[part]}, *others, "--max_seq_len=80")
    config = read_config(tmp_path / "a")
    assert set(config.sources) == set(config.torch_layers) == {part}
    assert (config.encoder_dim, config.max_seq_len) == (16, 80)


def test_a_resumed_run_needs_no_sources_and_is_bitwise_equal(
    sources: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    copies = {part: shutil.copytree(source, tmp_path / part) for part, source in sources.items()}
    options = ["--freeze=encoder", "--lr_decoder=1e-4", "--lr=1e-3"]
    train(tmp_path / "a", folder, sources, *options)
    train(tmp_path / "b", folder, {part: str(copy) for part, copy in copies.items()}, *options, "--steps=2")
    for copy in copies.values():
        shutil.rmtree(copy)
    assert main(["train", f"--resume={tmp_path / 'b'}", "--steps=4"]) == 0
    # The schedule of the first two steps is that of two steps, so only what follows a whole run can be compared.
    train(tmp_path / "c", folder, sources, *options, "--steps=2")
    assert main(["train", f"--resume={tmp_path / 'c'}", "--steps=4"]) == 0
    ours, theirs = tensors(tmp_path / "b", CHECKPOINT), tensors(tmp_path / "c", CHECKPOINT)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in tensors(tmp_path / "a", CHECKPOINT).items())


def test_a_run_killed_after_a_checkpoint_resumes_with_the_learning_rates_of_its_parts(
    sources: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--lr_encoder=1e-5", "--lr_decoder=1e-4", "--lr=1e-3"]
    train(tmp_path / "whole", folder, sources, *options)
    crash_at(monkeypatch, 3, crash)
    with pytest.raises(Crash):
        train(tmp_path / "cut", folder, sources, *options)
    monkeypatch.undo()
    assert main(["train", f"--resume={tmp_path / 'cut'}"]) == 0
    ours, theirs = tensors(tmp_path / "cut", CHECKPOINT), tensors(tmp_path / "whole", CHECKPOINT)
    assert [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])] == []


def test_a_run_that_begins_with_another_normalises_as_it_does(
    sources: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    train(tmp_path / "a", folder, sources)
    train(tmp_path / "b", folder, {}, f"--from={tmp_path / 'a'}")
    assert Captioner.from_pretrained(tmp_path / "b").preprocessing.mean == (0.5, 0.4, 0.3)


def test_printed_options_are_accepted_beside_a_part(
    sources: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [f"--{part}={source}" for part, source in sources.items()]
    with pytest.raises(SystemExit):
        main(["train", *parts, "--print_config"])
    (tmp_path / "options.yaml").write_text(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["train", f"--config={tmp_path / 'options.yaml'}", "--print_config"])
    assert capsys.readouterr().out == (tmp_path / "options.yaml").read_text()


def test_a_decoder_may_have_another_tokenizer(sources: dict[str, str], folder: Path, tmp_path: Path) -> None:
    byte_level(("<a>", "<b>")).save(str(tmp_path / "tokenizer.json"))
    names = [f"--tokenizer={tmp_path / 'tokenizer.json'}", "--bos_token=<a>", "--eos_token=<b>"]
    train(tmp_path / "a", folder, {"decoder": sources["decoder"]}, *names, "--image_size=32", "--max_seq_len=80")
    config = read_config(tmp_path / "a")
    assert (config.num_tokens, config.bos_token, config.eos_token) == (310, 0, 1)


def test_features_are_those_of_encode_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(image_size=32).train()
    model.encoder.requires_grad_(False)
    counted: list[int] = []
    model.encoder.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    found = Features(model)
    torch.testing.assert_close(found(IMG), model.encode(IMG))
    assert counted == [1, 1, 1, 3]
    again = found(IMG.flip(0))
    assert counted == [1, 1, 1, 3]
    assert torch.equal(again, found(IMG).flip(0))
    assert model.training
    changed = IMG.clone()
    changed[1, 0, 0, 0] += 1
    assert not torch.equal(found(changed)[1], found(IMG)[1])
    assert len(counted) == 5

    monkeypatch.setattr(parts, "MOST_BYTES", 0)
    counted.clear()
    forgetful = Features(model)
    assert torch.equal(forgetful(IMG), forgetful(IMG))
    assert counted == [1] * 6


def test_augmented_images_are_encoded_each_time(
    sources: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PalmE] = []
    monkeypatch.setattr(Features, "__init__", lambda self, model: made.append(model))
    train(tmp_path / "a", folder, sources, "--freeze=encoder", "--augment")
    train(tmp_path / "b", folder, sources)
    assert not made


@pytest.mark.parametrize(
    ("image_token", "joining"),
    [(None, [f"decoder.net.attn_layers.layers.{place}." for place in (1, 4)]), (31, ["projection."])],
    ids=["cross-attention", "projection"],
)
def test_parts_are_frozen_and_have_their_own_learning_rates(image_token: int | None, joining: list[str]) -> None:
    model = small(decoder_depth=2, image_token=image_token)

    def rates(**options: Any) -> dict[str, float]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = groups(model, Training(lr=1.0, **options))
        return {names[id(parameter)]: group["lr"] for group in found for parameter in group["params"]}

    expected = {}
    for name, _ in model.named_parameters():
        joins = any(name.startswith(prefix) for prefix in joining)
        expected[name] = 1.0 if joins else 2.0 if name.startswith("encoder.") else 3.0
    assert set(expected.values()) == {1.0, 2.0, 3.0}
    assert rates(lr_encoder=2.0, lr_decoder=3.0) == expected
    assert set(rates(lr_encoder=2.0).values()) == {1.0, 2.0}
    every = groups(model, Training())
    assert [id(parameter) for parameter in every] == [id(parameter) for parameter in model.parameters()]

    freeze(model, Training(freeze="encoder,decoder", start="a run"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, rate in expected.items() if rate == 1.0}
    assert rates(lr_decoder=3.0).keys() == trained


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="freeze=encoder,decoder leaves nothing to train: leave a part out"):
        freeze(small(cross_attend=False), Training(freeze="encoder,decoder", start="a run"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--freeze=vit"], "freeze=vit must be encoder, decoder, or encoder,decoder"),
        (["--encoder={encoder}"], "encoder=\\S+ needs images: choose others than data=digits"),
        (["--encoder={encoder}", "--encoder_depth=3"], "encoder_depth=3 is determined by --encoder=\\S+: leave --enc"),
        (
            ["--decoder={decoder}", "--qk_norm=true"],
            "qk_norm=True is determined by --decoder=\\S+: leave --qk_norm out",
        ),
        (["--encoder={decoder}", "--data={data}"], ".*model_type='llama' is not supported"),
        (["--encoder=nowhere/nothing", "--data={data}"], "nowhere/nothing is neither a folder nor a repository"),
        (["--encoder={bare}", "--data={data}"], "encoder=\\S+ must have a preprocessor_config.json that says"),
        (["--freeze=encoder", "--data={data}"], "freeze=encoder would keep a random encoder: pass --encoder, or begin"),
        (
            ["--encoder={encoder}", "--freeze=encoder", "--lr_encoder=1e-4"],
            "lr_encoder=0.0001 has no effect on a frozen encoder: leave it out",
        ),
        (["--encoder={raw}", "--data={data}"], "encoder=\\S+ must have .*: do_normalize=False must be True"),
        (["--encoder={zero}", "--data={data}"], "encoder=\\S+ must have .* must have 3 numbers, none of image_std 0"),
        (["--decoder={bare}", "--data={data}"], "\\S+ cannot be loaded: model_type='vit' is not supported"),
        (["--decoder={silent}", "--data={data}"], "\\S+ has no tokenizer.json: use a folder of save_pretrained"),
        (["--from={run}", "--encoder={encoder}"], "--from=\\S+ has all weights: leave --encoder out"),
    ],
)
def test_errors(
    options: list[str],
    message: str,
    sources: dict[str, str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bare = shutil.copytree(sources["encoder"], tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    silent = shutil.copytree(sources["decoder"], tmp_path / "silent")
    (silent / "tokenizer.json").unlink()
    raw, zero = (shutil.copytree(sources["encoder"], tmp_path / name) for name in ("raw", "zero"))
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (raw / "preprocessor_config.json").write_text(json.dumps(values | {"do_normalize": False}))
    (zero / "preprocessor_config.json").write_text(json.dumps(values | {"image_std": [0.0] * 3}))
    paths = sources | {
        "raw": raw,
        "zero": zero,
        "silent": silent,
        "data": folder,
        "bare": bare,
        "run": tmp_path / "run",
    }
    arguments = [option.format(**paths) for option in options]
    fails(capsys, ["train", f"--run={tmp_path / 'new'}", *arguments], f"{message}.*")
