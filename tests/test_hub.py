"""A saved model is read again bit by bit, from a folder or from the hub; what is no model is refused in one line."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelCard, ModelHubMixin
from torch import nn

import palme_xt
from palme_xt import PalmEConfig
from palme_xt.captioner.training.run import Run
from palme_xt.hub import PalmE
from palme_xt.storage import folder as pretrained
from palme_xt.storage.card import model_card
from palme_xt.storage.folder import COMPANIONS, CONFIG, WEIGHTS, PretrainedError
from tests.models import SMALL, batch, logits, small

TRAINING = {"data": "digits", "steps": 3, "lr": 0.002}
OTHER_FILES = {
    "preprocessor_config.json": b'{"crop_size": 1}',
    "tokenizer.json": b"\x00\xff",
    "README.md": b"# mine\r\n",
}
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


def hub(seed: int = 0, **arguments: Any) -> PalmE:
    """`small`, of the hub's class."""
    source = small(seed, **arguments)
    model = PalmE.from_config(source.config)
    model.load_state_dict(source.state_dict())
    assert isinstance(model, PalmE)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers, those that are not saved too, are equal in names, dtypes and values."""
    tensors, others = (
        dict(model.state_dict()) | dict(model.named_buffers()) | dict(model.named_parameters())
        for model in (one, other)
    )
    return list(tensors) == list(others) and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


def refused(folder: Path | str, message: str, **how: Any) -> None:
    """One line, and the same from each way to load."""
    with pytest.raises(PretrainedError) as error:
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

    monkeypatch.setattr("palme_xt.hub.HfApi.list_repo_files", refuse)


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES.keys())
def test_a_saved_model_is_read_again(overrides: dict[str, Any], tmp_path: Path) -> None:
    model = hub(**overrides)
    assert model.save_pretrained(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", CONFIG, WEIGHTS]

    loaded = PalmE.from_pretrained(tmp_path)
    assert type(loaded) is PalmE
    assert same(loaded, model)
    assert not same(loaded, hub(seed=1, **overrides))
    assert loaded.config == model.config == pretrained.read_config(str(tmp_path))
    assert loaded.config != hub(**overrides | {"max_seq_len": 17}).config
    assert not any(module.training for module in loaded.modules())
    img, text = batch(model)
    assert torch.equal(logits(loaded, img, text), logits(model.eval(), img, text))

    for plain in Run(tmp_path).load(), pretrained.load(str(tmp_path)):
        assert type(plain) is palme_xt.PalmE
        assert same(plain, model)
        assert not any(module.training for module in plain.modules())


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
    pretrained.save(model, tmp_path / "one", TRAINING, OTHER_FILES)
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


def test_it_is_read_as_widely_as_other_files(folder: Path) -> None:
    assert (folder / WEIGHTS).stat().st_mode == (folder / CONFIG).stat().st_mode


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
    assert not list(folder.glob("*.new"))


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    model = hub()
    model.decoder.net.to_logits.weight = model.decoder.net.token_emb.emb.weight
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = PalmE.from_pretrained(tmp_path)
    assert same(loaded, model)
    assert not same(loaded, hub())


def test_weights_are_cast_to_the_models_dtype(tmp_path: Path) -> None:
    model = hub().bfloat16()
    model.save_pretrained(tmp_path)
    assert safetensors.torch.load_file(tmp_path / WEIGHTS)["encoder.pos_embedding"].dtype == torch.bfloat16
    loaded = PalmE.from_pretrained(tmp_path)
    assert loaded.encoder.pos_embedding.dtype == torch.float32
    assert same(copy.deepcopy(loaded).bfloat16(), model)
    assert not same(loaded, hub())


def test_a_full_disk_leaves_the_old_files(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = hub(seed=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # enough for config.json, too little for the weights
    try:
        with pytest.raises(PretrainedError, match=r"\S+model cannot be written: .*File too large"):
            other.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    other.save_pretrained(folder)
    assert (folder / WEIGHTS).read_bytes() != before[WEIGHTS]


def test_files_are_on_the_disk_before_they_take_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[int | str] = []

    def fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)

    def replace(path: Path, target: Path) -> None:
        events.append(target.name)
        os.replace(path, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    pretrained.save(hub(), tmp_path, TRAINING, OTHER_FILES)
    names = [*OTHER_FILES, CONFIG, WEIGHTS]
    files = [(tmp_path / name).stat().st_ino for name in names]
    assert events == [*files, *names, tmp_path.stat().st_ino]


def test_what_a_killed_save_has_left_is_removed(folder: Path) -> None:
    (folder / "save.new").mkdir()
    (folder / "save.new" / ".tmpweights").write_bytes(b"half")
    names = {path.name for path in folder.iterdir()}
    hub(seed=1).save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == names - {"save.new"}
    assert same(PalmE.from_pretrained(folder), hub(seed=1))
    assert not same(PalmE.from_pretrained(folder), hub())


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = hub()
    (tmp_path / "file").touch()
    with pytest.raises(PretrainedError, match=r"\S+file cannot be written: File exists"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="config must be None: the weights are saved with the arguments that they"):
        model.save_pretrained(tmp_path / "none", config=model.config)
    model.companions = {"vocab.txt": b""}
    with pytest.raises(PretrainedError, match=r"companions\['vocab.txt'\] is not read again: the names are prepro"):
        model.save_pretrained(tmp_path / "none")
    model.companions = {}
    model.config = PalmEConfig(**SMALL | {"decoder_kwargs": {"ff_custom_activation": nn.GELU()}})
    with pytest.raises(TypeError, match=r"decoder_kwargs\['ff_custom_activation'\]=GELU.* has no JSON form"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Damage that changes, or replaces, what is in `config.json`."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        result = change(values)
        (folder / CONFIG).write_text(json.dumps(values if result is None else result))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Damage that changes the tensors."""

    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)

    return damage


def content(name: str, data: bytes) -> Callable[[Path], Any]:
    """Damage that replaces a file."""
    return lambda folder: (folder / name).write_bytes(data)


def torch_saved(folder: Path) -> None:
    torch.save(hub().state_dict(), folder / WEIGHTS)
    assert zipfile.is_zipfile(folder / WEIGHTS)


ARGUMENTS = r"\S+config.json does not hold a model's arguments: "
OF_THIS_MODEL = r"\S+model.safetensors does not hold this model's weights: "
SAME = ": config.json and model.safetensors must be of the same model"
EMBEDDING = "decoder.net.token_emb.emb.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda folder: (folder / CONFIG).unlink(),
        r"\S+ is not a run folder: it has no config.json; `palme-xt train` makes one",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        r"\S+ is not a run folder: it has no model.safetensors; `palme-xt train` makes one",
    ),
    "no JSON": (content(CONFIG, b'{"image_size": 8,'), ARGUMENTS + "Expecting property name .*"),
    "no text": (content(CONFIG, b'{"\xff": 8}'), ARGUMENTS + "'utf-8' codec can't decode .*"),
    "deep JSON": (content(CONFIG, b"[" * 100_000), ARGUMENTS + "maximum recursion depth exceeded.*"),
    "a list": (edit(lambda values: [1]), ARGUMENTS + "it holds a list, must hold an object"),
    "training": (
        edit(lambda values: values.update(training=3)),
        ARGUMENTS + "'training' holds a int, must hold an object",
    ),
    "unknown": (
        edit(lambda values: values.update(imagesize=values.pop("image_size"))),
        ARGUMENTS + r"'imagesize' is not an argument of PalmEConfig: did you mean 'image_size'\?",
    ),
    "missing": (
        edit(lambda values: (values.pop("qk_norm"), values.pop("patch_size"), None)[-1]),
        ARGUMENTS + "patch_size, qk_norm missing; a default could build another model than the saved one",
    ),
    "value": (edit(lambda values: values.update(image_size=9)), ARGUMENTS + "image_size=9 must be divisible .*"),
    "type": (edit(lambda values: values.update(qk_norm=1)), ARGUMENTS + "qk_norm=1 must be True or False, not int"),
    "upstream": (
        edit(lambda values: values.update(vit_kwargs={"emb_dropout": 1.5})),
        ARGUMENTS + "x-transformers .* refuses .*",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 9),
        OF_THIS_MODEL + ".*incomplete metadata, file not fully covered",
    ),
    "empty": (content(WEIGHTS, b""), OF_THIS_MODEL + ".*header too small"),
    "zipped pickle": (torch_saved, OF_THIS_MODEL + "it is a pickle in a zip file, .* reading one can run code"),
    "pickle": (content(WEIGHTS, pickle.dumps({})), OF_THIS_MODEL + "it is a pickle, and reading one can run code"),
    "git-lfs": (
        content(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        OF_THIS_MODEL + "it is a pointer of git-lfs: `git lfs pull` fetches the file itself",
    ),
    "HTML": (content(WEIGHTS, b"<!doctype html><title>404</title>"), OF_THIS_MODEL + "it looks like a web page"),
    # whose length, 0x0280, begins as a pickle does
    "header": (content(WEIGHTS, b"\x80\x02" + bytes(6) + b"{"), OF_THIS_MODEL + ".*invalid header length"),
    "missing tensors": (
        weights(lambda tensors: [tensors.pop(name) for name in (EMBEDDING, "encoder.pos_embedding")]),
        OF_THIS_MODEL + r"2 of \d+ tensors are missing, encoder.pos_embedding first" + SAME,
    ),
    "foreign tensors": (
        weights(lambda tensors: tensors.update(a=torch.ones(1), b=torch.ones(1))),
        OF_THIS_MODEL + "2 are not of this model, a first" + SAME,
    ),
    "another": (
        lambda folder: safetensors.torch.save_file({"bias": torch.ones(2)}, folder / WEIGHTS),
        OF_THIS_MODEL
        + r"(\d+) of \1 tensors are missing, encoder\.\S+ first; 1 are not of this model, bias first"
        + SAME,
    ),
    "shape": (
        weights(lambda tensors: tensors.update({EMBEDDING: torch.ones(32, 31)})),
        OF_THIS_MODEL + rf"1 have another shape, {EMBEDDING} first: it has \(32, 31\), must have \(32, 32\)" + SAME,
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_folders(damage: Callable[[Path], Any], message: str, folder: Path) -> None:
    assert same(PalmE.from_pretrained(folder), hub())
    damage(folder)
    refused(folder, message)
    with pytest.raises(PretrainedError) as error:
        Run(folder).load()
    assert re.fullmatch(message, str(error.value))


def test_what_is_no_folder(folder: Path, no_network: None) -> None:
    start = r"\S+ is not a run folder: it has no config.json; `palme-xt train` makes one"
    refused(folder / CONFIG, start + r" \(this is a file\)")
    with pytest.raises(PretrainedError, match=start + r" \(there is no such folder\)$"):
        pretrained.load(folder / "none")
    for name in str(folder / "none"), "./none", "runs/a/b":
        refused(name, rf"{name} is neither a folder here nor a repository of the hub that can be read: Repo id must .*")


def test_refused_weights_leave_the_model_as_it_was(folder: Path) -> None:
    good = (folder / WEIGHTS).read_bytes()
    DAMAGE["shape"][0](folder)
    model = hub(seed=1)
    with pytest.raises(PretrainedError, match="does not hold this model's weights"):
        pretrained.load_weights(model, folder)
    assert same(model, hub(seed=1))
    (folder / WEIGHTS).write_bytes(good)
    pretrained.load_weights(model, folder)
    assert same(model, hub())


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth", "b.ckpt", "weights.pkl", WEIGHTS])
def test_a_pickle_is_never_read(name: str, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    malicious = pickle.dumps(Malicious(trace))
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(malicious)
    if name == WEIGHTS:
        refused(folder, OF_THIS_MODEL + "it is a pickle, and reading one can run code")
    else:
        refused(folder, rf"\S+ has its weights in {name}, a pickle, and reading one can run code: only model.safe.*")
    assert not trace.exists()
    pickle.loads(malicious)
    assert trace.exists()


def test_a_pickle_beside_the_weights_does_not_matter(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps(0))
    assert same(PalmE.from_pretrained(folder), hub())
    assert not same(PalmE.from_pretrained(folder), hub(seed=1))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A download cache of huggingface_hub that holds one revision of user/name."""
    repository = tmp_path / "cache" / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("a" * 40)
    pretrained.save(hub(), repository / "snapshots" / ("a" * 40), TRAINING, OTHER_FILES)
    return tmp_path / "cache"


def test_a_repository_in_the_cache(cache: Path, no_network: None) -> None:
    loaded = PalmE.from_pretrained("user/name", revision="v1", cache_dir=cache, local_files_only=True)
    assert same(loaded, hub())
    assert not same(loaded, hub(seed=1))
    assert loaded.companions == OTHER_FILES
    assert loaded.how_trained == TRAINING
    message = "user/name is neither a folder here nor a repository of the hub that can be read: Cannot find .*"
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
    content(CONFIG, b"{}")(tmp_path)
    names = [CONFIG, "pytorch_model.bin", "onnx/other.bin"]
    monkeypatch.setattr("palme_xt.hub.HfApi.list_repo_files", lambda *_, **__: names)
    refused("user/name", "user/name on the hub has its weights in pytorch_model.bin, a pickle, .*")
    names.remove("pytorch_model.bin")
    refused("user/name", "user/name on the hub is not a run folder: it has no model.safetensors; .*")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("down")

    monkeypatch.setattr("palme_xt.hub.HfApi.list_repo_files", fails)
    refused("user/name", "user/name on the hub is not a run folder: it has no model.safetensors; .*")


def test_a_repository_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("404 Client Error.\n\nRepository Not Found.\nCheck the name.")

    monkeypatch.setattr("palme_xt.hub.snapshot_download", fails)
    why = "404 Client Error. Repository Not Found. Check the name."
    refused("runs/x", f"runs/x is neither a folder here nor a repository of the hub that can be read: {why}")


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, bytes]]]:
    """What would be uploaded: the repository, and its files."""
    uploaded = []

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        files = {str(path.relative_to(folder_path)): path.read_bytes() for path in folder_path.rglob("*")}
        uploaded.append((repo_id, files))
        return "the commit's URL"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return uploaded


def test_what_is_pushed(uploads: list[tuple[str, dict[str, bytes]]], tmp_path: Path) -> None:
    pretrained.save(hub(), tmp_path / "run", TRAINING, OTHER_FILES)
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
    pretrained.save(hub(), tmp_path / "run", TRAINING, OTHER_FILES)
    model = PalmE.from_pretrained(tmp_path / "run")
    model.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "README.md").read_bytes() == OTHER_FILES["README.md"]
    model.save_pretrained(tmp_path / "two", model_card_kwargs={"metrics": {"loss": 0.5}})
    card = (tmp_path / "two" / "README.md").read_text()
    assert card == str(model.generate_model_card({"loss": 0.5})) != str(model.generate_model_card())
    assert rows(ModelCard(card), "Metrics") == {"loss": "0.5"}
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == OTHER_FILES["tokenizer.json"]
    model.save_pretrained(tmp_path / "one", model_card_kwargs={"metrics": {"loss": 0.5}})
    assert (tmp_path / "one" / "README.md").read_bytes() == OTHER_FILES["README.md"]  # one that is there stays
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
        assert re.findall(r'from_pretrained\("(.*)"\)', card) == [named]
    assert ["| loss | 0.5 |" in card for card in cards] == [False, True, False, False]
    assert cards[2].encode() == OTHER_FILES["README.md"]


def metadata(card: ModelCard) -> Any:
    """What its YAML says; the library's types do not know its fields."""
    return card.data


def rows(card: ModelCard, title: str) -> dict[str, str]:
    """The rows of the table below a title."""
    section = card.text.split(f"## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (.+) \| (.*) \|$", section, re.MULTILINE)[1:])


def test_a_card_of_all_that_is_known() -> None:
    config = PalmEConfig(**SMALL)
    metrics = {"step": 3, "held_out_exact_match": 0.972, "held_out_loss": 0.03, "perplexity": float("inf")}
    card = ModelCard(model_card(config, TRAINING, metrics, parameters=1234567))
    assert metadata(card).library_name == "palme_xt"
    assert metadata(card).pipeline_tag == "image-to-text"
    assert "image-captioning" in metadata(card).tags
    results = {result.metric_type: result.metric_value for result in metadata(card).eval_results}
    assert results == {"held_out_exact_match": 0.972, "held_out_loss": 0.03}
    assert {(result.dataset_type, result.dataset_name) for result in metadata(card).eval_results} == {
        ("custom", "digits")
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert rows(card, "Arguments") == {name: str(value) for name, value in config.to_dict().items()}
    assert rows(card, "Training") == {name: str(value) for name, value in TRAINING.items()}
    assert rows(card, "Metrics") == {name: str(value) for name, value in metrics.items()}
    assert "1,234,567 parameters" in card.text
    assert "palme-xt caption FOLDER IMAGE" in card.text
    assert "not known" not in card.text


def test_a_card_says_what_is_not_known() -> None:
    card = ModelCard(model_card(PalmEConfig(**SMALL)))
    assert metadata(card).eval_results is None
    assert "How it was trained is not known." in card.text
    assert "It comes without an evaluation." in card.text
    assert "parameters" not in card.text
    assert metadata(ModelCard(model_card(PalmEConfig(**SMALL), metrics={"loss": 0.5}))).eval_results is None


def test_a_card_of_a_model_that_sees_nothing() -> None:
    card = ModelCard(model_card(PalmEConfig(**SMALL | {"cross_attend": False}), TRAINING, {"loss": 0.5}))
    assert metadata(card).pipeline_tag == metadata(card).eval_results[0].task_type == "text-generation"
    assert "image-captioning" not in metadata(card).tags
    assert "palme-xt caption" not in card.text


@pytest.mark.parametrize(
    ("data", "kind", "shown"),
    [
        ("hf:user/pictures-1.0", "user/pictures-1.0", "hf:user/pictures-1.0"),
        ("hf:user/pictures-1.0:small set/2", "user/pictures-1.0", "hf:user/pictures-1.0:small set/2"),
        ("hf:beans", "beans", "hf:beans"),
        ("hf:a/b/c", "custom", "hf:a/b/c"),
        ("hf:", "custom", "hf:"),
        ("user/pictures", "custom", "user/pictures"),
        ("pictures", "custom", "pictures"),
        ("a|b/*.tar", "custom", r"a\|b/\*.tar"),
        ("{x}\n---\n# <b>", "custom", r"{x} --- # \<b>"),
        ("a: [1, &x", "custom", r"a: \[1, &x"),
    ],
)
def test_a_card_of_any_data(data: str, kind: str, shown: str) -> None:
    card = ModelCard(model_card(PalmEConfig(**SMALL), {"data": data}, {"loss": 0.5}))
    (result,) = metadata(card).eval_results
    assert (result.dataset_type, result.dataset_name) == (kind, " ".join(data.split()))
    assert rows(card, "Training") == {"data": shown}


def test_the_program_in_the_card_runs(folder: Path) -> None:
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(program.replace("NAME", str(folder)), namespace)
    assert same(namespace["model"], hub())
    assert not same(namespace["model"], hub(seed=1))
