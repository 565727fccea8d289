"""What `forward` takes, decoding takes: the other inputs of the network, with and without its cache."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from x_transformers import TransformerWrapper
from x_transformers.x_transformers import AttentionLayers

from palme_xt import PalmE
from palme_xt.decoding.request import Request
from tests.models import SMALL, batch, small

B, DIM, VOCABULARY = 3, SMALL["decoder_dim"], SMALL["num_tokens"]


class ShiftedEmbedding(nn.Module):
    """A token embedding with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, DIM)

    def forward(self, ids: Tensor, shift: Tensor) -> Any:
        return self.emb(ids) + shift


class ScaledLogits(nn.Module):
    """A projection to logits with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, VOCABULARY)

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        return self.proj(x) * scale


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


LOOPED: dict[str, Any] = {
    "seed": 4,  # with most seeds, further loops change no token
    "decoder_kwargs": {"pre_and_post_norm": True},
    "transformer_kwargs": {"looped": True},
}
IDS = torch.tensor([[0], [2], [3]])
# For each input: a value, another value, and the arguments of a model that takes it.
INPUTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "condition": (draw(B, 6), -draw(B, 6), {"decoder_kwargs": {"use_adaptive_rmsnorm": True, "dim_condition": 6}}),
    "embed_ids": ({"kind": IDS}, {"kind": 3 - IDS}, {"transformer_kwargs": {"embed_num_tokens": {"kind": 4}}}),
    "in_attn_cond": (draw(B, 1, DIM), -draw(B, 1, DIM), {}),
    "layers_execute_order": ((0, 1, 2, 0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), {}),
    "looped_steps": (2, 3, LOOPED),
    "max_looped_steps": (2, 3, LOOPED),
    "recycle_steps": (2, 1, {"transformer_kwargs": {"recycling": True}}),
    "sum_embeds": (draw(B, 1, DIM), -draw(B, 1, DIM), {}),
    "to_logits_kwargs": (
        {"scale": draw(B, 1, VOCABULARY)},
        {"scale": -draw(B, 1, VOCABULARY)},
        {"transformer_kwargs": {"to_logits": ScaledLogits()}},
    ),
    "token_emb_kwargs": (
        {"shift": draw(B, 1, DIM)},
        {"shift": -draw(B, 1, DIM)},
        {"transformer_kwargs": {"token_emb": ShiftedEmbedding()}},
    ),
    "transform_token_embeds": (lambda embeddings: embeddings.flip(-1), lambda embeddings: -embeddings, {}),
}


KNOWN = {*signature(TransformerWrapper.forward).parameters, *signature(AttentionLayers.forward).parameters}
INSTALLED = [name for name in INPUTS if name in KNOWN]  # x-transformers 2.26.0 lacks some


def only(row: int, value: Any) -> Any:
    """Return what `value` holds for one sample."""
    return tree_map(lambda leaf: leaf[row : row + 1] if isinstance(leaf, Tensor) else leaf, value)


@torch.no_grad()
def greedy(model: PalmE, img: Tensor, prompt: Tensor, seq_len: int, **kwargs: Any) -> list[int]:
    """Decode one sample by reading the whole text for every token."""
    text, context = prompt[None], model.encode(img)
    for _ in range(seq_len):
        text = torch.cat([text, model.decoder.net(text, context=context, **kwargs)[:, -1:].argmax(dim=-1)], dim=1)
    return text[0, len(prompt) :].tolist()


def test_each_input_is_tested() -> None:
    assert sorted(INPUTS) == sorted(Request.PASSED_ON)


@pytest.mark.parametrize("name", INSTALLED)
def test_inputs_of_the_network_reach_every_step(name: str) -> None:
    value, other, arguments = INPUTS[name]
    model = small(**arguments).eval()
    img, text = batch(model, b=B, n=6)
    prompts = [text[0, :2], text[1], text[2, :4]]
    expected = [greedy(model, img[i : i + 1], prompts[i], 8, **{name: only(i, value)}) for i in range(B)]
    given: dict[str, Any] = {name: value, "temperature": 0.0}
    for cache_kv in True, False:
        assert model.generate(img, prompts, 8, cache_kv=cache_kv, **given).tolist() == expected
    assert torch.stack(list(model.stream(img, prompts, 8, **given)), dim=1).tolist() == expected
    assert model.generate(img, prompts, 8, **given | {name: other}).tolist() != expected  # negative control

    eos = expected[1][2]  # from then on, the other rows are decoded without this one
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert len({len(row) for row in ended}) > 1
    tokens = model.generate(img, prompts, 8, eos_token=eos, **given)
    assert tokens.tolist() == [row + [0] * (8 - len(row)) for row in ended]


@pytest.mark.parametrize("name", INSTALLED)
def test_inputs_of_the_network_follow_the_beams_and_the_samples(name: str) -> None:
    value, _, arguments = INPUTS[name]
    model = small(**arguments)
    img, text = batch(model, b=B, n=4)
    given: dict[str, Any] = {name: value}
    found, scores = model.beam_search(img, text, 6, beams=3, **given)
    for row in range(B):
        alone = {name: only(row, value)}
        tokens, score = model.beam_search(img[row : row + 1], text[row], 6, beams=3, cache_kv=False, **alone)
        assert torch.equal(found[:, row], tokens[:, 0])
        torch.testing.assert_close(scores[:, row], score[:, 0], rtol=1e-4, atol=1e-3)
    model.eval()
    scored = model.score(img, text, found[0], **given).sum(dim=1)
    torch.testing.assert_close(scored, scores[0], rtol=1e-4, atol=1e-3)

    seeded = [torch.Generator().manual_seed(0) for _ in range(2)]
    sampled = model.generate(img, text, 6, num_return_sequences=2, generator=seeded[0], **given)
    repeated = {name: tree_map(lambda leaf: leaf.repeat_interleave(2, 0) if isinstance(leaf, Tensor) else leaf, value)}
    images, prompts = img.repeat_interleave(2, 0), text.repeat_interleave(2, 0)
    assert torch.equal(sampled, model.generate(images, prompts, 6, generator=seeded[1], **repeated))


def test_what_is_not_of_a_sample_stays_when_rows_leave() -> None:
    model = small(transformer_kwargs={"token_emb": ShiftedEmbedding()})
    img, text = batch(model, b=3, n=3)
    shift = draw(1, DIM)  # not (3, ...), so it holds for all samples, also when one is left
    given: dict[str, Any] = {"token_emb_kwargs": {"shift": shift}, "temperature": 0.0}
    free = model.generate(img, text, 8, **given)
    eos = int(free[0, 1])
    for row, tokens in enumerate(model.generate(img, text, 8, eos_token=eos, **given).tolist()):
        until = free[row].tolist().index(eos) + 1 if eos in free[row] else 8
        assert tokens == free[row, :until].tolist() + [0] * (8 - until)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"tempertaure": 1.0},
        TypeError,
        "() got an unexpected keyword argument 'tempertaure': did you mean 'temperature'?",
    ),
    (
        {"recycle_step": 1},
        TypeError,
        "got an unexpected keyword argument 'recycle_step': did you mean 'recycle_steps'?",
    ),
    ({"mask": torch.ones(3, 3)}, TypeError, "got an unexpected keyword argument 'mask': did you mean 'context_mask'?"),
    (
        {"embed_ids": {"kind": torch.ones(3, 3)}},
        ValueError,
        "embed_ids has shape (3, 3), must have size 1 in dimension",
    ),
    ({"sum_embeds": torch.ones(3, 3, DIM)}, ValueError, "sum_embeds has shape (3, 3, 32), must have size 1"),
    ({"condition": torch.ones(3, 3, DIM)}, ValueError, "condition has shape (3, 3, 32), must have size 1"),
]


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(("kwargs", "error", "message"), BAD)
def test_bad_keywords(method: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small()
    img, text = batch(model, b=3, n=3)
    with pytest.raises(error, match=re.escape(f"PalmE.{method}{message}" if message[0] == "(" else message)):
        getattr(model, method)(img, text, 2, **kwargs)


def test_the_constructor_names_a_misspelled_argument_too() -> None:
    with pytest.raises(
        TypeError, match=r"PalmE.__init__\(\) got an .* argument 'encoder_dims': did you mean 'encoder_dim'"
    ):
        PalmE(encoder_dims=64)  # type: ignore[call-arg]
