"""Each of the 17 arguments has a visible effect, or none under a condition that is stated here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from palme_xt import PalmE
from tests.models import SMALL, batch, logits, small
from tests.test_config import CONTRACT

Shown = Callable[[PalmE], Any]


def attn(model: PalmE) -> Any:
    """Return the first self-attention of the decoder."""
    return model.decoder.net.attn_layers.layers[0][1]


SHOWN: dict[str, tuple[Any, Shown, Any]] = {
    "image_size": (12, lambda m: m.encoder.pos_embedding.shape, (1, 9, 24)),
    "patch_size": (2, lambda m: m.encoder.pos_embedding.shape, (1, 16, 24)),
    "encoder_dim": (40, lambda m: m.encoder.pos_embedding.shape, (1, 4, 40)),
    "encoder_depth": (3, lambda m: len(m.encoder.attn_layers.layers), 6),
    "encoder_heads": (3, lambda m: m.encoder.attn_layers.layers[0][1].heads, 3),
    "num_tokens": (50, lambda m: m.decoder.net.to_logits.weight.shape, (50, 32)),
    "max_seq_len": (20, lambda m: (m.decoder.max_seq_len, m.decoder.net.max_seq_len), (20, 20)),
    "decoder_dim": (48, lambda m: m.decoder.net.token_emb.emb.weight.shape, (32, 48)),
    "decoder_depth": (3, lambda m: len(m.decoder.net.attn_layers.layers), 9),
    "decoder_heads": (8, lambda m: attn(m).heads, 8),
    "alibi_num_heads": (3, lambda m: m.decoder.net.attn_layers.alibi.slopes.shape, (3, 1, 1)),
    "use_abs_pos_emb": (True, lambda m: "pos_emb.emb.weight" in m.decoder.net.state_dict(), False),
    "cross_attend": (False, lambda m: m.decoder.net.attn_layers.layer_types, ("a", "f") * 2),
    "alibi_pos_bias": (False, lambda m: m.decoder.net.attn_layers.alibi, None),
    "rotary_xpos": (False, lambda m: m.decoder.net.attn_layers.rotary_pos_emb, None),
    "attn_flash": (False, lambda m: attn(m).attend.flash, False),
    "qk_norm": (False, lambda m: attn(m).qk_norm, False),
}
INERT_IN_THE_STRUCTURE = {"use_abs_pos_emb"}  # with rotary positions, the default; a warning says so, tested below


def test_all_arguments_are_here() -> None:
    assert list(SHOWN) == list(CONTRACT)


@pytest.mark.parametrize("argument", SHOWN)
def test_the_argument_shows(argument: str) -> None:
    value, shown, expected = SHOWN[argument]
    assert value != SMALL.get(argument, CONTRACT[argument])
    assert shown(small(**{argument: value})) == expected
    assert (shown(small()) == expected) == (argument in INERT_IN_THE_STRUCTURE)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("alibi_num_heads", 1), ("alibi_pos_bias", False), ("rotary_xpos", False), ("qk_norm", False)],
)
def test_flags_without_parameters_change_the_logits(argument: str, value: Any) -> None:
    model, changed = small(), small(**{argument: value})
    changed.load_state_dict(model.state_dict(), strict=argument != "rotary_xpos")
    img, text = batch(model)
    difference = (logits(model, img, text) - logits(changed, img, text)).abs().max()
    assert difference > 1e-2


def test_flash_computes_the_same_by_another_way() -> None:
    model, flash = small(attn_flash=False), small(attn_flash=True)
    flash.load_state_dict(model.state_dict())
    img, text = batch(model)
    ours, theirs = logits(flash, img, text), logits(model, img, text)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, theirs)  # otherwise the flag would have no effect


def test_alibi_num_heads_is_inert_without_alibi() -> None:
    one, four = (small(alibi_pos_bias=False, alibi_num_heads=heads) for heads in (1, 4))
    img, text = batch(one)
    assert torch.equal(logits(one, img, text), logits(four, img, text))


def test_use_abs_pos_emb_adds_a_table_without_rotary_positions_or_on_request() -> None:
    for arguments in {"rotary_xpos": False}, {"decoder_kwargs": {"disable_abs_pos_emb": False}}:
        model = small(use_abs_pos_emb=True, **arguments)
        table = model.decoder.net.pos_emb.emb.weight
        assert table.shape == (16, 32)
        img, text = batch(model)
        before = logits(model, img, text)
        with torch.no_grad():
            table.zero_()
        assert not torch.equal(logits(model, img, text), before)


def test_max_seq_len_is_inert_in_forward_without_absolute_positions() -> None:
    short, long = small(max_seq_len=8), small(max_seq_len=64)
    img, text = batch(short, n=20)
    assert torch.equal(logits(short, img, text), logits(long, img, text))


def test_max_seq_len_sizes_the_table_of_absolute_positions() -> None:
    model = small(use_abs_pos_emb=True, rotary_xpos=False, max_seq_len=20)
    assert model.decoder.net.pos_emb.emb.weight.shape == (20, 32)


def test_encoder_and_decoder_may_be_of_any_width() -> None:
    for encoder_dim, decoder_dim in (8, 64), (64, 8), (20, 36):
        model = small(encoder_dim=encoder_dim, decoder_dim=decoder_dim)
        img, text = batch(model)
        assert model.encode(img).shape == (2, 4, encoder_dim)
        assert logits(model, img, text).shape == (2, 9, 32)


@pytest.mark.parametrize("dim", [8, 24, 64])
def test_one_head_of_any_dimension(dim: int) -> None:
    model = small(encoder_dim=dim, decoder_dim=dim, encoder_heads=1, decoder_heads=1, alibi_num_heads=1)
    img, text = batch(model)
    assert torch.isfinite(model(img, text))
    # With one head as wide as the model, upstream has no output projection. PalmE has none either, to load checkpoints.
    assert isinstance(attn(model).to_out, torch.nn.Identity) == (dim == 8)


def test_qk_norm_reaches_cross_attention_unless_told_otherwise() -> None:
    cross = lambda model: model.decoder.net.attn_layers.layers[1][1]  # noqa: E731
    assert cross(small()).qk_norm
    assert not cross(small(decoder_kwargs={"cross_attn_qk_norm": False})).qk_norm
    assert attn(small(decoder_kwargs={"cross_attn_qk_norm": False})).qk_norm
