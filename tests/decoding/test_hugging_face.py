"""Compare decoding with the `generate` of transformers, which runs the same network in its own loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from palme_xt import PalmE
from tests.models import batch, small

transformers: Any = pytest.importorskip("transformers")

PROMPTS, SEQ_LEN = 3, 9
PAD = 1  # transformers fills beams with EOS instead if it is 0
EOS: tuple[Any, ...] = (None, 3, [3, 7, 11])


class Config(transformers.PretrainedConfig):
    model_type = "palme_of_the_tests"


class HuggingFace(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A network of x-transformers for the loops of transformers, which give it the whole text at each step."""

    config_class = Config
    main_input_name = "input_ids"

    def __init__(self, model: PalmE) -> None:
        super().__init__(Config(is_encoder_decoder=False, vocab_size=model.config.num_tokens, num_hidden_layers=2))
        self.net = model.decoder.net

    def forward(self, input_ids: Tensor, starts: Tensor, context: Tensor, **_: Any) -> Any:
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.net(input_ids, context=context, seq_start_pos=starts)
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "starts": kwargs["starts"], "context": kwargs["context"]}

    def _update_model_kwargs_for_generation(self, _: Any, kwargs: dict[str, Any], **__: Any) -> dict[str, Any]:
        return kwargs


def draw(seed: int, num_tokens: int) -> tuple[PalmE, Tensor, list[Tensor]]:
    """Return a model, images and prompts, whose lengths differ for every other seed."""
    model = small(seed, num_tokens=num_tokens, autoregressive_kwargs={"pad_value": PAD})
    img, text = batch(model, b=PROMPTS, n=5, seed=seed)
    lens = (5, 2, 3) if seed % 2 else (5, 5, 5)
    return model, img, [row[:length] for row, length in zip(text, lens, strict=True)]


@torch.no_grad()
def theirs(model: PalmE, img: Tensor, prompts: list[Tensor], eos_token: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the new tokens `(b * k, n)` of transformers, padded to `SEQ_LEN`, and the scores of beams."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in prompts])
    found = (
        HuggingFace(model)
        .eval()
        .generate(
            ids,
            starts=torch.tensor([longest - len(row) for row in prompts]),
            context=model.encode(img),
            max_new_tokens=SEQ_LEN,
            do_sample=False,
            use_cache=False,
            pad_token_id=PAD,
            eos_token_id=eos_token,
            return_dict_in_generate=True,
            output_scores=True,
            **kwargs,
        )
    )
    new = found.sequences[:, longest:]
    return torch.nn.functional.pad(new, (0, SEQ_LEN - new.shape[1]), value=PAD), found.get("sequences_scores")


@pytest.mark.slow
@pytest.mark.parametrize("eos_token", EOS, ids=str)
def test_greedy_decoding_is_that_of_transformers(eos_token: Any) -> None:
    texts = set()
    for seed in range(40):
        model, img, prompts = draw(seed, num_tokens=24)
        expected, _ = theirs(model, img, prompts, eos_token)
        tokens = model.generate(img, prompts, SEQ_LEN, eos_token=eos_token, temperature=0.0)
        assert torch.equal(tokens, expected), seed
        texts |= {tuple(row) for row in tokens.tolist()}
    assert len(texts) > 80  # of 120


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("eos_token", EOS, ids=str)
def test_beam_search_is_that_of_transformers(eos_token: Any, early_stopping: bool | str) -> None:
    texts = set()
    for seed, (beams, penalty) in enumerate(itertools.product((2, 3, 4, 5) * 2, (-1.0, 0.0, 0.6, 1.0, 2.0))):
        model, img, prompts = draw(seed, num_tokens=24)
        how: dict[str, Any] = {"length_penalty": penalty, "early_stopping": early_stopping}
        expected, scores = theirs(model, img, prompts, eos_token, num_beams=beams, num_return_sequences=beams, **how)
        found, found_scores = model.beam_search(img, prompts, SEQ_LEN, beams=beams, eos_token=eos_token, **how)
        assert torch.equal(found.transpose(0, 1).flatten(0, 1), expected), (seed, beams, penalty)
        torch.testing.assert_close(found_scores.T.flatten(), scores, rtol=1e-4, atol=1e-4)
        texts |= {tuple(row) for row in expected.tolist()}
    assert len(texts) > 300  # of 420
