"""The printed program builds the same two modules, and looks as if a person wrote it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from palme_xt import PalmE, PalmEConfig
from palme_xt.captioner.training.run import Run
from palme_xt.cli import main
from palme_xt.parity import exactly
from palme_xt.parity.comparison import compare
from palme_xt.source import to_source
from palme_xt.storage.folder import WEIGHTS, as_safetensors
from palme_xt.strategies import configs
from tests.models import batch, small


def execute(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace


def ruff(source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True)


@given(configs())
def test_the_program_builds_the_same_model(config: PalmEConfig) -> None:
    program = execute(to_source(config))
    torch.manual_seed(0)
    assert compare(PalmE.from_config(config), (program["encoder"], program["decoder"]))


@settings(max_examples=15)
@given(configs())
def test_the_program_is_formatted_and_clean(config: PalmEConfig) -> None:
    for weights in None, "runs/digits/model.safetensors":
        source = to_source(config, weights)
        formatted = ruff(source, "format")
        assert formatted.stdout == source, formatted.stderr
        checked = ruff(source, "check")
        assert checked.returncode == 0, checked.stdout


def test_no_default_of_upstream_is_printed() -> None:
    source = to_source(PalmEConfig())
    assert "attn_layers=Encoder(dim=512, depth=6)," in source
    for absent in "heads=8", "patch_size=32,\n    channels", "cross_attn_dim_context", "pad_value", "palme_xt import":
        assert absent not in source
    for present in "alibi_num_heads=4", "attn_qk_norm=True", "use_abs_pos_emb=False", "class Decoder(":
        assert present in source
    text_only = to_source(PalmEConfig(cross_attend=False, alibi_pos_bias=False, encoder_dim=64))
    for absent in "alibi", "cross_att", "def forward", "class Decoder(", "import torch\n":
        assert absent not in text_only


def test_a_default_that_overrides_what_is_inherited_is_printed() -> None:
    source = to_source(PalmEConfig(decoder_kwargs={"cross_attn_qk_norm": False}))
    assert "cross_attn_qk_norm=False" in source


def test_long_values_are_wrapped() -> None:
    layers = ("a", "c", "f") * 9
    config = PalmEConfig(decoder_kwargs={"custom_layers": layers, "rel_pos_kwargs": {"slopes": (0.5,) * 4}})
    assert ruff(to_source(config), "format").stdout == to_source(config)


def test_the_program_of_a_run_has_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    run = Run(tmp_path / "run")
    run.create(model.config, {}, {})
    run.write({WEIGHTS: as_safetensors(model.state_dict())})
    assert main(["source", str(run.folder)]) == 0
    program = execute(capsys.readouterr().out)
    img, text = batch(model)
    loss: Tensor = program["forward"](img, text)
    with exactly():
        assert torch.equal(loss, model(img, text))


def test_the_program_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["source", "--encoder_dim=64", "--decoder_kwargs.ff_glu=true"]) == 0
    assert capsys.readouterr().out == to_source(PalmEConfig(encoder_dim=64, decoder_kwargs={"ff_glu": True}))


def test_what_cannot_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        TypeError, match="decoder_kwargs\\['attn_custom_attn_fn'\\]=<built-in function max> has no JSON"
    ):
        to_source(PalmEConfig(decoder_kwargs={"attn_custom_attn_fn": max}))
    assert main(["source", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["source", str(tmp_path), "--encoder_dim=64"]) == 2
    assert "allows no other options, found --encoder_dim: leave out" in capsys.readouterr().err
