"""Parity, decoding and model folders on each device: a GPU computes and decodes the same as the CPU."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE
from palme_xt.parity import check, compare, exactly
from palme_xt.parity.drift import PARITY
from palme_xt.storage.folder import load, save
from palme_xt.upstream import loss
from tests.devices import GPU
from tests.models import batch, logits, small
from tests.parity.goldens.make import FOLDER, GOLDENS
from tests.storage.folders import same

GREEDY: dict[str, Any] = {"temperature": 0.0}

# Other tests cover the CPU: here, it shows that these tests are right where there is no GPU.
each_device = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])


def on(device: str, **arguments: Any) -> tuple[PalmE, Tensor, Tensor]:
    """Return a small model with images and texts for it."""
    model = small(**arguments)
    img, text = batch(model, b=3, n=6)
    return model.to(device), img.to(device), text.to(device)


def numbers(model: PalmE, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Return the loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    value = model(img, text)
    value.backward()
    return {"loss": value.detach()} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[float]:
    """Return the distances of tensors, relative to those of `theirs`."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].cpu().double(), value.cpu().double()) for name, value in theirs.items()]
    return [float((a - b).norm() / (b.norm() + 1e-3)) for a, b in pairs]


@each_device
def test_it_is_the_hand_wired_model(device: str) -> None:
    model, img, text = on(device)
    theirs = HandWired(model.config).to(device)
    report = compare(model, theirs, img, text, tolerance=None)
    assert {name for name, outcome in report.outcomes.items() if outcome.result != "agrees"} == {"cached decoding"}
    assert not report.differences
    assert {value.device.type for value in model.state_dict().values()} == {device}
    assert not compare(model, HandWired(small(qk_norm=False).config).to(device), img, text, tolerance=None)


@each_device
def test_it_is_the_model_on_the_cpu(device: str) -> None:
    model, img, text = on(device)
    assert compare(model, small(), img, text, tolerance=None)
    assert not compare(model, small(alibi_num_heads=1), img, text, tolerance=None)


@each_device
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str, device: str) -> None:
    assert check(load(FOLDER / name, device), FOLDER / name / PARITY).difference is None


@each_device
def test_goldens_are_sensitive(device: str, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "default_flags", tmp_path / "run")
    model = load(folder, device)
    with torch.no_grad():
        model.decoder.net.attn_layers.layers[3][1].to_k.weight[0, 0] += 0.01
    difference = check(model, folder / PARITY).difference
    assert re.match(r"decoder\.net\.attn_layers\.layers\.3\.1\.to_k differs by up to", difference or "")


@each_device
def test_the_loss_and_its_gradients_are_those_of_the_exact_path(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_IN_CACHE", 0)  # in chunks
    model, img, text = on(device)
    ours = numbers(model, img, text)
    with exactly():
        theirs = numbers(model, img, text)
    assert max(distances(ours, theirs)) < 1e-4
    assert max(distances(numbers(model, img, text.flip(1)), theirs)) > 0.01


@each_device
def test_bfloat16_is_near(device: str) -> None:
    model, img, text = on(device, max_seq_len=512)
    text = text.repeat(1, 80)
    with torch.no_grad():
        near, far = logits(model, img, text), logits(model, img.flip(0), text)
        rough = logits(model.bfloat16(), img.bfloat16(), text)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - near).norm() < 0.05 * near.norm()
    assert (far - near).norm() > 0.1 * near.norm()


@each_device
def test_cached_decoding_is_uncached_decoding(device: str) -> None:
    model, img, text = on(device)
    prompts = [text[0, :1], text[1, :6], text[2, :3]]
    tokens = model.generate(img, prompts, 8, **GREEDY)
    assert tokens.device.type == device
    assert torch.equal(tokens, model.generate(img, prompts, 8, cache_kv=False, **GREEDY))
    alone = [model.generate(img[row : row + 1], prompt, 8, **GREEDY) for row, prompt in enumerate(prompts)]
    assert torch.equal(tokens, torch.cat(alone))
    assert torch.equal(tokens, torch.stack(list(model.stream(img, prompts, 8, **GREEDY)), dim=1))
    assert not torch.equal(tokens, model.generate(img.flip(0), prompts, 8, **GREEDY))


@each_device
def test_decoding_on_each_device_is_that_of_the_cpu(device: str) -> None:
    model, img, text = on(device)
    eos = int(model.generate(img, text, 8, **GREEDY)[0, 3])
    kwargs: dict[str, Any]
    for kwargs in {}, {"eos_token": eos}, {"prompt_lens": torch.tensor([6, 1, 4])}:
        there: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        expected = small().generate(img.cpu(), text.cpu(), 8, **GREEDY, **kwargs)
        assert torch.equal(model.generate(img, text, 8, **GREEDY, **there).cpu(), expected)
    texts, scores = model.beam_search(img, text, 8, beams=3, eos_token=eos)
    expected, expected_scores = small().beam_search(img.cpu(), text.cpu(), 8, beams=3, eos_token=eos)
    assert torch.equal(texts.cpu(), expected)
    torch.testing.assert_close(scores.cpu(), expected_scores, rtol=1e-4, atol=1e-4)


@each_device
def test_sampling_repeats_with_a_generator_of_the_device(device: str) -> None:
    model, img, text = on(device)
    runs = [model.generate(img, text, 8, generator=torch.Generator(device).manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("device", [GPU])  # test_compile.py has the CPU
def test_compiled_training_computes_the_same(device: str) -> None:
    torch._dynamo.reset()
    model, img, text = on(device)
    eager = numbers(model, img, text)
    model.compile(fullgraph=True)
    assert max(distances(numbers(model, img, text), eager)) < 1e-4


@each_device
def test_a_folder_holds_the_model_of_any_device(device: str, tmp_path: Path) -> None:
    model, img, text = on(device)
    expected = model.generate(img, text, 8, **GREEDY)
    save(model, tmp_path)
    loaded, here = load(tmp_path, device), load(tmp_path)
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {device}
    assert {tensor.device.type for tensor in here.state_dict().values()} == {"cpu"}
    assert same(loaded, model)
    assert same(here, small())
    assert not same(here, small(seed=1))
    assert torch.equal(loaded.generate(img, text, 8, **GREEDY), expected)
    with torch.no_grad():
        assert torch.equal(logits(loaded, img, text), logits(model.eval(), img, text))
