"""The drift check, and this project's goldens: x-transformers 2.31.10 against the installed release."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import palme_xt.upstream.versions
from benchmarks.hand_wired import HandWired
from palme_xt.cli import main
from palme_xt.parity import check, record
from palme_xt.parity.drift import PARITY, check_folder, environment, fingerprint, record_folder
from palme_xt.storage.folder import FolderError, load, save
from palme_xt.upstream.attend import Attend
from tests.models import batch, small
from tests.parity.goldens.make import FOLDER, GOLDENS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a model folder with a recorded reference."""
    save(small(), tmp_path / "run")
    record_folder(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    assert check_folder(FOLDER / name).difference is None


def test_goldens_are_sensitive(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "default_flags", tmp_path / "run")
    model = load(folder)
    with torch.no_grad():
        model.decoder.net.attn_layers.layers[3][1].to_k.weight[0, 0] += 0.01
    with mock.patch("palme_xt.parity.drift.load", return_value=model):
        difference = check_folder(folder).difference
    assert re.match(r"decoder\.net\.attn_layers\.layers\.3\.1\.to_k differs by up to", difference or "")


def test_the_same_release_computes_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "check", str(folder)]) == 0
    *versions, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "the same within 0.0001"
    assert versions == [f"{name}: {value}" for name, value in environment(load(folder)).items()]
    assert [line.split(":")[0] for line in versions] == [
        "x-transformers",
        "torch",
        "palme-xt",
        "Python",
        "device",
        "threads",
        "dtype",
    ]
    assert main(["parity", "check", str(folder), "--tolerance=0"]) == 0  # bitwise, on the same machine


def test_a_release_that_scales_twice_is_caught_at_its_first_layer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in x-transformers 2.17.1 to 2.25.4: also multiply queries and keys by the scale of qk-norm.
    original = Attend.forward

    def scaled_twice(self: Attend, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, q * 10 if self.causal else q, k, *args, **kwargs)

    with mock.patch.object(Attend, "forward", scaled_twice):
        assert main(["parity", "check", str(folder)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"differs: decoder\.net\.attn_layers\.layers\.0\.1\.attend differs by up to [\d.]+ \(values up", last
    )


def test_a_release_that_crashes_is_caught(folder: Path) -> None:
    with mock.patch.object(Attend, "forward", side_effect=RuntimeError("shapes\nmore")):
        assert check_folder(folder).difference == "the model crashes: RuntimeError: shapes"
    with mock.patch.object(Attend, "forward", side_effect=AssertionError):
        assert check_folder(folder).difference == "the model crashes: AssertionError"


def test_changed_weights_are_not_taken_for_drift(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.encoder.pos_embedding += 1
    save(model, folder)
    with pytest.raises(
        FolderError, match=r"the parameters of the PalmE are not those recorded in \S+parity\.safetensors"
    ):
        check_folder(folder)


def test_nan_is_not_recorded(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.encoder.pos_embedding.fill_(torch.nan)
    save(model, folder)
    with pytest.raises(FolderError, match=r"computes nan or inf from encoder\.\S+ on"):
        record_folder(folder)


def test_the_goldens_say_under_which_torch_they_were_made() -> None:
    changes = check_folder(FOLDER / "default_flags").changes
    assert changes.keys() <= {"torch", "palme-xt", "x-transformers"}
    assert changes["torch"] == ("2.13.0+cpu", torch.__version__.partition("+")[0])


class Scaled(nn.Module):
    """A module that has nothing to do with x-transformers, and can drift."""

    drift: Any = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, Any]:
        return {"y": self.norm(self.linear(x) * scale) + self.drift, "rows": len(x)}


def scaled() -> tuple[Scaled, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return Scaled(), {"x": torch.randn(3, 4), "scale": torch.full((), 3.0)}


def test_any_module_can_be_recorded(tmp_path: Path) -> None:
    module, inputs = scaled()
    record(module.train(), inputs, tmp_path / "new" / "scaled.safetensors")
    verdict = check(module, tmp_path / "new" / "scaled.safetensors", tolerance=0)
    assert (verdict.difference, verdict.changes, module.training) == (None, {}, True)
    module.drift = 0.01
    difference = check(module, tmp_path / "new" / "scaled.safetensors").difference
    assert re.match(r"the output\['y'\] differs by up to 0\.01 \(values up to", difference or "")
    module.norm = nn.LayerNorm(6, eps=0.1)
    assert (check(module, tmp_path / "new" / "scaled.safetensors").difference or "").startswith("norm differs by up to")
    module.register_forward_hook(lambda module, args, output: {"rows": output["rows"]})
    assert check(module, tmp_path / "new" / "scaled.safetensors").difference == "the output['y'] is missing"
    with pytest.raises(
        FolderError, match=r"the parameters of the Scaled are not those recorded in \S+: load them from"
    ):
        check(Scaled(), tmp_path / "new" / "scaled.safetensors")


def test_positional_inputs_and_where_the_cache_crashes(tmp_path: Path) -> None:
    path = tmp_path / "hand_wired.safetensors"
    hand_wired = HandWired(small().config)
    record(hand_wired, batch(small()), path)
    assert check(hand_wired, path, tolerance=0).difference is None
    record(small(), batch(small()), path)
    with mock.patch.object(Attend, "forward", side_effect=RuntimeError("shapes")):
        assert check(small(), path).difference == "the model crashes: RuntimeError: shapes"


def test_another_environment_is_named_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = scaled()
    record(module, inputs, tmp_path / "scaled.safetensors")
    now = environment(module) | {"device": "an abacus", "threads": "99"}
    monkeypatch.setattr("palme_xt.parity.drift.environment", lambda module: now)
    verdict = check(module, tmp_path / "scaled.safetensors")
    assert verdict.difference is None
    assert verdict.changes == {name: (environment(module)[name], now[name]) for name in ("device", "threads")}


@pytest.mark.parametrize("inputs", [("text",), {"x": 1.0}, [[torch.ones(1)]]], ids=str)
def test_inputs_other_than_tensors_are_rejected(inputs: Any, tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"inputs holds a (str|float|list), must be a tensor, a tuple of tensors, or a dict"
    ):
        record(scaled()[0], inputs, tmp_path / "scaled.safetensors")


def test_the_command_takes_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("from tests.parity.test_drift import scaled\ncount = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["parity", "record", "mine:scaled", "scaled.safetensors"]) == 0
    assert capsys.readouterr().out == "scaled.safetensors written\n"
    assert main(["parity", "check", "mine:scaled", "scaled.safetensors"]) == 0
    assert capsys.readouterr().out.endswith("the same within 0.0001\n")
    now = environment(scaled()[0]) | {"threads": "99"}
    with mock.patch.object(Scaled, "drift", 0.1), mock.patch("palme_xt.parity.drift.environment", return_value=now):
        assert main(["parity", "check", "mine:scaled", "scaled.safetensors"]) == 1
    out = capsys.readouterr().out
    assert f"threads: recorded with {torch.get_num_threads()}, now 99\n" in out
    assert "differs: the output['y'] differs by up to" in out
    for target, message in {
        "mine:other": "mine:other must be PACKAGE.MODULE:FUNCTION, which can be imported: ",
        "none:scaled": "none:scaled must be PACKAGE.MODULE:FUNCTION, which can be imported: No module named 'none'",
        "mine:count": "mine:count gives a int, must be a function that returns a tuple of a module and its inputs",
        "builtins:dict": "builtins:dict gives a dict, must be a function that returns a tuple of a module and its",
    }.items():
        assert main(["parity", "record", target, "scaled.safetensors"]) == 2
        assert message in capsys.readouterr().err
    assert main(["parity", "record", "mine:scaled"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_record_says_what_it_wrote_and_writes_little(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / PARITY).unlink()
    assert main(["parity", "record", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / PARITY} written\n"
    assert (folder / PARITY).stat().st_size < 100_000


def test_a_fingerprint_shows_every_element() -> None:
    output = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    expected = fingerprint(output)
    for place in range(output.numel()):
        changed = output.clone()
        changed.view(-1)[place] += 1e-3
        assert not torch.allclose(fingerprint(changed), expected, rtol=0, atol=1e-6)
    swapped = output.clone()
    swapped[0, 0], swapped[0, 1] = output[0, 1], output[0, 0]
    assert not torch.allclose(fingerprint(swapped), expected)


def test_bad_requests(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "check", str(folder), "--tolerance=-1"]) == 2
    assert "tolerance=-1.0 must be 0 or more" in capsys.readouterr().err
    (folder / PARITY).write_bytes(b"rubbish")
    assert main(["parity", "check", str(folder)]) == 2
    assert "is not a reference that `palme-xt parity record` wrote: " in capsys.readouterr().err
    (folder / PARITY).unlink()
    assert main(["parity", "check", str(folder)]) == 2
    assert "write one with `palme-xt parity record" in capsys.readouterr().err
    assert main(["parity", "record", str(tmp_path / "none")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize("installed", ["1.44.8", "2.25.5", "3.0.0"])
def test_an_unsupported_release_causes_a_warning(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palme_xt.upstream.versions, "version", lambda name: installed)
    message = rf"x-transformers {installed} is installed, but palme_xt supports 2\.26 to 2\.x: .*pip install"
    with pytest.warns(UserWarning, match=message):
        palme_xt.upstream.versions.warn_if_unsupported()


@pytest.mark.parametrize("installed", ["2.26.0", "2.31.10", "2.100.1rc1"])
def test_a_supported_release_causes_no_warning(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(palme_xt.upstream.versions, "version", lambda name: installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        palme_xt.upstream.versions.warn_if_unsupported()


def test_importing_warns_once() -> None:
    code = (
        "import importlib.metadata as metadata; known = metadata.version; "
        "metadata.version = lambda name: '2.20.1' if name == 'x-transformers' else known(name); "
        "import palme_xt; import palme_xt.config, palme_xt.parity.comparison"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.count("x-transformers 2.20.1 is installed, but palme_xt supports 2.26 to 2.x") == 1


def test_the_range_is_that_of_the_package() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    low, high = palme_xt.upstream.versions.MINIMUM, palme_xt.upstream.versions.BELOW
    assert f'"x-transformers>={".".join(map(str, low))},<{".".join(map(str, high))}"' in pyproject
