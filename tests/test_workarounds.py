"""Each workaround: what it mends, and that upstream still needs it. A test of the latter that fails is good news:
delete the workaround, and raise the lower bound of x-transformers if older releases still need it."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import x_transformers
from torch import Tensor

from palme_xt import PalmE
from palme_xt.alibi import AlibiPositionalBias
from tests.hand_wired import HandWired
from tests.models import batch, logits, small

FLAGS = ("alibi_pos_bias", "rotary_xpos", "attn_flash", "qk_norm", "use_abs_pos_emb")


def cached_logits(model: PalmE, img: Tensor, text: Tensor, first: int = 1) -> Tensor:
    """The logits of all but the last token: `first` tokens at once, then one at a time with the cache."""
    context = model.encode(img)
    values, cache = model.decoder.net(text[:, :first], context=context, return_intermediates=True)
    steps = [values]
    for n in range(first + 1, text.shape[1]):
        values, cache = model.decoder.net(text[:, :n], context=context, return_intermediates=True, cache=cache)
        steps.append(values)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("values", itertools.product([False, True], repeat=len(FLAGS)))
@torch.no_grad()
def test_cached_logits_are_those_of_the_whole_text(values: tuple[bool, ...]) -> None:
    model = small(**dict(zip(FLAGS, values, strict=True)), decoder_depth=3)
    img, text = batch(model, b=2, n=12)
    expected = logits(model, img, text)
    for first in 1, 5:
        torch.testing.assert_close(cached_logits(model, img, text, first), expected, rtol=1e-4, atol=1e-4)
    other = text.clone()
    other[:, 0] = (other[:, 0] + 1) % 32
    assert (cached_logits(model, img, other) - expected).abs().max() > 1e-2  # the cache holds what was read


@pytest.mark.parametrize("arguments", [{}, {"decoder_kwargs": {"attn_num_mem_kv": 2}}])
def test_generate_with_the_cache_is_generate_without(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    img, text = batch(model)
    context = model.encode(img)
    generate = model.decoder.generate
    cached, uncached = (
        generate(text[:, :3], 12, context=context, temperature=0.0, cache_kv=cache_kv) for cache_kv in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert cached.shape == (2, 12)


def test_generate_of_left_padded_prompts_with_the_cache() -> None:
    model = small()
    img, text = batch(model)
    prompts = [text[0, :2], text[1, :5]]
    together = model.decoder.generate(prompts, 6, context=model.encode(img), temperature=0.0)
    for row, prompt in enumerate(prompts):
        context = model.encode(img[row : row + 1])
        alone = model.decoder.generate(prompt[None], 6, context=context, temperature=0.0)
        assert torch.equal(together[row], alone[0])


def test_memories_of_earlier_segments_still_work() -> None:
    model = small(transformer_kwargs={"max_mem_len": 8})
    img, text = batch(model)
    net, context = model.decoder.net, model.encode(img)
    _, mems = net(text[:, :5], context=context, return_mems=True)
    values, mems = net(text[:, 5:], context=context, mems=mems, return_mems=True)
    assert values.shape == (2, 5, 32)
    assert not torch.equal(values, net(text[:, 5:], context=context))


def test_upstream_still_crashes_with_alibi_rotary_and_a_cache() -> None:
    model = HandWired(small().config)
    img, text = batch(small())
    context = model.encoder(img, return_embeddings=True)
    model.decoder.generate(text[:, :3], 4, context=context, cache_kv=False)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        model.decoder.generate(text[:, :3], 4, context=context)


def test_upstream_flash_attention_still_does_not_pickle() -> None:
    with pytest.raises((pickle.PicklingError, TypeError, AttributeError), match="_SDPBackend"):
        pickle.dumps(HandWired(small().config))
    pickle.dumps(HandWired(small(attn_flash=False).config))


def test_chosen_sdpa_backends_stay() -> None:
    chosen = {"enable_flash": False, "enable_math": True, "enable_mem_efficient": False}
    model = small(decoder_kwargs={"attn_attend_sdp_kwargs": chosen})
    attend = model.decoder.net.attn_layers.layers[0][1].attend
    assert attend.sdp_context_manager.args == ([torch.nn.attention.SDPBackend.MATH],)
    assert torch.isfinite(model(*batch(model)))


@pytest.mark.parametrize(("heads", "total_heads"), [(1, 1), (2, 4), (4, 4), (5, 8), (6, 6), (12, 16)])
def test_alibi_is_bitwise_upstreams(heads: int, total_heads: int) -> None:
    ours = AlibiPositionalBias(heads, total_heads)
    for i, j in (1, 1), (1, 7), (5, 5), (3, 9), (64, 64):
        theirs = x_transformers.x_transformers.AlibiPositionalBias(heads, total_heads)
        assert torch.equal(ours(i, j), theirs(i, j))
        # and upstream's for custom positions, which it has for the whole text only
        assert torch.equal(ours(j, j), theirs.forward_custom_pos(torch.arange(j)))


def test_alibi_takes_slopes() -> None:
    model = small(decoder_kwargs={"rel_pos_kwargs": {"slopes": [1.0, 0.25]}})
    alibi = model.decoder.net.attn_layers.alibi
    assert alibi(1, 3)[:, 0].tolist() == [[-2, -1, 0], [-0.5, -0.25, 0], [0, 0, 0], [0, 0, 0]]


def test_alibi_keeps_no_state_and_upstream_still_does() -> None:
    model = small()
    tensors = {name: value.clone() for name, value in model.named_buffers()}
    model(*batch(model, n=14))
    after = dict(model.named_buffers())
    assert list(after) == list(tensors)
    assert all(torch.equal(after[name], value) for name, value in tensors.items())
    theirs = x_transformers.x_transformers.AlibiPositionalBias(2, 4)
    before = len(list(theirs.buffers()))
    theirs(9, 9)
    assert len(list(theirs.buffers())) == before + 1


def test_alibi_slopes_outlive_the_meta_device_and_upstreams_still_do_not() -> None:
    for alibi, survives in (
        (AlibiPositionalBias(2, 4), True),
        (x_transformers.x_transformers.AlibiPositionalBias(2, 4), False),
    ):
        before = alibi.slopes.clone()
        alibi.to("meta").to_empty(device="cpu")
        alibi._apply(torch.zeros_like)
        assert torch.equal(alibi.slopes, before) == survives


def test_alibi_slopes_stay_float32() -> None:
    model = small().to(torch.bfloat16)
    assert model.decoder.net.attn_layers.alibi.slopes.dtype == torch.float32


def test_upstream_still_ties_a_copy_to_the_embedding_of_its_source() -> None:
    net = HandWired(small(transformer_kwargs={"tie_embedding": True}, cross_attend=False).config).decoder.net
    text = torch.randint(32, (2, 5))
    copied = copy.deepcopy(net)
    before = copied(text)
    with torch.no_grad():
        net.token_emb.emb.weight.zero_()
    assert not torch.equal(copied(text), before)


def test_one_head_crashes_upstream_unless_as_wide_as_the_model() -> None:
    def run(dim: int) -> Tensor:
        layers = x_transformers.Decoder(dim=dim, depth=2, heads=1, attn_dim_head=8, verbose=False)
        return layers(torch.randn(1, 4, dim))  # type: ignore[no-any-return]

    assert run(8).shape == (1, 4, 8)
    with pytest.raises(RuntimeError, match="The size of tensor"):
        run(16)


def test_upstream_still_accepts_silently() -> None:
    model = small()
    hand_wired = HandWired(model.config)
    img, text = batch(model)
    for silent in (
        lambda: hand_wired(img[..., :4, :4], text),
        lambda: hand_wired.decoder.net(text + 0.5, context=hand_wired.encoder(img, return_embeddings=True)).sum(),
        lambda: hand_wired(img[:1], text),
    ):
        assert torch.isfinite(silent())
    assert torch.isnan(hand_wired(img, torch.full_like(text, -100)))


def test_upstream_still_drops_absolute_positions_silently() -> None:
    net = HandWired(small(use_abs_pos_emb=True).config).decoder.net
    assert not any(name.startswith("pos_emb") for name, _ in net.named_parameters())
