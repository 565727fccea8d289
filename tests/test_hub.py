"""A model that was saved or pushed to the hub is read again, from a folder or a repository, with its other files."""

from __future__ import annotations

import copy
import json
import pickle
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from torch import nn

import palme_xt
from palme_xt import PalmEConfig
from palme_xt.hub import PalmE
from palme_xt.storage.files import UNFINISHED
from palme_xt.storage.folder import COMPANIONS, CONFIG, WEIGHTS, FolderError, load, read_config, save
from tests.models import SMALL, batch, logits
from tests.storage.folders import OTHER_FILES, TRAINING, hub, same
from tests.storage.test_card import metadata, rows

OVERRIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "tied": {"transformer_kwargs": {"tie_embedding": True}},
    "layers": {"decoder_kwargs": {"weight_tie_layers": True}},
    "others": {
        "vit_kwargs": {"channels": 1, "num_register_tokens": 2},
        "encoder_kwargs": {"use_rmsnorm": True},
        "decoder_kwargs": {"attn_kv_heads": 2, "ff_glu": True},
        "autoregressive_kwargs": {"pad_value": 3},
    },
    "text": {"cross_attend": False},
}


def refused(folder: Path | str, message: str, **how: Any) -> None:
    """Assert that loading raises this error, on one line."""
    with pytest.raises(FolderError) as error:
        PalmE.from_pretrained(folder, **how)
    assert re.fullmatch(message, str(error.value)), str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hub().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_a_saved_model_is_read_again(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = hub(**overrides)
    assert model.save_pretrained(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]

    loaded = PalmE.from_pretrained(tmp_path)
    assert type(loaded) is PalmE
    assert same(loaded, model)
    assert not same(loaded, hub(seed=1, **overrides))
    assert loaded.config == model.config == read_config(str(tmp_path))
    assert loaded.config != hub(**overrides | {"max_seq_len": 17}).config
    assert not any(module.training for module in loaded.modules())
    img, text = batch(model)
    assert torch.equal(logits(loaded, img, text), logits(model.eval(), img, text))

    for plain in load(tmp_path), load(str(tmp_path)):
        assert type(plain) is palme_xt.PalmE
        assert same(plain, model)
        assert not any(module.training for module in plain.modules())


def test_saving_over_another_model(folder: Path) -> None:
    (folder / "README.md").write_text("written by hand")
    (folder / "notes.txt").write_text("keep")
    other = hub(seed=1, decoder_dim=40)
    other.companions = OTHER_FILES
    other.save_pretrained(folder)
    assert same(PalmE.from_pretrained(folder), other)
    assert not same(PalmE.from_pretrained(folder), hub())
    assert (folder / "README.md").read_text() == "written by hand"
    assert (folder / "notes.txt").read_text() == "keep"
    assert (folder / "tokenizer.json").read_bytes() == OTHER_FILES["tokenizer.json"]
    assert not (folder / UNFINISHED).exists()


def test_a_full_disk_leaves_the_old_files(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = hub(seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # enough for config.json, too little for the weights
    try:
        with pytest.raises(FolderError, match=r"\S+model cannot be written: .*File too large"):
            other.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() != before[WEIGHTS]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = hub()
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match=r"\S+file cannot be written: File exists"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="config must be None: the weights are saved with the arguments that they"):
        model.save_pretrained(tmp_path / "none", config=model.config)
    model.companions = {"vocab.txt": b""}
    with pytest.raises(FolderError, match=r"companions\['vocab.txt'\] must be one of prepro"):
        model.save_pretrained(tmp_path / "none")
    model.companions = {}
    model.config = PalmEConfig(**SMALL | {"decoder_kwargs": {"ff_custom_activation": nn.GELU()}})
    with pytest.raises(TypeError, match=r"decoder_kwargs\['ff_custom_activation'\]=GELU.* has no JSON form"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_is_no_folder(folder: Path, no_network: None) -> None:
    refused(folder / CONFIG, r"\S+config.json is not a run folder: it is a file; `palme-xt train` makes one")
    message = r"\S+none is not a run folder: there is no such folder; `palme-xt train` makes one$"
    with pytest.raises(FolderError, match=message):
        load(folder / "none")
    for name in str(folder / "none"), "./none", "runs/a/b":
        refused(name, rf"{name} is neither a folder nor a repository on the hub that can be read: Repo id must.*")


def test_it_is_the_model_in_all_else(tmp_path: Path) -> None:
    model = PalmE(8, 4, 24, 2, 2, 32, decoder_dim=32, decoder_depth=2, encoder_kwargs={"attn_dim_head": 8})
    config = PalmEConfig(8, 4, 24, 2, 2, 32, decoder_dim=32, decoder_depth=2, encoder_kwargs={"attn_dim_head": 8})
    assert model.config == config != PalmEConfig()
    assert isinstance(model, palme_xt.PalmE)
    assert isinstance(model, ModelHubMixin)
    with pytest.raises(ValueError, match="image_size=9 must be divisible by patch_size=4"):
        PalmE(9, 4)
    for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert same(copied, model)
        assert copied.config == config
    adopted = PalmE.from_modules(model.encoder, model.decoder)
    assert isinstance(adopted, PalmE)
    adopted.save_pretrained(tmp_path)
    assert same(PalmE.from_pretrained(tmp_path), model)
    assert not same(PalmE.from_config(config), model)


def test_what_it_was_loaded_with_is_saved_again(tmp_path: Path) -> None:
    model = hub()
    save(model, tmp_path / "one", TRAINING, OTHER_FILES)
    loaded = PalmE.from_pretrained(str(tmp_path / "one"))
    assert loaded.companions == OTHER_FILES
    assert loaded.how_trained == TRAINING
    loaded.save_pretrained(tmp_path / "a" / "two")
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "a/two"))
    assert one == two
    assert set(one) == {CONFIG, WEIGHTS, *OTHER_FILES}
    assert json.loads(one[CONFIG]) == model.config.to_dict() | {"training": TRAINING}

    model.save_pretrained(tmp_path / "three")
    three = {path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()}
    assert three[WEIGHTS] == one[WEIGHTS]
    assert json.loads(three[CONFIG]) == model.config.to_dict()
    assert three["README.md"] != one["README.md"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a download cache of huggingface_hub that holds one revision of user/name."""
    repository = tmp_path / "cache" / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("a" * 40)
    save(hub(), repository / "snapshots" / ("a" * 40), TRAINING, OTHER_FILES)
    return tmp_path / "cache"


def test_a_repository_in_the_cache(cache: Path, no_network: None) -> None:
    loaded = PalmE.from_pretrained("user/name", revision="v1", cache_dir=cache, local_files_only=True)
    assert same(loaded, hub())
    assert not same(loaded, hub(seed=1))
    assert loaded.companions == OTHER_FILES
    assert loaded.how_trained == TRAINING
    message = "user/name is neither a folder nor a repository on the hub that can be read: Cannot find .*"
    refused("user/name", message, revision="v2", cache_dir=cache, local_files_only=True)
    (cache / "models--user--name" / "snapshots" / ("a" * 40) / WEIGHTS).unlink()
    message = "user/name on the hub is not a run folder: it has no model.safetensors; .*"
    refused("user/name", message, revision="v1", cache_dir=cache, local_files_only=True)


def test_a_download_asks_for_the_models_files_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    asked = []

    def snapshot_download(name: str, **how: Any) -> str:
        asked.append((name, how))
        return str(folder)

    monkeypatch.setattr("palme_xt.hub.snapshot_download", snapshot_download)
    how = {"revision": "v1", "token": "t", "cache_dir": "c", "force_download": True, "local_files_only": False}
    assert same(PalmE.from_pretrained("user/name", **how), hub())  # type: ignore[arg-type]
    assert asked == [("user/name", how | {"allow_patterns": [CONFIG, WEIGHTS, *COMPANIONS]})]
    PalmE.from_pretrained(folder)
    assert len(asked) == 1


def test_a_repository_of_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palme_xt.hub.snapshot_download", lambda *_, **__: str(tmp_path))
    (tmp_path / CONFIG).write_bytes(b"{}")
    message = "user/name on the hub is not a run folder: it has no model.safetensors; .*"
    refused("user/name", message + "weights in other files are not read, because reading a pickle can run code")


def test_a_repository_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("404 Client Error.\n\nRepository Not Found.\nCheck the name.")

    monkeypatch.setattr("palme_xt.hub.snapshot_download", fails)
    why = "404 Client Error. Repository Not Found. Check the name."
    refused("runs/x", f"runs/x is neither a folder nor a repository on the hub that can be read: {why}")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, bytes]]]:
    """Return what would be uploaded: each repository, and its files."""
    uploaded = []

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        files = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*")}
        uploaded.append((repo_id, files))
        return "the commit's URL"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploaded


def test_what_is_pushed(uploads: list[tuple[str, dict[str, bytes]]], tmp_path: Path) -> None:
    save(hub(), tmp_path / "run", TRAINING, OTHER_FILES)
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    model = PalmE.from_pretrained(tmp_path / "run")
    assert model.push_to_hub("name") == "the commit's URL"
    expected = {name: (tmp_path / "run" / name).read_bytes() for name in (CONFIG, WEIGHTS, *OTHER_FILES)}
    assert uploads == [("me/name", expected)]

    model.companions = {}
    url = model.save_pretrained(tmp_path / "saved", push_to_hub=True, model_card_kwargs={"metrics": {"loss": 0.5}})
    assert url == "the commit's URL"
    name, files = uploads[1]
    assert name == "me/saved"
    assert set(files) == {CONFIG, WEIGHTS, "README.md"}
    assert files["README.md"] == (tmp_path / "saved" / "README.md").read_bytes() != expected["README.md"]
    (result,) = metadata(ModelCard(files["README.md"].decode())).eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("digits", "loss", 0.5)


def test_a_card_is_made_anew_from_arguments(tmp_path: Path) -> None:
    save(hub(), tmp_path / "run", TRAINING, OTHER_FILES)
    model = PalmE.from_pretrained(tmp_path / "run")
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "README.md").read_bytes() == OTHER_FILES["README.md"]
    model.save_pretrained(tmp_path / "two", model_card_kwargs={"metrics": {"loss": 0.5}})
    card = (tmp_path / "two" / "README.md").read_text()
    assert card == str(model.generate_model_card({"loss": 0.5})) != str(model.generate_model_card())
    assert rows(ModelCard(card), "Metrics") == {"loss": "0.5"}
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == OTHER_FILES["tokenizer.json"]
    model.save_pretrained(tmp_path / "one", model_card_kwargs={"metrics": {"loss": 0.5}})
    assert (tmp_path / "one" / "README.md").read_bytes() == OTHER_FILES["README.md"]  # an existing card is kept
    assert model.companions == OTHER_FILES


@pytest.mark.parametrize(("repo_id", "named"), [("me/name", "me/name"), ("name", "NAME")])
def test_a_pushed_card_names_its_repository(
    repo_id: str, named: str, uploads: list[tuple[str, dict[str, bytes]]], tmp_path: Path
) -> None:
    model = hub()
    model.push_to_hub(repo_id)
    model.companions = OTHER_FILES
    model.push_to_hub(repo_id, model_card_kwargs={"metrics": {"loss": 0.5}})
    model.push_to_hub(repo_id)
    model.save_pretrained(tmp_path / "saved", repo_id=repo_id, push_to_hub=True, model_card_kwargs={})
    cards = [files["README.md"].decode() for _, files in uploads]
    for card in cards[0], cards[1], cards[3]:
        assert re.findall(r'PalmE\.from_pretrained\("(.*)"\)', card) == [named]
    assert ["| loss | 0.5 |" in card for card in cards] == [False, True, False, False]
    assert cards[2].encode() == OTHER_FILES["README.md"]


def test_the_program_in_the_card_runs(folder: Path) -> None:
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(program.replace("NAME", str(folder)), namespace)
    assert same(namespace["model"], hub())
    assert not same(namespace["model"], hub(seed=1))
