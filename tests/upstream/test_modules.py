"""Check what each workaround fixes, and that upstream still needs it.

A test of the latter that fails is good news: delete the workaround, and raise the lower bound of x-transformers if
older releases still need it.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import x_transformers
from torch import Tensor
from x_transformers.attend import Attend as UpstreamAttend

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE
from palme_xt.parity import exactly
from palme_xt.upstream.alibi import AlibiPositionalBias
from palme_xt.upstream.attend import Attend
from tests.models import batch, logits, small
from tests.upstream.storages import Storages

FLAGS = ("alibi_pos_bias", "rotary_xpos", "attn_flash", "qk_norm", "use_abs_pos_emb")


def cached_logits(model: PalmE, img: Tensor, text: Tensor, first: int = 1) -> Tensor:
    """Return the logits of all but the last token: `first` tokens at once, then one at a time with the cache."""
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
    assert (cached_logits(model, img, other) - expected).abs().max() > 1e-2  # the cache determines the logits


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


def test_memories_by_position_are_memories_by_keyword_and_upstreams_are_too() -> None:
    model = small(rotary_xpos=False)  # with which upstream's own Decoder runs
    theirs = HandWired(model.config)
    theirs.load_state_dict(model.state_dict())
    x, context, mems = torch.randn(2, 5, 32), torch.randn(2, 4, 24), [torch.randn(2, 3, 32)] * 2
    padding = torch.arange(5) < torch.tensor([[5], [3]])
    for layers in model.decoder.net.attn_layers, theirs.decoder.net.attn_layers:
        positional = layers(x, context, padding, None, None, None, mems)
        assert torch.equal(positional, layers(x, context=context, mask=padding, mems=mems))
        assert not torch.equal(positional, layers(x, context, padding))
    ours, upstreams = (m.decoder.net.attn_layers(x, context, padding, None, None, None, mems) for m in (model, theirs))
    torch.testing.assert_close(ours, upstreams)
    with_rotary = small().decoder.net.attn_layers
    positional = with_rotary(x, context, None, None, None, None, mems)
    assert torch.equal(positional, with_rotary(x, context=context, mems=mems))


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
        # and upstream's bias for custom positions, which it supports only for the whole text
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


ENCODERS: list[dict[str, Any]] = [{"alibi_pos_bias": True}, {"rotary_pos_emb": True}]


def remade(encoder: Any) -> Any:
    """Return a copy of an encoder that was on the meta device, with the weights of the original."""
    weights = encoder.state_dict()
    copied = copy.deepcopy(encoder).to("meta").to_empty(device="cpu")
    for buffer in copied.buffers():
        buffer.zero_()  # what `to_empty` leaves in it is arbitrary
    copied._apply(lambda tensor: tensor)
    copied.load_state_dict(weights, strict=True)
    return copied


@pytest.mark.parametrize("encoder_kwargs", ENCODERS, ids=str)
@torch.no_grad()
def test_positions_of_the_encoder_outlive_the_meta_device_and_bfloat16(encoder_kwargs: dict[str, Any]) -> None:
    model = small(encoder_kwargs=encoder_kwargs, image_size=16)
    theirs = HandWired(model.config)
    theirs.load_state_dict(model.state_dict())
    img, _ = batch(model)
    expected = model.encoder(img, return_embeddings=True)
    assert torch.equal(theirs.encoder(img, return_embeddings=True), expected)
    assert not torch.equal(small(image_size=16).encoder(img, return_embeddings=True), expected)
    assert torch.equal(remade(model.encoder)(img, return_embeddings=True), expected)
    buffers = len(list(model.encoder.buffers()))
    for contestant, dtype in (model, torch.float32), (theirs, torch.bfloat16):
        layers = contestant.encoder.to(torch.bfloat16).attn_layers
        positions = layers.rotary_pos_emb.inv_freq if layers.rel_pos is None else layers.rel_pos.slopes
        assert positions.dtype == dtype
    assert len(list(model.encoder.buffers())) == buffers


def test_upstream_still_loses_the_slopes_of_an_encoder_on_the_meta_device_and_grows_its_bias() -> None:
    model = small(encoder_kwargs={"alibi_pos_bias": True}, image_size=16)
    encoder = HandWired(model.config).encoder
    img, _ = batch(model)
    before = len(list(encoder.buffers()))
    expected = encoder(img, return_embeddings=True)
    assert len(list(encoder.buffers())) == before + 1
    assert not torch.equal(remade(encoder)(img, return_embeddings=True), expected)


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


def largest_tensor(model: Any, img: Tensor, text: Tensor) -> int:
    """Return the number of elements in the largest new tensor of a forward."""
    with Storages() as storages, torch.no_grad():
        model(img, text)
    sizes: list[int] = storages.sizes()
    return max(sizes)


def test_alibi_is_computed_once_and_not_copied_for_each_sample_as_upstream_still_does() -> None:
    model = small(decoder_depth=3)
    b, h, n = 3, 4, 64
    img, text = batch(model, b=b, n=n)
    alibi = model.decoder.net.attn_layers.alibi
    model.decoder.net.attn_layers.exact = True
    with mock.patch.object(alibi, "forward", wraps=alibi.forward) as computed:
        model(img, text)
    assert computed.call_count == 1
    assert largest_tensor(model, img, text) < b * h * n * n

    theirs = HandWired(small(decoder_depth=3, rotary_xpos=False).config)
    rel_pos = theirs.decoder.net.attn_layers.rel_pos
    with mock.patch.object(rel_pos, "forward", wraps=rel_pos.forward) as computed:
        theirs(img, text)
    assert computed.call_count == 3
    assert largest_tensor(theirs, img, text) == b * h * n * n


@pytest.mark.filterwarnings("ignore:decoder_kwargs")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"decoder_kwargs": {"attn_num_mem_kv": 3}},
        {"decoder_kwargs": {"attn_kv_heads": 2}},
        {"decoder_kwargs": {"attn_add_zero_kv": True}},
        {"decoder_kwargs": {"attn_max_attend_past": 3}},
        {"decoder_kwargs": {"attn_num_mem_kv": (3, 0)}},
        {"attn_flash": False},
    ],
)
def test_logits_are_bitwise_upstreams_with_and_without_masks(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    theirs = HandWired(model.config)
    theirs.load_state_dict(model.state_dict())
    img, text = batch(model)
    padding = torch.arange(10) < torch.tensor([[10], [6]])
    positions = torch.arange(10) * 2
    kwargs: dict[str, Any]
    with exactly():
        outputs = [logits(model, img, text)]
    assert torch.equal(outputs[0], logits(theirs, img, text))
    for kwargs in {"self_attn_kv_mask": padding}, {"mask": padding}, {"seq_start_pos": torch.tensor([0, 4])}:
        outputs.append(logits(model, img, text, **kwargs))
        assert torch.equal(outputs[-1], logits(theirs, img, text, **kwargs)), kwargs
    outputs.append(logits(model, img, text, pos=positions))
    assert torch.equal(outputs[-1], logits(theirs, img, text, pos=positions))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(outputs, 2))


def test_attn_bias_beside_alibi() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"attn_bias is given to a decoder with ALiBi: .* alibi_pos_bias=False"):
        model(*batch(model), attn_bias=torch.zeros(10, 10))
    without = small(alibi_pos_bias=False)
    img, text = batch(without)
    bias = torch.randn(10, 10)
    assert not torch.equal(logits(without, img, text, attn_bias=bias), logits(without, img, text))


def test_flash_attention_heeds_causal_false_and_upstreams_still_does_not() -> None:
    upstreams = UpstreamAttend(causal=True, flash=True, heads=2)
    ours = Attend(upstreams)
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    bias = torch.randn(2, 5, 5)
    mask, keys = torch.rand(2, 1, 5, 5) > 0.3, torch.rand(2, 5) > 0.3
    rows = {"row_mask": torch.rand(2, 5) > 0.3}  # only inverted attention reads it, which excludes flash attention
    kwargs: dict[str, Any]
    for kwargs in {}, {"attn_bias": bias}, {"mask": mask}, {"mask": mask, "attn_bias": bias}, {"mask": keys}, rows:
        causal, _ = upstreams(q, k, v, **kwargs)
        assert torch.equal(upstreams(q, k, v, causal=False, **kwargs)[0], causal)
        assert torch.equal(ours(q, k, v, **kwargs)[0], causal)
        plain, _ = UpstreamAttend(causal=False, flash=True, heads=2)(q, k, v, **kwargs)
        assert torch.equal(ours(q, k, v, causal=False, **kwargs)[0], plain)
        assert not torch.equal(plain, causal)


def test_fewer_keys_than_sparse_topk_are_told_of_and_upstream_still_crashes() -> None:
    model = small(attn_flash=False, decoder_kwargs={"attn_sparse_topk": 3})
    img, text = batch(model)
    assert torch.isfinite(model(img, text))
    message = "attn_sparse_topk=3 with 2 keys, must be at most the number of keys: lower it, or pass a longer text"
    with pytest.raises(ValueError, match=message):
        model.generate(img, text[:, :2], 3)
    with pytest.raises(RuntimeError, match="out of range"):
        HandWired(model.config)(img, text[:, :2])


def test_exported_attention_takes_fewer_queries_than_keys_and_upstreams_still_does_not() -> None:
    class CrossAttention(torch.nn.Module):
        def __init__(self, attend: UpstreamAttend) -> None:
            super().__init__()
            self.attend = attend

        def forward(self, q: Tensor, k: Tensor) -> Any:
            return self.attend(q, k, k, causal=False)[0]

    upstreams = UpstreamAttend(causal=False, flash=True, heads=2)
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 4, 8)
    shapes = ({2: torch.export.Dim("n", min=2, max=64)}, None)
    exported = torch.export.export(CrossAttention(Attend(upstreams)), (q, k), dynamic_shapes=shapes)
    torch.testing.assert_close(exported.module()(q[:, :, :3], k), upstreams(q[:, :, :3], k, k)[0])
    with pytest.raises(torch._dynamo.exc.UserError, match="n"):
        torch.export.export(CrossAttention(upstreams), (q, k), dynamic_shapes=shapes)


def error_in_bfloat16(model: Any, img: Tensor, text: Tensor) -> Tensor:
    """Return the relative error of each token's logits in bfloat16."""
    with torch.no_grad():
        exact = logits(model, img, text)
        low = logits(model.to(torch.bfloat16), img.to(torch.bfloat16), text).float()
    error: Tensor = (low - exact).norm(dim=-1).mean(dim=0) / exact.norm(dim=-1).mean()
    return error


def test_bfloat16_keeps_rotary_precision_at_length_and_upstream_still_does_not() -> None:
    arguments: dict[str, Any] = {"alibi_pos_bias": False, "decoder_kwargs": {"attn_dim_head": 32}, "max_seq_len": 1024}
    model = small(**arguments)
    theirs = HandWired(model.config)
    theirs.load_state_dict(model.state_dict())
    img, text = batch(model, n=1024)
    growth = []
    for contestant in model, theirs:
        error = error_in_bfloat16(contestant, img, text)
        growth.append(error[-128:].mean() / error[:128].mean())
    assert growth[0] < 1.5
    assert growth[1] > growth[0] + 0.5
    assert model.decoder.net.attn_layers.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert theirs.decoder.net.attn_layers.rotary_pos_emb.inv_freq.dtype == torch.bfloat16
    back = model.float().decoder.net.attn_layers.rotary_pos_emb
    assert torch.equal(back.inv_freq, small(**arguments).decoder.net.attn_layers.rotary_pos_emb.inv_freq)
