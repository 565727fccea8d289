"""The types that the package shows to a type checker of another project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import palme_xt

USER = """
import dataclasses
from collections.abc import Iterator
from typing import Any, assert_type

import torch
from torch import Tensor

import palme_xt
from palme_xt import PalmE, PalmEConfig, tokens
from palme_xt.parity import compare
from palme_xt.source import to_source
from palme_xt.storage.folder import load


class Mine(PalmE):
    pass


config = PalmEConfig(image_size=8, patch_size=4, decoder_kwargs={"ff_glu": True})
model = PalmE(8, 4, num_tokens=tokens.NUM_TOKENS, vit_kwargs={"channels": 1})
img, text = torch.rand(1, 3, 8, 8), tokens.encode(["a"])
assert_type(PalmE.from_config(config), PalmE)
assert_type(Mine.from_config(config), Mine)
assert_type(PalmE.from_modules(model.encoder, model.decoder), PalmE)
assert_type(PalmE(8, 4, encoder=torch.nn.Identity()), PalmE)
assert_type(PalmE.from_config(config, encoder=None), PalmE)
assert_type(PalmEConfig.from_dict(config.to_dict()), PalmEConfig)
assert_type(dataclasses.replace(model.config, num_tokens=9), PalmEConfig)
assert_type(load("folder"), PalmE)
assert_type(model.config.image_size, int)
assert_type(model.encode(img), Tensor)
assert_type(model(img, text), Tensor)
assert_type(model(None, text, context=model.encode(img), lens=torch.tensor([2])), Tensor)
assert_type(model.forward(img, text, return_outputs=False), Tensor)
assert_type(model(img, text, return_outputs=True), tuple[Tensor, tuple[Tensor, Any]])
assert_type(model.generate(img, [text[0]], 3, eos_token=tokens.EOS, filter_logits_fn="top_p"), Tensor)
assert_type(model.stream(img, text, 3, temperature=0.0), Iterator[Tensor])
assert_type(model.beam_search(img, text, seq_len=3, beams=2), tuple[Tensor, Tensor])
assert_type(to_source(config), str)
assert_type(bool(compare(model, model)), bool)


def either(outputs: bool) -> Any:
    return model(img, text, return_outputs=outputs)


palme_xt.Palm  # error: attr-defined
PalmE(image_sise=8)  # error: call-arg
PalmE("8")  # error: arg-type
PalmE(encoder=torch.nn.Identity().forward)  # error: arg-type
PalmE(8, 4, 32, 2, 2, 99, 16, 32, 2, 4, 4, False, True, True, True, True, True, {})  # error: call-arg
PalmEConfig(use_abs_pos_emb="yes")  # error: arg-type
config.image_size = 9  # error: misc
model(img)  # error: call-overload
model("x.png", text)  # error: call-overload
model.generate(img, text, 3, beam=2)  # error: call-arg
model.stream(img, text, 3, beams=2)  # error: call-arg
model.beam_search(img, text, "3")  # error: arg-type
"""


def test_the_marker_of_typed_packages_is_shipped() -> None:
    assert (files(palme_xt) / "py.typed").is_file()


@pytest.mark.slow
def test_mypy_checks_a_users_script(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    package = str(Path(palme_xt.__file__).parents[1])
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--show-error-codes", "--no-error-summary", "user.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": package},  # as an installed package: on MYPYPATH, py.typed would not be needed
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^user\.py:(\d+): error: .*\[(.*)\]$", checked.stdout, re.MULTILINE)
    lines = enumerate(USER.splitlines(), 1)
    assert found == [(str(n), line.partition("# error: ")[2]) for n, line in lines if "# error" in line], checked.stdout
