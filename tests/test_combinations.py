"""Combinations of overrides that upstream builds and then crashes with are rejected, and others are not."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import pytest
import torch

from palme_xt import PalmEConfig
from palme_xt.mapping import upstream_keywords
from tests.models import batch, small

CRASHING: list[tuple[dict[str, Any], str]] = [
    ({"transformer_kwargs": {"logits_dim": 9}}, "transformer_kwargs['logits_dim']=9 must be num_tokens"),
    (
        {"transformer_kwargs": {"tie_embedding": True, "emb_dim": 16}},
        "transformer_kwargs['tie_embedding']=True needs emb_dim=decoder_dim",
    ),
    (
        {"autoregressive_kwargs": {"add_attn_z_loss": True}},
        "autoregressive_kwargs['add_attn_z_loss']=True needs attn_flash=False",
    ),
    (
        {"decoder_kwargs": {"qkv_receive_diff_residuals": True}},
        "decoder_kwargs['qkv_receive_diff_residuals']=True needs num_residual_streams=2 or more",
    ),
    (
        {"encoder_kwargs": {"qkv_receive_diff_residuals": True}},
        "encoder_kwargs['qkv_receive_diff_residuals']=True needs num_residual_streams=2 or more",
    ),
]
RUNNING: list[dict[str, Any]] = [
    {"transformer_kwargs": {"logits_dim": 32}},
    {"transformer_kwargs": {"tie_embedding": True, "emb_dim": 32}},
    {"transformer_kwargs": {"emb_dim": 16}},
    {"autoregressive_kwargs": {"add_attn_z_loss": True}, "attn_flash": False},
    {"decoder_kwargs": {"qkv_receive_diff_residuals": True, "num_residual_streams": 2}},
    {"decoder_kwargs": {"qkv_receive_diff_residuals": True, "integrate_layers": True}},
    {"decoder_kwargs": {"qkv_receive_diff_residuals": True, "attn_aggregated_residuals": True}, "decoder_dim": 96},
]


@pytest.mark.parametrize(("arguments", "message"), CRASHING)
def test_combinations_that_crash_upstream_are_rejected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**arguments)
    with mock.patch.object(PalmEConfig, "_check_combinations"):
        model = small(**arguments)
    img, text = batch(model)
    with pytest.raises((RuntimeError, AssertionError, AttributeError, IndexError)):
        model(img, text.clamp(max=31)).backward()


@pytest.mark.parametrize("arguments", RUNNING, ids=str)
def test_combinations_that_run_upstream_are_accepted(arguments: dict[str, Any]) -> None:
    if not set(upstream_keywords("decoder")) >= set(arguments.get("decoder_kwargs", {})):
        return  # this upstream release does not have the override
    model = small(**arguments)
    assert torch.isfinite(model(*batch(model)))
