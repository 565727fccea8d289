"""Compare beam search with a brute-force one, and with the enumeration of all texts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from palme_xt import PalmE
from tests.models import batch, small

LOWEST = float("-inf")


def log_probs(model: PalmE, img: Tensor | None, texts: list[list[int]]) -> Tensor:
    """Return the log probabilities `(n, v)` of the token after each of n texts of the same length, for one image."""
    context = None if img is None else model.encode(img).expand(len(texts), -1, -1)
    values: Tensor = model.decoder.net(torch.tensor(texts), context=context)
    return values[:, -1].log_softmax(dim=-1)


@torch.no_grad()
def brute_force(
    model: PalmE, img: Tensor | None, prompt: list[int], seq_len: int, beams: int
) -> list[tuple[list[int], float]]:
    """Run a textbook beam search without EOS: extend all beams by all tokens, sort, and keep the best."""
    alive = [(list(prompt), 0.0)]
    for _ in range(seq_len):
        scores = log_probs(model, img, [text for text, _ in alive])
        extended = [
            ([*text, token], score + float(row[token]))
            for (text, score), row in zip(alive, scores, strict=True)
            for token in range(len(row))
        ]
        alive = sorted(extended, key=lambda pair: -pair[1])[:beams]
    return [(text[len(prompt) :], score) for text, score in alive]


@torch.no_grad()
def exhaustive(
    model: PalmE, img: Tensor, prompt: list[int], seq_len: int, eos_token: int | None, length_penalty: float
) -> list[tuple[list[int], float]]:
    """Return all possible texts with their scores, best first. Texts end at EOS or after seq_len tokens."""
    found = []
    alive = [(list(prompt), 0.0)]
    for length in range(1, seq_len + 1):
        scores = log_probs(model, img, [text for text, _ in alive])
        extended = [
            ([*text, token], score + float(row[token]))
            for (text, score), row in zip(alive, scores, strict=True)
            for token in range(len(row))
        ]
        alive = []
        for text, score in extended:
            if text[-1] == eos_token or length == seq_len:
                new = text[len(prompt) :]
                found.append((new + [0] * (seq_len - length), score / length**length_penalty))
            else:
                alive.append((text, score))
    return sorted(found, key=lambda pair: -pair[1])


@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"cross_attend": False}, {"attn_flash": False, "rotary_xpos": False}])
@pytest.mark.parametrize("beams", [2, 5])
def test_it_equals_a_brute_force_beam_search(arguments: dict[str, Any], beams: int, cache_kv: bool) -> None:
    model = small(**arguments)
    img, text = batch(model, b=3, n=5)
    images = None if arguments.get("cross_attend") is False else img
    prompts = [text[0], text[1, :2], text[2, :4]]
    tokens, scores = model.beam_search(images, prompts, 6, beams=beams, cache_kv=cache_kv)
    assert tokens.shape == (beams, 3, 6)
    assert scores.shape == (beams, 3)
    for row, prompt in enumerate(prompts):
        image = None if images is None else images[row : row + 1]
        expected = brute_force(model, image, prompt.tolist(), 6, beams)
        assert tokens[:, row].tolist() == [text for text, _ in expected]
        torch.testing.assert_close(scores[:, row], torch.tensor([score for _, score in expected]), rtol=1e-4, atol=1e-3)
    assert torch.equal(model.generate(images, prompts, 6, beams=beams, cache_kv=cache_kv), tokens[0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("eos_token", [None, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_as_wide_as_the_vocabulary_allows_it_finds_the_optimum(
    seed: int, eos_token: int | None, length_penalty: float
) -> None:
    vocabulary, seq_len = 4, 4
    model = small(seed=seed, num_tokens=vocabulary)
    img, text = batch(model, b=2, n=3, seed=seed)
    beams = vocabulary ** (seq_len - 1)
    tokens, scores = model.beam_search(
        img, text, seq_len, beams=beams, eos_token=eos_token, length_penalty=length_penalty
    )
    for row in range(2):
        expected = exhaustive(model, img[row : row + 1], text[row].tolist(), seq_len, eos_token, length_penalty)[:beams]
        best = torch.tensor([score for _, score in expected])
        torch.testing.assert_close(scores[: len(best), row], best, rtol=1e-4, atol=1e-3)
        assert tokens[0, row].tolist() == expected[0][0]
        assert (scores[len(best) :, row] == LOWEST).all()
        assert (tokens[len(best) :, row] == 0).all()


@torch.no_grad()
def rule_of_transformers(
    model: PalmE, img: Tensor, prompt: list[int], seq_len: int, beams: int, eos: list[int], how: dict[str, Any]
) -> list[tuple[list[int], float]]:
    """Search for one sample as transformers 5.24 does (`GenerationMixin._beam_search`), in lists."""
    penalty, early_stopping = how["length_penalty"], how["early_stopping"]
    alive: list[tuple[list[int], float]] = [(list(prompt), 0.0)]
    done: list[tuple[list[int], float]] = []
    for length in range(1, seq_len + 1):
        rows = log_probs(model, img, [text for text, _ in alive]).tolist()
        extended = [
            ([*text, token], score + row[token])
            for (text, score), row in zip(alive, rows, strict=True)
            for token in range(len(row))
        ]
        candidates = sorted(extended, key=lambda pair: -pair[1])[: beams * (1 + max(1, len(eos)))]
        for text, score in candidates[:beams]:
            if text[-1] in eos or length == seq_len:
                done.append((text[len(prompt) :] + [0] * (seq_len - length), score / length**penalty))
        done = sorted(done, key=lambda pair: -pair[1])[:beams]
        alive = [pair for pair in candidates if pair[0][-1] not in eos][:beams]
        longest = seq_len if early_stopping == "never" and penalty > 0 else length
        if len(done) == beams and (early_stopping is True or alive[0][1] / longest**penalty <= done[-1][1]):
            break
    return done


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("eos_token", [3, [3, 7, 11]], ids=str)
def test_it_ends_and_finishes_texts_as_transformers_does(
    eos_token: int | list[int], early_stopping: bool | str
) -> None:
    others = 0
    for seed, length_penalty in enumerate([-1.0, 0.0, 1.0, 2.0]):
        model = small(seed, num_tokens=20)
        img, text = batch(model, b=3, n=4, seed=seed)
        prompts = [text[0], text[1, :2], text[2, :3]]
        how: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        tokens, scores = model.beam_search(img, prompts, 8, beams=3, eos_token=eos_token, **how)
        for row, prompt in enumerate(prompts):
            eos = [eos_token] if isinstance(eos_token, int) else eos_token
            args = model, img[row : row + 1], prompt.tolist(), 8, 3, eos
            expected = rule_of_transformers(*args, how)
            assert tokens[:, row].tolist() == [found for found, _ in expected]
            best = torch.tensor([score for _, score in expected])
            torch.testing.assert_close(scores[:, row], best, rtol=1e-4, atol=1e-3)
            other = {"length_penalty": length_penalty, "early_stopping": early_stopping is False}
            others += rule_of_transformers(*args, other) != expected
    assert others > 0  # negative control: the three meanings differ


def test_negative_control_greedy_decoding_misses_the_optimum() -> None:
    missed = 0
    for seed in range(4):
        model = small(seed=seed, num_tokens=4)
        img, text = batch(model, b=2, n=3, seed=seed)
        greedy = model.generate(img, text, 4, temperature=0.0)
        missed += not torch.equal(greedy, model.generate(img, text, 4, beams=64))
    assert missed > 0


def test_length_penalty_prefers_longer_texts() -> None:
    model = small(num_tokens=4)
    img, text = batch(model, b=8, n=3)
    lengths = []
    for length_penalty in -2.0, 0.0, 4.0:
        tokens, _ = model.beam_search(img, text, 8, beams=8, eos_token=1, length_penalty=length_penalty)
        best = tokens[0].tolist()
        lengths.append(sum(row.index(1) + 1 if 1 in row else 8 for row in best))
    assert lengths[0] < lengths[1] < lengths[2]


def test_a_sample_does_not_depend_on_the_rest_of_the_batch() -> None:
    model = small()
    img, text = batch(model, b=4, n=5)
    prompts = [text[0, :1], text[1], text[2, :3], text[3, :2]]
    ends = model.generate(img, prompts, 8, beams=3)
    eos_token = int(ends[0, 2])
    together, scores = model.beam_search(img, prompts, 8, beams=3, eos_token=eos_token)
    for row, prompt in enumerate(prompts):
        alone, score = model.beam_search(img[row : row + 1], [prompt], 8, beams=3, eos_token=eos_token)
        assert torch.equal(together[:, row], alone[:, 0])
        torch.testing.assert_close(scores[:, row], score[:, 0], rtol=1e-4, atol=1e-4)


def test_one_beam_with_scores_is_greedy_decoding() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    tokens, scores = model.beam_search(img, text, 6, beams=1)
    assert torch.equal(tokens[0], model.generate(img, text, 6, temperature=0.0))
    assert (scores < 0).all()


def test_beams_of_several_images_and_beyond_max_seq_len() -> None:
    model = small()
    img, text = batch(model, b=4, n=3)
    both = img.unflatten(0, (2, 2))
    tokens = model.generate(both, text[:2], 20, beams=2, restrict_to_max_seq_len=False)
    assert tokens.shape == (2, 20)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"beams": 0}, ValueError, "beams=0 must be a positive int: 1 decodes without a search"),
        ({"beams": 2.0}, TypeError, "beams=2.0 must be a positive int, not float"),
        ({"length_penalty": 1.0}, ValueError, "length_penalty=1.0 has no effect with beams=1: leave it out"),
        ({"early_stopping": True}, ValueError, "early_stopping=True has no effect with beams=1: leave it out"),
        (
            {"beams": 2, "early_stopping": "always"},
            ValueError,
            "early_stopping='always' must be False, True or 'never'",
        ),
        ({"beams": 2, "num_return_sequences": 3}, ValueError, "num_return_sequences=3 must be at most beams=2"),
        ({"beams": 2, "length_penalty": "long"}, TypeError, "length_penalty='long' must be a number, not str"),
        ({"beams": 2, "length_penalty": float("inf")}, ValueError, "length_penalty=inf must be finite"),
        (
            {"beams": 2, "temperature": 0.7},
            ValueError,
            "temperature=0.7 has no effect with beams=2: leave it out",
        ),
        ({"beams": 2, "generator": torch.Generator()}, ValueError, "generator=<torch._C.Generator"),
        ({"beams": 2, "generator": torch.Generator()}, ValueError, "has no effect with beams=2: leave it out"),
        ({"early_stopping": False}, ValueError, "early_stopping=False has no effect with beams=1: leave it out"),
    ],
)
def test_what_makes_no_beam_search(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    with pytest.raises(error, match=re.escape(message)):
        model.generate(img, text, 3, **kwargs)


def test_upstream_beam_search_still_cannot() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    context = model.encode(img)
    one: Callable[..., Any] = model.decoder.beam_search
    assert one(text[:1], 4, beams=3, context=context[:1]).tolist() == [
        brute_force(model, img[:1], text[0].tolist(), 4, 3)[0][0]
    ]
    with pytest.raises(RuntimeError):
        one(text, 4, beams=3, context=context)
    with pytest.raises(AssertionError, match="eos token not supported yet"):
        one(text[:1], 4, beams=3, context=context[:1], eos_token=1)


def test_every_text_is_there_once() -> None:
    model = small()
    img, text = batch(model, b=2, n=3)
    tokens, _ = model.beam_search(img, text, 5, beams=6, eos_token=3)
    for row in range(2):
        assert len({tuple(beam) for beam in tokens[:, row].tolist()}) == 6


def test_scores_are_sorted() -> None:
    model = small()
    img, text = batch(model, b=3, n=3)
    _, scores = model.beam_search(img, text, 7, beams=5, eos_token=2, length_penalty=0.6)
    for better, worse in itertools.pairwise(scores):
        assert (better >= worse).all()
