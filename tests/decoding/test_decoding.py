"""Greedy decoding and sampling, batched, cached, with EOS and streamed, and the state that they leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.hand_wired import HandWired
from palme_xt import PalmE
from palme_xt.decoding import compiled as compiled_step
from palme_xt.decoding import probe
from palme_xt.mapping import upstream_keywords
from palme_xt.strategies import configs
from tests.models import batch, logits, small
from tests.upstream.storages import Storages

FLAGS = ("alibi_pos_bias", "rotary_xpos", "attn_flash", "qk_norm", "use_abs_pos_emb", "cross_attend")
GREEDY: dict[str, Any] = {"temperature": 0.0}
MODEL = small()
IMG, TEXT = batch(MODEL, b=2, n=4)


def reference(
    model: PalmE, img: Tensor | None, prompt: Tensor, seq_len: int, eos_token: int | None = None
) -> list[int]:
    """Decode one sample greedily in the slow and simple way: run the network on the whole text for every token."""
    context = model.encode(img) if img is not None and model.config.cross_attend else None
    text = prompt
    for _ in range(seq_len):
        text = torch.cat([text, model.decoder.net(text[None], context=context)[:, -1].argmax(dim=-1)])
        if text[-1] == eos_token:
            break
    return text[len(prompt) :].tolist()


def greedy_reference(
    model: PalmE, img: Tensor, prompts: list[Tensor], seq_len: int, eos_token: int | None = None
) -> list[list[int]]:
    rows = [reference(model, img[i : i + 1], prompt, seq_len, eos_token) for i, prompt in enumerate(prompts)]
    return [row + [model.config.pad_value] * (seq_len - len(row)) for row in rows]


@pytest.mark.parametrize("values", itertools.product([False, True], repeat=len(FLAGS)))
@torch.no_grad()
def test_each_sample_gets_the_tokens_it_gets_alone(values: tuple[bool, ...]) -> None:
    model = small(**dict(zip(FLAGS, values, strict=True)), max_seq_len=24)
    img, text = batch(model, b=4, n=6)
    prompts = [text[0, :1], text[1, :6], text[2, :3], text[3, :2]]
    expected = greedy_reference(model, img, prompts, 8)
    eos_token = expected[0][3]
    for cache_kv, eos in itertools.product([True, False], [None, eos_token]):
        tokens = model.generate(img, prompts, 8, cache_kv=cache_kv, eos_token=eos, **GREEDY)
        assert tokens.tolist() == (expected if eos is None else greedy_reference(model, img, prompts, 8, eos))
        alone = model.generate(img[1:2], prompts[1][None], 8, cache_kv=cache_kv, eos_token=eos, **GREEDY)
        assert tokens[1:2].tolist() == alone.tolist()


@given(st.data())
def test_greedy_decoding_of_any_config(data: st.DataObject) -> None:
    config = data.draw(configs())
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    model = PalmE.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        img = torch.randn(2, config.channels, config.image_size, config.image_size)
        ids = torch.randint(config.num_tokens, (2, 3))
        prompts = [ids[0], ids[1, : data.draw(st.integers(1, 3))]]
        expected = greedy_reference(model, img, prompts, 5)
    for cache_kv in True, False:
        assert model.generate(img, prompts, 5, cache_kv=cache_kv, **GREEDY).tolist() == expected


UNCACHED: list[dict[str, Any]] = [
    {"decoder_kwargs": {"shift_tokens": True}},
    {"decoder_kwargs": {"attn_use_rel_proj_pos_bias": True, "cross_attn_use_rel_proj_pos_bias": True}},
    {
        "decoder_kwargs": {"attn_data_dependent_alibi": True, "cross_attn_data_dependent_alibi": False},
        "alibi_pos_bias": False,
    },
    {"decoder_kwargs": {"pre_and_post_norm": True}, "transformer_kwargs": {"looped": True}},
    {"transformer_kwargs": {"num_memory_tokens": 2}},
    {"decoder_kwargs": {"attn_num_mem_kv": 2}},  # with xPos
]


@pytest.mark.filterwarnings("ignore:decoder_kwargs")
@pytest.mark.parametrize("arguments", UNCACHED, ids=str)
@torch.no_grad()
def test_where_the_cache_would_be_wrong_it_is_not_used(arguments: dict[str, Any]) -> None:
    (part, overrides), *_ = arguments.items()
    if not set(upstream_keywords(part.removesuffix("_kwargs"))) >= set(overrides):
        return  # this upstream release does not have the override
    model = small(attn_flash=False, **arguments)
    img, text = batch(model, b=1, n=4)
    with mock.patch.object(model.decoder.net, "forward", wraps=model.decoder.net.forward) as net:
        assert model.generate(img, text, 8, **GREEDY).tolist() == greedy_reference(model, img, list(text), 8)
    assert [call.args[0].shape[1] for call in net.call_args_list[:8]] == list(range(4, 12))


ALONE: list[dict[str, Any]] = [
    {"transformer_kwargs": {"num_memory_tokens": 2}},
    {"decoder_kwargs": {"attn_num_mem_kv": 2}},
    {"decoder_kwargs": {"shift_tokens": 1}},
    {"transformer_kwargs": {"scaled_sinu_pos_emb": True}, "use_abs_pos_emb": True, "rotary_xpos": False},
]


@pytest.mark.parametrize("arguments", ALONE, ids=str)
@torch.no_grad()
def test_where_padding_would_be_read_each_text_is_decoded_alone(arguments: dict[str, Any]) -> None:
    model = small(**arguments)
    img, text = batch(model, b=3, n=4)
    prompts = [text[0], text[1, :2], text[2, :3]]
    expected = greedy_reference(model, img, prompts, 6)
    assert model.generate(img, prompts, 6, **GREEDY).tolist() == expected
    eos_token = expected[0][2]
    ended = torch.tensor(greedy_reference(model, img, prompts, 6, eos_token))
    steps = list(model.stream(img, prompts, 6, eos_token=eos_token, **GREEDY))
    assert torch.equal(torch.stack(steps, dim=1), ended[:, : len(steps)])
    beams, scores = model.beam_search(img, prompts, 6, beams=3, eos_token=eos_token)
    for row, prompt in enumerate(prompts):
        best, score = model.beam_search(img[row : row + 1], prompt, 6, beams=3, eos_token=eos_token)
        assert torch.equal(beams[:, row], best[:, 0])
        torch.testing.assert_close(scores[:, row], score[:, 0])
    with mock.patch("palme_xt.decoding.probe.is_right", return_value=True), contextlib.suppress(RuntimeError):
        assert model.generate(img, prompts, 6, **GREEDY).tolist() != expected


def test_a_decoder_that_was_wired_by_hand_uses_its_cache_where_that_is_right() -> None:
    for arguments, cached in ({"rotary_xpos": False}, True), ({}, False):  # with both positions, upstream's crashes
        theirs = HandWired(small(**arguments).config)
        model = PalmE.from_modules(theirs.encoder, theirs.decoder)
        img, text = batch(model, n=3)
        expected = greedy_reference(model.eval(), img, list(text), 5)
        with mock.patch.object(model.decoder.net, "forward", wraps=model.decoder.net.forward) as net:
            assert model.generate(img, text, 5, **GREEDY).tolist() == expected
        assert net.call_args_list[-1].args[0].shape[1] == (1 if cached else 7)


def test_what_decoding_relies_on_is_tried_once_and_again_when_modules_are_replaced() -> None:
    model, other = small(), small(decoder_kwargs={"shift_tokens": 1})
    img, text = batch(model, n=3)
    hook = mock.Mock(return_value=None)
    model.decoder.net.attn_layers.register_forward_hook(hook)
    model.train()
    torch.manual_seed(5)
    with mock.patch.object(probe, "_try", wraps=probe._try) as tried:
        for _ in range(2):
            model.generate(img, text, 3, **GREEDY)
        assert tried.call_count == 1
        assert hook.call_count == 6  # one for each step, and none for the trial
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
        model.decoder.net.attn_layers = other.decoder.net.attn_layers
        assert model.generate(img, text, 3, **GREEDY).tolist() == greedy_reference(model.eval(), img, list(text), 3)
        assert tried.call_count == 2
        model.double()
        model.generate(img.double(), text, 3, **GREEDY)
        assert tried.call_count == 3


def test_what_decoding_relies_on_does_not_depend_on_where_it_is_tried() -> None:
    for context in torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), torch.inference_mode():
        net, config = small().decoder.net, small().config
        with context:
            assert probe.is_right(net, config, cached=True, padded=False)
            assert probe.is_right(net, config, cached=True, padded=True)
    for dtype in torch.bfloat16, torch.float64:
        assert probe.is_right(small().to(dtype).decoder.net, config, cached=True, padded=True)


def test_weights_and_size_do_not_matter_to_what_decoding_relies_on() -> None:
    shifted = small(decoder_kwargs={"shift_tokens": 1})
    with torch.no_grad():
        for parameter in shifted.parameters():
            parameter.zero_()  # so that no text has any effect
    assert not probe.is_right(shifted.decoder.net, shifted.config, cached=True, padded=False)
    deep = small(decoder_depth=16)
    copied = probe._small_copy(deep.decoder.net, torch.float32)
    assert probe.is_right(deep.decoder.net, deep.config, cached=True, padded=True)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in deep.parameters()}
    with torch.device("meta"):
        huge = small(decoder_dim=8192, decoder_heads=64, num_tokens=250_000).decoder.net
    buffers = {name: torch.zeros_like(value, device="cpu") for name, value in huge.named_buffers()}
    for name, value in buffers.items():
        huge.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = value
    with Storages() as storages:
        probe._small_copy(huge, torch.float32)
    assert max(storages.sizes()) < 10**7  # the vocabulary alone has 2 * 10**9


def test_a_temperature_near_zero_is_greedy() -> None:
    model = small()
    img, text = batch(model, b=2, n=4)
    assert torch.equal(model.generate(img, text, 5, temperature=1e-300), model.generate(img, text, 5, **GREEDY))


def test_negative_control_another_image_or_prompt_gives_other_tokens() -> None:
    model = small()
    img, text = batch(model, b=1, n=4)
    tokens = model.generate(img, text, 12, **GREEDY)
    assert not torch.equal(tokens, model.generate(-img, text, 12, **GREEDY))
    assert not torch.equal(tokens, model.generate(img, text.flip(1), 12, **GREEDY))


def test_prompts_in_all_their_forms() -> None:
    model = small()
    img, text = batch(model, b=3, n=4)
    shared = model.generate(img, text[0], 5, **GREEDY)
    assert shared.shape == (3, 5)
    assert torch.equal(shared, model.generate(img, text[:1].expand(3, -1), 5, **GREEDY))
    as_list = model.generate(img, [text[0], text[1, :2], text[2, :3]], 5, **GREEDY)
    lens = torch.tensor([4, 2, 3])
    assert torch.equal(as_list, model.generate(img, text, 5, prompt_lens=lens, **GREEDY))
    assert torch.equal(as_list, model.generate(img, text.int(), 5, prompt_lens=lens, **GREEDY))
    beyond = torch.where(torch.arange(4) < lens[:, None], text, -100)
    assert torch.equal(as_list, model.generate(img, beyond, 5, prompt_lens=lens, **GREEDY))
    assert not torch.equal(as_list, model.generate(img, text, 5, **GREEDY))


def test_the_image_is_encoded_once_or_not_at_all() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    with mock.patch.object(model.encoder, "forward", wraps=model.encoder.forward) as encoder:
        tokens = model.generate(img, text, 6, **GREEDY)
        assert encoder.call_count == 1
        context = model.encode(img)
        encoder.reset_mock()
        assert torch.equal(tokens, model.generate(None, text, 6, context=context, **GREEDY))
        assert encoder.call_count == 0


def test_hooks_of_the_decoder_run_at_each_step() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    tokens = model.generate(img, text, 4, **GREEDY)
    calls: list[int] = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[1]))
    assert torch.equal(model.generate(img, text, 4, **GREEDY), tokens)
    assert calls == [3, 1, 1, 1]


def test_ints_of_numpy_are_ints() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    numbers: list[Any] = [np.int64(4), np.int32(7), np.int64(3)]  # a type checker accepts only `int`
    four, eos, three = numbers
    greedy = model.generate(img, text, four, eos_token=eos, **GREEDY)
    assert torch.equal(greedy, model.generate(img, text, 4, eos_token=7, **GREEDY))
    best = model.generate(img, text, four, eos_token=eos, beams=three)
    assert torch.equal(best, model.generate(img, text, 4, eos_token=7, beams=3))


def test_a_context_mask_hides_patches() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    context, mask = model.encode(img), torch.tensor([[True, True, False, False]]).expand(2, -1)
    masked = model.generate(img, text, 12, context_mask=mask, **GREEDY)
    assert torch.equal(masked, model.generate(None, text, 12, context=context[:, :2], **GREEDY))
    assert not torch.equal(masked, model.generate(img, text, 12, **GREEDY))


def test_several_images_a_sample() -> None:
    model = small()
    (first, text), (second, _) = batch(model, n=3), batch(model, seed=5)
    both = torch.stack([first, second], dim=1)
    context = torch.cat([model.encode(first), model.encode(second)], dim=1)
    assert torch.equal(
        model.generate(both, text, 8, **GREEDY), model.generate(None, text, 8, context=context, **GREEDY)
    )


def test_a_step_reads_one_token_and_ended_rows_are_not_read() -> None:
    model = small()
    img, text = batch(model, b=4, n=3)
    free = model.generate(img, text, 8, **GREEDY)
    eos_token = int(free[0, 2])
    ends = [row.index(eos_token) if eos_token in row else 8 for row in free.tolist()]
    assert len(set(ends)) > 1
    with mock.patch.object(model.decoder.net, "forward", wraps=model.decoder.net.forward) as net:
        tokens = model.generate(img, text, 8, eos_token=eos_token, **GREEDY)
    shapes = [tuple(call.args[0].shape) for call in net.call_args_list]
    assert shapes == [(4, 3)] + [(sum(end >= n for end in ends), 1) for n in range(1, 8) if any(e >= n for e in ends)]
    for row, unbounded, end in zip(tokens.tolist(), free.tolist(), ends, strict=True):
        assert row == unbounded[: end + 1] + [0] * (7 - end)


def test_decoding_ends_when_all_rows_have() -> None:
    model = small()
    img, text = batch(model, b=1, n=3)
    eos_token = int(model.generate(img, text, 1, **GREEDY))
    assert model.generate(img, text, 9, eos_token=eos_token, **GREEDY).tolist() == [[eos_token] + [0] * 8]
    assert [step.tolist() for step in model.stream(img, text, 9, eos_token=eos_token, **GREEDY)] == [[eos_token]]


def test_an_eos_in_the_prompt_does_not_count() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    free = model.generate(img, text, 8, **GREEDY)
    unused = next(token for token in range(32) if token not in free.flatten().tolist())
    text[:, 0] = unused  # BOS == EOS, as in GPT-2's vocabulary
    free = model.generate(img, text, 8, **GREEDY)
    assert unused not in free.flatten().tolist()
    assert torch.equal(model.generate(img, text, 8, eos_token=unused, **GREEDY), free)
    prompts = [text[0], text[1, :1]]
    assert torch.equal(
        model.generate(img, prompts, 8, eos_token=unused, **GREEDY), model.generate(img, prompts, 8, **GREEDY)
    )


def test_bos_and_eos_of_the_config_are_defaults() -> None:
    model = small()
    img, _ = batch(model, b=3, n=3)
    start = torch.tensor([5])
    free = model.generate(img, start, 12, **GREEDY)
    eos = int(free[0, 3])
    config = dataclasses.replace(model.config, bos_token=5, eos_token=eos)
    known = PalmE.from_config(config)
    known.load_state_dict(model.state_dict())
    ended = model.generate(img, start, 12, eos_token=eos, **GREEDY)
    assert not torch.equal(ended, free)
    assert torch.equal(known.generate(img, seq_len=12, **GREEDY), ended)
    assert torch.equal(known.generate(img, **GREEDY), known.generate(img, seq_len=15, **GREEDY))  # max_seq_len=16
    assert torch.equal(known.beam_search(img, seq_len=12)[0], model.beam_search(img, start, 12, eos_token=eos)[0])
    # Explicit arguments win, and an empty list is no EOS.
    assert torch.equal(known.generate(img, seq_len=12, eos_token=[], **GREEDY), free)
    assert torch.equal(
        known.generate(img, torch.tensor([7]), 12, eos_token=[], **GREEDY),
        model.generate(img, torch.tensor([7]), 12, **GREEDY),
    )

    text_only = small(cross_attend=False, bos_token=5)
    assert torch.equal(text_only.generate(None, seq_len=6, **GREEDY), text_only.generate(None, start, 6, **GREEDY))


def test_each_of_several_eos_ids_ends_a_text() -> None:
    model = small()
    img, text = batch(model, b=4, n=3)
    free = model.generate(img, text, 8, **GREEDY).tolist()
    eos = [free[0][2], free[2][3]]
    until = [next((n + 1 for n, token in enumerate(row) if token in eos), 8) for row in free]
    assert len(set(until)) > 1
    expected = [row[:end] + [0] * (8 - end) for row, end in zip(free, until, strict=True)]
    for eos_token in eos, tuple(eos), eos[::-1]:
        assert model.generate(img, text, 8, eos_token=eos_token, **GREEDY).tolist() == expected
    assert model.generate(img, text, 8, eos_token=eos[:1], **GREEDY).tolist() != expected


@pytest.mark.parametrize("beams", [1, 3])
def test_a_logits_processor_decides_from_the_text_so_far(beams: int) -> None:
    model = small()
    img, text = batch(model, b=3, n=4)
    prompts = [text[0], text[1, :2], text[2, :3]]
    seen: list[Tensor] = []

    def once(ids: Tensor, logits: Tensor) -> Tensor:
        """Allow each token once in a text."""
        seen.append(ids)
        assert logits.dtype == torch.float32
        return logits.scatter(1, ids, -torch.inf)

    tokens = model.generate(img, prompts, 12, logits_processor=once, beams=beams, temperature=0.0)
    for row, prompt in zip(tokens.tolist(), prompts, strict=True):
        assert len({*row, *prompt.tolist()}) == len(row) + len(set(prompt.tolist()))
    assert [ids.shape for ids in seen] == [(3, 4)] + [(3 * beams, 4 + step) for step in range(1, 12)]
    assert seen[0][1].tolist() == [0, 0, *text[1, :2].tolist()]  # padded on the left
    assert not torch.equal(tokens, model.generate(img, prompts, 12, beams=beams, temperature=0.0))
    keep = model.generate(img, prompts, 12, logits_processor=lambda _, logits: logits, beams=beams, temperature=0.0)
    assert torch.equal(keep, model.generate(img, prompts, 12, beams=beams, temperature=0.0))


def test_a_logits_processor_comes_before_the_filter() -> None:
    model = small()
    img, text = batch(model, b=3, n=3)
    how: dict[str, Any] = {"filter_logits_fn": lambda logits: logits.clamp(max=0), "temperature": 2.0}
    processed = model.generate(
        img, text, 8, logits_processor=lambda _, logits: 3 * logits, generator=torch.Generator().manual_seed(0), **how
    )
    how["filter_logits_fn"] = lambda logits: (3 * logits).clamp(max=0)
    assert torch.equal(processed, model.generate(img, text, 8, generator=torch.Generator().manual_seed(0), **how))


def test_several_samples_for_each_image() -> None:
    model = small()
    img, text = batch(model, b=2, n=4)
    prompts = [text[0], text[1, :2]]
    eos = int(model.generate(img, prompts, 3, **GREEDY)[0, 2])
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    with mock.patch.object(model.encoder, "forward", wraps=model.encoder.forward) as encoder:
        tokens = model.generate(img, prompts, 9, num_return_sequences=3, eos_token=eos, generator=seeded())
    assert [len(call.args[0]) for call in encoder.call_args_list] == [2]  # each image once
    repeated = [prompts[0]] * 3 + [prompts[1]] * 3
    expected = model.generate(img.repeat_interleave(3, 0), repeated, 9, eos_token=eos, generator=seeded())
    assert torch.equal(tokens, expected)
    assert len(tokens[:3].unique(dim=0)) > 1
    steps = list(model.stream(img, prompts, 9, num_return_sequences=3, eos_token=eos, generator=seeded()))
    assert torch.equal(torch.stack(steps, dim=1), tokens[:, : len(steps)])

    best = model.generate(img, prompts, 9, beams=4, num_return_sequences=3)
    beams, _ = model.beam_search(img, prompts, 9, beams=4)
    assert torch.equal(best, beams[:3].transpose(0, 1).flatten(0, 1))


def test_scores_are_the_log_probabilities_of_a_full_forward() -> None:
    model = small().eval()
    img, text = batch(model, b=3, n=4)
    prompts = [text[0], text[1, :2], text[2, :3]]
    tokens = model.generate(img, prompts, 8, temperature=2.0)
    eos = int(tokens[0, 4])
    scores = model.score(img, prompts, tokens, eos_token=eos)
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, tokens[row]])
        values = logits(model, img[row : row + 1], whole[None])[0, len(prompt) - 1 :].log_softmax(dim=-1)
        expected = values[range(8), tokens[row]]
        until = tokens[row].tolist().index(eos) + 1 if eos in tokens[row] else 8
        torch.testing.assert_close(scores[row, :until], expected[:until], rtol=1e-5, atol=1e-5)
        assert (scores[row, until:] == 0).all()
    assert (scores == 0).any()
    lens = torch.tensor([4, 2, 3])
    context = model.encode(img)
    same = model.score(None, text, tokens.int(), eos_token=eos, prompt_lens=lens, context=context)
    torch.testing.assert_close(same, scores)
    assert not torch.allclose(model.score(-img, prompts, tokens, eos_token=eos), scores)


def test_scores_add_up_to_those_of_beams_and_have_gradients() -> None:
    model = small(bos_token=5, eos_token=3).eval()
    img, _ = batch(model, b=2, n=3)
    tokens, expected = model.beam_search(img, seq_len=7, beams=4)
    for beam, total in zip(tokens, expected, strict=True):
        torch.testing.assert_close(model.score(img, None, beam).sum(dim=1), total, rtol=1e-4, atol=1e-3)
    model.train()
    model.score(img, None, tokens[0]).sum().backward()
    assert model.training
    assert all(p.grad is not None for p in model.decoder.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.score(IMG, TEXT, TEXT.float()), TypeError, "tokens has dtype torch.float32, must be an integer"),
        (lambda m: m.score(IMG, TEXT, TEXT + 32), ValueError, "tokens must have ids within 0..num_tokens-1=31"),
        (lambda m: m.score(IMG, TEXT, TEXT[:1]), ValueError, "prompts has batch size 2, must have 1"),
        (lambda m: m.score(IMG, None, TEXT), ValueError, "prompts is None, and the model has no bos_token"),
        (lambda m: m.score(IMG[:1], TEXT, TEXT), ValueError, "must have the same batch size, not 2 and 1"),
        (
            lambda m: small(use_abs_pos_emb=True, rotary_xpos=False).score(IMG, TEXT, TEXT.repeat(1, 4)),
            ValueError,
            "text has 20 tokens, must have at most max_seq_len=16 with use_abs_pos_emb=True",
        ),
        (lambda m: m.score(IMG * torch.nan, TEXT, TEXT), ValueError, "the logits are nan: check img, context and the"),
    ],
)
def test_bad_scores(call: Callable[[PalmE], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(MODEL)


def test_the_pad_value_of_the_wrapper_fills_up() -> None:
    model = small(autoregressive_kwargs={"pad_value": 7})
    img, text = batch(model, b=1, n=3)
    eos_token = int(model.generate(img, text, 1, **GREEDY))
    assert model.generate(img, text, 4, eos_token=eos_token, **GREEDY).tolist() == [[eos_token, 7, 7, 7]]


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "top_a"])
def test_filters_by_name_and_by_function_are_upstreams(name: str) -> None:
    from x_transformers.autoregressive_wrapper import FILTER_LOGITS_FN

    model = small()
    img, text = batch(model, b=3, n=3)

    def sampled(filter_logits_fn: Any, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(img, text, 8, filter_logits_fn=filter_logits_fn, generator=generator, temperature=1.5)

    assert torch.equal(sampled(name), sampled(FILTER_LOGITS_FN[name]))
    assert not torch.equal(sampled(name), sampled(name, seed=1))


def test_the_default_filter_is_upstreams_top_k_and_its_keywords_reach_it() -> None:
    model = small()
    img, text = batch(model, b=4, n=3)
    allowed = logits(model, img, torch.cat([text, text[:, :1]], dim=1))[:, -1].topk(4).indices  # a tenth of 32
    seen = torch.cat([model.generate(img, text, 1, temperature=9.0) for _ in range(50)], dim=1)
    for row, best in zip(seen.tolist(), allowed.tolist(), strict=True):
        assert set(row) <= set(best)
        assert len(set(row)) > 1
    one = model.generate(img, text, 6, filter_kwargs={"k": 1})
    assert torch.equal(one, model.generate(img, text, 6, **GREEDY))


def test_sampled_tokens_have_the_softmax_s_frequencies() -> None:
    model = small(num_tokens=5)
    img, text = batch(model, b=1, n=3)
    expected = (logits(model, img, torch.cat([text, text[:, :1]], dim=1))[0, -1] / 2.0).softmax(dim=-1)
    many = model.generate(
        img.expand(20000, -1, -1, -1),
        text[0],
        1,
        temperature=2.0,
        filter_logits_fn=lambda values: values,
        generator=torch.Generator().manual_seed(0),
    )
    frequencies = many.flatten().bincount(minlength=5) / 20000
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.015)  # 4 standard deviations of 0.5 / 141


def test_the_same_generator_gives_the_same_tokens() -> None:
    model = small()
    img, text = batch(model, b=3, n=3)
    first, again, other = (
        model.generate(img, text, 8, generator=torch.Generator().manual_seed(seed), filter_logits_fn="top_p")
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kwargs", [GREEDY, {"temperature": 2.0}, {"cache_kv": False, **GREEDY}])
def test_stream_yields_the_tokens_of_generate(kwargs: dict[str, Any]) -> None:
    model = small()
    img, text = batch(model, b=3, n=3)
    eos_token = int(model.generate(img, text, 4, **GREEDY)[0, 3])
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    tokens = model.generate(img, text, 9, eos_token=eos_token, generator=seeded(), **kwargs)
    steps = list(model.stream(img, text, 9, eos_token=eos_token, generator=seeded(), **kwargs))
    assert torch.equal(torch.stack(steps, dim=1), tokens[:, : len(steps)])
    assert (tokens[:, len(steps) :] == 0).all()


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("beams", [1, 2])
def test_every_mode_is_restored_also_after_an_exception(beams: int) -> None:
    model = small().train()
    model.encoder.eval()  # frozen, as in fine-tuning a decoder
    model.decoder.net.token_emb.eval()
    before = modes(model)
    img, text = batch(model, n=3)
    seen = []
    hook = model.encoder.register_forward_hook(lambda *_: seen.append((any(modes(model)), torch.is_grad_enabled())))

    assert not model.generate(img, text, 3, beams=beams, temperature=0.0).requires_grad
    assert seen == [(False, False)]
    hook.remove()
    assert modes(model) == before
    assert torch.is_grad_enabled()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for part in model.encoder, model.decoder.net.attn_layers.final_norm:
        failing = part.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate(img, text, 3, beams=beams)
        failing.remove()
        assert modes(model) == before
        assert torch.is_grad_enabled()


def test_an_abandoned_stream_leaves_the_model_as_it_was() -> None:
    model = small().train()
    model.encoder.eval()
    before = modes(model)
    img, text = batch(model, n=3)
    stream = model.stream(img, text, 9, **GREEDY)
    for _ in range(2):
        next(stream)
        assert modes(model) == before  # still suspended, but already restored
        assert torch.is_grad_enabled()
        model(img, text).backward()
    expected = model.generate(img, text, 9, **GREEDY)
    assert torch.equal(torch.stack(list(stream), dim=1), expected[:, 2:])


def test_beyond_max_seq_len() -> None:
    model = small()  # max_seq_len=16
    img, text = batch(model, b=2, n=4)
    message = (
        "prompt of 4 tokens + seq_len=13 exceeds max_seq_len=16: shorten one, or pass restrict_to_max_seq_len=False"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(img, text, 13, **GREEDY)
    assert model.generate(img, text, 12, **GREEDY).shape == (2, 12)

    beyond = model.generate(img, text, 30, restrict_to_max_seq_len=False, **GREEDY)
    uncached = model.generate(img, text, 30, restrict_to_max_seq_len=False, cache_kv=False, **GREEDY)
    assert torch.equal(beyond, uncached)
    assert beyond.tolist() == greedy_reference(model, img, list(text), 30)

    absolute = small(use_abs_pos_emb=True, rotary_xpos=False)
    with pytest.raises(ValueError, match=r"restrict_to_max_seq_len=False to slide a window over the text"):
        absolute.generate(img, text, 13, **GREEDY)


@torch.no_grad()
def test_absolute_positions_slide_beyond_max_seq_len() -> None:
    model = small(use_abs_pos_emb=True, rotary_xpos=False)  # max_seq_len=16
    img, text = batch(model, b=3, n=6)
    prompts = [text[0], text[1, :2], text[2, :4]]

    def slide(row: int, window: int = 16) -> list[int]:
        text, context = prompts[row][None], model.encode(img[row : row + 1])
        for _ in range(30):
            values = model.decoder.net(text[:, -window:], context=context)
            text = torch.cat([text, values[:, -1:].argmax(dim=-1)], dim=1)
        return text[0, len(prompts[row]) :].tolist()

    expected = [slide(row) for row in range(3)]
    assert expected != [slide(row, window=15) for row in range(3)]  # negative control
    how: dict[str, Any] = {"restrict_to_max_seq_len": False, **GREEDY}
    for cache_kv in True, False:
        assert model.generate(img, prompts, 30, cache_kv=cache_kv, **how).tolist() == expected
    compiled = mock.Mock(wraps=compiled_step._step)
    with mock.patch.object(compiled_step, "_compiled", return_value=compiled):
        assert model.generate(img, prompts, 30, compile=True, **how).tolist() == expected
    assert compiled.call_count == 10  # from 7 to 16 tokens
    beams, _ = model.beam_search(img, prompts, 30, beams=3, restrict_to_max_seq_len=False)
    for row in range(3):
        alone, _ = model.beam_search(
            img[row : row + 1], prompts[row], 30, beams=3, restrict_to_max_seq_len=False, cache_kv=False
        )
        assert torch.equal(beams[:, row], alone[:, 0])


def test_upstream_still_shows_the_padding_of_prompts_when_it_slides() -> None:
    model = small(use_abs_pos_emb=True, rotary_xpos=False)
    img, text = batch(model, b=2, n=6)
    context, lens = model.encode(img), torch.tensor([6, 2])
    kwargs: dict[str, Any] = {"temperature": 0.0, "cache_kv": False}
    together = model.decoder.generate(text, 30, prompt_lens=lens, context=context, **kwargs)
    alone = model.decoder.generate(text[1:, :2], 30, context=context[1:], **kwargs)
    assert not torch.equal(together[1:], alone)
    ours = model.generate(None, text, 30, prompt_lens=lens, context=context, restrict_to_max_seq_len=False, **kwargs)
    assert torch.equal(ours[1:], alone)


@pytest.mark.parametrize("arguments", [{}, {"cross_attend": False}, {"use_abs_pos_emb": True, "rotary_xpos": False}])
@pytest.mark.parametrize("beams", [1, 3])
def test_bfloat16_and_autocast(arguments: dict[str, Any], beams: int) -> None:
    model = small(**arguments)
    img, text = batch(model, b=2, n=3)
    source = None if arguments.get("cross_attend") is False else img
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(source, text, 5, beams=beams, temperature=0.0).shape == (2, 5)
    model.to(torch.bfloat16)
    cached, uncached = (
        model.generate(source, text, 5, beams=beams, temperature=0.0, cache_kv=cache_kv) for cache_kv in (True, False)
    )
    assert cached.shape == uncached.shape == (2, 5)
    assert 0 <= cached.min() <= cached.max() < 32


def test_text_only_takes_one_prompt() -> None:
    model = small(cross_attend=False)
    _, text = batch(model, b=2, n=3)
    tokens = model.generate(None, text, 6, **GREEDY)
    assert torch.equal(model.generate(None, text[0], 6, **GREEDY), tokens[:1])
    assert torch.equal(model.generate(torch.randn(2, 3, 8, 8), text, 6, **GREEDY), tokens)


BAD: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda f: f(None, TEXT, 3), ValueError, "neither img nor context is given"),
    (lambda f: f(IMG, TEXT, 3, context=MODEL.encode(IMG)), ValueError, "both img and context are given"),
    (lambda f: f(IMG.byte(), TEXT, 3), TypeError, "img has dtype torch.uint8, must be floating point"),
    (lambda f: f(None, TEXT, 3, context=torch.ones(2, 4, 5)), ValueError, "must be (b, p, encoder_dim=24)"),
    (lambda f: f(IMG, TEXT[:1], 3), ValueError, "prompts has batch size 1, must have 2, the number of images: pass"),
    (lambda f: f(IMG, TEXT.float(), 3), TypeError, "prompts has dtype torch.float32, must be an integer dtype"),
    (lambda f: f(IMG, TEXT[:, :0], 3), ValueError, "prompts has shape (2, 0), must not be empty"),
    (lambda f: f(IMG, "a dog", 3), TypeError, "prompts is a str, must be a torch.Tensor"),
    (lambda f: f(IMG, [], 3), ValueError, "prompts is an empty list"),
    (lambda f: f(IMG, [TEXT[0], TEXT], 3), ValueError, "prompts[1] is (2, 4), must be a 1-d tensor (t,)"),
    (lambda f: f(IMG, [TEXT[0], TEXT[1, :0]], 3), ValueError, "prompts[1] has shape (1, 0), must not be empty"),
    (lambda f: f(IMG, [TEXT[0], TEXT[1].float()], 3), TypeError, "prompts[1] has dtype torch.float32"),
    (lambda f: f(IMG, [TEXT[0], TEXT[1].to("meta")], 3), ValueError, "prompts are on cpu, meta, must be on one device"),
    (lambda f: f(IMG, list(TEXT), 3, prompt_lens=torch.ones(2)), ValueError, "prompt_lens is only for prompts (b, t)"),
    (lambda f: f(IMG, TEXT, 3, prompt_lens=[1, 2]), TypeError, "prompt_lens=[1, 2] must be a tensor of ints (b,)"),
    (
        lambda f: f(IMG, TEXT, 3, prompt_lens=torch.tensor([0, 2])),
        ValueError,
        "prompt_lens=[0, 2]; prompt_lens must be within 1..4",
    ),
    (
        lambda f: f(IMG, TEXT, 3, prompt_lens=torch.tensor([1, 5])),
        ValueError,
        "prompt_lens=[1, 5]; prompt_lens must be within 1..4, the number",
    ),
    (lambda f: f(IMG, TEXT + 30, 3), ValueError, "must have ids within 0..num_tokens-1=31: check the tokenizer"),
    (lambda f: f(IMG, TEXT - 100, 3), ValueError, "must have ids within 0..num_tokens-1=31: check the tokenizer"),
    (lambda f: f(IMG, TEXT, 0), ValueError, "seq_len=0 must be a positive int: it is the maximum number of new tokens"),
    (lambda f: f(IMG, TEXT, 2.0), TypeError, "seq_len=2.0 must be a positive int, not float"),
    (lambda f: f(IMG, TEXT, 3, eos_token=32), ValueError, "eos_token=32 must be a token id within 0..num_tokens-1=31"),
    (lambda f: f(IMG, TEXT, 3, eos_token=True), TypeError, "eos_token=True must be a token id, not bool: or pass None"),
    (lambda f: f(IMG, TEXT, 3, temperature=-1), ValueError, "temperature=-1 must be 0 (greedy) or more, and finite"),
    (lambda f: f(IMG, TEXT, 3, temperature=float("nan")), ValueError, "temperature=nan must be 0 (greedy) or more"),
    (lambda f: f(IMG, TEXT, 3, temperature="hot"), TypeError, "temperature='hot' must be a number, not str"),
    (lambda f: f(IMG, TEXT, 3, filter_logits_fn="topp"), ValueError, "did you mean 'top_p'?"),
    (
        lambda f: f(IMG, TEXT, 3, filter_logits_fn=3),
        ValueError,
        "filter_logits_fn=3 must be one of top_p, top_k, top_a",
    ),
    (
        lambda f: f(IMG, TEXT, 3, filter_kwargs={"thres": 0.9}),
        ValueError,
        "filter_kwargs={'thres': 0.9} must have the keywords of top_k: frac_num_tokens, k; instead of thres, pass frac",
    ),
    (
        lambda f: f(IMG, TEXT, 3, filter_logits_fn="top_p", filter_kwargs={"p": 0.9}),
        ValueError,
        "filter_kwargs={'p': 0.9} must have the keywords of top_p: thres",
    ),
    (lambda f: f(IMG, None, 3), ValueError, "prompts is None, and the model has no bos_token: pass prompts, or"),
    (lambda f: f(IMG, TEXT, 3, eos_token=[1, 32]), ValueError, "eos_token=32 must be a token id within 0..num_tokens"),
    (lambda f: f(IMG, TEXT, 3, num_return_sequences=0), ValueError, "num_return_sequences=0 must be a positive int"),
    (lambda f: f(IMG, TEXT, 3, logits_processor=1), TypeError, "logits_processor=1 must be a function of ids and"),
    (
        lambda f: list(f(IMG, TEXT, 3, logits_processor=lambda ids, logits: logits[:1])),
        ValueError,
        "logits_processor must return logits (2, 32), with -inf for tokens that are not allowed, not tensor",
    ),
    (
        lambda f: list(f(IMG, TEXT, 3, logits_processor=lambda ids, logits: logits - torch.inf)),
        ValueError,
        "logits_processor returned -inf for all tokens of a text: it must allow at least one",
    ),
    (lambda f: list(f(IMG * torch.nan, TEXT, 3)), ValueError, "the logits are nan: check img, context and the model's"),
]


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_requests(method: str, call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    before = modes(MODEL)
    with pytest.raises(error, match=re.escape(message)):
        call(getattr(MODEL, method))
    assert modes(MODEL) == before


@pytest.mark.parametrize("name", ["context", "context_mask"])
def test_a_text_only_model_decodes_without_a_context(name: str) -> None:
    model = small(cross_attend=False)
    with pytest.raises(ValueError, match=f"{name} is only for models that cross-attend"):
        model.generate(None, TEXT, 3, **dict[str, Any]({name: torch.ones(2, 4)}))


def test_generate_is_upstreams_generate_where_upstream_runs() -> None:
    model = small()
    img, text = batch(model, b=3, n=4)
    theirs = model.decoder.generate(text, 8, context=model.encode(img), temperature=0.0)
    assert torch.equal(model.generate(img, text, 8, **GREEDY), theirs)


def test_upstream_still_counts_an_eos_of_the_prompt_and_stays_in_eval_mode() -> None:
    model = small().train()
    img, text = batch(model, b=2, n=3)
    context = model.encode(img)
    text[:, 0] = 5
    tokens = model.decoder.generate(text, 8, context=context, eos_token=5, temperature=0.0)
    assert tokens.shape == (2, 1)  # one token, which is padding
    assert (tokens == 0).all()
    with pytest.raises(AssertionError):
        model.decoder.generate(text, 8, temperature=0.0)
    assert not model.decoder.training


def test_nothing_is_tried_where_the_cache_is_not_wanted() -> None:
    model = small()
    img, prompts = batch(model)
    expected = model.generate(img, prompts, 3, **GREEDY)
    with mock.patch("palme_xt.decoding.probe.is_right", side_effect=AssertionError):
        assert torch.equal(model.generate(img, prompts, 3, cache_kv=False, **GREEDY), expected)
        with pytest.raises(AssertionError):
            model.generate(img, prompts, 3, **GREEDY)
