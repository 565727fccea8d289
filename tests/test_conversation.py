"""Conversations: each turn equals reading the whole text at once, and passes only new tokens through the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palme_xt import PalmE
from palme_xt.conversation import Conversation
from palme_xt.strategies import configs, sentences
from tests.models import SMALL, logits, small
from tests.test_in_sentence import IMAGE, P, close, images, of

GREEDY: dict[str, Any] = {"temperature": 0.0, "eos_token": []}


def ids(*tokens: int) -> Tensor:
    return torch.tensor(tokens)


@contextmanager
def read_at_once(model: PalmE) -> Iterator[list[int]]:
    """Collect how many positions each pass through the network reads."""
    found: list[int] = []
    layers = model.decoder.net.attn_layers
    hook = layers.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
    yield found
    hook.remove()


def collect(seen: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor that changes nothing."""

    def process(text: Tensor, values: Tensor) -> Tensor:
        seen.append(values[0])
        return values

    return process


def talk(model: PalmE, turns: list[tuple[Tensor, Any]], n: int = 3, **how: Any) -> tuple[Conversation, list[Tensor]]:
    """Return a conversation of greedy answers of n tokens, and the logits `(v,)` of each of their tokens."""
    conversation, seen = Conversation(model), list[Tensor]()
    for text, img in turns:
        conversation.read(text, img)
        answer = conversation.answer(n, logits_processor=collect(seen), **GREEDY, **how)
        assert torch.equal(conversation.ids[0, -n:], answer)
    return conversation, seen


def at_once(model: PalmE, turns: list[tuple[Tensor, Any]], text: Tensor, n: int = 3) -> Tensor:
    """Return the logits `(2 * n, v)` of the tokens of two answers, from reading the whole text `(1, n)`."""
    inside = [img for _, img in turns if img is not None]
    values = logits(model.eval(), [torch.cat(inside)] if inside else None, text)[0]  # type: ignore[arg-type]
    p = (model.config.image_size // model.config.patch_size) ** 2
    token = -1 if model.config.image_token is None else model.config.image_token
    ends = torch.where(text[0] == token, p, 1).cumsum(dim=0)
    first = len(turns[0][0])
    places = [*range(first, first + n), *range(text.shape[1] - n, text.shape[1])]
    return values[ends[places] - 2].detach()


CONFIGS = configs(cross_attend=False, max_seq_len=99)


@settings(max_examples=6)
@given(data=st.data())
def test_turns_equal_the_whole_text(data: st.DataObject) -> None:
    config = data.draw(CONFIGS)
    # With xPos, upstream's memories make the logits of a token depend on the length of the text.
    layers = {name: value for name, value in config.decoder_kwargs.items() if name != "attn_num_mem_kv"}
    config = replace(config, decoder_kwargs=layers, image_token=(config.pad_value + 1) % config.num_tokens)
    img, text, lens, prompts = data.draw(sentences(config))
    row, first = text[0, : lens[0]], int(prompts[0])
    count = row[:first].tolist().count(config.image_token)
    turns = [(row[:first], img[0][:count]), (row[first:], img[0][count:])]
    torch.manual_seed(0)
    model = PalmE.from_config(config)
    conversation, seen = talk(model, turns)
    assert close(torch.stack(seen), at_once(model, turns, conversation.ids))
    again = model.generate([img[0]], conversation.ids[0, :-3], 3, **GREEDY)
    assert torch.equal(again, conversation.ids[:, -3:])


TURNS = [(ids(1, IMAGE, 3, IMAGE, 4), images(2)), (ids(5, IMAGE, 6, 8), images(1, seed=5))]


def test_only_new_tokens_pass_the_network() -> None:
    model = of()
    with read_at_once(model) as read:
        conversation, seen = talk(model, TURNS)
        # The last token of an answer is read with the next question.
        assert read == [3 + 2 * P, 1, 1, 1 + 3 + P, 1, 1]
        expected = at_once(model, TURNS, conversation.ids)
    assert close(torch.stack(seen), expected)
    with read_at_once(model) as read:
        _, whole = talk(model, TURNS, cache_kv=False)
    assert read[3:] == [9 + 3 * P, 10 + 3 * P, 11 + 3 * P]
    assert close(torch.stack(whole), expected)
    # An image of the second turn that is mirrored, or a cache without the first tokens, would be noticed.
    for other in [TURNS[0], (TURNS[1][0], TURNS[1][1].flip(-1))], [(ids(2, *TURNS[0][0][1:]), TURNS[0][1]), TURNS[1]]:
        assert not close(torch.stack(talk(model, other)[1])[3], expected[3])


def test_a_changed_cache_is_noticed() -> None:
    model, seen = of(), list[Tensor]()
    whole = talk(model, TURNS)[1]
    conversation, _ = talk(model, TURNS[:1])
    for layer in conversation._cache.attn_intermediates:
        layer.cached_kv = tuple(kv.roll(1, dims=-2) for kv in layer.cached_kv)
    conversation.read(*TURNS[1])
    conversation.answer(1, logits_processor=collect(seen), **GREEDY)
    assert not close(seen[0], whole[3])


def test_where_the_cache_is_wrong_the_whole_text_is_read() -> None:
    model = of(decoder_kwargs={"shift_tokens": 1})
    with read_at_once(model) as read:
        conversation, seen = talk(model, TURNS)
    assert read[3:] == [9 + 3 * P, 10 + 3 * P, 11 + 3 * P]
    assert close(torch.stack(seen), at_once(model, TURNS, conversation.ids))


def test_other_models() -> None:
    text = small(cross_attend=False)
    turns = [(ids(1, 3), None), (ids(4, 5, 6), None)]
    with read_at_once(text) as read:
        conversation, seen = talk(text, turns)
    assert read == [2, 1, 1, 4, 1, 1]
    assert close(torch.stack(seen), at_once(text, turns, conversation.ids))

    model, img = small(), images(1)
    context = model.encode(img)
    conversation = Conversation(model, context)
    for turn, _ in turns:
        conversation.read(turn)
        with read_at_once(model) as read:
            answer = conversation.answer(3, **GREEDY)
        assert torch.equal(answer[None], model.generate(img, conversation.ids[:, :-3], 3, **GREEDY))
    assert read == [4, 1, 1]
    masked = Conversation(model, context, torch.tensor([[True, False, True, True]]))
    masked.read(ids(1, 3))
    mask = torch.tensor([[True, False, True, True]])
    expected = model.generate(None, ids(1, 3), 3, context=context, context_mask=mask, **GREEDY)
    assert torch.equal(masked.answer(3, **GREEDY)[None], expected)


def test_eos_stays_and_an_abandoned_answer_too() -> None:
    model = of()
    greedy = talk(model, TURNS[:1], n=4)[0].ids[0, 5:].tolist()
    conversation = Conversation(model)
    conversation.read(*TURNS[0])
    eos = greedy[-1]
    assert conversation.answer(8, temperature=0.0, eos_token=eos).tolist() == greedy[: greedy.index(eos) + 1]
    conversation.read(*TURNS[1])
    kept = conversation.ids[0].tolist()
    stream = conversation.stream(8, **GREEDY)
    some = [next(stream), next(stream)]
    assert conversation.ids[0].tolist() == kept + some
    conversation.read(ids(9))
    rest = conversation.answer(2, **GREEDY)
    whole = [torch.cat([img for _, img in TURNS])]
    assert torch.equal(model.generate(whole, ids(*kept, *some, 9), 2, **GREEDY)[0], rest)
    assert model.training

    sampled = [Conversation(model), Conversation(model)]
    for each in sampled:
        each.read(*TURNS[0])
    one, other = (each.answer(4, eos_token=[], generator=torch.Generator().manual_seed(3)) for each in sampled)
    assert torch.equal(one, other)


def test_images_in_any_form() -> None:
    model = of()
    expected = talk(model, TURNS)[0].ids
    forms: list[dict[str, Any]] = [{"img": [*TURNS[0][1]]}, {"image_embeds": model.encode(TURNS[0][1])}]
    for form in forms:
        conversation = Conversation(model)
        conversation.read(TURNS[0][0], **form)
        conversation.answer(3, **GREEDY)
        conversation.read(ids(5, IMAGE), images(1, seed=5))
        conversation.read(ids(6, 8), images(0))
        conversation.answer(3, **GREEDY)
        assert torch.equal(conversation.ids, expected)


def test_errors_leave_the_conversation_as_it_was() -> None:
    model = of(max_seq_len=16)
    conversation = Conversation(model)
    with pytest.raises(ValueError, match="sample 0 has 1 placeholders and 0 images; text must have one placeholder"):
        conversation.read(ids(1, IMAGE))
    with pytest.raises(ValueError, match="sample 0 has 1 placeholders and 2 images; text must have one placeholder"):
        conversation.read(ids(1, IMAGE), images(2))
    with pytest.raises(ValueError, match=r"text has ids from 1 to 99; text must have ids within 0\.\.num_tokens-1=31"):
        conversation.read(ids(1, 99))
    with pytest.raises(ValueError, match="both img and image_embeds are given"):
        conversation.read(ids(1, IMAGE), images(1), image_embeds=torch.randn(1, P, 24))
    assert conversation.ids.shape == (1, 0)
    conversation.read(ids(1, IMAGE, 3), images(1))
    with pytest.raises(ValueError, match=r"image_embeds has the shapes .* must be what encode returns"):
        conversation.read(ids(IMAGE), image_embeds=torch.randn(1, P - 1, 24))
    with pytest.raises(ValueError, match=r"prompt of 6 tokens \+ seq_len=11 exceeds max_seq_len=16: shorten one"):
        conversation.stream(11)
    with pytest.raises(ValueError, match="num_return_sequences=2 must be 1 in a conversation"):
        conversation.stream(2, num_return_sequences=2)
    with pytest.raises(TypeError, match="beams"):
        conversation.stream(2, beams=2)
    assert conversation.ids.tolist() == [[1, IMAGE, 3]]
    with pytest.raises(ValueError, match=r"a model that cross-attends needs img, or context=model\.encode\(img\)"):
        Conversation(small())
    with pytest.raises(ValueError, match="context is only for models that cross-attend"):
        Conversation(model, torch.randn(1, P, 24))
    with pytest.raises(ValueError, match="image_embeds is only for models with an image_token"):
        Conversation(PalmE(**SMALL, cross_attend=False)).read(ids(1), images(1))


@pytest.mark.slow
def test_it_compiles() -> None:
    expected, seen = talk(of(), TURNS)
    found, others = talk(of(), TURNS, compile=True)
    assert torch.equal(found.ids, expected.ids)
    assert close(torch.stack(others), torch.stack(seen))
