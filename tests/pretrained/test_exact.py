"""What is loaded computes what transformers computes, for random models of each family, and its config is proven."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from x_transformers import AutoregressiveWrapper, ViTransformerWrapper

from palme_xt import PalmE, PalmEConfig, hub
from palme_xt.adoption import find_difference
from palme_xt.parity import compare
from palme_xt.pretrained import load_decoder, load_encoder
from palme_xt.source import to_source

pytest.importorskip("transformers")

from tests.pretrained.families import DECODERS, ENCODERS, decoders, difference, encoders, images, patches, vision

TOLERANCE = 1e-5
CHANGED = 1e-3
each_encoder = pytest.mark.parametrize("family", ENCODERS)
each_decoder = pytest.mark.parametrize("family", DECODERS)


def with_models(check: Callable[[Any], None], models: st.SearchStrategy[Any], examples: int) -> None:
    settings(max_examples=examples, deadline=None)(given(models)(check))()


def example(models: st.SearchStrategy[Any], seed: int = 0) -> Any:
    """Return one model, which is the same in every call."""
    found: list[Any] = []
    settings(max_examples=seed + 2, deadline=None, database=None)(given(models)(lambda model: found.append(model)))()
    return found[-1]


def text(model: Any, n: int = 9) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, n), generator=torch.Generator().manual_seed(0))


def encodings(encoder: Any, model: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return our embeddings and theirs, and the gradients of the images."""
    theirs, ours = images(model, encoder)
    theirs.requires_grad_()
    ours.requires_grad_()
    weights = torch.randn(encoder.attn_layers.dim, generator=torch.Generator().manual_seed(1))
    found, wanted = encoder(ours, return_embeddings=True), patches(model, theirs)
    (gradient,) = torch.autograd.grad((found @ weights).square().sum(), ours)
    (expected,) = torch.autograd.grad((wanted @ weights).square().sum(), theirs)
    return found, wanted, gradient, expected[..., : ours.shape[-2], : ours.shape[-1]]


def check_encoder(model: Any) -> None:
    encoder = load_encoder(model)
    assert type(encoder) is ViTransformerWrapper
    found, wanted, gradient, expected = encodings(encoder, model)
    assert found.shape == wanted.shape
    assert difference(found, wanted) < TOLERANCE
    assert difference(gradient, expected) < TOLERANCE * 5


def check_decoder(model: Any) -> None:
    decoder = load_decoder(model)
    assert isinstance(decoder, AutoregressiveWrapper)
    tokens, net = text(model), decoder.net
    everywhere = torch.ones_like(tokens)
    theirs = model(tokens, labels=tokens, output_hidden_states=True, attention_mask=everywhere)
    assert difference(net(tokens), theirs.logits) < TOLERANCE
    assert difference(net(tokens, return_embeddings=True), theirs.hidden_states[-1]) < TOLERANCE
    loss = decoder(tokens)
    assert difference(loss, theirs.loss) < TOLERANCE
    (gradient,) = torch.autograd.grad(loss, [net.token_emb.emb.weight])
    (expected,) = torch.autograd.grad(theirs.loss, [model.get_input_embeddings().weight])
    rows = torch.arange(len(expected)) != model.config.pad_token_id  # nn.Embedding gives this row no gradient
    assert difference(gradient[rows], expected[rows]) < TOLERANCE * 5
    assert torch.equal(greedy(model, tokens), decoder.generate(tokens, 8, temperature=0.0, cache_kv=True))


def greedy(model: Any, tokens: Tensor, n: int = 8) -> Tensor:
    """Return the tokens that transformers decodes with its cache, without end."""
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    how = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    decoded: Tensor = model.generate(tokens, **how)
    return decoded[:, tokens.shape[1] :]


@each_encoder
def test_encoder_agrees(family: str) -> None:
    with_models(check_encoder, encoders(family), 1)


@each_decoder
def test_decoder_agrees(family: str) -> None:
    with_models(check_decoder, decoders(family), 1)


@pytest.mark.slow
@each_encoder
def test_many_encoders_agree(family: str) -> None:
    with_models(check_encoder, encoders(family), 50)


@pytest.mark.slow
@each_decoder
def test_many_decoders_agree(family: str) -> None:
    with_models(check_decoder, decoders(family), 50)


@pytest.mark.slow
@each_encoder
def test_every_tensor_of_an_encoder_counts(family: str) -> None:
    """A change of any tensor changes what is loaded as it changes the model of transformers, or neither."""

    def outputs(model: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            encoder = load_encoder(model)
            theirs, ours = images(model, encoder)
            return encoder(ours, return_embeddings=True), patches(model, theirs)

    unused = (
        r"pooler|classifier|head\.|mask_token|post_layernorm" if family in ("vit", "clip", "siglip") else "mask_token"
    )
    check_every_tensor(example(encoders(family).filter(has_patches), 3), outputs, unused)


@pytest.mark.slow
@each_decoder
def test_every_tensor_of_a_decoder_counts(family: str) -> None:
    """A change of any tensor changes what is loaded as it changes the model of transformers, or neither."""

    def outputs(model: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            tokens = text(model, 16)
            return load_decoder(model).net(tokens), model(tokens, attention_mask=torch.ones_like(tokens)).logits

    check_every_tensor(example(decoders(family), 3), outputs, "nothing")


def check_every_tensor(model: Any, outputs: Callable[[Any], tuple[Tensor, Tensor]], unused: str) -> None:
    before, _ = outputs(model)
    counting = 0
    for name, parameter in model.named_parameters():
        saved = parameter.data.clone()
        parameter.data += torch.randn(saved.shape, generator=torch.Generator().manual_seed(2))
        ours, theirs = outputs(model)
        parameter.data = saved
        assert difference(ours, theirs) < TOLERANCE, name
        changed = difference(theirs, before) > CHANGED
        assert (difference(ours, before) > CHANGED) == changed, name
        counting += changed
        # Without rotary positions, a bias of the keys changes all scores of a query alike.
        assert changed or name.endswith(("k_proj.bias", "c_attn.bias")) or is_unused(name, unused), name
    assert counting > 20


def has_patches(model: Any) -> bool:
    """Return whether there are several patches: to a single one, SigLIP attends whatever the queries and keys are."""
    return int(vision(model).config.image_size) >= 2 * int(vision(model).config.patch_size)


def is_unused(name: str, pattern: str) -> bool:
    other = ("text_model.", "logit_scale", "logit_bias", "visual_projection", "text_projection")
    return name.startswith(other) or any(
        part in name.replace("\\", "") for part in pattern.replace("\\", "").split("|")
    )


@each_encoder
@pytest.mark.slow
def test_positions_are_interpolated(family: str) -> None:
    def check(model: Any) -> None:
        size = 4 * load_encoder(model).patch_size
        encoder = load_encoder(model, image_size=size)
        config = PalmEConfig(**{"image_size": size, "patch_size": encoder.patch_size})
        assert encoder.pos_embedding.shape[1] == (config.image_size // config.patch_size) ** 2 == 16
        img = torch.randn(2, encoder.patch_to_embedding[1].in_features // encoder.patch_size**2, size, size)
        how = {} if family.startswith("dinov2") else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            assert difference(encoder(img, return_embeddings=True), patches(model, img, **how)) < TOLERANCE

    with_models(check, encoders(family), 20)


def check_proof(encoder_model: Any, decoder_model: Any, folder: Path) -> None:
    """The config is proven, and rebuilds the model without the sources; the text is continued as before."""
    encoder, decoder = load_encoder(encoder_model), load_decoder(decoder_model)
    plain = PalmE.from_modules(encoder, decoder, cross_attend=False)
    assert type(plain.config) is PalmEConfig
    assert find_difference(plain.config, encoder, decoder) is None

    folders = [folder / "encoder", folder / "decoder"]
    for model, path in zip((encoder_model, decoder_model), folders, strict=True):
        model.save_pretrained(path)
    model = hub.PalmE.from_modules(load_encoder(folders[0]), load_decoder(folders[1]))
    assert model.config.cross_attend
    assert model.config.sources == {"encoder": str(folders[0]), "decoder": str(folders[1])}
    for path in folders:
        shutil.rmtree(path)
    _, img = images(encoder_model, encoder)
    tokens = text(decoder_model)
    with torch.no_grad():
        assert difference(model.decoder.net(tokens, context=model.encode(img)), decoder.net(tokens)) < TOLERANCE
        assert torch.equal(model.encode(img), encoder(img, return_embeddings=True))
    assert torch.equal(model.generate(img, tokens, 8, eos_token=[], temperature=0.0), greedy(decoder_model, tokens))

    model.save_pretrained(folder / "palme")
    again = hub.PalmE.from_pretrained(folder / "palme")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    program: dict[str, Any] = {}
    exec(to_source(model.config), program)
    assert compare(again, (program["encoder"], program["decoder"]))


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "decoder"), zip(ENCODERS, DECODERS, strict=True))
def test_the_config_is_proven_and_rebuilds_the_model(encoder: str, decoder: str, tmp_path: Path) -> None:
    check_proof(example(encoders(encoder)), example(decoders(decoder)), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    for loaded in (
        load_encoder(example(encoders("clip")), dtype=dtype),
        load_decoder(example(decoders("qwen3")), dtype=dtype),
    ):
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert {buffer.dtype for buffer in loaded.buffers()} <= {torch.float32}
        assert not loaded.training
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
