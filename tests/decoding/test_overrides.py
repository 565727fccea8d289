"""Decoding keeps its promises under every keyword of upstream's decoder, whatever upstream's cache and padding do."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from palme_xt import PalmE, PalmEConfig
from palme_xt.decoding import compiled, probe
from palme_xt.mapping import upstream_keywords
from tests.decoding.overrides import FLAGS, KEYWORDS, NO_XPOS, Arguments, built, pairs, texts, variants
from tests.models import small

STEPS = 3
RANDOM = ("attn_gumbel_softmax", "cross_attn_gumbel_softmax")  # sample noise in eval mode, too

# Keywords with which x-transformers 2.31.10 computes something else from its cache, or from padded texts.
WRONG = (
    "orthog_residual",
    "mv_split_residual",
    "shift_tokens",
    "attn_selective",
    "attn_num_mem_kv",
    "attn_l2_distance",
    "attn_data_dependent_alibi",
    "attn_use_rel_proj_pos_bias",
    "attn_use_cope",
    "attn_orthog_projected_values",
    "attn_orthog_projected_values_per_head",
    "cross_attn_use_rel_proj_pos_bias",
    "cross_attn_inverted_attention",
    "cross_attn_causal",
    "scaled_sinu_pos_emb",
    "num_memory_tokens",
    "looped",
)

# All keywords take half a minute. By default, those that are known to need care are tried, and every eighth.
SOME = [
    pytest.param(part, name, marks=[] if name in WRONG or i % 8 == 0 else pytest.mark.slow)
    for i, (part, name) in enumerate(KEYWORDS)
]


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


def assert_step_that_is_compiled(model: PalmE) -> None:
    """Assert that the step that is compiled decodes the same tokens, or that the model cannot use the cache."""
    ids, context = texts()
    arguments: dict[str, Any] = {"context": context, "temperature": 0.0}
    if not probe.is_right(model.decoder.net, model.config, cached=True, padded=False):
        with pytest.raises(ValueError, match="compile=True needs the key-value cache"):
            model.generate(None, ids, 1 + STEPS, compile=True, **arguments)
        return
    step = mock.Mock(wraps=compiled._step)
    with mock.patch.object(compiled, "_compiled", return_value=step):
        tokens = model.generate(None, ids, 1 + STEPS, compile=True, **arguments)
    assert step.call_count == STEPS
    assert torch.equal(tokens, model.generate(None, ids, 1 + STEPS, **arguments))


def first_that_runs(part: str, name: str, flags: list[Arguments] = FLAGS) -> tuple[Arguments, PalmE]:
    for arguments in variants(part, name, flags):
        if name not in RANDOM and (model := built(arguments)) is not None:
            return arguments, model
    pytest.skip(f"{name} is random, or does not run")


@pytest.mark.parametrize(("part", "name"), SOME)
def test_promises_are_kept_under_every_keyword(part: str, name: str) -> None:
    _, model = first_that_runs(part, name)
    assert_promises(model)
    assert_step_that_is_compiled(model)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:decoder_kwargs")
def test_promises_are_kept_beyond_a_window_that_is_longer_than_the_texts_that_are_tried() -> None:
    model = small(attn_flash=False, decoder_kwargs={"cross_attn_max_attend_past": 20})
    ids, _ = texts()
    context = 3 * torch.randn(2, 40, 24)
    expected = torch.stack([alone(model, *sample) for sample in zip(ids, context, strict=True)])
    tokens, logits = decoded(model, list(ids), context, True)
    assert torch.equal(tokens, expected.argmax(dim=-1))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_promises_are_kept_under_pairs_of_keywords(seed: int) -> None:
    tried = 0
    for arguments in pairs(50, seed):
        model = built(arguments)
        if model is not None and not set(RANDOM) & set(arguments["decoder_kwargs"]):
            assert_promises(model)
            tried += 1
    assert tried >= 15


@pytest.mark.parametrize("name", WRONG)
def test_upstream_still_breaks_the_promises(name: str) -> None:
    part = "transformer" if name in upstream_keywords("transformer") else "decoder"
    _, model = first_that_runs(part, name)
    with (
        mock.patch("palme_xt.decoding.probe.is_right", return_value=True),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        assert_promises(model)


def warned_of(arguments: Arguments) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PalmEConfig(**arguments)
    return any("depend on the tokens after it" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(("part", "name"), SOME)
@torch.no_grad()
def test_exactly_the_keywords_that_see_later_tokens_are_warned_of(part: str, name: str) -> None:
    arguments, model = first_that_runs(part, name, NO_XPOS)
    ids, context = texts()
    context = torch.cat([context, context], dim=1)  # longer than the texts
    appended, shorter = (model.decoder.net(ids[:, :n], context=context)[:, :4] for n in (6, 5))
    sees = (appended - shorter).abs().max() > 1e-5 * appended.abs().max()
    assert bool(sees) == warned_of(arguments)


def test_the_warning_about_later_tokens() -> None:
    with pytest.warns(
        UserWarning, match=r"decoder_kwargs\['orthog_residual'\]=True lets the logits of a token depend on"
    ):
        PalmEConfig(decoder_kwargs={"orthog_residual": True})
    with pytest.warns(UserWarning, match="cross_attn_use_rel_proj_pos_bias"):
        PalmEConfig(decoder_kwargs={"attn_use_rel_proj_pos_bias": True})
    for reached in {"cross_attend": False}, {}:  # no warning where nothing is cross-attended to with it
        kwargs = {"attn_use_rel_proj_pos_bias": True, "cross_attn_use_rel_proj_pos_bias": False}
        PalmEConfig(**dict[str, Any](reached), decoder_kwargs=kwargs)
