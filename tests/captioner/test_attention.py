"""Compare attention maps with upstream's own attention, and check which tokens wrote which word."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from x_transformers import x_transformers as upstream

from palme_xt import PalmE, tokens
from palme_xt.captioner.attention import cross_attention_maps, word_maps, words
from tests.models import batch, logits, small


def twin(model: PalmE, **arguments: Any) -> PalmE:
    """Return a model with the same weights, without flash attention."""
    other = small(attn_flash=False, **arguments)
    other.load_state_dict(model.state_dict())
    return other.eval()


def upstreams(model: PalmE, img: Tensor, text: Tensor, layer: int) -> Tensor:
    """Return upstream's own attention without flash attention, `(b, n - 1, keys)`."""
    with torch.no_grad():
        _, intermediates = model.decoder.net(text[:, :-1], context=model.encode(img), return_intermediates=True)
    crosses = [each for each in intermediates.attn_intermediates if each.layer_type == "c"]
    weights: Tensor = crosses[layer].post_softmax_attn.mean(dim=1)
    return weights


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no qk_norm": {"qk_norm": False},
    "absolute positions": {"rotary_xpos": False, "alibi_pos_bias": False, "use_abs_pos_emb": True},
    "grouped heads": {"decoder_kwargs": {"attn_kv_heads": 2}},
    "one key-value head": {"decoder_kwargs": {"attn_one_kv_head": True}},
    "l2 distance": {"qk_norm": False, "decoder_kwargs": {"attn_l2_distance": True}},
    "residual streams": {"decoder_kwargs": {"num_residual_streams": 2}},
    "register tokens": {"vit_kwargs": {"num_register_tokens": 2}},
    "one block, run twice": {"decoder_kwargs": {"weight_tie_layers": True}},
    "blocks in another order": {
        "decoder_depth": 3,
        "decoder_kwargs": {"layers_execute_order": (0, 1, 2, 6, 7, 8, 3, 4, 5)},
    },
}
WITH_OTHER_KEYS: dict[str, dict[str, Any]] = {
    "memory key-values": {"decoder_kwargs": {"attn_num_mem_kv": 3}},
    "memory of grouped heads": {"decoder_kwargs": {"attn_num_mem_kv": 2, "attn_kv_heads": 2}},
    "a zero key": {"decoder_kwargs": {"attn_add_zero_kv": True}},
}


@pytest.mark.parametrize(
    "arguments", [*VARIANTS.values(), *WITH_OTHER_KEYS.values()], ids=[*VARIANTS, *WITH_OTHER_KEYS]
)
def test_maps_are_upstreams_attention(arguments: dict[str, Any]) -> None:
    model = small(**arguments).eval()
    other = twin(model, **arguments)
    img, text = batch(model)
    assert (logits(model, img, text) - logits(other, img, text)).abs().max() < 1e-3 * logits(model, img, text).std()
    for layer in (0, 1, -1):
        maps = cross_attention_maps(model, img, text, layer)
        assert maps.shape == (2, 9, 2, 2)
        assert maps.dtype == torch.float32
        expected = upstreams(other, img, text, layer)
        torch.testing.assert_close(maps.flatten(2), expected[..., -4:], atol=1e-4, rtol=0)
        torch.testing.assert_close(cross_attention_maps(other, img, text, layer), maps, atol=1e-4, rtol=0)
        assert (maps.flatten(2) - upstreams(other, img, text, (layer + 1) % 2)[..., -4:]).abs().max() > 0.05
        assert (maps.flatten(2) - upstreams(other, img.flip(0), text, layer)[..., -4:]).abs().max() > 0.01
        assert (maps - maps.mT).abs().max() > 0.05  # rows and columns are not swapped


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_maps_sum_to_one_over_the_patches_alone(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    sums = cross_attention_maps(model, *batch(model)).sum(dim=(-1, -2))
    torch.testing.assert_close(sums, torch.ones(2, 9))


@pytest.mark.parametrize("arguments", WITH_OTHER_KEYS.values(), ids=WITH_OTHER_KEYS)
def test_other_keys_take_a_share(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    maps = cross_attention_maps(model, *batch(model))
    assert (maps > 0).all()
    assert (maps.sum(dim=(-1, -2)) < 1).all()
    assert maps.sum(dim=(-1, -2)).min() < 0.98


def test_maps_are_the_softmax_of_queries_and_keys() -> None:
    model = small(qk_norm=False).eval()
    img, text = batch(model)
    cross = [m for m in model.decoder.net.attn_layers.modules() if isinstance(m, upstream.Attention) and not m.causal]
    projected: list[Tensor] = []
    hooks = [
        to.register_forward_hook(lambda *call: projected.append(call[-1])) for to in (cross[1].to_q, cross[1].to_k)
    ]
    model.decoder.net(text[:, :-1], context=model.encode(img))
    for hook in hooks:
        hook.remove()
    q, k = (rearrange(each, "b n (h d) -> b h n d", h=4) for each in projected)
    expected = (q @ k.mT * 8**-0.5).softmax(dim=-1).mean(dim=1).reshape(2, 9, 2, 2)
    torch.testing.assert_close(cross_attention_maps(model, img, text), expected)
    assert (cross_attention_maps(model, img, text, 0) - expected).abs().max() > 0.05


def test_memory_tokens_come_before_the_text() -> None:
    model = small(transformer_kwargs={"num_memory_tokens": 3}, attn_flash=False).eval()
    img, text = batch(model)
    weights = upstreams(model, img, text, -1)
    assert weights.shape == (2, 12, 4)
    maps = cross_attention_maps(model, img, text).flatten(2)
    torch.testing.assert_close(maps, weights[:, 3:])
    assert (maps - weights[:, :-3]).abs().max() > 0.05


def test_a_map_knows_the_tokens_before_it_alone() -> None:
    model = small()
    img, text = batch(model)
    changed = text.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 32
    difference = cross_attention_maps(model, img, text) - cross_attention_maps(model, img, changed)
    assert difference[:, :5].abs().max() < 1e-5
    assert (difference[:, 5:].abs().amax(dim=(2, 3)) > 1e-4).all()


def test_low_precision() -> None:
    model = small(qk_norm=False).eval()
    img, text = batch(model)
    expected = cross_attention_maps(model, img, text)
    maps = cross_attention_maps(model.to(torch.bfloat16), img, text)
    assert maps.dtype == torch.float32
    assert (maps - expected).abs().mean() < 0.05 < (maps.flip(0) - expected).abs().mean()


def test_the_model_is_as_before() -> None:
    model = small(decoder_kwargs={"attn_dropout": 0.5}).train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    img, text = batch(model)
    rng = torch.get_rng_state()
    maps = cross_attention_maps(model, img, text)
    assert not maps.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(cross_attention_maps(model.eval(), img, text), maps, atol=0, rtol=0)
    with pytest.raises(IndexError):
        cross_attention_maps(break_(model.train()), img, text)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def break_(model: PalmE) -> PalmE:
    """A model that fails after its cross-attentions."""

    def fail(*call: object) -> None:
        raise IndexError("broken")

    model.decoder.net.to_logits.register_forward_hook(fail)
    return model


def test_adopted_modules_and_narrow_dtypes() -> None:
    model = small()
    img, text = batch(model)
    expected = cross_attention_maps(model, img, text)
    adopted = PalmE.from_modules(model.encoder, model.decoder)
    assert torch.equal(cross_attention_maps(adopted, img.double(), text.to(torch.int16)), expected)


def add(model: PalmE, patches: int) -> PalmE:
    model.encoder.register_forward_hook(lambda _, __, out: torch.cat([out, out[:, :patches]], dim=1))
    return model


IMG, TEXT = batch(small())


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (small(cross_attend=False), (IMG, TEXT), ValueError, "model has cross_attend=False, must be True: there are"),
        (small(), (IMG, TEXT, 2), ValueError, "layer=2 must be an int within -2..1, one per cross-attention"),
        (small(), (IMG, TEXT, -3), ValueError, "layer=-3 must be an int within -2..1, one per cross-attention"),
        (
            small(decoder_kwargs={"weight_tie_layers": True}),
            (IMG, TEXT, 2),
            ValueError,
            "layer=2 must be an int within -2..1, one per cross-attention",
        ),
        (
            small(transformer_kwargs={"num_memory_tokens": 2, "memory_tokens_interspersed_every": 5}),
            (IMG, TEXT),
            ValueError,
            "model attends from 14 positions, must be 11, its memory tokens and text's: build it without memory_token",
        ),
        (small(), (IMG, TEXT, 1.0), ValueError, "layer=1.0 must be an int within"),
        (small(), (IMG, TEXT, True), ValueError, "layer=True must be an int within"),
        (
            small(),
            (IMG[:, None].expand(-1, 2, -1, -1, -1), TEXT),
            ValueError,
            "model encodes img of shape (2, 2, 3, 8, 8) to 8 embeddings, must be 2x2, one per patch: pass one image",
        ),
        (small(), (IMG[:1], TEXT), ValueError, "text has shape (2, 10) and img (1, 3, 8, 8), must have the same batch"),
        (small(), (IMG, TEXT[:, :1]), ValueError, "text has shape (2, 1), must have at least 2 tokens"),
        (small(), (IMG, TEXT.float()), TypeError, "text has dtype torch.float32, must be an integer dtype"),
        (small(), (IMG, TEXT.clone().fill_(32)), ValueError, "text has ids from 32 to 32; "),
        (
            small(),
            (IMG, TEXT.index_fill(1, torch.tensor([9]), -100)),
            ValueError,
            "text has ignore_index=-100, must hold only token ids: group texts by length",
        ),
        (
            add(small(), 1),
            (IMG, TEXT),
            ValueError,
            "model encodes img of shape (2, 3, 8, 8) to 5 embeddings, must be 2x2, one per patch: pass one image per",
        ),
    ],
)
def test_what_cannot_be_mapped(model: PalmE, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cross_attention_maps(model, *arguments)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        (["", ""], []),
        ([" ", "\n"], []),
        (["a"], [("a", [0])]),
        (["a", "b", " ", "c"], [("ab", [0, 1]), ("c", [3])]),
        (["he", "llo", " world", "s"], [("hello", [0, 1]), ("worlds", [2, 3])]),
        (["a b", "c"], [("a", [0]), ("bc", [0, 1])]),
        (["a ", "b"], [("a", [0]), ("b", [1])]),
        (["  a\tb  c "], [("a", [0]), ("b", [0]), ("c", [0])]),
        (["x", "", "é"], [("xé", [0, 1, 2])]),
        (["", "", "", "\U0001f600", "!"], [("\U0001f600!", [0, 1, 2, 3, 4])]),
        (["a", "", "\u00a0", "b"], [("a", [0]), ("b", [3])]),  # a space that takes two bytes
        (["a", "", "", "\u3000b"], [("a", [0]), ("b", [1, 2, 3])]),
        (["a", "b", ""], [("ab", [0, 1])]),  # cut in the middle of a character
    ],
)
def test_words(pieces: list[str], expected: list[tuple[str, list[int]]]) -> None:
    assert words(pieces) == expected
    assert [word for word, _ in words(pieces)] == "".join(pieces).split()


def test_word_maps() -> None:
    maps = torch.rand(4, 2, 3)
    found = word_maps(maps, [("ab", [0, 1]), ("c", [3])])
    torch.testing.assert_close(found, torch.stack([(maps[0] + maps[1]) / 2, maps[3]]))
    assert word_maps(maps, []).shape == (0, 2, 3)
    with pytest.raises(
        ValueError, match=r"words has 'c' of tokens \[3, 4\], must be within 0\.\.3: pass the maps of the"
    ):
        word_maps(maps, [("c", [3, 4])])


def test_from_bytes_to_the_maps_of_words() -> None:
    model = small(num_tokens=tokens.NUM_TOKENS)
    text = tokens.encode(["zwölf oben"])
    maps = cross_attention_maps(model, torch.rand(1, 3, 8, 8), text)[0]
    pieces = ["z", "w", "", "ö", "l", "f", " ", "o", "b", "e", "n"]
    found = words(pieces)
    assert found == [("zwölf", [0, 1, 2, 3, 4, 5]), ("oben", [7, 8, 9, 10])]
    assert len(maps) == len(pieces) + 1  # one more, for EOS
    torch.testing.assert_close(word_maps(maps, found), torch.stack([maps[:6].mean(dim=0), maps[7:11].mean(dim=0)]))
