"""A model folder is written atomically and read bit by bit; a damaged or foreign one gives a one-line error."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from palme_xt.hub import PalmE
from palme_xt.storage.files import UNFINISHED
from palme_xt.storage.folder import CONFIG, WEIGHTS, FolderError, load, load_weights, save
from tests.models import small
from tests.storage.folders import OTHER_FILES, TRAINING, same


def refused(folder: Path, message: str) -> None:
    """Assert that each way to load raises this error, on one line."""
    for read in load, PalmE.from_pretrained:
        with pytest.raises(FolderError) as error:
            read(folder)
        assert re.fullmatch(message, str(error.value)), str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(small(), tmp_path / "model")
    return tmp_path / "model"


def test_it_is_read_as_widely_as_other_files(folder: Path) -> None:
    (folder / "other").touch()
    for name in WEIGHTS, CONFIG:
        assert (folder / name).stat().st_mode == (folder / "other").stat().st_mode


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    model = small()
    model.decoder.net.to_logits.weight = model.decoder.net.token_emb.emb.weight
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save(model.state_dict())
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert same(loaded, model)
    assert not same(loaded, small())


def test_a_folder_of_an_earlier_version_still_loads(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / CONFIG).read_text())
    assert [values.pop(name) for name in ("bos_token", "eos_token", "external_encoder")] == [None] * 3
    (folder / CONFIG).write_text(json.dumps(values))
    assert load(folder).config == small().config
    save(small(bos_token=1, eos_token=[2, 3]), tmp_path / "other")
    assert load(tmp_path / "other").config == small(bos_token=1, eos_token=[2, 3]).config != small().config


def test_weights_are_cast_to_the_models_dtype(tmp_path: Path) -> None:
    model = small().bfloat16()
    save(model, tmp_path)
    assert safetensors.torch.load_file(tmp_path / WEIGHTS)["encoder.pos_embedding"].dtype == torch.bfloat16
    loaded = load(tmp_path)
    assert loaded.encoder.pos_embedding.dtype == torch.float32
    assert same(copy.deepcopy(loaded).bfloat16(), model)
    assert not same(loaded, small())


def test_files_are_on_the_disk_before_they_take_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[int | str] = []

    def fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)

    def replace(path: Path, target: Path) -> None:
        events.append(target.name)
        os.replace(path, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(small(), tmp_path, TRAINING, OTHER_FILES)
    names = [*OTHER_FILES, CONFIG, WEIGHTS]
    files = [(tmp_path / name).stat().st_ino for name in names]
    assert events == [*files, *names, tmp_path.stat().st_ino]


def test_what_a_killed_save_has_left_is_removed(folder: Path) -> None:
    (folder / UNFINISHED).mkdir()
    (folder / UNFINISHED / ".tmpweights").write_bytes(b"half")
    names = {path.name for path in folder.iterdir()}
    save(small(seed=1), folder)
    assert {path.name for path in folder.iterdir()} == names - {UNFINISHED}
    assert same(load(folder), small(seed=1))
    assert not same(load(folder), small())


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Return a function that changes or replaces the content of `config.json`."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        result = change(values)
        (folder / CONFIG).write_text(json.dumps(values if result is None else result))

    return damage


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Return a function that changes the tensors."""

    def damage(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)

    return damage


def content(name: str, data: bytes) -> Callable[[Path], Any]:
    """Return a function that replaces a file."""
    return lambda folder: (folder / name).write_bytes(data)


def torch_saved(folder: Path) -> None:
    torch.save(small().state_dict(), folder / WEIGHTS)
    assert zipfile.is_zipfile(folder / WEIGHTS)


ARGUMENTS = r"\S+config.json does not hold a model's arguments: "
OF_THIS_MODEL = r"\S+model.safetensors does not hold this model's weights: "
UNREADABLE = (
    r"\S+model.safetensors holds no safetensors weights that can be read: {}; download or save it again; other "
    "formats are not read, because reading a pickle can run code"
)
NO_WEIGHTS = (
    r"\S+ is not a run folder: it has no model.safetensors; `palme-xt train` makes one; weights in other files are not "
    "read, because reading a pickle can run code"
)
SAME = "; config.json and model.safetensors must belong to the same model"
EMBEDDING = "decoder.net.token_emb.emb.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (
        lambda folder: (folder / CONFIG).unlink(),
        r"\S+ is not a run folder: it has no config.json; `palme-xt train` makes one",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        NO_WEIGHTS,
    ),
    "no JSON": (content(CONFIG, b'{"image_size": 8,'), ARGUMENTS + "Expecting property name .*"),
    "no text": (content(CONFIG, b'{"\xff": 8}'), ARGUMENTS + "'utf-8' codec can't decode .*"),
    "deep JSON": (content(CONFIG, b"[" * 100_000), ARGUMENTS + "maximum recursion depth exceeded.*"),
    "a list": (
        edit(lambda values: [1]),
        ARGUMENTS + r"\[1\] must be an object, and so must .*",
    ),
    "training": (
        edit(lambda values: values.update(training=3)),
        ARGUMENTS + "{.* must be an object, and so must its 'training', if it has one",
    ),
    "unknown": (
        edit(lambda values: values.update(imagesize=values.pop("image_size"))),
        ARGUMENTS + r"'imagesize' is not an argument of PalmEConfig: did you mean 'image_size'\?",
    ),
    "missing": (
        edit(lambda values: (values.pop("qk_norm"), values.pop("patch_size"), None)[-1]),
        ARGUMENTS + "patch_size, qk_norm missing; defaults could build a different model than the saved one",
    ),
    "value": (edit(lambda values: values.update(image_size=9)), ARGUMENTS + "image_size=9 must be divisible .*"),
    "type": (edit(lambda values: values.update(qk_norm=1)), ARGUMENTS + "qk_norm=1 must be True or False, not int"),
    "upstream": (
        edit(lambda values: values.update(vit_kwargs={"emb_dropout": 1.5})),
        ARGUMENTS + "x-transformers .* rejects .*",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 9),
        UNREADABLE.format(".*incomplete metadata, file not fully covered"),
    ),
    "empty": (content(WEIGHTS, b""), UNREADABLE.format(".*header too small")),
    "zipped pickle": (torch_saved, UNREADABLE.format(".*header.*")),
    "pickle": (content(WEIGHTS, pickle.dumps({})), UNREADABLE.format(".*header.*")),
    "git-lfs": (
        content(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        UNREADABLE.format(".*header.*"),
    ),
    "HTML": (content(WEIGHTS, b"<!doctype html><title>404</title>"), UNREADABLE.format(".*header.*")),
    # The length of the header, 0x0280, begins like a pickle.
    "header": (content(WEIGHTS, b"\x80\x02" + bytes(6) + b"{"), UNREADABLE.format(".*invalid header length")),
    "missing tensors": (
        weights(lambda tensors: [tensors.pop(name) for name in (EMBEDDING, "encoder.pos_embedding")]),
        OF_THIS_MODEL
        + r"2 of \d+ tensors differ, encoder.pos_embedding first: it is missing in the file, \(.*\) in the model"
        + SAME,
    ),
    "foreign tensors": (
        weights(lambda tensors: tensors.update(a=torch.ones(1), b=torch.ones(1))),
        OF_THIS_MODEL + r"2 of \d+ tensors differ, a first: it is \(1,\) in the file, missing in the model" + SAME,
    ),
    "another": (
        lambda folder: safetensors.torch.save_file({"bias": torch.ones(2)}, folder / WEIGHTS),
        OF_THIS_MODEL + r"(\d+) of \1 tensors differ, encoder\.\S+ first: it is missing in the file, .*" + SAME,
    ),
    "shape": (
        weights(lambda tensors: tensors.update({EMBEDDING: torch.ones(32, 31)})),
        OF_THIS_MODEL
        + rf"1 of \d+ tensors differ, {EMBEDDING} first: it is \(32, 31\) in the file, \(32, 32\) in the model"
        + SAME,
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_folders(damage: Callable[[Path], Any], message: str, folder: Path) -> None:
    assert same(load(folder), small())
    damage(folder)
    refused(folder, message)


def test_refused_weights_leave_the_model_as_it_was(folder: Path) -> None:
    good = (folder / WEIGHTS).read_bytes()
    DAMAGE["shape"][0](folder)
    model = small(seed=1)
    with pytest.raises(FolderError, match="does not hold this model's weights"):
        load_weights(model, folder)
    assert same(model, small(seed=1))
    (folder / WEIGHTS).write_bytes(good)
    load_weights(model, folder)
    assert same(model, small())


class Malicious:
    """An object that creates a file when it is unpickled."""

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
        refused(folder, UNREADABLE.format(".*header.*"))
    else:
        refused(folder, NO_WEIGHTS)
    assert not trace.exists()
    pickle.loads(malicious)
    assert trace.exists()


@pytest.mark.parametrize(("damage", "expected"), [(None, 0), (Path.unlink, 1)], ids=["sound", "missing"])
def test_a_folder_is_listed_at_most_once(
    damage: Callable[[Path], Any] | None, expected: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage is not None:
        damage(folder / WEIGHTS)
    listings = []

    def listed(listing: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def list_(path: Any) -> Any:
            listings.append(path)
            return listing(path)

        return list_

    for name in "listdir", "scandir":
        monkeypatch.setattr(os, name, listed(getattr(os, name)))
    with contextlib.suppress(FolderError):
        load(folder)
    assert len(listings) == expected


def test_a_pickle_beside_the_weights_does_not_matter(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(pickle.dumps(0))
    assert same(load(folder), small())
    assert not same(load(folder), small(seed=1))
