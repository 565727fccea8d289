"""PalmE and the hand-wired upstream composition are the same model, with the same parameters and numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE, PalmEConfig
from palme_xt.parity import exactly
from palme_xt.strategies import batches, configs


def same_weights(config: PalmEConfig, seed: int = 0) -> tuple[PalmE, HandWired]:
    """Return both models with the same random weights, none at an initial value that would hide its effect."""
    torch.manual_seed(seed)
    palme, hand_wired = PalmE.from_config(config), HandWired(config)
    with torch.no_grad():
        for parameter in hand_wired.parameters():
            parameter.normal_(std=0.2)
    palme.load_state_dict(hand_wired.state_dict())
    return palme, hand_wired


def numbers(model: nn.Module, img: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Return loss, logits and the gradient of every parameter that has one."""
    loss, (logits, _) = model(img, text, return_outputs=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, "logits": logits, **gradients}


@given(st.data())
def test_loss_logits_and_gradients_are_bitwise_those_of_the_hand_wired_model(data: st.DataObject) -> None:
    config = data.draw(configs())
    img, text = data.draw(batches(config))
    palme, hand_wired = same_weights(config)
    with exactly():
        ours, theirs = numbers(palme, img, text), numbers(hand_wired, img, text)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(ours[name], value), name


@given(configs())
def test_parameters_and_buffers_have_the_names_and_shapes_of_the_hand_wired_model(config: PalmEConfig) -> None:
    shapes = {name: value.shape for name, value in PalmE.from_config(config).state_dict().items()}
    assert shapes == {name: value.shape for name, value in HandWired(config).state_dict().items()}


@given(st.data())
def test_negative_control_one_changed_weight_changes_the_loss(data: st.DataObject) -> None:
    config = data.draw(configs())
    img, text = data.draw(batches(config))
    palme, hand_wired = same_weights(config)
    with torch.no_grad():
        last = [module for module in palme.decoder.modules() if isinstance(module, nn.Linear)][-1]
        last.weight[0] += 1
    ours, theirs = (model(img, text, return_outputs=True)[0] for model in (palme, hand_wired))
    assert not torch.equal(ours, theirs)


@given(configs(attn_flash=False))
def test_negative_control_other_flags_with_the_same_weights_give_other_logits(config: PalmEConfig) -> None:
    torch.manual_seed(0)
    palme = PalmE.from_config(config)
    img = torch.randn(2, config.channels, config.image_size, config.image_size)
    text = torch.randint(config.num_tokens, (2, 8))
    with torch.no_grad():
        for parameter in palme.parameters():
            parameter.normal_(std=0.5)
        flipped = PalmE.from_config(
            PalmEConfig.from_dict(config.to_dict() | {"alibi_pos_bias": not config.alibi_pos_bias})
        )
        flipped.load_state_dict(palme.state_dict())
        ours, theirs = (model(img, text, return_outputs=True)[1][0] for model in (palme, flipped))
    assert not torch.equal(ours, theirs)


def test_the_default_configuration_at_full_size() -> None:
    config = PalmEConfig()
    palme, hand_wired = same_weights(config)
    img, text = torch.randn(1, 3, 256, 256), torch.randint(20000, (1, 40))
    with exactly():
        ours, theirs = numbers(palme, img, text), numbers(hand_wired, img, text)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    palme.zero_grad()
    for name, value in numbers(palme, img, text).items():  # within rounding without the switch
        assert (value - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-6, name
