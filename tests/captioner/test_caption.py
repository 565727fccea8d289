"""Captions from a run folder in Python, for every kind of image that Pillow and numpy know."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from palme_xt import tokens
from palme_xt.captioner import Captioner
from palme_xt.captioner.images import ImageError, Preprocessing
from palme_xt.cli import main
from palme_xt.storage.card import model_card
from palme_xt.storage.folder import FolderError
from tests.captioner.captioned import TINY, write_folder
from tests.models import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images in `data`, and a run that was trained on them in `run`."""
    folder = tmp_path_factory.mktemp("caption")
    data, run = write_folder(folder / "data", 12), folder / "run"
    assert main(["train", f"--data={data}", "--steps=12", "--batch_size=4", *TINY, f"--run={run}"]) == 0
    return folder


def test_a_run_captions_in_two_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioner = Captioner.from_pretrained(folder / "run")
    paths = sorted((folder / "data").glob("*.png"))[:4]
    expected = [captioner(path) for path in paths]
    assert len(set(expected)) > 1 or len(set(captioner(paths, temperature=1.0))) > 1
    capsys.readouterr()
    assert main(["caption", str(folder / "run"), *map(str, paths)]) == 0
    assert [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()] == expected

    images = [Image.open(path) for path in paths]
    arrays = [np.array(image) for image in images]
    assert captioner(images) == captioner(arrays) == captioner(tuple(map(str, paths))) == expected
    assert captioner(images[0]) == captioner(arrays[0]) == captioner(str(paths[0])) == expected[0]
    assert ["".join(captioner.stream(image)) for image in images] == expected
    assert captioner([]) == []
    assert captioner(paths, beams=2) == [captioner(path, beams=2) for path in paths]
    found = captioner.inputs(paths)
    assert torch.equal(found, torch.stack([captioner.preprocessing.read(path) for path in paths]))
    assert torch.equal(captioner.inputs(arrays), found)
    assert not torch.equal(captioner.inputs(arrays[::-1]), found)


def test_images_inside_the_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps=12", "--batch_size=4", *TINY, "--image_token=258", f"--run={tmp_path / 'run'}"]
    data = f"--data={folder / 'data'}"
    assert main(["train", data, *options]) == 2
    assert "image_token=258 must be a token id within 0..num_tokens-1=257" in capsys.readouterr().err
    assert main(["train", data, *options, "--num_tokens=259", "--max_seq_len=8"]) == 2
    assert re.search(r"has \d+ tokens, more than max_seq_len=8; 99% of the captions need", capsys.readouterr().err)
    assert main(["train", data, *options, "--num_tokens=259"]) == 0
    captioner = Captioner.from_pretrained(tmp_path / "run")
    paths = sorted((folder / "data").glob("*.png"))[:4]
    captions = captioner(paths)
    assert ["".join(captioner.stream(path)) for path in paths] == captions == [captioner(path) for path in paths]

    img, start = captioner.inputs(paths), torch.tensor([tokens.BOS, 258])
    ids = captioner.model.generate(img, start, eos_token=tokens.EOS, temperature=0.0)
    assert [tokens.decode(row) for row in ids.tolist()] == captions
    first = captioner.model.score(img, start, ids[:, :1])
    assert not torch.allclose(captioner.model.score(img.flip(0), start, ids[:, :1]), first)  # it looks at the image


def test_many_images_are_captioned_in_several_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = Captioner.from_pretrained(folder / "run")
    paths = sorted((folder / "data").glob("*.png"))
    expected, sizes = captioner(paths), list[int]()
    encode = captioner.model.encode

    def counted(img: torch.Tensor) -> torch.Tensor:
        sizes.append(len(img))
        return encode(img)

    monkeypatch.setattr("palme_xt.captioner.caption.CAPTIONED_AT_ONCE", 5)
    monkeypatch.setattr(captioner.model, "encode", counted)
    assert captioner(paths) == expected
    assert sizes == [5, 5, 2]


def test_grey_images_without_a_channel_axis() -> None:
    model = small(vit_kwargs={"channels": 1})
    captioner = Captioner(model, Preprocessing.plain(model.config))
    size = model.config.image_size
    grey = np.linspace(0, 255, size * size).reshape(size, size).astype(np.uint8)
    assert torch.equal(captioner.inputs([grey])[0, 0], torch.from_numpy(grey) / 255)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.png", ImageError, r"nowhere.png cannot be read: No such file or directory"),
        (
            np.zeros((8, 8, 3)),
            TypeError,
            r"images holds a float64 array, must hold paths, Pillow images or uint8 arr.*",
        ),
        (torch.zeros(3, 8, 8), TypeError, r"images holds a Tensor, must hold paths, .*"),
        (None, TypeError, r"images holds a NoneType, must hold paths, .*"),
    ],
)
def test_what_is_no_image(image: Any, error: type[Exception], message: str) -> None:
    model = small()
    captioner = Captioner(model, Preprocessing.like_clip(model.config))
    for images in image, [image]:
        with pytest.raises(error, match=message):
            captioner(images)
    with pytest.raises(error, match=message):
        captioner.stream(image)


def test_folders_that_are_no_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is not a run folder: there is no such folder"):
        Captioner.from_pretrained(tmp_path / "none")


def test_the_code_on_the_card_captions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shutil.copy(folder / "data" / "000.png", "image.png")
    (code,) = re.findall(r"```python\n(from palme_xt.captioner .*?)```", model_card(small().config), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", "run").replace('captioner("image.png")', 'said = captioner("image.png")'), names)
    assert names["said"] == Captioner.from_pretrained("run")("image.png")
