"""The composition: its attributes, the inputs and outputs of forward, several images, and no image."""

from __future__ import annotations

import inspect
import pydoc
import re
from dataclasses import fields

import pytest
import torch
import x_transformers

import palme_xt
from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig
from palme_xt.parity import exactly
from tests.models import batch, logits, small


def test_the_attributes_are_upstreams_classes() -> None:
    model = small()
    assert isinstance(model, torch.nn.Module)
    assert isinstance(model.encoder, x_transformers.ViTransformerWrapper)
    assert isinstance(model.encoder.attn_layers, x_transformers.Encoder)
    assert isinstance(model.decoder, x_transformers.AutoregressiveWrapper)
    assert isinstance(model.decoder.net, x_transformers.TransformerWrapper)
    assert isinstance(model.decoder.net.attn_layers, x_transformers.Decoder)


def test_checkpoints_of_hand_wired_modules_load_as_they_are() -> None:
    model = small()
    hand_wired = HandWired(model.config)
    img, text = batch(model)
    assert not torch.equal(logits(model, img, text), logits(hand_wired, img, text))
    model.encoder.load_state_dict(hand_wired.encoder.state_dict())
    model.decoder.load_state_dict(hand_wired.decoder.state_dict())
    expected = logits(hand_wired, img, text)
    with exactly():
        assert torch.equal(logits(model, img, text), expected)
    torch.testing.assert_close(logits(model, img, text), expected)


def test_forward_returns_what_the_wrapper_returns() -> None:
    model = small()
    img, text = batch(model)
    loss = model(img, text)
    assert loss.shape == ()
    again, (values, cache) = model(img, text, return_outputs=True)
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
    assert values.shape == (2, 9, 32)
    assert len(cache.attn_intermediates) == 4  # self- and cross-attention of two blocks


def test_the_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model = small()
    img, text = batch(model)
    values = logits(model, img, text)
    expected = torch.nn.functional.cross_entropy(values.flatten(0, 1), text[:, 1:].flatten())
    torch.testing.assert_close(model(img, text), expected)


def test_ignored_targets_do_not_count() -> None:
    model = small()
    img, text = batch(model)
    ignored = text.clone()
    ignored[:, 6:] = -100
    torch.testing.assert_close(model(img, ignored), model(img, text[:, :6]))


def test_keywords_of_the_wrapper_pass_through() -> None:
    model = small()
    img, text = batch(model)
    lens = torch.tensor([4, 7])
    padded = text.masked_fill(torch.arange(10) >= lens[:, None], -100)
    assert torch.equal(model(img, text, lens=lens), model(img, padded))

    mask = torch.tensor([[True, True, False, False]]).expand(2, -1)
    context = model.encode(img)
    masked = logits(model, img, text, context_mask=mask)
    torch.testing.assert_close(masked, logits(model, None, text, context=context[:, :2]))
    assert not torch.allclose(masked, logits(model, img, text))

    prepended = logits(model, img, text, prepend_embeds=torch.randn(2, 3, 32))
    assert prepended.shape == (2, 9, 32)


def test_encode_gives_the_patch_embeddings() -> None:
    model = small()
    img, _ = batch(model)
    context = model.encode(img)
    assert context.shape == (2, 4, 24)
    assert torch.equal(context, model.encoder(img, return_embeddings=True))


def test_an_encoded_image_can_be_used_again() -> None:
    model = small()
    img, text = batch(model)
    assert torch.equal(model(None, text, context=model.encode(img)), model(img, text))


def test_several_images_are_one_context_after_another() -> None:
    model = small()
    first, text = batch(model)
    second, _ = batch(model, seed=2)
    both = torch.stack([first, second], dim=1)
    context = model.encode(both)
    assert context.shape == (2, 8, 24)
    torch.testing.assert_close(context, torch.cat([model.encode(first), model.encode(second)], dim=1))
    torch.testing.assert_close(model(both, text), model(None, text, context=context))
    torch.testing.assert_close(model(first[:, None], text), model(first, text))
    assert not torch.allclose(model(both, text), model(first, text))


def test_text_only() -> None:
    model = small(cross_attend=False)
    img, text = batch(model)
    assert torch.equal(model(None, text), model(img, text))
    assert torch.equal(model(None, text), model(torch.full_like(img, torch.nan), text))

    model(None, text).backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad != (parameter.grad is not None)
    ]
    assert without == []
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_with_an_image_every_parameter_gets_a_gradient() -> None:
    model = small()
    model(*batch(model)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int) -> None:
    model = small(vit_kwargs={"channels": channels})
    assert torch.isfinite(model(*batch(model)))


def test_a_subclass_is_built_from_a_config() -> None:
    class Mine(PalmE):
        pass

    mine: Mine = Mine.from_config(small().config)  # the type checker is told so too
    assert type(mine) is Mine


def test_help_and_completion_find_the_names_that_are_loaded_when_used() -> None:
    assert set(palme_xt.__all__) <= set(dir(palme_xt))
    assert "class PalmE(" in pydoc.plain(pydoc.render_doc(palme_xt))


def test_help_documents_the_arguments() -> None:
    shown = pydoc.plain(pydoc.render_doc(PalmE))
    for argument in fields(PalmEConfig):
        assert re.search(rf"^ \| +{argument.name}: [A-Za-z]", shown, re.MULTILINE), argument.name
    assert "Continue prompts about images" in (PalmE.generate.__doc__ or "")


def test_forward_names_its_common_keywords() -> None:
    parameters = inspect.signature(PalmE.forward).parameters
    masks = ["lens", "context", "context_mask", "target_mask", "prompt_lens", "image_embeds"]
    assert list(parameters) == ["self", "img", "text", "return_outputs", *masks, "kwargs"]
    assert {parameters[name].kind for name in ("return_outputs", "lens")} == {inspect.Parameter.KEYWORD_ONLY}
