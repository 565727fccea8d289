"""Decoding keeps its promises under every keyword of upstream's decoder, whatever upstream's cache and padding do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from palme_xt import PalmE
from tests.decoding.overrides import FLAGS, KEYWORDS, Arguments, built, pairs, texts, variants

STEPS = 3
RANDOM = ("attn_gumbel_softmax", "cross_attn_gumbel_softmax")  # sample noise in eval mode, too

# Keywords that the release that the tests were written for cannot read a text with, and why.
NEVER_RUN = {
    "use_adaptive_layernorm": "needs condition",
    "use_adaptive_rmsnorm": "needs condition",
    "use_adaptive_layerscale": "needs condition",
}


def alone(model: PalmE, text: Tensor, context: Tensor) -> Tensor:
    """Return the logits `(n, v)` of greedy decoding that runs the network on the whole text at each step."""
    logits = []
    for _ in range(STEPS):
        logits.append(model.decoder.net(text[None], context=context[None])[0, -1])
        text = torch.cat([text, logits[-1].argmax(keepdim=True)])
    return torch.stack(logits)


def decoded(model: PalmE, prompts: list[Tensor], context: Tensor, cache_kv: bool) -> tuple[Tensor, Tensor]:
    """Return the tokens `(b, n)` and logits `(b, n, v)` of greedy decoding."""
    seen: list[Tensor] = []

    def see(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True), -torch.inf)

    tokens = model.generate(None, prompts, STEPS, context=context, cache_kv=cache_kv, filter_logits_fn=see)
    return tokens, torch.stack(seen, dim=1)


@torch.no_grad()
def assert_promises(model: PalmE) -> None:
    """Assert that each sample gets what it gets alone from the whole text, with and without the cache."""
    ids, context = texts()
    prompts = [ids[0], ids[1, :3]]
    expected = torch.stack([alone(model, *sample) for sample in zip(prompts, context, strict=True)])
    for cache_kv in True, False:
        tokens, logits = decoded(model, prompts, context, cache_kv)
        assert torch.equal(tokens, expected.argmax(dim=-1))
        # Upstream computes some softmaxes in float32.
        assert (logits - expected.float()).abs().max() <= 1e-4 * expected.abs().max()
    tokens, _ = decoded(model, [ids[0], ids[1].flip(0)], context, True)
    assert torch.equal(tokens[0], expected[0].argmax(dim=-1))


def first_that_runs(part: str, name: str) -> PalmE | None:
    return next(filter(None, map(built, variants(part, name, FLAGS))), None)


@pytest.mark.parametrize(("part", "name"), KEYWORDS)
def test_promises_are_kept_under_every_keyword(part: str, name: str) -> None:
    model = first_that_runs(part, name)
    if name in RANDOM or model is None:
        pytest.skip("random" if model else "does not run")
    assert_promises(model)
